import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from safegrpo_jax.grpo.optimizer import OptimizerConfig, last_learning_rate, learning_rate, make_optimizer

FLOAT32_ROUNDING = 1e-6  # relative


def run(config, params, gradients, mask=None):
    optimizer = make_optimizer(config, mask)
    state = optimizer.init(params)
    for grads in gradients:
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def random_tree(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {
        "vision": {"kernel": jnp.asarray(rng.normal(size=(3, 2)) * scale, jnp.float32)},
        "text": {"kernel": jnp.asarray(rng.normal(size=(4,)) * scale, jnp.float32)},
    }


def float64_adamw(config, params, gradients):
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    mean = jax.tree.map(np.zeros_like, params)
    square = jax.tree.map(np.zeros_like, params)
    for step, grads in enumerate(gradients, start=1):
        grads = jax.tree.map(lambda g: np.asarray(g, np.float64), grads)
        norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(grads)))
        grads = jax.tree.map(lambda g, norm=norm: g * min(1, config.clip_norm / norm), grads)
        mean = jax.tree.map(lambda m, g: config.beta1 * m + (1 - config.beta1) * g, mean, grads)
        square = jax.tree.map(lambda s, g: config.beta2 * s + (1 - config.beta2) * g**2, square, grads)

        def stepped(p, m, s, step=step):
            direction = m / (1 - config.beta1**step) / (np.sqrt(s / (1 - config.beta2**step)) + config.epsilon)
            return p - config.learning_rate * (direction + config.weight_decay * p)

        params = jax.tree.map(stepped, params, mean, square)
    return params


def test_agrees_with_float64_adamw_and_clipping():
    config = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1, clip_norm=1.0)
    gradients = [random_tree(seed, scale) for seed, scale in [(1, 0.1), (2, 5.0), (3, 0.5)]]
    params, _ = run(config, random_tree(0), gradients)
    expected = float64_adamw(config, random_tree(0), gradients)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), params, expected)


def test_agrees_with_torch():
    torch = pytest.importorskip("torch")
    config = OptimizerConfig(learning_rate=1e-2)
    gradients = [random_tree(seed, 2.0) for seed in (1, 2, 3)]
    params, _ = run(config, random_tree(0), gradients)
    tensors = [torch.nn.Parameter(torch.tensor(np.asarray(leaf))) for leaf in jax.tree.leaves(random_tree(0))]
    optimizer = torch.optim.AdamW(tensors, lr=1e-2, weight_decay=0.01)
    for grads in gradients:
        for tensor, gradient in zip(tensors, jax.tree.leaves(grads), strict=True):
            tensor.grad = torch.tensor(np.asarray(gradient))
        torch.nn.utils.clip_grad_norm_(tensors, 1.0)
        optimizer.step()
    for leaf, tensor in zip(jax.tree.leaves(params), tensors, strict=True):
        # torch divides by norm + 1e-6 when it clips, which Adam's scale invariance hides but for epsilon
        np.testing.assert_allclose(leaf, tensor.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_frozen_leaves_do_not_move_hold_no_moments_and_do_not_count_in_the_norm():
    mask = {"vision": {"kernel": False}, "text": {"kernel": True}}
    config = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1)
    huge = random_tree(1) | {"vision": {"kernel": jnp.full((3, 2), 1e6)}}
    absent = random_tree(1) | {"vision": {"kernel": None}}
    params, state = run(config, random_tree(0), [huge], mask)
    np.testing.assert_array_equal(params["vision"]["kernel"], random_tree(0)["vision"]["kernel"])
    alone, _ = run(config, {"text": random_tree(0)["text"]}, [{"text": random_tree(1)["text"]}])
    np.testing.assert_array_equal(params["text"]["kernel"], alone["text"]["kernel"])
    assert all(leaf.shape != (3, 2) for leaf in jax.tree.leaves(state))
    from_absent, _ = run(config, random_tree(0), [absent], mask)
    jax.tree.map(np.testing.assert_array_equal, from_absent, params)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {0: 1.0, 99: 1.0}),
        ({"warmup_steps": 3}, {0: 0.25, 1: 0.5, 2: 0.75, 3: 1.0, 50: 1.0}),
        ({"schedule": "linear", "total_steps": 10}, {0: 1.0, 5: 0.5, 10: 0.0, 20: 0.0}),
        (
            {"schedule": "linear", "warmup_steps": 4, "total_steps": 8, "final_ratio": 0.2},
            {0: 0.2, 4: 1.0, 6: 0.6, 8: 0.2, 9: 0.2},
        ),
        (
            {"schedule": "cosine", "total_steps": 10, "final_ratio": 0.1},
            {0: 1.0, 5: 0.55, 10: 0.1, 12: 0.1},
        ),
        ({"schedule": "linear", "total_steps": 2, "updates_per_step": 4}, {3: 1.0, 4: 0.5, 7: 0.5, 8: 0.0}),
    ],
)
def test_schedules(settings, expected):
    config = OptimizerConfig(learning_rate=3.0, **settings)
    for step, fraction in expected.items():
        np.testing.assert_allclose(learning_rate(config, step), 3 * fraction, atol=1e-6)


def test_the_rate_used_is_in_the_state():
    config = OptimizerConfig(learning_rate=1.0, schedule="linear", total_steps=4, clip_norm=0.0)
    _, state = run(config, random_tree(0), [random_tree(1)] * 3)
    np.testing.assert_allclose(last_learning_rate(state), learning_rate(config, 2))
    with pytest.raises(ValueError, match="make_optimizer"):
        last_learning_rate(optax.sgd(0.1).init(random_tree(0)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "step"}, "'step'.*constant, linear, cosine"),
        ({"schedule": "cosine"}, "total_steps > warmup_steps"),
        ({"updates_per_step": 0}, "updates_per_step"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**settings)


def test_adafactor_agrees_with_float64():
    """A factored matrix and a vector, by the formulas of the paper with optax's decay 1 - t^-0.8."""
    rng = np.random.default_rng(7)
    shapes = {"matrix": (130, 140), "vector": (5,)}
    params = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    gradients = [{name: rng.normal(size=shape) for name, shape in shapes.items()} for _ in range(3)]
    config = OptimizerConfig(method="adafactor", learning_rate=1e-2, weight_decay=0.1, clip_norm=0.0)

    def as_float32(tree):
        return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)

    actual, state = run(config, as_float32(params), [as_float32(grads) for grads in gradients])
    rows, columns, squares = np.zeros(130), np.zeros(140), np.zeros(5)
    for step, grads in enumerate(gradients, start=1):
        decay = 1 - step**-0.8
        square = grads["matrix"] ** 2
        rows = decay * rows + (1 - decay) * square.mean(1)
        columns = decay * columns + (1 - decay) * square.mean(0)
        squares = decay * squares + (1 - decay) * grads["vector"] ** 2
        updates = {
            "matrix": grads["matrix"] / np.sqrt(np.outer(rows / rows.mean(), columns)),
            "vector": grads["vector"] / np.sqrt(squares),
        }
        for name, update in updates.items():
            update = update / max(1.0, np.sqrt((update**2).mean()))
            params[name] = params[name] - config.learning_rate * (update + config.weight_decay * params[name])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), actual, params)
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) < 0.02 * 130 * 140
    assert last_learning_rate(state) == jnp.float32(1e-2)


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="method is 'sgd'; use one of adamw, adafactor"):
        OptimizerConfig(method="sgd")
