"""Adapters: the base model at the start, equal to the merged model later, one layer against qwix."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from qwen_tiny import example_prompts, random_params, tiny_config

from safegrpo_jax.models import hf_weights, lora, qwen_vl
from safegrpo_jax.models.layers import Linear
from safegrpo_jax.sharding import make_mesh, param_shardings

FUSION_TOLERANCE = 3e-6  # adding zeros changes nothing, but another program fuses in another order
MERGE_TOLERANCE = 1e-5  # float32: (W + s A B) x against W x + s A (B x)
ADAPTED = lora.LoraConfig(rank=3, alpha=6.0, projections=("q", "o", "down"), vision_projections=("qkv", "proj", "fc1"))


@pytest.fixture(scope="module")
def model():
    """(config with adapters, base parameters, base parameters joined with fresh adapters)."""
    base = tiny_config(scan_layers=True)
    config = dataclasses.replace(base, lora=ADAPTED)
    params = random_params(base)
    adapters = jax.jit(qwen_vl.init_adapters, static_argnums=0)(config, jax.random.key(0))
    return config, params, lora.join(params, adapters)


@jax.jit
def perturbed(params):
    """B away from its zeros."""
    mask = lora.adapter_mask(params)
    return jax.tree.map(lambda leaf, is_adapter: leaf + 0.01 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape)
                        if is_adapter else leaf, params, mask)  # fmt: skip


def hidden(params, prompts, config):
    features = qwen_vl.encode_images(params, prompts.images, config)
    tokens = (prompts.prompt_ids, prompts.prompt_mask, prompts.positions, prompts.vision_mask, prompts.feature_index)
    return qwen_vl.text_hidden(params, *tokens, features, config)


def test_tree_in_two_parts(model):
    config, params, adapted = model
    assert adapted["text"]["layers"]["q"]["lora_a"].shape == (2, 40, 3)
    assert adapted["text"]["layers"]["q"]["lora_b"].shape == (2, 3, 4, 16)
    assert adapted["text"]["deepstack_layers"]["o"]["lora_a"].shape == (2, 4, 16, 3)
    assert adapted["vision"]["blocks"]["stage_1"]["qkv"]["lora_b"].shape == (2, 3, 3, 4, 8)
    assert "lora_a" not in adapted["text"]["layers"]["k"]
    assert jax.tree.structure(lora.without_adapters(adapted)) == jax.tree.structure(params)
    shapes = jax.eval_shape(lambda key: qwen_vl.init_params(config, key), jax.random.key(0))
    assert jax.tree.structure(adapted) == jax.tree.structure(shapes)
    placed = param_shardings(adapted, make_mesh({"data": 2, "fsdp": 2, "tensor": 2}))
    assert placed["text"]["layers"]["q"]["lora_a"].is_fully_replicated


def test_fresh_is_the_base_model_and_trained_equals_merged(model, tmp_path):
    config, params, adapted = model
    base = dataclasses.replace(config, lora=lora.LoraConfig())
    prompts = example_prompts()
    run = jax.jit(hidden, static_argnums=2)
    expected = run(params, prompts, base)
    np.testing.assert_allclose(run(adapted, prompts, config), expected, atol=FUSION_TOLERANCE)
    trained = perturbed(adapted)
    merged = lora.merge_adapters(trained, config.lora)
    actual, expected_trained = run(trained, prompts, config), run(merged, prompts, base)
    np.testing.assert_allclose(actual, expected_trained, atol=MERGE_TOLERANCE)
    assert np.abs(actual - expected).max() > 100 * MERGE_TOLERANCE
    # The folder of a trained adapter is that of a plain model.
    with pytest.raises(ValueError, match="merge adapters"):
        hf_weights.export(tmp_path / "model", trained, config)
    hf_weights.export(tmp_path / "model", merged, config)
    jax.tree.map(np.testing.assert_array_equal, hf_weights.load(tmp_path / "model", config), merged)


def test_adapters_on_a_mesh(model):
    """Replicated adapters beside projections whose heads and widths are spread over devices."""
    config, _, adapted = model
    prompts, trained = example_prompts(), perturbed(adapted)
    run = jax.jit(hidden, static_argnums=2)
    expected = run(trained, prompts, config)
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    with jax.set_mesh(mesh):
        actual = run(jax.device_put(trained, param_shardings(trained, mesh)), prompts, config)
    assert len(actual.sharding.device_set) == 8
    np.testing.assert_allclose(actual[prompts.prompt_mask], expected[prompts.prompt_mask], atol=MERGE_TOLERANCE)


def test_only_adapters_are_trained(model):
    config, params, adapted = model
    mask = lora.trainable_mask(adapted, freeze_vision=False)
    assert mask == lora.adapter_mask(adapted)
    assert sum(jax.tree.leaves(mask)) == 2 * (2 * 3 + 3 * 3)  # A and B; three names in 2 text and 3 vision stacks
    assert not any(jax.tree.leaves(lora.trainable_mask(adapted, freeze_vision=True)["vision"]))
    assert all(jax.tree.leaves(lora.trainable_mask(params, freeze_vision=False)))


def test_one_layer_equals_qwix():
    qwix = pytest.importorskip("qwix")

    class Model(nnx.Module):
        def __init__(self):
            self.q = Linear((8,), (12,), bias=True, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.q(x)

    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 8)), jnp.float32)
    ours, theirs = Model(), Model()
    provider = qwix.LoraProvider(module_path="q", rank=2, alpha=5.0)
    theirs = qwix.apply_lora_to_model(theirs, provider, x, rngs=nnx.Rngs(1))
    layer = lora.LoraLinear(ours.q, lora.LoraConfig(rank=2, alpha=5.0), nnx.Rngs(1))
    b = jnp.asarray(np.random.default_rng(1).normal(size=(2, 12)), jnp.float32)
    layer.lora_b[...] = b
    theirs.q.kernel_lora_b[...] = b
    theirs.q.kernel_lora_a[...] = layer.lora_a[...]
    np.testing.assert_allclose(layer(x), theirs(x), atol=MERGE_TOLERANCE)
    assert np.abs(layer(x) - ours.q(x)).max() > 0.1


def test_refusals():
    config = dataclasses.replace(tiny_config("qwen3_vl_moe"), lora=lora.LoraConfig(rank=2, projections=("gate",)))
    with pytest.raises(ValueError, match="lora projection 'gate' does not exist in this model; choose from k, o, q"):
        jax.eval_shape(lambda key: qwen_vl.init_params(config, key), jax.random.key(0))
    with pytest.raises(ValueError, match="lora rank is -1"):
        lora.LoraConfig(rank=-1)
    with pytest.raises(ValueError, match="without projections"):
        lora.LoraConfig(rank=1, projections=())
