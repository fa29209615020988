"""The run's journal: append-only JSON lines that hold every metric first, whatever happens to a tracker.

Events: ``start``, ``step``, ``eval``, ``checkpoint``, ``fault``, ``end``. Numbers are written by repr, so a line gives
back the exact float. A process killed in mid-line leaves a torn last line, which the next start cuts off. A run's
sequence is the last line of each step: an attempt that starts from an older checkpoint writes its steps again.

Also here: the locks of a run folder, one training at a time; and sealed documents, whose every byte is accounted for.
"""

import contextlib
import functools
import hashlib
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from ca2st.checked_json import DocumentError, canonical_json, checked, encoded, parse_json
from ca2st.durable import open_itself, take_lock
from ca2st.errors import EnvironmentFault
from ca2st.training.errors import CheckpointDamagedError, RunFolderBusyError

LOCK_NAME = "run.lock"
"""Held by the rank that writes."""
LAUNCH_LOCK_NAME = "launch.lock"
"""Held by the command that starts the ranks, for as long as it starts them again."""
_MOST_BYTES = 500


@contextlib.contextmanager
def locked(folder: Path, *, name: str = LOCK_NAME, wait_seconds: float = 5.0) -> Iterator[None]:
    """Hold one of the folder's locks; the kernel releases it when the process ends, however it ends.

    `wait_seconds` lets a killed predecessor finish dying, and whoever only looks whether the lock is held let go of it,
    before this one gives up.

    Raises:
        RunFolderBusyError: another process holds it, named by host and process id.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open_itself(folder / name, "a+b") as file:
        if not take_lock(file, wait_seconds=wait_seconds):
            file.seek(0)
            holder = file.read(_MOST_BYTES).decode(errors="replace").strip() or "another process"
            raise RunFolderBusyError(
                f"{folder}: {holder} is training in this run folder; wait for it, stop it, or choose another folder"
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        file.flush()
        yield


def sha256_of_document(document: Mapping[str, Any]) -> str:
    """Return the hash of the canonical JSON of `document`."""
    return hashlib.sha256(canonical_json(document)).hexdigest()


def sealed_json(document: Mapping[str, Any]) -> bytes:
    """Return the canonical JSON of `document` with ``self_sha256``, the hash of the rest."""
    return canonical_json({**document, "self_sha256": sha256_of_document(document)})


def open_sealed_json(data: bytes, where: str) -> dict[str, Any]:
    """Return the document inside `sealed_json` bytes, without its hash.

    Raises:
        CheckpointDamagedError: any byte differs from what was written, white space included.
    """
    try:
        document = parse_json(data, dict[str, Any], where=where)
    except DocumentError as error:
        raise CheckpointDamagedError(str(error)) from error
    claimed = document.pop("self_sha256", None)
    if claimed != sha256_of_document(document) or sealed_json(document) != data:
        raise CheckpointDamagedError(f"{where}: its bytes are not those its self_sha256 names")
    return dict(document)


def differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the fields that differ, as ``path.of.field: was -> is``, sorted by path."""
    before, after = (
        {path: json.dumps(leaf, sort_keys=True, ensure_ascii=False) for path, leaf in flatten(one).items()}
        for one in (was, now)
    )
    return [
        f"{path}: {before.get(path, '(absent)')} -> {after.get(path, '(absent)')}"
        for path in sorted(before.keys() | after.keys())
        if before.get(path) != after.get(path)
    ]


def flatten(document: Any, prefix: str = "") -> dict[str, Any]:
    """Return the leaves of a document by dotted path; list items are numbered, empty containers are leaves."""
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(document, Mapping):
        items = document.items()
    elif isinstance(document, list | tuple):
        items = enumerate(document)
    leaves: dict[str, Any] = {}
    for key, value in items:
        leaves |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return leaves or {prefix: document}


_LOGGER = logging.getLogger(__name__)
JOURNAL_NAME = "journal.jsonl"
SKIPPED_STEP = "skipped_step"
"""Kind of the fault line of a step that was left out."""
SHARE_RIGHT = {"one": "top1", "several": "exact_match"}
"""Key of the share of a step's clips that were answered right, by how many labels a clip has."""
_TAIL_BYTES = 1 << 20
"""Where the torn end is looked for: far longer than any line."""


