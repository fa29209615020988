"""ClipBatch: the contract between the data pipeline and the model."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from ca2st.errors import CA2STError
from ca2st.spec import IMAGENET_MEAN, IMAGENET_STD

Labelling = Literal["one", "several", "none"]
"""What the labels of a batch are: a class of every target, the classes of one target that apply, or nothing."""


class BatchContractError(CA2STError):
    """A batch that breaks the contract: a fault of the code that made it, never of the data."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixing:
    """How neighbours are mixed: clips 2k and 2k+1 of the batch are partners; row i is what clip i keeps and takes.

    Small, and always on the CPU: what is to be done is known without asking the device. Mixed on the device by
    `ca2st.training.losses`; the pixels and labels of the batch are those of the clips as they were read.
    """

    video_share: Float[Tensor, " batch"]
    """Weight of the clip's own frames; 1 - it of the partner's. 1: not blended."""
    video_box: Int[Tensor, "batch 4"]
    """(top, left, height, width) in pixels, taken from the partner in every frame; of height 0: none."""
    mel_share: Float[Tensor, " batch"]
    """The same for the spectrogram."""
    mel_box: Int[Tensor, "batch 4"]
    """(first row, first bin, rows, bins) taken from the partner's spectrogram; of 0 rows: none."""
    label_share: Float[Tensor, " batch"]
    """Weight of the clip's own label in the target; 1 - it of the partner's."""

    def __post_init__(self) -> None:
        rows = self.video_share.shape[0]
        if rows % 2:
            raise BatchContractError(
                f"mixing: expected an even number of clips, as partners are neighbours, found {rows}; "
                "use an even per_device_batch_size"
            )
        for name in MIXING_FIELDS:
            if getattr(self, name).shape[0] != rows:
                raise BatchContractError(f"mixing.{name}: expected {rows} rows, found {described(getattr(self, name))}")


MIXING_FIELDS = ("video_share", "video_box", "mel_share", "mel_box", "label_share")
"""Tensors of a `Mixing`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipBatch:
    """A rank's share of one step: `batch` views of clips, in the plan's order.

    `video` stays uint8 until it is on the device; `normalised_video` turns it into what the experts read.
    """

    video: UInt8[Tensor, "batch 3 time height width"]
    """RGB frames, 0..255."""
    mel: Float[Tensor, "batch rows bins"]
    """Log-mel spectrogram crops, already normalised; all zeros where `has_audio` is false."""
    intervals_seconds: Float[Tensor, "batch intervals 2"]
    """(start, end) in seconds from the first moment of the sample: row 0 the spectrogram crop's, then one row per
    pair of frames: the times of frames 2k and 2k+1. `intervals` = 1 + time / 2."""
    labels: Int[Tensor, "batch columns"]
    """Class indices, one column per target (verb, noun, ...), in the order of the recipe's targets; of several labels
    per clip one column per class of the one target, 1 where it applies and 0 elsewhere; without labels no column."""
    sample_ids: tuple[str, ...]
    """Keys of the samples; the views of one sample repeat its key."""
    has_audio: Bool[Tensor, " batch"]
    """False where the source has no audio track: the model masks it, and no zero of `mel` is taken for silence."""
    is_padding: Bool[Tensor, " batch"]
    """True for entries that only fill the last batch of an evaluation; they count nowhere."""
    labelling: Labelling = "one"
    """How `labels` are to be read."""
    mixing: Mixing | None = None
    """How pairs are to be mixed in the training step; None in evaluation, and where nothing is mixed."""

    def __post_init__(self) -> None:
        batch, channels, time, _, _ = self.video.shape
        if self.video.dtype != torch.uint8 or channels != 3:
            raise BatchContractError(f"video: expected uint8 [B, 3, T, H, W], found {described(self.video)}")
        if self.intervals_seconds.shape != (batch, 1 + time // 2, 2):
            raise BatchContractError(
                f"intervals_seconds: expected [{batch}, {1 + time // 2}, 2], found {described(self.intervals_seconds)}"
            )
        for name in ("mel", "labels", "has_audio", "is_padding"):
            if getattr(self, name).shape[0] != batch:
                raise BatchContractError(f"{name}: expected {batch} rows, found {described(getattr(self, name))}")
        if self.labelling == "none" and self.labels.shape[1]:
            raise BatchContractError(f"labels: expected no column without labels, found {described(self.labels)}")
        if len(self.sample_ids) != batch:
            raise BatchContractError(f"sample_ids: expected {batch} keys, found {len(self.sample_ids)}")
        if self.mixing is not None and self.mixing.video_share.shape[0] != batch:
            raise BatchContractError(f"mixing: expected {batch} rows, found {described(self.mixing.video_share)}")

    @property
    def num_clips(self) -> int:
        """Return the number of views in the batch, padding included."""
        return self.video.shape[0]

    def normalised_video(self) -> Float[Tensor, "batch 3 time height width"]:
        """Return frames as float32 with ImageNet mean and standard deviation, which every expert reads (CLIP too)."""
        mean, std = _normalisation(self.video.device)
        return (self.video.float() / 255 - mean) / std

    def to(self, device: torch.device) -> "ClipBatch":
        """Return the same batch with its tensors on `device`; `mixing` stays on the CPU."""
        tensors: dict[str, Any] = {name: on_device(getattr(self, name), device) for name in _TENSORS}
        return replace(self, **tensors)

    def split(self, num_clips: int) -> Iterator["ClipBatch"]:
        """Yield consecutive micro-batches of at most `num_clips` views; pairs that are mixed must not be parted.

        Raises:
            BatchContractError: the batch is mixed and `num_clips` is odd.
        """
        for start in range(0, self.num_clips, num_clips):
            part = slice(start, start + num_clips)
            mixing = None
            if self.mixing is not None:
                mixing = Mixing(**{name: getattr(self.mixing, name)[part] for name in MIXING_FIELDS})
            tensors: dict[str, Any] = {name: getattr(self, name)[part] for name in _TENSORS}
            yield replace(self, **tensors, sample_ids=self.sample_ids[part], mixing=mixing)


_TENSORS = ("video", "mel", "intervals_seconds", "labels", "has_audio", "is_padding")


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return `tensor` on `device`; a copy to a GPU goes through pinned memory: the host need not wait for it."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


@cache
def _normalisation(device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, copied to each device once: every copy of them would make the host wait."""
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return mean, std


def described(tensor: Tensor) -> str:
    """Return the type and shape of a tensor for a message: ``uint8 [2, 3]``."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
