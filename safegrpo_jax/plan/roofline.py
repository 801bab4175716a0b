"""Seconds that a program cannot be faster than, from its operations and bytes and the peaks of a chip.

Three terms: matmuls at peak, bytes through HBM, bytes through the links. The largest limits, as if the others hid
behind it. No program reaches its roofline; `EFFICIENCY` says how near real ones come, and is an assumption: training
programs of this size are published at 45 to 65 % of peak (MaxText), decoding at about 70 % of the memory's bandwidth.
Source: the roofline model, Williams et al. 2009.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from safegrpo_jax.plan.compile import ProgramPlan
from safegrpo_jax.plan.topology import Chip

EFFICIENCY = {"matmuls": 0.5, "memory": 0.7, "links": 0.7}
_ROUNDS = {"all-reduce": 2}  # an all-reduce is a reduce-scatter and an all-gather


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of one call by what would limit it alone."""

    terms: dict[str, float]

    @property
    def limit(self) -> str:
        return max(self.terms, key=lambda name: self.terms[name])

    @property
    def seconds(self) -> float:
        return self.terms[self.limit]

    @property
    def expected_seconds(self) -> float:
        """At `EFFICIENCY` of each peak."""
        return max(seconds / EFFICIENCY[name] for name, seconds in self.terms.items())


@dataclasses.dataclass(frozen=True)
class StepEstimate:
    """A whole step: seconds at the roofline and as expected; tokens are those sampled."""

    roofline_seconds: float
    seconds: float
    tokens: float
    flops: float
    num_devices: int
    peak_flops: float
    num_steps: int

    @property
    def tokens_per_second_per_chip(self) -> float:
        return self.tokens / self.seconds / self.num_devices

    @property
    def model_flops_share(self) -> float:
        """Operations of the step over those that the chips could have done meanwhile."""
        return self.flops / (self.seconds * self.num_devices * self.peak_flops)

    @property
    def days(self) -> float:
        return self.seconds * self.num_steps / 86400

    @property
    def device_hours(self) -> float:
        return self.seconds * self.num_steps * self.num_devices / 3600


def roofline(program: ProgramPlan, chip: Chip) -> Roofline:
    """The roofline of one call. Where the traffic is unknown, memory is that of arguments and results alone and the
    links are left out: a lower bound."""
    terms = {"matmuls": program.flops / program.num_devices / chip.flops}
    if program.traffic is None:
        moved = program.argument_bytes + program.output_bytes - program.alias_bytes
        return Roofline(terms | {"memory": moved / chip.hbm_bandwidth})
    sent = sum(size * _ROUNDS.get(kind, 1) for kind, size in program.traffic.collectives.items())
    return Roofline(
        terms | {"memory": program.traffic.memory_bytes / chip.hbm_bandwidth, "links": sent / chip.link_bytes}
    )


def estimate_step(programs: Sequence[ProgramPlan], chip: Chip, tokens: float, num_steps: int) -> StepEstimate:
    """Sums the programs of a step, each as often as it is called."""
    lines = [(program.calls, roofline(program, chip)) for program in programs]
    return StepEstimate(
        roofline_seconds=sum(calls * line.seconds for calls, line in lines),
        seconds=sum(calls * line.expected_seconds for calls, line in lines),
        tokens=tokens,
        flops=sum(program.calls * program.flops for program in programs),
        num_devices=programs[0].num_devices,
        peak_flops=chip.flops,
        num_steps=num_steps,
    )
