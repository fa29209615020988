"""One rank's share of a step: fetched on threads, rendered by the backend, put together as a ClipBatch."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ca2st.batch import ClipBatch
from ca2st.spec import MEL_ROW_SECONDS, ClipSpec
from pipelines.draws import ClipFacts, Draws, ViewDraw
from pipelines.errors import SampleDamageError
from pipelines.fetch import ByteFetcher, FetchedSample
from pipelines.mel import mel_view
from pipelines.plan import PlannedSamples
from pipelines.preflight import TargetColumn
from pipelines.rendering import RenderRequest, ViewBackend
from pipelines.sampling import frames_per_second
from pipelines.shard_index import SampleEntry, ShardIndexCache
from sharding.index import TICKS_PER_SECOND

_FETCH_AHEAD_STEPS = 2
"""Steps whose bytes are read while an earlier one is rendered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prepared:
    sample: FetchedSample
    views: tuple[ViewDraw, ...]
    is_padding: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchAssembler:
    """Turns planned samples into ClipBatches."""

    clip: ClipSpec
    indexes: ShardIndexCache
    fetcher: ByteFetcher
    backend: ViewBackend
    targets: tuple[TargetColumn, ...]
    views_per_clip: int
    """Consecutive views that read the same frames: the crops of a clip."""
    fetch_threads: int

    def batches(
        self, steps: Iterable[int], *, planned: Callable[[int], PlannedSamples], draws: Draws
    ) -> Generator[ClipBatch, None, None]:
        """One batch a step, the bytes of the next steps being read meanwhile; closing it ends its threads."""
        waiting: deque[list[Future[_Prepared]]] = deque()
        pool = ThreadPoolExecutor(self.fetch_threads, thread_name_prefix="clip-fetch")
        try:
            for step in steps:
                waiting.append(self._submit(pool, planned(step), draws))
                if len(waiting) > _FETCH_AHEAD_STEPS:
                    yield self._batch(waiting.popleft())
            while waiting:
                yield self._batch(waiting.popleft())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _submit(self, pool: ThreadPoolExecutor, planned: PlannedSamples, draws: Draws) -> list[Future[_Prepared]]:
        columns = (planned.shards.tolist(), planned.rows.tolist(), planned.is_padding.tolist())
        return [pool.submit(self._prepare, *cells, draws) for cells in zip(*columns, strict=True)]

    def _prepare(self, shard: int, row: int, is_padding: bool, draws: Draws) -> _Prepared:
        entry = self.indexes.entry(shard, row)
        views = draws.views(_facts(entry))
        sample = self.fetcher.fetch(entry, (index for view in views for index in view.frame_indices))
        return _Prepared(sample=sample, views=views, is_padding=is_padding)

    def _batch(self, futures: list[Future[_Prepared]]) -> ClipBatch:
        prepared = [future.result() for future in futures]
        requests = [request for one in prepared for request in _requests(one, self.views_per_clip)]
        flat = [(one, view) for one in prepared for view in one.views]
        return ClipBatch(
            video=self.backend.render(requests),
            mel=torch.from_numpy(np.stack([self._mel(one.sample, view) for one, view in flat])),
            intervals_seconds=torch.stack([self._intervals(one.sample.entry, view) for one, view in flat]),
            labels=torch.tensor([self._labels(one.sample.entry) for one, _ in flat], dtype=torch.int64),
            sample_ids=tuple(one.sample.entry.key for one, _ in flat),
            has_audio=torch.tensor([one.sample.entry.has_audio for one, _ in flat]),
            is_padding=torch.tensor([one.is_padding for one, _ in flat]),
        )

    def _mel(self, sample: FetchedSample, view: ViewDraw) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
        rows, audio = self.clip.mel_rows, sample.entry.has_audio
        return mel_view(sample.mel, start_row=view.mel_start_row, num_rows=rows, has_audio=audio)

    def _intervals(self, entry: SampleEntry, view: ViewDraw) -> Float[Tensor, "intervals 2"]:
        return intervals_seconds(entry.frame_ticks[list(view.frame_indices)].tolist(), view.mel_start_row, self.clip)

    def _labels(self, entry: SampleEntry) -> list[int]:
        for target in self.targets:
            if not 0 <= entry.labels[target.column] < target.num_classes:
                raise SampleDamageError(
                    f"{entry.where}: expected a {target.name} of 0..{target.num_classes - 1}, found "
                    f"{entry.labels[target.column]}; convert the set again"
                )
        return [entry.labels[target.column] for target in self.targets]


def intervals_seconds(ticks: Sequence[int], mel_start_row: int, clip: ClipSpec) -> Float[Tensor, "intervals 2"]:
    """Row 0: the spectrogram crop, padding included. Then the stored times of frames 2k and 2k+1.

    `ticks` are those of the view's frames, in 1/90000 s.
    """
    mel = torch.tensor([[mel_start_row, mel_start_row + clip.mel_rows]], dtype=torch.float64) * MEL_ROW_SECONDS
    frames = torch.tensor(ticks, dtype=torch.float64).view(-1, 2) / TICKS_PER_SECOND
    return torch.cat([mel, frames]).float()


def _facts(entry: SampleEntry) -> ClipFacts:
    return ClipFacts(
        key=entry.key,
        num_frames=entry.num_frames,
        frames_per_second=frames_per_second(entry.frame_ticks, ticks_per_second=TICKS_PER_SECOND),
        mel_rows=entry.mel_rows,
    )


def _requests(prepared: _Prepared, views_per_clip: int) -> list[RenderRequest]:
    """One request a clip: its frames are decoded once for all of its crops."""
    sample, views = prepared.sample, prepared.views
    return [
        RenderRequest(
            frames=tuple(sample.frames[index] for index in views[first].frame_indices),
            boxes=tuple(
                view.crop.box(height=sample.height, width=sample.width)
                for view in views[first : first + views_per_clip]
            ),
            flip=views[first].flip,
            where=sample.entry.where,
        )
        for first in range(0, len(views), views_per_clip)
    ]
