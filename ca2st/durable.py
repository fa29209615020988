"""The one write protocol of the project, and the fault points that prove it.

Temporary name in the same folder, flush, fsync, rename, fsync of the folder: after a crash a file is either
complete under its final name or not there. Sets of files (shards, checkpoints) are written in any order with
their marker (manifest, COMPLETE.json) last.

Standard library only: `sharding` and `pipelines` use it too.
"""

import contextlib
import errno
import os
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal, TypeGuard, get_args

from ca2st.errors import EnvironmentFault, UserInputError

FaultKind = Literal["kill", "raise", "stop", "enospc"]
_TEMPORARY_SUFFIX = ".tmp"


class InjectedFault(RuntimeError):  # noqa: N818  # what it is, not an error of ours
    """Raised by a fault point of kind ``raise``: a stand-in for a bug at that place."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FaultPoints:
    """One fault to happen at the nth arrival at a named point; inert when `point` is empty.

    Parsed at the command line's edge from ``CA2ST_FAULT=point:nth[:kind[:rank]]`` and passed down as an object.
    """

    point: str = ""
    """Name of the point, for example ``shard.renamed``; empty: nothing ever happens."""
    nth: int = 1
    """Which arrival at the point, counted from 1, triggers the fault."""
    kind: FaultKind = "kill"
    """``kill`` SIGKILL, ``stop`` SIGSTOP, ``raise`` InjectedFault, ``enospc`` OSError(ENOSPC)."""
    rank: int | None = None
    """Of several processes that train together, only this one; None: whichever arrives."""
    _arrivals: Counter[str] = field(default_factory=Counter, repr=False)

    @classmethod
    def parse(cls, text: str) -> "FaultPoints":
        """Read ``point:nth[:kind[:rank]]``; an empty text gives inert fault points.

        Raises:
            UserInputError: the text has another form or names an unknown kind.
        """
        if not text:
            return cls()
        parts = text.split(":")
        known = get_args(FaultKind)
        point, nth, kind, rank = (*parts, *("", "", "kill", "")[len(parts) :])[:4]
        if len(parts) not in (2, 3, 4) or not nth.isdigit() or kind not in known or not (rank or "0").isdigit():
            raise UserInputError(
                f"CA2ST_FAULT: expected point:nth[:kind[:rank]] with kind one of {', '.join(known)}, found {text!r}"
            )
        return cls(point=point, nth=int(nth), kind=kind, rank=int(rank) if rank else None)  # type: ignore[arg-type]  # checked above

    def on_rank(self, rank: int) -> "FaultPoints":
        """These points for the process of `rank`: inert where they are another's."""
        return self if self.rank in (None, rank) else NO_FAULTS

    def reach(self, point: str) -> None:
        """Say that execution arrived at `point`; the configured fault happens here or never."""
        if not self.point or point != self.point:
            return
        self._arrivals[point] += 1
        if self._arrivals[point] != self.nth:
            return
        if self.kind == "raise":
            raise InjectedFault(f"fault point {point}, arrival {self.nth}")
        if self.kind == "enospc":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), point)
        os.kill(os.getpid(), signal.SIGKILL if self.kind == "kill" else signal.SIGSTOP)


NO_FAULTS = FaultPoints()


@contextlib.contextmanager
def writing(path: Path, *, faults: FaultPoints = NO_FAULTS, point: str = "file") -> Iterator[IO[bytes]]:
    """Open a binary file that gets its final name only when the block ends without an error.

    Fault points reached: ``<point>.written`` before the rename and ``<point>.renamed`` after it.

    Raises:
        EnvironmentFault: the file cannot be written (no space, no permission, read-only), naming the path.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{_TEMPORARY_SUFFIX}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        faults.reach(f"{point}.written")
        temporary.replace(path)
        fsync_folder(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if is_environment_error(error):
            raise EnvironmentFault(
                f"cannot write {path}: {error.strerror}; free space or choose another folder"
            ) from error
        raise
    faults.reach(f"{point}.renamed")


_ENVIRONMENT_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO})


def is_environment_error(error: BaseException) -> TypeGuard[OSError]:
    """Whether the machine refused: no space, no permission, a read-only or failing disk."""
    return isinstance(error, OSError) and error.errno in _ENVIRONMENT_ERRNOS


def write_bytes(path: Path, data: bytes, *, faults: FaultPoints = NO_FAULTS, point: str = "file") -> None:
    """Write `data` to `path` by the protocol of `writing`."""
    with writing(path, faults=faults, point=point) as file:
        file.write(data)


def fsync_folder(folder: Path) -> None:
    """Make renames and removals inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sweep_temporaries(folder: Path) -> list[Path]:
    """Remove temporary files that a killed writer left in `folder`; the caller holds the folder's lock."""
    left = sorted(folder.glob(f".*{_TEMPORARY_SUFFIX}"))
    for path in left:
        path.unlink(missing_ok=True)
    return left
