"""What a view of a clip is: its frames, its crop and augmentation, its rows of the spectrogram.

Draws are keyed by (seed, epoch, sample, reading). Which frames they stand for is arithmetic on whole numbers: n =
frames of the stored clip, T = `num_frames` of a view, random numbers in [0, 1). Products of whole numbers are divided
with floor, so no result depends on the rounding of a float.

Where a clip's rate varies the same formulas choose moments in place of frames: n = its ticks, strides in ticks, and the
view takes the frames on display at these moments (`Timeline`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ca2st.batch import Mixing
from ca2st.errors import UserInputError, check_choice
from ca2st.spec import ClipSpec
from pipelines.augment.boxes import Crop, ErasedBox, RandomCrop, SquareCrop
from pipelines.augment.config import AugmentConfig
from pipelines.augment.mixing import mixing_of
from pipelines.augment.rand_augment import NUMBERS_PER_OPERATION, ImageAugment, parse_rand_augment
from pipelines.augment.spectrogram import UNCHANGED, SpectrogramDraw
from pipelines.errors import check_range
from pipelines.keyed_random import Key, uniforms
from sharding.format.index import TICKS_PER_SECOND

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
    """Source frames between two read ones in a dense window, at about 30 frames per second; other rates scale it."""
    short_clip: ShortClip = "spread"
    """Uniform training of clips shorter than a view: ``spread`` uses all frames evenly, ``reference`` repeats the
    first one, as the published code does."""

    def __post_init__(self) -> None:
        check_choice("sampling.scheme", self.scheme, get_args(Scheme))
        check_choice("sampling.short_clip", self.short_clip, get_args(ShortClip))
        check_range(self, "sampling.", "frame_stride", low=1)


@dataclass(frozen=True, slots=True)
class Timeline:
    """The scale on which a clip's frames are chosen: their numbers, or moments where their rate varies."""

    length: int
    """Frames, or ticks; the last frame counts for the median interval."""
    stride: int
    """Of a dense window."""
    ticks: NDArray[np.int32] | None = None
    """Where the rate varies: the time of every frame from the first."""

    @classmethod
    def of(cls, ticks: NDArray[np.int32], *, frame_stride: int) -> "Timeline":
        """Return the scale of a clip whose frames have these times, for windows of every `frame_stride`-th frame."""
        if not rate_varies(ticks):
            return cls(len(ticks), scaled_stride(frame_stride, frames_per_second(ticks)))
        length = int(ticks[-1] - ticks[0]) + max(1, int(np.median(np.diff(ticks))))
        return cls(length, round(frame_stride * TICKS_PER_SECOND / _NOMINAL_RATE), ticks - ticks[0])

    def frames_at(self, chosen: Frames) -> Frames:
        """Return the frames on display at what was chosen."""
        if self.ticks is None:
            return chosen
        return tuple((np.searchsorted(self.ticks, np.array(chosen), side="right") - 1).tolist())


Protocol = Literal["validation", "test"]

_CROP_ATTEMPTS = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationViews:
    """The views of a sample that an evaluation averages: clips in time x crops along the long side."""

    protocol: Protocol = "validation"
    """``validation``: one centred view. ``test``: the published clips x crops."""
    clips: int = 1
    """Places in time; published: 5 for Kinetics-400, else 2."""
    crops: int = 1
    """Places along the long side, ends included; published: 3. One takes the centre."""

    def __post_init__(self) -> None:
        check_choice("views.protocol", self.protocol, get_args(Protocol))
        if self.clips < 1 or self.crops < 1:
            raise UserInputError(f"views: expected at least 1 clip and 1 crop, found {self.clips} x {self.crops}")
        if self.protocol == "validation" and self.num_views > 1:
            raise UserInputError(
                f"views: validation reads one centred view, found {self.clips} x {self.crops}; use protocol 'test'"
            )

    @property
    def num_views(self) -> int:
        """Views of one sample."""
        return self.clips * self.crops


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipFacts:
    """What a draw needs to know of a stored clip."""

    key: str
    frame_ticks: NDArray[np.int32]
    """Time of every frame in 1/90000 s, never going back."""
    mel_rows: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewDraw:
    """One view of a clip, fully decided."""

    frame_indices: tuple[int, ...]
    """Stored frames in view order; repeats where the clip is short."""
    crop: Crop
    flip: bool
    mel_start_row: int
    augment: ImageAugment | None = None
    """RandAugment of the frames after the flip."""
    erased: tuple[ErasedBox, ...] = ()
    """Boxes painted over after it."""
    spectrogram: SpectrogramDraw = UNCHANGED


