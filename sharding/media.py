"""Open and probe one source video with PyAV, and decode its streams strictly.

Strictly: a damaged packet or frame is an error, never a grey patch. Only the containers of FORMATS are opened, from
plain files, so a playlist or a text file cannot lead the decoder anywhere else.
"""

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import av
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream

from ca2st.errors import UserInputError
from sharding.errors import MediaError

FORMATS = ("mov", "matroska", "webm", "avi", "mpegts", "mpeg", "flv", "ogg", "asf")
"""Demuxers that may read a source."""
REASONS = {
    "missing_file": "the file does not exist or cannot be read",
    "empty_file": "the file has no bytes",
    "not_a_video": "no known video container",
    "no_index": "an MP4 without its moov box",
    "no_video_stream": "a container without a video stream",
    "truncated": "the container claims more than the file holds",
    "decode_error": "a packet or frame that does not decode cleanly",
    "bad_timestamps": "frame times that are missing or do not increase",
    "no_audio": "no sound in the segment while --audio is required",
    "bad_spectrogram": "a spectrogram with NaN, infinity or one value everywhere",
    "too_large": "a limit on bytes, duration, frames or pixels",
    "segment_outside": "the annotated segment lies behind the end of the media",
    "source_changed": "the file changed while it was read",
    "timeout": "decoding took longer than the clip timeout",
    "decoder_crash": "the decoding process died",
    "out_of_memory": "decoding needed more memory than the limit",
    "internal_error": "a fault of this program on this file; please report it",
}
"""Every reason a source can be rejected for, with its meaning."""
_Frame = av.VideoFrame | av.AudioFrame
_STRICT = {"err_detect": "crccheck+explode"}


