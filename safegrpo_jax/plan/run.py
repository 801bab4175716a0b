"""`--mode=plan`: will the programs of this config fit a TPU slice, and about how long would they take?

Compiles every program of a GRPO step for a slice that need not exist, prints a table and writes `plan.json` and
`plan.html`. All figures are compiled or estimated; nothing is timed.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from safegrpo_jax.config import Config
from safegrpo_jax.models.qwen_vl import QwenVLConfig
from safegrpo_jax.plan import entries as entries_lib
from safegrpo_jax.plan.compile import ProgramPlan, compile_entry
from safegrpo_jax.plan.page import write_page
from safegrpo_jax.plan.roofline import EFFICIENCY, StepEstimate, estimate_step, roofline
from safegrpo_jax.plan.topology import GIB, Topology, describe
from safegrpo_jax.sharding import make_mesh

FITS, DOES_NOT_FIT = 0, 1
DISCLAIMER = "compiled and estimated, not timed"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What was found for one config on one slice."""

    topology: Topology
    config: Config
    model: QwenVLConfig
    programs: tuple[ProgramPlan, ...]
    seconds: float

    @property
    def fits(self) -> bool:
        return all(program.fits(self.topology.chip.hbm_bytes) for program in self.programs)

    @property
    def step(self) -> StepEstimate:
        return estimate_step(
            self.programs, self.topology.chip, sampled_tokens(self.config), self.config.train.num_steps
        )


def sampled_tokens(config: Config) -> float:
    """Tokens of a step's completions, of the length that entries.py takes for typical."""
    settings = config.sampling
    rows = config.train.prompts_per_step * settings.group_size
    return rows * settings.max_new_tokens / entries_lib.TYPICAL_SHARE


def plan_mode(config: Config, topology_name: str, workdir: Path) -> int:
    """Plans, prints and writes; the exit code is 1 where a program does not fit.

    Raises:
      ValueError: no such topology, no libtpu, no model named, or a mesh of another size than the slice.
    """
    topology = describe(topology_name)
    model = entries_lib.planned_model(config)
    plan = make_plan(config, model, topology, report=lambda line: print(line, flush=True))
    print("\n".join(summary_lines(plan)))
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "plan.json").write_text(json.dumps(as_json(plan), indent=1) + "\n")
    write_page(workdir / "plan.html", as_json(plan))
    print(f"plan.json  {workdir / 'plan.json'}\nplan.html  {workdir / 'plan.html'}")
    return FITS if plan.fits else DOES_NOT_FIT


def make_plan(
    config: Config,
    model: QwenVLConfig,
    topology: Topology,
    only: Sequence[str] = (),
    report: Callable[[str], None] = lambda line: None,
) -> Plan:
    """Compiles the programs of a step (or `only` the named ones), one after another, reporting a line for each.

    Raises:
      ValueError: the mesh has another size than the slice.
    """
    started = time.monotonic()
    mesh = make_mesh(config.mesh.axis_sizes, topology.devices)
    programs = entries_lib.abstract_programs(config, model, mesh)
    report(f"{topology.name}, {len(topology.devices)} chips, mesh {_mesh_text(config)}: {DISCLAIMER}")
    report(HEADER)
    done = []
    for entry in entries_lib.list_entries(config, model, programs):
        if only and entry.name not in only:
            continue
        done.append(compile_entry(entry))
        jax.clear_caches()  # traces and executables of programs that are done with are gigabytes
        report(table_line(done[-1], topology))
    return Plan(topology, config, model, tuple(done), time.monotonic() - started)


HEADER = (
    f"{'program':8s} {'fits':>5s} {'total':>7s} {'args':>7s} {'temp':>7s} {'beside':>7s} {'calls':>7s} "
    f"{'compile':>8s}  one call cannot be faster than (limit)   [GiB of each device]"
)


def table_line(program: ProgramPlan, topology: Topology) -> str:
    """One program of the table."""
    if program.refusal:
        return f"{program.name:8s} {'NO':>5s}  {program.refusal}"
    chip = topology.chip
    line = roofline(program, chip)
    gib = [
        f"{size / GIB:7.2f}"
        for size in (
            program.total_bytes, program.argument_bytes, program.temporary_bytes, sum(program.resident.values())
        )
    ]  # fmt: skip
    return (
        f"{program.name:8s} {'yes' if program.fits(chip.hbm_bytes) else 'NO':>5s} {' '.join(gib)} {program.calls:7.4g} "
        f"{program.compile_seconds:6.0f} s  {_duration(line.seconds)} ({line.limit})"
        f"{' lower bound' if program.traffic is None else ''}"
    )


