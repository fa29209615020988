"""The order of an epoch, as a pure function: (record, shard sizes, epoch) -> which sample sits where in each batch.

1. Permute the shards and lay their samples end to end::

       shard 2        shard 0              shard 1
       |--------------|--------------------|---------|

2. Cut the line into `num_lanes` equal runs, and shuffle each run in blocks of `shuffle_block` samples::

       lane 0                 lane 1
       |~~~~~~~~|~~~~~~~~|~~~~|~~~~~~~~|~~~~~~~~|~~~~|

3. A batch takes the next `global_batch_size / num_lanes` samples of every lane. Position p of the batch belongs to
   lane p * num_lanes // global_batch_size.

4. A rank reads a run of positions, hence a run of lanes, hence its own shards (`rank_positions`).

No step but the fourth knows the number of ranks, so every world size reads the same global order, every rank makes
the same number of steps, and any (epoch, step) can be computed without what came before. In memory: the shard
table and one block a lane.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import PlanError
from pipelines.keyed_random import permutation
from pipelines.record import PlanRecord, Remainder


@dataclass(frozen=True, slots=True)
class PlannedSamples:
    """Some positions of one global batch, in order."""

    shards: NDArray[np.int64]
    """Index of each sample's shard in the shard table."""
    rows: NDArray[np.int64]
    """Row of each sample in its shard's index."""
    is_padding: NDArray[np.bool_]
    """True where a sample is only there to fill the batch (it is repeated, and counts nowhere)."""


