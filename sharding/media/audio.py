"""A segment's sound: cut out of a media file as mono samples at one rate, and its log-mel spectrogram.

The samples are on the video's time base.
"""

import io
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from typing import Any, cast

import av
import numpy as np
import numpy.typing as npt
from av.audio.stream import AudioStream
from av.container import InputContainer

from ca2st.errors import EnvironmentFault
from sharding.errors import MediaError
from sharding.format.shard_set import AudioParameters
from sharding.media.claims import MediaLimits
from sharding.media.video import Segment, decoded_frames, frame_seconds

_PREROLL = Fraction(1)  # a codec that overlaps its blocks, and the resampler, are right again well within this
_SEEK_FROM = Fraction(3)
_MOST_OFF = 0.005  # half a row: what counted samples and timestamps may differ by
_LOOK = 0.5  # seconds on both sides over which an offset must last to be a gap and not jitter
_BEHIND = Fraction(3, 5)  # decoded behind the end: the look, and the resampler's filter
_WINDOW = Fraction(25, 1000)  # of the spectrogram: the last row of a whole clip hears its last frame
_LEAST_STEP = 2.0**-15  # of 16-bit samples
_MIX_DOWN = {"rematrix_maxval": "1"}  # weights that sum to one: as loud as the source, no overflow from 5.1

Samples = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedAudio:
    """A segment's sound and what the source had."""

    pcm: Samples
    """float32 [num_samples], mono, about -1..1; sample 0 is the segment's first moment."""
    source_rate_hz: int
    source_channels: int
    notes: tuple[str, ...] = ()
    """Kinds of what is unusual about its place."""

    @property
    def is_silent(self) -> bool:
        """Whether it is digital silence: all samples within one step of 16-bit sound."""
        return bool(self.pcm.size == 0 or self.pcm.max() - self.pcm.min() < _LEAST_STEP)


@dataclass(frozen=True, slots=True)
class _Timed:
    """A frame, its place by counted samples, and how far its timestamp lies behind that, in seconds."""

    frame: av.AudioFrame
    counted: float
    offset: float


@dataclass(frozen=True, slots=True)
class _Piece:
    """Gapless samples and where the first of them lies in the segment."""

    first: int
    samples: Samples
    is_moved: bool
    """Whether its timestamps leave a gap behind the piece before it, or overlap it."""

    @property
    def end(self) -> int:
        return self.first + len(self.samples)


class _Run:
    """Gapless frames of one format through one resampler."""

    def __init__(self, first: _Timed, offset: float, rate_hz: int, before: "_Run | None") -> None:
        self.start = first.counted + offset
        self.is_moved = before is not None and not before.keeps_time(offset)
        self._offset = offset
        self.format = _format_of(first.frame)
        self._resampler = av.AudioResampler(format="flt", layout="mono", rate=rate_hz, options=dict(_MIX_DOWN))
        self._blocks: list[Samples] = []

    def keeps_time(self, offset: float) -> bool:
        """Return whether a frame of that offset lies where counting from the run's start puts it."""
        return abs(offset - self._offset) <= _MOST_OFF

    def add(self, frame: av.AudioFrame) -> None:
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
            rate, sample_format, layout = self.format
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
    duration: Fraction,
    rate_hz: int,
    limits: MediaLimits,
) -> EncodedAudio | None:
    """Decode, mix down and resample the segment's sound; None when there is none in it.

    Args:
        container: A freshly opened container.
        stream: Its audio stream.
        segment: Span on the media's clock.
        zero: The media clock's zero on the container's clock, from the video.
        duration: Seconds of picture in the segment; longer sound is cut one spectrogram window behind them.
        rate_hz: Rate of the result.
        limits: Guards.

    Raises:
        MediaError: ``decode_error``, ``bad_timestamps``, ``too_large``.
    """
    start = zero + segment.start
    wanted = None if segment.end is None else segment.end - segment.start
    seconds = duration + _WINDOW if wanted is None else min(wanted, duration + _WINDOW)
    seek = start - _PREROLL if segment.start >= _SEEK_FROM else None
    frames = _between(decoded_frames(container, stream, seek=seek), start - _PREROLL, start + seconds + _BEHIND)
    pieces = [
        _Piece(round((run.start - float(start)) * rate_hz), run.finish(), run.is_moved)
        for run in _runs(_timed(frames, limits), rate_hz)
    ]
    pcm = _placed(pieces, round(seconds * rate_hz))
    if pcm is None:
        return None
    half_a_second, is_to_end = rate_hz // 2, wanted is None or wanted > duration
    return EncodedAudio(
        pcm=pcm,
        source_rate_hz=stream.sample_rate,
        source_channels=stream.channels,
        notes=_notes(pieces, round(duration * rate_hz), few=half_a_second, is_to_end=is_to_end),
    )


