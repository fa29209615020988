"""Several shard sets behind one table of shards: set after set, each shard read through its own set's files."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from ca2st.errors import UserInputError
from ca2st.spec import ClipSpec
from pipelines.errors import SampleDamageError
from pipelines.fetch import ByteFetcher, FetchedSample
from pipelines.frame_rates import stride_note
from pipelines.preflight import TargetColumn, check_manifest, check_sound, target_columns
from pipelines.sampling import SamplingConfig
from pipelines.shard_files import ShardFiles, Verify
from pipelines.shard_index import SampleEntry, ShardIndexCache
from pipelines.shard_store import open_store
from pipelines.stats import StatsRecorder
from sharding.shard_set import ShardEntry, ShardSet


@dataclass(frozen=True, slots=True, kw_only=True)
class SetReader:
    """What reads the samples of one shard set."""

    fingerprint: str
    """Of its manifest."""
    shards: tuple[ShardEntry, ...]
    files: ShardFiles
    indexes: ShardIndexCache
    fetcher: ByteFetcher
    targets: tuple[TargetColumn, ...]
    """Where the targets stand among this set's label spaces."""

    def fetch(self, entry: SampleEntry, frame_indices: Sequence[int]) -> FetchedSample:
        """See `ByteFetcher.fetch`; a damaged copy of a remote shard in this machine's cache is fetched again, once."""
        with self.files.holding(entry.shard):
            try:
                return self.fetcher.fetch(entry, frame_indices)
            except SampleDamageError:
                if not self.files.distrust(entry.shard):
                    raise
        with self.files.holding(entry.shard):
            return self.fetcher.fetch(entry, frame_indices)


class SetReaders:
    """The readers of one or more sets; a shard is named by its place in the sets' tables laid end to end."""

    def __init__(
        self,
        shard_sets: Sequence[ShardSet],
        clip: ClipSpec,
        targets: Sequence[str],
        *,
        verify: Verify,
        index_cache_bytes: int,
        stats: StatsRecorder,
    ) -> None:
        """Check every set; nothing is opened before it is read.

        Raises:
            UserInputError: a target, codec or mel size that a set does not have.
            ShardSetDamageError: files of a set are missing or of another size.
        """
        for shard_set in shard_sets:
            check_manifest(shard_set, clip)
        self._readers = [
            _reader(shard_set, clip, targets, verify, index_cache_bytes // len(shard_sets), stats)
            for shard_set in shard_sets
        ]
        self._ends = [*accumulate(len(shard_set.shards) for shard_set in shard_sets)]

    def find(self, shard: int) -> tuple[SetReader, int]:
        """The reader of a shard, and the shard's place in its own set's table."""
        number = bisect_right(self._ends, shard)
        return self._readers[number], shard - (self._ends[number - 1] if number else 0)

    def stride_notes(self, shard_sets: Sequence[ShardSet], sampling: SamplingConfig) -> list[str]:
        """See `stride_note`: one line for each of the sets whose clips run at other rates."""
        pairs = zip(shard_sets, self._readers, strict=True)
        notes = [stride_note(shard_set, reader.indexes, sampling) for shard_set, reader in pairs]
        return [note for note in notes if note is not None]

    @property
    def are_remote(self) -> bool:
        """Whether any set is read through this machine's cache."""
        return any(not reader.files.store.keeps_open for reader in self._readers)

    def fetch_ahead(self, shard: int, *, is_abandoned: Callable[[], bool]) -> bool:
        """See `ShardStore.fetch_ahead`."""
        reader, own_shard = self.find(shard)
        return reader.files.store.fetch_ahead(reader.shards[own_shard], is_abandoned=is_abandoned)

    def finish_with(self, shard: int) -> None:
        """See `ShardStore.finish_with`."""
        reader, own_shard = self.find(shard)
        reader.files.store.finish_with(reader.shards[own_shard])

    def sample_ids(self) -> list[str]:
        """Keys of all samples in stored order, set after set."""
        return [key for reader in self._readers for key in reader.indexes.sample_ids()]

    def close(self) -> None:
        """Close the files of every set."""
        for reader in self._readers:
            reader.files.close()


def _reader(
    shard_set: ShardSet, clip: ClipSpec, targets: Sequence[str], verify: Verify, cache_bytes: int, stats: StatsRecorder
) -> SetReader:
    store = open_store(shard_set, stats)
    store.check()
    files = ShardFiles(shard_set, verify=verify, store=store)
    return SetReader(
        fingerprint=shard_set.manifest.fingerprint,
        shards=shard_set.shards,
        files=files,
        indexes=ShardIndexCache(shard_set, most_bytes=cache_bytes, store=store),
        fetcher=ByteFetcher(files, stats, num_mel_bins=clip.num_mel_bins),
        targets=target_columns(shard_set, targets),
    )


def check_agreement(shard_sets: Sequence[ShardSet], targets: Sequence[str]) -> None:
    """Refuse sets that cannot be trained on together.

    Raises:
        UserInputError: no set or target, one set twice, or sets whose targets have other classes or whose
            spectrograms were made otherwise; names the sets.
    """
    if not shard_sets:
        raise UserInputError("shard sets: expected at least one, found none")
    if not targets:
        raise UserInputError("targets: expected at least one label space, found none")
    first, places = shard_sets[0], dict[str, str]()
    for shard_set in shard_sets:
        if (fingerprint := shard_set.manifest.fingerprint) in places:
            raise UserInputError(
                f"{places[fingerprint]} and {shard_set.where} are the same shard set; name it once, with the "
                "sum of the weights"
            )
        places[fingerprint] = shard_set.where
        for name in targets:
            _require_same_classes(first, shard_set, name)
        if "none" not in (first.manifest.audio.policy, shard_set.manifest.audio.policy):
            check_sound(shard_set, first.manifest.audio, whose=first.where)


def _require_same_classes(first: ShardSet, other: ShardSet, target: str) -> None:
    spaces = [one.manifest.label_space(target) for one in (first, other)]
    if spaces[0].sha256 == spaces[1].sha256:
        return
    here, there = (space.classes for space in spaces)
    only = [f"{name!r} only in {one.where}" for one, name in _differing(first, other, here, there)][:2]
    detail = "; ".join(only) or "the same classes in another order"
    raise UserInputError(
        f"label space {target!r}: {first.where} ({len(here)} classes) and {other.where} ({len(there)} classes) differ: "
        f"{detail}; convert both with one class list"
    )


def _differing(
    first: ShardSet, other: ShardSet, here: Sequence[str], there: Sequence[str]
) -> list[tuple[ShardSet, str]]:
    """For each set one class that the other lacks."""
    found = []
    for one, own, others in ((first, here, set(there)), (other, there, set(here))):
        found += [(one, name) for name in own if name not in others][:1]
    return found
