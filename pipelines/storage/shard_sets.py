"""Several shard sets under one table of shards, checked against what is asked of them before the first step."""

import logging
import threading
from bisect import bisect_right
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from contextlib import suppress
from itertools import accumulate

import numpy as np

from ca2st.errors import CA2STError, UserInputError
from ca2st.spec import ClipSpec
from pipelines.errors import SampleDamageError
from pipelines.storage.index import SampleEntry
from pipelines.storage.remote import CachedShards
from pipelines.storage.samples import SampleReader
from pipelines.storage.shard_files import Verify
from pipelines.threads import LoaderThreads, StatsRecorder
from pipelines.views import SamplingConfig, frames_per_second, rate_varies, scaled_stride
from sharding.format.shard_set import AudioParameters, LabelSpace, ShardSet, VideoParameters, classes_that_differ
from sharding.media.codecs import STORED_CODECS

_SPECTROGRAM_FACTS = {
    "sample_rate_hz": ("sample rate", " Hz", "with `--sample-rate {expected}`"),
    "num_mel_bins": ("number of mel bins", "", "with as many"),
    "frame_length_ms": ("window", " ms", "with a release of the same window"),
    "frame_shift_ms": ("hop", " ms", "with a release of the same hop"),
}
_HORIZON_STEPS = 1024
_STEPS_PER_CALL = 64
"""Most steps that one call looks further: the first calls of an epoch do not hold up its first batches."""
_GRACE_STEPS = 4
"""Steps after which a shard's last read is over: more than are fetched ahead of the step that is handed out."""
_AHEAD_THREADS = 4
_MOST_CLIPS = 32
"""Clips whose times are read for `stride_note`."""
_log = logging.getLogger(__name__)


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
        if not targets and shard_sets[0].manifest.labelling != "none":
            raise UserInputError("targets: expected at least one label space, found none")
        for shard_set in shard_sets:
            check_manifest(shard_set, clip)
        most_bytes = index_cache_bytes // len(shard_sets)
        self._readers = [
            SampleReader(shard_set, stats, verify=verify, index_cache_bytes=most_bytes) for shard_set in shard_sets
        ]
        for reader in self._readers:
            reader.files.check()
        self.labelling = shard_sets[0].manifest.labelling
        """Of all the sets."""
        self._spaces: list[list[tuple[int, LabelSpace]]] = []
        """Of each set: the place in the index's ``labels`` of each label space named by `targets`, and the space."""
        names = () if self.labelling == "none" else targets
        for manifest in (shard_set.manifest for shard_set in shard_sets):
            spaces = [manifest.label_space(name) for name in names]
            self._spaces.append([(manifest.label_spaces.index(space), space) for space in spaces])
        self._ends = [*accumulate(len(shard_set.shards) for shard_set in shard_sets)]

    def find(self, shard: int) -> tuple[SampleReader, int]:
        """Return the reader of a shard, and the shard's place in its own set's table."""
        number = self._number(shard)
        return self._readers[number], shard - (self._ends[number - 1] if number else 0)

    def labels(self, shard: int, entry: SampleEntry) -> list[int]:
        """Return a sample's row of `ClipBatch.labels`: its labels in the order of the targets, or 0 and 1 by class.

        Raises:
            SampleDamageError: one is outside its label space.
        """
        if self.labelling == "none":
            return []
        spaces = self._spaces[self._number(shard)]
        if self.labelling == "several":
            ((_, space),) = spaces
            hot = [0] * len(space.classes)
            for label in entry.labels:
                hot[_inside(label, space, entry)] = 1
            return hot
        return [_inside(entry.labels[column], space, entry) for column, space in spaces]

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
        files = reader.files
        return isinstance(files, CachedShards) and files.fetch_ahead(
            files.shard_set.shards[own_shard], is_abandoned=is_abandoned
        )

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


