"""From single rules to the reward: gate, weights, and the figures to watch.

Owns RewardConfig and how rules combine; the rules themselves are in `rules`. The total is
gate x (tag_weight x tags + behavior_weight x behavior); an ablation is a config with a weight of 0. With equal
weights the levels 0, .25, .375, .5, .75, .875 and 1 are exact in float32 and bfloat16.
Source: SafeGRPO, arXiv 2511.12982.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from safegrpo_jax.rewards import rules
from safegrpo_jax.rewards.machines import REFUSAL_KEYWORDS, REFUSAL_PHRASES, RuleSet
from safegrpo_jax.types import UNSAFE, Array, Labels, Metrics, Rewards, TagSpans


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """How completions are rewarded.

    `refusal_keywords` serve rule set `reference` (anywhere in the answer), `refusal_phrases` serve `strict`
    (at the head of the answer); both are lower-case ASCII. With `gate` False a malformed completion still earns
    its parts. Lengths are answer tokens; 0 means no limit.

    Raises:
      ValueError: a weight or length out of range, or refusal texts that cannot be matched.
    """

    rule_set: str = "reference"
    gate: bool = True
    tag_weight: float = 0.5
    behavior_weight: float = 0.5
    refusal_keywords: tuple[str, ...] = REFUSAL_KEYWORDS
    refusal_phrases: tuple[str, ...] = REFUSAL_PHRASES
    min_help_tokens: int = 0
    max_refusal_tokens: int = 0

    def __post_init__(self):
        weights = (self.tag_weight, self.behavior_weight)
        if not (min(weights) >= 0 and 0 < sum(weights) <= 1):
            raise ValueError(f"tag_weight, behavior_weight are {weights}; use non-negative ones with a sum in (0, 1]")
        if self.min_help_tokens < 0 or self.max_refusal_tokens < 0:
            raise ValueError(
                f"min_help_tokens={self.min_help_tokens}, max_refusal_tokens={self.max_refusal_tokens}; use 0 or more"
            )
        self.rules()

    def rules(self) -> RuleSet:
        """The rule set to build tables for."""
        return RuleSet(self.rule_set, self.refusal_phrases if self.rule_set == "strict" else self.refusal_keywords)


def repeat_labels(labels: Labels, group_size: int) -> Labels:
    """The labels of the rollouts: row r is that of prompt r // group_size."""
    return jax.tree.map(lambda leaf: jnp.repeat(jnp.asarray(leaf), group_size, axis=0), labels)


def compute_rewards(spans: TagSpans, labels: Labels, config: RewardConfig) -> Rewards:
    """Rewards of n completions, given the labels of the same n rows.

    Rows whose label says `tagged` False get 0 everywhere: they are graded by other means.
    """
    values = {
        "gate": rules.format_is_complete(spans, labels),
        "visual_tag_matches_label": rules.visual_tag_matches_label(spans, labels),
        "text_tag_matches_label": rules.text_tag_matches_label(spans, labels),
        "combined_tag_matches_label": rules.combined_tag_matches_label(spans, labels),
        "tag_reward": rules.tags_match_labels(spans, labels),
        "behavior_reward": rules.behavior_matches_label(
            spans, labels, config.min_help_tokens, config.max_refusal_tokens
        ),
    }
    values = {name: jnp.where(labels.tagged, value, 0.0) for name, value in values.items()}
    total = config.tag_weight * values["tag_reward"] + config.behavior_weight * values["behavior_reward"]
    return Rewards(total=total * values["gate"] if config.gate else total, rules=values)


def reward_metrics(rewards: Rewards, labels: Labels) -> Metrics:
    """Means of the total and of every rule, over all tagged rows and over those of each combined label.

    Names are `reward/<name>_mean`, `..._mean_safe`, `..._mean_unsafe`; a cell without rows gives 0.
    """
    unsafe = jnp.asarray(labels.combined) == UNSAFE
    cells = {"": labels.tagged, "_safe": labels.tagged & ~unsafe, "_unsafe": labels.tagged & unsafe}
    return {
        f"reward/{name}_mean{cell}": _mean(value, members)
        for name, value in {"total": rewards.total, **rewards.rules}.items()
        for cell, members in cells.items()
    }


def disagreement(first: Rewards, second: Rewards, labels: Labels) -> Float[Array, ""]:
    """The fraction of tagged rows on which two rule sets give different totals."""
    return _mean((first.total != second.total).astype(jnp.float32), labels.tagged)


def _mean(value: Float[Array, "n"], members: Bool[Array, "n"]) -> Float[Array, ""]:
    return jnp.sum(jnp.where(members, value, 0.0)) / jnp.maximum(jnp.sum(members), 1)
