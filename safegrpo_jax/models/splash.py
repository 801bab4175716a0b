"""Block-wise attention on a TPU: jax's splash kernel behind the shapes and segment ids of attention.py.

Scores never exist as a whole, so memory grows with the length and not with its square. The kernel wants lengths and
head dimensions in multiples of the 128 lanes: both are padded with zeros, which add nothing to a score, and the scale
is that of the true head dimension. A kernel is opaque to the partitioner, so under a mesh each device runs it on its
own rows and heads. Source: jax.experimental.pallas.ops.tpu.splash_attention.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import PartitionSpec
from jaxtyping import Float, Int

from safegrpo_jax.sharding import BATCH_AXES
from safegrpo_jax.types import Array

LANES = 128
BLOCKS = (1024, 512, 256, 128)  # large blocks keep the matrix unit busy; the largest that divides the length is taken
HEAD_AXIS = "tensor"  # mesh axis that heads are spread over


def attend_splash(
    query: Float[Array, "n h t e"],
    keys: Float[Array, "n k t e"],
    values: Float[Array, "n k t e"],
    segment_ids: Int[Array, "n t"],
    causal: bool,
    interpret: bool,
) -> Float[Array, "n h t e"]:
    """As `attention.attend`. `interpret` runs the kernel's program step by step on any platform, for tests."""
    run = functools.partial(_attend_rows, causal=causal, interpret=interpret)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return run(query, keys, values, segment_ids)
    rows = tuple(name for name in BATCH_AXES if mesh.shape.get(name, 1) > 1) or None
    parts = mesh.shape.get(HEAD_AXIS, 1)
    if keys.shape[1] % parts:  # fewer key heads than shards: each query head gets its own copy
        keys, values = (jnp.repeat(x, query.shape[1] // keys.shape[1], axis=1) for x in (keys, values))
    heads = PartitionSpec(rows, HEAD_AXIS if parts > 1 else None)
    # A pallas call says nothing of how its results vary over the mesh, hence check_vma=False.
    sharded = jax.shard_map(run, in_specs=(heads, heads, heads, PartitionSpec(rows)), out_specs=heads, check_vma=False)
    return sharded(query, keys, values, segment_ids)


def _attend_rows(query, keys, values, segment_ids, *, causal, interpret):
    h, t, e = query.shape[1:]
    length = -(-t // LANES) * LANES
    padding = ((0, 0), (0, 0), (0, length - t), (0, -e % LANES))
    query, keys, values = (jnp.pad(x, padding) for x in (query * e**-0.5, keys, values))
    segment_ids = jnp.pad(segment_ids, ((0, 0), (0, length - t)))
    make_mask = masks.CausalMask if causal else masks.FullMask
    kernel = kernels.make_splash_mha(
        masks.MultiHeadMask([make_mask((length, length)) for _ in range(h)]),
        block_sizes=_block_sizes(next(block for block in BLOCKS if length % block == 0)),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    # Padding forms a segment of its own, 0: it sees padding instead of nothing, and is meaningless either way.
    attended = jax.vmap(lambda q, k, v, ids: kernel(q, k, v, segment_ids=kernels.SegmentIds(ids, ids)))(
        query, keys, values, segment_ids
    )
    return attended[:, :, :t, :e]


def _block_sizes(block: int) -> kernels.BlockSizes:
    return kernels.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
