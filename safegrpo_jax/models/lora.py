"""Low-rank adapters: y = W x + (alpha / rank) B A x, on chosen projections, with W frozen.

An adapted projection keeps its place and its kernel in the parameter tree and gains the leaves `lora_a` and `lora_b`,
so that scanned stacks, shardings and checkpoints treat adapters like any other parameter. B starts at zero: adapted
parameters are the base model until the first update, and without their adapters they are the reference policy.
Source: LoRA (arXiv 2106.09685); numbers tested against google/qwix, whose adapters are made by calling a mutable model
once, which stacks of layers cannot be.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from safegrpo_jax.models.layers import Linear
from safegrpo_jax.types import Array, ArrayTree, Params

ADAPTER_LEAVES = ("lora_a", "lora_b")
BLOCK_STACKS = ("layers", "deepstack_layers", "blocks")  # only what is in a transformer block gets adapters


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """`rank` 0 is off. Projections are named as in the parameter tree: text q k v o gate up down, vision qkv proj
    fc1 fc2 (Qwen3-VL) or qkv proj gate up down (Qwen2.5-VL). Experts have no adapters.

    Raises:
      ValueError: a negative rank, or a rank without projections.
    """

    rank: int = 0
    alpha: float = 16.0
    projections: tuple[str, ...] = ("q", "k", "v", "o")
    vision_projections: tuple[str, ...] = ()

    def __post_init__(self):
        if self.rank < 0:
            raise ValueError(f"lora rank is {self.rank}; use 0 for none, or a positive rank")
        if self.rank and not (self.projections or self.vision_projections):
            raise ValueError("lora rank is set without projections; name some in projections or vision_projections")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class LoraLinear(Linear):
    """A linear map, or a stack of them, with its adapter."""

    def __init__(self, base: Linear, config: LoraConfig, rngs: nnx.Rngs):
        self.num_in_axes, self.num_out_axes = base.num_in_axes, base.num_out_axes
        self.kernel, self.bias = base.kernel, base.bias
        self.scale = config.scale
        shape = base.kernel.shape
        stack, in_shape = shape[: -self.num_in_axes - self.num_out_axes], shape[: -self.num_out_axes]
        spread = math.prod(in_shape[len(stack) :]) ** -0.5
        self.lora_a = nnx.Param(spread * jax.random.normal(rngs.params(), (*in_shape, config.rank)))
        self.lora_b = nnx.Param(jnp.zeros((*stack, config.rank, *shape[-self.num_out_axes :])))

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        low = jnp.tensordot(x, self.lora_a[...].astype(x.dtype), self.num_in_axes)
        return super().__call__(x) + self.scale * jnp.tensordot(low, self.lora_b[...].astype(x.dtype), 1)


def adapt(tower: nnx.Module, projections: tuple[str, ...], config: LoraConfig, rngs: nnx.Rngs) -> None:
    """Gives every projection of the tower's blocks with one of these names an adapter, in place.

    Raises:
      ValueError: a name that no projection of the tower has.
    """
    modules = dict(nnx.iter_modules(tower))
    linears = {
        path: module for path, module in modules.items() if isinstance(module, Linear) and path[0] in BLOCK_STACKS
    }
    known = sorted({path[-1] for path in linears})
    for name in projections:
        if name not in known:
            raise ValueError(f"lora projection {name!r} does not exist in this model; choose from {', '.join(known)}")
    for path, linear in linears.items():
        if path[-1] in projections:
            setattr(modules[path[:-1]], path[-1], LoraLinear(linear, config, rngs))


def adapter_mask(params: ArrayTree) -> ArrayTree:
    """True at the leaves of adapters."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in ADAPTER_LEAVES, params)


def trainable_mask(abstract_params: Params, freeze_vision: bool) -> ArrayTree:
    """True for every parameter that a stage trains: the adapters where there are any, else all of them."""
    mask = adapter_mask(abstract_params)
    if not any(jax.tree.leaves(mask)):
        mask = jax.tree.map(lambda _: True, abstract_params)
    if freeze_vision:
        mask["vision"] = jax.tree.map(lambda _: False, mask["vision"])
    return mask


def without_adapters(params: ArrayTree) -> ArrayTree:
    """The base model's part of a tree: parameters, shapes or shardings."""
    return _filter(params, lambda name: name not in ADAPTER_LEAVES)


def only_adapters(params: ArrayTree) -> ArrayTree:
    """The adapters' part of a tree."""
    return _filter(params, lambda name: name in ADAPTER_LEAVES)


def join(base: ArrayTree, adapters: ArrayTree) -> ArrayTree:
    """The inverse of `without_adapters` and `only_adapters`."""
    if not isinstance(base, dict):
        return base
    joined = {name: join(node, adapters.get(name, {})) for name, node in base.items()}
    return joined | {name: leaf for name, leaf in adapters.items() if name in ADAPTER_LEAVES}


def merge_adapters(params: Params, config: LoraConfig) -> Params:
    """A model without adapters that computes the same: kernels plus scale * A B, in the kernels' dtype."""
    if not isinstance(params, dict):
        return params
    merged = {name: merge_adapters(node, config) for name, node in params.items() if name not in ADAPTER_LEAVES}
    if "lora_a" in params:
        merged["kernel"] = _merge(params["kernel"], params["lora_a"], params["lora_b"], config.scale)
    return merged


def _merge(kernel, a, b, scale):
    num_stack_axes = a.ndim + b.ndim - 2 - kernel.ndim
    stack, rank = kernel.shape[:num_stack_axes], a.shape[-1]
    delta = jnp.matmul(
        a.astype(jnp.float32).reshape(*stack, -1, rank),
        b.astype(jnp.float32).reshape(*stack, rank, -1),
        precision="highest",
    )
    return (kernel.astype(jnp.float32) + scale * delta.reshape(kernel.shape)).astype(kernel.dtype)


def _filter(tree: Any, keep: Callable[[str], bool]) -> Any:
    """The leaves of nested dicts whose own name is kept."""
    kept = {}
    for name, node in tree.items():
        if isinstance(node, dict):
            below = _filter(node, keep)
            if below:
                kept[name] = below
        elif keep(name):
            kept[name] = node
    return kept
