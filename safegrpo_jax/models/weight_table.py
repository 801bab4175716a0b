"""How every parameter is named and laid out in the files of its family: one table, read in both directions.

Owns names and layouts only; reads no file. A layout is a reordering of axes, done as a view, so that reading a slice of
a memory-mapped tensor touches that slice only.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import jax
import numpy as np

from safegrpo_jax.models.qwen_vl import QwenVLConfig
from safegrpo_jax.types import Params

# (parameter path, tensor name, layout). `{layer}` counts over the whole tower, whatever stack holds the layer;
# `{text}` and `{vision}` are the family's prefixes.
# Layouts: "same"; "flat" = the file flattens a parameter of several axes; "linear" = the file holds [out, in], here
# in-axes come first; "linear2" = the same with two in-axes (heads, head_dim); "conv" = [out, channels, frames, height,
# width]; "experts" = [expert, in, out], out flattened; "experts_out_first" = [expert, out, in], as transformers 5 has
# it in memory.
Table = tuple[tuple[str, str, str], ...]

TEXT_TABLE: Table = (
    (r"text/embed", r"{text}.embed_tokens.weight", "same"),
    (r"text/\w*layers/input_norm/scale", r"{text}.layers.{layer}.input_layernorm.weight", "same"),
    (r"text/\w*layers/([qkv])/kernel", r"{text}.layers.{layer}.self_attn.\1_proj.weight", "linear"),
    (r"text/\w*layers/([qkv])/bias", r"{text}.layers.{layer}.self_attn.\1_proj.bias", "flat"),
    (r"text/\w*layers/o/kernel", r"{text}.layers.{layer}.self_attn.o_proj.weight", "linear2"),
    (r"text/\w*layers/([qk]_norm)/scale", r"{text}.layers.{layer}.self_attn.\1.weight", "same"),
    (r"text/\w*layers/mlp_norm/scale", r"{text}.layers.{layer}.post_attention_layernorm.weight", "same"),
    (r"text/\w*layers/mlp/(gate|up|down)/kernel", r"{text}.layers.{layer}.mlp.\1_proj.weight", "linear"),
    (r"text/\w*layers/mlp/router/kernel", r"{text}.layers.{layer}.mlp.gate.weight", "linear"),
    (r"text/\w*layers/mlp/(gate_up|down)", r"{text}.layers.{layer}.mlp.experts.\1_proj", "experts"),
    (r"text/norm/scale", r"{text}.norm.weight", "same"),
    (r"text/lm_head/kernel", r"lm_head.weight", "linear"),
)
BLOCK_TABLE: Table = (
    (r"vision/blocks/stage_\d+/(norm\d)/scale", r"{vision}.blocks.{layer}.\1.weight", "same"),
    (r"vision/blocks/stage_\d+/(norm\d)/bias", r"{vision}.blocks.{layer}.\1.bias", "same"),
    (r"vision/blocks/stage_\d+/qkv/kernel", r"{vision}.blocks.{layer}.attn.qkv.weight", "linear"),
    (r"vision/blocks/stage_\d+/qkv/bias", r"{vision}.blocks.{layer}.attn.qkv.bias", "flat"),
    (r"vision/blocks/stage_\d+/proj/kernel", r"{vision}.blocks.{layer}.attn.proj.weight", "linear2"),
    (r"vision/blocks/stage_\d+/proj/bias", r"{vision}.blocks.{layer}.attn.proj.bias", "same"),
)
VISION_TABLE: Table = (
    (r"vision/patch_embed/kernel", r"{vision}.patch_embed.proj.weight", "conv"),
    (r"vision/patch_embed/bias", r"{vision}.patch_embed.proj.bias", "same"),
    (r"vision/pos_table", r"{vision}.pos_embed.weight", "same"),
    *BLOCK_TABLE,
    (r"vision/blocks/stage_\d+/(fc\d)/kernel", r"{vision}.blocks.{layer}.mlp.linear_\1.weight", "linear"),
    (r"vision/blocks/stage_\d+/(fc\d)/bias", r"{vision}.blocks.{layer}.mlp.linear_\1.bias", "same"),
    (r"vision/merger/norm/scale", r"{vision}.merger.norm.weight", "same"),
    (r"vision/merger/norm/bias", r"{vision}.merger.norm.bias", "same"),
    (r"vision/merger/(fc\d)/kernel", r"{vision}.merger.linear_\1.weight", "linear"),
    (r"vision/merger/(fc\d)/bias", r"{vision}.merger.linear_\1.bias", "same"),
    (r"vision/deepstack_mergers/norm/scale", r"{vision}.deepstack_merger_list.{layer}.norm.weight", "same"),
    (r"vision/deepstack_mergers/norm/bias", r"{vision}.deepstack_merger_list.{layer}.norm.bias", "same"),
    (r"vision/deepstack_mergers/(fc\d)/kernel", r"{vision}.deepstack_merger_list.{layer}.linear_\1.weight", "linear"),
    (r"vision/deepstack_mergers/(fc\d)/bias", r"{vision}.deepstack_merger_list.{layer}.linear_\1.bias", "same"),
)
WINDOWED_VISION_TABLE: Table = (
    (r"vision/patch_embed/kernel", r"{vision}.patch_embed.proj.weight", "conv"),
    *BLOCK_TABLE,
    (r"vision/blocks/stage_\d+/mlp/(gate|up|down)/kernel", r"{vision}.blocks.{layer}.mlp.\1_proj.weight", "linear"),
    (r"vision/blocks/stage_\d+/mlp/(gate|up|down)/bias", r"{vision}.blocks.{layer}.mlp.\1_proj.bias", "same"),
    (r"vision/merger/norm/scale", r"{vision}.merger.ln_q.weight", "same"),
    (r"vision/merger/fc1/kernel", r"{vision}.merger.mlp.0.weight", "linear"),
    (r"vision/merger/fc1/bias", r"{vision}.merger.mlp.0.bias", "same"),
    (r"vision/merger/fc2/kernel", r"{vision}.merger.mlp.2.weight", "linear"),
    (r"vision/merger/fc2/bias", r"{vision}.merger.mlp.2.bias", "same"),
)


class Names(NamedTuple):
    """The table of a family and the prefixes of its published files."""

    table: Table
    text: str
    vision: str


FAMILIES = {
    "qwen3_vl": Names(TEXT_TABLE + VISION_TABLE, "model.language_model", "model.visual"),
    "qwen3_vl_moe": Names(TEXT_TABLE + VISION_TABLE, "model.language_model", "model.visual"),
    "qwen2_5_vl": Names(TEXT_TABLE + WINDOWED_VISION_TABLE, "model", "visual"),
}


class Leaf(NamedTuple):
    """One parameter and its tensors in the files: one per layer when `stacked`, else one."""

    path: str
    shape: tuple[int, ...]  # of one layer, as a parameter
    stacked: bool
    names: tuple[str, ...]
    file_shape: tuple[int, ...]
    layout: str


def describe_leaves(abstract_params: Params, config: QwenVLConfig) -> list[Leaf]:
    """How every parameter of the model, in tree order, appears in the files.

    Raises:
      ValueError: a parameter that the table does not know.
    """
    starts = dict.fromkeys(("text/deepstack_layers", "vision/deepstack_mergers"), 0)
    starts["text/layers"] = len(config.vision.deepstack_layers)
    for index in range(len(config.vision.stage_lens)):
        starts[f"vision/blocks/stage_{index}"] = sum(config.vision.stage_lens[:index])

    family = FAMILIES[config.family]
    leaves = []
    for key_path, array in jax.tree_util.tree_leaves_with_path(abstract_params):
        path = jax.tree_util.keystr(key_path, simple=True, separator="/")
        template, layout = _find_rule(path, family.table)
        start = next((start for prefix, start in starts.items() if path.startswith(prefix + "/")), None)
        stacked = start is not None
        shape = array.shape[1:] if stacked else array.shape
        layers = range(start, start + array.shape[0]) if stacked else range(1)
        names = tuple(template.format(layer=layer, text=family.text, vision=family.vision) for layer in layers)
        leaves.append(Leaf(path, shape, stacked, names, _file_shape(shape, layout, config), layout))
    return leaves


def match_expert_layout(leaves: list[Leaf], file_shapes: dict[str, tuple[int, ...]]) -> list[Leaf]:
    """`leaves` with the layout of the experts that the files have: [expert, in, out] or [expert, out, in].

    Both fit a square tensor, so all of them decide together; gate_up and down cannot be square at once.
    """
    turned = [
        leaf._replace(layout="experts_out_first", file_shape=(leaf.file_shape[0], *leaf.file_shape[:0:-1]))
        if leaf.layout == "experts"
        else leaf
        for leaf in leaves
    ]
    fits = all(
        file_shapes.get(name, leaf.file_shape) == leaf.file_shape
        for leaf in turned
        if leaf.layout == "experts_out_first"
        for name in leaf.names
    )
    return turned if fits else leaves


def _find_rule(path: str, table: Table) -> tuple[str, str]:
    for pattern, template, layout in table:
        match = re.fullmatch(pattern, path)
        if match:
            return match.expand(template), layout
    raise ValueError(f"parameter {path} has no rule in the weight table")


def _file_shape(shape, layout, config):
    match layout:
        case "same":
            return shape
        case "flat":
            return (math.prod(shape),)
        case "linear":
            return (math.prod(shape[1:]), shape[0])
        case "linear2":
            return (math.prod(shape[2:]), shape[0] * shape[1])
        case "experts":
            return (*shape[:2], math.prod(shape[2:]))
        case "conv":
            vision = config.vision
            return (shape[1], vision.num_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    raise ValueError(f"unknown layout {layout!r} in the weight table")


# Where the in-axes of a parameter lie, for layouts whose files hold them last.
_IN_AXES = {"linear": (0,), "conv": (0,), "linear2": (0, 1), "experts_out_first": (1,)}


def from_file(tensor: np.ndarray, leaf: Leaf) -> np.ndarray:
    """The tensor as a parameter of one layer: a view."""
    axes = _IN_AXES.get(leaf.layout, ())
    others = [size for axis, size in enumerate(leaf.shape) if axis not in axes]
    in_last = tensor.reshape(*others, *(leaf.shape[axis] for axis in axes))
    return np.moveaxis(in_last, range(-len(axes), 0), axes)


def to_file(array: np.ndarray, leaf: Leaf) -> np.ndarray:
    """The inverse of `from_file`, contiguous."""
    axes = _IN_AXES.get(leaf.layout, ())
    return np.ascontiguousarray(np.moveaxis(array, axes, range(-len(axes), 0))).reshape(leaf.file_shape)
