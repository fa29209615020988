"""Which backend turns stored bytes into pixels, by the codec they are stored in and the device of the rank.

The driver's video library (libnvcuvid) says for a codec, chroma format and bit depth whether the device decodes it, on
how many engines, and from which size on. Ours are 8 bit, 4:2:0 (`sharding.media.codecs`). JPEG frames need no engine:
nvJPEG decodes them on the CUDA cores where there is none.

A batch of shard sets of several codecs is routed: every clip goes to the backend of its codec, and back to its place.
"""

import ctypes
import importlib.util
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import UInt8
from torch import Tensor

from ca2st.errors import EnvironmentFault
from pipelines.config import BackendName
from pipelines.rendering import JpegFrames, RenderRequest, ViewBackend
from pipelines.threads import StatsRecorder
from sharding.media.codecs import SIDE_MULTIPLE

_log = logging.getLogger(__name__)
DALI_ON_CPU = {"mjpeg": "JPEG frames", "vp9": "VP9 videos"}
"""Codecs that DALI decodes without a GPU, with what it is given."""
_UNEVEN = (
    "%s shards from before sides were multiples of %d: DALI 2.4 makes a GPU decoder anew for every such clip (tens of "
    "milliseconds), and rarely decodes wrong colours; convert them again, or decode_on = 'cpu'"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendChoice:
    """Which backend renders a codec, and why."""

    backend: Literal["dali-gpu", "dali", "reference"]
    reason: str
    is_slow: bool = False
    """Whether the log line is a warning."""


def choose_backend(
    name: BackendName,
    codec: str,
    *,
    dali_installed: bool,
    gpu: "CudaDecoders | None" = None,
    short_side: int | None = None,
) -> BackendChoice:
    """Return the backend for shards of `codec` whose pictures have `short_side` pixels on the shorter side.

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
    not_on_gpu = "" if gpu is None else f"; not on the GPU: {refusal}"
    if codec not in DALI_ON_CPU:
        if name == "dali":
            raise EnvironmentFault(
                f"backend dali: decodes {codec} on a GPU only, {refusal}; "
                "use backend 'reference', or convert the shards with --codec mjpeg"
            )
        reason = (
            f"chosen by auto, DALI decodes {codec} on a GPU only; slow: on a CPU train from shards of --codec mjpeg, "
            "the fastest there"
        )
        return BackendChoice(backend="reference", reason=reason + not_on_gpu, is_slow=True)
    reason = f"chosen by auto, nvidia-dali is installed; {DALI_ON_CPU[codec]} are decoded on the CPU"
    return BackendChoice(backend="dali", reason=("asked for by name" if name == "dali" else reason) + not_on_gpu)


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
    uneven: Collection[str] = (),
) -> ViewBackend:
    """Return the backend for shards of `codecs`; each choice is explained in a log line, a slow one in a warning.

    `device`: the rank's own, used where it is a GPU that decodes the codec; `short_sides`: pixels of the shorter
    side, by codec; `uneven`: codecs of sets whose sides are not all multiples of `SIDE_MULTIPLE`. Where one of several
    backends cannot be made, those made before it are closed.

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
    if slow := sorted(codec for codec in uneven if codec != "mjpeg" and choices[codec].backend == "dali-gpu"):
        _log.warning(_UNEVEN, ", ".join(slow), SIDE_MULTIPLE)
    backends: dict[str, ViewBackend] = {}
    with ExitStack() as on_error:
        for codec, choice in choices.items():
            if choice.backend == "reference":
                from pipelines.decode.reference import ReferenceBackend

                backends[codec] = ReferenceBackend(crop_size=crop_size, stats=stats)
            else:
                from pipelines.decode.dali import dali_backend

                backends[codec] = dali_backend(
                    codec,
                    num_frames=num_frames,
                    crop_size=crop_size,
                    views_per_clip=views_per_clip,
                    threads=threads,
                    stats=stats,
                    device=device if choice.backend == "dali-gpu" else None,
                )
            on_error.callback(backends[codec].close)
        on_error.pop_all()
    return RoutedBackend(backends) if len(backends) > 1 else next(iter(backends.values()))


def dali_is_installed() -> bool:
    """Return whether nvidia-dali can be imported here."""
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:
        return False


class RoutedBackend:
    """Renders clips by the backends of their codecs."""

    def __init__(self, backends: Mapping[str, ViewBackend]) -> None:
        """`backends` by codec."""
        self._backends = dict(backends)
        self.name = ", ".join(f"{codec}: {backend.name}" for codec, backend in self._backends.items())

    def render(self, requests: Sequence[RenderRequest]) -> UInt8[Tensor, "views 3 time height width"]:
        """See `ViewBackend.render`."""
        stored = ["mjpeg" if isinstance(one.frames, JpegFrames) else one.frames.codec for one in requests]
        views: dict[int, Tensor] = {}
        for codec, backend in self._backends.items():
            places = [place for place, found in enumerate(stored) if found == codec]
            if places:
                own = [requests[place] for place in places]
                parts = torch.split(backend.render(own), [len(request.boxes) for request in own])
                views |= dict(zip(places, parts, strict=True))
        # Codecs that the device does not decode come from the CPU.
        device = next((part.device for part in views.values() if part.device.type != "cpu"), torch.device("cpu"))
        return torch.cat([views[place].to(device) for place in range(len(requests))])

    def close(self) -> None:
        """Close every backend."""
        for backend in self._backends.values():
            backend.close()


LIBRARY = "libnvcuvid.so.1"
NVCUVID_CODECS = {"h264": 4, "hevc": 8, "vp9": 10, "av1": 11}
"""The library's numbers of codecs."""
_CHROMA_420 = 1
_SUCCESS = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoDecoder:
    """How a device decodes one codec."""

    engines: int
    """Decoders that share the work; 0: an old driver that does not say."""
    least_width: int
    least_height: int
    """Smallest pictures, in pixels: for HEVC and VP9 over a hundred."""
    most_width: int
    most_height: int


@dataclass(frozen=True, kw_only=True, slots=True)
class CudaDecoders:
    """A device, and what it decodes."""

    index: int
    """Its number for CUDA in this process."""
    name: str
    video: Mapping[str, VideoDecoder]
    missing: str = ""
    """Why no codec could be asked for; empty: all were."""

    def refusal(self, codec: str, *, short_side: int | None) -> str | None:
        """Return why pictures of `codec` with that shorter side, in pixels, are not decoded here; None: they are."""
        if codec == "mjpeg":
            return None
        if self.missing:
            return self.missing
        if codec not in self.video:
            return f"{self.name} has no decoder for {codec} of 8 bit 4:2:0"
        decoder = self.video[codec]
        least, most = max(decoder.least_width, decoder.least_height), min(decoder.most_width, decoder.most_height)
        if short_side is not None and not least <= short_side <= most:
            return f"{self.name} decodes {codec} of {least} to {most} pixels per side, the shards have {short_side}"
        return None


class _Caps(ctypes.Structure):
    """CUVIDDECODECAPS of NVIDIA's Video Codec SDK, version 11 on; older ones have zeros for the number of engines."""

    _fields_ = (
        ("codec", ctypes.c_int),
        ("chroma_format", ctypes.c_int),
        ("bit_depth_minus_8", ctypes.c_uint),
        ("reserved_1", ctypes.c_uint * 3),
        ("is_supported", ctypes.c_ubyte),
        ("num_engines", ctypes.c_ubyte),
        ("output_formats", ctypes.c_ushort),
        ("most_width", ctypes.c_uint),
        ("most_height", ctypes.c_uint),
        ("most_macroblocks", ctypes.c_uint),
        ("least_width", ctypes.c_ushort),
        ("least_height", ctypes.c_ushort),
        ("reserved_2", ctypes.c_uint * 11),
    )


AskDriver = Callable[[_Caps], int]
"""Fills in what the structure leaves open; 0: it did."""


def cuda_decoders(device: torch.device | None) -> CudaDecoders | None:
    """Return the decoders of `device`; None where it is no CUDA device that torch can use.

    Makes the device's context, as the training does anyway.
    """
    if device is None or device.type != "cuda" or not torch.cuda.is_available():
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    name = torch.cuda.get_device_name(index)
    try:
        function = ctypes.CDLL(LIBRARY).cuvidGetDecoderCaps
    except OSError as error:
        missing = (
            f"the driver's video library {LIBRARY} cannot be loaded ({error}); in a container ask for it by "
            "NVIDIA_DRIVER_CAPABILITIES=compute,utility,video"
        )
        return CudaDecoders(index=index, name=name, video={}, missing=missing)
    function.restype = ctypes.c_int
    function.argtypes = [ctypes.POINTER(_Caps)]
    with torch.cuda.device(index):
        torch.zeros(1, device=f"cuda:{index}")  # the library asks the current context
        return CudaDecoders(index=index, name=name, video=asked(lambda caps: int(function(ctypes.byref(caps)))))


def asked(ask: AskDriver) -> dict[str, VideoDecoder]:
    """Return every codec that the driver says it decodes."""
    found = {}
    for codec, number in NVCUVID_CODECS.items():
        caps = _Caps(codec=number, chroma_format=_CHROMA_420, bit_depth_minus_8=0)
        if ask(caps) == _SUCCESS and caps.is_supported:
            found[codec] = VideoDecoder(
                engines=caps.num_engines,
                least_width=caps.least_width,
                least_height=caps.least_height,
                most_width=caps.most_width,
                most_height=caps.most_height,
            )
    return found