@dataclass(frozen=True, slots=True)
class _Stream:
    """The random numbers of one reading of a sample, one stream per purpose."""

    seed: int
    epoch: int
    sample: str
    repeat: int

    def key(self, purpose: str) -> Key:
        key = (purpose, self.seed, self.epoch, self.sample)
        return (*key, self.repeat) if self.repeat else key

    def uniforms(self, purpose: str, count: int) -> list[float]:
        numbers: list[float] = uniforms(self.key(purpose), count).tolist()
        return numbers


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainDraws:
    """Draws one random view of each sample of an epoch."""

    clip: ClipSpec
    sampling: SamplingConfig
    augment: AugmentConfig
    seed: int
    epoch: int
    first_pair: int = 0
    """Where the rank's share begins in the global batch, in pairs of clips."""

    def mixing(self, step: int, has_audio: Sequence[bool]) -> Mixing | None:
        """Return how the rank's share of `step` is mixed, by which clips have sound; None: not at all."""
        if self.augment.mixing.probability == 0:
            return None
        heard = [one or other for one, other in zip(has_audio[::2], has_audio[1::2], strict=True)]
        keys = [("mixing", self.seed, self.epoch, step, self.first_pair + pair) for pair in range(len(heard))]
        drawn = self.augment.mixing.drawn
        return mixing_of([drawn(key, self.clip, heard=one) for key, one in zip(keys, heard, strict=True)])

    def views(self, facts: ClipFacts, *, repeat: int = 0) -> tuple[ViewDraw, ...]:
        """Return the single view of the sample in this epoch; `repeat` counts its earlier readings in the epoch."""
        stream, augment = _Stream(self.seed, self.epoch, facts.key, repeat), self.augment
        (mel_fraction,) = stream.uniforms("mel", 1)
        (flip,) = stream.uniforms("flip", 1)
        operations: ImageAugment | None = None
        erased: tuple[ErasedBox, ...] = ()
        if augment.rand_augment is not None:
            rules = parse_rand_augment(augment.rand_augment)
            count = rules.num_operations * NUMBERS_PER_OPERATION
            operations = rules.drawn(stream.uniforms("rand_augment", count))
        if augment.erasing.probability > 0:
            numbers = stream.uniforms("erasing", augment.erasing.num_numbers)
            erased = augment.erasing.drawn(numbers, size=self.clip.crop_size, key=stream.key("erasing_noise"))
        view = ViewDraw(
            frame_indices=self._frames(facts, stream),
            crop=self._crop(stream),
            flip=flip < augment.flip_probability,
            mel_start_row=mel_start(facts.mel_rows, rows_read=self.clip.mel_rows, fraction=mel_fraction),
            augment=operations,
            erased=erased,
            spectrogram=augment.spectrogram.drawn(
                stream.uniforms("spectrogram", augment.spectrogram.num_numbers),
                num_rows=self.clip.mel_rows,
                num_bins=self.clip.num_mel_bins,
                key=stream.key("spectrogram_noise"),
            ),
        )
        return (view,)

    def _frames(self, facts: ClipFacts, stream: _Stream) -> tuple[int, ...]:
        line = Timeline.of(facts.frame_ticks, frame_stride=self.sampling.frame_stride)
        num_frames, numbers = self.clip.num_frames, stream.uniforms("frames", self.clip.num_frames)
        if self.sampling.scheme == "dense":
            return line.frames_at(dense_window(line.length, num_frames=num_frames, stride=line.stride, u=numbers[0]))
        if len(facts.frame_ticks) < num_frames and self.sampling.short_clip == "reference":
            return (0,) * num_frames
        return line.frames_at(uniform_train(line.length, num_frames=num_frames, uniforms=numbers))

    def _crop(self, stream: _Stream) -> RandomCrop:
        numbers = stream.uniforms("crop", 2 * _CROP_ATTEMPTS + 2)
        low, high = self.augment.crop_area
        log_low, log_high = map(math.log, self.augment.crop_aspect_ratio)
        return RandomCrop(
            area_fractions=tuple(low + u * (high - low) for u in numbers[:_CROP_ATTEMPTS]),
            aspect_ratios=tuple(
                math.exp(log_low + u * (log_high - log_low)) for u in numbers[_CROP_ATTEMPTS : 2 * _CROP_ATTEMPTS]
            ),
            vertical=numbers[-2],
            horizontal=numbers[-1],
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationDraws:
    """The fixed views of a sample: clips in order and, for each, its crops in order."""

    clip: ClipSpec
    sampling: SamplingConfig
    view_plan: EvaluationViews

    def mixing(self, step: int, has_audio: Sequence[bool]) -> None:
        """Return None: evaluation never mixes."""

    def views(self, facts: ClipFacts, *, repeat: int = 0) -> tuple[ViewDraw, ...]:  # noqa: ARG002 - as in training
        """Return all views of the sample; the same at every reading."""
        plan, is_test = self.view_plan, self.view_plan.protocol == "test"
        line = Timeline.of(facts.frame_ticks, frame_stride=self.sampling.frame_stride)
        frames = [line.frames_at(self._chosen(line, clip)) for clip in range(plan.clips)]
        views = []
        for clip, crop in product(range(plan.clips), range(plan.crops)):
            fraction = Fraction(1, 2)
            if is_test:
                fraction = mel_test_fraction(clip=clip, crop=crop, num_clips=plan.clips, num_crops=plan.crops)
            views.append(
                ViewDraw(
                    frame_indices=frames[clip],
                    crop=SquareCrop(fraction=crop / (plan.crops - 1) if plan.crops > 1 else 0.5),
                    flip=False,
                    mel_start_row=mel_start(facts.mel_rows, rows_read=self.clip.mel_rows, fraction=fraction),
                )
            )
        return tuple(views)

    def _chosen(self, line: Timeline, clip: int) -> Frames:
        n, num_frames, num_clips = line.length, self.clip.num_frames, self.view_plan.clips
        if self.sampling.scheme == "uniform":
            return uniform_test(n, num_frames=num_frames, clip=clip, num_clips=num_clips)
        if self.view_plan.protocol == "test":
            return dense_test(n, num_frames=num_frames, stride=line.stride, clip=clip, num_clips=num_clips)
        return dense_window(n, num_frames=num_frames, stride=line.stride, u=0.5)


Draws = TrainDraws | EvaluationDraws
"""What decides the views of a sample."""


def scaled_stride(frame_stride: int, frames_per_second: float) -> int:
    """Return the stride that spans the same time at the clip's own rate; 24 to 30 fps count as the nominal 30."""
    if _ABOUT_NOMINAL[0] <= frames_per_second <= _ABOUT_NOMINAL[1]:
        return frame_stride
    return max(1, round(frame_stride * frames_per_second / _NOMINAL_RATE))


def frames_per_second(ticks: NDArray[np.int32]) -> float:
    """Return the mean rate of stored frame times; the nominal 30 for a single frame."""
    if len(ticks) < 2 or ticks[-1] <= ticks[0]:
        return _NOMINAL_RATE
    return (len(ticks) - 1) * TICKS_PER_SECOND / float(ticks[-1] - ticks[0])


def rate_varies(ticks: NDArray[np.int32]) -> bool:
    """Return whether a frame is over half an interval off its place on an even grid from the first to the last frame.

    Rounded or jittering times of a constant rate stay on it.
    """
    times, last = ticks.astype(np.int64) - int(ticks[0]), len(ticks) - 1
    return last >= 2 and 2 * int(np.abs(times * last - np.arange(last + 1) * times[-1]).max()) > int(times[-1])


def dense_window(n: int, *, num_frames: int, stride: int, u: float) -> Frames:
    """Return `num_frames` points of a window of `num_frames` x `stride` frames, at `u` of the room in [0, 1).

    Of a clip that is not longer than the window: as many as n // stride points over it, then its last frame.
    """
    span = num_frames * stride
    if n <= span:
        count = n // stride
        points = [i * n // max(count - 1, 1) for i in range(count)] + [n] * (num_frames - count)
        return tuple(min(point, n - 1) for point in points)
    start = int(u * (n - span))
    return tuple(start + min(i * span // (num_frames - 1), span - 1) for i in range(num_frames))


def dense_test(n: int, *, num_frames: int, stride: int, clip: int, num_clips: int) -> Frames:
    """Return clip `clip` of `num_clips` equally placed runs of every `stride`-th frame; one takes the centre."""
    candidates = list(range(0, n, stride))
    candidates += candidates[-1:] * (num_frames - len(candidates))
    room = len(candidates) - num_frames
    start = clip * room // (num_clips - 1) if num_clips > 1 else room // 2
    return tuple(candidates[start : start + num_frames])


def uniform_train(n: int, *, num_frames: int, uniforms: Sequence[float]) -> Frames:
    """Return a random frame of each of `num_frames` equal segments of n // num_frames frames; all, where n is less."""
    segment = n // num_frames
    if segment:
        return tuple(i * segment + int(u * segment) for i, u in zip(range(num_frames), uniforms, strict=True))
    return tuple(i * n // num_frames for i in range(num_frames))


def uniform_test(n: int, *, num_frames: int, clip: int, num_clips: int) -> Frames:
    """Return frames (i + clip / num_clips) * n / num_frames; two clips: segment starts and middles; one: middles."""
    if num_clips == 1:
        clip, num_clips = 1, 2
    return tuple((i * num_clips + clip) * n // (num_frames * num_clips) for i in range(num_frames))


def mel_start(num_rows: int, *, rows_read: int, fraction: float | Fraction) -> int:
    """Return a view's first spectrogram row: `fraction` of the room, 0 where the clip is shorter than the view."""
    return int(fraction * max(num_rows - rows_read, 0))


def mel_test_fraction(*, clip: int, crop: int, num_clips: int, num_crops: int) -> Fraction:
    """Return where the spectrogram of a test view lies: views walk through the middle of the clip."""
    return Fraction(num_crops * clip + crop + 3, num_clips * num_crops + 6)
