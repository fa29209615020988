"""Mixup and CutMix of pairs: how clips 2k and 2k+1 of a global batch are mixed, decided ahead and handed on as data.

One lambda per pair, the share that a clip keeps of itself, drawn from a stream keyed by (seed, epoch, step, k): no
split into ranks and micro-batches changes it. From this one lambda follows everything of the pair:

- video: blended with lambda (mixup), or, where `switch_probability` says so, a box of 1 - lambda of the picture's
  area is taken from the partner (CutMix), the same in every frame;
- spectrogram, beside either: a box of 1 - lambda of its area is taken from the partner (``cutmix``), or it is blended
  with lambda too (``mixup``);
- labels: lambda; where a box is used, the part of the area outside it, since a box that reaches over the border is cut
  there; of two boxes (video and spectrogram) the mean.

Both clips of a pair keep the same share and lose the same box. A clip without sound lends and keeps zeros, as its
spectrogram is; where neither clip has sound nothing is heard, and the spectrogram's box does not count for the labels.
Times (`intervals_seconds`) stay those of the clip itself.

Source: Zhang et al., "mixup" (2017); Yun et al., "CutMix" (2019), with timm's rules for the box.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from ca2st.batch import MIXING_FIELDS, Mixing
from ca2st.errors import UserInputError, check_choice
from ca2st.spec import ClipSpec
from pipelines.errors import check_range
from pipelines.keyed_random import Key, uniforms

SpectrogramMixing = Literal["cutmix", "mixup"]
_ATTEMPTS = 64
_NUMBERS = 6
"""Of each pair before the attempts: whether, switch, and the two middles of the boxes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MixingConfig:
    """Mixing of pairs; off by default.

    Published: ``probability = 0.9`` (0.5 for Kinetics-400), everything else as here: mixup on the video, never CutMix,
    and on sets with sound CutMix of the spectrogram beside it.
    """

    probability: float = 0.0
    """Chance that a pair is mixed (``mixup_prob`` of the reference). Above 0, batches and micro-batches are even."""
    mixup_alpha: float = 0.8
    """Lambda of a blended video is drawn from Beta(alpha, alpha)."""
    cutmix_alpha: float = 1.0
    """The same where the video is cut."""
    switch_probability: float = 0.0
    """Chance that the video of a mixed pair is cut instead of blended; published: never."""
    spectrogram: SpectrogramMixing = "cutmix"
    """``cutmix``: a box from the same lambda, whose area then decides the labels. ``mixup``: blended with lambda; for
    models that do not hear, where the labels must follow the video alone."""

    def __post_init__(self) -> None:
        check_choice("augment.mixing.spectrogram", self.spectrogram, get_args(SpectrogramMixing))
        check_range(self, "augment.mixing.", "probability", "switch_probability", low=0, high=1)
        for name in ("mixup_alpha", "cutmix_alpha"):
            if not 0 < getattr(self, name) <= 1:
                raise UserInputError(
                    f"augment.mixing.{name}: expected above 0 and at most 1, found {getattr(self, name)}"
                )

    def check_even(self, name: str, num_clips: int) -> None:
        """Raise `UserInputError` where mixing is on and a number of clips would part a pair; `name` is the setting."""
        if self.probability > 0 and num_clips % 2:
            raise UserInputError(
                f"{name}: expected an even number where pairs of clips are mixed (augment.mixing.probability "
                f"{self.probability}), found {num_clips}; make it even or set the probability to 0"
            )

    def drawn(self, key: Key, clip: ClipSpec, *, heard: bool) -> "PairMixing":
        """Return how the pair that `key` names is mixed; `heard`: one of its clips has sound."""
        whether, switch, *rest = uniforms(key, _NUMBERS + 2 * _ATTEMPTS).tolist()
        if whether >= self.probability:
            return UNMIXED
        middles, attempts = rest[: _NUMBERS - 2], rest[_NUMBERS - 2 :]
        is_cut, is_mel_cut = switch < self.switch_probability, self.spectrogram == "cutmix"
        share = beta(self.cutmix_alpha if is_cut else self.mixup_alpha, attempts)
        size, rows, bins = clip.crop_size, clip.mel_rows, clip.num_mel_bins
        video_box = cut_box(share, (size, size), middles[:2]) if is_cut else NO_BOX
        mel_box = cut_box(share, (rows, bins), middles[2:]) if is_mel_cut else NO_BOX
        areas = [1 - video_box[2] * video_box[3] / size**2] if is_cut else []
        if is_mel_cut and heard:
            areas.append(1 - mel_box[2] * mel_box[3] / (rows * bins))
        return PairMixing(
            video_share=1.0 if is_cut else share,
            video_box=video_box,
            mel_share=1.0 if is_mel_cut else share,
            mel_box=mel_box,
            label_share=sum(areas) / len(areas) if areas else share,
        )


Box = tuple[int, int, int, int]
"""First place and length along two axes: (top, left, height, width), or (first row, first bin, rows, bins)."""
NO_BOX: Box = (0, 0, 0, 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class PairMixing:
    """What both clips of a pair keep of themselves, and the boxes they take from each other."""

    video_share: float = 1.0
    video_box: Box = NO_BOX
    mel_share: float = 1.0
    mel_box: Box = NO_BOX
    label_share: float = 1.0


UNMIXED = PairMixing()
"""Both clips stay as they are."""


def mixing_of(pairs: Sequence[PairMixing]) -> Mixing:
    """Return how the clips of a batch are mixed, neighbours alike, as the batch carries it."""
    rows = [pair for pair in pairs for _ in range(2)]
    return Mixing(**{name: torch.tensor([getattr(row, name) for row in rows]) for name in MIXING_FIELDS})


def beta(alpha: float, numbers: Sequence[float]) -> float:
    """Draw from Beta(alpha, alpha), alpha at most 1, by Jöhnk's method from pairs of uniform numbers.

    At least every second pair is accepted: the 64 pairs that are given run out once in 10^19 draws, and then give 1/2.
    """
    for u, v in zip(numbers[::2], numbers[1::2], strict=True):
        x, y = u ** (1 / alpha), v ** (1 / alpha)
        if 0 < x + y <= 1:
            return float(x / (x + y))
    return 0.5


def cut_box(share: float, sizes: tuple[int, int], middles: Sequence[float]) -> Box:
    """Return a box of 1 - `share` of the area about an evenly drawn middle, cut at the borders."""
    part = math.sqrt(1 - share)
    (first, length), (other_first, other_length) = (
        _cut(int(size * part), int(u * size), size) for size, u in zip(sizes, middles, strict=True)
    )
    return first, other_first, length, other_length


def _cut(length: int, middle: int, size: int) -> tuple[int, int]:
    first, end = max(middle - length // 2, 0), min(middle + (length + 1) // 2, size)
    return first, end - first
