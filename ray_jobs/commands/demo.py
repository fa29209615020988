"""``ca2st demo``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ray_jobs.demo.answers import DemoReport


def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything the demo makes; rerun to go on.")] = Path("demo"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the facts as one JSON object.")] = False,
) -> None:
    """Make a small audio-visual world, shard it, train small models on frozen experts, compare them, write a page.

    Example: ca2st demo --out demo
    """
    from ray_jobs.console import print_json
    from ray_jobs.demo.demo import run_demo

    report = run_demo(out)
    if as_json:
        print_json(report)
    else:
        _print_report(report)


def _print_report(report: "DemoReport") -> None:
    from ray_jobs.console import result
    from ray_jobs.demo.answers import next_steps

    result(f"\n{'model':<10} {'trainable':>10} {'top-1':>7} {'ceiling':>8} {'clips/s':>8}  MLflow run")
    for run in report.runs:
        result(
            f"{run.model:<10} {run.trainable:>10,} {run.top1:>7.1%} {run.ceiling:>8.1%} "
            f"{run.clips_per_second:>8.0f}  {run.run_id or 'not tracked'}"
        )
    chance = report.runs[-1].chance
    result(f"The ceiling is the best that anybody could reach with what a model is given; chance is {chance:.1%}.")
    result("Experts alone: " + ", ".join(f"{one.expert} {one.top1:.1%} on {one.factor}" for one in report.experts))
    result(f"\n{report.prediction.video}")
    for prediction in report.prediction.predictions:
        result(f"  {prediction.probability:6.1%}  {prediction.label}")
    result(f"\nDone in {report.seconds:.0f} s. Look at {report.page} in a browser. What to try next:")
    for step in next_steps(report):
        result(f"  {step.command}\n      {step.says}")
