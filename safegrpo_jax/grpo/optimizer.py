"""The optimizer: clip by global norm, AdamW or Adafactor, a learning-rate schedule, frozen leaves.

Owns one optax chain and the schedule; knows nothing of models, losses or batches. Frozen leaves are
taken out of the tree (None in their place) before optax sees it, so they have no moments, no decay and
no part in the norm. The rate last used is kept in the state, where a report can read it.

Source: AdamW (arXiv 1711.05101); defaults are those of torch, which the published run inherits. Adafactor (arXiv
1804.04235) in optax's parts, for where 8 bytes of moments a parameter are too many.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float, Int

from safegrpo_jax.types import Array, ArrayTree, Params

SCHEDULES = ("constant", "linear", "cosine")
METHODS = ("adamw", "adafactor")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The method and its schedule.

    `method`: "adamw", or "adafactor", which keeps for a matrix the mean squares of its rows and columns alone, bounds
    the root mean square of an update at 1 and has no momentum: `beta1`, `beta2` and `epsilon` are AdamW's.

    `schedule` starts after a linear warm-up of `warmup_steps`, holds or falls to `final_ratio` times
    the peak at `total_steps` and stays there. Both counts are in schedule steps, one of which is
    `updates_per_step` optimizer updates (set it to mini-batches x epochs to count outer steps).
    `clip_norm` bounds the global L2 norm of the gradient; 0 is off. Weight decay acts on every trainable leaf.
    """

    method: str = "adamw"
    learning_rate: float = 1e-6
    schedule: str = "constant"
    warmup_steps: int = 0
    total_steps: int = 0
    final_ratio: float = 0.0
    updates_per_step: int = 1
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.01
    clip_norm: float = 1.0

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"optimizer method is {self.method!r}; use one of {', '.join(METHODS)}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"optimizer schedule is {self.schedule!r}; use one of {', '.join(SCHEDULES)}")
        if self.schedule != "constant" and self.total_steps <= self.warmup_steps:
            raise ValueError(
                f"optimizer schedule {self.schedule!r} needs total_steps > warmup_steps, "
                f"got {self.total_steps} and {self.warmup_steps}"
            )
        if self.updates_per_step < 1:
            raise ValueError(f"optimizer updates_per_step is {self.updates_per_step}; use a number >= 1")


def learning_rate(config: OptimizerConfig, num_updates: Int[Array, ""] | int) -> Float[Array, ""]:
    """Learning rate of the update that follows `num_updates` finished ones.

    Warm-up of w steps gives step s < w the fraction (s + 1) / (w + 1), so that no step is wasted at rate 0.
    """
    step = (jnp.asarray(num_updates) // config.updates_per_step).astype(jnp.float32)
    warmup = jnp.minimum((step + 1) / (config.warmup_steps + 1), 1.0)
    progress = jnp.clip((step - config.warmup_steps) / max(config.total_steps - config.warmup_steps, 1), 0.0, 1.0)
    match config.schedule:
        case "constant":
            shape = 1.0
        case "linear":
            shape = 1.0 - progress
        case "cosine":
            shape = 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
    decay = shape if config.schedule == "constant" else config.final_ratio + (1.0 - config.final_ratio) * shape
    return jnp.asarray(config.learning_rate * warmup * decay, jnp.float32)


class LearningRateState(NamedTuple):
    """`num_updates` finished updates; `learning_rate` is the one the last of them used."""

    num_updates: Int[Array, ""]
    learning_rate: Float[Array, ""]


def last_learning_rate(opt_state: ArrayTree) -> Float[Array, ""]:
    """The rate the last update used, from a state that `make_optimizer` made.

    Raises: ValueError if the state holds none, hence comes from another optimizer.
    """
    rate = optax.tree.get(opt_state, "learning_rate")
    if rate is None:
        raise ValueError("the optimizer state holds no learning rate; build the optimizer with make_optimizer")
    return rate


def select_trainable(tree: ArrayTree, trainable_mask: ArrayTree | None) -> ArrayTree:
    """`tree` with None where `trainable_mask` (bools at the leaves; None for all trainable) is False."""
    if trainable_mask is None:
        return tree
    return jax.tree.map(lambda trainable, leaf: leaf if trainable else None, trainable_mask, tree)


def merge_trainable(trainable: ArrayTree, params: Params) -> Params:
    """The inverse of `select_trainable`: leaves of `trainable`, and those of `params` where it has None."""
    return jax.tree.map(
        lambda leaf, frozen: frozen if leaf is None else leaf, trainable, params, is_leaf=lambda leaf: leaf is None
    )


def make_optimizer(config: OptimizerConfig, trainable_mask: ArrayTree | None) -> optax.GradientTransformation:
    """The optimizer over the leaves where `trainable_mask` is True (None: all).

    `update` needs `params`, ignores gradients of frozen leaves (they may be None) and returns zeros for them.
    """

    def init_rate(params):
        return LearningRateState(jnp.zeros([], jnp.int32), learning_rate(config, 0))

    def scale_by_rate(updates, state, params=None):
        rate = learning_rate(config, state.num_updates)
        updates = jax.tree.map(lambda update: -rate.astype(update.dtype) * update, updates)
        return updates, LearningRateState(optax.safe_increment(state.num_updates), rate)

    match config.method:
        case "adamw":
            direction = optax.scale_by_adam(config.beta1, config.beta2, config.epsilon)
        case "adafactor":
            direction = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
    inner = optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        direction,
        optax.add_decayed_weights(config.weight_decay),
        optax.GradientTransformation(init_rate, scale_by_rate),
    )

    def init(params):
        return inner.init(select_trainable(params, trainable_mask))

    def update(grads, opt_state, params):
        grads, trainable = select_trainable(grads, trainable_mask), select_trainable(params, trainable_mask)
        updates, opt_state = inner.update(grads, opt_state, trainable)
        return merge_trainable(updates, jax.tree.map(jnp.zeros_like, params)), opt_state

    return optax.GradientTransformation(init, update)
