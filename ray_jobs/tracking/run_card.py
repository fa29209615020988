"""The card of a run: what was trained on what, what it reached, how to use it; one HTML file that asks no network."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ca2st import __version__
from ca2st.training.documents import flatten
from ray_jobs.pages.templates import page_environment
from ray_jobs.redaction import redacted
from ray_jobs.tracking.run_facts import RunFacts, registered_name

if TYPE_CHECKING:
    from jinja2 import Environment

    from ray_jobs.compare.charts import Chart

_MOST_CLASSES = 60
_SHOWN_SETTINGS = (
    "model.kind",
    "model.fusion",
    "model.dim",
    "model.depth",
    "clip.num_frames",
    "clip.crop_size",
    "trainable",
    "start.checkpoint",
    "training.epochs",
    "training.global_batch_size",
    "training.precision",
    "training.seed",
    "optim.base_lr",
    "optim.weight_decay",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class LargeFile:
    """A file of the run that is too large for MLflow and stays where it is."""

    path: str
    megabytes: float


def charts_of(run: RunFacts) -> "list[Chart]":
    """A drawing for each curve with two steps or more."""
    from ray_jobs.compare.charts import metric_charts  # it reads runs back from MLflow by ray_jobs.tracking

    return metric_charts([run.curves])


def chart_svg(chart: "Chart") -> str:
    """One drawing as a file of its own."""
    return _environment().get_template("chart.svg").render(chart=chart, alone=True)


def render_run_card(run: RunFacts, *, charts: "Sequence[Chart]", large: Sequence[LargeFile]) -> str:
    """The whole page."""
    settings = flatten(run.recipe)
    page = _environment().get_template("run_card.html")
    return page.render(
        version=__version__,
        run=run,
        charts=charts,
        alone=False,
        large=large,
        settings={name: _shown(settings[name]) for name in _SHOWN_SETTINGS if settings.get(name) is not None},
        classes={name: (len(names), names[:_MOST_CLASSES]) for name, names in run.classes.items()},
        model=registered_name(run.recipe),
        environment=_surroundings(run),
    )


def _environment() -> "Environment":
    environment = page_environment("ray_jobs.tracking")
    environment.filters["number"] = lambda value: f"{value:.4g}"
    environment.filters["duration"] = duration_in_words
    return environment


def duration_in_words(seconds: float) -> str:
    """``2 h 5 min``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.3g} s"


def _shown(value: object) -> str:
    return redacted(str(value))


def _surroundings(run: RunFacts) -> Mapping[str, str]:
    """Where it was trained: topology, hardware, commit and versions."""
    found = {name: str(value) for name, value in run.start.get("topology", {}).items()}
    found |= {name: value for name, value in run.tags.items() if name.startswith(("hardware.", "git."))}
    return found | {name: str(value) for name, value in run.start.get("versions", {}).items()}
