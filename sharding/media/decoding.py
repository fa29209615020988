"""Decode one stream of an opened source strictly, from its beginning or from a moment on.

Strictly: a damaged packet or frame is an error, never a grey patch.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, cast

import av
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.video.stream import VideoStream

from sharding.errors import MediaError

_SECONDS_BACK = (0, 2, 8, 32, 128)  # of a seek, from the wanted moment; behind them only the beginning is left
_WRONG_TIMES_AFTER_SEEK = ("mpeg",)  # a program stream dates few of its frames: the others are counted from there
_WRAP_SECONDS = 2**33 / 90_000
_BEGIN_ANYWHERE = ("mpegts", "mpeg", "flv", "matroska,webm")  # broadcast and live formats; their key flags are right
_WITHOUT_PRESENTATION_TIMES = ("avi",)  # it stores none; FFmpeg 8 makes up some that are wrong with B-frames
_Frame = av.VideoFrame | av.AudioFrame


@dataclass(slots=True)
class LeadIn:
    """What was left out in front of the first key frame of a file that begins inside a group of pictures."""

    num_packets: int = 0


def frame_seconds(frame: _Frame) -> Fraction:
    """Presentation time of a frame on the container's clock.

    Raises:
        MediaError: ``bad_timestamps`` when it has none.
    """
    ticks, time_base = _moment(frame)
    return ticks * time_base


def _moment(frame: _Frame) -> tuple[int, Fraction]:
    """Its ticks and their length: a product of fractions for every frame would cost more than it tells."""
    ticks, time_base = frame.pts, frame.time_base
    if ticks is None:
        ticks = frame.dts
    if ticks is None or time_base is None:
        raise MediaError("bad_timestamps", "expected a presentation time on every frame, found one without")
    return ticks, time_base


def video_frames(
    container: InputContainer, stream: VideoStream, *, seek: Fraction | None = None, lead_in: LeadIn | None = None
) -> Iterator[av.VideoFrame]:
    """Frames in display order; with `seek`, from a key frame at or before that moment of the container's clock.

    Their `pts` are FFmpeg's best-effort times. Packets in front of the first key frame are left out and counted in
    `lead_in`.

    Raises:
        MediaError: ``decode_error`` at the first packet or frame that is damaged, ``encrypted`` at one under DRM.
    """
    yield from _frames(container, stream, seek, lead_in or LeadIn())


def audio_frames(
    container: InputContainer, stream: AudioStream, *, seek: Fraction | None = None
) -> Iterator[av.AudioFrame]:
    """As `video_frames`, for sound."""
    yield from _frames(container, stream, seek, LeadIn())


def _frames(
    container: InputContainer, stream: VideoStream | AudioStream, seek: Fraction | None, lead_in: LeadIn
) -> Iterator[Any]:
    if seek is None or not can_seek(container, stream):
        yield from _decode(container, stream, lead_in)
        return
    beginning = (stream.start_time or 0) * _time_base(stream)
    for seconds_back in _SECONDS_BACK:
        if seek - seconds_back > beginning:
            _seek(container, stream, seek - seconds_back)
            frames = _decode(container, stream, LeadIn(), is_sought=True)
            first = _first_after_seek(frames)
            if first is not None and frame_seconds(first) <= seek:
                yield first
                yield from frames
                return
    _seek(container, stream, beginning)
    yield from _decode(container, stream, lead_in)


def can_seek(container: InputContainer, stream: VideoStream | AudioStream) -> bool:
    """Whether frames have right times behind a seek.

    Not in a program stream, nor where a transport stream's clock of 33 bits starts over: what lies behind is missed.
    """
    start, length = (float((ticks or 0) * _time_base(stream)) for ticks in (stream.start_time, stream.duration))
    starts_over = container.format.name == "mpegts" and (start < 0 or start + length >= _WRAP_SECONDS)
    return not starts_over and container.format.name not in _WRONG_TIMES_AFTER_SEEK


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


def _decode(
    container: InputContainer, stream: VideoStream | AudioStream, lead_in: LeadIn, *, is_sought: bool = False
) -> Iterator[Any]:
    last: tuple[int, Fraction] | None = None
    nothing_left_out = LeadIn()
    times = _BestTimes(container, stream) if isinstance(stream, VideoStream) else _SoundTimes()
    if isinstance(times, _SoundTimes) and stream.start_time is not None and not is_sought:
        times.begin(stream.start_time * _time_base(stream))
    try:
        for packet in _from_key_frame(container, stream, lead_in):
            for side_data in packet.iter_sidedata():  # mostly none: cheaper than to ask for one by its name
                if side_data.data_type == "encryption_info":
                    raise MediaError("encrypted", f"expected a {stream.type} stream in the clear, found one under DRM")
            if packet.is_corrupt:
                raise MediaError("decode_error", f"expected whole packets, found a cut one in the {stream.type} stream")
            for frame in _decoded(packet, lead_in if last is None else nothing_left_out):
                times.correct(frame)
                if is_sought and last is None and frame.pts is None:
                    continue  # nobody knows where it lies: the first one with a time begins
                last = _moment(frame)
                if frame.is_corrupt:
                    raise MediaError(
                        "decode_error",
                        f"expected a clean {stream.type} frame, found damage at {_at(last[0] * last[1])}",
                    )
                yield frame
    except av.error.MemoryError:
        raise
    except av.error.FFmpegError as error:
        raise _decode_error(stream, error, None if last is None else last[0] * last[1]) from error


def _decoded(packet: "av.Packet[Any]", lead_in: LeadIn) -> list[_Frame]:
    """The packet's frames; in a file that began in the middle it may come before the decoder's parameters."""
    try:
        return cast(list[_Frame], packet.decode())
    except av.error.InvalidDataError:
        if not lead_in.num_packets:
            raise
        lead_in.num_packets += 1
        return []


def _from_key_frame(
    container: InputContainer, stream: VideoStream | AudioStream, lead_in: LeadIn
) -> "Iterator[av.Packet[Any]]":
    """The stream's packets; of video those that need a picture from before the first key frame are left out."""
    packets = container.demux(stream)
    if stream.type != "video" or container.format.name not in _BEGIN_ANYWHERE:
        yield from packets
        return
    is_begun, begins_at = False, 0
    for packet in packets:
        if not is_begun and (packet.is_keyframe or not packet.size):  # the empty packet at the end flushes the decoder
            is_begun, begins_at = True, packet.pts or 0
        is_leading = lead_in.num_packets > 0 and packet.pts is not None and packet.pts < begins_at
        if is_begun and not is_leading:
            yield packet
        else:
            lead_in.num_packets += 1


