"""``ca2st compare``: the runs of a tracking store side by side, as facts and as one HTML file.

`read_runs` asks the store; what follows are pure functions of the runs.
"""

import datetime
import statistics
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ca2st import __version__
from ca2st.errors import UserInputError, check_choice, did_you_mean
from ca2st.training.metrics import harmonic_mean
from ray_jobs.pages.charts import Curve, metric_charts, page_environment, tone
from ray_jobs.redaction import without_credentials
from ray_jobs.tracking.client import connected, sqlite_path
from ray_jobs.tracking.run_record import SYSTEM_PREFIX, WORLD_SIZE

_CLIPS_PER_SECOND = "train/clips_per_second"
_LOSS = "train/loss"
_ACCURACIES = ("test/top1", "validation/top1", "test/action_top1", "validation/action_top1")
_PAGE_RUNS = 200
_MOST_LABEL_CHARACTERS = 40


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFilter:
    """Which runs are compared: those that meet all that is asked."""

    experiment: str | None = None
    """Name of the MLflow experiment; None: all of the store."""
    recipes: tuple[str, ...] = ()
    """Names of recipes."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """MLflow tags and their values."""
    runs: tuple[str, ...] = ()
    """Names of runs, or beginnings of their ids, in the order in which they are shown."""
    newest: int = 20
    """At most so many, the newest."""

    def __post_init__(self) -> None:
        if self.newest < 1:
            raise UserInputError(f"--newest: expected at least 1, found {self.newest}")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackedRun:
    """One run as MLflow knows it."""

    run_id: str
    name: str
    experiment: str
    status: str
    """``FINISHED``, ``RUNNING``, ``KILLED``, ``FAILED``."""
    started: str
    """UTC, ISO 8601."""
    settings: Mapping[str, str]
    tags: Mapping[str, str]
    metrics: Mapping[str, float]
    """Newest values by name; `train/clips_per_second` is the median over the steps."""
    curves: Mapping[str, Curve]
    """Loss of training and every accuracy of validation and test, by step."""
    device_hours: float | None
    """Hours that devices spent in training steps: all attempts together, each step once; None before the first."""
    device: str
    """``GPU`` or ``CPU``: what an hour is an hour of (a worker on a CPU)."""

    @property
    def accuracy_name(self) -> str | None:
        """The metric that stands for the run: test before validation, top-1; tests on other datasets do not count."""
        own, ends = f"test/{_dataset(self)}-", ("/top1", "/action_top1")
        names = sorted(self.metrics)
        tests = [name for name in names if name.startswith(own) and name.endswith(ends)]
        known = [_ACCURACIES[0], *tests, *_ACCURACIES[1:], *(name for name in names if name.endswith("_top1"))]
        return next((name for name in known if name in self.metrics), None)


def read_runs(uri: str, wanted: RunFilter) -> list[TrackedRun]:
    """Return the runs that `wanted` names, oldest first or in the order of its names.

    Raises:
        UserInputError: nothing matches, or there is no such SQLite file, which is not made; says what there is.
        TrackingUnavailableError: the store cannot be reached.
    """
    if (path := sqlite_path(uri)) is not None and not path.is_file():
        raise UserInputError(f"{uri}: expected an MLflow store, found no such file; train first, or check the address")
    with connected(uri, "compare again") as client:
        experiments = {one.experiment_id: one.name for one in client.search_experiments()}
        if wanted.experiment is not None:
            check_choice("experiment", wanted.experiment, sorted(experiments.values()))
            experiments = {key: name for key, name in experiments.items() if name == wanted.experiment}
        found = [
            run
            for run in _search(client, list(experiments))
            if (not wanted.recipes or run.data.tags.get("ca2st.name", run.info.run_name) in wanted.recipes)
            and wanted.tags.items() <= run.data.tags.items()
        ]
        found = _named(found, wanted.runs) if wanted.runs else found[: wanted.newest][::-1]
        if not found:
            asked = [f"in experiment {wanted.experiment!r}"] if wanted.experiment else []
            asked += [f"of recipe {' or '.join(wanted.recipes)}"] if wanted.recipes else []
            asked += [f"with tag {name}={value}" for name, value in wanted.tags.items()]
            told = "is there yet; train first"
            if asked:
                told = f"{' '.join(asked)}; `ca2st compare` without filters shows all"
            raise UserInputError(f"no run of {without_credentials(uri)} {told}")
        return [_tracked(client, run, experiments[run.info.experiment_id]) for run in found]


_TAGS_THAT_DIFFER = ("git.commit", "hardware.gpus", "hardware.cpu_count", "version.torch", "version.ca2st")


@dataclass(frozen=True, kw_only=True, slots=True)
class ComparedRun:
    """One column of the comparison."""

    run_id: str
    name: str
    label: str
    """The name, with what tells it from other runs of that name."""
    experiment: str
    status: str
    started: str
    metrics: Mapping[str, float]
    deltas: Mapping[str, float]
    """Each metric minus the baseline's, where both have it."""
    accuracy: float | None
    """The newest value of the metric that stands for the run, 0 to 1."""
    accuracy_name: str | None
    last_step: int | None
    """The step of `accuracy`."""
    best: float | None
    """The largest value that metric ever had."""
    best_step: int | None
    """The step of `best`; of equal ones the earlier."""
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
    """What differs, setting by setting, one value per run."""
    num_equal_settings: int
    across_datasets: list[AcrossDatasets]


