"""Group-relative advantages: how much better a rollout did than the other samples of its prompt.

Owns the step from one reward per rollout, or one per rule, to one advantage per rollout, and its spreading over spans
of tokens. The idea: the group mean replaces a learned critic, the group spread sets the scale.
A group whose rewards are all equal carries no signal: it is found by max == min, not by its standard
deviation, because a rounding error of 1e-8 divided by an epsilon of 1e-6 is not a small number.

Source: GRPO (arXiv 2402.03300) eq. 4 of outcome supervision; Dr. GRPO (arXiv 2503.20783) for `scale="none"`;
RLOO (arXiv 2402.14740) for `baseline="leave_one_out"`;
verl `core_algos.compute_grpo_outcome_advantage`, TRL `GRPOTrainer` (`scale_rewards`); GDPO (arXiv 2601.05242) and TRL
"normalize_then_sum" for `normalize="per_rule"`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Float, Int

from safegrpo_jax.types import Array, Metrics

SCALES = ("group", "batch", "none")
NORMALIZE = ("total", "per_rule")
CREDIT = ("completion", "span")
BASELINES = ("group", "leave_one_out")


@dataclasses.dataclass(frozen=True)
class AdvantageConfig:
    """How rewards become advantages.

    `scale` divides the centred rewards by: "group", the sample standard deviation of the group;
    "batch", that of all rewards of the batch; "none", nothing. `epsilon` is added to the divisor.
    `baseline`, what is taken from a reward: "group", the mean of its group; "leave_one_out", that of the others of the
    group, which does not depend on the reward itself.
    `normalize`: "total" compares the total rewards of a group; "per_rule" compares each rule alone, so that a rule
    that spreads little counts as much as its weight says, and scales the weighted sum to unit spread in the batch.
    `credit`: "completion" gives all tokens of a rollout its advantage; "span" gives the tokens of each tag the
    advantage of that tag's verdict and those of the answer that of its behaviour.
    """

    scale: str = "group"
    baseline: str = "group"
    epsilon: float = 1e-6
    normalize: str = "total"
    credit: str = "completion"

    def __post_init__(self):
        for name, allowed in (
            ("scale", SCALES),
            ("baseline", BASELINES),
            ("normalize", NORMALIZE),
            ("credit", CREDIT),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"advantage {name} is {getattr(self, name)!r}; use one of {', '.join(allowed)}")
        if self.normalize == "per_rule" and self.scale == "none":
            raise ValueError("advantage normalize 'per_rule' needs a scale of each rule; use scale 'group' or 'batch'")
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
        if config.baseline == "leave_one_out":  # r - (sum - r) / (g - 1) = (r - mean) * g / (g - 1)
            centred = centred * (group_size / (group_size - 1))
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


def per_rule_advantages(
    values: Sequence[Float[Array, "n"]], weights: Sequence[float], group_size: int, config: AdvantageConfig
) -> Float[Array, "n"]:
    """Advantage of each rollout from the values of each rule, compared within the group rule by rule.

    The weighted sum is divided by its standard deviation in the batch (divisor count - 1, plus `epsilon`); its mean
    is 0 already, that of every group being 0. A group in which every rule is constant gets exactly 0.

    Raises: ValueError as `group_advantages`.
    Source: GDPO (arXiv 2601.05242); TRL "normalize_then_sum".
    """
    total = sum(
        weight * group_advantages(value, group_size, config)[0] for value, weight in zip(values, weights, strict=True)
    )
    batch_std = jnp.std(total, ddof=1) if total.shape[0] > 1 else 1.0
    return jnp.where(total == 0, 0.0, total / (batch_std + config.epsilon))


def spread_over_spans(
    advantages: Float[Array, "n"],
    span_values: Float[Array, "n q"],
    span_starts: Int[Array, "n q"],
    span_ends: Int[Array, "n q"],
    num_tokens: int,
    group_size: int,
    config: AdvantageConfig,
) -> Float[Array, "n c"]:
    """The advantage of every token: that of the rule of the span it lies in, else the rollout's; c is `num_tokens`.

    `span_values` are the rules' values, compared within the group each; starts are inclusive, ends exclusive, and a
    span that was not found (-1) covers nothing. Where spans overlap the one listed first wins.

    Example: advantages [2], a span of tokens 1 and 2 whose rule has advantage -1, c = 4: [[2, -1, -1, 2]].

    Raises: ValueError as `group_advantages`.
    """
    tokens = jnp.arange(num_tokens)
    spread = jnp.broadcast_to(advantages[:, None], (advantages.shape[0], num_tokens))
    for q in reversed(range(span_values.shape[1])):
        credit = group_advantages(span_values[:, q], group_size, config)[0]
        inside = (tokens >= span_starts[:, q, None]) & (tokens < span_ends[:, q, None])
        spread = jnp.where(inside, credit[:, None], spread)
    return spread
