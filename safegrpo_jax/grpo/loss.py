"""The GRPO objective, one pure function per formula, every value per token.

Owns the surrogates, the correction for a sampler that is not quite the policy, the KL estimators, the aggregation of
tokens to a number, and their sum with its metrics. It neither runs a model nor knows of microbatches, and this is the
idea that keeps it so: every aggregation is a weighted sum over tokens, and the weights depend on the mask alone. They
are computed once for a whole mini-batch, so the sum over any cut into microbatches is exact.

Source: PPO (arXiv 1707.06347), dual clip (arXiv 1912.09729), clip-higher and token mean (DAPO, arXiv 2503.14476),
constant divisor (Dr. GRPO, arXiv 2503.20783), GSPO (arXiv 2507.18071), CISPO (MiniMax-M1, arXiv 2506.13585), decoupled
objective (arXiv 2110.00641), KL estimators (joschu.net/blog/kl-approx.html); clamps and defaults as verl `core_algos`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from safegrpo_jax.masked import masked_sum
from safegrpo_jax.types import Array, Metrics

SURROGATES = ("ppo", "gspo", "cispo")
ANCHORS = ("behavior", "proximal", "policy")
CORRECTIONS = ("none", "truncate", "sequence_mask")
AGGREGATIONS = ("token_mean", "seq_mean_token_sum", "seq_mean_token_mean", "seq_mean_token_sum_norm")
KL_ESTIMATORS = ("k1", "k2", "k3", "none")
NORMALIZERS = ("global", "micro")

LOG_RATIO_LIMIT = 20.0  # exp(20) is finite in float32 with room for products
KL_LIMIT = 10.0  # published clamp of k3: beyond it the KL of a token has no gradient


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Terms of the objective.

    `surrogate`: "ppo", the clipped ratio of each token; "gspo", the clipped ratio of the whole sequence, per token;
    "cispo", the log-probability weighted by the clipped ratio, which then bears no gradient.
    `ratio_anchor`, what the ratio is taken against: "behavior", the log-probabilities of sampling; "proximal", those
    the trainer itself computes before the first update of a batch, in one more pass; "policy", the policy itself
    without gradient, so that the ratio is exactly 1, which is right with a single update per batch.
    `correction` weighs the surrogate by anchor over behaviour probability, without gradient: "truncate" per token, at
    most `correction_cap`; "sequence_mask" per sequence, where a weight above the cap becomes 0.
    `clip_low`, `clip_high`: the ratio is clipped to [1 - clip_low, 1 + clip_high].
    `clip_dual`: where the advantage is negative, the loss of a token is at most -advantage * clip_dual; 0 is off.
    `mask_truncated`: completions that were cut off by length train nothing.
    `kl_estimator`: one of KL_ESTIMATORS; "none" reads no reference log-probabilities and reports no KL.
    `kl_in_reward`: kl_coefficient times the summed KL estimate of sampling is taken from the reward of a completion,
    before the advantages, instead of added to the loss.
    `kl_target`: where positive, the KL coefficient starts at `kl_coefficient` and follows this KL, see
    `adapted_kl_coefficient`; `kl_horizon` rollouts away from it by a fifth or more change it by a fifth.
    `aggregation`: one of AGGREGATIONS, applied to surrogate, KL and entropy alike.
    `norm_length`: divisor of "seq_mean_token_sum_norm"; 0 takes the padded completion length.
    `normalizer`: "global" divides by counts of the mini-batch; "micro" takes the mean over microbatches
    of each one's aggregate, which depends on how rows are cut but is what the published run did.
    `replay_weight`: factor of the cross-entropy of replayed demonstrations, where an update is given any.
    """

    surrogate: str = "ppo"
    ratio_anchor: str = "behavior"
    correction: str = "none"
    correction_cap: float = 2.0
    clip_low: float = 0.2
    clip_high: float = 0.2
    clip_dual: float = 3.0
    mask_truncated: bool = False
    kl_estimator: str = "k3"
    kl_coefficient: float = 0.01
    kl_in_reward: bool = False
    kl_target: float = 0.0
    kl_horizon: int = 10_000
    entropy_coefficient: float = 0.0
    aggregation: str = "token_mean"
    norm_length: int = 0
    normalizer: str = "global"
    replay_weight: float = 0.0

    def __post_init__(self):
        for field, allowed in (
            ("surrogate", SURROGATES),
            ("ratio_anchor", ANCHORS),
            ("correction", CORRECTIONS),
            ("kl_estimator", KL_ESTIMATORS),
            ("aggregation", AGGREGATIONS),
            ("normalizer", NORMALIZERS),
        ):
            if getattr(self, field) not in allowed:
                raise ValueError(f"loss {field} is {getattr(self, field)!r}; use one of {', '.join(allowed)}")
        if not 0 <= self.clip_low <= 1 or self.clip_high < 0:
            raise ValueError(f"loss clip range is {self.clip_low}, {self.clip_high}; use 0 <= low <= 1 and high >= 0")
        if self.clip_dual and self.clip_dual <= 1:
            raise ValueError(f"loss clip_dual is {self.clip_dual}; use a number > 1, or 0 to switch it off")
        if self.norm_length < 0:
            raise ValueError(f"loss norm_length is {self.norm_length}; use a token count, or 0 for the padded length")
        if self.kl_estimator == "none" and (self.kl_coefficient or self.kl_in_reward):
            raise ValueError(
                "loss kl_estimator is 'none': set kl_coefficient to 0 and kl_in_reward to False, or choose one"
            )
        if self.kl_target < 0 or self.kl_horizon < 1 or (self.kl_target and not self.kl_coefficient):
            raise ValueError(
                f"loss kl_target is {self.kl_target}, kl_horizon {self.kl_horizon}, kl_coefficient "
                f"{self.kl_coefficient}; use a horizon >= 1 and a coefficient > 0 to start from, or target 0 for none"
            )
        if self.correction_cap <= 0:
            raise ValueError(f"loss correction_cap is {self.correction_cap}; use a number > 0")
        if self.correction != "none" and self.ratio_anchor == "behavior":
            raise ValueError(
                f"loss correction {self.correction!r} needs ratio_anchor 'proximal' or 'policy': with 'behavior' there"
                " is nothing to correct"
            )


