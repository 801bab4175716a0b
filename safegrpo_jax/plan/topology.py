"""TPU slices by name, described by libtpu without one: devices to compile for, and what a chip can do.

Peaks are the vendor's per chip; `hbm_bytes` is what the compiler of libtpu 0.0.52 gives to programs: the limit that it
names when it refuses one. `link_bytes` is what one torus axis carries in both directions together, 2 x 45 GB/s (v4,
v5e) or 2 x 90 GB/s (v5p, v6e). Source: cloud.google.com/tpu/docs, one page for each generation.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Sequence

import jax
from jax.experimental import topologies

GIB = 1 << 30
_ENVIRONMENT = {  # libtpu is to describe a slice, not to look for one
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip: bytes of HBM for programs, peak bfloat16 FLOP/s, bytes/s of HBM and of a torus axis."""

    hbm_bytes: int
    flops: float
    hbm_bandwidth: float
    link_bytes: float


CHIPS = {
    "v4": Chip(int(30.75 * GIB), 275e12, 1228e9, 90e9),
    "v5e": Chip(int(15.75 * GIB), 197e12, 819e9, 90e9),
    "v5p": Chip(int(95.73 * GIB), 459e12, 2765e9, 180e9),
    "v6e": Chip(int(31.24 * GIB), 918e12, 1640e9, 180e9),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice: `name` as given, "generation:AxB" or "generation:AxBxC" in chips, its chip and its devices."""

    name: str
    chip: Chip
    devices: Sequence[jax.Device]


def generation_of(name: str) -> str:
    """The generation in the name of a topology.

    Raises:
      ValueError: not the name of a topology.
    """
    generation, _, bounds = name.partition(":")
    dimensions = 3 if generation in ("v4", "v5p") else 2
    if generation not in CHIPS or not re.fullmatch(r"\d+" + r"x\d+" * (dimensions - 1), bounds):
        raise ValueError(
            f"--topology={name!r}: write a generation ({', '.join(CHIPS)}) and its chips along each axis, three axes "
            "for v4 and v5p, two for v5e and v6e, such as v4:2x2x4 or v5e:4x4"
        )
    return generation


def describe(name: str) -> Topology:
    """Asks libtpu for the devices of a slice. Call it before jax has any other use of a TPU.

    Raises:
      ValueError: no such topology, or libtpu is not installed.
    """
    generation = generation_of(name)
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError("--mode=plan compiles with the TPU's compiler: pip install libtpu==0.0.52 (no TPU is needed)")
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    sides = [int(side) for side in name.partition(":")[2].split("x")]
    # A host has 2 x 2 chips, and a slice of fewer is one host.
    host = (*(min(2, side) for side in sides[:2]), 1)
    try:
        described = topologies.get_topology_desc(
            platform="tpu",
            topology_name=name,
            # A v4 chip is two cores that work as one device in this mode, as they do in a run.
            chip_config_name="megacore" if generation == "v4" else "default",
            chips_per_host_bounds=host,
            num_slices=1,
        )
    except (jax.errors.JaxRuntimeError, ValueError, RuntimeError) as error:
        raise ValueError(f"--topology={name}: libtpu knows no such slice ({str(error).splitlines()[0]})") from error
    assert len(described.devices) == math.prod(sides), "one device for each chip"
    return Topology(name, CHIPS[generation], described.devices)
