"""What the order of an epoch depends on, kept with every checkpoint and compared before a resume."""

from dataclasses import dataclass
from typing import Literal, get_args

from pipelines.errors import PlanError

ORDER_VERSION = 1
"""Raised whenever the same record would give another order or other draws."""
Remainder = Literal["drop", "pad"]
_MOST_LANES = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanRecord:
    """The order is a function of this record, the shard sizes and the epoch, and of nothing else.

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
    """``drop``: what fills no whole batch is left out this epoch. ``pad``: the last batches are filled up, marked."""
    manifest_fingerprint: str
    """Stands for every byte of the shard set."""
    version: int = ORDER_VERSION
    """Version of the rules that turn the record into an order."""

    def __post_init__(self) -> None:
        if self.global_batch_size < 1 or self.num_lanes < 1 or self.shuffle_block < 0:
            raise PlanError(
                f"expected global_batch_size >= 1, num_lanes >= 1 and shuffle_block >= 0, found "
                f"{self.global_batch_size}, {self.num_lanes} and {self.shuffle_block}"
            )
        if self.global_batch_size % self.num_lanes:
            raise PlanError(
                f"num_lanes: expected a divisor of global_batch_size {self.global_batch_size}, found {self.num_lanes}; "
                f"leave it out for {default_num_lanes(self.global_batch_size)}"
            )
        if self.remainder not in get_args(Remainder):
            raise PlanError(f"remainder: expected one of {', '.join(get_args(Remainder))}, found {self.remainder!r}")


def default_num_lanes(global_batch_size: int) -> int:
    """The largest divisor of the global batch that is at most 64."""
    return max(lanes for lanes in range(1, min(_MOST_LANES, global_batch_size) + 1) if not global_batch_size % lanes)
