"""The random draws of a view, made ahead of any pixel and handed to the backends as data.

Every draw comes from a stream keyed by (purpose, seed, epoch, sample key): one purpose never disturbs another, and
neither ranks, threads nor the order of reading matter.
"""

import math
from dataclasses import dataclass
from itertools import product
from typing import Literal, get_args

from ca2st.errors import UserInputError
from ca2st.spec import ClipSpec
from pipelines import sampling
from pipelines.choices import require_one_of
from pipelines.crops import Crop, RandomCrop, SquareCrop
from pipelines.keyed_random import uniforms
from pipelines.sampling import SamplingConfig

Protocol = Literal["validation", "test"]

_CROP_ATTEMPTS = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentConfig:
    """The training transform: random resized crop and flip, one draw for all frames of a clip."""

    crop_area: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest part of the picture's area."""
    crop_aspect_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest width / height, drawn evenly on a logarithmic scale."""
    flip_probability: float = 0.5
    """Chance of a mirror image; 0 where left and right are the label (Something-Something)."""

    def __post_init__(self) -> None:
        for name in ("crop_area", "crop_aspect_ratio"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise UserInputError(f"augment.{name}: expected 0 < low <= high, found ({low}, {high})")
        if self.crop_area[1] > 1:
            raise UserInputError(f"augment.crop_area: expected at most 1, found {self.crop_area[1]}")
        if not 0 <= self.flip_probability <= 1:
            raise UserInputError(f"augment.flip_probability: expected 0..1, found {self.flip_probability}")


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
        require_one_of("views.protocol", self.protocol, get_args(Protocol))
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
    num_frames: int
    frames_per_second: float
    mel_rows: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewDraw:
    """One view of a clip, fully decided."""

    frame_indices: tuple[int, ...]
    """Stored frames in view order; repeats where the clip is short."""
    crop: Crop
    flip: bool
    mel_start_row: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainDraws:
    """Draws one random view of each sample of an epoch."""

    clip: ClipSpec
    sampling: SamplingConfig
    augment: AugmentConfig
    seed: int
    epoch: int

    def views(self, facts: ClipFacts) -> tuple[ViewDraw, ...]:
        """The single view of the sample in this epoch."""
        (mel_fraction,) = self._uniforms("mel", facts.key, 1)
        (flip,) = self._uniforms("flip", facts.key, 1)
        view = ViewDraw(
            frame_indices=self._frames(facts),
            crop=self._crop(facts.key),
            flip=flip < self.augment.flip_probability,
            mel_start_row=sampling.mel_start(facts.mel_rows, rows_read=self.clip.mel_rows, fraction=mel_fraction),
        )
        return (view,)

    def _uniforms(self, purpose: str, key: str, count: int) -> list[float]:
        numbers: list[float] = uniforms((purpose, self.seed, self.epoch, key), count).tolist()
        return numbers

    def _frames(self, facts: ClipFacts) -> tuple[int, ...]:
        n, num_frames = facts.num_frames, self.clip.num_frames
        numbers = self._uniforms("frames", facts.key, num_frames)
        if self.sampling.scheme == "uniform":
            return sampling.uniform_train(
                n, num_frames=num_frames, uniforms=numbers, short_clip=self.sampling.short_clip
            )
        stride = sampling.scaled_stride(self.sampling.frame_stride, facts.frames_per_second)
        return sampling.dense_train(n, num_frames=num_frames, stride=stride, u=numbers[0])

    def _crop(self, key: str) -> RandomCrop:
        numbers = self._uniforms("crop", key, 2 * _CROP_ATTEMPTS + 2)
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

    def views(self, facts: ClipFacts) -> tuple[ViewDraw, ...]:
        """All views of the sample."""
        plan = self.view_plan
        frames = [self._frames(facts, clip) for clip in range(plan.clips)]
        return tuple(
            ViewDraw(
                frame_indices=frames[clip],
                crop=SquareCrop(fraction=crop / (plan.crops - 1) if plan.crops > 1 else 0.5),
                flip=False,
                mel_start_row=self._mel_start(facts.mel_rows, clip, crop),
            )
            for clip, crop in product(range(plan.clips), range(plan.crops))
        )

    def _mel_start(self, mel_rows: int, clip: int, crop: int) -> int:
        plan, fraction = self.view_plan, 0.5
        if plan.protocol == "test":
            fraction = sampling.mel_test_fraction(clip=clip, crop=crop, num_clips=plan.clips, num_crops=plan.crops)
        return sampling.mel_start(mel_rows, rows_read=self.clip.mel_rows, fraction=fraction)

    def _frames(self, facts: ClipFacts, clip: int) -> tuple[int, ...]:
        n, num_frames, plan = facts.num_frames, self.clip.num_frames, self.view_plan
        is_test = plan.protocol == "test"
        if self.sampling.scheme == "uniform":
            if is_test:
                return sampling.uniform_test(n, num_frames=num_frames, clip=clip, num_clips=plan.clips)
            return sampling.uniform_validation(n, num_frames=num_frames)
        stride = sampling.scaled_stride(self.sampling.frame_stride, facts.frames_per_second)
        if is_test:
            return sampling.dense_test(n, num_frames=num_frames, stride=stride, clip=clip, num_clips=plan.clips)
        return sampling.dense_validation(n, num_frames=num_frames, stride=stride)


Draws = TrainDraws | EvaluationDraws
"""What decides the views of a sample."""
