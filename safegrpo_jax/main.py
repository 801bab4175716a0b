"""Command line: flags, devices, and the choice of mode.

    python -m safegrpo_jax.main --config=FILE[:arg] [--workdir=DIR] [--mode=train|evaluate|sample|export|plan]
        [--config.section.key=value] [--image=FILE --prompt=TEXT] [--topology=v4:2x2x4]
        [--distributed | --coordinator=HOST:PORT --num_processes=N --process_id=I]

Bad input ends with one line on stderr and exit code 2, a non-finite number with 1, as does a plan that does not fit.
An interrupted run saves and exits with 128 plus the signal: 130 after Ctrl-C, 143 after SIGTERM, by which a platform
announces that it takes the machine.

Several processes (hosts of a slice) run the same command with --distributed on Cloud TPU VMs, elsewhere with the three
flags of the coordinator, or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID in the environment. They exit
alike; with 75 where one of them was lost, and the same commands go on from the last checkpoint.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import traceback

if __name__ == "__main__" and sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
    # The allocator reads this when the process starts, so the process starts again, before the slow imports. With huge
    # pages a training step on a CPU takes a quarter to a third less time: fresh buffers fault in page by page.
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    os.execv(sys.executable, sys.orig_argv)
# transformers reads tokenizer files here, for which it needs no torch: no advice to install it.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

from pathlib import Path

import jax
from absl import flags, logging
from ml_collections import config_flags

from safegrpo_jax import config as config_lib
from safegrpo_jax import processes, train
from safegrpo_jax import run as run_lib
from safegrpo_jax.checkpoint import package_versions
from safegrpo_jax.metrics import MetricsWriter, NonFiniteError
from safegrpo_jax.plan.run import plan_mode

FLAGS = flags.FLAGS
_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file with an optional argument: FILE[:arg].")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for all that the run leaves; default workdirs/<config>[-arg].")
_MODE = flags.DEFINE_enum("mode", "train", ["train", "evaluate", "sample", "export", "plan"], "What to do.")
_IMAGE = flags.DEFINE_string("image", None, "For --mode=sample: an image file.")
_PROMPT = flags.DEFINE_string("prompt", None, "For --mode=sample: the request.")
_TOPOLOGY = flags.DEFINE_string("topology", None, "For --mode=plan: a TPU slice, such as v4:2x2x4; none is needed.")
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "One of several processes, which the platform tells of.")
_COORDINATOR = flags.DEFINE_string("coordinator", "", "One of several processes: HOST:PORT of process 0.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", 0, "With --coordinator: how many processes there are.")
_PROCESS_ID = flags.DEFINE_integer("process_id", -1, "With --coordinator: which one this is, from 0.")
_DEBUG = flags.DEFINE_bool("debug", False, "Show the traceback of an input error.")

FAILED, BAD_INPUT, INTERRUPTED_BY = 1, 2, 128


def parse_flags(argv: list[str]) -> None:
    """Parses the command line.

    Raises:
      ValueError: an unknown flag or key (with a suggestion), a config file that is missing or does not run.
    """
    named = next((arg.split("=", 1)[1] for arg in argv if arg.startswith("--config=")), "")
    if named and not Path(named.split(":")[0]).is_file():
        raise ValueError(f"--config={named}: there is no such file; the shipped ones are in configs/")
    try:
        rest = FLAGS(argv)[1:]
        config = _CONFIG.value
    except flags.Error as error:
        lines = str(error).strip().splitlines()
        if len(lines) > 1:  # a traceback through the config file: its last line says what is wrong
            raise ValueError(f"--config={named}: the file does not run: {lines[-1]}") from error
        raise ValueError(lines[0]) from error
    except (AttributeError, KeyError, TypeError) as error:  # how ml_collections reports a key that is not there
        raise ValueError(f"--config: no such key: {str(error.args[0]).strip()}".replace("\n", " ")) from error
    except (ImportError, SyntaxError, NameError) as error:
        raise ValueError(f"--config={named}: the file does not run: {error}") from error
    if rest:
        raise ValueError(f"unexpected argument {rest[0]!r}; flags are written --name=value")
    if config is None:
        raise ValueError("--config is missing; try --config=configs/cpu_demo.py")


def default_workdir(config_flag: str) -> Path:
    """`configs/cpu_demo.py:full` -> `workdirs/cpu_demo-full`."""
    file, _, argument = config_flag.partition(":")
    return Path("workdirs") / (Path(file).stem + (f"-{argument}" if argument else ""))


def set_devices(mesh: config_lib.MeshConfig) -> None:
    """Chooses platform and number of host devices; must run before the first computation."""
    if mesh.platform:
        jax.config.update("jax_platforms", mesh.platform)
    if mesh.cpu_devices:
        jax.config.update("jax_num_cpu_devices", mesh.cpu_devices)


def join_processes(config: config_lib.Config) -> None:
    """Where there are several processes, finds them and makes sure that all were started alike.

    Raises:
      ValueError: they were not found, or differ in config, package versions or code.
    """
    given = (_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    if not (_DISTRIBUTED.value or given != ("", 0, -1) or "JAX_COORDINATOR_ADDRESS" in os.environ):
        return
    processes.join(*given)
    packages = package_versions() | {"python": sys.version.split()[0]}
    facts = {
        "config": dataclasses.asdict(config),
        "packages": packages,
        "code": processes.code_sha256(),
        "mode": _MODE.value,
    }
    processes.agree("start", facts)


def prepare() -> run_lib.Run:
    """Reads the config, the model, the data and the work directory that the flags name.

    Raises:
      ValueError, OSError: anything wrong with them.
    """
    config = config_lib.from_config_dict(_CONFIG.value)
    if "://" in (_WORKDIR.value or ""):
        raise ValueError(f"--workdir={_WORKDIR.value}: name a folder; a bucket can be mounted as one (gcsfuse)")
    workdir = Path(_WORKDIR.value or default_workdir(config_flags.get_config_filename(FLAGS["config"])))
    set_devices(config.mesh)
    join_processes(config)
    if _MODE.value == "train" and processes.is_first():
        print(f"work directory {workdir}; preparing model and data", flush=True)
    match _MODE.value:
        case "train":
            return run_lib.build_run(config, workdir, run_lib.needed_splits(config))
        case "evaluate":
            return run_lib.build_run(config, workdir, config.evaluation.splits)
    if _MODE.value == "sample" and not (_IMAGE.value and _PROMPT.value):
        raise ValueError("--mode=sample needs --image=FILE and --prompt=TEXT")
    return run_lib.build_run(config, workdir, ())


def plan_run() -> int:
    """Plans the run on a slice that need not exist and returns the exit code.

    Raises:
      ValueError: anything wrong with the flags or the config.
    """
    if not _TOPOLOGY.value:
        raise ValueError("--mode=plan needs --topology, such as --topology=v4:2x2x4 or v5e:8x8")
    jax.config.update("jax_platforms", "cpu")  # the slice is only described
    config = config_lib.from_config_dict(_CONFIG.value)
    workdir = Path(_WORKDIR.value or default_workdir(config_flags.get_config_filename(FLAGS["config"])))
    return plan_mode(config, _TOPOLOGY.value, workdir)


def train_run(run: run_lib.Run, writer: MetricsWriter) -> int:
    """Trains, prints the results and their paths, and returns the exit code."""
    number = train.train(run, writer)
    if not processes.is_first():
        return number and INTERRUPTED_BY + number
    if number:
        print(f"stopped; run the same command again to go on (work directory {run.workdir})")
        return INTERRUPTED_BY + number
    print(train.results_table(run))
    for name in ("report.html", "summary.json", "metrics.jsonl", "rollouts", "export"):
        print(f"{name:14s} {run.workdir / name}")
    return 0


def look(run: run_lib.Run) -> str | Path:
    """Runs a mode that trains nothing and returns what to print."""
    match _MODE.value:
        case "evaluate":
            return train.evaluate_checkpoint(run)
        case "export":
            return run.export(train.latest_params(run))
    return train.sample(run, Path(_IMAGE.value), _PROMPT.value)


def execute() -> int:
    """Runs what the command line asks for and returns the exit code."""
    # While a run trains, a ValueError is a fault of the program and shows its traceback.
    input_errors: tuple[type[Exception], ...] = (ValueError, OSError)
    try:
        parse_flags(sys.argv)
        if _MODE.value == "plan":
            return plan_run()
        run = prepare()
        with jax.set_mesh(run.mesh):
            if _MODE.value != "train":
                result = look(run)
                if processes.is_first():
                    print(result)
                code = 0
            else:
                writer = run_lib.open_metrics(run)
                input_errors = ()
                code = train_run(run, writer)
        processes.leave()
        return code
    except NonFiniteError as error:
        return _fail(FAILED, error)
    except TimeoutError as error:  # another process is missing
        return _fail(processes.LOST, error)
    except input_errors as error:
        if FLAGS.is_parsed() and _DEBUG.value:
            raise
        return _fail(BAD_INPUT, error)


def _fail(code: int, error: Exception) -> int:
    print(f"error: {error}", file=sys.stderr)
    if processes.joined():
        processes.abandon(code, str(error))
    return code


def main() -> None:
    logging.set_verbosity(logging.ERROR)
    try:
        code = execute()
    except BaseException as error:
        if not processes.joined():
            raise
        traceback.print_exc()
        if isinstance(error, jax.errors.JaxRuntimeError):
            processes.await_verdict()
        processes.abandon(FAILED, repr(error))
    sys.exit(code)


if __name__ == "__main__":
    main()
