"""Decode one stream of an opened source strictly, and cut a segment out of a video by presentation time.

Strictly: a damaged packet or frame is an error, never a grey patch.

`clock_zero` is the one place that says where the clock of picture and sound starts. Seconds of annotations count from
the start of the file, its earliest stream, as players and FFmpeg's ``-ss`` count. A whole file starts at its first
displayed frame, whatever its timestamp: sound from before it is no part of the clip. A segment keeps the frames with
start <= time < end. A segment that falls between two frames keeps the one on display.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, cast

import av
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.sidedata.sidedata import SideData
from av.video.stream import VideoStream

from sharding.errors import MediaError
from sharding.media.claims import MediaLimits, check_ends_as_claimed, frame_rate

_NO_FRAME = av.VideoFrame()
_SEEK_FROM = Fraction(2)  # nearer starts are reached by decoding on from the first frame
_LATE = Fraction(1, 10)  # behind the start of the file: more than the delay of B-frames or the lead of a sound codec
_ENOUGH = Fraction(19, 20)  # of an annotated segment
_JITTER = Fraction(1, 4)  # of the shorter frame interval, the source's or the wanted one: thinning forgives it


CLOCKS = {
    "file": "from the start of the file, its earliest stream, as players and FFmpeg's -ss count",
    "first-frame": "from the first displayed picture",
}
"""Where seconds of annotations may count from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """A span of time on the media's clock."""

    start: Fraction
    end: Fraction | None
    """Exclusive; None: to the end of the media."""

    @classmethod
    def of(cls, start_seconds: float | None, end_seconds: float | None) -> "Segment":
        """From an annotation's decimal seconds; a missing start is the media's first moment."""
        start = Fraction(0) if start_seconds is None else _decimal(start_seconds)
        return cls(start=start, end=None if end_seconds is None else _decimal(end_seconds))


def _decimal(seconds: float) -> Fraction:
    # 12.34 as written, not its binary neighbour: a frame at exactly that time belongs to the segment.
    return Fraction(seconds).limit_denominator(1_000_000)


def clock_zero(container: InputContainer, first_picture: Fraction, clock: str) -> Fraction:
    """Return zero of the media's clock on the container's clock, in seconds.

    Args:
        container: The opened file.
        first_picture: Time of its first displayed frame on the container's clock.
        clock: A name of CLOCKS.
    """
    start = None if clock == "first-frame" else file_start(container)
    return first_picture if start is None else min(first_picture, start)


def file_start(container: InputContainer) -> Fraction | None:
    """Return where the earliest stream of a file starts on the container's clock, in seconds; None where it is unknown.

    Files that belong together, picture in one and sound in the other, start at the same moment.
    """
    start: int | None = container.start_time
    if start is None:
        return None
    rounded = Fraction(start, av.time_base)
    starts = [
        stream.start_time * stream.time_base
        for stream in container.streams
        if stream.start_time is not None and stream.time_base is not None
    ]
    exact = [start for start in starts if abs(start - rounded) < Fraction(1, av.time_base)]
    return min(exact or [rounded])


@dataclass(frozen=True, slots=True)
class TimedFrame:
    """A decoded frame with its times relative to the segment's start."""

    picture: av.VideoFrame
    seconds: Fraction
    duration: Fraction
    display_matrix: bytes | None = None
    """How it is laid on the screen, as `sharding.media.picture.orientation_of` reads it; None: as it is."""


def display_matrix(picture: av.VideoFrame) -> bytes | None:
    """Return the display matrix that comes with this frame, of its container or of a message inside the stream.

    Ask once: the frame shows no side data afterwards.
    """
    side_data = picture.side_data
    found = side_data.get("DISPLAYMATRIX") if len(side_data) else None
    matrix = bytes(found) if isinstance(found, SideData) else None
    # PyAV's frame and its side data hold each other. Left so, every frame keeps its pixels until the garbage collector
    # runs: a hundred frames of 4K are more than a child may have, and fresh memory for each frame costs time.
    cast(Any, side_data).__init__(_NO_FRAME)
    return matrix


