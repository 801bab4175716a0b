"""Line charts as inline SVG: which metrics share a chart, and how a chart is drawn.

A chart works without scripts: every step has an invisible band whose tooltip lists the values there. Colours are CSS
variables (`--series-1` ... `--series-6`), so that light and dark schemes need no second drawing. Names of metrics come
from a file and are escaped; all else is numbers.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

WIDTH, HEIGHT = 380, 200
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 26  # margins around the plot
MAX_POINTS = 120  # more steps than this are averaged in bins
MAX_SERIES = 6  # as many colours as can be told apart
SMOOTH_FROM = 20  # points; fewer need no running mean

Number = int | float  # as JSON gives them
Points = list[tuple[Number, Number]]  # (step, value), ascending
Series = dict[str, Points]  # by name


@dataclasses.dataclass(frozen=True)
class ChartKind:
    """A chart for the metrics whose name, without its stage, matches `pattern` as a whole."""

    title: str
    caption: str
    pattern: str
    unit_range: bool = False  # always draw the whole range from 0 to 1


KINDS = (
    ChartKind("Reward", "Mean reward of the sampled answers; 1 is best.", r"(reward/)?(mean|total|mean_reward)", True),
    ChartKind("Reward by rule", "Mean value of every rule; 1 means always kept.", r"(reward|rules?)/(?!.*std).+", True),
    ChartKind("Loss", "What the optimizer lowers.", r"(.*/)?(loss|replay_loss)"),
    ChartKind("Distance from the reference", "KL divergence from the frozen starting model.", r"(.*/)?kl(_.*)?"),
    ChartKind("Clipped tokens", "Share of tokens whose update was cut off.", r"(.*/)?clip_?frac.*"),
    ChartKind("Gradient norm", "Before clipping.", r"(.*/)?grad(ient)?_norm.*"),
    ChartKind("Answer length", "Tokens per sampled answer.", r"(.*/)?(completion|response|answer)_?len.*"),
    ChartKind("Entropy", "How undecided the model is, per token (nats).", r"(.*/)?entropy.*"),
    ChartKind("Groups that teach nothing", "Share of groups with equal rewards.", r".*zero_(variance|std).*", True),
    ChartKind("Refused or cut off", "Share of sampled answers.", r"(.*/)?(refusal|truncated).*", True),
)


def stage_charts(stage: str, rows: Sequence[Mapping[str, Any]]) -> tuple[list[dict], list[dict]]:
    """Charts of one stage as (shown, further): dicts of title, caption, svg, legend. Further: metrics of no kind."""
    series: Series = {}
    for row in rows:
        for name, value in row.items():
            if name not in ("stage", "step") and not name.startswith("reward_cells/"):  # a hundred of them, for a query
                series.setdefault(name.removeprefix(f"{stage}/"), []).append((row["step"], value))
    shown, taken = [], set()
    for kind in KINDS:
        names = [name for name in series if name not in taken and re.fullmatch(kind.pattern, name)]
        taken.update(names)
        for start in range(0, len(names), MAX_SERIES):
            part = {name: series[name] for name in names[start : start + MAX_SERIES]}
            title = kind.title if start == 0 else f"{kind.title} ({start // MAX_SERIES + 1})"
            shown.append(_chart(title, kind.caption, part, kind.unit_range))
    return shown, [_chart(name, "", {name: series[name]}, False) for name in sorted(series.keys() - taken)]


def line_chart(series: Series, title: str, unit_range: bool = False) -> Markup:
    """One SVG with axes, a line per series and a tooltip per step. Every series holds at least one finite point."""
    steps = sorted({step for points in series.values() for step, _ in points})
    values = [value for points in series.values() for _, value in points]
    y_ticks = nice_ticks(0.0, 1.0) if unit_range and max(values) <= 1 and min(values) >= 0 else _value_ticks(values)
    x_low, x_high = steps[0], steps[-1] if steps[-1] > steps[0] else steps[0] + 1
    y_low, y_high = min(y_ticks[0], *values), max(y_ticks[-1], *values)

    def x(step):
        return LEFT + (step - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def y(value):
        return TOP + (y_high - value) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    parts = [_axes(y_ticks, [tick for tick in nice_ticks(x_low, x_high, 5) if x_low <= tick <= x_high], x, y)]
    for index, points in enumerate(series.values()):
        parts.append(_line(points, index, x, y, alone=len(series) == 1))
    parts.append(_hover_bands(series, steps, x, y))
    label = escape(f"{title}, step {steps[0]:g} to {steps[-1]:g}")
    head = f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
    return Markup(head + "".join(parts) + "</svg>")


def nice_ticks(low: Number, high: Number, count: int = 4) -> list[Number]:
    """About `count` round numbers that cover low..high: nice_ticks(0, 0.93) -> [0, .25, .5, .75, 1]."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / count))
    unit = next(unit for unit in (1, 2, 2.5, 5, 10) if unit * power * count >= span * 0.999)
    size = unit * power
    first, last = math.floor(low / size + 1e-9), math.ceil(high / size - 1e-9)
    return [round(i * size, 12) for i in range(first, max(last, first + 1) + 1)]


