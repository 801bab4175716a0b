"""A whole plan, on CPU devices: the programs are those that a run calls, memory is the compiler's, the rest adds up."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import smaller

from safegrpo_jax import config as config_lib
from safegrpo_jax.plan import entries as entries_lib
from safegrpo_jax.plan import run as plan_run
from safegrpo_jax.plan import topology as topology_lib
from safegrpo_jax.plan.compile import needed_bytes
from safegrpo_jax.plan.page import write_page
from safegrpo_jax.plan.roofline import EFFICIENCY, roofline
from safegrpo_jax.sharding import make_mesh

NAMES = ["copy", "encode", "start", "prefill", "decode", "finish", "score", "update"]


def zeros(tree):
    def make(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.device_put(
                jax.random.split(jax.random.key(0), leaf.shape or 1).reshape(leaf.shape), leaf.sharding
            )
        return jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding)

    return jax.tree.map(make, tree)


def test_every_program_of_a_step_is_there_once(plan):
    assert [program.name for program in plan.programs] == NAMES
    assert plan.fits
    assert all(program.traffic is not None and program.flops >= 0 for program in plan.programs)


def test_memory_is_the_compilers_and_what_is_beside(plan, tiny, topology):
    config, model = tiny
    programs = entries_lib.abstract_programs(config, model, make_mesh(config.mesh.axis_sizes, topology.devices))
    entry = next(entry for entry in entries_lib.list_entries(config, model, programs) if entry.name == "update")
    with jax.set_mesh(entry.mesh):
        memory = entry.trace().lower().compile().memory_analysis()
    update = plan.programs[-1]
    assert update.peak_bytes == memory.peak_memory_in_bytes
    assert update.argument_bytes == memory.argument_size_in_bytes
    assert update.alias_bytes >= 0.999 * entries_lib.bytes_per_device(entry.arguments[0])
    assert update.total_bytes == update.peak_bytes + sum(update.resident.values())
    by_leaf = sum(leaf.size * 4 for leaf in jax.tree.leaves(programs.abstract_params))
    assert update.resident["reference"] < by_leaf / 4, "spread over the mesh"


def test_shapes_are_those_that_a_run_passes_on(tiny):
    """The programs of a step called in turn on arrays: each takes what the one before gave, as the plan has it."""
    config, model = tiny
    mesh = make_mesh(config.mesh.axis_sizes)
    programs = entries_lib.abstract_programs(config, model, mesh)
    entries = {entry.name: entry for entry in entries_lib.list_entries(config, model, programs)}

    def check(given, planned):
        for value, shape in zip(jax.tree.leaves(given), jax.tree.leaves(planned), strict=True):
            assert (value.shape, value.dtype) == (shape.shape, shape.dtype)
            if shape.sharding is not None:
                assert value.sharding.is_equivalent_to(shape.sharding, value.ndim)

    def call(name, arguments):
        entry = entries[name]
        with jax.set_mesh(entry.mesh):
            return entry.function(*arguments, **entry.static)

    params = zeros(entries["copy"].arguments[0])
    copy = call("copy", [params])
    prompts = zeros(entries["encode"].arguments[1])
    features = call("encode", [copy, prompts])
    constants = zeros(entries["start"].arguments[4])
    check([copy, prompts, features], entries["start"].arguments[:3])
    state, pool, private, keys = call(
        "start", [copy, prompts, features, zeros(entries["start"].arguments[3]), constants]
    )
    check([state, private, pool], entries["decode"].arguments[1:4])
    index = np.zeros(entries["prefill"].arguments[3].shape, np.int32)
    pool = call("prefill", [copy, prompts, features, index, index, pool])
    queue = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), entries["decode"].arguments[4])
    state, private, _ = call("decode", [copy, state, private, pool, queue, keys, constants])
    check([state, constants], entries["finish"].arguments)
    rollouts = call("finish", [state, constants])
    check(rollouts, entries["score"].arguments[3])


def test_decode_is_counted_by_its_steps(plan, tiny):
    decode = plan.programs[NAMES.index("decode")]
    config = tiny[0]
    steps = 16 * 2 * 16 / entries_lib.TYPICAL_SHARE / config.sampling.num_slots
    assert decode.calls * config.sampling.decode_chunk == steps


def test_step_adds_up(plan):
    chip, step = plan.topology.chip, plan.step
    lines = [roofline(program, chip) for program in plan.programs]
    assert step.roofline_seconds == pytest.approx(
        sum(program.calls * line.seconds for program, line in zip(plan.programs, lines, strict=True))
    )
    update = lines[-1]
    assert update.terms["matmuls"] == pytest.approx(plan.programs[-1].flops / 8 / 1e12)
    assert update.expected_seconds == pytest.approx(max(update.terms[name] / EFFICIENCY[name] for name in update.terms))
    assert step.device_hours == pytest.approx(step.days * 24 * 8)
    assert 0 < step.model_flops_share < 1


def test_a_plan_that_does_not_fit_says_by_how_much_and_what_to_change(plan):
    largest = max(program.total_bytes for program in plan.programs)
    tight = smaller(plan, largest - 1)
    assert smaller(plan, largest).fits and not tight.fits
    text = "\n".join(plan_run.summary_lines(tight))
    assert "DOES NOT FIT" in text and "to change: " in text
    alone = smaller(plan, plan.programs[-1].argument_bytes)
    assert any("at least" in line and "chips of this kind" in line for line in plan_run.advice(alone))
    assert not plan_run.advice(plan)


def test_json_and_page(plan, tmp_path):
    content = json.loads(json.dumps(plan_run.as_json(smaller(plan, 1))))
    assert content["note"] == "compiled and estimated, not timed"
    assert [program["name"] for program in content["programs"]] == NAMES
    write_page(tmp_path / "plan.html", content)
    page = (tmp_path / "plan.html").read_text()
    assert page.count("class=bar") == len(NAMES) and "does not fit" in page
    assert "http" not in page and "<script" not in page


def test_what_the_compiler_refuses_is_read():
    message = "Ran out of memory on HBM, the total memory required for HLO temporaries (105.73G) exceeds available HBM"
    assert needed_bytes(message + " (30.75G).") == int(105.73 * 2**30)
    assert needed_bytes("Used 17.5G of 15.75G hbm. Exceeded hbm capacity by 1.7G.") == int(17.5 * 2**30)
    with pytest.raises(ValueError, match="without saying"):
        needed_bytes("no room")


@pytest.mark.parametrize("name", ["v4", "v4:2x2", "v7:2x2", "v5e:2x2x4", "v5e:2xa"])
def test_a_topology_of_no_slice_is_refused(name):
    with pytest.raises(ValueError, match="write a generation"):
        topology_lib.generation_of(name)


def test_without_libtpu_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(topology_lib.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install libtpu=="):
        topology_lib.describe("v4:2x2x4")


def test_a_config_that_names_no_model_is_refused():
    with pytest.raises(ValueError, match="needs config.model.size"):
        entries_lib.planned_model(config_lib.Config())


def test_exit_code_and_files(plan, tiny, topology, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plan_run, "describe", lambda name: topology)
    monkeypatch.setattr(plan_run, "make_plan", lambda *arguments, **keywords: plan)
    assert plan_run.plan_mode(tiny[0], "v4:2x2x2", tmp_path) == plan_run.FITS
    assert {path.name for path in tmp_path.iterdir()} == {"plan.json", "plan.html"}
    monkeypatch.setattr(plan_run, "make_plan", lambda *arguments, **keywords: smaller(plan, 1))
    assert plan_run.plan_mode(tiny[0], "v4:2x2x2", tmp_path) == plan_run.DOES_NOT_FIT
    assert "DOES NOT FIT" in capsys.readouterr().out
