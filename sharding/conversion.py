"""Convert a list of sources into a shard set: decode in children, write shards in order, the manifest last.

`convert` refuses what can be refused before anything is decoded or written. Decoded clips become samples (`assemble`),
samples are cut into shards by size (`ShardCutter`). At the end rejects are held against the budget, and the manifest is
written.
"""

import errno
import functools
import json
import logging
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ca2st.durable import NO_FAULTS, FaultPoints, sweep_temporaries, write_bytes
from ca2st.errors import EnvironmentFault
from sharding.errors import (
    ConversionRefusedError,
    MediaError,
    ShardDamageError,
)
from sharding.folder import (
    REJECTS_NAME,
    SOURCES_NAME,
    DoneShard,
    Reject,
    ShardSources,
    State,
    append_sources,
    changed_sources,
    changes_in_words,
    count_by_reason,
    done_shards,
    folder_lock,
    open_done_shard,
    output_folder,
    read_done_shard,
    read_sources,
    refuse_another_conversion,
    refuse_foreign_files,
    rejects_file,
    remove_shards_from,
    require_within_budget,
    state_of,
    state_of_sample,
    write_missing,
    write_sources,
)
from sharding.format.index import sample_key
from sharding.format.shard_set import MANIFEST_NAME, read_shard_set, write_shard_set
from sharding.format.writer import ShardRange, StoredSample, write_shard
from sharding.media.audio import log_mel, no_spectrogram, npy_bytes
from sharding.media.encode import ClipJob, EncodedClip, encode_clip
from sharding.settings import TRAILER_BYTES, ConversionConfig, conversion_identity, estimate_storage
from sharding.source import MISSING_MEDIA, SourceList, SourceSample, check_source, named_labels, refuse_doubtful
from sharding.verify import shard_problems
from sharding.workers import ClipPool, DecodePool, Rejected

_log = logging.getLogger(__name__)
OpenPool = Callable[[], AbstractContextManager[ClipPool]]
"""Opens a pool for the clips of one conversion; leaving it ends everything that it started."""
Outcome = StoredSample | Reject


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversionReport:
    """What a finished conversion made."""

    manifest_path: Path
    num_classes: Mapping[str, int]
    """Classes by target."""
    num_samples: int
    num_shards: int
    num_with_audio: int
    rejected: Mapping[str, int]
    """Rejected sources by reason."""
    notes: Mapping[str, int]
    """What was unusual about the sources and accepted, by kind: of their list and of the clips."""
    clips_per_second: float
    """Clips converted in this run by its wall time; 0 when there was nothing left to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversionProgress:
    """Where a running conversion stands."""

    num_done: int
    """Sources dealt with, rejects and those of earlier runs included."""
    num_rejected: int
    num_shards: int
    clips_per_second: float
    """Of this run."""


def convert(
    source: SourceList,
    out: Path,
    config: ConversionConfig,
    *,
    faults: FaultPoints = NO_FAULTS,
    progress: Callable[[ConversionProgress], None] | None = None,
    encode: Callable[[ClipJob], EncodedClip] = encode_clip,
    pool: OpenPool | None = None,
) -> ConversionReport:
    """Convert `source` into a shard set in the folder `out`, or finish a conversion begun there.

    Args:
        source: The samples, in the order in which they are stored.
        out: A new or empty folder, or that of the same conversion.
        config: Parameters.
        faults: Fault points (tests).
        progress: Called after every source.
        encode: What the decode children run; a module-level function.
        pool: Opened when there is work; None: `config.workers` children of this process that run `encode`.

    Raises:
        UserInputError: no samples, or every one of them rejected, and nothing is left behind; or `config.strict`, and
            notes question the data.
        ConversionRefusedError: `out` holds something else, another process converts into it, or it holds a finished
            set and sources changed since (`config.update` converts them again).
        RejectBudgetError: more rejects than `config.max_rejects`; they are listed in ``rejects.jsonl``, no manifest.
        ShardDamageError: `out` holds a finished set that is damaged.
        EnvironmentFault: the folder cannot be written.
    """
    check_source(source)
    check_notes(source, config)
    pool = pool or partial(
        DecodePool,
        encode,
        num_workers=config.workers,
        timeout_seconds=config.clip_timeout_seconds,
        memory_bytes=config.clip_memory_bytes,
    )
    with output_folder(out), folder_lock(out):
        refuse_foreign_files(out)
        sweep_temporaries(out)
        return _Conversion(source, out, config, faults=faults, progress=progress or (lambda _: None), pool=pool).run()


def check_notes(
    source: SourceList,
    config: ConversionConfig,
    shards: Sequence[DoneShard] = (),
    examples: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Refuse notes that question the data where `config.strict`: of the source list, and of the clips in `shards`.

    Raises:
        UserInputError: naming kinds, counts and examples; `examples` are ids of clips by kind.
    """
    if config.strict:
        kept = " (finished shards are kept, and a rerun goes on from them)" if shards else ""
        rest = f"correct or remove them, or leave --strict out{kept}"
        refuse_doubtful(_count_notes(source, shards), {**(examples or {}), **source.notes}, rest=rest)


