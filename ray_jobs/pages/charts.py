"""Templates, axes, lines and charts of the pages.

Templates of a page: those of its own package, and the layout and style that all pages share.

Where ticks go: seconds of the video and hertz of mel bins as percentages of a picture's side.

Points, lines and ticks of a drawing, in its own units: what an SVG template needs.

Curves of several runs in one drawing, steps to the right.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

Curve = tuple[tuple[int, float], ...]
"""(step, value), steps ascending."""


_FOLDER = "page_files"


def page_environment(package: str) -> Environment:
    """The templates in `page_files` of `package`, beside the shared ``layout.html``, which a page extends.

    Whatever is filled in is escaped, and what is not given is an error.
    """
    return Environment(
        loader=ChoiceLoader([PackageLoader(package, _FOLDER), PackageLoader("ray_jobs.pages", _FOLDER)]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


_KALDI_LOWEST_HZ = 20.0
_HERTZ = (125, 250, 500, 1000, 2000, 4000, 8000, 16000)
_LEAST_GAP_PERCENT = 11.0
_STEPS_SECONDS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


@dataclass(frozen=True, kw_only=True, slots=True)
class Tick:
    """A label on an axis."""

    percent: float
    """From the left or the top."""
    label: str


def seconds_ticks(start: float, end: float, *, most: int = 6) -> list[Tick]:
    """Round seconds between `start` and `end`, at most about `most`."""
    span = end - start
    step = next((step for step in _STEPS_SECONDS if span / step <= most), _STEPS_SECONDS[-1])
    first, last = math.ceil(start / step - 1e-6), math.floor(end / step + 1e-6)
    decimals = max(0, math.ceil(-math.log10(step) - 1e-9))
    return [
        Tick(percent=100 * (number * step - start) / span, label=f"{number * step:.{decimals}f}")
        for number in range(first, last + 1)
    ]


def hertz_ticks(sample_rate_hz: int) -> list[Tick]:
    """Frequencies on the mel axis of the Kaldi filter bank, 20 Hz to half the sample rate, lowest at the bottom."""
    low, high = _mel(_KALDI_LOWEST_HZ), _mel(sample_rate_hz / 2)
    ticks: list[Tick] = []
    for hertz in _HERTZ:
        percent = 100 * (1 - (_mel(hertz) - low) / (high - low))
        near = bool(ticks) and ticks[-1].percent - percent < _LEAST_GAP_PERCENT
        if percent >= 0 and not near:
            ticks.append(Tick(percent=percent, label=f"{hertz // 1000} kHz" if hertz >= 1000 else f"{hertz} Hz"))
    return ticks


def hertz_of_bin(mel_bin: float, *, num_bins: int, sample_rate_hz: int) -> float:
    """The frequency at a place on the mel axis, counted in bins from its lower end."""
    low, high = _mel(_KALDI_LOWEST_HZ), _mel(sample_rate_hz / 2)
    mel = low + (high - low) * mel_bin / num_bins
    return 700 * (math.exp(mel / 1127) - 1)


def _mel(hertz: float) -> float:
    return 1127 * math.log(1 + hertz / 700)


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
