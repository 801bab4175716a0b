"""The configs of the TPU slices: each is the published run, fills its slice, and spreads all of its state evenly."""

import importlib
import math

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from configs import base, tpu_shared
from safegrpo_jax import config as config_lib
from safegrpo_jax.models.qwen_vl import PUBLISHED_SIZES, init_params
from safegrpo_jax.plan.topology import CHIPS, generation_of
from safegrpo_jax.sharding import param_shardings

NAMES = ("tpu_v4", "tpu_v5e", "tpu_v5p", "tpu_v6e")
# What a slice changes. Anything else would change what is learned.
OF_A_SLICE = {
    "pretrain.batch_size", "cold_start.batch_size", "evaluation.batch_size",
    "mesh", "model.size", "model.attention", "model.experts", "model.logits_chunk", "policy_update.num_microbatches",
    "sampling.num_slots", "sampling.min_slots", "sampling.cache_buckets",
}  # fmt: skip
OF_QWEN2_5 = {f"processor.{key}" for key in ("patch_size", "position_table_side", "image_mean", "image_std")} | {
    "processor.min_pixels",
    "processor.max_pixels",
}
NEAR_IDEAL = 1.05  # of the bytes that every device would hold if all divided evenly


def values(name, size):
    return importlib.import_module(f"configs.{name}").get_config(size)


@pytest.mark.parametrize("size", tpu_shared.SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_is_the_published_run_on_its_slice(name, size):
    config = config_lib.from_config_dict(values(name, size))
    chosen = importlib.import_module(f"configs.{name}").SLICES[size]
    assert generation_of(chosen.topology) == name.removeprefix("tpu_")
    chips = math.prod(int(side) for side in chosen.topology.partition(":")[2].split("x"))
    assert math.prod(config.mesh.axis_sizes.values()) == chips
    assert math.prod(config.mesh.sampling_axis_sizes.values()) == chips
    text = PUBLISHED_SIZES[config.model.size].text
    assert text.num_heads % config.mesh.sampling_axis_sizes["tensor"] == 0
    assert config_lib.num_blocks(config) == config.train.prompts_per_step, "one prompt a part and microbatch"
    ours, published = values(name, size).to_dict(), base.get_config().to_dict()
    changed = {
        f"{section}.{key}"
        for section, keys in published.items()
        if isinstance(keys, dict) and section not in OF_A_SLICE
        for key in keys
        if ours[section][key] != keys[key]
    }
    assert changed <= OF_A_SLICE | (OF_QWEN2_5 if size == "2_5_7b" else set())


@pytest.mark.parametrize("size", tpu_shared.SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_state_is_spread_evenly(name, size):
    """Parameters alone: moments lie like them. The one thing that may be repeated is a key head."""
    config = config_lib.from_config_dict(values(name, size))
    model = PUBLISHED_SIZES[config.model.size]
    abstract = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    sizes = config.mesh.axis_sizes
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    placed = param_shardings(abstract, mesh, config=config.sharding)
    held = sum(
        np.prod(sharding.shard_shape(leaf.shape))
        for leaf, sharding in zip(jax.tree.leaves(abstract), jax.tree.leaves(placed), strict=True)
    )
    ideal = sum(leaf.size for leaf in jax.tree.leaves(abstract)) / math.prod(sizes.values())
    assert held <= NEAR_IDEAL * ideal
    gigabytes = 12 * held / 1e9  # float32 parameters and two moments
    assert gigabytes < 0.5 * CHIPS[name.removeprefix("tpu_")].hbm_bytes / 1e9


def test_an_unknown_model_is_refused():
    with pytest.raises(ValueError, match=r"configs/tpu_v4.py:9b: give a model as argument, one of 4b, 8b"):
        values("tpu_v4", "9b")


def test_training_wants_the_checkpoint_of_the_size(tmp_path):
    from safegrpo_jax.run import build_run

    config = config_lib.from_config_dict(values("tpu_v4", "8b"))
    with pytest.raises(ValueError, match="config.model.path is empty"):
        build_run(config, tmp_path, ())
    with pytest.raises(ValueError, match=r"has vision deepstack_layers .*, the checkpoint in .*; name the size"):
        config_lib.check_size(PUBLISHED_SIZES["qwen3-vl-4b"], config.model)
    config_lib.check_size(PUBLISHED_SIZES["qwen3-vl-8b"], config.model)
    unknown = values("tpu_v4", "8b")
    unknown.model.size = "qwen3-vl-9b"
    with pytest.raises(ValueError, match="did you mean 'qwen3-vl-"):
        config_lib.from_config_dict(unknown)