class _BestTimes:
    """Presentation times as FFmpeg's `best_effort_timestamp` has them, which PyAV does not pass on.

    The stored time as long as these increase more often than the decoding times do, else the decoding time of the
    packet that made the frame come out; where there is neither, one frame behind the last.
    """

    def __init__(self, container: InputContainer, stream: VideoStream) -> None:
        self._has_pts = container.format.name not in _WITHOUT_PRESENTATION_TIMES
        self._interval = max(1, round(1 / (frame_rate(stream) * _time_base(stream))))
        self._last: int | None = None
        self._last_pts = self._last_dts = -(2**63)
        self._num_faulty_pts = self._num_faulty_dts = 0

    def correct(self, frame: _Frame) -> None:
        """Set the frame's `pts`."""
        pts, dts = frame.pts if self._has_pts else None, frame.dts
        if dts is not None:
            self._num_faulty_dts += dts <= self._last_dts
            self._last_dts = dts
        elif pts is not None:
            self._last_dts = pts
        if pts is not None:
            self._num_faulty_pts += pts <= self._last_pts
            self._last_pts = pts
        elif dts is not None:
            self._last_pts = dts
        best = pts if pts is not None and (dts is None or self._num_faulty_pts <= self._num_faulty_dts) else dts
        if best is None and self._last is not None:
            best = self._last + (frame.duration or self._interval)
        self._last = frame.pts = best


class _SoundTimes:
    """Times of sound: a frame without one lies where the frame before it ends.

    Some decoders give back such frames, Windows Media Audio its last one.
    """

    def __init__(self) -> None:
        self._last: tuple[int, Fraction, int, int] | None = None

    def begin(self, moment: Fraction) -> None:
        """Say where a first frame without a time lies."""
        self._last = 1, moment, 0, 1

    def correct(self, frame: _Frame) -> None:
        """Set the frame's `pts` where it lacks."""
        if not isinstance(frame, av.AudioFrame):
            return
        if frame.pts is None:
            frame.pts = frame.dts
        if frame.pts is None and self._last is not None:
            ticks, time_base, num_samples, rate_hz = self._last
            follows = ticks * time_base + Fraction(num_samples, rate_hz)
            frame.pts, frame.time_base = round(follows * frame.sample_rate), Fraction(1, frame.sample_rate)
        if frame.pts is not None:
            self._last = *_moment(frame), frame.samples, frame.sample_rate


def frame_rate(stream: VideoStream) -> Fraction:
    """Frames per second as the file says; 30 where it says nothing."""
    return Fraction(stream.average_rate or stream.guessed_rate or 30)


def _decode_error(
    stream: VideoStream | AudioStream, error: av.error.FFmpegError, moment: Fraction | None
) -> MediaError:
    return MediaError("decode_error", f"{stream.type} stream after {_at(moment)}: {error.strerror}")


def _at(moment: Fraction | None) -> str:
    return "its start" if moment is None else f"{float(moment):.3f} s"