@dataclass(frozen=True, kw_only=True, slots=True)
class MediaLimits:
    """What one source may cost; more is a ``too_large`` reject. Guards against decompression bombs."""

    max_file_bytes: int = 256 * 2**30
    """Bytes of the file; generous, since hours of video are cut by time."""
    max_duration_seconds: float = 600.0
    """Seconds of a segment; the longest clips of the supported datasets take minutes."""
    max_frames: int = 36_000
    """Frames kept of a segment: ten minutes at 60 fps."""
    max_frame_pixels: int = 8192 * 4320
    """Width x height of a source frame: 8K."""
    max_decoded_pixels: int = 300_000_000_000
    """Width x height summed over the decoded frames: ten minutes of 4K at 60 fps."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if getattr(self, name) <= 0:
                raise UserInputError(f"MediaLimits.{name}: expected a positive number, found {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceState:
    """Size and modification time of a source, to notice a change while it is read."""

    num_bytes: int
    modified_ns: int


def source_state(path: Path) -> SourceState:
    """Look at the file.

    Raises:
        MediaError: ``missing_file``.
    """
    try:
        found = path.stat()
        readable = os.access(path, os.R_OK) and path.is_file()
    except OSError as error:
        raise MediaError("missing_file", f"expected a readable file, found: {error.strerror}") from error
    if not readable:
        raise MediaError("missing_file", "expected a readable file, found a folder or one without read permission")
    return SourceState(num_bytes=found.st_size, modified_ns=found.st_mtime_ns)


def check_unchanged(path: Path, before: SourceState) -> None:
    """Raise MediaError ``source_changed`` unless the file is as it was."""
    try:
        same = source_state(path) == before
    except MediaError:
        same = False
    if not same:
        raise MediaError(
            "source_changed", "expected the same size and time as before reading, found others; convert again"
        )


@contextlib.contextmanager
def open_media(path: Path) -> Iterator[InputContainer]:
    """The opened container of a local file.

    Raises:
        MediaError: ``not_a_video`` when no allowed demuxer takes it.
    """
    options = {"format_whitelist": _whitelist(), "protocol_whitelist": "file"}
    try:
        container = av.open(f"file:{path}", "r", options=options)
    except av.error.MemoryError:
        raise
    except av.error.FFmpegError as error:
        raise MediaError("not_a_video", f"expected one of {', '.join(FORMATS)}, found: {error.strerror}") from error
    with container:
        yield container


def _whitelist() -> str:
    # FFmpeg compares a demuxer's whole name ("matroska,webm"), and each of its aliases, with these entries.
    return ",".join((*FORMATS, "mp4", "m4a", "3gp", "3g2", "mj2"))


def video_stream(container: InputContainer, limits: MediaLimits) -> VideoStream:
    """The first video stream that is no cover picture, set up for strict decoding on one thread.

    Raises:
        MediaError: ``no_video_stream``; ``too_large`` by its frame size.
    """
    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:
            pixels = stream.width * stream.height
            if pixels > limits.max_frame_pixels:
                found = f"{stream.width}x{stream.height}"
                raise MediaError(
                    "too_large", f"expected at most {limits.max_frame_pixels} pixels a frame, found {found}"
                )
            _be_strict(stream)
            return stream
    raise MediaError("no_video_stream", f"expected a video stream, found {len(container.streams)} streams without one")


def audio_stream(container: InputContainer) -> AudioStream | None:
    """The first audio stream, set up for strict decoding, or None."""
    if not container.streams.audio:
        return None
    stream = container.streams.audio[0]
    _be_strict(stream)
    return stream


def _be_strict(stream: VideoStream | AudioStream) -> None:
    stream.codec_context.thread_count = 1
    stream.codec_context.options = dict(_STRICT)


def frame_seconds(frame: _Frame) -> Fraction:
    """Presentation time of a frame on the container's clock.

    Raises:
        MediaError: ``bad_timestamps`` when it has none.
    """
    moment = frame.pts if frame.pts is not None else frame.dts
    if moment is None or frame.time_base is None:
        raise MediaError("bad_timestamps", "expected a presentation time on every frame, found one without")
    return moment * frame.time_base


def video_frames(
    container: InputContainer, stream: VideoStream, *, seek: Fraction | None = None
) -> Iterator[av.VideoFrame]:
    """Frames in display order; with `seek`, from the key frame at or before that moment of the container's clock.

    Raises:
        MediaError: ``decode_error`` at the first packet or frame that is damaged.
    """
    yield from _frames(container, stream, seek)


def audio_frames(
    container: InputContainer, stream: AudioStream, *, seek: Fraction | None = None
) -> Iterator[av.AudioFrame]:
    """As `video_frames`, for sound."""
    yield from _frames(container, stream, seek)


def _frames(container: InputContainer, stream: VideoStream | AudioStream, seek: Fraction | None) -> Iterator[Any]:
    if seek is None:
        yield from _decode(container, stream)
        return
    _seek(container, stream, seek)
    frames = _decode(container, stream)
    first = next(frames, None)
    if first is not None and frame_seconds(first) <= seek:
        yield first
    else:  # an index that points behind the moment: count from the beginning instead
        _seek(container, stream, (stream.start_time or 0) * _time_base(stream))
        frames = _decode(container, stream)
    yield from frames


def _seek(container: InputContainer, stream: VideoStream | AudioStream, moment: Fraction) -> None:
    try:
        container.seek(math.floor(moment / _time_base(stream)), stream=stream)
    except av.error.MemoryError:
        raise
    except av.error.FFmpegError as error:
        raise _decode_error(stream, error, moment) from error


def _time_base(stream: VideoStream | AudioStream) -> Fraction:
    if stream.time_base is None:
        raise MediaError("bad_timestamps", f"expected a time base on the {stream.type} stream, found none")
    return stream.time_base


def _decode(container: InputContainer, stream: VideoStream | AudioStream) -> Iterator[Any]:
    moment: Fraction | None = None
    try:
        for packet in container.demux(stream):
            if packet.is_corrupt:
                raise MediaError("decode_error", f"expected whole packets, found a cut one in the {stream.type} stream")
            for frame in cast(list[_Frame], packet.decode()):
                moment = frame_seconds(frame)
                if frame.is_corrupt:
                    raise MediaError(
                        "decode_error", f"expected a clean {stream.type} frame, found damage at {_at(moment)}"
                    )
                yield frame
    except av.error.MemoryError:
        raise
    except av.error.FFmpegError as error:
        raise _decode_error(stream, error, moment) from error


def _decode_error(
    stream: VideoStream | AudioStream, error: av.error.FFmpegError, moment: Fraction | None
) -> MediaError:
    return MediaError("decode_error", f"{stream.type} stream after {_at(moment)}: {error.strerror}")


def _at(moment: Fraction | None) -> str:
    return "its start" if moment is None else f"{float(moment):.3f} s"
