"""The reference backend, the oracle of the others: Pillow and FFmpeg decode, NumPy resizes by a formula written here.

Of a video member only the groups of pictures that hold wanted frames are decoded, each from its key frame to its last
wanted one; frame i is packet i (`sharding.media.encode`). Colours become RGB as the stream's tags say, by libswscale
with chroma interpolated bilinearly, which on our shards is bit for bit what DALI's CPU decoder does.

RandAugment follows the formulas of augment/rand_augment.py, one operation after the other. Pillow and DALI's CPU
decoder agree bit for bit on the frames of our shards (tests hold them to it).

Resizing n source pixels to m: target pixel i has its centre at c = (i + 0.5) * n / m - 0.5 on the source grid. Its
value is the mean of the source pixels j, weighted by max(0, 1 - |j - c| / r) with r = max(1, n / m): bilinear
interpolation when growing, a triangle that covers all of the shrunk area when shrinking. Weights are scaled to sum
1. Beyond its border the crop continues with its last pixel, as in DALI; Pillow and torch leave those weights out, so
where a picture shrinks they differ in the outermost target pixels. Columns first, then rows, in float32; one
rounding, half up, at the end.
"""

import io
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import av
import numpy as np
import torch
from av.container import InputContainer
from av.video.reformatter import Interpolation, VideoReformatter
from av.video.stream import VideoStream
from einops import rearrange
from jaxtyping import UInt8
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pipelines.augment.boxes import CropBox
from pipelines.augment.formulas import augmented, erase_in_place
from pipelines.errors import SampleDamageError
from pipelines.rendering import JpegFrames, RenderRequest, VideoMember
from pipelines.storage.samples import video_facts
from pipelines.threads import StatsRecorder
from sharding.media.codecs import stored_codec

_TO_RGB = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.BITEXACT
_STRICT = {"err_detect": "crccheck+explode"}
_Pixels = NDArray[np.uint8]


def decode_video(member: VideoMember, *, where: str) -> UInt8[Tensor, "time 3 height width"]:
    """Return the RGB pixels of the member's wanted frames in view order; a repeated frame is decoded once.

    Raises:
        SampleDamageError: a frame is not there or does not decode cleanly; `where` names the sample.
    """
    facts = video_facts(member.data, stored_codec(member.codec), where=where)
    wanted = sorted(set(member.frame_indices))
    try:
        with av.open(io.BytesIO(member.data), "r", format="mp4") as container:
            pixels = dict(_wanted_frames(container, wanted))
    except (av.error.FFmpegError, ValueError) as error:
        raise SampleDamageError(
            f"{where}: the {member.codec} video has the right checksum but cannot be decoded ({error}); "
            "convert the set again"
        ) from error
    if sizes := {frame.shape[:2] for frame in pixels.values()} - {(facts.height, facts.width)}:
        raise SampleDamageError(
            f"{where}: expected frames of {facts.height} x {facts.width} in the {member.codec} video, found "
            f"{sorted(sizes)}; convert the set again"
        )
    clip = np.stack([pixels[index] for index in member.frame_indices])
    return torch.from_numpy(rearrange(clip, "t h w c -> t c h w"))


def packets_to_decode(wanted: Sequence[int], key_frames: Sequence[int]) -> list[int]:
    """Return the ascending numbers of the packets that give the frames `wanted`: from each one's key frame on.

    Both arguments ascend, and the first frame is a key frame.
    """
    needed: list[int] = []
    for first, behind in pairwise([*key_frames, max([*wanted, *key_frames], default=0) + 1]):
        inside = [index for index in wanted if first <= index < behind]
        needed += range(first, inside[-1] + 1) if inside else ()
    return needed


def _wanted_frames(container: InputContainer, wanted: Sequence[int]) -> Iterator[tuple[int, _Pixels]]:
    stream = container.streams.video[0]
    stream.codec_context.thread_count = 1
    stream.codec_context.options = dict(_STRICT)
    packets = [packet for packet in container.demux(stream) if packet.size]
    if wanted[-1] >= len(packets):
        raise ValueError(f"expected frame {wanted[-1]}, found {len(packets)} frames")
    numbers = {packet.pts: number for number, packet in enumerate(packets)}
    key_frames = [number for number, packet in enumerate(packets) if packet.is_keyframe]
    missing, scaler = set(wanted), VideoReformatter()
    for frame in _decoded(stream, [packets[number] for number in packets_to_decode(wanted, key_frames)]):
        number = numbers.get(frame.pts, -1)
        if frame.is_corrupt:
            raise ValueError(f"frame {number} is damaged")
        if number in missing:
            missing.remove(number)
            rgb = scaler.reformat(frame, format="rgb24", interpolation=_TO_RGB, threads=1)
            yield number, rgb.to_ndarray().astype(np.uint8, copy=False)
    if missing:
        raise ValueError(f"frames {sorted(missing)} did not come out of the decoder")


