import jax
import numpy as np
import pytest

from safegrpo_jax.grpo.advantages import (
    AdvantageConfig,
    group_advantages,
    per_rule_advantages,
    spread_over_spans,
)

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


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_leaving_one_out_agrees_with_float64(scale):
    rewards = np.random.default_rng(3).random((5, 4))
    rewards[2] = 0.7
    others = np.array([[np.delete(row, i).mean() for i in range(4)] for row in rewards])
    divisor = {"group": rewards.std(1, ddof=1, keepdims=True) + 1e-6, "batch": rewards.std(ddof=1) + 1e-6, "none": 1.0}
    config = AdvantageConfig(scale=scale, baseline="leave_one_out")
    advantages, _ = group_advantages(rewards.astype(np.float32).reshape(-1), 4, config)
    expected = (rewards - others) / divisor[scale]
    expected[2] = 0
    np.testing.assert_allclose(advantages, expected.reshape(-1), rtol=1e-4, atol=FLOAT32_ROUNDING)


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


def test_per_rule_advantages_agree_with_float64():
    """Normalised rule by rule within the group, weighted, then scaled to unit spread in the batch."""
    rng = np.random.default_rng(2)
    values, weights = rng.random((3, 4, 8)), [0.5, 0.25, 1.0]
    values[1] = 0.5  # a rule that never differs
    values[:, 2] = 0.3  # a group in which no rule differs
    centred = values - values.mean(2, keepdims=True)
    scaled = np.where(values.max(2, keepdims=True) > values.min(2, keepdims=True), centred, 0) / (
        values.std(2, ddof=1, keepdims=True) + 1e-6
    )
    total = np.einsum("r,rbg->bg", weights, scaled)
    expected = total / (total.std(ddof=1) + 1e-6)
    rows = [value.reshape(-1).astype(np.float32) for value in values]
    got = np.asarray(per_rule_advantages(rows, weights, 8, AdvantageConfig(normalize="per_rule"))).reshape(4, 8)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=FLOAT32_ROUNDING)
    assert (got[2] == 0).all() and np.std(got, ddof=1) == pytest.approx(1, abs=1e-4)


def test_per_rule_tells_apart_what_totals_do_not():
    """Rewards (1, 0) and (0, 1) have one total; if fewer rollouts keep the second rule, keeping it counts for more."""
    first, second = np.array([1, 1, 1, 0], np.float32), np.array([0, 0, 0, 1], np.float32)
    total, _ = group_advantages(first + second, 4, AdvantageConfig())
    assert (np.asarray(total) == 0).all()
    got = np.asarray(per_rule_advantages([first, second], [0.5, 1.0], 4, AdvantageConfig(normalize="per_rule")))
    assert got[3] > 0 > got[0] and got[0] == got[1] == got[2]


def test_rules_that_never_differ_give_exactly_zero():
    values = [np.full(8, 0.1, np.float32)] * 2
    config = AdvantageConfig(normalize="per_rule", epsilon=0.0)
    assert (np.asarray(per_rule_advantages(values, [0.5, 0.5], 4, config)) == 0).all()


def test_spans_take_the_advantage_of_their_own_rule():
    """Two rollouts of one group: the tag in tokens 1 to 2, the answer in 2 to 4 (the tag wins in token 2), by hand."""
    unit = np.sqrt(0.5)  # of two values that differ, in units of their standard deviation
    values = np.array([[1, 0], [0, 1]], np.float32)
    starts, ends = np.array([[1, 2], [-1, 3]]), np.array([[3, 5], [-1, 4]])
    advantages = np.array([0.25, -0.25], np.float32)
    got = spread_over_spans(advantages, values, starts, ends, 6, 2, AdvantageConfig(credit="span"))
    expected = [[0.25, unit, unit, -unit, -unit, 0.25], [-0.25, -0.25, -0.25, unit, -0.25, -0.25]]
    np.testing.assert_allclose(got, expected, atol=1e-5)
    nothing = np.full((2, 2), -1)
    alike = spread_over_spans(advantages, values, nothing, nothing, 6, 2, AdvantageConfig(credit="span"))
    np.testing.assert_array_equal(alike, np.broadcast_to(advantages[:, None], (2, 6)))


@pytest.mark.parametrize(
    "fields",
    [
        {"normalize": "each"},
        {"baseline": "mean"},
        {"credit": "token"},
        {"normalize": "per_rule", "scale": "none"},
        {"scale": "max"},
    ],
)
def test_unknown_choices_are_refused(fields):
    with pytest.raises(ValueError, match="use "):
        AdvantageConfig(**fields)
