"""The loss of every run over its steps, as lines in a drawing, and how low it could have gone."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ray_jobs.pages.lines import Line, Mark, Point

WIDTH, HEIGHT = 720, 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 14, 14, 44
_MOST_POINTS = 400
_STEPS = (1, 2, 5, 10, 20, 25, 50, 100, 200, 500, 1000, 2000, 5000, 10000)


@dataclass(frozen=True, kw_only=True, slots=True)
class LossCurve:
    """One run."""

    model: str
    raw: Line
    """Every step."""
    smooth: Line
    """The mean of the steps around each."""
    floor: float
    """Where in the drawing the least possible loss is."""
    floor_loss: float
    final_loss: float
    """Smoothed, at the last step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LossChart:
    """A drawing of WIDTH x HEIGHT with steps to the right and the loss upwards."""

    curves: list[LossCurve]
    x_marks: list[Mark]
    y_marks: list[Mark]
    guess: float
    """Where in the drawing the loss of a model that knows nothing is."""
    guess_loss: float
    width: float = WIDTH
    height: float = HEIGHT
    left: float = _LEFT
    right: float = WIDTH - _RIGHT
    top: float = _TOP
    bottom: float = HEIGHT - _BOTTOM


def least_loss(ceiling: float, *, num_classes: int, smoothing: float) -> float:
    """The lowest cross-entropy in nats that can be expected on clips never seen, by what a model is given.

    A model whose best accuracy is `ceiling` cannot tell 1 / `ceiling` equally likely classes apart. The best it can do
    is to answer the mean of their targets, smoothed labels; what is left is the entropy of that mean.
    """
    group = 1 / ceiling
    off = smoothing / num_classes
    on = (1 - smoothing) / group + off
    return -group * on * math.log(on) - (num_classes - group) * (off * math.log(off) if off else 0.0)


def smoothed(values: Sequence[float], *, reach: int) -> list[float]:
    """The mean of each value and up to `reach` on both sides, as many on the one as on the other."""
    found = []
    for index in range(len(values)):
        near = min(reach, index, len(values) - 1 - index)
        window = values[index - near : index + near + 1]
        found.append(sum(window) / len(window))
    return found


def loss_chart(
    losses: Mapping[str, Sequence[tuple[int, float]]], floors: Mapping[str, float], *, num_classes: int
) -> LossChart:
    """Curves of (step, loss) by model; `floors` are their least losses."""
    guess = math.log(num_classes)
    last = max((step for steps in losses.values() for step, _ in steps), default=1)
    highest = max([guess, *(loss for steps in losses.values() for _, loss in steps)])
    top = 0.5 * math.ceil(highest / 0.5 + 1e-9)

    def x(step: float) -> float:
        return _LEFT + (WIDTH - _LEFT - _RIGHT) * step / last

    def y(loss: float) -> float:
        return HEIGHT - _BOTTOM - (HEIGHT - _BOTTOM - _TOP) * loss / top

    def line(model: str, points: Sequence[tuple[int, float]]) -> Line:
        every = -(-len(points) // _MOST_POINTS)
        kept = points[::every]
        return Line(name=model, points=[Point(x=x(step), y=y(loss), label="") for step, loss in kept])

    curves = []
    for model, steps in losses.items():
        mean = smoothed([loss for _, loss in steps], reach=max(1, len(steps) // 20))
        curves.append(
            LossCurve(
                model=model,
                raw=line(model, steps),
                smooth=line(model, [(step, loss) for (step, _), loss in zip(steps, mean, strict=True)]),
                floor=y(floors[model]),
                floor_loss=floors[model],
                final_loss=mean[-1],
            )
        )
    stride = next((step for step in _STEPS if last / step <= 8), _STEPS[-1])
    return LossChart(
        curves=curves,
        x_marks=[Mark(at=x(step), label=str(step)) for step in range(0, last + 1, stride)],
        y_marks=[Mark(at=y(loss), label=str(loss)) for loss in range(math.floor(top) + 1)],
        guess=y(guess),
        guess_loss=guess,
    )
