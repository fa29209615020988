"""Shapes as signed distances: negative inside, in units of the radius."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float

Plane = Float[np.ndarray, "frames height width"]


def _disc(x: Plane, y: Plane) -> Plane:
    return np.asarray(np.hypot(x, y) - 0.8)


def _square(x: Plane, y: Plane) -> Plane:
    return np.asarray(np.maximum(np.abs(x), np.abs(y)) - 0.71)


def _triangle(x: Plane, y: Plane) -> Plane:
    slope = np.sqrt(0.75)
    return np.asarray(np.maximum(np.maximum(slope * x - 0.5 * y, -slope * x - 0.5 * y), y) - 0.62)


def _cross(x: Plane, y: Plane) -> Plane:
    upright = np.maximum(np.abs(x) - 0.33, np.abs(y) - 0.95)
    lying = np.maximum(np.abs(x) - 0.95, np.abs(y) - 0.33)
    return np.asarray(np.minimum(upright, lying))


def _ring(x: Plane, y: Plane) -> Plane:
    return np.asarray(np.abs(np.hypot(x, y) - 0.75) - 0.22)


def _star(x: Plane, y: Plane) -> Plane:
    """Five points, folded onto one edge: the line from a tip (radius 1.22) to a notch (0.55) half a point further."""
    half_point = np.pi / 5
    angle = np.abs((np.arctan2(x, -y) / (2 * half_point) + 0.5) % 1.0 - 0.5) * 2 * half_point
    along, across = np.cos(angle) * np.hypot(x, y), np.sin(angle) * np.hypot(x, y)
    normal = np.array([0.55 * np.sin(half_point), 1.22 - 0.55 * np.cos(half_point)])
    normal /= np.hypot(*normal)
    return np.asarray((along - 1.22) * float(normal[0]) + across * float(normal[1]))


def _bar(x: Plane, y: Plane) -> Plane:
    """Two radii wide and without ends."""
    return np.asarray(np.abs(x) - 1.0 + 0.0 * y)


SHAPES = ("disc", "square", "triangle", "cross", "ring", "star")
"""Shapes that can be labels, in label order; their areas are about equal."""
BAR = "bar"
"""The shape of what hides others; never a label."""

OUTLINES: dict[str, Callable[[Plane, Plane], Plane]] = {
    "disc": _disc,
    "square": _square,
    "triangle": _triangle,
    "cross": _cross,
    "ring": _ring,
    "star": _star,
    BAR: _bar,
}
"""Distance to each outline at (x right, y down)."""