class ShardsAhead:
    """Fetches the shards of remote sets before they are needed, along one iteration over an epoch.

    The plan says which shards the coming steps of this rank touch. At most `most_waiting` of them are on their way at
    once (one for each of the rank's lanes, two at least), seen at most `_HORIZON_STEPS` steps ahead; and nothing that
    is still being read is evicted for them. Local sets need none of this, and get no thread.
    """

    def __init__(
        self, sets: SetReaders, shards_of: Callable[[int], set[int]], steps: range, *, most_waiting: int
    ) -> None:
        """`shards_of` gives the shards that this rank reads in a step; only `reached` calls it."""
        self._sets, self._shards_of, self._steps = sets, shards_of, steps
        self._most_waiting = max(2, most_waiting)
        self._next = steps.start
        self._last_step: dict[int, int] = {}
        self._refused: list[int] = []
        self._waiting = set[int]()
        self._closing = threading.Event()
        self._threads = LoaderThreads("clip-shards", _AHEAD_THREADS) if sets.are_remote else None

    def close(self) -> None:
        """Abandon what is on its way, and end the threads."""
        self._closing.set()
        if self._threads is not None:
            self._threads.close()

    def reached(self, step: int) -> None:
        """Say that the samples of `step` are about to be read; called for the steps in order."""
        if self._threads is None:
            return
        finished = [shard for shard, last in self._last_step.items() if last < step - _GRACE_STEPS]
        for shard in finished:
            del self._last_step[shard]
            self._sets.release(shard)
        if finished:
            again, self._refused = self._refused, []
            for shard in again:
                self._fetch(shard)
        stop = min(self._steps.stop, step + _HORIZON_STEPS, self._next + _STEPS_PER_CALL)
        while self._next < stop and len(self._waiting) < self._most_waiting:
            for shard in self._shards_of(self._next):
                if shard not in self._last_step:
                    self._fetch(shard)
                self._last_step[shard] = self._next
            self._next += 1

    def _fetch(self, shard: int) -> None:
        assert self._threads is not None
        self._waiting.add(shard)
        call = self._threads.submit(self._sets.fetch_ahead, shard, is_abandoned=self._closing.is_set)
        call.add_done_callback(lambda done: self._done(shard, done))

    def _done(self, shard: int, call: "Future[bool]") -> None:
        self._waiting.discard(shard)
        if call.cancelled():
            return
        error = call.exception()
        if error is not None and not isinstance(error, CA2STError):
            _log.warning("fetching a shard ahead: %r; it is fetched when it is needed", error)
        elif error is None and not call.result():
            self._refused.append(shard)


def check_agreement(shard_sets: Sequence[ShardSet], targets: Sequence[str]) -> None:
    """Raise `UserInputError` for sets that cannot be trained on together; names them.

    That is one set twice, sets without labels, with other classes, or with spectrograms made otherwise.
    """
    if not shard_sets:
        raise UserInputError("shard sets: expected at least one, found none")
    require_labels(shard_sets[0], what="training", labelling=shard_sets[0].manifest.labelling)
    if not targets:
        raise UserInputError("targets: expected at least one label space, found none")
    first, places = shard_sets[0], dict[str, str]()
    for shard_set in shard_sets:
        require_labels(shard_set, what="training", labelling=first.manifest.labelling)
        if (fingerprint := shard_set.manifest.fingerprint) in places:
            raise UserInputError(
                f"{places[fingerprint]} and {shard_set.where} are the same shard set; name it once, with the "
                "sum of the weights"
            )
        places[fingerprint] = shard_set.where
        for name in targets:
            ours, theirs = (one.manifest.label_space(name) for one in (first, shard_set))
            if ours.sha256 != theirs.sha256:
                where = (f"in {first.where}", f"in {shard_set.where}")
                differing = classes_that_differ(ours.classes, theirs.classes, where=where)
                raise UserInputError(
                    f"label space {name!r}: {first.where} has {len(ours.classes)} classes and {shard_set.where} "
                    f"{len(theirs.classes)}: {differing}; convert both with one class list"
                )
        if "none" not in (first.manifest.audio.policy, shard_set.manifest.audio.policy):
            check_sound(shard_set, first.manifest.audio, whose=first.where)


def require_labels(shard_set: ShardSet, *, what: str, labelling: str) -> None:
    """Raise `UserInputError` for a set without labels, which `what` needs, or with another labelling."""
    found = shard_set.manifest.labelling
    if found == "none":
        raise UserInputError(
            f"{shard_set.where}: expected labels, which {what} needs, found a set without any "
            f"({shard_set.manifest.dataset}, {shard_set.manifest.split}); choose a labelled split (`ca2st evaluate` "
            "writes predictions for this one)"
        )
    if found != labelling:
        raise UserInputError(
            f"{shard_set.where}: expected {labelling} label{'s' * (labelling != 'one')} per sample, as in the first "
            f"training set, found {found}; convert both with the same column of labels"
        )


