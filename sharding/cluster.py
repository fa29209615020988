"""Conversion on a Ray cluster: each shard is one task, made on whichever node is free and written there.

What a shard becomes depends on its sources alone, so a task whose node is lost is simply given out again. A shard that
takes several workers with it stops the conversion instead of becoming rejects. Ray is imported in functions only. The
caller opens the Ray session, and says how a node that joins later is examined.
"""

import logging
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Self

from ca2st.errors import CA2STError, EnvironmentFault
from sharding.format.writer import shard_name
from sharding.shard_task import MadeShard, OnSample, ShardSetup, ShardTask, make_shards
from sharding.source import SourceSample

_log = logging.getLogger(__name__)
_MOST_LOSSES = 3
_START_SECONDS = 180.0  # a cold interpreter on a busy node, or a cluster whose processors are all taken
_examined: set[str] = set()
"""Node ids, in a worker's process."""


@dataclass(slots=True)
class _Given:
    """A task that was given out."""

    task: ShardTask
    losses: list[str] = field(default_factory=list)
    """What became of the workers that it was lost with."""
    blind: str = ""
    """The node that could not read a file which this machine reads."""


class RayShards:
    """Makes shards by tasks on the cluster that this process has joined, each with one CPU and one decode child.

    Args:
        setup: Of the conversion; its folder must be shared by the nodes.
        num_workers: Tasks at a time; fewer run while the cluster has no room for more.
        vet: Called on a node outside `vetted` before it makes a shard; raises UnlikeNodeError to refuse it.
        vetted: Ids of nodes that were examined already.
    """

    def __init__(
        self, setup: ShardSetup, *, num_workers: int, vet: Callable[[], None], vetted: Collection[str]
    ) -> None:
        import ray

        self._common: Any = ray.put((setup, vet, frozenset(vetted)))
        self._num_workers = num_workers
        self._running: dict[Any, _Given] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        end_tasks(self._running)

    def run(
        self,
        tasks: Iterable[ShardTask],
        *,
        on_sample: OnSample,  # noqa: ARG002  a task tells of its sources when it is done
    ) -> Iterator[MadeShard]:
        """Yield what became of each task, as it is done; single sources are not heard of.

        Raises:
            EnvironmentFault: no worker can be started, a shard cannot be written, or one loses its workers again and
                again.
            UnlikeNodeError: a task came to a node that would write other bytes.
        """
        import ray

        _wait_for_room()
        waiting = iter(tasks)
        while True:
            while len(self._running) < self._num_workers and (task := next(waiting, None)) is not None:
                self._give(_Given(task))
            if not self._running:
                return
            ready, _ = ray.wait(list(self._running), num_returns=1)
            for ticket in ready:
                if (made := self._settle(ticket)) is not None:
                    yield made

    def _give(self, given: _Given) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        strategy: Any = "SPREAD"
        if given.blind:
            here = ray.get_runtime_context().get_node_id()
            strategy = NodeAffinitySchedulingStrategy(here, soft=True)
        task = ray.remote(num_cpus=1, max_retries=0, scheduling_strategy=strategy)(_make_on_node)
        self._running[task.remote(self._common, given.task)] = given

    def _settle(self, ticket: Any) -> MadeShard | None:
        """Return the shard of a task that ended; None where it is given out again."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        given = self._running.pop(ticket)
        made: MadeShard
        try:
            place, made = ray.get(ticket)
        except RayTaskError as error:
            if isinstance(error.cause, CA2STError):
                raise error.cause from None
            self._lose(given, f"{type(error.cause).__name__}: {_first_line(error.cause)}")
            return None
        except RayError as error:
            self._lose(given, f"{type(error).__name__}: {_ends(error)}")
            return None
        unread = None if given.blind else _readable_here(given.task, made)
        if unread is not None:
            _log.warning("%s cannot read %s, which this machine reads; is the folder mounted?", place, unread.path)
            self._give(replace(given, task=replace(given.task, rejects=None), blind=place))
            return None
        return made

    def _lose(self, given: _Given, why: str) -> None:
        """Give a task out again whose worker was lost: no fault of a clip, so never a reject."""
        name = shard_name(given.task.number)
        _log.warning("a conversion worker was lost while it made %s: %s", name, why)
        given.losses.append(why)
        if len(given.losses) >= _MOST_LOSSES:
            raise EnvironmentFault(
                f"{name}: {len(given.losses)} workers were lost while making it ({'; '.join(given.losses)}); see to "
                "these nodes, or leave its clips out, and rerun: finished shards are kept"
            )
        self._give(given)


def end_tasks(tickets: Collection[Any]) -> None:
    """End those tasks of `tickets`, references to their results, that still run.

    Ray 2.60 aborts the whole process ("Tried to complete task that was not pending") where a task is cancelled whose
    result has come a moment ago, so those that ended are left alone.
    """
    import ray

    _, running = ray.wait(list(tickets), num_returns=len(tickets), timeout=0) if tickets else ((), ())
    for ticket in running:
        ray.cancel(ticket, force=True)


def _wait_for_room() -> None:
    """Start something on one CPU; raises EnvironmentFault where nothing starts."""
    import ray
    from ray.exceptions import GetTimeoutError, RayError

    ticket = ray.remote(num_cpus=1, max_retries=_MOST_LOSSES)(_nothing).remote()
    try:
        ray.get(ticket, timeout=_START_SECONDS)
    except GetTimeoutError:
        end_tasks([ticket])
        raise EnvironmentFault(
            f"expected a conversion worker to start within {_START_SECONDS:g} s, found none; are the cluster's "
            "processors all taken? wait until some are free, and rerun"
        ) from None
    except RayError as error:
        raise EnvironmentFault(f"no conversion worker can be started: {_ends(error)}; fix that and rerun") from error


def _nothing() -> None:
    """What `_wait_for_room` runs; to find it a worker imports this module, so all that it needs to make shards."""


def _make_on_node(
    common: tuple[ShardSetup, Callable[[], None], Collection[str]], task: ShardTask
) -> tuple[str, MadeShard]:
    """Return the node's name and the shard made on it; a node that joined later is examined first."""
    import ray

    setup, vet, vetted = common
    node_id = ray.get_runtime_context().get_node_id()
    if node_id not in vetted and node_id not in _examined:
        vet()
        _examined.add(node_id)
    address = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]  # Ray has no types there
    with setup.decode_pool() as pool:
        return f"{address} ({node_id[:8]})", next(make_shards(setup, iter([task]), pool))


def _readable_here(task: ShardTask, made: MadeShard) -> SourceSample | None:
    """Return a sample whose file the node did not find and this machine does."""
    for reject in made.rejects:
        sample = task.samples[reject.position - task.first]
        paths = [path for path in (sample.path, sample.sound_path) if path is not None]
        if reject.reason == "missing_file" and all(path.is_file() for path in paths):
            return sample
    return None


def _ends(error: BaseException) -> str:
    """Return the first and last line: what happened to the worker, and the cause where Ray names one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ... ".join(dict.fromkeys((lines[0], lines[-1]))) if lines else "no message"


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "no message")
