"""The sampler on a tiny Qwen3-VL with images: the same tokens for any number of slots and on any mesh."""

import functools

import jax
import numpy as np
import pytest
from qwen_tiny import END, IMAGE, START, VIDEO, build_prompts, pack_images, random_params, tiny_config

from safegrpo_jax.programs import model_functions
from safegrpo_jax.rewards.automaton import build_tables
from safegrpo_jax.sampling.rollout import Placement, Sampler, SamplingConfig
from safegrpo_jax.sharding import make_mesh, param_shardings, shard_batch

LOGP_TOLERANCE = 1e-5  # float32 sums in another order
GRIDS = [[grid] for grid in [(2, 4), (4, 4), (6, 2), (2, 2), (4, 6), (2, 6), (6, 4), (4, 2)]]  # one image a packing row
CONFIG = tiny_config()
STOP = 7


def make_prompts():
    """Eight prompts of 3 to 14 tokens; the fourth and the eighth leave their image out."""
    rows = [
        [5 + row, *([] if row % 4 == 3 else [START, (row, 0), END]), *range(20 + row, 22 + 2 * row)] for row in range(8)
    ]
    return build_prompts(rows, pack_images(GRIDS, row_len=24), GRIDS, length=28)


@functools.cache
def make_params():
    """The spread of a trained model: tokens depend on what was said and seen."""
    params = random_params(CONFIG)

    def spread(path, leaf):
        return leaf if path[-1].key in ("scale", "bias") else 5 * leaf

    return jax.tree_util.tree_map_with_path(spread, params)


def make_sampler(mesh_axes=(("data", 1),), **sizes):
    axes = dict(mesh_axes)
    mesh = make_mesh(axes, jax.devices()[: int(np.prod(list(axes.values())))])
    head_axis = "tensor" if "tensor" in axes else None
    return Sampler(
        model_functions(CONFIG),
        SamplingConfig(group_size=4, max_new_tokens=10, **sizes),
        Placement(mesh, ("data",), head_axis),
        np.isin(np.arange(CONFIG.text.vocab_size), (IMAGE, VIDEO, START, END)),
        (STOP,),
        build_tables("reference", [b"%d" % token for token in range(CONFIG.text.vocab_size)]),
    )


def generate(sampler, prompts):
    mesh = sampler.placement.mesh
    params = jax.device_put(make_params(), param_shardings(make_params(), mesh))
    rollouts, stats = sampler.generate(params, shard_batch(prompts, mesh), jax.random.key(2))
    return jax.device_get(rollouts), stats


def sample(mesh_axes=(("data", 1),), **sizes):
    return generate(make_sampler(mesh_axes, **sizes), make_prompts())


@pytest.fixture(scope="module")
def expected():
    rollouts, _ = sample()
    assert 0 < rollouts.truncated.sum() < 32 and len(set(rollouts.completion_ids.reshape(-1))) > 20
    return rollouts


@pytest.mark.parametrize("num_slots", [1, 7, 64])
def test_tokens_do_not_depend_on_slots(expected, num_slots):
    rollouts, stats = sample(num_slots=num_slots, num_prefixes=2 if num_slots < 8 else 0, cache_buckets=(3, 6))
    np.testing.assert_array_equal(rollouts.completion_ids, expected.completion_ids)
    np.testing.assert_allclose(rollouts.behavior_logps, expected.behavior_logps, atol=LOGP_TOLERANCE)
    assert stats["sampler/prefill_prompts"] == 8


@pytest.mark.parametrize("mesh_axes", [(("data", 8),), (("data", 4), ("tensor", 2))], ids=str)
def test_tokens_do_not_depend_on_the_mesh(expected, mesh_axes):
    rollouts, _ = sample(mesh_axes, num_slots=8, num_prefixes=8)
    np.testing.assert_array_equal(rollouts.completion_ids, expected.completion_ids)
    np.testing.assert_allclose(rollouts.behavior_logps, expected.behavior_logps, atol=LOGP_TOLERANCE)


def test_images_are_encoded_once_for_all_prefills_and_samples(expected):
    sampler = make_sampler(num_slots=4, num_prefixes=2, prefill_batch=1)
    calls = {"encode": [], "prefill": []}

    def counted(name):
        program = getattr(sampler, name)

        def call(params, prompts, *rest):
            calls[name].append(len(prompts.images.patches))
            return program(params, prompts, *rest)

        return call

    sampler.encode, sampler.prefill = counted("encode"), counted("prefill")
    rollouts, _ = generate(sampler, make_prompts())
    assert calls["encode"] == [len(GRIDS)] and len(calls["prefill"]) == 8
    np.testing.assert_array_equal(rollouts.completion_ids, expected.completion_ids)


def test_a_batch_of_text_alone(expected):
    """The two prompts without an image, with nothing but padding where images would be."""

    def take(path, leaf):
        if path[0].name == "images":
            return np.zeros_like(leaf)
        return leaf[:, [3, 7]] if path[-1].name == "positions" else leaf[[3, 7]]

    prompts = jax.tree_util.tree_map_with_path(take, make_prompts())
    rollouts, _ = generate(make_sampler(), prompts)
    rows = np.concatenate([np.arange(12, 16), np.arange(28, 32)])
    np.testing.assert_array_equal(rollouts.completion_ids, expected.completion_ids[rows])
