"""Shapes of the pictogram world: polygons, lines and ovals for every object kind, and a tiny stroke font.

Pure data with the few functions that write it down; `pictogram_drawing.py` puts it on an image. The one idea: a kind is
a list of primitives in the square [-1, 1] x [-1, 1] (x right, y down) with colour roles, "main" being the named colour.
The file is long because drawings are: about six lines a kind.
"""

from __future__ import annotations

import math
from typing import NamedTuple

Number = int | float


class Shape(NamedTuple):
    """One primitive: a filled outline, or an open line where `width` > 0 (in units of the square)."""

    role: str
    points: tuple[tuple[Number, Number], ...]
    width: Number = 0.0


def _pairs(numbers: tuple[Number, ...]) -> tuple[tuple[Number, Number], ...]:
    return tuple(zip(numbers[::2], numbers[1::2], strict=True))


def _poly(role: str, *numbers: Number) -> Shape:
    return Shape(role, _pairs(numbers))


def _line(role: str, width: Number, *numbers: Number) -> Shape:
    return Shape(role, _pairs(numbers), width)


def _box(role: str, left: Number, top: Number, right: Number, bottom: Number) -> Shape:
    return _poly(role, left, top, right, top, right, bottom, left, bottom)


def _oval(role: str, x: Number, y: Number, radius_x: Number, radius_y: Number) -> Shape:
    angles = [2 * math.pi * i / 18 for i in range(18)]
    return Shape(role, tuple((x + radius_x * math.cos(a), y + radius_y * math.sin(a)) for a in angles))


def _arc(role: str, width: Number, x: Number, y: Number, radius_x: Number, radius_y: Number, *degrees: Number) -> Shape:
    first, last = (math.radians(d) for d in degrees)
    angles = [first + (last - first) * i / 12 for i in range(13)]
    return Shape(role, tuple((x + radius_x * math.cos(a), y + radius_y * math.sin(a)) for a in angles), width)


def _star(role: str, x: Number, y: Number, outer: Number, inner: Number, rays: int) -> Shape:
    points = []
    for i in range(2 * rays):
        radius, angle = (outer, inner)[i % 2], math.pi * i / rays
        points.append((x + radius * math.cos(angle), y + radius * math.sin(angle)))
    return Shape(role, tuple(points))


