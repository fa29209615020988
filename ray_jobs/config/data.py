"""The `[data]` section of a recipe: which shards, which labels, and how clips are drawn from them."""

from dataclasses import dataclass, field

from ca2st.errors import UserInputError
from pipelines.augment.config import AugmentConfig
from pipelines.balance import BalanceConfig
from pipelines.draws import EvaluationViews
from pipelines.loader_config import LoaderConfig
from pipelines.order_config import OrderConfig, TrainRemainder
from pipelines.sampling import SamplingConfig
from pipelines.selection import SelectionConfig
from sharding.location import as_location
from sharding.synthetic.config import SyntheticConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class SyntheticData:
    """A small audio-visual world made by our own code, so that a recipe runs without any download."""

    num_train: int = 512
    """Clips of the training split."""
    num_validation: int = 128
    """Clips of the validation split."""
    frame_size: int = 64
    """Height and width of its frames in pixels."""
    frames_per_second: int = 16
    """Frame rate of its videos."""
    min_frames: int = 16
    """Frames of its shortest clip; all clips of ``binding`` have this many."""
    max_frames: int = 21
    """Frames of its longest clip."""
    task: str = "holistic"
    """What is labelled: ``space``, ``time``, ``audio`` or all three together, ``holistic``; or, in scenes of several
    objects, ``binding``: which of them keeps time with the sound."""
    difficulty: str = "easy"
    """``easy``, ``medium`` or ``hard``; sharding/synthetic/README.md says what each means."""
    seed: int = 0
    """Seed of the world; the splits never share a clip."""

    def __post_init__(self) -> None:
        if min(self.num_train, self.num_validation) < 1:
            raise UserInputError("num_train, num_validation: expected at least one clip each")
        self.world("train")

    def world(self, split: str, *, workers: int = 1) -> SyntheticConfig:
        """The settings of one split for those who make it.

        Raises:
            UserInputError: a value out of range.
        """
        return SyntheticConfig(
            num_samples=self.num_train if split == "train" else self.num_validation,
            frame_size=self.frame_size,
            frames_per_second=self.frames_per_second,
            min_frames=self.min_frames,
            max_frames=self.max_frames,
            difficulty=self.difficulty,
            binding=self.task == "binding",
            seed=self.seed,
            workers=workers,
        )


def check_place(name: str, place: str) -> None:
    """Refuse a URL that is not read, or that carries a secret; `name` is the setting.

    Raises:
        UserInputError: as `as_location`; the message holds no secret.
    """
    try:
        as_location(place)
    except UserInputError as error:
        raise UserInputError(f"{name}: {error}") from None


@dataclass(frozen=True, kw_only=True, slots=True)
class MixtureSet:
    """One of several shard sets that are trained on together: a ``[[data.mixture]]`` section."""

    train: str
    """Folder or URL of its shards. Every set must have the same classes for each target, in the same order."""
    weight: float | None = None
    """Its share of the samples, in parts of the sum of all weights; given for every set or for none. None: every sample
    of every set once an epoch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Which shards, which labels, and how clips are drawn from them."""

    train: str | None = None
    """Folder or URL (s3, gs, http) of the training split's shards (``--data`` overrides it)."""
    mixture: tuple[MixtureSet, ...] = ()
    """Several shard sets in place of `train`."""
    select: SelectionConfig = field(default_factory=SelectionConfig)
    """Train on a part of the samples; validation stays whole."""
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    """Read rare classes more often in training; with weights, inside each set."""
    repeats: int = 1
    """Readings of each sample in a training batch, each with random views of its own: repeated augmentation. An epoch
    has as many times the steps; 1 is none. Source: Hoffer et al., "Augment your batch" (CVPR 2020)."""
    epoch_samples: int | None = None
    """Samples of an epoch before `repeats`; None: one pass, that is all sets' samples together."""
    remainder: TrainRemainder = "drop"
    """The end of an epoch that fills no whole batch: ``drop`` leaves it out, other samples each epoch; ``wrap`` fills
    the batch with the beginning of one more pass, so that all are read, even where they are fewer than a batch."""
    validation: str | None = None
    """Folder or URL of the validation split's shards; None: no validation."""
    synthetic: SyntheticData | None = None
    """Make this world's shards first, where `train` names none."""
    targets: tuple[str, ...] | None = None
    """Label spaces to learn, by name; None: the manifest's own targets."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Which frames of a clip."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Random views in training."""
    views: EvaluationViews = field(default_factory=EvaluationViews)
    """Views a sample in validation while training."""
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    """Order, threads, backend."""

    def __post_init__(self) -> None:
        for name, place in (("train", self.train), ("validation", self.validation)):
            if place is not None:
                check_place(name, place)
        for entry in self.mixture:
            check_place("mixture", entry.train)
        if self.targets is not None and not self.targets:
            raise UserInputError(
                "targets: expected at least one label space, found none; leave it out for the set's own"
            )
        if self.mixture and (self.train is not None or self.synthetic is not None):
            other = "train" if self.train is not None else "synthetic"
            raise UserInputError(f"mixture: expected no data.{other} beside it; remove one of the two")
        weighted = [entry.train for entry in self.mixture if entry.weight is not None]
        if weighted and len(weighted) < len(self.mixture):
            bare = next(entry.train for entry in self.mixture if entry.weight is None)
            raise UserInputError(f"mixture: expected a weight for every set or for none, found none for {bare}")
        self.order()

    def order(self) -> OrderConfig:
        """What decides which samples a training reads, beside the sets themselves."""
        weights = tuple(entry.weight for entry in self.mixture if entry.weight is not None)
        return OrderConfig(
            weights=weights or None,
            selection=self.select,
            balance=self.balance,
            repeats=self.repeats,
            epoch_samples=self.epoch_samples,
            remainder=self.remainder,
        )
