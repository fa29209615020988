"""Points, lines and ticks of a drawing, in its own units: what an SVG template needs."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """A place on a line."""

    x: float
    y: float
    label: str
    """What a pointer that rests on it is told."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One curve."""

    name: str
    points: list[Point]

    @property
    def path(self) -> str:
        """The line through its points, as SVG writes it."""
        return " ".join(
            f"{'L' if index else 'M'}{point.x:.1f} {point.y:.1f}" for index, point in enumerate(self.points)
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """A tick: its place in the drawing and its text."""

    at: float
    label: str
