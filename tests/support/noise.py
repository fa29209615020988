"""Frames of noise through the GOP encoders; run as a program it prints the hashes of what comes out."""

import hashlib
import json
from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np

from sharding.format.shard_set import VideoParameters
from sharding.media.codecs import STORED_CODECS
from sharding.media.encode import GOP_ENCODINGS, ClipEncoder
from sharding.media.picture import PictureMaker
from sharding.media.video import TimedFrame

SIZES = ((32, 16, 20), (64, 48, 20), (130, 98, 12))
"""Width, height, frames: encoders that are not deterministic show it on small frames first."""


def noise_frames(width: int, height: int, count: int) -> list[TimedFrame]:
    """Noise that grows brighter by a level a frame; the same at every call."""
    noise = np.random.default_rng(width).integers(0, 60, (count, height, width, 3), np.uint8)
    images = noise + np.arange(count, dtype=np.uint8)[:, None, None, None]
    return [
        TimedFrame(av.VideoFrame.from_ndarray(image, format="rgb24"), Fraction(number, 30), Fraction(1, 30))
        for number, image in enumerate(images)
    ]


def encoded_noise(codec: str, frames: Sequence[TimedFrame], *, quality: int | None = None) -> bytes:
    """The MP4 of the frames; quality None: the codec's default."""
    quality = STORED_CODECS[codec].default_quality if quality is None else quality
    video = VideoParameters(codec=codec, quality=quality, num_gop_frames=8)
    encoder = ClipEncoder(video, PictureMaker(video))
    for frame in frames:
        encoder.add(frame)
    return encoder.finish().mp4


def hashes_of_noise() -> dict[str, str]:
    """A hash a codec over all SIZES."""
    return {
        codec: hashlib.sha256(b"".join(encoded_noise(codec, noise_frames(*size)) for size in SIZES)).hexdigest()
        for codec in GOP_ENCODINGS
    }


if __name__ == "__main__":
    print(json.dumps(hashes_of_noise()))
