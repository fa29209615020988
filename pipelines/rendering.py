"""What a backend is given and what it returns: the seam between bytes and pixels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import UInt8
from torch import Tensor

from pipelines.crops import CropBox


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderRequest:
    """One clip to decode once, and the views to cut from it."""

    frames: tuple[bytes, ...]
    """JPEGs in view order; a short clip repeats some."""
    boxes: tuple[CropBox, ...]
    """One a view, inside the picture."""
    flip: bool
    """Mirror every view."""
    where: str
    """Shard and key, for messages."""


@runtime_checkable
class ViewBackend(Protocol):
    """Renders views: decode, crop, bilinear resize with antialiasing, flip, in this order, the same for all frames."""

    name: str

    def render(self, requests: Sequence[RenderRequest]) -> UInt8[Tensor, "views 3 time height width"]:
        """Pixels of every view, request by request, its boxes in order.

        Raises:
            SampleDamageError: a frame that passed its checksum cannot be decoded; names the sample.
        """
        ...

    def close(self) -> None:
        """Give back threads and buffers."""
        ...
