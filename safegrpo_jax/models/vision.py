"""The vision tower of Qwen3-VL: packed patches in, merged vision tokens out.

Patches of all images lie in rows of one static length; segment ids keep the images apart, so the tower knows
nothing of image sizes. After each tap layer the hidden state also goes through a merger of its own (deepstack);
the text decoder adds those features after its first layers. The block stack is split at the taps.
Source: huggingface/transformers modeling_qwen3_vl.py (numeric oracle).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Int

from safegrpo_jax.models.attention import attend
from safegrpo_jax.models.layers import INIT_STD, Execution, LayerNorm, Linear, init_stacks, run_layers
from safegrpo_jax.models.rope import rotate, vision_angles
from safegrpo_jax.types import Array, PackedImages, VisionFeatures

ROPE_THETA = 10000.0  # of every released vision tower; not a key of the published config files


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Sizes of the vision tower. `deepstack_layers`: 0-based layers whose output is tapped, ascending.

    Raises:
      ValueError: sizes that do not fit together.
    """

    width: int
    mlp_width: int
    num_layers: int
    num_heads: int
    out_width: int
    deepstack_layers: tuple[int, ...]
    patch_size: int = 16
    temporal_patch_size: int = 2
    merge_size: int = 2
    num_channels: int = 3
    num_positions: int = 2304

    def __post_init__(self):
        if self.width % (4 * self.num_heads):
            raise ValueError(f"vision width {self.width} must be a multiple of 4 * num_heads = {4 * self.num_heads}")
        taps = self.deepstack_layers
        if not taps or list(taps) != sorted(set(taps)) or not 0 <= taps[0] <= taps[-1] < self.num_layers:
            raise ValueError(
                f"deepstack_layers {taps} must be ascending layers of 0..{self.num_layers - 1}, at least one"
            )
        if round(self.num_positions**0.5) ** 2 != self.num_positions:
            raise ValueError(f"num_positions {self.num_positions} must be a square number")

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads

    @property
    def patch_values(self) -> int:
        """Values in one patch: channels x frames x height x width."""
        return self.num_channels * self.temporal_patch_size * self.patch_size**2

    def make_tower(self, rngs: nnx.Rngs) -> VisionTower:
        return VisionTower(self, rngs)

    @property
    def stage_lens(self) -> tuple[int, ...]:
        """Blocks up to and including each tap, then the blocks after the last tap (absent when there are none)."""
        ends = [tap + 1 for tap in self.deepstack_layers] + [self.num_layers]
        lens = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        return tuple(length for length in lens if length)


class VisionBlock(nnx.Module):
    """Pre-norm transformer block: attention inside each image, then a tanh-GELU MLP."""

    def __init__(self, config: VisionConfig, rngs: nnx.Rngs):
        heads = (config.num_heads, config.head_dim)
        self.norm1 = LayerNorm(config.width)
        self.qkv = Linear((config.width,), (3, *heads), bias=True, rngs=rngs)
        self.proj = Linear(heads, (config.width,), bias=True, rngs=rngs)
        self.norm2 = LayerNorm(config.width)
        self.fc1 = Linear((config.width,), (config.mlp_width,), bias=True, rngs=rngs)
        self.fc2 = Linear((config.mlp_width,), (config.width,), bias=True, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "u i d"],
        cos: Float[Array, "u i half"],
        sin: Float[Array, "u i half"],
        segment_ids: Int[Array, "u i"],
        execution: Execution,
    ) -> Float[Array, "u i d"]:
        query, keys, values = jnp.moveaxis(self.qkv(self.norm1(x)), (2, 3), (0, 2))  # 3 of [u h i e]
        attended = attend(
            rotate(query, cos, sin),
            rotate(keys, cos, sin),
            values,
            segment_ids,
            causal=False,
            implementation=execution.attention,
        )
        shape = x.shape
        # One long axis of tokens: contracting two axes in the weight gradients is slow on a CPU.
        x = (x + self.proj(attended.swapaxes(1, 2))).reshape(-1, shape[-1])
        return (x + self.fc2(jax.nn.gelu(self.fc1(self.norm2(x)), approximate=True))).reshape(shape)


class PatchMerger(nnx.Module):
    """Joins merge_size**2 consecutive patches into one token of the text width, with an exact (erf) GELU.

    The main merger normalises each patch, a deepstack merger the joined vector (`norm_joined`).
    """

    def __init__(self, config: VisionConfig, norm_joined: bool, rngs: nnx.Rngs):
        self.joined_width = config.width * config.merge_size**2
        self.norm_joined = norm_joined
        self.norm = LayerNorm(self.joined_width if norm_joined else config.width)
        self.fc1 = Linear((self.joined_width,), (self.joined_width,), bias=True, rngs=rngs)
        self.fc2 = Linear((self.joined_width,), (config.out_width,), bias=True, rngs=rngs)

    def __call__(self, x: Float[Array, "u i d"]) -> Float[Array, "m out"]:
        if self.norm_joined:
            x = self.norm(x.reshape(-1, self.joined_width))
        else:
            x = self.norm(x).reshape(-1, self.joined_width)
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))


class VisionTower(nnx.Module):
    """The whole tower. `blocks` holds one stack per stage, in order; `deepstack_mergers` one layer per tap."""

    def __init__(self, config: VisionConfig, rngs: nnx.Rngs):
        self.config = config
        self.patch_embed = Linear((config.patch_values,), (config.width,), bias=True, rngs=rngs)
        self.pos_table = nnx.Param(INIT_STD * jax.random.normal(rngs.params(), (config.num_positions, config.width)))
        stages = init_stacks(lambda keys: VisionBlock(config, keys), config.stage_lens, rngs)
        self.blocks = nnx.Dict({f"stage_{index}": stage for index, stage in enumerate(stages)})
        self.merger = PatchMerger(config, False, rngs)
        num_taps = len(config.deepstack_layers)
        (self.deepstack_mergers,) = init_stacks(lambda keys: PatchMerger(config, True, keys), (num_taps,), rngs)

    def __call__(self, images: PackedImages, execution: Execution) -> VisionFeatures:
        """Merged tokens of all packing rows, in packing order; those of padding patches are finite and meaningless."""
        x = self.patch_embed(images.patches.astype(execution.compute_dtype))
        x = x + self._position_embedding(images).astype(x.dtype)
        angles = vision_angles(images.patch_pos, self.config.head_dim, ROPE_THETA)
        cos, sin = jnp.cos(angles), jnp.sin(angles)  # float32: the vision rotation is never rounded to bfloat16

        def body(x, block):
            return block(x, cos, sin, images.segment_ids, execution), None

        tapped = []
        for index in range(len(self.config.stage_lens)):
            x, _ = run_layers(body, x, self.blocks[f"stage_{index}"], execution)
            if index < len(self.config.deepstack_layers):
                tapped.append(x)
        deepstack = jax.vmap(lambda merger, x: merger(x))(self.deepstack_mergers, jnp.stack(tapped))
        return VisionFeatures(main=self.merger(x), deepstack=deepstack)

    def _position_embedding(self, images: PackedImages) -> Float[Array, "u i d"]:
        # Bilinear interpolation of the learned table in float32, tap by tap: a gather of all four at once would
        # be a buffer four times the hidden state.
        table = self.pos_table[...].astype(jnp.float32)
        taps = [
            table[images.tap_ids[..., tap]] * images.tap_weights[..., tap, None]
            for tap in range(images.tap_ids.shape[-1])
        ]
        return sum(taps[1:], taps[0])
