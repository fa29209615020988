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
from pipelines.storage.index import SampleEntry, ShardIndexCache
from pipelines.storage.remote import CachedShards
from pipelines.storage.samples import SampleReader
from pipelines.storage.shard_files import Verify
from pipelines.views.sampling import SamplingConfig, VaryingRate, frames_per_second, scaled_stride
from sharding.format.index import TICKS_PER_SECOND
from sharding.format.shard_set import AudioParameters, ShardSet, VideoParameters
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


def stride_note(reader: SampleReader, sampling: SamplingConfig) -> str | None:
    """One line on what a dense window reads of this set, judged by clips of its first shard.

    None where it reads every `frame_stride`-th frame as configured, or where there are no dense windows.

    Raises:
        ShardSetDamageError: the first index is damaged.
    """
    if sampling.scheme != "dense":
        return None
    shard_set = reader.shard_set
    first = next((place for place, shard in enumerate(shard_set.shards) if shard.num_samples), None)
    if first is None:
        return None
    count = shard_set.shards[first].num_samples
    rows = np.unique(np.linspace(0, count - 1, min(count, _MOST_CLIPS)).astype(int)).tolist()
    ticks = _ticks(reader.indexes, first, rows)
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


class SetReaders:
    """The readers of one or more sets; a shard is named by its place in the sets' tables laid end to end."""

    def __init__(
        self,
        shard_sets: Sequence[ShardSet],
        clip: ClipSpec,
        targets: Sequence[str],
        *,
        stats: StatsRecorder,
        verify: Verify = "size",
        index_cache_bytes: int = 1 << 30,
    ) -> None:
        """Check every set; nothing is opened before it is read.

        Raises:
            UserInputError: a target, codec or mel size that a set does not have.
            ShardSetDamageError: files of a set are missing or of another size.
        """
        for shard_set in shard_sets:
            check_manifest(shard_set, clip)
        self._readers: list[SampleReader] = []
        for shard_set in shard_sets:
            most_bytes = index_cache_bytes // len(shard_sets)
            reader = SampleReader(shard_set, stats, verify=verify, index_cache_bytes=most_bytes)
            reader.files.check()
            self._readers.append(reader)
        self._targets = [target_columns(shard_set, targets) for shard_set in shard_sets]
        self._ends = [*accumulate(len(shard_set.shards) for shard_set in shard_sets)]

    def find(self, shard: int) -> tuple[SampleReader, int]:
        """Return the reader of a shard, and the shard's place in its own set's table."""
        number = self._number(shard)
        return self._readers[number], shard - (self._ends[number - 1] if number else 0)

    def labels(self, shard: int, entry: SampleEntry) -> list[int]:
        """Return the labels of a sample of a shard, in the order of the targets.

        Raises:
            SampleDamageError: one is outside its label space.
        """
        targets = self._targets[self._number(shard)]
        for target in targets:
            if not 0 <= entry.labels[target.column] < target.num_classes:
                raise SampleDamageError(
                    f"{entry.where}: expected a {target.name} of 0..{target.num_classes - 1}, found "
                    f"{entry.labels[target.column]}; convert the set again"
                )
        return [entry.labels[target.column] for target in targets]

    def stride_notes(self, sampling: SamplingConfig) -> list[str]:
        """See `stride_note`: one line for each of the sets whose clips run at other rates."""
        notes = [stride_note(reader, sampling) for reader in self._readers]
        return [note for note in notes if note is not None]

    @property
    def are_remote(self) -> bool:
        """Whether any set is read through this machine's cache."""
        return any(isinstance(reader.files, CachedShards) for reader in self._readers)

    def fetch_ahead(self, shard: int, *, is_abandoned: Callable[[], bool]) -> bool:
        """See `CachedShards.fetch_ahead`; False for a local set."""
        reader, own_shard = self.find(shard)
        if isinstance(files := reader.files, CachedShards):
            return files.fetch_ahead(files.shard_set.shards[own_shard], is_abandoned=is_abandoned)
        return False

    def release(self, shard: int) -> None:
        """See `CachedShards.release`."""
        reader, own_shard = self.find(shard)
        if isinstance(files := reader.files, CachedShards):
            files.release(files.shard_set.shards[own_shard])

    def sample_ids(self) -> list[str]:
        """Return the keys of all samples in stored order, set after set."""
        return [key for reader in self._readers for key in reader.indexes.sample_ids()]

    def close(self) -> None:
        """Close the files of every set."""
        for reader in self._readers:
            reader.close()

    def _number(self, shard: int) -> int:
        return bisect_right(self._ends, shard)


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
