"""Sources of samples: the samples of a pass end to end, and which source each slot of an epoch reads.

The slots of an epoch are one line. It is cut into blocks; each holds the same number of slots of a source, its quota,
in a random order keyed by the block::

    quotas 2 : 1 (a real block is 64 slots or more)     | b a a | a a b | a b a | ...
    reading number of a source:        a:  0 1    2 3      4 5        b: 0     1     2

Hence the reading number of any slot, and how many slots of a source lie before it, follow from the block alone.
Readings 0 .. length-1 of a source are its first pass, the next as many its second.

Selecting or balancing samples reads all indexes once, when a run starts. Kept afterwards: four bytes per selected
sample where some are left out, and two (four, beyond 65 536 classes) where classes are balanced. While it runs, a limit
takes eight more.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ca2st.errors import UserInputError
from pipelines.errors import ShardSetDamageError
from pipelines.keyed_random import Key, permutation
from pipelines.order.selection import (
    BalanceConfig,
    ClassBalance,
    LabelLists,
    SampleSelector,
    SelectionConfig,
    key_ranks,
    smallest,
)
from pipelines.storage.index import num_labels, read_columns
from sharding.format.shard_set import ShardEntry, ShardSet


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SampleSource:
    """Samples of neighbouring shards of the shard table that are drawn together."""

    sizes: NDArray[np.int64]
    """Samples of each shard, as far as they are selected."""
    first_shard: int = 0
    """Place of its first shard in the shard table."""
    rows: NDArray[np.int32] | None = None
    """Row of every selected sample in its shard's index, shard after shard; None: all rows."""
    balance: ClassBalance | None = None
    """How often each selected sample is read; None: once per pass."""
    offsets: NDArray[np.int64] = field(init=False)
    """Selected samples before each shard, and of all."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "offsets", np.concatenate([[0], np.cumsum(self.sizes, dtype=np.int64)]))

    @property
    def num_samples(self) -> int:
        """Selected samples."""
        return int(self.offsets[-1])

    @property
    def num_readings(self) -> int:
        """Readings of a pass."""
        return self.num_samples if self.balance is None else self.balance.num_readings

    @property
    def most_readings(self) -> int:
        """No pass reads a sample more often."""
        return 1 if self.balance is None else self.balance.most_readings


def plain_source(sizes: Sequence[int] | NDArray[np.int64]) -> SampleSource:
    """Return all samples of shards of these sizes, each read once per pass."""
    return SampleSource(sizes=np.asarray(sizes, dtype=np.int64))


class SourceLine:
    """One pass through a source. In memory: the shard table, and with class balance a byte or two per sample."""

    def __init__(self, source: SampleSource, *, key: Key, shuffled: bool) -> None:
        """`key` names the pass; its shards are permuted where `shuffled`."""
        self._source, num_shards, sizes = source, len(source.sizes), source.sizes
        self._readings = None if source.balance is None else source.balance.readings(("balance", *key))
        if self._readings is not None:
            sizes, filled = np.zeros(num_shards, np.int64), np.flatnonzero(source.sizes)
            if len(filled):
                sizes[filled] = np.add.reduceat(self._readings, source.offsets[filled], dtype=np.int64)
        self._shards = permutation(("shards", *key), num_shards) if shuffled else np.arange(num_shards)
        self._starts = np.concatenate([[0], np.cumsum(sizes[self._shards], dtype=np.int64)])

    def at(self, places: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Return shard (in the shard table), row and reading (0: the sample's first in the pass) at `places`."""
        where = np.searchsorted(self._starts, places, side="right") - 1
        shards, rows = self._shards[where], places - self._starts[where]
        readings, offsets = np.zeros_like(rows), self._source.offsets
        if self._readings is not None:  # a sample takes a place per reading
            for shard in np.unique(shards):
                here, inside = shards == shard, rows[shards == shard]
                own = self._readings[offsets[shard] : offsets[shard + 1]]
                ends = np.cumsum(own, dtype=np.int64)
                rows[here] = np.searchsorted(ends, inside, side="right")
                readings[here] = inside - (ends - own)[rows[here]]
        if self._source.rows is not None:
            rows = self._source.rows[offsets[shards] + rows].astype(np.int64)
        return self._source.first_shard + shards, rows, readings


