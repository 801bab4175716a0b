"""config.json: both spellings are read, and what a file leaves open or this model cannot do is refused."""

import json

import pytest
from qwen_tiny import tiny_config

from safegrpo_jax.models import hf_config


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(hf_config.config_to_hf(tiny_config())))
    return tmp_path


def change_config(folder, change):
    path = folder / "config.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(architectures=["Qwen2_5_VLForConditionalGeneration"]), "is not supported; known pairs"),
        (lambda c: c.update(model_type="qwen3_vl_moe"), "is not supported; known pairs"),
        (lambda c: c.update(model_type="llava", architectures=["Llava"]), "model_type 'llava' is not supported"),
        (lambda c: c.update(quantization_config={"quant_method": "fp8"}), "quantization_config"),
        (lambda c: c["text_config"].pop("rope_theta"), r"text_config\.rope_theta is missing"),
        (lambda c: c["text_config"]["rope_scaling"].pop("mrope_section"), "mrope_section is missing"),
        (lambda c: c["text_config"].pop("rope_scaling"), "mrope_section is missing"),
        (lambda c: c["text_config"]["rope_scaling"].update(rope_type="yarn"), "rope_type is 'yarn'"),
        (lambda c: c["text_config"].update(hidden_act="gelu"), r"text_config\.hidden_act is 'gelu'"),
        (lambda c: c["vision_config"].pop("depth"), r"vision_config\.depth is missing"),
        (lambda c: c.pop("image_token_id"), "image_token_id is missing"),
        (lambda c: c.pop("text_config"), "text_config is missing"),
        (lambda c: c["vision_config"].update(out_hidden_size=8), "out_width 8 must equal"),
        (lambda c: c.update(vision_config="small"), "vision_config is 'small', not an object"),
        (lambda c: c.update(tie_word_embeddings="no"), "tie_word_embeddings is 'no'"),
        (lambda c: c["vision_config"].update(depth="24"), r"vision_config\.depth is '24', not a whole number"),
        (lambda c: c["vision_config"].update(depth=10**30), r"vision_config\.depth is '1000"),
        (lambda c: c["text_config"].update(num_hidden_layers=0), r"text_config\.num_hidden_layers is '0'"),
        (lambda c: c["text_config"].update(rms_norm_eps=None), "rms_norm_eps is 'None', not a positive number"),
        (lambda c: c["text_config"].update(rope_scaling=[1]), r"rope_scaling is '\[1\]', not an object"),
        (lambda c: c["text_config"]["rope_scaling"].update(mrope_section=[]), "not three whole numbers"),
    ],
)
def test_read_config_refuses(folder, change, message):
    change_config(folder, change)
    with pytest.raises(ValueError, match=message):
        hf_config.read_config(folder)


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("qwen3_vl_moe", lambda c: c["text_config"].pop("num_experts"), r"text_config\.num_experts is missing"),
        ("qwen3_vl_moe", lambda c: c["text_config"].update(decoder_sparse_step=2), "decoder_sparse_step is 2"),
        ("qwen3_vl_moe", lambda c: c["text_config"].update(mlp_only_layers=[1]), r"mlp_only_layers is \[1\]"),
        ("qwen3_vl_moe", lambda c: c["text_config"].update(norm_topk_prob=False), "norm_topk_prob is False"),
        ("qwen3_vl_moe", lambda c: c["text_config"].update(num_experts_per_tok=17), "experts_per_token 17"),
        ("qwen2_5_vl", lambda c: c.pop("rope_theta"), "config.json: rope_theta is missing"),
        ("qwen2_5_vl", lambda c: c["rope_scaling"].pop("mrope_section"), "mrope_section is missing"),
        ("qwen2_5_vl", lambda c: c["rope_scaling"].update(mrope_section=[4, 2, 2]), "mrope_section"),
        ("qwen2_5_vl", lambda c: c.update(use_sliding_window=True), "use_sliding_window is True"),
        ("qwen2_5_vl", lambda c: c["vision_config"].pop("window_size"), r"vision_config\.window_size is missing"),
        ("qwen2_5_vl", lambda c: c["vision_config"].update(window_size=36), "window_size 36 must be a multiple"),
        ("qwen2_5_vl", lambda c: c["vision_config"].update(fullatt_block_indexes=[9]), r"full_layers \(9,\)"),
    ],
)
def test_read_config_of_other_families_refuses(family, change, message):
    content = json.loads(json.dumps(hf_config.config_to_hf(tiny_config(family))))
    change(content)
    with pytest.raises(ValueError, match=message):
        hf_config.config_from_hf(content)


def test_read_config_of_nothing_and_of_rubbish(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        hf_config.read_config(tmp_path / "absent")
    for text in ("{", "[]"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match="config.json"):
            hf_config.read_config(tmp_path)


def test_read_config_accepts_both_rope_spellings(folder):
    def modernise(content):
        text = content["text_config"]
        text["rope_parameters"] = {**text.pop("rope_scaling"), "rope_theta": text.pop("rope_theta")}
        content["vision_config"]["rope_parameters"] = {"rope_type": "axial", "rope_theta": 10000.0}

    assert hf_config.read_config(folder) == tiny_config()
    change_config(folder, modernise)
    assert hf_config.read_config(folder) == tiny_config()
