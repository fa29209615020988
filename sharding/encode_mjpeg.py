"""MJPEG in MP4: every frame a whole JPEG at a known place.

The bytes depend on the frames alone: one thread, fixed quantiser, bitexact encoder, muxer and scaler.
"""

import av
from av.codec.context import Flags

from sharding.encoded_video import ClipFile, EncodedVideo
from sharding.errors import MediaError
from sharding.stored_picture import FULL_RANGE, PictureMaker
from sharding.video_cut import TimedFrame


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
