"""Where the time of the data goes, stage by stage."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any

_OWN_TO_CONSUMER = ("steps", "wait_seconds")
"""What the consumer does or waits for itself, as opposed to the loader's threads."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageStats:
    """Running totals of a loader; subtract an earlier snapshot to get those of a stretch.

    Index, fetch and checksum run on several threads, so their seconds are thread seconds. DALI decodes, crops and
    resizes in one graph, picture by picture, and does not say how long each took: all three are decode there, and
    augment is RandAugment and erasing. In the reference backend decode is decoding alone.
    """

    steps: int = 0
    """Batches handed to the consumer."""
    views: int = 0
    """Views in those batches, padding included."""
    bytes_read: int = 0
    index_seconds: float = 0.0
    """Finding a sample in its shard's index, and drawing its view."""
    fetch_seconds: float = 0.0
    """Reading bytes."""
    checksum_seconds: float = 0.0
    """Comparing them with the index."""
    decode_seconds: float = 0.0
    """JPEG to pixels."""
    augment_seconds: float = 0.0
    """Crop, resize, flip where no graph does them; RandAugment and erasing."""
    wait_seconds: float = 0.0
    """The consumer waiting for a batch: near zero where the data keeps up."""
    cache_hits: int = 0
    """Remote sets: samples and indexes that were read from this machine's cache."""
    cache_misses: int = 0
    """Remote sets: shards and indexes that this process fetched."""
    downloaded_bytes: int = 0
    """Bytes that came from servers."""
    download_seconds: float = 0.0
    """Seconds in which they came, all threads together: requests that were answered."""
    retries: int = 0
    """Requests tried again, and downloads with another hash."""
    quarantined: int = 0
    """Places of batches filled with another sample, because theirs is quarantined."""

    def __sub__(self, earlier: "StageStats") -> "StageStats":
        names = [field.name for field in fields(self)]
        return StageStats(**{name: getattr(self, name) - getattr(earlier, name) for name in names})

    def totals(self) -> dict[str, int | float]:
        """Return what the loader's threads have done, by name."""
        return {name: total for name, total in asdict(self).items() if name not in _OWN_TO_CONSUMER}


@dataclass(frozen=True, slots=True)
class ActiveStage:
    """What a thread is busy with."""

    stage: str
    """``fetch``, ``decode``, ..."""
    where: str
    """Shard and sample, where known."""
    thread: str
    since: float
    """On `time.monotonic`."""


class StatsRecorder:
    """Adds up totals from several threads; `snapshot` is what the outside sees."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._totals: dict[str, Any] = asdict(StageStats())
        self._active: dict[int, ActiveStage] = {}
        self._last_change = time.monotonic()

    def add(self, name: str, amount: float | int) -> None:
        """Add to the total of that name."""
        with self._lock:
            self._totals[name] += amount
            self._last_change = time.monotonic()

    @contextmanager
    def timed(self, name: str, *, where: str = "") -> Iterator[None]:
        """Add the duration of the block to the total of that name; `where` names what is worked on, for a stall."""
        stage = ActiveStage(name.removesuffix("_seconds"), where, threading.current_thread().name, time.monotonic())
        outer = self._enter(threading.get_ident(), stage)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - start)
            self._leave(threading.get_ident(), outer)

    def snapshot(self) -> StageStats:
        """Return the totals so far."""
        with self._lock:
            return StageStats(**self._totals)

    @property
    def last_change(self) -> float:
        """When a stage last began or ended anywhere, on `time.monotonic`."""
        with self._lock:
            return self._last_change

    def active(self) -> list[ActiveStage]:
        """Return the stages that threads are in now, the longest first."""
        with self._lock:
            return sorted(self._active.values(), key=lambda stage: stage.since)

    def _enter(self, thread: int, stage: ActiveStage) -> ActiveStage | None:
        with self._lock:
            outer = self._active.get(thread)
            self._active[thread] = stage
            self._last_change = stage.since
        return outer

    def _leave(self, thread: int, outer: ActiveStage | None) -> None:
        with self._lock:
            if outer is None:
                del self._active[thread]
            else:
                self._active[thread] = outer
