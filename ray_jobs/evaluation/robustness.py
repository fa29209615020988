"""How much a model depends on its sound: tested on the same samples as they are and disturbed, with a plot."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ca2st.checked_json import encoded, finite
from ca2st.durable import write_bytes
from ca2st.errors import UserInputError, check_choice
from ca2st.model.config import EXPERTS
from ca2st.training.metrics import main_metric
from pipelines.views import EvaluationViews
from ray_jobs.console import require_folder_place, say
from ray_jobs.evaluation.perturbations import PERTURBATIONS
from ray_jobs.evaluation.significance import Comparison, compare_predictions
from ray_jobs.evaluation.workers import EvaluationReport, Workers, evaluate_checkpoint, match_labels, scoring_ray
from ray_jobs.pages import charts
from ray_jobs.runs.model import find_checkpoint, run_document_of
from sharding.format.shard_set import read_shard_set

CLEAN = "clean"
REPORT_NAME, PLOT_NAME = "robustness.json", "robustness.svg"


@dataclass(frozen=True, kw_only=True, slots=True)
class Condition:
    """One disturbance and what the model makes of it."""

    name: str
    """A name of `PERTURBATIONS`."""
    says: str
    """What is done."""
    metrics: dict[str, float]
    against_clean: Comparison
    """On the metric that stands for the model: the clean set first."""
    predictions: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RobustnessReport:
    """A model on a set, disturbed in several ways."""

    checkpoint: str
    set_name: str
    num_samples: int
    views: str
    seed: int
    main_metric: str
    clean: dict[str, float]
    """Metrics of the undisturbed set."""
    conditions: list[Condition]
    how_noise_is_added: str
    """What is approximated, as shards keep no waveform."""


_HOW = (
    "in the power of the mel bins, as shards keep spectrograms and no waveform: the mean spectrum of the noise, varied "
    "as Gaussian noise varies; without the cross term of the waveforms"
)


def measure_robustness(
    path: Path,
    data: str,
    views: EvaluationViews,
    *,
    conditions: Sequence[str] = tuple(PERTURBATIONS),
    seed: int = 0,
    out: Path | None = None,
    workers: Workers | None = None,
) -> tuple[RobustnessReport, Path]:
    """Test a checkpoint on a set as it is and under each of `conditions`; returns the report and its folder.

    The folder gets the predictions, ``robustness.json`` and ``robustness.svg``.

    Raises:
        UserInputError: an unknown condition, the model does not hear, the set's samples have no or several labels, or
            none of a target that the main metric needs.
    """
    for name in conditions:
        check_choice("--conditions", name, PERTURBATIONS)
    checkpoint = find_checkpoint(path)
    _require_something_to_measure(checkpoint, data)
    folder = out or checkpoint.parent.parent / f"robustness.{checkpoint.name}"
    require_folder_place(folder, "--out")
    folder.mkdir(parents=True, exist_ok=True)
    reports: dict[str, EvaluationReport] = {}
    with scoring_ray(workers or Workers()):
        for name in (CLEAN, *conditions):
            say(f"robustness: {name}")
            reports[name] = evaluate_checkpoint(
                checkpoint,
                data,
                views,
                predictions=folder / f"{name}.parquet",
                workers=workers,
                perturbation="" if name == CLEAN else name,
                seed=seed,
            )
    clean = reports[CLEAN]
    report = RobustnessReport(
        checkpoint=str(checkpoint),
        set_name=clean.set_name,
        num_samples=clean.num_samples,
        views=f"{views.clips}x{views.crops}",
        seed=seed,
        main_metric=clean.main_metric,
        clean=clean.metrics,
        conditions=[_condition(name, reports[name], clean) for name in conditions],
        how_noise_is_added=_HOW,
    )
    text = json.dumps(finite(asdict(report)), indent=1, ensure_ascii=False)
    write_bytes(folder / REPORT_NAME, encoded(text + "\n"))
    write_bytes(folder / PLOT_NAME, encoded(charts.chart_svg(robustness_chart(report))))
    return report, folder


def _require_something_to_measure(checkpoint: Path, data: str) -> None:
    document = run_document_of(checkpoint)
    recipe = document.recipe
    if "audio" not in EXPERTS[recipe.model.kind]:
        raise UserInputError(
            f"{checkpoint}: expected a model that hears, found {recipe.model.kind}: what is done to the sound changes "
            "nothing in it"
        )
    shard_set = read_shard_set(data, storage=recipe.data.loader.storage)
    labelling = shard_set.manifest.labelling
    if labelling != "one":
        raise UserInputError(
            f"{data}: expected samples with a label each, found {labelling}: nothing can be right or wrong"
        )
    match = match_labels(document.classes, shard_set.manifest, where=shard_set.where)
    needed = main_metric(tuple(document.classes))
    if main_metric(match.targets) != needed:
        lacking = ", ".join(sorted(document.classes.keys() - match.spaces.keys()))
        raise UserInputError(
            f"{data}: expected labels of all targets of the model, found none of {lacking}: {needed}, which stands for "
            "the model, cannot be compared"
        )


def _condition(name: str, report: EvaluationReport, clean: EvaluationReport) -> Condition:
    compared = compare_predictions(clean.predictions, report.predictions)
    (against,) = [one for one in compared if one.metric == clean.main_metric]
    return Condition(
        name=name,
        says=PERTURBATIONS[name].says,
        metrics=report.metrics,
        against_clean=against,
        predictions=str(report.predictions),
    )


def robustness_chart(report: RobustnessReport) -> charts.Chart:
    """Return a drawing: of each condition the accuracy and its interval, and a line at the undisturbed one."""
    clean = report.clean[report.main_metric]
    ends = [  # of few samples the difference may reach beyond what an accuracy can be
        (max(0.0, clean + one.against_clean.low), min(1.0, clean + one.against_clean.high)) for one in report.conditions
    ]
    lowest, highest = min([clean, *(low for low, _ in ends)]), max([clean, *(high for _, high in ends)])
    y_places = charts.places(100 * lowest, 100 * highest)
    count = len(report.conditions)
    width = 160 + 150 * count
    frame = charts.Frame(x_range=(0.0, float(count)), y_range=(y_places[0], y_places[-1]), width=width)
    lines = []
    for number, (one, (low, high)) in enumerate(zip(report.conditions, ends, strict=True)):
        values = [(number + 0.5, 100 * value) for value in (low, one.against_clean.second, high)]
        words = f"{one.says}: {one.against_clean.second:.2%}, {100 * low:.2f} to {100 * high:.2f}"
        points = [charts.Point(x=frame.x(x), y=frame.y(y), label=words) for x, y in values]
        lines.append(charts.Line(css="t0 d0", name=one.name, points=points))
    level = charts.Level(
        css="t1 d0",
        y=frame.y(100 * clean),
        left=frame.left,
        right=frame.right,
        text=f"undisturbed {clean:.1%}",
        title="the same samples undisturbed",
    )
    return charts.Chart(
        title="robustness",
        says=f"{report.main_metric} in %, {report.num_samples} samples; 95 % intervals of the difference",
        x_label="what is done to the sound",
        frame=frame,
        lines=lines,
        x_marks=[charts.Mark(at=frame.x(number + 0.5), label=one.says) for number, one in enumerate(report.conditions)],
        y_marks=[charts.Mark(at=frame.y(place), label=f"{place:g}") for place in y_places],
        levels=[level],
    )
