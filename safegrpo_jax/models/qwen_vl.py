"""Qwen3-VL (dense): its configuration, the published sizes, and the pure functions the trainer calls.

Parameters are a nested dict `{"vision": ..., "text": ...}` of arrays; the modules exist only inside the functions
here. Nothing is mutable: the KV cache goes in and comes out. Mixture-of-experts and other Qwen-VL families are
refused. Source: huggingface/transformers 5.23 modeling_qwen3_vl.py (numeric oracle) and the published config files.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Bool, Float, Int

from safegrpo_jax.models.decoder import TextConfig, TextDecoder
from safegrpo_jax.models.layers import Execution
from safegrpo_jax.models.vision import ROPE_THETA, VisionConfig, VisionTower
from safegrpo_jax.types import Array, Key, KVCache, PackedImages, Params, Prompts, VisionFeatures

ARCHITECTURE = "Qwen3VLForConditionalGeneration"
TOKEN_ID_NAMES = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")

# config.json key -> field, for every size that is copied as it is.
VISION_KEYS = {
    "hidden_size": "width",
    "intermediate_size": "mlp_width",
    "depth": "num_layers",
    "num_heads": "num_heads",
    "out_hidden_size": "out_width",
    "deepstack_visual_indexes": "deepstack_layers",
    "patch_size": "patch_size",
    "temporal_patch_size": "temporal_patch_size",
    "spatial_merge_size": "merge_size",
    "in_channels": "num_channels",
    "num_position_embeddings": "num_positions",
}
TEXT_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "width",
    "intermediate_size": "mlp_width",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "rms_norm_eps": "norm_epsilon",
    "max_position_embeddings": "max_positions",
    "rope_theta": "rope_theta",
}


@dataclasses.dataclass(frozen=True)
class QwenVLConfig:
    """A Qwen3-VL model: what it is (`vision`, `text`, token ids) and how it is computed (the rest).

    `dtype` is the compute dtype, "float32" or "bfloat16"; parameters keep their own. `scan_layers` compiles one
    block for each stack instead of all; `remat` recomputes blocks in the backward pass.

    Raises:
      ValueError: sizes that do not fit together, unknown dtype or attention implementation.
    """

    vision: VisionConfig
    text: TextConfig
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    dtype: str = "float32"
    scan_layers: bool = False
    remat: bool = False
    attention: str = "reference"

    def __post_init__(self):
        num_taps = len(self.vision.deepstack_layers)
        if self.text.num_layers <= num_taps:
            raise ValueError(f"text num_layers {self.text.num_layers} must exceed the {num_taps} deepstack taps")
        if self.vision.out_width != self.text.width:
            raise ValueError(f"vision out_width {self.vision.out_width} must equal the text width {self.text.width}")
        for name in TOKEN_ID_NAMES:
            if not 0 <= getattr(self, name) < self.text.vocab_size:
                raise ValueError(f"{name} {getattr(self, name)} is outside the vocabulary of {self.text.vocab_size}")
        _ = self.execution  # an unknown dtype or attention is refused here, not at the first call

    @property
    def execution(self) -> Execution:
        return Execution(self.dtype, self.scan_layers, self.remat, self.attention)

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> QwenVLConfig:
        """Reads the content of a `config.json`, in the published form or as transformers 5 writes it.

        The compute dtype stays float32 whatever the file says; choose it with `dataclasses.replace`.

        Raises:
          ValueError: another architecture, a missing key, a quantised checkpoint, or a setting this model lacks.
        """
        if config.get("architectures") != [ARCHITECTURE] or config.get("model_type") != "qwen3_vl":
            raise ValueError(
                f"architectures {config.get('architectures')} with model_type {config.get('model_type')!r} is not"
                f" supported: only dense Qwen3-VL ({ARCHITECTURE}, 'qwen3_vl')"
            )
        if "quantization_config" in config:
            raise ValueError("quantization_config is set: quantised weights are refused, use the bfloat16 checkpoint")
        vision, text = _required(config, "vision_config"), _required(config, "text_config")
        ids = {name: _required(config, name) for name in TOKEN_ID_NAMES}
        tied = config.get("tie_word_embeddings", False)  # the root flag counts, and its absence means untied
        return cls(vision=_read_vision(vision), text=_read_text(text, tied), **ids)

    def to_hf(self) -> dict[str, Any]:
        """The content of a `config.json` in the published form, which transformers 4.57 and 5 both read."""
        vision, text = self.vision, self.text
        vision_config = {hf: getattr(vision, name) for hf, name in VISION_KEYS.items()}
        text_config = {hf: getattr(text, name) for hf, name in TEXT_KEYS.items()}
        return {
            "architectures": [ARCHITECTURE],
            "model_type": "qwen3_vl",
            "tie_word_embeddings": text.tied_embeddings,
            **{name: getattr(self, name) for name in TOKEN_ID_NAMES},
            "vision_config": {
                "model_type": "qwen3_vl",
                "hidden_act": "gelu_pytorch_tanh",
                **vision_config,
                "deepstack_visual_indexes": list(vision.deepstack_layers),
            },
            "text_config": {
                "model_type": "qwen3_vl_text",
                "hidden_act": "silu",
                "attention_bias": False,
                **text_config,
                "rope_scaling": {
                    "mrope_interleaved": True,
                    "mrope_section": list(text.mrope_section),
                    "rope_type": "default",
                },
                "tie_word_embeddings": text.tied_embeddings,
            },
        }


def _required(section: dict[str, Any], key: str, where: str = "") -> Any:
    if key not in section:
        raise ValueError(f"config.json: {where}{key} is missing; take the file of the checkpoint itself")
    return section[key]


def _expect(section: dict[str, Any], where: str, key: str, supported: Any) -> None:
    if section.get(key, supported) != supported:
        raise ValueError(f"config.json: {where}{key} is {section[key]!r}; only {supported!r} is supported")


def _read_vision(section: dict[str, Any]) -> VisionConfig:
    where = "vision_config."
    _expect(section, where, "hidden_act", "gelu_pytorch_tanh")
    sizes = {name: _required(section, hf, where) for hf, name in VISION_KEYS.items()}
    sizes["deepstack_layers"] = tuple(sizes["deepstack_layers"])
    rope = section.get("rope_parameters") or {}
    _expect(rope, where + "rope_parameters.", "rope_type", "axial")
    _expect(rope, where + "rope_parameters.", "rope_theta", ROPE_THETA)
    return VisionConfig(**sizes)


def _read_text(section: dict[str, Any], tied: bool) -> TextConfig:
    where = "text_config."
    for key, supported in (("hidden_act", "silu"), ("attention_bias", False), ("use_sliding_window", False)):
        _expect(section, where, key, supported)
    # Published files hold rope_theta beside rope_scaling; transformers 5 joins both as rope_parameters.
    rope = dict(section.get("rope_parameters") or section.get("rope_scaling") or {})
    if "rope_theta" in section:
        rope.setdefault("rope_theta", section["rope_theta"])
    for key, supported in (("rope_type", "default"), ("mrope_interleaved", True)):
        _expect(rope, where + "rope_scaling.", key, supported)
    sizes = {name: _required({**section, **rope}, hf, where) for hf, name in TEXT_KEYS.items()}
    section_lens = tuple(_required(rope, "mrope_section", where + "rope_scaling."))
    return TextConfig(**sizes, mrope_section=section_lens, tied_embeddings=tied)


def _published(text_sizes, vision_sizes, *, tied):
    width, mlp_width, num_layers, num_heads = text_sizes
    vision_width, vision_mlp_width, vision_layers, taps = vision_sizes
    return QwenVLConfig(
        vision=VisionConfig(vision_width, vision_mlp_width, vision_layers, 16, width, taps),
        text=TextConfig(151936, width, mlp_width, num_layers, num_heads, 8, 5e6, (24, 20, 20), tied_embeddings=tied),
    )


_SMALL_TOWER = (1024, 4096, 24, (5, 11, 17))
_LARGE_TOWER = (1152, 4304, 27, (8, 16, 24))
PUBLISHED_SIZES = {
    "qwen3-vl-2b": _published((2048, 6144, 28, 16), _SMALL_TOWER, tied=True),
    "qwen3-vl-4b": _published((2560, 9728, 36, 32), _SMALL_TOWER, tied=True),
    "qwen3-vl-8b": _published((4096, 12288, 36, 32), _LARGE_TOWER, tied=False),
    "qwen3-vl-32b": _published((5120, 25600, 64, 64), _LARGE_TOWER, tied=False),
}


def init_params(config: QwenVLConfig, key: Key) -> Params:
    """Random float32 parameters: matrices normal with std 1/sqrt(inputs), tables with 0.02, norms one, biases zero."""
    vision_key, text_key = jax.random.split(key)
    return {
        "vision": nnx.to_pure_dict(nnx.state(VisionTower(config.vision, nnx.Rngs(vision_key)))),
        "text": nnx.to_pure_dict(nnx.state(_make_decoder(config, nnx.Rngs(text_key)))),
    }


def encode_images(params: Params, images: PackedImages, config: QwenVLConfig) -> VisionFeatures:
    """Vision tokens of all images in packing order, in the compute dtype; those of padding are meaningless."""
    return _vision(params, config)(images, config.execution)


def text_hidden(
    params: Params,
    token_ids: Int[Array, "n t"],
    mask: Bool[Array, "n t"],
    positions: Int[Array, "3 n t"],
    vision_mask: Bool[Array, "n t"],
    feature_index: Int[Array, "n t"],
    features: VisionFeatures,
    config: QwenVLConfig,
) -> Float[Array, "n t d"]:
    """Hidden states after the final norm, in the compute dtype.

    Where `vision_mask` is True the token is replaced by row `feature_index` of `features`. Tokens with a False
    `mask` influence no other token; their own hidden states are finite and meaningless.
    """
    decoder = _text(params, config)
    x = _splice(decoder, token_ids, vision_mask, feature_index, features, config)
    x, _ = decoder.run(
        x, mask, positions, vision_mask, feature_index, features.deepstack, config.execution, keep_cache=False
    )
    return decoder.norm(x)


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
    step: Int[Array, ""],
    cache: KVCache,
    config: QwenVLConfig,
) -> tuple[Float[Array, "n d"], KVCache]:
    """One decode step: hidden states after the final norm, and the cache with private slot `step` written.

    Rollout r attends to the prefix of prompt r // g and to its private slots 0..step, its own token included.
    """
    return _text(params, config).decode(token_ids, positions, step, cache, config.execution)


def _make_decoder(config, rngs):
    return TextDecoder(config.text, len(config.vision.deepstack_layers), rngs)


@functools.lru_cache(maxsize=16)
def _graphs(config):
    # Structure only. `eval_shape` makes no arrays, so this is safe to reach first from inside a jit trace.
    return (
        nnx.graphdef(nnx.eval_shape(lambda: VisionTower(config.vision, nnx.Rngs(0)))),
        nnx.graphdef(nnx.eval_shape(lambda: _make_decoder(config, nnx.Rngs(0)))),
    )


def _vision(params, config) -> VisionTower:
    return nnx.merge(_graphs(config)[0], params["vision"])


def _text(params, config) -> TextDecoder:
    return nnx.merge(_graphs(config)[1], params["text"])


def _splice(decoder, token_ids, vision_mask, feature_index, features, config):
    x = decoder.embed_tokens(token_ids, config.execution)
    return jnp.where(vision_mask[..., None], features.main[feature_index].astype(x.dtype), x)
