"""Curves of several runs in one drawing, steps to the right."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ray_jobs.compare.runs import Curve
from ray_jobs.pages.lines import Line, Mark, Point

WIDTH, HEIGHT = 720, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 12, 40
_MOST_POINTS = 400
_MOST_MARKS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """One metric of all runs that have it."""

    metric: str
    lines: list[Line]
    """A line a run, named by the run's place in the comparison."""
    x_marks: list[Mark]
    y_marks: list[Mark]
    width: float = WIDTH
    height: float = HEIGHT
    left: float = _LEFT
    right: float = WIDTH - _RIGHT
    top: float = _TOP
    bottom: float = HEIGHT - _BOTTOM


def metric_charts(curves_of_run: Sequence[Mapping[str, Curve]]) -> list[Chart]:
    """A drawing for each metric that some run has at two steps or more."""
    names = sorted({name for curves in curves_of_run for name, curve in curves.items() if len(curve) > 1})
    return [_chart(name, [curves.get(name, ()) for curves in curves_of_run]) for name in names]


def _chart(metric: str, curves: Sequence[Curve]) -> Chart:
    values = [value for curve in curves for _, value in curve]
    x_places = places(0, max(step for curve in curves for step, _ in curve), whole=True)
    y_places = places(min(values), max(values))
    left, right = min(x_places), max(x_places[-1], *(step for curve in curves for step, _ in curve))
    low, high = y_places[0], y_places[-1]

    def x(step: float) -> float:
        return _LEFT + (WIDTH - _LEFT - _RIGHT) * (step - left) / (right - left)

    def y(value: float) -> float:
        return HEIGHT - _BOTTOM - (HEIGHT - _BOTTOM - _TOP) * (value - low) / (high - low)

    def line(number: int, curve: Curve) -> Line:
        points = [Point(x=x(step), y=y(value), label=f"step {step}: {value:.4g}") for step, value in thinned(curve)]
        return Line(name=str(number), points=points)

    return Chart(
        metric=metric,
        lines=[line(number, curve) for number, curve in enumerate(curves) if curve],
        x_marks=[Mark(at=x(place), label=f"{place:g}") for place in x_places],
        y_marks=[Mark(at=y(place), label=f"{place:g}") for place in y_places],
    )


def thinned(curve: Curve) -> Curve:
    """At most some hundred points: evenly chosen, the last one kept."""
    every = -(-len(curve) // _MOST_POINTS)
    return curve[-1::-every][::-1] if curve else curve


def places(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Round numbers in even steps, two at least, from at most `low` to at least `high` (the last at most, if `whole`).

    Of values that are as good as one the step is that of their size.
    """
    size = max(abs(low), abs(high))
    span = high - low if high - low > 1e-6 * size else size
    step = _round_step(max(span, 1e-9) / _MOST_MARKS)
    if whole:
        step = max(1.0, step)
    first = math.floor(low / step + 1e-9)
    last = math.floor(high / step + 1e-9) if whole else math.ceil(high / step - 1e-9)
    decimals = max(0, 1 - math.floor(math.log10(step)))
    return [round(number * step, decimals) for number in range(first, max(last, first + 1) + 1)]


def _round_step(least: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is at least `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))
