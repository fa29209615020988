"""Make one whole shard: decode its clips in children, make spectrograms, write the tar and its index.

A task is a range of the source list that was cut beforehand, so no task needs another. It runs in the process of the
conversion, in a worker process of this machine, or on a node of a cluster, to the same bytes.
"""

import contextlib
import itertools
import json
import math
import signal
import tempfile
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Any, Protocol, Self, cast

from ca2st.durable import NO_FAULTS, FaultPoints
from ca2st.errors import EnvironmentFault
from ca2st.processes import SPAWN, die_with_parent, start_deaf
from sharding.errors import MediaError
from sharding.folder import DoneShard, Reject, State, open_done_shard, state_of_sample
from sharding.format.index import sample_key
from sharding.format.remote import Location, RemoteFiles
from sharding.format.writer import ShardRange, StoredSample, shard_name, write_shard
from sharding.media.audio import load_filter_bank, log_mel, no_spectrogram, npy_bytes
from sharding.media.encode import ClipJob, EncodedClip, encode_clip
from sharding.settings import ConversionConfig
from sharding.source import SourceList, SourceSample, named_labels
from sharding.workers import DecodePool, Rejected, cannot_start, exit_in_words

_MOST_EXAMPLES = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardSetup:
    """What all tasks of a conversion have in common."""

    out: Location
    """The set's folder, absolute, or its URL."""
    config: ConversionConfig
    source: SourceList
    """The list, without its samples."""
    identity: Mapping[str, Any]
    """Of the conversion; it goes into every index."""
    faults: FaultPoints = NO_FAULTS
    encode: Callable[[ClipJob], EncodedClip] = encode_clip
    """What the decode children run; a module-level function."""

    def decode_pool(self, num_children: int = 1) -> DecodePool:
        """Return the children of one worker."""
        return DecodePool(
            self.encode,
            num_workers=num_children,
            timeout_seconds=self.config.clip_timeout_seconds,
            memory_bytes=self.config.clip_memory_bytes,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardTask:
    """One shard to make."""

    number: int
    """Of the shard."""
    first: int
    """Position of its first sample in the source list."""
    samples: tuple[SourceSample, ...]
    """Of its whole range, with absolute paths."""
    rejects: tuple[Reject, ...] | None = None
    """Of a shard that is there: it stays where these come out the same again. None: there is none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MadeShard:
    """What became of a task."""

    number: int
    num_sources: int
    is_kept: bool = False
    """The shard that was there stays; nothing else is said about it."""
    shard: DoneShard | None = None
    """None where every sample was rejected: then there is no file."""
    rejects: tuple[Reject, ...] = ()
    states: tuple[State, ...] = ()
    """Of the sources of the range, before they were read."""
    examples: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Ids of some samples by kind of note."""


OnSample = Callable[[int, bool], None]
"""Called with a shard's number for every source that was read for it, and whether it was rejected."""


def make_shards(
    setup: ShardSetup,
    tasks: Iterator[ShardTask],
    pool: DecodePool,
    *,
    on_sample: OnSample = lambda _number, _is_reject: None,
) -> Iterator[MadeShard]:
    """Make the shard of each task in `setup.out`; children that find nothing more to do for one begin with the next.

    Tasks of shards that are there, with their rejects, come before all others.

    Raises:
        EnvironmentFault: a shard cannot be written, or a decode child not be started.
    """
    for task in tasks:
        if task.rejects is None:
            yield from _made_in_turn(setup, itertools.chain([task], tasks), pool, on_sample)
            return
        samples = [task.samples[reject.position - task.first] for reject in task.rejects]
        clips = pool.map(map(setup.config.job, samples))
        found = [
            assemble(reject.position, sample, clip, setup.source, setup.config)
            for reject, sample, clip in zip(task.rejects, samples, clips, strict=True)
        ]
        if found == list(task.rejects):
            yield MadeShard(number=task.number, num_sources=len(task.samples), is_kept=True)
        else:
            yield from _made_in_turn(setup, iter([task]), pool, on_sample)


def _made_in_turn(
    setup: ShardSetup, tasks: Iterator[ShardTask], pool: DecodePool, on_sample: OnSample
) -> Iterator[MadeShard]:
    begun = deque[tuple[ShardTask, list[State]]]()

    def jobs() -> Iterator[ClipJob]:
        for task in tasks:
            begun.append((task, states := []))
            for sample in task.samples:
                states.append(state_of_sample(sample))
                yield setup.config.job(sample)

    clips = pool.map(jobs())
    loaded = Future[None]()  # while the children start and decode their first clips
    if setup.config.audio_policy == "none":
        loaded.set_result(None)
    else:
        Thread(target=_load_filter_bank, args=(loaded,), daemon=True).start()  # no executor: Ctrl-C would wait for it
    for clip in clips:
        loaded.result()
        task, states = begun.popleft()
        of_task = itertools.chain([clip], itertools.islice(clips, len(task.samples) - 1))
        yield _made(setup, task, of_task, states, on_sample)


def _load_filter_bank(loaded: Future[None]) -> None:
    """Import it once: a second import of torch after one that failed ends with another error, which says less."""
    try:
        load_filter_bank()
    except BaseException as error:  # noqa: BLE001  raised where the result is awaited
        loaded.set_exception(error)
    else:
        loaded.set_result(None)


def _made(
    setup: ShardSetup,
    task: ShardTask,
    clips: Iterable[EncodedClip | Rejected],
    states: list[State],
    on_sample: OnSample,
) -> MadeShard:
    """Write the shard of the task from its decoded clips; `states` of its sources are complete when these end."""
    rejects, examples = list[Reject](), defaultdict[str, list[str]](list)

    def stored() -> Iterator[StoredSample]:
        for position, (sample, clip) in enumerate(zip(task.samples, clips, strict=True), task.first):
            outcome = assemble(position, sample, clip, setup.source, setup.config)
            on_sample(task.number, isinstance(outcome, Reject))
            if isinstance(outcome, Reject):
                rejects.append(outcome)
                continue
            for kind in dict.fromkeys(outcome.notes):
                if len(examples[kind]) < _MOST_EXAMPLES:
                    examples[kind].append(sample.sample_id)
            yield outcome

    samples = stored()
    shard = None
    if (first := next(samples, None)) is not None:
        end = task.first + len(task.samples)
        shard = _written(
            setup,
            task.number,
            itertools.chain([first], samples),
            lambda: ShardRange(first=task.first, end=end, rejects=tuple(map(asdict, rejects))),
        )
    return MadeShard(
        number=task.number,
        num_sources=len(task.samples),
        shard=shard,
        rejects=tuple(rejects),
        states=tuple(states),
        examples={kind: tuple(ids) for kind, ids in examples.items()},
    )


def _written(
    setup: ShardSetup, number: int, samples: Iterable[StoredSample], covers: Callable[[], ShardRange]
) -> DoneShard:
    """Write a shard into the set's folder, or into one of this machine's and from there to the set's URL."""

    def write(root: Path) -> DoneShard:
        write_shard(root, number, samples, covers=covers, conversion=setup.identity, faults=setup.faults)
        return open_done_shard(root, number, with_tar=False)

    if isinstance(setup.out, Path):
        return write(setup.out)
    files = RemoteFiles(folder=setup.out)
    with tempfile.TemporaryDirectory(prefix="ca2st-shard-") as folder:
        shard = write(Path(folder))
        for name in (shard.entry.index_name, shard.entry.name):  # a tar is never there without its index
            files.upload(name, Path(folder) / name)
        return shard


def assemble(
    position: int,
    sample: SourceSample,
    clip: EncodedClip | Rejected,
    source: SourceList,
    config: ConversionConfig,
) -> StoredSample | Reject:
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


class ShardPool(Protocol):
    """What makes the shards of a conversion: processes of this machine, or the nodes of a cluster."""

    def run(self, tasks: Iterable[ShardTask], *, on_sample: OnSample) -> Iterator[MadeShard]:
        """Yield what became of each task, as it is done; `on_sample` may hear of its sources before."""


class LocalWorkers:
    """Makes shards with `config.workers` decode children on this machine.

    A process keeps several children busy: its own share of a clip, spectrogram and tar, is a twentieth of the decoding.
    A single process is this one; others would each import torch for the spectrograms.
    """

    def __init__(self, setup: ShardSetup, num_tasks: int, *, children_per_process: int = 8) -> None:
        num_children = setup.config.workers
        num_workers = min(math.ceil(num_children / children_per_process), num_tasks)
        each, more = divmod(num_children, max(1, num_workers))
        self._setup, self._children_of = setup, [each + (number < more) for number in range(num_workers)]
        self._own_pool: DecodePool | None = None
        self._workers: list[_Worker] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._own_pool is not None:
            self._own_pool.close()
        for worker in self._workers:
            if kind is None:
                worker.connection.close()  # it ends by itself
                worker.process.join(timeout=5.0)
            worker.process.kill()  # its decode children end with it
        for worker in self._workers:
            worker.process.join()
            worker.connection.close()

    def run(self, tasks: Iterable[ShardTask], *, on_sample: OnSample) -> Iterator[MadeShard]:
        """Yield what became of each task, as it is done.

        Raises:
            EnvironmentFault: as `make_shards`, or a worker cannot be started or is killed.
        """
        if len(self._children_of) == 1:
            self._own_pool = self._setup.decode_pool(self._children_of[0])
            yield from make_shards(self._setup, iter(tasks), self._own_pool, on_sample=on_sample)
            return
        for num_children in self._children_of:
            try:
                self._workers.append(_Worker(self._setup, num_children))
            except OSError as error:
                raise cannot_start("a conversion worker", error) from error
        waiting = iter(tasks)
        while True:
            for worker in self._workers:
                if worker.task is None and (following := next(waiting, None)) is not None:
                    worker.give(following)
            busy = {worker.connection: worker for worker in self._workers if worker.task is not None}
            if not busy:
                return
            for connection in wait(list(busy)):
                worker = busy[cast(Connection, connection)]
                number, message = worker.receive()
                if isinstance(message, MadeShard):
                    yield message
                else:
                    on_sample(number, message)


class _Worker:
    """A process that makes shards, its pipe, and what it is making."""

    def __init__(self, setup: ShardSetup, num_children: int) -> None:
        self.connection, theirs = SPAWN.Pipe()
        self.process = SPAWN.Process(target=serve_shards, args=(theirs, setup, num_children), daemon=False)
        start_deaf(self.process)
        theirs.close()
        self.task: ShardTask | None = None

    def give(self, task: ShardTask) -> None:
        self.task = task
        with contextlib.suppress(OSError):  # it died: `receive` says so
            self.connection.send(task)

    def receive(self) -> tuple[int, MadeShard | bool]:
        """Return a shard's number, and the shard or whether one more of its sources was rejected; raise its error."""
        assert self.task is not None
        try:
            message = self.connection.recv()
        except (EOFError, OSError) as error:
            self.process.join(timeout=5.0)
            raise EnvironmentFault(
                f"a conversion worker ended while it made {shard_name(self.task.number)} "
                f"({exit_in_words(self.process.exitcode)}); is memory short? finished shards are kept: rerun, with "
                "fewer --workers if need be"
            ) from error
        if isinstance(message, BaseException):
            raise message
        number = self.task.number
        if isinstance(message, MadeShard):
            self.task = None
        return number, message


def serve_shards(connection: Connection, setup: ShardSetup, num_children: int) -> None:
    """Make shards as `connection` asks for them, until it closes; the body of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the conversion decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    die_with_parent()
    with contextlib.suppress(EOFError, ConnectionError), setup.decode_pool(num_children) as pool:
        while True:
            task = connection.recv()
            try:
                made: MadeShard | Exception = next(
                    make_shards(setup, iter([task]), pool, on_sample=lambda _, is_reject: connection.send(is_reject))
                )
            except (EOFError, ConnectionError):
                raise
            except Exception as error:  # noqa: BLE001  told to the conversion, which ends with it
                made = error
            connection.send(made)
