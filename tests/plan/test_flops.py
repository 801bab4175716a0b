"""Operations counted from traced programs against formulas, on a Qwen3-VL-like model: the passes of training and a
decode step; kernels and grouped matmuls alone."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from safegrpo_jax.models import qwen_vl
from safegrpo_jax.models.experts import ExpertMLP
from safegrpo_jax.models.splash import attend_splash
from safegrpo_jax.plan.flops import count_flops
from safegrpo_jax.sharding import make_mesh
from safegrpo_jax.types import VisionFeatures

NEAR = 0.03  # of the analytic count, which leaves out everything but matmuls of weights and attention


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def text_flops(model, rows, length):
    """Forward operations of the text decoder over whole rows, head not included. The reference attention computes all
    pairs."""
    text = model.text
    per_token = (
        text.width * text.head_dim * (2 * text.num_heads + 2 * text.num_kv_heads) + 3 * text.width * text.mlp_width
    )
    return text.num_layers * rows * (2 * length * per_token + 4 * length**2 * text.num_heads * text.head_dim)


@pytest.fixture(scope="module")
def model():
    published = qwen_vl.PUBLISHED_SIZES["qwen3-vl-8b"]
    text = dataclasses.replace(published.text, num_layers=7)
    return dataclasses.replace(published, text=text, dtype="bfloat16", scan_layers=True)


def forward(model, rows, length):
    params = jax.eval_shape(lambda: qwen_vl.init_params(model, jax.random.key(0)))
    width = model.text.width
    features = jax.eval_shape(lambda: VisionFeatures(jnp.zeros((16, width)), jnp.zeros((3, 16, width))))
    tokens = (
        shape(rows, length, dtype=jnp.int32),
        shape(rows, length, dtype=bool),
        shape(3, rows, length, dtype=jnp.int32),
        shape(rows, length, dtype=bool),
        shape(rows, length, dtype=jnp.int32),
    )

    def loss(params, tokens, features):
        return qwen_vl.text_hidden(params, *tokens, features, model).astype(jnp.float32).sum()

    return loss, (params, tokens, features)


def test_forward_of_a_scanned_decoder(model):
    function, arguments = forward(model, 2, 1024)
    counted = count_flops(jax.jit(function).trace(*arguments).jaxpr)
    assert counted == pytest.approx(text_flops(model, 2, 1024), rel=NEAR)


@pytest.mark.parametrize("remat", [False, True])
def test_gradient_counts_what_is_computed_again(model, remat):
    function, arguments = forward(dataclasses.replace(model, remat=remat), 2, 1024)
    counted = count_flops(jax.jit(jax.grad(function)).trace(*arguments).jaxpr)
    # A block is computed again up to its last matmul: no gradient needs what `down` gives.
    text = model.text
    down = text.num_layers * 2 * 2 * 1024 * text.width * text.mlp_width
    expected = 4 * text_flops(model, 2, 1024) - down if remat else 3 * text_flops(model, 2, 1024)
    assert counted == pytest.approx(expected, rel=NEAR)


def test_microbatches_multiply(model):
    function, arguments = forward(model, 2, 256)

    def accumulate(*arguments):
        return jax.lax.scan(lambda total, _: (total + function(*arguments), None), 0.0, None, length=5)[0]

    once, five = (count_flops(jax.jit(f).trace(*arguments).jaxpr) for f in (function, accumulate))
    assert five == 5 * once


def test_a_loop_of_unknown_turns():
    def search(x):
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 1e6, lambda x: x @ x, x)

    jaxpr = jax.jit(search).trace(shape(64, 64)).jaxpr
    assert count_flops(jaxpr) == 2 * 64**3
    assert count_flops(jaxpr, turns=10) == 20 * 64**3


def test_splash_kernels_by_blocks():
    heads, length, head_dim = 4, 4096, 128
    q = shape(2, heads, length, head_dim, dtype=jnp.bfloat16)
    ids = shape(2, length, dtype=jnp.int32)

    def count(causal):
        def loss(q, k, v, ids):
            return attend_splash(q, k, v, ids, causal, False).astype(jnp.float32).sum()

        return count_flops(jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(q, q, q, ids).jaxpr)

    pair = 2 * 2 * heads * head_dim  # of one matmul, both rows
    # The gradient also contracts outputs with their gradients, a matmul of one column.
    assert count(False) == pytest.approx((2 + 4 + 3) * pair * length**2, rel=1e-3)
    assert count(True) == pytest.approx((2 + 4 + 3) * pair * length * (length + 1024) // 2, rel=1e-3)


def test_grouped_matmuls_do_the_work_of_one_expert_a_row():
    rows, width, out, groups = 64, 16, 8, 4
    arguments = (shape(rows, width), shape(groups, width, out), shape(groups, dtype=jnp.int32))

    def loss(*arguments):
        return jax.lax.ragged_dot(*arguments).sum()

    assert count_flops(jax.jit(loss).trace(*arguments).jaxpr) == 2 * rows * width * out
    both = jax.jit(jax.grad(lambda *a: loss(*a) ** 2, argnums=(0, 1))).trace(*arguments).jaxpr
    assert count_flops(both) == 3 * 2 * rows * width * out


def test_a_shard_map_counts_all_its_shards():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.PartitionSpec("data")

    def product(x, w):
        return jax.shard_map(lambda x, w: x @ w, in_specs=(rows, jax.sharding.PartitionSpec()), out_specs=rows)(x, w)

    with jax.set_mesh(mesh):
        jaxpr = jax.jit(product).trace(shape(64, 32), shape(32, 16)).jaxpr
    assert count_flops(jaxpr) == 2 * 64 * 32 * 16


@pytest.mark.parametrize("axis_sizes", [{"data": 8}, {"fsdp": 2, "expert": 2, "tensor": 2}])
def test_experts_count_the_same_by_kernel_and_by_ragged_dot(axis_sizes):
    """Forward and gradients; rows of a device in whole tiles, which the kernel would round up to."""
    graph, params = nnx.split(nnx.eval_shape(lambda: ExpertMLP(64, 48, 8, 4, nnx.Rngs(0))))

    def loss(params, x, implementation):
        return nnx.merge(graph, params)(x, implementation).sum()

    def counted(implementation):
        gradient = jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)
        return count_flops(gradient.trace(params, shape(2048, 64), implementation).jaxpr)

    alone = counted("ragged_dot")
    assert alone == pytest.approx(3 * 2 * 2048 * (64 * 8 + 4 * 3 * 64 * 48), rel=NEAR)
    with jax.set_mesh(make_mesh(axis_sizes)):
        assert counted("megablox") == pytest.approx(alone, rel=NEAR)
