"""One rank's share of a step: prefetched, fetched on threads, rendered, put together as a ClipBatch.

Tells a loader that stands still from one that is slow.

Work ahead of the consumer on one background thread that always ends with its iterator.

One rank's share of a step: fetched on threads, rendered by the backend, put together as a ClipBatch.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from ca2st.batch import ClipBatch, Mixing
from ca2st.spec import MEL_ROW_SECONDS, ClipSpec
from pipelines.augment.mixing import PairMixing
from pipelines.errors import LoaderStalledError, SampleDamageError
from pipelines.order.plan import PlannedSamples
from pipelines.quarantine import DamageGuard, PlannedCell, cells_of
from pipelines.rendering import RenderRequest, ViewBackend
from pipelines.stats import StatsRecorder
from pipelines.storage.fetch import FetchedSample, FetchThreads
from pipelines.storage.headers import mel_view
from pipelines.storage.index import SampleEntry
from pipelines.storage.shard_sets import SetReaders, TargetColumn
from pipelines.views.draws import ClipFacts, Draws, ViewDraw
from pipelines.views.sampling import VaryingRate, frames_per_second
from sharding.format.index import TICKS_PER_SECOND

_MOST_NAMED = 4


class StallWatch:
    """Raises when, while the consumer waits, no stage of any thread has begun or ended for too long.

    Slow storage with a stage that ends now and then is slow, not stalled, however long a batch takes.
    """

    def __init__(self, stats: StatsRecorder, *, timeout_seconds: float) -> None:
        self._stats, self._timeout = stats, timeout_seconds
        self.poll_seconds = min(1.0, timeout_seconds / 4)
        """How often to look."""
        self.has_tripped = False
        """Whether a stall was found: its thread may hold locks for ever, so nothing may wait for it any more."""

    def is_stalled(self, waiting_since: float) -> bool:
        """Whether nothing has moved since `waiting_since` (on `time.monotonic`) for longer than the timeout."""
        return time.monotonic() - max(waiting_since, self._stats.last_change) > self._timeout

    def check(self, waiting_since: float) -> None:
        """Look once.

        Raises:
            LoaderStalledError: a stall; names the stages that threads stand in, and on what.
        """
        if self.is_stalled(waiting_since):
            raise self.stalled(f"no batch, and no stage begun or ended, for {self._timeout:g} s")

    def stalled(self, what: str) -> LoaderStalledError:
        """The error of a loader that will give no more batches."""
        self.has_tripped = True
        return LoaderStalledError(
            f"the loader stands still: {what}; {self._where()}; look at that storage or file, or raise "
            "data.loader.stall_timeout_seconds where it is only slow, and rerun to resume"
        )

    def _where(self) -> str:
        now = time.monotonic()
        stages = [stage for stage in self._stats.active() if stage.stage != "wait"]
        told = [
            f"{stage.stage} for {now - stage.since:.1f} s{f' ({stage.where})' if stage.where else ''} in {stage.thread}"
            for stage in stages[:_MOST_NAMED]
        ]
        more = f" and {len(stages) - _MOST_NAMED} more" if len(stages) > _MOST_NAMED else ""
        return f"it stands in: {', '.join(told)}{more}" if told else "none of its threads is in a stage that is timed"


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Item(Generic[T]):
    value: T


@dataclass(frozen=True, slots=True)
class _End:
    error: BaseException | None


def prefetched(
    source: Callable[[], Generator[T, None, None]], depth: int, *, watch: StallWatch
) -> Generator[T, None, None]:
    """The items of `source()`, made by a background thread up to `depth` items ahead; depth 0 makes them inline.

    An error of the source is raised here, as it was. When the consumer stops, for whatever reason, the source is
    closed on its own thread, and the thread has ended before this iterator has; unless it hangs, when it is left
    behind. Inline there is nobody to notice a stall.

    Raises:
        LoaderStalledError: the thread hangs, by `watch`, or has ended without a word.
    """
    if depth == 0:
        yield from source()
        return
    worker = _Worker(source, depth, watch)
    try:
        yield from worker.items()
    finally:
        worker.stop()


class _Worker(Generic[T]):
    def __init__(self, source: Callable[[], Generator[T, None, None]], depth: int, watch: StallWatch) -> None:
        self._source, self._watch = source, watch
        self._room = threading.Semaphore(depth)
        self._stopping = threading.Event()
        self._done: queue.SimpleQueue[_Item[T] | _End] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="clip-prefetch", daemon=True)
        self._thread.start()

    def items(self) -> Iterator[T]:
        while True:
            item = self._take()
            if isinstance(item, _Item):
                yield item.value
                self._room.release()
            elif item.error is not None:
                raise item.error
            else:
                return

    def stop(self) -> None:
        self._stopping.set()
        self._room.release()
        begin = time.monotonic()
        while self._thread.is_alive() and not self._watch.has_tripped:
            if self._watch.is_stalled(begin):
                self._watch.has_tripped = True
            else:
                self._thread.join(self._watch.poll_seconds)

    def _take(self) -> "_Item[T] | _End":
        begin = time.monotonic()
        while True:
            was_alive = self._thread.is_alive()
            try:
                return self._done.get(timeout=self._watch.poll_seconds)
            except queue.Empty:
                if not was_alive:
                    raise self._watch.stalled("its thread has ended without a word") from None
                self._watch.check(begin)

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            self._produce()
        except BaseException as raised:  # noqa: BLE001 - carried to the consumer's thread and raised there
            error = raised
        self._done.put(_End(error))

    def _produce(self) -> None:
        items = self._source()
        try:
            while True:
                self._room.acquire()
                if self._stopping.is_set():
                    return
                try:
                    value = next(items)
                except StopIteration:
                    return
                self._done.put(_Item(value))
                del value
        finally:
            items.close()


_FETCH_AHEAD_STEPS = 2
"""Steps whose bytes are read while an earlier one is rendered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prepared:
    cell: PlannedCell
    """What was read: of a place in quarantine, its stand-in."""
    sample: FetchedSample
    labels: list[int]
    views: tuple[ViewDraw, ...]
    is_padding: bool


