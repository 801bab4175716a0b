"""What is read from compiled programs: loops nested in loops, slices, copies, collectives; from jax's own CPU output
and from hand-written text in the form of the TPU compiler."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from safegrpo_jax.plan import hlo
from safegrpo_jax.sharding import make_mesh

TPU_TEXT = """HloModule jit_f, is_scheduled=true

%fused_slice (param_0.1: bf16[36,64,64]) -> bf16[64,64] {
  %param_0.1 = bf16[36,64,64]{2,1,0:T(8,128)(2,1)} parameter(0)
  %c.1 = s32[]{:T(128)} constant(0)
  %ds.1 = bf16[1,64,64]{2,1,0} dynamic-slice(%param_0.1, %c.1, %c.1, %c.1), dynamic_slice_sizes={1,64,64}
  ROOT %b.1 = bf16[64,64]{1,0} bitcast(%ds.1)
}

%compare (p.0: s32[], p.1: s32[]) -> pred[] {
  %p.0 = s32[]{:T(128)} parameter(0)
  %p.1 = s32[]{:T(128)} parameter(1)
  ROOT %lt = pred[]{:T(512)} compare(%p.0, %p.1), direction=LT
}

%cond (arg.1: (s32[], bf16[36,64,64])) -> pred[] {
  %arg.1 = (s32[]{:T(128)}, bf16[36,64,64]{2,1,0}) parameter(0)
  %limit = s32[]{:T(128)} constant(36)
  %i.1 = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  ROOT %wrapped = pred[]{:T(512)} fusion(%i.1, %limit), kind=kLoop, calls=%compare
}

%body (arg.2: (s32[], bf16[36,64,64])) -> (s32[], bf16[36,64,64]) {
  %arg.2 = (s32[]{:T(128)}, bf16[36,64,64]{2,1,0}) parameter(0)
  %i.2 = s32[]{:T(128)} get-tuple-element(%arg.2), index=0
  %w = bf16[36,64,64]{2,1,0} get-tuple-element(%arg.2), index=1
  %layer = bf16[64,64]{1,0} fusion(%w), kind=kLoop, calls=%fused_slice, backend_config={"estimated_cycles":"10"}
  %whole = bf16[256,64]{1,0} all-gather(%layer), channel_id=1, dimensions={0}
  %on_chip = bf16[256,64]{1,0:T(8,128)S(1)} copy(%whole), backend_config={"window_config":{"estimated_cycles":"5"}}
  %k = (bf16[64,64]{1,0}, f32[8]{0}) custom-call(%layer), custom_call_target="tpu_custom_call"
  ROOT %t = (s32[]{:T(128)}, bf16[36,64,64]{2,1,0}) tuple(%i.2, %w)
}

ENTRY %main (a: bf16[36,64,64]) -> (s32[], bf16[36,64,64]) {
  %a = bf16[36,64,64]{2,1,0} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %start = (s32[]{:T(128)}, bf16[36,64,64]{2,1,0}) tuple(%zero, %a)
  ROOT %loop = (s32[]{:T(128)}, bf16[36,64,64]{2,1,0}) while(%start), condition=%cond, body=%body
}
"""


def measure(function, *arguments, turns=1):
    text = jax.jit(function).lower(*arguments).compile().as_text()
    return hlo.measure(hlo.parse(text), turns)


def test_text_of_the_tpu_compiler():
    found = hlo.measure(hlo.parse(TPU_TEXT))
    assert found.collectives == {"all-gather": 36 * 256 * 64 * 2}
    assert found.calls == {"tpu_custom_call": 36}
    assert found.cycles == found.copy_cycles == 36 * 15
    layer, whole = 64 * 64 * 2, 256 * 64 * 2
    slicing, gathering, copying, kernel = 2 * layer, layer + whole, whole, layer + layer + 32
    assert found.memory_bytes == 36 * (slicing + gathering + copying + kernel)
    assert found.largest_elements == 36 * 64 * 64


def test_nested_loops_multiply():
    def nested(x):
        def outer(x, _):
            return jax.lax.scan(lambda y, _: (jnp.sin(y @ y), None), x, None, length=3)[0], None

        return jax.lax.scan(outer, x, None, length=5)[0]

    x = jnp.ones((64, 64))
    program = hlo.parse(jax.jit(nested).lower(x).compile().as_text())
    runs = {times for times, item, _ in hlo.counted(program) if "sine" in item.opcode + item.attributes}
    assert 15 in runs
    once = measure(lambda x: jnp.sin(x @ x), x).memory_bytes
    many = hlo.measure(program).memory_bytes
    assert 15 * once <= many < 20 * once


def test_a_loop_of_unknown_turns_makes_as_many_as_said():
    def search(x):
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 1e6, lambda x: x @ x, x)

    x = jnp.ones((64, 64))
    one, ten = (measure(search, x, turns=turns).memory_bytes for turns in (1, 10))
    assert ten > 5 * one


def test_a_slice_of_a_stack_is_read_not_the_stack():
    stack = jnp.ones((100, 64, 64))

    found = measure(lambda x, stack: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)[0], stack[0], stack)
    per_layer = 64 * 64 * 4
    assert 100 * 3 * per_layer <= found.memory_bytes < 100 * 12 * per_layer  # 100 stacks would be 10000 layers


def test_collectives_are_those_of_the_loop():
    mesh = make_mesh({"data": 8})
    spread, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())

    def step(x, w):
        def body(x, _):
            return jax.lax.with_sharding_constraint(jnp.tanh(x), whole) @ w, None

        x, _ = jax.lax.scan(body, x, None, length=7)
        return x

    arguments = (
        jax.device_put(np.ones((64, 64), np.float32), spread),
        jax.device_put(np.ones((64, 64), np.float32), spread),
    )
    with jax.set_mesh(mesh):
        text = jax.jit(step, out_shardings=spread).lower(*arguments).compile().as_text()
    found = hlo.measure(hlo.parse(text))
    per_turn = {size / (64 * 64 * 4) for size in found.collectives.values()}
    assert max(per_turn) >= 7, per_turn


def test_sizes():
    assert hlo.shape_bytes("(f32[8,4]{1,0:T(8,128)}, bf16[3]{0}, s32[])") == 128 + 6 + 4
    assert hlo.shape_bytes("pred[16]{0:T(512)S(3)}") == 16
    assert hlo.shape_bytes("pred[16]{0:T(512)S(3)}", in_hbm=True) == 0
    assert hlo.shape_bytes("u4[16]{0}") == 8
    assert hlo.shape_bytes("f8e4m3fn[16]{0}") == 16
