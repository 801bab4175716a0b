"""From single rules to the reward: gate, weights, parts, and the figures to watch.

Owns RewardConfig and how rules combine; the rules themselves are in `rules`. The total is
gate x (tag_weight x tags + behavior_weight x behavior); an ablation is a config with a weight of 0. With equal
weights the levels 0, .25, .375, .5, .75, .875 and 1 are exact in float32 and bfloat16. What goes beyond the published
reward (keyword rules, anchors, the price of length) is off unless a config asks for it.
Source: SafeGRPO, arXiv 2511.12982.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Int32

from safegrpo_jax.rewards import rules
from safegrpo_jax.rewards.machines import (
    REFUSAL_KEYWORDS,
    REFUSAL_PHRASES,
    RuleSet,
    build_text_machines,
    default_rule_set,
    normalize_answer,
)
from safegrpo_jax.rewards.rules import KeywordRule
from safegrpo_jax.types import UNSAFE, Array, Labels, Metrics, Rewards, TagSpans

RULES = (
    "gate", "visual_tag_matches_label", "text_tag_matches_label", "combined_tag_matches_label", "tag_reward",
    "behavior_reward",
)  # fmt: skip
ANCHOR, LENGTH = "answer_matches_gold", "completion_is_short"
_ROUNDING = 1e-6  # of a float32 sum of weights that are no binary fractions
CELLS = tuple("_".join(labels) for labels in itertools.product(("safe", "unsafe"), repeat=3))


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """How completions are rewarded.

    `refusal_keywords` serve rule set `reference` (anywhere in the answer), `refusal_phrases` serve `strict`
    (at the head of the answer); both are lower-case ASCII. With `gate` False a malformed completion still earns
    its parts. Answer lengths are in tokens; 0 means no limit.
    `keyword_rules`: rules of your own. `anchor_answers`: the possible gold answers of plain questions mixed into the
    batch ("A", "B", ...), whose reward is then 1 for the gold one inside `<answer>`, else 0; empty is off.
    `overlong_buffer`: the last so many tokens before the length limit cost up to `overlong_penalty`; 0 is off.

    Raises:
      ValueError: a weight or length out of range, or texts that cannot be matched or make too large a machine.
    """

    rule_set: str = "reference"
    gate: bool = True
    tag_weight: float = 0.5
    behavior_weight: float = 0.5
    refusal_keywords: tuple[str, ...] = REFUSAL_KEYWORDS
    refusal_phrases: tuple[str, ...] = REFUSAL_PHRASES
    min_help_tokens: int = 0
    max_refusal_tokens: int = 0
    keyword_rules: tuple[KeywordRule, ...] = ()
    anchor_answers: tuple[str, ...] = ()
    overlong_buffer: int = 0
    overlong_penalty: float = 1.0

    def __post_init__(self):
        weights = (self.tag_weight, self.behavior_weight, *(rule.weight for rule in self.keyword_rules))
        if not (min(weights) >= 0 and 0 < sum(weights) <= 1):
            raise ValueError(
                f"tag_weight, behavior_weight and those of keyword_rules are {weights}; "
                "use non-negative ones with a sum in (0, 1]"
            )
        if self.min_help_tokens < 0 or self.max_refusal_tokens < 0:
            raise ValueError(
                f"min_help_tokens={self.min_help_tokens}, max_refusal_tokens={self.max_refusal_tokens}; use 0 or more"
            )
        if self.overlong_buffer < 0 or not self.overlong_penalty > 0:
            raise ValueError(
                f"overlong_buffer={self.overlong_buffer}, overlong_penalty={self.overlong_penalty}; "
                "use a number of tokens (0 is off) and a penalty > 0"
            )
        names = [rule.name for rule in self.keyword_rules]
        if taken := {name for name in names if names.count(name) > 1 or name in (*RULES, ANCHOR, LENGTH, "total")}:
            raise ValueError(f"keyword_rules use the names {sorted(taken)} twice or for another rule; use new ones")
        for rule_set in (self.rules(), self.rules(self.other_rule_set)):
            if rule_set != default_rule_set(rule_set.name):  # texts of one's own may make too large a machine
                build_text_machines(rule_set)

    @property
    def other_rule_set(self) -> str:
        """The rule set that is not used, to compare with."""
        return "reference" if self.rule_set == "strict" else "strict"

    @property
    def weights(self) -> dict[str, float]:
        """Share of each rule in the total of a tagged row."""
        named = {rule.name: rule.weight for rule in self.keyword_rules}
        return {"tag_reward": self.tag_weight, "behavior_reward": self.behavior_weight} | named

    def rules(self, rule_set: str = "") -> RuleSet:
        """What to build tables for; `rule_set` instead of the configured one."""
        name = rule_set or self.rule_set
        return RuleSet(
            name,
            self.refusal_phrases if name == "strict" else self.refusal_keywords,
            tuple(rule.keyword_set() for rule in self.keyword_rules),
            self.anchor_answers,
        )


class RewardPart(NamedTuple):
    """One addend of the total: a weight and values in [0, 1]."""

    weight: float
    value: Float[Array, "n"]


def repeat_labels(labels: Labels, group_size: int) -> Labels:
    """The labels of the rollouts: row r is that of prompt r // group_size."""
    return jax.tree.map(lambda leaf: jnp.repeat(jnp.asarray(leaf), group_size, axis=0), labels)


