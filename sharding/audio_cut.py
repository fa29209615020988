"""Cut a segment's sound out of a media file, as mono samples at one rate, on the video's time base.

Sample 0 is the segment's first moment: sound that starts later is preceded by silence, sound that starts earlier is
cut. The end is where the sound ends (or the segment), never padded. Gaps inside the track stay gaps of silence.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
import numpy.typing as npt
from av.audio.stream import AudioStream
from av.container import InputContainer

from sharding.decoding import audio_frames, frame_seconds
from sharding.errors import MediaError
from sharding.media import MediaLimits
from sharding.video_cut import Segment

_PREROLL = Fraction(1)  # a codec that overlaps its blocks, and the resampler, are right again well within this
_SEEK_FROM = Fraction(3)
_GAP = Fraction(1, 20)  # timestamps rounded to milliseconds jitter less; a missing packet makes more
_MIX_DOWN = {"rematrix_maxval": "1"}  # weights that sum to one: as loud as the source, no overflow from 5.1

Samples = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedAudio:
    """A segment's sound and what the source had."""

    pcm: Samples
    """float32 [num_samples], mono, about -1..1; sample 0 is the segment's first moment."""
    source_rate_hz: int
    source_channels: int


class _Run:
    """Gapless frames of one format through one resampler."""

    def __init__(self, first: av.AudioFrame, rate_hz: int) -> None:
        self.start = frame_seconds(first)
        self._format = _format_of(first)
        self._resampler = av.AudioResampler(format="flt", layout="mono", rate=rate_hz, options=dict(_MIX_DOWN))
        self._num_source_samples = 0
        self._blocks: list[Samples] = []

    def continues_with(self, frame: av.AudioFrame) -> bool:
        """Whether the frame has the same format and starts where the last one ended."""
        expected = self.start + Fraction(self._num_source_samples, self._format[0])
        return _format_of(frame) == self._format and abs(frame_seconds(frame) - expected) <= _GAP

    def add(self, frame: av.AudioFrame) -> None:
        self._num_source_samples += frame.samples
        frame.pts = None  # placed by `start` and counted from there: jitter must not stretch anything
        self._resample(frame)

    def finish(self) -> Samples:
        self._resample(None)
        return np.concatenate(self._blocks) if self._blocks else np.zeros(0, np.float32)

    def _resample(self, frame: av.AudioFrame | None) -> None:
        try:
            ready: Sequence[av.AudioFrame | None] = self._resampler.resample(frame)
        except av.error.MemoryError:
            raise
        except (av.error.FFmpegError, ValueError) as error:
            rate, sample_format, layout = self._format
            found = f"{rate} Hz {sample_format} {layout}"
            raise MediaError(
                "decode_error", f"expected sound that can be resampled, found {found} ({error})"
            ) from error
        self._blocks += [block.to_ndarray().reshape(-1).astype(np.float32) for block in ready if block is not None]


def _format_of(frame: av.AudioFrame) -> tuple[int, str, str]:
    return frame.sample_rate, frame.format.name, frame.layout.name


def cut_audio(
    container: InputContainer,
    stream: AudioStream,
    segment: Segment,
    *,
    zero: Fraction,
    rate_hz: int,
    limits: MediaLimits,
) -> EncodedAudio | None:
    """Decode, mix down and resample the segment's sound; None when there is none in it.

    Args:
        container: A freshly opened container.
        stream: Its audio stream.
        segment: Span on the media's clock.
        zero: The media clock's zero on the container's clock, from the video.
        rate_hz: Rate of the result.
        limits: Guards.

    Raises:
        MediaError: ``decode_error``, ``bad_timestamps``, ``too_large``.
    """
    start = zero + segment.start
    end = None if segment.end is None else zero + segment.end
    seek = start - _PREROLL if segment.start >= _SEEK_FROM else None
    most = int((limits.max_duration_seconds + 1) * rate_hz)
    last = start + int(limits.max_duration_seconds)
    runs = _runs(audio_frames(container, stream, seek=seek), end, rate_hz, last)
    pieces = [(round((run.start - start) * rate_hz), run.finish()) for run in runs]
    length = None if end is None else round((end - start) * rate_hz)
    pcm = _placed(pieces, length, most)
    if pcm is None:
        return None
    return EncodedAudio(pcm=pcm, source_rate_hz=stream.sample_rate, source_channels=stream.channels)


def _runs(frames: Iterator[av.AudioFrame], end: Fraction | None, rate_hz: int, last: Fraction) -> Iterator[_Run]:
    run: _Run | None = None
    for frame in frames:
        moment = frame_seconds(frame)
        if end is not None and moment >= end + _GAP:  # a little more, for the resampler's filter
            break
        if moment > last + 1:
            raise MediaError("too_large", "expected sound no longer than the limit on duration, found more")
        if run is not None and not run.continues_with(frame):
            yield run
            run = None
        run = run or _Run(frame, rate_hz)
        run.add(frame)
    if run is not None:
        yield run


def _placed(pieces: list[tuple[int, Samples]], length: int | None, most: int) -> Samples | None:
    """Lay pieces (first index, samples) on silence; None when no sample lies in the segment."""
    ends = [at + len(samples) for at, samples in pieces if len(samples)]
    total = max(ends, default=0)
    total = total if length is None else min(total, length)
    inside = any(at < total and at + len(samples) > 0 for at, samples in pieces)
    if total <= 0 or not inside:
        return None
    if total > most:
        raise MediaError("too_large", "expected sound no longer than the limit on duration, found more")
    canvas = np.zeros(total, np.float32)
    for at, samples in pieces:
        first, last = max(at, 0), min(at + len(samples), total)
        if last > first:
            canvas[first:last] = samples[first - at : last - at]
    return canvas