def _between(
    frames: Iterator[av.AudioFrame], start: Fraction, end: Fraction
) -> Iterator[tuple[av.AudioFrame, Fraction]]:
    """Yield the frames that lie at least in part between the moments, each with its own."""
    for frame in frames:
        moment = frame_seconds(frame)
        if moment >= end:
            return
        if frame.samples and (moment > start or moment + Fraction(frame.samples, frame.sample_rate) > start):
            yield frame, moment


def _timed(frames: Iterator[tuple[av.AudioFrame, Fraction]], limits: MediaLimits) -> Iterator[_Timed]:
    counted, unit = 0, 1  # counted / unit seconds: exact, and cheaper than fractions
    for frame, moment in frames:
        if unit % frame.sample_rate:
            finer = math.lcm(unit, frame.sample_rate)
            counted, unit = counted * (finer // unit), finer
        behind = moment.numerator * unit - counted * moment.denominator
        yield _Timed(frame, counted / unit, behind / (moment.denominator * unit))
        counted += frame.samples * (unit // frame.sample_rate)
        if counted > (limits.max_duration_seconds + 10) * unit:  # the same moment again and again
            raise MediaError("too_large", "expected sound no longer than the limit on duration, found more")


def _runs(frames: Iterator[_Timed], rate_hz: int) -> Iterator[_Run]:
    run: _Run | None = None
    for one, offset in _steadied(frames):
        if run is None or _format_of(one.frame) != run.format or not run.keeps_time(offset):
            if run is not None:
                yield run
            run = _Run(one, offset, rate_hz, run)
        run.add(one.frame)
    if run is not None:
        yield run


def _steadied(frames: Iterator[_Timed]) -> Iterator[tuple[_Timed, float]]:
    """Yield each frame with the median offset of its neighbours, as many before it as behind it.

    Steps of the clock stay where they are (the median of a monotone sequence is its middle), jitter goes.
    """
    before: deque[_Timed] = deque()
    ahead: deque[_Timed] = deque()

    def first_of_ahead() -> tuple[_Timed, float]:
        middle = ahead.popleft()
        while before and middle.counted - before[0].counted > _LOOK:
            before.popleft()
        is_beyond = bool(ahead) and ahead[-1].counted - middle.counted > _LOOK  # only the last one can be
        num_ahead = len(ahead) - is_beyond
        reach = min(len(before), num_ahead)
        near = [*islice(before, len(before) - reach, None), middle, *islice(ahead, reach)]
        before.append(middle)
        return middle, sorted([one.offset for one in near])[reach]

    for one in frames:
        ahead.append(one)
        while one.counted - ahead[0].counted > _LOOK:
            yield first_of_ahead()
    while ahead:
        yield first_of_ahead()


def _placed(pieces: list[_Piece], length: int) -> Samples | None:
    """Lay the pieces on silence; None when no sample lies in the segment."""
    total = min(max((piece.end for piece in pieces if len(piece.samples)), default=0), length)
    if total <= 0 or not any(piece.first < total and piece.end > 0 for piece in pieces):
        return None
    canvas = np.zeros(total, np.float32)
    for piece in pieces:
        first, last = max(piece.first, 0), min(piece.end, total)
        if last > first:
            canvas[first:last] = piece.samples[first - piece.first : last - piece.first]
    return canvas


def _notes(pieces: list[_Piece], num_wanted: int, *, few: int, is_to_end: bool) -> tuple[str, ...]:
    """Return what is worth counting about the place of sound beside `num_wanted` samples of picture; `few` are not."""
    first, last = min(piece.first for piece in pieces), max(piece.end for piece in pieces)
    found = {
        "sound starts late": first > few,
        "sound ends early": last < num_wanted - few,
        "sound goes on behind the picture": is_to_end and last > num_wanted + few,
        "gaps or overlaps in the sound": any(piece.is_moved and 0 < piece.first < num_wanted for piece in pieces),
    }
    return tuple(kind for kind, is_so in found.items() if is_so)


_FLOOR = float(np.log(np.finfo(np.float32).eps))
"""Kaldi's floor: the value of a bin without energy."""
_AUDIBLE = 1e-3  # peak of a waveform that cannot give a spectrogram of nothing but the floor

Spectrogram = npt.NDArray[np.float16]


def log_mel(pcm: npt.NDArray[np.float32], parameters: AudioParameters) -> Spectrogram:
    """float16 [rows, num_mel_bins] of mono samples; sound shorter than a window is padded to one.

    Raises:
        MediaError: ``bad_spectrogram`` for NaN, infinity, or one value everywhere, above the floor or although there is
            sound.
    """
    window = round(parameters.sample_rate_hz * parameters.frame_length_ms / 1000)
    if not np.isfinite(pcm).all():
        raise MediaError("bad_spectrogram", "expected finite audio samples, found NaN or infinity")
    centred = pcm - pcm.mean(dtype=np.float64).astype(np.float32)
    mel = _filter_bank(np.pad(centred, (0, max(0, window - len(centred)))), parameters)
    if not np.isfinite(mel).all():
        raise MediaError("bad_spectrogram", "expected finite values, found NaN or infinity")
    inner = centred[window:-window]  # a click at the very ends lies where the windows fade out, or behind the last one
    is_wrong = mel.flat[0] > _FLOOR + 0.01 or np.abs(inner).max(initial=0.0) > _AUDIBLE
    if is_wrong and mel.max() == mel.min():
        raise MediaError("bad_spectrogram", f"expected a picture of the sound, found {mel.flat[0]} everywhere")
    return mel.astype(np.float16)


def no_spectrogram(parameters: AudioParameters) -> Spectrogram:
    """Return the spectrogram of a sample without audio: no rows."""
    return np.zeros((0, parameters.num_mel_bins), np.float16)


def npy_bytes(mel: Spectrogram) -> bytes:
    """Return the array as a .npy file (version 1.0, no pickle)."""
    sink = io.BytesIO()
    np.lib.format.write_array(sink, np.ascontiguousarray(mel), version=(1, 0), allow_pickle=False)
    return sink.getvalue()


def load_filter_bank() -> Callable[..., Any]:
    """Return Kaldi's filter bank of torchaudio; the first call imports torch, which takes a second.

    Raises:
        EnvironmentFault: they cannot be imported.
    """
    try:
        from torchaudio.compliance.kaldi import fbank
    except (ImportError, OSError) as error:
        raise EnvironmentFault(
            f"spectrograms need torch and torchaudio, found that they cannot be imported ({error}); install the "
            "versions of requirements.lock together, or leave the sound out with --audio none"
        ) from error
    return cast(Callable[..., Any], fbank)


def _filter_bank(pcm: npt.NDArray[np.float32], parameters: AudioParameters) -> npt.NDArray[np.float32]:
    fbank = load_filter_bank()
    import torch

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the same sums in the same order on every machine
    try:
        with torch.inference_mode():
            mel: npt.NDArray[np.float32] = fbank(
                torch.from_numpy(np.ascontiguousarray(pcm, np.float32))[None],
                htk_compat=True,
                sample_frequency=float(parameters.sample_rate_hz),
                use_energy=False,
                window_type="hanning",
                num_mel_bins=parameters.num_mel_bins,
                dither=0.0,
                frame_length=parameters.frame_length_ms,
                frame_shift=parameters.frame_shift_ms,
            ).numpy()
    finally:
        torch.set_num_threads(num_threads)
    return mel
