"""Writes `report.html`: one file that shows a run to somebody who audits it, without a network and without scripts.

Reads the work directory alone (`workdir.py`), so a report can be made during a run or long after it. Charts, tables
and cards come from their own files; `page.html` places them and escapes every value; scripts only add filters. The
page forbids itself all loading, and runs no script but its own. What does not fit under the size limit is left out,
and the page says how much.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jinja2
from markupsafe import Markup

from safegrpo_jax.report.cards import ImageShelf, group_card, outcome, pair_card
from safegrpo_jax.report.charts import stage_charts
from safegrpo_jax.report.tables import accuracy_by_cell, before_after, headline_tiles
from safegrpo_jax.report.workdir import Row, RunFiles, in_turn, read_run

MAX_STEPS, MAX_GROUPS, MAX_PAIRS = 8, 48, 48
GROUP_BYTES, PAIR_BYTES = 2_200_000, 1_100_000  # of text and images; with the charts a page stays below 5 MB
_OUTCOMES = ("worse", "better", "still wrong", "still right")
_ANSWER_MARKS = (
    "all right",
    "something wrong",
    "image wrong",
    "text wrong",
    "together wrong",
    "answer wrong",
    "refuses",
    "does not refuse",
    "cut off",
)


def write_report(workdir: str | os.PathLike[str], out_path: str | os.PathLike[str]) -> pathlib.Path:
    """Writes the page, whole or not at all, and returns its path.

    Raises:
      ValueError: the work directory holds no metrics.jsonl, or a file in it is damaged (named with its line).
    """
    run = read_run(pathlib.Path(workdir), MAX_STEPS, MAX_GROUPS)
    page = _environment().get_template("page.html").render(_context(run))
    out_path = pathlib.Path(out_path)
    temporary = out_path.with_name(f".{out_path.name}.tmp")
    temporary.write_text(page, encoding="utf-8", errors="replace")  # a JSON prompt may hold half a surrogate pair
    temporary.replace(out_path)
    return out_path


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FunctionLoader(_package_text),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _package_text(name: str) -> str:
    return (importlib.resources.files(__package__) / name).read_text(encoding="utf-8")


def _context(run: RunFiles) -> dict[str, Any]:
    shelf = ImageShelf(run.workdir)
    script = _package_text("page.js")
    by_step = in_turn(run.groups, key=lambda rows: -rows[0]["step"])  # the limit then cuts all steps alike
    groups = _within_bytes((group_card(rows, shelf) for rows in by_step), GROUP_BYTES)
    groups.sort(key=lambda group: -group["step"])
    all_pairs = _pairs(run)
    pairs = _within_bytes((pair_card(*pair, shelf) for pair in all_pairs[:MAX_PAIRS]), PAIR_BYTES)
    pairs.sort(key=lambda pair: _OUTCOMES.index(pair["outcome"]))
    steps = sorted({group["step"] for group in groups}, reverse=True)
    return {
        "name": run.name,
        "style": Markup(_package_text("page.css")),
        "script": Markup(script),
        "script_hash": f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}",
        "tiles": headline_tiles(run.summary),
        "table": before_after(run.summary),
        "cells": accuracy_by_cell(run.evaluations),
        "stages": [_stage(name, rows) for name, rows in run.metrics.items()],
        "pairs": pairs,
        "num_pairs": len(all_pairs),
        "pair_filters": [
            {"title": "split", "key": "split", "choices": _choices(pairs, "split")},
            {"title": "labels", "key": "cell", "choices": _choices(pairs, "cell")},
            {"title": "outcome", "key": "outcome", "choices": _OUTCOMES},
        ],
        "groups": groups,
        "num_groups_read": run.num_groups_read,
        "shown_steps": steps,
        "num_dumped_steps": len(run.dumped_steps),
        "group_filters": [
            {"title": "step", "key": "step", "choices": steps},
            {"title": "labels", "key": "cell", "choices": _choices(groups, "cell")},
            {"title": "answers", "key": "marks", "choices": _ANSWER_MARKS},
        ],
        "images": shelf.images,
        "facts": list(_facts(run.summary)),
    }


def _stage(name: str, rows: Sequence[Row]) -> dict[str, Any]:
    shown, further = stage_charts(name, rows)
    return {"name": name, "steps": rows[-1]["step"], "shown": shown, "further": further}


def _pairs(run: RunFiles) -> list[tuple[str, Row, Row]]:
    """(split, before, after) of every item answered at both moments; outcomes and splits in turn."""
    pairs = []
    for split, moments in run.evaluations.items():
        old = {row["record_id"]: row for row in moments.get("before", [])}
        pairs += [(split, old[row["record_id"]], row) for row in moments.get("after", []) if row["record_id"] in old]
    return in_turn(pairs, key=lambda pair: (_OUTCOMES.index(outcome(*pair[1:])), pair[0]))


def _within_bytes(cards: Iterable[dict[str, Any]], limit: int) -> list[dict[str, Any]]:
    """The first cards whose text and images fit into `limit` bytes, but at least one."""
    kept, used = [], 0
    for card in cards:
        used += len(json.dumps(card, ensure_ascii=False).encode())
        if kept and used > limit:
            break
        kept.append(card)
    return kept


def _choices(cards: Sequence[dict[str, Any]], key: str) -> list[str]:
    return sorted({card[key] for card in cards})


def _facts(summary: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Everything in summary.json but the tables, as (name, value) for people."""
    for key, value in summary.items():
        if not prefix and key in ("before", "after"):
            continue
        if isinstance(value, Mapping):
            yield from _facts(value, f"{prefix}{key} ")
        elif key.endswith("_bytes"):
            yield prefix + key.removesuffix("_bytes").replace("_", " "), f"{value / 2**30:.2f} GiB"
        elif key.endswith("_seconds"):
            yield prefix + key.removesuffix("_seconds").replace("_", " ") + " time", f"{value / 60:.1f} minutes"
        else:
            yield prefix + key.replace("_", " "), str(value)
