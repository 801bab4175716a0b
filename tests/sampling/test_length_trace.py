"""Slots on a stored, skewed trace of response lengths: how many decode steps, how busy, and nothing lost."""

import json
from pathlib import Path

import jax
import numpy as np
from forced_lengths import ForcedLengths
from jax.sharding import AxisType
from toy_decoder import BANNED, END, FUNCTIONS, VOCAB, init_params, make_prompts, reward_tables

from safegrpo_jax.sampling.rollout import Placement, SamplingConfig, make_row_keys

GROUP, SLOTS, SHRINK = 8, 32, 8  # lengths and the host's chunk are divided alike, so the schedule is that of full size
TRACE = json.loads((Path(__file__).parents[1] / "data" / "length_trace.json").read_text())["lengths"]
LENGTHS = np.maximum(1, np.array(TRACE) // SHRINK)
LARGEST_STEPS_RATIO = 0.3  # of static batching: batches of as many rows as there are slots, each to its longest
SMALLEST_OCCUPANCY = 0.9  # while anything waits
KEY = jax.random.key(5)


def generate(num_slots, num_prefixes):
    """(rollouts, statistics, the host's reports) of the whole trace."""
    sampling = SamplingConfig(
        GROUP,
        int(LENGTHS.max()),
        num_slots=num_slots,
        num_prefixes=num_prefixes,
        prefill_batch=4,
        decode_chunk=64 // SHRINK,
        cache_buckets=(64, 128, 256),
    )
    mesh = jax.make_mesh((1,), ("data",), (AxisType.Auto,), devices=jax.devices()[:1])
    banned = BANNED | (np.arange(VOCAB) == END)
    sampler = ForcedLengths(FUNCTIONS, sampling, Placement(mesh, ("data",)), banned, (END,), reward_tables())
    prompts = make_prompts(range(len(LENGTHS) // GROUP))
    sampler.force(make_row_keys(KEY, prompts.record_ids, GROUP), LENGTHS)
    reports, decode = [], sampler.decode

    def note(*arguments):
        result = decode(*arguments)
        reports.append(jax.device_get(result[-1]))
        return result

    sampler.decode = note
    rollouts, stats = sampler.generate(init_params(), prompts, KEY)
    return jax.device_get(rollouts), stats, reports


def test_a_skewed_trace_takes_few_steps_and_keeps_the_slots_busy():
    rollouts, stats, reports = generate(SLOTS, 12)
    np.testing.assert_array_equal(rollouts.completion_len, LENGTHS)
    assert not rollouts.truncated[LENGTHS < LENGTHS.max()].any()
    static = LENGTHS.reshape(-1, SLOTS).max(axis=1).sum()
    assert stats["sampler/decode_steps"] <= LARGEST_STEPS_RATIO * static
    full = [report for report in reports if report.next_row[0] < len(LENGTHS)][-1]
    assert full.num_steps > 0.8 * stats["sampler/decode_steps"], "the drain should be the smaller part"
    assert full.num_busy / (SLOTS * full.num_steps) >= SMALLEST_OCCUPANCY
    prompts = make_prompts(range(len(LENGTHS) // GROUP))
    assert stats["sampler/prefill_tokens"] == prompts.prompt_mask.sum()
    assert stats["sampler/prefill_prompts"] == len(prompts.record_ids)
