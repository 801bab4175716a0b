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
from safegrpo_jax.types import Array, CacheView

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
    prefix_ids: Int[Array, "n t"] | None = None,
) -> Float[Array, "n h t e"]:
    """Attention of every token to the tokens of its segment (up to itself when `causal`). Key head j serves
    query heads [j*h/k, (j+1)*h/k). Rows of segment 0 come out finite and meaningless.

    With `prefix_ids` a token also sees the tokens of that segment: a prompt that several responses share.

    Raises:
      ValueError: unknown implementation, or prefixes for the splash kernel, whose masks are equal segments.
    """
    if prefix_ids is not None and implementation != "reference":
        raise ValueError(f"attention {implementation!r} cannot share prompts in a row; use 'reference'")
    match implementation:
        case "reference":
            return _attend_reference(query, keys, values, segment_ids, prefix_ids, causal)
        case "splash" | "splash_interpret":
            interpret = implementation == "splash_interpret"
            return attend_splash(query, keys, values, segment_ids, causal, interpret).astype(values.dtype)
        case _:
            raise ValueError(f"attention implementation {implementation!r} is not one of {IMPLEMENTATIONS}")


def _attend_reference(query, keys, values, segment_ids, prefix_ids, causal):
    n, h, t, e = query.shape
    k = keys.shape[1]
    visible = segment_ids[:, :, None] == segment_ids[:, None, :]
    if prefix_ids is not None:
        visible |= prefix_ids[:, :, None] == segment_ids[:, None, :]
    visible &= segment_ids[:, None, :] > 0
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
    prefix_keys: Float[Array, "b k e p"],
    prefix_values: Float[Array, "b k p e"],
    prefix_mask: Bool[Array, "b p"],
    private_keys: Float[Array, "n k e s"],
    private_values: Float[Array, "n k s e"],
    view: CacheView,
) -> Float[Array, "n h e"]:
    """One token per slot attends to its prompt's prefix and to its newest `view.private_len` private columns.

    Two parts, merged by their log-sum-exp. All samples of a prompt are seated together for the first, so that a prefix
    is read once per step whatever its number of samples, and never repeated. A slot without anything to see gets a
    finite mean.
    """
    n, h, e = query.shape
    b, k, g, r = *prefix_keys.shape[:2], view.slot_of_seat.size // prefix_keys.shape[0], h // prefix_keys.shape[1]
    z = len(view.slot_of_seat)
    take = jax.vmap(lambda rows, index: rows.at[index].get(mode="promise_in_bounds"))

    seated = take(query.reshape(z, n // z, h, e), view.slot_of_seat).reshape(b, g, k, r, e).swapaxes(1, 2)
    scores = _score("nkqe,nkes->nkqs", seated.reshape(b, k, g * r, e), prefix_keys)
    prefix = _attend_part(scores, prefix_values, prefix_mask[:, None, None])
    prefix = prefix.reshape(b, k, g, r, e + 2).swapaxes(1, 2).reshape(z, b // z * g, k, r, e + 2)
    prefix = take(prefix, view.seat_of_slot).reshape(n, k, r, e + 2)

    columns = private_keys.shape[3]
    age = (view.column - jnp.arange(columns)) % columns
    visible = age < view.private_len[:, None]
    scores = _score("nkqe,nkes->nkqs", query.reshape(n, k, r, e), private_keys)
    private = _attend_part(scores, private_values, visible[:, None, None])
    return _merge_parts(prefix, private).reshape(n, h, e).astype(query.dtype)


def attend_continuations(
    query: Float[Array, "n h c e"],
    keys: Float[Array, "n k c e"],
    values: Float[Array, "n k c e"],
    mask: Bool[Array, "n c"],
    prefix_keys: Float[Array, "b k p e"],
    prefix_values: Float[Array, "b k p e"],
    prefix_mask: Bool[Array, "b p"],
) -> Float[Array, "n h c e"]:
    """Tokens that continue prompt row r // (n // b) attend to that prompt and, causally, to their own row.

    Two parts, merged by their log-sum-exp: a prompt's keys meet the queries of all its rows in one product.
    """
    (n, h, c, e), (b, k) = query.shape, prefix_keys.shape[:2]
    g, r = n // b, h // k
    grouped = query.reshape(n, k, r * c, e)
    by_prompt = grouped.reshape(b, g, k, r * c, e).swapaxes(1, 2).reshape(b, k, g * r * c, e)
    scores = _score("nkqe,nkse->nkqs", by_prompt, prefix_keys)
    prefix = _attend_part(scores, prefix_values, prefix_mask[:, None, None])
    prefix = prefix.reshape(b, k, g, r * c, e + 2).swapaxes(1, 2).reshape(n, k, r * c, e + 2)
    causal = jnp.tile(jnp.tri(c, dtype=bool), (r, 1))
    own = _attend_part(_score("nkqe,nkse->nkqs", grouped, keys), values, mask[:, None, None] & causal)
    return _merge_parts(prefix, own).reshape(n, h, c, e).astype(values.dtype)


def _merge_parts(first, second):
    """Attention over both parts of the keys, from what `_attend_part` gave for each."""
    e = first.shape[-1] - 2
    highest = jnp.maximum(first[..., e], second[..., e])
    shares = [jnp.exp(part[..., e] - highest) for part in (first, second)]
    total = sum(share * part[..., e + 1] for share, part in zip(shares, (first, second), strict=True))
    summed = sum(share[..., None] * part[..., :e] for share, part in zip(shares, (first, second), strict=True))
    return summed / total[..., None]


def _score(subscripts, query, keys):
    return jnp.einsum(subscripts, query, keys, preferred_element_type=jnp.float32) * query.shape[-1] ** -0.5


def _attend_part(scores, values, visible):
    """Attention [n k q e] over one part of the keys, from its scores [n k q s], not yet normalised, joined on the last
    axis by the highest score and the sum of the exponentials: [n k q e+2] float32. `visible` broadcasts against the
    scores.
    """
    scores = jnp.where(visible, scores, MASKED_SCORE)
    # The result does not depend on it: without a gradient of its own it costs none.
    highest = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    weights = jnp.exp(scores - highest)
    summed = jnp.einsum("nkqs,nkse->nkqe", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
    return jnp.concatenate([summed, highest, weights.sum(-1, keepdims=True)], axis=-1)