def _count_notes(source: SourceList, shards: Sequence[DoneShard]) -> dict[str, int]:
    """Return how often each kind of note was made about the source list and the clips."""
    counts = Counter({kind: len(places) for kind, places in source.notes.items()})
    for shard in shards:
        counts.update(shard.notes)
    return dict(sorted(counts.items()))


class ShardCutter:
    """Cuts a stream of outcomes into shards by size.

    A shard's range of sources ends right behind its last sample; rejects after it belong to the next shard, those at
    the very end to the last one. So the cuts depend on the outcomes alone, not on where a conversion was interrupted.
    """

    def __init__(self, outcomes: Iterator[tuple[int, Outcome]], *, first: int, end: int, shard_bytes: int) -> None:
        self._outcomes, self._last_end, self._room = outcomes, end, shard_bytes - TRAILER_BYTES
        self._first = self._end = first
        self._rejects: list[Reject] = []
        self._before_next: list[Reject] = []
        self._next: tuple[int, StoredSample] | None = None
        self._advance()

    @property
    def has_samples(self) -> bool:
        """Whether at least one more sample is to be written."""
        return self._next is not None

    def samples(self) -> Iterator[StoredSample]:
        """Yield the samples of the next shard; at least one when `has_samples`."""
        self._first, self._rejects = self._end, []
        num_bytes = 0
        while self._next is not None:
            position, sample = self._next
            if num_bytes and num_bytes + sample.tar_bytes > self._room:
                return
            num_bytes += sample.tar_bytes
            self._end = position + 1
            self._take_rejects()
            self._advance()
            yield sample
        self._end = self._last_end
        self._take_rejects()

    def covers(self) -> ShardRange:
        """Return what the shard last cut covers; call it when its samples are used up."""
        rejects: tuple[Mapping[str, Any], ...] = tuple(asdict(reject) for reject in self._rejects)
        return ShardRange(first=self._first, end=self._end, rejects=rejects)

    @property
    def depends_end(self) -> int:
        """Position behind the last source on which the shard last cut depends: the sample that no longer fitted."""
        return self._last_end if self._next is None else self._next[0] + 1

    @property
    def rejects_without_shard(self) -> list[Reject]:
        """Rejects behind the last sample that no shard has taken."""
        return list(self._before_next)

    def _take_rejects(self) -> None:
        self._rejects += self._before_next
        self._before_next = []

    def _advance(self) -> None:
        self._next = None
        for position, outcome in self._outcomes:
            if isinstance(outcome, StoredSample):
                self._next = (position, outcome)
                return
            self._before_next.append(outcome)


