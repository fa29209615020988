"""Which job of a map is next, which must be given again, and which results are due; pure bookkeeping."""

import logging
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from ca2st.errors import EnvironmentFault
from sharding.decode_child import EncodedClip, Rejected

_log = logging.getLogger(__name__)

_MOST_LOSSES = 3
_PLACES_ASKED = 2


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
        """The results whose turn has come."""
        while self._due in self._done:
            result = self._done.pop(self._due)
            self._held_bytes -= _num_bytes(result)
            self._due += 1
            yield result

    def take(self, place: str, places: Collection[str]) -> tuple[int, Any] | None:
        """The next job for a worker at `place`, with its number; None when there is none for it now.

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
        """A worker that had not begun this job is gone."""
        self._again.append(index)

    def lose(self, index: int, why: str) -> None:
        """A worker was lost while it worked on this job: no fault of the clip, so never a reject.

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


def _num_bytes(result: Any) -> int:
    if not isinstance(result, EncodedClip):
        return 0
    return len(result.video.mp4) + (0 if result.audio is None else result.audio.pcm.nbytes)
