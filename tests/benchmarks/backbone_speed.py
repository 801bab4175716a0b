"""Forward and backward of token log-probs: this backbone against transformers on torch, same weights, batch and CPU.

A Qwen3-VL of 13 million parameters; 32 rows, each one image of 128 x 128 pixels, 36 prompt and 128 response tokens.
Both run on the same two cores in turns, so that other load on the machine meets both; medians are compared. Both
compute logits of the response only.

    JAX_PLATFORMS=cpu python tests/benchmarks/backbone_speed.py [rounds]
"""

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from safegrpo_jax.data.images import interpolation_taps, patch_positions
from safegrpo_jax.models import hf_weights
from safegrpo_jax.models.decoder import TextConfig
from safegrpo_jax.models.hf_config import config_to_hf
from safegrpo_jax.models.qwen_vl import QwenVLConfig
from safegrpo_jax.models.vision import VisionConfig
from safegrpo_jax.policy import make_logps_fn
from safegrpo_jax.types import Labels, PackedImages, Prompts

NUM_THREADS = 2
ROWS, PROMPT, RESPONSE, GRID = 32, 36, 128, 8  # the grid in patches: 64 patches, 16 tokens
IMAGE, VIDEO, START, END = 4090, 4091, 4092, 4093
CONFIG = QwenVLConfig(
    vision=VisionConfig(192, 768, 6, 4, 256, (1, 3), num_positions=64),
    text=TextConfig(4096, 256, 768, 8, 4, 2, 1e4, (12, 10, 10), head_dim=64, tied_embeddings=True),
    image_token_id=IMAGE,
    video_token_id=VIDEO,
    vision_start_token_id=START,
    vision_end_token_id=END,
)
LARGEST_RATIO = 1.3


def make_batch() -> tuple[Prompts, np.ndarray]:
    """Prompts (image first, no padding) and responses [32 128]."""
    rng = np.random.default_rng(0)
    tokens = (GRID // 2) ** 2
    ids = rng.integers(0, 4000, (ROWS, PROMPT)).astype(np.int32)
    ids[:, 0], ids[:, 1 : 1 + tokens], ids[:, 1 + tokens] = START, IMAGE, END
    rows, columns = np.divmod(np.arange(tokens), GRID // 2)
    text = 1 + GRID // 2 + np.arange(PROMPT - 1 - tokens)
    axes = [np.concatenate([[0], 1 + spread, text]) for spread in (0 * rows, rows, columns)]
    vision_mask = ids == IMAGE
    feature_index = np.zeros_like(ids)
    feature_index[vision_mask] = np.arange(ROWS * tokens)

    def tiled(array):
        return np.broadcast_to(array, (ROWS, *array.shape))

    taps, weights = interpolation_taps(GRID, GRID, 8)
    patches = rng.normal(size=(ROWS, GRID * GRID, CONFIG.vision.patch_values)).astype(np.float32)
    images = PackedImages(
        patches, tiled(patch_positions(GRID, GRID)), tiled(taps), tiled(weights), np.ones((ROWS, GRID**2), np.int32)
    )
    zeros = np.zeros(ROWS, np.int32)
    delta = np.full(ROWS, text[-1] + 1 - PROMPT, np.int32)
    positions = np.broadcast_to(np.array(axes, np.int32)[:, None], (3, ROWS, PROMPT))
    labels = Labels(zeros, zeros, zeros, zeros > 0)
    prompts = Prompts(ids, ids >= 0, positions, delta, vision_mask, feature_index, zeros, images, labels)
    return prompts, rng.integers(0, 4000, (ROWS, RESPONSE)).astype(np.int32)


def make_torch_step(model, prompts: Prompts, responses: np.ndarray):
    ids = torch.from_numpy(np.concatenate([prompts.prompt_ids, responses], 1)).long()
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.from_numpy(prompts.images.patches.reshape(-1, CONFIG.vision.patch_values)),
        "image_grid_thw": torch.tensor([(1, GRID, GRID)] * ROWS),
        "mm_token_type_ids": (ids == IMAGE).int(),
        "logits_to_keep": RESPONSE + 1,
        "use_cache": False,
    }
    targets = torch.from_numpy(responses).long()[..., None]

    def step():
        model.zero_grad()
        logps = torch.log_softmax(model(**inputs).logits[:, :-1], -1)
        total = logps.gather(-1, targets).sum()
        total.backward()
        return float(total.detach())

    return step


def make_jax_step(params, prompts: Prompts, responses: np.ndarray):
    logps_fn = make_logps_fn(CONFIG, np.zeros(CONFIG.text.vocab_size, bool), 1.0, chunk=0, freeze_vision=False)
    mask = np.ones(responses.shape, bool)

    @jax.jit
    def gradient(params, prompts):
        return jax.value_and_grad(lambda params: logps_fn(params, prompts, jnp.asarray(responses), mask)[0].sum())(
            params
        )

    prompts = jax.device_put(prompts)
    return lambda: float(jax.block_until_ready(gradient(params, prompts))[0])


def main(rounds: int = 15) -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:NUM_THREADS])  # jax counts cores at its first call
    torch.set_num_threads(NUM_THREADS)
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(**config_to_hf(CONFIG))).float()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder) / "model")
        params = hf_weights.load(Path(folder) / "model", CONFIG)
    prompts, responses = make_batch()
    steps = {"torch": make_torch_step(model, prompts, responses), "jax": make_jax_step(params, prompts, responses)}
    totals = {name: step() for name, step in steps.items()}  # compiles, and shows that both compute the same
    assert abs(totals["jax"] / totals["torch"] - 1) < 1e-5, totals
    seconds = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    best = {name: min(values) for name, values in seconds.items()}
    ratio = medians["jax"] / medians["torch"]
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"{count / 1e6:.1f}M parameters, log-prob sums {totals['torch']:.2f} (torch) {totals['jax']:.2f} (jax)")
    print(f"medians of {rounds}: torch {medians['torch']:.3f} s, jax {medians['jax']:.3f} s, ratio {ratio:.2f}")
    print(f"fastest: torch {best['torch']:.3f} s, jax {best['jax']:.3f} s, ratio {best['jax'] / best['torch']:.2f}")
    sys.exit(ratio > LARGEST_RATIO)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
