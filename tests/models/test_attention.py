"""Attention against a loop over its definition; padding; the two-part cache against whole rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from safegrpo_jax.models.attention import attend, attend_cache, attend_continuations
from safegrpo_jax.sharding import make_mesh
from safegrpo_jax.types import CacheView

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


def test_a_shared_prefix_is_seen_beside_the_own_segment():
    """Segment 1 is the prompt of the responses 2 and 3; 4 is a prompt alone."""
    query, keys, values = draw(1, 4, 9, 8), draw(1, 2, 9, 8, seed=1), draw(1, 2, 9, 8, seed=2)
    segment_ids, prefix_ids = np.array([[1, 1, 2, 2, 3, 3, 4, 0, 0]]), np.array([[1, 1, 1, 1, 1, 1, 4, 0, 0]])
    actual = attend(query, keys, values, segment_ids, causal=True, implementation="reference", prefix_ids=prefix_ids)
    assert np.isfinite(actual).all()
    for head, token in np.ndindex(4, 7):
        own = {segment_ids[0, token], prefix_ids[0, token]}
        seen = [other for other in range(token + 1) if segment_ids[0, other] in own]
        expected = one_query(query[0, head, token], keys[0, head // 2, seen], values[0, head // 2, seen])
        np.testing.assert_allclose(actual[0, head, token], expected, atol=TOLERANCE)


def test_continuations_see_their_prompt_and_themselves():
    """Two prompts, the second with padding at its left, two rows each; a row may be padding from some token on."""
    query, keys, values = draw(4, 4, 3, 8), draw(4, 2, 3, 8, seed=1), draw(4, 2, 3, 8, seed=2)
    prefix_keys, prefix_values = draw(2, 2, 5, 8, seed=3), draw(2, 2, 5, 8, seed=4)
    prefix_mask, mask = np.arange(5) >= np.array([[0], [3]]), np.arange(3) < np.array([[3], [1], [0], [2]])
    actual = attend_continuations(query, keys, values, mask, prefix_keys, prefix_values, prefix_mask)
    assert np.isfinite(actual).all()
    for row, head, token in np.ndindex(4, 4, 3):
        before, own = prefix_mask[row // 2], mask[row, : token + 1]
        seen_keys = np.concatenate([prefix_keys[row // 2, head // 2, before], keys[row, head // 2, : token + 1][own]])
        seen_values = np.concatenate(
            [prefix_values[row // 2, head // 2, before], values[row, head // 2, : token + 1][own]]
        )
        expected = one_query(query[row, head, token], seen_keys, seen_values)
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


def test_a_slot_sees_the_prefix_it_sits_at_and_its_newest_private_columns():
    """Two shards of three slots and two prefixes with three seats; slots sit anywhere, the ring has come round."""
    z, slots, prefixes, g, k, p, s, e = 2, 3, 2, 3, 2, 5, 4, 8
    n, b, h = z * slots, z * prefixes, 2 * k
    query = draw(n, h, e)
    prefix_keys, prefix_values = draw(b, k, p, e, seed=1), draw(b, k, p, e, seed=2)
    private_keys, private_values = draw(n, k, s, e, seed=3), draw(n, k, s, e, seed=4)
    prefix_mask = np.arange(p) >= np.array([0, 2, 1, 4])[:, None]
    seat_of_slot = np.array([[4, 1, 3], [2, 0, 5]], np.int32)
    slot_of_seat = np.zeros((z, prefixes * g), np.int32)
    np.put_along_axis(slot_of_seat, seat_of_slot, np.broadcast_to(np.arange(slots, dtype=np.int32), (z, slots)), 1)
    private_len = np.array([0, 1, 4, 3, 2, 1], np.int32)
    for column in range(s):
        view = CacheView(*map(jnp.asarray, (column, private_len, seat_of_slot, slot_of_seat)))
        actual = attend_cache(
            query,
            prefix_keys.swapaxes(2, 3),
            prefix_values,
            prefix_mask,
            private_keys.swapaxes(2, 3),
            private_values,
            jax.tree.map(jnp.asarray, view),
        )
        for row, head in np.ndindex(n, h):
            prompt = row // slots * prefixes + seat_of_slot.reshape(-1)[row] // g
            newest = [(column - age) % s for age in range(private_len[row])]

            def joined(prefix, private, row=row, head=head, prompt=prompt, newest=newest):
                return np.concatenate([prefix[prompt, head // 2][prefix_mask[prompt]], private[row, head // 2, newest]])

            expected = one_query(
                query[row, head], joined(prefix_keys, private_keys), joined(prefix_values, private_values)
            )
            np.testing.assert_allclose(actual[row, head], expected, atol=TOLERANCE)


def test_a_slot_that_sees_nothing_stays_finite():
    ones = np.ones((1, 1, 2, 4), np.float32)
    view = CacheView(*map(jnp.asarray, (0, np.array([0]), np.array([[0]]), np.array([[0]]))))
    keys = ones.swapaxes(2, 3)
    attended = attend_cache(ones[:, :, 0], keys, ones, np.zeros((1, 2), bool), keys * 3, ones * 3, view)
    np.testing.assert_allclose(attended, ones[:, :, 0] * 2)
