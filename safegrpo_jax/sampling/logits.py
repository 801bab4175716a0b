"""From logits to one token per row: temperature, banned ids, top-k, top-p, greedy, Gumbel-argmax.

Everything is float32 and row-wise. Top-k and top-p are thresholds found by a 32-step radix search over
the bits of the scores: exact, and without the full sort that makes large vocabularies slow on a TPU.
The log-probability of a token is always that of the temperature-scaled softmax without the banned ids,
never of the truncated one, because that is the distribution the trainer recomputes.
Which noise a row gets is not decided here but in `sampling/rollout.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from safegrpo_jax.types import Array, Key


def scale_logits(
    logits: Float[Array, "n v"], banned_ids_mask: Bool[Array, "v"], temperature: float
) -> Float[Array, "n v"]:
    """Scores (float32) whose softmax is the sampling distribution: logits / temperature, -inf where banned.

    Temperature 0 means greedy; its log-probabilities are those of temperature 1.
    """
    scores = logits.astype(jnp.float32) / (temperature if temperature > 0 else 1.0)
    return jnp.where(banned_ids_mask, -jnp.inf, scores)


def keep_top_k(scores: Float[Array, "n v"], top_k: int) -> Float[Array, "n v"]:
    """-inf below the k-th highest score of each row. Scores equal to the k-th stay, so ties may leave more than k."""
    return _keep_heaviest(scores, jnp.ones_like(scores), float(top_k))


def keep_top_p(scores: Float[Array, "n v"], top_p: float) -> Float[Array, "n v"]:
    """-inf outside the smallest set of highest scores whose probability reaches `top_p` (0, 1]; ties stay."""
    return _keep_heaviest(scores, jax.nn.softmax(scores, axis=-1), top_p)


def gumbel_noise(row_keys: Key, token_index: Int[Array, "n"], vocab_size: int) -> Float[Array, "n v"]:
    """Standard Gumbel noise of one token per row: row r depends on `row_keys[r]` and `token_index[r]` alone."""

    def one_row(row_key, index):
        # "high" keeps the far tail, without which tokens rarer than 2**-23 could never be drawn.
        return jax.random.gumbel(jax.random.fold_in(row_key, index), (vocab_size,), jnp.float32, mode="high")

    return jax.vmap(one_row)(row_keys, token_index)


def first_argmax(scores: Float[Array, "n v"]) -> Int[Array, "n"]:
    """Lowest index of each row's maximum; the last index where a row holds NaN.

    Two plain reductions: the (value, index) reduction of `jnp.argmax` does not vectorise on a CPU and
    costs four times as much as the whole of the rest of sampling.
    """
    # Without the barrier the two reductions may each recompute the noise, and a last-bit difference
    # between the copies would match no index.
    scores = jax.lax.optimization_barrier(scores)
    highest = jnp.max(scores, axis=-1, keepdims=True)
    last_index = scores.shape[-1] - 1
    index = jnp.arange(scores.shape[-1], dtype=jnp.int32)
    return jnp.min(jnp.where(scores == highest, index, last_index), axis=-1)


def choose_tokens(
    logits: Float[Array, "n v"],
    banned_ids_mask: Bool[Array, "v"],
    draw_noise: Callable[[], Float[Array, "n v"]],
    *,
    temperature: float,
    top_k: int,
    top_p: float,
) -> tuple[Int[Array, "n"], Float[Array, "n"]]:
    """Draws one id per row and returns it with its log-probability under the full, banned-masked softmax.

    `temperature` 0 takes the best id and never calls `draw_noise`. `top_k` 0 and `top_p` 1 switch the
    truncations off; together, top-p acts on the distribution that top-k left. They restrict what is
    drawn and leave the log-probability alone.
    """
    scores = scale_logits(logits, banned_ids_mask, temperature)
    candidates = scores
    if temperature > 0:
        if top_k > 0:
            candidates = keep_top_k(candidates, top_k)
        if top_p < 1:
            candidates = keep_top_p(candidates, top_p)
        candidates = candidates + draw_noise()
    ids = first_argmax(candidates)
    chosen = jnp.take_along_axis(scores, ids[:, None], axis=-1)[:, 0]
    return ids, chosen - jax.nn.logsumexp(scores, axis=-1)


def _keep_heaviest(scores: Float[Array, "n v"], weights: Float[Array, "n v"], target: float) -> Float[Array, "n v"]:
    """-inf below the highest threshold at which the weights of the scores at or above it sum to `target`.

    Built bit by bit from the top over unsigned integers ordered like the floats. Where no threshold
    reaches the target, all bits stay 0 and everything is kept.
    """
    bits = jax.lax.bitcast_convert_type(scores, jnp.uint32)
    negative = bits >> 31 == 1
    ordered = jnp.where(negative, ~bits, bits | jnp.uint32(1 << 31))

    def set_bit(i, threshold):
        candidate = threshold | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        mass = jnp.sum(jnp.where(ordered >= candidate, weights, 0.0), axis=-1, keepdims=True)
        return jnp.where(mass >= target, candidate, threshold)

    threshold = jax.lax.fori_loop(0, 32, set_bit, jnp.zeros_like(ordered[:, :1]))
    return jnp.where(ordered >= threshold, scores, -jnp.inf)
