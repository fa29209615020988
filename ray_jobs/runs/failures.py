"""``failure.json``: the first failure of an attempt, kept in the run folder by whoever saw it.

When one rank fails the others fail after it, with errors that only say so. Whoever wants to know why a run ended, and
whether starting it again can help, reads this file: it holds the newest attempt's own error, not its echoes.
"""

import contextlib
import json
import logging
import math
import re
import resource
import shutil
import signal
from dataclasses import asdict, dataclass
from pathlib import Path

from ca2st.checked_json import DocumentError, encoded, read_json
from ca2st.durable import open_itself, take_lock, write_bytes
from ca2st.errors import CA2STError, DataDamageError, EnvironmentFault, NumericError, UserInputError
from ca2st.training.errors import OutOfMemoryFault, PeerFailedError, StopNotSavedError
from ca2st.training.ranks import KNOBS, SHARED_MEMORY
from ray_jobs.errors import WorkerFailedError
from ray_jobs.redaction import redacted


def death_of(rank: int, exit_code: int) -> WorkerFailedError:
    """Return the error for a child of this process that ended without a word: what its exit code means, what to do."""
    if exit_code == 128 + signal.SIGKILL:
        peak_bytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024  # the most that any of them held
        return WorkerFailedError(
            f"rank {rank} was killed (SIGKILL) and left no word: most likely by the kernel, for want of memory (look "
            f"with `dmesg | grep -i oom`, in a container at its memory limit); the largest worker held "
            f"{peak_bytes / 1e9:.2f} GB; {KNOBS}; rerun to resume",
            EnvironmentFault.exit_code,
        )
    if exit_code == 128 + signal.SIGBUS:
        shared_free_bytes = 0
        with contextlib.suppress(OSError):
            shared_free_bytes = shutil.disk_usage(SHARED_MEMORY).free
        return WorkerFailedError(
            f"rank {rank} ended by a bus error (SIGBUS): {SHARED_MEMORY} is full ({shared_free_bytes / 1e6:.0f} MB are "
            "free now; enlarge it, docker run --shm-size=8g), or a shard or weights file was cut short while it was "
            "read (`ca2st shard verify` tells); then rerun to resume",
            EnvironmentFault.exit_code,
        )
    if exit_code == 128 + signal.SIGABRT:
        return WorkerFailedError(
            f"rank {rank} was ended by a library (SIGABRT); on GPUs most likely by NCCL's watchdog, because another "
            "rank was silent for training.collective_timeout_seconds: the lines above name the collective and the "
            "ranks that came to it; rerun to resume",
            exit_code,
        )
    return WorkerFailedError(
        f"rank {rank} ended with exit code {exit_code}; its last lines above say more; then rerun", exit_code
    )


FAILURE_NAME = "failure.json"
_LOCK_NAME = "failure.lock"
_NOT_MENDED = (UserInputError, DataDamageError, NumericError)
_OF_A_PERSON = (signal.SIGINT, signal.SIGTERM)
_LOST_PEER = re.compile(
    r"(?is)\bgloo\b.*(connection (closed|reset) by peer|broken pipe|caused pair closure|timed out waiting)"
    r"|remote process exit|closed by remote peer|communicator was aborted|collective operation timeout"
    r"|failed to recv, got 0 bytes|connection was likely closed"
)
"""What gloo, NCCL and their store say when another rank went away; their other errors are a rank's own."""
_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class FailureRecord:
    """One failure, with everything that the one who reads of it asks."""

    kind: str
    """Name of the error's class."""
    message: str
    exit_code: int
    """What a command that ends by this failure ends with."""
    rank: int
    """-1: of no rank."""
    node: str
    """Where: host name or address."""
    attempt: int
    """Of its launch, from 1."""
    final: bool
    """True: starting again cannot help."""
    launch: str = ""
    """The launch it belongs to: a command that was run once, with all its restarts."""
    echo: bool = False
    """True: it only says that another rank failed."""
    preempted: bool = False
    """True: its node was taken away, as had been announced; counted apart from failures."""

    def __str__(self) -> str:
        where = f"rank {self.rank} on {self.node}" if self.rank >= 0 else self.node
        return f"{where}, attempt {self.attempt}: {self.kind}: {self.message}"


