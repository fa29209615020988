"""The reference backend, the oracle of the others: Pillow and FFmpeg decode, NumPy resizes (`resizing.resized_crop`).

Of a video member only the groups of pictures that hold wanted frames are decoded, each from its key frame to its last
wanted one; frame i is packet i (`sharding.media.encode`). Colours become RGB as the stream's tags say, by libswscale
with chroma interpolated bilinearly, which on our shards is bit for bit what DALI's CPU decoder does.

RandAugment follows the formulas of augment/rand_augment.py, one operation after the other. Pillow and DALI's CPU
decoder agree bit for bit on the frames of our shards (tests hold them to it).
"""

import io
from collections.abc import Iterator, Sequence
from itertools import pairwise

import av
import numpy as np
import torch
from av.container import InputContainer
from av.video.reformatter import Interpolation, VideoReformatter
from einops import rearrange
from jaxtyping import UInt8
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pipelines.augment.boxes import CropBox
from pipelines.augment.formulas import augmented, erase_in_place
from pipelines.decode.resizing import resized_crop
from pipelines.errors import SampleDamageError
from pipelines.rendering import RenderRequest, VideoMember
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
    chosen = [packets[number] for number in packets_to_decode(wanted, key_frames)]
    for frame in (frame for packet in [*chosen, None] for frame in stream.decode(packet)):
        number = numbers.get(frame.pts, -1)
        if frame.is_corrupt:
            raise ValueError(f"frame {number} is damaged")
        if number in missing:
            missing.remove(number)
            rgb = scaler.reformat(frame, format="rgb24", interpolation=_TO_RGB, threads=1)
            yield number, rgb.to_ndarray().astype(np.uint8, copy=False)
    if missing:
        raise ValueError(f"frames {sorted(missing)} did not come out of the decoder")


class ReferenceBackend:
    """Renders one clip after the other in the calling thread."""

    name = "reference"

    def __init__(self, *, crop_size: int, stats: StatsRecorder) -> None:
        self._crop_size, self._stats = crop_size, stats

    def render(self, requests: Sequence[RenderRequest]) -> UInt8[Tensor, "views 3 time height width"]:
        """See `ViewBackend.render`."""
        views = []
        for request in requests:
            with self._stats.timed("decode_seconds"):
                frames = decode_frames(request)
            with self._stats.timed("augment_seconds"):
                views += [self._view(frames, box, request) for box in request.boxes]
        return torch.stack(views)

    def close(self) -> None:
        """Nothing is held."""

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
    jpegs = request.frames.frames
    decoded = {data: _decode(data, request.where) for data in dict.fromkeys(jpegs)}
    pixels = np.stack([decoded[data] for data in jpegs])
    return torch.from_numpy(rearrange(pixels, "t h w c -> t c h w"))


def _decode(data: bytes, where: str) -> NDArray[np.uint8]:
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise SampleDamageError(
            f"{where}: a frame has the right checksum but cannot be decoded ({error}); convert the set again"
        ) from error
