"""``ca2st demo``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ray_jobs.demo import DemoReport


def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything the demo makes; rerun to go on.")] = Path("demo"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the facts as one JSON object.")] = False,
) -> None:
    """Make a small audio-visual world, shard it, train a tiny CA2ST on frozen experts, evaluate, compare.

    Example: ca2st demo --out demo
    """
    from ray_jobs.console import print_json
    from ray_jobs.demo import run_demo

    report = run_demo(out)
    if as_json:
        print_json(report)
    else:
        _print_report(report, out)


def _print_report(report: "DemoReport", out: Path) -> None:
    from ray_jobs.console import result

    result(f"\n{'model':<10} {'names the':<10} {'top-1':>6} {'chance':>7}  MLflow run")
    for run in report.runs:
        result(f"{run.model:<10} {run.target:<10} {run.top1:>6.1%} {run.chance:>7.1%}  {run.run_id}")
    ca2st = report.runs[-1]
    result(
        f"""
Done in {report.seconds:.0f} s. Everything is under {out}/. What to do next:
  mlflow ui --backend-store-uri {report.tracking_uri}
      compare the runs in a browser
  ca2st predict {ca2st.checkpoint} {report.sample_video}
      ask the model about one of the world's clips, or about a video of your own
  ca2st shard build --dataset folder --media YOUR_VIDEOS --audio optional --out shards/mine
      convert videos of your own: a folder a class"""
    )
