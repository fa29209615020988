"""Which backend turns stored bytes into pixels, by the codec they are stored in."""

import importlib.util
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ca2st.errors import EnvironmentFault
from pipelines.rendering import ViewBackend
from pipelines.routed import RoutedBackend
from pipelines.stats import StatsRecorder

BackendName = Literal["auto", "dali", "reference"]
_log = logging.getLogger(__name__)

DALI_ON_CPU = {"mjpeg": "JPEG frames", "vp9": "VP9 videos"}
"""Codecs that DALI decodes without a GPU, with what it is given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendChoice:
    """Which backend renders a codec, and why."""

    backend: Literal["dali", "reference"]
    reason: str
    is_slow: bool = False
    """Whether the user should hear of it."""


def choose_backend(name: BackendName, codec: str, *, dali_installed: bool) -> BackendChoice:
    """The backend for shards of `codec` on a machine without a GPU.

    Raises:
        EnvironmentFault: ``dali`` is asked for by name and is not installed, or cannot decode the codec here.
    """
    if name == "reference":
        return BackendChoice(backend="reference", reason="asked for by name")
    if name == "dali" and not dali_installed:
        raise EnvironmentFault("backend dali: nvidia-dali is not installed; install it or use backend 'reference'")
    if codec not in DALI_ON_CPU:
        if name == "dali":
            raise EnvironmentFault(
                f"backend dali: decodes {codec} on a GPU only, found none to use; "
                "use backend 'reference', or convert the shards with --codec mjpeg"
            )
        reason = (
            f"chosen by auto, DALI decodes {codec} on a GPU only; slow: on a CPU train from shards of --codec mjpeg, "
            "the fastest there"
        )
        return BackendChoice(backend="reference", reason=reason, is_slow=True)
    if name == "dali":
        return BackendChoice(backend="dali", reason="asked for by name")
    if not dali_installed:
        reason = "chosen by auto, nvidia-dali is not installed; several times slower than dali"
        return BackendChoice(backend="reference", reason=reason, is_slow=True)
    reason = f"chosen by auto, nvidia-dali is installed; {DALI_ON_CPU[codec]} are decoded on the CPU"
    return BackendChoice(backend="dali", reason=reason)


def make_backend(
    name: BackendName,
    *,
    codecs: Sequence[str] = ("mjpeg",),
    num_frames: int,
    crop_size: int,
    views_per_clip: int,
    threads: int,
    stats: StatsRecorder,
) -> ViewBackend:
    """The backend for shards of `codecs`; every choice is explained in one log line, a slow one in a warning.

    Raises:
        EnvironmentFault: as `choose_backend`.
    """
    choices = {codec: choose_backend(name, codec, dali_installed=dali_is_installed()) for codec in codecs}
    for choice in dict.fromkeys(choices.values()):
        level = logging.WARNING if choice.is_slow else logging.INFO
        _log.log(level, "backend %s: %s", choice.backend, choice.reason)

    def made(codec: str) -> ViewBackend:
        if choices[codec].backend == "reference":
            from pipelines.reference import ReferenceBackend

            return ReferenceBackend(crop_size=crop_size, stats=stats)
        return _dali(
            codec,
            num_frames=num_frames,
            crop_size=crop_size,
            views_per_clip=views_per_clip,
            threads=threads,
            stats=stats,
        )

    backends = {codec: made(codec) for codec in choices}
    return RoutedBackend(backends) if len(backends) > 1 else next(iter(backends.values()))


def _dali(
    codec: str, *, num_frames: int, crop_size: int, views_per_clip: int, threads: int, stats: StatsRecorder
) -> ViewBackend:
    if codec == "mjpeg":
        from pipelines.dali_graph import DaliBackend

        return DaliBackend(
            num_frames=num_frames, crop_size=crop_size, views_per_clip=views_per_clip, threads=threads, stats=stats
        )
    from pipelines.dali_video import DaliVideoBackend

    return DaliVideoBackend(
        num_frames=num_frames, crop_size=crop_size, views_per_clip=views_per_clip, threads=threads, stats=stats
    )


def dali_is_installed() -> bool:
    """Whether nvidia-dali can be imported here."""
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:
        return False
