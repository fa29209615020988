"""Scheduling on a cluster whose workers come, die and hang: order, what is done again, and when it stops."""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ca2st.errors import EnvironmentFault
from sharding import cluster as cluster_pool
from sharding.cluster import ClusterPool, Lost
from sharding.errors import UnlikeNodeError
from sharding.media.audio import EncodedAudio
from sharding.media.encode import EncodedClip, EncodedVideo
from sharding.workers import Rejected

MISSING = Rejected("missing_file", "expected a readable file, found: No such file or directory")
HANGS = object()
"""Instead of an answer: none ever comes."""


def twice(place: str, job: Any) -> Any:
    return 2 * job


@dataclass(eq=False)
class FakeTicket:
    worker: int
    ask: Callable[[], Any]
    value: Any = None


@dataclass
class FakeCluster:
    """Every worker answers at each wait, or only the one that `pick` chooses; the clock moves while nobody does."""

    answer: Callable[[str, Any], Any] = twice
    places: Sequence[Any] = ("a", "b")
    """Of the workers in turn: a place, or a `Lost` for one that cannot start."""
    pick: Callable[[int], int] | None = None
    answer_seconds: float = 0.0
    now: float = 0.0
    given: list[Any] = field(default_factory=list)
    ended: list[int] = field(default_factory=list)
    num_started: int = 0

    def start(self) -> tuple[int, FakeTicket]:
        place = self.places[self.num_started % len(self.places)]
        self.num_started += 1
        return self.num_started - 1, FakeTicket(self.num_started - 1, lambda: place)

    def give(self, worker: int, job: Any) -> FakeTicket:
        assert worker not in self.ended
        self.given.append(job)
        place = self.places[worker % len(self.places)]
        return FakeTicket(worker, lambda: self.answer(place, job))

    def wait(self, tickets: Sequence[FakeTicket], timeout_seconds: float) -> Sequence[FakeTicket]:
        asked = [tickets[self.pick(len(tickets))]] if self.pick else tickets
        for ticket in asked:
            ticket.value = ticket.ask()
        answered = [ticket for ticket in asked if ticket.value is not HANGS]
        self.now += self.answer_seconds if answered else timeout_seconds
        return answered

    def take(self, ticket: FakeTicket) -> Any:
        if isinstance(ticket.value, Exception):
            raise ticket.value
        return ticket.value

    def end(self, worker: int) -> None:
        self.ended.append(worker)


def pool_on(cluster: FakeCluster, *, num_workers: int = 2) -> ClusterPool:
    return ClusterPool(cluster, num_workers=num_workers, timeout_seconds=10, clock=lambda: cluster.now)


def run(cluster: FakeCluster, jobs: Sequence[Any], *, num_workers: int = 2) -> list[Any]:
    with pool_on(cluster, num_workers=num_workers) as pool:
        return list(pool.map(jobs))


def dies_at(job: Any, *, times: int) -> Callable[[str, Any], Any]:
    """Workers that answer, but for `job`, with which they die `times` times."""
    left = [times]

    def answer(place: str, asked: Any) -> Any:
        if asked == job and left[0]:
            left[0] -= 1
            return Lost("its process was killed")
        return 2 * asked

    return answer


