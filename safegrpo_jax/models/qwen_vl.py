"""Qwen-VL: the configuration, the published sizes, and the pure functions the trainer calls.

One model for three families, which differ by their configs: Qwen3-VL, Qwen3-VL-MoE (experts in the decoder) and
Qwen2.5-VL (another vision tower). Parameters are a nested dict `{"vision": ..., "text": ...}` of arrays; the modules
exist only inside the functions here. Nothing is mutable: the KV cache goes in and comes out.
Source: huggingface/transformers 5.23 (numeric oracle) and the published config files.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Bool, Float, Int

from safegrpo_jax.models.decoder import TextBlock, TextConfig, TextDecoder
from safegrpo_jax.models.layers import Execution
from safegrpo_jax.models.lora import LoraConfig, adapt, only_adapters
from safegrpo_jax.models.vision import VisionConfig
from safegrpo_jax.models.windowed_vision import WindowedVisionConfig
from safegrpo_jax.types import Array, CacheView, Key, KVCache, PackedImages, Params, Prompts, VisionFeatures

_MATRIX_NAMES = ("kernel", "embed", "gate_up", "down", "lora_a", "lora_b")
TOKEN_ID_NAMES = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


@dataclasses.dataclass(frozen=True)
class QwenVLConfig:
    """A Qwen-VL model: what it is (`vision`, `text`, token ids) and how it is computed (the rest).

    `dtype` is the compute dtype, "float32" or "bfloat16"; parameters keep their own. `scan_layers` compiles one
    block for each stack instead of all; `remat` recomputes blocks in the backward pass; `attention` and `experts` name
    implementations (attention.py, grouped.py); `lora` adds adapters to the parameters.

    Raises:
      ValueError: sizes that do not fit together, unknown dtype or implementation.
    """

    vision: VisionConfig | WindowedVisionConfig
    text: TextConfig
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    dtype: str = "float32"
    scan_layers: bool = False
    remat: bool = False
    attention: str = "reference"
    experts: str = "ragged_dot"
    lora: LoraConfig = LoraConfig()

    def __post_init__(self):
        num_taps = len(self.vision.deepstack_layers)
        if self.text.num_layers <= num_taps:
            raise ValueError(f"text num_layers {self.text.num_layers} must exceed the {num_taps} deepstack taps")
        if self.vision.out_width != self.text.width:
            raise ValueError(f"vision out_width {self.vision.out_width} must equal the text width {self.text.width}")
        for name in TOKEN_ID_NAMES:
            if not 0 <= getattr(self, name) < self.text.vocab_size:
                raise ValueError(f"{name} {getattr(self, name)} is outside the vocabulary of {self.text.vocab_size}")
        _ = self.execution  # an unknown dtype or implementation is refused here, not at the first call

    @property
    def execution(self) -> Execution:
        return Execution(self.dtype, self.scan_layers, self.remat, self.attention, self.experts)

    @property
    def family(self) -> str:
        """The `model_type` of the checkpoints: "qwen3_vl", "qwen3_vl_moe" or "qwen2_5_vl"."""
        if isinstance(self.vision, WindowedVisionConfig):
            return "qwen2_5_vl"
        return "qwen3_vl_moe" if self.text.num_experts else "qwen3_vl"


def _qwen3(text_sizes, tower, *, kv_heads=8, tied=False, experts=(0, 0, 0)):
    width, mlp_width, num_layers, num_heads = text_sizes
    vision_width, vision_mlp_width, vision_layers, taps = tower
    num_experts, experts_per_token, expert_width = experts
    return QwenVLConfig(
        vision=VisionConfig(vision_width, vision_mlp_width, vision_layers, 16, width, taps),
        text=TextConfig(
            151936, width, mlp_width, num_layers, num_heads, kv_heads, 5e6, (24, 20, 20), tied_embeddings=tied,
            num_experts=num_experts, experts_per_token=experts_per_token, expert_width=expert_width,
        ),
    )  # fmt: skip


def _qwen2_5(text_sizes, kv_heads, vision_mlp_width, *, vocab_size=152064, tied=False):
    width, mlp_width, num_layers, num_heads = text_sizes
    return QwenVLConfig(
        vision=WindowedVisionConfig(1280, vision_mlp_width, 32, 16, width, (7, 15, 23, 31)),
        text=TextConfig(
            vocab_size, width, mlp_width, num_layers, num_heads, kv_heads, 1e6, (16, 24, 24), tied_embeddings=tied,
            max_positions=128000, mrope_interleaved=False, qk_norm=False, qkv_bias=True,
        ),
    )  # fmt: skip


_SMALL_TOWER = (1024, 4096, 24, (5, 11, 17))
_LARGE_TOWER = (1152, 4304, 27, (8, 16, 24))
PUBLISHED_SIZES = {
    "qwen3-vl-2b": _qwen3((2048, 6144, 28, 16), _SMALL_TOWER, tied=True),
    "qwen3-vl-4b": _qwen3((2560, 9728, 36, 32), _SMALL_TOWER, tied=True),
    "qwen3-vl-8b": _qwen3((4096, 12288, 36, 32), _LARGE_TOWER),
    "qwen3-vl-32b": _qwen3((5120, 25600, 64, 64), _LARGE_TOWER),
    "qwen3-vl-30b-a3b": _qwen3((2048, 6144, 48, 32), _LARGE_TOWER, kv_heads=4, experts=(128, 8, 768)),
    "qwen3-vl-235b-a22b": _qwen3((4096, 12288, 94, 64), _LARGE_TOWER, kv_heads=4, experts=(128, 8, 1536)),
    "qwen2.5-vl-3b": _qwen2_5((2048, 11008, 36, 16), 2, 3420, vocab_size=151936, tied=True),
    "qwen2.5-vl-7b": _qwen2_5((3584, 18944, 28, 28), 4, 3420),
    "qwen2.5-vl-32b": _qwen2_5((5120, 27648, 64, 40), 8, 3456),
    "qwen2.5-vl-72b": _qwen2_5((8192, 29568, 80, 64), 8, 3456),
}


def init_params(config: QwenVLConfig, key: Key) -> Params:
    """Random float32 parameters: matrices normal with std 1/sqrt(inputs), tables with 0.02, norms one, biases zero."""
    vision_key, text_key = jax.random.split(key)
    return {
        "vision": nnx.to_pure_dict(nnx.state(_make_vision(config, nnx.Rngs(vision_key)))),
        "text": nnx.to_pure_dict(nnx.state(_make_decoder(config, nnx.Rngs(text_key)))),
    }


def cast_weights(params: Params, config: QwenVLConfig) -> Params:
    """A copy in which what every forward pass casts to the compute dtype is cast already: the same results to the bit.

    Norms, biases and the position table stay as they are, for they enter in float32.
    """
    dtype = config.execution.compute_dtype

    def copy(path, leaf):
        return jnp.array(leaf, dtype if path[-1].key in _MATRIX_NAMES else leaf.dtype, copy=True)

    return jax.tree_util.tree_map_with_path(copy, params)


def init_adapters(config: QwenVLConfig, key: Key) -> Params:
    """Fresh adapters alone, to be joined to loaded parameters. Under jit the base model is never made."""
    return only_adapters(init_params(config, key))


def encode_images(params: Params, images: PackedImages, config: QwenVLConfig) -> VisionFeatures:
    """Vision tokens of all images in packing order, in the compute dtype; those of padding are meaningless."""
    return _vision(gather_vision(params, config), config)(images, config.execution)


def gather_vision(params: Params, config: QwenVLConfig) -> Params:
    """`params` with the vision tower whole on every device of the mesh, its matrices in the compute dtype.

    It is small: to gather it once costs less than to communicate in each of its layers.
    """
    vision = cast_weights(params["vision"], config)
    if not jax.sharding.get_abstract_mesh().empty:
        vision = jax.lax.with_sharding_constraint(vision, PartitionSpec())
    return {**params, "vision": vision}


def text_hidden(
    params: Params,
    token_ids: Int[Array, "n t"],
    mask: Bool[Array, "n t"] | Int[Array, "n t"],
    positions: Int[Array, "3 n t"],
    vision_mask: Bool[Array, "n t"],
    feature_index: Int[Array, "n t"],
    features: VisionFeatures,
    config: QwenVLConfig,
    prefix_ids: Int[Array, "n t"] | None = None,
) -> Float[Array, "n t d"]:
    """Hidden states after the final norm, in the compute dtype.

    Where `vision_mask` is True the token is replaced by row `feature_index` of `features`. Tokens with a False
    `mask` influence no other token; their own hidden states are finite and meaningless. A row of several sequences
    has their numbers, 1 and up, for a mask: tokens see those of their own number alone, and with `prefix_ids` also
    those of that number.
    """
    decoder = _text(params, config)
    x = _splice(decoder, token_ids, vision_mask, feature_index, features, config)
    x, _ = decoder.run(
        x,
        mask,
        positions,
        vision_mask,
        feature_index,
        features.deepstack,
        config.execution,
        keep_cache=False,
        prefix_ids=prefix_ids,
    )
    return decoder.norm(x)


def continuation_hidden(
    params: Params,
    prompts: Prompts,
    features: VisionFeatures,
    token_ids: Int[Array, "n c"],
    mask: Bool[Array, "n c"],
    positions: Int[Array, "n c"],
    config: QwenVLConfig,
) -> tuple[Float[Array, "b d"], Float[Array, "n c d"]]:
    """Hidden states after the final norm: of each prompt's last token, and of all tokens of its continuations.

    Row r continues prompt r // (n // b), whose tokens are computed once. The prompts are left-padded; continuations
    hold no image, and their `positions` are equal on all axes.
    """
    decoder = _text(params, config)
    x = _splice(decoder, prompts.prompt_ids, prompts.vision_mask, prompts.feature_index, features, config)
    x, y = decoder.run_continuations(
        x,
        prompts.prompt_mask,
        prompts.positions,
        prompts.vision_mask,
        prompts.feature_index,
        features.deepstack,
        decoder.embed_tokens(token_ids, config.execution),
        mask,
        positions,
        config.execution,
    )
    return decoder.norm(x[:, -1]), decoder.norm(y)


def logits_from_hidden(
    params: Params, hidden: Float[Array, "*rows d"], config: QwenVLConfig
) -> Float[Array, "*rows v"]:
    """float32 logits over the whole vocabulary, untrained rows included."""
    return _text(params, config).logits(hidden)


def prefill(
    params: Params, prompts: Prompts, features: VisionFeatures, config: QwenVLConfig
) -> tuple[Float[Array, "b d"], tuple[Float[Array, "b k p e"], ...], tuple[Float[Array, "b k p e"], ...]]:
    """Runs the prompts. Returns the hidden state after each prompt's last token, and keys (rotated) and values
    of every layer."""
    decoder = _text(params, config)
    x = _splice(decoder, prompts.prompt_ids, prompts.vision_mask, prompts.feature_index, features, config)
    x, cache = decoder.run(
        x,
        prompts.prompt_mask,
        prompts.positions,
        prompts.vision_mask,
        prompts.feature_index,
        features.deepstack,
        config.execution,
        keep_cache=True,
    )
    keys, values = zip(*cache, strict=True)
    return decoder.norm(x[:, -1]), keys, values


def decode_hidden(
    params: Params,
    token_ids: Int[Array, "n"],
    positions: Int[Array, "n"],
    view: CacheView,
    cache: KVCache,
    config: QwenVLConfig,
    blocks: Sequence[TextBlock] | None = None,
) -> tuple[Float[Array, "n d"], KVCache]:
    """One decode step: hidden states after the final norm, and the cache with private column `view.column` written.

    Each slot attends to the prefix it sits at and to its own private columns, that of this token included.
    `blocks` from `decode_blocks`, once for many steps.
    """
    return _text(params, config).decode(token_ids, positions, view, cache, config.execution, blocks)


def decode_blocks(params: Params, config: QwenVLConfig) -> list[TextBlock] | None:
    """The blocks cut out of their stacks, a copy of them all: in a loop on a CPU every step would make that copy.

    None with `scan_layers`, the choice for models of which there is no room for two.
    """
    return None if config.scan_layers else _text(params, config).blocks()


def _make_vision(config, rngs):
    tower = config.vision.make_tower(rngs)
    if config.lora.rank:
        adapt(tower, config.lora.vision_projections, config.lora, rngs)
    return tower


def _make_decoder(config, rngs):
    decoder = TextDecoder(config.text, len(config.vision.deepstack_layers), rngs)
    if config.lora.rank:
        adapt(decoder, config.lora.projections, config.lora, rngs)
    return decoder


@functools.lru_cache(maxsize=16)
def _graphs(config):
    # Structure only. `eval_shape` makes no arrays, so this is safe to reach first from inside a jit trace.
    return (
        nnx.graphdef(nnx.eval_shape(lambda: _make_vision(config, nnx.Rngs(0)))),
        nnx.graphdef(nnx.eval_shape(lambda: _make_decoder(config, nnx.Rngs(0)))),
    )


def _vision(params, config):
    return nnx.merge(_graphs(config)[0], params["vision"])


def _text(params, config) -> TextDecoder:
    return nnx.merge(_graphs(config)[1], params["text"])


def _splice(decoder, token_ids, vision_mask, feature_index, features, config):
    x = decoder.embed_tokens(token_ids, config.execution)
    return jnp.where(vision_mask[..., None], features.main[feature_index].astype(x.dtype), x)
