"""What a model attends to in a video: one run with its attention recorded, and where its tokens lie."""

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

_TOP = 5
_MOST_FRAME_TICKS = 8


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
    """A view of a video, what the model said about it, and where its attention went.

    The methods say where tokens lie: seconds for times, rows and columns or hertz for places.
    """

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

    @property
    def pair_seconds(self) -> list[float]:
        """Middle of each pair of frames: the time of a visual token."""
        pairs = zip(self.frame_seconds[::2], self.frame_seconds[1::2], strict=True)
        return [(first + second) / 2 for first, second in pairs]

    def audio_box(self) -> dict[str, float]:
        """Return the part of the spectrogram that the grid of audio patches covers, in percent of its sides.

        Patches overlap; each is drawn as wide as the step to the next, around its own centre.
        """
        (rows, columns), stride = audio_patches(self.model, self.clip), self.model.audio_stride
        margin = (self.model.patch_size - stride) / 2
        return {
            "left": 100 * margin / self.clip.mel_rows,
            "bottom": 100 * margin / self.clip.num_mel_bins,
            "width": 100 * columns * stride / self.clip.mel_rows,
            "height": 100 * rows * stride / self.clip.num_mel_bins,
        }

    def token_seconds(self, expert: str) -> list[float]:
        """Return each token time of an expert: the centre of a pair of frames or of a column of patches."""
        if expert != "audio":
            return self.pair_seconds
        _, columns = audio_patches(self.model, self.clip)
        rows = (column * self.model.audio_stride + self.model.patch_size / 2 for column in range(columns))
        return [self._heard.start_seconds + row * MEL_ROW_SECONDS for row in rows]

    def ticks(self, expert: str) -> list[Tick]:
        """Return seconds on an axis of an expert's token times."""
        seconds = self.token_seconds(expert)
        if expert == "audio":
            half = self.model.audio_stride * MEL_ROW_SECONDS / 2
            return seconds_ticks(seconds[0] - half, seconds[-1] + half, most=5)
        every = -(-len(seconds) // _MOST_FRAME_TICKS)
        return [
            Tick(percent=100 * (index + 0.5) / len(seconds), label=f"{moment:.1f}")
            for index, moment in enumerate(seconds)
            if index % every == 0
        ]

    def key_in_words(self, keys: str, time: int, place: int, *, num_places: int) -> str:
        """Return a key as a person would point at it."""
        moment = self.token_seconds(keys)[time]
        if keys == "audio":
            hertz = hertz_of_bin(
                place * self.model.audio_stride + self.model.patch_size / 2,
                num_bins=self.clip.num_mel_bins,
                sample_rate_hz=self._heard.sample_rate_hz,
            )
            tone = f"{hertz / 1000:.1f} kHz" if hertz >= 1000 else f"{hertz:.0f} Hz"
            return f"the sound at {moment:.2f} s around {tone}"
        side = math.isqrt(num_places)
        row, column = place // side + 1, place % side + 1
        return f"the frame at {moment:.2f} s, row {row} and column {column} of {side}"

    @property
    def _heard(self) -> Sound:
        assert self.sound is not None
        return self.sound


def run_recorded(trained: TrainedModel, video: Path) -> Explanation:
    """Read `video` as `ca2st predict` does, one centred view, and run the model once with its attention recorded.

    Raises:
        UserInputError: one expert alone, or experts joined without cross-attention.
        RejectBudgetError: the video cannot be decoded; the message says why.
        NumericError: the model's numbers are not finite.
    """
    if not has_cross_attention(trained.model):
        raise UserInputError(
            f"{trained.checkpoint.folder}: expected a model whose experts listen to each other, found "
            f"{trained.recipe.model.kind!r} ({', '.join(trained.model.experts)}) without cross-attention, so there is "
            "nothing to explain; give a checkpoint of cast, cava or ca2st with cross-attention, or use `ca2st predict` "
            "for its classes"
        )
    with (
        shards_of_videos(trained, [video]) as shard_set,
        trained_loader(trained, shard_set, tuple(trained.classes), views=EvaluationViews()) as loader,
    ):
        # The one view of the one video, without the entries that fill its batch.
        batch = next(batch for whole in loader.batches() for batch in whole.split(1) if not batch.is_padding[0])
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