class EpochPlan:
    """The order of one epoch; see the module's text for the rules.

    Not for several threads at once: it keeps the current block of every lane.
    """

    def __init__(self, record: PlanRecord, shard_sizes: Sequence[int] | NDArray[np.int64], *, epoch: int) -> None:
        """Lay out the epoch; `shard_sizes` are the numbers of samples of the shards in table order.

        Raises:
            PlanError: there are no samples, or with remainder ``drop`` fewer than one batch.
        """
        sizes = np.asarray(shard_sizes, dtype=np.int64)
        self._record, self._epoch = record, epoch
        self._shards = self._order_shards(len(sizes))
        self._starts = np.concatenate([[0], np.cumsum(sizes[self._shards])])
        self.num_samples = int(self._starts[-1])
        """Samples of the whole set."""
        self.num_steps = count_steps(self.num_samples, record.global_batch_size, remainder=record.remainder)
        """Batches of the epoch: the same on every rank."""
        self._lane_starts = [lane * self.num_samples // record.num_lanes for lane in range(record.num_lanes + 1)]
        self._blocks: dict[int, tuple[int, NDArray[np.int64]]] = {}

    def samples(self, step: int, positions: range) -> PlannedSamples:
        """The samples at `positions` of the global batch of `step`.

        Raises:
            PlanError: the step or a position lies outside the epoch.
        """
        batch = self._record.global_batch_size
        if not (0 <= step < self.num_steps and 0 <= positions.start <= positions.stop <= batch):
            raise PlanError(
                f"expected a step below {self.num_steps} and positions within 0..{batch}, "
                f"found step {step} and {positions}"
            )
        per_lane = batch // self._record.num_lanes
        parts = [
            self._lane_slots(lane, step * per_lane + np.arange(first, last))
            for lane, first, last in _runs_of_lanes(positions, per_lane)
        ]
        laid = np.concatenate([laid for laid, _ in parts]) if parts else np.empty(0, np.int64)
        padding = np.concatenate([padding for _, padding in parts]) if parts else np.empty(0, np.bool_)
        place = np.searchsorted(self._starts, laid, side="right") - 1
        return PlannedSamples(self._shards[place], laid - self._starts[place], padding)

    def _order_shards(self, num_shards: int) -> NDArray[np.int64]:
        if not self._record.shuffle_block:
            return np.arange(num_shards, dtype=np.int64)
        return permutation(("shards", self._record.seed, self._epoch), num_shards)

    def _lane_slots(self, lane: int, slots: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Places on the line of a lane's slots, and which slots lie behind the lane's end."""
        start, end = self._lane_starts[lane], self._lane_starts[lane + 1]
        is_padding = slots >= end - start
        inside = np.minimum(slots, max(end - start - 1, 0))
        if block_size := self._record.shuffle_block:
            blocks = inside // block_size
            inside = np.concatenate(
                [
                    block * block_size + self._block(lane, int(block))[inside[blocks == block] % block_size]
                    for block in np.unique(blocks)
                ]
            )
        return np.minimum(start + inside, self.num_samples - 1), is_padding

    def _block(self, lane: int, block: int) -> NDArray[np.int64]:
        held, order = self._blocks.get(lane, (-1, None))
        if held != block or order is None:
            block_size = self._record.shuffle_block
            length = self._lane_starts[lane + 1] - self._lane_starts[lane] - block * block_size
            order = permutation(("block", self._record.seed, self._epoch, lane, block), max(1, min(length, block_size)))
            self._blocks[lane] = (block, order)
        return order


def _runs_of_lanes(positions: range, per_lane: int) -> list[tuple[int, int, int]]:
    """(lane, first, last) for each lane that `positions` touches; first and last count inside the lane's share."""
    if not len(positions):
        return []
    lanes = range(positions.start // per_lane, (positions.stop - 1) // per_lane + 1)
    edges = [positions.start, *(lane * per_lane for lane in lanes[1:]), positions.stop]
    return [
        (lane, first - lane * per_lane, last - lane * per_lane)
        for lane, (first, last) in zip(lanes, pairwise(edges), strict=True)
    ]


def count_steps(num_samples: int, global_batch_size: int, *, remainder: Remainder) -> int:
    """Batches of an epoch.

    Raises:
        PlanError: there are no samples, or with ``drop`` fewer than one batch.
    """
    if num_samples < (global_batch_size if remainder == "drop" else 1):
        raise PlanError(
            f"expected at least one batch of samples: global_batch_size {global_batch_size} (remainder {remainder}), "
            f"found {num_samples} samples; convert more data or lower the batch"
        )
    return num_samples // global_batch_size if remainder == "drop" else -(-num_samples // global_batch_size)


def require_enough_samples(*, num_samples: int, global_batch_size: int, world_size: int, remainder: Remainder) -> None:
    """Refuse, before anything starts, a set that cannot feed every rank.

    Raises:
        PlanError: no samples, fewer samples than ranks, or with ``drop`` fewer than one batch; holds the three numbers.
    """
    least = max(1, world_size, global_batch_size if remainder == "drop" else 1)
    if num_samples < least:
        raise PlanError(
            f"too few samples: {num_samples} samples, global_batch_size {global_batch_size}, world_size {world_size}; "
            f"at least {least} samples are needed (remainder {remainder}): convert more data, lower the batch, or use "
            "fewer ranks"
        )


def rank_positions(rank: int, world_size: int, *, global_batch_size: int, keep_pairs: bool) -> range:
    """The positions of a global batch that belong to `rank`: a run, and together all of them, each once.

    With `keep_pairs` (training) positions 2k and 2k+1, the partners of a mixup, stay on one rank: run borders are
    even, and only the last position of an odd batch is without a partner. Without, runs differ by at most one.

    Raises:
        PlanError: the rank is outside the world, or a rank would get nothing.
    """
    unit = 2 if keep_pairs else 1
    num_units = -(-global_batch_size // unit)
    if not 0 <= rank < world_size:
        raise PlanError(f"rank: expected 0 <= rank < world_size {world_size}, found {rank}")
    if num_units < world_size:
        what = "two positions (a mixup pair)" if keep_pairs else "one position"
        raise PlanError(
            f"global_batch_size {global_batch_size} on {world_size} ranks: every rank needs {what}; "
            f"use a global batch of at least {unit * world_size} or fewer ranks"
        )
    first, last = (min(global_batch_size, unit * (edge * num_units // world_size)) for edge in (rank, rank + 1))
    return range(first, last)
