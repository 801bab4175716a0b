"""Draws a kind of the pictogram world as a small PNG image.

Owns pixels; what a kind looks like is `pictogram_shapes.py`, what it means `pictogram_world.py`. The one idea: every
drawing jitters the points, turns, stretches and places them on a cluttered, noisy background, so that no two drawings
are equal while the kind and its named colour stay recognisable at 64 x 64 pixels.
"""

from __future__ import annotations

import functools
import io
import math
import zlib
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from safegrpo_jax.data.pictogram_shapes import SHAPES, Shape, written_note

OVERSAMPLING = 2  # drawn larger and averaged down: smooth edges cost less than Pillow's own antialiasing
MAX_TURN = 0.25  # radians, either way
POINT_JITTER = 0.025  # of the unit square; about one pixel at 64
NOISE_LEVEL = 10  # largest change of a channel by pixel noise, of 255
MIN_CONTRAST = 110  # smallest distance between main colour and background, in RGB units

COLOURS = {
    "red": (205, 35, 40),
    "orange": (245, 140, 20),
    "yellow": (245, 220, 40),
    "green": (35, 150, 60),
    "blue": (40, 85, 210),
    "purple": (135, 50, 165),
    "black": (35, 35, 38),
    "white": (250, 250, 250),
}
_FIXED_ROLES = {
    "ink": (20, 20, 24),
    "steel": (165, 172, 182),
    "paper": (246, 244, 238),
    "skin": (235, 185, 150),
    "blood": (170, 5, 15),
    "wood": (130, 85, 45),
    "glow": (255, 190, 30),
    "leaf": (70, 135, 60),
    "cloud": (120, 125, 135),
    "water": (95, 160, 215),
}


class _Compiled(NamedTuple):
    points: np.ndarray  # [all points, 2]
    ends: tuple[int, ...]  # one per shape, exclusive
    shapes: tuple[Shape, ...]


@functools.cache
def _compile(kind: str, second_line: str) -> _Compiled:
    shapes = SHAPES[kind] if kind in SHAPES else written_note((kind, second_line) if second_line else (kind,))
    points = np.array([point for shape in shapes for point in shape.points])
    ends = tuple(np.cumsum([len(shape.points) for shape in shapes]).tolist())
    return _Compiled(points, ends, shapes)


def _blend(colour: tuple[int, ...], other: tuple[int, ...], share: float) -> tuple[int, ...]:
    return tuple(round(a + (b - a) * share) for a, b in zip(colour, other, strict=True))


def _background_colour(rng: np.random.Generator, main: tuple[int, ...]) -> tuple[int, ...]:
    while True:  # ends with probability 1; about a third of the colour box is far enough from any main colour
        colour = tuple((rng.integers(150, 215) + rng.integers(-30, 31, 3)).tolist())
        if sum((a - b) ** 2 for a, b in zip(colour, main, strict=True)) > MIN_CONTRAST**2:
            return colour


def _draw_background(draw: ImageDraw.ImageDraw, rng: np.random.Generator, main: tuple[int, ...], side: int) -> None:
    """A plain colour, sometimes with a ground band, and a few small marks behind the object."""
    sky = _background_colour(rng, main)
    draw.rectangle((0, 0, side, side), fill=sky)
    if rng.random() < 0.5:
        ground = _blend(sky, (255, 255, 255) if rng.random() < 0.5 else (90, 90, 90), 0.25)
        height = float(rng.uniform(0.5, 0.85)) * side
        draw.polygon(
            [(0, height), (side, height + float(rng.uniform(-0.1, 0.1)) * side), (side, side), (0, side)], ground
        )
    for _ in range(int(rng.integers(2, 6))):
        x, y, radius = (rng.uniform((0, 0, 0.02), (1, 1, 0.06)) * side).tolist()
        mark = _blend(sky, tuple(rng.integers(0, 256, 3).tolist()), 0.5)
        if rng.random() < 0.5:
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=mark)
        else:
            draw.line((x - radius, y - radius, x + radius, y + radius), fill=mark, width=OVERSAMPLING)


def _placement(rng: np.random.Generator, side: int, is_writing: bool) -> tuple[np.ndarray, np.ndarray]:
    """A random 2 x 2 map (turn and stretch) and a position, in canvas pixels."""
    turn = float(rng.uniform(-1, 1)) * (MAX_TURN / 3 if is_writing else MAX_TURN)
    smallest, largest = (0.88, 0.95) if is_writing else (0.72, 0.92)
    scale = rng.uniform(smallest, largest) * rng.uniform(0.93, 1.05, 2) * side / 2
    freedom = max(side / 2 - float(scale.max()), 0.0)
    cosine, sine = math.cos(turn), math.sin(turn)
    return np.array([[cosine, sine], [-sine, cosine]]) * scale[:, None], side / 2 + rng.uniform(-1, 1, 2) * freedom


def draw_pictogram(kind: str, colour: str, rng: np.random.Generator, image_size: int, second_line: str = "") -> bytes:
    """Draws one kind in one named colour and returns a PNG file of `image_size` x `image_size` pixels, RGB.

    A kind without a shape list is written as a word on a paper note, `second_line` below it.

    Raises:
        KeyError: a colour outside COLOURS, or a letter outside the stroke font.
    """
    main = tuple(np.clip(np.array(COLOURS[colour]) + rng.integers(-14, 15, 3), 0, 255).tolist())
    roles = _FIXED_ROLES | {
        "main": main,
        "dark": _blend(main, (0, 0, 0), 0.45),
        "light": _blend(main, (255, 255, 255), 0.55),
    }
    side = image_size * OVERSAMPLING
    canvas = Image.new("RGB", (side, side))
    draw = ImageDraw.Draw(canvas)
    _draw_background(draw, rng, main, side)
    compiled = _compile(kind, second_line)
    matrix, centre = _placement(rng, side, is_writing=kind not in SHAPES)
    jitter = rng.normal(0, POINT_JITTER, compiled.points.shape)
    points = ((compiled.points + jitter) @ matrix + centre).ravel().tolist()
    unit = float(np.abs(np.linalg.det(matrix))) ** 0.5
    start = 0
    for shape, end in zip(compiled.shapes, compiled.ends, strict=True):
        outline = points[2 * start : 2 * end]
        if shape.width:
            draw.line(outline, fill=roles[shape.role], width=max(1, round(shape.width * unit)), joint="curve")
        else:
            draw.polygon(outline, fill=roles[shape.role], outline=_FIXED_ROLES["ink"])
        start = end
    pixels = np.asarray(canvas.reduce(OVERSAMPLING), np.int16)
    noise = rng.integers(-NOISE_LEVEL, NOISE_LEVEL + 1, pixels.shape, np.int16)
    buffer = io.BytesIO()
    Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8)).save(
        buffer, "PNG", compress_level=1, compress_type=zlib.Z_HUFFMAN_ONLY
    )
    return buffer.getvalue()
