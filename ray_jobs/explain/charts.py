"""The entropy of every direction over the layers, drawn as SVG."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ca2st.model.attention_maps import AttentionMap
from ray_jobs.pages.lines import Line, Mark, Point

WIDTH, HEIGHT = 360, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 40, 12, 14, 40
_MOST_LAYER_TICKS = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class LineChart:
    """A drawing of WIDTH x HEIGHT with layers to the right."""

    title: str
    y_label: str
    lines: list[Line]
    x_marks: list[Mark]
    y_marks: list[Mark]
    left: float = _LEFT
    right: float = WIDTH - _RIGHT
    top: float = _TOP
    bottom: float = HEIGHT - _BOTTOM
    width: float = WIDTH
    height: float = HEIGHT


def entropy_charts(maps: Sequence[AttentionMap], *, depth: int) -> tuple[LineChart, LineChart]:
    """Entropy as a share of its maximum, and in bits."""
    share = {(found.direction.name, found.layer): float(found.entropy_share[0]) for found in maps}
    bits = {(found.direction.name, found.layer): float(found.entropy_bits[0]) for found in maps}
    highest = max(max(bits.values()), 1.0)
    step = next(step for step in (0.5, 1, 2, 4) if highest / step <= 6 or step == 4)
    ceiling = step * -(-highest // step)
    return (
        _chart("Share of the maximum", "share of maximum entropy", share, depth=depth, top=1.0, step=0.25, unit="%"),
        _chart("In bits", "entropy in bits", bits, depth=depth, top=ceiling, step=step, unit=" bits"),
    )


def _chart(
    title: str,
    y_label: str,
    values: Mapping[tuple[str, int], float],
    *,
    depth: int,
    top: float,
    step: float,
    unit: str,
) -> LineChart:
    def x(layer: int) -> float:
        return _LEFT + (WIDTH - _LEFT - _RIGHT) * ((layer - 0.5) / depth)

    def y(value: float) -> float:
        return HEIGHT - _BOTTOM - (HEIGHT - _BOTTOM - _TOP) * value / top

    def told(value: float) -> str:
        return f"{100 * value:.1f} %" if unit == "%" else f"{value:.2f}{unit}"

    names = dict.fromkeys(name for name, _ in values)
    lines = [
        Line(
            name=name,
            points=[
                Point(x=x(layer), y=y(value), label=f"{name.upper()}, layer {layer}: {told(value)}")
                for (of, layer), value in values.items()
                if of == name
            ],
        )
        for name in names
    ]
    every = -(-depth // _MOST_LAYER_TICKS)
    ticks = [step * number for number in range(round(top / step) + 1)]
    return LineChart(
        title=title,
        y_label=y_label,
        lines=lines,
        x_marks=[
            Mark(at=x(layer), label=str(layer)) for layer in range(1, depth + 1) if layer % every == 0 or every == 1
        ],
        y_marks=[Mark(at=y(tick), label=f"{100 * tick:.0f} %" if unit == "%" else f"{tick:g}") for tick in ticks],
    )
