"""Which backend turns stored bytes into pixels, by the codec they are stored in."""

import importlib.util
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch

from ca2st.errors import EnvironmentFault
from pipelines.cuda_decoders import CudaDecoders, cuda_decoders
from pipelines.loader_config import BackendName
from pipelines.rendering import ViewBackend
from pipelines.routed import RoutedBackend
from pipelines.stats import StatsRecorder

_log = logging.getLogger(__name__)

DALI_ON_CPU = {"mjpeg": "JPEG frames", "vp9": "VP9 videos"}
"""Codecs that DALI decodes without a GPU, with what it is given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendChoice:
    """Which backend renders a codec, and why."""

    backend: Literal["dali-gpu", "dali", "reference"]
    reason: str
    is_slow: bool = False
    """Whether the user should hear of it."""


def choose_backend(
    name: BackendName,
    codec: str,
    *,
    dali_installed: bool,
    gpu: CudaDecoders | None = None,
    short_side: int | None = None,
) -> BackendChoice:
    """The backend for shards of `codec` whose pictures have `short_side` pixels on the shorter side.

    `gpu`: the rank's device; None: there is none, or it is not to be used.

    Raises:
        EnvironmentFault: ``dali`` is asked for by name and is not installed, or cannot decode the codec here.
    """
    if name == "reference":
        return BackendChoice(backend="reference", reason="asked for by name")
    if name == "dali" and not dali_installed:
        raise EnvironmentFault("backend dali: nvidia-dali is not installed; install it or use backend 'reference'")
    if not dali_installed:
        reason = "chosen by auto, nvidia-dali is not installed; several times slower than dali"
        return BackendChoice(backend="reference", reason=reason, is_slow=True)
    refusal = "found none to use" if gpu is None else gpu.refusal(codec, short_side=short_side)
    if gpu is not None and refusal is None:
        asked = "asked for by name" if name == "dali" else "chosen by auto"
        return BackendChoice(backend="dali-gpu", reason=f"{asked}; {codec} is decoded and augmented on {gpu.name}")
    choice = _on_cpu(name, codec, why_no_gpu=refusal or "")
    return choice if gpu is None else replace(choice, reason=f"{choice.reason}; not on the GPU: {refusal}")


def _on_cpu(name: BackendName, codec: str, *, why_no_gpu: str) -> BackendChoice:
    if codec not in DALI_ON_CPU:
        if name == "dali":
            raise EnvironmentFault(
                f"backend dali: decodes {codec} on a GPU only, {why_no_gpu}; "
                "use backend 'reference', or convert the shards with --codec mjpeg"
            )
        reason = (
            f"chosen by auto, DALI decodes {codec} on a GPU only; slow: on a CPU train from shards of --codec mjpeg, "
            "the fastest there"
        )
        return BackendChoice(backend="reference", reason=reason, is_slow=True)
    if name == "dali":
        return BackendChoice(backend="dali", reason="asked for by name")
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
    device: torch.device | None = None,
    short_sides: Mapping[str, int] | None = None,
) -> ViewBackend:
    """The backend for shards of `codecs`; every choice is explained in one log line, a slow one in a warning.

    `device`: the rank's own, used where it is a GPU that decodes the codec; `short_sides`: pixels of the shorter
    side, by codec. Where one of several backends cannot be made, those made before it are closed.

    Raises:
        EnvironmentFault: as `choose_backend`.
    """
    gpu, installed = cuda_decoders(device) if name != "reference" else None, dali_is_installed()
    sides = short_sides or {}
    choices = {
        codec: choose_backend(name, codec, dali_installed=installed, gpu=gpu, short_side=sides.get(codec))
        for codec in codecs
    }
    for choice in dict.fromkeys(choices.values()):
        level = logging.WARNING if choice.is_slow else logging.INFO
        _log.log(level, "backend %s: %s", choice.backend, choice.reason)
    sizes = _Sizes(num_frames, crop_size, views_per_clip, threads)
    backends: dict[str, ViewBackend] = {}
    with ExitStack() as on_error:
        for codec, choice in choices.items():
            backends[codec] = _made(choice, codec, sizes, stats, device)
            on_error.callback(backends[codec].close)
        on_error.pop_all()
    return RoutedBackend(backends) if len(backends) > 1 else next(iter(backends.values()))


class _Sizes(NamedTuple):
    num_frames: int
    crop_size: int
    views_per_clip: int
    threads: int


def _made(
    choice: BackendChoice, codec: str, sizes: _Sizes, stats: StatsRecorder, device: torch.device | None
) -> ViewBackend:
    if choice.backend == "reference":
        from pipelines.reference import ReferenceBackend

        return ReferenceBackend(crop_size=sizes.crop_size, stats=stats)
    if choice.backend == "dali-gpu":
        from pipelines.dali_gpu import gpu_backend

        assert device is not None
        return gpu_backend(codec, device=device, **sizes._asdict(), stats=stats)
    if codec == "mjpeg":
        from pipelines.dali_graph import DaliBackend

        return DaliBackend(**sizes._asdict(), stats=stats)
    from pipelines.dali_video import DaliVideoBackend

    return DaliVideoBackend(**sizes._asdict(), stats=stats)


def dali_is_installed() -> bool:
    """Whether nvidia-dali can be imported here."""
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:
        return False
