"""What the order of an epoch depends on, kept with every checkpoint and compared before a resume."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from pipelines.errors import PlanError, ResumeMismatchError

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

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` reads them back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "PlanRecord":
        """The record of `to_dict`'s values.

        Raises:
            ResumeMismatchError: fields are missing or unknown: another version of ca2st wrote them.
        """
        known = {field.name for field in fields(cls)}
        if set(values) != known:
            raise ResumeMismatchError(
                f"loader record: expected the fields {sorted(known)}, found {sorted(values)}; "
                "resume with the release that wrote it, or start a new run"
            )
        return cls(**values)

    def differences(self, other: "PlanRecord") -> tuple[str, ...]:
        """One ``field: ours -> theirs`` for each field in which `other` differs."""
        ours, theirs = self.to_dict(), other.to_dict()
        return tuple(f"{name}: {ours[name]!r} -> {theirs[name]!r}" for name in ours if ours[name] != theirs[name])

    def require_same(self, now: "PlanRecord") -> None:
        """Refuse to go on with `now` where this record began.

        Raises:
            ResumeMismatchError: any field differs; the message names each with both values.
        """
        if found := self.differences(now):
            raise ResumeMismatchError(
                f"resume: the order of samples would change ({'; '.join(found)}); "
                "use the values the run began with, or start a new run"
            )


def default_num_lanes(global_batch_size: int) -> int:
    """The largest divisor of the global batch that is at most 64."""
    return max(lanes for lanes in range(1, min(_MOST_LANES, global_batch_size) + 1) if not global_batch_size % lanes)
