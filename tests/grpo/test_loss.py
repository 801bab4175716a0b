import jax
import jax.numpy as jnp
import numpy as np
import pytest

from safegrpo_jax.grpo.loss import (
    AGGREGATIONS,
    LossConfig,
    adapted_kl_coefficient,
    clipped_surrogate,
    grpo_loss,
    kl_estimate,
    log_ratio,
    token_weights,
)

GOLDEN_DIGITS = 1e-6  # golden values are printed to six or more decimals
FLOAT32_ROUNDING = 1e-6  # relative; sums of a few dozen products

K3_GOLDEN = {
    -25: 10,
    -11: 10,
    -1: 0.36787944,
    -0.1: 0.00483742,
    0: 0,
    0.1: 0.00517092,
    1: 0.71828183,
    2: 4.3890561,
    2.5: 8.68249396,
    3: 10,
    25: 10,
}
SURROGATE_GOLDEN = [
    (1, 0.5, -1.2),
    (1, -0.5, -0.606531),
    (-1, 0.5, 1.648721),
    (-1, -0.5, 0.8),
    (-1, 2, 3.0),
    (-1, 0.1, 1.105171),
    (1, 0.1, -1.105171),
    (0, 1, 0),
]


def one(value):
    return jnp.full((1, 1), value, jnp.float32)


def surrogate_of(policy_logp, advantage, config=LossConfig()):  # noqa: B008
    return clipped_surrogate(jnp.exp(log_ratio(one(policy_logp), one(0.0))), one(advantage), config)


@pytest.mark.parametrize(("difference", "expected"), K3_GOLDEN.items())
def test_published_values_of_k3(difference, expected):
    np.testing.assert_allclose(kl_estimate(one(0.0), one(difference), "k3"), one(expected), atol=GOLDEN_DIGITS)


def test_k1_and_k2():
    np.testing.assert_allclose(kl_estimate(one(-1.0), one(-3.0), "k1"), one(2.0))
    np.testing.assert_allclose(kl_estimate(one(-1.0), one(-3.0), "k2"), one(2.0))


@pytest.mark.parametrize("difference", [-25, -11, -10.99, -1, -0.01, 0, 0.5, 2.61, 2.612, 3, 25])
def test_gradient_of_k3_stops_at_its_clamps(difference):
    slope = jax.grad(lambda logp: kl_estimate(one(logp), one(difference), "k3")[0, 0])(0.0)
    inside = -10.99998 < difference < 2.6108686
    np.testing.assert_allclose(slope, 1 - np.exp(difference) if inside else 0, atol=GOLDEN_DIGITS, rtol=GOLDEN_DIGITS)


@pytest.mark.parametrize(("advantage", "difference", "expected"), SURROGATE_GOLDEN)
def test_published_values_of_the_surrogate(advantage, difference, expected):
    loss, clipped, bounded = surrogate_of(difference, advantage)
    np.testing.assert_allclose(loss, one(expected), atol=GOLDEN_DIGITS)
    assert bool(clipped[0, 0]) == ((advantage, difference) in [(1, 0.5), (-1, -0.5)])
    assert bool(bounded[0, 0]) == ((advantage, difference) == (-1, 2))


@pytest.mark.parametrize(
    ("advantage", "difference", "expected"),
    [
        (1, 0.1, -np.exp(0.1)),  # inside: -A * ratio
        (1, 0.5, 0),  # clipped from above
        (1, -0.5, -np.exp(-0.5)),  # the pessimistic branch keeps its gradient
        (-1, -0.5, 0),  # clipped from below
        (-1, 0.5, np.exp(0.5)),
        (-1, 2, 0),  # dual clip
        (1, -25, 0),  # clamp of the log-ratio
        (-1, 0, 1),  # on-policy
    ],
)
def test_gradient_of_the_surrogate(advantage, difference, expected):
    slope = jax.grad(lambda logp: surrogate_of(logp, advantage)[0][0, 0])(float(difference))
    np.testing.assert_allclose(slope, expected, rtol=GOLDEN_DIGITS)