def compare(runs: Sequence[TrackedRun], *, baseline: str | None = None) -> Comparison:
    """Put `runs` side by side; `baseline` is a run's name or the beginning of its id, else the first.

    Raises:
        UserInputError: no run is called so, or several are.
    """
    first = _baseline(runs, baseline)
    differing, num_equal = differing_settings(runs)
    return Comparison(
        runs=[_compared(run, first.metrics, label) for run, label in zip(runs, labels(runs), strict=True)],
        baseline=first.run_id,
        settings=differing,
        num_equal_settings=num_equal,
        across_datasets=across_datasets(runs),
    )


def differing_settings(runs: Sequence[TrackedRun]) -> tuple[dict[str, list[str | None]], int]:
    """Return the settings and telling tags that are not the same in all runs, and how many settings are."""
    names = sorted({name for run in runs for name in run.settings} - {"name"})
    columns: dict[str, list[str | None]] = {name: [run.settings.get(name) for run in runs] for name in names}
    differing = {name: values for name, values in columns.items() if len(set(values)) > 1}
    num_equal = len(columns) - len(differing)
    for name in _TAGS_THAT_DIFFER:
        values = [run.tags.get(name) for run in runs]
        if len(set(values)) > 1:
            differing[name] = values
    return differing, num_equal


def labels(runs: Sequence[TrackedRun]) -> list[str]:
    """Return a name for each run that no other one has: its own, else with what differs, else with its id.

    What differs is the experiment, or the one setting that alone tells runs of one name apart.
    """
    found = []
    for run in runs:
        alike = [other for other in runs if other.name == run.name]
        words = next(_telling(run, alike), run.run_id[:8])
        found.append(run.name if len(alike) == 1 else f"{run.name} ({words})")
    return found


def _telling(run: TrackedRun, alike: Sequence[TrackedRun]) -> Iterator[str]:
    if len({other.experiment for other in alike}) == len(alike):
        yield run.experiment
    settings, _ = differing_settings(alike)
    for name, values in settings.items():
        value = values[alike.index(run)]
        if len(set(values)) == len(alike) and value is not None and len(value) <= _MOST_LABEL_CHARACTERS:
            yield f"{name.rpartition('.')[2]} {value}"


def across_datasets(runs: Sequence[TrackedRun]) -> list[AcrossDatasets]:
    """Return harmonic means of models that were trained on more than one dataset; a model is its `[model]` settings."""
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


def render_comparison_page(comparison: Comparison, *, source: str) -> str:
    """Return the whole page; it asks nothing of any network."""
    environment = page_environment()
    environment.filters["tone"] = tone
    environment.filters["percent"] = lambda share: f"{100 * share:.1f} %"
    environment.filters["points"] = lambda share: f"{100 * share:+.1f}"
    return environment.get_template("compare.html").render(
        version=__version__,
        comparison=comparison,
        charts=metric_charts([run.curves for run in comparison.runs], names=[run.label for run in comparison.runs]),
        names=metric_names(comparison),
        source=source,
    )


def metric_names(comparison: Comparison) -> list[str]:
    """Return the metrics of any run: accuracies first, then the rest by name."""

    def is_accuracy(name: str) -> bool:
        last = name.rpartition("/")[2]
        return last.endswith(("top1", "top5", "mean_class")) or last == "ceiling"

    names = {name for run in comparison.runs for name in run.metrics}
    return sorted(names, key=lambda name: (not is_accuracy(name), name))


def _search(client: "MlflowClient", experiment_ids: list[str]) -> list[Any]:
    """Return all of their runs, newest first."""
    found: list[Any] = []
    token = None
    while True:
        page = client.search_runs(
            experiment_ids, max_results=_PAGE_RUNS, order_by=["attributes.start_time DESC"], page_token=token
        )
        found += page
        token = page.token
        if not token:
            return found


