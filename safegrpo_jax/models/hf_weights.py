"""Qwen-VL safetensors files <-> parameters. Refuses to guess.

weight_table.py says how every parameter is named and laid out in the files; loading and exporting both read it. All
names and shapes are checked from the file headers before a single weight is read. A parameter is then assembled shard
by shard from memory-mapped files, so neither host nor device ever holds the model twice.
File format: https://huggingface.co/docs/safetensors (eight-byte header length, JSON header, raw tensors).
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from safegrpo_jax.models.hf_config import config_from_hf, config_to_hf, read_json
from safegrpo_jax.models.lora import LoraConfig
from safegrpo_jax.models.qwen_vl import QwenVLConfig, init_params
from safegrpo_jax.models.weight_table import Leaf, describe_leaves, from_file, match_expert_layout, to_file
from safegrpo_jax.types import Params

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
FILE_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}

QUANTISED_DTYPES = ("F8_", "F6_", "F4", "I8", "U8")  # beginnings of the type names


def load(folder: str | Path, config: QwenVLConfig, dtype: Any = jnp.float32, shardings: Params | None = None) -> Params:
    """Loads the weights of a model folder, each parameter cast to `dtype` and placed by `shardings`; no adapters.

    Beside the result the host holds one parameter at a time (all its layers): its mapped pages and one copy.

    Args:
      shardings: a tree like the parameters; without it everything goes to the default device.

    Raises:
      ValueError: a tensor is unknown, missing, set twice, misshapen, quantised or of another type; a file is
        broken.
    """
    tensors = _open_tensors(Path(folder))
    leaves = match_expert_layout(_leaves(config), {name: tensor.shape for name, (tensor, _) in tensors.items()})
    expected = {name: leaf for leaf in leaves for name in leaf.names}
    for name, (tensor, file) in tensors.items():
        if name not in expected:
            raise ValueError(f"{file}: unknown tensor {name}; a tied model, for one, has no lm_head.weight")
        if tensor.shape != expected[name].file_shape:
            raise ValueError(f"{file}: tensor {name} has shape {tensor.shape}, expected {expected[name].file_shape}")
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise ValueError(f"{folder}: missing tensor {missing[0]} ({len(missing)} missing in all)")

    placements = [None] * len(leaves) if shardings is None else jax.tree.leaves(shardings)
    arrays = []
    for leaf, place in zip(leaves, placements, strict=True):
        # Taken out, so that the mapped pages of a parameter go before the next one is read.
        views = [from_file(tensors.pop(name)[0], leaf) for name in leaf.names]
        arrays.append(_assemble(leaf, views, dtype, place))
    return jax.tree.unflatten(jax.tree.structure(_abstract_params(config)), arrays)


def export(
    folder: str | Path,
    params: Params,
    config: QwenVLConfig,
    hf_config: dict[str, Any] | None = None,
    max_shard_bytes: int = 5 * 1024**3,
) -> None:
    """Writes a folder that `transformers` and `load` read, in the dtype of the parameters. Merge adapters before.

    Args:
      hf_config: content for config.json, such as the original checkpoint's; `config_to_hf(config)` if None. Its dtype
        entries are replaced by what is written.
      max_shard_bytes: a new file is started when the next tensor would exceed this.

    Raises:
      ValueError: the folder exists, `hf_config` describes another model, or the parameters are not the base model's or
        have mixed dtypes.
    """
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"{folder} exists already; export writes a new folder and never overwrites one")
    described = config if hf_config is None else config_from_hf(hf_config)
    if (described.vision, described.text) != (config.vision, config.text):
        raise ValueError("hf_config describes another model than config; export with the config.json it came from")
    if jax.tree.structure(params) != jax.tree.structure(_abstract_params(config)):
        raise ValueError("the parameters are not those of the base model; merge adapters with lora.merge_adapters")
    dtypes = {np.dtype(array.dtype) for array in jax.tree.leaves(params)}
    if len(dtypes) != 1 or not dtypes <= set(FILE_DTYPES.values()):
        raise ValueError(f"parameters have dtypes {sorted(map(str, dtypes))}; export needs one of {list(FILE_DTYPES)}")
    (dtype,) = dtypes

    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _write_shards(partial, _leaves(config), jax.tree.leaves(params), dtype, max_shard_bytes)
    content = _with_dtype(hf_config or config_to_hf(config), dtype.name)
    (partial / "config.json").write_text(json.dumps(content, indent=2) + "\n")
    os.rename(partial, folder)  # readers see the whole folder or none


def _leaves(config: QwenVLConfig) -> list[Leaf]:
    return describe_leaves(_abstract_params(config), config)


def _abstract_params(config: QwenVLConfig) -> Params:
    """Of the base model: adapters are not part of a model folder."""
    base = dataclasses.replace(config, lora=LoraConfig())
    return jax.eval_shape(lambda key: init_params(base, key), jax.random.key(0))


def _assemble(leaf: Leaf, views: list[np.ndarray], dtype: Any, sharding: jax.sharding.Sharding | None):
    shape = (len(leaf.names), *leaf.shape) if leaf.stacked else leaf.shape

    def read(index: tuple[slice, ...]) -> np.ndarray:
        if not leaf.stacked:
            return views[0][index].astype(dtype)
        chosen = [view[index[1:]] for view in views[index[0]]]
        part = np.empty((len(chosen), *chosen[0].shape), dtype)
        for layer, view in enumerate(chosen):  # layer by layer: never two copies of a stack
            part[layer] = view
        return part

    if sharding is None:
        return jnp.asarray(read((slice(None),) * len(shape)))
    return jax.make_array_from_callback(shape, sharding, read)


def _open_tensors(folder: Path) -> dict[str, tuple[np.ndarray, Path]]:
    """Every tensor of the folder as a memory-mapped array, with its file."""
    index_path = folder / INDEX_NAME
    if index_path.is_file():
        weight_map = read_json(index_path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index_path} has no weight_map; download it again")
        for name, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise ValueError(f"{index_path}: weight_map has {file!r} for {name}, not a file beside it")
    else:
        weight_map = {}
    tensors: dict[str, tuple[np.ndarray, Path]] = {}
    for file in sorted(set(weight_map.values())) or [SINGLE_NAME]:
        path = folder / file
        if not path.is_file():
            raise ValueError(f"{path} does not exist: the folder needs {SINGLE_NAME} or all files of {INDEX_NAME}")
        for name, tensor in _open_file(path):
            if name in tensors:
                raise ValueError(f"{path}: tensor {name} is set twice, before in {tensors[name][1]}")
            tensors[name] = (tensor, path)
    for name, file in weight_map.items():
        if name not in tensors:
            raise ValueError(f"{folder / file}: missing tensor {name}, which {INDEX_NAME} promises there")
    return tensors


def _open_file(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    size = path.stat().st_size
    with path.open("rb") as file:
        header_len = int.from_bytes(file.read(8), "little")
        if size < 8 or header_len > size - 8:
            raise ValueError(f"{path} is truncated or not a safetensors file; download it again")
        try:
            # Pairs, not a dict: a name that occurs twice in one header must not vanish here.
            header = json.loads(file.read(header_len), object_pairs_hook=list)
        except ValueError as error:
            raise ValueError(f"{path} has a broken safetensors header ({error}); download it again") from error
    for name, fields in _entries(header, path):
        if fields["dtype"].startswith(QUANTISED_DTYPES) or "_scale" in name.rsplit(".", 1)[-1]:
            raise ValueError(
                f"{path}: tensor {name} of type {fields['dtype']} belongs to a quantised checkpoint, which is refused;"
                " use the bfloat16 one"
            )
        if fields["dtype"] not in FILE_DTYPES:
            raise ValueError(
                f"{path}: tensor {name} is of type {fields['dtype']}; weights of type {', '.join(FILE_DTYPES)} are read"
            )
        start, end = fields["data_offsets"]
        if 8 + header_len + end > size:
            raise ValueError(f"{path} is truncated: tensor {name} ends beyond the file; download it again")
        shape, dtype = tuple(fields["shape"]), FILE_DTYPES[fields["dtype"]]
        if end - start != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{path}: tensor {name} holds {end - start} bytes, not what its shape {shape} needs")
        yield name, np.memmap(path, dtype, "r", 8 + header_len + start, shape)


def _entries(header: Any, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The tensors of a parsed header, whose objects are lists of pairs."""
    try:
        entries = [(name, dict(entry)) for name, entry in header if name != "__metadata__"]
        for _, fields in entries:
            (start, end), shape = fields["data_offsets"], fields["shape"]
            if not isinstance(fields["dtype"], str) or any(type(n) is not int or n < 0 for n in (start, end, *shape)):
                raise ValueError("entries without type, shape or offsets")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} has a broken safetensors header ({error}); download it again") from None
    return iter(entries)