class _Conversion:
    """One run of `convert`, with the folder locked."""

    def __init__(
        self,
        source: SourceList,
        out: Path,
        config: ConversionConfig,
        *,
        faults: FaultPoints,
        progress: Callable[[ConversionProgress], None],
        pool: OpenPool,
    ) -> None:
        self._source, self._out, self._config = source, out, config
        self._faults, self._progress, self._pool = faults, progress, pool
        self._identity = conversion_identity(source, config)
        self._done: list[DoneShard] = []
        self._known: dict[str, ShardSources] = {}
        self._states: dict[int, State] = {}  # of the sources of shards that are not written yet
        self._noted: dict[str, dict[str, None]] = {}  # ids by kind of note, of this run, each once
        self._num_converted = self._num_rejected = 0
        self._started = time.monotonic()

    def run(self) -> ConversionReport:
        self._known = read_sources(self._out)
        if (self._out / MANIFEST_NAME).exists():
            report = self._finished_before()
            if not self._sources_changed():
                _log.info("already finished, nothing to convert: %s", self._out)
                return report
            (self._out / MANIFEST_NAME).unlink()
        else:
            self._done = done_shards(self._out, self._identity, self._source, is_whole=self._is_whole)
            self._sources_changed()
            if self._done:
                _log.info("resuming after %d finished shards of an earlier run", len(self._done))
        with self._pool() as pool:
            self._drop_shards_with_other_rejects(pool)
            remove_shards_from(self._out, len(self._done))
            write_sources(self._out, self._known_of_done())
            self._warn_of_space()
            try:
                leftover = self._convert_rest(pool)
            except EnvironmentFault as fault:
                if getattr(fault.__cause__, "errno", None) == errno.ENOSPC:
                    fault.add_note(f"about {self._bytes_to_come() / 1e6:.0f} MB are still to come; rerun to go on")
                raise
        rejects = [Reject(**reject) for shard in self._done for reject in shard.covers.rejects] + leftover
        require_within_budget(rejects, self._source, budget=self._config.max_rejects, out=self._out)
        check_notes(self._source, self._config, self._done, {kind: tuple(ids) for kind, ids in self._noted.items()})
        write_sources(self._out, self._known_of_done())
        self._write_manifest(rejects)
        return self._report(count_by_reason(rejects))

    def _write_manifest(self, rejects: Sequence[Reject]) -> None:
        """Write the lists of rejects and of what is missing, where there are any, the shard table and the manifest."""
        write_missing(self._out, self._source.notes.get(MISSING_MEDIA, ()))
        if rejects:
            write_bytes(self._out / REJECTS_NAME, rejects_file(rejects))
        else:
            (self._out / REJECTS_NAME).unlink(missing_ok=True)
        fields = {
            "dataset": self._source.dataset,
            "split": self._source.split,
            "label_spaces": self._source.label_spaces,
            "targets": self._source.targets,
            "audio": self._config.audio,
            "video": self._config.video,
            "tool_versions": self._identity["tool_versions"],
            "source_list_sha256": self._source.sha256,
            "rejected": count_by_reason(rejects),
            "clock": self._config.clock,
            "notes": _count_notes(self._source, self._done),
            "labelling": self._source.labelling,
        }
        write_shard_set(self._out, fields, tuple(shard.entry for shard in self._done), faults=self._faults)

    def _finished_before(self) -> ConversionReport:
        shards = read_shard_set(self._out)
        for number in range(len(shards.shards)):
            shard = read_done_shard(self._out, number)
            if shard is None or shard.entry != shards.shards[number]:
                name = shards.shards[number].name
                raise ShardDamageError(
                    f"{self._out}: {name} or its index is missing, cut short or changed; "
                    f"see `ca2st shard verify {self._out}`"
                )
            refuse_another_conversion(self._out, shard.conversion, self._identity)
            self._done.append(shard)
        check_notes(self._source, self._config, self._done)
        return self._report(shards.manifest.rejected)

    def _is_whole(self, shard: DoneShard) -> bool:
        """Whether a shard is as it was written: by the hash of its index kept beside it, else by every byte of it."""
        known = self._known.get(shard.entry.name)
        if known is not None:
            return known.index_sha256 == shard.entry.index_sha256 and known.first == shard.covers.first
        return not shard_problems(self._out, shard.entry, self._source.label_spaces)

    def _sources_changed(self) -> bool:
        """Whether sources are other files than when the shards were made; from the first of these shards on all go.

        Raises:
            ConversionRefusedError: the set is finished, and `config.update` is not given.
        """
        state = functools.cache(state_of)
        for number, shard in enumerate(self._done):
            known = self._known.get(shard.entry.name)
            if known is None or not changed_sources(known, self._source, state):
                continue
            words = changes_in_words(self._known_of_done(), self._source, state)
            if (self._out / MANIFEST_NAME).exists() and not self._config.update:
                raise ConversionRefusedError(
                    f"{self._out}: holds a finished set, but {words} changed since; to convert again from "  # noqa: S608  # words, no SQL
                    f"{shard.entry.name} on give --update (runs begun on this set will not resume on the new one), or "
                    f"choose another --out; if only times changed, remove {self._out / SOURCES_NAME} to keep the set"
                )
            _log.warning("%s changed since they were converted: converting again from %s", words, shard.entry.name)
            del self._done[number:]
            return True
        return False

    def _known_of_done(self) -> list[ShardSources]:
        return [self._known[shard.entry.name] for shard in self._done if shard.entry.name in self._known]

    def _bytes_to_come(self) -> float:
        """Return estimated size of what is not converted yet."""
        total = len(self._source.samples)
        num_done = self._done[-1].covers.end if self._done else 0
        return estimate_storage(self._source, self._config).total_bytes * (total - num_done) / total

    def _warn_of_space(self) -> None:
        needed, free = self._bytes_to_come(), shutil.disk_usage(self._out).free
        if needed > free:
            _log.warning(
                "%s: about %.0f MB are to be written (an estimate), and %.0f MB are free there",
                self._out,
                needed / 1e6,
                free / 1e6,
            )

    def _drop_shards_with_other_rejects(self, pool: ClipPool) -> None:
        """Try the rejects of complete shards again: where a source was repaired, go on from its shard."""
        for number, shard in enumerate(self._done):
            if not shard.covers.rejects:
                continue
            positions = [reject["position"] for reject in shard.covers.rejects]
            before = [Reject(**reject) for reject in shard.covers.rejects]
            changed = [at for at, (_, outcome) in enumerate(self._outcomes(pool, positions)) if outcome != before[at]]
            if changed:
                # A source before the first sample of its shard might have fitted into the one before.
                leads = positions[changed[0]] == shard.covers.first + changed[0]
                del self._done[max(0, number - leads) :]
                return

    def _convert_rest(self, pool: ClipPool) -> list[Reject]:
        """Write the shards that are missing; the rejects no shard could take when there is no sample at all."""
        while True:
            first, end = (self._done[-1].covers.end if self._done else 0), len(self._source.samples)
            self._num_rejected = sum(len(shard.covers.rejects) for shard in self._done)
            outcomes = self._reported(self._outcomes(pool, range(first, end)), first)
            cutter = ShardCutter(outcomes, first=first, end=end, shard_bytes=self._config.shard_bytes)
            while cutter.has_samples:
                self._write_shard(cutter)
            if not cutter.rejects_without_shard or not self._done:
                return cutter.rejects_without_shard
            # A source behind the last shard was good when that was written and is not any more: write it again.
            self._done.pop()
            remove_shards_from(self._out, len(self._done))

    def _outcomes(self, pool: ClipPool, positions: list[int] | range) -> Iterator[tuple[int, Outcome]]:
        samples = [self._source.samples[position] for position in positions]
        clips = pool.map(self._job(position) for position in positions)
        for position, sample, clip in zip(positions, samples, clips, strict=True):
            outcome = assemble(position, sample, clip, self._source, self._config)
            for kind in outcome.notes if isinstance(outcome, StoredSample) else ():
                self._noted.setdefault(kind, {})[sample.sample_id] = None
            yield position, outcome

    def _job(self, position: int) -> ClipJob:
        sample = self._source.samples[position]
        self._states[position] = state_of_sample(sample)
        return self._config.job(sample)

    def _reported(self, outcomes: Iterator[tuple[int, Outcome]], num_done: int) -> Iterator[tuple[int, Outcome]]:
        for position, outcome in outcomes:
            num_done += 1
            self._num_converted += 1
            self._num_rejected += isinstance(outcome, Reject)
            self._faults.reach("sample")
            self._progress(
                ConversionProgress(
                    num_done=num_done,
                    num_rejected=self._num_rejected,
                    num_shards=len(self._done),
                    clips_per_second=self._clips_per_second(),
                )
            )
            yield position, outcome

    def _write_shard(self, cutter: ShardCutter) -> None:
        number = len(self._done)
        write_shard(
            self._out,
            number,
            cutter.samples(),
            covers=cutter.covers,
            conversion=self._identity,
            faults=self._faults,
        )
        done = open_done_shard(self._out, number, with_tar=False)
        self._done.append(done)
        first, name = done.covers.first, done.entry.name
        states = tuple(self._states[position] for position in range(first, cutter.depends_end))
        known = ShardSources(shard=name, index_sha256=done.entry.index_sha256, first=first, states=states)
        append_sources(self._out, known)
        self._known[name] = known
        for position in range(first, done.covers.end):
            del self._states[position]

    def _report(self, rejected: Mapping[str, int]) -> ConversionReport:
        return ConversionReport(
            manifest_path=self._out / MANIFEST_NAME,
            num_classes=self._source.num_classes,
            num_samples=sum(shard.entry.num_samples for shard in self._done),
            num_shards=len(self._done),
            num_with_audio=sum(shard.num_with_audio for shard in self._done),
            rejected=rejected,
            notes=_count_notes(self._source, self._done),
            clips_per_second=self._clips_per_second(),
        )

    def _clips_per_second(self) -> float:
        return self._num_converted / max(time.monotonic() - self._started, 1e-9)


