"""Several processes that run one program: how they find each other, agree, wait for each other, and end together.

On a slice every host runs the same command. Arrays span all of them, so a process that is missing, late or different
would leave the others waiting in a collective for ever; all this is to have them say what is wrong instead. Facts
and barriers go through jax's coordination service (a key-value store in process 0), never through the devices: they
work, and time out, when a device would hang. With one process every function returns at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from jax._src import distributed  # the coordination service has no public name; orbax reaches it the same way
from jax.experimental import multihost_utils

from safegrpo_jax.types import ArrayTree

LOST = 75  # exit code when another process is gone (EX_TEMPFAIL): the same command on all hosts goes on
JOIN_SECONDS = 300  # hosts of a slice are not set up at the same moment
AGREE_SECONDS = 300
WAIT_SECONDS = 3600  # for files that process 0 writes: exporting a large model to a bucket takes long
BEAT_SECONDS = 2.0
SILENT_SECONDS = 30.0  # without a sign of life for so long, a process counts as lost
GRACE_SECONDS = 5.0
LINGER_SECONDS = 15.0  # process 0 ends last, so that the others can read why: the store is in it
_LARGEST_GATHER = 1 << 28  # bytes of an array that every device holds whole for a moment

_leaving = threading.Event()
_names = itertools.count()  # barriers are used once; all processes meet the same ones in the same order


def join(coordinator: str = "", num_processes: int = 0, process_id: int = -1) -> None:
    """Finds the other processes; must run before the first computation.

    Without arguments the environment says where they are: JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID
    where set, else what jax knows of Cloud TPU VMs, GKE and Slurm.

    Raises:
      ValueError: they were not found within `JOIN_SECONDS`, or what is given is incomplete.
    """
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS", "")
    num_processes = num_processes or int(os.environ.get("JAX_NUM_PROCESSES", 0))
    process_id = process_id if process_id >= 0 else int(os.environ.get("JAX_PROCESS_ID", -1))
    given = {"coordinator": bool(coordinator), "num_processes": num_processes > 0, "process_id": process_id >= 0}
    if any(given.values()) and not all(given.values()):
        missing = ", ".join(f"--{name} (JAX_{variable})" for name, variable in _VARIABLES.items() if not given[name])
        raise ValueError(f"several processes: {missing} is missing; give all three, or none on Cloud TPU VMs")
    named = {"coordinator_address": coordinator, "num_processes": num_processes, "process_id": process_id}
    # jax's own SIGTERM handler would swallow the signal while the run is prepared; StopRequest has one.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            **(named if all(given.values()) else {}),
            cluster_detection_method="deactivate" if all(given.values()) else None,
            initialization_timeout=JOIN_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"the processes did not find each other: {str(error).splitlines()[0]}; start the same command on every "
            f"host within {JOIN_SECONDS} seconds, or leave --distributed out on a single host"
        ) from error
    threading.Thread(target=_watch, name="watch the other processes", daemon=True).start()


_VARIABLES = {"coordinator": "COORDINATOR_ADDRESS", "num_processes": "NUM_PROCESSES", "process_id": "PROCESS_ID"}


def joined() -> bool:
    """True where this process has joined others, even if only itself."""
    return distributed.global_state.client is not None


def is_first() -> bool:
    """True in the one process that writes files and prints."""
    return jax.process_index() == 0


def barrier(name: str, seconds: float = WAIT_SECONDS) -> None:
    """Returns when every process has come here.

    Raises:
      TimeoutError: some did not come in time; names them.
    """
    if jax.process_count() == 1:
        return
    client, place = distributed.global_state.client, f"barrier/{next(_names)} {name}"
    client.key_value_set(f"{place}/{jax.process_index()}", "here")
    try:
        client.wait_at_barrier(place, round(seconds * 1000))
    except jax.errors.JaxRuntimeError as error:
        here = {int(key.rsplit("/", 1)[1]) for key, _ in client.key_value_dir_get(f"{place}/")}
        missing = sorted(set(range(jax.process_count())) - here)
        raise TimeoutError(
            f"{_processes(missing)} did not reach {name!r} within {seconds:g} seconds; see the log there"
        ) from error


@contextlib.contextmanager
def first_alone(name: str) -> Iterator[None]:
    """Runs its body in process 0, then in all others: they find the files that it wrote."""
    if not is_first():
        barrier(name)
    yield
    if is_first():
        barrier(name)


def exchange(name: str, facts: Any) -> list[Any]:
    """What each process gives (JSON types), by process index.

    Raises:
      TimeoutError: a process is missing; names it.
    """
    if jax.process_count() == 1:
        return [facts]
    client, folder = distributed.global_state.client, f"facts/{next(_names)} {name}/"
    client.key_value_set(f"{folder}{jax.process_index()}", json.dumps(facts, sort_keys=True))
    barrier(name, AGREE_SECONDS)
    values = {int(key.rsplit("/", 1)[1]): json.loads(value) for key, value in client.key_value_dir_get(folder)}
    return [values[index] for index in range(jax.process_count())]


def agree(name: str, facts: Mapping[str, Any]) -> None:
    """Makes sure that all processes give the same facts (nested mappings of JSON types).

    Raises:
      ValueError: they do not; names the keys, values and processes.
      TimeoutError: a process is missing; names it.
    """
    if differences := describe_differences(exchange(name, facts)):
        raise ValueError(
            f"the processes were not started alike: {'; '.join(differences)}; run the same code with the same flags on "
            "every host"
        )


def describe_differences(facts: Sequence[Mapping[str, Any]]) -> list[str]:
    """What processes 1, 2, ... have that process 0 has not: "config.seed is 0 on process 0, 1 on process 2"."""
    flat = [_flatten(fact) for fact in facts]
    return [
        f"{key} is {flat[0].get(key, 'absent')!r} on process 0, {other.get(key, 'absent')!r} on process {index}"
        for index, other in enumerate(flat)
        for key in sorted({*flat[0], *other})
        if flat[0].get(key) != other.get(key)
    ]


def code_sha256() -> str:
    """Hash of the package's source files."""
    digest, package = hashlib.sha256(), Path(__file__).parent
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def check_shared(folder: Path) -> None:
    """Makes sure that all processes see one folder under this name.

    Raises:
      ValueError: some see another one; names them.
    """
    if jax.process_count() == 1:
        return
    token, marker = exchange("token of the work directory", uuid.uuid4().hex)[0], folder / ".processes"
    with first_alone("marker in the work directory"):
        if is_first():
            folder.mkdir(parents=True, exist_ok=True)
            marker.write_text(token)
        seen = marker.is_file() and marker.read_text() == token
    strangers = [index for index, saw in enumerate(exchange("work directory", seen)) if not saw]
    if is_first():
        marker.unlink()
    if strangers:
        raise ValueError(
            f"--workdir={folder}: {_processes(strangers)} cannot see what process 0 writes there; name a folder that "
            "all hosts share"
        )


