"""``ca2st predict``."""

from pathlib import Path
from typing import Annotated

import typer


def predict(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint folder, or a run folder for its newest one.")],
    videos: Annotated[
        list[Path],
        typer.Argument(help="Video files of any kind FFmpeg reads, folders of them, or patterns: 'clips/**/*.mp4'."),
    ],
    top: Annotated[int, typer.Option(min=1, help="How many classes a video.")] = 5,
    views: Annotated[str, typer.Option(help="Clips x crops a video.")] = "2x3",
    as_json: Annotated[bool, typer.Option("--json", help="Print the facts as one JSON object.")] = False,
) -> None:
    """Classify video files with a trained model; ends with 3 when some cannot be read, and names them.

    Example: ca2st predict runs/smoke holiday.mp4 --top 3
    """
    from pipelines.views.draws import EvaluationViews
    from ray_jobs.console import counted, parse_views, print_json, result, say
    from ray_jobs.runs.prediction import find_videos, predict_readable

    clips, crops = parse_views(views)
    files, aside = find_videos(videos)
    if aside:
        more = f" and {len(aside) - 5} more" if len(aside) > 5 else ""
        say(f"left aside, no videos by their endings: {', '.join(map(str, aside[:5]))}{more}")
    report = predict_readable(
        checkpoint, files, top=top, views=EvaluationViews(protocol="test", clips=clips, crops=crops)
    )
    if as_json:
        print_json(report)
    for video in () if as_json else report.videos:
        result(video.video)
        for prediction in video.predictions:
            result(f"  {prediction.probability:6.1%}  {prediction.target}: {prediction.label}")
    if report.notes:
        say(f"notes: {counted(report.notes)}")
    for damaged in report.damaged:
        say(f"cannot be read: {damaged.video}: {damaged.reason} ({damaged.what})")
    if report.damaged:
        say(f"{len(report.videos)} of {len(files)} videos predicted, {len(report.damaged)} cannot be read")
        raise typer.Exit(3)
