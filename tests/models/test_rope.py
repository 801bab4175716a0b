"""Rotary embeddings against their definitions."""

import jax.numpy as jnp
import numpy as np

from safegrpo_jax.models.rope import contiguous_axes, interleaved_axes, rotate, text_angles, vision_angles

ANGLE_TOLERANCE = 1e-6  # float32 rounding of angles of a few units
PRODUCT_TOLERANCE = 1e-5  # float32 rounding of dot products of a few units


def test_published_interleaving():
    axes = interleaved_axes((24, 20, 20), 64)
    assert "".join("thw"[axis] for axis in axes) == "thw" * 20 + "tttt"
    assert np.bincount(axes).tolist() == [24, 20, 20]


def test_published_runs():
    axes = contiguous_axes((16, 24, 24))
    assert "".join("thw"[axis] for axis in axes) == "t" * 16 + "h" * 24 + "w" * 24


def test_text_angles_take_each_frequency_from_its_axis():
    positions = np.array([2, 5, 11], np.int32).reshape(3, 1, 1)
    angles = text_angles(positions, 16, 1e4, interleaved_axes((4, 2, 2), 8))[0, 0]
    expected = [position * 1e4 ** (-2 * j / 16) for j, position in enumerate([2, 5, 11, 2, 5, 11, 2, 2])]
    np.testing.assert_allclose(angles, expected, atol=ANGLE_TOLERANCE)


def test_equal_axes_are_plain_rotation_and_scores_depend_on_distance_only():
    rng = np.random.default_rng(0)
    query, key = rng.normal(size=(2, 1, 1, 1, 16)).astype(np.float32)

    def score(query_position, key_position):
        rotated = []
        for x, position in ((query, query_position), (key, key_position)):
            angles = text_angles(np.full((3, 1, 1), position, np.int32), 16, 1e4, interleaved_axes((4, 2, 2), 8))
            rotated.append(rotate(x, jnp.cos(angles), jnp.sin(angles)))
        return float((rotated[0] * rotated[1]).sum())

    np.testing.assert_allclose(score(7, 3), score(104, 100), atol=PRODUCT_TOLERANCE)
    assert abs(score(7, 3) - score(7, 4)) > 100 * PRODUCT_TOLERANCE
    np.testing.assert_allclose(score(9, 9), (query * key).sum(), atol=PRODUCT_TOLERANCE)


def test_vision_angles_are_rows_then_columns():
    angles = vision_angles(np.array([[[3, 7]]], np.int32), 8, 1e4)
    np.testing.assert_allclose(angles[0, 0], [3, 3 * 0.01, 7, 7 * 0.01], rtol=1e-6)


def test_rotation_pairs_the_two_halves_in_the_wider_dtype():
    x = jnp.asarray([1.0, 0, 0, 0], jnp.bfloat16).reshape(1, 1, 1, 4)
    angle = jnp.full((1, 1, 2), jnp.pi / 2)
    turned = rotate(x, jnp.cos(angle), jnp.sin(angle))
    assert turned.dtype == jnp.bfloat16
    np.testing.assert_allclose(turned.ravel().astype(np.float32), [0, 0, 1, 0], atol=1e-6)