def is_final(error: BaseException, *, before: FailureRecord | None = None, launch: str = "") -> bool:
    """Return whether starting the run again cannot help.

    So it is with what the user gave, damaged data, numbers that are not finite, on this rank or another; with memory
    that did not suffice when `before`, on record, was the same failure of the same `launch`; and where a person asked
    to stop, though the state could not be saved.
    """
    if isinstance(error, StopNotSavedError):
        return error.signal_number in _OF_A_PERSON
    if isinstance(error, PeerFailedError):
        return error.exit_code in {kind.exit_code for kind in _NOT_MENDED}
    if isinstance(error, OutOfMemoryFault):
        return before is not None and before.kind == OutOfMemoryFault.__name__ and before.launch == launch
    return isinstance(error, _NOT_MENDED)


def is_echo(error: BaseException) -> bool:
    """Return whether `error` only says that another rank failed, or that the connection to it was cut."""
    if isinstance(error, PeerFailedError):
        return True
    return isinstance(error, RuntimeError) and _LOST_PEER.search(str(error)) is not None


def message_of(error: BaseException) -> str:
    """Return what `error` says, with the notes that were added on its way and without secrets."""
    return redacted(f"{error}{''.join(f' [{note}]' for note in getattr(error, '__notes__', ()))}")


def record_of(
    error: BaseException, *, rank: int, node: str, attempt: int, launch: str = "", before: FailureRecord | None = None
) -> FailureRecord:
    """Describe `error`, notes included; `before` is the failure that is on record already."""
    earlier = before if before is not None and before.attempt < attempt else None  # not another rank's, just now
    return FailureRecord(
        kind=type(error).__name__,
        message=message_of(error),
        exit_code=error.exit_code if isinstance(error, CA2STError) else CA2STError.exit_code,
        rank=rank,
        node=node,
        attempt=attempt,
        final=is_final(error, before=earlier, launch=launch),
        launch=launch,
        echo=is_echo(error),
    )


def first_of(kept: FailureRecord | None, new: FailureRecord) -> FailureRecord:
    """Return which to keep: of one attempt the first that is no echo, else that of the newer attempt or launch."""
    if kept is None or kept.launch != new.launch or kept.attempt < new.attempt:
        return new
    if kept.attempt == new.attempt and kept.echo and not new.echo:
        return new
    return kept


def read_failure(run_dir: Path) -> FailureRecord | None:
    """Return what is on record in `run_dir`; None: nothing, or nothing that can be read just now."""
    try:
        return read_json(run_dir / FAILURE_NAME, FailureRecord)
    except (OSError, EnvironmentFault, DocumentError):
        return None  # none yet, storage that hiccups, or a record that is damaged or of another version


def forget_failure(run_dir: Path) -> None:
    """Take what is on record away: the run has come to its end after all, and its journal keeps the faults."""
    (run_dir / FAILURE_NAME).unlink(missing_ok=True)


def keep_failure(run_dir: Path, new: FailureRecord) -> FailureRecord:
    """Put `new` on record unless an earlier one of its attempt is there; returns what is on record then.

    A folder that cannot be written (a full disk may be what failed) is only logged.
    """
    try:
        with open_itself(run_dir / _LOCK_NAME, "ab") as lock:
            take_lock(lock, wait_seconds=math.inf)
            kept = first_of(read_failure(run_dir), new)
            if kept is new:
                write_bytes(
                    run_dir / FAILURE_NAME, encoded(json.dumps(asdict(new), indent=1, ensure_ascii=False) + "\n")
                )
            return kept
    except (OSError, EnvironmentFault) as error:
        _LOGGER.warning("%s: cannot put on record that %s: %s", run_dir, new, error)
        return new


def error_of(record: FailureRecord) -> CA2STError:
    """Return the error to end a command with for a failure on record: of its kind, with its exit code."""
    return error_told(str(record), record.exit_code)


def error_told(message: str, exit_code: int) -> CA2STError:
    """Return the error to end a command with of which only this is known."""
    kinds: tuple[type[CA2STError], ...] = (UserInputError, DataDamageError, EnvironmentFault, NumericError)
    kind = next((kind for kind in kinds if kind.exit_code == exit_code), CA2STError)
    return kind(message)
