"""The scan compiles ahead of time for TPU slices, without a collective; skips where libtpu is not installed.

`pip install libtpu` lets it run on any machine; `tests/benchmarks/rewards_tpu_compile.py` tells the seconds.
"""

import importlib.util

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from safegrpo_jax.rewards import spans as reward_spans
from safegrpo_jax.rewards.automaton import build_tables

ROLLOUTS, TOKENS = 2048, 4096
TOPOLOGIES = {
    "v4": {"topology_name": "v4:2x2x4", "chip_config_name": "megacore", "chips_per_host_bounds": (2, 2, 1)},
    "v5e": {"topology_name": "v5e:4x4", "chip_config_name": "default", "chips_per_host_bounds": (2, 2, 1)},
}
ENVIRONMENT = {  # libtpu is to describe a slice, not to look for one
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")


def lower_scan(generation: str, tables) -> jax.stages.Lowered:
    """The scan over rollouts spread over all chips of a slice of that generation, not yet compiled."""
    described = topologies.get_topology_desc(platform="tpu", num_slices=1, **TOPOLOGIES[generation])
    mesh = Mesh(np.array(described.devices), ("data",), axis_types=(AxisType.Auto,))
    rows, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    tables = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), tables)
    ids, mask = (jax.ShapeDtypeStruct((ROLLOUTS, TOKENS), dtype, sharding=rows) for dtype in (np.int32, bool))
    return jax.jit(reward_spans.scan, out_shardings=rows).lower(tables, ids, mask)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("generation", TOPOLOGIES)
@pytest.mark.parametrize("rule_set", ["reference", "strict"])
def test_scan_compiles_without_collectives(generation, rule_set, small_bytes, monkeypatch):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    compiled = lower_scan(generation, build_tables(rule_set, small_bytes)).compile()
    text = compiled.as_text()
    assert not [name for name in COLLECTIVES if name in text]
    per_chip = ROLLOUTS * TOKENS * 5 // 16  # ids and mask of a chip's rollouts
    assert compiled.memory_analysis().argument_size_in_bytes < per_chip + 2**21
