"""What is drawn, how often, and with which log-probability."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from safegrpo_jax.sampling.logits import (
    choose_tokens,
    first_argmax,
    gumbel_noise,
    keep_top_k,
    keep_top_p,
    scale_logits,
)

NUM_DRAWS = 20_000
CHI_SQUARE_LEVEL = 0.999  # the seed is fixed, so a correct sampler passes always
LOGP_TOLERANCE = 2e-6  # float32 against float64
TEMPERATURE = 0.7
LOGITS = np.array([0.3, -1.0, 2.0, 1.1, 0.29, -3.0, 1.7, 4.0, 0.0], np.float32)
BANNED = np.arange(9) == 7  # the likeliest one
NOT_BANNED = np.zeros(9, bool)


def draw(num_rows, temperature=TEMPERATURE, top_k=0, top_p=1.0):
    row_keys = jax.random.split(jax.random.key(5), num_rows)
    logits = jnp.broadcast_to(LOGITS, (num_rows, 9))

    @jax.jit
    def run(logits, banned, row_keys):
        def noise():
            return gumbel_noise(row_keys, jnp.full(len(row_keys), 3), 9)

        return choose_tokens(logits, banned, noise, temperature=temperature, top_k=top_k, top_p=top_p)

    ids, logps = run(logits, BANNED, row_keys)
    return np.asarray(ids), np.asarray(logps)


def full_softmax(temperature=TEMPERATURE):
    return scipy.special.softmax(np.where(BANNED, -np.inf, LOGITS.astype(np.float64) / temperature))


@pytest.mark.parametrize(
    "top_k,top_p,support",
    [
        (0, 1.0, [0, 1, 2, 3, 4, 5, 6, 8]),
        (3, 1.0, [2, 3, 6]),
        (0, 0.6, [2, 6]),  # 0.46 + 0.30 reach 0.6
        (3, 0.9, [2, 3, 6]),  # of what top-k left: 0.52 + 0.34 fall short of 0.9
        (2, 0.5, [2]),  # 0.61 of what top-k left
    ],
)
def test_sampled_frequencies_match_the_exact_distribution(top_k, top_p, support):
    ids, logps = draw(NUM_DRAWS, top_k=top_k, top_p=top_p)
    full = full_softmax()
    expected = np.zeros(9)
    expected[support] = full[support] / full[support].sum()
    counts = np.bincount(ids, minlength=9)
    assert set(np.flatnonzero(counts)) == set(support)
    if len(support) > 1:
        statistic = ((counts - NUM_DRAWS * expected)[support] ** 2 / (NUM_DRAWS * expected[support])).sum()
        assert statistic < scipy.stats.chi2.ppf(CHI_SQUARE_LEVEL, len(support) - 1)
    np.testing.assert_allclose(logps, np.log(full[ids]), atol=LOGP_TOLERANCE)


def test_rare_tokens_are_drawn_at_their_rate():
    """A token of probability 1e-4 among 400,000 draws: 40 expected, 20 to 65 is beyond four deviations."""
    row_keys = jax.random.split(jax.random.key(1), 400_000)
    scores = jnp.log(jnp.array([1 - 1e-4, 1e-4]))
    ids = jax.jit(lambda keys: first_argmax(scores + gumbel_noise(keys, jnp.full(len(keys), 0), 2)))(row_keys)
    assert 14 < int(ids.sum()) < 66


def test_greedy_takes_the_best_allowed_id_and_reports_temperature_one():
    ids, logps = draw(3, temperature=0.0, top_k=1, top_p=0.1)
    assert ids.tolist() == [2, 2, 2]
    np.testing.assert_allclose(logps, np.log(full_softmax(temperature=1.0)[2]), atol=LOGP_TOLERANCE)


@pytest.mark.parametrize("top_k", [1, 7, 499, 500, 900])
def test_top_k_keeps_what_a_sort_keeps(top_k):
    scores = np.random.default_rng(top_k).normal(size=(6, 500)).astype(np.float32) * 5
    kept = np.isfinite(keep_top_k(jnp.asarray(scores), top_k))
    threshold = np.sort(scores, axis=1)[:, -min(top_k, 500)]
    np.testing.assert_array_equal(kept, scores >= threshold[:, None])


def test_top_k_keeps_ties_and_never_revives_banned_ids():
    scores = scale_logits(jnp.array([[1.0, 2.0, 2.0, 9.0, -1.0, 0.0, -0.0, 3.0, 3.0]]), jnp.arange(9) == 3, 1.0)
    assert np.flatnonzero(np.isfinite(keep_top_k(scores, 3)[0])).tolist() == [1, 2, 7, 8]
    assert np.flatnonzero(np.isfinite(keep_top_k(scores, 9)[0])).tolist() == [0, 1, 2, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_top_p_keeps_the_smallest_sufficient_set(top_p):
    scores = np.random.default_rng(3).normal(size=(6, 500)).astype(np.float32) * 3
    kept = np.isfinite(keep_top_p(jnp.asarray(scores), top_p))
    probs = scipy.special.softmax(scores.astype(np.float64), axis=1)
    for row in range(6):
        order = np.argsort(-probs[row])
        before = np.cumsum(probs[row][order]) - probs[row][order]
        assert set(np.flatnonzero(kept[row])) == set(order[before < top_p])


def test_first_argmax_is_argmax_also_with_ties_and_stays_in_range_with_nan():
    scores = np.random.default_rng(0).integers(0, 4, (50, 33)).astype(np.float32)
    scores[:, 0] = -np.inf
    np.testing.assert_array_equal(jax.jit(first_argmax)(scores), scores.argmax(1))
    assert first_argmax(jnp.full((1, 33), jnp.nan)).tolist() == [32]


def test_noise_of_a_row_does_not_depend_on_its_neighbours():
    row_keys = jax.random.split(jax.random.key(0), 6)
    together = gumbel_noise(row_keys, jnp.full(len(row_keys), 2), 40)
    alone = gumbel_noise(row_keys[4:5], jnp.full(len(row_keys[4:5]), 2), 40)
    np.testing.assert_array_equal(together[4:5], alone)
    assert not np.array_equal(alone, gumbel_noise(row_keys[4:5], jnp.full(len(row_keys[4:5]), 3), 40))
