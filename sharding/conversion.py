"""Convert a list of sources into a shard set: shards planned ahead and made by workers, the manifest last.

`convert` refuses what can be refused before anything is decoded or written. The list is cut into shards by a forecast
(`plan_shards`); workers make whole shards by themselves (`sharding.shard_task`). This process counts, holds the rejects
against the budget, and writes the manifest. No byte of a shard passes through it.
"""

import contextlib
import errno
import functools
import hashlib
import logging
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ca2st.checked_json import sha256_of_json
from ca2st.durable import NO_FAULTS, FaultPoints, sweep_temporaries, write_bytes
from ca2st.errors import EnvironmentFault, UserInputError, listed
from sharding import folder
from sharding.errors import ConversionRefusedError, ShardDamageError
from sharding.format import remote
from sharding.format.index import decode_index, sample_key
from sharding.format.shard_set import MANIFEST_NAME, Manifest, ShardEntry, ShardSet, read_shard_set, write_shard_set
from sharding.format.writer import shard_name
from sharding.media.encode import ClipJob, EncodedClip, encode_clip
from sharding.settings import ConversionConfig, conversion_identity, plan_shards
from sharding.shard_task import LocalWorkers, MadeShard, ShardPool, ShardSetup, ShardTask
from sharding.source import MISSING_MEDIA, SourceList, check_source, examples_of, refuse_doubtful
from sharding.verify import remote_shard_problems, shard_problems

_log = logging.getLogger(__name__)
OpenPool = Callable[[ShardSetup, int], AbstractContextManager[ShardPool]]
"""Opens a pool for so many shards of one conversion; leaving it ends everything that it started."""
_WRITABLE = ("s3", "gs", "memory")
_MOST_STATES = 100_000  # of files, remembered: several samples may be cut out of one


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversionReport:
    """What a finished conversion made."""

    manifest_path: Path | str
    """File, or its URL."""
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
    out: str | Path,
    config: ConversionConfig,
    *,
    faults: FaultPoints = NO_FAULTS,
    progress: Callable[[ConversionProgress], None] | None = None,
    encode: Callable[[ClipJob], EncodedClip] = encode_clip,
    pool: OpenPool | None = None,
) -> ConversionReport:
    """Convert `source` into a shard set in `out`, finish a conversion begun there, or add to the set that is there.

    Args:
        source: The samples, in the order in which they are stored.
        out: A new or empty folder, or that of the same conversion; or the URL of one (s3, gs).
        config: Parameters.
        faults: Fault points (tests).
        progress: Called after every source.
        encode: What the decode children run; a module-level function.
        pool: Opened with the number of shards to make, where there are any; None: this machine's processes.

    Raises:
        UserInputError: no samples, or every one of them rejected, and nothing is left behind; or `config.strict`, and
            notes question the data.
        ConversionRefusedError: `out` holds something else, another process converts into it, or it holds a finished
            set and sources changed since (`config.update` converts them again), or one to which nothing can be added.
        RejectBudgetError: more rejects than `config.max_rejects`; they are listed in ``rejects.jsonl``, no manifest.
        ShardDamageError: `out` holds a finished set that is damaged.
        EnvironmentFault: the folder cannot be written.
    """
    check_source(source)
    check_notes(source, config)
    place = remote.as_location(out)
    if isinstance(place, remote.RemoteFolder) and place.scheme not in _WRITABLE:
        raise UserInputError(
            f"--out {place}: expected a folder or a URL of {', '.join(_WRITABLE)}; others are read only"
        )
    with folder.claimed(place) as home:
        folder.refuse_foreign_files(remote.files_of(place))
        sweep_temporaries(home)
        config = _as_begun(remote.files_of(place), config)
        setup = ShardSetup(
            out=place.absolute() if isinstance(place, Path) else place,
            config=config,
            source=replace(source, samples=(), notes={}),
            identity=conversion_identity(source, config),
            faults=faults,
            encode=encode,
        )
        conversion = _Conversion(source, setup, home, pool=pool or LocalWorkers, progress=progress or (lambda _: None))
        try:
            return conversion.run()
        finally:
            sweep_temporaries(home)  # of workers that were ended


