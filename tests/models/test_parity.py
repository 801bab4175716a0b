"""Logits and gradients of the whole model against transformers on torch, family by family and case by case."""

import copy
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from qwen_tiny import GRID_SIDE, GRIDS, example_prompts, single_prompt, tiny_config, torch_inputs, torch_model

from safegrpo_jax.models import hf_config, hf_weights, qwen_vl

torch = pytest.importorskip("torch")

LOGITS_TOLERANCE = 1e-4  # float32 sums in another order, through eight blocks, on logits of a few units
GRADIENT_TOLERANCE = 1e-4  # relative to the largest gradient of the same parameter of a layer
BFLOAT16_MODELS = 4  # of one tiny model the drift is luck: single ones differ by a tenth either way
BFLOAT16_FACTOR = 1.05  # what is left of that luck in the mean of four

# Windows cut at both sides, at none, and a grid of two rows.
ODD_GRIDS = [[(10, 14), (8, 8)], [(2, 10)]]
# Beside a table of 48 x 48: smaller, as large, larger, of two rows.
TABLE_GRIDS = [[(10, 14), (48, 2)], [(50, 4)]]
PUBLISHED_TABLE_SIDE = 48


def with_text(config, **changes):
    return dataclasses.replace(config, text=dataclasses.replace(config.text, **changes))


def with_vision(config, **changes):
    return dataclasses.replace(config, vision=dataclasses.replace(config.vision, **changes))


# Grids of one packing row make one prompt, others the batch of `example_prompts`: two images of different grids in one
# row, one image, text only, the last two padded on the left. Two query heads share a key head unless a name says more.
CASES = {
    "one-image": (tiny_config(), [[(4, 6)]]),
    "two-images": (tiny_config(), [[(4, 6), (2, 4)]]),
    "untied": (tiny_config(), GRIDS),
    "tied": (tiny_config(tied=True), ODD_GRIDS),
    "published-table": (with_vision(tiny_config(), num_positions=PUBLISHED_TABLE_SIDE**2), TABLE_GRIDS),
    "gqa-1": (with_text(tiny_config(), num_heads=8, num_kv_heads=8), GRIDS),
    "gqa-8": (with_text(tiny_config(), num_heads=8, num_kv_heads=1), GRIDS),
    "depth-24": (with_vision(tiny_config(), num_layers=24, deepstack_layers=(5, 11, 17)), GRIDS),
    "depth-27": (with_vision(tiny_config(), num_layers=27, deepstack_layers=(8, 16, 24)), GRIDS),
    "experts": (with_text(tiny_config("qwen3_vl_moe"), num_experts=128, experts_per_token=8), GRIDS),
    "experts-tied": (tiny_config("qwen3_vl_moe", tied=True), ODD_GRIDS),
    "windows": (tiny_config("qwen2_5_vl"), ODD_GRIDS),
    "windows-tied": (tiny_config("qwen2_5_vl", tied=True), ODD_GRIDS),
}
UNROLLED = ("one-image", "experts-tied", "windows-tied")  # the others scan and recompute their layers


def case_prompts(name, grids):
    if len(grids) == 1:
        return single_prompt(grids)
    return example_prompts(grids, PUBLISHED_TABLE_SIDE if name == "published-table" else GRID_SIDE)


def saved_params(model, config, folder):
    """Reads `model` back from the folder it saves."""
    model.save_pretrained(folder)
    described = hf_config.read_config(folder)
    assert (described.vision, described.text) == (config.vision, config.text)
    return hf_weights.load(folder, config)


def prompt_logits(params, prompts, config):
    features = qwen_vl.encode_images(params, prompts.images, config)
    tokens = (prompts.prompt_ids, prompts.prompt_mask, prompts.positions, prompts.vision_mask, prompts.feature_index)
    return qwen_vl.logits_from_hidden(params, qwen_vl.text_hidden(params, *tokens, features, config), config)


def scored_targets(prompts):
    """The next token of every token, and where there is one."""
    scored = prompts.prompt_mask.copy()
    scored[:, -1] = False
    return np.roll(prompts.prompt_ids, -1, 1), scored


def torch_logits_and_gradients(model, inputs, targets, scored, config, folder):
    """Logits, and the gradients of the summed log-probs of the next tokens in our layout: theirs are saved and loaded
    as if they were weights."""
    logits = model(**inputs).logits
    picked = torch.log_softmax(logits, -1).gather(-1, torch.from_numpy(targets).long()[..., None])[..., 0]
    (picked * torch.from_numpy(scored)).sum().backward()
    gradient_model = copy.deepcopy(model)
    with torch.no_grad():
        for copied, parameter in zip(gradient_model.parameters(), model.parameters(), strict=True):
            copied.copy_(parameter.grad)
    return logits.detach().numpy(), saved_params(gradient_model, config, folder)


@functools.partial(jax.jit, static_argnums=4)
def logits_and_gradients(params, prompts, targets, scored, config):
    def total_logp(params):
        logits = prompt_logits(params, prompts, config)
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
        return (picked * scored).sum(), logits

    gradients, logits = jax.grad(total_logp, has_aux=True)(params)
    return logits, gradients


@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients(tmp_path, name):
    config, grids = CASES[name]
    config = dataclasses.replace(config, scan_layers=name not in UNROLLED, remat=name not in UNROLLED)
    prompts = case_prompts(name, grids)
    targets, scored = scored_targets(prompts)
    model = torch_model(config)
    params = saved_params(model, config, tmp_path / "model")
    expected_logits, expected = torch_logits_and_gradients(
        model, torch_inputs(prompts, grids), targets, scored, config, tmp_path / "gradients"
    )
    logits, gradients = logits_and_gradients(params, prompts, targets, scored, config)

    real = prompts.prompt_mask
    assert np.abs(expected_logits[real]).max() > 1  # otherwise an absolute tolerance says nothing
    np.testing.assert_allclose(logits[real], expected_logits[real], atol=LOGITS_TOLERANCE, rtol=0)

    def compare(path, actual, expected):
        stacked = any(getattr(key, "key", "").endswith(("layers", "blocks", "mergers")) for key in path)
        largest = np.abs(expected).max(axis=tuple(range(int(stacked), expected.ndim)), keepdims=True)
        assert (largest > 0).all(), jax.tree_util.keystr(path)
        worst = (np.abs(actual - expected) / largest).max()
        assert worst < GRADIENT_TOLERANCE, (jax.tree_util.keystr(path), worst)

    jax.tree_util.tree_map_with_path(compare, gradients, expected)


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