def format_value(value: Number) -> str:
    """Three digits: 0.123, 1e-05, 1,234."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _value_ticks(values: Sequence[Number]) -> list[Number]:
    low, high = min(values), max(values)
    if low > 0 and low < 0.6 * high:  # show zero unless that flattens the curve
        low = 0.0
    return nice_ticks(low, high)


def _chart(title: str, caption: str, series: Series, unit_range: bool) -> dict:
    longest = max(len(points) for points in series.values())
    bin_size = math.ceil(longest / MAX_POINTS)
    binned = {name: _bin(points, bin_size) for name, points in series.items()}
    notes = [caption] if caption else []
    if bin_size > 1:
        notes.append(f"Each point is the mean of {bin_size} steps.")
    legend = [
        {"name": name, "color": f"var(--series-{index + 1})", "last": format_value(points[-1][1])}
        for index, (name, points) in enumerate(series.items())
    ]
    return {"title": title, "caption": " ".join(notes), "svg": line_chart(binned, title, unit_range), "legend": legend}


def _bin(points: Points, size: int) -> Points:
    blocks = [points[start : start + size] for start in range(0, len(points), size)]
    return [(block[-1][0], sum(value for _, value in block) / len(block)) for block in blocks]


def _axes(y_ticks: Sequence[Number], x_ticks: Sequence[Number], x, y) -> str:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = [f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>']
    for tick in y_ticks:
        at = y(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 3.5:.1f}" text-anchor="end">{format_value(tick)}</text>')
    parts.append(f'<text x="{LEFT - 6}" y="{HEIGHT - 9}" text-anchor="end">step</text>')
    for tick in x_ticks:
        parts.append(f'<text x="{x(tick):.1f}" y="{HEIGHT - 9}" text-anchor="middle">{format_value(tick)}</text>')
    return "".join(parts)


def _line(points: Points, index: int, x, y, alone: bool) -> str:
    color = f"var(--series-{index + 1})"

    def polyline(points, css_class):
        coordinates = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
        return f'<polyline class="{css_class}" stroke="{color}" points="{coordinates}"/>'

    if len(points) == 1:
        step, value = points[0]
        return f'<circle cx="{x(step):.1f}" cy="{y(value):.1f}" r="3" fill="{color}"/>'
    if not alone or len(points) < SMOOTH_FROM:
        return polyline(points, "line")
    return polyline(points, "line raw") + polyline(_running_mean(points), "line")


def _running_mean(points: Points) -> Points:
    """Mean over a centred window of a tenth of the points, shorter at the ends."""
    half = max(1, len(points) // 20)
    windows = [points[max(0, i - half) : i + half + 1] for i in range(len(points))]
    means = [sum(value for _, value in window) / len(window) for window in windows]
    return [(step, mean) for (step, _), mean in zip(points, means, strict=True)]


def _hover_bands(series: Series, steps: Sequence[Number], x, y) -> str:
    values = {name: dict(points) for name, points in series.items()}
    edges = [LEFT, *((x(a) + x(b)) / 2 for a, b in itertools.pairwise(steps)), WIDTH - RIGHT]
    bottom, height = HEIGHT - BOTTOM, HEIGHT - TOP - BOTTOM
    parts = []
    for step, (left, right) in zip(steps, itertools.pairwise(edges), strict=True):
        here = [(index, name, at[step]) for index, (name, at) in enumerate(values.items()) if step in at]
        title = "\n".join([f"step {step:g}", *(f"{name}: {format_value(value)}" for _, name, value in here)])
        parts.append(
            f'<g class="hit"><title>{escape(title)}</title>'
            f'<rect x="{left:.1f}" y="{TOP}" width="{right - left:.1f}" height="{height}"/>'
            f'<line x1="{x(step):.1f}" x2="{x(step):.1f}" y1="{TOP}" y2="{bottom}"/>'
        )
        for index, _, value in here:
            color = f"var(--series-{index + 1})"
            parts.append(f'<circle cx="{x(step):.1f}" cy="{y(value):.1f}" r="3" fill="{color}"/>')
        parts.append("</g>")
    return "".join(parts)