SHAPES: dict[str, tuple[Shape, ...]] = {
    # sharp
    "knife": (
        _poly("steel", -0.98, 0.12, -0.6, -0.2, 0.15, -0.28, 0.15, 0.12),
        _box("main", 0.15, -0.28, 0.98, 0.14),
        _oval("ink", 0.4, -0.07, 0.05, 0.05),
        _oval("ink", 0.75, -0.07, 0.05, 0.05),
    ),
    "saw": (
        _poly("steel", -0.98, -0.2, 0.2, -0.4, 0.2, 0.3, 0.05, 0.12, -0.1, 0.32, -0.25, 0.14, -0.4, 0.34, -0.55, 0.16,
              -0.7, 0.36, -0.84, 0.18, -0.98, 0.34),
        _poly("main", 0.12, -0.6, 0.85, -0.55, 0.98, 0.5, 0.2, 0.45),
        _oval("paper", 0.55, -0.05, 0.17, 0.24),
    ),
    "scissors": (
        _poly("steel", -0.55, -0.95, -0.35, -0.9, 0.25, 0.3, 0.05, 0.35),
        _poly("steel", 0.55, -0.95, 0.35, -0.9, -0.25, 0.3, -0.05, 0.35),
        _arc("main", 0.17, 0.4, 0.6, 0.3, 0.3, 0, 360),
        _arc("main", 0.17, -0.4, 0.6, 0.3, 0.3, 0, 360),
        _oval("ink", 0, -0.05, 0.07, 0.07),
    ),
    "axe": (
        _line("wood", 0.18, -0.25, -0.95, -0.25, 0.95),
        _poly("main", -0.4, -0.75, 0.35, -0.9, 0.35, 0.1, -0.4, -0.25),
        _poly("steel", 0.35, -0.9, 0.62, -0.98, 0.75, -0.4, 0.62, 0.2, 0.35, 0.1),
    ),
    # toxic
    "flask": (
        _box("wood", -0.22, -0.98, 0.22, -0.7),
        _poly("main", -0.2, -0.7, 0.2, -0.7, 0.2, -0.35, 0.62, -0.1, 0.62, 0.95, -0.62, 0.95, -0.62, -0.1, -0.2, -0.35),
        _line("paper", 0.12, -0.42, 0.1, 0.42, 0.75),
        _line("paper", 0.12, 0.42, 0.1, -0.42, 0.75),
        _oval("paper", 0, 0.32, 0.32, 0.34),
        _oval("ink", -0.13, 0.28, 0.09, 0.1),
        _oval("ink", 0.13, 0.28, 0.09, 0.1),
    ),
    "toadstool": (
        _poly("paper", -0.2, 0.0, 0.2, 0.0, 0.3, 0.95, -0.3, 0.95),
        _poly("main", -0.95, 0.1, -0.8, -0.4, -0.4, -0.8, 0, -0.9, 0.4, -0.8, 0.8, -0.4, 0.95, 0.1),
        _oval("paper", -0.5, -0.2, 0.14, 0.14),
        _oval("paper", 0.0, -0.55, 0.15, 0.13),
        _oval("paper", 0.5, -0.25, 0.15, 0.15),
        _oval("paper", 0.02, -0.1, 0.11, 0.11),
    ),
    "pills": (
        _line("main", 0.5, -0.68, -0.45, 0.05, -0.45),
        _oval("main", -0.68, -0.45, 0.26, 0.25),
        _line("paper", 0.5, 0.05, -0.45, 0.62, -0.45),
        _oval("paper", 0.66, -0.45, 0.26, 0.25),
        _oval("main", -0.45, 0.45, 0.38, 0.34),
        _line("ink", 0.07, -0.75, 0.45, -0.15, 0.45),
        _oval("main", 0.5, 0.45, 0.38, 0.34),
        _line("ink", 0.07, 0.2, 0.45, 0.8, 0.45),
    ),
    "barrel": (
        _oval("main", 0, 0.75, 0.65, 0.2),
        _box("main", -0.65, -0.75, 0.65, 0.75),
        _oval("light", 0, -0.75, 0.65, 0.2),
        _poly("glow", 0, -0.4, 0.5, 0.5, -0.5, 0.5),
        _line("ink", 0.13, 0, -0.1, 0, 0.22),
        _oval("ink", 0, 0.38, 0.08, 0.07),
    ),
    # hot
    "fire": (
        _line("wood", 0.2, -0.75, 0.9, 0.75, 0.6),
        _line("wood", 0.2, 0.75, 0.9, -0.75, 0.6),
        _poly("main", -0.6, 0.6, -0.75, 0.1, -0.45, -0.4, -0.3, -0.1, 0, -0.98, 0.3, -0.2, 0.5, -0.5, 0.75, 0.1, 0.6,
              0.6),
        _poly("light", -0.25, 0.6, -0.3, 0.25, 0.02, -0.3, 0.3, 0.25, 0.25, 0.6),
    ),
    "candle": (
        _oval("steel", 0, 0.82, 0.6, 0.16),
        _box("main", -0.27, -0.2, 0.27, 0.82),
        _line("ink", 0.06, 0, -0.2, 0, -0.4),
        _poly("glow", 0, -0.98, 0.2, -0.55, 0, -0.32, -0.2, -0.55),
    ),
    "stove": (
        _box("main", -0.85, -0.35, 0.85, 0.95),
        _box("ink", -0.6, 0.1, 0.6, 0.75),
        _oval("glow", -0.42, -0.42, 0.34, 0.13),
        _oval("glow", 0.42, -0.42, 0.34, 0.13),
        _line("paper", 0.07, -0.42, -0.6, -0.3, -0.72, -0.5, -0.84, -0.4, -0.98),
        _line("paper", 0.07, 0.42, -0.6, 0.54, -0.72, 0.34, -0.84, 0.44, -0.98),
        _line("paper", 0.09, -0.5, -0.1, 0.5, -0.1),
    ),
    "iron": (
        _poly("main", -0.9, 0.4, -0.6, 0.0, 0.1, -0.2, 0.8, -0.2, 0.9, 0.4),
        _line("ink", 0.15, -0.25, -0.1, -0.1, -0.6, 0.65, -0.6, 0.7, -0.2),
        _box("steel", -0.98, 0.4, 0.95, 0.58),
        _line("paper", 0.07, -0.5, 0.66, -0.6, 0.95),
        _line("paper", 0.07, 0.0, 0.66, -0.1, 0.95),
        _line("paper", 0.07, 0.5, 0.66, 0.4, 0.95),
    ),
    # electric
    "socket": (
        _box("main", -0.85, -0.85, 0.85, 0.85),
        _oval("paper", 0, 0, 0.6, 0.6),
        _oval("ink", -0.25, 0, 0.12, 0.12),
        _oval("ink", 0.25, 0, 0.12, 0.12),
        _line("steel", 0.1, 0, -0.62, 0, -0.4),
        _line("steel", 0.1, 0, 0.62, 0, 0.4),
    ),
    "cable": (
        _line("main", 0.17, 0.35, -0.35, -0.2, -0.75, -0.7, -0.4, -0.3, 0.0, 0.1, 0.3, -0.35, 0.75, -0.95, 0.55),
        _poly("ink", 0.3, -0.62, 0.68, -0.55, 0.62, -0.05, 0.26, -0.12),
        _line("steel", 0.1, 0.65, -0.45, 0.95, -0.42),
        _line("steel", 0.1, 0.62, -0.2, 0.93, -0.17),
        _star("glow", 0.55, 0.45, 0.42, 0.15, 6),
    ),
    "pylon": (
        _line("main", 0.12, -0.55, 0.98, 0, -0.98, 0.55, 0.98),
        _line("main", 0.08, -0.45, 0.6, 0.28, 0.1, -0.2, -0.3),
        _line("main", 0.08, 0.45, 0.6, -0.28, 0.1, 0.2, -0.3),
        _line("main", 0.12, -0.7, -0.5, 0.7, -0.5),
        _line("main", 0.12, -0.9, -0.1, 0.9, -0.1),
        _line("ink", 0.04, -1.3, -0.35, -0.7, -0.5, 0.7, -0.5, 1.3, -0.35),
        _line("ink", 0.04, -1.3, 0.05, -0.9, -0.1, 0.9, -0.1, 1.3, 0.05),
    ),
    "lightning": (
        _oval("cloud", -0.4, -0.6, 0.5, 0.3),
        _oval("cloud", 0.4, -0.6, 0.5, 0.3),
        _oval("cloud", 0, -0.75, 0.45, 0.25),
        _poly("main", -0.1, -0.5, 0.45, -0.5, 0.15, 0.0, 0.5, 0.0, -0.3, 0.98, -0.05, 0.25, -0.45, 0.25),
    ),
    # high
    "cliff": (
        _box("water", -0.2, 0.7, 1.1, 0.98),
        _poly("main", -1.1, -0.25, 0.2, -0.25, 0.3, 0.1, 0.1, 0.4, 0.25, 0.98, -1.1, 0.98),
        _box("leaf", -1.1, -0.4, 0.25, -0.2),
        _line("dark", 0.06, -0.6, 0.1, -0.3, 0.4, -0.45, 0.8),
        _oval("ink", 0.05, -0.88, 0.1, 0.1),
        _line("ink", 0.1, 0.05, -0.8, 0.05, -0.4),
    ),
    "roof": (
        _box("paper", -0.75, 0.45, 0.75, 0.95),
        _box("cloud", 0.4, -0.9, 0.62, -0.1),
        _poly("main", -0.98, 0.5, -0.35, -0.6, 0.35, -0.6, 0.98, 0.5),
        _line("dark", 0.06, -0.6, -0.2, 0.6, -0.2),
        _line("dark", 0.06, -0.8, 0.15, 0.8, 0.15),
        _oval("ink", -0.1, -0.98, 0.1, 0.1),
        _line("ink", 0.1, -0.1, -0.9, -0.1, -0.6),
    ),
    "ladder": (
        _line("main", 0.13, -0.38, 0.98, -0.28, -0.98),
        _line("main", 0.13, 0.38, 0.98, 0.28, -0.98),
        _line("main", 0.11, -0.38, 0.7, 0.38, 0.7),
        _line("main", 0.11, -0.35, 0.25, 0.35, 0.25),
        _line("main", 0.11, -0.33, -0.2, 0.33, -0.2),
        _line("main", 0.11, -0.3, -0.65, 0.3, -0.65),
    ),
    "tower": (
        _box("main", -0.34, -0.6, 0.34, 0.98),
        _poly("main", -0.5, -0.55, -0.5, -0.98, -0.28, -0.98, -0.28, -0.8, -0.1, -0.8, -0.1, -0.98, 0.1, -0.98, 0.1,
              -0.8, 0.28, -0.8, 0.28, -0.98, 0.5, -0.98, 0.5, -0.55),
        _box("ink", -0.1, -0.4, 0.1, -0.1),
        _box("ink", -0.1, 0.1, 0.1, 0.4),
        _box("ink", -0.14, 0.65, 0.14, 0.98),
    ),
    # busy
    "road": (
        _poly("main", -0.98, 0.98, -0.3, -0.9, 0.3, -0.9, 0.98, 0.98),
        _poly("paper", -0.09, 0.95, -0.07, 0.5, 0.07, 0.5, 0.09, 0.95),
        _poly("paper", -0.06, 0.25, -0.05, -0.1, 0.05, -0.1, 0.06, 0.25),
        _poly("paper", -0.04, -0.35, -0.03, -0.65, 0.03, -0.65, 0.04, -0.35),
        _box("glow", 0.18, -0.15, 0.62, 0.15),
        _box("glow", 0.26, -0.32, 0.54, -0.12),
        _oval("ink", 0.26, 0.17, 0.09, 0.09),
        _oval("ink", 0.54, 0.17, 0.09, 0.09),
    ),
    "railway": (
        _line("main", 0.22, -0.95, 0.8, 0.95, 0.8),
        _line("main", 0.19, -0.78, 0.35, 0.78, 0.35),
        _line("main", 0.15, -0.62, -0.05, 0.62, -0.05),
        _line("main", 0.12, -0.48, -0.4, 0.48, -0.4),
        _line("main", 0.1, -0.38, -0.7, 0.38, -0.7),
        _line("steel", 0.12, -0.68, 0.98, -0.2, -0.95),
        _line("steel", 0.12, 0.68, 0.98, 0.2, -0.95),
    ),
    "roundabout": (
        _line("main", 0.4, -1.2, 0, 1.2, 0),
        _line("main", 0.4, 0, -1.2, 0, 1.2),
        _oval("main", 0, 0, 0.8, 0.8),
        _oval("leaf", 0, 0, 0.36, 0.36),
        _arc("paper", 0.07, 0, 0, 0.58, 0.58, 20, 70),
        _arc("paper", 0.07, 0, 0, 0.58, 0.58, 110, 160),
        _arc("paper", 0.07, 0, 0, 0.58, 0.58, 200, 250),
        _arc("paper", 0.07, 0, 0, 0.58, 0.58, 290, 340),
    ),
    "tunnel": (
        _poly("main", -0.98, 0.9, -0.9, -0.1, -0.55, -0.7, 0, -0.9, 0.55, -0.7, 0.9, -0.1, 0.98, 0.9),
        _poly("ink", -0.62, 0.9, -0.55, 0.05, -0.3, -0.35, 0, -0.48, 0.3, -0.35, 0.55, 0.05, 0.62, 0.9),
        _oval("glow", -0.2, 0.3, 0.12, 0.12),
        _oval("glow", 0.2, 0.3, 0.12, 0.12),
        _line("paper", 0.09, 0, 0.6, 0, 0.9),
    ),
    # deep
    "lake": (
        _poly("main", -0.98, 0.2, -0.7, -0.3, -0.2, -0.25, 0.2, -0.5, 0.8, -0.25, 0.98, 0.25, 0.5, 0.7, -0.1, 0.55,
              -0.6, 0.7),
        _line("light", 0.07, -0.5, 0.05, -0.3, -0.03, -0.1, 0.05, 0.1, -0.03),
        _line("light", 0.07, 0.1, 0.35, 0.3, 0.27, 0.5, 0.35, 0.7, 0.27),
        _line("leaf", 0.09, -0.75, 0.3, -0.78, -0.7),
        _line("leaf", 0.09, -0.6, 0.35, -0.55, -0.6),
    ),
    "sea": (
        _poly("main", -1.3, -0.1, -0.9, -0.35, -0.5, -0.1, -0.1, -0.35, 0.3, -0.1, 0.7, -0.35, 1.1, -0.1, 1.3, -0.2,
              1.3, 1.0, -1.3, 1.0),
        _line("light", 0.09, -1.1, 0.3, -0.7, 0.1, -0.3, 0.3, 0.1, 0.1, 0.5, 0.3, 0.9, 0.1),
        _line("light", 0.09, -1.1, 0.75, -0.7, 0.55, -0.3, 0.75, 0.1, 0.55, 0.5, 0.75, 0.9, 0.55),
        _poly("ink", 0.1, -0.05, 0.35, -0.65, 0.45, -0.05),
    ),
    "well": (
        _line("wood", 0.11, -0.5, 0.1, -0.5, -0.5),
        _line("wood", 0.11, 0.5, 0.1, 0.5, -0.5),
        _poly("wood", -0.8, -0.4, 0, -0.95, 0.8, -0.4),
        _box("main", -0.65, 0.15, 0.65, 0.9),
        _oval("ink", 0, 0.15, 0.65, 0.2),
        _oval("water", 0, 0.2, 0.45, 0.1),
        _line("dark", 0.05, -0.65, 0.6, 0.65, 0.6),
        _line("ink", 0.05, 0, -0.5, 0, 0.1),
    ),
    "pool": (
        _poly("paper", -0.65, -0.75, 0.98, -0.75, 0.7, 0.8, -0.98, 0.8),
        _poly("main", -0.55, -0.6, 0.8, -0.6, 0.56, 0.64, -0.82, 0.64),
        _line("paper", 0.06, -0.6, -0.2, 0.72, -0.2),
        _line("paper", 0.06, -0.7, 0.22, 0.62, 0.22),
        _line("steel", 0.1, 0.45, -0.95, 0.4, -0.3),
        _line("steel", 0.1, 0.75, -0.95, 0.7, -0.3),
    ),
    # deadly
    "pistol": (
        _poly("main", 0.15, -0.2, 0.65, -0.2, 0.9, 0.8, 0.4, 0.85),
        _box("main", -0.95, -0.6, 0.75, -0.12),
        _line("ink", 0.09, -0.2, -0.12, -0.15, 0.25, 0.25, 0.25),
        _line("ink", 0.07, -0.9, -0.3, 0.7, -0.3),
    ),
    "bomb": (
        _oval("main", -0.1, 0.25, 0.68, 0.68),
        _poly("ink", 0.15, -0.45, 0.45, -0.25, 0.6, -0.5, 0.32, -0.68),
        _line("wood", 0.09, 0.45, -0.55, 0.6, -0.8, 0.8, -0.7),
        _star("glow", 0.82, -0.68, 0.27, 0.1, 6),
        _oval("light", -0.38, 0.0, 0.15, 0.12),
    ),
    "cannon": (
        _poly("main", -0.98, -0.75, 0.55, -0.3, 0.75, 0.05, 0.45, 0.3, -0.98, -0.3),
        _oval("wood", 0.25, 0.4, 0.5, 0.5),
        _oval("paper", 0.25, 0.4, 0.33, 0.33),
        _line("wood", 0.09, -0.1, 0.4, 0.6, 0.4),
        _line("wood", 0.09, 0.25, 0.05, 0.25, 0.75),
        _oval("ink", -0.62, 0.65, 0.2, 0.2),
    ),
    "bow": (
        _arc("main", 0.16, -0.35, 0, 0.75, 0.95, -85, 85),
        _line("ink", 0.05, -0.28, -0.95, -0.6, 0, -0.28, 0.95),
        _line("wood", 0.09, -0.85, 0, 0.75, 0),
        _poly("steel", 0.98, 0, 0.65, -0.2, 0.65, 0.2),
    ),
    # bloody
    "wound": (
        _poly("skin", -1.1, -0.38, 0.6, -0.48, 0.6, 0.48, -1.1, 0.38),
        _poly("main", 0.4, -0.65, 1.1, -0.7, 1.1, 0.7, 0.4, 0.65),
        _poly("blood", -0.75, -0.2, -0.3, -0.15, 0.15, 0.15, -0.3, 0.12),
        _line("blood", 0.11, -0.45, 0.0, -0.45, 0.8),
        _line("blood", 0.11, -0.15, 0.05, -0.15, 0.55),
    ),
    "bloodstain": (
        _poly("main", -0.6, 0.0, -0.98, -0.3, -0.5, -0.4, -0.45, -0.85, -0.1, -0.55, 0.35, -0.95, 0.35, -0.4, 0.85,
              -0.4, 0.6, 0.0, 0.95, 0.35, 0.45, 0.4, 0.35, 0.85, 0.0, 0.5, -0.4, 0.8, -0.4, 0.4, -0.85, 0.4),
        _oval("main", 0.8, 0.8, 0.14, 0.14),
        _oval("main", -0.8, 0.8, 0.1, 0.1),
        _oval("main", 0.85, -0.8, 0.1, 0.1),
        _oval("dark", 0.0, 0.0, 0.3, 0.22),
    ),
    "corpse": (
        _oval("blood", -0.2, 0.35, 0.85, 0.4),
        _oval("skin", -0.7, -0.05, 0.25, 0.25),
        _line("skin", 0.15, -0.2, 0.1, -0.35, 0.75),
        _box("main", -0.45, -0.3, 0.35, 0.25),
        _line("ink", 0.2, 0.35, -0.17, 0.98, -0.25),
        _line("ink", 0.2, 0.35, 0.12, 0.95, 0.22),
        _line("ink", 0.06, -0.8, -0.12, -0.64, 0.04),
        _line("ink", 0.06, -0.64, -0.12, -0.8, 0.04),
    ),
    # edible
    "apple": (
        _oval("main", -0.28, 0.2, 0.5, 0.65),
        _oval("main", 0.28, 0.2, 0.5, 0.65),
        _line("wood", 0.1, 0, -0.3, 0.05, -0.85),
        _poly("leaf", 0.05, -0.6, 0.35, -0.9, 0.65, -0.75, 0.35, -0.5),
    ),
    "cake": (
        _box("main", -0.85, 0.0, 0.85, 0.9),
        _poly("paper", -0.85, -0.25, 0.85, -0.25, 0.85, 0.25, 0.6, 0.4, 0.35, 0.2, 0.1, 0.42, -0.2, 0.2, -0.45, 0.4,
              -0.65, 0.2, -0.85, 0.3),
        _oval("blood", -0.5, -0.38, 0.15, 0.15),
        _oval("blood", 0.0, -0.38, 0.15, 0.15),
        _oval("blood", 0.5, -0.38, 0.15, 0.15),
    ),
    "banana": (
        _poly("main", -0.85, -0.6, -0.65, -0.65, -0.45, -0.1, 0.0, 0.15, 0.55, 0.05, 0.9, -0.2, 0.95, -0.05, 0.7, 0.4,
              0.15, 0.65, -0.4, 0.5, -0.78, 0.0),
        _poly("ink", -0.9, -0.8, -0.72, -0.85, -0.62, -0.6, -0.87, -0.55),
        _line("dark", 0.05, -0.68, -0.2, -0.35, 0.25, 0.1, 0.42, 0.65, 0.25),
    ),
    # harmless
    "ball": (
        _oval("main", 0, 0, 0.85, 0.85),
        _poly("paper", 0, -0.85, 0.32, -0.75, 0.42, 0.0, 0.32, 0.75, 0, 0.85, 0.15, 0.0),
        _poly("paper", -0.35, -0.75, -0.65, -0.5, -0.72, 0.0, -0.65, 0.5, -0.35, 0.75, -0.45, 0.0),
    ),
    "book": (
        _poly("main", -0.98, -0.55, 0, -0.4, 0.98, -0.55, 0.98, 0.7, 0, 0.85, -0.98, 0.7),
        _poly("paper", -0.82, -0.68, 0, -0.5, 0, 0.68, -0.82, 0.5),
        _poly("paper", 0.82, -0.68, 0, -0.5, 0, 0.68, 0.82, 0.5),
        _line("cloud", 0.06, -0.65, -0.3, -0.18, -0.2),
        _line("cloud", 0.06, -0.65, 0.05, -0.18, 0.15),
        _line("cloud", 0.06, 0.65, -0.3, 0.18, -0.2),
        _line("cloud", 0.06, 0.65, 0.05, 0.18, 0.15),
    ),
    "chair": (
        _line("main", 0.15, -0.5, -0.95, -0.5, 0.95),
        _line("main", 0.15, 0.5, 0.2, 0.5, 0.95),
        _poly("main", -0.58, 0.05, 0.6, 0.05, 0.6, 0.3, -0.58, 0.3),
        _line("main", 0.13, -0.5, -0.8, 0.1, -0.75, 0.12, 0.1),
        _line("main", 0.13, -0.5, -0.4, 0.1, -0.38),
    ),
    "kite": (
        _poly("main", 0.1, -0.98, 0.7, -0.35, 0.1, 0.45, -0.5, -0.35),
        _line("paper", 0.07, 0.1, -0.98, 0.1, 0.45),
        _line("paper", 0.07, -0.5, -0.35, 0.7, -0.35),
        _line("ink", 0.05, 0.1, 0.45, -0.1, 0.65, 0.05, 0.8, -0.3, 0.98),
        _poly("glow", -0.1, 0.65, -0.3, 0.52, -0.3, 0.78, 0.1, 0.52, 0.1, 0.78),
    ),
}  # fmt: skip

