"""Frames out of a video member by FFmpeg: the oracle of the other decoders.

Only the groups of pictures that hold wanted frames are decoded, each from its key frame to its last wanted one; frame
i is packet i (`sharding.encode_gop`). Colours become RGB as the stream's tags say, by libswscale with chroma
interpolated bilinearly, which on our shards is bit for bit what DALI's CPU decoder does.
"""

import io
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
from torch import Tensor

from pipelines.errors import SampleDamageError
from pipelines.mp4 import video_facts
from pipelines.rendering import VideoMember
from sharding.codecs import stored_codec

_TO_RGB = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.BITEXACT
_STRICT = {"err_detect": "crccheck+explode"}
_Pixels = NDArray[np.uint8]


def decode_video(member: VideoMember, *, where: str) -> UInt8[Tensor, "time 3 height width"]:
    """RGB pixels of the member's wanted frames in view order; a repeated frame is decoded once.

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
    """Ascending numbers of the packets that give the frames `wanted`: from each one's key frame on.

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
