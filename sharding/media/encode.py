"""Encode the frames of a clip as it is stored: single JPEG frames, or short groups of pictures.

What every encoder of clips gives, and the MP4 file that all of them write.

MJPEG in MP4: every frame a whole JPEG at a known place.

The bytes depend on the frames alone: one thread, fixed quantiser, bitexact encoder, muxer and scaler.

H.264, HEVC and VP9 in MP4: short closed groups of pictures, for decoders that want a video and not single frames.

Every group starts with a key frame at a regular place and needs no other group: no open groups, no scene cuts of the
encoder's choice. No B-frames: frame i is packet i, and decoding order is display order. The bytes depend on the
frames and their times alone: one thread, no look-ahead (libx264 with it gives other bytes now and then), a quality
instead of a bit rate, bitexact encoder, muxer and scaler.

Encode the frames of a clip for training, by the codec's name.

What the pixels are is said in `sharding.media.picture`: ``mjpeg`` in full range, the others in limited range, tagged.
"""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol, cast

import av
from av.codec.context import Flags

from sharding.errors import MediaError
from sharding.media.codecs import stored_codec
from sharding.media.picture import FULL_RANGE, LIMITED_RANGE, PictureMaker
from sharding.media.video import TimedFrame


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedVideo:
    """A clip as it is stored, with the place of every frame inside it."""

    mp4: bytes
    width: int
    height: int
    frame_data_offset: int
    """Where the first frame's bytes start, the others following without a gap; 0 where frames have no bytes of their
    own."""
    frame_bytes: tuple[int, ...]
    """Bytes of every frame; empty where frames depend on others."""
    frame_ticks: tuple[int, ...]
    """Presentation times in ticks from the segment's start; increasing, >= 0."""


class ClipEncoder(Protocol):
    """Takes a clip's frames in order and gives its stored form."""

    def add(self, frame: TimedFrame) -> None:
        """Encode one more frame."""

    def finish(self) -> EncodedVideo:
        """Close the file and give its bytes; no more frames after this."""


class ClipFile:
    """The MP4 of one clip in memory: times exact to the tick, the same packets give the same bytes."""

    def __init__(self, ticks_per_second: int) -> None:
        ticks = str(ticks_per_second)  # of the movie too: a first frame behind the start is kept to the tick
        options = {"fflags": "+bitexact", "movie_timescale": ticks, "video_track_timescale": ticks}
        self.time_base = Fraction(1, ticks_per_second)
        self.ticks: list[int] = []
        """Times of the frames that `stamp` has seen."""
        self.packets: list[bytes] = []
        """Contents of the packets written."""
        self._ticks_per_second = ticks_per_second
        self._durations: list[int] = []
        self._sink = io.BytesIO()
        self.container = av.open(self._sink, "w", format="mp4", options=options)

    def stamp(self, picture: av.VideoFrame, frame: TimedFrame) -> None:
        """Give the picture its frame's time.

        Raises:
            MediaError: ``bad_timestamps`` when it is not behind the last one's.
        """
        tick = round(frame.seconds * self._ticks_per_second)
        if self.ticks and tick <= self.ticks[-1]:
            raise MediaError("bad_timestamps", f"expected frames at least a tick apart, found two at {tick}")
        picture.pts, picture.time_base = tick, self.time_base
        self.ticks.append(tick)
        self._durations.append(max(1, round(frame.duration * self._ticks_per_second)))

    def write(self, packets: "list[av.Packet[av.VideoStream]]") -> None:
        """Write packets in the order of the frames; frame i must be packet i."""
        for packet in packets:
            number = len(self.packets)
            if packet.pts != packet.dts or packet.pts != self.ticks[number]:
                raise RuntimeError(f"packet {number} is not frame {number}; this FFmpeg cannot be used")
            packet.duration = self._durations[number]
            self.packets.append(bytes(packet))
            self.container.mux(packet)

    def close(self) -> bytes:
        """The finished file.

        Raises:
            MediaError: ``decode_error`` when there was no frame.
        """
        if not self.ticks:
            raise MediaError("decode_error", "expected at least one frame, found none")
        if len(self.packets) != len(self.ticks):
            raise RuntimeError("the encoder did not give one packet a frame; this FFmpeg cannot be used")
        self.container.close()
        return self._sink.getvalue()


class MjpegEncoder:
    """`ClipEncoder` of codec ``mjpeg``."""

    def __init__(self, *, pictures: PictureMaker, quality: int, ticks_per_second: int) -> None:
        self._pictures = pictures
        self._options = {"qmin": str(quality), "qmax": str(quality)}
        self._file = ClipFile(ticks_per_second)
        self._stream: av.VideoStream | None = None

    def add(self, frame: TimedFrame) -> None:
        """Make the frame ready and encode it."""
        picture = self._pictures.upright(frame)
        self._file.stamp(picture, frame)
        if self._stream is None:
            self._stream = self._open_stream(picture)
        self._file.write(self._stream.encode(picture))

    def finish(self) -> EncodedVideo:
        """Close the MP4, check that its frames lie together, and give everything."""
        if self._stream is None:
            raise MediaError("decode_error", "expected at least one frame, found none")
        self._file.write(self._stream.encode(None))
        mp4, packets = self._file.close(), self._file.packets
        offset, frames = mp4.find(packets[0]), b"".join(packets)
        if mp4[offset : offset + len(frames)] != frames:
            raise RuntimeError("the muxer did not write the frames' packets together; this FFmpeg cannot be used")
        return EncodedVideo(
            mp4=mp4,
            width=self._stream.width,
            height=self._stream.height,
            frame_data_offset=offset,
            frame_bytes=tuple(len(packet) for packet in packets),
            frame_ticks=tuple(self._file.ticks),
        )

    def _open_stream(self, picture: av.VideoFrame) -> av.VideoStream:
        stream = self._file.container.add_stream("mjpeg", rate=30, options=self._options)
        stream.width, stream.height, stream.pix_fmt = picture.width, picture.height, FULL_RANGE.pixel_format
        stream.time_base = stream.codec_context.time_base = self._file.time_base
        stream.codec_context.thread_count = 1
        stream.codec_context.flags |= Flags.bitexact
        stream.codec_context.color_range = FULL_RANGE.colour_range
        stream.codec_context.colorspace = FULL_RANGE.colour_space
        return stream


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
