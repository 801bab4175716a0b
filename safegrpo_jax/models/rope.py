"""Rotary position embedding: the angles of the two towers and the rotation itself.

Positions come in as data; computing them from tokens and image grids is host work (data/processor.py).
Text: three position axes (time, height, width) share the frequencies, interleaved THWTHW...TT (Qwen3-VL) or in three
runs T..TH..HW..W (Qwen2.5-VL).
Vision: the first half of the frequencies turns with the patch row, the second with its column.
Angles are float32 always. Source: huggingface/transformers modeling_qwen3_vl.py.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from safegrpo_jax.types import Array


def interleaved_axes(section: tuple[int, int, int], num_frequencies: int) -> np.ndarray:
    """Which position axis (0 time, 1 height, 2 width) turns each frequency.

    Example: section (4, 2, 2) over 8 frequencies gives 0 1 2 0 1 2 0 0.
    """
    axes = np.zeros(num_frequencies, np.int32)
    for axis in (1, 2):
        axes[axis : 3 * section[axis] : 3] = axis
    return axes


def contiguous_axes(section: tuple[int, int, int]) -> np.ndarray:
    """As `interleaved_axes`, with the frequencies of an axis together. Section (4, 2, 2) gives 0 0 0 0 1 1 2 2."""
    return np.repeat(np.arange(3, dtype=np.int32), section)


def text_angles(
    positions: Int[Array, "3 n t"], head_dim: int, theta: float, axes: Int[np.ndarray, "half"]
) -> Float[Array, "n t half"]:
    """Rotation angles of M-RoPE in radians, float32, one per pair of head channels (half = head_dim / 2).

    `axes[j]` is the position axis that turns frequency j.
    """
    time, height, width = (axis[..., None] for axis in positions)
    position = jnp.where(axes == 0, time, jnp.where(axes == 1, height, width))
    return position.astype(jnp.float32) * _inverse_frequencies(head_dim, theta)


def vision_angles(patch_pos: Int[Array, "u i 2"], head_dim: int, theta: float) -> Float[Array, "u i half"]:
    """Rotation angles of the patches in radians, float32: row angles, then column angles (half = head_dim / 2)."""
    row_column = patch_pos[..., None].astype(jnp.float32) * _inverse_frequencies(head_dim // 2, theta)
    return row_column.reshape(*patch_pos.shape[:-1], head_dim // 2)


def rotate(
    x: Float[Array, "n heads t e"], cos: Float[Array, "n t half"], sin: Float[Array, "n t half"]
) -> Float[Array, "n heads t e"]:
    """Rotates channel pairs (j, j + e/2). Products are taken in the wider of the two dtypes, the result in x's."""
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _inverse_frequencies(num_channels: int, theta: float) -> np.ndarray:
    # float32 throughout, as the checkpoints were trained: rounding a float64 power differs in the last digit,
    # which a position in the thousands would multiply.
    exponents = np.arange(0, num_channels, 2, dtype=np.float32) / np.float32(num_channels)
    return np.float32(1.0) / np.float32(theta) ** exponents
