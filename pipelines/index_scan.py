"""One reading of all indexes when a run starts, for what selects or balances samples.

Kept afterwards: four bytes a selected sample where some are left out, and two (four, beyond 65 536 classes) where
classes are balanced. While it runs, a limit takes eight more.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ca2st.errors import UserInputError
from pipelines.balance import BalanceConfig, ClassBalance
from pipelines.errors import ShardSetDamageError
from pipelines.selection import SampleSelector, SelectionConfig, key_ranks, smallest
from pipelines.shard_files import read_index_bytes
from pipelines.shard_store import ShardStore, open_store
from pipelines.source import SampleSource
from sharding.manifest import LabelSpace
from sharding.parquet import read_parquet
from sharding.shard_set import ShardEntry, ShardSet


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scanned:
    """The selected samples of all sets, shard after shard."""

    sizes: NDArray[np.int64]
    """How many of each shard."""
    rows: NDArray[np.int32]
    balanced: NDArray[np.integer]
    """Label of the balanced target; empty where none is balanced."""


def make_sources(
    groups: Sequence[Sequence[ShardSet]],
    *,
    first_target: str,
    selection: SelectionConfig,
    balance: BalanceConfig,
) -> tuple[SampleSource, ...]:
    """One source a group of shard sets, in the order of the sets. Indexes are read only where they are needed.

    Raises:
        UserInputError: a name of the selection matches nothing, or a group is left without samples; says which.
        ShardSetDamageError: an index is missing or damaged.
    """
    sizes = [_stored_sizes(group) for group in groups]
    firsts = np.cumsum([0, *map(len, sizes)]).tolist()
    if selection.is_everything and balance.rule == "none":
        return tuple(SampleSource(sizes=own, first_shard=first) for own, first in zip(sizes, firsts[:-1], strict=True))
    scanned = _scan([one for group in groups for one in group], first_target, selection, balance)
    edges = np.concatenate([[0], np.cumsum(scanned.sizes)])[firsts]
    sources = []
    for index, group in enumerate(groups):
        shards, samples = slice(*firsts[index : index + 2]), slice(*edges[index : index + 2].tolist())
        if samples.start == samples.stop:
            raise UserInputError(f"data.select: no sample of {group[0].where} is selected; leave the set out")
        sources.append(
            SampleSource(
                sizes=scanned.sizes[shards],
                first_shard=shards.start,
                rows=None if selection.is_everything else scanned.rows[samples],
                balance=None if balance.rule == "none" else ClassBalance(scanned.balanced[samples], balance),
            )
        )
    return tuple(sources)


def _stored_sizes(group: Sequence[ShardSet]) -> NDArray[np.int64]:
    return np.array([shard.num_samples for shard_set in group for shard in shard_set.shards], dtype=np.int64)


def _scan(
    shard_sets: Sequence[ShardSet], first_target: str, selection: SelectionConfig, balance: BalanceConfig
) -> _Scanned:
    spaces = [selection.target or first_target, balance.target or first_target]
    selected, balanced = (shard_sets[0].manifest.label_space(name) for name in spaces)
    selector = SampleSelector(selection, selected.classes)
    kind = np.uint16 if len(balanced.classes) <= 1 << 16 else np.uint32
    rows: list[NDArray[np.int32]] = []
    ranks: list[NDArray[np.uint64]] = []
    classes: list[NDArray[np.integer]] = []
    for keys, labels in _shards(shard_sets, (selected.name, balanced.name), with_keys=selection.needs_keys):
        chosen = np.flatnonzero(selector.mask(keys, labels[0])).astype(np.int32)
        rows.append(chosen)
        if balance.rule != "none":
            classes.append(labels[1][chosen].astype(kind))
        if selection.limit is not None and keys is not None:
            ranks.append(key_ranks((keys[row] for row in chosen), limit_seed=selection.limit_seed))
    sizes = np.array([len(one) for one in rows], np.int64)
    selector.require_matches(int(sizes.sum()))
    whole = _Scanned(
        sizes=sizes,
        rows=np.concatenate([np.empty(0, np.int32), *rows]),
        balanced=np.concatenate([np.empty(0, kind), *classes]),
    )
    return whole if selection.limit is None else _limited(whole, smallest(np.concatenate(ranks), selection.limit))


def _limited(whole: _Scanned, mask: NDArray[np.bool_]) -> _Scanned:
    ends = np.concatenate([[0], np.cumsum(mask)])[np.cumsum(whole.sizes)]
    return _Scanned(
        sizes=np.diff(ends, prepend=0),
        rows=whole.rows[mask],
        balanced=whole.balanced[mask] if len(whole.balanced) else whole.balanced,
    )


def _shards(
    shard_sets: Sequence[ShardSet], names: Sequence[str], *, with_keys: bool
) -> Iterator[tuple[list[str] | None, list[NDArray[np.int64]]]]:
    """Keys and the labels of the named spaces, shard by shard."""
    for shard_set in shard_sets:
        store = open_store(shard_set)
        spaces = [shard_set.manifest.label_space(name) for name in names]
        columns = [shard_set.manifest.label_spaces.index(space) for space in spaces]
        for shard in shard_set.shards:
            keys, labels = _columns(shard_set, shard, store, with_keys=with_keys)
            yield (
                keys,
                [_checked(labels[:, column], space, shard) for column, space in zip(columns, spaces, strict=True)],
            )


def _checked(labels: NDArray[np.int64], space: LabelSpace, shard: ShardEntry) -> NDArray[np.int64]:
    if len(labels) and not (labels.min() >= 0 and labels.max() < len(space.classes)):
        raise ShardSetDamageError(
            f"{shard.index_name}: expected a {space.name} of 0..{len(space.classes) - 1} in every row, found "
            f"{labels.min()}..{labels.max()}; convert the set again"
        )
    return labels


def _columns(
    shard_set: ShardSet, shard: ShardEntry, store: ShardStore, *, with_keys: bool
) -> tuple[list[str] | None, NDArray[np.int64]]:
    wanted = ["key", "labels"] if with_keys else ["labels"]
    try:
        data = read_index_bytes(shard_set, shard, store=store)
        table = read_parquet(data, columns=wanted, num_rows=shard.num_samples)
        flat = table.column("labels").combine_chunks().flatten().to_numpy(zero_copy_only=False)
        labels = flat.astype(np.int64).reshape(shard.num_samples, len(shard_set.manifest.label_spaces))
    except (pa.ArrowException, ValueError, OSError) as error:
        raise ShardSetDamageError(
            f"{shard.index_name}: not this shard's index ({error}); convert the set again"
        ) from error
    return (table.column("key").to_pylist() if with_keys else None), labels