def _decoded(stream: VideoStream, packets: Sequence[Any]) -> Iterator[av.VideoFrame]:
    for packet in packets:
        yield from stream.decode(packet)
    yield from stream.decode(None)


class ReferenceBackend:
    """Renders one clip after the other in the calling thread."""

    name = "reference"

    def __init__(self, *, crop_size: int, stats: StatsRecorder) -> None:
        self._crop_size, self._stats = crop_size, stats

    def render(self, requests: Sequence[RenderRequest]) -> UInt8[Tensor, "views 3 time height width"]:
        """See `ViewBackend.render`."""
        return torch.stack([view for request in requests for view in self._views(request)])

    def close(self) -> None:
        """Nothing is held."""

    def _views(self, request: RenderRequest) -> list[UInt8[Tensor, "3 time height width"]]:
        with self._stats.timed("decode_seconds"):
            frames = decode_frames(request)
        with self._stats.timed("augment_seconds"):
            return [self._view(frames, box, request) for box in request.boxes]

    def _view(
        self, frames: UInt8[Tensor, "time 3 height width"], box: CropBox, request: RenderRequest
    ) -> UInt8[Tensor, "3 time size size"]:
        view = rearrange(resized_crop(frames, box, size=self._crop_size), "t c h w -> c t h w")
        view = (view.flip(-1) if request.flip else view).contiguous()
        if request.augment is not None:
            view = augmented(view, request.augment)
        erase_in_place(view, request.erased)
        return view


def decode_frames(request: RenderRequest) -> UInt8[Tensor, "time 3 height width"]:
    """Return the RGB pixels of a clip's frames; a repeated frame is decoded once.

    Raises:
        SampleDamageError: a frame cannot be decoded.
    """
    if isinstance(request.frames, VideoMember):
        return decode_video(request.frames, where=request.where)
    return _decode_jpegs(request.frames, request.where)


def _decode_jpegs(jpegs: JpegFrames, where: str) -> UInt8[Tensor, "time 3 height width"]:
    decoded = {data: _decode(data, where) for data in dict.fromkeys(jpegs.frames)}
    pixels = np.stack([decoded[data] for data in jpegs.frames])
    return torch.from_numpy(rearrange(pixels, "t h w c -> t c h w"))


def _decode(data: bytes, where: str) -> NDArray[np.uint8]:
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise SampleDamageError(
            f"{where}: a frame has the right checksum but cannot be decoded ({error}); convert the set again"
        ) from error


def resized_crop(
    frames: UInt8[Tensor, "time 3 height width"], box: CropBox, *, size: int
) -> UInt8[Tensor, "time 3 size size"]:
    """Return the pixels of `box` resized to `size` x `size` by the module's formula."""
    crop = frames[..., box.top : box.top + box.height, box.left : box.left + box.width].numpy()
    # Frames and colours last: every tap then copies whole runs of memory.
    planes = rearrange(crop, "t c h w -> h w (t c)").astype(np.float32)
    resized = _resize(_resize(planes, axis=1, size=size), axis=0, size=size)
    return torch.from_numpy(rearrange(_rounded(resized), "h w (t c) -> t c h w", c=3))


def first_row_resized(
    frames: Sequence[UInt8[np.ndarray, "height width 3"]], *, size: int
) -> UInt8[np.ndarray, "3 time size"]:
    """Return the first row of the frames resized to `size` x `size`."""
    taps, weights = triangle_taps(len(frames[0]), size)
    rows = np.stack([frame[taps[:, 0]] for frame in frames], axis=1).astype(np.float32)
    row = rearrange(np.tensordot(weights[:, 0], rows, axes=1), "t w c -> 1 w (t c)")
    return rearrange(_rounded(_resize(row, axis=1, size=size)), "1 w (t c) -> c t w", c=3)


def _rounded(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    pixels: NDArray[np.uint8] = np.floor(values + np.float32(0.5)).clip(0, 255).astype(np.uint8)
    return pixels


def _resize(planes: NDArray[np.float32], *, axis: int, size: int) -> NDArray[np.float32]:
    taps, weights = triangle_taps(planes.shape[axis], size)
    along = (1, size, 1) if axis else (size, 1, 1)
    total = np.zeros((), dtype=np.float32)
    for tap, weight in zip(taps, weights, strict=True):
        total = total + np.take(planes, tap, axis=axis) * weight.reshape(along)
    return total


def triangle_taps(num_source: int, num_target: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the source pixels that each target pixel reads, and their weights, both [taps, target].

    Added tap by tap, so a value never depends on the number of threads or on the shape of the batch.
    """
    scale = num_source / num_target
    radius = max(1.0, scale)
    centre = (np.arange(num_target) + 0.5) * scale - 0.5
    taps = np.ceil(centre - radius) + np.arange(math.floor(2 * radius) + 1)[:, None]
    weights = np.maximum(1 - np.abs(taps - centre) / radius, 0)
    weights /= weights.sum(axis=0)
    return taps.clip(0, num_source - 1).astype(np.int64), weights.astype(np.float32)
