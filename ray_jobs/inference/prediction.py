"""Classify anybody's video files: they become a small shard set in a temporary folder, read like any other."""

import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ca2st.cores import num_cores
from ca2st.errors import UserInputError
from pipelines.draws import EvaluationViews
from ray_jobs.conversion import convert_shown
from ray_jobs.inference.evaluation import score
from ray_jobs.inference.trained import TrainedModel, load_trained
from sharding.codecs import DEFAULT_GOP_FRAMES
from sharding.conversion import ConversionConfig
from sharding.keys import sample_key
from sharding.manifest import LabelSpace
from sharding.shard_set import ShardSet, read_shard_set
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


def predict_videos(
    checkpoint: Path, videos: Sequence[Path], *, top: int, views: EvaluationViews
) -> list[VideoPrediction]:
    """The `top` classes of every target for each video, in the order given.

    A video is read as in training: whole, with its sound where it has some.

    Raises:
        UserInputError: a video is not there or given twice, or `checkpoint` is none.
        RejectBudgetError: a video cannot be decoded; the message says which and why.
    """
    require_videos(videos)
    trained = load_trained(checkpoint)
    with shards_of_videos(trained, videos) as shard_set:
        result = score(trained, shard_set, views)
    rows = {key: index for index, key in enumerate(result.sample_ids)}
    found = []
    for video in map(str, videos):
        row = rows[sample_key(video)]
        of_video = {target: values[row] for target, values in result.probabilities.items()}
        found.append(VideoPrediction(video=video, predictions=likeliest(trained.classes, of_video, top=top)))
    return found


@contextmanager
def shards_of_videos(trained: TrainedModel, videos: Sequence[Path]) -> Iterator[ShardSet]:
    """The videos as a small shard set in a temporary folder, made as the model's training shards were.

    Raises:
        RejectBudgetError: a video cannot be decoded; the message says which and why.
    """
    gop = trained.video.num_gop_frames
    config = ConversionConfig(
        codec=trained.video.codec,
        quality=trained.video.quality,
        num_gop_frames=DEFAULT_GOP_FRAMES if gop is None else gop,
        short_side=trained.video.short_side,
        frames_per_second=trained.video.frames_per_second,
        audio_policy="none" if trained.audio.policy == "none" else "optional",
        sample_rate_hz=trained.audio.sample_rate_hz,
        num_mel_bins=trained.audio.num_mel_bins,
        workers=min(num_cores(), len(videos)),
    )
    with tempfile.TemporaryDirectory(prefix="ca2st-videos-") as folder:
        convert_shown(_source_list(trained, videos), Path(folder) / "shards", config)
        yield read_shard_set(Path(folder) / "shards")


def require_videos(videos: Sequence[Path]) -> None:
    """Refuse a list of videos that are not there or are named twice.

    Raises:
        UserInputError: as said.
    """
    if missing := [str(video) for video in videos if not video.is_file()]:
        raise UserInputError(f"expected video files, found none at {', '.join(missing)}; check the paths")
    if twice := [name for name, count in Counter(map(str, videos)).items() if count > 1]:
        raise UserInputError(f"expected each video once, found twice: {', '.join(twice)}")


def _source_list(trained: TrainedModel, videos: Sequence[Path]) -> SourceList:
    """The videos with a label that nobody reads."""
    return SourceList(
        dataset="videos",
        split="predict",
        label_spaces=tuple(LabelSpace(name=name, classes=tuple(classes)) for name, classes in trained.classes.items()),
        targets=tuple(trained.classes),
        samples=tuple(
            SourceSample(
                sample_id=str(video),
                path=video,
                start_seconds=None,
                end_seconds=None,
                labels=(0,) * len(trained.classes),
                where=f"argument {number}",
            )
            for number, video in enumerate(videos, start=1)
        ),
    )


def likeliest(
    classes: Mapping[str, Sequence[str]], probabilities: Mapping[str, Tensor], *, top: int
) -> list[Prediction]:
    """The `top` classes of every target, the likeliest first; `probabilities` are one number a class."""
    found = []
    for target, names in classes.items():
        values, indices = probabilities[target].topk(min(top, len(names)))
        for value, index in zip(values.tolist(), indices.tolist(), strict=True):
            found.append(Prediction(target=target, label=names[index], probability=value))
    return found
