"""The background thread: ahead, in order, honest about errors, and gone when its iterator is."""

import threading
import time
from collections.abc import Generator

import pytest

from pipelines.threads import StallWatch, StatsRecorder, prefetched


def watch(seconds: float = 60.0) -> StallWatch:
    return StallWatch(StatsRecorder(), timeout_seconds=seconds)


def wait_for(condition: object, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:  # type: ignore[operator]
        time.sleep(0.002)
    assert condition()  # type: ignore[operator]


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_items_come_in_order_and_the_thread_ends(depth: int) -> None:
    before = threading.active_count()
    assert list(prefetched((i for i in range(20)), depth, watch=watch())) == list(range(20))
    assert threading.active_count() == before


def test_no_more_than_depth_items_are_made_ahead() -> None:
    made: list[int] = []

    def source() -> Generator[int, None, None]:
        for i in range(100):
            made.append(i)
            yield i

    items = prefetched(source(), 3, watch=watch())
    assert next(items) == 0
    wait_for(lambda: len(made) >= 3)
    time.sleep(0.05)
    assert len(made) == 3
    next(items)
    wait_for(lambda: len(made) == 4)
    items.close()


@pytest.mark.parametrize("depth", [0, 2])
def test_an_error_surfaces_as_it_was_after_the_items_before_it(depth: int) -> None:
    error = KeyError("clip-7")

    def source() -> Generator[int, None, None]:
        yield 1
        raise error

    items = prefetched(source(), depth, watch=watch())
    assert next(items) == 1
    with pytest.raises(KeyError, match="clip-7") as found:
        next(items)
    assert found.value is error


@pytest.mark.parametrize("depth", [0, 1, 4])
def test_closing_early_closes_the_source_and_ends_the_thread(depth: int) -> None:
    closed = threading.Event()

    def source() -> Generator[int, None, None]:
        try:
            while True:
                yield 1
        finally:
            closed.set()

    before = threading.active_count()
    items = prefetched(source(), depth, watch=watch())
    next(items)
    items.close()
    assert closed.is_set()
    assert threading.active_count() == before


def test_an_interrupt_in_the_consumer_ends_the_thread() -> None:
    before = threading.active_count()

    def consume() -> None:
        for _ in prefetched((i for i in range(100)), 2, watch=watch()):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        consume()
    wait_for(lambda: threading.active_count() == before)


def test_nothing_starts_before_the_first_item_is_asked_for() -> None:
    before = threading.active_count()
    items = prefetched((i for i in range(3)), 2, watch=watch())
    assert threading.active_count() == before
    items.close()
