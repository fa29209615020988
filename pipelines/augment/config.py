"""What a recipe's ``[data.augment]`` says."""

from dataclasses import dataclass, field

from ca2st.errors import UserInputError
from pipelines.augment.boxes import ErasingConfig
from pipelines.augment.mixing import MixingConfig
from pipelines.augment.rand_augment import parse_rand_augment
from pipelines.augment.spectrogram import SpectrogramConfig
from pipelines.errors import check_intervals, check_range


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentConfig:
    """The training transform, one draw for all frames of a clip; evaluation never uses any of it.

    In this order: crop, resize, flip, RandAugment, erasing; then, in the training step, mixing of pairs. By default
    crop and flip alone. Published (CAST, CAVA, CA2ST)::

        [data.augment]
        rand_augment = "rand-m7-n4-mstd0.5-inc1"    # flip_probability = 0.0 for Something-Something
        [data.augment.spectrogram]                   # sets with sound
        time_masks = 2
        frequency_masks = 2
        [data.augment.mixing]
        probability = 0.9                            # 0.5 for Kinetics-400
        spectrogram = "cutmix"                       # "mixup" for CAST, which hears nothing
    """

    crop_area: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest part of the picture's area."""
    crop_aspect_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest width / height, drawn evenly on a logarithmic scale."""
    flip_probability: float = 0.5
    """Chance of a mirror image; 0 where left and right are the label (Something-Something)."""
    rand_augment: str | None = None
    """RandAugment in timm's notation (``rand-m7-n4-mstd0.5-inc1`` as published); None: none."""
    erasing: ErasingConfig = field(default_factory=ErasingConfig)
    """Boxes that are painted over; off by default, as published."""
    spectrogram: SpectrogramConfig = field(default_factory=SpectrogramConfig)
    """Masks, roll and noise; nothing by default."""
    mixing: MixingConfig = field(default_factory=MixingConfig)
    """Mixup and CutMix of pairs; off by default."""

    def __post_init__(self) -> None:
        check_intervals(self, "augment.", "crop_area", "crop_aspect_ratio")
        check_range(self, "augment.", "flip_probability", low=0, high=1)
        if self.crop_area[1] > 1:
            raise UserInputError(f"augment.crop_area: expected at most 1, found {self.crop_area[1]}")
        if self.rand_augment is not None:
            parse_rand_augment(self.rand_augment)