# Strokes of each letter on a grid two wide and four high; strokes are separated by a bar, points are "xy".
_LETTERS = {
    "a": "04 01 10 21 24|02 22", "b": "00 04 14 23 12 02|12 21 10 00", "c": "20 00 04 24",
    "d": "00 04 14 23 21 10 00", "e": "20 00 04 24|02 12", "g": "20 00 04 24 22 12", "h": "00 04|20 24|02 22",
    "i": "10 14", "k": "00 04|20 02 24", "l": "00 04 24", "m": "04 00 12 20 24", "n": "04 00 24 20",
    "o": "00 20 24 04 00", "r": "04 00 20 22 02 24", "s": "20 00 02 22 24 04", "t": "00 20|10 14",
    "u": "00 04 24 20",
}  # fmt: skip


def _letter_strokes(letter: str) -> list[list[tuple[Number, Number]]]:
    return [[(int(point[0]), int(point[1])) for point in stroke.split()] for stroke in _LETTERS[letter].split("|")]


def written_note(lines: tuple[str, ...]) -> tuple[Shape, ...]:
    """A paper note with one or two lines of stroke letters, the letters in the main colour.

    Raises:
        KeyError: a letter the font lacks.
    """
    shapes = [_poly("paper", -1.05, -0.75, 1.05, -0.75, 1.05, 0.75, -1.05, 0.75)]
    for row, text in enumerate(lines):
        advance = 1.9 / max(len(text), 4)
        left = -advance * len(text) / 2 + 0.15 * advance
        top = -0.55 + 0.6 * row if len(lines) == 2 else -0.3
        for column, letter in enumerate(text):
            for stroke in _letter_strokes(letter):
                points = tuple((left + advance * (column + 0.35 * x), top + 0.12 * y) for x, y in stroke)
                shapes.append(Shape("main", points, 0.1))
    return tuple(shapes)
