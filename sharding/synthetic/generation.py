"""Make the clips of the synthetic world as media files, in worker processes, continuing after a kill.

Frames and sound become an ordinary mp4: H.264 where this PyAV has it (MPEG-4 part 2 where not) with AAC.

::

    <media>/<split>/world.json            settings and tool versions, written first
    <media>/<split>/<split>-000000.mp4    clip 0, ...
    <media>/<split>/annotations.csv       file name and class names of every clip, written last
"""

import concurrent.futures
import csv
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from jaxtyping import Float, UInt8

from ca2st.checked_json import DocumentError, canonical_json, read_json
from ca2st.durable import sweep_temporaries, write_bytes
from ca2st.errors import EnvironmentFault, UserInputError
from ca2st.processes import SPAWN, die_with_parent
from sharding.folder import folder_lock
from sharding.synthetic.config import SyntheticConfig
from sharding.synthetic.factors import label_spaces, labels_of

_ENCODERS: dict[str, dict[str, str]] = {
    "libx264": {"preset": "veryfast", "crf": "20", "mbtree": "0", "threads": "1", "flags": "+bitexact"},
    "mpeg4": {"qscale": "2", "threads": "1", "flags": "+bitexact"},
}
"""Encoder options. ``mbtree`` off: on frames of a few macroblocks x264's look-ahead gives other bytes every time."""


def video_encoder() -> str:
    """Return name of the video encoder this machine's PyAV offers, the best first."""
    return next(name for name in _ENCODERS if name in av.codecs_available)


def tool_versions() -> dict[str, str]:
    """Return what decides the bytes beside the settings."""
    libraries = {name: ".".join(map(str, version)) for name, version in av.library_versions.items()}
    return {"encoder": video_encoder(), "av": av.__version__, "numpy": np.__version__, **libraries}


