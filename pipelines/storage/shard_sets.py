"""Several shard sets behind one table of shards, checked against what is asked of them.

What a loader asks of a shard set before its first step, beyond the files' sizes.

Says where clips run at another rate than the 30 frames a second that `sampling.frame_stride` counts in.

Several shard sets behind one table of shards: set after set, each shard read through its own set's files.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from ca2st.errors import UserInputError
from ca2st.spec import ClipSpec
from pipelines.errors import SampleDamageError
from pipelines.stats import StatsRecorder
from pipelines.storage.fetch import ByteFetcher, FetchedSample
from pipelines.storage.index import SampleEntry, ShardIndexCache
from pipelines.storage.shard_files import ShardFiles, Verify, open_store
from pipelines.views.sampling import SamplingConfig, VaryingRate, frames_per_second, scaled_stride
from sharding.format.index import TICKS_PER_SECOND
from sharding.format.shard_set import AudioParameters, ShardEntry, ShardSet, VideoParameters
from sharding.media.codecs import STORED_CODECS

_SPECTROGRAM_FACTS = {
    "sample_rate_hz": ("sample rate", "Hz", "with `--sample-rate {expected}`"),
    "num_mel_bins": ("number of mel bins", "", "with as many"),
    "frame_length_ms": ("window", "ms", "with a release of the same window"),
    "frame_shift_ms": ("hop", "ms", "with a release of the same hop"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetColumn:
    """A label space that a batch carries."""

    name: str
    column: int
    """Its place among the manifest's label spaces, hence in the index's ``labels``."""
    num_classes: int


def check_manifest(shard_set: ShardSet, clip: ClipSpec) -> None:
    """Refuse a set whose codec or spectrograms this loader does not read.

    Raises:
        UserInputError: an unknown codec, colours that no decoder here expects, or another number of mel bins than the
            clip's.
    """
    manifest = shard_set.manifest
    video = manifest.video
    if video.codec not in STORED_CODECS:
        raise UserInputError(
            f"{shard_set.root}: expected codec {' or '.join(STORED_CODECS)}, found {video.codec}; "
            "use a matching release, or convert with `ca2st shard build --codec mjpeg`"
        )
    expected = STORED_CODECS[video.codec].colour
    if video.colour not in (None, expected):
        raise UserInputError(
            f"{shard_set.root}: expected colours {expected} for {video.codec}, which is what decoders take them for, "
            f"found {video.colour}; convert again"
        )
    if manifest.audio.num_mel_bins != clip.num_mel_bins:
        raise UserInputError(
            f"{shard_set.root}: expected {clip.num_mel_bins} mel bins, found {manifest.audio.num_mel_bins}; "
            "set clip.num_mel_bins or convert again"
        )


def check_sound(shard_set: ShardSet, made: AudioParameters, *, whose: str) -> None:
    """Refuse a set whose spectrograms were made otherwise than `made`: to a model they are other sounds.

    For sets that a model hears, and for sets that are read together; `whose` says whose parameters `made` are.

    Raises:
        UserInputError: another sample rate, number of mel bins, window or hop; with both values and the way.
    """
    found = shard_set.manifest.audio
    for name, (fact, unit, way) in _SPECTROGRAM_FACTS.items():
        expected, here = getattr(made, name), getattr(found, name)
        if expected != here:
            raise UserInputError(
                f"{shard_set.where}: expected spectrograms of {fact} {_with_unit(expected, unit)} as {whose} has, "
                f"found {_with_unit(here, unit)}; convert these videos {way.format(expected=expected)}"
            )


def require_sound(shard_set: ShardSet, *, whose: str) -> None:
    """Refuse a set that was made without any sound, for a model that hears.

    Raises:
        UserInputError: as said; a set with sound where there is some (``--audio optional``) is none.
    """
    if shard_set.manifest.audio.policy == "none":
        raise UserInputError(
            f"{shard_set.where}: expected shards with sound for {whose}, which hears, found a set that was made with "
            "`--audio none`; convert these videos with `--audio optional`, or use a model without an audio expert"
        )


def picture_notes(shard_set: ShardSet, made: VideoParameters, *, whose: str) -> list[str]:
    """What of a set's pictures is another than `made`, a line each: another size or frame rate is read all the same."""
    found = shard_set.manifest.video
    pairs = [
        (f"{found.short_side} pixels on the shorter side", f"{made.short_side}"),
        (_frame_rate(found), _frame_rate(made)),
    ]
    differ = [found.short_side != made.short_side, found.frames_per_second != made.frames_per_second]
    return [
        f"{shard_set.where}: its videos have {here}, those that {whose} was trained on {there}; results may differ"
        for is_other, (here, there) in zip(differ, pairs, strict=True)
        if is_other
    ]


