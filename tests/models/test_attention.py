"""Attention against a loop over its definition; padding; the two-part cache against whole rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from safegrpo_jax.models.attention import attend, attend_cache
from safegrpo_jax.sharding import make_mesh

TOLERANCE = 1e-5  # float32 sums of a few dozen terms of unit size


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def one_query(query, keys, values):
    scores = keys @ query / np.sqrt(len(query))
    weights = np.exp(scores - scores.max())
    return weights / weights.sum() @ values


@pytest.mark.parametrize("implementation", ["reference", "splash_interpret"])
@pytest.mark.parametrize("causal", [False, True])
def test_segments_and_grouped_heads(causal, implementation):
    query, keys, values = draw(2, 4, 7, 8), draw(2, 2, 7, 8, seed=1), draw(2, 2, 7, 8, seed=2)
    segment_ids = np.array([[1, 1, 1, 2, 2, 0, 0], [0, 0, 1, 1, 1, 1, 1]], np.int32)
    actual = attend(query, keys, values, segment_ids, causal=causal, implementation=implementation)
    assert np.isfinite(actual).all()
    for row, head, token in np.ndindex(2, 4, 7):
        segment = segment_ids[row, token]
        if segment == 0:
            continue
        seen = segment_ids[row] == segment
        if causal:
            seen &= np.arange(7) <= token
        expected = one_query(query[row, head, token], keys[row, head // 2, seen], values[row, head // 2, seen])
        np.testing.assert_allclose(actual[row, head, token], expected, atol=TOLERANCE)


def test_splash_gradients_and_blocks_of_a_mesh():
    """Two blocks of a row, a head dimension that is padded, rows and heads over devices; against plain attention."""
    query, keys, values = draw(4, 4, 160, 24), draw(4, 2, 160, 24, seed=1), draw(4, 2, 160, 24, seed=2)
    segment_ids = np.repeat([[0] * 20 + [1] * 70 + [2] * 70], 4, 0).astype(np.int32)
    weights = np.where(segment_ids[:, None, :, None] > 0, draw(4, 4, 160, 24, seed=3), 0)

    def gradients(implementation):
        def weighted(query, keys, values):
            return (
                weights * attend(query, keys, values, segment_ids, causal=True, implementation=implementation)
            ).sum()

        return jax.jit(jax.value_and_grad(weighted, (0, 1, 2)))(query, keys, values)

    expected = gradients("reference")
    with jax.set_mesh(make_mesh({"data": 2, "fsdp": 2, "tensor": 2})):
        actual = gradients("splash_interpret")
    np.testing.assert_allclose(actual[0], expected[0], rtol=TOLERANCE)
    for ours, theirs in zip(actual[1], expected[1], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)


def test_unknown_implementation():
    x = draw(1, 1, 2, 4)
    with pytest.raises(ValueError, match="'flash' is not one of"):
        attend(x, x, x, np.ones((1, 2), np.int32), causal=True, implementation="flash")


def test_cache_is_prefix_of_the_own_prompt_and_private_slots_so_far():
    b, g, k, p, s, e = 2, 3, 2, 5, 4, 8
    n, h = b * g, 2 * k
    query = draw(n, h, e)
    prefix_keys, prefix_values = draw(b, k, p, e, seed=1), draw(b, k, p, e, seed=2)
    private_keys, private_values = draw(n, k, s, e, seed=3), draw(n, k, s, e, seed=4)
    prefix_mask = np.array([[True] * 5, [False, False, True, True, True]])
    for step in range(s):
        actual = attend_cache(
            query, prefix_keys, prefix_values, prefix_mask, private_keys, private_values, jnp.int32(step)
        )
        for row, head in np.ndindex(n, h):
            prompt, mask = row // g, prefix_mask[row // g]

            def joined(prefix, private, row=row, head=head, prompt=prompt, mask=mask, step=step):
                return np.concatenate([prefix[prompt, head // 2][mask], private[row, head // 2, : step + 1]])

            expected = one_query(
                query[row, head], joined(prefix_keys, private_keys), joined(prefix_values, private_values)
            )
            np.testing.assert_allclose(actual[row, head], expected, atol=TOLERANCE)


def test_prompt_that_is_all_padding_stays_finite():
    ones = np.ones((1, 1, 2, 4), np.float32)
    attended = attend_cache(ones[:, :, 0], ones, ones, np.zeros((1, 2), bool), ones * 3, ones * 3, jnp.int32(0))
    np.testing.assert_allclose(attended, ones[:, :, 0] * 3)
