"""From JPEG bytes to pixels: what a backend is given, what it returns, and which one is used."""

import importlib.util
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from jaxtyping import UInt8
from torch import Tensor

from ca2st.errors import EnvironmentFault
from pipelines.crops import CropBox
from pipelines.stats import StatsRecorder

BackendName = Literal["auto", "dali", "reference"]
_log = logging.getLogger(__name__)


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


def make_backend(
    name: BackendName, *, num_frames: int, crop_size: int, views_per_clip: int, threads: int, stats: StatsRecorder
) -> ViewBackend:
    """The backend of that name; the choice behind ``auto`` is explained in one log line.

    Raises:
        EnvironmentFault: ``dali`` is asked for by name and is not installed.
    """
    if _resolve(name) == "reference":
        from pipelines.reference import ReferenceBackend

        return ReferenceBackend(crop_size=crop_size, stats=stats)
    from pipelines.dali_graph import DaliBackend

    return DaliBackend(
        num_frames=num_frames, crop_size=crop_size, views_per_clip=views_per_clip, threads=threads, stats=stats
    )


def _resolve(name: BackendName) -> BackendName:
    installed = dali_is_installed()
    if name == "dali" and not installed:
        raise EnvironmentFault("backend dali: nvidia-dali is not installed; install it or use backend 'reference'")
    if name != "auto":
        _log.info("backend %s: asked for by name", name)
        return name
    if installed:
        _log.info("backend dali: chosen by auto, nvidia-dali is installed; JPEG frames are decoded on the CPU")
        return "dali"
    _log.warning("backend reference: chosen by auto, nvidia-dali is not installed; several times slower than dali")
    return "reference"


def dali_is_installed() -> bool:
    """Whether nvidia-dali can be imported here."""
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:
        return False
