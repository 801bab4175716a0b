"""Rollouts of a toy attention model against whole-sequence recomputation, under any order, split and mesh."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from jax import monitoring
from jax.sharding import AxisType
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
from safegrpo_jax.sampling.decode import Queue
from safegrpo_jax.sampling.rollout import Placement, Sampler, SamplingConfig
from safegrpo_jax.sharding import shard_batch

RECOMPUTE_TOLERANCE = 1e-5  # float32 sums in another order
CHI_SQUARE_LEVEL = 0.999  # fixed seed
KEY = jax.random.key(11)
SAMPLING = SamplingConfig(group_size=3, max_new_tokens=10, temperature=0.8)


@functools.cache
def make_sampler(sampling=SAMPLING, num_devices=1, stop_ids=(END,)):
    mesh = jax.make_mesh((num_devices,), ("data",), (AxisType.Auto,), devices=jax.devices()[:num_devices])
    return Sampler(FUNCTIONS, sampling, Placement(mesh, ("data",)), BANNED, stop_ids, reward_tables())


def sample(prompts, sampling=SAMPLING, num_devices=1, stop_ids=(END,), params=None, key=KEY):
    """(rollouts, statistics), both on the host."""
    sampler = make_sampler(sampling, num_devices, stop_ids)
    params = init_params() if params is None else params
    rollouts, stats = sampler.generate(params, shard_batch(prompts, sampler.placement.mesh), key)
    return jax.device_get(rollouts), stats


def run(prompts, sampling=SAMPLING, **options):
    return sample(prompts, sampling, **options)[0]


def assert_same(left, right):
    """Equal tokens, masks and spans; log-probabilities up to the order of float32 sums."""
    np.testing.assert_allclose(left.behavior_logps, right.behavior_logps, atol=RECOMPUTE_TOLERANCE)
    logps = left.behavior_logps
    left, right = (dataclasses.replace(side, behavior_logps=logps) for side in (left, right))
    jax.tree.map(np.testing.assert_array_equal, left, right)


def take_rows(rollouts, rows):
    return jax.tree.map(lambda leaf: leaf[rows], rollouts)


def test_logps_equal_a_full_recomputation():
    prompts = make_prompts(range(8))
    rollouts = run(prompts)
    logits = recompute_logits(init_params(), prompts, rollouts.completion_ids, rollouts.completion_mask)
    logps = scipy.special.log_softmax(np.where(BANNED, -np.inf, logits / SAMPLING.temperature), axis=-1)
    expected = np.take_along_axis(logps, rollouts.completion_ids[..., None], axis=-1)[..., 0]
    expected = np.where(rollouts.completion_mask, expected, 0)
    np.testing.assert_allclose(rollouts.behavior_logps, expected, atol=RECOMPUTE_TOLERANCE)
    assert 0 < rollouts.truncated.sum() < 24, "the case should hold ended and cut-off rows"


def test_rows_are_consistent():
    rollouts = run(make_prompts(range(8)))
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


def test_spans_carried_by_the_loop_are_those_of_a_scan():
    rollouts = run(make_prompts(range(8)))
    scanned = reward_spans.scan(reward_tables(), rollouts.completion_ids, rollouts.completion_mask)
    jax.tree.map(np.testing.assert_array_equal, rollouts.spans, jax.device_get(scanned))
    assert (rollouts.spans.tag_count > 0).any() and (rollouts.spans.tag_count == 0).any()


def test_tokens_do_not_depend_on_prompt_order_or_batch_split():
    records = np.arange(20, 28)
    whole = run(make_prompts(records))
    order = np.array([3, 0, 7, 5, 1, 2, 6, 4])
    rows = (order[:, None] * 3 + np.arange(3)).reshape(-1)
    assert_same(run(make_prompts(records[order])), take_rows(whole, rows))
    for start in (0, 2, 4, 6):
        part = run(make_prompts(records[start : start + 2]))
        assert_same(part, take_rows(whole, slice(3 * start, 3 * start + 6)))


def test_samples_do_not_depend_on_the_group_size():
    prompts = make_prompts([20, 21])
    three, five = run(prompts), run(prompts, dataclasses.replace(SAMPLING, group_size=5))
    assert_same(three, take_rows(five, np.array([0, 1, 2, 5, 6, 7])))


def test_padding_changes_nothing():
    records = range(8)
    assert_same(run(make_prompts(records, prompt_len=15)), run(make_prompts(records)))


@pytest.mark.parametrize("num_devices", [2, 8])
def test_tokens_do_not_depend_on_the_mesh(num_devices):
    prompts = make_prompts(range(8))
    sampler = make_sampler(num_devices=num_devices)
    rollouts, _ = sampler.generate(init_params(), shard_batch(prompts, sampler.placement.mesh), KEY)
    assert rollouts.completion_ids.sharding.shard_shape((24, 10)) == (24 // num_devices, 10)
    assert_same(jax.device_get(rollouts), run(prompts))


@pytest.mark.parametrize("num_devices", [1, 2])
@pytest.mark.parametrize(
    "sizes",
    [
        dict(num_slots=2, num_prefixes=2),
        dict(num_slots=4, num_prefixes=2, decode_chunk=3),
        dict(num_slots=6, num_prefixes=4, prefill_batch=2, cache_buckets=(2, 5)),
        dict(num_slots=14, min_slots=2, decode_chunk=2),
        dict(num_slots=64, prefill_batch=2, cache_buckets=(1,)),
    ],
    ids=str,
)
def test_tokens_do_not_depend_on_slots_or_refills(sizes, num_devices):
    prompts = make_prompts(range(8))
    sampling = dataclasses.replace(SAMPLING, **sizes)
    rollouts, stats = sample(prompts, sampling, num_devices=num_devices)
    assert_same(rollouts, run(prompts))
    assert stats["sampler/prefill_prompts"] == 8
    assert stats["sampler/prefill_tokens"] == prompts.prompt_mask.sum()


def test_slots_that_end_are_refilled_until_nothing_waits():
    """Steps are what the lengths ask for, to the step: each slot takes the next rollout as soon as it is idle."""
    prompts = make_prompts(range(8))
    rollouts, stats = sample(prompts, dataclasses.replace(SAMPLING, num_slots=4, num_prefixes=8))
    ends = np.zeros(4, int)
    for length in rollouts.completion_len:
        ends[ends.argmin()] += length
    assert stats["sampler/decode_steps"] == ends.max() < 10 * 24 / 4
    assert stats["sampler/slot_occupancy"] == rollouts.completion_len.sum() / (4 * ends.max())


def test_idle_slots_are_dropped_once_nothing_waits():
    sampling = dataclasses.replace(SAMPLING, max_new_tokens=30, decode_chunk=1)
    prompts = make_prompts(range(8))
    plain, plain_stats = sample(prompts, sampling)
    dropped, stats = sample(prompts, dataclasses.replace(sampling, min_slots=6))
    assert_same(dropped, plain)
    assert stats["sampler/decode_steps"] == plain_stats["sampler/decode_steps"]
    assert stats["sampler/slot_occupancy"] > 1.3 * plain_stats["sampler/slot_occupancy"]


def test_sharded_decode_keeps_every_buffer_split():
    """On 8 devices a step exchanges one number, and the cache that the loop ends with is split as it began."""
    sampler = make_sampler(dataclasses.replace(SAMPLING, group_size=2, num_slots=8), num_devices=8)
    prompts = shard_batch(make_prompts(range(16)), sampler.placement.mesh)
    layout = sampler.layout(16)
    state, pool, private, keys = sampler.start(
        init_params(), prompts, jnp.zeros(()), KEY, sampler.constants, layout=layout
    )
    assert private.keys[0].shape == (8, 2, 6, 16) and pool.keys[0].shape == (16, 2, 6, 7)
    queue = Queue(np.zeros(8, np.int32), np.zeros((8, 2), np.int32))
    arguments = (init_params(), state, private, pool, queue, keys, sampler.constants)
    compiled = sampler.decode.lower(*arguments).compile()
    exchanged = re.findall(r"= (\S+) (?:all-|collective-)\S+\(.*op_name=.*/while/", compiled.as_text())
    assert exchanged == ["s32[]"], exchanged
    after, before = jax.tree.leaves(compiled.output_shardings[:2]), jax.tree.leaves((state, private))
    assert all(leaf.sharding.is_equivalent_to(out, leaf.ndim) for leaf, out in zip(before, after, strict=True))
    assert private.keys[0].sharding.shard_shape((8, 2, 6, 16)) == (1, 2, 6, 16)


def test_a_prompt_is_held_once_per_group():
    """Bytes of the cache: prefixes for the prompts, private columns for the slots, whatever the group size."""
    for group_size in (2, 8):
        sampling = dataclasses.replace(SAMPLING, group_size=group_size, max_new_tokens=6)
        sampler = make_sampler(sampling)
        start = functools.partial(sampler.start, layout=sampler.layout(4))
        _, pool, private, _ = jax.eval_shape(
            start, init_params(), make_prompts(range(4)), jnp.zeros(()), KEY, sampler.constants
        )
        assert pool.last_hidden.shape == (4, 12)
        assert (pool.keys[0].shape, pool.values[0].shape) == ((4, 2, 6, 7), (4, 2, 7, 6))
        assert private.keys[0].shape == (4 * group_size, 2, 6, 8)
        assert private.values[0].shape == (4 * group_size, 2, 8, 6)


def test_ragged_batches_compile_nothing_new():
    """Fifty batches of other records, prompt lengths and endings, after a few that went through every size."""
    compiled = []
    monitoring.register_event_duration_secs_listener(
        lambda event, duration, **_: compiled.append(event) if event.endswith("backend_compile_duration") else None
    )
    sizes = dict(num_slots=4, num_prefixes=4, prefill_batch=2, cache_buckets=(4,), min_slots=2, decode_chunk=1)
    sampler = make_sampler(dataclasses.replace(SAMPLING, **sizes))
    params = [init_params(end_bias=float(bias)) for bias in (-1, 0, 1)]
    for seed in range(70):
        if seed == 20:
            assert len(compiled) > 5
            compiled.clear()
        records = np.random.default_rng(seed).integers(0, 100, 8)
        sampler.generate(params[seed % 3], make_prompts(records), jax.random.key(seed))
    assert compiled == []


def test_every_row_may_end_with_its_first_token():
    rollouts = run(make_prompts(range(8)), params=init_params(end_bias=1000.0))
    assert rollouts.completion_len.tolist() == [1] * 24 and not rollouts.truncated.any()
    assert (rollouts.completion_ids[:, 0] == END).all() and (rollouts.completion_ids[:, 1:] == 0).all()


def test_no_row_ends():
    rollouts = run(make_prompts(range(8)), params=init_params(end_bias=-1000.0))
    assert rollouts.truncated.all() and rollouts.completion_mask.all()


def test_without_stop_ids_the_end_token_is_a_token():
    rollouts = run(make_prompts(range(8)), params=init_params(end_bias=1000.0), stop_ids=())
    assert rollouts.truncated.all() and (rollouts.completion_ids == END).all()


def test_any_of_several_stop_ids_ends_a_row():
    rollouts = run(make_prompts(range(8)), stop_ids=(END, 5))
    last = np.take_along_axis(rollouts.completion_ids, rollouts.completion_len[:, None] - 1, axis=1)[:, 0]
    assert set(last[~rollouts.truncated]) == {END, 5}
    assert (np.isin(rollouts.completion_ids, [END, 5]).sum(axis=1) == ~rollouts.truncated).all()


def test_one_token_of_one_sample():
    prompts = make_prompts(range(6))
    long = run(prompts, dataclasses.replace(SAMPLING, group_size=1))
    short = run(prompts, dataclasses.replace(SAMPLING, group_size=1, max_new_tokens=1))
    assert short.completion_ids.shape == (6, 1)
    np.testing.assert_array_equal(short.completion_ids, long.completion_ids[:, :1])
    np.testing.assert_array_equal(short.truncated, long.completion_len > 1)


def test_greedy_follows_the_best_token_of_a_full_recomputation():
    prompts = make_prompts(range(8))
    rollouts = run(prompts, dataclasses.replace(SAMPLING, temperature=0.0, group_size=2))
    logits = recompute_logits(init_params(), prompts, rollouts.completion_ids, rollouts.completion_mask)
    scores = np.where(BANNED, -np.inf, logits)
    mask = rollouts.completion_mask
    np.testing.assert_array_equal(rollouts.completion_ids[mask], scores.argmax(-1)[mask])
    best = scipy.special.log_softmax(scores, axis=-1).max(-1)
    np.testing.assert_allclose(rollouts.behavior_logps[mask], best[mask], atol=RECOMPUTE_TOLERANCE)
    np.testing.assert_array_equal(rollouts.completion_ids[0::2], rollouts.completion_ids[1::2])


def test_first_tokens_follow_the_distribution_of_the_model():
    prompts = make_prompts([6])
    sampling = SamplingConfig(group_size=8000, max_new_tokens=1, temperature=1.5)
    ids = run(prompts, sampling).completion_ids[:, 0]
    logits = recompute_logits(init_params(), prompts, np.zeros((1, 1), np.int32), np.ones((1, 1), bool))[0, 0]
    expected = 8000 * scipy.special.softmax(np.where(BANNED, -np.inf, logits / 1.5))
    counts = np.bincount(ids, minlength=VOCAB)
    common = expected > 5
    statistic = ((counts - expected)[common] ** 2 / expected[common]).sum()
    assert statistic < scipy.stats.chi2.ppf(CHI_SQUARE_LEVEL, common.sum() - 1)
    assert common.sum() > 5 and counts[VISION] == 0


def test_top_k_restricts_every_token():
    prompts = make_prompts(range(4))
    rollouts = run(prompts, dataclasses.replace(SAMPLING, top_k=2))
    logits = recompute_logits(init_params(), prompts, rollouts.completion_ids, rollouts.completion_mask)
    rank = np.argsort(np.argsort(-np.where(BANNED, -np.inf, logits), axis=-1), axis=-1)
    chosen = np.take_along_axis(rank, rollouts.completion_ids[..., None], axis=-1)[..., 0]
    assert set(chosen[rollouts.completion_mask]) == {0, 1}


def test_another_key_gives_other_tokens():
    prompts = make_prompts(range(8))
    assert not np.array_equal(run(prompts).completion_ids, run(prompts, key=jax.random.key(12)).completion_ids)


@pytest.mark.parametrize(
    "field,value",
    [("group_size", 0), ("max_new_tokens", 0), ("temperature", -0.1), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.1)],
)
def test_impossible_settings_are_refused(field, value):
    with pytest.raises(ValueError, match=f"sampling.{field} is {value}"):
        SamplingConfig(**{field: value})
