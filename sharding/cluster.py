"""Conversion on a Ray cluster: one pool of workers on its nodes, which may be lost at any time.

Results come in the order of the jobs, and a lost worker's jobs are given to others. What a clip becomes depends on the
clip alone; a clip that takes several workers with it stops the conversion instead of becoming a reject. An actor holds
one decode child, so that the limits, the timeout and the crash handling of `sharding.workers` stay as they are.

Ray is imported in functions only. The caller opens the Ray session, and says how a node that joins later is examined.
"""

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Self

from ca2st.errors import EnvironmentFault
from sharding.errors import UnlikeNodeError
from sharding.media.encode import ClipJob, EncodedClip, encode_clip
from sharding.settings import ConversionConfig
from sharding.workers import DecodePool, Rejected

_log = logging.getLogger(__name__)
_MOST_LOSSES = 3
_PLACES_ASKED = 2
_START_SECONDS = 180.0  # a cold interpreter on a busy node, or a cluster whose processors are all taken
_GRACE_SECONDS = 180.0  # beyond the clip's own limit: starting a decode child, sending the clip
_DEPTH = 2  # jobs a worker has at a time: the second is begun while the first one's clip travels
_LOOK_AHEAD = 3  # jobs a worker, finished or not, ahead of the one that is due
_MOST_HELD_BYTES = 2 * 2**30
_MOST_FAILED_STARTS = 3


class JobBook:
    """The jobs of one map, from being read to being yielded in order.

    Args:
        jobs: Read one at a time, when a worker has room.
        window: A job is given only while fewer than this many jobs are between it and the one that is due.
        most_held_bytes: No new job is given while finished clips that are not due yet take more than this.
    """

    def __init__(self, jobs: Iterable[Any], *, window: int, most_held_bytes: int) -> None:
        self._waiting = enumerate(jobs)
        self._next = next(self._waiting, None)
        self._window, self._most_held_bytes = window, most_held_bytes
        self._given: dict[int, Any] = {}
        self._again: list[int] = []
        self._done: dict[int, Any] = {}
        self._held_bytes = 0
        self._due = 0
        self._losses: dict[int, list[str]] = {}
        self._blind: dict[int, set[str]] = {}

    @property
    def finished(self) -> bool:
        """Every job was read, answered and yielded."""
        return self._next is None and not self._given and not self._done

    def due(self) -> Iterator[Any]:
        """Yield the results whose turn has come."""
        while self._due in self._done:
            result = self._done.pop(self._due)
            self._held_bytes -= _num_bytes(result)
            self._due += 1
            yield result

    def take(self, place: str, places: Collection[str]) -> tuple[int, Any] | None:
        """Return the next job for a worker at `place`, with its number; None when there is none for it now.

        `places` are those of all workers that are ready: a job that could not read its file at one of them goes to
        another while there is one.
        """
        for index in sorted(self._again):
            blind = self._blind.get(index, set())
            if place not in blind or not set(places) - blind:
                self._again.remove(index)
                return index, self._given[index]
        full = self._held_bytes > self._most_held_bytes
        if self._next is None or full or self._next[0] - self._due >= self._window:
            return None
        (index, job), self._next = self._next, next(self._waiting, None)
        self._given[index] = job
        return index, job

    def answer(self, index: int, result: Any, *, place: str, places: Collection[str]) -> None:
        """Take the result of a job; a file that is missing at one place is looked for at another first."""
        blind = self._blind.setdefault(index, set())
        if isinstance(result, Rejected) and result.reason == "missing_file":
            blind.add(place)
            if len(blind) < _PLACES_ASKED and set(places) - blind:
                self._again.append(index)
                return
        elif blind:
            _log.warning("%s cannot read a file that %s reads; is its media folder mounted?", *blind, place)
        del self._given[index], self._blind[index]
        self._losses.pop(index, None)
        self._done[index] = result
        self._held_bytes += _num_bytes(result)

    def give_again(self, index: int) -> None:
        """Put a job back that a lost worker had not begun."""
        self._again.append(index)

    def lose(self, index: int, why: str) -> None:
        """Put a job back whose worker was lost while it worked on it: no fault of the clip, so never a reject.

        Raises:
            EnvironmentFault: it is the third one.
        """
        losses = self._losses.setdefault(index, [])
        losses.append(why)
        if len(losses) >= _MOST_LOSSES:
            path = getattr(self._given[index], "path", f"job {index}")
            raise EnvironmentFault(
                f"{path}: {len(losses)} workers were lost while converting it ({'; '.join(losses)}); see to these "
                "nodes, or leave the clip out, and rerun: finished shards are kept"
            )
        self._again.append(index)


