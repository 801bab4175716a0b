"""From records to hidden states: fifty batches of random lengths, counts and sizes of images, and no compilation."""

import itertools

import jax
import numpy as np
from jax import monitoring

from safegrpo_jax.data.processor import Processor, ProcessorConfig
from safegrpo_jax.data.records import Record
from safegrpo_jax.models import qwen_vl
from safegrpo_jax.models.decoder import TextConfig
from safegrpo_jax.models.qwen_vl import QwenVLConfig
from safegrpo_jax.models.vision import VisionConfig

CONFIG = ProcessorConfig(
    patch_size=4,
    position_table_side=6,
    min_pixels=64,
    max_pixels=1024,  # 64 patches, 16 tokens
    prompt_buckets=(48, 96),
    completion_buckets=(8,),
    patch_buckets=(64,),
    instruction="",
)
PROMPTS_PER_BATCH, MAX_IMAGES, NUM_BATCHES = 2, 2, 50
ROWS = (1, 2, 3, 4)  # packing rows that two prompts of up to two images can need


def make_model(chat):
    ids = [chat.tokenizer.convert_tokens_to_ids(name) for name in ("<|vision_start|>", "<|vision_end|>")]
    return QwenVLConfig(
        vision=VisionConfig(16, 24, 2, 2, 24, (0,), patch_size=4, num_positions=36),
        text=TextConfig(400, 24, 32, 2, 2, 1, 1e4, (2, 1, 1), head_dim=8),
        image_token_id=chat.image_token_id,
        video_token_id=399,
        vision_start_token_id=ids[0],
        vision_end_token_id=ids[1],
        scan_layers=True,
    )


def random_record(rng, png):
    sizes = rng.integers(8, 33, (rng.integers(0, MAX_IMAGES + 1), 2))
    text = "".join(rng.choice(list("a red knife?"), rng.integers(1, 24)))
    images = tuple(png(int(height), int(width)) for height, width in sizes)
    return Record(text, images, "safe", "safe", "safe", tagged=bool(rng.integers(2)))


def test_no_compilation_after_warm_up(small_tokenizer, png):
    processor = Processor(small_tokenizer, CONFIG)
    config = make_model(processor.chat)
    params = jax.jit(qwen_vl.init_params, static_argnums=0)(config, jax.random.key(0, impl="unsafe_rbg"))

    @jax.jit
    def hidden(params, prompts):
        features = qwen_vl.encode_images(params, prompts.images, config)
        tokens = (prompts.prompt_ids, prompts.prompt_mask, prompts.positions, prompts.vision_mask)
        return qwen_vl.text_hidden(params, *tokens, prompts.feature_index, features, config)

    compiled = []
    monitoring.register_event_duration_secs_listener(
        lambda event, duration, **_: compiled.append(event) if event.endswith("backend_compile_duration") else None
    )
    rng = np.random.default_rng(0)
    example = processor.encode_prompts([random_record(rng, png) for _ in range(PROMPTS_PER_BATCH)])

    def reshaped(rows, length):
        old_rows, old_length = example.images.segment_ids.shape[0], example.prompt_ids.shape[1]

        def resize(path, leaf):
            in_images = path[0].name == "images"
            sizes = [
                rows if in_images and axis == 0 and size == old_rows
                else length if not in_images and size == old_length else size
                for axis, size in enumerate(leaf.shape)
            ]  # fmt: skip
            return np.zeros(sizes, leaf.dtype)

        return jax.tree_util.tree_map_with_path(resize, example)

    for rows, length in itertools.product(ROWS, CONFIG.prompt_buckets):
        hidden(params, reshaped(rows, length))
    assert len(compiled) >= len(ROWS) * len(CONFIG.prompt_buckets)

    compiled.clear()
    shapes = set()
    for _ in range(NUM_BATCHES):
        prompts = processor.encode_prompts([random_record(rng, png) for _ in range(PROMPTS_PER_BATCH)])
        states = jax.device_get(hidden(params, prompts))
        assert np.isfinite(states).all()
        shapes.add((prompts.images.segment_ids.shape[0], prompts.prompt_ids.shape[1]))
    assert len(shapes) > 3  # the batches are ragged indeed
    assert compiled == []
