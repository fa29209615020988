"""Cut a segment out of a video by presentation time.

`clock_zero` is the one place that says where the clock of picture and sound starts. Seconds of annotations count from
the start of the file, its earliest stream, as players and FFmpeg's ``-ss`` count. A whole file starts at its first
displayed frame, whatever its timestamp: sound from before it is no part of the clip. A segment keeps the frames with
start <= time < end. A segment that falls between two frames keeps the one on display.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, cast

import av
from av.container import InputContainer
from av.sidedata.sidedata import SideData
from av.video.stream import VideoStream

from sharding.errors import MediaError
from sharding.media.claims import check_ends_as_claimed
from sharding.media.decoding import LeadIn, can_seek, frame_rate, frame_seconds, video_frames
from sharding.media.probe import MediaLimits

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
    """Zero of the media's clock on the container's clock, in seconds.

    Args:
        container: The opened file.
        first_picture: Time of its first displayed frame on the container's clock.
        clock: A name of CLOCKS.
    """
    if clock == "first-frame" or container.start_time is None:
        return first_picture
    rounded = Fraction(container.start_time, av.time_base)
    starts = [
        stream.start_time * stream.time_base
        for stream in container.streams
        if stream.start_time is not None and stream.time_base is not None
    ]
    exact = [start for start in starts if abs(start - rounded) < Fraction(1, av.time_base)]
    return min([first_picture, *(exact or [rounded])])


@dataclass(frozen=True, slots=True)
class TimedFrame:
    """A decoded frame with its times relative to the segment's start."""

    picture: av.VideoFrame
    seconds: Fraction
    duration: Fraction
    display_matrix: bytes | None = None
    """How it is laid on the screen, as `sharding.media.picture.orientation_of` reads it; None: as it is."""


def display_matrix(picture: av.VideoFrame) -> bytes | None:
    """The display matrix that comes with this frame, of its container or of a message inside the stream.

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
        clock: str = "file",
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
        self._check_claim()
        start, end = self._segment.start, self._segment.end
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
        """All frames with their times; of several at one time the last, which players leave on display."""
        decoded_pixels = 0
        held: TimedFrame | None = None
        pictures = self._pictures()
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
            self._matrix = (
                display_matrix(picture) or self._matrix
            )  # a message inside the stream holds for all that follow
            held = TimedFrame(picture, seconds, picture.duration * base or self._interval, self._matrix)
        if held is not None:
            yield held

    def _pictures(self) -> Iterator[av.VideoFrame]:
        frames = video_frames(self._container, self._stream, lead_in=self._lead_in)
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
        return video_frames(self._container, self._stream, seek=self.zero + self._segment.start)

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

    def _check_claim(self) -> None:
        """A whole file that says it is too long need not be decoded up to the limit."""
        claimed = (self._container.duration or 0) / av.time_base - float(self._segment.start)
        if self._segment.end is None:
            self._check_extent(0, Fraction(claimed))

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
