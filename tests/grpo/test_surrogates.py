"""The other surrogates, anchors and corrections, against token-by-token Python floats and their exact gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_loss import FLOAT32_ROUNDING, random_tokens, run_loss

from safegrpo_jax.grpo.loss import LossConfig, grpo_loss, importance_weights, surrogate_terms, token_weights

ROUNDING = 10 * FLOAT32_ROUNDING  # sums over a row inside an exponential


def no_kl(**settings):
    return LossConfig(kl_estimator="none", kl_coefficient=0.0, **settings)


def float64_case(tokens, config):
    """Loss, clip fraction and d loss / d policy, written from the papers: sums over Python floats, no jax."""
    policy, _, behavior, proximal, _, advantages, mask = (np.asarray(x, np.float64) for x in tokens)
    anchor = {"behavior": behavior, "proximal": proximal, "policy": policy}[config.ratio_anchor]
    low, high = 1 - config.clip_low, 1 + config.clip_high
    count, loss, clipped_count = mask.sum(), 0.0, 0
    gradient = np.zeros_like(policy)
    for i in range(len(policy)):
        tokens_of_row = np.flatnonzero(mask[i])
        if not len(tokens_of_row):
            continue
        total_change = sum(anchor[i, j] - behavior[i, j] for j in tokens_of_row)
        sequence_ratio = np.exp(np.mean([policy[i, j] - anchor[i, j] for j in tokens_of_row]))
        for j in tokens_of_row:
            weight = {
                "none": 1.0,
                "truncate": min(np.exp(anchor[i, j] - behavior[i, j]), config.correction_cap),
                "sequence_mask": np.exp(total_change) if np.exp(total_change) <= config.correction_cap else 0.0,
            }[config.correction]
            advantage = advantages[i, j]
            ratio = sequence_ratio if config.surrogate == "gspo" else np.exp(policy[i, j] - anchor[i, j])
            limited = min(max(ratio, low), high)
            if config.surrogate == "cispo":
                loss += -advantage * limited * policy[i, j] * weight / count
                gradient[i, j] += -advantage * limited * weight / count
                clipped_count += limited != ratio
                continue
            term, slope = -advantage * ratio, -advantage * ratio
            if -advantage * limited > term:
                term, slope = -advantage * limited, 0.0
                clipped_count += 1
            if advantage < 0 and term > -advantage * config.clip_dual:
                term, slope = -advantage * config.clip_dual, 0.0
            loss += term * weight / count
            shares = tokens_of_row if config.surrogate == "gspo" else [j]
            for k in shares:
                gradient[i, k] += slope * weight / count / len(shares)
    return loss, clipped_count / count, gradient


@pytest.mark.parametrize("surrogate", ["ppo", "gspo", "cispo"])
@pytest.mark.parametrize(
    ("anchor", "correction"),
    [
        ("behavior", "none"),
        ("proximal", "none"),
        ("proximal", "truncate"),
        ("proximal", "sequence_mask"),
        ("policy", "truncate"),
    ],
)
def test_loss_and_gradient_agree_with_float64(surrogate, anchor, correction):
    config = no_kl(
        surrogate=surrogate, ratio_anchor=anchor, correction=correction, correction_cap=1.3, clip_low=0.1, clip_high=0.2
    )
    tokens = random_tokens()
    expected, clip_fraction, expected_gradient = float64_case(tokens, config)
    loss, sums, _ = run_loss(tokens, config)
    np.testing.assert_allclose(loss, expected, rtol=ROUNDING, atol=ROUNDING)
    np.testing.assert_allclose(sums["policy/clip_fraction"], clip_fraction, rtol=ROUNDING)
    assert (clip_fraction > 0) == (anchor != "policy"), "the random case must clip"
    gradient = jax.grad(lambda policy: run_loss((policy, *tokens[1:]), config)[0])(jnp.asarray(tokens[0]))
    np.testing.assert_allclose(gradient, expected_gradient, rtol=ROUNDING, atol=ROUNDING)


def test_the_policy_as_anchor_has_a_ratio_of_exactly_one():
    tokens = random_tokens()
    _, sums, maxima = run_loss(tokens, no_kl(ratio_anchor="policy"))
    assert maxima["policy/ratio_max"] == 1 and sums["policy/clip_fraction"] == 0 and sums["policy/approx_kl"] == 0
    assert sums["policy/behavior_gap_mean"] > 0.1, "the gap to the sampler is reported all the same"


def test_corrections_cut_at_their_cap():
    behavior = np.log(np.array([[0.5, 0.5], [0.2, 0.5]], np.float32))
    anchor = np.log(np.array([[0.6, 0.4], [0.8, 0.5]], np.float32))
    mask = np.ones((2, 2), bool)
    token = importance_weights(anchor, behavior, mask, no_kl(ratio_anchor="proximal", correction="truncate"))
    np.testing.assert_allclose(token, [[1.2, 0.8], [2.0, 1.0]], rtol=1e-6)
    sequence = importance_weights(anchor, behavior, mask, no_kl(ratio_anchor="proximal", correction="sequence_mask"))
    np.testing.assert_allclose(sequence, [[0.96, 0.96], [0.0, 0.0]], rtol=1e-6)
    longer = importance_weights(
        np.append(anchor, np.ones((2, 1), np.float32), 1),
        np.append(behavior, np.zeros((2, 1), np.float32), 1),
        np.append(mask, np.zeros((2, 1), bool), 1),
        no_kl(ratio_anchor="proximal", correction="sequence_mask"),
    )
    np.testing.assert_allclose(longer[:, :2], sequence, rtol=1e-6)  # padding adds nothing to the sum


@pytest.mark.parametrize("surrogate", ["gspo", "cispo"])
@pytest.mark.parametrize("correction", ["truncate", "sequence_mask"])
def test_padding_reaches_neither_loss_nor_gradient(surrogate, correction):
    policy, *rest, mask = random_tokens()
    poisoned = [np.where(mask, values, np.nan).astype(np.float32) for values in rest]
    config = no_kl(surrogate=surrogate, ratio_anchor="proximal", correction=correction)
    weights, num_tokens = token_weights(mask, "token_mean"), jnp.float32(mask.sum())

    def total(policy, rest):
        return grpo_loss(policy, *rest, mask, weights, num_tokens, config)[0]

    np.testing.assert_allclose(total(policy, poisoned), total(policy, rest), rtol=FLOAT32_ROUNDING)
    gradient = np.asarray(jax.grad(total)(policy, rest))
    assert np.all(gradient[~mask] == 0) and np.all(np.isfinite(gradient)) and np.any(gradient != 0)


def test_kl_in_the_reward_is_reported_but_not_in_the_loss():
    tokens = random_tokens()
    with_kl, sums, _ = run_loss(tokens, LossConfig(kl_coefficient=0.5))
    without, sums_reward, _ = run_loss(tokens, LossConfig(kl_coefficient=0.5, kl_in_reward=True))
    np.testing.assert_allclose(with_kl - without, 0.5 * sums["policy/kl"], rtol=1e-5)
    assert sums_reward["policy/kl"] == sums["policy/kl"]


def test_gspo_ratio_is_one_number_a_row():
    policy, _, behavior, *_, advantages, mask = random_tokens()
    _, ratio, *_ = surrogate_terms(policy, behavior, advantages, mask, no_kl(surrogate="gspo"))
    assert np.all(np.ptp(ratio, axis=1) == 0)
    expected = [np.exp(np.mean((policy - behavior)[i][mask[i]])) for i in range(len(mask)) if mask[i].any()]
    np.testing.assert_allclose(np.asarray(ratio)[mask.any(1), 0], expected, rtol=1e-5)
