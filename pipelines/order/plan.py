"""The order of an epoch, as a pure function: (record, sources, epoch) -> which sample sits where in each batch.

1. Each source (a shard set, or several read as one) is a line: its shards permuted, their samples end to end. A source
   that is used up goes into its next pass, with a permutation of its own::

       shard 2        shard 0              shard 1            shard 0 ...
       |--------------|--------------------|---------| pass 1 |------------

2. The epoch is a line of slots. Every slot reads one source (`MixtureOrder`): all of them the only one, or by weight.
   The line is cut into `num_lanes` equal runs; a lane thus reads one run of each source's line, which is shuffled in
   blocks of `shuffle_block` samples::

       lane 0                 lane 1
       |~~~~~~~~|~~~~~~~~|~~~~|~~~~~~~~|~~~~~~~~|~~~~|

3. A batch takes the next `global_batch_size / num_lanes` positions of every lane. Position p of the batch belongs to
   lane p * num_lanes // global_batch_size. With `repeats` R a pair of slots s0 s1 fills 2R positions: s0 s1 s0 s1 ...,
   so that positions 2k and 2k+1, the partners of a mixup, are different slots.

4. A rank reads a run of positions, hence a run of lanes, hence its own shards (`rank_positions`).

No step but the fourth knows the number of ranks, so every world size reads the same global order, every rank makes
the same number of steps, and any (epoch, step) can be computed without what came before. In memory: the shard
table, one block per lane and source, and with class balance a byte per sample.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import PlanError
from pipelines.keyed_random import Key, block_quotas, permutation
from pipelines.order.selection import PlanRecord, Remainder
from pipelines.order.sources import MixtureOrder, SampleSource, SourcePasses
from sharding.format.shard_set import ShardSet


class SamplePlan:
    """The order in which shard sets are read: the same object on every rank, and before any rank starts."""

    def __init__(
        self, record: PlanRecord, sources: Sequence[SampleSource], groups: Sequence[Sequence[ShardSet]]
    ) -> None:
        """`groups` are the shard sets of each source."""
        self.record = record
        """What the order depends on, and nothing else but the sets' bytes."""
        self._sources, self._groups = sources, groups
        self._passes: tuple[int, list[SourcePasses]] = (-1, [])
        self.num_samples = sum(source.num_samples for source in sources)
        """Different samples that are read."""
        self.num_clips = epoch_length(record, sources) * record.repeats
        """Clips of an epoch, before what fills no whole batch is dropped or padded."""

    @property
    def num_steps(self) -> int:
        """Batches of an epoch; the same on every rank. Raises as `count_steps`."""
        return count_steps(self.num_clips, self.record.global_batch_size, remainder=self.record.remainder)

    def require_enough(self, *, world_size: int) -> None:
        """Refuse what cannot feed every rank; raises as `require_enough_samples` and `rank_positions`."""
        require_enough_samples(
            num_samples=self.num_clips,
            global_batch_size=self.record.global_batch_size,
            world_size=world_size,
            remainder=self.record.remainder,
        )
        self.positions(0, world_size)

    def positions(self, rank: int, world_size: int) -> range:
        """Return the positions of every global batch that `rank` reads; raises as `rank_positions`."""
        return rank_positions(
            rank,
            world_size,
            global_batch_size=self.record.global_batch_size,
            keep_pairs=self.record.remainder != "pad",
        )

    def epoch(self, epoch: int) -> "EpochPlan":
        """Return the order of one epoch. Plans of the same epoch share what takes time and memory."""
        held, passes = self._passes
        if held != epoch:
            passes = source_passes(self.record, self._sources, epoch=epoch)
            self._passes = (epoch, passes)
        return EpochPlan(self.record, self._sources, epoch=epoch, passes=passes)

    def describe(self) -> str:
        """Describe the plan in a line: length of an epoch, and how often each source is read in it."""
        quotas = mixture_quotas(self.record, self._sources)
        shares = (self.num_clips * quotas / quotas.sum()).tolist()
        parts = [
            f"{' and '.join(one.where for one in group)}: {source.num_samples} samples, each read "
            f"{share / source.num_samples:.4g} times on average"
            for group, source, share in zip(self._groups, self._sources, shares, strict=True)
        ]
        return (
            f"plan: {self.num_steps} steps of {self.record.global_batch_size} clips per epoch "
            f"(remainder {self.record.remainder}); {'; '.join(parts)}"
        )


class PlannedSample(NamedTuple):
    """What is read at one position of a global batch."""

    shard: int
    """Index of its shard in the shard table; the tables of several sets are laid end to end."""
    row: int
    repeat: int
    """Distinguishes the readings of one sample in one epoch: no two have the same number, and the first copy of the
    first reading of the first pass has 0."""
    is_padding: bool
    """Whether it is only there to fill the batch (it is repeated, and counts nowhere)."""


