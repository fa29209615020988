"""Encode the frames of a clip for training: MJPEG in MP4, every frame a whole JPEG at a known place.

Pixels: rotation applied, short side at most the wanted one (never enlarged), even sizes, yuvj420p, full range, BT.601.
The bytes depend on the frames alone: one thread, fixed quantiser, bitexact encoder, muxer and scaler.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import av
import numpy as np
from av.codec.context import Flags
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

from ca2st.errors import UserInputError, did_you_mean
from sharding.errors import MediaError
from sharding.video_cut import TimedFrame

_PIXEL_FORMAT = "yuvj420p"
_SCALER = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedVideo:
    """A clip as it is stored, with the place of every frame inside it."""

    mp4: bytes
    width: int
    height: int
    frame_data_offset: int
    """Where the first frame's bytes start; the others follow without a gap."""
    frame_bytes: tuple[int, ...]
    frame_ticks: tuple[int, ...]
    """Presentation times in ticks from the segment's start; increasing, >= 0."""


class ClipEncoder(Protocol):
    """Takes a clip's frames in order and gives its stored form."""

    def add(self, frame: TimedFrame) -> None:
        """Encode one more frame."""

    def finish(self) -> EncodedVideo:
        """Close the file and give its bytes; no more frames after this."""


def output_size(width: int, height: int, short_side: int) -> tuple[int, int]:
    """Even width and height with the shorter at most `short_side` and the source's shape."""
    scale = min(Fraction(1), Fraction(short_side, min(width, height)))
    return _even(width * scale), _even(height * scale)


def _even(pixels: Fraction) -> int:
    return max(2, 2 * round(pixels / 2) if pixels.denominator > 1 else int(pixels) // 2 * 2)


class MjpegEncoder:
    """`ClipEncoder` of codec ``mjpeg``."""

    def __init__(self, *, short_side: int, quality: int, ticks_per_second: int) -> None:
        self._short_side, self._ticks_per_second = short_side, ticks_per_second
        self._time_base = Fraction(1, ticks_per_second)
        self._options = {"qmin": str(quality), "qmax": str(quality)}
        self._scaler = VideoReformatter()
        self._sink = io.BytesIO()
        self._container = av.open(self._sink, "w", format="mp4", options=self._muxer_options())
        self._stream: av.VideoStream | None = None
        self._size = (0, 0)
        self._packets: list[bytes] = []
        self._ticks: list[int] = []

    def _muxer_options(self) -> dict[str, str]:
        ticks = str(self._ticks_per_second)  # of the movie too: a first frame behind the start is kept to the tick
        return {"fflags": "+bitexact", "movie_timescale": ticks, "video_track_timescale": ticks}

    def add(self, frame: TimedFrame) -> None:
        """Rotate, scale and encode one frame."""
        picture = self._upright(frame.picture)
        tick = round(frame.seconds * self._ticks_per_second)
        if self._ticks and tick <= self._ticks[-1]:
            raise MediaError("bad_timestamps", f"expected frames at least a tick apart, found two at {tick}")
        picture.pts, picture.time_base = tick, self._time_base
        self._ticks.append(tick)
        if self._stream is None:
            self._stream = self._open_stream(picture)
        self._mux(self._stream.encode(picture), max(1, round(frame.duration * self._ticks_per_second)))

    def finish(self) -> EncodedVideo:
        """Close the MP4, check that its frames lie together, and give everything."""
        if self._stream is None:
            raise MediaError("decode_error", "expected at least one frame, found none")
        self._mux(self._stream.encode(None), 1)
        self._container.close()
        mp4 = self._sink.getvalue()
        offset = mp4.find(self._packets[0])
        frames = b"".join(self._packets)
        if len(self._packets) != len(self._ticks) or mp4[offset : offset + len(frames)] != frames:
            raise RuntimeError("the muxer did not write one contiguous packet a frame; this FFmpeg cannot be used")
        return EncodedVideo(
            mp4=mp4,
            width=self._stream.width,
            height=self._stream.height,
            frame_data_offset=offset,
            frame_bytes=tuple(len(packet) for packet in self._packets),
            frame_ticks=tuple(self._ticks),
        )

    def _mux(self, packets: "list[av.Packet[av.VideoStream]]", duration: int) -> None:
        for packet in packets:
            packet.duration = duration
            self._packets.append(bytes(packet))
            self._container.mux(packet)

    def _upright(self, picture: av.VideoFrame) -> av.VideoFrame:
        turns = round(picture.rotation / 90) % 4
        if self._size == (0, 0):
            self._size = output_size(picture.width, picture.height, self._short_side)
        try:
            scaled = self._scaler.reformat(
                picture,
                *self._size,
                format=_PIXEL_FORMAT,
                dst_colorspace=Colorspace.ITU601,
                dst_color_range=ColorRange.JPEG,
                interpolation=_SCALER,
                threads=1,
            )
        except ValueError as error:
            raise MediaError(
                "decode_error", f"pixel format {picture.format.name}: cannot be converted ({error})"
            ) from error
        return _rotated(scaled, turns) if turns else scaled

    def _open_stream(self, picture: av.VideoFrame) -> av.VideoStream:
        stream = self._container.add_stream("mjpeg", rate=30, options=self._options)
        stream.width, stream.height, stream.pix_fmt = picture.width, picture.height, _PIXEL_FORMAT
        stream.time_base = stream.codec_context.time_base = self._time_base
        stream.codec_context.thread_count = 1
        stream.codec_context.flags |= Flags.bitexact
        stream.codec_context.color_range, stream.codec_context.colorspace = ColorRange.JPEG, Colorspace.ITU601
        return stream


def _rotated(picture: av.VideoFrame, turns: int) -> av.VideoFrame:
    """The planes of a yuvj420p frame turned counter-clockwise by `turns` quarters."""
    width, height = picture.width, picture.height
    flat = picture.to_ndarray().reshape(-1)
    luma, chroma = width * height, width * height // 4
    shapes = (
        (0, luma, height, width),
        (luma, chroma, height // 2, width // 2),
        (luma + chroma, chroma, height // 2, width // 2),
    )
    planes = [np.rot90(flat[at : at + size].reshape(rows, columns), turns) for at, size, rows, columns in shapes]
    rows, columns = planes[0].shape
    data = np.concatenate([plane.reshape(-1) for plane in planes]).reshape(rows * 3 // 2, columns)
    turned = av.VideoFrame.from_ndarray(data, format=_PIXEL_FORMAT)
    turned.color_range, turned.colorspace = ColorRange.JPEG, Colorspace.ITU601
    return turned


CODECS: dict[str, Callable[..., ClipEncoder]] = {"mjpeg": MjpegEncoder}
"""Encoders by ``--codec``; each takes short_side, quality, ticks_per_second."""


def check_codec(name: str) -> None:
    """Raise UserInputError with the known codecs unless `name` is one of CODECS."""
    if name not in CODECS:
        known = ", ".join(CODECS)
        raise UserInputError(f"codec {name!r}: expected one of {known}{did_you_mean(name, list(CODECS))}")
