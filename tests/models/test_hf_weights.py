"""Model folders: round trips with transformers and with itself, and every way a folder can be wrong."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from qwen_tiny import example_prompts, random_params, tiny_config, torch_inputs, torch_model
from safetensors.numpy import load_file, save_file

from safegrpo_jax.models import hf_config, hf_weights, qwen_vl
from safegrpo_jax.sharding import make_mesh, param_shardings

LOGITS_TOLERANCE = 1e-4  # float32 sums in another order through eight blocks

GATE = "model.language_model.layers.1.mlp.gate_proj.weight"


@functools.partial(jax.jit, static_argnums=2)
def prompt_logits(params, prompts, config):
    features = qwen_vl.encode_images(params, prompts.images, config)
    arguments = (prompts.prompt_ids, prompts.prompt_mask, prompts.positions, prompts.vision_mask, prompts.feature_index)
    return qwen_vl.logits_from_hidden(params, qwen_vl.text_hidden(params, *arguments, features, config), config)


@pytest.fixture(scope="module")
def model():
    config = tiny_config()
    return config, random_params(config)


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "qwen2_5_vl"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_round_trip_of_other_families(tmp_path, family, tied):
    config = tiny_config(family, tied=tied)
    params = random_params(config)
    hf_weights.export(tmp_path / "model", params, config, max_shard_bytes=200_000)
    assert hf_config.read_config(tmp_path / "model") == config
    assert_trees_equal(hf_weights.load(tmp_path / "model", config), params)
    names = set(json.loads((tmp_path / "model" / hf_weights.INDEX_NAME).read_text())["weight_map"])
    expected = {
        "qwen3_vl_moe": {
            "model.language_model.layers.3.mlp.experts.gate_up_proj",
            "model.language_model.layers.0.mlp.gate.weight",
        },
        "qwen2_5_vl": {"model.layers.3.self_attn.q_proj.bias", "visual.merger.ln_q.weight", "visual.merger.mlp.2.bias"},
    }
    assert expected[family] <= names and ("lm_head.weight" in names) is not tied


@pytest.mark.parametrize("expert_width", [20, 24, 40], ids=["square-gate-up", "oblong", "square-down"])
def test_experts_of_either_layout(tmp_path, expert_width):
    """[expert, in, out] as published, or [expert, out, in]: told apart by shape, even where one tensor is square."""
    config = tiny_config("qwen3_vl_moe")
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, expert_width=expert_width))
    params = random_params(config)
    folder = tmp_path / "model"
    hf_weights.export(folder, params, config)
    path = folder / hf_weights.SINGLE_NAME
    published = load_file(path)["model.language_model.layers.2.mlp.experts.gate_up_proj"]
    assert published.shape == (16, 40, 2 * expert_width)
    np.testing.assert_array_equal(  # gate first, then up
        published[3], np.asarray(params["text"]["layers"]["mlp"]["gate_up"][0, 3]).reshape(40, -1)
    )

    def turn(tensors):
        for name in tensors:
            if ".experts." in name:
                tensors[name] = np.ascontiguousarray(tensors[name].swapaxes(1, 2))

    rewrite(path, turn)
    assert_trees_equal(hf_weights.load(folder, config), params)


def test_experts_of_mixed_layouts_are_refused(tmp_path):
    config = tiny_config("qwen3_vl_moe")
    hf_weights.export(tmp_path / "model", random_params(config), config)
    name = "model.language_model.layers.1.mlp.experts.down_proj"
    rewrite(
        tmp_path / "model" / hf_weights.SINGLE_NAME,
        lambda tensors: tensors.update({name: np.ascontiguousarray(tensors[name].swapaxes(1, 2))}),
    )
    with pytest.raises(ValueError, match=rf"{name} has shape \(16, 40, 24\), expected \(16, 24, 40\)"):
        hf_weights.load(tmp_path / "model", config)


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    """A sound folder of several files. Tests that break it copy it first."""
    config, params = model
    folder = tmp_path_factory.mktemp("exported") / "model"
    hf_weights.export(folder, params, config, max_shard_bytes=100_000)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture
def folder(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "model")


def file_of(folder, name):
    return folder / json.loads((folder / hf_weights.INDEX_NAME).read_text())["weight_map"][name]


def rewrite(path, change):
    """Applies `change` to the tensors of one file."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def assert_trees_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize(
    ("family", "tied", "max_shard_bytes"),
    [
        ("qwen3_vl", False, 30_000),
        ("qwen3_vl", True, 10**9),
        ("qwen3_vl_moe", False, 200_000),
        ("qwen2_5_vl", False, 10**9),
        ("qwen2_5_vl", True, 30_000),
    ],
)
def test_export_loads_in_transformers_with_equal_logits(tmp_path, family, tied, max_shard_bytes):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForImageTextToText

    config = tiny_config(family, tied=tied)
    # Spread enough that every part matters: experts differ, attention is not uniform.
    params = jax.tree.map(lambda leaf: leaf * 6 if leaf.ndim > 2 else leaf, random_params(config))
    hf_weights.export(tmp_path / "model", params, config, max_shard_bytes=max_shard_bytes)
    model, report = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "model", dtype="auto", attn_implementation="eager", output_loading_info=True
    )
    assert model.config.architectures == [hf_config.ARCHITECTURES[family]] == [type(model).__name__]
    assert model.dtype == torch.float32
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    prompts = example_prompts()
    with torch.no_grad():
        expected = model.eval()(**torch_inputs(prompts)).logits.numpy()[prompts.prompt_mask]
    actual = prompt_logits(params, prompts, config)[prompts.prompt_mask]
    np.testing.assert_allclose(actual, expected, atol=LOGITS_TOLERANCE, rtol=0)


