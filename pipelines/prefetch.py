"""Work ahead of the consumer on one background thread that always ends with its iterator."""

import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from pipelines.stall_watch import StallWatch

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
