"""Group-relative advantages: how much better a rollout did than the other samples of its prompt.

Owns the step from one reward per rollout to one advantage per rollout; spreading it over tokens is
the caller's. The idea: the group mean replaces a learned critic, the group spread sets the scale.
A group whose rewards are all equal carries no signal: it is found by max == min, not by its standard
deviation, because a rounding error of 1e-8 divided by an epsilon of 1e-6 is not a small number.

Source: GRPO (arXiv 2402.03300) eq. 4 of outcome supervision; Dr. GRPO (arXiv 2503.20783) for `scale="none"`;
verl `core_algos.compute_grpo_outcome_advantage`, TRL `GRPOTrainer` (`scale_rewards`).
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Float

from safegrpo_jax.types import Array, Metrics

SCALES = ("group", "batch", "none")


@dataclasses.dataclass(frozen=True)
class AdvantageConfig:
    """How rewards become advantages.

    `scale` divides the centred rewards by: "group", the sample standard deviation of the group;
    "batch", that of all rewards of the batch; "none", nothing. `epsilon` is added to the divisor.
    """

    scale: str = "group"
    epsilon: float = 1e-6

    def __post_init__(self):
        if self.scale not in SCALES:
            raise ValueError(f"advantage scale is {self.scale!r}; use one of {', '.join(SCALES)}")
        if self.epsilon < 0:
            raise ValueError(f"advantage epsilon is {self.epsilon}; use a number >= 0")


def group_advantages(
    rewards: Float[Array, "n"], group_size: int, config: AdvantageConfig
) -> tuple[Float[Array, "n"], Metrics]:
    """Advantage of each rollout; rows `j * group_size` to `(j + 1) * group_size - 1` are one group.

    Standard deviations have divisor count - 1. A group with max == min gets exactly 0. With
    `group_size` 1 there is nothing to compare with: the mean is taken as 0 and the group spread as 1,
    so that the reward itself drives the update.

    The statistics are: the fraction of groups with equal rewards, the mean over groups of the group
    standard deviation, and the largest magnitude and standard deviation of the advantages.

    Raises: ValueError if `group_size` does not divide the number of rows.
    """
    num_rows = rewards.shape[0]
    if group_size < 1 or num_rows % group_size:
        raise ValueError(f"{num_rows} rewards cannot be cut into groups of {group_size}; make them divisible")
    groups = jnp.asarray(rewards, jnp.float32).reshape(-1, group_size)
    if group_size == 1:
        constant = jnp.zeros(groups.shape, bool)
        centred, group_std = groups, jnp.ones_like(groups)
    else:
        constant = groups.max(1, keepdims=True) == groups.min(1, keepdims=True)
        centred = groups - groups.mean(1, keepdims=True)
        group_std = jnp.where(constant, 0.0, groups.std(1, ddof=1, keepdims=True))
    match config.scale:
        case "group":
            scaled = centred / (group_std + config.epsilon)
        case "batch":
            batch_std = groups.std(ddof=1) if num_rows > 1 else 1.0
            scaled = centred / (batch_std + config.epsilon)
        case "none":
            scaled = centred
    advantages = jnp.where(constant, 0.0, scaled).reshape(-1)
    return advantages, {
        "advantage/zero_variance_fraction": jnp.mean(constant.astype(jnp.float32)),
        "advantage/group_std_mean": jnp.mean(group_std),
        "advantage/abs_max": jnp.max(jnp.abs(advantages)),
        "advantage/std": jnp.std(advantages),
    }
