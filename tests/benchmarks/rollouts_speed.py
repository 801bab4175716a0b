"""Sampling: this engine against transformers' `generate` on torch, same weights, prompts and CPU.

The 13-million-parameter Qwen3-VL of `backbone_speed.py`, prompts of 36 tokens with one image of 128 x 128 pixels each,
groups of 8 samples at temperature 1. Two cases:

    equal    4 prompts, every rollout 128 tokens long
    skewed   32 prompts, rollout lengths of the stored trace divided by 8, 32 rows at a time. `generate` runs each
             batch of 32 rows to its longest, as it must; tokens beyond a rollout's length do not count

Both run on the same two cores in turns, so that other load on the machine meets both; medians of useful tokens per
second are compared. The engine also carries the reward automaton and the behaviour log-probabilities.

    PYTHONPATH=. JAX_PLATFORMS=cpu python tests/benchmarks/rollouts_speed.py [rounds]
"""

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import torch
from backbone_speed import CONFIG, GRID, IMAGE, NUM_THREADS, PROMPT, make_batch

sys.path.append(str(Path(__file__).parents[1] / "sampling"))
from forced_lengths import ForcedLengths
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from safegrpo_jax.models import hf_weights
from safegrpo_jax.models.hf_config import config_to_hf
from safegrpo_jax.programs import model_functions
from safegrpo_jax.rewards.automaton import build_tables
from safegrpo_jax.sampling.rollout import Placement, SamplingConfig, make_row_keys
from safegrpo_jax.sharding import make_mesh, shard_batch
from safegrpo_jax.types import Prompts

GROUP, ROWS = 8, 32
STOP = 0
EQUAL_LENGTHS = np.full(4 * GROUP, 128)
TRACE = Path(__file__).parents[1] / "data" / "length_trace.json"
SMALLEST_RATIOS = {"equal": 2.5, "skewed": 4.0}


def skewed_lengths() -> np.ndarray:
    return np.maximum(1, np.array(json.loads(TRACE.read_text())["lengths"][: ROWS * GROUP]) // 8)


def prompts_of(num_prompts: int) -> Prompts:
    """The first prompts of the backbone's batch, each with its image."""

    def take(path, leaf):
        return leaf[:, :num_prompts] if path[-1].name == "positions" else leaf[:num_prompts]

    prompts = jax.tree_util.tree_map_with_path(take, make_batch()[0])
    ids = np.arange(num_prompts, dtype=np.int32)
    return Prompts(**{**vars(prompts), "record_ids": ids})


def make_torch_run(model, prompts: Prompts, lengths: np.ndarray):
    """Generates all rollouts, `ROWS` rows at a time."""
    batches = []
    for first in range(0, len(prompts.prompt_ids), ROWS // GROUP):
        part = slice(first, first + ROWS // GROUP)
        ids = torch.from_numpy(prompts.prompt_ids[part]).long()
        longest = int(lengths[first * GROUP :][:ROWS].max())
        batches.append(
            {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "pixel_values": torch.from_numpy(prompts.images.patches[part].reshape(-1, CONFIG.vision.patch_values)),
                "image_grid_thw": torch.tensor([(1, GRID, GRID)] * len(ids)),
                "mm_token_type_ids": (ids == IMAGE).int(),
                "min_new_tokens": longest,
                "max_new_tokens": longest,
            }
        )

    @torch.no_grad()
    def run():
        for batch in batches:
            tokens = model.generate(
                **batch, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, num_return_sequences=GROUP
            )
            assert tokens.shape == (ROWS, PROMPT + batch["max_new_tokens"])

    return run


def make_jax_run(params, prompts: Prompts, lengths: np.ndarray, sampling: SamplingConfig):
    mesh = make_mesh({"data": len(jax.devices())})
    vocabulary = np.arange(CONFIG.text.vocab_size)
    tables = build_tables("reference", [b"<text_safe>"] + [b"%d" % i for i in vocabulary[1:]])
    sampler = ForcedLengths(
        model_functions(CONFIG), sampling, Placement(mesh, ("data",)), vocabulary == STOP, (STOP,), tables
    )
    prompts, key = shard_batch(prompts, mesh), jax.random.key(0)
    sampler.force(make_row_keys(key, prompts.record_ids, GROUP), lengths)
    stats = {}

    def run():
        rollouts, new = sampler.generate(params, prompts, key)
        np.testing.assert_array_equal(rollouts.completion_len, lengths)
        stats.update(new)

    return run, stats


def main(rounds: int = 5) -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:NUM_THREADS])  # jax counts cores at its first call
    jax.config.update("jax_num_cpu_devices", NUM_THREADS)
    torch.set_num_threads(NUM_THREADS)
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(**config_to_hf(CONFIG))).float().eval()
    model.generation_config.pad_token_id = STOP
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder) / "model")
        params = hf_weights.load(Path(folder) / "model", CONFIG)
    skewed = skewed_lengths()
    cases = {
        "equal": (EQUAL_LENGTHS, SamplingConfig(GROUP, 128, decode_chunk=128, cache_buckets=(32, 64, 96))),
        "skewed": (
            skewed,
            SamplingConfig(
                GROUP, int(skewed.max()), num_slots=ROWS, num_prefixes=12, cache_buckets=(64, 128, 256), min_slots=4
            ),
        ),
    }
    failed = False
    for name, (lengths, sampling) in cases.items():
        prompts = prompts_of(len(lengths) // GROUP)
        jax_run, stats = make_jax_run(params, prompts, lengths, sampling)
        runs = {"torch": make_torch_run(model, prompts, lengths), "jax": jax_run}
        seconds = {side: [] for side in runs}
        for number in range(rounds + 1):
            for side, run in runs.items():
                started = time.perf_counter()
                run()
                if number:  # the first compiles
                    seconds[side].append(time.perf_counter() - started)
        speeds = {side: lengths.sum() / statistics.median(values) for side, values in seconds.items()}
        ratio = speeds["jax"] / speeds["torch"]
        failed |= ratio < SMALLEST_RATIOS[name]
        print(
            f"{name}: {lengths.sum()} tokens, tokens/s (medians of {rounds}) torch {speeds['torch']:.0f}, "
            f"jax {speeds['jax']:.0f}, ratio {ratio:.2f} (at least {SMALLEST_RATIOS[name]}); "
            f"{stats['sampler/decode_steps']:.0f} steps, occupancy {stats['sampler/slot_occupancy']:.2f}"
        )
    sys.exit(bool(failed))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
