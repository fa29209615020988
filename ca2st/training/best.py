"""Which checkpoint of a run is the best, and whether the run has learned enough: read off its validations.

The journal's ``eval`` lines are the truth, so nothing of this has to be saved: a run that was killed knows as much as
one that was not. Every validation follows the checkpoint of its step.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ca2st.training.checkpoint import CHECKPOINTS_NAME, folders_of_steps, list_checkpoints
from ca2st.training.config import TrainingConfig
from ca2st.training.journal import JOURNAL_NAME, read_events

Metrics = Mapping[str, float | None]
"""Metrics of one validation; None for a number that was not finite."""
VALIDATION = "validation"


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """What one validation said."""

    metric: str
    value: float
    step: int
    checkpoint: Path | None
    """Where that model is kept; None where it was cleared away."""


def validations(journal: Path, *, until: int | None = None) -> dict[int, Metrics]:
    """Return the metrics of each validated step up to `until`, in order of steps; of a repeated one the last."""
    found: dict[int, Metrics] = {}
    for line in read_events(journal, event="eval"):
        if line["split"] == VALIDATION and (until is None or line["step"] <= until):
            found[line["step"]] = line["metrics"]
    return dict(sorted(found.items()))


def is_lower_better(metric: str) -> bool:
    """Return whether less of a metric is better: of losses and errors."""
    return metric.endswith(("loss", "error"))


def best_steps(scores: Mapping[int, Metrics], metric: str) -> list[int]:
    """Return the steps that have a value of `metric`, the best first; of equal ones the earlier."""
    sign = 1 if is_lower_better(metric) else -1
    values = {step: value for step, metrics in scores.items() if (value := metrics.get(metric)) is not None}
    return sorted(values, key=lambda step: (sign * values[step], step))


def reason_to_end(config: TrainingConfig, scores: Mapping[int, Metrics], metric: str) -> str | None:
    """Return why a run with these validations ends now, before its last step; None: it goes on."""
    sign = -1 if is_lower_better(metric) else 1
    best, since = -math.inf, 0
    for metrics in scores.values():
        value = metrics.get(metric)
        own = -math.inf if value is None else sign * value
        if config.stop_at is not None and value is not None and own >= sign * config.stop_at:
            return f"{metric} {value:.4f} reached stop_at = {config.stop_at}"
        if own > best + config.least_improvement:
            best, since = own, 0
        else:
            since += 1
        if config.early_stopping is not None and since >= config.early_stopping:
            return f"{since} validations without a better {metric} than {sign * best:.4f}"
    return None


def score_at(run_dir: Path, scores: Mapping[int, Metrics], metric: str, steps: Sequence[int]) -> Score | None:
    """Return the score of the first of `steps` that has a value; None where there is none."""
    folders = list_checkpoints(run_dir / CHECKPOINTS_NAME)
    for step in steps:
        if (value := scores[step].get(metric)) is not None:
            kept = folders_of_steps(folders, [step])
            return Score(metric=metric, value=value, step=step, checkpoint=kept[0] if kept else None)
    return None


def best_and_last(run_dir: Path, metric: str) -> tuple[Score | None, Score | None]:
    """Return the best and the last validation of a run by `metric`; (None, None) before the first."""
    scores = validations(run_dir / JOURNAL_NAME)
    best = score_at(run_dir, scores, metric, best_steps(scores, metric))
    return best, score_at(run_dir, scores, metric, sorted(scores, reverse=True))
