"""``ca2st predict``."""

from pathlib import Path
from typing import Annotated

import typer


def predict(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint folder, or a run folder for its newest one.")],
    videos: Annotated[list[Path], typer.Argument(help="Video files of any kind FFmpeg reads.")],
    top: Annotated[int, typer.Option(min=1, help="How many classes a video.")] = 5,
    views: Annotated[str, typer.Option(help="Clips x crops a video.")] = "2x3",
    as_json: Annotated[bool, typer.Option("--json", help="Print the facts as one JSON object.")] = False,
) -> None:
    """Classify video files with a trained model.

    Example: ca2st predict runs/smoke holiday.mp4 --top 3
    """
    from pipelines.draws import EvaluationViews
    from ray_jobs.console import print_json, result
    from ray_jobs.inference.prediction import predict_videos
    from ray_jobs.sizes import parse_views

    clips, crops = parse_views(views)
    found = predict_videos(
        checkpoint, videos, top=top, views=EvaluationViews(protocol="test", clips=clips, crops=crops)
    )
    if as_json:
        print_json({"videos": found})
        return
    for video in found:
        result(video.video)
        for prediction in video.predictions:
            result(f"  {prediction.probability:6.1%}  {prediction.target}: {prediction.label}")
