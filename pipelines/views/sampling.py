"""Which frames of a clip, and which rows of its spectrogram, a view reads: arithmetic on whole numbers.

n = frames of the stored clip, T = `num_frames` of a view. Random numbers come in as arguments in [0, 1). Products
of whole numbers are divided with floor, so no result hangs on the rounding of a float.

Where a clip's rate varies the same formulas choose moments in place of frames: n = its ticks, strides in ticks, and the
view takes the frames on display at these moments (`VaryingRate`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ca2st.errors import UserInputError, check_choice

Scheme = Literal["dense", "uniform"]
ShortClip = Literal["reference", "spread"]
Frames = tuple[int, ...]

_NOMINAL_RATE = 30.0
_ABOUT_NOMINAL = (23.5, 36.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingConfig:
    """How frames are chosen; Source: the published method's dataset classes, restated in our words."""

    scheme: Scheme = "dense"
    """``dense``: a window of `frame_stride` x num_frames (Kinetics-400, VGG-Sound, KineticsSound, UCF-101).
    ``uniform``: spread over the whole sample (Something-Something-V2, EPIC sets, ActivityNet, HD-EPIC)."""
    frame_stride: int = 4
    """Source frames between two read ones in a dense window, at about 30 frames a second; other rates scale it."""
    short_clip: ShortClip = "spread"
    """Uniform training of clips shorter than a view: ``spread`` uses all frames evenly, ``reference`` repeats the
    first one, as the published code does."""

    def __post_init__(self) -> None:
        check_choice("sampling.scheme", self.scheme, get_args(Scheme))
        check_choice("sampling.short_clip", self.short_clip, get_args(ShortClip))
        if self.frame_stride < 1:
            raise UserInputError(f"sampling.frame_stride: expected at least 1, found {self.frame_stride}")


@dataclass(frozen=True, slots=True)
class VaryingRate:
    """The times of a clip whose frames are not evenly spaced, counted from its first frame."""

    ticks: NDArray[np.int32]
    """Presentation time of every frame, never going back."""
    ticks_per_second: int

    @classmethod
    def of(cls, ticks: NDArray[np.int32], *, ticks_per_second: int) -> "VaryingRate | None":
        """None for a constant rate: no frame is more than half an interval off its place on an even grid.

        The grid goes from the first frame to the last; rounded or jittering times of a constant rate stay on it.
        """
        times, last = ticks.astype(np.int64) - int(ticks[0]), len(ticks) - 1
        if last < 2 or 2 * int(np.abs(times * last - np.arange(last + 1) * times[-1]).max()) <= times[-1]:
            return None
        return cls(ticks - ticks[0], ticks_per_second)

    @property
    def num_ticks(self) -> int:
        """Length of the clip; its last frame lasts as long as frames do in the middle of their lengths."""
        return int(self.ticks[-1]) + max(1, int(np.median(np.diff(self.ticks))))

    def stride(self, frame_stride: int) -> int:
        """Ticks of `frame_stride` frames at the nominal rate."""
        return round(frame_stride * self.ticks_per_second / _NOMINAL_RATE)

    def frames_at(self, moments: Frames) -> Frames:
        """The frames on display at these ticks."""
        return tuple((np.searchsorted(self.ticks, np.array(moments), side="right") - 1).tolist())


def scaled_stride(frame_stride: int, frames_per_second: float) -> int:
    """The stride that spans the same time at the clip's own rate; 24 to 30 fps count as the nominal 30."""
    if _ABOUT_NOMINAL[0] <= frames_per_second <= _ABOUT_NOMINAL[1]:
        return frame_stride
    return max(1, round(frame_stride * frames_per_second / _NOMINAL_RATE))


def frames_per_second(ticks: NDArray[np.int32], *, ticks_per_second: int) -> float:
    """Mean rate of stored frame times; the nominal 30 for a single frame."""
    if len(ticks) < 2 or ticks[-1] <= ticks[0]:
        return _NOMINAL_RATE
    return (len(ticks) - 1) * ticks_per_second / float(ticks[-1] - ticks[0])


def dense_train(n: int, *, num_frames: int, stride: int, u: float) -> Frames:
    """A window of `num_frames` x `stride` frames that starts at random; the whole clip where it is shorter."""
    span = num_frames * stride
    if n <= span:
        return _dense_short(n, num_frames=num_frames, stride=stride)
    return _dense_window(int(u * (n - span)), num_frames=num_frames, span=span)


def dense_validation(n: int, *, num_frames: int, stride: int) -> Frames:
    """As `dense_train` with the window in the centre."""
    span = num_frames * stride
    if n <= span:
        return _dense_short(n, num_frames=num_frames, stride=stride)
    return _dense_window((n - span) // 2, num_frames=num_frames, span=span)


def _dense_window(start: int, *, num_frames: int, span: int) -> Frames:
    """`num_frames` points from `start` to `start + span`, both included, held inside the window's last frame."""
    return tuple(start + min(i * span // (num_frames - 1), span - 1) for i in range(num_frames))


def _dense_short(n: int, *, num_frames: int, stride: int) -> Frames:
    """As many as n // stride points over the clip, then its last frame."""
    count = n // stride
    points = [i * n // max(count - 1, 1) for i in range(count)] + [n] * (num_frames - count)
    return tuple(min(point, n - 1) for point in points)


def dense_test(n: int, *, num_frames: int, stride: int, clip: int, num_clips: int) -> Frames:
    """Clip `clip` of `num_clips` equally placed runs of every `stride`-th frame; one clip takes the centre."""
    candidates = list(range(0, n, stride))
    candidates += candidates[-1:] * (num_frames - len(candidates))
    room = len(candidates) - num_frames
    start = clip * room // (num_clips - 1) if num_clips > 1 else room // 2
    return tuple(candidates[start : start + num_frames])


def uniform_train(n: int, *, num_frames: int, uniforms: Sequence[float], short_clip: ShortClip) -> Frames:
    """A random frame of each of `num_frames` equal segments of n // num_frames frames."""
    segment = n // num_frames
    if segment:
        return tuple(i * segment + int(u * segment) for i, u in zip(range(num_frames), uniforms, strict=True))
    if short_clip == "reference":
        return (0,) * num_frames
    return tuple(i * n // num_frames for i in range(num_frames))


def uniform_validation(n: int, *, num_frames: int) -> Frames:
    """The centre of each of `num_frames` segments."""
    return tuple((2 * i + 1) * n // (2 * num_frames) for i in range(num_frames))


def uniform_test(n: int, *, num_frames: int, clip: int, num_clips: int) -> Frames:
    """Frame (i + clip / num_clips) * n / num_frames; two clips: segment starts and middles; one: middles."""
    if num_clips == 1:
        return uniform_validation(n, num_frames=num_frames)
    return tuple((i * num_clips + clip) * n // (num_frames * num_clips) for i in range(num_frames))


def mel_start(num_rows: int, *, rows_read: int, fraction: float | Fraction) -> int:
    """First spectrogram row of a view: `fraction` of the room, 0 where the clip is shorter than the view."""
    return int(fraction * max(num_rows - rows_read, 0))


def mel_test_fraction(*, clip: int, crop: int, num_clips: int, num_crops: int) -> Fraction:
    """Where the spectrogram of a test view sits: views walk through the middle of the clip."""
    return Fraction(num_crops * clip + crop + 3, num_clips * num_crops + 6)
