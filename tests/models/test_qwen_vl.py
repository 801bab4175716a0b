"""The whole model: cached decoding, padding, sharding, execution choices, configuration."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from qwen_tiny import example_prompts, random_params, tiny_config

from safegrpo_jax.models import hf_config, qwen_vl
from safegrpo_jax.models.layers import unstack
from safegrpo_jax.sharding import make_mesh, param_shardings, shard_batch
from safegrpo_jax.types import CacheView, KVCache, VisionFeatures

GRADIENT_TOLERANCE = 1e-4  # relative to the largest of the parameter: sums over the batch in another order
CACHE_TOLERANCE = 1e-5  # the same sums, split differently between prefix and private slots

encode_images = jax.jit(qwen_vl.encode_images, static_argnums=2)
text_hidden = jax.jit(qwen_vl.text_hidden, static_argnums=7)
prefill = jax.jit(qwen_vl.prefill, static_argnums=3)
decode_hidden = jax.jit(qwen_vl.decode_hidden, static_argnums=5)


def prompt_hidden(params, prompts, config):
    features = encode_images(params, prompts.images, config)
    return text_hidden(
        params,
        prompts.prompt_ids,
        prompts.prompt_mask,
        prompts.positions,
        prompts.vision_mask,
        prompts.feature_index,
        features,
        config,
    )


def prompt_logits(params, prompts, config):
    return qwen_vl.logits_from_hidden(params, prompt_hidden(params, prompts, config), config)


@pytest.fixture(scope="module", params=["qwen3_vl", "qwen3_vl_moe", "qwen2_5_vl"])
def random_model(request):
    """A small spread: the q/k norms make attention far from uniform anyway, and rounding is not blown up."""
    config = tiny_config(request.param)
    return config, random_params(config)


def test_cached_decode_equals_full_forward(random_model):
    config, params = random_model
    prompts = example_prompts()
    group_size, num_steps, slots = 2, 4, 6
    b = len(prompts.prompt_ids)
    n = b * group_size
    completion = np.random.default_rng(1).integers(1, 80, (n, num_steps)).astype(np.int32)
    start = np.repeat(prompts.prompt_mask.sum(1) + prompts.rope_delta, group_size).astype(np.int32)
    places = start[:, None] + np.arange(num_steps, dtype=np.int32)

    def joined(rows, tail):
        return np.concatenate([np.repeat(rows, group_size, -2), tail], -1)

    features = encode_images(params, prompts.images, config)
    full = text_hidden(
        params,
        joined(prompts.prompt_ids, completion),
        joined(prompts.prompt_mask, np.ones((n, num_steps), bool)),
        joined(prompts.positions, np.broadcast_to(places, (3, n, num_steps))),
        joined(prompts.vision_mask, np.zeros((n, num_steps), bool)),
        joined(prompts.feature_index, np.zeros((n, num_steps), np.int32)),
        features,
        config,
    )

    last, keys, values = prefill(params, prompts, features, config)
    p = prompts.prompt_ids.shape[1]
    np.testing.assert_allclose(np.repeat(last, group_size, 0), full[:, p - 1], atol=CACHE_TOLERANCE)
    # Private slots start as large rubbish: a slot that is not written yet must not be read.
    k, e = config.text.num_kv_heads, config.text.head_dim
    rubbish = (
        tuple(jnp.full(shape, 1e4) for _ in range(config.text.num_layers))
        for shape in ((n, k, e, slots), (n, k, slots, e))
    )
    cache = KVCache(tuple(layer.swapaxes(2, 3) for layer in keys), values, prompts.prompt_mask, *rubbish)
    seats = jnp.arange(n, dtype=jnp.int32)[None]
    for step in range(num_steps):
        view = CacheView(jnp.int32(step), jnp.full(n, step + 1, jnp.int32), seats, seats)
        hidden, cache = decode_hidden(params, completion[:, step], places[:, step], view, cache, config)
        np.testing.assert_allclose(hidden, full[:, p + step], atol=CACHE_TOLERANCE)


def test_padding_influences_nothing(random_model):
    config, params = random_model
    prompts = example_prompts()
    expected = prompt_hidden(params, prompts, config)
    images = prompts.images
    empty = images.segment_ids == 0
    changed = dataclasses.replace(
        prompts,
        prompt_ids=np.where(prompts.prompt_mask, prompts.prompt_ids, 77),
        positions=np.where(prompts.prompt_mask, prompts.positions, 1000),
        images=dataclasses.replace(images, patches=np.where(empty[..., None], 50.0, images.patches).astype(np.float32)),
    )
    actual = prompt_hidden(params, changed, config)
    assert np.isfinite(actual).all()
    np.testing.assert_array_equal(actual[prompts.prompt_mask], expected[prompts.prompt_mask])


def test_cast_weights_give_the_same_bits(random_model):
    config, params = random_model
    config = dataclasses.replace(config, dtype="bfloat16")
    cast = qwen_vl.cast_weights(params, config)
    prompts = example_prompts()
    np.testing.assert_array_equal(prompt_logits(cast, prompts, config), prompt_logits(params, prompts, config))
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(cast)) / sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert kept < 0.55, "matrices are nearly all there is"


def test_images_of_one_packing_row_are_isolated(random_model):
    config, params = random_model
    images = example_prompts().images
    other = np.where((images.segment_ids == 2)[..., None], images.patches + 3, images.patches)
    before = encode_images(params, images, config)
    after = encode_images(params, dataclasses.replace(images, patches=other), config)
    segment_ids = images.segment_ids.reshape(-1)[::4]
    second, others = segment_ids == 2, segment_ids == 1
    for old, new in zip((before.main, *before.deepstack), (after.main, *after.deepstack), strict=True):
        np.testing.assert_array_equal(old[others], new[others])
        assert np.abs(old[second] - new[second]).max() > 0.01


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_vl_moe", "qwen2_5_vl"])
def test_batch_equals_prompts_alone(family):
    """Packed images and left padding against each prompt by itself, its images in rows of their own, no padding."""
    config = tiny_config(family, scan_layers=True)
    params = random_params(config)
    together = example_prompts()
    expected = prompt_hidden(params, together, config)
    segment_ids = together.images.segment_ids
    for b, places in enumerate([[(0, 1), (0, 2)], [(1, 1)], []]):
        real = together.prompt_mask[b]
        longest = max(((segment_ids[row] == segment).sum() for row, segment in places), default=4)

        def alone(array, places=places, longest=longest):
            rows = np.zeros((max(len(places), 1), longest, *array.shape[2:]), array.dtype)
            for new_row, (row, segment) in enumerate(places):
                values = array[row][segment_ids[row] == segment]
                rows[new_row, : len(values)] = values
            return rows

        images = jax.tree.map(alone, together.images)
        index = np.zeros(real.sum(), np.int32)
        index[together.vision_mask[b][real]] = np.flatnonzero(images.segment_ids.reshape(-1)[::4])
        single = text_hidden(
            params,
            together.prompt_ids[b : b + 1, real],
            together.prompt_mask[b : b + 1, real],
            together.positions[:, b : b + 1, real],
            together.vision_mask[b : b + 1, real],
            index[None],
            encode_images(params, images, config),
            config,
        )
        np.testing.assert_allclose(single[0], expected[b, real], atol=CACHE_TOLERANCE)


def test_execution_choices_change_no_result(random_model):
    """Scanned layers against unrolled ones; gradients of both are compared with torch in test_parity.py."""
    config, params = random_model
    prompts = example_prompts()
    scanned = dataclasses.replace(config, scan_layers=True, remat=True)
    results = []
    for choice in (config, scanned):
        features = encode_images(params, prompts.images, choice)
        results.append((prompt_hidden(params, prompts, choice), prefill(params, prompts, features, choice)))
    assert len(results[1][1][1]) == config.text.num_layers
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=CACHE_TOLERANCE), *results)


def test_unstacking_keeps_layers_and_gradients():
    stack = {"a": jnp.arange(12.0).reshape(3, 4), "b": jnp.arange(3.0)}
    layers = unstack(stack)
    assert len(layers) == 3
    np.testing.assert_array_equal(layers[1]["a"], [4, 5, 6, 7])
    assert layers[1]["b"].shape == ()
    weights = [1.0, 10.0, 100.0]

    def weighted(stack):
        return sum(w * (layer["a"].sum() + layer["b"]) for w, layer in zip(weights, unstack(stack), strict=True))

    gradient = jax.grad(weighted)(stack)
    np.testing.assert_array_equal(gradient["a"], np.repeat(np.array(weights)[:, None], 4, 1))
    np.testing.assert_array_equal(gradient["b"], weights)


MIXED = {"data": 2, "fsdp": 2, "tensor": 2}
MESHES = (
    ("qwen3_vl", {"data": 8}),
    ("qwen3_vl", {"data": 4, "tensor": 2}),
    ("qwen3_vl", MIXED),
    ("qwen3_vl_moe", MIXED),
    ("qwen3_vl_moe", {"data": 4, "expert": 2}),
    ("qwen2_5_vl", MIXED),
)


@pytest.mark.parametrize(
    ("family", "axis_sizes"), MESHES, ids=[f"{family}-{'-'.join(sizes)}" for family, sizes in MESHES]
)
def test_eight_devices_equal_one(family, axis_sizes):
    """Hidden states, and the gradient of their projection on random directions, for every parameter."""
    config = tiny_config(family)
    params = random_params(config)
    config = dataclasses.replace(config, scan_layers=True)  # one block to compile
    base = example_prompts()
    eight = jax.tree.map(lambda leaf: np.tile(leaf, (8,) + (1,) * (leaf.ndim - 1)), base)
    m = base.images.segment_ids.size // 4
    shift = np.repeat(np.arange(8, dtype=np.int32) * m, 3)[:, None]
    eight = dataclasses.replace(
        eight,
        positions=np.tile(base.positions, (1, 8, 1)),
        feature_index=np.where(eight.vision_mask, eight.feature_index + shift, 0),
    )
    directions = np.random.default_rng(0).normal(size=(config.text.width,)).astype(np.float32)

    @jax.jit
    def projection(params, prompts):
        features = qwen_vl.encode_images(params, prompts.images, config)
        tokens = (prompts.prompt_ids, prompts.prompt_mask, prompts.positions, prompts.vision_mask)
        hidden = qwen_vl.text_hidden(params, *tokens, prompts.feature_index, features, config)
        real = prompts.prompt_mask[..., None]
        return jnp.where(real, hidden * directions, 0).sum() / real.sum(), hidden

    with_gradient = jax.jit(jax.value_and_grad(projection, has_aux=True))
    (_, expected), expected_gradient = with_gradient(params, base)
    mesh = make_mesh(axis_sizes)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, param_shardings(params, mesh))
        (_, actual), gradient = with_gradient(placed, shard_batch(eight, mesh))
    assert len(actual.sharding.device_set) == 8
    real = eight.prompt_mask
    np.testing.assert_allclose(actual[real], np.tile(expected, (8, 1, 1))[real], atol=CACHE_TOLERANCE)
    for path, wanted in jax.tree_util.tree_leaves_with_path(expected_gradient):
        found = functools.reduce(lambda node, key: node[key.key], path, gradient)
        largest = np.abs(wanted).max()
        np.testing.assert_allclose(found, wanted, atol=GRADIENT_TOLERANCE * largest, err_msg=str(path))


PUBLISHED_BILLIONS = {  # total and vision, counted from the published configurations
    "qwen3-vl-2b": (2.128, 0.407),
    "qwen3-vl-4b": (4.438, 0.415),
    "qwen3-vl-8b": (8.767, 0.576),
    "qwen3-vl-32b": (33.357, 0.595),
    "qwen3-vl-30b-a3b": (31.071, 0.539),
    "qwen3-vl-235b-a22b": (235.670, 0.576),
    "qwen2.5-vl-3b": (3.755, 0.669),
    "qwen2.5-vl-7b": (8.292, 0.677),
    "qwen2.5-vl-32b": (33.453, 0.689),
    "qwen2.5-vl-72b": (73.411, 0.705),
}


@pytest.mark.parametrize("name", qwen_vl.PUBLISHED_SIZES)
def test_published_parameter_counts(name):
    config = qwen_vl.PUBLISHED_SIZES[name]
    shapes = jax.eval_shape(lambda key: qwen_vl.init_params(config, key), jax.random.key(0))
    total, vision = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (shapes, shapes["vision"]))
    assert (round(total / 1e9, 3), round(vision / 1e9, 3)) == PUBLISHED_BILLIONS[name]
    assert hf_config.config_from_hf(hf_config.config_to_hf(config)) == config


def test_initial_spread():
    key = jax.random.key(0, impl="unsafe_rbg")  # a third of the compile time of the default generator
    params = jax.jit(qwen_vl.init_params, static_argnums=0)(tiny_config(), key)
    text, vision = params["text"], params["vision"]
    gate, fc1 = text["layers"]["mlp"]["gate"]["kernel"], vision["blocks"]["stage_1"]["fc1"]["kernel"]
    for leaf, std in ((text["embed"], 0.02), (gate, gate.shape[-2] ** -0.5), (fc1, fc1.shape[-2] ** -0.5)):
        assert abs(float(leaf.std()) / std - 1) < 0.05  # thousands of draws each
    first, second = text["deepstack_layers"]["q"]["kernel"]  # layers are drawn independently
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.1
    assert (vision["merger"]["norm"]["scale"] == 1).all() and (vision["patch_embed"]["bias"] == 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float64"}, "float64"),
        ({"attention": "flash"}, "flash"),
        ({"image_token_id": 100}, "image_token_id"),
    ],
)
def test_config_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(tiny_config(), **change)


def test_features_are_spliced_by_index(random_model):
    """The feature index, not the order of appearance, says which feature a token takes."""
    config, params = random_model
    prompts = example_prompts()
    features = encode_images(params, prompts.images, config)
    order = np.random.default_rng(0).permutation(len(features.main))
    shuffled = VisionFeatures(main=features.main[order], deepstack=features.deepstack[:, order])
    index = np.where(prompts.vision_mask, np.argsort(order)[prompts.feature_index], 0).astype(np.int32)
    arguments = (prompts.prompt_ids, prompts.prompt_mask, prompts.positions, prompts.vision_mask)
    expected = text_hidden(params, *arguments, prompts.feature_index, features, config)
    np.testing.assert_array_equal(text_hidden(params, *arguments, index, shuffled, config), expected)
