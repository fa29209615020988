"""``ca2st compare``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ray_jobs.compare.report import Comparison


_MOST_SHOWN_SETTINGS = 40
_MOST_SHOWN_CHARACTERS = 32


def compare(
    runs: Annotated[list[str] | None, typer.Argument(help="Names of runs or beginnings of ids; default: all.")] = None,
    experiment: Annotated[str | None, typer.Option(help="MLflow experiment; default: all.")] = None,
    recipe: Annotated[list[str] | None, typer.Option(help="Only runs of this recipe; may be repeated.")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="Only runs with this tag, name=value; may be repeated.")] = None,
    baseline: Annotated[str | None, typer.Option(help="Run that differences refer to; default: the first.")] = None,
    newest: Annotated[int, typer.Option(help="At most so many runs, the newest.")] = 20,
    tracking_uri: Annotated[str | None, typer.Option(help="MLflow store; default: as a training takes it.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the comparison as one HTML file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the facts as one JSON object.")] = False,
) -> None:
    """MLflow runs side by side: settings that differ, accuracies and differences, curves, device hours.

    Example: ca2st compare --experiment ca2st --html compare.html
    """
    from ca2st.errors import UserInputError
    from ray_jobs.compare.report import RunFilter, read_runs
    from ray_jobs.compare.report import compare as put_side_by_side
    from ray_jobs.console import print_json, require_writable_place, result, say
    from ray_jobs.environment import default_tracking_uri

    if html is not None:
        require_writable_place(html, "--html")
    if wrong := [one for one in tag or () if "=" not in one]:
        raise UserInputError(f"--tag: expected name=value, found {wrong[0]!r}")
    tags = dict(one.split("=", 1) for one in tag or ())
    uri = tracking_uri or default_tracking_uri(Path("runs"))
    wanted = RunFilter(
        experiment=experiment, recipes=tuple(recipe or ()), tags=tags, runs=tuple(runs or ()), newest=newest
    )
    comparison = put_side_by_side(read_runs(uri, wanted), baseline=baseline)
    if html is not None:
        from ray_jobs.compare.page import write_comparison_page
        from ray_jobs.redaction import without_credentials

        write_comparison_page(comparison, html, source=without_credentials(uri))
        say(f"wrote {html}")
    if as_json:
        print_json(comparison)
        return
    for line in _lines(comparison):
        result(line)


def _lines(comparison: "Comparison") -> list[str]:
    width = max(len(run.name) for run in comparison.runs)
    lines = [f"{'run':<{width}}  {'id':<8}  {'status':<8}  {'top-1':>7}  {'delta':>6}  {'hours':>9}  {'clips/s':>8}"]
    for run in comparison.runs:
        accuracy = "-" if run.accuracy is None else f"{run.accuracy:.1%}"
        delta = run.deltas.get(run.accuracy_name or "")
        shown = "base" if run.run_id == comparison.baseline else "-" if delta is None else f"{100 * delta:+.1f}"
        hours = "-" if run.device_hours is None else f"{run.device_hours:.3g} {run.device}"
        speed = run.metrics.get("train/clips_per_second")
        lines.append(
            f"{run.name:<{width}}  {run.run_id[:8]}  {run.status.lower():<8}  {accuracy:>7}  {shown:>6}  {hours:>9}  "
            f"{'-' if speed is None else format(speed, '.0f'):>8}"
        )
    for one in comparison.across_datasets:
        sets = ", ".join(f"{name} {accuracy:.1%}" for name, accuracy in one.accuracies.items())
        lines.append(f"{one.model} over {sets}: harmonic mean {one.harmonic_mean:.1%}")
    lines.append(f"\n{len(comparison.settings)} settings differ, {comparison.num_equal_settings} are the same")
    for name, values in list(comparison.settings.items())[:_MOST_SHOWN_SETTINGS]:
        lines.append(f"  {name}: {' | '.join(map(_short, values))}")
    if len(comparison.settings) > _MOST_SHOWN_SETTINGS:
        lines.append(f"  and {len(comparison.settings) - _MOST_SHOWN_SETTINGS} more: see --html or --json")
    return lines


def _short(value: str | None) -> str:
    """The end of a long value: of a path it tells the most."""
    if value is None:
        return "-"
    return value if len(value) <= _MOST_SHOWN_CHARACTERS else f"...{value[3 - _MOST_SHOWN_CHARACTERS :]}"
