"""What is kept of tracking in a run folder: what the run is called in MLflow, how much MLflow has, who is at work.

Two files with one writer each, so that nobody waits: ``tracking.json`` by who trains, ``tracking_progress.json`` by
whoever sends and holds the sender's lock. Locks are the kernel's: they end with their holder, however it ends.
"""

import json
import logging
import math
import os
import shlex
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from ca2st.checked_json import DocumentError, encoded, read_json
from ca2st.durable import open_itself, take_lock, write_bytes
from ca2st.errors import UserInputError
from ca2st.training.journal import JOURNAL_NAME
from ca2st.training.journal import LOCK_NAME as RUN_LOCK_NAME
from ray_jobs.errors import TrackingUnavailableError

_LOGGER = logging.getLogger(__name__)
STATE_NAME = "tracking.json"
PROGRESS_NAME = "tracking_progress.json"
LOCK_NAME = "tracking.lock"
FOLLOWER_LOCK_NAME = "follower.lock"
FOLDER_TAG, COPY_TAG, HOST_TAG = "ca2st.run_dir", "ca2st.copied_from", "ca2st.host"
"""Where the run lives; of a run whose folder was copied, where that was; the machine that trains."""
_LOCAL_SERVER = "http://127.0.0.1:5000"
_LOOK_SECONDS = 0.15
_BLOCK_BYTES = 65_536


class SenderBusyError(TrackingUnavailableError):
    """Another process is sending this run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How much of a run MLflow has."""

    run_id: str | None = None
    """MLflow's run, made at the first sync."""
    experiment_id: str | None = None
    """The experiment that it is in."""
    attempt: int = 0
    """The newest whose start was sent."""
    sent_bytes: int = 0
    """Length of the journal's prefix that MLflow has."""
    last_step: int = -1
    """Highest step sent: a resumed attempt's repeated steps are not sent again."""
    last_evals: Mapping[str, int] = field(default_factory=dict)
    """The same of evaluations, by split."""
    params: Mapping[str, str] = field(default_factory=dict)
    """Settings as MLflow has them: it takes a param once."""
    system_bytes: Mapping[str, int] = field(default_factory=dict)
    """Length sent of each node's file of system metrics."""
    pending: tuple[str, ...] = ()
    """Names of the extras (inputs, artefacts, registered model) whose time has come and that MLflow lacks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackingState:
    """What a run is called in MLflow, and how much of it MLflow has."""

    uri: str
    """MLflow tracking URI without credentials: ``sqlite:///path`` or a server's address."""
    experiment: str
    run_name: str
    params: Mapping[str, str]
    """Settings of the newest attempt."""
    tags: Mapping[str, str]
    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    """A tag of the run in MLflow, by which it is found when the answer to its making was lost."""
    progress: Progress = Progress()

    @property
    def run_id(self) -> str | None:
        """MLflow's run; None before the first sync."""
        return self.progress.run_id


def sync_command(run_dir: Path) -> str:
    """Return the command that sends the rest of a run to MLflow, ready for a shell."""
    return shlex.join(["ca2st", "track", "sync", str(run_dir)])


def link_of(state: TrackingState) -> str | None:
    """Return the page of the run's experiment, shown as model training; None before the first sync.

    A browser that MLflow 3 has not met shows every experiment as one of GenAI, without its runs: neither a tag of the
    experiment nor a setting of the server decides it, only the link. An SQLite store has no server: the link is that of
    ``mlflow ui``.
    """
    if state.progress.experiment_id is None:
        return None
    server = state.uri.rstrip("/") if state.uri.startswith(("http://", "https://")) else _LOCAL_SERVER
    return f"{server}/#/experiments/{state.progress.experiment_id}/runs?workflowType=machine_learning"


def open_tracking(run_dir: Path, state: TrackingState) -> TrackingState:
    """Keep `state` beside the journal; of a run that is resumed the names stay, settings and tags are the new ones."""
    kept = None
    try:
        if (run_dir / STATE_NAME).exists():
            separate_copy(run_dir)
            kept = read_state(run_dir)
    except DocumentError as error:
        _LOGGER.warning("DAMAGED %s; it is written anew, and MLflow may get a new run", error)
    if kept is not None:
        state = replace(kept, uri=state.uri, params=state.params, tags={**kept.tags, **state.tags})
    _write(run_dir / STATE_NAME, state)
    return state


def separate_copy(run_dir: Path) -> Path | None:
    """Give a run folder that was copied a run of its own in MLflow, which gets the journal from its start.

    A copy is known by the folder that its run lives in, while that is there and still has the same run; a folder that
    was moved keeps its run.

    Returns:
        The folder it was copied from; None where it is no copy.
    """
    kept = read_state(run_dir)
    origin = Path(kept.tags.get(FOLDER_TAG, run_dir))
    try:
        is_copy = not origin.samefile(run_dir) and read_state(origin).key == kept.key
    except (OSError, UserInputError, DocumentError):  # moved, or of another machine
        return None
    if not is_copy:
        return None
    write_progress(run_dir, Progress())  # before the new key: killed in between it is still seen to be a copy
    tags = {**kept.tags, FOLDER_TAG: str(run_dir.resolve()), COPY_TAG: str(origin)}
    _write(run_dir / STATE_NAME, replace(kept, key=uuid.uuid4().hex, tags=tags))
    return origin


