"""Logits and gradients of the whole model against transformers on torch, family by family and case by case."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from qwen_tiny import GRIDS, example_prompts, tiny_config, torch_inputs, torch_model

from safegrpo_jax.models import hf_config, hf_weights, qwen_vl

torch = pytest.importorskip("torch")

LOGITS_TOLERANCE = 1e-4  # float32 sums in another order, through eight blocks, on logits of a few units
GRADIENT_TOLERANCE = 1e-4  # relative to the largest gradient of the same parameter of a layer
BFLOAT16_MODELS = 4  # of one tiny model the drift is luck: single ones differ by a tenth either way
BFLOAT16_FACTOR = 1.05  # what is left of that luck in the mean of four

# Windows cut at both sides, at none, and a grid of two rows; a position table of 6 x 6 interpolated to other sides.
ODD_GRIDS = [[(10, 14), (8, 8)], [(2, 10)]]


def with_text(config, **changes):
    return dataclasses.replace(config, text=dataclasses.replace(config.text, **changes))


def with_vision(config, **changes):
    return dataclasses.replace(config, vision=dataclasses.replace(config.vision, **changes))


CASES = {
    "untied": (tiny_config(), GRIDS),
    "tied": (tiny_config(tied=True), ODD_GRIDS),
    "gqa-1": (with_text(tiny_config(), num_heads=8, num_kv_heads=8), GRIDS),
    "gqa-8": (with_text(tiny_config(), num_heads=8, num_kv_heads=1), GRIDS),
    "depth-24": (with_vision(tiny_config(scan_layers=True), num_layers=24, deepstack_layers=(5, 11, 17)), GRIDS),
    "depth-27": (with_vision(tiny_config(scan_layers=True), num_layers=27, deepstack_layers=(8, 16, 24)), GRIDS),
    "experts": (with_text(tiny_config("qwen3_vl_moe"), num_experts=128, experts_per_token=8), GRIDS),
    "windows": (tiny_config("qwen2_5_vl"), ODD_GRIDS),
    "windows-tied": (tiny_config("qwen2_5_vl", tied=True), ODD_GRIDS),
}
GRADIENT_CASES = ("tied", "depth-24", "experts", "windows")  # untied heads: experts, windows


@pytest.fixture(scope="module")
def make_twins(tmp_path_factory):
    """name -> (config, parameters, torch model, grids): the parameters read back from what transformers saved."""

    def make(name):
        config, grids = CASES[name]
        model = torch_model(config)
        return config, saved_params(model, config, tmp_path_factory.mktemp(name)), model, grids

    return make


def saved_params(model, config, folder):
    """Reads `model` back from the folder it saves."""
    model.save_pretrained(folder / "model")
    described = hf_config.read_config(folder / "model")
    assert (described.vision, described.text) == (config.vision, config.text)
    return hf_weights.load(folder / "model", config)


def prompt_logits(params, prompts, config):
    features = qwen_vl.encode_images(params, prompts.images, config)
    tokens = (prompts.prompt_ids, prompts.prompt_mask, prompts.positions, prompts.vision_mask, prompts.feature_index)
    return qwen_vl.logits_from_hidden(params, qwen_vl.text_hidden(params, *tokens, features, config), config)


@pytest.mark.parametrize("name", CASES)
def test_logits(make_twins, name):
    config, params, model, grids = make_twins(name)
    prompts = example_prompts(grids)
    with torch.no_grad():
        expected = model(**torch_inputs(prompts, grids)).logits.numpy()
    actual = np.asarray(jax.jit(prompt_logits, static_argnums=2)(params, prompts, config))
    real = prompts.prompt_mask
    assert np.abs(expected[real]).max() > 1  # otherwise an absolute tolerance says nothing
    np.testing.assert_allclose(actual[real], expected[real], atol=LOGITS_TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", GRADIENT_CASES)
def test_logp_gradients(make_twins, tmp_path, name):
    config, params, model, grids = make_twins(name)
    config = dataclasses.replace(config, scan_layers=True, remat=True)
    prompts = example_prompts(grids)
    targets = np.roll(prompts.prompt_ids, -1, 1)
    scored = prompts.prompt_mask.copy()
    scored[:, -1] = False

    logps = torch.log_softmax(model(**torch_inputs(prompts, grids)).logits, -1)
    picked = logps.gather(-1, torch.from_numpy(targets).long()[..., None])[..., 0]
    (picked * torch.from_numpy(scored)).sum().backward()
    gradient_model = copy.deepcopy(model)  # saving it brings the gradients into the names and layouts of files
    with torch.no_grad():
        for copied, parameter in zip(gradient_model.parameters(), model.parameters(), strict=True):
            copied.copy_(parameter.grad)
    expected = saved_params(gradient_model, config, tmp_path)

    def total_logp(params):
        logps = jax.nn.log_softmax(prompt_logits(params, prompts, config))
        return (jnp.take_along_axis(logps, targets[..., None], -1)[..., 0] * scored).sum()

    def compare(path, actual, expected):
        stacked = any(getattr(key, "key", "").endswith(("layers", "blocks", "mergers")) for key in path)
        largest = np.abs(expected).max(axis=tuple(range(int(stacked), expected.ndim)), keepdims=True)
        worst = (np.abs(actual - expected) / largest).max()
        assert worst < GRADIENT_TOLERANCE, (jax.tree_util.keystr(path), worst)

    jax.tree_util.tree_map_with_path(compare, jax.jit(jax.grad(total_logp))(params), expected)


@pytest.mark.parametrize("name", ["untied", "experts", "windows"])
def test_bfloat16_drifts_no_more_than_transformers(tmp_path, name):
    """Root mean square difference of the logits from float32, both in bfloat16 with the same weights."""
    config, grids = CASES[name]
    config = dataclasses.replace(config, scan_layers=True)
    half_config = dataclasses.replace(config, dtype="bfloat16")
    prompts = example_prompts(grids)
    inputs = torch_inputs(prompts, grids)
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    run = jax.jit(prompt_logits, static_argnums=2)
    squares = []
    for seed in range(BFLOAT16_MODELS):
        model = torch_model(config, seed).to(torch.bfloat16)
        params = saved_params(model, config, tmp_path / str(seed))
        exact = run(params, prompts, config)
        ours = run(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params), prompts, half_config)
        with torch.no_grad():
            theirs = model(**inputs).logits.float().numpy()
        squares.append([np.square(half - exact)[prompts.prompt_mask].mean() for half in (ours, theirs)])
    drift, their_drift = np.sqrt(np.mean(squares, 0))
    print(name, drift, their_drift)
    assert 0 < drift < BFLOAT16_FACTOR * their_drift, (drift, their_drift)
