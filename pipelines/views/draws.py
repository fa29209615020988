"""What is drawn for a view of a clip: frames, crop, augmentation; keyed by seed, epoch and sample."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from typing import Literal, get_args

from ca2st.errors import UserInputError, check_choice
from ca2st.spec import ClipSpec
from pipelines.augment.config import AugmentConfig
from pipelines.augment.crops import Crop, RandomCrop, SquareCrop
from pipelines.augment.erasing import ErasedBox
from pipelines.augment.mixing import MixingDraws, PairMixing
from pipelines.augment.rand_augment import NUMBERS_PER_OPERATION, ImageAugment, parse_rand_augment
from pipelines.augment.spectrogram import UNCHANGED, SpectrogramDraw
from pipelines.keyed_random import Key, uniforms
from pipelines.views import sampling
from pipelines.views.sampling import SamplingConfig, VaryingRate

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
    num_frames: int
    frames_per_second: float
    mel_rows: int
    varying_rate: VaryingRate | None = None
    """Times of the frames, where these are not evenly spaced: views are then chosen by time."""

    def clock(self, config: SamplingConfig) -> tuple[int, int]:
        """Length of the clip and stride of a dense window: in frames, or in ticks where the rate varies."""
        if self.varying_rate is None:
            return self.num_frames, sampling.scaled_stride(config.frame_stride, self.frames_per_second)
        return self.varying_rate.num_ticks, self.varying_rate.stride(config.frame_stride)

    def frames_at(self, chosen: sampling.Frames) -> sampling.Frames:
        """The frames at what was chosen on the scale of `clock`."""
        return chosen if self.varying_rate is None else self.varying_rate.frames_at(chosen)


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
    """What is done to the spectrogram."""


@dataclass(frozen=True, slots=True)
class _Stream:
    """The random numbers of one reading of a sample, a stream a purpose."""

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

    def mixing(self, step: int, has_audio: Sequence[bool]) -> tuple[PairMixing, ...] | None:
        """How each clip of the rank's share of `step` is mixed, by which of them have sound; None: not at all."""
        if self.augment.mixing.probability == 0:
            return None
        draws = MixingDraws(
            config=self.augment.mixing, clip=self.clip, seed=self.seed, epoch=self.epoch, first_pair=self.first_pair
        )
        return draws.of_step(step, has_audio)

    def views(self, facts: ClipFacts, *, repeat: int = 0) -> tuple[ViewDraw, ...]:
        """The single view of the sample in this epoch; `repeat` counts its earlier readings in the same epoch."""
        stream = _Stream(self.seed, self.epoch, facts.key, repeat)
        (mel_fraction,) = stream.uniforms("mel", 1)
        (flip,) = stream.uniforms("flip", 1)
        view = ViewDraw(
            frame_indices=self._frames(facts, stream),
            crop=self._crop(stream),
            flip=flip < self.augment.flip_probability,
            mel_start_row=sampling.mel_start(facts.mel_rows, rows_read=self.clip.mel_rows, fraction=mel_fraction),
            augment=self._rand_augment(stream),
            erased=self._erased(stream),
            spectrogram=self._spectrogram(stream),
        )
        return (view,)

    def _rand_augment(self, stream: "_Stream") -> ImageAugment | None:
        if self.augment.rand_augment is None:
            return None
        rules = parse_rand_augment(self.augment.rand_augment)
        return rules.drawn(stream.uniforms("rand_augment", rules.num_operations * NUMBERS_PER_OPERATION))

    def _erased(self, stream: "_Stream") -> tuple[ErasedBox, ...]:
        erasing = self.augment.erasing
        if erasing.probability == 0:
            return ()
        numbers = stream.uniforms("erasing", erasing.num_numbers)
        return erasing.drawn(numbers, size=self.clip.crop_size, key=stream.key("erasing_noise"))

    def _spectrogram(self, stream: "_Stream") -> SpectrogramDraw:
        config = self.augment.spectrogram
        return config.drawn(
            stream.uniforms("spectrogram", config.num_numbers),
            num_rows=self.clip.mel_rows,
            num_bins=self.clip.num_mel_bins,
            key=stream.key("spectrogram_noise"),
        )

    def _frames(self, facts: ClipFacts, stream: "_Stream") -> tuple[int, ...]:
        (n, stride), num_frames = facts.clock(self.sampling), self.clip.num_frames
        numbers, short_clip = stream.uniforms("frames", num_frames), self.sampling.short_clip
        if self.sampling.scheme == "dense":
            return facts.frames_at(sampling.dense_train(n, num_frames=num_frames, stride=stride, u=numbers[0]))
        if facts.num_frames < num_frames and short_clip == "reference":
            return (0,) * num_frames
        return facts.frames_at(
            sampling.uniform_train(n, num_frames=num_frames, uniforms=numbers, short_clip=short_clip)
        )

    def _crop(self, stream: "_Stream") -> RandomCrop:
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
        """Evaluation never mixes."""

    def views(self, facts: ClipFacts, *, repeat: int = 0) -> tuple[ViewDraw, ...]:  # noqa: ARG002 - as in training
        """All views of the sample; the same at every reading."""
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
        plan, fraction = self.view_plan, Fraction(1, 2)
        if plan.protocol == "test":
            fraction = sampling.mel_test_fraction(clip=clip, crop=crop, num_clips=plan.clips, num_crops=plan.crops)
        return sampling.mel_start(mel_rows, rows_read=self.clip.mel_rows, fraction=fraction)

    def _frames(self, facts: ClipFacts, clip: int) -> tuple[int, ...]:
        n, stride = facts.clock(self.sampling)
        num_frames, num_clips, is_dense = self.clip.num_frames, self.view_plan.clips, self.sampling.scheme == "dense"
        if self.view_plan.protocol == "test":
            chosen = (
                sampling.dense_test(n, num_frames=num_frames, stride=stride, clip=clip, num_clips=num_clips)
                if is_dense
                else sampling.uniform_test(n, num_frames=num_frames, clip=clip, num_clips=num_clips)
            )
        elif is_dense:
            chosen = sampling.dense_validation(n, num_frames=num_frames, stride=stride)
        else:
            chosen = sampling.uniform_validation(n, num_frames=num_frames)
        return facts.frames_at(chosen)


Draws = TrainDraws | EvaluationDraws
"""What decides the views of a sample."""
