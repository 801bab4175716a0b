"""What a run writes down while it works: metrics, the progress line, timings, and rows for people to audit.

`MetricsWriter` owns `<workdir>/metrics.jsonl` (one line per stage and step, flushed at once) and TensorBoard event
files in `<workdir>/tensorboard/<stage>/`. `write_rollouts` and `write_evaluation` own `rollouts/*.jsonl` and
`evaluation/*.jsonl`, whose rows hold all that is needed to recompute their reward; images are stored once, by content.
A step appears once, whatever was interrupted; a non-finite value is an error, never a line. Nothing here computes a
metric or draws a picture.

One row: `ROW_KEYS`. `labels` {"visual", "text", "combined"} -> "safe" | "unsafe", or {} for a plain question, whose
gold answer is `answer`; `token_texts` one string per token of `completion_ids`; `spans` as `describe_spans` gives;
`rules` rule -> value in [0, 1]; `advantage` may be None; `image_file` a name in `rollouts/images/`, or "".
"""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import io
import json
import math
import os
import pathlib
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, SupportsFloat

import jax
import numpy as np
from tensorboardX import SummaryWriter

from safegrpo_jax.processes import is_first
from safegrpo_jax.types import VERDICT_OTHER, VERDICT_SAFE, VERDICT_UNSAFE, TagSpans

ROW_KEYS = (
    "step",
    "record_id",
    "sample",
    "prompt",
    "category",
    "image_file",
    "labels",
    "text",
    "completion_ids",
    "token_texts",
    "spans",
    "rules",
    "reward",
    "advantage",
    "truncated",
    "refusal",
    "answer",
)
VERDICT_NAMES = {VERDICT_SAFE: "safe", VERDICT_UNSAFE: "unsafe", VERDICT_OTHER: "other"}
TAG_NAMES = ("visual", "text", "combined")
_EVENT_FLUSH_SECONDS = 10  # event files trail metrics.jsonl by at most this
_IMAGE_MAGIC = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"GIF8": ".gif", b"RIFF": ".webp", b"BM": ".bmp"}


class NonFiniteError(ValueError):
    """A metric became infinite or NaN: the run must stop, its last checkpoint being good."""


