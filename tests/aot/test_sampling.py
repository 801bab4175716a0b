"""Ahead of time, 16 chips, the 8B model: sampling fits beside the trainer's state and copies no cache.

Compiled by libtpu for TPUs that are not there; nothing runs. The bars are those of a decode step that reads what it
needs and little else: bad layouts of the cache show as temporaries of its size, or as most of the cycles in copies.
"""

import jax
import pytest

from configs import tpu_v4, tpu_v5e
from safegrpo_jax import config as config_lib
from safegrpo_jax.plan.compile import compile_entry
from safegrpo_jax.plan.entries import abstract_programs, bytes_per_device, list_entries, planned_model
from safegrpo_jax.plan.topology import describe
from safegrpo_jax.sharding import make_mesh

pytest.importorskip("libtpu")

LARGEST_SHARE_OF_HBM = 0.92
LARGEST_TEMPORARIES = 0.06  # of the bytes of the cache
SMALLEST_ALIASED = 0.999  # of the donated bytes
LARGEST_COPY_SHARE = 0.15  # of the estimated cycles


def sixteen_v5e():
    """The model's configuration is for 64 chips; on 16 there is room for fewer slots."""
    values = tpu_v5e.get_config("8b")
    values.mesh.fsdp, values.mesh.tensor, values.mesh.sampling_tensor = 4, 4, 8
    values.policy_update.num_microbatches = 16
    values.sampling.num_slots, values.sampling.min_slots = 64, 16
    return values


SLICES = {"v4:2x2x4": lambda: tpu_v4.get_config("8b"), "v5e:4x4": sixteen_v5e}


@pytest.fixture(scope="module", params=SLICES)
def sampling(request):
    """(chip, {name: (entry, plan)}) of the programs of sampling."""
    topology = describe(request.param)
    config = config_lib.from_config_dict(SLICES[request.param]())
    model = planned_model(config)
    chosen = ("encode", "prefill", "decode")
    with jax.default_matmul_precision("default"):  # the tests' "highest" is for CPUs; a run on a TPU does not set it
        programs = abstract_programs(config, model, make_mesh(config.mesh.axis_sizes, topology.devices))
        entries = [entry for entry in list_entries(config, model, programs) if entry.name in chosen]
        return topology.chip, {entry.name: (entry, compile_entry(entry)) for entry in entries}


def test_fits_beside_the_state_of_training(sampling):
    chip, compiled = sampling
    assert compiled.keys() == {"encode", "prefill", "decode"}
    for name, (_, plan) in compiled.items():
        assert {"policy", "optimizer state", "reference"} <= plan.resident.keys()
        assert not plan.refusal and plan.total_bytes <= LARGEST_SHARE_OF_HBM * chip.hbm_bytes, (name, plan)


def test_decoding_makes_no_second_cache(sampling):
    entry, plan = sampling[1]["decode"]
    _, state, private, pool, *_ = entry.arguments
    assert plan.temporary_bytes <= LARGEST_TEMPORARIES * bytes_per_device((private, pool))
    assert plan.alias_bytes >= SMALLEST_ALIASED * bytes_per_device((state, private))


def test_decoding_spends_little_on_copies(sampling):
    _, plan = sampling[1]["decode"]
    assert 0 < plan.traffic.copy_cycles <= LARGEST_COPY_SHARE * plan.traffic.cycles
    # A step of tensor-parallel parts adds up activations; no weight and no cache travels.
    assert plan.traffic.collectives["all-gather"] < 1e6
