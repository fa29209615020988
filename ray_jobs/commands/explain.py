"""``ca2st explain``."""

from pathlib import Path
from typing import Annotated

import typer


def explain(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint folder, or a run folder for its newest one.")],
    video: Annotated[Path, typer.Argument(help="A video file of any kind FFmpeg reads.")],
    out: Annotated[Path | None, typer.Option(help="HTML page; default: VIDEO's name with .explain.html, here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the facts as one JSON object.")] = False,
) -> None:
    """Show what each expert listened to in a video: cross-attention by direction and layer, as one HTML page.

    Example: ca2st explain runs/smoke holiday.mp4 --out holiday.html
    """
    from ray_jobs.console import print_json, result, table
    from ray_jobs.explain.page import explain_video

    report = explain_video(checkpoint, video, out=out)
    if as_json:
        print_json({"html": str(report.html), "predictions": report.predictions, "entropy": report.entropy})
        return
    for prediction in report.predictions:
        result(f"  {prediction.probability:6.1%}  {prediction.target}: {prediction.label}")
    result(table({"page": report.html}))
