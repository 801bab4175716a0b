"""The page of a plan: one file without scripts or outside resources, with a bar of a device's memory per program."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

_COLORS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#9d755d", "#72b7b2", "#e45756", "#bab0ac", "#eeca3b")
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; width: 100% } td, th { padding: .3rem .6rem; text-align: right }
td:first-child, th:first-child { text-align: left } tr { border-bottom: 1px solid #ddd }
.bar { position: relative; height: 1.4rem; background: #f2f2f2; margin: .2rem 0 .8rem }
.part { position: absolute; top: 0; bottom: 0 } .limit { position: absolute; top: -.2rem; bottom: -.2rem; width: 2px;
background: #c00 } .no { color: #c00; font-weight: 600 } .key { display: inline-block; width: .8rem; height: .8rem;
margin: 0 .3rem 0 1rem }
"""


def write_page(path: Path, plan: dict[str, Any]) -> None:
    """Writes the page of `run.as_json`."""
    hbm = plan["chip"]["hbm_bytes"]
    scale = max(hbm, *(program["total_bytes"] for program in plan["programs"]))
    names = list(dict.fromkeys(name for program in plan["programs"] for name, _ in _parts(program)))
    colors = {name: _COLORS[number % len(_COLORS)] for number, name in enumerate(names)}
    step = plan["step"]
    body = [
        f"<h1>{_text(plan['model'])} on {_text(plan['topology'])}: "
        f"{'fits' if plan['fits'] else '<span class=no>does not fit</span>'}</h1>",
        f"<p>{_text(plan['note'])}. Mesh {_text(plan['mesh'])}; {_gib(hbm)} GiB for programs on a device (red line).",
        _table(plan["programs"]),
        "<h2>Memory of each device</h2><p>",
        *(f"<span class=key style='background:{color}'></span>{_text(name)}" for name, color in colors.items()),
        "</p>",
        *(_bar(program, colors, hbm, scale) for program in plan["programs"]),
        "<h2>A step</h2>",
        f"<p>{step['tokens']:,.0f} sampled tokens: {step['roofline_seconds']:.0f} s at the peaks of the chips, "
        f"{step['seconds']:.0f} s at the assumed shares of them; {step['tokens_per_second_per_chip']:.0f} tokens/s/"
        f"chip, {step['model_flops_share']:.0%} of peak FLOP/s; {step['days']:.1f} days and "
        f"{step['device_hours']:,.0f} device-hours for {step['num_steps']} steps.</p>",
    ]
    if plan["advice"]:
        body += ["<h2>What to change</h2><ul>", *(f"<li>{_text(line)}</li>" for line in plan["advice"]), "</ul>"]
    title = f"plan of {_text(plan['model'])} on {_text(plan['topology'])}"
    head = f"<!doctype html><meta charset=utf-8><title>{title}</title><style>{_STYLE}</style>"
    path.write_text(head + "\n".join(body) + "\n")


def _parts(program: dict[str, Any]) -> list[tuple[str, int]]:
    """What fills a device while a program runs, in the order of the bar."""
    kept = program["peak_bytes"] - program["temporary_bytes"]
    return [("arguments and results", kept), ("temporaries", program["temporary_bytes"]), *program["resident"].items()]


def _bar(program: dict[str, Any], colors: dict[str, str], hbm: int, scale: int) -> str:
    left, pieces = 0, []
    for name, size in _parts(program):
        pieces.append(
            f"<div class=part style='left:{100 * left / scale:.2f}%;width:{100 * size / scale:.2f}%;"
            f"background:{colors[name]}' title='{_text(name)} {_gib(size)} GiB'></div>"
        )
        left += size
    mark = f"<div class=limit style='left:{100 * hbm / scale:.2f}%'></div>"
    label = f"{_text(program['name'])} {_gib(program['total_bytes'])} GiB"
    return f"<div>{label}</div><div class=bar>{''.join(pieces)}{mark}</div>"


def _table(programs: list[dict[str, Any]]) -> str:
    titles = ("program", "fits", "total", "arguments", "temporaries", "beside", "calls", "compiled", "TFLOP", "sent")
    titles += ("limit",)
    rows = []
    for program in programs:
        traffic = program["traffic"]
        sent = _gib(sum(traffic["collectives"].values())) if traffic else "unknown"
        cells = (
            _text(program["name"]),
            "yes" if program["fits"] else "<span class=no>no</span>",
            _gib(program["total_bytes"]),
            _gib(program["argument_bytes"]),
            _gib(program["temporary_bytes"]),
            _gib(sum(program["resident"].values())),
            f"{program['calls']:.4g}",
            f"{program['compile_seconds']:.0f} s",
            f"{program['flops'] / 1e12:.4g}",
            sent,
            f"{program['roofline_seconds'][program['limit']]:.3g} s ({_text(program['limit'])})",
        )
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
        if program["refusal"]:
            rows.append(f"<tr><td colspan={len(titles)} class=no>{_text(program['refusal'])}</td></tr>")
    head = "".join(f"<th>{title}</th>" for title in titles)
    return (
        f"<table><tr>{head}</tr>{''.join(rows)}</table><p>Sizes in GiB of each device, operations of all devices.</p>"
    )


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.2f}"


def _text(value: str) -> str:
    return html.escape(str(value), quote=True)
