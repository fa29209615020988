"""What the decoders of a CUDA device can do, asked of the driver and not read from a table.

The driver's video library (libnvcuvid) answers for a codec, chroma format and bit depth whether the device decodes
it, on how many engines, and from which size on. Ours are 8 bit, 4:2:0 (`sharding.codecs`). JPEG frames need no engine:
nvJPEG decodes them on the CUDA cores where there is none.
"""

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

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
    """Its name."""
    video: Mapping[str, VideoDecoder]
    """By codec."""
    missing: str = ""
    """Why no codec could be asked for; empty: all were."""

    def refusal(self, codec: str, *, short_side: int | None) -> str | None:
        """Why pictures of `codec` whose shorter side has `short_side` pixels are not decoded here; None: they are."""
        if codec == "mjpeg":
            return None
        if self.missing:
            return self.missing
        if codec not in self.video:
            return f"{self.name} has no decoder for {codec} of 8 bit 4:2:0"
        decoder = self.video[codec]
        least, most = max(decoder.least_width, decoder.least_height), min(decoder.most_width, decoder.most_height)
        if short_side is not None and not least <= short_side <= most:
            return f"{self.name} decodes {codec} of {least} to {most} pixels a side, the shards have {short_side}"
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
    """The decoders of `device`; None where it is no CUDA device that torch can use.

    Makes the device's context, as the training does anyway.
    """
    if device is None or device.type != "cuda" or not torch.cuda.is_available():
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    name = torch.cuda.get_device_name(index)
    try:
        ask = _driver()
    except OSError as error:
        missing = (
            f"the driver's video library {LIBRARY} cannot be loaded ({error}); in a container ask for it by "
            "NVIDIA_DRIVER_CAPABILITIES=compute,utility,video"
        )
        return CudaDecoders(index=index, name=name, video={}, missing=missing)
    with torch.cuda.device(index):
        torch.zeros(1, device=f"cuda:{index}")  # the library asks the current context
        return CudaDecoders(index=index, name=name, video=asked(ask))


def asked(ask: AskDriver) -> dict[str, VideoDecoder]:
    """Every codec that the driver says it decodes."""
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


def _driver() -> AskDriver:
    function = ctypes.CDLL(LIBRARY).cuvidGetDecoderCaps
    function.restype = ctypes.c_int
    function.argtypes = [ctypes.POINTER(_Caps)]

    def ask(caps: _Caps) -> int:
        return int(function(ctypes.byref(caps)))

    return ask
