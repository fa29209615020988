"""Remote shards fetched before their first sample is asked for, and given up once their last has been read.

The plan says which shards the coming steps of this rank touch. At most `most_waiting` of them are on their way at
once (one for each of the rank's lanes, two at least), seen at most `_HORIZON_STEPS` steps ahead; and nothing that
anybody still reads is evicted for them. Local sets need none of this, and get no thread.
"""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType
from typing import Protocol, runtime_checkable

from ca2st.errors import CA2STError
from pipelines.storage.fetch import FetchThreads

_HORIZON_STEPS = 1024
_STEPS_A_CALL = 64
"""Most steps that one call looks further: the first calls of an epoch do not hold up its first batches."""
_GRACE_STEPS = 4
"""Steps after which a shard's last read is over: more than are fetched ahead of the step that is handed out."""
_THREADS = 4
_log = logging.getLogger(__name__)


@runtime_checkable
class FetchesAhead(Protocol):
    """The shards of one or more sets, by their place in the sets' tables laid end to end."""

    @property
    def are_remote(self) -> bool:
        """Whether there is anything to fetch."""
        ...

    def fetch_ahead(self, shard: int, *, is_abandoned: Callable[[], bool]) -> bool:
        """See `ShardStore.fetch_ahead`."""
        ...

    def finish_with(self, shard: int) -> None:
        """See `ShardStore.finish_with`."""
        ...


class ShardsAhead:
    """Follows one iteration over an epoch; `reached` is called for its steps in order."""

    def __init__(
        self, sets: FetchesAhead, shards_of: Callable[[int], set[int]], steps: range, *, most_waiting: int
    ) -> None:
        """`shards_of` gives the shards that this rank reads in a step; it is called from `reached` alone."""
        self._sets, self._shards_of, self._steps = sets, shards_of, steps
        self._most_waiting = max(2, most_waiting)
        self._next = steps.start
        self._last_step: dict[int, int] = {}
        self._refused: list[int] = []
        self._lock, self._waiting = threading.Lock(), set[int]()
        self._closing = threading.Event()
        self._threads = FetchThreads(_THREADS) if sets.are_remote else None

    def __enter__(self) -> "ShardsAhead":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give up what is on its way, and end the threads."""
        self._closing.set()
        if self._threads is not None:
            self._threads.close()

    def reached(self, step: int) -> None:
        """Say that the samples of `step` are about to be asked for."""
        if self._threads is None:
            return
        if self._finish_before(step - _GRACE_STEPS):
            again, self._refused = self._refused, []
            for shard in again:
                self._fetch(shard)
        stop = min(self._steps.stop, step + _HORIZON_STEPS, self._next + _STEPS_A_CALL)
        while self._next < stop and len(self._waiting) < self._most_waiting:
            for shard in self._shards_of(self._next):
                if shard not in self._last_step:
                    self._fetch(shard)
                self._last_step[shard] = self._next
            self._next += 1

    def _finish_before(self, step: int) -> list[int]:
        """Give up the shards whose last known step lies before `step`."""
        finished = [shard for shard, last in self._last_step.items() if last < step]
        for shard in finished:
            del self._last_step[shard]
            self._sets.finish_with(shard)
        return finished

    def _fetch(self, shard: int) -> None:
        assert self._threads is not None
        with self._lock:
            self._waiting.add(shard)
        call = self._threads.submit(self._sets.fetch_ahead, shard, is_abandoned=self._closing.is_set)
        call.add_done_callback(lambda done: self._done(shard, done))

    def _done(self, shard: int, call: "Future[bool]") -> None:
        with self._lock:
            self._waiting.discard(shard)
        if call.cancelled():
            return
        error = call.exception()
        if error is not None and not isinstance(error, CA2STError):
            _log.warning("fetching a shard ahead: %r; it is fetched when it is needed", error)
        elif error is None and not call.result():
            self._refused.append(shard)
