"""A tiny Qwen3-VL for tests: configuration, host-side inputs in plain numpy, and its torch twin.

The index work here is written from the definitions, on purpose apart from the package's processor.
"""

import dataclasses

import jax
import numpy as np

from safegrpo_jax.models.decoder import TextConfig
from safegrpo_jax.models.hf_config import config_to_hf
from safegrpo_jax.models.qwen_vl import QwenVLConfig, init_params
from safegrpo_jax.models.vision import VisionConfig
from safegrpo_jax.models.windowed_vision import WindowedVisionConfig
from safegrpo_jax.types import Labels, PackedImages, Prompts

IMAGE, VIDEO, START, END, PAD = 90, 91, 92, 93, 0
GRID_SIDE = 6  # of the learned position table


def tiny_config(family: str = "qwen3_vl", tied: bool = False, **execution) -> QwenVLConfig:
    """4 vision layers, 4 text layers; grouped heads whose total width is not the model's (where a family allows it).

    The towers are tapped after 0 and 2, or attend in full in 1 and 3 and else in windows of 8 x 8 patches.
    """
    vision = VisionConfig(32, 48, 4, 4, 40, (0, 2), patch_size=4, num_positions=GRID_SIDE**2)
    text = TextConfig(100, 40, 56, 4, 4, 2, 1e4, (4, 2, 2), head_dim=16, tied_embeddings=tied)
    match family:
        case "qwen3_vl_moe":
            text = dataclasses.replace(text, num_experts=16, experts_per_token=4, expert_width=24)
        case "qwen2_5_vl":
            vision = WindowedVisionConfig(32, 48, 4, 4, 48, (1, 3), patch_size=4, window_size=32)
            text = TextConfig(
                100, 48, 56, 4, 4, 2, 1e4, (2, 2, 2), head_dim=12, tied_embeddings=tied,
                mrope_interleaved=False, qk_norm=False, qkv_bias=True,
            )  # fmt: skip
    return QwenVLConfig(
        vision=vision,
        text=text,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        **execution,
    )


def random_params(config: QwenVLConfig, seed: int = 0):
    """Parameters spread as `init_params` spreads them, with every norm and bias moved a little off its start."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))

    def draw(path, leaf):
        noise = 0.02 * rng.normal(size=leaf.shape)
        return jax.numpy.asarray(1 + noise if path[-1].key == "scale" else noise, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def torch_model(config: QwenVLConfig, seed: int = 0):
    """A transformers model of this configuration with weights large enough for every part to matter."""
    import torch
    import transformers

    content = config_to_hf(config)
    config_class = getattr(
        transformers, content["architectures"][0].removesuffix("ForConditionalGeneration") + "Config"
    )
    hf_config = config_class(**content)
    hf_config._attn_implementation = "eager"
    model = getattr(transformers, content["architectures"][0])(hf_config).eval().float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = ("norm" in name or "ln_q" in name) and name.endswith("weight")
            # A router of unit logits: the chosen experts differ from token to token, none by a rounding error.
            spread = 0.5 if name.endswith("mlp.gate.weight") else 0.15
            parameter.copy_(1 + 0.2 * noise if is_norm else spread * noise)
    return model


def merge_block_order(height: int, width: int) -> np.ndarray:
    """(row, column) of the patches of one image, 2x2 blocks together."""
    return np.array(
        [
            (2 * block_row + i, 2 * block_column + j)
            for block_row in range(height // 2)
            for block_column in range(width // 2)
            for i in range(2)
            for j in range(2)
        ],
        np.int32,
    )


def pack_images(
    grids: list[list[tuple[int, int]]], row_len: int, seed: int = 0, table_side: int = GRID_SIDE
) -> PackedImages:
    """Random patches; `grids[u]` are the (height, width) of the images of packing row u."""
    rng = np.random.default_rng(seed)
    u = len(grids)
    patches = np.zeros((u, row_len, 3 * 2 * 4 * 4), np.float32)
    patch_pos = np.zeros((u, row_len, 2), np.int32)
    tap_ids = np.zeros((u, row_len, 4), np.int32)
    tap_weights = np.zeros((u, row_len, 4), np.float32)
    segment_ids = np.zeros((u, row_len), np.int32)
    for row, images in enumerate(grids):
        start = 0
        for number, (height, width) in enumerate(images, 1):
            where = slice(start, start + height * width)
            start = where.stop
            patches[row, where] = rng.normal(size=(height * width, patches.shape[-1]))
            patch_pos[row, where] = merge_block_order(height, width)
            segment_ids[row, where] = number
            tap_ids[row, where], tap_weights[row, where] = _taps(patch_pos[row, where], height, width, table_side)
    return PackedImages(patches, patch_pos, tap_ids, tap_weights, segment_ids)


def _taps(patch_pos, height, width, side):
    ids, weights = [], []
    for row, column in patch_pos:
        y, x = row * (side - 1) / max(height - 1, 1), column * (side - 1) / max(width - 1, 1)
        top, left = int(y), int(x)
        bottom, right = min(top + 1, side - 1), min(left + 1, side - 1)
        ids.append([a * side + b for a in (top, bottom) for b in (left, right)])
        weights.append([a * b for a in (1 - (y - top), y - top) for b in (1 - (x - left), x - left)])
    return np.array(ids, np.int32), np.array(weights, np.float32)


def real_patches(images: PackedImages) -> np.ndarray:
    """The patches of all images in order, without padding: transformers' pixel_values."""
    return images.patches[images.segment_ids > 0]


