"""Where the time of the data goes, stage by stage."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace


@dataclass(frozen=True, kw_only=True, slots=True)
class StageStats:
    """Running totals of a loader; subtract an earlier snapshot to get those of a stretch.

    Fetch and checksum run on several threads, so their seconds are thread seconds. The DALI backend decodes and
    augments in one graph: both are counted under decode, and augment stays 0.
    """

    steps: int = 0
    """Batches handed to the consumer."""
    views: int = 0
    """Views in those batches, padding included."""
    bytes_read: int = 0
    fetch_seconds: float = 0.0
    """Reading bytes."""
    checksum_seconds: float = 0.0
    """Comparing them with the index."""
    decode_seconds: float = 0.0
    """JPEG to pixels."""
    augment_seconds: float = 0.0
    """Crop, resize, flip."""
    wait_seconds: float = 0.0
    """The consumer waiting for a batch: near zero where the data keeps up."""

    def __sub__(self, earlier: "StageStats") -> "StageStats":
        names = [field.name for field in fields(self)]
        return StageStats(**{name: getattr(self, name) - getattr(earlier, name) for name in names})


class StatsRecorder:
    """Adds up totals from several threads; `snapshot` is what the outside sees."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._totals = StageStats()

    def add(self, name: str, amount: float | int) -> None:
        """Add to the total of that name."""
        with self._lock:
            self._totals = replace(self._totals, **{name: getattr(self._totals, name) + amount})

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the duration of the block to the total of that name."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - start)

    def snapshot(self) -> StageStats:
        """The totals so far."""
        with self._lock:
            return self._totals
