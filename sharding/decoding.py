"""Decode one stream of an opened source strictly, from its beginning or from a moment on.

Strictly: a damaged packet or frame is an error, never a grey patch.
"""

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, cast

import av
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.video.stream import VideoStream

from sharding.errors import MediaError

_SECONDS_BACK = (0, 2, 8, 32, 128)  # of a seek, from the wanted moment; behind them only the beginning is left
_WRONG_TIMES_AFTER_SEEK = ("mpeg",)  # a program stream dates few of its frames: the others are counted from there
_Frame = av.VideoFrame | av.AudioFrame


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
    """Frames in display order; with `seek`, from a key frame at or before that moment of the container's clock.

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
    if seek is None or container.format.name in _WRONG_TIMES_AFTER_SEEK:
        yield from _decode(container, stream)
        return
    beginning = (stream.start_time or 0) * _time_base(stream)
    for seconds_back in _SECONDS_BACK:
        if seek - seconds_back > beginning:
            _seek(container, stream, seek - seconds_back)
            frames = _decode(container, stream)
            first = _first_after_seek(frames)
            if first is not None and frame_seconds(first) <= seek:
                yield first
                yield from frames
                return
    _seek(container, stream, beginning)
    yield from _decode(container, stream)


def _first_after_seek(frames: Iterator[Any]) -> Any:
    """The first frame, or None where decoding cannot begin here: an open group of pictures, the middle of a packet."""
    try:
        return next(frames, None)
    except MediaError as error:
        if error.reason != "decode_error":
            raise
        return None


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
