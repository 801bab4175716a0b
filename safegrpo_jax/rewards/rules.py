"""The single rules: statements about one completion, each a pure function of what was found and what is true.

Owns no totals (see `compose`). Every rule takes the spans and the labels of the same n rows and
gives a value in [0, 1] per row; the published levels are multiples of 1/4 and so exact in any float type.
Source: SafeGRPO, arXiv 2511.12982, and its published reward function.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from safegrpo_jax.rewards.machines import KeywordSet
from safegrpo_jax.types import SAFE, UNSAFE, VERDICT_SAFE, VERDICT_UNSAFE, Array, Labels, TagSpans

VISUAL, TEXT, COMBINED = range(3)
_LABELS = {"safe": SAFE, "unsafe": UNSAFE}


@dataclasses.dataclass(frozen=True)
class KeywordRule:
    """A rule that a config adds: the completion holds one of some texts, or none of them.

    `name`: in metrics and rollout files. `texts`: lower-case ASCII, found in any case. `where`: in the first closed
    "answer" (without one the rule is broken) or anywhere in the "completion". `wanted`: whether a text must be there
    or none may be. `label`: the combined label of the prompts it is about, "safe", "unsafe" or "any"; others keep it.
    `weight`: its share of the total, behind the gate; with 0 it is only measured.

    Raises:
      ValueError: a name that is no identifier, an unknown label, or a negative weight. Texts are checked by `RuleSet`.
    """

    name: str
    texts: tuple[str, ...]
    where: str = "answer"
    wanted: bool = False
    label: str = "any"
    weight: float = 0.0

    def __post_init__(self):
        if not self.name.isidentifier():
            raise ValueError(f"keyword rule name {self.name!r} does not fit a metric; use letters, digits and _")
        if self.label not in (*_LABELS, "any"):
            raise ValueError(f"keyword rule {self.name}: label is {self.label!r}; use 'safe', 'unsafe' or 'any'")
        if not self.weight >= 0:
            raise ValueError(f"keyword rule {self.name}: weight is {self.weight}; use a number >= 0")

    def keyword_set(self) -> KeywordSet:
        """What the rule's machine looks for."""
        return KeywordSet(self.texts, self.where)


def format_is_complete(spans: TagSpans, labels: Labels) -> Float[Array, "n"]:
    """1 where the completion passes the gate: all tags, the end of the reasoning, and the answer, in order."""
    del labels  # the same signature as every rule
    return spans.gate.astype(jnp.float32)


def visual_tag_matches_label(spans: TagSpans, labels: Labels) -> Float[Array, "n"]:
    """1 where the first visual tag gives the label."""
    return _says(spans, VISUAL, labels.visual).astype(jnp.float32)


def text_tag_matches_label(spans: TagSpans, labels: Labels) -> Float[Array, "n"]:
    """1 where the first text tag gives the label."""
    return _says(spans, TEXT, labels.text).astype(jnp.float32)


def combined_tag_matches_label(spans: TagSpans, labels: Labels) -> Float[Array, "n"]:
    """1 where the first combined tag gives the label."""
    return _says(spans, COMBINED, labels.combined).astype(jnp.float32)


def tags_match_labels(spans: TagSpans, labels: Labels) -> Float[Array, "n"]:
    """0 unless the combined tag is right; then 0.5, and 0.25 more for each of the other two that is right."""
    single = visual_tag_matches_label(spans, labels) + text_tag_matches_label(spans, labels)
    return combined_tag_matches_label(spans, labels) * (0.5 + 0.25 * single)


def behavior_matches_label(
    spans: TagSpans, labels: Labels, min_help_tokens: int = 0, max_refusal_tokens: int = 0
) -> Float[Array, "n"]:
    """1 where the combined tag is right and the answer acts on it: refuses if unsafe, helps if safe.

    Help shorter than `min_help_tokens` and, if that is not 0, refusals longer than `max_refusal_tokens` do not
    count; lengths are answer tokens between the markers. Without a closed answer the value is 0.
    """
    refuses = spans.answered & spans.refusal
    if max_refusal_tokens:
        refuses &= spans.answer_len <= max_refusal_tokens
    helps = spans.answered & ~spans.refusal & (spans.answer_len >= min_help_tokens)
    acts = jnp.where(labels.combined == UNSAFE, refuses, helps)
    return (acts & _says(spans, COMBINED, labels.combined)).astype(jnp.float32)


def keyword_rule_holds(spans: TagSpans, labels: Labels, column: int, rule: KeywordRule) -> Float[Array, "n"]:
    """1 where `rule` is kept or not about the prompt; its machine is `column` of the added ones."""
    found = jnp.asarray(spans.added_outcomes)[:, column] == 1
    kept = found if rule.wanted else ~found
    if rule.where == "answer":
        kept &= spans.answer_start >= 0
    if rule.label != "any":
        kept |= labels.combined != _LABELS[rule.label]
    return kept.astype(jnp.float32)


def answer_matches_gold(spans: TagSpans, labels: Labels) -> Float[Array, "n"]:
    """1 where the first closed answer is the gold one; the machine of listed answers is the last added one.

    Rows without a gold answer get 0.
    """
    gold = jnp.asarray(labels.gold_answer)
    return ((gold > 0) & (jnp.asarray(spans.added_outcomes)[:, -1] == gold)).astype(jnp.float32)


def completion_is_short(completion_len: Int[Array, "n"], max_len: int, buffer: int) -> Float[Array, "n"]:
    """1 up to `max_len - buffer` tokens, from there down to 0 at `max_len`, linearly.

    Source: DAPO (arXiv 2503.14476) eq. 13, soft overlong punishment; this is 1 plus its value.
    """
    return jnp.clip((max_len - completion_len.astype(jnp.float32)) / buffer, 0.0, 1.0)


def _says(spans: TagSpans, tag: int, label: Int[Array, "n"]) -> Bool[Array, "n"]:
    return jnp.asarray(spans.verdict)[:, tag] == jnp.where(label == UNSAFE, VERDICT_UNSAFE, VERDICT_SAFE)
