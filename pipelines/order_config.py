"""Which samples a training reads, and how often."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from ca2st.errors import UserInputError
from pipelines.balance import BalanceConfig
from pipelines.choices import require_one_of
from pipelines.quotas import block_quotas
from pipelines.selection import SelectionConfig

TrainRemainder = Literal["drop", "wrap"]


@dataclass(frozen=True, kw_only=True, slots=True)
class OrderConfig:
    """Which samples a training reads, and how often; all of it is part of the order."""

    weights: tuple[float, ...] | None = None
    """One a shard set: the sets' shares of the samples. None: the sets are read as one, every sample alike."""
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    """Which samples of the sets."""
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    """How often each class; with weights, inside each set."""
    repeats: int = 1
    """Readings of each sample in a batch (repeated augmentation)."""
    epoch_samples: int | None = None
    """Samples of an epoch before `repeats`; None: one pass through everything."""
    remainder: TrainRemainder = "drop"
    """``drop`` or ``wrap``: see `PlanRecord.remainder`."""

    def __post_init__(self) -> None:
        require_one_of("remainder", self.remainder, get_args(TrainRemainder))
        if self.repeats < 1:
            raise UserInputError(f"repeats: expected at least 1, found {self.repeats}")
        if self.epoch_samples is not None and self.epoch_samples < 1:
            raise UserInputError(f"epoch_samples: expected at least 1, found {self.epoch_samples}")
        if self.weights is not None:
            block_quotas(self.weights)  # a weight that cannot be used is told before anything starts