def test_clip_bounds_are_separate_and_the_dual_clip_can_be_off():
    config = LossConfig(clip_low=0.1, clip_high=0.3, clip_dual=0.0)
    np.testing.assert_allclose(surrogate_of(1.0, 1.0, config)[0], one(-1.3), rtol=FLOAT32_ROUNDING)
    np.testing.assert_allclose(surrogate_of(-1.0, -1.0, config)[0], one(0.9), rtol=FLOAT32_ROUNDING)
    loss, _, bounded = surrogate_of(2.0, -1.0, config)
    np.testing.assert_allclose(loss, one(np.exp(2.0)), rtol=FLOAT32_ROUNDING)
    assert not bounded[0, 0]


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("token_mean", 2.5),
        ("seq_mean_token_sum", 5.0),
        ("seq_mean_token_mean", 3.0),
        ("seq_mean_token_sum_norm", 2.5),
    ],
)
def test_published_values_of_the_aggregations(aggregation, expected):
    losses = np.array([[1, 2, 3, 99], [4, 99, 99, 99]], np.float32)
    mask = np.array([[1, 1, 1, 0], [1, 0, 0, 0]], bool)
    np.testing.assert_allclose((token_weights(mask, aggregation) * losses).sum(), expected, rtol=GOLDEN_DIGITS)
    with_empty_row = np.concatenate([mask, np.zeros((1, 4), bool)])
    weights = token_weights(with_empty_row, aggregation)
    np.testing.assert_allclose(weights[:2], token_weights(mask, aggregation), rtol=GOLDEN_DIGITS)
    assert np.all(np.asarray(weights)[2] == 0)


def test_constant_divisor_can_be_given():
    weights = token_weights(np.ones((2, 4), bool), "seq_mean_token_sum_norm", norm_length=16)
    np.testing.assert_allclose(weights, np.full((2, 4), 1 / 16))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_blocks_average_the_aggregates_of_each_block(aggregation):
    rng = np.random.default_rng(4)
    mask = np.arange(6) < rng.integers(0, 7, (8, 1))
    weights = token_weights(mask, aggregation, num_blocks=4)
    alone = [token_weights(mask[2 * j : 2 * j + 2], aggregation) / 4 for j in range(4)]
    np.testing.assert_allclose(weights, np.concatenate(alone), rtol=FLOAT32_ROUNDING)


def random_tokens(seed=5, n=6, c=9):
    rng = np.random.default_rng(seed)
    mask = np.arange(c) < np.array([[9], [4], [1], [0], [7], [2]])
    behavior = np.where(mask, -rng.exponential(1.0, (n, c)), 0).astype(np.float32)
    policy = np.where(mask, behavior + rng.normal(0, 0.6, (n, c)), 0).astype(np.float32)
    proximal = np.where(mask, behavior + rng.normal(0, 0.4, (n, c)), 0).astype(np.float32)
    reference = np.where(mask, behavior + rng.normal(0, 1.5, (n, c)), 0).astype(np.float32)
    entropy = np.where(mask, rng.exponential(1.0, (n, c)), 0).astype(np.float32)
    advantages = np.broadcast_to(rng.normal(0, 2, (n, 1)), (n, c)).astype(np.float32)
    return policy, entropy, behavior, proximal, reference, advantages, mask


def run_loss(tokens, config):
    mask = tokens[-1]
    weights = token_weights(mask, config.aggregation, norm_length=config.norm_length)
    return grpo_loss(*tokens, weights, jnp.maximum(mask.sum(), 1).astype(jnp.float32), config)


def float64_loss(tokens, config):
    """The objective token by token in Python floats, written from the papers and not from the package."""
    policy, entropy, behavior, _, reference, advantages, mask = (np.asarray(x, np.float64) for x in tokens)
    terms, clipped, bounded, minus_log_ratio = np.zeros_like(policy), 0, 0, 0.0
    for i, j in zip(*np.nonzero(mask), strict=True):
        advantage, change = advantages[i, j], min(max(policy[i, j] - behavior[i, j], -20), 20)
        plain = -advantage * np.exp(change)
        limited = -advantage * min(max(np.exp(change), 1 - config.clip_low), 1 + config.clip_high)
        term = max(plain, limited)
        clipped += limited > plain
        bounded += advantage < 0 and term > -advantage * config.clip_dual
        if advantage < 0:
            term = min(term, -advantage * config.clip_dual)
        away = min(max(reference[i, j] - policy[i, j], -20), 20)
        kl = {"k1": -away, "k2": away**2 / 2, "k3": min(np.exp(away) - away - 1, 10)}[config.kl_estimator]
        terms[i, j] = term + config.kl_coefficient * kl - config.entropy_coefficient * entropy[i, j]
        minus_log_ratio -= change
    lengths = mask.sum(1)
    sequences = [terms[i].sum() for i in range(len(terms)) if lengths[i]]
    means = [terms[i].sum() / lengths[i] for i in range(len(terms)) if lengths[i]]
    total = {
        "token_mean": terms.sum() / lengths.sum(),
        "seq_mean_token_sum": np.mean(sequences),
        "seq_mean_token_mean": np.mean(means),
        "seq_mean_token_sum_norm": terms.sum() / mask.shape[1],
    }[config.aggregation]
    return total, clipped / lengths.sum(), bounded / lengths.sum(), minus_log_ratio / lengths.sum()


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_objective_agrees_with_float64(aggregation, estimator):
    config = LossConfig(
        aggregation=aggregation, kl_estimator=estimator, kl_coefficient=0.3, entropy_coefficient=0.1, clip_high=0.28
    )
    tokens = random_tokens()
    loss, sums, maxima = run_loss(tokens, config)
    expected, clip_fraction, dual_fraction, approx_kl = float64_loss(tokens, config)
    np.testing.assert_allclose(loss, expected, rtol=5 * FLOAT32_ROUNDING)
    np.testing.assert_allclose(sums["policy/clip_fraction"], clip_fraction, rtol=FLOAT32_ROUNDING)
    np.testing.assert_allclose(sums["policy/clip_fraction_dual"], dual_fraction, rtol=FLOAT32_ROUNDING)
    np.testing.assert_allclose(sums["policy/approx_kl"], approx_kl, atol=FLOAT32_ROUNDING)
    ratio = np.exp(tokens[0] - tokens[2])[tokens[-1]]
    np.testing.assert_allclose(maxima["policy/ratio_max"], ratio.max(), rtol=5 * FLOAT32_ROUNDING)
    assert clip_fraction > 0 and dual_fraction > 0, "the random case must exercise both clips"


