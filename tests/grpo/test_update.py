"""The update with a toy model: an embedding, image features spliced into the prompt, and a linear head."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from safegrpo_jax.grpo.logps import token_logps
from safegrpo_jax.grpo.loss import LossConfig
from safegrpo_jax.grpo.optimizer import OptimizerConfig, make_optimizer
from safegrpo_jax.grpo.update import UpdateConfig, slice_prompts, update_policy, update_supervised
from safegrpo_jax.types import Demonstrations, Experience, Labels, PackedImages, Prompts, TrainState

B, G, P, C, V, D = 16, 2, 5, 6, 11, 4
PATCHES, X = 8, 3  # per packing row, one row and two merged tokens per prompt
SAME_GRADIENT = 1e-6  # absolute, on parameters of order 0.1: only the order of sums differs
FLOAT64_AGREEMENT = 2e-6  # absolute, after SGD steps in float32

# Most of these tests is compilation; the toy needs no optimised machine code.
QUICK = {"xla_backend_optimization_level": 0}

KL_COEFFICIENT = 0.4  # of the state, which only an adapting coefficient reads
LOSS = LossConfig(kl_coefficient=0.1, entropy_coefficient=0.05, replay_weight=0.5)


def init_params():
    rng = np.random.default_rng(0)
    shapes = {"vision": {"kernel": (X, D)}, "text": {"embedding": (V, D), "head": (D, V)}}
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(0, 0.5, shape), jnp.float32),
        shapes,
        is_leaf=lambda s: isinstance(s, tuple),
    )


def logps_fn(params, prompts, completion_ids, completion_mask, chunk_size=0):
    """A token depends on the token before it and on the mean of its prompt, images included."""
    patches = prompts.images.patches.reshape(-1, 4, X).mean(1)
    features = patches @ params["vision"]["kernel"]
    embedded = params["text"]["embedding"][prompts.prompt_ids]
    embedded = jnp.where(prompts.vision_mask[..., None], features[prompts.feature_index], embedded)
    embedded = embedded * prompts.prompt_mask[..., None] + 0.01 * prompts.positions.sum(0)[..., None]
    group = completion_ids.shape[0] // prompts.prompt_ids.shape[0]
    context = jnp.repeat(embedded.mean(1), group, axis=0)
    last = jnp.repeat(prompts.prompt_ids[:, -1:], group, axis=0)
    before = jnp.concatenate([last, completion_ids[:, :-1]], axis=1)
    hidden = jnp.tanh(params["text"]["embedding"][before] + context[:, None])
    banned = jnp.arange(V) == V - 1
    return token_logps(
        lambda states: states @ params["text"]["head"], hidden, completion_ids, completion_mask, banned, 0.9, chunk_size
    )


def make_prompts(seed, num=B):
    rng = np.random.default_rng(seed)
    vision_mask = np.zeros((num, P), bool)
    vision_mask[:, 1:3] = True
    feature_index = np.where(vision_mask, np.arange(num)[:, None] * 2 + np.arange(P) - 1, 0).astype(np.int32)
    images = PackedImages(
        patches=rng.normal(size=(num, PATCHES, X)).astype(np.float32),
        patch_pos=np.zeros((num, PATCHES, 2), np.int32),
        tap_ids=np.zeros((num, PATCHES, 4), np.int32),
        tap_weights=np.zeros((num, PATCHES, 4), np.float32),
        segment_ids=np.ones((num, PATCHES), np.int32),
    )
    zeros = np.zeros(num, np.int32)
    return Prompts(
        prompt_ids=rng.integers(0, V - 1, (num, P)).astype(np.int32),
        prompt_mask=np.arange(P) >= rng.integers(0, 2, (num, 1)),
        positions=rng.integers(0, 9, (3, num, P)).astype(np.int32),
        rope_delta=zeros,
        vision_mask=vision_mask,
        feature_index=feature_index,
        record_ids=np.arange(num, dtype=np.int32),
        images=images,
        labels=Labels(visual=zeros, text=zeros, combined=zeros, tagged=np.ones(num, bool)),
    )


def make_experience(seed=1, num=B):
    rng = np.random.default_rng(seed)
    prompts = make_prompts(seed, num)
    n = num * G
    ids = rng.integers(0, V - 1, (n, C)).astype(np.int32)
    mask = np.arange(C) < rng.integers(0, C + 1, (n, 1))
    logps = np.asarray(logps_fn(init_params(), prompts, ids, mask)[0])
    advantages = np.broadcast_to(rng.normal(0, 1, (n, 1)), (n, C)).astype(np.float32)

    def moved(scale):
        return np.where(mask, logps + rng.normal(0, scale, (n, C)), 0).astype(np.float32)

    return Experience(
        prompts=prompts,
        completion_ids=ids,
        completion_mask=mask,
        behavior_logps=moved(0.3),
        proximal_logps=moved(0.2),
        reference_logps=moved(0.5),
        advantages=advantages,
    )


def make_demonstrations(seed=2, num=B):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, V - 1, (num, C)).astype(np.int32)
    return Demonstrations(make_prompts(seed, num), ids, np.arange(C) < rng.integers(1, C + 1, (num, 1)))


def make_sgd(mask=None):
    """Plain gradient descent would do; a large epsilon makes AdamW nearly that, so that rounding is not amplified."""
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.0, beta1=0.0, beta2=0.0, epsilon=1.0, clip_norm=0.0)
    return make_optimizer(config, mask)


def start(optimizer, params=None):
    params = init_params() if params is None else params
    return TrainState(jnp.int32(7), params, optimizer.init(params), jnp.int32(0), jnp.float32(KL_COEFFICIENT))


@functools.partial(jax.jit, static_argnames=("loss", "update", "mask_items"), compiler_options=QUICK)
def run(experience, replay=None, loss=LOSS, update=UpdateConfig(), mask_items=None):  # noqa: B008
    mask = None if mask_items is None else {"vision": {"kernel": mask_items[0]}, "text": dict(mask_items[1])}
    optimizer = make_sgd(mask)
    return update_policy(
        start(optimizer),
        experience,
        replay,
        logps_fn=logps_fn,
        optimizer=optimizer,
        loss=loss,
        update=update,
        trainable_mask=mask,
    )


def assert_same_params(state, other, atol=SAME_GRADIENT):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol, rtol=0), state.params, other.params)


def reordered(experience, order):
    """The same experience with its prompts, and their rollouts and packing rows, in another order."""
    rows = (order[:, None] * G + np.arange(G)).reshape(-1)
    prompts = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf[:, order] if path[-1].name == "positions" else leaf[order], experience.prompts
    )
    moved = dataclasses.replace(prompts, feature_index=make_prompts(0).feature_index)
    rest = {
        field.name: getattr(experience, field.name)[rows]
        for field in dataclasses.fields(Experience)
        if field.name != "prompts"
    }
    return Experience(prompts=moved, **rest)


@functools.partial(jax.jit, static_argnames="loss", compiler_options=QUICK)
def reference_step(params, experience, replay, loss):
    """One step of descent on the whole objective at once, no blocks, in the plainest jnp."""

    def objective(params):
        mask = experience.completion_mask
        logps, entropy = logps_fn(params, experience.prompts, experience.completion_ids, mask)
        ratio = jnp.exp(logps - experience.behavior_logps)
        advantages = experience.advantages
        worst = jnp.maximum(-advantages * ratio, -advantages * jnp.clip(ratio, 0.8, 1.2))
        surrogate = jnp.where(advantages < 0, jnp.minimum(worst, -3.0 * advantages), worst)
        away = experience.reference_logps - logps
        kl = jnp.minimum(jnp.exp(away) - away - 1, 10.0)
        tokens = surrogate + loss.kl_coefficient * kl - loss.entropy_coefficient * entropy
        total = jnp.sum(jnp.where(mask, tokens, 0)) / jnp.sum(mask)
        if replay is not None:
            logps, _ = logps_fn(params, replay.prompts, replay.completion_ids, replay.completion_mask)
            total -= loss.replay_weight * jnp.sum(logps) / jnp.sum(replay.completion_mask)
        return total

    value, grads = jax.value_and_grad(objective)(params)
    return jax.tree.map(lambda p, g: p - 0.1 * g / (jnp.abs(g) + 1.0), params, grads), value, grads


def test_one_step_is_descent_on_the_whole_objective():
    experience, replay = make_experience(), make_demonstrations()
    state, metrics = run(experience, replay)
    expected, value, grads = reference_step(init_params(), experience, replay, LOSS)
    assert_same_params(state, TrainState(jnp.int32(0), expected, None), FLOAT64_AGREEMENT)
    total = metrics["policy/loss"] + LOSS.replay_weight * metrics["replay/loss"]
    np.testing.assert_allclose(total, value, rtol=1e-5)
    np.testing.assert_allclose(metrics["update/grad_norm"], optax.tree.norm(grads), rtol=1e-5)
    np.testing.assert_allclose(metrics["update/learning_rate"], 0.1, rtol=1e-6)
    assert state.step == 8 and metrics["update/skipped_steps"] == 0


def test_minibatches_are_steps_on_contiguous_blocks_and_epochs_repeat_them():
    experience, replay = make_experience(), make_demonstrations()
    state, metrics = run(experience, replay, update=UpdateConfig(num_minibatches=4, num_epochs=2))
    params, values = init_params(), []
    for block in [0, 1, 2, 3] * 2:
        rows = slice(block * B // 4 * G, (block + 1) * B // 4 * G)
        part = Experience(
            slice_prompts(experience.prompts, block, 4),
            *(
                getattr(experience, field.name)[rows]
                for field in dataclasses.fields(Experience)
                if field.name != "prompts"
            ),
        )
        prompts = slice(block * B // 4, (block + 1) * B // 4)
        replay_part = Demonstrations(
            slice_prompts(replay.prompts, block, 4), replay.completion_ids[prompts], replay.completion_mask[prompts]
        )
        params, value, _ = reference_step(params, part, replay_part, LOSS)
        values.append(value)
    assert_same_params(state, TrainState(jnp.int32(0), params, None), 4 * FLOAT64_AGREEMENT)
    total = metrics["policy/loss"] + LOSS.replay_weight * metrics["replay/loss"]
    np.testing.assert_allclose(total, np.mean(values), rtol=1e-5)
    assert state.step == 8


@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean_token_mean"])
def test_microbatches_do_not_change_the_step(aggregation):
    loss = dataclasses.replace(LOSS, aggregation=aggregation)
    experience, replay = make_experience(), make_demonstrations()
    whole, whole_metrics = run(experience, replay, loss, UpdateConfig(num_minibatches=2))
    cut, cut_metrics = run(experience, replay, loss, UpdateConfig(num_minibatches=2, num_microbatches=4))
    assert_same_params(whole, cut)
    assert whole_metrics.keys() == cut_metrics.keys()
    for name, value in whole_metrics.items():
        np.testing.assert_allclose(cut_metrics[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_micro_normalizer_averages_the_means_of_microbatches():
    experience = make_experience()
    loss = dataclasses.replace(LOSS, normalizer="micro")
    _, metrics = run(experience, None, loss, UpdateConfig(num_microbatches=4))
    parts = []
    for block in range(4):
        rows = slice(block * B // 4 * G, (block + 1) * B // 4 * G)
        fields = [getattr(experience, f.name)[rows] for f in dataclasses.fields(Experience) if f.name != "prompts"]
        part = Experience(slice_prompts(experience.prompts, block, 4), *fields)
        parts.append(reference_step(init_params(), part, None, loss)[1])
    np.testing.assert_allclose(metrics["policy/loss"], np.mean(parts), atol=1e-6)  # of terms of order 1
    _, with_global = run(experience, None, LOSS, UpdateConfig(num_microbatches=4))
    assert abs(with_global["policy/loss"] - metrics["policy/loss"]) > 1e-4


def test_the_order_of_prompts_is_irrelevant():
    experience = make_experience()
    shuffled = reordered(experience, np.random.default_rng(8).permutation(B))
    update = UpdateConfig(num_microbatches=2)
    assert_same_params(run(experience, None, LOSS, update)[0], run(shuffled, None, LOSS, update)[0])


def test_slices_use_their_own_packing_rows():
    prompts = make_prompts(3)
    block = jax.jit(slice_prompts, static_argnums=2)(prompts, 2, 4)
    np.testing.assert_array_equal(block.feature_index, prompts.feature_index[: B // 4])
    np.testing.assert_array_equal(block.images.patches, prompts.images.patches[B // 2 : 3 * B // 4])
    np.testing.assert_array_equal(block.positions, prompts.positions[:, B // 2 : 3 * B // 4])
    np.testing.assert_array_equal(block.record_ids, np.arange(B // 2, 3 * B // 4))
    with pytest.raises(ValueError, match="rows, which cannot be cut into 3 blocks"):
        slice_prompts(prompts, 0, 3)


def test_frozen_leaves_stay_and_the_others_move_as_before():
    experience = make_experience()
    free, free_metrics = run(experience)
    frozen, metrics = run(experience, mask_items=(False, (("embedding", True), ("head", True))))
    np.testing.assert_array_equal(frozen.params["vision"]["kernel"], init_params()["vision"]["kernel"])
    np.testing.assert_allclose(frozen.params["text"]["head"], free.params["text"]["head"], atol=SAME_GRADIENT)
    assert metrics["update/grad_norm"] < free_metrics["update/grad_norm"]


def test_a_step_with_a_broken_gradient_is_skipped_and_counted():
    experience = make_experience()
    mask = experience.completion_mask.copy()
    mask[:, 0] = True
    advantages = experience.advantages.copy()
    advantages[0] = np.nan  # in the first of four mini-batches
    broken = dataclasses.replace(experience, completion_mask=mask, advantages=advantages)
    state, metrics = run(broken, update=UpdateConfig(num_minibatches=4))
    assert metrics["update/skipped_steps"] == 1
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((state.params, state.opt_state)))
    assert np.isnan(metrics["policy/loss"]), "the loss must show what happened"
    all_broken, metrics = run(dataclasses.replace(broken, advantages=np.full_like(advantages, np.nan)))
    jax.tree.map(np.testing.assert_array_equal, all_broken.params, init_params())
    assert metrics["update/skipped_steps"] == 1 and all_broken.step == 8


def test_skipped_steps_in_a_row_are_counted_until_a_good_one():
    experience, update = make_experience(), UpdateConfig(num_minibatches=4)
    mask, size = np.ones_like(experience.completion_mask), B * G // 4
    advantages = experience.advantages.copy()
    for broken, in_a_row in [((0,), 0), ((2, 3), 2), ((0, 1, 2, 3), 4)]:
        values = advantages.copy()
        for block in broken:
            values[block * size] = np.nan
        state, metrics = run(dataclasses.replace(experience, completion_mask=mask, advantages=values), update=update)
        assert metrics["update/skipped_steps"] == len(broken)
        assert metrics["update/skipped_in_row"] == state.skipped_in_row == in_a_row


def test_the_kl_coefficient_of_the_state_is_used_and_adapts():
    experience = make_experience()
    loss = dataclasses.replace(LOSS, kl_target=0.05, kl_horizon=2 * B * G)
    state, metrics = run(experience, None, loss)
    assert metrics["policy/kl_coefficient"] == jnp.float32(KL_COEFFICIENT) and metrics["policy/kl"] > 0.06
    np.testing.assert_allclose(state.kl_coefficient, KL_COEFFICIENT * (1 + 0.2 / 2), rtol=1e-6)
    fixed, _ = run(experience, None, dataclasses.replace(LOSS, kl_coefficient=KL_COEFFICIENT))
    assert_same_params(state, fixed)


def test_an_update_on_padding_alone_is_finite_and_changes_nothing():
    experience = make_experience()
    empty = dataclasses.replace(experience, completion_mask=np.zeros_like(experience.completion_mask))
    state, metrics = run(empty)
    jax.tree.map(np.testing.assert_array_equal, state.params, init_params())
    assert all(np.isfinite(value) for value in metrics.values())


def test_the_behaviour_gap_is_that_of_the_first_step():
    experience = make_experience()
    mask = experience.completion_mask
    logps = logps_fn(init_params(), experience.prompts, experience.completion_ids, mask)[0]
    same = dataclasses.replace(experience, behavior_logps=np.asarray(logps))
    _, metrics = run(same, update=UpdateConfig(num_minibatches=4))
    assert metrics["policy/behavior_gap_mean"] < 1e-6  # the same program up to rounding
    assert metrics["policy/approx_kl"] != 0 and metrics["policy/ratio_max"] > 1.0001, "later steps have moved on"


def test_the_effective_sample_fraction_is_that_of_the_first_step():
    experience = make_experience()
    mask = np.asarray(experience.completion_mask)
    logps = np.asarray(logps_fn(init_params(), experience.prompts, experience.completion_ids, mask)[0], np.float64)
    # The first of two mini-batches: half of the rows.
    ratio = np.exp(logps - experience.behavior_logps)[: B * G // 2][mask[: B * G // 2]]
    expected = ratio.sum() ** 2 / (ratio.size * np.square(ratio).sum())
    for num_microbatches in (1, 2):
        _, metrics = run(experience, update=UpdateConfig(num_minibatches=2, num_microbatches=num_microbatches))
        np.testing.assert_allclose(metrics["policy/effective_sample_fraction"], expected, rtol=1e-5)
    assert expected < 0.98, "the case must show a difference"


def test_with_the_policy_as_anchor_the_step_is_the_plain_policy_gradient():
    """The ratio is exactly 1 whatever the sampler said: no clipping, and the gradient of -advantage * logp."""
    experience = make_experience()
    loss = LossConfig(ratio_anchor="policy", kl_estimator="none", kl_coefficient=0.0)
    state, metrics = run(experience, None, loss)
    assert metrics["policy/ratio_max"] == 1 and metrics["policy/clip_fraction"] == 0

    def objective(params):
        mask = experience.completion_mask
        logps, _ = logps_fn(params, experience.prompts, experience.completion_ids, mask)
        return -jnp.sum(jnp.where(mask, experience.advantages * logps, 0)) / jnp.sum(mask)

    grads = jax.grad(objective)(init_params())
    expected = jax.tree.map(lambda p, g: p - 0.1 * g / (jnp.abs(g) + 1.0), init_params(), grads)
    assert_same_params(state, TrainState(jnp.int32(0), expected, None), FLOAT64_AGREEMENT)


@pytest.mark.parametrize("surrogate", ["gspo", "cispo"])
def test_other_surrogates_are_exact_over_microbatches(surrogate):
    loss = dataclasses.replace(LOSS, surrogate=surrogate, ratio_anchor="proximal", correction="truncate")
    experience = make_experience()
    whole, _ = run(experience, None, loss, UpdateConfig())
    cut, _ = run(experience, None, loss, UpdateConfig(num_microbatches=4))
    assert_same_params(whole, cut)


def make_mesh():
    return jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))


def shard(tree, mesh):
    def place(path, leaf):
        spec = PartitionSpec(None, "data") if path and path[-1].name == "positions" else PartitionSpec("data")
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(place, tree)


def test_eight_devices_agree_with_one_and_share_the_work():
    experience, replay = make_experience(num=32), make_demonstrations(num=32)
    update = UpdateConfig(num_minibatches=2, num_microbatches=2)
    alone, alone_metrics = run(experience, replay, update=update)
    mesh, work = make_mesh(), {}
    with jax.set_mesh(mesh):
        inputs = shard(experience, mesh), shard(replay, mesh)
        for batch_axes in ((), ("data",)):
            program = run.lower(*inputs, update=dataclasses.replace(update, batch_axes=batch_axes)).compile()
            spread, metrics = program(*inputs)
            work[batch_axes] = program.cost_analysis()["flops"]
            assert_same_params(alone, spread)
            for name, value in alone_metrics.items():
                np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    # Microbatches are a quarter of the batch: left contiguous, they lie on two devices of eight.
    assert work[("data",)] < 0.5 * work[()]


def test_the_state_can_be_donated_and_logits_be_made_in_chunks():
    optimizer = make_sgd()
    step = jax.jit(
        lambda state, experience: update_policy(
            state,
            experience,
            None,
            logps_fn=functools.partial(logps_fn, chunk_size=4),
            optimizer=optimizer,
            loss=LOSS,
            update=UpdateConfig(4),
        ),
        donate_argnums=0,
        compiler_options=QUICK,
    )
    state = start(optimizer)
    given = state.params["text"]["head"]
    state, _ = step(state, make_experience())
    assert given.is_deleted()
    assert_same_params(state, run(make_experience(), update=UpdateConfig(num_minibatches=4))[0])
    assert step(state, make_experience())[0].step == 9


@pytest.mark.parametrize("num_microbatches", [1, 4])
def test_supervised_step_is_descent_on_the_mean_cross_entropy(num_microbatches):
    demonstrations, optimizer = make_demonstrations(), make_sgd()
    mask = demonstrations.completion_mask

    def cross_entropy(params):
        return -jnp.sum(logps_fn(params, demonstrations.prompts, demonstrations.completion_ids, mask)[0]) / mask.sum()

    value, grads = jax.value_and_grad(cross_entropy)(init_params())
    expected = jax.tree.map(lambda p, g: p - 0.1 * g / (jnp.abs(g) + 1.0), init_params(), grads)
    step = jax.jit(
        functools.partial(update_supervised, logps_fn=logps_fn, optimizer=optimizer, num_microbatches=num_microbatches),
        compiler_options=QUICK,
    )
    state, metrics = step(start(optimizer), demonstrations)
    assert_same_params(state, TrainState(jnp.int32(0), expected, None), FLOAT64_AGREEMENT)
    np.testing.assert_allclose(metrics["supervised/loss"], value, rtol=1e-5)
    for _ in range(20):
        state, metrics = step(state, demonstrations)
    assert metrics["supervised/loss"] < value - 0.05
    assert state.step == 28


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="num_minibatches is 0"):
        UpdateConfig(num_minibatches=0)
    with pytest.raises(ValueError, match="cannot be cut into 3 blocks"):
        run(make_experience(), update=UpdateConfig(num_minibatches=3))
