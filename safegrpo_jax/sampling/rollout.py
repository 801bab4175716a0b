"""Rollouts: g sampled completions per prompt with their behaviour log-probabilities and reward spans.

One idea: randomness belongs to (key, record, sample, token). Every draw is keyed by these four alone, so
the order of the prompts, the split into batches and the mesh change no token.
The loop is `sampling/decode.py`, the draw `sampling/logits.py`; this file joins them.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from safegrpo_jax.rewards import spans as reward_spans
from safegrpo_jax.sampling.decode import ModelFunctions, decode_completions
from safegrpo_jax.sampling.logits import choose_tokens, gumbel_noise
from safegrpo_jax.types import Array, ArrayTree, Key, Params, Prompts, Rollouts


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How completions are drawn. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 are off."""

    group_size: int = 8
    max_new_tokens: int = 4096
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        for name, ok, remedy in (
            ("group_size", self.group_size >= 1, "at least 1"),
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "0 (greedy) or positive"),
            ("top_k", self.top_k >= 0, "0 (off) or positive"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1 (off)"),
        ):
            if not ok:
                raise ValueError(f"sampling.{name} is {getattr(self, name)}; it must be {remedy}")


def generate(
    functions: ModelFunctions,
    params: Params,
    prompts: Prompts,
    key: Key,
    sampling: SamplingConfig,
    banned_ids_mask: Bool[Array, "v"],
    stop_ids: tuple[int, ...],
    reward_tables: ArrayTree,
) -> Rollouts:
    """Samples `sampling.group_size` completions of each prompt; row r is sample r % g of prompt r // g.

    Pure and jittable with `params`, `prompts`, `key`, `banned_ids_mask` and `reward_tables` traced. Banned ids
    are never drawn and carry no probability. Columns after a row's end hold id 0 and are masked out.
    A row that ends with one of `stop_ids` keeps it as its last token and is not truncated, also when it
    is the last token that fits.
    """
    row_keys = make_row_keys(key, prompts.record_ids, sampling.group_size)

    def choose(logits: Float[Array, "n v"], token_index: Int[Array, ""]):
        return choose_tokens(
            logits,
            banned_ids_mask,
            lambda: gumbel_noise(row_keys, token_index, logits.shape[-1]),
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
        )

    state = decode_completions(
        functions,
        params,
        prompts,
        choose,
        group_size=sampling.group_size,
        max_new_tokens=sampling.max_new_tokens,
        stop_ids=stop_ids,
        reward_tables=reward_tables,
    )
    return Rollouts(
        completion_ids=state.completion_ids,
        completion_mask=jnp.arange(sampling.max_new_tokens) < state.completion_len[:, None],
        behavior_logps=state.completion_logps,
        completion_len=state.completion_len,
        truncated=state.active,
        spans=reward_spans.finish(reward_tables, state.reward_state),
    )


def make_row_keys(key: Key, record_ids: Int[Array, "b"], group_size: int) -> Key:
    """One key per rollout, from the key, the record and the sample number; the token number is folded in per step."""

    def one_record(record_id):
        record_key = jax.random.fold_in(key, record_id)
        return jax.vmap(lambda sample: jax.random.fold_in(record_key, sample))(jnp.arange(group_size))

    keys = jax.vmap(one_record)(record_ids)
    return keys.reshape(-1, *keys.shape[2:])
