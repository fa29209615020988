"""H.264, HEVC and VP9 in MP4: short closed groups of pictures, for decoders that want a video and not single frames.

Every group starts with a key frame at a regular place and needs no other group: no open groups, no scene cuts of the
encoder's choice. No B-frames: frame i is packet i, and decoding order is display order. The bytes depend on the
frames and their times alone: one thread, no look-ahead (libx264 with it gives other bytes now and then), a quality
instead of a bit rate, bitexact encoder, muxer and scaler.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import av
from av.codec.context import Flags

from sharding.codecs import stored_codec
from sharding.encoded_video import ClipFile, EncodedVideo
from sharding.errors import MediaError
from sharding.stored_picture import LIMITED_RANGE, PictureMaker
from sharding.video_cut import TimedFrame

_COLOUR_BT709 = 1  # primaries and transfer, which no conversion here changes; the matrix is LIMITED_RANGE's
_KEY_FRAMES = "keyint={gop}:min-keyint={gop}:scenecut=0:open-gop=0:bframes=0"
_X264 = "threads=1:lookahead-threads=1:sliced-threads=0:sync-lookahead=0:rc-lookahead=0:mbtree=0"
_X265 = "pools=none:frame-threads=1:wpp=0:lookahead-slices=0:rc-lookahead=0:cutree=0:info=0:log-level=none"


@dataclass(frozen=True, kw_only=True, slots=True)
class GopEncoding:
    """How FFmpeg encodes a codec of ours; `{gop}` and `{quality}` in the options are filled in."""

    encoder: str
    options: Mapping[str, str]


GOP_ENCODINGS: dict[str, GopEncoding] = {
    "h264": GopEncoding(
        encoder="libx264",
        options={"preset": "medium", "crf": "{quality}", "x264-params": f"{_KEY_FRAMES}:{_X264}"},
    ),
    "hevc": GopEncoding(
        encoder="libx265",
        options={"preset": "fast", "crf": "{quality}", "x265-params": f"{_KEY_FRAMES}:{_X265}"},
    ),
    "vp9": GopEncoding(
        encoder="libvpx-vp9",
        options={
            "crf": "{quality}",
            "b": "0",
            "g": "{gop}",
            "keyint_min": "{gop}",
            "deadline": "good",
            "cpu-used": "4",
            "row-mt": "0",
            "tile-columns": "0",
            "lag-in-frames": "0",
            "auto-alt-ref": "0",
        },
    ),
}


def _pixels_alone(picture: av.VideoFrame) -> av.VideoFrame:
    """The same pixels without what else a source's frame carries: a picture type would force key frames."""
    alone = av.VideoFrame.from_ndarray(picture.to_ndarray(), format=LIMITED_RANGE.pixel_format)
    alone.color_range, alone.colorspace = LIMITED_RANGE.colour_range, LIMITED_RANGE.colour_space
    return alone


class GopEncoder:
    """`ClipEncoder` of the codecs of GOP_ENCODINGS."""

    def __init__(
        self, codec: str, *, pictures: PictureMaker, quality: int, num_gop_frames: int, ticks_per_second: int
    ) -> None:
        self._codec, self._num_gop_frames = codec, num_gop_frames
        self._options = {
            name: value.format(gop=num_gop_frames, quality=quality)
            for name, value in GOP_ENCODINGS[codec].options.items()
        }
        self._pictures = pictures
        self._file = ClipFile(ticks_per_second)
        self._stream: av.VideoStream | None = None
        self._num_checked = 0

    def add(self, frame: TimedFrame) -> None:
        """Make the frame ready and encode it."""
        picture = _pixels_alone(self._pictures.upright(frame))
        self._file.stamp(picture, frame)
        if self._stream is None:
            self._stream = self._open_stream(picture)
        self._write(self._stream.encode(picture))

    def finish(self) -> EncodedVideo:
        """Close the MP4 and give everything."""
        if self._stream is None:
            raise MediaError("decode_error", "expected at least one frame, found none")
        self._write(self._stream.encode(None))
        return EncodedVideo(
            mp4=self._file.close(),
            width=self._stream.width,
            height=self._stream.height,
            frame_data_offset=0,
            frame_bytes=(),
            frame_ticks=tuple(self._file.ticks),
        )

    def _write(self, packets: "list[av.Packet[av.VideoStream]]") -> None:
        for packet in packets:
            if packet.is_keyframe != (self._num_checked % self._num_gop_frames == 0):
                raise RuntimeError(
                    f"frame {self._num_checked}: expected a key frame every {self._num_gop_frames} frames and nowhere "
                    f"else; this FFmpeg's {GOP_ENCODINGS[self._codec].encoder} cannot be used"
                )
            self._num_checked += 1
        self._file.write(packets)

    def _open_stream(self, picture: av.VideoFrame) -> av.VideoStream:
        least = stored_codec(self._codec).smallest_side
        if min(picture.width, picture.height) < least:
            found = f"{picture.width}x{picture.height}"
            raise MediaError("too_small", f"expected at least {least} pixels a side for {self._codec}, found {found}")
        stream = cast(
            av.VideoStream,
            self._file.container.add_stream(GOP_ENCODINGS[self._codec].encoder, rate=30, options=self._options),
        )
        context = stream.codec_context
        stream.width, stream.height, stream.pix_fmt = picture.width, picture.height, LIMITED_RANGE.pixel_format
        stream.time_base = context.time_base = self._file.time_base
        context.thread_count, context.gop_size, context.max_b_frames = 1, self._num_gop_frames, 0
        context.flags |= Flags.bitexact
        context.color_range, context.colorspace = LIMITED_RANGE.colour_range, LIMITED_RANGE.colour_space
        context.color_primaries = context.color_trc = _COLOUR_BT709
        return stream
