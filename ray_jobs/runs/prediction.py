"""Classify anybody's video files: they become a small shard set in a temporary folder, read like any other."""

import glob
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from ca2st.errors import UserInputError
from ca2st.processes import num_cores
from pipelines.views import EvaluationViews
from ray_jobs.console import convert_shown
from ray_jobs.runs.inference import TrainedModel, load_trained, score
from sharding.conversion import convert
from sharding.datasets.request import VIDEO_SUFFIXES
from sharding.errors import AllRejectedError, RejectBudgetError
from sharding.folder import Reject, read_rejects
from sharding.format.index import sample_key
from sharding.format.shard_set import LabelSpace, ShardSet, read_shard_set
from sharding.media.codecs import DEFAULT_GOP_FRAMES
from sharding.settings import ConversionConfig, RejectBudget
from sharding.source import SourceList, SourceSample


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """One class a video may show."""

    target: str
    """Label space: ``label``, ``verb``, ``noun``, ..."""
    label: str
    probability: float


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoPrediction:
    """The likeliest classes of one video."""

    video: str
    predictions: list[Prediction]
    """By target, the likeliest first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DamagedVideo:
    """A file that could not be read as a video."""

    video: str
    reason: str
    """A `sharding.errors.RejectReason`."""
    what: str


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictionReport:
    """What was said about the videos that can be read, and which cannot."""

    videos: list[VideoPrediction]
    """In the order given."""
    damaged: list[DamagedVideo]
    notes: dict[str, int]
    """What was unusual about the videos and accepted, by kind (see `sharding.source`)."""


def predict_videos(
    checkpoint: Path, videos: Sequence[Path], *, top: int = 5, views: EvaluationViews | None = None
) -> list[VideoPrediction]:
    """Return the `top` classes of every target for each video, in the order given.

    A video is read as in training: whole, with its sound where it has some; `views` None: one centred view.

    Raises:
        UserInputError: a video is not there or given twice, or `checkpoint` is none.
        RejectBudgetError: a video cannot be decoded; the message says which and why.
    """
    report = predict_readable(checkpoint, videos, top=top, views=views or EvaluationViews())
    _refuse_damaged(report.damaged)
    return report.videos


def predict_readable(checkpoint: Path, videos: Sequence[Path], *, top: int, views: EvaluationViews) -> PredictionReport:
    """As `predict_videos`, but a video that cannot be decoded is listed with the reason, the others are predicted."""
    require_videos(videos)
    trained = load_trained(checkpoint)
    with converted(trained, whole_videos(videos)) as (shard_set, damaged):
        if shard_set is None:
            return PredictionReport(videos=[], damaged=damaged, notes={})
        result, notes = score(trained, shard_set, views), dict(shard_set.manifest.notes)
    rows = {key: index for index, key in enumerate(result.sample_ids)}
    found = []
    for video in map(str, videos):
        if (row := rows.get(sample_key(video))) is not None:
            of_video = {target: values[row] for target, values in result.probabilities.items()}
            found.append(VideoPrediction(video=video, predictions=likeliest(trained.classes, of_video, top=top)))
    return PredictionReport(videos=found, damaged=damaged, notes=notes)


@contextmanager
def shards_of_videos(trained: TrainedModel, videos: Sequence[Path]) -> Iterator[ShardSet]:
    """The videos as a small shard set in a temporary folder, made as the model's training shards were.

    A video that cannot be decoded is a RejectBudgetError that says which and why.
    """
    with converted(trained, whole_videos(videos)) as (shard_set, damaged):
        _refuse_damaged(damaged)
        assert shard_set is not None
        yield shard_set


def _refuse_damaged(damaged: Sequence[DamagedVideo]) -> None:
    if damaged:
        told = "; ".join(f"{one.video}: {one.reason} ({one.what})" for one in damaged)
        raise RejectBudgetError(f"expected videos that can be read, found {told}; repair or replace them")


@contextmanager
def converted(
    trained: TrainedModel, samples: Sequence[SourceSample], *, is_shown: bool = True
) -> Iterator[tuple[ShardSet | None, list[DamagedVideo]]]:
    """The readable samples as a shard set in a temporary folder (None: not one is), and the others.

    `is_shown`: with a progress bar.
    """
    gop = trained.video.num_gop_frames
    config = ConversionConfig(
        codec=trained.video.codec,
        quality=trained.video.quality,
        num_gop_frames=DEFAULT_GOP_FRAMES if gop is None else gop,
        short_side=trained.video.short_side,
        side_multiple=trained.video.side_multiple,
        frames_per_second=trained.video.frames_per_second,
        interlaced=trained.video.interlaced or "deinterlace",
        audio_policy="none" if trained.audio.policy == "none" else "optional",
        sample_rate_hz=trained.audio.sample_rate_hz,
        num_mel_bins=trained.audio.num_mel_bins,
        workers=min(num_cores(), len(samples)),
        max_rejects=RejectBudget(count=len(samples)),
    )
    source = SourceList(
        dataset="videos",
        split="predict",
        label_spaces=tuple(LabelSpace(name=name, classes=tuple(classes)) for name, classes in trained.classes.items()),
        targets=tuple(trained.classes),
        labelling="none",
        samples=tuple(samples),
    )
    with tempfile.TemporaryDirectory(prefix="ca2st-videos-") as folder:
        root = Path(folder) / "shards"
        try:
            (convert_shown if is_shown else convert)(source, root, config)
        except AllRejectedError as error:
            yield None, _damaged(error.rejects)
            return
        yield read_shard_set(root), _damaged(read_rejects(root))


def _damaged(rejects: Sequence[Reject]) -> list[DamagedVideo]:
    return [DamagedVideo(video=one.sample_id, reason=one.reason, what=one.what) for one in rejects]


def find_videos(arguments: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Return the videos that arguments name, and the files in folders that are none: left aside.

    A file stands for itself, a folder for all videos in it and in its folders, and a pattern such as ``*/*.mp4`` for
    the videos that it matches (a shell puts their names in its place; between quotes it arrives here). A folder or
    pattern without a video is a UserInputError.
    """
    found: list[Path] = []
    aside: list[Path] = []
    for argument in arguments:
        is_pattern = not argument.exists() and glob.has_magic(str(argument))
        if not (is_pattern or argument.is_dir()):
            found.append(argument)
            continue
        # Path.glob takes no absolute pattern.
        files = glob.iglob(str(argument), recursive=True) if is_pattern else _files_below(argument)  # noqa: PTH207
        paths = [path for path in map(Path, sorted(files)) if path.is_file()]
        videos = [path for path in paths if path.suffix.lower() in VIDEO_SUFFIXES]
        if not videos:
            what = "a pattern of videos" if is_pattern else "a folder with videos in it"
            raise UserInputError(
                f"{argument}: expected {what} (endings: {' '.join(sorted(VIDEO_SUFFIXES))}), found {len(paths)} files, "
                "none of them a video"
            )
        found += videos
        aside += [path for path in paths if path.suffix.lower() not in VIDEO_SUFFIXES]
    return found, aside


