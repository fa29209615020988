"""``ca2st evaluate``."""

from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint folder, or a run folder for its newest one.")],
    data: Annotated[str, typer.Option(help="Shards to test on: a folder or a URL.")],
    views: Annotated[str, typer.Option(help="Clips x crops a sample: 2x3 as published, 5x3 for Kinetics-400.")] = "2x3",
    predictions: Annotated[
        Path | None, typer.Option(help="Parquet file for the predictions; default: in the run folder.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the facts as one JSON object.")] = False,
) -> None:
    """Score every sample once: softmax a view, mean over the views of a sample, arg-max.

    Example: ca2st evaluate runs/smoke --data shards/validation --views 2x3
    """
    from pipelines.views.draws import EvaluationViews
    from ray_jobs.console import parse_views, print_json, result, table
    from ray_jobs.runs.inference import evaluate_checkpoint

    clips, crops = parse_views(views)
    report = evaluate_checkpoint(
        checkpoint, data, EvaluationViews(protocol="test", clips=clips, crops=crops), predictions=predictions
    )
    facts = {
        **report.metrics,
        "top1": report.metrics[report.main_metric],
        "num_samples": report.num_samples,
        "views": views,
        "predictions": str(report.predictions),
        "checkpoint": str(report.checkpoint),
    }
    if as_json:
        print_json(facts)
    else:
        result(table(facts))
