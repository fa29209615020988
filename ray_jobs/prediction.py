"""Classify anybody's video files: they become a small shard set in a temporary folder, read like any other."""

import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ca2st.errors import UserInputError
from ca2st.training.evaluate import EvaluationResult
from pipelines.draws import EvaluationViews
from ray_jobs.conversion import convert_shown
from ray_jobs.environment import num_cores
from ray_jobs.evaluation import score
from ray_jobs.trained import TrainedModel, load_trained
from sharding.conversion import ConversionConfig
from sharding.keys import sample_key
from sharding.manifest import LabelSpace, read_shard_set
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
    _check_videos(videos)
    trained = load_trained(checkpoint)
    source = _source_list(trained, videos)
    config = ConversionConfig(
        short_side=trained.video.short_side,
        frames_per_second=trained.video.frames_per_second,
        audio_policy="none" if trained.audio.policy == "none" else "optional",
        sample_rate_hz=trained.audio.sample_rate_hz,
        num_mel_bins=trained.audio.num_mel_bins,
        workers=min(num_cores(), len(videos)),
    )
    with tempfile.TemporaryDirectory(prefix="ca2st-predict-") as folder:
        convert_shown(source, Path(folder) / "shards", config)
        result = score(trained, read_shard_set(Path(folder) / "shards"), views)
    rows = {key: index for index, key in enumerate(result.sample_ids)}
    return [
        VideoPrediction(
            video=sample.sample_id, predictions=_top(trained, result, rows[sample_key(sample.sample_id)], top)
        )
        for sample in source.samples
    ]


def _check_videos(videos: Sequence[Path]) -> None:
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


def _top(trained: TrainedModel, result: EvaluationResult, row: int, top: int) -> list[Prediction]:
    found = []
    for target, classes in trained.classes.items():
        values, indices = result.probabilities[target][row].topk(min(top, len(classes)))
        for value, index in zip(values.tolist(), indices.tolist(), strict=True):
            found.append(Prediction(target=target, label=classes[index], probability=value))
    return found
