"""Mesh, parameter rules on the published sizes, and host batches placed over the data axes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from safegrpo_jax.models.qwen_vl import PUBLISHED_SIZES, init_params
from safegrpo_jax.sharding import (
    QWEN_VL_RULES,
    ShardingConfig,
    batch_sharding,
    make_mesh,
    param_shardings,
    shard_batch,
)
from safegrpo_jax.types import Labels, PackedImages, Prompts, VisionFeatures


@pytest.fixture(scope="module")
def shapes():
    return jax.eval_shape(lambda key: init_params(PUBLISHED_SIZES["qwen3-vl-8b"], key), jax.random.key(0))


def spec_of(tree, path):
    for key in path.split("/"):
        tree = tree[key]
    return tree.spec


def test_mesh_axes_are_auto():
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    assert mesh.shape == {"data": 2, "fsdp": 2, "tensor": 2}
    assert mesh.axis_types == (AxisType.Auto,) * 3
    assert make_mesh({"data": 2}, jax.devices()[:2]).size == 2
    with pytest.raises(ValueError, match="need 6 devices, there are 8"):
        make_mesh({"data": 6})


def test_published_parameters_are_placed(shapes):
    placed = param_shardings(shapes, make_mesh({"data": 2, "fsdp": 2, "tensor": 2}))
    expected = {
        "text/embed": PartitionSpec("tensor", "fsdp"),
        "text/lm_head/kernel": PartitionSpec("fsdp", "tensor"),
        "text/layers/q/kernel": PartitionSpec(None, "fsdp", "tensor", None),
        "text/deepstack_layers/k/kernel": PartitionSpec(None, "fsdp", "tensor", None),
        "text/layers/o/kernel": PartitionSpec(None, "tensor", None, "fsdp"),
        "text/layers/mlp/gate/kernel": PartitionSpec(None, "fsdp", "tensor"),
        "text/layers/mlp/down/kernel": PartitionSpec(None, "tensor", "fsdp"),
        "text/layers/q_norm/scale": PartitionSpec(),
        "vision/blocks/stage_0/qkv/kernel": PartitionSpec(None, "fsdp", None, "tensor", None),
        "vision/blocks/stage_0/proj/kernel": PartitionSpec(None, "tensor", None, "fsdp"),
        "vision/pos_table": PartitionSpec(),
    }
    assert {path: spec_of(placed, path) for path in expected} == expected
    assert jax.tree.structure(placed) == jax.tree.structure(shapes)


@pytest.mark.parametrize("name", PUBLISHED_SIZES)
def test_every_parameter_of_every_size_has_one_rule(name):
    """On a pod slice with every kind of axis; few key heads are the only thing that may be replicated."""
    shapes = jax.eval_shape(lambda key: init_params(PUBLISHED_SIZES[name], key), jax.random.key(0))
    for key_path, _ in jax.tree_util.tree_leaves_with_path(shapes):
        path = jax.tree_util.keystr(key_path, simple=True, separator="/")
        assert sum(re.fullmatch(pattern, path) is not None for pattern, _ in QWEN_VL_RULES) == 1, path
    placed = param_shardings(shapes, make_mesh({"fsdp": 2, "expert": 2, "tensor": 2}))
    split = {sharding.spec for sharding in jax.tree.leaves(placed["text"])}
    if PUBLISHED_SIZES[name].text.num_experts:
        assert {
            PartitionSpec(None, "expert", "fsdp", None, "tensor"),
            PartitionSpec(None, "expert", "tensor", "fsdp"),
        } <= split
    else:
        assert {PartitionSpec(None, "fsdp", "tensor"), PartitionSpec(None, "tensor", "fsdp")} <= split
    kept = sum(leaf.size for leaf in jax.tree.leaves(shapes["text"]))
    on_device = sum(
        np.prod(sharding.shard_shape(leaf.shape))
        for leaf, sharding in zip(jax.tree.leaves(shapes["text"]), jax.tree.leaves(placed["text"]), strict=True)
    )
    assert on_device < 0.26 * kept  # four or eight parts of everything but norms, biases and routers


def test_few_key_heads_are_replicated_and_absent_axes_ignored(shapes):
    small = {"text": {"layers": {"k": {"kernel": jax.ShapeDtypeStruct((36, 64, 2, 16), jnp.float32)}}}}
    placed = param_shardings(small, make_mesh({"data": 2, "tensor": 4}))
    assert spec_of(placed, "text/layers/k/kernel") == PartitionSpec(None, None, None, None)
    placed = param_shardings(shapes, make_mesh({"data": 8}))
    assert all(sharding.is_fully_replicated for sharding in jax.tree.leaves(placed))
    renamed = param_shardings(shapes, make_mesh({"model": 8}), config=ShardingConfig(mlp="model", vocab=None))
    assert spec_of(renamed, "text/layers/mlp/gate/kernel") == PartitionSpec(None, None, "model")


def test_refused_parameters():
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})

    def place(path, shape):
        tree = jax.ShapeDtypeStruct(shape, jnp.float32)
        for key in reversed(path.split("/")):
            tree = {key: tree}
        return param_shardings(tree, mesh)

    with pytest.raises(ValueError, match="text/adapter/kernel .* has no sharding rule"):
        place("text/adapter/kernel", (4, 4))
    with pytest.raises(ValueError, match="text/embed has 3 axes"):
        place("text/embed", (4, 4, 4))
    with pytest.raises(ValueError, match="vocab 5 is not divisible by mesh axis tensor = 2"):
        place("text/embed", (5, 4))
    assert place("text/embed", (4, 4))  # the rules themselves accept a sound one


def test_first_rule_wins():
    mesh = make_mesh({"tensor": 8})
    tree = {"text": {"embed": jax.ShapeDtypeStruct((8, 8), jnp.float32)}}
    placed = param_shardings(tree, mesh, rules=((r"text/embed", (None, "mlp")), *QWEN_VL_RULES))
    assert placed["text"]["embed"].spec == PartitionSpec(None, "tensor")


def test_batch_sharding_uses_the_data_axes_there_are():
    assert batch_sharding(make_mesh({"data": 4, "fsdp": 2})).spec == PartitionSpec(("data", "fsdp"))
    assert batch_sharding(make_mesh({"data": 4, "tensor": 2})).spec == PartitionSpec(("data",))
    assert batch_sharding(make_mesh({"tensor": 8})).spec == PartitionSpec(None)


def host_prompts(b):
    rows = np.arange(b, dtype=np.int32)
    ids = rows[:, None] * 10 + np.arange(6, dtype=np.int32)
    images = PackedImages(
        np.zeros((b, 8, 4), np.float32),
        np.zeros((b, 8, 2), np.int32),
        np.zeros((b, 8, 4), np.int32),
        np.zeros((b, 8, 4), np.float32),
        np.ones((b, 8), np.int32),
    )
    labels = Labels(rows, rows, rows, np.ones(b, bool))
    positions = np.stack([ids, ids + 1, ids + 2])
    return Prompts(ids, ids >= 0, positions, rows, ids > 2, ids * 0, rows, images, labels)


def test_batches_are_split_by_prompt():
    mesh = make_mesh({"data": 4, "tensor": 2})
    host = host_prompts(8)
    placed = shard_batch({"prompts": host, "step": np.int32(3)}, mesh)
    assert placed["prompts"].prompt_ids.addressable_shards[0].data.shape == (2, 6)
    assert placed["prompts"].positions.sharding.spec == PartitionSpec(None, ("data",))
    assert placed["prompts"].positions.addressable_shards[0].data.shape == (3, 2, 6)
    assert placed["prompts"].images.patches.addressable_shards[0].data.shape == (2, 8, 4)
    assert placed["step"].sharding.is_fully_replicated
    jax.tree.map(np.testing.assert_array_equal, placed["prompts"], host)
    features = shard_batch(VisionFeatures(np.zeros((8, 5)), np.zeros((3, 8, 5))), mesh)
    assert features.main.addressable_shards[0].data.shape == (2, 5)
    assert features.deepstack.addressable_shards[0].data.shape == (3, 2, 5)


def test_uneven_batches_are_refused():
    with pytest.raises(ValueError, match=r"prompt_ids \(6, 6\): axis 0 is not divisible into 4"):
        shard_batch(host_prompts(6), make_mesh({"data": 4, "tensor": 2}))
