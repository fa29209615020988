"""``ca2st features``."""

from pathlib import Path
from typing import Annotated

import typer


def features(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint folder, or a run folder for its newest one.")],
    data: Annotated[
        str, typer.Option(help="Shards to read, a folder or a URL; their classes need not be the model's.")
    ],
    views: Annotated[str, typer.Option(help="Clips x crops a sample; a feature is the mean over them.")] = "1x1",
    experts: Annotated[
        str | None, typer.Option(help="Experts to write, such as spatial,audio; default: all the model has.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Parquet file; default: in the run folder.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the facts as one JSON object.")] = False,
) -> None:
    """Write the pooled feature of every expert, as it goes into the head, for every sample of a shard set.

    Example: ca2st features runs/smoke --data shards/validation --views 2x3 --experts spatial,audio
    """
    from pipelines.views.draws import EvaluationViews
    from ray_jobs.console import parse_views, print_json, result, table
    from ray_jobs.runs.features import write_features

    clips, crops = parse_views(views)
    report = write_features(
        checkpoint,
        data,
        EvaluationViews(protocol="test", clips=clips, crops=crops),
        experts=None if experts is None else tuple(name.strip() for name in experts.split(",")),
        out=out,
    )
    facts = {"features": str(report.features), "num_samples": report.num_samples, "experts": report.experts}
    if as_json:
        print_json(facts)
    else:
        result(table(facts))
