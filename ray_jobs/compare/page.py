"""The comparison as one HTML file that asks nothing of any network."""

from pathlib import Path

from ca2st import __version__
from ca2st.durable import write_bytes
from ray_jobs.compare.report import Comparison
from ray_jobs.pages.charts import metric_charts, page_environment

NUM_TONES = 8
"""Runs beyond so many share colours; their dashes differ."""


def write_comparison_page(comparison: Comparison, file: Path, *, source: str) -> None:
    """Write the page to `file`; `source` says where the numbers are from."""
    write_bytes(file, render_comparison_page(comparison, source=source).encode())


def render_comparison_page(comparison: Comparison, *, source: str) -> str:
    """The whole page."""
    environment = page_environment("ray_jobs.compare")
    environment.filters["percent"] = lambda share: f"{100 * share:.1f} %"
    environment.filters["points"] = lambda share: f"{100 * share:+.1f}"
    environment.filters["number"] = lambda value: f"{value:.4g}"
    return environment.get_template("page.html").render(
        version=__version__,
        comparison=comparison,
        charts=metric_charts([run.curves for run in comparison.runs]),
        names=metric_names(comparison),
        source=source,
        num_tones=NUM_TONES,
    )


def metric_names(comparison: Comparison) -> list[str]:
    """Metrics of any run: accuracies first, then the rest by name."""
    names = {name for run in comparison.runs for name in run.metrics}
    return sorted(names, key=lambda name: (not is_share(name), name))


def is_share(name: str) -> bool:
    """Whether a metric is an accuracy, told in percent."""
    last = name.rpartition("/")[2]
    return last.endswith(("top1", "top5", "mean_class")) or last == "ceiling"
