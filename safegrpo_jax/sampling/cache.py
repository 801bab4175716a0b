"""The decoding cache: prefixes of the prompts in work, and a ring of private columns for the decode slots.

A prompt's keys and values are held once, whatever its number of samples, while any of them is in work. All slots
write the same private column in a step, so that a step is one contiguous write and no scatter; a slot knows how many
of the newest columns are its own. One buffer per layer: a stacked cache is sliced and copied in every step by the TPU
compiler. Reading the cache and writing its private columns is the model's business.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from safegrpo_jax.types import Array, Prompts, pytree

KEY_COLUMNS, VALUE_COLUMNS = 3, 2  # the axes of the private columns


@pytree
class PromptPool:
    """The b prompts that are held: their keys and values by layer, and what their samples begin with.

    `last_hidden` gives the first token of every sample, which sits at position `first_pos`. A place never written is
    masked out. `num_tokens` counts the prompt tokens prefilled so far.
    """

    keys: tuple[Float[Array, "b k e p"], ...]
    values: tuple[Float[Array, "b k p e"], ...]
    mask: Bool[Array, "b p"]
    last_hidden: Float[Array, "b d"]
    first_pos: Int[Array, "b"]
    num_tokens: Int[Array, ""]


@pytree
class PrivateCache:
    """Keys and values of the tokens that n slots have fed, by layer; `column` is the one written last."""

    keys: tuple[Float[Array, "n k e s"], ...]
    values: tuple[Float[Array, "n k s e"], ...]
    column: Int[Array, ""]

    @property
    def num_columns(self) -> int:
        return self.values[0].shape[VALUE_COLUMNS]


def allocate(prefilled: tuple, num_prefixes: int, num_slots: int, num_columns: int) -> tuple[PromptPool, PrivateCache]:
    """Empty, in the shapes and dtypes of `prefilled`, what prefill returns for some prompts."""
    hidden, keys, values = prefilled
    _, num_heads, prompt_len, head_dim = keys[0].shape

    def empty_keys(num_rows, length):
        return tuple(jnp.zeros((num_rows, num_heads, head_dim, length), part.dtype) for part in keys)

    def empty_values(num_rows, length):
        return tuple(jnp.zeros((num_rows, num_heads, length, head_dim), part.dtype) for part in values)

    pool = PromptPool(
        keys=empty_keys(num_prefixes, prompt_len),
        values=empty_values(num_prefixes, prompt_len),
        mask=jnp.zeros((num_prefixes, prompt_len), bool),
        last_hidden=jnp.zeros((num_prefixes, hidden.shape[1]), hidden.dtype),
        first_pos=jnp.zeros(num_prefixes, jnp.int32),
        num_tokens=jnp.int32(0),
    )
    private = PrivateCache(
        empty_keys(num_slots, num_columns), empty_values(num_slots, num_columns), jnp.int32(num_columns - 1)
    )
    return pool, private


def write_prompts(pool: PromptPool, prefilled: tuple, prompts: Prompts, places: Int[Array, "z q"]) -> PromptPool:
    """Puts z * q prefilled prompts at the places given within each shard; places past the end are dropped."""
    hidden, keys, values = prefilled
    num_tokens = jnp.sum(prompts.prompt_mask, axis=-1, dtype=jnp.int32)
    kept = places.reshape(-1) < len(pool.mask) // len(places)

    def write(old, new):
        return write_sharded(old, new, places)

    return PromptPool(
        keys=tuple(write(old, new.swapaxes(2, 3)) for old, new in zip(pool.keys, keys, strict=True)),
        values=tuple(map(write, pool.values, values)),
        mask=write(pool.mask, prompts.prompt_mask),
        last_hidden=write(pool.last_hidden, hidden),
        first_pos=write(pool.first_pos, num_tokens + prompts.rope_delta),
        num_tokens=pool.num_tokens + jnp.sum(jnp.where(kept, num_tokens, 0)),
    )


def write_sharded(old: Array, new: Array, places: Int[Array, "z q"]) -> Array:
    """`old` [z * m ...] with row `places[z, q]` of each shard replaced by the rows of `new` [z * q ...]; places outside
    a shard are dropped."""
    num_shards = len(places)

    def write(old, new, places):
        return old.at[places].set(new, mode="drop")

    split = (part.reshape(num_shards, -1, *part.shape[1:]) for part in (old, new))
    return jax.vmap(write)(*split, places).reshape(old.shape)


def take_sharded(rows: Array, places: Int[Array, "z q"]) -> Array:
    """Rows `places[z, q]` of each shard of `rows` [z * m ...], as [z * q ...]; places outside a shard give any row."""
    num_shards = len(places)
    split = rows.reshape(num_shards, -1, *rows.shape[1:])
    taken = jax.vmap(lambda rows, places: rows.at[places].get(mode="clip"))(split, places)
    return taken.reshape(-1, *rows.shape[1:])


def grow_ring(ring: Float[Array, "n k rows columns"], column: Int[Array, ""], axis: int, num_columns: int) -> Array:
    """The ring with more columns along `axis`: the old ones come first, from the oldest to the newest, which was
    `column`."""
    added = [(0, 0)] * ring.ndim
    added[axis] = (0, num_columns - ring.shape[axis])
    return jnp.pad(jnp.roll(ring, -(column + 1), axis=axis), added)
