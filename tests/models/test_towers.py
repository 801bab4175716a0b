"""The parts of the model, one by one, against the transformers modules of the same weights."""

import jax
import numpy as np
import pytest
from qwen_tiny import example_prompts, grid_thw, real_patches, tiny_config, torch_model

from safegrpo_jax.models import hf_weights, qwen_vl
from safegrpo_jax.models.attention import attend
from safegrpo_jax.models.decoder import TextBlock
from safegrpo_jax.models.rope import text_angles

torch = pytest.importorskip("torch")

MODULE_TOLERANCE = 1e-5  # float32 sums in another order, relative to the largest output


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    config = tiny_config()
    model = torch_model(config, seed=3)
    folder = tmp_path_factory.mktemp("towers") / "model"
    model.save_pretrained(folder)
    return config, hf_weights.load(folder, config), model


def assert_close(actual, expected):
    expected = expected.detach().numpy()
    np.testing.assert_allclose(actual, expected, atol=MODULE_TOLERANCE * np.abs(expected).max(), rtol=0)


def test_vision_tower_and_deepstack_taps(twins):
    config, params, model = twins
    images = example_prompts().images
    expected = model.model.visual(torch.from_numpy(real_patches(images)), grid_thw())
    features = jax.jit(qwen_vl.encode_images, static_argnums=2)(params, images, config)
    real = images.segment_ids.reshape(-1)[::4] > 0
    assert_close(features.main[real], expected.pooler_output)
    assert len(features.deepstack) == len(expected.deepstack_features) == 2
    for actual, feature in zip(features.deepstack, expected.deepstack_features, strict=True):
        assert_close(actual[real], feature)


def test_text_block(twins):
    config, params, model = twins
    from flax import nnx

    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 7, config.text.width)).astype(np.float32)
    positions = rng.integers(0, 30, (3, 2, 7)).astype(np.int32)
    weights = jax.tree.map(lambda leaf: leaf[1], params["text"]["layers"])  # layer 3 of the model
    graph = nnx.graphdef(nnx.eval_shape(lambda: TextBlock(config.text, nnx.Rngs(0))))

    @jax.jit
    def run(weights, x, positions):
        block = nnx.merge(graph, weights)
        angles = text_angles(positions, config.text.head_dim, config.text.rope_theta, config.text.mrope_axes)
        query, keys, values = block.heads(x, jax.numpy.cos(angles), jax.numpy.sin(angles))
        segments = np.ones((2, 7), np.int32)
        return block.finish(x, attend(query, keys, values, segments, causal=True, implementation="reference"))

    inputs = torch.from_numpy(x)
    rotation = model.model.language_model.rotary_emb(inputs, torch.from_numpy(positions).long())
    mask = torch.triu(torch.full((7, 7), torch.finfo(torch.float32).min), 1)[None, None]
    expected = model.model.language_model.layers[3](inputs, position_embeddings=rotation, attention_mask=mask)
    assert_close(run(weights, x, positions), expected)
