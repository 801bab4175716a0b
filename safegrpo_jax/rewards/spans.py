"""Runs the reward tables over sampled tokens: what a completion holds, and where.

Owns the state carried by the decode loop and the scan over finished completions; both are the same `step`, so
they cannot disagree. A step is one gather for the token's class and one for the transitions of all machines. A tag
holds exactly two `<`, so remembering the tokens of the last two `<` tells where it began; an answer marker holds one.
Token indices count the active tokens of a row, which for right-padded completions is the array index.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Int, Int32

from safegrpo_jax.rewards.automaton import ANSWER, FIRST_TAG, GATE, STATE_BITS, STATE_MASK, RewardTables
from safegrpo_jax.rewards.machines import ANSWER_AMBIGUOUS, ANSWER_HELP, ANSWER_REFUSAL, TAGS
from safegrpo_jax.types import VERDICT_NONE, Array, TagSpans, pytree


@pytree
class SpanState:
    """Where each of n completions stands in the reward machines; every leaf has n in front.

    `rows` are the machines' rows of `RewardTables.transitions`. `*_open` are the tokens that hold the last and the
    last but one `<`. The other fields are those of `TagSpans`, not yet masked; `answer_inside` is the first token
    wholly behind the opening marker.
    """

    rows: Int32[Array, "n machines"]
    index: Int32[Array, "n"]
    last_open: Int32[Array, "n"]
    previous_open: Int32[Array, "n"]
    verdict: Int32[Array, "n 3"]
    tag_start: Int32[Array, "n 3"]
    tag_end: Int32[Array, "n 3"]
    tag_count: Int32[Array, "n 3"]
    answer_start: Int32[Array, "n"]
    answer_inside: Int32[Array, "n"]
    answer_end: Int32[Array, "n"]
    answer_len: Int32[Array, "n"]


def init_state(tables: RewardTables, num_rows: int) -> SpanState:
    """The state of `num_rows` completions without a token."""
    missing = jnp.full(num_rows, -1, jnp.int32)
    zero = jnp.zeros(num_rows, jnp.int32)
    missing_tags, zero_tags = (jnp.broadcast_to(value[:, None], (num_rows, len(TAGS))) for value in (missing, zero))
    return SpanState(
        rows=jnp.broadcast_to(jnp.asarray(tables.first_row), (num_rows, tables.first_row.shape[0])),
        index=zero,
        last_open=missing,
        previous_open=missing,
        verdict=zero_tags,
        tag_start=missing_tags,
        tag_end=missing_tags,
        tag_count=zero_tags,
        answer_start=missing,
        answer_inside=missing,
        answer_end=missing,
        answer_len=zero,
    )


def step(tables: RewardTables, state: SpanState, token_ids: Int[Array, "n"], active: Bool[Array, "n"]) -> SpanState:
    """Feeds one token to each row; rows that are not active stay as they are.

    Token ids of active rows must lie within the tables' vocabulary: nothing checks them.
    """
    token_class = _lookup(tables.token_class, jnp.where(active, token_ids, 0))
    token_class = jnp.where(active, token_class, 0)  # class 0 changes nothing
    entries = _lookup(tables.transitions, state.rows, token_class[:, None])
    events = entries >> STATE_BITS
    opens = events[:, GATE]
    state = _note_tags(state, events[:, FIRST_TAG:ANSWER])
    state = _note_answer(state, events[:, ANSWER])
    return dataclasses.replace(
        state,
        rows=(entries & STATE_MASK) + jnp.asarray(tables.first_row),
        index=state.index + active,
        last_open=jnp.where(opens > 0, state.index, state.last_open),
        previous_open=jnp.where(opens > 1, state.index, jnp.where(opens == 1, state.last_open, state.previous_open)),
    )


def _lookup(table: Array, *indices: Array) -> Array:
    """`table[indices]` as int32, without bounds checks."""
    return jnp.asarray(table).at[indices].get(mode="promise_in_bounds").astype(jnp.int32)


def _note_tags(state: SpanState, events: Int[Array, "n 3"]) -> SpanState:
    """Counts the tags that end in this token and places those seen for the first time."""
    verdict, opens_before_end, count = events & 3, (events >> 2) & 3, events >> 4
    first = (verdict != VERDICT_NONE) & (state.verdict == VERDICT_NONE)
    index, last, previous = (field[:, None] for field in (state.index, state.last_open, state.previous_open))
    # The opening `<` is the last but one before the tag's end.
    start = jnp.where(opens_before_end == 0, previous, jnp.where(opens_before_end == 1, last, index))
    return dataclasses.replace(
        state,
        verdict=jnp.where(first, verdict, state.verdict),
        tag_start=jnp.where(first, start, state.tag_start),
        tag_end=jnp.where(first, index + 1, state.tag_end),
        tag_count=state.tag_count + count,
    )


def _note_answer(state: SpanState, event: Int[Array, "n"]) -> SpanState:
    """Places the markers of the first answer; the event of each occurs once per completion."""
    opened, closed = event & 3, (event >> 2) & 3
    inside = jnp.where(opened > 0, state.index + 1, state.answer_inside)
    closing_start = jnp.where(closed == 2, state.index, state.last_open)
    return dataclasses.replace(
        state,
        answer_start=jnp.where(opened > 0, jnp.where(opened == 2, state.index, state.last_open), state.answer_start),
        answer_inside=inside,
        answer_end=jnp.where(closed > 0, state.index + 1, state.answer_end),
        answer_len=jnp.where(closed > 0, jnp.maximum(closing_start - inside, 0), state.answer_len),
    )


def advance(
    tables: RewardTables, state: SpanState, token_ids: Int[Array, "n c"], mask: Bool[Array, "n c"]
) -> SpanState:
    """`step` over c tokens of each row; masked tokens (False) are skipped."""

    def body(state: SpanState, column: tuple[Array, Array]) -> tuple[SpanState, None]:
        return step(tables, state, *column), None

    tables = jax.tree.map(jnp.asarray, tables)  # put host tables on the device once, not in every step
    token_ids, mask = jnp.asarray(token_ids), jnp.asarray(mask)
    # Inside shard_map a loop wants its state to vary over the mesh axes that the tokens vary over, as this zero does.
    state = jax.tree.map(lambda leaf: leaf + jnp.zeros_like(token_ids, leaf.dtype, shape=leaf.shape), state)
    return jax.lax.scan(body, state, (token_ids.T, mask.T))[0]


def scan(tables: RewardTables, token_ids: Int[Array, "n c"], mask: Bool[Array, "n c"]) -> TagSpans:
    """What finished completions hold: `advance` over all their tokens."""
    return finish(tables, advance(tables, init_state(tables, token_ids.shape[0]), token_ids, mask))


def finish(tables: RewardTables, state: SpanState) -> TagSpans:
    """What the tokens fed so far hold, taking the completion as ended here.

    A tag's or the answer's span covers exactly the tokens that hold a byte of it, markers included. `answered`
    is True where the first answer is closed and counts as help or refusal; under `strict` an answer that refuses
    late is neither. `answer_len` counts the tokens that hold no byte of the two markers.
    """
    outcome = _lookup(tables.outcome, state.rows)
    answer = outcome[:, ANSWER]
    closed = answer >= ANSWER_HELP
    return TagSpans(
        gate=outcome[:, GATE] == 1,
        verdict=state.verdict,
        tag_start=state.tag_start,
        tag_end=state.tag_end,
        tag_count=state.tag_count,
        answer_start=jnp.where(closed, state.answer_start, -1),
        answer_end=state.answer_end,
        answered=closed & (answer != ANSWER_AMBIGUOUS),
        refusal=answer == ANSWER_REFUSAL,
        answer_len=state.answer_len,
        added_outcomes=outcome[:, ANSWER + 1 :],
    )
