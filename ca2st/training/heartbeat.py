"""Each rank says now and then that it lives and where it stands, so that the others can tell who is silent.

A thread of every rank writes ``heartbeats/rank-<r>.json`` of the run folder, which all ranks see. A process that is
stopped, hangs in the kernel or has lost its machine writes no more. Who waits too long in an exchange looks twice: a
rank whose count of beats stands still is silent. No clocks are compared.
"""

import faulthandler
import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from ca2st.training.errors import RanksSilentError

FOLDER_NAME = "heartbeats"
_EXCHANGES = ("gather", "backward")
_TIMED_OUT = ("Timed out waiting", "timed out", "Timeout")
_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Whereabouts:
    """Where a rank stands."""

    step: int
    """Updates made."""
    stage: str
    """What `stages.StageClock` stands in."""
    seconds: float
    """How long it has been in it."""
    keys: tuple[str, ...] = ()
    """Samples it works on, where they are known."""

    def __str__(self) -> str:
        keys = f" with {', '.join(self.keys[:4])}{' ...' if len(self.keys) > 4 else ''}" if self.keys else ""
        return f"in {self.stage} after step {self.step}, for {self.seconds:.0f} s{keys}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Beat:
    """One rank's file."""

    count: int
    """Beats so far."""
    where: Whereabouts


class Heartbeat:
    """Beats while the block runs, and watches its own rank: a context manager, inert for a rank alone.

    When this rank has waited in one exchange for four fifths of the timeout, the stacks of its threads are dumped on
    stderr with who is silent, while there still is somebody to tell. A rank that others wait for so long, and that
    lives, dumps its own: they show what it hangs in, be it a step, a validation or the writing of a checkpoint.
    """

    def __init__(
        self,
        folder: Path,
        *,
        rank: int,
        world_size: int,
        timeout_seconds: float,
        where: Callable[[], Whereabouts],
    ) -> None:
        self._folder = folder / FOLDER_NAME
        self._rank, self._world_size = rank, world_size
        self._timeout, self._where = timeout_seconds, where
        self.interval_seconds = min(5.0, timeout_seconds / 20)
        """Time between two beats."""
        self._ended = threading.Event()
        self._count = 0
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)

    def __enter__(self) -> "Heartbeat":
        if self._world_size > 1:
            self._beat()
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._world_size == 1:
            return
        self._ended.set()
        self._thread.join()
        with suppress(OSError):
            self._path(self._rank).unlink()
            self._folder.rmdir()  # by the last of the ranks

    def explain(self, error: BaseException) -> RanksSilentError | None:
        """`error` as what it says of the other ranks, where it is an exchange that was given up; else None."""
        if self._world_size == 1 or not isinstance(error, RuntimeError):
            return None
        if not any(words in str(error) for words in _TIMED_OUT):
            return None
        return RanksSilentError(
            f"rank {self._rank} waited {self._timeout:g} s for the other ranks after step {self._where().step}: "
            f"{self.told()}; look at that process and its machine, or raise training.collective_timeout_seconds where "
            "it is only slow, and rerun to resume"
        )

    def told(self) -> str:
        """Who is silent, and where the others stand; takes as long as three beats."""
        before = self._others()
        time.sleep(3 * self.interval_seconds)
        return describe(before, self._others(), ranks=[r for r in range(self._world_size) if r != self._rank])

    def _watch(self) -> None:
        dumped: tuple[int, str] | None = None
        while not self._ended.wait(self.interval_seconds):
            self._beat()
            where = self._where()
            standing = (where.step, where.stage)
            if dumped == standing:
                continue
            if self._waits_long(where):
                dumped = standing
                self._dump(f"waits for other ranks {where}: {self._who_is_silent()}")
            elif where.seconds > self._timeout / 2 and (waiting := self._who_waits_long()):
                dumped = standing
                self._dump(f"is waited for by rank {', '.join(map(str, waiting))} and stands {where}")

    def _waits_long(self, where: Whereabouts) -> bool:
        return where.stage in _EXCHANGES and where.seconds > 0.8 * self._timeout

    def _who_waits_long(self) -> list[int]:
        return [rank for rank, beat in self._others().items() if self._waits_long(beat.where)]

    def _who_is_silent(self) -> str:
        before = self._others()
        for _ in range(3):
            self._ended.wait(self.interval_seconds)
            self._beat()
        return describe(before, self._others(), ranks=[r for r in range(self._world_size) if r != self._rank])

    def _dump(self, what: str) -> None:
        sys.stderr.write(f"rank {self._rank} {what}; its threads:\n")
        sys.stderr.flush()
        with suppress(OSError, ValueError):  # a stderr without a file descriptor
            faulthandler.dump_traceback(file=sys.stderr, all_threads=True)

    def _beat(self) -> None:
        self._count += 1
        path = self._path(self._rank)
        temporary = path.with_suffix(".tmp")
        beat = Beat(count=self._count, where=self._where())
        try:
            self._folder.mkdir(parents=True, exist_ok=True)  # the last of an earlier group may take it away
            temporary.write_text(json.dumps(asdict(beat)))
            temporary.replace(path)
        except OSError as error:  # a full disk must not end a run that could go on
            _LOGGER.debug("cannot write %s: %s", path, error)

    def _others(self) -> dict[int, Beat]:
        found = {rank: read_beat(self._path(rank)) for rank in range(self._world_size) if rank != self._rank}
        return {rank: beat for rank, beat in found.items() if beat is not None}

    def _path(self, rank: int) -> Path:
        return self._folder / f"rank-{rank}.json"


def read_beat(path: Path) -> Beat | None:
    """A rank's file, or None where there is none."""
    try:
        document = json.loads(path.read_text())
        where = document["where"] | {"keys": tuple(document["where"]["keys"])}
        return Beat(count=document["count"], where=Whereabouts(**where))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def describe(before: Mapping[int, Beat], after: Mapping[int, Beat], *, ranks: list[int]) -> str:
    """What two looks at the beats of `ranks` say: first who is silent, then where the others stand."""
    silent = [rank for rank in ranks if rank in after and rank in before and before[rank].count == after[rank].count]
    gone = [rank for rank in ranks if rank not in after]
    parts = [f"rank {rank} is silent, last seen {after[rank].where}" for rank in silent]
    parts += [f"rank {rank} has left the run" for rank in gone]
    alive = [rank for rank in ranks if rank not in silent and rank not in gone]
    parts += [f"rank {rank} is alive {after[rank].where}" for rank in alive]
    return "; ".join(parts)
