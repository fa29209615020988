"""Small annotation files and media folders, made by hand in the published forms."""

from collections.abc import Sequence
from pathlib import Path

EPIC_SOUNDS_HEADER = (
    "annotation_id,participant_id,video_id,start_timestamp,stop_timestamp,"
    "start_sample,stop_sample,description,class,class_id"
)


def epic_sounds_row(
    name: str = "P01_02_0",
    *,
    video: str = "P01_02",
    start: str = "00:00:01.500",
    stop: str = "00:00:02.250",
    class_name: str = "rustle",
    class_id: str = "4",
) -> str:
    """One row in EPIC-SOUNDS' form; the participant is the first part of the video's name."""
    return f"{name},{video.split('_')[0]},{video},{start},{stop},36000,54000,paper / bag,{class_name},{class_id}"


def write_lines(path: Path, lines: Sequence[str], *, line_end: str = "\n", encoding: str = "utf-8") -> Path:
    """Write lines as a text file; returns its path."""
    path.write_bytes((line_end.join(lines) + line_end).encode(encoding))
    return path


def touch(folder: Path, *names: str) -> Path:
    """Empty files below `folder`, for readers that only look at names; returns the folder."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return folder
