"""One policy update: mini-batches of optimizer steps, each of exactly accumulated microbatch gradients.

Owns the cutting of a batch into blocks, the accumulation, the skipping of broken steps, and the
metrics; the objective is loss.py's, the model comes in as `logps_fn`. A block is a contiguous run of
prompts, of their rollouts and of their rows of packed image patches, which the host lays out so.
All divisors are counts over the mini-batch and are known before its first microbatch, so the number
of microbatches changes memory, not mathematics (unless `normalizer="micro"` asks for that).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec
from jaxtyping import Bool, Float, Int

from safegrpo_jax.grpo.loss import LossConfig, adapted_kl_coefficient, grpo_loss, token_weights
from safegrpo_jax.grpo.optimizer import last_learning_rate, merge_trainable, select_trainable
from safegrpo_jax.types import (
    PATCHES_PER_FEATURE,
    Array,
    ArrayTree,
    Demonstrations,
    Experience,
    Metrics,
    Packing,
    Params,
    Prompts,
    TrainState,
)


@dataclasses.dataclass(frozen=True)
class UpdateConfig:
    """How a batch becomes optimizer steps.

    The batch is cut into `num_minibatches` blocks of prompts, one optimizer step each, gone through
    `num_epochs` times; each block into `num_microbatches`, whose gradients are added. The prompts must
    have been packed with `num_minibatches * num_microbatches` blocks. `batch_axes` names the mesh axes
    over which rows of every block are spread; without it a contiguous block of a sharded batch lies on
    a few devices only and the others idle. Empty for one device.
    """

    num_minibatches: int = 1
    num_epochs: int = 1
    num_microbatches: int = 1
    batch_axes: tuple[str, ...] = ()

    def __post_init__(self):
        for name in ("num_minibatches", "num_epochs", "num_microbatches"):
            if getattr(self, name) < 1:
                raise ValueError(f"update {name} is {getattr(self, name)}; use a number >= 1")


def split_prompts(prompts: Prompts, count: int, batch_axes: tuple[str, ...] = ()) -> Prompts:
    """Cuts prompts and packing rows into `count` contiguous blocks; every array gains a leading axis of blocks.

    Feature indices are shifted to count from the first merged token of their block. Prompts of a block
    must use packing rows of that block only.

    Raises: ValueError if `count` does not divide the prompts or the packing rows.
    """
    num_packing_rows, num_patches = prompts.images.segment_ids.shape
    features_per_block = num_packing_rows * num_patches // PATCHES_PER_FEATURE // count

    def split(path, leaf):
        name = path[-1].name
        blocks = _split_axis(leaf, count, batch_axes, axis=1 if name == "positions" else 0, name=name)
        if name == "feature_index":
            first = (jnp.arange(count, dtype=blocks.dtype) * features_per_block)[:, None, None]
            is_vision = _split_axis(prompts.vision_mask, count, batch_axes, axis=0, name="vision_mask")
            blocks = jnp.where(is_vision, blocks - first, 0)
        return blocks

    return jax.tree_util.tree_map_with_path(split, prompts)


def slice_prompts(prompts: Prompts, index: Int[Array, ""] | int, count: int) -> Prompts:
    """Block number `index` (may be traced) of the `count` blocks of `split_prompts`.

    Example: with 8 prompts and 4 packing rows of 16 patches, block 1 of 2 is prompts 4 to 7 with
    packing rows 2 and 3, and feature index 8 becomes 0.
    """
    return jax.tree.map(lambda blocks: blocks[index], split_prompts(prompts, count))


def update_policy(
    state: TrainState,
    experience: Experience,
    replay: Demonstrations | None,
    packing: Packing | None = None,
    *,
    logps_fn: Callable,
    optimizer: optax.GradientTransformation,
    loss: LossConfig,
    update: UpdateConfig,
    trainable_mask: ArrayTree | None = None,
) -> tuple[TrainState, Metrics]:
    """All optimizer steps on one rollout batch; `step` of the result is one higher.

    `logps_fn(params, prompts [b], completion_ids [n c], completion_mask [n c])` returns log-probabilities
    and entropies [n c], 0 where masked, under the temperature of sampling. `trainable_mask` must be the
    one the optimizer was made with (None: all leaves); no gradient is computed for frozen leaves.
    Each mini-batch takes its block of `replay`, whose leading sizes must be divisible like the batch's.

    With `packing`, made for `num_minibatches`, its blocks are the microbatches, and `num_microbatches` cuts the replay
    alone. `logps_fn` then takes one block (without the leading axis) as a fifth argument, and answers for the block's
    `rollouts`, [members c], from the whole mini-batch. The gradient is that of padded rows.

    A step whose gradient norm is not finite changes neither parameters nor optimizer state and is counted in
    `update/skipped_steps`; `update/skipped_in_row` counts those since the last good one. With `kl_target` the KL
    coefficient is the state's, and adapts once, after all steps, to the mean KL.

    Metrics are means over the steps, `_max` maxima; the behaviour gap and the effective sample size (of the importance
    ratios of all tokens, as a fraction) are those of the first step alone, where the policy is still the one that
    sampled and a gap is a numerical mismatch.

    Raises: ValueError (while tracing) for sizes that do not divide.
    """

    def minibatch_step(carry, block):
        gradient = _packed_gradient if packing is not None else _padded_gradient
        grads, sums, maxima = gradient(carry[0], *block, logps_fn, loss, update, trainable_mask, kl_coefficient)
        carry, step_metrics = _apply_gradients(*carry, grads, optimizer)
        return carry, (sums | step_metrics, maxima)

    kl_coefficient = state.kl_coefficient if loss.kl_target else loss.kl_coefficient

    blocks = _split_blocks((experience, replay, packing), update.num_minibatches, update.batch_axes)
    (params, opt_state, skipped_in_row), (means, maxima) = jax.lax.scan(
        lambda carry, _: jax.lax.scan(minibatch_step, carry, blocks),
        (state.params, state.opt_state, jnp.asarray(state.skipped_in_row)),
        None,
        length=update.num_epochs,
    )
    first_mean, first_square = (means.pop(f"policy/importance{kind}_mean")[0, 0] for kind in ("", "_square"))
    metrics = {name: jnp.mean(values) for name, values in means.items()}
    metrics |= {name: jnp.max(values) for name, values in maxima.items()}
    # 1 where sampler and trainer agree; with no token at all there is nothing to disagree about.
    metrics["policy/effective_sample_fraction"] = jnp.where(
        first_square > 0, jnp.square(first_mean) / jnp.maximum(first_square, 1e-30), 1.0
    )
    metrics["policy/behavior_gap_mean"] = means["policy/behavior_gap_mean"][0, 0]
    metrics["policy/behavior_gap_max"] = maxima["policy/behavior_gap_max"][0, 0]
    metrics["update/skipped_steps"] = jnp.sum(means["update/skipped_steps"])
    metrics["update/skipped_in_row"] = skipped_in_row
    next_coefficient = jnp.asarray(state.kl_coefficient)
    if loss.kl_target:
        metrics["policy/kl_coefficient"] = next_coefficient
        next_coefficient = adapted_kl_coefficient(
            next_coefficient, metrics["policy/kl"], len(experience.completion_ids), loss
        )
    return TrainState(state.step + 1, params, opt_state, skipped_in_row, next_coefficient), metrics


def update_supervised(
    state: TrainState,
    demonstrations: Demonstrations,
    *,
    logps_fn: Callable,
    optimizer: optax.GradientTransformation,
    num_microbatches: int,
    trainable_mask: ArrayTree | None = None,
    batch_axes: tuple[str, ...] = (),
) -> tuple[TrainState, Metrics]:
    """One optimizer step on the mean cross-entropy over the tokens of the demonstrations.

    Arguments, skipping of broken steps and errors as in `update_policy`. The cross-entropy is that of
    `logps_fn`, hence at its temperature and without its banned ids.
    """
    weights = token_weights(demonstrations.completion_mask, "token_mean")

    def block_loss(params, block):
        loss = _cross_entropy(params, *block, logps_fn)
        return loss, ({"supervised/loss": loss}, {})

    blocks = _split_blocks((demonstrations, weights), num_microbatches, batch_axes)
    grads, metrics, _ = _accumulate(block_loss, state.params, trainable_mask, blocks)
    carry = state.params, state.opt_state, jnp.asarray(state.skipped_in_row)
    (params, opt_state, skipped_in_row), step_metrics = _apply_gradients(*carry, grads, optimizer)
    metrics = metrics | step_metrics | {"update/skipped_in_row": skipped_in_row}
    return TrainState(state.step + 1, params, opt_state, skipped_in_row, jnp.asarray(state.kl_coefficient)), metrics


def logps_in_blocks(
    params: Params,
    prompts: Prompts,
    completion_ids: Int[Array, "n c"],
    completion_mask: Bool[Array, "n c"],
    logps_fn: Callable,
    count: int,
    batch_axes: tuple[str, ...],
) -> Float[Array, "n c"]:
    """Log-probabilities of all rollouts, `count` blocks of prompts one after another, as the update takes them: the
    activations of one block exist at a time. Arguments as in `update_policy`."""
    blocks = _split_blocks((prompts, completion_ids, completion_mask), count, batch_axes)
    logps = jax.lax.map(lambda block: logps_fn(params, *block)[0], blocks)
    return logps.reshape(completion_mask.shape)


def _padded_gradient(params, experience, replay, _, logps_fn, loss: LossConfig, update, trainable_mask, kl_coefficient):
    """Gradient and metrics of a mini-batch whose microbatches are equal blocks of its rows."""
    mask = experience.completion_mask
    num_norm_blocks = update.num_microbatches if loss.normalizer == "micro" else 1
    weights = token_weights(mask, loss.aggregation, num_norm_blocks, loss.norm_length)
    num_tokens = jnp.maximum(mask.sum(), 1).astype(jnp.float32)
    replay_weights = None if replay is None else token_weights(replay.completion_mask, "token_mean")

    def block_loss(params, block):
        experience, weights, replay, replay_weights = block
        logps = logps_fn(params, experience.prompts, experience.completion_ids, experience.completion_mask)
        rows = (*_per_token(experience), experience.completion_mask, weights)
        total, sums, maxima = grpo_loss(*logps, *rows, num_tokens, loss, kl_coefficient)
        if replay is not None:
            replay_loss = _cross_entropy(params, replay, replay_weights, logps_fn)
            sums = sums | {"replay/loss": replay_loss}
            total = total + loss.replay_weight * replay_loss
        return total, (sums, maxima)

    blocks = _split_blocks((experience, weights, replay, replay_weights), update.num_microbatches, update.batch_axes)
    return _accumulate(block_loss, params, trainable_mask, blocks)


def _packed_gradient(
    params, experience, replay, packing, logps_fn, loss: LossConfig, update, trainable_mask, kl_coefficient
):
    """As `_padded_gradient`, where the microbatches are the blocks of `packing` and the replay is one more pass."""
    if loss.normalizer != "global":
        raise ValueError(f"normalizer {loss.normalizer!r} is not defined for packed rows; use 'global'")
    mask, tokens = experience.completion_mask, (experience.completion_ids, experience.completion_mask)
    weights = token_weights(mask, loss.aggregation, norm_length=loss.norm_length)
    num_tokens = jnp.maximum(mask.sum(), 1).astype(jnp.float32)

    def block_loss(params, block):
        logps = logps_fn(params, experience.prompts, *tokens, block)
        rows = [x[block.rollouts] for x in _per_token(experience)]
        rows += [mask[block.rollouts] & block.rollout_mask[:, None], weights[block.rollouts]]
        total, sums, maxima = grpo_loss(*logps, *rows, num_tokens, loss, kl_coefficient)
        return total, (sums, maxima)

    is_used = packing.rollout_mask.any(-1)
    grads, sums, maxima = _accumulate(block_loss, params, trainable_mask, packing, is_used)
    if replay is not None:
        replay_weights = token_weights(replay.completion_mask, "token_mean")

        def replay_loss(params, block):
            value = _cross_entropy(params, *block, logps_fn)
            return loss.replay_weight * value, ({"replay/loss": value}, {})

        blocks = _split_blocks((replay, replay_weights), update.num_microbatches, update.batch_axes)
        replay_grads, replay_sums, _ = _accumulate(replay_loss, params, trainable_mask, blocks)
        grads, sums = jax.tree.map(jnp.add, grads, replay_grads), sums | replay_sums
    return grads, sums, maxima


def _per_token(experience: Experience) -> tuple[Array, ...]:
    return (
        experience.behavior_logps,
        experience.proximal_logps,
        experience.reference_logps,
        experience.advantages,
    )


def packed_logps(
    params: Params,
    prompts: Prompts,
    completion_ids: Int[Array, "n c"],
    completion_mask: Bool[Array, "n c"],
    packing: Packing,
    *,
    logps_fn: Callable,
    num_minibatches: int,
    batch_axes: tuple[str, ...] = (),
) -> Float[Array, "n c"]:
    """Log-probabilities of all rollouts, block by block; 0 where masked. Arguments as in `update_policy`."""

    def minibatch(carry, part):
        *rows, packing = part

        def add_block(logps, block):
            def compute(logps):
                values, _ = logps_fn(params, *rows, block)
                # Places that hold no rollout write out of range, which is dropped.
                place = jnp.where(block.rollout_mask, block.rollouts, len(logps))
                return logps.at[place].set(values, mode="drop")

            return jax.lax.cond(block.rollout_mask.any(), compute, lambda logps: logps, logps), None

        logps, _ = jax.lax.scan(add_block, jnp.zeros(rows[-1].shape, jnp.float32), packing)
        return carry, logps

    parts = _split_blocks((prompts, completion_ids, completion_mask, packing), num_minibatches, batch_axes)
    _, logps = jax.lax.scan(minibatch, None, parts)
    return logps.reshape(completion_mask.shape)


def _cross_entropy(params, demonstrations, weights, logps_fn):
    logps, _ = logps_fn(params, demonstrations.prompts, demonstrations.completion_ids, demonstrations.completion_mask)
    return -jnp.sum(weights * logps)


def _accumulate(block_loss, params, trainable_mask, blocks, is_used=None):
    """Sum of the gradients and of the additive metrics over `blocks`, and the maxima of the others.

    Blocks that are not `is_used` (None: all are) are skipped; their metrics count as 0.
    """

    def add_block(grads, block):
        def loss_of_trainable(trainable):
            return block_loss(merge_trainable(trainable, params), block)

        block_grads, metrics = jax.grad(loss_of_trainable, has_aux=True)(trainable)
        return jax.tree.map(jnp.add, grads, block_grads), metrics

    def add_if_used(grads, flag_and_block):
        _, shapes = jax.eval_shape(add_block, grads, flag_and_block[1])

        def skip(grads, _):
            return grads, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

        return jax.lax.cond(flag_and_block[0], add_block, skip, grads, flag_and_block[1])

    trainable = select_trainable(params, trainable_mask)
    zeros = jax.tree.map(jnp.zeros_like, trainable)
    if is_used is None:
        grads, (sums, maxima) = jax.lax.scan(add_block, zeros, blocks)
    else:
        grads, (sums, maxima) = jax.lax.scan(add_if_used, zeros, (is_used, blocks))
    sums = {name: jnp.sum(values) for name, values in sums.items()}
    return grads, sums, {name: jnp.max(values) for name, values in maxima.items()}


def _apply_gradients(params, opt_state, skipped_in_row, grads, optimizer):
    grad_norm = optax.tree.norm(grads)
    updates, new_opt_state = optimizer.update(grads, opt_state, params)
    finite = jnp.isfinite(grad_norm)
    carry = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old),
        (optax.apply_updates(params, updates), new_opt_state, jnp.zeros_like(skipped_in_row)),
        (params, opt_state, skipped_in_row + 1),
    )
    metrics = {
        "update/grad_norm": grad_norm,
        "update/learning_rate": last_learning_rate(carry[1]),
        "update/skipped_steps": 1.0 - finite.astype(jnp.float32),
    }
    return carry, metrics


def _split_blocks(tree: Any, count: int, batch_axes: tuple[str, ...]):
    """Every array of `tree`, prompts included, cut into `count` contiguous blocks on a new leading axis."""

    def split(path, node):
        if isinstance(node, Prompts):
            return split_prompts(node, count, batch_axes)
        if isinstance(node, Packing):  # its leading axis is of blocks, gone through one after another
            return jax.tree.map(lambda x: _split_axis(x, count, (), axis=0, name="packing"), node)
        return _split_axis(node, count, batch_axes, axis=0, name=jax.tree_util.keystr(path))

    return jax.tree_util.tree_map_with_path(split, tree, is_leaf=lambda node: isinstance(node, Prompts | Packing))


def _split_axis(array, count: int, batch_axes: tuple[str, ...], *, axis: int, name: str):
    size = array.shape[axis]
    if size % count:
        raise ValueError(f"{name} has {size} rows, which cannot be cut into {count} blocks; make them divisible")
    shape = (*array.shape[:axis], count, size // count, *array.shape[axis + 1 :])
    blocks = jnp.moveaxis(jnp.reshape(array, shape), axis, 0)
    if batch_axes:
        blocks = jax.lax.with_sharding_constraint(blocks, PartitionSpec(*(None,) * (axis + 1), batch_axes))
    return blocks