def assemble(
    position: int, sample: SourceSample, clip: EncodedClip | Rejected, source: SourceList, config: ConversionConfig
) -> Outcome:
    """Return the stored sample of a decoded clip, or the reject it is."""
    if isinstance(clip, Rejected):
        return Reject(position=position, sample_id=sample.sample_id, reason=clip.reason, what=clip.what)
    try:
        mel = log_mel(clip.audio.pcm, config.audio) if clip.audio and clip.has_audio else no_spectrogram(config.audio)
    except MediaError as error:
        return Reject(position=position, sample_id=sample.sample_id, reason=error.reason, what=str(error))
    key = sample_key(sample.sample_id)
    record = sample_record(key, sample, clip, source, config)
    return StoredSample(
        key=key,
        labels=sample.labels,
        video=clip.video.mp4,
        mel=npy_bytes(mel),
        json=json.dumps(record, sort_keys=True, ensure_ascii=False).encode(),
        num_frames=len(clip.video.frame_ticks),
        duration_seconds=clip.duration_seconds,
        has_audio=clip.has_audio,
        mel_rows=len(mel),
        frame_data_offset=clip.video.frame_data_offset,
        frame_bytes=clip.video.frame_bytes,
        frame_ticks=clip.video.frame_ticks,
        notes=clip.notes,
    )


