"""Grouped matmuls: contiguous runs of rows, each times a kernel of its own. What a mixture of experts is made of.

The implementation is one explicit argument. "ragged_dot" is jax's own: on a CPU, and as libtpu 0.0.52 compiles it for a
v4, every row is multiplied with every kernel and masked, which is exact and costs as many times too much as there are
kernels. "megablox" is the TPU kernel that multiplies a row once, "megablox_interpret" the same program on any platform,
slowly.
Source: jax.experimental.pallas.ops.tpu.megablox.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm
from jaxtyping import Float, Int

from safegrpo_jax.types import Array

IMPLEMENTATIONS = ("ragged_dot", "megablox", "megablox_interpret")
ROW_TILE = 256  # a tile that several runs share is visited once for each: small beside the rows of an expert
WIDTH_TILE = 1024  # three tiles of bfloat16 and one of float32 fit the 16 MB of a v4's vector memory


def grouped_matmul(
    rows: Float[Array, "rows d"],
    kernels: Float[Array, "experts d f"],
    counts: Int[Array, "all_experts"],
    first_expert: Int[Array, ""],
    implementation: str,
) -> Float[Array, "rows f"]:
    """`rows` sorted by expert, `counts` of them each, times the kernel of their expert.

    `kernels` may be some of all experts, `first_expert` on: rows of the others come out 0. "ragged_dot" needs them all.

    Raises:
      ValueError: unknown implementation.
    """
    match implementation:
        case "ragged_dot":
            return jax.lax.ragged_dot(rows, kernels, counts)
        case "megablox" | "megablox_interpret":
            # Rows beyond the counts belong to no expert: what the kernel leaves there is cut off again.
            padded = jnp.pad(rows, ((0, -len(rows) % ROW_TILE), (0, 0)))
            return _megablox(padded, kernels, counts, first_expert, implementation == "megablox_interpret")[: len(rows)]
        case _:
            raise ValueError(f"experts implementation {implementation!r} is not one of {IMPLEMENTATIONS}")


def _tiles(m: int, k: int, n: int) -> tuple[int, int, int]:
    return ROW_TILE, min(k, WIDTH_TILE), min(n, WIDTH_TILE)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _megablox(rows, kernels, counts, first_expert, interpret):
    return gmm(rows, kernels, counts, rows.dtype, _tiles, first_expert, interpret=interpret)


def _forward(rows, kernels, counts, first_expert, interpret):
    return _megablox(rows, kernels, counts, first_expert, interpret), (rows, kernels, counts, first_expert)


def _backward(interpret, saved, gradient):
    rows, kernels, counts, first_expert = saved
    to_rows = gmm(gradient, kernels, counts, rows.dtype, _tiles, first_expert, transpose_rhs=True, interpret=interpret)
    to_kernels = tgmm(rows.T, gradient, counts, kernels.dtype, _tiles, first_expert, len(kernels), interpret=interpret)
    return to_rows, to_kernels, None, None


_megablox.defvjp(_forward, _backward)