@dataclass(frozen=True, slots=True)
class Lost:
    """Instead of an answer: the worker is gone."""

    why: str


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
        cluster: "RayCluster",
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
        """Yield a result or a `Rejected` for each job, in order; at most a few jobs per worker are read ahead.

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
        """Wait for the next answer, loss or deadline, and handle every one that is due."""
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
        """Return those that wait for a job on its node: if that is gone, they must not get the lost job in turn."""
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
            raise EnvironmentFault(f"no conversion worker can be started: {why}; fix that and rerun")
        for number, (_, index) in enumerate(worker.given):
            if number == 0:
                book.lose(index, f"{worker.place}: {why}")
            else:
                book.give_again(index)


def ray_pool(
    config: ConversionConfig,
    *,
    vet: Callable[[], None],
    vetted: Collection[str],
    encode: Callable[[ClipJob], EncodedClip] = encode_clip,
) -> ClusterPool:
    """Return a pool of `config.workers` actors, spread over the nodes of the cluster that this process has joined.

    Args:
        config: Limits of a clip, and the number of actors; each takes one CPU.
        vet: Called on a node outside `vetted` before an actor there takes part; raises UnlikeNodeError to refuse it.
        vetted: Ids of nodes that were examined already.
        encode: What the decode children run; a module-level function.
    """
    cluster = RayCluster(encode, config, vet=vet, vetted=vetted)
    return ClusterPool(cluster, num_workers=config.workers, timeout_seconds=config.clip_timeout_seconds)


class RayCluster:
    """Starts actors and passes jobs to them. A ticket, an object reference, stands for an answer to come."""

    def __init__(
        self,
        encode: Callable[[ClipJob], EncodedClip],
        config: ConversionConfig,
        *,
        vet: Callable[[], None],
        vetted: Collection[str],
    ) -> None:
        import ray

        self._actor: Any = ray.remote(
            num_cpus=1,
            max_restarts=0,  # the pool starts another one, anywhere
            max_task_retries=0,
            scheduling_strategy="SPREAD",
        )(_DecodeWorker)
        self._limits = (encode, config.clip_timeout_seconds, config.clip_memory_bytes)
        self._question = (vet, frozenset(vetted))

    def start(self) -> tuple[Any, Any]:
        """Start a worker; return it, and the ticket that is answered with its place once it runs."""
        actor = self._actor.remote(*self._limits)
        return actor, actor.introduce.remote(*self._question)

    def give(self, worker: Any, job: Any) -> Any:
        """Return a ticket for the job's result; a worker does its jobs in turn. Never waits."""
        return worker.run.remote(job)

    def wait(self, tickets: Sequence[Any], timeout_seconds: float) -> Sequence[Any]:
        """Wait for the first of `tickets` that is answered; return all that are."""
        import ray

        timeout = None if timeout_seconds == math.inf else timeout_seconds
        ready, rest = ray.wait(list(tickets), timeout=timeout)
        if ready and rest:
            ready += ray.wait(rest, num_returns=len(rest), timeout=0)[0]
        return ready

    def take(self, ticket: Any) -> Any:
        """Return the answer, or `Lost`; raises UnlikeNodeError for a worker on a node that must not take part."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        try:
            return _in_own_memory(ray.get(ticket))
        except RayTaskError as error:
            if isinstance(error.cause, UnlikeNodeError):
                raise error.cause from None
            return Lost(f"{type(error.cause).__name__}: {_first_line(error.cause)}")
        except RayError as error:
            return Lost(f"{type(error).__name__}: {_ends(error)}")

    def end(self, worker: Any) -> None:
        """End a worker and everything it started, at once."""
        import ray

        ray.kill(worker)


def _num_bytes(result: Any) -> int:
    if not isinstance(result, EncodedClip):
        return 0
    return len(result.video.mp4) + (0 if result.audio is None else result.audio.pcm.nbytes)


class _DecodeWorker:
    """What runs in an actor's process."""

    def __init__(self, encode: Callable[[ClipJob], EncodedClip], timeout_seconds: float, memory_bytes: int) -> None:
        self._pool = DecodePool(encode, num_workers=1, timeout_seconds=timeout_seconds, memory_bytes=memory_bytes)

    def introduce(self, vet: Callable[[], None], vetted: Collection[str]) -> str:
        """Return the node's name; a node that joined later is examined first."""
        import ray

        node_id = ray.get_runtime_context().get_node_id()
        if node_id not in vetted:
            vet()
        address = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]  # Ray has no types there
        return f"{address} ({node_id[:8]})"

    def run(self, job: Any) -> Any:
        """Return the job's clip, or its `Rejected`."""
        (result,) = self._pool.map([job])
        return result


def _in_own_memory(answer: Any) -> Any:
    """Copy sound: torch wants to write to it, and it would keep Ray's shared memory in use."""
    if isinstance(answer, EncodedClip) and answer.audio is not None:
        return replace(answer, audio=replace(answer.audio, pcm=answer.audio.pcm.copy()))
    return answer


def _ends(error: BaseException) -> str:
    """Return the first and last line: what happened to the actor, and the cause where Ray names one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ... ".join(dict.fromkeys((lines[0], lines[-1]))) if lines else "no message"


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "no message")
