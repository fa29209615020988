"""Where the time of the data goes, stage by stage, and the loader's own threads.

One makes batches ahead of the consumer, some read bytes, and a watch notices a stall.

`concurrent.futures` waits at the interpreter's exit for every thread it ever started: one read that never returns,
from a file server that is gone, and the process never ends. These are daemons: closing waits for them only so long.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import partial
from itertools import islice
from typing import Any, ParamSpec, TypeVar

from ca2st.errors import listed
from pipelines.errors import LoaderStalledError

_OWN_TO_CONSUMER = ("steps", "wait_seconds")
"""What the consumer does or waits for itself, as opposed to the loader's threads."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageStats:
    """Running totals of a loader; subtract an earlier snapshot to get those of a stretch.

    All run on several threads, so their seconds are thread seconds. Decode and augment are those of the threads that
    render: on a GPU crop and resize are part of DALI's graph and count as decode, on a CPU threads of ours do them, and
    augment is the wait for these.
    """

    steps: int = 0
    """Batches handed to the consumer."""
    views: int = 0
    """Views in those batches, padding included."""
    bytes_read: int = 0
    index_seconds: float = 0.0
    """Finding a sample in its shard's index, and drawing its view."""
    fetch_seconds: float = 0.0
    checksum_seconds: float = 0.0
    """Comparing the bytes read with the index."""
    decode_seconds: float = 0.0
    """Stored bytes to pixels."""
    augment_seconds: float = 0.0
    """Crop, resize, flip where no graph does them; RandAugment and erasing."""
    wait_seconds: float = 0.0
    """The consumer waiting for a batch: near zero where the data keeps up."""
    cache_hits: int = 0
    """Remote sets: samples and indexes that were read from this machine's cache."""
    cache_misses: int = 0
    """Remote sets: shards and indexes that this process fetched."""
    downloaded_bytes: int = 0
    download_seconds: float = 0.0
    """Time of the downloads, all threads together: requests that were answered."""
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
        thread, thread_name = threading.get_ident(), threading.current_thread().name
        stage = ActiveStage(name.removesuffix("_seconds"), where, thread_name, time.monotonic())
        with self._lock:
            outer = self._active.get(thread)
            self._active[thread] = stage
            self._last_change = stage.since
        start = time.perf_counter()
        try:
            yield
        finally:
            passed = time.perf_counter() - start
            with self._lock:
                self._totals[name] += passed
                self._last_change = time.monotonic()
                if outer is None:
                    del self._active[thread]
                else:
                    self._active[thread] = outer

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


P = ParamSpec("P")
T = TypeVar("T")


class StallWatch:
    """Raises when, while the consumer waits, no stage of any thread has begun or ended for too long.

    Slow storage with a stage that ends now and then is slow, not stalled, however long a batch takes.
    """

    def __init__(self, stats: StatsRecorder, *, timeout_seconds: float) -> None:
        self._stats, self._timeout = stats, timeout_seconds
        self.poll_seconds = min(1.0, timeout_seconds / 4)
        """How often to look."""
        self.has_tripped = False
        """Whether a stall was found: its thread may hold locks indefinitely, so nothing may wait for it."""

    def is_stalled(self, waiting_since: float) -> bool:
        """Return whether nothing has moved since `waiting_since` (`time.monotonic`) for longer than the timeout."""
        return time.monotonic() - max(waiting_since, self._stats.last_change) > self._timeout

    def check(self, waiting_since: float) -> None:
        """Raise `LoaderStalledError` where it has stalled; names the stages that threads are in, and on what."""
        if self.is_stalled(waiting_since):
            raise self.stalled(f"no batch, and no stage begun or ended, for {self._timeout:g} s")

    def stalled(self, what: str) -> LoaderStalledError:
        """Return the error of a loader that will give no more batches."""
        self.has_tripped = True
        now, where = time.monotonic(), "none of its threads is in a stage that is timed"
        if stages := [stage for stage in self._stats.active() if stage.stage != "wait"]:
            named = [
                f"{stage.stage} for {now - stage.since:.1f} s{f' ({stage.where})' if stage.where else ''} in "
                f"{stage.thread}"
                for stage in stages
            ]
            where = f"it hangs in: {listed(named, most=4)}"
        return LoaderStalledError(
            f"the loader has stalled: {what}; {where}; look at that storage or file, or raise "
            "data.loader.stall_timeout_seconds where it is only slow, and rerun to resume"
        )


def prefetched(source: Generator[T, None, None], depth: int, *, watch: StallWatch) -> Generator[T, None, None]:
    """Yield the items of `source`, made by a background thread up to `depth` items ahead; depth 0 makes them inline.

    An error of the source is raised here, as it was. When the consumer stops, for whatever reason, the source is
    closed on its own thread, and the thread has ended before this iterator has; unless it hangs, when it is left
    behind. Inline no stall is noticed.

    Raises:
        LoaderStalledError: the thread hangs, by `watch`, or has ended without a result.
    """
    if depth == 0:
        yield from source
        return
    thread = LoaderThreads("clip-prefetch", 1)

    def begun() -> "Future[list[T]]":
        return thread.submit(list, islice(source, 1))  # empty at the end of the source

    def awaited(call: "Future[list[T]]") -> list[T]:
        begin = time.monotonic()
        while not wait([call], watch.poll_seconds).done:
            if thread.join(0.0) and not call.done():
                raise watch.stalled("its thread has ended without a result")
            watch.check(begin)
        return call.result()

    ahead = deque(begun() for _ in range(depth))
    try:
        while made := awaited(ahead.popleft()):
            yield from made
            ahead.append(begun())
    finally:
        for call in ahead:
            call.cancel()
        thread.submit(source.close)
        thread.end()
        begin = time.monotonic()
        while not watch.has_tripped and not thread.join(watch.poll_seconds):
            watch.has_tripped = watch.is_stalled(begin)


class LoaderThreads:
    """A fixed number of threads that make calls in the order they came; errors travel in the futures."""

    def __init__(self, name: str, count: int) -> None:
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, name=f"{name}_{number}", daemon=True) for number in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, function: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> "Future[T]":
        """Have `function` called by one of the threads."""
        future: Future[T] = Future()
        self._calls.put((future, partial(function, *arguments, **named)))
        return future

    def close(self, *, patience_seconds: float = 10.0) -> None:
        """Let running calls end, drop those that wait, and end the threads; one that hangs is left behind."""
        self._closing.set()
        self.end()
        self.join(patience_seconds)

    def end(self) -> None:
        """Have the threads end once they have made the calls that wait."""
        for _ in self._threads:
            self._calls.put(None)

    def join(self, seconds: float) -> bool:
        """Wait at most so long for the threads to end; return whether they have."""
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _run(self) -> None:
        while (waiting := self._calls.get()) is not None:
            future, call = waiting
            if self._closing.is_set() or not future.set_running_or_notify_cancel():
                future.cancel()
                continue
            try:
                future.set_result(call())
            except BaseException as error:  # noqa: BLE001 - carried to whoever asks for the result
                future.set_exception(error)
            del waiting, future, call  # an idle thread keeps no sample alive