def build_prompts(rows: list[list], images: PackedImages, grids: list[list[tuple[int, int]]], length: int) -> Prompts:
    """Left-padded prompts. A row is a list of token ids and of (u, number) naming the number-th image of row u."""
    b = len(rows)
    ids = np.full((b, length), PAD, np.int32)
    mask = np.zeros((b, length), bool)
    positions = np.zeros((3, b, length), np.int32)
    vision_mask = np.zeros((b, length), bool)
    feature_index = np.zeros((b, length), np.int32)
    rope_delta = np.zeros(b, np.int32)
    for row, parts in enumerate(rows):
        tokens, places, features, next_pos = [], [], [], 0
        for part in parts:
            if isinstance(part, tuple):
                u, number = part
                height, width = (side // 2 for side in grids[u][number])
                first = u * images.segment_ids.shape[1] // 4 + sum(h * w // 4 for h, w in grids[u][:number])
                tokens += [IMAGE] * (height * width)
                places += [(next_pos, next_pos + y, next_pos + x) for y in range(height) for x in range(width)]
                features += list(range(first, first + height * width))
                next_pos += max(height, width)
            else:
                tokens.append(part)
                places.append((next_pos,) * 3)
                features.append(-1)
                next_pos += 1
        where = slice(length - len(tokens), length)
        ids[row, where] = tokens
        mask[row, where] = True
        positions[:, row, where] = np.array(places).T
        vision_mask[row, where] = np.array(features) >= 0
        feature_index[row, where] = np.maximum(features, 0)
        rope_delta[row] = next_pos - len(tokens)
    labels = Labels(*(np.zeros(b, np.int32) for _ in range(3)), np.ones(b, bool))
    return Prompts(
        ids, mask, positions, rope_delta, vision_mask, feature_index, np.arange(b, dtype=np.int32), images, labels
    )


GRIDS = [[(4, 6), (2, 4)], [(6, 2)]]  # two images of different shape in row 0, one in row 1


def example_prompts(grids: list[list[tuple[int, int]]] = GRIDS, table_side: int = GRID_SIDE) -> Prompts:
    """Three prompts: two images of different grids, one image with left padding, text only.

    `grids` has two images in row 0 and one in row 1.
    """
    patches = max(sum(height * width for height, width in row) for row in grids)
    images = pack_images(grids, row_len=patches + 8, table_side=table_side)
    rows = [
        [5, START, (0, 0), END, 7, START, (0, 1), END, 11, 12, 13],
        [21, START, (1, 0), END, 23, 24],
        [31, 32, 33, 34, 35],
    ]
    length = 12 + sum(height * width // 4 for height, width in grids[0])
    return build_prompts(rows, images, grids, length)


def single_prompt(grids: list[list[tuple[int, int]]]) -> Prompts:
    """One prompt with the images of the only row of `grids`, nothing padded."""
    images = pack_images(grids, row_len=sum(height * width for height, width in grids[0]))
    parts = [part for number in range(len(grids[0])) for part in (START, (0, number), END, 41 + number)]
    length = 1 + sum(3 + height * width // 4 for height, width in grids[0])
    return build_prompts([[5, *parts]], images, grids, length)


def torch_inputs(prompts: Prompts, grids: list[list[tuple[int, int]]] = GRIDS) -> dict:
    """The same batch as keyword arguments of the transformers model; it computes positions by itself."""
    import torch

    ids = torch.from_numpy(prompts.prompt_ids).long()
    return {
        "input_ids": ids,
        "attention_mask": torch.from_numpy(prompts.prompt_mask).long(),
        "pixel_values": torch.from_numpy(real_patches(prompts.images)),
        "image_grid_thw": grid_thw(grids),
        "mm_token_type_ids": (ids == IMAGE).int(),
    }


def grid_thw(grids: list[list[tuple[int, int]]] = GRIDS):
    """(frames, height, width) of every image, in the order of the prompts."""
    import torch

    return torch.tensor([(1, *grid) for row in grids for grid in row])
