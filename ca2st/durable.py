"""The one write protocol of the project, and the fault points that prove it.

Temporary name in the same folder that nobody can foresee and that must be new, flush, fsync, rename, fsync of the
folder: after a crash a file is either complete under its final name or not there, and no symbolic link is written
through. Sets of files (shards, checkpoints) are written in any order with their marker (manifest, COMPLETE.json) last.

Standard library only: `sharding` and `pipelines` use it too.
"""

import contextlib
import errno
import fcntl
import math
import os
import secrets
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal, TypeGuard, get_args

from ca2st.errors import EnvironmentFault, UserInputError

FaultKind = Literal["kill", "raise", "stop", "enospc"]
_TEMPORARY_SUFFIX = ".tmp"
_LOCK_POLL_SECONDS = 0.05
_NAME_CHARACTERS = 50  # of the final name in a temporary one, which must not be longer than 255 bytes


class InjectedFault(RuntimeError):  # noqa: N818  # what it is, not an error of ours
    """Raised by a fault point of kind ``raise``: a replacement for a bug at that place."""


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
        if len(parts) not in (2, 3, 4) or not nth.isdecimal() or kind not in known or not (rank or "0").isdecimal():
            raise UserInputError(
                f"CA2ST_FAULT: expected point:nth[:kind[:rank]] with kind one of {', '.join(known)}, found {text!r}"
            )
        return cls(point=point, nth=int(nth), kind=kind, rank=int(rank) if rank else None)  # type: ignore[arg-type]  # checked above

    def on_rank(self, rank: int) -> "FaultPoints":
        """Return these points for the process of `rank`: inert where they are another's."""
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
        UserInputError: a folder has that name, or a file that of its folder.
        FileNotFoundError: there is no such folder.
    """
    temporary = path.with_name(f".{path.name[:_NAME_CHARACTERS]}.{secrets.token_hex(8)}{_TEMPORARY_SUFFIX}")
    opened = False
    try:
        with temporary.open("xb") as file:  # x: it must be new, so no link of another's is followed
            opened = True
            yield file
            file.flush()
            os.fsync(file.fileno())
        faults.reach(f"{point}.written")
        temporary.replace(path)
        fsync_folder(path.parent)
    except BaseException as error:
        if opened:
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and (named := _named(error, path, temporary)) is not error:
            raise named from error
        raise
    faults.reach(f"{point}.renamed")


_ENVIRONMENT_ERRNOS = {
    errno.ENOSPC: "free space there, or choose another folder",
    errno.EDQUOT: "free space within the quota, or choose another folder",
    errno.EFBIG: "raise the limit for the size of a file (ulimit -f), or choose another folder",
    errno.EROFS: "make its file system writable, or choose another folder",
    errno.EACCES: "give this user the right to write into its folder, or choose another folder",
    errno.EPERM: "give this user the right to write into its folder, or choose another folder",
    errno.EIO: "check the disk, or choose another folder",
    errno.EMFILE: "raise the limit for open files (ulimit -n)",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "remove the symbolic link, which is not followed, or choose another folder",
}
"""What the machine refuses, and what is needed then."""


def is_environment_error(error: BaseException) -> TypeGuard[OSError]:
    """Return whether the machine refused: no space, no permission, a read-only or failing disk."""
    return isinstance(error, OSError) and error.errno in _ENVIRONMENT_ERRNOS


def what_is_needed(error: OSError) -> str:
    """Return what a user can do about what the machine refused."""
    return _ENVIRONMENT_ERRNOS.get(error.errno or 0, "choose another folder")


def unwritable(path: Path, error: OSError) -> EnvironmentFault:
    """Return the fault to raise where the machine refuses to write `path`: what, why, and what is needed."""
    found = error.strerror
    if error.errno == errno.ENOSPC:
        with contextlib.suppress(OSError):
            disk = os.statvfs(path.parent)
            found = f"{found} ({disk.f_bavail * disk.f_frsize} bytes are free there)"
    return EnvironmentFault(f"cannot write {path}: {found}; {what_is_needed(error)}")


def _named(error: OSError, path: Path, temporary: Path) -> Exception:
    """Return the error of a write as one that names the file, and not its temporary name."""
    if is_environment_error(error):
        return unwritable(path, error)
    if error.errno in (errno.EISDIR, errno.ENOTDIR) and error.filename == str(temporary):
        return UserInputError(f"cannot write {path}: {error.strerror}; choose another name")
    if error.errno == errno.ENOENT and error.filename == str(temporary):
        if path.parent.is_dir():
            return EnvironmentFault(f"cannot write {path}: no file can be made in its folder; choose another folder")
        return FileNotFoundError(error.errno, error.strerror, str(path))
    return error


def write_bytes(path: Path, data: bytes, *, faults: FaultPoints = NO_FAULTS, point: str = "file") -> None:
    """Write `data` to `path` by the protocol of `writing`."""
    with writing(path, faults=faults, point=point) as file:
        file.write(data)


def append_bytes(path: Path, data: bytes) -> None:
    """Add `data` durably to the end of a file, new or not; a kill can leave a part. Raises as `open_itself`."""
    try:
        with open_itself(path, "ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if is_environment_error(error):
            raise unwritable(path, error) from error
        raise


def open_itself(path: Path, mode: str) -> IO[bytes]:
    """Open a binary file under its final name, as a log or a lock is; never through a symbolic link.

    Raises:
        EnvironmentFault: it cannot be opened, or is a symbolic link.
    """

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)

    try:
        return open(path, mode, opener=opener)  # Path.open takes no opener
    except OSError as error:
        if is_environment_error(error):
            raise unwritable(path, error) from error
        raise


def take_lock(file: IO[bytes] | int, *, shared: bool = False, wait_seconds: float = 0.0) -> bool:
    """Take the kernel's lock (flock) on an open file; return whether it was free within `wait_seconds`.

    It is released when the file is closed or its process ends, however it ends. Not `filelock`: that truncates the file
    it opens (here locks name their holder, or are data), and has no shared locks.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    if math.isinf(wait_seconds):
        fcntl.flock(file, kind)
        return True
    deadline = time.monotonic() + wait_seconds
    while True:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
        time.sleep(min(_LOCK_POLL_SECONDS, max(0.0, deadline - time.monotonic())))


def fsync_folder(folder: Path) -> None:
    """Make renames and removals inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
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