class VideoCut:
    """The frames of one segment; `zero`, `duration`, `changes` and `notes` are known once `frames` is used up."""

    def __init__(
        self,
        container: InputContainer,
        stream: VideoStream,
        segment: Segment,
        *,
        limits: MediaLimits,
        clock: str,
    ) -> None:
        self.zero = Fraction(0)
        """The media clock's zero on the container's clock."""
        self.duration = Fraction(0)
        """Seconds from the segment's start to its end, or to the media's end if that comes first."""
        self.changes: dict[str, Any] = {}
        """What was done to frames and times, in JSON's types."""
        self.notes: list[str] = []
        """Kinds of what was unusual, as of `EncodedClip.notes`."""
        self._container, self._stream, self._segment, self._limits = container, stream, segment, limits
        self._clock = clock
        self._interval = 1 / frame_rate(stream)
        self._lead_in = LeadIn()
        self._num_replaced = 0
        self._matrix: bytes | None = None

    def frames(self) -> Iterator[TimedFrame]:
        """Yield the segment's frames in order.

        Raises:
            MediaError: ``decode_error``, ``truncated``, ``bad_timestamps``, ``too_large``, ``segment_outside``.
        """
        start, end = self._segment.start, self._segment.end
        if end is None:  # a whole file that says it is too long need not be decoded up to the limit
            claimed = (self._container.duration or 0) / av.time_base - float(start)
            self._check_extent(0, Fraction(claimed))
        before: TimedFrame | None = None
        num_kept, media_end = 0, -start  # until a frame is found none of the media is
        for frame in self._checked_frames():
            if end is not None and frame.seconds >= end - start:
                self.duration = end - start
                break
            media_end = frame.seconds + frame.duration
            if frame.seconds < 0:
                before = frame
                continue
            num_kept += 1
            self._check_extent(num_kept, media_end)
            yield frame
        else:
            needed = None if end is None else self.zero + end
            found = self.zero + start + media_end
            check_ends_as_claimed(self._container, self._stream, found=found, needed=needed)
            self.duration = media_end
        if num_kept == 0:
            yield self._on_display(before, media_end)
        self._note_what_was_unusual()

    def _checked_frames(self) -> Iterator[TimedFrame]:
        """Yield all frames with their times; of several at one time the last, which players leave on display."""
        decoded_pixels = 0
        held: TimedFrame | None = None
        pictures = self._pictures()  # says where zero is
        origin = self.zero + self._segment.start
        for picture in pictures:
            decoded_pixels += picture.width * picture.height
            self._check_pixels(picture, decoded_pixels)
            seconds = frame_seconds(picture) - origin
            if held is not None and seconds < held.seconds:
                found = f"{float(seconds):.4f} s behind {float(held.seconds):.4f} s"
                raise MediaError("bad_timestamps", f"expected frame times that increase, found {found}")
            if held is not None and seconds > held.seconds:
                yield held
            else:
                self._num_replaced += held is not None
            base = picture.time_base or Fraction(0)
            # A message inside the stream holds for all that follow.
            self._matrix = display_matrix(picture) or self._matrix
            held = TimedFrame(picture, seconds, picture.duration * base or self._interval, self._matrix)
        if held is not None:
            yield held

    def _pictures(self) -> Iterator[av.VideoFrame]:
        frames = decoded_frames(self._container, self._stream, lead_in=self._lead_in)
        first = next(frames, None)
        if first is None:
            raise MediaError("decode_error", "expected at least one frame, found none")
        self.zero = clock_zero(self._container, frame_seconds(first), self._clock)
        self._matrix = display_matrix(first)
        late = frame_seconds(first) - clock_zero(self._container, frame_seconds(first), "file")
        if late > _LATE:
            self.notes.append("picture starts late")
            self.changes["picture_starts_seconds"] = float(late)
        if self._segment.start < _SEEK_FROM or not can_seek(self._container, self._stream):
            return itertools.chain([first], frames)
        return decoded_frames(self._container, self._stream, seek=self.zero + self._segment.start)

    def _note_what_was_unusual(self) -> None:
        start, end = self._segment.start, self._segment.end
        if end is not None and self.duration < min((end - start) * _ENOUGH, end - start - self._interval):
            self.notes.append("shorter than annotated")
        if self._lead_in.num_packets:
            self.notes.append("began inside a group of pictures")
            self.changes["skipped_packets_before_key_frame"] = self._lead_in.num_packets
        if self._num_replaced:
            self.notes.append("frames at the same time")
            self.changes["replaced_frames_at_the_same_time"] = self._num_replaced

    def _check_pixels(self, picture: av.VideoFrame, decoded: int) -> None:
        if picture.width * picture.height > self._limits.max_frame_pixels:
            found = f"a frame of {picture.width}x{picture.height}"
            raise MediaError("too_large", f"expected at most {self._limits.max_frame_pixels} pixels, found {found}")
        if decoded > self._limits.max_decoded_pixels:
            raise MediaError(
                "too_large", f"expected at most {self._limits.max_decoded_pixels} decoded pixels, found more"
            )

    def _check_extent(self, num_frames: int, seconds: Fraction) -> None:
        if num_frames > self._limits.max_frames:
            raise MediaError("too_large", f"expected at most {self._limits.max_frames} frames, found more")
        if float(seconds) > self._limits.max_duration_seconds + 1:
            limit = self._limits.max_duration_seconds
            raise MediaError("too_large", f"expected at most {limit:g} s, found more; cut the video by times")

    def _on_display(self, before: TimedFrame | None, media_end: Fraction) -> TimedFrame:
        is_followed = self.duration > 0  # by a frame behind the segment: until then `before` stays on display
        if before is None or (media_end <= 0 and not is_followed):
            length = float(media_end + self._segment.start)
            found = f"{length:.3f} s of media" if length > 0 else "no frame there"
            raise MediaError("segment_outside", f"expected the segment inside the media, found {found}")
        return replace(before, seconds=Fraction(0), duration=self.duration or self._interval)


