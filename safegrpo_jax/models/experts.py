"""The mixture of experts of Qwen3-VL-MoE: every token through its best-scored experts, none ever dropped.

Assignments are sorted by expert, so each expert's tokens are one contiguous run and three grouped matmuls (grouped.py)
do the work of all experts: shapes are static, there is no capacity, and gradients are exact.
Under a mesh each data shard sorts its own tokens: a sort over the whole batch would bring every token to every device.
Source: huggingface/transformers modeling_qwen3_vl_moe.py (numeric oracle).
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Float, Int

from safegrpo_jax.models.grouped import grouped_matmul
from safegrpo_jax.models.layers import Linear
from safegrpo_jax.sharding import BATCH_AXES
from safegrpo_jax.types import Array

EXPERT_AXIS, MLP_AXIS = "expert", "tensor"  # mesh axes that experts and their widths are spread over


class ExpertMLP(nnx.Module):
    """sum over the chosen experts j of weight_j * down_j(silu(gate_j x) * up_j x).

    Weights are the softmax over ALL experts, in float32, rescaled so that those of the chosen ones sum to 1.
    `gate_up` keeps gate and up on an axis of their own, [experts d 2 f], so that a partition of f cuts both alike.
    """

    def __init__(self, width: int, expert_width: int, num_experts: int, experts_per_token: int, rngs: nnx.Rngs):
        self.experts_per_token = experts_per_token
        self.router = Linear((width,), (num_experts,), bias=False, rngs=rngs)
        gate_up, down = (num_experts, width, 2, expert_width), (num_experts, expert_width, width)
        self.gate_up = nnx.Param(width**-0.5 * jax.random.normal(rngs.params(), gate_up))
        self.down = nnx.Param(expert_width**-0.5 * jax.random.normal(rngs.params(), down))

    def __call__(self, x: Float[Array, "tokens d"], implementation: str) -> Float[Array, "tokens d"]:
        """`implementation` is one of grouped.py.

        Raises:
          ValueError: tokens that the data shards of the mesh do not divide, or an unknown implementation.
        """
        logits = self.router(x)
        gate_up, down = self.gate_up[...].astype(x.dtype), self.down[...].astype(x.dtype)
        mesh = jax.sharding.get_abstract_mesh()
        parts = [name for name in (*BATCH_AXES, EXPERT_AXIS, MLP_AXIS) if mesh.shape.get(name, 1) > 1]
        rows = tuple(name for name in parts if name in BATCH_AXES)
        num_shards = math.prod(mesh.shape[name] for name in rows)
        if x.shape[0] % num_shards:
            raise ValueError(f"{x.shape[0]} tokens do not divide into {num_shards} data shards; pad the batch")
        tokens, kernels = PartitionSpec(rows or None), (PartitionSpec(), PartitionSpec())
        mix = functools.partial(self._mix, implementation=implementation)
        if implementation == "ragged_dot":  # the partitioner cuts experts and widths by itself
            if not rows:
                return mix(x, logits, gate_up, down)
            sharded = jax.shard_map(mix, in_specs=(tokens, tokens, *kernels), out_specs=tokens, axis_names=set(rows))
            return sharded(x, logits, gate_up, down)
        if not parts:
            return mix(x, logits, gate_up, down)
        # A kernel is opaque to the partitioner: each device takes its own tokens, experts and part of their width.
        expert, width = (name if name in parts else None for name in (EXPERT_AXIS, MLP_AXIS))
        kernels = (PartitionSpec(expert, None, None, width), PartitionSpec(expert, width))
        summed = tuple(name for name in (expert, width) if name)
        sharded = jax.shard_map(
            functools.partial(mix, expert_axis=expert, summed=summed),
            in_specs=(tokens, tokens, *kernels),
            out_specs=tokens,
            check_vma=False,  # a pallas call says nothing of how its results vary over the mesh
        )
        return sharded(x, logits, gate_up, down)

    def _mix(self, x, logits, gate_up, down, *, implementation, expert_axis=None, summed=()):
        weights, experts = route(logits, self.experts_per_token)
        experts = experts.reshape(-1)
        order = jnp.argsort(experts)
        counts = jnp.bincount(experts, length=logits.shape[-1]).astype(jnp.int32)
        first = jax.lax.axis_index(expert_axis) * len(down) if expert_axis else 0

        def grouped(rows, kernels):
            return grouped_matmul(rows, kernels, counts, jnp.int32(first), implementation)

        rows = x[order // self.experts_per_token]
        mixed = grouped(jax.nn.silu(grouped(rows, gate_up[:, :, 0])) * grouped(rows, gate_up[:, :, 1]), down)
        by_token = mixed[jnp.argsort(order)].reshape(*weights.shape, -1)
        # The weight multiplies the expert's output, as in the checkpoints' training: rounding differs otherwise.
        by_token = (by_token * weights[..., None]).sum(1)
        return jax.lax.psum(by_token, summed) if summed else by_token


def route(
    logits: Float[Array, "tokens experts"], experts_per_token: int
) -> tuple[Float[Array, "tokens chosen"], Int[Array, "tokens chosen"]]:
    """(weights in the dtype of `logits`, indices) of each token's experts, best first; weights sum to 1."""
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    weights, experts = jax.lax.top_k(probabilities, experts_per_token)
    return (weights / weights.sum(-1, keepdims=True)).astype(logits.dtype), experts
