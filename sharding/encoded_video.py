"""What every encoder of clips gives, and the MP4 file that all of them write."""

import io
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import av

from sharding.errors import MediaError
from sharding.video_cut import TimedFrame


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