def _write_shards(
    folder: Path, leaves: list[Leaf], arrays: Iterable[jax.Array | np.ndarray], dtype: np.dtype, max_shard_bytes: int
) -> None:
    shards: list[list[tuple[str, Leaf, Any, int | None]]] = [[]]
    filled = 0
    for leaf, array in zip(leaves, arrays, strict=True):
        num_bytes = math.prod(leaf.shape) * dtype.itemsize
        for layer, name in enumerate(leaf.names):
            if shards[-1] and filled + num_bytes > max_shard_bytes:
                shards.append([])
                filled = 0
            shards[-1].append((name, leaf, array, layer if leaf.stacked else None))
            filled += num_bytes
    files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = [SINGLE_NAME]
    for file, shard in zip(files, shards, strict=True):
        _write_file(folder / file, shard, dtype)
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name, *_ in shard}
        total = sum(len(leaf.names) * math.prod(leaf.shape) for leaf in leaves) * dtype.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


def _write_file(path: Path, shard: list[tuple[str, Leaf, Any, int | None]], dtype: np.dtype) -> None:
    code = next(code for code, file_dtype in FILE_DTYPES.items() if file_dtype == dtype)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, leaf, _, _ in shard:
        start, end = end, end + math.prod(leaf.shape) * dtype.itemsize
        header[name] = {"dtype": code, "shape": leaf.file_shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # tensors start on an eight-byte boundary
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for _, leaf, array, layer in shard:
            file.write(to_file(np.asarray(array if layer is None else array[layer]), leaf).tobytes())


def _with_dtype(hf_config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The config with its dtype entries, old and new spelling, root and sections, replaced by one true one."""
    content = {key: value for key, value in hf_config.items() if key != "torch_dtype"} | {"dtype": dtype}
    for key in content.keys() & {"text_config", "vision_config"}:
        section = {name: value for name, value in content[key].items() if name != "torch_dtype"}
        content[key] = section | ({"dtype": dtype} if "dtype" in hf_config[key] else {})
    return content
