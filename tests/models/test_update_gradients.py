"""One gradient, whatever way it is computed: packed or padded, cut, sharded, rematerialised, in chunks, reordered.

A tiny Qwen3-VL with images. The gradients are those of the whole objective, KL and entropy included, taken from the
update itself by an optimizer that only keeps them.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from qwen_tiny import END, IMAGE, START, build_prompts, pack_images, random_params, tiny_config

from safegrpo_jax.grpo.loss import LossConfig
from safegrpo_jax.grpo.packing import PackingConfig, count_tokens, image_rows_of, pack_rollouts
from safegrpo_jax.grpo.update import UpdateConfig, packed_logps, update_policy
from safegrpo_jax.policy import make_logps_fn
from safegrpo_jax.sharding import make_mesh, param_shardings, shard_batch
from safegrpo_jax.types import Experience, TrainState

SAME_GRADIENT = 1e-5  # relative to the largest of the parameter: float32 sums in another order
SAME_LOGPS = 1e-5  # absolute, of numbers around -5
QUICK = {"xla_backend_optimization_level": 0}  # most of these tests is compilation
B, G, C, WIDTH, TEMPERATURE = 8, 2, 10, 16, 0.8
GRIDS = [[(4, 6)], [(2, 4), (4, 4)], [(6, 2)], [], [(4, 4)], [(2, 2)], [(4, 6)], [(2, 10)]]
CONFIG = tiny_config(scan_layers=True)
BANNED = np.isin(np.arange(100), [IMAGE, START, END])
LOSS = LossConfig(kl_coefficient=0.1, entropy_coefficient=0.05)


class Seen(NamedTuple):
    """The optimizer state of `keep_gradient`: what the update gave it."""

    grads: dict
    learning_rate: jax.Array


keep_gradient = optax.GradientTransformation(
    lambda params: Seen(jax.tree.map(jnp.zeros_like, params), jnp.float32(0)),
    lambda grads, state, params: (jax.tree.map(jnp.zeros_like, params), Seen(grads, jnp.float32(0))),
)


@functools.cache
def make_experience():
    """Eight prompts of other lengths with none, one or two images, two responses each, lengths 1 to C."""
    rng = np.random.default_rng(0)
    rows = []
    for u, grids in enumerate(GRIDS):
        images = [part for number in range(len(grids)) for part in (START, (u, number), END)]
        rows.append([*rng.integers(1, 80, 1 + u % 3).tolist(), *images, *rng.integers(1, 80, 2).tolist()])
    prompts = build_prompts(rows, pack_images(GRIDS, row_len=32, seed=1), GRIDS, WIDTH)
    lengths = np.array([1, C, 3, 7, 2, 2, 9, 4, 5, 6, C, 8, 1, 3, 7, 5])
    mask = np.arange(C) < lengths[:, None]

    def noise(scale):
        return np.where(mask, rng.normal(-4, scale, mask.shape), 0).astype(np.float32)

    return Experience(
        prompts=prompts,
        completion_ids=rng.integers(1, 80, mask.shape).astype(np.int32),
        completion_mask=mask,
        behavior_logps=noise(0.5),
        proximal_logps=noise(0.5),
        reference_logps=noise(0.5),
        advantages=np.where(mask, rng.normal(size=(B * G, 1)), 0).astype(np.float32),
    )


def make_packing(config, num_minibatches=1, num_shards=1):
    experience = make_experience()
    prompts = experience.prompts
    return pack_rollouts(
        prompts.prompt_mask.sum(1),
        experience.completion_mask.sum(1),
        WIDTH,
        image_rows_of(prompts.vision_mask, prompts.feature_index, 32),
        B,
        config,
        num_minibatches,
        num_shards,
    )


def make_update(share=False, chunk=0, batch_axes=(), cuts=UpdateConfig(), **execution):  # noqa: B008
    config = tiny_config(**{"scan_layers": True, **execution})
    step = functools.partial(
        update_policy,
        logps_fn=make_logps_fn(config, BANNED, TEMPERATURE, chunk, False, share, batch_axes),
        optimizer=keep_gradient,
        loss=LOSS,
        update=dataclasses.replace(cuts, batch_axes=batch_axes),
    )
    return jax.jit(lambda state, experience, packing: step(state, experience, None, packing), compiler_options=QUICK)


def start(params):
    return TrainState(jnp.int32(0), params, keep_gradient.init(params))


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG)


@pytest.fixture(scope="module")
def padded(params):
    """(gradient, metrics) of padded rows on one device."""
    state, metrics = make_update()(start(params), make_experience(), None)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(state.opt_state.grads["vision"]["blocks"]))
    return state.opt_state.grads, metrics


def assert_same(result, expected):
    (state, metrics), (grads, expected_metrics) = result, expected

    def close(path, actual, wanted):
        limit = SAME_GRADIENT * float(np.abs(wanted).max())
        np.testing.assert_allclose(actual, wanted, atol=limit, rtol=0, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(close, state.opt_state.grads, grads)
    assert metrics.keys() == expected_metrics.keys()
    for name, value in expected_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("share", [False, True], ids=["separate", "shared"])
def test_gradient_and_metrics_are_those_of_padded_rows(share, params, padded):
    packing = make_packing(PackingConfig(64, 1, share))
    used = packing.rollout_mask.any(-1)
    assert used.sum() > 2 and (packing.segment_ids.max(-1) > 1).any(), "several rows of several rollouts"
    assert not share or (packing.prefix_ids != packing.segment_ids).any()
    assert_same(make_update(share)(start(params), make_experience(), packing), padded)


@pytest.mark.parametrize("num_microbatches", [2, 4])
def test_microbatches_add_up(num_microbatches, params, padded):
    update = make_update(cuts=UpdateConfig(num_microbatches=num_microbatches))
    assert_same(update(start(params), make_experience(), None), padded)


@pytest.mark.parametrize(
    "settings",
    [
        {"remat": True},
        {"scan_layers": False},
        {"chunk": 3},
        {"chunk": 10},
        {"share": True},
        {"share": True, "cuts": UpdateConfig(num_microbatches=4)},
    ],
    ids=["remat", "unrolled", "chunk-3", "chunk-10", "shared", "shared-4"],
)
def test_ways_of_execution_give_one_gradient(settings, params, padded):
    assert_same(make_update(**settings)(start(params), make_experience(), None), padded)


def test_the_order_of_rollouts_is_irrelevant(params, padded):
    """Samples change places within their groups, and prompts with their images within the batch."""
    rng = np.random.default_rng(3)
    order = rng.permutation(B)
    rows = np.concatenate([prompt * G + rng.permutation(G) for prompt in order])
    experience = make_experience()
    prompts = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf[:, order] if path[-1].name == "positions" else leaf[order], experience.prompts
    )
    moved = prompts.feature_index + (np.arange(B) - order)[:, None] * 8  # 32 patches a packing row, one row a prompt
    prompts = dataclasses.replace(prompts, feature_index=np.where(prompts.vision_mask, moved, 0).astype(np.int32))
    fields = {field.name: getattr(experience, field.name) for field in dataclasses.fields(Experience)}
    shuffled = Experience(**{name: prompts if name == "prompts" else value[rows] for name, value in fields.items()})
    assert_same(make_update()(start(params), shuffled, None), padded)


@pytest.mark.parametrize("share", [False, True], ids=["separate", "shared"])
@pytest.mark.parametrize("is_packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("axes", [{"data": 8}, {"fsdp": 4, "tensor": 2}], ids=["8", "4x2"])
def test_meshes_give_the_gradient_of_one_device(axes, is_packed, share, params, padded):
    mesh, packing = make_mesh(axes), None
    batch_axes = tuple(name for name in ("data", "fsdp") if name in axes)
    if is_packed:
        packing = make_packing(PackingConfig(28, 8, share), num_shards=mesh.size // axes.get("tensor", 1))
        assert share or len(packing.rollout) > 1, "several blocks"
    with jax.set_mesh(mesh):
        state = start(jax.device_put(params, param_shardings(params, mesh)))
        experience = shard_batch(make_experience(), mesh)
        result = make_update(share, batch_axes=batch_axes)(state, experience, packing)
    assert_same(result, padded)


def test_two_minibatches_use_their_own_images(params):
    """The last gradient kept is that of the second half of the batch."""
    packing = make_packing(PackingConfig(64, 1, True), num_minibatches=2)
    cuts = UpdateConfig(num_minibatches=2)
    state, metrics = make_update(cuts=cuts)(start(params), make_experience(), None)
    packed = make_update(True, cuts=cuts)(start(params), make_experience(), packing)
    assert_same(packed, (state.opt_state.grads, metrics))


@pytest.mark.parametrize("share", [False, True], ids=["separate", "shared"])
def test_log_probabilities_are_those_of_padded_rows(share, params):
    experience = make_experience()
    tokens = (experience.prompts, experience.completion_ids, experience.completion_mask)
    logps_fn = make_logps_fn(CONFIG, BANNED, TEMPERATURE, 0, True, share)
    expected, _ = jax.jit(logps_fn, compiler_options=QUICK)(params, *tokens)
    packed = jax.jit(functools.partial(packed_logps, logps_fn=logps_fn, num_minibatches=2), compiler_options=QUICK)
    actual = packed(params, *tokens, make_packing(PackingConfig(64, 2, share), num_minibatches=2))
    np.testing.assert_allclose(actual, expected, atol=SAME_LOGPS)
    assert (np.asarray(actual)[~experience.completion_mask] == 0).all() and np.abs(expected).max() > 1


def test_shared_prompts_cost_fewer_tokens():
    real = [count_tokens(make_packing(PackingConfig(64, 1, share)))[0] for share in (False, True)]
    assert real[1] < 0.8 * real[0]


def test_the_splash_kernel_refuses_shared_prompts(params):
    packing = make_packing(PackingConfig(64, 1, True))
    with pytest.raises(ValueError, match="attention 'splash' cannot share prompts"):
        make_update(True, attention="splash")(start(params), make_experience(), packing)