def gold_answer_numbers(answers: Sequence[str], config: RewardConfig) -> Int32[np.ndarray, "b"]:
    """1 + the index in `config.anchor_answers` of each gold answer, 0 for one that is not listed. For `Labels`."""
    numbers = {normalize_answer(answer): number for number, answer in enumerate(config.anchor_answers, 1)}
    return np.array([numbers.get(normalize_answer(answer), 0) for answer in answers], np.int32)


def compute_rewards(spans: TagSpans, labels: Labels, config: RewardConfig) -> Rewards:
    """Rewards of n completions, given the labels of the same n rows.

    Rows whose label says `tagged` False get 0 everywhere, but for `answer_matches_gold` where they have a gold answer
    and the config lists answers. The price of length is added by `shape_by_length`.

    Raises:
      ValueError: (while tracing) the config lists answers and the labels say nothing of them.
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
    for column, rule in enumerate(config.keyword_rules):
        values[rule.name] = rules.keyword_rule_holds(spans, labels, column, rule)
    values = {name: jnp.where(labels.tagged, value, 0.0) for name, value in values.items()}
    if config.anchor_answers:
        if labels.gold_answer is None:
            raise ValueError("rewards.anchor_answers is set but labels.gold_answer is None; use gold_answer_numbers")
        values[ANCHOR] = jnp.where(labels.tagged, 0.0, rules.answer_matches_gold(spans, labels))
    return Rewards(total=_total(values, config), rules=values)


def shape_by_length(
    rewards: Rewards, labels: Labels, completion_len: Int[Array, "n"], max_len: int, config: RewardConfig
) -> Rewards:
    """Subtracts up to `overlong_penalty` from graded rows that come close to `max_len` tokens, if that is on.

    `completion_len` counts sampled tokens, the end token included. Source: DAPO (arXiv 2503.14476) eq. 13.
    """
    if not config.overlong_buffer:
        return rewards
    graded = labels.tagged if labels.gold_answer is None else labels.tagged | (labels.gold_answer > 0)
    short = rules.completion_is_short(completion_len, max_len, config.overlong_buffer)
    values = rewards.rules | {LENGTH: jnp.where(graded, short, 1.0)}
    return Rewards(total=_total(values, config), rules=values)


def reward_parts(values: dict[str, Float[Array, "n"]], config: RewardConfig) -> dict[str, RewardPart]:
    """The addends of the total, by rule, from the values of all rules (`Rewards.rules`).

    Their weighted sum is the total, but for the constant `overlong_penalty` where the length is a part.
    """
    gate = values["gate"] if config.gate else 1.0
    parts = {name: RewardPart(weight, gate * values[name]) for name, weight in config.weights.items() if weight}
    if ANCHOR in values:
        parts[ANCHOR] = RewardPart(1.0, values[ANCHOR])
    if LENGTH in values:
        parts[LENGTH] = RewardPart(config.overlong_penalty, values[LENGTH])
    return parts


def credited_spans(
    rewards: Rewards, spans: TagSpans, labels: Labels, config: RewardConfig
) -> tuple[Float[Array, "n 4"], Int[Array, "n 4"], Int[Array, "n 4"]]:
    """The spans that stand for a rule of their own: the rule's value behind the gate, first token, one past the last.

    In the order visual, text and combined verdict, answer (for its behaviour). A span is -1 to -1 where nothing was
    found, where the config gives its rule no weight, and in rows that are not tagged.
    """
    names = ("visual_tag_matches_label", "text_tag_matches_label", "combined_tag_matches_label", "behavior_reward")
    gate = rewards.rules["gate"] if config.gate else 1.0
    weighted = jnp.array([config.tag_weight > 0] * 3 + [config.behavior_weight > 0])
    credited = weighted & jnp.asarray(labels.tagged)[:, None]
    starts = jnp.concatenate([spans.tag_start, spans.answer_start[:, None]], axis=1)
    ends = jnp.concatenate([spans.tag_end, spans.answer_end[:, None]], axis=1)
    values = jnp.stack([gate * rewards.rules[name] for name in names], axis=1)
    return values, jnp.where(credited, starts, -1), jnp.where(credited, ends, -1)


def reward_metrics(rewards: Rewards, labels: Labels) -> Metrics:
    """Means and pass rates (share of rows with value 1) of the total and of every rule, over tagged rows.

    `reward/<name>_mean`, `..._mean_safe`, `..._mean_unsafe`: over all, and by combined label; pass rates of the same
    rows are `reward_cells/<name>_pass_rate...`. `reward_cells/<name>_mean_<cell>`, `..._pass_rate_<cell>`: by all three
    labels, a cell being visual_text_combined such as `safe_safe_unsafe`, with `rows_<cell>` the number of its rows; a
    cell without rows gives 0. The anchor's mean is over rows with a gold answer, `reward/anchor_rows` their number.
    """
    named = {name: value for name, value in {"total": rewards.total, **rewards.rules}.items() if name != ANCHOR}
    values = jnp.stack(list(named.values()), axis=1)
    members = _cell_members(labels)
    counts = members.sum(0)

    def cell_means(values: Float[Array, "n r"]) -> Float[Array, "cells r"]:
        sums = jnp.sum(jnp.where(members[:, :, None], values[:, None], 0.0), axis=0)
        return sums / jnp.maximum(counts, 1)[:, None]

    means, pass_rates = cell_means(values), cell_means((values > 1 - _ROUNDING).astype(jnp.float32))
    metrics = {}
    for row, cell in enumerate(("", "_safe", "_unsafe", *(f"_{cell}" for cell in CELLS))):
        for column, name in enumerate(named):
            metrics[f"reward{'_cells' * (row > 2)}/{name}_mean{cell}"] = means[row, column]
            metrics[f"reward_cells/{name}_pass_rate{cell}"] = pass_rates[row, column]
        if row > 2:
            metrics[f"reward_cells/rows{cell}"] = counts[row]
    if ANCHOR in rewards.rules:
        anchored = ~labels.tagged & (labels.gold_answer > 0)
        metrics[f"reward/{ANCHOR}_mean"] = _mean(rewards.rules[ANCHOR], anchored)
        metrics["reward/anchor_rows"] = jnp.sum(anchored)
    return metrics


def disagreement(first: Rewards, second: Rewards, labels: Labels) -> Float[Array, ""]:
    """The fraction of tagged rows on which two rule sets give different totals."""
    return mean_of_tagged((first.total != second.total).astype(jnp.float32), labels)


def mean_of_tagged(values: Float[Array, "n"], labels: Labels) -> Float[Array, ""]:
    """Mean over the tagged rows, 0 without any."""
    return _mean(values, labels.tagged)


def _total(values: dict[str, Float[Array, "n"]], config: RewardConfig) -> Float[Array, "n"]:
    total = sum(part.weight * part.value for part in reward_parts(values, config).values())
    return total - config.overlong_penalty if LENGTH in values else total


def _cell_members(labels: Labels) -> Bool[Array, "n cells"]:
    """Which rows belong to: all, combined safe, combined unsafe, and each of CELLS; tagged rows only."""
    visual, text, combined = (jnp.asarray(label) == UNSAFE for label in (labels.visual, labels.text, labels.combined))
    number = 4 * visual + 2 * text + combined
    by_combined = jnp.stack([jnp.ones_like(combined), ~combined, combined], axis=1)
    by_all = number[:, None] == jnp.arange(len(CELLS))
    return jnp.concatenate([by_combined, by_all], axis=1) & jnp.asarray(labels.tagged)[:, None]


def _mean(value: Float[Array, "n"], members: Bool[Array, "n"]) -> Float[Array, ""]:
    return jnp.sum(jnp.where(members, value, 0.0)) / jnp.maximum(jnp.sum(members), 1)
