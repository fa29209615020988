"""Encode the frames of a clip for training, by the codec's name.

What the pixels are is said in `sharding.stored_picture`: ``mjpeg`` in full range, the others in limited range, tagged.
"""

from sharding.codecs import stored_codec
from sharding.encode_gop import GopEncoder
from sharding.encode_mjpeg import MjpegEncoder
from sharding.encoded_video import ClipEncoder
from sharding.stored_picture import PictureMaker


def clip_encoder(
    codec: str, *, pictures: PictureMaker, quality: int, num_gop_frames: int | None, ticks_per_second: int
) -> ClipEncoder:
    """A new encoder for one clip, whose frames `pictures` makes ready for this codec.

    `num_gop_frames` is None for a codec whose frames stand alone, and only there.

    Raises:
        UserInputError: an unknown codec.
    """
    if stored_codec(codec).has_frame_ranges or num_gop_frames is None:
        return MjpegEncoder(pictures=pictures, quality=quality, ticks_per_second=ticks_per_second)
    return GopEncoder(
        codec,
        pictures=pictures,
        quality=quality,
        num_gop_frames=num_gop_frames,
        ticks_per_second=ticks_per_second,
    )