def _files_below(folder: Path) -> Iterator[str]:
    for at, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (str(Path(at) / name) for name in names if not name.startswith("."))


def require_videos(videos: Sequence[Path]) -> None:
    """Refuse an empty list of videos, and one of videos that are not there or are named twice (UserInputError)."""
    if not videos:
        raise UserInputError("expected at least one video, found none")
    if missing := [str(video) for video in videos if not video.is_file()]:
        raise UserInputError(f"expected video files, found none at {', '.join(missing)}; check the paths")
    if twice := [name for name, count in Counter(map(str, videos)).items() if count > 1]:
        raise UserInputError(f"expected each video once, found twice: {', '.join(twice)}")


def whole_videos(videos: Sequence[Path]) -> list[SourceSample]:
    """Return each video as a sample, from its beginning to its end."""
    return [segment_of(video, None, None, name=str(video)) for video in videos]


def segment_of(video: Path, start_seconds: float | None, end_seconds: float | None, *, name: str) -> SourceSample:
    """Return a part of a video as the sample `name`."""
    return SourceSample(
        sample_id=name, path=video, start_seconds=start_seconds, end_seconds=end_seconds, labels=(), where=str(video)
    )


def likeliest(
    classes: Mapping[str, Sequence[str]], probabilities: Mapping[str, ArrayLike], *, top: int
) -> list[Prediction]:
    """Return the `top` classes of every target, the likeliest first; `probabilities` are one number per class."""
    found = []
    for target, names in classes.items():
        values = np.asarray(probabilities[target])
        found += [
            Prediction(target=target, label=names[index], probability=float(values[index]))
            for index in np.argsort(-values, kind="stable")[:top].tolist()
        ]
    return found
