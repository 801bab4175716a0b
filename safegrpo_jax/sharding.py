"""Where arrays live: the mesh, an ordered table parameter path -> logical axes, and host batch -> global arrays.

A rule gives every axis of a parameter a logical name; `ShardingConfig` maps logical names to mesh axes. A mesh axis
that the mesh does not have partitions nothing, so one configuration serves a laptop and a pod. The compiler places
all communication (mesh axes are of type Auto). The vision tower is only stored spread; it computes whole, for it is
small and has its own data.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float

from safegrpo_jax.types import Array, ArrayTree, Params, Prompts, TrainState

FSDP_AXIS = "fsdp"
BATCH_AXES = ("data", FSDP_AXIS)  # mesh axes that a batch is spread over

# First match wins. Names are those of `ShardingConfig`; None is never partitioned. Layer stacks lead with None.
Rules = tuple[tuple[str, tuple[str | None, ...]], ...]
QWEN_VL_RULES: Rules = (
    (r"vision/(pos_table|.*norm.*|.*bias|.*lora_[ab])", ()),
    (r"vision/patch_embed/kernel", (None, "vision_width")),
    (r"vision/blocks/\w+/qkv/kernel", (None, "vision_width", None, "vision_heads", None)),
    (r"vision/blocks/\w+/proj/kernel", (None, "vision_heads", None, "vision_width")),
    (r"vision/blocks/\w+/(fc1|mlp/gate|mlp/up)/kernel", (None, "vision_width", "vision_heads")),
    (r"vision/blocks/\w+/(fc2|mlp/down)/kernel", (None, "vision_heads", "vision_width")),
    (r"vision/merger/fc[12]/kernel", ("vision_width", "vision_heads")),
    (r"vision/deepstack_mergers/fc[12]/kernel", (None, "vision_width", "vision_heads")),
    (r"text/embed", ("vocab", "width")),
    (r"text/lm_head/kernel", ("width", "vocab")),
    (r"text/(deepstack_)?layers/q/kernel", (None, "width", "heads", None)),
    (r"text/(deepstack_)?layers/[kv]/kernel", (None, "width", "kv_heads", None)),
    (r"text/(deepstack_)?layers/q/bias", (None, "heads", None)),
    (r"text/(deepstack_)?layers/[kv]/bias", (None, "kv_heads", None)),
    (r"text/(deepstack_)?layers/o/kernel", (None, "heads", None, "width")),
    (r"text/(deepstack_)?layers/mlp/(gate|up)/kernel", (None, "width", "mlp")),
    (r"text/(deepstack_)?layers/mlp/down/kernel", (None, "mlp", "width")),
    (r"text/(deepstack_)?layers/mlp/router/kernel", (None, "width", None)),
    (r"text/(deepstack_)?layers/mlp/gate_up", (None, "experts", "width", None, "mlp")),
    (r"text/(deepstack_)?layers/mlp/down", (None, "experts", "mlp", "width")),
    (r"text/(.*norm)/scale", ()),
    (r"text/.*/lora_[ab]", ()),
)


@dataclasses.dataclass(frozen=True)
class ShardingConfig:
    """Mesh axis of each logical axis, None to replicate. `kv_heads` and `vision_heads` (the tower's heads and mlp) are
    replicated where they do not divide."""

    vocab: str | None = "tensor"
    width: str | None = "fsdp"
    heads: str | None = "tensor"
    kv_heads: str | None = "tensor"
    mlp: str | None = "tensor"
    experts: str | None = "expert"
    vision_width: str | None = "fsdp"
    vision_heads: str | None = "tensor"


def make_mesh(axis_sizes: dict[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all `devices` (default: all there are). Enter it with `jax.set_mesh`.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    if math.prod(axis_sizes.values()) != len(devices):
        raise ValueError(
            f"mesh axes {axis_sizes} need {math.prod(axis_sizes.values())} devices, there are {len(devices)}"
        )
    return jax.make_mesh(
        tuple(axis_sizes.values()),
        tuple(axis_sizes),
        axis_types=(AxisType.Auto,) * len(axis_sizes),
        devices=devices,
    )


def regroup(mesh: Mesh, axis_sizes: dict[str, int]) -> Mesh:
    """The devices of `mesh`, in the same order, under other axes.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    if math.prod(axis_sizes.values()) != mesh.size:
        raise ValueError(f"mesh axes {axis_sizes} do not regroup the {mesh.size} devices of {dict(mesh.shape)}")
    devices = mesh.devices.reshape(tuple(axis_sizes.values()))
    return Mesh(devices, tuple(axis_sizes), axis_types=(AxisType.Auto,) * len(axis_sizes))


def compiler_options(mesh: Mesh) -> dict[str, str]:
    """What the compiler of the mesh's devices is to do otherwise than it would, for `jax.jit`.

    On a TPU it makes of a matmul with a spread weight a loop over the weight's parts whose partial sums go through
    memory in bfloat16: 2.8 times the time of the matmul alone by its own estimate, and twice the time to compile.
    """
    if mesh.devices.flat[0].platform != "tpu":
        return {}
    return {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}


def param_shardings(
    abstract_params: Params,
    mesh: Mesh | AbstractMesh,
    rules: Rules = QWEN_VL_RULES,
    config: ShardingConfig | None = None,
) -> Params:
    """The sharding of every parameter, as a tree like `abstract_params` (arrays or their shapes).

    Raises:
      ValueError: a parameter without a rule or with another number of axes than its rule, or an axis that the mesh
        axis does not divide (only `kv_heads` falls back to replication: fewer heads than tensor shards is normal).
    """
    config = ShardingConfig() if config is None else config

    def place(key_path, leaf):
        path = jax.tree_util.keystr(key_path, simple=True, separator="/")
        return NamedSharding(mesh, _find_spec(path, leaf.shape, mesh, rules, config))

    return jax.tree_util.tree_map_with_path(place, abstract_params)


def _find_spec(path, shape, mesh, rules, config):
    axes = next((axes for pattern, axes in rules if re.fullmatch(pattern, path)), None)
    if axes is None:
        raise ValueError(f"parameter {path} {shape} has no sharding rule; add one to the table")
    if axes and len(axes) != len(shape):
        raise ValueError(f"parameter {path} has {len(shape)} axes, its sharding rule {axes} has {len(axes)}")
    spec = []
    for logical, size in zip(axes, shape, strict=False):
        mesh_axis = None if logical is None else getattr(config, logical)
        parts = mesh.shape.get(mesh_axis, 1)
        if size % parts and logical not in ("kv_heads", "vision_heads"):
            raise ValueError(f"parameter {path}: {logical} {size} is not divisible by mesh axis {mesh_axis} = {parts}")
        spec.append(mesh_axis if parts > 1 and size % parts == 0 else None)
    return PartitionSpec(*spec)


def state_shardings(state: TrainState, params_sharding: ArrayTree, replicated: NamedSharding) -> ArrayTree:
    """Moments are sharded like their parameters; counters, and moments of another shape (factors), are replicated.

    A moment is recognised by its path, which ends in the path of its parameter.
    """
    shapes = jax.tree.leaves(state.params)
    by_path = {
        _names(path): (shape.shape, sharding)
        for (path, sharding), shape in zip(
            jax.tree_util.tree_flatten_with_path(params_sharding)[0], shapes, strict=True
        )
    }
    longest = max(map(len, by_path))

    def choose(path, leaf):
        names = _names(path)
        for length in range(min(len(names), longest), 0, -1):
            shape, sharding = by_path.get(names[-length:], (None, None))
            if shape == leaf.shape:
                return sharding
        return replicated

    return jax.tree_util.tree_map_with_path(choose, state)


def _names(path) -> tuple[str, ...]:
    return tuple(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def gather_parts(part: Float[Array, "..."], axis: int, dtype: jnp.dtype) -> Float[Array, "..."]:
    """Inside a shard_map over the batch axes: the whole of an array that is in parts over "fsdp" along `axis`.

    It travels in `dtype` and has the type of the parts. Its gradient is summed where it is used, without a word between
    the devices, and meets once, in that type, on the way back: one reduce-scatter.
    """
    mesh = jax.sharding.get_abstract_mesh()
    others = tuple(name for name in BATCH_AXES if name != FSDP_AXIS and mesh.shape.get(name, 1) > 1)
    # Said to vary over the other axes from the start: else their sum is taken at every use.
    return _gather_parts(jax.lax.pcast(part, others, to="varying") if others else part, axis, dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather_parts(part, axis, dtype):
    return jax.lax.all_gather(part.astype(dtype), FSDP_AXIS, axis=axis, tiled=True).astype(part.dtype)


def _gather_parts_forward(part, axis, dtype):
    return _gather_parts(part, axis, dtype), None


def _gather_parts_backward(axis, dtype, _, cotangent):
    return (jax.lax.psum_scatter(cotangent, FSDP_AXIS, scatter_dimension=axis, tiled=True),)


_gather_parts.defvjp(_gather_parts_forward, _gather_parts_backward)


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Axis `axis` of an array spread over the mesh's data axes, everything else replicated."""
    present = tuple(name for name in BATCH_AXES if name in mesh.shape)
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, present or None))


def batch_axis(key_path: jax.tree_util.KeyPath) -> int:
    """The batch axis of an array in the pytrees of types.py, by its field name."""
    name = getattr(key_path[-1], "name", None) if key_path else None
    return 1 if name in ("positions", "deepstack") else 0


def batch_shardings(tree: ArrayTree, mesh: Mesh) -> ArrayTree:
    """`batch_sharding` of every array of a batch, of arrays or shapes with a batch axis."""
    return jax.tree_util.tree_map_with_path(lambda path, _: batch_sharding(mesh, batch_axis(path)), tree)


def with_shardings(shapes: ArrayTree, shardings: ArrayTree) -> ArrayTree:
    """Shapes that say where their arrays live."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
    )


def replicate(tree: ArrayTree, mesh: Mesh) -> ArrayTree:
    """Every array of `tree` whole on every device. A shape stays a shape, placed so: programs that are only compiled
    need no more."""
    whole = NamedSharding(mesh, PartitionSpec())

    def place(leaf):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole)
        return jax.device_put(leaf, whole)

    return jax.tree.map(place, tree)


def shard_batch(tree: ArrayTree, mesh: Mesh) -> ArrayTree:
    """Turns a host batch (Prompts, Experience, ...) into global arrays, each process giving its own rows.

    Scalars are replicated. With several processes `Prompts.feature_index` comes in counting from the process's own
    packing rows; it is shifted here to count over the global ones.

    Raises:
      ValueError: rows that the data axes do not divide.
    """
    local_parts = math.prod(mesh.local_mesh.shape.get(name, 1) for name in BATCH_AXES)

    def place(key_path, leaf):
        if np.ndim(leaf) == 0:
            return jax.make_array_from_process_local_data(NamedSharding(mesh, PartitionSpec()), leaf)
        axis = batch_axis(key_path)
        if leaf.shape[axis] % local_parts:
            path = jax.tree_util.keystr(key_path, simple=True, separator="/")
            raise ValueError(f"batch {path} {leaf.shape}: axis {axis} is not divisible into {local_parts} local parts")
        return jax.make_array_from_process_local_data(batch_sharding(mesh, axis), leaf)

    def is_prompts(node):
        return isinstance(node, Prompts)

    if jax.process_count() > 1:
        tree = jax.tree.map(
            lambda node: _shift_features(node, mesh) if is_prompts(node) else node, tree, is_leaf=is_prompts
        )
    return jax.tree_util.tree_map_with_path(place, tree)


def process_share(mesh: Mesh) -> tuple[int, int]:
    """(index, count): this process feeds part `index` of the `count` equal, contiguous parts of every batch.

    Processes whose devices differ on other mesh axes only feed the same part.

    Raises:
      ValueError: its devices do not lie together on the data axes.
    """
    axes = [name for name in mesh.axis_names if name in BATCH_AXES]
    parts = math.prod(mesh.shape[name] for name in axes)
    rows = np.moveaxis(mesh.devices, [mesh.axis_names.index(name) for name in axes], range(len(axes))).reshape(
        parts, -1
    )
    own = [part for part in range(parts) if any(device.process_index == jax.process_index() for device in rows[part])]
    if parts % len(own) or own[0] % len(own) or own[-1] - own[0] != len(own) - 1:
        raise ValueError(
            f"mesh {dict(mesh.shape)}: process {jax.process_index()} holds parts {own} of {parts} of a batch, which "
            "are not one run; give data and fsdp sizes that fit the devices of a host"
        )
    return own[0] // len(own), parts // len(own)


def _shift_features(prompts: Prompts, mesh: Mesh) -> Prompts:
    segments = jax.make_array_from_process_local_data(batch_sharding(mesh), prompts.images.segment_ids)
    first_row = min(shard.index[0].start or 0 for shard in segments.addressable_shards)
    first_feature = first_row * segments.shape[1] // 4  # four patches make one merged token
    index = np.where(prompts.vision_mask, prompts.feature_index + np.int32(first_feature), 0)
    return dataclasses.replace(prompts, feature_index=index)