class SourcePasses:
    """The endless line of a source, pass after pass; keeps the passes in use. Safe to use from several threads."""

    def __init__(self, source: SampleSource, *, key: Key, number: int, shuffled: bool, most_held: int) -> None:
        """`key` names the epoch, `number` the source in it; `most_held` passes are kept."""
        self._source, self._key, self._number, self._shuffled = source, key, number, shuffled
        self._most_held, self._lock = most_held, threading.Lock()
        self._held: OrderedDict[int, SourceLine] = OrderedDict()

    def at(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the shard, row and number of the reading at `places`: [3, places]."""
        passes, inside = np.divmod(places, self._source.num_readings)
        found = np.empty((3, len(places)), np.int64)
        for number in np.unique(passes).tolist():
            here = passes == number
            found[:, here] = self._line(number).at(inside[here])
            found[2, here] += number * self._source.most_readings
        return found

    def _line(self, number: int) -> SourceLine:
        with self._lock:
            if number not in self._held:
                key = (*self._key, self._number, number) if self._number or number else self._key
                self._held[number] = SourceLine(self._source, key=key, shuffled=self._shuffled)
            self._held.move_to_end(number)
            while len(self._held) > self._most_held:
                self._held.popitem(last=False)
            return self._held[number]


class MixtureOrder:
    """Sources by slot. Not for several threads at once: it keeps the blocks in use."""

    def __init__(self, quotas: NDArray[np.int64], *, key: Key, most_blocks: int) -> None:
        """`quotas`: slots of each source in one block; `most_blocks`: blocks kept, each a few kilobytes."""
        self._quotas, self._key, self._block_size = quotas, key, int(quotas.sum())
        self._block = lru_cache(most_blocks)(self._made_block)

    def at(self, slots: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the source of each slot, and the number of that source's reading it is."""
        if len(self._quotas) == 1:
            return np.zeros_like(slots), slots
        sources, readings = np.empty_like(slots), np.empty_like(slots)
        blocks, inside = np.divmod(slots, self._block_size)
        for block in np.unique(blocks).tolist():
            here = blocks == block
            order, numbers = self._block(block)
            sources[here] = order[inside[here]]
            readings[here] = block * self._quotas[sources[here]] + numbers[inside[here]]
        return sources, readings

    def readings_before(self, slot: int) -> NDArray[np.int64]:
        """Return how many slots of each source lie before `slot`."""
        if len(self._quotas) == 1:
            return np.array([slot])
        block, inside = divmod(slot, self._block_size)
        partial = np.bincount(self._block(block)[0][:inside], minlength=len(self._quotas))
        return block * self._quotas + partial

    def _made_block(self, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the source of every slot of a block, and its number among the block's slots of that source."""
        stored = np.repeat(np.arange(len(self._quotas)), self._quotas)
        order = stored[permutation((*self._key, block), self._block_size)]
        numbers = np.empty_like(order)
        for source, quota in enumerate(self._quotas.tolist()):
            numbers[order == source] = np.arange(quota)
        return order, numbers


def make_sources(
    groups: Sequence[Sequence[ShardSet]],
    *,
    first_target: str,
    selection: SelectionConfig,
    balance: BalanceConfig,
) -> tuple[SampleSource, ...]:
    """Make a source per group of shard sets, in the order of the sets. Indexes are read only where needed.

    Raises:
        UserInputError: a name of the selection matches nothing, or a group is left without samples; says which.
        ShardSetDamageError: an index is missing or damaged.
    """
    stored = [[shard.num_samples for one in group for shard in one.shards] for group in groups]
    firsts = np.cumsum([0, *map(len, stored)]).tolist()
    if selection.is_everything and balance.rule == "none":
        return tuple(
            SampleSource(sizes=np.array(own, np.int64), first_shard=first)
            for own, first in zip(stored, firsts[:-1], strict=True)
        )
    sizes, rows, labels = _scan([one for group in groups for one in group], first_target, selection, balance)
    edges = np.concatenate([[0], np.cumsum(sizes)])[firsts]
    sources = []
    for index, group in enumerate(groups):
        shards, samples = slice(*firsts[index : index + 2]), slice(*edges[index : index + 2].tolist())
        if samples.start == samples.stop:
            raise UserInputError(f"data.select: no sample of {group[0].where} is selected; leave the set out")
        class_balance = None
        if balance.rule != "none":
            own = labels.part(samples)
            class_balance = ClassBalance(own.flat if bool((own.sizes == 1).all()) else own, balance)
        sources.append(
            SampleSource(
                sizes=sizes[shards],
                first_shard=shards.start,
                rows=None if selection.is_everything else rows[samples],
                balance=class_balance,
            )
        )
    return tuple(sources)


def _scan(
    shard_sets: Sequence[ShardSet], first_target: str, selection: SelectionConfig, balance: BalanceConfig
) -> tuple[NDArray[np.int64], NDArray[np.int32], LabelLists]:
    """Return the selected samples of all sets, shard after shard: how many of each, rows, labels of what is balanced.

    No labels where nothing is balanced.
    """
    spaces = [selection.target or first_target, balance.target or first_target]
    selected, balanced = (shard_sets[0].manifest.label_space(name) for name in spaces)
    selector = SampleSelector(selection, selected.classes)
    kind = np.uint16 if len(balanced.classes) <= 1 << 16 else np.uint32
    chosen: list[NDArray[np.int32]] = []
    ranks: list[NDArray[np.uint64]] = []
    classes: list[LabelLists] = []
    for keys, labels in _shards(shard_sets, (selected.name, balanced.name), with_keys=selection.needs_keys):
        mask = selector.mask(keys, labels[0])
        chosen.append(np.flatnonzero(mask).astype(np.int32))
        if balance.rule != "none":
            classes.append(labels[1].where(mask))
        if selection.limit is not None and keys is not None:
            ranks.append(key_ranks((keys[row] for row in chosen[-1]), limit_seed=selection.limit_seed))
    sizes = np.array([len(one) for one in chosen], np.int64)
    selector.require_matches(int(sizes.sum()))
    rows, joined = np.concatenate([np.empty(0, np.int32), *chosen]), LabelLists.joined(classes, kind)
    if selection.limit is None:
        return sizes, rows, joined
    mask = smallest(np.concatenate(ranks), selection.limit)
    ends = np.concatenate([[0], np.cumsum(mask)])[np.cumsum(sizes)]
    return np.diff(ends, prepend=0), rows[mask], joined.where(mask) if len(joined) else joined


def _shards(
    shard_sets: Sequence[ShardSet], names: Sequence[str], *, with_keys: bool
) -> Iterator[tuple[list[str] | None, list[LabelLists]]]:
    """Yield the keys and the labels of the named spaces, shard by shard."""
    for shard_set in shard_sets:
        manifest = shard_set.manifest
        named = [manifest.label_space(name) for name in names]
        spaces = [(space, manifest.label_spaces.index(space)) for space in named]
        for shard, table in read_columns(shard_set, ["key", "labels"] if with_keys else ["labels"]):
            labels = _labels(table, shard, num_labels(manifest))
            for space, column in spaces:
                flat = labels[column].flat
                if len(flat) and not (flat.min() >= 0 and flat.max() < len(space.classes)):
                    raise ShardSetDamageError(
                        f"{shard.index_name}: expected a {space.name} of 0..{len(space.classes) - 1} in every row, "
                        f"found {flat.min()}..{flat.max()}; convert the set again"
                    )
            keys = table.column("key").to_pylist() if with_keys else None
            yield keys, [labels[column] for _, column in spaces]


def _labels(table: pa.Table, shard: ShardEntry, expected: int | None) -> list[LabelLists]:
    """The labels of a shard by label space; `expected` labels per sample, or None: any number of the one space."""
    try:
        column = table.column("labels").combine_chunks()
        flat = column.flatten().to_numpy(zero_copy_only=False).astype(np.int64)
        if expected is None:
            sizes = column.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
            return [LabelLists(flat, sizes)]
        one = np.ones(shard.num_samples, np.int64)
        return [LabelLists(labels, one) for labels in flat.reshape(shard.num_samples, expected).T]
    except (pa.ArrowException, ValueError) as error:
        raise ShardSetDamageError(
            f"{shard.index_name}: not this shard's index ({error}); convert the set again"
        ) from error
