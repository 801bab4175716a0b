"""A tiny Qwen3-VL in the sampler: its cached decode and the trainer's whole-sequence pass give the same numbers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_decoder import BANNED, END, PIECES, VOCAB, reward_tables

from safegrpo_jax.models import qwen_vl
from safegrpo_jax.models.decoder import TextConfig
from safegrpo_jax.models.vision import VisionConfig
from safegrpo_jax.policy import model_functions
from safegrpo_jax.sampling.rollout import Placement, Sampler, SamplingConfig
from safegrpo_jax.sharding import make_mesh
from safegrpo_jax.types import Labels, PackedImages, Prompts

LOGP_TOLERANCE = 1e-5  # float32 sums in another order, logits below 10 in size
GROUP, NEW_TOKENS, PROMPT_LEN = 3, 12, 9
SAMPLING = SamplingConfig(group_size=GROUP, max_new_tokens=NEW_TOKENS, temperature=0.9)
IMAGE_ID = 3
CONFIG = qwen_vl.QwenVLConfig(
    vision=VisionConfig(
        width=16, mlp_width=24, num_layers=2, num_heads=2, out_width=24, deepstack_layers=(0,),
        patch_size=2, num_positions=16,
    ),
    text=TextConfig(
        vocab_size=VOCAB, width=24, mlp_width=32, num_layers=3, num_heads=4, num_kv_heads=2,
        rope_theta=1e4, mrope_section=(2, 1, 1), head_dim=8,
    ),
    image_token_id=IMAGE_ID, video_token_id=4, vision_start_token_id=5, vision_end_token_id=6,
)  # fmt: skip


FUNCTIONS = model_functions(CONFIG)


@functools.cache
def init_params():
    """Matrices with five times the usual spread (decided probabilities, rounding not amplified), vectors near one.

    Drawn by numpy: compiling the model's own initialisation would take most of this file's time.
    """
    rng = np.random.default_rng(3)
    shapes = jax.eval_shape(lambda key: qwen_vl.init_params(CONFIG, key), jax.random.key(0))

    def draw(leaf):
        return jnp.asarray(rng.normal(0.0 if leaf.ndim > 1 else 1.0, 0.1, leaf.shape), leaf.dtype)

    return jax.tree.map(draw, shapes)


def make_prompts(image_seed=0):
    """Three prompts of 9, 6 and 4 tokens; the first two begin with an image of 2 x 4 patches (2 merged tokens)."""
    lengths = np.array([9, 6, 4])
    mask = np.arange(PROMPT_LEN) >= PROMPT_LEN - lengths[:, None]
    ids = np.where(mask, np.random.default_rng(1).integers(7, VOCAB, mask.shape), 0).astype(np.int32)
    vision_mask, feature_index = np.zeros_like(mask), np.zeros_like(ids)
    positions = np.broadcast_to(np.where(mask, np.cumsum(mask, 1) - 1, 0), (3, *mask.shape)).astype(np.int32).copy()
    rope_delta = np.zeros(3, np.int32)
    for row in (0, 1):
        first = PROMPT_LEN - lengths[row]
        pads = slice(first, first + 2)
        ids[row, pads], vision_mask[row, pads], feature_index[row, pads] = IMAGE_ID, True, (2 * row, 2 * row + 1)
        # One row of two merged tokens at (time 0, height 0, width 0..1); the text goes on at 2: no delta.
        positions[:, row, pads] = [[0, 0], [0, 0], [0, 1]]
    patches = np.random.default_rng(image_seed).normal(size=(2, 8, 24)).astype(np.float32)
    patch_pos = np.array([[y, 2 * block + x] for block in (0, 1) for y in (0, 1) for x in (0, 1)], np.int32)
    taps = np.broadcast_to((patch_pos @ [4, 1])[:, None], (8, 4))
    images = PackedImages(
        patches=patches,
        patch_pos=np.stack([patch_pos] * 2),
        tap_ids=np.stack([taps] * 2).astype(np.int32),
        tap_weights=np.full((2, 8, 4), 0.25, np.float32),
        segment_ids=np.ones((2, 8), np.int32),
    )
    zeros = np.zeros(3, np.int32)
    labels = Labels(visual=zeros, text=zeros, combined=zeros, tagged=zeros == 0)
    record_ids = np.arange(3, dtype=np.int32)
    return Prompts(ids, mask, positions, rope_delta, vision_mask, feature_index, record_ids, images, labels)


def sample(params, prompts, sampling=SAMPLING):
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    sampler = Sampler(FUNCTIONS, sampling, Placement(mesh, ("data",)), BANNED, (END,), reward_tables())
    return jax.device_get(sampler.generate(params, prompts, jax.random.key(0))[0])


@jax.jit
def recompute_logps(params, prompts, completion_ids, completion_mask):
    """Log-probabilities from one pass over prompt and completion, as the trainer computes them."""

    def join(of_prompt, of_completion):
        return jnp.concatenate([jnp.repeat(of_prompt, GROUP, axis=-2), of_completion], axis=-1)

    start = jnp.repeat(prompts.prompt_mask.sum(-1) + prompts.rope_delta, GROUP)[:, None]
    positions = jnp.broadcast_to(start + jnp.arange(NEW_TOKENS), (3, *completion_ids.shape))
    hidden = qwen_vl.text_hidden(
        params,
        join(prompts.prompt_ids, completion_ids),
        join(prompts.prompt_mask, completion_mask),
        join(prompts.positions, positions),
        join(prompts.vision_mask, jnp.zeros_like(completion_mask)),
        join(prompts.feature_index, jnp.zeros_like(completion_ids)),
        qwen_vl.encode_images(params, prompts.images, CONFIG),
        CONFIG,
    )
    logits = qwen_vl.logits_from_hidden(params, hidden[:, PROMPT_LEN - 1 : -1], CONFIG) / SAMPLING.temperature
    logps = jax.nn.log_softmax(jnp.where(BANNED, -jnp.inf, logits), axis=-1)
    chosen = jnp.take_along_axis(logps, completion_ids[..., None], axis=-1)[..., 0]
    return jnp.where(completion_mask, chosen, 0.0)


@pytest.fixture(scope="module")
def rollouts():
    return sample(init_params(), make_prompts())


def test_behavior_logps_equal_the_whole_sequence_pass(rollouts):
    logps = recompute_logps(init_params(), make_prompts(), rollouts.completion_ids, rollouts.completion_mask)
    np.testing.assert_allclose(rollouts.behavior_logps, logps, atol=LOGP_TOLERANCE)
    assert len(PIECES) == VOCAB and np.ptp(rollouts.behavior_logps[:, 0]) > 0.1, "the distribution is not flat"


def test_refills_give_the_same_rollouts(rollouts):
    sizes = dict(num_slots=2, num_prefixes=2, prefill_batch=1, cache_buckets=(4,), decode_chunk=5)
    refilled = sample(init_params(), make_prompts(), dataclasses.replace(SAMPLING, **sizes))
    np.testing.assert_array_equal(refilled.completion_ids, rollouts.completion_ids)
    np.testing.assert_allclose(refilled.behavior_logps, rollouts.behavior_logps, atol=LOGP_TOLERANCE)


def test_other_images_change_the_logps_of_their_prompts_alone(rollouts):
    swapped = make_prompts(image_seed=1)
    logps = recompute_logps(init_params(), swapped, rollouts.completion_ids, rollouts.completion_mask)
    change = np.abs(rollouts.behavior_logps - logps).max(axis=1).reshape(3, GROUP)
    assert (change[:2] > 100 * LOGP_TOLERANCE).all()
    assert (change[2] < LOGP_TOLERANCE).all()
