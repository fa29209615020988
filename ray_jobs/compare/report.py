"""What a comparison says: pure functions of the runs."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ca2st.errors import UserInputError, did_you_mean
from ca2st.training.metrics import harmonic_mean
from ray_jobs.compare.runs import CLIPS_PER_SECOND, Curve, TrackedRun
from ray_jobs.tracking.events import SYSTEM_PREFIX

_NOT_SETTINGS = frozenset({"name"})
_TAGS_THAT_DIFFER = ("git.commit", "hardware.gpus", "hardware.cpu_count", "version.torch", "version.ca2st")
_DATASET = "data.{}.dataset"


@dataclass(frozen=True, kw_only=True, slots=True)
class ComparedRun:
    """One column of the comparison."""

    run_id: str
    name: str
    experiment: str
    status: str
    started: str
    metrics: Mapping[str, float]
    """Newest values; `train/clips_per_second` is the median over the steps."""
    deltas: Mapping[str, float]
    """Each metric minus the baseline's, where both have it."""
    accuracy: float | None
    """The metric that stands for the run, 0 to 1."""
    accuracy_name: str | None
    device_hours: float | None
    device: str
    hours_per_point: float | None
    """Device hours for each percentage point of accuracy."""
    curves: Mapping[str, Curve]


@dataclass(frozen=True, kw_only=True, slots=True)
class AcrossDatasets:
    """One model on several datasets."""

    model: str
    accuracies: Mapping[str, float]
    """By dataset: the mean over its runs."""
    harmonic_mean: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Runs side by side."""

    runs: list[ComparedRun]
    baseline: str
    """Id of the run that deltas refer to."""
    settings: Mapping[str, list[str | None]]
    """What differs, setting by setting, a value a run."""
    num_equal_settings: int
    across_datasets: list[AcrossDatasets]


def compare(runs: Sequence[TrackedRun], *, baseline: str | None = None) -> Comparison:
    """Put `runs` side by side; `baseline` is a run's name or the beginning of its id, else the first.

    Raises:
        UserInputError: no run is called so.
    """
    first = _baseline(runs, baseline)
    base = _metrics(first)
    differing, num_equal = differing_settings(runs)
    return Comparison(
        runs=[_compared(run, base) for run in runs],
        baseline=first.run_id,
        settings=differing,
        num_equal_settings=num_equal,
        across_datasets=across_datasets(runs),
    )


def differing_settings(runs: Sequence[TrackedRun]) -> tuple[dict[str, list[str | None]], int]:
    """Settings and telling tags that are not the same in all runs, and how many settings are."""
    names = sorted({name for run in runs for name in run.settings} - _NOT_SETTINGS)
    columns: dict[str, list[str | None]] = {name: [run.settings.get(name) for run in runs] for name in names}
    differing = {name: values for name, values in columns.items() if len(set(values)) > 1}
    num_equal = len(columns) - len(differing)
    for name in _TAGS_THAT_DIFFER:
        values = [run.tags.get(name) for run in runs]
        if len(set(values)) > 1:
            differing[name] = values
    return differing, num_equal


def across_datasets(runs: Sequence[TrackedRun]) -> list[AcrossDatasets]:
    """Harmonic means of models that were trained on more than one dataset; a model is its `[model]` settings."""
    groups: dict[str, dict[str, list[float]]] = {}
    for run in runs:
        name, dataset = run.accuracy_name, _dataset(run)
        if name is not None and dataset is not None:
            groups.setdefault(_model(run, runs), {}).setdefault(dataset, []).append(run.metrics[name])
    means = {
        model: {name: statistics.mean(values) for name, values in sorted(sets.items())}
        for model, sets in groups.items()
    }
    return [
        AcrossDatasets(model=model, accuracies=sets, harmonic_mean=harmonic_mean(list(sets.values())))
        for model, sets in means.items()
        if len(sets) > 1
    ]


def _dataset(run: TrackedRun) -> str | None:
    return run.tags.get(_DATASET.format("validation")) or run.tags.get(_DATASET.format("train"))


def _model(run: TrackedRun, runs: Sequence[TrackedRun]) -> str:
    """Its kind, and whatever else of its `[model]` settings is not the same in all runs."""
    own = {name: value for name, value in run.settings.items() if name.startswith("model.") and name != "model.kind"}
    more = [
        f"{name.removeprefix('model.')}={value}"
        for name, value in sorted(own.items())
        if len({other.settings.get(name) for other in runs}) > 1
    ]
    return " ".join([run.settings.get("model.kind", "model"), *more])


def _baseline(runs: Sequence[TrackedRun], name: str | None) -> TrackedRun:
    if name is None:
        return runs[0]
    for run in runs:
        if run.name == name or run.run_id.startswith(name):
            return run
    names = [run.name for run in runs]
    known = [run.name if names.count(run.name) == 1 else f"{run.name} ({run.run_id[:8]})" for run in runs]
    raise UserInputError(f"--baseline {name!r}: expected one of {', '.join(known)}{did_you_mean(name, names)}")


def _metrics(run: TrackedRun) -> dict[str, float]:
    """What the run reached; how busy its nodes were last is none of it."""
    speed = {} if run.median_clips_per_second is None else {CLIPS_PER_SECOND: run.median_clips_per_second}
    own = {name: value for name, value in run.metrics.items() if not name.startswith(SYSTEM_PREFIX)}
    return dict(sorted((own | speed).items()))


def _compared(run: TrackedRun, base: Mapping[str, float]) -> ComparedRun:
    metrics, name = _metrics(run), run.accuracy_name
    accuracy = None if name is None else metrics[name]
    hours = run.device_hours
    return ComparedRun(
        run_id=run.run_id,
        name=run.name,
        experiment=run.experiment,
        status=run.status,
        started=run.started,
        metrics=metrics,
        deltas={name: value - base[name] for name, value in metrics.items() if name in base},
        accuracy=accuracy,
        accuracy_name=name,
        device_hours=hours,
        device=run.device,
        hours_per_point=hours / (100 * accuracy) if hours is not None and accuracy else None,
        curves=run.curves,
    )
