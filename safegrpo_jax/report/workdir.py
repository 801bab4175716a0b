"""Reads what a run left in its work directory, and picks the part of it that one page can show.

Knows the file layout and the row schema of `metrics.py`; makes no markup. Only the rollout files that will be shown
are read, since a long run leaves gigabytes. The pick is fixed: steps evenly spaced with the first and the last, and
within a step the label cells in turn, so that rare cells are seen.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

Row = dict[str, Any]  # one row of rollouts/*.jsonl or evaluation/*.jsonl; schema in metrics.py


@dataclasses.dataclass(frozen=True)
class RunFiles:
    """One run as read. `metrics` by stage; `groups`: the rollouts of one prompt at one step each."""

    name: str
    workdir: pathlib.Path
    summary: dict[str, Any]
    metrics: dict[str, list[Row]]
    dumped_steps: list[int]
    groups: list[list[Row]]  # picked from `num_groups_read` at the picked steps
    num_groups_read: int
    evaluations: dict[str, dict[str, list[Row]]]  # split -> "before" | "after" -> rows


def read_run(workdir: pathlib.Path, max_steps: int, max_groups: int) -> RunFiles:
    """Reads a work directory; parts that a run has not written yet are empty.

    Raises:
      ValueError: there is no metrics.jsonl, or a line of a file is not valid (file and line are named).
    """
    metrics_path = workdir / "metrics.jsonl"
    if not metrics_path.exists():
        raise ValueError(f"no {metrics_path}; give the work directory of a run")
    metrics: dict[str, list[Row]] = {}
    for row in read_jsonl(metrics_path):
        metrics.setdefault(row["stage"], []).append(row)
    dumps = {int(path.stem.removeprefix("step_")): path for path in sorted(workdir.glob("rollouts/step_*.jsonl"))}
    evaluations: dict[str, dict[str, list[Row]]] = {}
    for path in sorted(workdir.glob("evaluation/*_*.jsonl")):
        moment, split = path.stem.split("_", 1)
        evaluations.setdefault(split, {})[moment] = read_jsonl(path)
    groups, num_groups_read = _pick_groups(dumps, max_steps, max_groups)
    summary_path = workdir / "summary.json"
    return RunFiles(
        name=workdir.resolve().name,
        workdir=workdir,
        summary=json.loads(summary_path.read_text(encoding="utf-8")) if summary_path.exists() else {},
        metrics=metrics,
        dumped_steps=list(dumps),
        groups=groups,
        num_groups_read=num_groups_read,
        evaluations=evaluations,
    )


def read_jsonl(path: pathlib.Path) -> list[Row]:
    """Rows of a JSON lines file; a last line without its newline is of a run killed while writing, and left out.

    Raises:
      ValueError: naming file and line.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: not valid JSON ({error}); run the step again or delete it") from error
    return rows


def label_cell(row: Row) -> str:
    """The labels of a row in words, e.g. "image safe, text safe, together unsafe"; "plain question" without labels."""
    labels = row["labels"]
    if not labels:
        return "plain question"
    return f"image {labels['visual']}, text {labels['text']}, together {labels['combined']}"


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` items, evenly spaced from the first to the last: spread("abcde", 3) -> ["a", "c", "e"]."""
    if len(items) <= count:
        return list(items)
    if count == 1:
        return [items[-1]]
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def in_turn(items: Iterable[Any], key) -> list[Any]:
    """All items, one of each key in turn: with the initial as key, "a1 a2 a3 b1" -> "a1 b1 a2 a3"."""
    by_key: dict[Any, list[Any]] = {}
    for item in items:
        by_key.setdefault(key(item), []).append(item)
    rounds = itertools.zip_longest(*(by_key[k] for k in sorted(by_key)))
    return [item for items_of_round in rounds for item in items_of_round if item is not None]


def _pick_groups(dumps: dict[int, pathlib.Path], max_steps: int, max_groups: int) -> tuple[list[list[Row]], int]:
    """The groups to show, and how many groups there are at the same steps."""
    steps = spread(sorted(dumps, reverse=True), max_steps)
    picked, num_read = [], 0
    for step in steps:
        groups: dict[Any, list[Row]] = {}
        for row in read_jsonl(dumps[step]):
            groups.setdefault(row["record_id"], []).append(row)
        num_read += len(groups)
        picked += in_turn(groups.values(), key=lambda group: label_cell(group[0]))[: max(1, max_groups // len(steps))]
    return picked, num_read
