"""Rollouts of a toy attention model against whole-sequence recomputation, under any order, split and mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from toy_decoder import (
    BANNED,
    END,
    FUNCTIONS,
    VISION,
    VOCAB,
    init_params,
    make_prompts,
    recompute_logits,
    reward_tables,
)

from safegrpo_jax.rewards import spans as reward_spans
from safegrpo_jax.sampling.decode import decode_completions
from safegrpo_jax.sampling.rollout import SamplingConfig, generate, make_row_keys

RECOMPUTE_TOLERANCE = 1e-5  # float32 sums in another order
CHI_SQUARE_LEVEL = 0.999  # fixed seed
KEY = jax.random.key(11)
SAMPLING = SamplingConfig(group_size=3, max_new_tokens=10, temperature=0.8)


@pytest.fixture(scope="module")
def tables():
    return reward_tables()


@functools.partial(jax.jit, static_argnames=("sampling", "stop_ids"))
def _generate(params, prompts, key, banned, tables, sampling, stop_ids):
    return generate(FUNCTIONS, params, prompts, key, sampling, banned, stop_ids, tables)


def run(tables, prompts, sampling=SAMPLING, params=None, key=KEY, stop_ids=(END,)):
    params = init_params() if params is None else params
    return jax.device_get(_generate(params, prompts, key, BANNED, tables, sampling, stop_ids))


def assert_same(left, right):
    """Equal tokens, masks and spans; log-probabilities up to the order of float32 sums."""
    np.testing.assert_allclose(left.behavior_logps, right.behavior_logps, atol=RECOMPUTE_TOLERANCE)
    logps = left.behavior_logps
    left, right = (dataclasses.replace(side, behavior_logps=logps) for side in (left, right))
    jax.tree.map(np.testing.assert_array_equal, left, right)


def take_rows(rollouts, rows):
    return jax.tree.map(lambda leaf: leaf[rows], rollouts)


def test_logps_equal_a_full_recomputation(tables):
    prompts = make_prompts(range(8))
    rollouts = run(tables, prompts)
    logits = recompute_logits(init_params(), prompts, rollouts.completion_ids, rollouts.completion_mask)
    logps = scipy.special.log_softmax(np.where(BANNED, -np.inf, logits / SAMPLING.temperature), axis=-1)
    expected = np.take_along_axis(logps, rollouts.completion_ids[..., None], axis=-1)[..., 0]
    expected = np.where(rollouts.completion_mask, expected, 0)
    np.testing.assert_allclose(rollouts.behavior_logps, expected, atol=RECOMPUTE_TOLERANCE)
    assert 0 < rollouts.truncated.sum() < 24, "the case should hold ended and cut-off rows"


def test_rows_are_consistent(tables):
    rollouts = run(tables, make_prompts(range(8)))
    lengths = rollouts.completion_len
    np.testing.assert_array_equal(rollouts.completion_mask, np.arange(10) < lengths[:, None])
    assert (rollouts.completion_ids[~rollouts.completion_mask] == 0).all()
    assert (rollouts.behavior_logps[~rollouts.completion_mask] == 0).all()
    is_end = rollouts.completion_ids == END
    np.testing.assert_array_equal(is_end.any(axis=1), ~rollouts.truncated)
    assert (np.argmax(is_end, axis=1) == lengths - 1)[~rollouts.truncated].all(), "nothing follows the end token"
    assert (lengths[rollouts.truncated] == 10).all()
    assert not (rollouts.completion_ids == VISION).any()
    assert len({tuple(row) for row in rollouts.completion_ids[:3]}) == 3, "samples of one prompt differ"


def test_spans_carried_by_the_loop_are_those_of_a_scan(tables):
    rollouts = run(tables, make_prompts(range(8)))
    scanned = reward_spans.scan(tables, rollouts.completion_ids, rollouts.completion_mask)
    jax.tree.map(np.testing.assert_array_equal, rollouts.spans, jax.device_get(scanned))
    assert (rollouts.spans.tag_count > 0).any() and (rollouts.spans.tag_count == 0).any()


def test_tokens_do_not_depend_on_prompt_order_or_batch_split(tables):
    records = np.arange(20, 28)
    whole = run(tables, make_prompts(records))
    order = np.array([3, 0, 7, 5, 1, 2, 6, 4])
    rows = (order[:, None] * 3 + np.arange(3)).reshape(-1)
    assert_same(run(tables, make_prompts(records[order])), take_rows(whole, rows))
    for start in (0, 2, 4, 6):
        part = run(tables, make_prompts(records[start : start + 2]))
        assert_same(part, take_rows(whole, slice(3 * start, 3 * start + 6)))


def test_samples_do_not_depend_on_the_group_size(tables):
    prompts = make_prompts([20, 21])
    three, five = run(tables, prompts), run(tables, prompts, dataclasses.replace(SAMPLING, group_size=5))
    assert_same(three, take_rows(five, np.array([0, 1, 2, 5, 6, 7])))


def test_padding_changes_nothing(tables):
    records = range(8)
    assert_same(run(tables, make_prompts(records, prompt_len=15)), run(tables, make_prompts(records)))


@pytest.mark.parametrize("num_devices", [1, 2, 8])
def test_tokens_do_not_depend_on_the_mesh(tables, num_devices):
    prompts, params = make_prompts(range(8)), init_params()
    mesh = jax.make_mesh((num_devices,), ("data",), (AxisType.Auto,), devices=jax.devices()[:num_devices])
    replicated = NamedSharding(mesh, PartitionSpec())

    def shard(name):
        return NamedSharding(mesh, PartitionSpec(None, "data") if "positions" in name else PartitionSpec("data"))

    sharded = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.device_put(leaf, shard(jax.tree_util.keystr(path))), prompts
    )
    params, device_tables, key = jax.device_put((params, tables, KEY), replicated)
    rollouts = _generate(params, sharded, key, BANNED, device_tables, SAMPLING, (END,))
    assert rollouts.completion_ids.sharding.shard_shape((24, 10)) == (24 // num_devices, 10)
    assert_same(jax.device_get(rollouts), run(tables, prompts))


def test_sharded_loop_keeps_every_buffer_split(tables):
    """On 8 devices the compiled loop gathers nothing, and the private cache it ends with is still split by rows."""
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
    prompts, params = make_prompts(range(8)), init_params()
    keys = make_row_keys(KEY, prompts.record_ids, 2)

    def decode(params, prompts, tables, keys):
        def choose(logits, token_index):
            noise = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, token_index)))(keys)
            return (noise * VOCAB).astype(jnp.int32), noise

        options = dict(group_size=2, max_new_tokens=5, stop_ids=(END,), reward_tables=tables)
        return decode_completions(FUNCTIONS, params, prompts, choose, **options).cache

    rows = NamedSharding(mesh, PartitionSpec("data"))
    replicated = NamedSharding(mesh, PartitionSpec())
    in_prompts = jax.tree_util.tree_map_with_path(
        lambda path, _: (
            NamedSharding(mesh, PartitionSpec(None, "data")) if "positions" in jax.tree_util.keystr(path) else rows
        ),
        prompts,
    )
    compiled = (
        jax.jit(decode, in_shardings=(replicated, in_prompts, replicated, rows))
        .lower(params, prompts, tables, keys)
        .compile()
    )
    assert "all-gather" not in compiled.as_text()
    cache = compiled.output_shardings
    assert cache.private_keys[0].shard_shape((16, 2, 5, 6)) == (2, 2, 5, 6)
    assert cache.prefix_keys[0].shard_shape((8, 2, 7, 6)) == (1, 2, 7, 6)


def test_the_prompt_is_cached_once_per_group(tables):
    prompts = make_prompts(range(4))

    def decode(params, prompts, tables):
        def choose(logits, token_index):
            return jnp.full(logits.shape[0], END, jnp.int32), jnp.zeros(logits.shape[0])

        options = dict(group_size=8, max_new_tokens=6, stop_ids=(END,), reward_tables=tables)
        return decode_completions(FUNCTIONS, params, prompts, choose, **options)

    state = jax.jit(decode)(init_params(), prompts, tables)
    assert state.cache.prefix_keys[0].shape == state.cache.prefix_values[0].shape == (4, 2, 7, 6)
    assert state.cache.private_keys[0].shape == state.cache.private_values[0].shape == (32, 2, 6, 6)
    assert int(state.step) == 1, "all rows ended at once, so the model is never run again"


def test_every_row_may_end_with_its_first_token(tables):
    rollouts = run(tables, make_prompts(range(8)), params=init_params(end_bias=1000.0))
    assert rollouts.completion_len.tolist() == [1] * 24 and not rollouts.truncated.any()
    assert (rollouts.completion_ids[:, 0] == END).all() and (rollouts.completion_ids[:, 1:] == 0).all()


def test_no_row_ends(tables):
    rollouts = run(tables, make_prompts(range(8)), params=init_params(end_bias=-1000.0))
    assert rollouts.truncated.all() and rollouts.completion_mask.all()


def test_without_stop_ids_the_end_token_is_a_token(tables):
    rollouts = run(tables, make_prompts(range(8)), params=init_params(end_bias=1000.0), stop_ids=())
    assert rollouts.truncated.all() and (rollouts.completion_ids == END).all()


def test_any_of_several_stop_ids_ends_a_row(tables):
    rollouts = run(tables, make_prompts(range(8)), stop_ids=(END, 5))
    last = np.take_along_axis(rollouts.completion_ids, rollouts.completion_len[:, None] - 1, axis=1)[:, 0]
    assert set(last[~rollouts.truncated]) == {END, 5}
    assert (np.isin(rollouts.completion_ids, [END, 5]).sum(axis=1) == ~rollouts.truncated).all()


def test_one_token_of_one_sample(tables):
    prompts = make_prompts(range(6))
    long = run(tables, prompts, dataclasses.replace(SAMPLING, group_size=1))
    short = run(tables, prompts, dataclasses.replace(SAMPLING, group_size=1, max_new_tokens=1))
    assert short.completion_ids.shape == (6, 1)
    np.testing.assert_array_equal(short.completion_ids, long.completion_ids[:, :1])
    np.testing.assert_array_equal(short.truncated, long.completion_len > 1)


def test_greedy_follows_the_best_token_of_a_full_recomputation(tables):
    prompts = make_prompts(range(8))
    rollouts = run(tables, prompts, dataclasses.replace(SAMPLING, temperature=0.0, group_size=2))
    logits = recompute_logits(init_params(), prompts, rollouts.completion_ids, rollouts.completion_mask)
    scores = np.where(BANNED, -np.inf, logits)
    mask = rollouts.completion_mask
    np.testing.assert_array_equal(rollouts.completion_ids[mask], scores.argmax(-1)[mask])
    best = scipy.special.log_softmax(scores, axis=-1).max(-1)
    np.testing.assert_allclose(rollouts.behavior_logps[mask], best[mask], atol=RECOMPUTE_TOLERANCE)
    np.testing.assert_array_equal(rollouts.completion_ids[0::2], rollouts.completion_ids[1::2])


def test_first_tokens_follow_the_distribution_of_the_model(tables):
    prompts = make_prompts([6])
    sampling = SamplingConfig(group_size=8000, max_new_tokens=1, temperature=1.5)
    ids = run(tables, prompts, sampling).completion_ids[:, 0]
    logits = recompute_logits(init_params(), prompts, np.zeros((1, 1), np.int32), np.ones((1, 1), bool))[0, 0]
    expected = 8000 * scipy.special.softmax(np.where(BANNED, -np.inf, logits / 1.5))
    counts = np.bincount(ids, minlength=VOCAB)
    common = expected > 5
    statistic = ((counts - expected)[common] ** 2 / expected[common]).sum()
    assert statistic < scipy.stats.chi2.ppf(CHI_SQUARE_LEVEL, common.sum() - 1)
    assert common.sum() > 5 and counts[VISION] == 0


def test_top_k_restricts_every_token(tables):
    prompts = make_prompts(range(4))
    rollouts = run(tables, prompts, dataclasses.replace(SAMPLING, top_k=2))
    logits = recompute_logits(init_params(), prompts, rollouts.completion_ids, rollouts.completion_mask)
    rank = np.argsort(np.argsort(-np.where(BANNED, -np.inf, logits), axis=-1), axis=-1)
    chosen = np.take_along_axis(rank, rollouts.completion_ids[..., None], axis=-1)[..., 0]
    assert set(chosen[rollouts.completion_mask]) == {0, 1}


def test_another_key_gives_other_tokens(tables):
    prompts = make_prompts(range(8))
    assert not np.array_equal(
        run(tables, prompts).completion_ids, run(tables, prompts, key=jax.random.key(12)).completion_ids
    )


@pytest.mark.parametrize(
    "field,value",
    [("group_size", 0), ("max_new_tokens", 0), ("temperature", -0.1), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.1)],
)
def test_impossible_settings_are_refused(field, value):
    with pytest.raises(ValueError, match=f"sampling.{field} is {value}"):
        SamplingConfig(**{field: value})
