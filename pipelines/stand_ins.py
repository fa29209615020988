"""What fills the place of a damaged sample, so that every step keeps its size on every rank.

The place is filled with the sample that the plan puts at the same position, hence in the same lane, one step later;
where that one is damaged too, two steps later, and so on around the epoch; at last with the step's other positions.
So the filling follows from the plan and from what is damaged: not from ranks, threads, or when damage was found.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from ca2st.errors import DataDamageError
from pipelines.errors import SampleDamageError
from pipelines.plan import EpochPlan, PlannedSamples
from pipelines.quarantine import Quarantine, QuarantinedSample
from pipelines.shard_sets import SetReaders
from pipelines.stats import StatsRecorder

T = TypeVar("T")


class PlannedCell(NamedTuple):
    """One place of a batch, as the plan fills it."""

    shard: int
    row: int
    repeat: int
    is_padding: bool


def cells_of(planned: PlannedSamples) -> list[PlannedCell]:
    """The places of some planned samples, in order."""
    columns = (planned.shards, planned.rows, planned.repeats, planned.is_padding)
    return [PlannedCell(*cell) for cell in zip(*(column.tolist() for column in columns), strict=True)]


class StandIns:
    """Candidates for the places of one epoch; safe to use from several threads."""

    def __init__(self, plan: EpochPlan, *, global_batch_size: int) -> None:
        """`plan` is asked from here alone."""
        self._plan, self._batch, self._lock = plan, global_batch_size, threading.Lock()

    def of(self, step: int, position: int) -> Iterator[PlannedCell]:
        """Candidates for `position` of the global batch of `step`, in the order in which they are tried."""
        for later in range(1, self._plan.num_steps):
            yield self._cell((step + later) % self._plan.num_steps, position)
        for other in range(1, self._batch):
            yield self._cell(step, (position + other) % self._batch)

    def _cell(self, step: int, position: int) -> PlannedCell:
        with self._lock:
            return cells_of(self._plan.samples(step, range(position, position + 1)))[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class DamageGuard:
    """Keeps damaged samples out of training batches, within the quarantine's budget."""

    quarantine: Quarantine
    sets: SetReaders
    stats: StatsRecorder
    rank: int

    def sound(
        self, cell: PlannedCell, stand_ins: Iterable[PlannedCell], read: Callable[[PlannedCell], T], *, step: int
    ) -> T:
        """What `read` makes of the cell, or of the first of its stand-ins that is not damaged.

        Raises:
            DataDamageError: the budget is exceeded, or every stand-in is damaged.
        """
        if (made := self._tried(cell, read, step)) is not None:
            return made[0]
        for other in stand_ins:
            if (made := self._tried(other, read, step)) is not None:
                self.stats.add("quarantined", 1)
                return made[0]
        raise DataDamageError(f"step {step}: no sound sample is left to fill a place of the batch; repair the data")

    def reject(self, cell: PlannedCell, error: SampleDamageError, *, step: int) -> None:
        """Put a sample into quarantine; raises as `Quarantine.add`."""
        reader, shard = self.sets.find(cell.shard)
        try:
            key = reader.indexes.entry(shard, cell.row).key
        except SampleDamageError:
            key = ""
        fingerprint, name, row = self._place(cell)
        self.quarantine.add(
            QuarantinedSample(
                fingerprint=fingerprint, shard=name, row=row, key=key, what=str(error), step=step, rank=self.rank
            )
        )

    def _tried(self, cell: PlannedCell, read: Callable[[PlannedCell], T], step: int) -> tuple[T] | None:
        if self._place(cell) in self.quarantine:
            return None
        try:
            return (read(cell),)
        except SampleDamageError as error:
            self.reject(cell, error, step=step)
            return None

    def _place(self, cell: PlannedCell) -> tuple[str, str, int]:
        reader, shard = self.sets.find(cell.shard)
        return reader.fingerprint, reader.shards[shard].name, cell.row
