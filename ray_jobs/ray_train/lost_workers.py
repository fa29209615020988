"""Workers that died without a word: Ray tells of them, and they are put on record with their node."""

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ray.exceptions import OutOfMemoryError, RayActorError
from ray.train.v2.api.callback import UserCallback

from ca2st.errors import EnvironmentFault
from ray_jobs.every_node import living_nodes
from ray_jobs.ray_access import first_line
from ray_jobs.ray_train.launch_folder import LaunchFolder
from ray_jobs.running.failure_record import FailureRecord, keep_failure

_LOGGER = logging.getLogger(__name__)


class LostWorkers(UserCallback):
    """Called in Ray's controller whenever it finds that workers failed."""

    def __init__(self, folder: Path) -> None:
        self._folder = LaunchFolder(folder)

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
        """Put on record the workers that died: those that raised have done so themselves."""
        del run_context
        try:
            self._record(worker_exceptions)
        except Exception as error:  # noqa: BLE001  # Ray would end the run, which can go on, for an error in here
            _LOGGER.warning("cannot tell which workers died: %s", error)

    def _record(self, worker_exceptions: Mapping[int, Exception]) -> None:
        died = {rank: error for rank, error in worker_exceptions.items() if died_of(error) is not None}
        if not died:
            return
        attempt = self._folder.num_attempts()
        places = {rank: self._folder.node_of(attempt, rank) for rank in died}
        record = death_record(
            {rank: died_of(error) or "" for rank, error in died.items()},
            places,
            living={node.address for node in living_nodes()},
            attempt=attempt,
            launch=self._folder.name,
            preempted=any(is_preempted(error) for error in died.values()),
        )
        keep_failure(self._folder.run_dir, record)


def died_of(error: Exception) -> str | None:
    """Ray's words for the death of a worker's process or node; None when the worker raised `error` itself."""
    cause = _cause_of(error)
    if isinstance(cause, OutOfMemoryError):  # killed by Ray; no RayActorError, and its last lines are advice
        return first_line(cause)
    return str(cause) if isinstance(cause, RayActorError) else None


def is_preempted(error: Exception) -> bool:
    """Whether a worker died since its node was taken away, as Ray had been told before."""
    cause = _cause_of(error)
    return isinstance(cause, RayActorError) and cause.preempted


def _cause_of(error: Exception) -> Exception:
    """What Ray's health check has found, where that is what failed."""
    cause: Exception = getattr(error, "health_check_failure", error)
    return cause


def death_record(
    died: Mapping[int, str],
    places: Mapping[int, str],
    *,
    living: Collection[str],
    attempt: int,
    launch: str,
    preempted: bool = False,
) -> FailureRecord:
    """What to put on record for workers that died: Ray's words by rank, and their places as ``host (address)``.

    `preempted`: one of them with a node that was taken away as announced, which explains the others.
    """
    rank = min(died)
    by_node: dict[str, list[int]] = {}
    for one in sorted(died):
        by_node.setdefault(places[one] or "a node not known", []).append(one)
    told = "; ".join(_told(place, ranks, living) for place, ranks in by_node.items())
    return FailureRecord(
        kind="WorkerDiedError",
        message=f"{told} ({_last_line(died[rank])})",
        exit_code=EnvironmentFault.exit_code,
        rank=rank,
        node=places[rank] or "a node not known",
        attempt=attempt,
        final=False,
        launch=launch,
        preempted=preempted,
    )


def _told(place: str, ranks: list[int], living: Collection[str]) -> str:
    address = place.rpartition("(")[2].rstrip(")")
    which = f"rank {', '.join(map(str, ranks))}"
    if address and address not in living and place.endswith(")"):
        return f"node {place} was lost with the worker of {which}"
    return f"the worker process of {which} on {place} died"


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "Ray gives no reason")