@given(num_jobs=st.integers(0, 40), num_workers=st.integers(1, 5), seed=st.integers(0, 999), deaths=st.integers(0, 2))
def test_results_come_in_the_order_of_the_jobs_whoever_is_first_and_whoever_dies(
    num_jobs: int, num_workers: int, seed: int, deaths: int
) -> None:
    cluster = FakeCluster(dies_at(num_jobs // 2, times=deaths), ("a", "b", "c"), pick=random.Random(seed).randrange)
    assert run(cluster, range(num_jobs), num_workers=num_workers) == [2 * job for job in range(num_jobs)]
    assert sorted(set(cluster.given)) == list(range(num_jobs))
    assert sorted(cluster.ended) == list(range(cluster.num_started))


def test_no_worker_is_started_where_there_is_no_job() -> None:
    cluster = FakeCluster()
    assert run(cluster, []) == []
    assert cluster.num_started == 0


def test_no_more_jobs_are_read_ahead_than_three_a_worker() -> None:
    read = []

    def jobs() -> Iterator[int]:
        for job in range(100):
            read.append(job)
            yield job

    cluster = FakeCluster(lambda _, job: HANGS if job == 0 and cluster.now == 0 else job)
    with pool_on(cluster) as pool:
        assert next(pool.map(jobs())) == 0
    assert len(read) <= 3 * 2 + 2


def test_a_job_lost_with_its_node_is_not_given_to_the_idle_workers_of_that_node() -> None:
    cluster = FakeCluster(
        lambda place, job: Lost("its node died") if (place, job) == ("a", 12) else 2 * job, ("a",) * 5 + ("b",) * 20
    )
    assert run(cluster, range(13), num_workers=6) == [2 * job for job in range(13)]
    assert cluster.given.count(12) == 2


def test_a_lost_worker_is_replaced_and_only_the_job_it_worked_on_is_blamed(caplog: pytest.LogCaptureFixture) -> None:
    deaths = [0, 0, 1]  # the third would be one too many for job 1, were it blamed for those of job 0

    def answer(place: str, job: int) -> Any:
        if deaths and job == deaths[0]:
            del deaths[0]
            return Lost("its process was killed")
        return 2 * job

    cluster = FakeCluster(answer, ("a",))
    assert run(cluster, range(6), num_workers=1) == [0, 2, 4, 6, 8, 10]
    assert cluster.ended == [0, 1, 2, 3]
    assert "a conversion worker was lost on a: its process was killed" in caplog.text


def test_a_clip_that_loses_three_workers_stops_the_conversion_and_is_no_reject() -> None:
    job = SimpleNamespace(path=Path("/media/heavy.mp4"))
    cluster = FakeCluster(lambda *_: Lost("its node died"))
    with pytest.raises(EnvironmentFault, match=r"/media/heavy.mp4: 3 workers were lost .*a: its node died; .*rerun"):
        run(cluster, [job])
    assert sorted(cluster.ended) == list(range(cluster.num_started))


def test_a_worker_that_never_answers_is_ended_and_its_job_done_elsewhere() -> None:
    cluster = FakeCluster(lambda place, job: HANGS if place == "a" else job, ("a", "b", "b"))
    assert run(cluster, range(5)) == list(range(5))
    assert 0 in cluster.ended
    assert cluster.now == pytest.approx(10 + 180)


def test_workers_that_cannot_start_are_no_obstacle_while_others_can() -> None:
    cluster = FakeCluster(places=("a", Lost("no space"), Lost("no space"), Lost("no space"), Lost("no space")))
    assert run(cluster, range(8)) == [2 * job for job in range(8)]
    assert cluster.num_started == 4


def test_when_no_worker_can_start_the_reason_is_told() -> None:
    with pytest.raises(EnvironmentFault, match="no conversion worker can be started: no module named sharding"):
        run(FakeCluster(places=(Lost("no module named sharding"),)), range(8))


def test_when_no_worker_gets_a_processor_it_stops_after_a_while() -> None:
    cluster = FakeCluster(places=(HANGS,))
    with pytest.raises(EnvironmentFault, match="expected a conversion worker to start within 180 s"):
        run(cluster, range(8))
    assert cluster.now == 180


def test_a_worker_may_wait_for_a_processor_while_another_works() -> None:
    cluster = FakeCluster(lambda _, job: HANGS if cluster.now < 185 else job, ("a", HANGS))
    assert run(cluster, range(20)) == list(range(20))
    assert cluster.now == 10 + 180


def test_a_worker_has_the_whole_time_for_each_of_its_jobs() -> None:
    turns = itertools.count()
    cluster = FakeCluster(pick=lambda num_tickets: next(turns) % num_tickets, answer_seconds=50)
    assert run(cluster, range(20)) == [2 * job for job in range(20)]
    assert cluster.num_started == 2


def test_a_node_that_must_not_take_part_stops_the_conversion() -> None:
    cluster = FakeCluster(places=("a", UnlikeNodeError("b: av 1, here 2")))
    with pytest.raises(UnlikeNodeError, match="av 1"):
        run(cluster, range(8))
    assert sorted(cluster.ended) == [0, 1]


def test_j6_an_interrupt_ends_every_worker() -> None:
    cluster = FakeCluster()

    def interrupted() -> None:
        with pool_on(cluster) as pool:
            for result in pool.map(range(8)):
                if result == 4:
                    raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert sorted(cluster.ended) == list(range(cluster.num_started)) == [0, 1]


def test_a_file_missing_on_one_node_is_read_by_another_and_the_node_is_named(caplog: pytest.LogCaptureFixture) -> None:
    cluster = FakeCluster(lambda place, job: MISSING if place == "a" else job)
    assert run(cluster, range(9)) == list(range(9))
    assert "a cannot read a file that b reads" in caplog.text


def test_a_file_missing_on_two_nodes_or_on_the_only_one_is_a_reject() -> None:
    cluster = FakeCluster(lambda place, job: MISSING, ("a", "b", "c"))
    assert run(cluster, range(4), num_workers=3) == [MISSING] * 4
    assert len(cluster.given) == 8
    alone = FakeCluster(lambda place, job: MISSING, ("a",))
    assert run(alone, range(4)) == [MISSING] * 4
    assert len(alone.given) == 4


def test_a_file_missing_on_one_node_stays_so_when_the_other_is_lost_for_good() -> None:
    def answer(place: str, job: Any) -> Any:
        return MISSING if place == "a" else Lost("its node died")

    cluster = FakeCluster(answer, ("a", "b", HANGS))
    assert run(cluster, [0]) == [MISSING]


def clip(num_bytes: int) -> EncodedClip:
    return EncodedClip(
        video=EncodedVideo(
            mp4=bytes(num_bytes), width=16, height=16, frame_data_offset=0, frame_bytes=(), frame_ticks=(0,)
        ),
        audio=EncodedAudio(pcm=np.zeros(4, np.float32), source_rate_hz=16_000, source_channels=1),
        duration_seconds=1.0,
        source_frames_per_second=25.0,
        source_size=(16, 16),
        source_bytes=1,
        source_codec="h264",
    )


def test_finished_clips_that_wait_for_their_turn_take_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_pool, "_MOST_HELD_BYTES", 1000)
    one = clip(600)
    num_seen_first: list[int] = []

    def answer(place: str, job: int) -> Any:
        if job == 0 and cluster.now == 0:
            return HANGS
        if job == 0:
            num_seen_first.append(len(cluster.given))
        return one

    cluster = FakeCluster(answer, ("a", "b", "c", "d", "e", "f"))
    assert run(cluster, range(40), num_workers=6) == [one] * 40
    # Two finished clips are more than 1000 bytes: nothing new was given beside what the six workers had.
    assert num_seen_first[0] <= 2 * 6 + 2