def test_round_trip_is_exact(model, exported):
    config, params = model
    assert hf_config.read_config(exported) == config
    assert_trees_equal(hf_weights.load(exported, config), params)


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_vl_moe", "qwen2_5_vl"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_transformers_saved_comes_back_byte_for_byte(tmp_path, family, dtype):
    """Names, types, shapes and bytes of every tensor; and a second round trip is the first, file for file."""
    torch = pytest.importorskip("torch")
    config = tiny_config(family)
    torch_model(config).to(getattr(torch, dtype)).save_pretrained(tmp_path / "theirs")
    content = json.loads((tmp_path / "theirs" / "config.json").read_text())
    previous = tmp_path / "theirs"
    for name in ("ours", "again"):
        params = hf_weights.load(previous, config, dtype=jnp.dtype(dtype))
        previous = tmp_path / name
        hf_weights.export(previous, params, config, content, max_shard_bytes=150_000)
    theirs, ours = (
        {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
        for folder in (tmp_path / "theirs", tmp_path / "ours")
    )
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        if ".experts." in name:  # written as transformers has them in memory; the published files have in-axes first
            tensor = tensor.swapaxes(1, 2)
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), name
        assert ours[name].tobytes() == tensor.tobytes(), name
    files = sorted(path.name for path in previous.iterdir())
    assert len(files) > 3 and files == sorted(path.name for path in (tmp_path / "ours").iterdir())
    for file in files:
        assert (previous / file).read_bytes() == (tmp_path / "ours" / file).read_bytes()


def test_bfloat16_round_trip(model, tmp_path):
    config, params = model
    half = jax.tree.map(lambda leaf: np.asarray(leaf).astype(ml_dtypes.bfloat16), params)
    hf_weights.export(
        tmp_path / "half", half, config, hf_config=hf_config.config_to_hf(config) | {"torch_dtype": "float32"}
    )
    content = json.loads((tmp_path / "half" / "config.json").read_text())
    assert content["dtype"] == "bfloat16" and "torch_dtype" not in content
    assert_trees_equal(hf_weights.load(tmp_path / "half", config, dtype=jnp.bfloat16), half)
    assert_trees_equal(
        hf_weights.load(tmp_path / "half", config), jax.tree.map(lambda leaf: leaf.astype(np.float32), half)
    )


def test_load_straight_into_shards(model, exported):
    config, params = model
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    shardings = param_shardings(params, mesh)
    loaded = hf_weights.load(exported, config, shardings=shardings)
    assert_trees_equal(loaded, params)
    gate = loaded["text"]["layers"]["mlp"]["gate"]["kernel"]
    assert gate.sharding.spec == PartitionSpec(None, "fsdp", "tensor")
    assert gate.addressable_shards[0].data.shape == (2, 20, 28)


def test_stacked_axis_can_be_sharded_too(model, exported):
    config, params = model
    mesh = make_mesh({"stage": 2, "data": 4})
    shardings = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), params)
    shardings["text"]["layers"]["mlp"]["gate"]["kernel"] = NamedSharding(mesh, PartitionSpec("stage"))
    assert_trees_equal(hf_weights.load(exported, config, shardings=shardings), params)


def test_unknown_tensor(model, folder):
    path = file_of(folder, GATE)
    rewrite(path, lambda tensors: tensors.update({"model.extra.weight": np.zeros(3, np.float32)}))
    with pytest.raises(ValueError, match=rf"{path.name}: unknown tensor model\.extra\.weight"):
        hf_weights.load(folder, model[0])


def test_missing_tensor(model, folder):
    path = file_of(folder, GATE)
    rewrite(path, lambda tensors: tensors.pop(GATE))
    with pytest.raises(ValueError, match=rf"{path.name}: missing tensor {GATE}"):
        hf_weights.load(folder, model[0])


def test_missing_tensor_without_an_index(model, tmp_path):
    config, params = model
    hf_weights.export(tmp_path / "model", params, config)
    rewrite(tmp_path / "model" / hf_weights.SINGLE_NAME, lambda tensors: tensors.pop(GATE))
    with pytest.raises(ValueError, match=rf"missing tensor {GATE} \(1 missing"):
        hf_weights.load(tmp_path / "model", config)