def read_state(run_dir: Path) -> TrackingState:
    """Return the tracking state of a run folder.

    Raises:
        UserInputError: the folder has none: no training with tracking was started there.
        DocumentError: it is not what was written; the next start in the folder writes it anew.
    """
    path = run_dir / STATE_NAME
    if run_dir.exists() and not run_dir.is_dir():
        raise UserInputError(f"{run_dir}: expected the folder of a training run, found a file")
    progress = _read_progress(run_dir)
    try:
        return replace(read_json(path, TrackingState), progress=progress)
    except FileNotFoundError:
        raise UserInputError(f"{path}: no such file; expected the folder of a training run") from None
    except DocumentError as error:
        raise DocumentError(f"{error}; rerun the training's command, which writes the file anew") from error


def write_progress(run_dir: Path, progress: Progress) -> None:
    """Keep what MLflow has; the caller holds the sender's lock."""
    _write(run_dir / PROGRESS_NAME, progress)


def unsent_bytes(run_dir: Path) -> int:
    """Return the length of the journal's whole lines that MLflow does not have; 0 while there is no journal.

    A torn last line, left by a killed writer, is none of them: nobody sends it, and the next start cuts it off.
    """
    journal = run_dir / JOURNAL_NAME
    if not journal.exists():
        return 0
    sent = _read_progress(run_dir).sent_bytes
    with journal.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end > sent:
            begin = max(sent, end - _BLOCK_BYTES)
            file.seek(begin)
            newline = file.read(end - begin).rfind(b"\n")
            if newline >= 0:
                return begin + newline + 1 - sent
            end = begin
    return 0


@contextmanager
def one_sender(run_dir: Path, *, wait_seconds: float) -> Iterator[None]:
    """Hold the sender's lock of a run: two at once would make two MLflow runs.

    The follower of a killed attempt outlives it by a last sync.

    Raises:
        SenderBusyError: another process still holds it after `wait_seconds`.
        UserInputError: no training with tracking was started there.
    """
    read_state(run_dir)
    with open_itself(run_dir / LOCK_NAME, "ab") as file:
        if not take_lock(file, wait_seconds=wait_seconds):
            raise SenderBusyError(
                f"{run_dir}: another process is sending this run to MLflow; wait for it and run "
                f"`{sync_command(run_dir)}` again"
            )
        yield


@contextmanager
def alive(run_dir: Path) -> Iterator[None]:
    """Show that a follower of this run lives; several may."""
    with open_itself(run_dir / FOLLOWER_LOCK_NAME, "ab") as file:
        take_lock(file, shared=True, wait_seconds=math.inf)
        yield


def show_ready(run_dir: Path) -> None:
    """Write this follower's process number into its lock file: from now on it waits for the store alone."""
    (run_dir / FOLLOWER_LOCK_NAME).write_text(str(os.getpid()))


def is_ready(run_dir: Path, pid: int) -> bool:
    """Return whether the follower with this process number has called `show_ready`."""
    path = run_dir / FOLLOWER_LOCK_NAME
    return path.exists() and path.read_text() == str(pid)


def is_alive(run_dir: Path) -> bool:
    """Return whether somebody on this machine trains or follows the run of this folder.

    Looking takes a lock for an instant. A training that begins just then tries again for seconds, and who looks at the
    same time, for as long as it takes here; a holder keeps its lock for as long as it lives.
    """
    for name, shared in ((RUN_LOCK_NAME, True), (FOLLOWER_LOCK_NAME, False)):
        # NFS gives an exclusive lock only on a file that is open for writing.
        with suppress(FileNotFoundError), (run_dir / name).open("rb+") as file:
            if not take_lock(file, shared=shared, wait_seconds=_LOOK_SECONDS):
                return True
    return False


def _read_progress(run_dir: Path) -> Progress:
    """Return how far it is; of a damaged file nothing, since what is sent twice MLflow keeps once."""
    path = run_dir / PROGRESS_NAME
    try:
        return read_json(path, Progress)
    except FileNotFoundError:
        return Progress()
    except DocumentError as error:
        _LOGGER.warning("DAMAGED %s; it is set aside, and all of the journal is sent to MLflow again", error)
        with suppress(OSError):
            path.replace(path.with_name(f"{PROGRESS_NAME}.damaged"))
        return Progress()


def _write(path: Path, kept: TrackingState | Progress) -> None:
    document = {name: value for name, value in asdict(kept).items() if name != "progress"}  # a file of its own
    write_bytes(path, encoded(json.dumps(document, indent=1, ensure_ascii=False) + "\n"), point="tracking")
