"""One source of samples, and its line: the samples of a pass end to end, shard after shard."""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pipelines.balance import ClassBalance
from pipelines.keyed_random import Key, permutation


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
    """How often each selected sample is read; None: once a pass."""
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
    """All samples of shards of these sizes, each read once a pass."""
    return SampleSource(sizes=np.asarray(sizes, dtype=np.int64))


class SourceLine:
    """One pass through a source. In memory: the shard table, and with class balance a byte or two a sample."""

    def __init__(self, source: SampleSource, *, key: Key, shuffled: bool) -> None:
        """`key` names the pass; its shards are permuted where `shuffled`."""
        self._source, num_shards = source, len(source.sizes)
        self._readings = None if source.balance is None else source.balance.readings(("balance", *key))
        sizes = source.sizes if self._readings is None else _sums(self._readings, source)
        self._shards = permutation(("shards", *key), num_shards) if shuffled else np.arange(num_shards)
        self._starts = np.concatenate([[0], np.cumsum(sizes[self._shards], dtype=np.int64)])

    def at(self, places: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Shard (in the shard table), row and reading (0: the pass's first of that sample) at `places` of the line."""
        where = np.searchsorted(self._starts, places, side="right") - 1
        shards, inside = self._shards[where], places - self._starts[where]
        samples, readings = self._unfold(shards, inside)
        rows = samples
        if self._source.rows is not None:
            rows = self._source.rows[self._source.offsets[shards] + samples].astype(np.int64)
        return self._source.first_shard + shards, rows, readings

    def _unfold(
        self, shards: NDArray[np.int64], inside: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Sample and reading of it, for places inside the shards where a sample takes as many as it is read."""
        if self._readings is None:
            return inside, np.zeros_like(inside)
        samples, readings = np.empty_like(inside), np.empty_like(inside)
        for shard in np.unique(shards):
            here = shards == shard
            first, last = self._source.offsets[shard], self._source.offsets[shard + 1]
            ends = np.cumsum(self._readings[first:last], dtype=np.int64)
            samples[here] = np.searchsorted(ends, inside[here], side="right")
            readings[here] = inside[here] - (ends - self._readings[first:last])[samples[here]]
        return samples, readings


class SourcePasses:
    """The endless line of a source, pass after pass; keeps the passes in use. Safe to use from several threads."""

    def __init__(self, source: SampleSource, *, key: Key, number: int, shuffled: bool, most_held: int) -> None:
        """`key` names the epoch, `number` the source in it; `most_held` passes are kept."""
        self._source, self._key, self._number, self._shuffled = source, key, number, shuffled
        self._most_held, self._lock = most_held, threading.Lock()
        self._held: OrderedDict[int, SourceLine] = OrderedDict()

    def at(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Shard, row and number of the reading at `places`: [3, places]."""
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


def _sums(readings: NDArray[np.integer], source: SampleSource) -> NDArray[np.int64]:
    """Readings of every shard."""
    sums, filled = np.zeros(len(source.sizes), np.int64), np.flatnonzero(source.sizes)
    if len(filled):
        sums[filled] = np.add.reduceat(readings, source.offsets[filled], dtype=np.int64)
    return sums
