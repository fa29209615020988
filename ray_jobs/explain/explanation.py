"""What a model attends to in a video: one run with its attention recorded, and where its tokens lie.

`Places` says seconds for times, and rows and columns or hertz for places.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ca2st.batch import ClipBatch
from ca2st.errors import NumericError, UserInputError
from ca2st.model.config import ModelConfig
from ca2st.model.inspect import AttentionMap, has_cross_attention, record_attention
from ca2st.model.network import ModelOutput
from ca2st.model.tokens import audio_patches
from ca2st.spec import MEL_ROW_SECONDS, ClipSpec
from ca2st.training.evaluate import probabilities_of
from pipelines.storage.samples import SampleReader
from pipelines.views import EvaluationViews
from ray_jobs.pages.charts import Tick, hertz_of_bin, seconds_ticks
from ray_jobs.runs.inference import TrainedModel, place_model, trained_loader
from ray_jobs.runs.prediction import Prediction, likeliest, shards_of_videos
from sharding.format.shard_set import ShardSet

_TOP = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Sound:
    """What the audio expert read."""

    mel: NDArray[np.float32]
    """[rows, bins], normalised; row 0 is the earliest, bin 0 the lowest. Zeros where the video has no sound."""
    start_seconds: float
    """Of row 0, from the video's first moment."""
    end_seconds: float
    """Of the last row's end, padding included."""
    num_heard_rows: int
    """Rows that are sound; those behind are padding. 0 where the video has no sound."""
    sample_rate_hz: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Explanation:
    """A view of a video, what the model said about it, and where its attention went."""

    video: str
    model: ModelConfig
    clip: ClipSpec
    checkpoint: str
    predictions: list[Prediction]
    frames: NDArray[np.uint8]
    """[num_frames, height, width, 3] RGB, as the experts saw them."""
    frame_seconds: tuple[float, ...]
    """Time of each frame from the video's first moment."""
    sound: Sound | None
    """None where the model has no audio expert."""
    maps: list[AttentionMap]
    """Of one clip each, in the order of computation."""


def require_attention(trained: TrainedModel) -> None:
    """Refuse a model whose experts do not listen to each other.

    Raises:
        UserInputError: one expert alone, or experts joined without cross-attention.
    """
    if not has_cross_attention(trained.model):
        experts = ", ".join(trained.model.experts)
        raise UserInputError(
            f"{trained.checkpoint.folder}: expected a model whose experts listen to each other, found "
            f"{trained.recipe.model.kind!r} ({experts}) without cross-attention, so there is nothing to explain; give "
            "a checkpoint of cast, cava or ca2st with cross-attention, or use `ca2st predict` for its classes"
        )


def run_recorded(trained: TrainedModel, video: Path) -> Explanation:
    """Read `video` as `ca2st predict` does, one centred view, and run the model once with its attention recorded.

    Raises:
        UserInputError: the model has no cross-attention.
        RejectBudgetError: the video cannot be decoded; the message says why.
        NumericError: the model's numbers are not finite.
    """
    require_attention(trained)
    with shards_of_videos(trained, [video]) as shard_set:
        batch = _centred_view(trained, shard_set)
        mel_rows = SampleReader(shard_set).indexes.entry(0, 0).mel_rows
    accelerator = place_model(trained)
    here = batch.to(accelerator.device)
    with torch.no_grad(), accelerator.autocast(), record_attention(trained.model) as maps:
        output: ModelOutput = trained.model(here.normalised_video(), here.mel, here.intervals_seconds, here.has_audio)
    _check_finite(trained, output, maps)
    probabilities = {
        name: probabilities_of(logits[0], trained.labelling).cpu() for name, logits in output.logits.items()
    }
    return Explanation(
        video=str(video),
        model=trained.recipe.model,
        clip=trained.recipe.clip,
        checkpoint=trained.checkpoint.folder.name,
        predictions=likeliest(trained.classes, probabilities, top=_TOP),
        frames=batch.video[0].permute(1, 2, 3, 0).contiguous().numpy(),
        frame_seconds=tuple(batch.intervals_seconds[0, 1:].flatten().tolist()),
        sound=_sound(trained, batch, mel_rows) if "audio" in trained.model.experts else None,
        maps=maps,
    )


def _check_finite(trained: TrainedModel, output: ModelOutput, maps: list[AttentionMap]) -> None:
    wrong = [
        f"{found.direction.name.upper()} of layer {found.layer}" for found in maps if not found.given.isfinite().all()
    ]
    wrong += [f"the logits of {name}" for name, logits in output.logits.items() if not logits.isfinite().all()]
    if wrong:
        raise NumericError(
            f"{trained.checkpoint.folder}: expected finite attention and logits, found NaN or infinity first in "
            f"{wrong[0]}; its weights cannot be used, give an earlier checkpoint"
        )


