"""Which backend turns JPEG bytes into pixels."""

import importlib.util
import logging
from typing import Literal

from ca2st.errors import EnvironmentFault
from pipelines.rendering import ViewBackend
from pipelines.stats import StatsRecorder

BackendName = Literal["auto", "dali", "reference"]
_log = logging.getLogger(__name__)


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
