"""Birth of the decoding cache: the prompt's keys and values once per prompt, private slots once per rollout.

The prompt part is what prefill returned, never copied per sample; each of the n rollouts owns `num_slots`
empty slots for the tokens it generates. One buffer per layer: a stacked cache is sliced and copied
in every step by the TPU compiler. Reading and writing the cache is the model's business.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Bool, Float

from safegrpo_jax.types import Array, KVCache


def allocate_cache(
    prefix_keys: tuple[Float[Array, "b k p e"], ...],
    prefix_values: tuple[Float[Array, "b k p e"], ...],
    prefix_mask: Bool[Array, "b p"],
    num_rows: int,
    num_slots: int,
) -> KVCache:
    """A cache with `num_rows` x `num_slots` private slots per layer, zero, in the dtype of the prefix."""

    def empty(prefix):
        _, num_heads, _, head_dim = prefix.shape
        return jnp.zeros((num_rows, num_heads, num_slots, head_dim), prefix.dtype)

    return KVCache(
        prefix_keys=prefix_keys,
        prefix_values=prefix_values,
        prefix_mask=prefix_mask,
        private_keys=tuple(empty(prefix) for prefix in prefix_keys),
        private_values=tuple(empty(prefix) for prefix in prefix_values),
    )
