"""Encode the frames of a clip for training, by the codec's name.

Pixels of every codec: rotation applied, short side at most the wanted one (never enlarged), even sizes, BT.601;
``mjpeg`` in full range, the others in limited range, tagged.
"""

from sharding.codecs import stored_codec
from sharding.encode_gop import GopEncoder
from sharding.encode_mjpeg import MjpegEncoder
from sharding.encoded_video import ClipEncoder


def clip_encoder(
    codec: str, *, short_side: int, quality: int, num_gop_frames: int | None, ticks_per_second: int
) -> ClipEncoder:
    """A new encoder for one clip; `num_gop_frames` is None for a codec whose frames stand alone, and only there.

    Raises:
        UserInputError: an unknown codec.
    """
    if stored_codec(codec).has_frame_ranges or num_gop_frames is None:
        return MjpegEncoder(short_side=short_side, quality=quality, ticks_per_second=ticks_per_second)
    return GopEncoder(
        codec,
        short_side=short_side,
        quality=quality,
        num_gop_frames=num_gop_frames,
        ticks_per_second=ticks_per_second,
    )
