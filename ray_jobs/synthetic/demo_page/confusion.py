"""What was answered instead of what: one mark for every test clip, of a kind that says which factor went wrong."""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from ray_jobs.pages.lines import Mark
from ray_jobs.synthetic.demo_page.answers import Answers, Factors, shown

SIDE, MARGIN = 640.0, 64.0
_KINDS = {
    "right": "all right",
    "space": "shape wrong",
    "time": "motion wrong",
    "audio": "tone wrong",
    "several": "more than one wrong",
}
_ARROWS = {
    "up": "↑",
    "down": "↓",
    "left": "←",
    "right": "→",
    "up_left": "↖",
    "up_right": "↗",
    "down_left": "↙",
    "down_right": "↘",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """A pair of true and answered class that occurred."""

    x: float
    """Centre; answers to the right."""
    y: float
    """Centre; true classes downwards."""
    kind: str
    """Key of what went wrong: ``right``, ``space``, ``time``, ``audio``, ``several``."""
    count: int
    label: str
    """The pair in words."""

    @property
    def opacity(self) -> float:
        """Fuller for what happened more often."""
        return min(1.0, 0.55 + 0.15 * self.count)


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """A sort of answer."""

    key: str
    says: str
    count: int
    """Clips that were answered so."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ConfusionChart:
    """All answers of one model, classes sorted by factor."""

    num_clips: int
    cells: list[Cell]
    kinds: list[Kind]
    blocks: list[Mark]
    """Classes of the first factor."""
    inner: list[Mark]
    """Classes of the second within each."""
    step: float
    """Side of a cell."""
    block_lines: list[float]
    inner_lines: list[float]
    side: float = SIDE
    margin: float = MARGIN


def confusion_chart(answers: Answers, factors: Factors) -> ConfusionChart:
    """Where `answers` lie in the table of true by answered class."""
    num_classes = int(np.prod(factors.sizes))
    step = SIDE / num_classes
    right = answers.right_parts(factors)
    kinds = [_kind(row.tolist()) for row in right]
    counts = Counter(zip(answers.labels.tolist(), answers.chosen.tolist(), kinds, strict=True))
    first, second = factors.sizes[:2]
    return ConfusionChart(
        num_clips=len(answers.keys),
        cells=[
            Cell(
                x=step * (chosen + 0.5),
                y=step * (label + 0.5),
                kind=kind,
                count=count,
                label=_pair(factors, label, chosen, count=count),
            )
            for (label, chosen, kind), count in sorted(counts.items())
        ],
        kinds=[Kind(key=key, says=says, count=kinds.count(key)) for key, says in _KINDS.items()],
        blocks=[
            Mark(at=SIDE * (index + 0.5) / first, label=shown(name)) for index, name in enumerate(factors.classes[0])
        ],
        inner=[
            Mark(at=SIDE * (block * second + index + 0.5) / (first * second), label=_ARROWS.get(name, shown(name)))
            for block in range(first)
            for index, name in enumerate(factors.classes[1])
        ],
        step=step,
        block_lines=[SIDE * index / first for index in range(first + 1)],
        inner_lines=[SIDE * index / (first * second) for index in range(first * second) if index % second],
    )


def _kind(right: list[bool]) -> str:
    wrong = [key for key, is_right in zip(("space", "time", "audio"), right, strict=True) if not is_right]
    return "right" if not wrong else wrong[0] if len(wrong) == 1 else "several"


def _pair(factors: Factors, label: int, chosen: int, *, count: int) -> str:
    true, said = ", ".join(factors.labels(label)), ", ".join(factors.labels(chosen))
    clips = "1 clip" if count == 1 else f"{count} clips"
    return f"{clips} of {true}: right" if label == chosen else f"{clips} of {true}: answered {said}"