def encode_clip(
    frames: UInt8[np.ndarray, "frames height width 3"],
    sound: Float[np.ndarray, "num_samples"],
    *,
    frames_per_second: int,
    sample_rate_hz: int,
) -> bytes:
    """Return the bytes of an mp4 with one video and one mono audio stream; the same input gives the same bytes."""
    sink, name = io.BytesIO(), video_encoder()
    with av.open(sink, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        video = container.add_stream(name, rate=frames_per_second, options=_ENCODERS[name])
        assert isinstance(video, av.VideoStream)
        video.height, video.width = frames.shape[1:3]
        video.pix_fmt = "yuv420p"
        video.codec_context.thread_count = 1
        audio = container.add_stream("aac", rate=sample_rate_hz, layout="mono", options={"flags": "+bitexact"})
        audio.codec_context.thread_count = 1
        for frame in frames:
            container.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(video.encode())
        samples = av.AudioFrame.from_ndarray(sound[None], format="fltp", layout="mono")
        samples.sample_rate, samples.pts, samples.time_base = sample_rate_hz, 0, Fraction(1, sample_rate_hz)
        container.mux(audio.encode(samples))
        container.mux(audio.encode())
    return sink.getvalue()


WORLD_NAME = "world.json"
ANNOTATIONS_NAME = "annotations.csv"
_CLIPS_PER_TASK = 16

Progress = Callable[[int, int], None]
"""Called with (clips done, clips in all)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipFile:
    """Where one clip of the synthetic world lies and what it shows."""

    name: str
    labels: tuple[int, ...]


def clip_file(config: SyntheticConfig, split: str, index: int) -> ClipFile:
    """Return name and labels of sample `index`; pure."""
    return ClipFile(name=f"{split}-{index:06d}.mp4", labels=labels_of(config, split, index))


def make_clip(config: SyntheticConfig, split: str, index: int) -> bytes:
    """Return the mp4 of sample `index`: a pure function of its arguments under the same tool versions."""
    from sharding.synthetic.clips import draw_frames, sound_samples

    frames = draw_frames(config, split, index)
    sound = sound_samples(config, split, index, num_frames=len(frames))
    return encode_clip(frames, sound, frames_per_second=config.frames_per_second, sample_rate_hz=config.sample_rate_hz)


def generate_split(
    media: Path, split: str, config: SyntheticConfig, *, limit: int | None = None, progress: Progress | None = None
) -> Path:
    """Make the clips of a split (or the first `limit`) that are not there yet; returns the split's folder.

    Raises:
        UserInputError: the folder holds clips of other settings or tool versions, or another process works there.
        EnvironmentFault: a file cannot be written, or a worker process died.
    """
    folder = media / split
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserInputError(f"--media {media}: expected a folder to make videos in, found a file in its way") from None
    except OSError as error:
        raise EnvironmentFault(f"cannot make {folder}: {error.strerror}; choose another --media") from error
    num_clips = len(range(config.num_samples)[:limit])
    with folder_lock(folder):
        sweep_temporaries(folder)
        _claim(folder, split, config)
        _make_files(folder, split, config, num_clips, progress=progress)
        write_bytes(folder / ANNOTATIONS_NAME, _annotations(config, split, num_clips))
    return folder


def _claim(folder: Path, split: str, config: SyntheticConfig) -> None:
    """Write down what this folder is made of, or check that it is still the same."""
    mine: dict[str, Any] = {"split": split, **config.content(), "tool_versions": tool_versions()}
    path = folder / WORLD_NAME
    if not path.exists():
        write_bytes(path, canonical_json(mine))
        return
    try:
        theirs = read_json(path, dict[str, Any])
    except DocumentError as error:
        raise UserInputError(
            f"{path}: not the settings of a synthetic set ({error}); remove {folder} and run again"
        ) from error
    differing = [name for name in sorted(mine.keys() | theirs.keys()) if mine.get(name) != theirs.get(name)]
    if differing:
        found = "; ".join(f"{name}: {theirs.get(name)} there, {mine.get(name)} now" for name in differing)
        raise UserInputError(
            f"{folder}: holds a synthetic set of other settings ({found}); choose another --media or remove it"
        )


def _make_files(
    folder: Path, split: str, config: SyntheticConfig, num_clips: int, *, progress: Progress | None
) -> None:
    missing = [n for n in range(num_clips) if not (folder / clip_file(config, split, n).name).is_file()]
    tasks = [missing[first : first + _CLIPS_PER_TASK] for first in range(0, len(missing), _CLIPS_PER_TASK)]
    done = num_clips - len(missing)
    report = progress or (lambda _done, _total: None)
    report(done, num_clips)
    for count in _run_tasks(folder, split, config, tasks):
        done += count
        report(done, num_clips)


def _run_tasks(folder: Path, split: str, config: SyntheticConfig, tasks: list[list[int]]) -> Iterator[int]:
    """Run the tasks here when there are few, else in spawned workers; yields the clips each task made."""
    workers = min(config.workers, len(tasks))
    if workers < 2:
        for task in tasks:
            yield _make_task(folder, split, config, task)
        return
    # Spawned, never forked: a fork after PyAV has started its threads hangs.
    pool = concurrent.futures.ProcessPoolExecutor(workers, mp_context=SPAWN, initializer=die_with_parent)
    try:
        futures = [pool.submit(_make_task, folder, split, config, task) for task in tasks]
        for future in concurrent.futures.as_completed(futures):
            yield future.result()
    except concurrent.futures.BrokenExecutor as error:
        raise EnvironmentFault(
            f"a worker that was making clips in {folder} died (killed, or out of memory?); "
            "run again with fewer --workers: finished clips are kept"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _make_task(folder: Path, split: str, config: SyntheticConfig, indices: list[int]) -> int:
    for index in indices:
        write_bytes(folder / clip_file(config, split, index).name, make_clip(config, split, index))
    return len(indices)


def _annotations(config: SyntheticConfig, split: str, num_clips: int) -> bytes:
    spaces = label_spaces(config)
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["path", *(space.name for space in spaces)])
    for index in range(num_clips):
        clip = clip_file(config, split, index)
        names = (space.classes[label] for space, label in zip(spaces, clip.labels, strict=True))
        rows.writerow([clip.name, *names])
    return text.getvalue().encode()
