"""Log-probabilities of given tokens, and the entropy at each of them, from hidden states.

The distribution is the one the sampler draws from before top-k and top-p: logits divided by the
temperature, banned ids removed, softmax in float32. Logits are the largest array of the whole update
(tokens x vocabulary), so they are made a few completion positions at a time, forgotten, and made again
for the gradient. Chunks are cut along c, never along n: n is the axis sharded over devices.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from safegrpo_jax.types import Array

# Finite, so that 0 * log 0 in the entropy is 0; far below any logit, so that exp of it is exactly 0.
BANNED_LOGIT = -1e9


def token_logps(
    logits_fn: Callable,
    hidden: Float[Array, "n c d"],
    target_ids: Int[Array, "n c"],
    mask: Bool[Array, "n c"],
    banned_ids_mask: Bool[Array, "v"],
    temperature: float,
    chunk_size: int,
) -> tuple[Float[Array, "n c"], Float[Array, "n c"]]:
    """Natural log-probability of `target_ids[n, c]` given `hidden[n, c]`, and the entropy there; 0 where masked.

    `logits_fn` maps hidden states [... d] to logits [... v] in float32 and may close over parameters
    that are being differentiated. `hidden[n, c]` is the state that predicts token c, hence that of the
    token before it. Results are float32. `banned_ids_mask` is True for ids that have probability 0. `chunk_size` is the
    number of completion positions whose logits (n * chunk_size * v numbers) exist at one time; 0 takes
    all at once and keeps them for the gradient.

    Raises: ValueError for a temperature or a chunk size that makes no sense.
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; log-probabilities need a temperature > 0")
    if chunk_size < 0:
        raise ValueError(f"chunk_size is {chunk_size}; use 0 (no chunks) or a number of completion positions")

    def score(hidden, target_ids):
        logits = jnp.where(banned_ids_mask, BANNED_LOGIT, logits_fn(hidden).astype(jnp.float32) / temperature)
        log_normalizer = jax.nn.logsumexp(logits, axis=-1)
        # A comparison instead of a gather: it fuses, its transpose is no scatter, and it works on a sharded vocabulary.
        is_target = jnp.arange(logits.shape[-1]) == target_ids[..., None]
        logps = jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1) - log_normalizer
        all_logps = logits - log_normalizer[..., None]
        entropy = -jnp.sum(jnp.exp(all_logps) * all_logps, axis=-1)
        return logps, entropy

    if chunk_size:
        logps, entropy = _score_in_chunks(score, hidden, target_ids, chunk_size)
    else:
        logps, entropy = score(hidden, target_ids)
    return jnp.where(mask, logps, 0.0), jnp.where(mask, entropy, 0.0)


def _score_in_chunks(score, hidden, target_ids, chunk_size):
    num_rows, length, width = hidden.shape
    num_chunks = -(-length // chunk_size)
    padding = num_chunks * chunk_size - length
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0))).reshape(num_rows, num_chunks, chunk_size, width)
    target_ids = jnp.pad(target_ids, ((0, 0), (0, padding))).reshape(num_rows, num_chunks, chunk_size)

    score = jax.checkpoint(score, prevent_cse=False)  # a scan body is its own barrier
    chunks = (jnp.moveaxis(hidden, 1, 0), jnp.moveaxis(target_ids, 1, 0))
    _, outputs = jax.lax.scan(lambda carry, chunk: (carry, score(*chunk)), None, chunks)
    return tuple(jnp.moveaxis(out, 0, 1).reshape(num_rows, -1)[:, :length] for out in outputs)
