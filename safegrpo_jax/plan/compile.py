"""Compiles the programs of a step and keeps what the compiler says of each: bytes, seconds, traffic, or its refusal.

Every figure of memory is the compiler's own (`memory_analysis`), of one device. What is resident beside a program's
arguments is added to it, since the compiler does not know of it.
"""

from __future__ import annotations

import dataclasses
import re
import time

import jax
from absl import logging

from safegrpo_jax.plan import hlo
from safegrpo_jax.plan.entries import Entry
from safegrpo_jax.plan.flops import count_flops
from safegrpo_jax.plan.hlo import Traffic

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclasses.dataclass(frozen=True)
class ProgramPlan:
    """What is known of one program before it ever ran. Bytes are of one device, `flops` of one call on all of them.

    `peak_bytes` is the compiler's: arguments, results that reuse none of them, temporaries. `refusal` is its message
    where it would not compile; then `peak_bytes` is what it says it needs. `traffic` is None where the text of the
    program could not be read, see `no_traffic`.
    """

    name: str
    calls: float
    num_devices: int
    lower_seconds: float
    compile_seconds: float
    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temporary_bytes: int
    peak_bytes: int
    resident: dict[str, int]
    flops: int
    traffic: Traffic | None
    no_traffic: str = ""
    refusal: str = ""

    @property
    def total_bytes(self) -> int:
        return self.peak_bytes + sum(self.resident.values())

    def fits(self, hbm_bytes: int) -> bool:
        return not self.refusal and self.total_bytes <= hbm_bytes


def compile_entry(entry: Entry) -> ProgramPlan:
    """Lowers and compiles one program. A program that needs more memory than a device has is a result, not an error."""
    started = time.monotonic()
    traced = entry.trace()
    flops = count_flops(traced.jaxpr, entry.turns)
    with jax.set_mesh(entry.mesh):
        lowered = traced.lower()
    lowered_at = time.monotonic()
    found = {"name": entry.name, "calls": entry.calls, "num_devices": entry.mesh.size, "resident": entry.resident}
    found |= {"flops": flops, "lower_seconds": lowered_at - started}
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        seconds = time.monotonic() - lowered_at
        needed = needed_bytes(str(error))
        return ProgramPlan(
            **found, compile_seconds=seconds, argument_bytes=0, output_bytes=0, alias_bytes=0, temporary_bytes=needed,
            peak_bytes=needed, traffic=None, no_traffic="not compiled", refusal=str(error).splitlines()[0],
        )  # fmt: skip
    seconds, memory = time.monotonic() - lowered_at, compiled.memory_analysis()
    traffic, no_traffic = read_traffic(compiled, entry.turns)
    return ProgramPlan(
        **found,
        compile_seconds=seconds,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        peak_bytes=memory.peak_memory_in_bytes,
        traffic=traffic,
        no_traffic=no_traffic,
    )


def needed_bytes(message: str) -> int:
    """The bytes that the compiler's refusal says a program needs, e.g. "(298.86G) exceeds available HBM (30.75G)".

    Raises:
      ValueError: the message names none.
    """
    found = re.search(r"([\d.]+)([KMGT]?)\)? (?:exceeds available|of [\d.]+[KMGT]? hbm)", message)
    if not found:
        raise ValueError(f"the compiler refused a program without saying what it needs: {message}")
    return int(float(found.group(1)) * _UNITS[found.group(2)])


def read_traffic(compiled: jax.stages.Compiled, turns: int) -> tuple[Traffic | None, str]:
    """Traffic of a compiled program, or why it is unknown: some TPU programs cannot be printed by this jaxlib."""
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        logging.warning("the compiled program cannot be printed: %s", error)
        return None, str(error).splitlines()[0]
    return hlo.measure(hlo.parse(text), turns), ""
