"""What the order of an epoch depends on, kept with every checkpoint and compared before a resume."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from pipelines.balance import BalanceConfig
from pipelines.errors import PlanError
from pipelines.selection import SelectionConfig

ORDER_VERSION = 1
"""Raised whenever the same record would give another order or other draws."""
Remainder = Literal["drop", "wrap", "pad"]
_MOST_LANES = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class SetShare:
    """One shard set of a mixture."""

    fingerprint: str
    """Stands for every byte of the set."""
    weight: float | None
    """Its share of the samples, in parts of the sum of all weights; None: the sets are read as one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanRecord:
    """The order is a function of this record, the shard sets it names and the epoch, and of nothing else.

    The number of ranks is absent on purpose: every world size reads the same global order.
    """

    seed: int
    """Keys every permutation and every draw."""
    global_batch_size: int
    """Samples of one step, all ranks together."""
    num_lanes: int
    """Parallel runs through the shards; divides `global_batch_size`."""
    shuffle_block: int
    """Samples that are shuffled together inside a lane; 0: shards and samples in their stored order."""
    remainder: Remainder
    """What becomes of an end that fills no whole batch. ``drop``: left out this epoch. ``wrap``: the batch is filled up
    with the first samples of one more pass. ``pad``: filled up with marked samples that count nowhere (evaluation)."""
    manifest_fingerprint: str
    """Stands for every byte of the shard set, the first one of a mixture."""
    mixture: tuple[SetShare, ...] = ()
    """All sets in order, where there are several."""
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    """Which samples of the sets are read."""
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    """How often classes are read."""
    repeats: int = 1
    """Readings of each sample in a batch, each with draws of its own (repeated augmentation)."""
    epoch_samples: int | None = None
    """Samples of an epoch, `repeats` not counted; None: those of one pass through everything."""
    version: int = ORDER_VERSION
    """Version of the rules that turn the record into an order."""

    def __post_init__(self) -> None:
        if self.global_batch_size < 1 or self.num_lanes < 1 or self.shuffle_block < 0:
            raise PlanError(
                f"expected global_batch_size >= 1, num_lanes >= 1 and shuffle_block >= 0, found "
                f"{self.global_batch_size}, {self.num_lanes} and {self.shuffle_block}"
            )
        if self.repeats < 1 or (self.epoch_samples is not None and self.epoch_samples < 1):
            raise PlanError(
                f"expected repeats >= 1 and epoch_samples >= 1, found {self.repeats} and {self.epoch_samples}"
            )
        default = default_num_lanes(self.global_batch_size, repeats=self.repeats)
        if self.global_batch_size % self.num_lanes:
            raise PlanError(
                f"num_lanes: expected a divisor of global_batch_size {self.global_batch_size}, found {self.num_lanes}; "
                f"leave it out for {default}"
            )
        if self.repeats > 1 and (self.global_batch_size // self.num_lanes) % (2 * self.repeats):
            raise PlanError(
                f"num_lanes: with repeats {self.repeats} a lane's share of a batch must be a multiple of "
                f"{2 * self.repeats}, found {self.global_batch_size} / {self.num_lanes}; leave it out for {default}"
            )
        if self.remainder not in get_args(Remainder):
            raise PlanError(f"remainder: expected one of {', '.join(get_args(Remainder))}, found {self.remainder!r}")


def default_num_lanes(global_batch_size: int, *, repeats: int = 1) -> int:
    """The largest divisor of the global batch that is at most 64; with repeats, of its groups of 2 * `repeats`.

    Raises:
        PlanError: the batch does not hold whole groups: pairs of samples, each `repeats` times.
    """
    group = 2 * repeats if repeats > 1 else 1
    if global_batch_size % group:
        raise PlanError(
            f"global_batch_size {global_batch_size}: with repeats {repeats} expected a multiple of {group} "
            f"(pairs of samples, {repeats} times each); change one of the two"
        )
    groups = global_batch_size // group
    return max(lanes for lanes in range(1, min(_MOST_LANES, groups) + 1) if not groups % lanes)