def thinned(frames: Iterator[TimedFrame], frames_per_second: float | None) -> Iterator[TimedFrame]:
    """Keep the first frame of every 1/frames_per_second of presentation time; None keeps all."""
    if frames_per_second is None:
        yield from frames
        return
    rate = _decimal(frames_per_second)
    last = -1
    for frame in frames:
        slot = int(frame.seconds * rate + _JITTER * min(Fraction(1), frame.duration * rate))
        if slot > last:
            last = slot
            yield frame


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
    """Return presentation time of a frame on the container's clock.

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


def decoded_frames(
    container: InputContainer,
    stream: VideoStream | AudioStream,
    *,
    seek: Fraction | None = None,
    lead_in: LeadIn | None = None,
) -> Iterator[Any]:
    """Yield frames in display order; with `seek`, from a key frame at or before that moment of the container's clock.

    Their `pts` are FFmpeg's best-effort times. Packets in front of the first key frame are left out and counted in
    `lead_in`.

    Raises:
        MediaError: ``decode_error`` at the first packet or frame that is damaged, ``encrypted`` at one under DRM.
    """
    lead_in = lead_in or LeadIn()
    if seek is None or not can_seek(container, stream):
        yield from _decode(container, stream, lead_in)
        return
    beginning = (stream.start_time or 0) * _time_base(stream)
    for seconds_back in _SECONDS_BACK:
        if seek - seconds_back > beginning:
            _seek(container, stream, seek - seconds_back)
            frames = _decode(container, stream, LeadIn(), is_sought=True)
            try:
                first = next(frames, None)
            except MediaError as error:
                if error.reason != "decode_error":
                    raise
                first = None  # decoding cannot begin there: an open group of pictures, a packet's middle
            if first is not None and frame_seconds(first) <= seek:
                yield first
                yield from frames
                return
    _seek(container, stream, beginning)
    yield from _decode(container, stream, lead_in)


def can_seek(container: InputContainer, stream: VideoStream | AudioStream) -> bool:
    """Return whether frames have right times behind a seek.

    Not in a program stream, nor where a transport stream's clock of 33 bits starts over: what lies behind is missed.
    """
    start, length = (float((ticks or 0) * _time_base(stream)) for ticks in (stream.start_time, stream.duration))
    starts_over = container.format.name == "mpegts" and (start < 0 or start + length >= _WRAP_SECONDS)
    return not starts_over and container.format.name not in _WRONG_TIMES_AFTER_SEEK


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
    times: _BestTimes | _SoundTimes
    if isinstance(stream, VideoStream):
        times = _BestTimes(container, stream)
    else:
        start = None if is_sought else stream.start_time
        times = _SoundTimes(None if start is None else start * _time_base(stream))
    try:
        for packet in _from_key_frame(container, stream, lead_in):
            for side_data in packet.iter_sidedata():  # mostly none: cheaper than to ask for one by its name
                if side_data.data_type == "encryption_info":
                    raise MediaError("encrypted", f"expected a {stream.type} stream in the clear, found one under DRM")
            if packet.is_corrupt:
                raise MediaError("decode_error", f"expected whole packets, found a cut one in the {stream.type} stream")
            try:
                frames: list[Any] = packet.decode()
            except av.error.InvalidDataError:
                if last is not None or not lead_in.num_packets:
                    raise
                lead_in.num_packets += 1  # the file began in the middle, and this comes before the decoder's parameters
                continue
            for frame in frames:
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


def _from_key_frame(
    container: InputContainer, stream: VideoStream | AudioStream, lead_in: LeadIn
) -> "Iterator[av.Packet[Any]]":
    """Return the stream's packets; of video those that need a picture from before the first key frame are left out."""
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

    def correct(self, frame: av.VideoFrame) -> None:
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

    def __init__(self, begins: Fraction | None) -> None:
        """`begins` is where a first frame without a time lies."""
        self._last: tuple[int, Fraction, int, int] | None = None if begins is None else (1, begins, 0, 1)

    def correct(self, frame: av.AudioFrame) -> None:
        """Set the frame's `pts` where it lacks."""
        if frame.pts is None:
            frame.pts = frame.dts
        if frame.pts is None and self._last is not None:
            ticks, time_base, num_samples, rate_hz = self._last
            follows = ticks * time_base + Fraction(num_samples, rate_hz)
            frame.pts, frame.time_base = round(follows * frame.sample_rate), Fraction(1, frame.sample_rate)
        if frame.pts is not None:
            self._last = *_moment(frame), frame.samples, frame.sample_rate


def _decode_error(
    stream: VideoStream | AudioStream, error: av.error.FFmpegError, moment: Fraction | None
) -> MediaError:
    return MediaError("decode_error", f"{stream.type} stream after {_at(moment)}: {error.strerror}")


def _at(moment: Fraction | None) -> str:
    return "its start" if moment is None else f"{float(moment):.3f} s"
