"""The vision tower of Qwen2.5-VL: attention inside windows of 8 x 8 patches, in a few layers inside whole images.

Positions come from the rotation alone: there is no position table, and nothing is tapped. A window is a segment: its
id follows from a patch's image, row and column, so patches stay in packing order and no image size is known here.
Source: huggingface/transformers modeling_qwen2_5_vl.py (numeric oracle); it sorts the patches by window instead.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Int

from safegrpo_jax.models.attention import attend
from safegrpo_jax.models.layers import Execution, GatedMLP, Linear, RMSNorm, init_stacks, run_layers
from safegrpo_jax.models.rope import rotate, vision_angles
from safegrpo_jax.models.vision import ROPE_THETA
from safegrpo_jax.types import Array, PackedImages, VisionFeatures

NORM_EPSILON = 1e-6  # of every released tower; not a key of the published config files
MAX_WINDOWS = 512  # along one side of an image, 57 344 pixels; leaves int32 room for 8191 images in a packing row


@dataclasses.dataclass(frozen=True)
class WindowedVisionConfig:
    """Sizes of the windowed vision tower.

    `full_layers`: 0-based layers that attend inside the whole image, ascending. `window_size`: a window's side in
    pixels, a multiple of the merged token's side.

    Raises:
      ValueError: sizes that do not fit together.
    """

    width: int
    mlp_width: int
    num_layers: int
    num_heads: int
    out_width: int
    full_layers: tuple[int, ...]
    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    num_channels: int = 3
    window_size: int = 112

    def __post_init__(self):
        if self.width % (4 * self.num_heads):
            raise ValueError(f"vision width {self.width} must be a multiple of 4 * num_heads = {4 * self.num_heads}")
        full = list(self.full_layers)
        if full != sorted(set(full)) or (full and not 0 <= full[0] <= full[-1] < self.num_layers):
            raise ValueError(f"full_layers {self.full_layers} must be ascending layers of 0..{self.num_layers - 1}")
        if self.window_size % (self.patch_size * self.merge_size):
            raise ValueError(
                f"window_size {self.window_size} must be a multiple of patch_size * merge_size = "
                f"{self.patch_size * self.merge_size}"
            )

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads

    @property
    def patch_values(self) -> int:
        """Values in one patch: channels x frames x height x width."""
        return self.num_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def deepstack_layers(self) -> tuple[int, ...]:
        return ()

    @property
    def stage_lens(self) -> tuple[int, ...]:
        """One stack of all blocks: a layer's kind of attention is data."""
        return (self.num_layers,)

    def make_tower(self, rngs: nnx.Rngs) -> WindowedVisionTower:
        return WindowedVisionTower(self, rngs)


def window_ids(segment_ids: Int[Array, "u i"], patch_pos: Int[Array, "u i 2"], window_side: int) -> Int[Array, "u i"]:
    """Segment ids of the windows: equal for patches of one image in the same `window_side` x `window_side` square.

    Squares start at the image's top left corner and are cut at its right and bottom. Padding stays 0.
    """
    row, column = patch_pos[..., 0] // window_side, patch_pos[..., 1] // window_side
    return jnp.where(segment_ids > 0, (segment_ids * MAX_WINDOWS + row) * MAX_WINDOWS + column, 0)


class WindowedBlock(nnx.Module):
    """Pre-norm transformer block with RMS norms and a SiLU-gated MLP; every linear map has a bias."""

    def __init__(self, config: WindowedVisionConfig, rngs: nnx.Rngs):
        heads = (config.num_heads, config.head_dim)
        self.norm1 = RMSNorm(config.width, NORM_EPSILON)
        self.qkv = Linear((config.width,), (3, *heads), bias=True, rngs=rngs)
        self.proj = Linear(heads, (config.width,), bias=True, rngs=rngs)
        self.norm2 = RMSNorm(config.width, NORM_EPSILON)
        self.mlp = GatedMLP(config.width, config.mlp_width, bias=True, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "u i d"],
        cos: Float[Array, "u i half"],
        sin: Float[Array, "u i half"],
        segment_ids: Int[Array, "u i"],
        execution: Execution,
    ) -> Float[Array, "u i d"]:
        query, keys, values = jnp.moveaxis(self.qkv(self.norm1(x)), (2, 3), (0, 2))  # 3 of [u h i e]
        query, keys = rotate(query, cos, sin), rotate(keys, cos, sin)
        attended = attend(query, keys, values, segment_ids, causal=False, implementation=execution.attention)
        shape = x.shape
        # One long axis of tokens: contracting two axes in the weight gradients is slow on a CPU.
        x = (x + self.proj(attended.swapaxes(1, 2))).reshape(-1, shape[-1])
        return (x + self.mlp(self.norm2(x))).reshape(shape)


class WindowedMerger(nnx.Module):
    """Joins merge_size**2 consecutive patches, each normalised, into one token of the text width; exact (erf) GELU."""

    def __init__(self, config: WindowedVisionConfig, rngs: nnx.Rngs):
        self.joined_width = config.width * config.merge_size**2
        self.norm = RMSNorm(config.width, NORM_EPSILON)
        self.fc1 = Linear((self.joined_width,), (self.joined_width,), bias=True, rngs=rngs)
        self.fc2 = Linear((self.joined_width,), (config.out_width,), bias=True, rngs=rngs)

    def __call__(self, x: Float[Array, "u i d"]) -> Float[Array, "m out"]:
        return self.fc2(jax.nn.gelu(self.fc1(self.norm(x).reshape(-1, self.joined_width)), approximate=False))


class WindowedVisionTower(nnx.Module):
    """The whole tower. `blocks` holds one stack, named as the first stage of the other family's tower."""

    def __init__(self, config: WindowedVisionConfig, rngs: nnx.Rngs):
        self.config = config
        self.patch_embed = Linear((config.patch_values,), (config.width,), bias=False, rngs=rngs)
        (blocks,) = init_stacks(lambda keys: WindowedBlock(config, keys), config.stage_lens, rngs)
        self.blocks = nnx.Dict({"stage_0": blocks})
        self.merger = WindowedMerger(config, rngs)

    def __call__(self, images: PackedImages, execution: Execution) -> VisionFeatures:
        """Merged tokens of all packing rows, in packing order; those of padding patches are finite and meaningless."""
        config = self.config
        x = self.patch_embed(images.patches.astype(execution.compute_dtype))
        angles = vision_angles(images.patch_pos, config.head_dim, ROPE_THETA)
        cos, sin = jnp.cos(angles), jnp.sin(angles)  # float32: the vision rotation is never rounded to bfloat16
        windows = window_ids(images.segment_ids, images.patch_pos, config.window_size // config.patch_size)
        is_full = jnp.isin(jnp.arange(config.num_layers), jnp.asarray(config.full_layers, jnp.int32))

        def body(x, layer):
            block, full = layer
            return block(x, cos, sin, jnp.where(full, images.segment_ids, windows), execution), None

        x, _ = run_layers(body, x, (self.blocks["stage_0"], is_full), execution)
        main = self.merger(x)
        return VisionFeatures(main=main, deepstack=jnp.zeros((0, *main.shape), main.dtype))