class Journal:
    """Writer of one attempt's lines. One process writes at a time: the run folder is locked.

    Each line is handed to the kernel as it is written, so a killed process loses none; `sync` makes them survive the
    machine too. On a full disk lines wait in memory and follow once there is space.
    """

    def __init__(self, path: Path, *, attempt: int, wall_clock: Callable[[], float] = time.time) -> None:
        self.path = path
        self.attempt = attempt
        self._wall_clock = wall_clock
        self._pending = b""
        self._failure: str | None = None
        try:
            with open_itself(path, "ab") as file:
                self._descriptor = os.dup(file.fileno())
        except OSError as error:
            raise EnvironmentFault(f"cannot write {path}: {error.strerror}; choose another run folder") from error

    def write(self, event: str, **fields: Any) -> None:
        """Append one line: the event, this attempt, the time (seconds since 1970) and `fields`.

        Raises:
            ValueError: a field is NaN or infinite.
        """
        line = {"event": event, "attempt": self.attempt, "time": self._wall_clock(), **fields}
        self._pending += encoded(json.dumps(line, separators=(",", ":"), ensure_ascii=False, allow_nan=False) + "\n")
        self._flush()

    def sync(self) -> None:
        """Make every line so far survive a loss of power.

        Raises:
            EnvironmentFault: the disk is full or failing; lines that wait stay in memory.
        """
        self._flush()
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise EnvironmentFault(f"cannot write {self.path}: {error.strerror}; free space") from error
        if self._pending:
            raise EnvironmentFault(f"cannot write {self.path}: {self._failure}; free space")

    def close(self) -> None:
        """Sync and close; raises as `sync` when lines would be lost."""
        try:
            self.sync()
        finally:
            os.close(self._descriptor)

    def _flush(self) -> None:
        try:
            while self._pending:
                self._pending = self._pending[os.write(self._descriptor, self._pending) :]
        except OSError as error:  # kept in _pending: the next line tries again, sync() and close() say so
            self._failure = error.strerror


@contextlib.contextmanager
def closed_at_the_end(journal: Journal) -> Iterator[None]:
    """Close the journal after the block; lines that are lost are a failure, but hide no other one."""
    try:
        yield
    except BaseException as error:
        try:
            journal.close()
        except EnvironmentFault as lost:
            error.add_note(str(lost))
        raise
    journal.close()


def cut_torn_end(path: Path) -> int:
    """Cut what a killed writer left after the last whole line; returns the bytes cut."""
    if not path.exists():
        return 0
    with open_itself(path, "r+b") as file:
        start = max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES)
        file.seek(start)
        data = file.read()
        end = len(data)
        while end and not _is_whole_line(data, end):
            end = data.rfind(b"\n", 0, end - 1) + 1
        if end < len(data):
            file.truncate(start + end)
            os.fsync(file.fileno())
    return len(data) - end


def read_events(path: Path, *, event: str | None = None, kind: type | None = None) -> Iterator[dict[str, Any]]:
    """Yield lines of a journal in order, all or those of one event; a torn last line is left out.

    A line that is not what was written is left out too, and a warning names it: the others are as good as before.
    `kind` as for `parse_event`.
    """
    if not path.exists():
        return
    marker = None if event is None else f'"event":"{event}"'.encode()
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            if marker is None or marker in line:
                document = parse_event(line, where=f"{path}:{number}", kind=kind)
                if document is not None and (event is None or document["event"] == event):
                    yield document


def parse_event(line: bytes, *, where: str, kind: type | None = None) -> dict[str, Any] | None:
    """Read one line of a journal; None, and a warning with `where`, for one that is not what was written.

    `kind`: a TypedDict of another file's lines; None: the journal's.
    """
    try:
        document = parse_json(line, dict[str, Any], where=where)
        checked(document, kind or _LINES.get(str(document.get("event")), _Line), where=where)
    except DocumentError as error:
        _warn_once(f"{error}; the line is left out, every other one counts")
        return None
    return document


class _Line(TypedDict):
    event: str
    attempt: int
    time: float


class _AtStep(_Line):
    step: int


class _StepLine(_AtStep):
    top1: NotRequired[float]
    exact_match: NotRequired[float]


class _EvalLine(_AtStep):
    split: str
    metrics: dict[str, float | None]


class _FaultLine(_AtStep):
    kind: str


class _EndLine(_Line):
    status: str


_LINES: dict[str, type] = {
    "start": _AtStep,
    "step": _StepLine,
    "eval": _EvalLine,
    "fault": _FaultLine,
    "end": _EndLine,
}


@functools.cache
def _warn_once(text: str) -> None:
    """The journal is read several times at a start."""
    _LOGGER.warning("DAMAGED JOURNAL %s", text)


def run_sequence(path: Path) -> list[dict[str, Any]]:
    """Return the run's steps in order: the last line of each."""
    last = {line["step"]: line for line in read_events(path, event="step")}
    return [last[step] for step in sorted(last)]


def share_right(line: Mapping[str, Any]) -> float:
    """Return the share of clips that the step of `line` answered right; 0 where that is not known."""
    return float(next((line[key] for key in SHARE_RIGHT.values() if key in line), 0.0))


def skipped_steps(path: Path, *, until: int) -> list[int]:
    """Return the steps up to `until` that the run left out for numbers that were not finite, in order.

    A later attempt that started before such a step has made it again, and says itself what came of it.
    """
    starts = [(line["attempt"], line["step"]) for line in read_events(path, event="start")]
    skips = [line for line in read_events(path, event="fault") if line["kind"] == SKIPPED_STEP]
    return sorted(
        line["step"]
        for line in skips
        if line["step"] <= until
        and all(line["step"] <= begun for attempt, begun in starts if attempt > line["attempt"])
    )


def last_attempt(path: Path) -> int:
    """Return the number of the newest attempt in the journal; 0 when there is none."""
    return max((line["attempt"] for line in read_events(path, event="start")), default=0)


def _is_whole_line(data: bytes, end: int) -> bool:
    if data[end - 1 : end] != b"\n":
        return False
    try:
        return isinstance(json.loads(data[data.rfind(b"\n", 0, end - 1) + 1 : end]), dict)
    except ValueError:
        return False
