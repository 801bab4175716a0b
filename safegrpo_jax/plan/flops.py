"""Counts the floating-point operations of a traced program: matmuls and kernels, loops as often as they turn.

A multiply-add is two operations. Everything else (norms, softmax, rotations) is a few percent of a transformer and is
limited by memory, which roofline.py counts. Operations are those of the whole mesh.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from safegrpo_jax.models.splash import BLOCKS


def count_flops(program: ClosedJaxpr | Jaxpr, turns: int = 1) -> int:
    """Operations of one run of a traced program (`Traced.jaxpr`); a loop whose turns data decides makes `turns`."""
    jaxpr = program.jaxpr if isinstance(program, ClosedJaxpr) else program
    return sum(_of_equation(equation, turns) for equation in jaxpr.eqns)


def _of_equation(equation: JaxprEqn, turns: int) -> int:
    parameters = equation.params
    match equation.primitive.name:
        case "dot_general":
            return _of_dot(equation)
        case "ragged_dot_general" | "ragged_dot":
            return _of_grouped_dot(equation)
        case "conv_general_dilated":
            raise NotImplementedError("a convolution: nothing here has one, so its count was never tested")
        case "jit" | "pjit" if parameters["name"] in ("gmm", "tgmm"):
            return _of_megablox(equation)
        case "pallas_call":
            return _of_kernel(equation)
        case "scan":
            return parameters["length"] * count_flops(parameters["jaxpr"], turns)
        case "while":
            return turns * count_flops(parameters["body_jaxpr"], turns)
        case "cond":
            return max(count_flops(branch, turns) for branch in parameters["branches"])
        case "shard_map":
            axes = parameters.get("manual_axes", parameters["mesh"].axis_names)
            return math.prod(parameters["mesh"].shape[name] for name in axes) * count_flops(parameters["jaxpr"], turns)
    return sum(count_flops(inner, turns) for inner in _inner(parameters))


def _inner(parameters: dict) -> Iterator[ClosedJaxpr | Jaxpr]:
    for value in parameters.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, ClosedJaxpr | Jaxpr):
                yield item


def _of_dot(equation: JaxprEqn) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def _of_grouped_dot(equation: JaxprEqn) -> int:
    """Every row meets the matrix of its own group only, forward as in both gradients."""
    numbers = equation.params["ragged_dot_dimension_numbers"]
    (contracted, _), _ = numbers.dot_dimension_numbers
    left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    # The gradient of the matrices has a group axis in front, of which each row contributes to one.
    groups = out[0] if not numbers.rhs_group_dimensions else 1
    return 2 * math.prod(out) // groups * math.prod(left[axis] for axis in contracted)


def _of_megablox(equation: JaxprEqn) -> int:
    """As `_of_grouped_dot`. Of groups spread over devices each has its share of the rows, at even load."""
    (left, right, groups), out = (v.aval.shape for v in equation.invars[:3]), equation.outvars[0].aval.shape
    own_groups = right[0] if equation.params["name"] == "gmm" else out[0]
    return 2 * math.prod(left) * out[-1] * own_groups // groups[0]


# Matmuls over pairs of tokens: scores and values; for the gradients the scores again, and those of the chain rule. And
# the operands of a causal kernel, which takes the tokens' numbers beyond those of one that sees everything.
_KERNELS = {"splash_mha_fwd": (2, 8), "splash_mha_dkv": (4, 11), "splash_mha_dq": (3, 11)}


def _of_kernel(equation: JaxprEqn) -> int:
    """Blocks of a splash kernel that are not masked as a whole."""
    name = equation.params["name"] or ""
    matmuls, causal_operands = next((found for kernel, found in _KERNELS.items() if name.startswith(kernel)), (0, 0))
    if not matmuls:
        raise ValueError(f"kernel {name!r} is not one of {', '.join(_KERNELS)}; say here how to count it")
    avals = [variable.aval for variable in equation.invars]
    *rows, heads, length, head_dim = next(aval.shape for aval in avals if aval.dtype.kind not in "iub")
    pairs = length**2
    if len(avals) == causal_operands:
        block = next(block for block in BLOCKS if length % block == 0)
        pairs = length * (length + block) // 2
    return matmuls * 2 * math.prod(rows) * heads * pairs * head_dim