def summary_lines(plan: Plan) -> list[str]:
    """What the table means: does it fit, a step, the run, and what to change."""
    step, chip = plan.step, plan.topology.chip
    fullest = max(plan.programs, key=lambda program: program.total_bytes)
    share = ", ".join(f"{value:.0%} of {name}" for name, value in EFFICIENCY.items())
    lines = [
        "",
        f"{'fits' if plan.fits else 'DOES NOT FIT'}: at most {fullest.total_bytes / GIB:.2f} of "
        f"{chip.hbm_bytes / GIB:.2f} GiB ({fullest.name}); planned in {plan.seconds:.0f} s",
    ]
    if plan.fits:
        lines += [
            f"a step of {step.tokens:,.0f} sampled tokens: {step.roofline_seconds:.0f} s at the peaks of the chip, "
            f"{step.seconds:.0f} s at {share}",
            f"at that pace {step.tokens_per_second_per_chip:.0f} sampled tokens/s/chip, {step.model_flops_share:.0%} "
            f"of peak FLOP/s, {step.days:.1f} days for {step.num_steps} steps, {step.device_hours:,.0f} device-hours",
        ]
    return lines + [f"to change: {line}" for line in advice(plan)]


def advice(plan: Plan) -> list[str]:
    """For each program that does not fit: by how much, what fills the device, and the keys that change it."""
    hbm, config = plan.topology.chip.hbm_bytes, plan.config
    lines = []
    for program in plan.programs:
        if program.fits(hbm):
            continue
        excess = (program.total_bytes - hbm) / GIB
        parts = {"arguments and results": program.peak_bytes - program.temporary_bytes}
        parts |= {"temporaries": program.temporary_bytes} | program.resident
        largest = sorted(parts.items(), key=lambda part: -part[1])[:3]
        text = ", ".join(f"{name} {size / GIB:.1f} GiB" for name, size in largest)
        lines.append(f"{program.name} is over by {excess:.1f} GiB ({text}); {_remedy(program.name, config)}")
    state = next((p.argument_bytes for p in plan.programs if p.name == "update"), 0)
    if state > 0.6 * hbm:
        chips = math.ceil(state * len(plan.topology.devices) / (0.5 * hbm))
        lines.append(
            f"the trained state alone is {state / GIB:.1f} of {hbm / GIB:.2f} GiB: at least {chips} chips of this kind,"
            " or config.model.lora.rank to train adapters"
        )
    return lines


def _remedy(name: str, config: Config) -> str:
    update, sampling = config.policy_update, config.sampling
    match name:
        case "update" | "score":
            options = [f"more policy_update.num_microbatches than {update.num_microbatches}"]
            options += [] if config.model.remat else ["model.remat=True"]
            options += [f"a smaller model.logits_chunk than {config.model.logits_chunk}", "more chips along mesh.fsdp"]
        case "decode" | "start" | "finish":
            options = [f"fewer sampling.num_slots than {sampling.num_slots or 'all'}", "more mesh.sampling_tensor"]
        case "prefill":
            options = ["a smaller sampling.prefill_batch", "fewer sampling.num_prefixes"]
        case _:
            options = ["fewer train.prompts_per_step", "a smaller processor.max_pixels", "more chips along mesh.fsdp"]
    return "try " + ", or ".join(options)


def as_json(plan: Plan) -> dict:
    """Everything that was found, as plain values."""
    chip = plan.topology.chip
    programs = []
    for program in plan.programs:
        line = roofline(program, chip)
        programs.append(
            dataclasses.asdict(program)
            | {"total_bytes": program.total_bytes, "fits": program.fits(chip.hbm_bytes)}
            | {"roofline_seconds": line.terms, "limit": line.limit, "expected_seconds": line.expected_seconds}
        )
    step = plan.step
    derived = ("tokens_per_second_per_chip", "model_flops_share", "days", "device_hours")
    return {
        "note": DISCLAIMER,
        "topology": plan.topology.name,
        "chip": dataclasses.asdict(chip),
        "model": plan.config.model.size or plan.config.model.path,
        "mesh": _mesh_text(plan.config),
        "fits": plan.fits,
        "plan_seconds": plan.seconds,
        "programs": programs,
        "efficiency": EFFICIENCY,
        "step": dataclasses.asdict(step) | {name: getattr(step, name) for name in derived},
        "advice": advice(plan),
    }


def _mesh_text(config: Config) -> str:
    text = " x ".join(f"{name} {size}" for name, size in config.mesh.axis_sizes.items() if size > 1) or "one device"
    sampling = config.mesh.sampling_axis_sizes["tensor"]
    return text + (f" (sampling: tensor {sampling})" if sampling != config.mesh.tensor else "")


def _duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.2f} ms"