def check_manifest(shard_set: ShardSet, clip: ClipSpec) -> None:
    """Raise `UserInputError` for an unknown codec, colours that no decoder expects, or another number of mel bins."""
    manifest, video = shard_set.manifest, shard_set.manifest.video
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
    """Raise `UserInputError` for spectrograms made otherwise than `made`, which are `whose`: to a model other sounds.

    For sets that a model hears, and for sets that are read together.
    """
    found = shard_set.manifest.audio
    for name, (fact, unit, way) in _SPECTROGRAM_FACTS.items():
        expected, here = getattr(made, name), getattr(found, name)
        if expected != here:
            raise UserInputError(
                f"{shard_set.where}: expected spectrograms of {fact} {expected:g}{unit} as {whose} has, "
                f"found {here:g}{unit}; convert these videos {way.format(expected=expected)}"
            )


def require_sound(shard_set: ShardSet, *, whose: str) -> None:
    """Raise `UserInputError` for a set made without any sound, where a model hears; ``--audio optional`` passes."""
    if shard_set.manifest.audio.policy == "none":
        raise UserInputError(
            f"{shard_set.where}: expected shards with sound for {whose}, which hears, found a set that was made with "
            "`--audio none`; convert these videos with `--audio optional`, or use a model without an audio expert"
        )


def picture_notes(shard_set: ShardSet, made: VideoParameters, *, whose: str) -> list[str]:
    """Return a line per difference of a set's pictures from `made`: other sizes and rates are read all the same."""
    found = shard_set.manifest.video
    pairs = [
        (f"{found.short_side} pixels on the shorter side", f"{made.short_side} pixels on the shorter side"),
        (_frame_rate(found), _frame_rate(made)),
    ]
    return [
        f"{shard_set.where}: its videos have {here}, those that {whose} was trained on {there}; results may differ"
        for here, there in pairs
        if here != there
    ]


def _frame_rate(video: VideoParameters) -> str:
    rate = video.frames_per_second
    return "every frame" if rate is None else f"at most {rate:g} frames per second"


def stride_note(reader: SampleReader, sampling: SamplingConfig) -> str | None:
    """Return a line on clips whose rate is not the 30 frames per second that `sampling.frame_stride` counts in.

    Judged by clips of the first shard. None where a window reads every `frame_stride`-th frame as configured, or where
    there are no dense windows.
    """
    if sampling.scheme != "dense":
        return None
    shard_set = reader.shard_set
    first = next((place for place, shard in enumerate(shard_set.shards) if shard.num_samples), None)
    if first is None:
        return None
    count, ticks = shard_set.shards[first].num_samples, []
    for row in np.unique(np.linspace(0, count - 1, min(count, _MOST_CLIPS)).astype(int)).tolist():
        with suppress(SampleDamageError):  # a row that contradicts itself is named when it is read
            ticks.append(reader.indexes.entry(first, row).frame_ticks)
    even = [one for one in ticks if not rate_varies(one)]
    parts = []
    strides = [
        (rate, stride)
        for rate in map(frames_per_second, even)
        if (stride := scaled_stride(sampling.frame_stride, rate)) != sampling.frame_stride
    ]
    if strides:
        rates, scaled = zip(*strides, strict=True)
        parts.append(
            f"{len(strides)} of the first {len(ticks)} clips run at {_range(rates)} frames per second; their dense "
            f"windows take strides of {_range(scaled)} frames in place of {sampling.frame_stride}, the same in time "
            "(sampling.frame_stride counts frames at 30 per second)"
        )
    if len(even) < len(ticks):
        parts.append(
            f"{len(ticks) - len(even)} of the first {len(ticks)} clips vary in their frame rate; their dense windows "
            f"take a frame every {sampling.frame_stride}/30 s"
        )
    return f"{shard_set.where}: {'; '.join(parts)}" if parts else None


def _inside(label: int, space: LabelSpace, entry: SampleEntry) -> int:
    if not 0 <= label < len(space.classes):
        raise SampleDamageError(
            f"{entry.where}: expected a {space.name} of 0..{len(space.classes) - 1}, found {label}; "
            "convert the set again"
        )
    return label


def _range(values: Collection[float | int]) -> str:
    low, high = f"{min(values):.4g}", f"{max(values):.4g}"
    return low if low == high else f"{low} to {high}"
