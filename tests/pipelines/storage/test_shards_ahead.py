"""Shards fetched ahead: the next ones of the plan, bounded, released after their last read."""

import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field

import pytest

from ca2st.errors import EnvironmentFault
from pipelines.storage.shard_sets import SetReaders, ShardsAhead


@dataclass
class FakeShards(SetReaders):
    """Remembers what it is asked for; fetches end when `go` is set."""

    are_remote: bool = True
    has_room: bool = True
    error: Exception | None = None
    go: threading.Event = field(default_factory=threading.Event)
    asked: list[int] = field(default_factory=list)
    released: list[int] = field(default_factory=list)

    def fetch_ahead(self, shard: int, *, is_abandoned: Callable[[], bool]) -> bool:
        self.asked.append(shard)
        while not self.go.wait(0.005) and not is_abandoned():
            pass
        if self.error is not None:
            raise self.error
        return self.has_room

    def release(self, shard: int) -> None:
        self.released.append(shard)


def ahead_of(shards: FakeShards, *, steps: int = 100, most_waiting: int = 2) -> ShardsAhead:
    """Two steps per shard."""
    return ShardsAhead(shards, lambda step: {step // 2}, range(steps), most_waiting=most_waiting)


def until(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        threading.Event().wait(0.005)
    raise AssertionError("did not happen")


@pytest.mark.parametrize("most", [2, 3, 5])
def test_no_more_shards_than_allowed_are_on_their_way_at_once(most: int) -> None:
    shards = FakeShards()
    with closing(ahead_of(shards, most_waiting=most)) as ahead:
        for _ in range(5):
            ahead.reached(0)
        until(lambda: len(shards.asked) == min(most, 4))
        shards.go.set()
        until(lambda: not ahead._waiting)
        ahead.reached(1)
        until(lambda: len(shards.asked) > most)
    assert shards.asked[:most] == list(range(most))
    assert len(shards.asked) == len(set(shards.asked))


def test_a_shard_is_released_once_its_last_step_lies_behind() -> None:
    shards = FakeShards()
    shards.go.set()
    with closing(ahead_of(shards)) as ahead:
        for step in range(10):
            ahead.reached(step)
            until(lambda: not ahead._waiting)
    assert shards.released == [0, 1], "steps 0 to 3; those of the last four steps may still be read"


def test_a_shard_without_room_is_asked_for_again_when_one_is_released() -> None:
    shards = FakeShards(has_room=False)
    shards.go.set()
    with closing(ahead_of(shards, steps=6)) as ahead:
        ahead.reached(0)
        until(lambda: not ahead._waiting)
        ahead.reached(1)
        until(lambda: not ahead._waiting)
        before = len(shards.asked)
        ahead.reached(6)
        until(lambda: len(shards.asked) > before)


def test_an_error_on_the_way_is_left_to_the_read_that_needs_the_shard() -> None:
    shards = FakeShards(error=EnvironmentFault("the server is gone"))
    shards.go.set()
    with closing(ahead_of(shards)) as ahead:
        ahead.reached(0)
        until(lambda: not ahead._waiting)
        ahead.reached(1)


def test_closing_abandons_what_is_on_its_way_and_ends_the_threads() -> None:
    before, shards = threading.active_count(), FakeShards()
    ahead = ahead_of(shards)
    ahead.reached(0)
    until(lambda: len(shards.asked) == 2)
    ahead.close()
    assert threading.active_count() == before


def test_local_sets_start_no_thread_and_are_asked_for_nothing() -> None:
    before, shards = threading.active_count(), FakeShards(are_remote=False)
    with closing(ahead_of(shards)) as ahead:
        ahead.reached(0)
        assert threading.active_count() == before
    assert (shards.asked, shards.released) == ([], [])
