import jax.numpy as jnp
import numpy as np
import pytest

from safegrpo_jax.masked import masked_mean, masked_std, masked_sum

FLOAT32_ROUNDING = 1e-6  # sums of a few dozen numbers of order 1


@pytest.mark.parametrize("axis", [None, 0, 1, (0, 2)])
def test_reductions_agree_with_numpy_over_the_kept_entries(axis):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(3, 4, 5)).astype(np.float32)
    mask = rng.random((3, 4, 5)) < 0.6
    kept = np.ma.MaskedArray(values.astype(np.float64), ~mask)
    np.testing.assert_allclose(masked_sum(values, mask, axis), kept.sum(axis).astype(float), atol=FLOAT32_ROUNDING)
    np.testing.assert_allclose(masked_mean(values, mask, axis), kept.mean(axis).astype(float), atol=FLOAT32_ROUNDING)
    for ddof in (0, 1):
        expected = np.ma.filled(kept.std(axis, ddof=ddof), 0.0)
        expected = np.where(np.isfinite(expected), expected, 0.0)
        np.testing.assert_allclose(masked_std(values, mask, axis, ddof), expected, atol=FLOAT32_ROUNDING)


def test_what_is_masked_cannot_poison_the_result():
    values = jnp.array([[1.0, jnp.nan], [jnp.inf, 3.0]])
    mask = jnp.array([[True, False], [False, True]])
    assert masked_sum(values, mask) == 4
    assert masked_mean(values, mask) == 2
    assert masked_std(values, mask) == 1


def test_an_empty_selection_is_zero():
    values, mask = jnp.ones((2, 3)), jnp.zeros((2, 3), bool)
    for reduce in (masked_sum, masked_mean, masked_std):
        np.testing.assert_array_equal(reduce(values, mask, 1), np.zeros(2))
