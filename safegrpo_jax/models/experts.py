"""The mixture of experts of Qwen3-VL-MoE: every token through its best-scored experts, none ever dropped.

Assignments are sorted by expert, so each expert's tokens are one contiguous run and three grouped matmuls
(`jax.lax.ragged_dot`) do the work of all experts: shapes are static, there is no capacity, and gradients are exact.
A TPU has an instruction for them; on a CPU jax computes every expert for every token, which is exact and slow.
Under a mesh each data shard sorts its own tokens: a sort over the whole batch would bring every token to every device.
Source: huggingface/transformers modeling_qwen3_vl_moe.py (numeric oracle).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Float, Int

from safegrpo_jax.models.layers import Linear
from safegrpo_jax.sharding import BATCH_AXES
from safegrpo_jax.types import Array


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

    def __call__(self, x: Float[Array, "tokens d"]) -> Float[Array, "tokens d"]:
        logits = self.router(x)
        gate_up, down = self.gate_up[...].astype(x.dtype), self.down[...].astype(x.dtype)
        mesh = jax.sharding.get_abstract_mesh()
        axes = tuple(name for name in BATCH_AXES if mesh.shape.get(name, 1) > 1)
        if not axes:
            return self._mix(x, logits, gate_up, down)
        num_shards = math.prod(mesh.shape[name] for name in axes)
        if x.shape[0] % num_shards:
            raise ValueError(f"{x.shape[0]} tokens do not divide into {num_shards} data shards; pad the batch")
        tokens, whole = PartitionSpec(axes), PartitionSpec()
        mix = jax.shard_map(
            self._mix, in_specs=(tokens, tokens, whole, whole), out_specs=tokens, axis_names=frozenset(axes)
        )
        return mix(x, logits, gate_up, down)

    def _mix(self, x, logits, gate_up, down):
        weights, experts = route(logits, self.experts_per_token)
        experts = experts.reshape(-1)
        order = jnp.argsort(experts)
        counts = jnp.bincount(experts, length=logits.shape[-1]).astype(jnp.int32)
        rows = x[order // self.experts_per_token]
        gate = jax.lax.ragged_dot(rows, gate_up[:, :, 0], counts)
        up = jax.lax.ragged_dot(rows, gate_up[:, :, 1], counts)
        mixed = jax.lax.ragged_dot(jax.nn.silu(gate) * up, down, counts)
        by_token = mixed[jnp.argsort(order)].reshape(*weights.shape, -1)
        # The weight multiplies the expert's output, as in the checkpoints' training: rounding differs otherwise.
        return (by_token * weights[..., None]).sum(1)


def route(
    logits: Float[Array, "tokens experts"], experts_per_token: int
) -> tuple[Float[Array, "tokens chosen"], Int[Array, "tokens chosen"]]:
    """(weights in the dtype of `logits`, indices) of each token's experts, best first; weights sum to 1."""
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    weights, experts = jax.lax.top_k(probabilities, experts_per_token)
    return (weights / weights.sum(-1, keepdims=True)).astype(logits.dtype), experts
