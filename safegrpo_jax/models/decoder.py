"""The text decoder of the Qwen-VL families: grouped-query attention, M-RoPE, a gated MLP or experts, deepstack adds.

The families differ by fields of `TextConfig`: q/k norms, biases of q, k, v, the order of M-RoPE, experts.
After layer j < number of taps the j-th deepstack feature is added at the vision tokens, so the stack is kept as
two: `deepstack_layers` and `layers`. Decoding runs the same blocks on one token per rollout against a cache
that goes in and comes out. Source: huggingface/transformers modeling_qwen3_vl.py,
modeling_qwen3_vl_moe.py, modeling_qwen2_5_vl.py (numeric oracles).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float, Int

from safegrpo_jax.models.attention import attend, attend_cache, attend_continuations
from safegrpo_jax.models.experts import ExpertMLP
from safegrpo_jax.models.layers import (
    INIT_STD,
    Execution,
    GatedMLP,
    Linear,
    RMSNorm,
    init_stacks,
    run_layers,
    spread_tokens,
    unstack,
)
from safegrpo_jax.models.rope import contiguous_axes, interleaved_axes, rotate, text_angles
from safegrpo_jax.types import Array, CacheView, KVCache


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Sizes and family traits of the text decoder. `mrope_section`: frequencies turned by (time, height, width).

    With `num_experts` every layer's MLP is a mixture: each token goes to `experts_per_token` experts of width
    `expert_width`, and `mlp_width` is unused.

    Raises:
      ValueError: sizes that do not fit together.
    """

    vocab_size: int
    width: int
    mlp_width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    rope_theta: float
    mrope_section: tuple[int, int, int]
    head_dim: int = 128
    norm_epsilon: float = 1e-6
    max_positions: int = 262144
    tied_embeddings: bool = False
    mrope_interleaved: bool = True
    qk_norm: bool = True
    qkv_bias: bool = False
    num_experts: int = 0
    experts_per_token: int = 0
    expert_width: int = 0

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}")
        axes = self.mrope_axes.tolist()
        counts = tuple(axes.count(axis) for axis in range(3))
        if self.head_dim % 2 or counts != self.mrope_section or len(axes) != self.head_dim // 2:
            raise ValueError(f"mrope_section {self.mrope_section} does not divide head_dim {self.head_dim} / 2")
        if self.num_experts and not (0 < self.experts_per_token <= self.num_experts and self.expert_width > 0):
            raise ValueError(
                f"experts_per_token {self.experts_per_token} of num_experts {self.num_experts} with expert_width "
                f"{self.expert_width}: give 1..num_experts and a width"
            )

    @property
    def mrope_axes(self) -> np.ndarray:
        """The position axis of each frequency."""
        if self.mrope_interleaved:
            return interleaved_axes(self.mrope_section, self.head_dim // 2)
        return contiguous_axes(self.mrope_section)


class TextBlock(nnx.Module):
    """Pre-norm transformer block: causal attention, then a SiLU-gated MLP or a mixture of them."""

    def __init__(self, config: TextConfig, rngs: nnx.Rngs):
        heads, kv_heads = (config.num_heads, config.head_dim), (config.num_kv_heads, config.head_dim)
        self.input_norm = RMSNorm(config.width, config.norm_epsilon)
        self.q = Linear((config.width,), heads, bias=config.qkv_bias, rngs=rngs)
        self.k = Linear((config.width,), kv_heads, bias=config.qkv_bias, rngs=rngs)
        self.v = Linear((config.width,), kv_heads, bias=config.qkv_bias, rngs=rngs)
        self.o = Linear(heads, (config.width,), bias=False, rngs=rngs)
        self.q_norm = RMSNorm(config.head_dim, config.norm_epsilon) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_epsilon) if config.qk_norm else None
        self.mlp_norm = RMSNorm(config.width, config.norm_epsilon)
        self.has_experts = config.num_experts > 0
        self.mlp = (
            ExpertMLP(config.width, config.expert_width, config.num_experts, config.experts_per_token, rngs)
            if self.has_experts
            else GatedMLP(config.width, config.mlp_width, bias=False, rngs=rngs)
        )

    def heads(
        self, x: Float[Array, "n t d"], cos: Float[Array, "n t half"], sin: Float[Array, "n t half"]
    ) -> tuple[Float[Array, "n h t e"], Float[Array, "n k t e"], Float[Array, "n k t e"]]:
        """Rotated queries, rotated keys and values of every token, head-major."""
        x = self.input_norm(x)
        query, keys = self.q(x), self.k(x)
        if self.q_norm is not None:
            query, keys = self.q_norm(query), self.k_norm(keys)
        query, keys = query.swapaxes(1, 2), keys.swapaxes(1, 2)
        return rotate(query, cos, sin), rotate(keys, cos, sin), self.v(x).swapaxes(1, 2)

    def finish(
        self, x: Float[Array, "n t d"], attended: Float[Array, "n h t e"], execution: Execution
    ) -> Float[Array, "n t d"]:
        """The block's output from its input and the attention output."""
        shape = x.shape
        # One long axis of tokens: contracting two axes in the weight gradients costs a sixth of a CPU step.
        x = (x + self.o(attended.swapaxes(1, 2))).reshape(-1, shape[-1])
        y = self.mlp_norm(x)
        y = self.mlp(y, execution.experts) if self.has_experts else self.mlp(y)
        return (x + y).reshape(shape)