class MetricsWriter:
    """Appends metrics to the work directory. Writes on process 0 only; checks on all, so that all stop together."""

    def __init__(self, workdir: str | os.PathLike[str], tensorboard: bool = True, wandb: bool = False):
        """Opens the work directory for appending; half a line left by a killed run is removed.

        Raises:
          ValueError: wandb is asked for but not installed, or `metrics.jsonl` has a line that is no JSON object.
        """
        self._workdir = pathlib.Path(workdir)
        self._path = self._workdir / "metrics.jsonl"
        self._primary = is_first()
        self._tensorboard = tensorboard
        self._purge_steps: dict[str, int] = {}
        self._event_writers: dict[str, SummaryWriter] = {}
        self._wandb = _start_wandb(self._workdir) if wandb and self._primary else None
        if self._primary:
            self._workdir.mkdir(parents=True, exist_ok=True)
            self._replace_lines(_read_lines(self._path))

    def rewind(self, stage_order: Sequence[str], stage: str, step: int) -> None:
        """Forgets every line after `step` finished steps of `stage`: call it once on resume, before `write`.

        Stages before `stage` in `stage_order` are kept whole, those after it are forgotten; step 0 forgets `stage`.
        TensorBoard is told to drop the same steps.
        """
        rank = {name: index for index, name in enumerate(stage_order)}
        if stage not in rank:
            raise ValueError(f"cannot rewind metrics to unknown stage {stage!r}; stages: {', '.join(stage_order)}")
        if not self._primary:
            return
        rows = _read_lines(self._path)
        unknown = {row["stage"] for row in rows} - rank.keys()
        if unknown:
            raise ValueError(
                f"{self._path}: stages {sorted(unknown)} are not in this run; choose another work directory"
            )
        self._replace_lines([row for row in rows if (rank[row["stage"]], row["step"]) <= (rank[stage], step)])
        self._close_event_writers()
        self._purge_steps = {stage: step + 1} | {name: 0 for name in rank if rank[name] > rank[stage]}

    def write(self, stage: str, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """Appends the metrics after `step` finished steps of `stage`.

        Raises:
          NonFiniteError: a value is infinite or NaN; nothing is written.
          ValueError: this stage has a line for this or a later step, or a metric is called "stage" or "step".
        """
        values = {name: float(value) for name, value in metrics.items()}
        for name, value in values.items():
            if not math.isfinite(value):
                raise NonFiniteError(f"{stage} step {step}: {name} is {value}; resume from the last checkpoint")
            if name in ("stage", "step"):
                raise ValueError(f"{stage} step {step}: a metric may not be called {name!r}")
        if not self._primary:
            return
        if step <= self._last_steps.get(stage, -1):
            last = self._last_steps[stage]
            raise ValueError(
                f"{self._path}: {stage} is at step {last}, cannot write step {step}; rewind before resuming"
            )
        with self._path.open("a") as file:
            file.write(json.dumps({"stage": stage, "step": step, **values}) + "\n")
        self._last_steps[stage] = step
        if self._tensorboard:
            events = self._events(stage)
            for name, value in values.items():
                events.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log({f"{stage}/{name}": value for name, value in values.items()} | {f"{stage}/step": step})

    def close(self) -> None:
        """Flushes and closes the event files."""
        self._close_event_writers()
        if self._wandb is not None:
            self._wandb.finish()

    def _replace_lines(self, rows: list[dict[str, Any]]) -> None:
        self._last_steps = {row["stage"]: row["step"] for row in rows}
        _replace_text(self._path, "".join(json.dumps(row) + "\n" for row in rows))

    def _events(self, stage: str) -> SummaryWriter:
        if stage not in self._event_writers:
            folder = self._workdir / "tensorboard" / stage
            self._event_writers[stage] = SummaryWriter(
                str(folder), purge_step=self._purge_steps.get(stage), flush_secs=_EVENT_FLUSH_SECONDS
            )
        return self._event_writers[stage]

    def _close_event_writers(self) -> None:
        for events in self._event_writers.values():
            events.close()
        self._event_writers = {}


class Progress:
    """Shows how a stage goes: one live line on a terminal, else one plain line per step."""

    def __init__(
        self,
        stream: io.TextIOBase,
        stage: str,
        num_steps: int,
        start_step: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ):
        """`start_step` steps are finished already (a resumed run); `clock` gives seconds."""
        self._stream, self._stage, self._num_steps, self._clock = stream, stage, num_steps, clock
        self._live = stream.isatty()
        self._times = [(start_step, clock())]

    def update(self, step: int, values: Mapping[str, SupportsFloat], num_tokens: int = 0) -> None:
        """Shows that `step` steps are finished. `values` by their short label; `num_tokens` made in this step."""
        now = self._clock()
        seconds = now - self._times[-1][1]
        self._times.append((step, now))
        # The first step compiles: its time says nothing about those to come.
        first_step, first_time = self._times[1] if len(self._times) > 2 else self._times[0]
        parts = [f"{self._stage} {step:>{len(str(self._num_steps))}}/{self._num_steps}"]
        parts += [f"{label} {float(value):.4g}" for label, value in values.items()]
        if num_tokens and seconds > 0:
            parts.append(f"{num_tokens / seconds:,.0f} tok/s")
        if step < self._num_steps and step > first_step:
            parts.append(f"ETA {_duration((self._num_steps - step) * (now - first_time) / (step - first_step))}")
        self._show("  ".join(parts))

    def note(self, text: str) -> None:
        """A line of its own that stays, above the live one."""
        self._stream.write(f"\r\x1b[K{text}\n" if self._live else f"{text}\n")
        self._stream.flush()

    def close(self) -> None:
        """Leaves the last live line on the screen."""
        if self._live and len(self._times) > 1:
            self._stream.write("\n")
            self._stream.flush()

    def _show(self, line: str) -> None:
        if self._live:
            width = shutil.get_terminal_size().columns - 1  # a wrapped line could not be rewritten
            self._stream.write(f"\r\x1b[K{line[:width]}")
        else:
            self._stream.write(f"{line}\n")
        self._stream.flush()


class StageTimer:
    """Seconds per part of a step. A part that ends in a jitted call must block on its result inside the `with`."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Adds the seconds spent inside to `part`."""
        start = self._clock()
        try:
            yield
        finally:
            self._seconds[part] = self._seconds.get(part, 0.0) + self._clock() - start

    def pop(self) -> dict[str, float]:
        """`time/<part>_seconds` since the last call, and starts again from nothing."""
        seconds, self._seconds = self._seconds, {}
        return {f"time/{part}_seconds": value for part, value in seconds.items()}


def peak_rss_bytes() -> int:
    """The largest resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB


def write_rollouts(workdir: str | os.PathLike[str], step: int, rows: Sequence[Mapping[str, Any]]) -> pathlib.Path:
    """Writes the rollouts of one step to `rollouts/step_000010.jsonl`, whole or not at all. Returns the path.

    Raises:
      ValueError: a row lacks a key of `ROW_KEYS`, or holds a number that is not finite.
    """
    return _write_rows(pathlib.Path(workdir) / "rollouts" / f"step_{step:06d}.jsonl", rows)


def write_evaluation(
    workdir: str | os.PathLike[str], moment: str, split: str, rows: Sequence[Mapping[str, Any]]
) -> pathlib.Path:
    """Writes the graded answers of a split, `moment` being "before" or "after", to `evaluation/after_test.jsonl`.

    Raises:
      ValueError: as `write_rollouts`.
    """
    return _write_rows(pathlib.Path(workdir) / "evaluation" / f"{moment}_{split}.jsonl", rows)


def save_image(workdir: str | os.PathLike[str], image: bytes) -> str:
    """Stores an encoded image in `rollouts/images/` under the hash of its bytes, once. Returns the file name."""
    suffix = next((suffix for magic, suffix in _IMAGE_MAGIC.items() if image.startswith(magic)), ".image")
    path = pathlib.Path(workdir) / "rollouts" / "images" / f"{hashlib.sha256(image).hexdigest()[:20]}{suffix}"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_bytes(image)
        temporary.replace(path)
    return path.name


def describe_spans(spans: TagSpans, row: int) -> dict[str, list[Any]]:
    """The spans of one rollout as JSON: tag -> [start, end, verdict], "answer" -> [start, end], in tokens.

    A tag or answer that was not found has no entry. Verdicts are "safe", "unsafe" or "other"; ends are exclusive.
    """
    described: dict[str, list[Any]] = {}
    for index, name in enumerate(TAG_NAMES):
        verdict = VERDICT_NAMES.get(int(spans.verdict[row, index]))
        if verdict is not None:
            described[name] = [int(spans.tag_start[row, index]), int(spans.tag_end[row, index]), verdict]
    if int(spans.answer_start[row]) >= 0:
        described["answer"] = [int(spans.answer_start[row]), int(spans.answer_end[row])]
    return described


def token_texts(pieces: Sequence[bytes]) -> list[str]:
    """The text each token adds: a character cut over tokens goes to the last of them, invalid bytes become U+FFFD.

    Joined, they are the decoded completion: [b"caf\\xc3", b"\\xa9"] -> ["caf", "é"].
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    return [decoder.decode(piece, final=index == len(pieces) - 1) for index, piece in enumerate(pieces)]


def _write_rows(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> pathlib.Path:
    lines = []
    for index, row in enumerate(rows):
        if missing := [key for key in ROW_KEYS if key not in row]:
            raise ValueError(
                f"{path.name} row {index}: missing {', '.join(missing)}; a row holds every key of ROW_KEYS"
            )
        try:
            lines.append(json.dumps(dict(row), allow_nan=False, default=_plain) + "\n")
        except ValueError as error:
            raise ValueError(f"{path.name} row {index} (record {row['record_id']}): {error}") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace_text(path, "".join(lines))
    return path


def _plain(value: Any) -> Any:
    """numpy and jax values as the JSON types they stand for."""
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return np.asarray(value).tolist()
    raise TypeError(f"a row may hold JSON types and arrays, not {type(value).__name__}")


def _replace_text(path: pathlib.Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl, without a last line that a killed run did not finish."""
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), start=1):
        if not line.endswith("\n"):
            break
        try:
            row = json.loads(line)
            rows.append(row | {"stage": row["stage"], "step": int(row["step"])})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}:{number}: not a metrics line ({error}); delete the line") from error
    return rows


def _start_wandb(workdir: pathlib.Path) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ValueError("metrics.wandb is on, but wandb is missing; pip install wandb, or turn it off") from error
    return wandb.init(project="safegrpo_jax", dir=str(workdir), name=workdir.name, resume="allow")


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"