class EpochPlan:
    """The order of one epoch; see the module's text for the rules.

    Not for several threads at once: it keeps the current block of every lane.
    """

    def __init__(
        self,
        record: PlanRecord,
        sources: Sequence[SampleSource],
        *,
        epoch: int,
        passes: Sequence[SourcePasses] | None = None,
    ) -> None:
        """Lay out the epoch; several plans of it may share its `source_passes`. Raises as `count_steps`."""
        self._record, self._sources, self._epoch = record, sources, epoch
        self.num_samples = epoch_length(record, sources)
        """Slots of the epoch: its samples, `repeats` not counted."""
        self.num_steps = count_steps(
            self.num_samples * record.repeats, record.global_batch_size, remainder=record.remainder
        )
        """Batches of the epoch: the same on every rank."""
        lanes = np.arange(record.num_lanes + 1)
        self._lane_edges = lanes * self.num_samples // record.num_lanes
        self._mixture = MixtureOrder(
            mixture_quotas(record, sources), key=("mixture", record.seed, epoch), most_blocks=2 * record.num_lanes + 2
        )
        self._readings = np.stack([self._mixture.readings_before(edge) for edge in self._lane_edges.tolist()])
        """[lanes + 1, sources]: how many readings of each source lie before each edge of a lane."""
        self._blocks: dict[tuple[int, int], tuple[int, NDArray[np.int64]]] = {}
        self._passes = passes or source_passes(record, sources, epoch=epoch)

    def samples(self, step: int, positions: range) -> list[PlannedSample]:
        """Return the samples at `positions` of the global batch of `step`; raises `PlanError` outside the epoch."""
        batch, repeats = self._record.global_batch_size, self._record.repeats
        if not (0 <= step < self.num_steps and 0 <= positions.start <= positions.stop <= batch):
            raise PlanError(
                f"expected a step below {self.num_steps} and positions within 0..{batch}, "
                f"found step {step} and {positions}"
            )
        lanes, inside = np.divmod(np.arange(positions.start, positions.stop), batch // self._record.num_lanes)
        pairs, inside = np.divmod(step * (batch // self._record.num_lanes) + inside, 2 * repeats)
        slots, copies = 2 * pairs + inside % 2, inside // 2
        starts, lengths = self._lane_edges[lanes], np.diff(self._lane_edges)[lanes]
        # A place behind a lane's end repeats its last slot, as padding.
        held = np.minimum(starts + np.minimum(slots, np.maximum(lengths - 1, 0)), self.num_samples - 1)
        sources, places = self._mixture.at(held)
        if self._record.shuffle_block:
            # A lane without slots of its own repeats a sample of another lane: that lies in no block of its run.
            in_lane = lengths > 0
            for lane, source in {*zip(lanes[in_lane].tolist(), sources[in_lane].tolist(), strict=True)}:
                here = (lanes == lane) & (sources == source)
                places[here] = self._shuffled(lane, source, places[here])
        found = np.empty((3, len(places)), np.int64)
        for source in np.unique(sources):
            here = sources == source
            found[:, here] = self._passes[source].at(places[here])
        shards, rows, readings = found
        columns = (shards, rows, readings * repeats + copies, slots >= lengths)
        return [PlannedSample(*one) for one in zip(*(column.tolist() for column in columns), strict=True)]

    def _shuffled(self, lane: int, source: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the places of a lane's run of a source, each exchanged within its block."""
        first, end = self._readings[lane : lane + 2, source].tolist()
        size = self._record.shuffle_block
        blocks, inside = np.divmod(places - first, size)
        shuffled = np.empty_like(places)
        for block in np.unique(blocks).tolist():
            here = blocks == block
            order = self._block(lane, source, block, min(size, end - first - block * size))
            shuffled[here] = first + block * size + order[inside[here]]
        return shuffled

    def _block(self, lane: int, source: int, block: int, length: int) -> NDArray[np.int64]:
        held, order = self._blocks.get((lane, source), (-1, None))
        if held != block or order is None:
            key: Key = ("block", self._record.seed, self._epoch, lane, block)
            order = permutation((*key, source) if source else key, length)
            self._blocks[lane, source] = (block, order)
        return order


def count_steps(num_samples: int, global_batch_size: int, *, remainder: Remainder) -> int:
    """Count the batches of an epoch.

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
    """Raise `PlanError` for fewer samples than ranks, none, or with ``drop`` fewer than one batch; with the numbers."""
    least = max(1, world_size, global_batch_size if remainder == "drop" else 1)
    if num_samples < least:
        raise PlanError(
            f"too few samples: {num_samples} samples, global_batch_size {global_batch_size}, world_size {world_size}; "
            f"at least {least} samples are needed (remainder {remainder}): convert more data, lower the batch, or use "
            "fewer ranks"
        )


def rank_positions(rank: int, world_size: int, *, global_batch_size: int, keep_pairs: bool) -> range:
    """Return the positions of a global batch that belong to `rank`: a run, and together all of them, each once.

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


def source_passes(record: PlanRecord, sources: Sequence[SampleSource], *, epoch: int) -> list[SourcePasses]:
    """Return the lines of an epoch, pass after pass: what takes time and memory in a plan."""
    return [
        SourcePasses(
            source,
            key=(record.seed, epoch),
            number=number,
            shuffled=record.shuffle_block > 0,
            most_held=2 * record.num_lanes,  # a lane is in one pass, or in two where it crosses
        )
        for number, source in enumerate(sources)
    ]


def mixture_quotas(record: PlanRecord, sources: Sequence[SampleSource]) -> NDArray[np.int64]:
    """Return the slots of each source in a block of the mixture; raises `PlanError` as `block_quotas`."""
    if len(sources) == 1:
        return np.ones(1, np.int64)
    weights = [share.weight for share in record.mixture if share.weight is not None]
    if len(weights) != len(sources):
        raise PlanError(f"expected a weight for each of {len(sources)} sources, found {len(weights)}")
    return block_quotas(weights)


def epoch_length(record: PlanRecord, sources: Sequence[SampleSource]) -> int:
    """Return the slots of an epoch: `epoch_samples`, or as many as one pass through every source reads.

    With ``wrap`` rounded up to whole batches.
    """
    length = record.epoch_samples or sum(source.num_readings for source in sources)
    if record.remainder != "wrap":
        return length
    per_batch = record.global_batch_size // record.repeats
    return -(-length // per_batch) * per_batch
