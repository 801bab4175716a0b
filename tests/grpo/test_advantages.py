import jax
import numpy as np
import pytest

from safegrpo_jax.grpo.advantages import AdvantageConfig, group_advantages

GOLDEN_DIGITS = 1e-6  # the golden values are printed to six decimals
FLOAT32_ROUNDING = 2e-6  # relative, of a mean, a root and a quotient

REWARDS = np.array([1, 0.875, 0.75, 0.5, 0.375, 0.25, 0, 0], np.float32)
GOLDEN = {
    "verl": (
        AdvantageConfig(),
        [1.389364, 1.062455, 0.735546, 0.081727, -0.245182, -0.572091, -1.22591, -1.22591],
    ),
    "trl": (
        AdvantageConfig(epsilon=1e-4),
        [1.389005, 1.06218, 0.735355, 0.081706, -0.245118, -0.571943, -1.225592, -1.225592],
    ),
    "dr": (
        AdvantageConfig(scale="none"),
        [0.53125, 0.40625, 0.28125, 0.03125, -0.09375, -0.21875, -0.46875, -0.46875],
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_published_values(name):
    config, expected = GOLDEN[name]
    advantages, stats = group_advantages(REWARDS, 8, config)
    np.testing.assert_allclose(advantages, expected, atol=GOLDEN_DIGITS)
    np.testing.assert_allclose(stats["advantage/group_std_mean"], 0.382368, atol=GOLDEN_DIGITS)
    np.testing.assert_allclose(stats["advantage/abs_max"], np.abs(expected).max(), atol=GOLDEN_DIGITS)


def test_one_success_in_eight():
    advantages, _ = group_advantages(np.eye(8, dtype=np.float32)[3], 8, AdvantageConfig())
    np.testing.assert_allclose(advantages[3], 2.474867, atol=1e-5)  # epsilon 1e-6 over a spread of 0.35
    np.testing.assert_allclose(np.delete(advantages, 3), -0.353552, atol=GOLDEN_DIGITS)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_rewards_give_exactly_zero_and_are_counted(scale):
    # 0.1 is not a binary fraction: the mean of 7 of them differs from 0.1 by a rounding error.
    rewards = np.concatenate([np.full(7, 0.1), np.linspace(0, 1, 7), np.full(7, 0.7)]).astype(np.float32)
    advantages, stats = jax.jit(group_advantages, static_argnums=(1, 2))(rewards, 7, AdvantageConfig(scale=scale))
    assert np.all(np.asarray(advantages)[:7] == 0) and np.all(np.asarray(advantages)[14:] == 0)
    assert np.all(np.abs(advantages[7:10]) > 0.1)
    np.testing.assert_allclose(stats["advantage/zero_variance_fraction"], 2 / 3, rtol=FLOAT32_ROUNDING)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_random_groups_agree_with_float64(scale):
    rewards = np.random.default_rng(1).random((5, 4))
    centred = rewards - rewards.mean(1, keepdims=True)
    divisor = {"group": rewards.std(1, ddof=1, keepdims=True) + 1e-6, "batch": rewards.std(ddof=1) + 1e-6, "none": 1.0}
    advantages, stats = group_advantages(rewards.astype(np.float32).reshape(-1), 4, AdvantageConfig(scale=scale))
    np.testing.assert_allclose(advantages, (centred / divisor[scale]).reshape(-1), rtol=1e-4, atol=FLOAT32_ROUNDING)
    np.testing.assert_allclose(stats["advantage/std"], (centred / divisor[scale]).std(), rtol=1e-4)


def test_a_group_of_one_keeps_its_reward():
    rewards = np.array([0.5, 0.25], np.float32)
    advantages, stats = group_advantages(rewards, 1, AdvantageConfig())
    np.testing.assert_allclose(advantages, rewards / (1 + 1e-6), rtol=1e-7)
    assert stats["advantage/zero_variance_fraction"] == 0
    advantages, _ = group_advantages(rewards, 1, AdvantageConfig(scale="none"))
    np.testing.assert_array_equal(advantages, rewards)


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="'std'.*group, batch, none"):
        AdvantageConfig(scale="std")
    with pytest.raises(ValueError, match="6 rewards .* groups of 4"):
        group_advantages(np.zeros(6, np.float32), 4, AdvantageConfig())
