import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from safegrpo_jax.grpo.logps import token_logps

FLOAT32_ROUNDING = 2e-6  # of a log-softmax over 50 logits of order 1
GRADIENT_ROUNDING = 1e-5  # relative; sums in another order

N, C, D, V = 3, 7, 6, 50


@pytest.fixture
def case():
    rng = np.random.default_rng(2)
    banned = np.zeros(V, bool)
    banned[[0, 17, 49]] = True
    return {
        "hidden": rng.normal(size=(N, C, D)).astype(np.float32),
        "head": rng.normal(size=(D, V)).astype(np.float32),
        "target_ids": rng.integers(1, 17, (N, C)).astype(np.int32),
        "mask": np.arange(C) < np.array([[7], [3], [0]]),
        "banned": banned,
    }


def run(case, temperature, chunk_size, head=None, hidden=None):
    head = case["head"] if head is None else head
    hidden = case["hidden"] if hidden is None else hidden
    args = (hidden, case["target_ids"], case["mask"], case["banned"])
    return token_logps(lambda states: states @ head, *args, temperature, chunk_size)


def float64_reference(case, temperature):
    logits = (case["hidden"].astype(np.float64) @ case["head"].astype(np.float64)) / temperature
    probabilities = np.where(case["banned"], 0.0, np.exp(logits))
    probabilities /= probabilities.sum(-1, keepdims=True)
    logps = np.log(np.take_along_axis(probabilities, case["target_ids"][..., None], -1)[..., 0])
    entropy = -np.where(probabilities > 0, probabilities * np.log(np.maximum(probabilities, 1e-300)), 0).sum(-1)
    return np.where(case["mask"], logps, 0), np.where(case["mask"], entropy, 0)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk_size", [0, 1, 3, 7, 16])
def test_agrees_with_float64(case, temperature, chunk_size):
    logps, entropy = jax.jit(lambda: run(case, temperature, chunk_size))()
    expected_logps, expected_entropy = float64_reference(case, temperature)
    np.testing.assert_allclose(logps, expected_logps, atol=FLOAT32_ROUNDING * 5)
    np.testing.assert_allclose(entropy, expected_entropy, atol=FLOAT32_ROUNDING * 5)
    assert np.all(np.asarray(logps)[~case["mask"]] == 0) and np.all(np.asarray(entropy)[~case["mask"]] == 0)


def test_gradients_do_not_depend_on_chunks_and_are_finite(case):
    def total(head, hidden, chunk_size):
        logps, entropy = run(case, 0.9, chunk_size, head, hidden)
        return jnp.sum(jnp.sin(logps)) + 0.3 * jnp.sum(entropy**2)

    grad = jax.jit(jax.grad(total, argnums=(0, 1)), static_argnums=2)
    whole = grad(case["head"], case["hidden"], 0)
    for chunk_size in (2, 7):
        for expected, chunked in zip(whole, grad(case["head"], case["hidden"], chunk_size), strict=True):
            np.testing.assert_allclose(chunked, expected, rtol=GRADIENT_ROUNDING, atol=1e-6)
    assert np.all(np.isfinite(whole[0]))
    assert np.all(np.asarray(whole[0])[:, case["banned"]] == 0), "a banned id must not move the head"
    assert np.all(np.asarray(whole[1])[~case["mask"]] == 0)


def test_gradient_of_the_entropy_by_finite_differences(case):
    def entropy_sum(hidden):
        return jnp.sum(run(case, 1.0, 3, hidden=hidden)[1])

    direction = np.random.default_rng(3).normal(size=case["hidden"].shape).astype(np.float32)
    step = 1e-2
    slope = (entropy_sum(case["hidden"] + step * direction) - entropy_sum(case["hidden"] - step * direction)) / (
        2 * step
    )
    analytic = jnp.vdot(jax.grad(entropy_sum)(case["hidden"]), direction)
    np.testing.assert_allclose(analytic, slope, rtol=5e-3)  # cubic error of the step and float32 differences


def test_chunks_never_hold_all_logits():
    n, c, v = 4, 48, 977

    def total(head, hidden, chunk_size):
        ids, mask = jnp.zeros((n, c), jnp.int32), jnp.ones((n, c), bool)
        return jnp.sum(token_logps(lambda x: x @ head, hidden, ids, mask, jnp.zeros(v, bool), 1.0, chunk_size)[0])

    def largest_buffer(chunk_size):
        program = jax.jit(jax.value_and_grad(total), static_argnums=2).lower(
            jnp.zeros((8, v)), jnp.zeros((n, c, 8)), chunk_size
        )
        shapes = re.findall(r"f32\[([0-9,]+)\]", program.compile().as_text())
        return max(np.prod([int(size) for size in shape.split(",")]) for shape in shapes)

    assert largest_buffer(0) == n * c * v
    assert largest_buffer(8) == n * 8 * v


@pytest.mark.parametrize(("temperature", "chunk_size"), [(0.0, 0), (-1.0, 0), (1.0, -1)])
def test_bad_settings_are_refused(case, temperature, chunk_size):
    with pytest.raises(ValueError, match="temperature|chunk_size"):
        run(case, temperature, chunk_size)