def test_padding_cannot_reach_the_loss_or_its_gradient():
    policy, *rest, mask = random_tokens()
    poisoned = [np.where(mask, values, np.nan).astype(np.float32) for values in rest]
    config = LossConfig(entropy_coefficient=0.1)
    weights, num_tokens = token_weights(mask, "token_mean"), jnp.float32(mask.sum())

    def total(policy, rest):
        return grpo_loss(policy, *rest, mask, weights, num_tokens, config)[0]

    np.testing.assert_allclose(total(policy, poisoned), total(policy, rest), rtol=FLOAT32_ROUNDING)
    gradient = np.asarray(jax.grad(total)(policy, rest))
    assert np.all(gradient[~mask] == 0) and np.all(np.isfinite(gradient)) and np.any(gradient != 0)


def test_a_given_kl_coefficient_takes_the_place_of_the_configs():
    *tokens, mask = random_tokens()
    rest = (mask, token_weights(mask, "token_mean"), jnp.float32(mask.sum()))
    given, sums, _ = grpo_loss(*tokens, *rest, LossConfig(kl_coefficient=0.5), jnp.float32(0.2))
    expected, *_ = grpo_loss(*tokens, *rest, LossConfig(kl_coefficient=0.2))
    np.testing.assert_allclose(given, expected, rtol=FLOAT32_ROUNDING)
    assert sums["policy/kl"] > 0.1


@pytest.mark.parametrize(
    ("kl", "factor"),
    [(0.1, 1.0), (0.11, 1 + 0.1 * 0.5), (0.5, 1 + 0.2 * 0.5), (0.0, 1 - 0.2 * 0.5), (0.085, 1 - 0.15 * 0.5)],
)
def test_the_kl_coefficient_follows_its_target(kl, factor):
    """1 + the relative error, cut at a fifth, times rollouts over horizon: 64 of 128."""
    config = LossConfig(kl_target=0.1, kl_horizon=128)
    adapted = adapted_kl_coefficient(jnp.float32(0.3), jnp.float32(kl), 64, config)
    np.testing.assert_allclose(adapted, 0.3 * factor, rtol=1e-6)
    assert adapted_kl_coefficient(jnp.float32(0.3), jnp.float32(np.nan), 64, config) == jnp.float32(0.3)


def test_no_reference_means_no_kl():
    policy, entropy, behavior, proximal, reference, advantages, mask = random_tokens()
    config = LossConfig(kl_estimator="none", kl_coefficient=0.0)
    unread = np.full_like(reference, np.nan)
    loss, sums, _ = run_loss((policy, entropy, behavior, unread, unread, advantages, mask), config)
    assert np.isfinite(loss) and "policy/kl" not in sums


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"aggregation": "mean"}, "aggregation.*'mean'.*token_mean"),
        ({"kl_estimator": "k9"}, "kl_estimator.*'k9'.*k3"),
        ({"kl_estimator": "none"}, "kl_coefficient to 0"),
        ({"normalizer": "local"}, "normalizer.*'local'.*global, micro"),
        ({"clip_dual": 0.9}, "clip_dual.*> 1"),
        ({"clip_low": 1.5}, "clip range"),
        ({"surrogate": "trpo"}, "surrogate.*'trpo'.*ppo, gspo, cispo"),
        ({"ratio_anchor": "old"}, "ratio_anchor.*'old'.*behavior"),
        ({"correction": "clip"}, "correction.*'clip'.*truncate"),
        ({"correction": "truncate"}, "needs ratio_anchor 'proximal' or 'policy'"),
        ({"correction_cap": 0.0}, "correction_cap.*> 0"),
        ({"kl_target": -0.1}, "kl_target is -0.1"),
        ({"kl_target": 0.1, "kl_coefficient": 0.0}, "coefficient > 0 to start from"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LossConfig(**settings)