def _frame_rate(video: VideoParameters) -> str:
    return "every frame" if video.frames_per_second is None else f"at most {video.frames_per_second:g} frames a second"


def _with_unit(value: float | int, unit: str) -> str:
    return f"{value:g} {unit}".rstrip()


def target_columns(shard_set: ShardSet, targets: Sequence[str]) -> tuple[TargetColumn, ...]:
    """Where the label spaces named by `targets` stand in the index.

    Raises:
        UserInputError: none is named, or the set has none of that name.
    """
    if not targets:
        raise UserInputError("targets: expected at least one label space, found none")
    manifest = shard_set.manifest
    spaces = [manifest.label_space(name) for name in targets]
    return tuple(
        TargetColumn(name=space.name, column=manifest.label_spaces.index(space), num_classes=len(space.classes))
        for space in spaces
    )


_MOST_CLIPS = 32


def stride_note(shard_set: ShardSet, indexes: ShardIndexCache, sampling: SamplingConfig) -> str | None:
    """One line on what a dense window reads of this set, judged by clips of its first shard.

    None where it reads every `frame_stride`-th frame as configured, or where there are no dense windows.

    Raises:
        ShardSetDamageError: the first index is damaged.
    """
    if sampling.scheme != "dense":
        return None
    first = next((place for place, shard in enumerate(shard_set.shards) if shard.num_samples), None)
    if first is None:
        return None
    count = shard_set.shards[first].num_samples
    rows = np.unique(np.linspace(0, count - 1, min(count, _MOST_CLIPS)).astype(int)).tolist()
    ticks = _ticks(indexes, first, rows)
    varying = [one for one in ticks if VaryingRate.of(one, ticks_per_second=TICKS_PER_SECOND)]
    rates = [_rate(one) for one in ticks if VaryingRate.of(one, ticks_per_second=TICKS_PER_SECOND) is None]
    parts = [_strides_in_words(rates, len(ticks), sampling)]
    if varying:
        parts.append(
            f"{len(varying)} of the first {len(ticks)} clips vary in their frame rate; their dense windows take a "
            f"frame every {sampling.frame_stride}/30 s"
        )
    told = "; ".join(part for part in parts if part)
    return f"{shard_set.where}: {told}" if told else None


def _ticks(indexes: ShardIndexCache, shard: int, rows: Sequence[int]) -> list[NDArray[np.int32]]:
    """Frame times of some clips of a shard; one that contradicts itself is left out, for its reading names it."""
    ticks = []
    for row in rows:
        with suppress(SampleDamageError):
            ticks.append(indexes.entry(shard, row).frame_ticks)
    return ticks


def _rate(ticks: NDArray[np.int32]) -> float:
    return frames_per_second(ticks, ticks_per_second=TICKS_PER_SECOND)


def _strides_in_words(rates: Sequence[float], num_clips: int, sampling: SamplingConfig) -> str:
    strides = {rate: scaled_stride(sampling.frame_stride, rate) for rate in rates}
    scaled = {rate: stride for rate, stride in strides.items() if stride != sampling.frame_stride}
    if not scaled:
        return ""
    part = sum(rate in scaled for rate in rates)
    return (
        f"{part} of the first {num_clips} clips run at {_range(scaled.keys())} frames a second; their dense "
        f"windows take strides of {_range(scaled.values())} frames in place of {sampling.frame_stride}, the same in "
        "time (sampling.frame_stride counts frames at 30 a second)"
    )


def _range(values: Iterable[float | int]) -> str:
    numbers = sorted({f"{value:.4g}" for value in values}, key=float)
    return numbers[0] if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"


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
