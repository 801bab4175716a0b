"""Decode slots: one token per step for every slot, and a new rollout for a slot in the step after its last has ended.

Knows nothing of the model (four functions), of how a token is chosen (one function) or of rewards beyond
carrying the automaton state, so that the reward spans are known when the last token is. Slots, rollouts and prefixes
lie in z shards that never look at one another. The first token of a rollout comes from its prompt's last
hidden state; token j >= 1 comes from feeding token j - 1. The last token is therefore never fed, and a slot
works exactly as many steps on a rollout as this has tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from safegrpo_jax.rewards import spans as reward_spans
from safegrpo_jax.sampling.cache import PrivateCache, PromptPool, take_sharded, write_sharded
from safegrpo_jax.types import Array, ArrayTree, CacheView, Key, KVCache, Params, Prompts, VisionFeatures, pytree

PAD_ID = 0  # fills what no rollout has written; always masked

ChooseTokens = Callable[[Float[Array, "n v"], Key, Int[Array, "n"]], tuple[Int[Array, "n"], Float[Array, "n"]]]


@dataclasses.dataclass(frozen=True)
class ModelFunctions:
    """What the sampler needs of a model.

    encode: (params, prompts) -> features of all images of the batch.
    prefill: (params, prompts, features) -> last hidden state [b d], keys and values [b k p e] of each layer; for all
        prompts whose images were encoded, or some of them.
    unpack: params -> what `decode` wants beside them, made once for the steps of a chunk.
    decode: (params, unpacked, token_ids [n], positions [n], view, cache) -> (hidden [n d], cache); see `CacheView`.
    logits: (params, hidden [n d]) -> [n v] float32.
    """

    encode: Callable[[Params, Prompts], VisionFeatures]
    prefill: Callable[[Params, Prompts, VisionFeatures], tuple[Array, tuple[Array, ...], tuple[Array, ...]]]
    unpack: Callable[[Params], ArrayTree]
    decode: Callable[[Params, ArrayTree, Array, Array, CacheView, KVCache], tuple[Array, KVCache]]
    logits: Callable[[Params, Array], Array]


@pytree
class DecodeState:
    """Which rollout each slot works on, and all that was sampled so far. Numbers count within a shard.

    `slot_rows`: the rollout of a slot, the number of rollouts where it is idle; `slot_prefixes`: where its prompt is
    held; `last_ids`: its newest token. Rollouts begin in order: those below `next_row` have.
    `stopped`: ended by a stop token. `num_steps` steps so far, in which `num_busy` slots of a shard gave a token.
    """

    slot_rows: Int[Array, "z slots"]
    slot_prefixes: Int[Array, "z slots"]
    last_ids: Int[Array, "z slots"]
    next_row: Int[Array, "z"]
    completion_ids: Int[Array, "z rows c"]
    completion_logps: Float[Array, "z rows c"]
    completion_len: Int[Array, "z rows"]
    stopped: Bool[Array, "z rows"]
    reward_state: Any  # rewards.spans.SpanState of all rollouts
    num_steps: Int[Array, ""]
    num_busy: Int[Array, "z"]


@pytree
class Queue:
    """Which rollouts may begin: those below `ready_rows`, whose prompt is held at `prompt_prefixes`."""

    ready_rows: Int[Array, "z"]
    prompt_prefixes: Int[Array, "z prompts"]


@pytree
class DecodeReport:
    """What the host needs to know between two chunks; `longest` is the length of the longest rollout in work."""

    slot_rows: Int[Array, "z slots"]
    next_row: Int[Array, "z"]
    longest: Int[Array, ""]
    num_steps: Int[Array, ""]
    num_busy: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class DecodeSettings:
    """`group_size` samples per prompt of at most `max_new_tokens` tokens; `chunk` steps between two reports."""

    group_size: int
    max_new_tokens: int
    chunk: int
    stop_ids: tuple[int, ...]


def init_state(
    num_shards: int, num_slots: int, num_rows: int, settings: DecodeSettings, reward_tables: ArrayTree
) -> DecodeState:
    """Nothing sampled, all slots idle; slots and rows are those of a shard."""
    rows, slots = (num_shards, num_rows), (num_shards, num_slots)
    spans = reward_spans.init_state(reward_tables, num_shards * num_rows)
    return DecodeState(
        slot_rows=jnp.full(slots, num_rows, jnp.int32),
        slot_prefixes=jnp.zeros(slots, jnp.int32),
        last_ids=jnp.full(slots, PAD_ID, jnp.int32),
        next_row=jnp.zeros(num_shards, jnp.int32),
        completion_ids=jnp.full((*rows, settings.max_new_tokens), PAD_ID, jnp.int32),
        completion_logps=jnp.zeros((*rows, settings.max_new_tokens), jnp.float32),
        completion_len=jnp.zeros(rows, jnp.int32),
        stopped=jnp.zeros(rows, bool),
        reward_state=jax.tree.map(lambda leaf: leaf.reshape(*rows, *leaf.shape[1:]), spans),
        num_steps=jnp.int32(0),
        num_busy=jnp.zeros(num_shards, jnp.int32),
    )


def decode_chunk(
    functions: ModelFunctions,
    params: Params,
    state: DecodeState,
    private: PrivateCache,
    pool: PromptPool,
    queue: Queue,
    row_keys: Key,
    choose: ChooseTokens,
    settings: DecodeSettings,
    reward_tables: ArrayTree,
) -> tuple[DecodeState, PrivateCache, DecodeReport]:
    """At most `settings.chunk` steps; fewer when no slot has work, or a rollout outgrows the private columns.

    `choose(logits [n v], keys [n], token_index [n])` returns the next id of every slot and its log-probability. A row
    ends with one of `stop_ids`, which counts as its last token, or with `max_new_tokens` tokens. Traceable;
    nothing raises.
    """
    unpacked = functions.unpack(params)
    num_rows = state.completion_len.shape[1]
    num_columns = private.num_columns
    last_step = state.num_steps + settings.chunk

    def goes_on(carry: tuple[DecodeState, PrivateCache]) -> Bool[Array, ""]:
        state, _ = carry
        # One number, so that the shards wait for each other once a step: 0 with nothing to do, else 1 + the longest.
        works = (state.slot_rows < num_rows).any(axis=1) | (state.next_row < queue.ready_rows)
        room_needed = jnp.max(jnp.where(works, 1 + _longest(state), 0))
        return (state.num_steps < last_step) & (0 < room_needed) & (room_needed <= 1 + num_columns)

    def advance(carry: tuple[DecodeState, PrivateCache]) -> tuple[DecodeState, PrivateCache]:
        state, private = carry
        state, fresh = _begin_rows(state, queue, settings.group_size)
        lens = _of_slots(state.completion_len, state.slot_rows)
        column = (private.column + 1) % num_columns
        view = _view_cache(state, column, jnp.where(fresh, 0, lens), len(pool.mask), settings.group_size)
        positions = take_sharded(pool.first_pos, state.slot_prefixes) + lens.reshape(-1) - 1
        cache = KVCache(pool.keys, pool.values, pool.mask, private.keys, private.values)
        hidden, cache = functions.decode(params, unpacked, state.last_ids.reshape(-1), positions, view, cache)
        first = take_sharded(pool.last_hidden, state.slot_prefixes)
        hidden = jnp.where(fresh.reshape(-1)[:, None], first, hidden)
        keys = _of_slots(row_keys, state.slot_rows).reshape(-1)
        ids, logps = choose(functions.logits(params, hidden), keys, lens.reshape(-1))
        state = _append(state, ids.reshape(lens.shape), logps.reshape(lens.shape), lens, settings, reward_tables)
        return state, PrivateCache(cache.private_keys, cache.private_values, column)

    state, private = jax.lax.while_loop(goes_on, advance, (state, private))
    return state, private, _report(state)


def _report(state: DecodeState) -> DecodeReport:
    longest, num_busy = jnp.max(_longest(state)), jnp.sum(state.num_busy)
    return DecodeReport(state.slot_rows, state.next_row, longest, state.num_steps, num_busy)


def _of_slots(values: Array, slot_rows: Int[Array, "z slots"]) -> Array:
    """[z rows ...] -> [z slots ...]: the value of each slot's rollout, that of any rollout where a slot is idle."""
    return jax.vmap(lambda values, rows: values.at[rows].get(mode="clip"))(values, slot_rows)