def sample_record(
    key: str, sample: SourceSample, clip: EncodedClip, source: SourceList, config: ConversionConfig
) -> dict[str, Any]:
    """Return the contents of a sample's ``.json``."""
    audio: dict[str, Any] = {"has_audio": False}
    if clip.audio is not None:
        audio = {
            "has_audio": clip.has_audio,
            "is_silent": clip.audio.is_silent,
            "sample_rate_hz": config.sample_rate_hz,
            "num_samples": len(clip.audio.pcm),
            "source_sample_rate_hz": clip.audio.source_rate_hz,
            "source_channels": clip.audio.source_channels,
        }
    if sample.sound_path is not None and clip.sound_bytes is not None:
        audio |= {"source": sample.sound_path.name, "source_bytes": clip.sound_bytes}
    record = {
        "key": key,
        "sample_id": sample.sample_id,
        "source": sample.path.name,
        "source_bytes": clip.source_bytes,
        "start_seconds": sample.start_seconds,
        "end_seconds": sample.end_seconds,
        "duration_seconds": clip.duration_seconds,
        "labels": named_labels(sample.labels, source.label_spaces, source.labelling),
        "video": {
            "codec": config.codec,
            "width": clip.video.width,
            "height": clip.video.height,
            "num_frames": len(clip.video.frame_ticks),
            "source_codec": clip.source_codec,
            "source_width": clip.source_size[0],
            "source_height": clip.source_size[1],
            "source_frames_per_second": clip.source_frames_per_second,
        },
        "audio": audio,
    }
    said = {"changes": dict(clip.changes), "notes": list(clip.notes)}
    return record | {name: value for name, value in said.items() if value}
