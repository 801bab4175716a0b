"""The decode loop: prefill once per prompt, then one token per step for every rollout until all have stopped.

Knows nothing of the model (three functions), of how a token is chosen (one function) or of rewards beyond
carrying the automaton state, so that the reward spans are known when the last token is.
The first token comes from the prompt's last hidden state; step j >= 1 feeds token j - 1, which the model
writes to private slot j - 1. The last token of a row is therefore never fed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from safegrpo_jax.rewards import spans as reward_spans
from safegrpo_jax.sampling.cache import allocate_cache
from safegrpo_jax.types import Array, ArrayTree, KVCache, Params, Prompts, pytree

PAD_ID = 0  # what a finished row emits; always masked

Prefill = Callable[[Params, Prompts], tuple[Array, tuple[Array, ...], tuple[Array, ...]]]
Decode = Callable[[Params, Array, Array, Array, KVCache], tuple[Array, KVCache]]
ChooseTokens = Callable[[Float[Array, "n v"], Int[Array, ""]], tuple[Int[Array, "n"], Float[Array, "n"]]]


@dataclasses.dataclass(frozen=True)
class ModelFunctions:
    """What the sampler needs of a model.

    prefill: (params, prompts) -> last hidden state [b d], keys and values [b k p e] of each layer.
    decode: (params, token_ids [n], positions [n], step [], cache) -> (hidden [n d], cache); writes the
        token's keys and values at private slot `step` and attends to the prefix of prompt r // g and to
        the private slots <= step.
    logits: (params, hidden [n d]) -> [n v] float32.
    """

    prefill: Prefill
    decode: Decode
    logits: Callable[[Params, Array], Array]


@pytree
class DecodeState:
    """The carry of the loop. `step` counts the tokens every row has been offered; `active` rows have not stopped.

    A row that is no longer active keeps its tokens, log-probabilities, length and reward state; its cache
    slots go on being written but are read by nobody.
    """

    step: Int[Array, ""]
    active: Bool[Array, "n"]
    last_ids: Int[Array, "n"]
    completion_ids: Int[Array, "n c"]
    completion_logps: Float[Array, "n c"]
    completion_len: Int[Array, "n"]
    reward_state: Any  # rewards.spans.SpanState
    cache: KVCache


def decode_completions(
    functions: ModelFunctions,
    params: Params,
    prompts: Prompts,
    choose: ChooseTokens,
    *,
    group_size: int,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
    reward_tables: ArrayTree,
) -> DecodeState:
    """Decodes `group_size` completions of every prompt; row r belongs to prompt r // group_size.

    `choose(logits [n v], token_index [])` returns the next id of every row and its log-probability. Ends when
    every row has emitted one of `stop_ids` (which counts as its last token) or `max_new_tokens` tokens;
    rows still active then were cut off. Traceable; nothing raises.
    """
    last_hidden, prefix_keys, prefix_values = functions.prefill(params, prompts)
    num_rows = prompts.prompt_ids.shape[0] * group_size
    cache = allocate_cache(prefix_keys, prefix_values, prompts.prompt_mask, num_rows, max_new_tokens)
    first_positions = jnp.repeat(jnp.sum(prompts.prompt_mask, axis=-1) + prompts.rope_delta, group_size)

    def append(state: DecodeState, logits: Float[Array, "n v"]) -> DecodeState:
        ids, logps = choose(logits, state.step)
        return _append_tokens(state, ids, logps, stop_ids, reward_tables)

    def unfinished(state: DecodeState) -> Bool[Array, ""]:
        return (state.step < max_new_tokens) & jnp.any(state.active)

    def advance(state: DecodeState) -> DecodeState:
        slot = state.step - 1
        hidden, cache = functions.decode(params, state.last_ids, first_positions + slot, slot, state.cache)
        return append(dataclasses.replace(state, cache=cache), functions.logits(params, hidden))

    state = _empty_state(num_rows, max_new_tokens, reward_tables, cache)
    first_logits = jnp.repeat(functions.logits(params, last_hidden), group_size, axis=0)
    return jax.lax.while_loop(unfinished, advance, append(state, first_logits))


def _empty_state(num_rows: int, max_new_tokens: int, reward_tables: ArrayTree, cache: KVCache) -> DecodeState:
    return DecodeState(
        step=jnp.int32(0),
        active=jnp.ones(num_rows, bool),
        last_ids=jnp.full(num_rows, PAD_ID, jnp.int32),
        completion_ids=jnp.full((num_rows, max_new_tokens), PAD_ID, jnp.int32),
        completion_logps=jnp.zeros((num_rows, max_new_tokens), jnp.float32),
        completion_len=jnp.zeros(num_rows, jnp.int32),
        reward_state=reward_spans.init_state(reward_tables, num_rows),
        cache=cache,
    )


def _append_tokens(
    state: DecodeState,
    ids: Int[Array, "n"],
    logps: Float[Array, "n"],
    stop_ids: tuple[int, ...],
    reward_tables: ArrayTree,
) -> DecodeState:
    ids = jnp.where(state.active, ids, PAD_ID)
    logps = jnp.where(state.active, logps, 0.0)
    stops = jnp.any(ids[:, None] == jnp.array(stop_ids, jnp.int32), axis=-1)
    return dataclasses.replace(
        state,
        step=state.step + 1,
        active=state.active & ~stops,
        last_ids=ids,
        completion_ids=jax.lax.dynamic_update_index_in_dim(state.completion_ids, ids, state.step, axis=1),
        completion_logps=jax.lax.dynamic_update_index_in_dim(state.completion_logps, logps, state.step, axis=1),
        completion_len=state.completion_len + state.active,
        reward_state=reward_spans.step(reward_tables, state.reward_state, ids, state.active),
    )