def _longest(state: DecodeState) -> Int[Array, "z"]:
    busy = state.slot_rows < state.completion_len.shape[1]
    return jnp.max(jnp.where(busy, _of_slots(state.completion_len, state.slot_rows), 0), axis=1)


def _begin_rows(state: DecodeState, queue: Queue, group_size: int) -> tuple[DecodeState, Bool[Array, "z slots"]]:
    """Gives the idle slots of each shard its next rollouts, in order; True for the slots that got one."""
    idle = state.slot_rows == state.completion_len.shape[1]
    candidates = state.next_row[:, None] + jnp.cumsum(idle, axis=1, dtype=jnp.int32) - 1
    fresh = idle & (candidates < queue.ready_rows[:, None])
    prefixes = _of_slots(queue.prompt_prefixes, candidates // group_size)
    state = dataclasses.replace(
        state,
        slot_rows=jnp.where(fresh, candidates, state.slot_rows),
        slot_prefixes=jnp.where(fresh, prefixes, state.slot_prefixes),
        next_row=state.next_row + fresh.sum(axis=1, dtype=jnp.int32),
    )
    return state, fresh


def _view_cache(
    state: DecodeState,
    column: Int[Array, ""],
    private_len: Int[Array, "z slots"],
    num_prefixes: int,
    group_size: int,
) -> CacheView:
    num_shards, num_slots = state.slot_rows.shape
    num_seats = num_prefixes // num_shards * group_size
    busy = state.slot_rows < state.completion_len.shape[1]
    seats = jnp.where(busy, state.slot_prefixes * group_size + state.slot_rows % group_size, num_seats)
    slots = jnp.broadcast_to(jnp.arange(num_slots, dtype=jnp.int32), seats.shape)
    nobody = jnp.zeros(num_shards * num_seats, jnp.int32)
    return CacheView(
        column=column,
        private_len=jnp.where(busy, private_len, 0).reshape(-1),
        seat_of_slot=jnp.where(busy, seats, 0),
        slot_of_seat=write_sharded(nobody, slots.reshape(-1), seats).reshape(num_shards, num_seats),
    )


def _append(
    state: DecodeState,
    ids: Int[Array, "z slots"],
    logps: Float[Array, "z slots"],
    lens: Int[Array, "z slots"],
    settings: DecodeSettings,
    reward_tables: ArrayTree,
) -> DecodeState:
    """Writes each busy slot's token to its rollout and frees the slots whose rollout has ended."""
    rows = state.slot_rows
    busy = rows < state.completion_len.shape[1]
    stops = jnp.any(ids[..., None] == jnp.array(settings.stop_ids, jnp.int32), axis=-1)
    ends = stops | (lens + 1 == settings.max_new_tokens)

    def write_token(tokens, rows, lens, new):
        return tokens.at[rows, lens].set(new, mode="drop")  # the row of an idle slot is out of bounds

    def write(values, rows, new):
        return values.at[rows].set(new, mode="drop")

    def flat(tree):
        return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), tree)

    spans = flat(jax.tree.map(lambda leaf: _of_slots(leaf, rows), state.reward_state))
    spans = reward_spans.step(reward_tables, spans, ids.reshape(-1), busy.reshape(-1))
    spans = jax.tree.map(lambda leaf: leaf.reshape(*rows.shape, *leaf.shape[1:]), spans)
    return dataclasses.replace(
        state,
        slot_rows=jnp.where(ends, state.completion_len.shape[1], rows),
        last_ids=ids,
        completion_ids=jax.vmap(write_token)(state.completion_ids, rows, lens, ids),
        completion_logps=jax.vmap(write_token)(state.completion_logps, rows, lens, logps),
        completion_len=jax.vmap(write)(state.completion_len, rows, lens + 1),
        stopped=jax.vmap(write)(state.stopped, rows, stops),
        reward_state=jax.tree.map(lambda old, new: jax.vmap(write)(old, rows, new), state.reward_state, spans),
        num_steps=state.num_steps + 1,
        num_busy=state.num_busy + busy.sum(axis=1, dtype=jnp.int32),
    )