def log_ratio(policy_logps: Float[Array, "n c"], behavior_logps: Float[Array, "n c"]) -> Float[Array, "n c"]:
    """Log of policy over behaviour probability, clamped to +-LOG_RATIO_LIMIT (no gradient outside)."""
    return jnp.clip(policy_logps - behavior_logps, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def clipped_surrogate(
    ratio: Float[Array, "n c"], advantages: Float[Array, "n c"], config: LossConfig
) -> tuple[Float[Array, "n c"], Bool[Array, "n c"], Bool[Array, "n c"]]:
    """Per-token surrogate loss (to minimise), where the clip replaced it, and where the dual clip bounded it.

    The dual clip exists because for a negative advantage nothing else bounds the loss as the ratio grows.
    """
    plain = -advantages * ratio
    clipped = -advantages * jnp.clip(ratio, 1 - config.clip_low, 1 + config.clip_high)
    loss = jnp.maximum(plain, clipped)
    if not config.clip_dual:
        return loss, clipped > plain, jnp.zeros(loss.shape, bool)
    bound = -advantages * config.clip_dual
    bounded = (advantages < 0) & (loss > bound)
    return jnp.where(advantages < 0, jnp.minimum(loss, bound), loss), clipped > plain, bounded


def sequence_log_ratio(log_ratios: Float[Array, "n c"], mask: Bool[Array, "n c"]) -> Float[Array, "n c"]:
    """Mean log-ratio of each row over its real tokens, at every token: the logarithm of GSPO's sequence ratio."""
    lengths = jnp.maximum(mask.sum(1, keepdims=True), 1)
    return jnp.broadcast_to(jnp.where(mask, log_ratios, 0.0).sum(1, keepdims=True) / lengths, log_ratios.shape)


def importance_weights(
    anchor_logps: Float[Array, "n c"], behavior_logps: Float[Array, "n c"], mask: Bool[Array, "n c"], config: LossConfig
) -> Float[Array, "n c"]:
    """Weight of every token for having been drawn by the behaviour policy instead of the anchor; no gradient."""
    change = jax.lax.stop_gradient(log_ratio(anchor_logps, behavior_logps))
    match config.correction:
        case "none":
            return jnp.ones_like(change)
        case "truncate":
            return jnp.minimum(jnp.exp(change), config.correction_cap)
        case "sequence_mask":
            total = jnp.where(mask, change, 0.0).sum(1, keepdims=True)
            weight = jnp.exp(jnp.clip(total, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))
            return jnp.broadcast_to(jnp.where(weight > config.correction_cap, 0.0, weight), change.shape)
    raise ValueError(f"correction is {config.correction!r}; use one of {', '.join(CORRECTIONS)}")


def kl_estimate(
    policy_logps: Float[Array, "n c"], reference_logps: Float[Array, "n c"], estimator: str
) -> Float[Array, "n c"]:
    """Per-token estimate of KL(policy || reference) from the sampled token alone.

    k1 is unbiased and may be negative; k2 is half the squared log-ratio; k3 is unbiased in value and
    never negative, with its argument clamped to +-LOG_RATIO_LIMIT and itself to KL_LIMIT.
    """
    match estimator:
        case "k1":
            return policy_logps - reference_logps
        case "k2":
            return 0.5 * jnp.square(policy_logps - reference_logps)
        case "k3":
            difference = jnp.clip(reference_logps - policy_logps, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
            # expm1 keeps the digits that exp(d) - d - 1 loses near 0, where training lives.
            return jnp.minimum(jnp.expm1(difference) - difference, KL_LIMIT)
    raise ValueError(f"KL estimator is {estimator!r}; use one of {', '.join(KL_ESTIMATORS[:3])}")


def adapted_kl_coefficient(
    coefficient: Float[Array, ""], kl: Float[Array, ""], num_rollouts: int, config: LossConfig
) -> Float[Array, ""]:
    """The coefficient for the next step, after `num_rollouts` rollouts at a mean KL of `kl`.

    Proportional control with the relative error cut at a fifth. A KL that is not finite changes nothing.
    Source: Ziegler et al. (arXiv 1909.08593) section 2.2.
    """
    error = jnp.clip(kl / config.kl_target - 1.0, -0.2, 0.2)
    adapted = coefficient * (1.0 + error * num_rollouts / config.kl_horizon)
    return jnp.where(jnp.isfinite(kl), adapted, coefficient)


def token_weights(
    mask: Bool[Array, "n c"], aggregation: str, num_blocks: int = 1, norm_length: int = 0
) -> Float[Array, "n c"]:
    """Weights w such that the aggregate of per-token values x is sum(w * x); 0 where masked.

    With `num_blocks` > 1 the rows are cut into that many contiguous blocks, each is aggregated alone,
    and the aggregate is the mean over blocks. Rows without any token count as no sequence.
    "seq_mean_token_sum_norm" is the sum of all tokens over one constant, not divided by the number of
    sequences, as published.

    Example, rows of 3 and 1 tokens in a width of 4: "token_mean" weighs each token 1/4,
    "seq_mean_token_sum" 1/2, "seq_mean_token_mean" 1/6 and 1/2, "seq_mean_token_sum_norm" 1/4.
    """
    real = jnp.asarray(mask, jnp.float32).reshape(num_blocks, -1, mask.shape[1])
    row_len = real.sum(2, keepdims=True)
    num_sequences = jnp.maximum((row_len > 0).sum(1, keepdims=True), 1)
    match aggregation:
        case "token_mean":
            divisor = jnp.maximum(row_len.sum(1, keepdims=True), 1)
        case "seq_mean_token_sum":
            divisor = num_sequences
        case "seq_mean_token_mean":
            divisor = num_sequences * jnp.maximum(row_len, 1)
        case "seq_mean_token_sum_norm":
            divisor = norm_length or mask.shape[1]
        case _:
            raise ValueError(f"aggregation is {aggregation!r}; use one of {', '.join(AGGREGATIONS)}")
    return (real / (divisor * num_blocks)).reshape(mask.shape)


def surrogate_terms(
    policy_logps: Float[Array, "n c"],
    anchor_logps: Float[Array, "n c"],
    advantages: Float[Array, "n c"],
    mask: Bool[Array, "n c"],
    config: LossConfig,
) -> tuple[Float[Array, "n c"], Float[Array, "n c"], Bool[Array, "n c"], Bool[Array, "n c"]]:
    """Per-token surrogate loss of `config.surrogate`, its ratio, where the ratio left the clip range to an effect,
    and where the dual clip bounded the loss."""
    log_ratios = log_ratio(policy_logps, anchor_logps)
    match config.surrogate:
        case "ppo":
            ratio = jnp.exp(log_ratios)
        case "gspo":
            ratio = jnp.exp(sequence_log_ratio(log_ratios, mask))
        case "cispo":
            ratio = jax.lax.stop_gradient(jnp.exp(log_ratios))
            clipped = jnp.clip(ratio, 1 - config.clip_low, 1 + config.clip_high)
            return -advantages * clipped * policy_logps, ratio, clipped != ratio, jnp.zeros(ratio.shape, bool)
        case _:
            raise ValueError(f"surrogate is {config.surrogate!r}; use one of {', '.join(SURROGATES)}")
    loss, clipped, dual_clipped = clipped_surrogate(ratio, advantages, config)
    return loss, ratio, clipped, dual_clipped


def grpo_loss(
    policy_logps: Float[Array, "n c"],
    entropy: Float[Array, "n c"],
    behavior_logps: Float[Array, "n c"],
    proximal_logps: Float[Array, "n c"],
    reference_logps: Float[Array, "n c"],
    advantages: Float[Array, "n c"],
    mask: Bool[Array, "n c"],
    weights: Float[Array, "n c"],
    num_tokens: Float[Array, ""],
    config: LossConfig,
    kl_coefficient: Float[Array, ""] | float | None = None,
) -> tuple[Float[Array, ""], Metrics, Metrics]:
    """Loss of some rows of a mini-batch, its additive metrics, and the metrics of which to take the maximum.

    `weights` are the rows' part of the `token_weights` of the mini-batch, and `num_tokens` the mini-batch's
    number of real tokens (float32, at least 1), so that losses and additive metrics of disjoint rows sum to
    those of the mini-batch. Only `policy_logps` and, if it has a coefficient, `entropy` carry gradient.
    `proximal_logps` is read for `ratio_anchor` "proximal" alone. Clip fractions, ratios, importance weights and gaps
    are token means; loss, surrogate, KL and entropy follow the aggregation. The importance ratios are those of the
    policy over the behaviour, as they are, without a cap. `kl_coefficient` takes the place of the config's.
    """
    if kl_coefficient is None:
        kl_coefficient = config.kl_coefficient
    anchor_logps = {
        "behavior": behavior_logps,
        "proximal": proximal_logps,
        "policy": jax.lax.stop_gradient(policy_logps),
    }[config.ratio_anchor]
    surrogate, ratio, clipped, dual_clipped = surrogate_terms(policy_logps, anchor_logps, advantages, mask, config)
    surrogate = surrogate * importance_weights(anchor_logps, behavior_logps, mask, config)

    def aggregate(values):
        return masked_sum(values * weights, mask)

    def mean(values):
        return masked_sum(values.astype(jnp.float32), mask) / num_tokens

    gap = jnp.abs(policy_logps - behavior_logps)
    importance = jnp.exp(log_ratio(policy_logps, behavior_logps))
    sums = {
        "policy/surrogate_loss": aggregate(surrogate),
        "policy/entropy": aggregate(entropy),
        "policy/clip_fraction": mean(clipped),
        "policy/clip_fraction_dual": mean(dual_clipped),
        "policy/approx_kl": mean(-log_ratio(policy_logps, anchor_logps)),
        "policy/ratio_mean": mean(ratio),
        "policy/behavior_gap_mean": mean(gap),
        "policy/importance_mean": mean(importance),
        "policy/importance_square_mean": mean(jnp.square(importance)),
    }
    loss = sums["policy/surrogate_loss"]
    if config.entropy_coefficient:
        loss = loss - config.entropy_coefficient * sums["policy/entropy"]
    if config.kl_estimator != "none":
        sums["policy/kl"] = aggregate(kl_estimate(policy_logps, reference_logps, config.kl_estimator))
        if not config.kl_in_reward:
            loss = loss + kl_coefficient * sums["policy/kl"]
    maxima = {
        "policy/ratio_max": jnp.max(jnp.where(mask, ratio, 0.0)),
        "policy/behavior_gap_max": jnp.max(jnp.where(mask, gap, 0.0)),
    }
    return loss, sums | {"policy/loss": loss}, maxima
