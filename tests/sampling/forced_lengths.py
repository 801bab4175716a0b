"""A sampler whose rollouts end where they are told: a length trace decides, not the model."""

import jax
import jax.numpy as jnp
import numpy as np

from safegrpo_jax.sampling.rollout import Sampler


class ForcedLengths(Sampler):
    """Draws as ever, but a rollout ends with its first stop id exactly at its length. Ban the stop ids otherwise."""

    def force(self, row_keys: jax.Array, lengths: np.ndarray) -> None:
        """`row_keys` from `make_row_keys`, by which a rollout is recognised wherever it is decoded."""
        self._rows, self._lengths = jax.random.key_data(row_keys), jnp.asarray(lengths)

    def choose(self, banned_ids_mask, logits, row_keys, token_index):
        ids, logps = super().choose(banned_ids_mask, logits, row_keys, token_index)
        same = (jax.random.key_data(row_keys)[:, None] == self._rows[None]).all(-1)
        length = jnp.sum(jnp.where(same, self._lengths, 0), axis=1)
        return jnp.where(token_index + 1 == length, self._settings.stop_ids[0], ids), logps
