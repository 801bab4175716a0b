"""The small parts the towers are made of: linear maps, gated MLP, the two norms, the walk through a stack of blocks.

A stack is one block module whose leaves carry a leading layer axis l. `run_layers` walks it either as a
`lax.scan` (one compiled block, for deep models) or unrolled (faster on a CPU for a few small layers).
Parameters are kept in the dtype they came in and cast to the compute dtype where they are used.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Float

from safegrpo_jax.models import attention, grouped
from safegrpo_jax.models.splash import HEAD_AXIS
from safegrpo_jax.sharding import BATCH_AXES
from safegrpo_jax.types import Array

INIT_STD = 0.02  # of tables: embeddings and positions
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a model is computed, as opposed to what it is.

    Raises:
      ValueError: unknown dtype, or implementation of attention or experts.
    """

    dtype: str = "float32"
    scan_layers: bool = False
    remat: bool = False
    attention: str = "reference"
    experts: str = "ragged_dot"

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise ValueError(f"model dtype {self.dtype!r} is not one of {sorted(DTYPES)}")
        if self.attention not in attention.IMPLEMENTATIONS:
            raise ValueError(f"attention {self.attention!r} is not one of {attention.IMPLEMENTATIONS}")
        if self.experts not in grouped.IMPLEMENTATIONS:
            raise ValueError(f"experts {self.experts!r} is not one of {grouped.IMPLEMENTATIONS}")

    @property
    def compute_dtype(self) -> jnp.dtype:
        return jnp.dtype(DTYPES[self.dtype])


class Linear(nnx.Module):
    """Maps the last `len(in_shape)` axes of its input to `out_shape`. The kernel's shape is in_shape + out_shape."""

    def __init__(self, in_shape: tuple[int, ...], out_shape: tuple[int, ...], *, bias: bool, rngs: nnx.Rngs):
        self.num_in_axes, self.num_out_axes = len(in_shape), len(out_shape)
        # Unit variance is kept at any width; at the published width of 2560 this is the customary 0.02.
        std = math.prod(in_shape) ** -0.5
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), in_shape + out_shape))
        self.bias = nnx.Param(jnp.zeros(out_shape)) if bias else None

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        kernel = self.kernel[...].astype(x.dtype)
        if self.bias is None:
            return jnp.tensordot(x, kernel, self.num_in_axes)
        # One rounding after the bias, not two: in bfloat16 the second costs a vision tower a seventh of its precision.
        y = jnp.tensordot(x, kernel, self.num_in_axes, preferred_element_type=jnp.float32)
        return (y + self.bias[...].astype(jnp.float32)).astype(x.dtype)


class GatedMLP(nnx.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self, width: int, mlp_width: int, *, bias: bool, rngs: nnx.Rngs):
        self.gate = Linear((width,), (mlp_width,), bias=bias, rngs=rngs)
        self.up = Linear((width,), (mlp_width,), bias=bias, rngs=rngs)
        self.down = Linear((mlp_width,), (width,), bias=bias, rngs=rngs)

    def __call__(self, x: Float[Array, "*rows d"]) -> Float[Array, "*rows d"]:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class LayerNorm(nnx.Module):
    """Layer norm over the last axis: statistics and affine map in float32, one rounding at the end."""

    def __init__(self, width: int, epsilon: float = 1e-6):
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones(width))
        self.bias = nnx.Param(jnp.zeros(width))

    def __call__(self, x: Float[Array, "*rows d"]) -> Float[Array, "*rows d"]:
        y = x.astype(jnp.float32)
        y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.epsilon)
        return (y * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis, in float32, rounded BEFORE the multiplication with the weight.

    Source: huggingface/transformers modeling_qwen3_vl.py; the order changes bfloat16 results by one unit.
    """

    def __init__(self, width: int, epsilon: float):
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones(width))

    def __call__(self, x: Float[Array, "*rows d"]) -> Float[Array, "*rows d"]:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.epsilon)
        return y.astype(x.dtype) * self.scale[...].astype(x.dtype)


def init_stacks(make_block: Callable[[nnx.Rngs], nnx.Module], lens: Sequence[int], rngs: nnx.Rngs) -> list[nnx.Module]:
    """Independently initialised blocks as stacks of the given lengths.

    All layers are drawn at once and split afterwards: each random draw costs half a second of compilation.
    """
    everything = jax.vmap(lambda key: make_block(nnx.Rngs(key)))(jax.random.split(rngs.params(), sum(lens)))
    leaves, treedef = jax.tree.flatten(everything)
    return [treedef.unflatten(pieces) for pieces in zip(*(jax.lax.split(leaf, lens) for leaf in leaves), strict=True)]


def run_layers(
    body: Callable[[Any, Any], tuple[Any, Any]], carry: Any, layers: Any, execution: Execution
) -> tuple[Any, tuple]:
    """Calls `body(carry, layer) -> (carry, output)` on every layer of a stack, in order.

    Args:
      layers: any pytree whose leaves share a leading layer axis, such as `(blocks, features)`.

    Returns:
      The last carry and the outputs, one per layer.
    """
    if execution.remat:
        # Inside a scan nothing can be merged across iterations, so the barrier against it would only cost.
        body = jax.checkpoint(body, prevent_cse=not execution.scan_layers)
    if execution.scan_layers:
        carry, stacked = jax.lax.scan(body, carry, layers)
        return carry, tuple(unstack(stacked)) if jax.tree.leaves(stacked) else ()
    outputs = []
    for layer in unstack(layers):
        carry, output = body(carry, layer)
        outputs.append(output)
    return carry, tuple(outputs)


def spread_tokens(x: Float[Array, "n t d"]) -> Float[Array, "n t d"]:
    """Between blocks, the devices that share a block's heads keep a part of the tokens each. What every layer keeps
    for the gradient is then as small as if they had shared the batch."""
    mesh = jax.sharding.get_abstract_mesh()
    parts = mesh.shape.get(HEAD_AXIS, 1)
    if parts == 1 or x.shape[1] % parts:
        return x
    rows = tuple(name for name in BATCH_AXES if mesh.shape.get(name, 1) > 1) or None
    return jax.lax.with_sharding_constraint(x, PartitionSpec(rows, HEAD_AXIS))


def unstack(tree: Any) -> list[Any]:
    """The layers of a stack as separate trees. The gradient of `split` is one concatenation, not l padded sums."""
    leaves, treedef = jax.tree.flatten(tree)
    num_layers = leaves[0].shape[0]
    pieces = [
        [piece.reshape(leaf.shape[1:]) for piece in jax.lax.split(leaf, (1,) * num_layers, axis=0)] for leaf in leaves
    ]
    return [treedef.unflatten(layer) for layer in zip(*pieces, strict=True)]