def test_tensor_set_twice(model, folder):
    path = file_of(folder, "lm_head.weight")
    assert path != file_of(folder, GATE)
    rewrite(path, lambda tensors: tensors.update({GATE: np.zeros((56, 40), np.float32)}))
    with pytest.raises(ValueError, match=rf"tensor {GATE} is set twice"):
        hf_weights.load(folder, model[0])


def test_misshapen_tensor(model, folder):
    path = file_of(folder, GATE)
    rewrite(path, lambda tensors: tensors.update({GATE: np.zeros((40, 56), np.float32)}))
    with pytest.raises(ValueError, match=rf"{path.name}: tensor {GATE} has shape \(40, 56\), expected \(56, 40\)"):
        hf_weights.load(folder, model[0])


def test_head_in_a_tied_checkpoint(model, folder):
    config = dataclasses.replace(model[0], text=dataclasses.replace(model[0].text, tied_embeddings=True))
    with pytest.raises(ValueError, match=r"unknown tensor lm_head\.weight; a tied model"):
        hf_weights.load(folder, config)


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        (ml_dtypes.float8_e4m3fn, "of type F8_E4M3 belongs to a quantised checkpoint"),
        (ml_dtypes.float8_e5m2, "of type F8_E5M2 belongs to a quantised checkpoint"),
        (np.int8, "of type I8 belongs to a quantised checkpoint"),
        (np.uint8, "of type U8 belongs to a quantised checkpoint"),
        (np.int32, "is of type I32; weights of type F32, F16, BF16 are read"),
        (np.float64, "is of type F64; weights of type F32, F16, BF16 are read"),
        (np.bool_, "is of type BOOL; weights of type F32, F16, BF16 are read"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_weights_of_a_wrong_type(model, folder, dtype, message):
    path = file_of(folder, GATE)
    rewrite(path, lambda tensors: tensors.update({GATE: tensors[GATE].astype(dtype)}))
    with pytest.raises(ValueError, match=rf"{path.name}: tensor {GATE} {message}"):
        hf_weights.load(folder, model[0])


def test_half_precision_is_read(model, folder):
    path = file_of(folder, GATE)
    kept = load_file(path)[GATE].astype(np.float16)
    rewrite(path, lambda tensors: tensors.update({GATE: kept}))
    loaded = hf_weights.load(folder, model[0])["text"]["deepstack_layers"]["mlp"]["gate"]["kernel"][1]
    np.testing.assert_array_equal(loaded, kept.T.astype(np.float32))


def test_scale_tensor(model, folder):
    name = GATE + "_scale_inv"
    rewrite(file_of(folder, GATE), lambda tensors: tensors.update({name: np.ones((1, 1), np.float32)}))
    with pytest.raises(ValueError, match=rf"{name} of type F32 belongs to a quantised"):
        hf_weights.load(folder, model[0])


@pytest.mark.parametrize("kept", [3, 200, -10])
def test_truncated_file(model, folder, kept):
    path = file_of(folder, GATE)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=rf"{path.name} is truncated"):
        hf_weights.load(folder, model[0])


@pytest.mark.parametrize(
    "header",
    [
        "[]7",
        "[1, 2]",
        '{"a": 3}',
        '{"a": {"dtype": "F32", "shape": [1]}}',
        '{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}',
        '{"a": {"dtype": 7, "shape": [1], "data_offsets": [0, 4]}}',
    ],
)
def test_broken_header(model, tmp_path, header):
    encoded = header.encode()
    (tmp_path / hf_weights.SINGLE_NAME).write_bytes(len(encoded).to_bytes(8, "little") + encoded + bytes(64))
    with pytest.raises(ValueError, match="model.safetensors has a broken safetensors header"):
        hf_weights.load(tmp_path, model[0])


@pytest.mark.parametrize("file", ["../model/model-00001.safetensors", "/etc/hostname", None, ["a"]])
def test_index_that_names_no_file_of_the_folder(model, folder, file):
    path = folder / hf_weights.INDEX_NAME
    index = json.loads(path.read_text())
    index["weight_map"][GATE] = file
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"{path.name}: weight_map has .* for {GATE}, not a file beside it"):
        hf_weights.load(folder, model[0])


def test_absent_file(model, folder):
    path = file_of(folder, GATE)
    path.unlink()
    with pytest.raises(ValueError, match=rf"{path.name} does not exist"):
        hf_weights.load(folder, model[0])


def test_export_refuses(model, exported, tmp_path):
    config, params = model
    with pytest.raises(ValueError, match="exists already"):
        hf_weights.export(exported, params, config)
    wider = dataclasses.replace(config, text=dataclasses.replace(config.text, mlp_width=64))
    with pytest.raises(ValueError, match="another model"):
        hf_weights.export(tmp_path / "new", params, config, hf_config=hf_config.config_to_hf(wider))
    mixed = params | {"vision": jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params["vision"])}
    with pytest.raises(ValueError, match="dtypes"):
        hf_weights.export(tmp_path / "new", mixed, config)
    assert not (tmp_path / "new").exists()