def largest(value: int) -> int:
    """The largest of the values that the processes give. Waits for the device; all must call it at the same step."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.process_allgather(np.array([value], np.int32)).max())


class StopRequest:
    """While entered, the first Ctrl-C or SIGTERM sets `requested` to its number; a second Ctrl-C interrupts at once."""

    def __init__(self):
        self.requested = 0
        self._previous = {}

    def __enter__(self) -> StopRequest:
        self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def agreed(self, waits: bool = True) -> int:
        """The signal that stops the run after this step, 0 for none: the same in all processes, whichever got it.

        Several processes ask each other only where `waits`: where the host waits for the device anyway.
        """
        if jax.process_count() == 1:
            return self.requested
        return largest(self.requested) if waits else 0

    def _note(self, number, frame) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = number
        print("\nstopping after this step; Ctrl-C again to stop at once", file=sys.stderr)


def fetch(tree: ArrayTree) -> ArrayTree:
    """Host copies of global arrays, whole, in every process."""
    return jax.tree.map(_fetch, tree)


def _fetch(array: Any) -> Any:
    if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
        return jax.device_get(array)
    if array.nbytes > _LARGEST_GATHER and len(array) > 1:  # layer by layer: no device could hold the stack
        return np.stack([_fetch(array[index]) for index in range(len(array))])
    return multihost_utils.process_allgather(array, tiled=True)


def leave() -> None:
    """Waits for the others at the end, so that none of them takes a finished process for a lost one."""
    barrier("end of the program")
    _leaving.set()


def abandon(code: int, reason: str) -> NoReturn:
    """Ends this process and tells the others why, which then end too. An ordinary exit would wait for them."""
    sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # process 0 may be gone, and its store with it
        _set_sign(f"failed: {reason}")
        deadline = time.monotonic() + LINGER_SECONDS
        while distributed.global_state.process_id == 0 and time.monotonic() < deadline:
            if sum(sign.startswith("failed: ") for sign in _signs().values()) == distributed.global_state.num_processes:
                break
            time.sleep(0.1)
    os._exit(code)


def await_verdict() -> None:
    """Gives the watch time to say who was lost: a lost process breaks a collective before its silence is noticed."""
    time.sleep(SILENT_SECONDS + 2 * BEAT_SECONDS)


def _set_sign(sign: str) -> None:
    state = distributed.global_state
    state.client.key_value_set(f"signs/{state.process_id}", sign, allow_overwrite=True)


def _signs() -> dict[int, str]:
    signs = distributed.global_state.client.key_value_dir_get("signs/")
    return {int(key.rsplit("/", 1)[1]): sign for key, sign in signs}


def _watch() -> None:
    """Gives signs of life and ends the process when another one has failed or gives none. Runs in a thread of its own.

    jax notices silence too, later, and aborts. Only the end of process 0, where the store is, it notices first.
    """
    state = distributed.global_state
    seen: dict[int, tuple[str, float]] = {index: ("", time.monotonic()) for index in range(state.num_processes)}
    for beat in itertools.count():
        if _leaving.wait(BEAT_SECONDS):
            return
        try:
            _set_sign(f"beat {beat}")
            signs = _signs()
        except jax.errors.JaxRuntimeError:
            return  # process 0 is gone, which jax itself notices at once; or this process is leaving
        now = time.monotonic()
        for index, sign in signs.items():
            if sign.startswith("failed: ") and index != state.process_id:
                time.sleep(GRACE_SECONDS)  # what is wrong in all of them, this process says itself
                _end(f"process {index} stopped: {sign.removeprefix('failed: ')}")
            if sign != seen[index][0]:
                seen[index] = (sign, now)
        silent = [index for index, (_, since) in seen.items() if now - since > SILENT_SECONDS]
        if silent:
            _end(f"{_processes(silent)} gave no sign of life for {SILENT_SECONDS:g} seconds")


def _end(reason: str) -> NoReturn:
    print(f"error: {reason}; the same command on all hosts goes on from the last checkpoint", file=sys.stderr)
    abandon(LOST, reason)


def _processes(indices: Sequence[int]) -> str:
    return f"process{'es' if len(indices) > 1 else ''} {', '.join(map(str, indices))}"


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
