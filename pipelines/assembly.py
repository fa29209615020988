"""One rank's share of a step: read on threads, rendered by the backend, put together as a ClipBatch."""

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from ca2st.batch import ClipBatch, Mixing
from ca2st.spec import MEL_ROW_SECONDS, ClipSpec
from pipelines.augment.mixing import PairMixing
from pipelines.augment.spectrogram import mel_view
from pipelines.config import EvaluationSetup, TrainSetup
from pipelines.errors import SampleDamageError
from pipelines.order.plan import SamplePlan
from pipelines.quarantine import DamageGuard, PlannedCell, Replacements, cells_of
from pipelines.rendering import RenderRequest, ViewBackend
from pipelines.stats import StatsRecorder
from pipelines.storage.index import SampleEntry
from pipelines.storage.remote import ShardsAhead
from pipelines.storage.samples import FetchedSample
from pipelines.storage.shard_sets import SetReaders
from pipelines.threads import FetchThreads
from pipelines.views import ClipFacts, Draws, VaryingRate, ViewDraw, frames_per_second
from sharding.format.index import TICKS_PER_SECOND

_FETCH_AHEAD_STEPS = 2
"""Steps whose bytes are read while an earlier one is rendered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prepared:
    cell: PlannedCell
    """What was read: for a place in quarantine, its replacement."""
    sample: FetchedSample
    labels: list[int]
    views: tuple[ViewDraw, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """This rank's places of one step, and what is needed to fill them."""

    number: int
    positions: range
    """Of the places in the global batch."""
    cells: list[PlannedCell]
    draws: Draws
    replacements: Replacements


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchAssembler:
    """Turns the planned samples of a rank into ClipBatches."""

    setup: TrainSetup | EvaluationSetup
    plan: SamplePlan
    sets: SetReaders
    backend: ViewBackend
    stats: StatsRecorder
    guard: DamageGuard | None = None
    """Keeps damaged samples out; None: the first one ends the run."""

    def batches(self, epoch: int, draws: Draws, first_step: int = 0) -> Generator[ClipBatch, None, None]:
        """Yield a batch per step, the bytes of the next steps being read meanwhile; closing it ends its threads."""
        # A plan caches the blocks of the step it was last asked for: each reader of other steps gets its own.
        plan, later, others = (self.plan.epoch(epoch) for _ in range(3))
        record, positions = self.plan.record, self.plan.positions(self.setup.rank, self.setup.world_size)
        replacements = Replacements(others, global_batch_size=record.global_batch_size)
        steps, waiting = range(first_step, plan.num_steps), deque[tuple[_Step, list[Future[_Prepared]]]]()
        lanes = -(-len(positions) * record.num_lanes // record.global_batch_size)

        def shards_of(step: int) -> set[int]:
            return set(later.samples(step, positions).shards.tolist())

        with (
            ShardsAhead(self.sets, shards_of, steps, most_waiting=lanes) as ahead,
            closing(FetchThreads(self.setup.loader.fetch_threads)) as threads,
        ):
            for number in steps:
                ahead.reached(number)
                cells = cells_of(plan.samples(number, positions))
                step = _Step(number=number, positions=positions, cells=cells, draws=draws, replacements=replacements)
                if self.guard is None:
                    futures = [threads.submit(self._prepare, cell, draws) for cell in cells]
                else:
                    futures = [threads.submit(self._prepare_undamaged, step, place) for place in range(len(cells))]
                waiting.append((step, futures))
                if len(waiting) > _FETCH_AHEAD_STEPS:
                    yield self._batch(*waiting.popleft())
            while waiting:
                yield self._batch(*waiting.popleft())

    def _prepare(self, cell: PlannedCell, draws: Draws) -> _Prepared:
        """Draw the views of a planned sample and read its bytes."""
        reader, own_shard = self.sets.find(cell.shard)
        with self.stats.timed("index_seconds"):
            entry = reader.indexes.entry(own_shard, cell.row)
            views = draws.views(_facts(entry), repeat=cell.repeat)
        sample = reader.fetch(entry, [index for view in views for index in view.frame_indices])
        return _Prepared(cell=cell, sample=sample, labels=self.sets.labels(cell.shard, entry), views=views)

    def _prepare_undamaged(self, step: _Step, place: int) -> _Prepared:
        """`_prepare` the sample of a place or, where the guard keeps that out, a replacement."""
        assert self.guard is not None
        replacements = step.replacements.of(step.number, step.positions[place])
        return self.guard.read(
            step.cells[place], replacements, lambda cell: self._prepare(cell, step.draws), step=step.number
        )

    def _batch(self, step: _Step, futures: list[Future[_Prepared]]) -> ClipBatch:
        prepared, video = self._rendered(step, [future.result() for future in futures])
        flat = [(one, view) for one in prepared for view in one.views]
        has_audio = [one.sample.entry.has_audio for one, _ in flat]
        mixed = step.draws.mixing(step.number, has_audio)
        return ClipBatch(
            video=video,
            mel=torch.from_numpy(np.stack([self._mel(one.sample, view) for one, view in flat])),
            intervals_seconds=torch.stack([self._intervals(one.sample.entry, view) for one, view in flat]),
            labels=torch.tensor([one.labels for one, _ in flat], dtype=torch.int64),
            sample_ids=tuple(one.sample.entry.key for one, _ in flat),
            has_audio=torch.tensor(has_audio),
            is_padding=torch.tensor([one.cell.is_padding for one, _ in flat]),
            mixing=None if mixed is None else mixing_of(mixed),
        )

    def _rendered(
        self, step: _Step, prepared: list[_Prepared]
    ) -> tuple[list[_Prepared], UInt8[Tensor, "views 3 time height width"]]:
        """Render a step's samples, those in place of samples that cannot be decoded among them."""
        while True:
            try:
                return prepared, self.backend.render(self._requests(prepared))
            except SampleDamageError:
                if self.guard is None:
                    raise
                replaced = [self._decodable(step, place, one) for place, one in enumerate(prepared)]
                if all(one is other for one, other in zip(prepared, replaced, strict=True)):
                    raise
                prepared = replaced

    def _decodable(self, step: _Step, place: int, prepared: _Prepared) -> _Prepared:
        """Return the sample at `place`, or a replacement if its own pictures cannot be decoded."""
        assert self.guard is not None
        try:
            self.backend.render(self._requests([prepared]))
        except SampleDamageError as error:
            self.guard.reject(prepared.cell, error, step=step.number)
            return self._prepare_undamaged(step, place)
        return prepared

    def _requests(self, prepared: Sequence[_Prepared]) -> list[RenderRequest]:
        return [request for one in prepared for request in _requests(one, self.setup.views_per_clip)]

    def _mel(self, sample: FetchedSample, view: ViewDraw) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
        return mel_view(
            sample.mel,
            start_row=view.mel_start_row,
            num_rows=self.setup.clip.mel_rows,
            has_audio=sample.entry.has_audio,
            draw=view.spectrogram,
        )

    def _intervals(self, entry: SampleEntry, view: ViewDraw) -> Float[Tensor, "intervals 2"]:
        ticks = entry.frame_ticks[list(view.frame_indices)].tolist()
        return intervals_seconds(ticks, view.mel_start_row - view.spectrogram.roll, self.setup.clip)


def intervals_seconds(ticks: Sequence[int], mel_start_row: int, clip: ClipSpec) -> Float[Tensor, "intervals 2"]:
    """Return row 0: the spectrogram crop, padding included. Then the stored times of frames 2k and 2k+1.

    `ticks` are those of the view's frames, in 1/90000 s.
    """
    mel = torch.tensor([[mel_start_row, mel_start_row + clip.mel_rows]], dtype=torch.float64) * MEL_ROW_SECONDS
    frames = torch.tensor(ticks, dtype=torch.float64).view(-1, 2) / TICKS_PER_SECOND
    return torch.cat([mel, frames]).float()


def mixing_of(clips: Sequence[PairMixing]) -> Mixing:
    """Return how the clips of a batch are mixed, in order, as the batch carries it."""
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


def _requests(prepared: _Prepared, views_per_clip: int) -> Iterator[RenderRequest]:
    """Yield a request per clip: its frames are decoded once for all of its crops."""
    sample = prepared.sample
    for first in range(0, len(prepared.views), views_per_clip):
        views = prepared.views[first : first + views_per_clip]
        yield RenderRequest(
            frames=sample.clip_frames(views[0].frame_indices),
            boxes=tuple(view.crop.box(height=sample.height, width=sample.width) for view in views),
            flip=views[0].flip,
            augment=views[0].augment,
            erased=views[0].erased,
            where=sample.entry.where,
        )
