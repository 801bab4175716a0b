"""Sums, means and standard deviations over the entries a mask keeps.

The masked entries are replaced before they are summed, so a NaN or an infinity under the mask does
not reach the result. An empty selection gives 0, never NaN: a batch of padding is a harmless batch.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Bool, Float

from safegrpo_jax.types import Array

Axes = int | tuple[int, ...] | None


def masked_sum(values: Float[Array, "*axes"], mask: Bool[Array, "*axes"], axis: Axes = None) -> Float[Array, "..."]:
    """Sum over `axis` (None: all axes) of the entries where `mask` is True."""
    return jnp.sum(jnp.where(mask, values, 0), axis=axis)


def masked_mean(values: Float[Array, "*axes"], mask: Bool[Array, "*axes"], axis: Axes = None) -> Float[Array, "..."]:
    """Mean over `axis` of the entries where `mask` is True; 0 where the mask keeps none."""
    return masked_sum(values, mask, axis) / jnp.maximum(jnp.sum(mask, axis=axis), 1)


def masked_std(
    values: Float[Array, "*axes"], mask: Bool[Array, "*axes"], axis: Axes = None, ddof: int = 0
) -> Float[Array, "..."]:
    """Standard deviation over `axis` of the kept entries, divisor `count - ddof`; 0 where `count <= ddof`."""
    count = jnp.sum(mask, axis=axis, keepdims=True)
    mean = jnp.sum(jnp.where(mask, values, 0), axis=axis, keepdims=True) / jnp.maximum(count, 1)
    squares = masked_sum(jnp.square(values - mean), mask, axis)
    freedom = jnp.sum(mask, axis=axis) - ddof
    return jnp.where(freedom > 0, jnp.sqrt(squares / jnp.maximum(freedom, 1)), 0)
