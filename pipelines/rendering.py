"""What a backend is given and what it returns: the seam between bytes and pixels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import UInt8
from torch import Tensor

from pipelines.augment.boxes import CropBox, ErasedBox
from pipelines.augment.rand_augment import ImageAugment


@dataclass(frozen=True, slots=True)
class JpegFrames:
    """A clip as single pictures: only the frames of its views were read."""

    frames: tuple[bytes, ...]
    """JPEGs in view order; a short clip repeats some."""


@dataclass(frozen=True, slots=True)
class VideoMember:
    """A clip as a video file: frames depend on others, so the whole member was read."""

    data: bytes
    codec: str
    """Name of the codec as in the manifest: h264, hevc, vp9."""
    frame_indices: tuple[int, ...]
    """Frames of the file in view order; a short clip repeats some."""


ClipFrames = JpegFrames | VideoMember
"""The stored frames of a clip, in one of two forms; one function per form decodes, and what follows knows of
neither."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderRequest:
    """One clip to decode once, and the views to cut from it."""

    frames: ClipFrames
    boxes: tuple[CropBox, ...]
    """One per view, inside the picture."""
    flip: bool
    where: str
    """Shard and key, for messages."""
    augment: ImageAugment | None = None
    """RandAugment of every view after the flip; None: none."""
    erased: tuple[ErasedBox, ...] = ()
    """Boxes of every view that are painted over last."""


@runtime_checkable
class ViewBackend(Protocol):
    """Renders views: decode, crop, bilinear resize with antialiasing, flip, RandAugment, erasing, in this order.

    The same for all frames of a clip.
    """

    name: str

    def render(self, requests: Sequence[RenderRequest]) -> UInt8[Tensor, "views 3 time height width"]:
        """Return the pixels of every view, request by request, its boxes in order.

        Raises:
            SampleDamageError: a frame that passed its checksum cannot be decoded; names the sample.
        """
        ...

    def close(self) -> None:
        """Give back threads and buffers."""
        ...
