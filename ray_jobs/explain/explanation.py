"""One run of a model over one video with its attention recorded: everything the page shows."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ca2st.batch import ClipBatch
from ca2st.errors import NumericError, UserInputError
from ca2st.model.attention_maps import AttentionMap, has_cross_attention, record_attention
from ca2st.model.config import ModelConfig
from ca2st.model.holistic import ModelOutput
from ca2st.spec import MEL_ROW_SECONDS, ClipSpec
from pipelines.draws import EvaluationViews
from pipelines.shard_index import ShardIndexCache
from ray_jobs.inference.evaluation import place_model
from ray_jobs.inference.prediction import Prediction, likeliest, shards_of_videos
from ray_jobs.inference.trained import TrainedModel, trained_loader
from sharding.shard_set import ShardSet

_TOP = 5
_INDEX_BYTES = 1 << 20


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
        mel_rows = ShardIndexCache(shard_set, most_bytes=_INDEX_BYTES).entry(0, 0).mel_rows
    accelerator = place_model(trained)
    here = batch.to(accelerator.device)
    with torch.no_grad(), accelerator.autocast(), record_attention(trained.model) as maps:
        output: ModelOutput = trained.model(here.normalised_video(), here.mel, here.intervals_seconds)
    _check_finite(trained, output, maps)
    probabilities = {name: logits[0].float().softmax(dim=-1).cpu() for name, logits in output.logits.items()}
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
    """The single view of the single video, without the entries that fill its batch."""
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