def _as_begun(files: remote.Files, config: ConversionConfig) -> ConversionConfig:
    """Return the settings, with the sides of pictures as the set has them that was begun or finished there."""
    multiple, first = config.side_multiple, min(folder.shards_there(files), default=None)
    shard = None if first is None else folder.read_done_shard(files, first)
    if shard is not None and multiple is not None and shard.conversion["video"].get("side_multiple") is None:
        _log.info("%s: its pictures have even sides, not multiples of %d: what is made now too", files.folder, multiple)
        return replace(config, side_multiple=None)
    if multiple is not None and config.short_side % multiple:
        most = config.short_side // multiple * multiple
        _log.warning("short side %d: sides are multiples of %d, so it is at most %d", config.short_side, multiple, most)
    return config


def check_notes(
    source: SourceList,
    config: ConversionConfig,
    shards: Sequence[folder.DoneShard] = (),
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


def _count_notes(source: SourceList, shards: Sequence[folder.DoneShard]) -> dict[str, int]:
    """Return how often each kind of note was made about the source list and the clips."""
    counts = Counter({kind: len(places) for kind, places in source.notes.items()})
    for shard in shards:
        counts.update(shard.notes)
    return dict(sorted(counts.items()))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Earlier:
    """A finished set that is added to."""

    manifest: Manifest
    shards: tuple[ShardEntry, ...]
    rejects: bytes
    """Its lines of ``rejects.jsonl``."""
    missing: bytes


class _Conversion:
    """One run of `convert`, with its output claimed."""

    def __init__(
        self,
        source: SourceList,
        setup: ShardSetup,
        home: Path,
        *,
        pool: OpenPool,
        progress: Callable[[ConversionProgress], None],
    ) -> None:
        self._source, self._setup, self._out, self._config = source, setup, setup.out, setup.config
        self._pool, self._progress, self._home = pool, progress, home
        self._files = remote.files_of(setup.out)
        self._plan = plan_shards(source, setup.config)
        self._earlier: _Earlier | None = None
        self._first_number = 0
        if isinstance(self._files, remote.RemoteFiles) and not (home / folder.SOURCES_NAME).exists():
            with contextlib.suppress(remote.RemoteFileMissingError):  # left there by another machine
                write_bytes(home / folder.SOURCES_NAME, self._files.read(folder.SOURCES_NAME))
        self._sources = folder.SourcesFile(home)
        self._done: dict[int, folder.DoneShard] = {}
        self._rejects: dict[int, tuple[folder.Reject, ...]] = {}
        self._examples: dict[int, Mapping[str, tuple[str, ...]]] = {}
        self._sampled: dict[int, tuple[int, int]] = {}  # of shards being made: sources so far, rejects among them
        self._num_done = self._num_rejected = self._num_converted = 0
        self._started = time.monotonic()

    def run(self) -> ConversionReport:
        is_update = False
        if MANIFEST_NAME in (self._files.sizes() or {}):
            shards = read_shard_set(self._out)
            if self._config.append and shards.manifest.source_lists[-1:] != (self._list_hash,):
                self._earlier = self._set_to_add_to(shards)
                self._first_number = 1 + max(folder.shard_number(entry.name) for entry in shards.shards)
                _log.info("adding to the %d samples in %s", shards.manifest.num_samples, self._out)
            else:
                report = self._finished_before(shards)
                if not self._drop_changed(finished=True):
                    _log.info("already finished, nothing to convert: %s", self._out)
                    return report
                # Before any shard is made anew: a kill leaves no manifest over a mixture.
                self._files.remove(MANIFEST_NAME)
                is_update = True
        elif self._config.append:
            raise ConversionRefusedError(
                f"{self._out}: --append: expected a finished set to add to, found no {MANIFEST_NAME}; "
                "leave --append out to make one, or to finish the one that was begun"
            )
        if not is_update:
            self._find_done()
            self._drop_changed(finished=False)
        if self._done:
            _log.info("resuming after %d finished shards of an earlier run", len(self._done))
        earlier = () if self._earlier is None else self._earlier.shards
        names = [entry.name for entry in earlier]
        for number in folder.shards_there(self._files) - {*map(folder.shard_number, names), *self._done}:
            folder.remove_shard(self._files, number)
        self._sources.keep([*names, *map(shard_name, sorted(self._done))])
        self._make_shards()
        rejects = [reject for number in sorted(self._rejects) for reject in self._rejects[number]]
        files = self._files if self._earlier is None else None
        folder.require_within_budget(rejects, self._source, budget=self._config.max_rejects, files=files)
        shards_made = [self._done[number] for number in sorted(self._done)]
        check_notes(self._source, self._config, shards_made, self._examples_by_kind())
        self._sources.keep([*names, *(shard.entry.name for shard in shards_made)])
        return self._finish(shards_made, rejects)

    @property
    def _list_hash(self) -> str:
        return str(self._setup.identity["source_list_sha256"])

    def _set_to_add_to(self, shards: ShardSet) -> _Earlier:
        """Return a finished set, once it was seen that the list can be added to it.

        Raises:
            ConversionRefusedError: it has other classes or parameters, or samples of the same ids.
        """
        ours, theirs = self._manifest_fields(), shards.manifest
        for name in ("dataset", "split", "label_spaces", "targets", "labelling", "audio", "video", "clock"):
            if ours[name] != getattr(theirs, name):
                found, expected = f"{ours[name]!r:.200}", f"{getattr(theirs, name)!r:.200}"
                raise ConversionRefusedError(
                    f"{self._out}: --append: expected the {name} of the set that is there, {expected}, found {found}; "
                    "add with the same classes and parameters, or choose another --out"
                )
        if ours["tool_versions"] != theirs.tool_versions:
            _log.warning("%s: what is added is made by other versions than what is there", self._out)
        keys = {sample_key(sample.sample_id): sample for sample in self._source.samples}
        for entry in shards.shards:
            for key in decode_index(self._files.read(entry.index_name), columns=["key"])["key"].to_pylist():
                if key in keys:
                    raise ConversionRefusedError(
                        f"{keys[key].where}: sample id {keys[key].sample_id!r} is in {self._out} already, in "
                        f"{entry.name}; --append takes new samples only"
                    )
        num_rejects, num_missing = sum(theirs.rejected.values()), theirs.notes.get(MISSING_MEDIA, 0)
        return _Earlier(
            manifest=theirs,
            shards=shards.shards,
            rejects=self._first_lines(folder.REJECTS_NAME, num_rejects),
            missing=self._first_lines(folder.MISSING_NAME, num_missing),
        )

    def _first_lines(self, name: str, count: int) -> bytes:
        """Return so many lines of a list; an addition that was stopped at its end may have left more."""
        return b"".join(self._files.read(name).splitlines(keepends=True)[:count]) if count else b""

    def _manifest_fields(self) -> dict[str, Any]:
        return {
            "dataset": self._source.dataset,
            "split": self._source.split,
            "label_spaces": self._source.label_spaces,
            "targets": self._source.targets,
            "audio": self._config.audio,
            "video": self._config.video,
            "tool_versions": self._setup.identity["tool_versions"],
            "source_list_sha256": self._list_hash,
            "clock": self._config.clock,
            "labelling": self._source.labelling,
        }

    def _finish(self, shards: Sequence[folder.DoneShard], rejects: Sequence[folder.Reject]) -> ConversionReport:
        """Write the lists of rejects and of what is missing, the table of shards, and the manifest, last."""
        fields, earlier = self._manifest_fields(), self._earlier
        rejected, notes = Counter(folder.count_by_reason(rejects)), Counter(_count_notes(self._source, shards))
        lines, entries = folder.rejects_file(rejects), tuple(shard.entry for shard in shards)
        missing = folder.missing_file(self._source.notes.get(MISSING_MEDIA, ()))
        examples = examples_of(self._source.notes)
        if earlier is not None:
            examples |= earlier.manifest.examples
            rejected.update(earlier.manifest.rejected)
            notes.update(earlier.manifest.notes)
            lines, missing = earlier.rejects + lines, earlier.missing + missing
            entries = earlier.shards + entries
            lists = (*(earlier.manifest.source_lists or (earlier.manifest.source_list_sha256,)), self._list_hash)
            fields |= {"source_lists": lists, "source_list_sha256": sha256_of_json(list(lists))}
            fields["table"] = f"shards-{len(lists)}.parquet"
        fields |= {"rejected": dict(sorted(rejected.items())), "notes": dict(sorted(notes.items()))}
        fields["examples"] = dict(sorted(examples.items()))
        fields["rejects_sha256"] = hashlib.sha256(lines).hexdigest() if lines else None
        folder.write_or_remove(self._files, folder.MISSING_NAME, missing)
        folder.write_or_remove(self._files, folder.REJECTS_NAME, lines)
        if isinstance(self._files, remote.RemoteFiles):
            known = self._home / folder.SOURCES_NAME  # not there where another machine made every shard
            folder.write_or_remove(self._files, folder.SOURCES_NAME, known.read_bytes() if known.exists() else b"")
        manifest = write_shard_set(self._files, fields, entries, faults=self._setup.faults)
        if earlier is not None:
            self._files.remove(earlier.manifest.table)
        return self._report(manifest)

    def _finished_before(self, shards: ShardSet) -> ConversionReport:
        """Take the shards of a finished set; of one that was added to, those that the same list added last."""
        for entry in shards.shards:
            number = folder.shard_number(entry.name)
            shard = folder.read_done_shard(self._files, number)
            if shard is None or shard.entry != entry:
                raise ShardDamageError(
                    f"{self._out}: {entry.name} or its index is missing, cut short or changed; "
                    f"see `ca2st shard verify {self._out}`"
                )
            if self._config.append and shard.conversion.get("source_list_sha256") != self._list_hash:
                continue
            folder.refuse_another_conversion(self._out, shard.conversion, self._setup.identity, finished=True)
            self._keep(number, shard)
        check_notes(self._source, self._config, list(self._done.values()))
        return self._report(shards.manifest)

    def _find_done(self) -> None:
        """Find the complete shards of an earlier run."""
        for number in sorted(folder.shards_there(self._files)):
            if number < self._first_number:
                continue
            covers, identity = self._range(number), self._setup.identity
            shard = folder.planned_shard(self._files, number, covers=covers, identity=identity, source=self._source)
            if shard is not None and self._is_whole(shard):
                self._keep(number, shard)

    def _range(self, number: int) -> range:
        """Return positions of the sources of a shard; none of a shard that the plan does not have."""
        return self._plan.range(number - self._first_number)

    def _is_whole(self, shard: folder.DoneShard) -> bool:
        """Whether a shard is as it was written: by the hash of its index kept beside it, else by every byte of it."""
        known = self._sources.of(shard.entry.name)
        if known is not None:
            return known.index_sha256 == shard.entry.index_sha256 and known.first == shard.covers.first
        spaces = self._source.label_spaces
        if isinstance(self._files, remote.LocalFiles):
            return not shard_problems(self._files.folder, shard.entry, spaces)
        with tempfile.TemporaryDirectory(prefix="ca2st-verify-") as scratch:
            listed = shard.entry.bytes
            return not remote_shard_problems(self._files, shard.entry, spaces, root=Path(scratch), listed=listed)

    def _keep(self, number: int, shard: folder.DoneShard) -> None:
        """Count a shard as done; what all of them have in common is not kept so often."""
        rejects = tuple(folder.Reject(**reject) for reject in shard.covers.rejects)
        self._done[number] = replace(shard, conversion={}, covers=replace(shard.covers, rejects=()))
        self._rejects[number] = rejects
        self._num_done += shard.covers.end - shard.covers.first
        self._num_rejected += len(rejects)

    def _drop(self, number: int) -> None:
        covers = self._done.pop(number).covers
        self._num_done -= covers.end - covers.first
        self._num_rejected -= len(self._rejects.pop(number))

    def _known(self, numbers: Sequence[int]) -> Iterator[folder.ShardSources]:
        for number in numbers:
            if (known := self._sources.of(shard_name(number))) is not None:
                yield known

    def _drop_changed(self, *, finished: bool) -> bool:
        """Whether sources are other files than when the shards were made; these shards are to be made again.

        Raises:
            ConversionRefusedError: the set is finished, and `config.update` is not given.
        """
        state = functools.lru_cache(_MOST_STATES)(folder.state_of)
        changed = [
            number
            for number in self._done
            if any(folder.changed_sources(known, self._source, state) for known in self._known([number]))
        ]
        if not changed:
            return False
        words = folder.changes_in_words(self._known(changed), self._source, state)
        names = listed([shard_name(number) for number in changed])
        if finished:
            if not self._config.update:
                raise ConversionRefusedError(
                    f"{self._out}: holds a finished set, but {words} changed since; to convert {names} again give "  # noqa: S608  # words, no SQL
                    "--update (runs begun on this set will not resume on the new one), or choose another --out; if "
                    f"only times changed, remove {self._home / folder.SOURCES_NAME} to keep the set"
                )
            if any(range(one.covers.first, one.covers.end) != self._range(at) for at, one in self._done.items()):
                raise ConversionRefusedError(
                    f"{self._out}: {words} changed since; this set was made by an earlier ca2st, which cut shards as "
                    "they filled: --update cannot replace single ones, choose another --out"
                )
        _log.warning("%s changed since they were converted: converting %s again", words, names)
        for number in changed:
            self._drop(number)
        return True

    def _make_shards(self) -> None:
        """Make the shards that are missing, and try the rejects of the others again: sources may be repaired."""
        again = {number for number, rejects in self._rejects.items() if rejects}
        planned = range(self._first_number, self._first_number + len(self._plan))
        numbers = [*sorted(again), *(number for number in planned if number not in self._done)]
        if not numbers:
            return
        if isinstance(self._out, Path):
            needed, free = self._bytes_to_come() / 1e6, shutil.disk_usage(self._out).free / 1e6
            if needed > free:
                told = "%s: about %.0f MB are to be written (an estimate), and %.0f MB are free there"
                _log.warning(told, self._out, needed, free)
        with self._pool(self._setup, len(numbers)) as pool:
            try:
                for made in pool.run(map(self._task, numbers), on_sample=self._count):
                    self._take(made)
            except EnvironmentFault as fault:
                if os.strerror(errno.ENOSPC) in str(fault):
                    fault.add_note(f"about {self._bytes_to_come() / 1e6:.0f} MB are still to come; rerun to go on")
                raise

    def _task(self, number: int) -> ShardTask:
        covers = self._range(number)
        samples = tuple(  # a worker may run in another folder
            replace(one, path=one.path.absolute(), sound_path=one.sound_path.absolute() if one.sound_path else None)
            for one in self._source.samples[covers.start : covers.stop]
        )
        return ShardTask(number=number, first=covers.start, samples=samples, rejects=self._rejects.get(number))

    def _count(self, number: int, is_rejected: bool) -> None:
        """Count a source of a shard that is being made."""
        if number in self._done:
            self._drop(number)  # its rejects came out otherwise: it is made again
        num_counted, num_rejected = self._sampled.get(number, (0, 0))
        self._sampled[number] = num_counted + 1, num_rejected + is_rejected
        self._num_converted += 1
        self._num_done += 1
        self._num_rejected += is_rejected
        self._setup.faults.reach("sample")
        self._say()

    def _take(self, made: MadeShard) -> None:
        """Take what became of a shard."""
        if made.is_kept:
            return
        num_counted, num_rejected = self._sampled.pop(made.number, (0, 0))
        self._num_done -= num_counted
        self._num_rejected -= num_rejected
        self._num_converted += made.num_sources - num_counted
        if made.number in self._done:
            self._drop(made.number)
        self._examples[made.number] = made.examples
        if made.shard is None:
            folder.remove_shard(self._files, made.number)
            self._rejects[made.number] = made.rejects
            self._num_done += made.num_sources
            self._num_rejected += len(made.rejects)
        else:
            self._keep(made.number, made.shard)
            name, digest = made.shard.entry.name, made.shard.entry.index_sha256
            first = made.shard.covers.first
            self._sources.append(folder.ShardSources(shard=name, index_sha256=digest, first=first, states=made.states))
        self._setup.faults.reach("made")
        if num_counted == 0:
            self._say()

    def _say(self) -> None:
        self._progress(
            ConversionProgress(
                num_done=self._num_done,
                num_rejected=self._num_rejected,
                num_shards=len(self._done),
                clips_per_second=self._clips_per_second(),
            )
        )

    def _examples_by_kind(self) -> dict[str, tuple[str, ...]]:
        found: dict[str, tuple[str, ...]] = {}
        for number in sorted(self._examples):
            for kind, ids in self._examples[number].items():
                found[kind] = found.get(kind, ()) + ids
        return found

    def _bytes_to_come(self) -> float:
        """Return estimated size of what is not converted yet."""
        total = self._plan.num_sources
        num_done = sum(shard.covers.end - shard.covers.first for shard in self._done.values())
        return self._plan.num_bytes * (total - num_done) / total

    def _report(self, manifest: Manifest) -> ConversionReport:
        shards = list(self._done.values())
        path = self._out / MANIFEST_NAME if isinstance(self._out, Path) else self._out.file(MANIFEST_NAME)
        return ConversionReport(
            manifest_path=path,
            num_classes=self._source.num_classes,
            num_samples=manifest.num_samples,
            num_shards=manifest.num_shards,
            num_with_audio=sum(shard.num_with_audio for shard in shards),
            rejected=manifest.rejected,
            notes=manifest.notes,
            clips_per_second=self._clips_per_second(),
        )

    def _clips_per_second(self) -> float:
        return self._num_converted / max(time.monotonic() - self._started, 1e-9)
