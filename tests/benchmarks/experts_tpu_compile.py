"""What a TPU would do with grouped matmuls, without a TPU: pip install libtpu.

Compiles the experts of one layer of Qwen3-VL-30B-A3B on one chip with each implementation and prints the FLOPs of the
program beside those that the result needs. On a v4 with libtpu 0.0.52, 32 768 rows (4096 tokens), forward: ragged_dot
128 times as many (3.96e13 of 3.09e11), megablox 1.00 times.

    JAX_PLATFORMS=cpu python tests/benchmarks/experts_tpu_compile.py --rows=32768
"""

import argparse
import functools
import os

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_WORKER_ID", "0")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from safegrpo_jax.models.grouped import grouped_matmul
from safegrpo_jax.models.qwen_vl import PUBLISHED_SIZES


def mix(rows, gate, up, down, counts, implementation):
    grouped = functools.partial(grouped_matmul, counts=counts, first_expert=jnp.int32(0), implementation=implementation)
    return grouped(jax.nn.silu(grouped(rows, gate)) * grouped(rows, up), down)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=32768)
    parser.add_argument("--topology", default="v4:2x2x1")
    parser.add_argument("--implementations", nargs="+", default=["ragged_dot", "megablox"])
    arguments = parser.parse_args()
    topology = topologies.get_topology_desc(
        platform="tpu",
        topology_name=arguments.topology,
        chip_config_name="default",
        chips_per_host_bounds=(2, 2, 1),
        num_slices=1,
    )
    text = PUBLISHED_SIZES["qwen3-vl-30b-a3b"].text
    make = functools.partial(jax.ShapeDtypeStruct, sharding=SingleDeviceSharding(topology.devices[0]))
    inner = make((text.num_experts, text.width, text.expert_width), jnp.bfloat16)
    outer = make((text.num_experts, text.expert_width, text.width), jnp.bfloat16)
    rows, counts = make((arguments.rows, text.width), jnp.bfloat16), make((text.num_experts,), jnp.int32)
    needed = 3 * 2 * arguments.rows * text.width * text.expert_width
    for implementation in arguments.implementations:
        program = jax.jit(functools.partial(mix, implementation=implementation))
        compiled = program.lower(rows, inner, inner, outer, counts).compile()
        flops, memory = compiled.cost_analysis()["flops"], compiled.memory_analysis()
        print(
            f"{implementation}: {flops:.3g} FLOPs, {flops / needed:.2f} times the {needed:.3g} needed,"
            f" {memory.temp_size_in_bytes / 1e6:.0f} MB temporary"
        )


if __name__ == "__main__":
    main()
