"""Every module of the three families against its twin in transformers, on the inputs that the twin got.

Each transformers model runs once; what goes in and comes out of its modules is recorded, and each of our modules is
given the recorded input with the same weights. Only the tower and the positions start from our own inputs.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from qwen_tiny import example_prompts, real_patches, tiny_config, torch_inputs, torch_model

from safegrpo_jax.models import hf_weights, qwen_vl
from safegrpo_jax.models.attention import attend
from safegrpo_jax.models.decoder import TextDecoder
from safegrpo_jax.models.experts import route
from safegrpo_jax.models.layers import unstack
from safegrpo_jax.models.rope import text_angles, vision_angles
from safegrpo_jax.models.vision import ROPE_THETA
from safegrpo_jax.models.windowed_vision import window_ids

torch = pytest.importorskip("torch")

MODULE_TOLERANCE = 1e-5  # float32 sums in another order, relative to the largest output
GRIDS = [[(10, 14), (8, 8)], [(2, 10)]]  # windows cut at both sides, at none, and a grid of two rows


@dataclasses.dataclass(frozen=True)
class Twins:
    """One model twice, and `calls[module name] = (positional arguments, keyword arguments, output)` of theirs."""

    config: qwen_vl.QwenVLConfig
    params: Any
    prompts: Any
    vision: nnx.Module
    text: nnx.Module
    calls: dict[str, tuple]

    def text_block(self, layer):
        stacks = [stack for stack in (self.text.deepstack_layers, self.text.layers) if stack is not None]
        return [block for stack in stacks for block in unstack(stack)][layer]

    def vision_block(self, layer):
        return [block for stage in self.vision.blocks.values() for block in unstack(stage)][layer]

    def vision_call(self, name):
        return self.calls[f"model.visual.{name}"]

    def text_call(self, name):
        return self.calls[f"model.language_model.{name}"]


@pytest.fixture(scope="module", params=["qwen3_vl", "qwen3_vl_moe", "qwen2_5_vl"])
def twins(request, tmp_path_factory):
    config = tiny_config(request.param)
    model = torch_model(config, seed=3)
    folder = tmp_path_factory.mktemp("modules") / "model"
    model.save_pretrained(folder)
    params = hf_weights.load(folder, config)
    tower = nnx.eval_shape(lambda: config.vision.make_tower(nnx.Rngs(0)))
    decoder = nnx.eval_shape(lambda: TextDecoder(config.text, len(config.vision.deepstack_layers), nnx.Rngs(0)))
    calls = {}
    for name, module in model.named_modules():
        module.register_forward_hook(
            lambda _, arguments, keywords, output, name=name: calls.update({name: (arguments, keywords, output)}),
            with_kwargs=True,
        )
    prompts = example_prompts(GRIDS)
    with torch.no_grad():
        model(**torch_inputs(prompts, GRIDS))
    vision = nnx.merge(nnx.graphdef(tower), params["vision"])
    return Twins(config, params, prompts, vision, nnx.merge(nnx.graphdef(decoder), params["text"]), calls)


def assert_close(actual, expected):
    expected = np.asarray(expected)
    assert np.shape(actual) == expected.shape
    np.testing.assert_allclose(actual, expected, atol=MODULE_TOLERANCE * np.abs(expected).max(), rtol=0)


def half(embeddings):
    """Theirs hold the angles of both halves of the channels, ours one."""
    return [np.asarray(values)[..., : values.shape[-1] // 2] for values in embeddings]


def vision_segments(call):
    """Segment ids [1 i] from the cumulative lengths that their block got."""
    lengths = np.diff(np.asarray(call[1]["cu_seqlens"]))
    return np.repeat(np.arange(1, len(lengths) + 1, dtype=np.int32), lengths)[None]


def test_patch_embedding(twins):
    patches = real_patches(twins.prompts.images)
    assert_close(twins.vision.patch_embed(patches), twins.vision_call("patch_embed")[2])


def test_vision_rotation_and_segments(twins):
    """Angles, windows and whole images. Theirs sorts patches by window, which is a stable sort by our window ids."""
    images = twins.prompts.images
    windowed = twins.config.family == "qwen2_5_vl"
    segments, real = images.segment_ids, images.segment_ids > 0
    segments = np.where(real, segments + 10 * np.arange(len(segments), dtype=np.int32)[:, None], 0)
    ids = np.asarray(window_ids(segments, images.patch_pos, 8)) if windowed else segments
    order = np.argsort(ids[real], kind="stable")
    angles = vision_angles(images.patch_pos, twins.config.vision.head_dim, ROPE_THETA)[real][order]
    cos, sin = half(twins.vision_call("blocks.0")[1]["position_embeddings"])
    assert_close(jnp.cos(angles), cos)
    assert_close(jnp.sin(angles), sin)
    for layer, ours in ((0, ids[real]), (1, segments[real])):
        theirs = vision_segments(twins.vision_call(f"blocks.{layer}"))[0]
        np.testing.assert_array_equal(np.unique(ours[order], return_inverse=True)[1] + 1, theirs)


@pytest.mark.parametrize("layer", [0, 1], ids=["windowed", "full"])
def test_vision_block(twins, layer):
    call = twins.vision_call(f"blocks.{layer}")
    cos, sin = half(call[1]["position_embeddings"])
    block, x = twins.vision_block(layer), np.asarray(call[0][0])
    actual = jax.jit(lambda *arguments: block(*arguments, twins.config.execution))(
        x[None], cos[None], sin[None], vision_segments(call)
    )
    assert_close(actual[0], call[2])
    assert np.abs(np.asarray(call[2]) - x).max() > 0.1  # the block does something


@pytest.mark.parametrize("name", ["norm1", "norm2"])
def test_vision_norms(twins, name):
    (x, *_), _, expected = twins.vision_call(f"blocks.1.{name}")
    assert_close(getattr(twins.vision_block(1), name)(np.asarray(x)), expected)


def test_vision_mlp(twins):
    (x, *_), _, expected = twins.vision_call("blocks.1.mlp")
    block, x = twins.vision_block(1), np.asarray(x)
    if twins.config.family == "qwen2_5_vl":
        actual = block.mlp(x)
    else:
        actual = block.fc2(jax.nn.gelu(block.fc1(x), approximate=True))
    assert_close(actual, expected)


def test_mergers(twins):
    calls = {"merger": twins.vision.merger}
    if twins.config.family != "qwen2_5_vl":
        mergers = unstack(twins.vision.deepstack_mergers)
        calls |= {f"deepstack_merger_list.{tap}": merger for tap, merger in enumerate(mergers)}
        assert len(calls) == 3
    for name, merger in calls.items():
        (x, *_), _, expected = twins.vision_call(name)
        assert_close(merger(np.asarray(x)[None]), expected)


def test_vision_tower(twins):
    images = twins.prompts.images
    expected = twins.calls["model.visual"][2]
    features = jax.jit(qwen_vl.encode_images, static_argnums=2)(twins.params, images, twins.config)
    real = images.segment_ids.reshape(-1)[::4] > 0
    assert_close(features.main[real], torch.cat(expected.pooler_output))  # cut by image, as the taps are
    tapped = [] if twins.config.family == "qwen2_5_vl" else expected.deepstack_features
    assert len(features.deepstack) == len(tapped) == len(twins.config.vision.deepstack_layers)
    for actual, feature in zip(features.deepstack, tapped, strict=True):
        assert_close(actual[real], torch.cat(feature))


def test_text_rotation(twins):
    """Their positions are of their own making: rows, columns and times of ours are checked with them."""
    text, real = twins.config.text, twins.prompts.prompt_mask
    cos, sin = half(twins.text_call("rotary_emb")[2])
    angles = text_angles(twins.prompts.positions, text.head_dim, text.rope_theta, text.mrope_axes)
    assert_close(jnp.cos(angles)[real], cos[real])
    assert_close(jnp.sin(angles)[real], sin[real])
    assert len({tuple(place) for place in twins.prompts.positions[:, 0].T}) > 40  # the axes differ


@pytest.mark.parametrize("name", ["input_norm", "mlp_norm", "q_norm", "k_norm"])
def test_text_norms(twins, name):
    theirs = {"input_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    norm = getattr(twins.text_block(1), name)
    if norm is None:
        assert twins.config.family == "qwen2_5_vl"
        return
    prefix = "layers.1." if name in theirs else "layers.1.self_attn."
    (x, *_), _, expected = twins.text_call(prefix + theirs.get(name, name))
    assert_close(norm(np.asarray(x)), expected)


@pytest.mark.parametrize("layer", [0, 3], ids=["tapped", "last"])
def test_text_block_and_its_attention(twins, layer):
    (x, *_), keywords, expected = twins.text_call(f"layers.{layer}")
    block, real = twins.text_block(layer), twins.prompts.prompt_mask
    cos, sin = half(keywords["position_embeddings"])

    @jax.jit
    def run(x):
        query, keys, values = block.heads(x, cos, sin)
        segments = real.astype(np.int32)
        attended = attend(query, keys, values, segments, causal=True, implementation="reference")
        return block.o(attended.swapaxes(1, 2)), block.finish(x, attended, twins.config.execution)

    attention, output = run(np.asarray(x))
    assert_close(attention[real], np.asarray(twins.text_call(f"layers.{layer}.self_attn")[2][0])[real])
    assert_close(output[real], np.asarray(expected)[real])


def test_text_mlp_or_experts(twins):
    (x, *_), _, expected = twins.text_call("layers.1.mlp")
    x = np.asarray(x)
    choice = ("ragged_dot",) if twins.config.text.num_experts else ()
    assert_close(twins.text_block(1).mlp(x.reshape(-1, x.shape[-1]), *choice).reshape(x.shape), expected)


def test_router(twins):
    if twins.config.family != "qwen3_vl_moe":
        assert not twins.config.text.num_experts
        return
    (x, *_), _, (logits, weights, experts) = twins.text_call("layers.1.mlp.gate")
    ours = twins.text_block(1).mlp.router(np.asarray(x))
    assert_close(ours, logits)
    our_weights, our_experts = route(ours, twins.config.text.experts_per_token)
    np.testing.assert_array_equal(our_experts, experts)
    assert_close(our_weights, weights)


def test_embedding_final_norm_and_head(twins):
    real = twins.prompts.prompt_mask
    embedded = twins.text_call("embed_tokens")[2]
    assert_close(twins.text.embed_tokens(twins.prompts.prompt_ids, twins.config.execution), embedded)
    (x, *_), _, expected = twins.text_call("norm")
    assert_close(twins.text.norm(np.asarray(x)), expected)
    (x, *_), _, expected = twins.calls["lm_head"]
    assert_close(twins.text.logits(np.asarray(x))[real], np.asarray(expected)[real])
