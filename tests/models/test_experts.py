"""Grouped matmuls against a loop, and the mixture's kernel on a mesh against jax's own grouped matmul."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from safegrpo_jax.models.experts import ExpertMLP
from safegrpo_jax.models.grouped import grouped_matmul
from safegrpo_jax.sharding import make_mesh

TOLERANCE = 1e-5  # float32 sums of a few dozen terms of unit size
COUNTS = np.array([3, 0, 250, 47], np.int32)  # an expert without rows, one over two tiles of rows


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32) / np.float32(shape[-2]) ** 0.5


@pytest.mark.parametrize(
    ("implementation", "chosen"),
    [("ragged_dot", slice(0, 4)), ("megablox_interpret", slice(0, 4)), ("megablox_interpret", slice(1, 3))],
    ids=["ragged_dot", "megablox", "megablox-some"],
)
def test_each_row_meets_the_kernel_of_its_expert(implementation, chosen):
    rows, kernels, weights = draw(300, 24), draw(4, 24, 40, seed=1), draw(300, 40, seed=2)
    expert = np.repeat(np.arange(4), COUNTS)
    known = (expert >= chosen.start) & (expert < chosen.stop)

    def definition(rows, kernels):
        return jnp.where(known[:, None], jnp.einsum("rd,rdf->rf", rows, kernels[expert]), 0)

    def grouped(rows, kernels):
        return grouped_matmul(rows, kernels[chosen], COUNTS, jnp.int32(chosen.start), implementation)

    def with_gradients(function):
        def weighted(rows, kernels):
            y = function(rows, kernels)
            return (y * weights).sum(), y

        return jax.jit(jax.value_and_grad(weighted, (0, 1), has_aux=True))(rows, kernels)

    compare = functools.partial(np.testing.assert_allclose, atol=TOLERANCE)
    (_, y), gradients = with_gradients(grouped)
    (_, expected), expected_gradients = with_gradients(definition)
    jax.tree.map(compare, (y, gradients), (expected, expected_gradients))


def test_the_kernel_on_a_mesh_equals_one_device():
    """Tokens, experts and widths over eight devices: outputs, and gradients of tokens and of all parameters."""
    graph, params = nnx.split(ExpertMLP(24, 16, 8, 3, nnx.Rngs(0)))
    x, weights = draw(64, 24, seed=1) * 24**0.5, draw(64, 24, seed=2)

    def weighted(params, x, implementation):
        y = nnx.merge(graph, params)(x, implementation)
        return (y * weights).sum(), y

    run = jax.jit(jax.value_and_grad(weighted, (0, 1), has_aux=True), static_argnums=2)
    (_, expected), expected_gradients = run(params, x, "ragged_dot")
    with jax.set_mesh(make_mesh({"fsdp": 2, "expert": 2, "tensor": 2})):
        (_, actual), gradients = run(params, x, "megablox_interpret")
    assert np.abs(expected).max() > 0.1
    compare = functools.partial(np.testing.assert_allclose, atol=TOLERANCE)
    jax.tree.map(compare, (actual, gradients), (expected, expected_gradients))
    with pytest.raises(ValueError, match="experts implementation 'dense' is not one of"):
        nnx.merge(graph, params)(x, "dense")
