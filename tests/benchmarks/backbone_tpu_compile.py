"""Compiles forward and backward of published backbones for a TPU slice, without a TPU: pip install libtpu.

Layers are scanned, so a few of them compile to the same program as all; `--layers` sets how many. Prints the seconds of
compilation, kernel calls (splash attention) in the program, and bytes per device.

    JAX_PLATFORMS=cpu python tests/benchmarks/backbone_tpu_compile.py --size=qwen3-vl-30b-a3b --layers=4
"""

import argparse
import dataclasses
import os
import time

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_WORKER_ID", "0")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from safegrpo_jax.grpo.logps import token_logps
from safegrpo_jax.models import qwen_vl
from safegrpo_jax.sharding import batch_axis, batch_sharding, make_mesh, param_shardings
from safegrpo_jax.types import PackedImages


def shortened(name: str, num_layers: int) -> qwen_vl.QwenVLConfig:
    config = qwen_vl.PUBLISHED_SIZES[name]
    text = dataclasses.replace(config.text, num_layers=num_layers)
    execution = {"dtype": "bfloat16", "scan_layers": True, "remat": True, "attention": "splash", "experts": "megablox"}
    return dataclasses.replace(config, text=text, **execution)


def abstract_batch(config, rows, length, patches):
    vision = config.vision

    def ints(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    def floats(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    def flags(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.bool_)

    images = PackedImages(
        patches=floats(rows, patches, vision.patch_values),
        patch_pos=ints(rows, patches, 2),
        tap_ids=ints(rows, patches, 4),
        tap_weights=floats(rows, patches, 4),
        segment_ids=ints(rows, patches),
    )
    tokens = {"ids": ints(rows, length), "mask": flags(rows, length), "vision_mask": flags(rows, length)}
    return {"images": images, "positions": ints(3, rows, length), "feature_index": ints(rows, length), **tokens}


def compile_gradient(config, mesh, rows, length, patches):
    def loss(params, batch):
        features = qwen_vl.encode_images(params, batch["images"], config)
        tokens = (batch["ids"], batch["mask"], batch["positions"], batch["vision_mask"], batch["feature_index"])
        hidden = qwen_vl.text_hidden(params, *tokens, features, config)
        banned = jnp.zeros(config.text.vocab_size, bool)
        logps, _ = token_logps(
            lambda h: qwen_vl.logits_from_hidden(params, h, config),
            hidden[:, :-1], batch["ids"][:, 1:], batch["mask"][:, 1:], banned, 1.0, 512,
        )  # fmt: skip
        return logps.sum()

    shapes = jax.eval_shape(lambda key: qwen_vl.init_params(config, key), jax.random.key(0))
    shardings = param_shardings(shapes, mesh)
    params = jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes,
                          shardings)  # fmt: skip

    def place(path, leaf):
        axis = 1 if getattr(path[-1], "key", "") == "positions" else batch_axis(path)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=batch_sharding(mesh, axis))

    batch = jax.tree_util.tree_map_with_path(place, abstract_batch(config, rows, length, patches))
    replicated = NamedSharding(mesh, PartitionSpec())
    with jax.set_mesh(mesh):
        gradient = jax.jit(jax.value_and_grad(loss), out_shardings=(replicated, shardings))
        return gradient.lower(params, batch).compile()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", default="qwen3-vl-2b", choices=qwen_vl.PUBLISHED_SIZES)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--topology", default="v5e:2x4")
    parser.add_argument("--fsdp", type=int, default=4)
    parser.add_argument("--tensor", type=int, default=2)
    parser.add_argument("--expert", type=int, default=1)
    arguments = parser.parse_args()
    bounds = [int(side) for side in arguments.topology.split(":")[1].split("x")]
    topology = topologies.get_topology_desc(
        platform="tpu",
        topology_name=arguments.topology,
        chip_config_name="default",
        chips_per_host_bounds=(*bounds[:2], 1),
        num_slices=1,
    )
    sizes = {"fsdp": arguments.fsdp, "tensor": arguments.tensor, "expert": arguments.expert}
    mesh = make_mesh(sizes, topology.devices)
    config = shortened(arguments.size, arguments.layers)
    started = time.monotonic()
    compiled = compile_gradient(config, mesh, rows=8, length=1024, patches=1024)
    text, memory = compiled.as_text(), compiled.memory_analysis()
    print(
        f"{arguments.size}, {arguments.layers} text layers, {arguments.topology}: compiled in"
        f" {time.monotonic() - started:.0f} s, {text.count('tpu_custom_call')} kernel calls,"
        f" {memory.argument_size_in_bytes / 1e9:.2f} GB arguments, {memory.temp_size_in_bytes / 1e9:.2f} GB temporary"
        " per device"
    )


if __name__ == "__main__":
    main()