StandInsAt = Callable[[int, int], Iterable[PlannedCell]]
"""Candidates for a place of this rank's share, by step and place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reading:
    """One step's places, and what is needed to read them."""

    step: int
    cells: list[PlannedCell]
    draws: Draws
    stand_ins: StandInsAt


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchAssembler:
    """Turns planned samples into ClipBatches."""

    clip: ClipSpec
    sets: SetReaders
    backend: ViewBackend
    views_per_clip: int
    """Consecutive views that read the same frames: the crops of a clip."""
    fetch_threads: int
    stats: StatsRecorder
    guard: DamageGuard | None = None
    """Keeps damaged samples out; None: the first one ends the run."""

    def batches(
        self, steps: Iterable[int], *, planned: Callable[[int], PlannedSamples], draws: Draws, stand_ins: StandInsAt
    ) -> Generator[ClipBatch, None, None]:
        """One batch a step, the bytes of the next steps being read meanwhile; closing it ends its threads.

        `stand_ins` gives, for a step and a place in this rank's share, what fills it where `guard` keeps it out.
        """
        waiting: deque[tuple[_Reading, list[Future[_Prepared]]]] = deque()
        pool = FetchThreads(self.fetch_threads)
        try:
            for step in steps:
                reading = _Reading(step=step, cells=cells_of(planned(step)), draws=draws, stand_ins=stand_ins)
                waiting.append((reading, self._submit(pool, reading)))
                if len(waiting) > _FETCH_AHEAD_STEPS:
                    yield self._batch(*waiting.popleft())
            while waiting:
                yield self._batch(*waiting.popleft())
        finally:
            pool.close()

    def _submit(self, pool: FetchThreads, reading: _Reading) -> list[Future[_Prepared]]:
        return [pool.submit(self._prepare_sound, place, reading) for place in range(len(reading.cells))]

    def _prepare_sound(self, place: int, reading: _Reading) -> _Prepared:
        cell = reading.cells[place]
        if self.guard is None:
            return self._prepare(cell, reading.draws)
        return self.guard.sound(
            cell,
            reading.stand_ins(reading.step, place),
            lambda other: self._prepare(other, reading.draws),
            step=reading.step,
        )

    def _prepare(self, cell: PlannedCell, draws: Draws) -> _Prepared:
        reader, own_shard = self.sets.find(cell.shard)
        with self.stats.timed("index_seconds"):
            entry = reader.indexes.entry(own_shard, cell.row)
            views = draws.views(_facts(entry), repeat=cell.repeat)
        sample = reader.fetch(entry, [index for view in views for index in view.frame_indices])
        labels = _labels(entry, reader.targets)
        return _Prepared(cell=cell, sample=sample, labels=labels, views=views, is_padding=cell.is_padding)

    def _batch(self, reading: _Reading, futures: list[Future[_Prepared]]) -> ClipBatch:
        prepared, video = self._rendered([future.result() for future in futures], reading)
        flat = [(one, view) for one in prepared for view in one.views]
        mixed = reading.draws.mixing(reading.step, [one.sample.entry.has_audio for one, _ in flat])
        return ClipBatch(
            video=video,
            mel=torch.from_numpy(np.stack([self._mel(one.sample, view) for one, view in flat])),
            intervals_seconds=torch.stack([self._intervals(one.sample.entry, view) for one, view in flat]),
            labels=torch.tensor([one.labels for one, _ in flat], dtype=torch.int64),
            sample_ids=tuple(one.sample.entry.key for one, _ in flat),
            has_audio=torch.tensor([one.sample.entry.has_audio for one, _ in flat]),
            is_padding=torch.tensor([one.is_padding for one, _ in flat]),
            mixing=None if mixed is None else mixing_of(mixed),
        )

    def _rendered(
        self, prepared: list[_Prepared], reading: _Reading
    ) -> tuple[list[_Prepared], UInt8[Tensor, "views 3 time height width"]]:
        """Pixels of a step's samples, those in place of samples that cannot be decoded among them."""
        while True:
            try:
                return prepared, self.backend.render(self._requests(prepared))
            except SampleDamageError:
                if self.guard is None:
                    raise
                replaced = [self._decodable(place, one, reading) for place, one in enumerate(prepared)]
                if all(one is other for one, other in zip(prepared, replaced, strict=True)):
                    raise
                prepared = replaced

    def _decodable(self, place: int, prepared: _Prepared, reading: _Reading) -> _Prepared:
        """The sample at `place`, or what stands in for it if its own pictures cannot be decoded."""
        assert self.guard is not None
        try:
            self.backend.render(self._requests([prepared]))
        except SampleDamageError as error:
            self.guard.reject(prepared.cell, error, step=reading.step)
            return self._prepare_sound(place, reading)
        return prepared

    def _requests(self, prepared: Sequence[_Prepared]) -> list[RenderRequest]:
        return [request for one in prepared for request in _requests(one, self.views_per_clip)]

    def _mel(self, sample: FetchedSample, view: ViewDraw) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
        return mel_view(
            sample.mel,
            start_row=view.mel_start_row,
            num_rows=self.clip.mel_rows,
            has_audio=sample.entry.has_audio,
            draw=view.spectrogram,
        )

    def _intervals(self, entry: SampleEntry, view: ViewDraw) -> Float[Tensor, "intervals 2"]:
        ticks = entry.frame_ticks[list(view.frame_indices)].tolist()
        return intervals_seconds(ticks, view.mel_start_row - view.spectrogram.roll, self.clip)