class TextDecoder(nnx.Module):
    """Embedding, blocks, final norm and output map (the embedding itself when tied)."""

    def __init__(self, config: TextConfig, num_taps: int, rngs: nnx.Rngs):
        self.config = config
        shape = (config.vocab_size, config.width)
        self.embed = nnx.Param(INIT_STD * jax.random.normal(rngs.params(), shape))
        lens = [num_taps, config.num_layers - num_taps] if num_taps else [config.num_layers]
        *tapped, self.layers = init_stacks(lambda keys: TextBlock(config, keys), lens, rngs)
        self.deepstack_layers = tapped[0] if tapped else None
        self.norm = RMSNorm(config.width, config.norm_epsilon)
        self.lm_head = None if config.tied_embeddings else Linear(shape[::-1][:1], shape[:1], bias=False, rngs=rngs)

    def embed_tokens(self, token_ids: Int[Array, "n t"], execution: Execution) -> Float[Array, "n t d"]:
        return self.embed[...][token_ids].astype(execution.compute_dtype)

    def run(
        self,
        x: Float[Array, "n t d"],
        mask: Bool[Array, "n t"] | Int[Array, "n t"],
        positions: Int[Array, "3 n t"],
        vision_mask: Bool[Array, "n t"],
        feature_index: Int[Array, "n t"],
        deepstack: Float[Array, "taps m d"],
        execution: Execution,
        keep_cache: bool,
        prefix_ids: Int[Array, "n t"] | None = None,
    ) -> tuple[Float[Array, "n t d"], tuple]:
        """All blocks over whole rows, without the final norm. `mask` and `prefix_ids` as in `qwen_vl.text_hidden`.

        Returns:
          Hidden states, and with `keep_cache` the (keys, values) of each layer, [n k t e], else an empty tuple.
        """
        cos, sin = self._rotation(positions, execution)
        segment_ids = mask.astype(jnp.int32)

        def body(x, block):
            query, keys, values = block.heads(x, cos, sin)
            attended = attend(
                query,
                keys,
                values,
                segment_ids,
                causal=True,
                implementation=execution.attention,
                prefix_ids=prefix_ids,
            )
            x = spread_tokens(block.finish(x, attended, execution))
            return x, (keys, values) if keep_cache else None

        def deepstack_body(x, layer):
            block, features = layer
            x, cache = body(x, block)
            added = jnp.where(vision_mask[..., None], features[feature_index].astype(x.dtype), 0)
            return x + added, cache

        first, x = (), spread_tokens(x)
        if self.deepstack_layers is not None:
            x, first = run_layers(deepstack_body, x, (self.deepstack_layers, deepstack), execution)
        x, rest = run_layers(body, x, self.layers, execution)
        return x, first + rest if keep_cache else ()

    def run_continuations(
        self,
        x: Float[Array, "b p d"],
        mask: Bool[Array, "b p"],
        positions: Int[Array, "3 b p"],
        vision_mask: Bool[Array, "b p"],
        feature_index: Int[Array, "b p"],
        deepstack: Float[Array, "taps m d"],
        y: Float[Array, "n c d"],
        y_mask: Bool[Array, "n c"],
        y_positions: Int[Array, "n c"],
        execution: Execution,
    ) -> tuple[Float[Array, "b p d"], Float[Array, "n c d"]]:
        """As `run` on every row of `y` behind its prompt, r // (n // b), but each prompt is computed once."""
        cos, sin = self._rotation(positions, execution)
        y_cos, y_sin = self._rotation(jnp.broadcast_to(y_positions, (3, *y_positions.shape)), execution)
        segment_ids = mask.astype(jnp.int32)

        def body(carry, block):
            x, y = carry
            query, keys, values = block.heads(x, cos, sin)
            attended = attend(query, keys, values, segment_ids, causal=True, implementation=execution.attention)
            own = block.heads(y, y_cos, y_sin)
            continued = attend_continuations(*own, y_mask, keys, values, mask)
            x, y = block.finish(x, attended, execution), block.finish(y, continued, execution)
            return (spread_tokens(x), spread_tokens(y)), None

        def deepstack_body(carry, layer):
            block, features = layer
            (x, y), _ = body(carry, block)
            added = jnp.where(vision_mask[..., None], features[feature_index].astype(x.dtype), 0)
            return (x + added, y), None

        carry = (spread_tokens(x), spread_tokens(y))
        if self.deepstack_layers is not None:
            carry, _ = run_layers(deepstack_body, carry, (self.deepstack_layers, deepstack), execution)
        return run_layers(body, carry, self.layers, execution)[0]

    def blocks(self) -> list[TextBlock]:
        """All blocks in order, cut out of their stacks."""
        stacks = [stack for stack in (self.deepstack_layers, self.layers) if stack is not None]
        return [block for stack in stacks for block in unstack(stack)]

    def decode(
        self,
        token_ids: Int[Array, "n"],
        positions: Int[Array, "n"],
        view: CacheView,
        cache: KVCache,
        execution: Execution,
        blocks: Sequence[TextBlock] | None = None,
    ) -> tuple[Float[Array, "n d"], KVCache]:
        """One token per slot through all blocks and the final norm; its keys and values go to `view.column`.

        `blocks` from `self.blocks()` where they were cut out of their stacks before.
        """
        x = self.embed_tokens(token_ids[:, None], execution)
        cos, sin = self._rotation(jnp.broadcast_to(positions[None, :, None], (3, len(positions), 1)), execution)
        private_keys, private_values = [], []
        for index, block in enumerate(self.blocks() if blocks is None else blocks):
            query, keys, values = block.heads(x, cos, sin)
            for rings, old, new, axis in (
                (private_keys, cache.private_keys[index], keys.swapaxes(2, 3), 3),
                (private_values, cache.private_values[index], values, 2),
            ):
                rings.append(jax.lax.dynamic_update_slice_in_dim(old, new, view.column, axis))
            attended = attend_cache(
                query[:, :, 0],
                cache.prefix_keys[index],
                cache.prefix_values[index],
                cache.prefix_mask,
                private_keys[-1],
                private_values[-1],
                view,
            )
            x = block.finish(x, attended[:, :, None], execution)
        cache = dataclasses.replace(cache, private_keys=tuple(private_keys), private_values=tuple(private_values))
        return self.norm(x)[:, 0], cache

    def logits(self, hidden: Float[Array, "*rows d"]) -> Float[Array, "*rows v"]:
        """float32 logits of final hidden states."""
        if self.lm_head is None:
            kernel, contract = self.embed[...], 1
        else:
            kernel, contract = self.lm_head.kernel[...], 0
        dims = (((hidden.ndim - 1,), (contract,)), ((), ()))
        return jax.lax.dot_general(hidden, kernel.astype(hidden.dtype), dims, preferred_element_type=jnp.float32)

    def _rotation(self, positions, execution):
        angles = text_angles(positions, self.config.head_dim, self.config.rope_theta, self.config.mrope_axes)
        # Rounded to the compute dtype before the products: what the released checkpoints were trained with.
        return jnp.cos(angles).astype(execution.compute_dtype), jnp.sin(angles).astype(execution.compute_dtype)
