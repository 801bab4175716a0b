"""Attention with grouped query heads: full rows (both towers) and one decode step over a two-part cache.

Who sees whom is given by segment ids, not by a dense mask: tokens see tokens of the same segment, segment 0 is
padding and is seen by nobody. The same ids describe packed images, left-padded prompts and packed rollouts.
Everything is head-major, [n heads t e]: token-major keys made cached attention twice as slow on a CPU.
The implementation is one explicit argument: "reference" is plain einsum, "splash" the TPU kernel of splash.py,
"splash_interpret" the same program on any platform, slowly. Scores and softmax are float32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from safegrpo_jax.models.splash import attend_splash
from safegrpo_jax.types import Array

IMPLEMENTATIONS = ("reference", "splash", "splash_interpret")
# A finite minimum instead of -inf: a query that sees nothing (padding) gets uniform weights, not NaN.
MASKED_SCORE = jnp.finfo(jnp.float32).min


def attend(
    query: Float[Array, "n h t e"],
    keys: Float[Array, "n k t e"],
    values: Float[Array, "n k t e"],
    segment_ids: Int[Array, "n t"],
    *,
    causal: bool,
    implementation: str,
) -> Float[Array, "n h t e"]:
    """Attention of every token to the tokens of its segment (up to itself when `causal`). Key head j serves
    query heads [j*h/k, (j+1)*h/k). Rows of segment 0 come out finite and meaningless.

    Raises:
      ValueError: unknown implementation.
    """
    match implementation:
        case "reference":
            return _attend_reference(query, keys, values, segment_ids, causal)
        case "splash" | "splash_interpret":
            interpret = implementation == "splash_interpret"
            return attend_splash(query, keys, values, segment_ids, causal, interpret).astype(values.dtype)
        case _:
            raise ValueError(f"attention implementation {implementation!r} is not one of {IMPLEMENTATIONS}")


def _attend_reference(query, keys, values, segment_ids, causal):
    n, h, t, e = query.shape
    k = keys.shape[1]
    visible = (segment_ids[:, :, None] == segment_ids[:, None, :]) & (segment_ids[:, None, :] > 0)
    if causal:
        visible &= jnp.tri(t, dtype=bool)
    bias = jnp.where(visible, 0.0, MASKED_SCORE)[:, None, None]
    # The query heads of a key head are folded into its rows: plain batched matmuls, whose gradients run a quarter
    # faster on a CPU than those of five-axis einsums.
    grouped = query.reshape(n, k, (h // k) * t, e)
    scores = jnp.einsum("nkqe,nkse->nkqs", grouped, keys, preferred_element_type=jnp.float32) * e**-0.5
    weights = jax.nn.softmax(scores.reshape(n, k, h // k, t, t) + bias, axis=-1).astype(values.dtype)
    attended = jnp.einsum("nkqs,nkse->nkqe", weights.reshape(n, k, (h // k) * t, t), values)
    return attended.reshape(n, h, t, e)


def attend_cache(
    query: Float[Array, "n h e"],
    prefix_keys: Float[Array, "b k p e"],
    prefix_values: Float[Array, "b k p e"],
    prefix_mask: Bool[Array, "b p"],
    private_keys: Float[Array, "n k s e"],
    private_values: Float[Array, "n k s e"],
    step: Int[Array, ""],
) -> Float[Array, "n h e"]:
    """One token per rollout attends to its prompt's prefix and to its private slots 0..step, in one softmax.

    All g = n / b samples of a prompt are taken together, so the prefix is read once per prompt and never repeated.
    """
    n, h, e = query.shape
    b, k = prefix_keys.shape[:2]
    g, r = n // b, h // k
    scale = e**-0.5
    by_prompt = query.reshape(b, g, k, r, e).swapaxes(1, 2)
    prefix = jnp.einsum("bkgre,bkpe->bkgrp", by_prompt, prefix_keys, preferred_element_type=jnp.float32) * scale
    prefix = jnp.where(prefix_mask[:, None, None, None], prefix, MASKED_SCORE)
    by_rollout = query.reshape(n, k, r, e)
    private = jnp.einsum("nkre,nkse->nkrs", by_rollout, private_keys, preferred_element_type=jnp.float32) * scale
    private = jnp.where(jnp.arange(private.shape[-1]) <= step, private, MASKED_SCORE)

    private = private.reshape(b, g, k, r, -1).swapaxes(1, 2)
    highest = jnp.maximum(prefix.max(-1, keepdims=True), private.max(-1, keepdims=True))
    prefix, private = jnp.exp(prefix - highest), jnp.exp(private - highest)
    total = prefix.sum(-1, keepdims=True) + private.sum(-1, keepdims=True)
    prefix, private = (prefix / total).astype(query.dtype), (private / total).astype(query.dtype)

    from_prefix = jnp.einsum("bkgrp,bkpe->bkgre", prefix, prefix_values).swapaxes(1, 2).reshape(n, h, e)
    private = private.swapaxes(1, 2).reshape(n, k, r, -1)
    return from_prefix + jnp.einsum("nkrs,nkse->nkre", private, private_values).reshape(n, h, e)
