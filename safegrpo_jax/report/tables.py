"""Figures before and after training: headline tiles, the table with intervals, and accuracy by label cell.

Takes `summary.json` and evaluation rows as read; gives dicts of strings for the page. Intervals come with the summary
(`low`, `high`) or, for rates that lack them and for label cells, from Wilson's formula.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from safegrpo_jax.evaluation.scores import difference_interval, wilson_interval
from safegrpo_jax.report.workdir import Row, label_cell

SPLIT_CAPTIONS = {
    "test": "Held-out items like those in training.",
    "compositional": "Combinations of image and request that were never trained.",
    "alarming_benign": "Harmless requests that sound alarming. Refusing them is a mistake.",
    "questions": "Plain questions with one exact answer: did training cost ability?",
}
METRIC_NAMES = {
    "combined_accuracy": "judges image and text together right",
    "visual_accuracy": "judges the image right",
    "text_accuracy": "judges the text right",
    "refusal_rate": "refuses",
    "format_rate": "keeps the format",
    "mean_reward": "mean reward, greedy answers",
    "sampled_mean_reward": "mean reward, sampled answers",
    "answer_accuracy": "answers exactly",
}
HEADLINES = (  # split, metric, title
    ("compositional", "combined_accuracy", "Right on combinations never trained"),
    ("test", "combined_accuracy", "Right on held-out items"),
    ("alarming_benign", "refusal_rate", "Refuses harmless requests"),
    ("questions", "answer_accuracy", "Answers plain questions"),
)


def headline_tiles(summary: Mapping[str, Any]) -> list[dict[str, str]]:
    """The few figures that say whether the run worked, where the summary has them."""
    tiles = []
    for split, metric, title in HEADLINES:
        before = summary.get("before", {}).get(split, {}).get(metric)
        after = summary.get("after", {}).get(split, {}).get(metric)
        if before and after:
            tiles.append(
                {
                    "title": title,
                    "before": _format(metric, before["value"]),
                    "after": _format(metric, after["value"]),
                    "change": _change(metric, before["value"], after["value"]),
                    "trend": _trend(split, metric, before, after),
                    "count": str(after["count"]),
                }
            )
    return tiles


def before_after(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One block per split: name, caption and rows of metric, before, after, change, count and a small plot."""
    first, second = summary.get("before", {}), summary.get("after", {})
    blocks = []
    for split in {**first, **second}:
        old, new = first.get(split, {}), second.get(split, {})
        rows = [_table_row(split, name, old.get(name), new.get(name)) for name in {**old, **new}]
        blocks.append({"split": split, "caption": SPLIT_CAPTIONS.get(split, ""), "rows": rows})
    return blocks


def accuracy_by_cell(evaluations: Mapping[str, Mapping[str, Sequence[Row]]]) -> list[dict[str, Any]]:
    """One block per split with labels: for every label cell, how often it is judged right and refused."""
    blocks = []
    for split, moments in evaluations.items():
        cells: dict[str, dict[str, list[Row]]] = {}
        for moment, rows in moments.items():
            for row in rows:
                if row["labels"]:
                    cells.setdefault(label_cell(row), {}).setdefault(moment, []).append(row)
        rows = [
            {"cell": cell} | {moment: _cell_figures(by_moment.get(moment, [])) for moment in ("before", "after")}
            for cell, by_moment in sorted(cells.items())
        ]
        if rows:
            blocks.append({"split": split, "rows": rows})
    return blocks


def combined_is_right(row: Row) -> bool:
    """Whether the verdict about image and text together is that of the label; a missing one is wrong."""
    span = row["spans"].get("combined")
    return bool(span) and span[2] == row["labels"]["combined"]


def interval(metric: str, score: Mapping[str, Any]) -> tuple[float | int, float | int] | None:
    """95% interval of a score; None where the summary has none and the metric is not a rate."""
    if "low" in score and "high" in score:
        return score["low"], score["high"]
    if metric.endswith(("_accuracy", "_rate")) and score["count"]:
        return wilson_interval(round(score["value"] * score["count"]), score["count"])
    return None


