"""config.json of the Qwen-VL families <-> QwenVLConfig. What this model cannot do, or the file leaves open, is refused.

Files come in two spellings, the published one and that of transformers 5; both are read, the published one is written.
A missing key is never guessed: the defaults of transformers differ from the published checkpoints.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from safegrpo_jax.models.decoder import TextConfig
from safegrpo_jax.models.qwen_vl import TOKEN_ID_NAMES, QwenVLConfig
from safegrpo_jax.models.vision import ROPE_THETA, VisionConfig
from safegrpo_jax.models.windowed_vision import WindowedVisionConfig

ARCHITECTURES = {
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
}

# config.json key -> field, for every size that is copied as it is.
TOWER_KEYS = {
    "hidden_size": "width",
    "intermediate_size": "mlp_width",
    "depth": "num_layers",
    "num_heads": "num_heads",
    "out_hidden_size": "out_width",
    "patch_size": "patch_size",
    "temporal_patch_size": "temporal_patch_size",
    "spatial_merge_size": "merge_size",
    "in_channels": "num_channels",
}
VISION_KEYS = TOWER_KEYS | {
    "deepstack_visual_indexes": "deepstack_layers",
    "num_position_embeddings": "num_positions",
}
WINDOWED_VISION_KEYS = TOWER_KEYS | {"fullatt_block_indexes": "full_layers", "window_size": "window_size"}
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
EXPERT_KEYS = {
    "num_experts": "num_experts",
    "num_experts_per_tok": "experts_per_token",
    "moe_intermediate_size": "expert_width",
}
# Other spellings of a key, in files that have no key of the first name.
ALIASES = {"in_channels": "in_chans", "num_experts": "num_local_experts"}
SECTION_KEYS = ("vision_config", "text_config")
LIST_KEYS = ("deepstack_visual_indexes", "fullatt_block_indexes", "mrope_section")
REAL_KEYS = ("rms_norm_eps", "rope_theta")
LARGEST_SIZE = 2**31 - 1


def read_config(folder: str | Path) -> QwenVLConfig:
    """Reads `config.json` of a model folder.

    Raises:
      ValueError: the folder or file is missing or broken, or describes a model that is not supported.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give a local Qwen-VL folder with config.json and safetensors files")
    return config_from_hf(read_json(path))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      ValueError: not JSON, or not an object.
    """
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not hold a JSON object; download it again")
    return content


def config_from_hf(content: dict[str, Any]) -> QwenVLConfig:
    """Reads the content of a `config.json`, in the published form or as transformers 5 writes it.

    The compute dtype stays float32 whatever the file says; choose it with `dataclasses.replace`.

    Raises:
      ValueError: another architecture, a missing key, a quantised checkpoint, or a setting this model lacks.
    """
    family = content.get("model_type")
    if (
        not isinstance(family, str)
        or family not in ARCHITECTURES
        or content.get("architectures") != [ARCHITECTURES[family]]
    ):
        raise ValueError(
            f"config.json: architectures {content.get('architectures')} with model_type {family!r} is not supported;"
            f" known pairs are {', '.join(f'{name} with {kind}' for kind, name in ARCHITECTURES.items())}"
        )
    if "quantization_config" in content:
        raise ValueError("quantization_config is set: quantised weights are refused, use the bfloat16 checkpoint")
    _expect(content, "", "tie_word_embeddings", True, False)
    vision = _required(content, "vision_config")
    ids = {name: _required(content, name) for name in TOKEN_ID_NAMES}
    if family == "qwen2_5_vl":
        # Published files are flat: text sizes stand at the root.
        text = _required(content, "text_config") if content.get("text_config") else content
        _expect(text, "text_config.", "tie_word_embeddings", True, False)
        # Older files of transformers have the flag in the text section only.
        tied = content.get("tie_word_embeddings", False) or text.get("tie_word_embeddings", False)
        return QwenVLConfig(_read_windowed_vision(vision), _read_plain_text(text, tied), **ids)
    tied = content.get("tie_word_embeddings", False)  # the root flag counts, and its absence means untied
    text = _required(content, "text_config")
    return QwenVLConfig(_read_vision(vision), _read_text(text, tied, with_experts=family == "qwen3_vl_moe"), **ids)


def config_to_hf(config: QwenVLConfig) -> dict[str, Any]:
    """The content of a `config.json` in the published form, which transformers 4.57 and 5 both read.

    Raises:
      ValueError: sizes that the published form of the family cannot say.
    """
    root = {
        "architectures": [ARCHITECTURES[config.family]],
        "model_type": config.family,
        "tie_word_embeddings": config.text.tied_embeddings,
        **{name: getattr(config, name) for name in TOKEN_ID_NAMES},
    }
    if config.family == "qwen2_5_vl":
        vision = {"model_type": config.family, "hidden_act": "silu", **_section(config.vision, WINDOWED_VISION_KEYS)}
        return root | _plain_text_to_hf(config.text) | {"vision_config": vision}
    vision = {
        "model_type": config.family,
        "hidden_act": "gelu_pytorch_tanh",
        **_section(config.vision, VISION_KEYS),
    }
    return root | {"vision_config": vision, "text_config": _text_to_hf(config.text, config.family)}


def _section(sizes: VisionConfig | WindowedVisionConfig | TextConfig, keys: dict[str, str]) -> dict[str, Any]:
    values = {hf: getattr(sizes, name) for hf, name in keys.items()}
    return {hf: list(value) if isinstance(value, tuple) else value for hf, value in values.items()}


def _text_to_hf(text: TextConfig, family: str) -> dict[str, Any]:
    experts = _section(text, EXPERT_KEYS) | {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True}
    return {
        "model_type": f"{family}_text",
        "hidden_act": "silu",
        "attention_bias": False,
        **_section(text, TEXT_KEYS),
        **(experts if text.num_experts else {}),
        "rope_scaling": {
            "mrope_interleaved": True,
            "mrope_section": list(text.mrope_section),
            "rope_type": "default",
        },
        "tie_word_embeddings": text.tied_embeddings,
    }


def _plain_text_to_hf(text: TextConfig) -> dict[str, Any]:
    if text.head_dim * text.num_heads != text.width:
        raise ValueError(f"head_dim {text.head_dim} must be width {text.width} / num_heads {text.num_heads}: the files"
                         " of Qwen2.5-VL have no key for it")  # fmt: skip
    keys = {hf: name for hf, name in TEXT_KEYS.items() if hf != "head_dim"}
    rope = {"type": "mrope", "mrope_section": list(text.mrope_section)}
    return {"hidden_act": "silu", "use_sliding_window": False, **_section(text, keys), "rope_scaling": rope}


def _required(section: dict[str, Any], key: str, where: str = "") -> Any:
    for spelling in (key, ALIASES.get(key)):
        if spelling in section:
            return _checked(section[spelling], key, where)
    raise ValueError(f"config.json: {where}{key} is missing; take the file of the checkpoint itself")


def _checked(value: Any, key: str, where: str) -> Any:
    """Refuses what no checkpoint says. A size beyond memory, for one, would be found out only by running out of it."""
    if key in SECTION_KEYS:
        wanted, good = "an object", isinstance(value, dict)
    elif key in LIST_KEYS:
        wanted, good = "a list of whole numbers", isinstance(value, list) and all(map(_is_size, value))
        if key == "mrope_section":
            wanted, good = "three whole numbers", good and len(value) == 3
    elif key in REAL_KEYS:
        wanted, good = "a positive number", type(value) in (int, float) and 0 < value < math.inf
    else:
        wanted, good = "a whole number", _is_size(value) and (value > 0 or key in TOKEN_ID_NAMES)
    if not good:
        raise ValueError(f"config.json: {where}{key} is {str(value)[:40]!r}, not {wanted}")
    return value


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value <= LARGEST_SIZE  # not bool, which is an int too


def _expect(section: dict[str, Any], where: str, key: str, *supported: Any) -> None:
    if key in section and section[key] not in supported:
        raise ValueError(f"config.json: {where}{key} is {section[key]!r}; only {supported[0]!r} is supported")


def _read_tower(section: dict[str, Any], keys: dict[str, str], activation: str) -> dict[str, Any]:
    where = "vision_config."
    _expect(section, where, "hidden_act", activation)
    rope = _rope_section(section, where)
    _expect(rope, where + "rope_parameters.", "rope_type", "axial")
    _expect(rope, where + "rope_parameters.", "rope_theta", ROPE_THETA)
    sizes = {name: _required(section, hf, where) for hf, name in keys.items()}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in sizes.items()}


def _read_vision(section: dict[str, Any]) -> VisionConfig:
    return VisionConfig(**_read_tower(section, VISION_KEYS, "gelu_pytorch_tanh"))


def _read_windowed_vision(section: dict[str, Any]) -> WindowedVisionConfig:
    return WindowedVisionConfig(**_read_tower(section, WINDOWED_VISION_KEYS, "silu"))


def _read_text(section: dict[str, Any], tied: bool, with_experts: bool) -> TextConfig:
    where = "text_config."
    _expect(section, where, "attention_bias", False)
    rope = _read_rope(section, where)
    _expect(rope, where + "rope_scaling.", "mrope_interleaved", True)
    keys = TEXT_KEYS
    if with_experts:
        keys = TEXT_KEYS | EXPERT_KEYS
        _expect(section, where, "decoder_sparse_step", 1)
        _expect(section, where, "mlp_only_layers", [], None)
        _expect(section, where, "norm_topk_prob", True)
    return _make_text(section, rope, keys, where, tied_embeddings=tied)


def _read_plain_text(section: dict[str, Any], tied: bool) -> TextConfig:
    where = "text_config." if section.get("model_type") == "qwen2_5_vl_text" else ""
    head_dim = _required(section, "hidden_size", where) // _required(section, "num_attention_heads", where)
    _expect(section, where, "head_dim", head_dim, None)
    traits = {"mrope_interleaved": False, "qk_norm": False, "qkv_bias": True}
    rope = _read_rope(section, where)
    return _make_text({**section, "head_dim": head_dim}, rope, TEXT_KEYS, where, tied_embeddings=tied, **traits)


def _rope_section(section: dict[str, Any], where: str) -> dict[str, Any]:
    for key in ("rope_parameters", "rope_scaling"):
        rope = section.get(key)
        if rope is not None and not isinstance(rope, dict):
            raise ValueError(f"config.json: {where}{key} is {str(rope)[:40]!r}, not an object")
        if rope:
            return rope
    return {}


def _read_rope(section: dict[str, Any], where: str) -> dict[str, Any]:
    """The rope section with rope_theta, which published files hold beside rope_scaling."""
    _expect(section, where, "hidden_act", "silu")
    _expect(section, where, "use_sliding_window", False)
    rope = dict(_rope_section(section, where))
    if "rope_theta" in section:
        rope.setdefault("rope_theta", section["rope_theta"])
    for key in ("rope_type", "type"):
        _expect(rope, where + "rope_scaling.", key, "default", "mrope")
    return rope


def _make_text(
    section: dict[str, Any], rope: dict[str, Any], keys: dict[str, str], where: str, **traits: bool
) -> TextConfig:
    sizes = {name: _required({**section, **rope}, hf, where) for hf, name in keys.items()}
    section_lens = tuple(_required(rope, "mrope_section", where + "rope_scaling."))
    return TextConfig(**sizes, mrope_section=section_lens, **traits)