def _labels(entry: SampleEntry, targets: Sequence[TargetColumn]) -> list[int]:
    for target in targets:
        if not 0 <= entry.labels[target.column] < target.num_classes:
            raise SampleDamageError(
                f"{entry.where}: expected a {target.name} of 0..{target.num_classes - 1}, found "
                f"{entry.labels[target.column]}; convert the set again"
            )
    return [entry.labels[target.column] for target in targets]


def intervals_seconds(ticks: Sequence[int], mel_start_row: int, clip: ClipSpec) -> Float[Tensor, "intervals 2"]:
    """Row 0: the spectrogram crop, padding included. Then the stored times of frames 2k and 2k+1.

    `ticks` are those of the view's frames, in 1/90000 s.
    """
    mel = torch.tensor([[mel_start_row, mel_start_row + clip.mel_rows]], dtype=torch.float64) * MEL_ROW_SECONDS
    frames = torch.tensor(ticks, dtype=torch.float64).view(-1, 2) / TICKS_PER_SECOND
    return torch.cat([mel, frames]).float()


def mixing_of(clips: Sequence[PairMixing]) -> Mixing:
    """How the clips of a batch are mixed, in order, as the batch carries it."""
    return Mixing(
        video_share=torch.tensor([clip.video_share for clip in clips]),
        video_box=torch.tensor([clip.video_box for clip in clips], dtype=torch.int64),
        mel_share=torch.tensor([clip.mel_share for clip in clips]),
        mel_box=torch.tensor([clip.mel_box for clip in clips], dtype=torch.int64),
        label_share=torch.tensor([clip.label_share for clip in clips]),
    )


def _facts(entry: SampleEntry) -> ClipFacts:
    return ClipFacts(
        key=entry.key,
        num_frames=entry.num_frames,
        frames_per_second=frames_per_second(entry.frame_ticks, ticks_per_second=TICKS_PER_SECOND),
        mel_rows=entry.mel_rows,
        varying_rate=VaryingRate.of(entry.frame_ticks, ticks_per_second=TICKS_PER_SECOND),
    )


def _requests(prepared: _Prepared, views_per_clip: int) -> list[RenderRequest]:
    """One request a clip: its frames are decoded once for all of its crops."""
    sample, views = prepared.sample, prepared.views
    return [
        RenderRequest(
            frames=sample.clip_frames(views[first].frame_indices),
            boxes=tuple(
                view.crop.box(height=sample.height, width=sample.width)
                for view in views[first : first + views_per_clip]
            ),
            flip=views[first].flip,
            augment=views[first].augment,
            erased=views[first].erased,
            where=sample.entry.where,
        )
        for first in range(0, len(views), views_per_clip)
    ]