def _cell_figures(rows: Sequence[Row]) -> dict[str, str]:
    if not rows:
        return {"count": "0", "right": "–", "interval": "", "refused": "–"}
    right, refused = sum(map(combined_is_right, rows)), sum(bool(row["refusal"]) for row in rows)
    low, high = wilson_interval(right, len(rows))
    return {
        "count": str(len(rows)),
        "right": f"{100 * right / len(rows):.0f} %",
        "interval": f"{100 * low:.0f}–{100 * high:.0f}",
        "refused": f"{100 * refused / len(rows):.0f} %",
    }


def _table_row(split: str, metric: str, before: Mapping | None, after: Mapping | None) -> dict[str, Any]:
    cells: dict[str, Any] = {"metric": METRIC_NAMES.get(metric, metric), "name": metric, "change": "", "trend": ""}
    for moment, score in (("before", before), ("after", after)):
        bounds = interval(metric, score) if score else None
        cells[moment] = _format(metric, score["value"]) if score else "–"
        cells[f"{moment}_interval"] = "–".join(_format(metric, b).removesuffix(" %") for b in bounds) if bounds else ""
    if before and after:
        cells["change"] = _change(metric, before["value"], after["value"])
        cells["trend"] = _trend(split, metric, before, after)
    counts = sorted({str(score["count"]) for score in (before, after) if score})
    return cells | {"count": " / ".join(counts), "plot": _range_plot(metric, before, after)}


def _range_plot(metric: str, before: Mapping | None, after: Mapping | None) -> Markup:
    """Both values with their intervals on one line from 0 to 1; nothing where a value lies outside."""
    scores = [(name, score) for name, score in (("before", before), ("after", after)) if score]
    if any(not 0 <= score["value"] <= 1 for _, score in scores):
        return Markup("")
    parts = [Markup('<line class="axis" x1="5" x2="145" y1="13" y2="13"/>')]
    for name, score in scores:
        y, middle = (8 if name == "before" else 18), 5 + 140 * score["value"]
        if bounds := interval(metric, score):
            low, high = (5 + 140 * min(max(bound, 0), 1) for bound in bounds)
            parts.append(
                Markup('<line class="range {}" x1="{:.1f}" x2="{:.1f}" y1="{}" y2="{}"/>').format(name, low, high, y, y)
            )
        parts.append(Markup('<circle class="{}" cx="{:.1f}" cy="{}" r="3.5"/>').format(name, middle, y))
    return Markup('<svg class="ranges" viewBox="0 0 150 26" aria-hidden="true">{}</svg>').format(Markup("").join(parts))


def _is_percent(metric: str) -> bool:
    return not metric.endswith("reward")


def _format(metric: str, value: float | int) -> str:
    if not math.isfinite(value):
        return "–"
    return f"{100 * value:.1f} %" if _is_percent(metric) else f"{value:.3f}"


def _change(metric: str, before: float | int, after: float | int) -> str:
    change = f"{100 * (after - before):+.1f}" if _is_percent(metric) else f"{after - before:+.3f}"
    return change.replace("-", "\N{MINUS SIGN}")


def _trend(split: str, metric: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """ "better" or "worse", or "" where chance may explain the change or more is neither (refusals differ by item)."""
    bounds = interval(metric, before), interval(metric, after)
    if None in bounds or (metric == "refusal_rate" and split != "alarming_benign"):
        return ""
    scores = [
        {"value": score["value"], "low": low, "high": high}
        for score, (low, high) in zip((before, after), bounds, strict=True)
    ]
    low, high = difference_interval(*scores)
    if low <= 0 <= high:
        return ""
    return "better" if (low > 0) != (metric == "refusal_rate") else "worse"