def _centred_view(trained: TrainedModel, shard_set: ShardSet) -> ClipBatch:
    """Return the single view of the single video, without the entries that fill its batch."""
    views, targets = EvaluationViews(), tuple(trained.classes)
    with trained_loader(trained, shard_set, targets, views=views) as loader:
        return next(batch for whole in loader.batches() for batch in whole.split(1) if not batch.is_padding[0])


def _sound(trained: TrainedModel, batch: ClipBatch, mel_rows: int) -> Sound:
    start, end = batch.intervals_seconds[0, 0].tolist()
    heard = mel_rows - round(start / MEL_ROW_SECONDS) if batch.has_audio[0] else 0
    return Sound(
        mel=batch.mel[0].numpy(),
        start_seconds=start,
        end_seconds=end,
        num_heard_rows=min(heard, len(batch.mel[0])),
        sample_rate_hz=trained.audio.sample_rate_hz,
    )


_MOST_FRAME_TICKS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class AudioBox:
    """The part of the spectrogram that the grid of audio patches covers, in percent of its sides.

    Patches overlap; each is drawn as wide as the step to the next, around its own centre.
    """

    left: float
    bottom: float
    width: float
    height: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Places:
    """The grids of one explained video."""

    explanation: Explanation

    @property
    def frame_seconds(self) -> list[float]:
        """Middle of each pair of frames: the time of a visual token."""
        seconds = self.explanation.frame_seconds
        return [(first + second) / 2 for first, second in zip(seconds[::2], seconds[1::2], strict=True)]

    @property
    def audio_grid(self) -> tuple[int, int]:
        """(rows, columns) of spectrogram patches."""
        return audio_patches(self.explanation.model, self.explanation.clip)

    def audio_box(self) -> AudioBox:
        """Return where the patch grid lies on the spectrogram."""
        model, clip = self.explanation.model, self.explanation.clip
        (rows, columns), stride = self.audio_grid, model.audio_stride
        margin = (model.patch_size - stride) / 2
        return AudioBox(
            left=100 * margin / clip.mel_rows,
            bottom=100 * margin / clip.num_mel_bins,
            width=100 * columns * stride / clip.mel_rows,
            height=100 * rows * stride / clip.num_mel_bins,
        )

    def time_labels(self, expert: str) -> list[str]:
        """Return each token time of an expert as ``1.25 s``."""
        if expert == "audio":
            return [f"{self._column_seconds(column):.2f} s" for column in range(self.audio_grid[1])]
        return [f"{seconds:.2f} s" for seconds in self.frame_seconds]

    def ticks(self, expert: str) -> list[Tick]:
        """Return seconds on an axis of an expert's token times."""
        if expert == "audio":
            half = self.explanation.model.audio_stride * MEL_ROW_SECONDS / 2
            first, last = self._column_seconds(0) - half, self._column_seconds(self.audio_grid[1] - 1) + half
            return seconds_ticks(first, last, most=5)
        seconds = self.frame_seconds
        every = -(-len(seconds) // _MOST_FRAME_TICKS)
        return [
            Tick(percent=100 * (index + 0.5) / len(seconds), label=f"{moment:.1f}")
            for index, moment in enumerate(seconds)
            if index % every == 0
        ]

    def key_in_words(self, keys: str, time: int, place: int, *, num_places: int) -> str:
        """Return a key as a person would point at it."""
        if keys == "audio":
            model = self.explanation.model
            hertz = hertz_of_bin(
                place * model.audio_stride + model.patch_size / 2,
                num_bins=self.explanation.clip.num_mel_bins,
                sample_rate_hz=self._sound.sample_rate_hz,
            )
            tone = f"{hertz / 1000:.1f} kHz" if hertz >= 1000 else f"{hertz:.0f} Hz"
            return f"the sound at {self._column_seconds(time):.2f} s around {tone}"
        side = math.isqrt(num_places)
        row, column = place // side + 1, place % side + 1
        return f"the frame at {self.frame_seconds[time]:.2f} s, row {row} and column {column} of {side}"

    @property
    def _sound(self) -> Sound:
        assert self.explanation.sound is not None
        return self.explanation.sound

    def _column_seconds(self, column: int) -> float:
        """Centre of a column of spectrogram patches."""
        model = self.explanation.model
        return self._sound.start_seconds + (column * model.audio_stride + model.patch_size / 2) * MEL_ROW_SECONDS
