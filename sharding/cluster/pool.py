"""A pool of workers that may be lost: results in the order of the jobs, a lost worker's jobs given to others.

What a clip becomes depends on the clip alone. A worker that dies, is preempted or loses its node is replaced, and its
jobs are done again; a clip that takes several workers with it stops the conversion instead of becoming a reject.
`Cluster` is all that is asked of a cluster; `sharding.cluster.ray_workers` is the one there is.
"""

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol, Self

from ca2st.errors import EnvironmentFault
from sharding.cluster.job_book import JobBook

_log = logging.getLogger(__name__)

_START_SECONDS = 180.0  # a cold interpreter on a busy node, or a cluster whose processors are all taken
_GRACE_SECONDS = 180.0  # beyond the clip's own limit: starting a decode child, sending the clip
_DEPTH = 2  # jobs a worker has at a time: the second is begun while the first one's clip travels
_LOOK_AHEAD = 3  # jobs a worker, finished or not, ahead of the one that is due
_MOST_HELD_BYTES = 2 * 2**30
_MOST_FAILED_STARTS = 3


@dataclass(frozen=True, slots=True)
class Lost:
    """Instead of an answer: the worker is gone."""

    why: str


class Cluster(Protocol):
    """Starts workers elsewhere and passes jobs to them. A ticket stands for an answer to come; it is hashable."""

    def start(self) -> tuple[Any, Any]:
        """A new worker, and the ticket that is answered with its place once it runs."""

    def give(self, worker: Any, job: Any) -> Any:
        """A ticket for the job's result; a worker does its jobs in turn. Never waits."""

    def wait(self, tickets: Sequence[Any], timeout_seconds: float) -> Sequence[Any]:
        """Those of `tickets` that are answered; waits for the first one."""

    def take(self, ticket: Any) -> Any:
        """The answer, or `Lost`; raises UnlikeNodeError for a worker on a node that must not take part."""

    def end(self, worker: Any) -> None:
        """End a worker and everything it started, at once."""


@dataclass(slots=True, eq=False)
class _Worker:
    handle: Any
    introduction: Any
    """Ticket of its place; None once it is ready."""
    place: str = "a worker that had not started"
    given: deque[tuple[Any, int]] = field(default_factory=deque)
    """Tickets and numbers of its jobs, the one it works on first."""
    deadline: float = math.inf

    @property
    def ready(self) -> bool:
        return self.introduction is None

    @property
    def awaited(self) -> Any:
        """The ticket that is answered next; None for an idle worker."""
        if self.introduction is not None:
            return self.introduction
        return self.given[0][0] if self.given else None


class ClusterPool:
    """Runs jobs on `num_workers` workers of `cluster`.

    Args:
        cluster: Where the workers run.
        num_workers: Workers at a time; fewer are used while the cluster has no room for more.
        timeout_seconds: Wall time of one job, which the workers themselves keep to.
        clock: Seconds that only grow (tests).
    """

    def __init__(
        self,
        cluster: Cluster,
        *,
        num_workers: int,
        timeout_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cluster, self._num_workers, self._clock = cluster, num_workers, clock
        self._answer_seconds = timeout_seconds + _GRACE_SECONDS
        self._workers: list[_Worker] = []
        self._failed_starts = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End every worker."""
        workers, self._workers = self._workers, []
        for worker in workers:
            self._cluster.end(worker.handle)

    def map(self, jobs: Iterable[Any]) -> Iterator[Any]:
        """Yield a result or a `Rejected` for each job, in order; at most a few jobs a worker are read ahead.

        One map at a time, used up or followed by `close`.

        Raises:
            EnvironmentFault: no worker can be started, or one job loses its workers again and again.
            UnlikeNodeError: a worker started on a node that would write other bytes.
        """
        book = JobBook(jobs, window=_LOOK_AHEAD * self._num_workers, most_held_bytes=_MOST_HELD_BYTES)
        while True:
            yield from book.due()
            if book.finished:
                return
            self._grow()
            self._give_out(book)
            self._collect(book)

    def _grow(self) -> None:
        """Start workers up to their number, unless the last ones all failed to start."""
        while len(self._workers) < self._num_workers and self._failed_starts < _MOST_FAILED_STARTS:
            handle, introduction = self._cluster.start()
            self._workers.append(_Worker(handle, introduction, deadline=self._clock() + _START_SECONDS))

    def _places(self) -> set[str]:
        return {worker.place for worker in self._workers if worker.ready}

    def _give_out(self, book: JobBook) -> None:
        places = self._places()
        for depth in range(_DEPTH):
            for worker in self._workers:
                if worker.ready and len(worker.given) == depth and (job := book.take(worker.place, places)):
                    worker.given.append((self._cluster.give(worker.handle, job[1]), job[0]))
                    if depth == 0:
                        worker.deadline = self._clock() + self._answer_seconds

    def _collect(self, book: JobBook) -> None:
        """Wait for the next answer, loss or deadline, and deal with every one that is due."""
        nobody_works = not self._places()
        awaited = {worker.awaited: worker for worker in self._workers if worker.awaited is not None}
        # A worker may wait for a free processor as long as others work.
        deadlines = {
            ticket: worker.deadline if worker.ready or nobody_works else math.inf for ticket, worker in awaited.items()
        }
        answered = set(self._cluster.wait(list(awaited), max(0.0, min(deadlines.values()) - self._clock())))
        for ticket, worker in awaited.items():
            if ticket in answered:
                self._settle(worker, book)
            elif self._clock() >= deadlines[ticket]:
                self._give_up_on(worker, book)

    def _settle(self, worker: _Worker, book: JobBook) -> None:
        answer = self._cluster.take(worker.awaited)
        if isinstance(answer, Lost):
            self._lose(worker, answer.why, book)
        elif not worker.ready:
            worker.introduction, worker.place, self._failed_starts = None, answer, 0
        else:
            _, index = worker.given.popleft()
            worker.deadline = self._clock() + self._answer_seconds
            book.answer(index, answer, place=worker.place, places=self._places())

    def _give_up_on(self, worker: _Worker, book: JobBook) -> None:
        if worker.ready:
            self._lose(worker, f"no answer within {self._answer_seconds:g} s", book)
            return
        raise EnvironmentFault(
            f"expected a conversion worker to start within {_START_SECONDS:g} s, found none; are the cluster's "
            "processors all taken? wait until some are free, and rerun"
        )

    def _idle_beside(self, worker: _Worker) -> list[_Worker]:
        """Those that wait for a job on its node: if that is gone, the lost job must not be given to them in turn."""
        return [one for one in self._workers if one.ready and not one.given and one.place == worker.place]

    def _end(self, workers: Sequence[_Worker]) -> None:
        for worker in dict.fromkeys(workers):
            self._workers.remove(worker)
            self._cluster.end(worker.handle)

    def _lose(self, worker: _Worker, why: str, book: JobBook) -> None:
        """End a worker that is lost, and put its jobs back."""
        _log.warning("a conversion worker was lost on %s: %s", worker.place, why)
        self._end([worker, *(self._idle_beside(worker) if worker.ready else ())])
        self._failed_starts = 0 if worker.ready else self._failed_starts + 1
        if worker.ready and not self._places():
            for other in self._workers:  # they waited for a processor without hurry until now
                other.deadline = self._clock() + _START_SECONDS
        if self._failed_starts >= _MOST_FAILED_STARTS and not self._workers:
            raise EnvironmentFault(f"no conversion worker can be started: {why}; mend that and rerun")
        for number, (_, index) in enumerate(worker.given):
            if number == 0:
                book.lose(index, f"{worker.place}: {why}")
            else:
                book.give_again(index)