def _named(runs: Sequence[Any], names: Sequence[str]) -> list[Any]:
    """Return the runs of these names or id beginnings; of several with one name the newest, which comes first."""
    chosen = []
    for name in names:
        near = [run for run in runs if run.info.run_name == name][:1]
        near = near or [run for run in runs if run.info.run_id.startswith(name)]
        if len(near) > 1:
            told = ", ".join(f"{run.info.run_id} ({run.info.run_name})" for run in near)
            raise UserInputError(f"run {name!r}: expected one run, found {len(near)} ids that begin so: {told}")
        if not near:
            known = sorted({run.info.run_name for run in runs})
            raise UserInputError(
                f"run {name!r}: expected a run's name or the beginning of its id, found none among "
                f"{', '.join(known) or 'no runs'}{did_you_mean(name, known)}"
            )
        chosen.append(near[0])
    return chosen


def _tracked(client: "MlflowClient", run: Any, experiment: str) -> TrackedRun:
    # How busy the nodes were last is nothing that the run reached.
    known = {name: value for name, value in run.data.metrics.items() if not name.startswith(SYSTEM_PREFIX)}
    curves = {
        name: _history(client, run.info.run_id, name)
        for name in sorted(known)
        if name in (_LOSS, _CLIPS_PER_SECOND, WORLD_SIZE) or name.rpartition("/")[2].endswith("top1")
    }
    speeds, worlds = curves.pop(_CLIPS_PER_SECOND, ()), curves.pop(WORLD_SIZE, ())
    if speeds:
        known[_CLIPS_PER_SECOND] = statistics.median(speed for _, speed in speeds)
    return TrackedRun(
        run_id=run.info.run_id,
        name=run.info.run_name,
        experiment=experiment,
        status=run.info.status,
        started=datetime.datetime.fromtimestamp(run.info.start_time / 1000, datetime.UTC).isoformat(timespec="seconds"),
        settings=dict(run.data.params),
        tags=dict(run.data.tags),
        metrics=dict(sorted(known.items())),
        curves=curves,
        device_hours=_device_hours(speeds, worlds, run.data.params),
        device="GPU" if "hardware.gpus" in run.data.tags else "CPU",
    )


def _history(client: "MlflowClient", run_id: str, name: str) -> Curve:
    """Return the values of a metric by step; of two for one step the later."""
    values = sorted(client.get_metric_history(run_id, name), key=lambda value: (value.step, value.timestamp))
    return tuple({value.step: value.value for value in values}.items())


def _device_hours(speeds: Curve, worlds: Curve, settings: Mapping[str, str]) -> float | None:
    """Return the device hours: clips of a step by its clips per second are its seconds; a worker holds one device.

    `worlds`: how many workers there were from behind a step on; empty: always as many as the settings say.
    """
    batch, workers = settings.get("training.global_batch_size"), float(settings.get("launch.workers", "1"))
    if batch is None or not speeds:
        return None
    ends = [end for end, _ in worlds]
    seconds = 0.0
    for step, speed in speeds:
        before = bisect_left(ends, step)
        num_devices = worlds[before - 1][1] if before else workers
        seconds += num_devices * float(batch) / speed if speed > 0 else 0.0
    return seconds / 3600


def _dataset(run: TrackedRun) -> str | None:
    return run.tags.get("data.validation.dataset") or run.tags.get("data.train.dataset")


def _model(run: TrackedRun, runs: Sequence[TrackedRun]) -> str:
    """Return the model's kind, and whatever else of its `[model]` settings is not the same in all runs."""
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
    names = [run.name for run in runs]
    known = [run.name if names.count(run.name) == 1 else f"{run.name} ({run.run_id[:8]})" for run in runs]
    found = [run for run in runs if run.run_id == name or run.name == name]
    found = found or [run for run in runs if run.run_id.startswith(name)]
    if len(found) > 1:
        told = ", ".join(f"{run.run_id[:8]} ({label})" for run, label in zip(found, labels(found), strict=True))
        raise UserInputError(f"--baseline {name!r}: expected one run, found {len(found)}: {told}; give the id of one")
    if found:
        return found[0]
    raise UserInputError(f"--baseline {name!r}: expected one of {', '.join(known)}{did_you_mean(name, names)}")


def _compared(run: TrackedRun, base: Mapping[str, float], label: str) -> ComparedRun:
    name = run.accuracy_name
    accuracy = None if name is None else run.metrics[name]
    curve = run.curves.get(name or "", ())
    best = max(curve, key=lambda point: (point[1], -point[0]), default=None)
    hours = run.device_hours
    return ComparedRun(
        run_id=run.run_id,
        name=run.name,
        label=label,
        experiment=run.experiment,
        status=run.status,
        started=run.started,
        metrics=run.metrics,
        deltas={name: value - base[name] for name, value in run.metrics.items() if name in base},
        accuracy=accuracy,
        accuracy_name=name,
        last_step=curve[-1][0] if curve else None,
        best=None if best is None else best[1],
        best_step=None if best is None else best[0],
        device_hours=hours,
        device=run.device,
        hours_per_point=hours / (100 * accuracy) if hours is not None and accuracy else None,
        curves=run.curves,
    )


if TYPE_CHECKING:
    from mlflow import MlflowClient
