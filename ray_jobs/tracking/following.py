"""MLflow follows a training by a process of its own: ``python -m ray_jobs.tracking.following RUN_DIR PARENT_PID``.

Training never waits for it and does not notice when it is killed. Here are both ends: the training starts and ends its
follower (`followed`), the follower sends again and again (`follow`); and what a person or the program asks of a run's
record: send the rest of it, add numbers to it, read them back.
"""

import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

import psutil  # type: ignore[import-untyped]  # it ships no stubs

from ca2st.durable import open_itself
from ca2st.errors import CA2STError, UserInputError
from ca2st.training.journal import flatten
from ray_jobs import environment
from ray_jobs.console import say
from ray_jobs.errors import TrackingUnavailableError
from ray_jobs.redaction import RedactedStream, redacted, redacted_values, without_credentials
from ray_jobs.tracking.artefacts import keep_inputs
from ray_jobs.tracking.client import (
    Complaint,
    Say,
    StoreError,
    TroubleLog,
    anchored,
    complaint_of_error,
    is_making_tables,
    open_client,
    pause_seconds,
    reachable,
    sqlite_path,
    whole_uri,
)
from ray_jobs.tracking.run_record import MetricWriter, Value, clean_name
from ray_jobs.tracking.sender import Sender, end_orphans
from ray_jobs.tracking.state import (
    COPY_TAG,
    FOLDER_TAG,
    FOLLOWER_LOCK_NAME,
    HOST_TAG,
    PROGRESS_NAME,
    SenderBusyError,
    TrackingState,
    alive,
    is_ready,
    link_of,
    open_tracking,
    read_state,
    show_ready,
    sync_command,
    unsent_bytes,
)

if TYPE_CHECKING:
    from ray_jobs.config.recipe import Recipe
    from ray_jobs.runs.data import TrainingData

_SILENT_SECONDS = 10.0
_WORKING_SECONDS = 60.0
_POLL_SECONDS = 0.1
_TELL_SECONDS = 1.0
_SYNC_WAIT_SECONDS = 60.0
"""For a follower to end that is still sending the run."""
_LAST_WAIT_SECONDS = 5.0
"""At the end, for a follower of an earlier attempt to be done."""
_NICENESS = 10
"""The processors are the training's."""


@contextmanager
def followed(recipe: "Recipe", run_dir: Path, data: "TrainingData") -> Iterator[None]:
    """Have a process of its own send the journal to MLflow while the block runs."""
    state = open_tracking(run_dir, _tracking_state(recipe, run_dir, data))
    if state.run_id is None and (origin := state.tags.get(COPY_TAG)) is not None:
        say(f"{run_dir} was copied from {origin}: in MLflow it is a run of its own")
    keep_inputs(run_dir, data)
    if not recipe.tracking.enabled:  # `ca2st track sync` can send it later
        yield
        return
    with open_itself(run_dir / "follower.log", "ab") as log:
        follower = _start_follower(run_dir, log)
    is_over = threading.Event()
    threading.Thread(target=_tell_link, args=(run_dir, is_over), daemon=True).start()
    try:
        yield
    finally:
        is_over.set()
        finish_following(run_dir, follower)


def _tell_link(run_dir: Path, is_over: threading.Event) -> None:
    """Say where the run can be watched, once MLflow has it."""
    while not is_over.wait(_TELL_SECONDS):
        with suppress(CA2STError, OSError):
            state = read_state(run_dir)
            if (link := link_of(state)) is not None:
                say(f"MLflow: {link}{how_to_serve(state.uri)}")
                return


def how_to_serve(uri: str) -> str:
    """Return what to start first where the store is a file; nothing where a server has it."""
    return f" (after `mlflow ui --backend-store-uri {shlex.quote(uri)}`)" if sqlite_path(uri) is not None else ""


def finish_following(run_dir: Path, follower: "subprocess.Popen[bytes]") -> None:
    """Let the follower send the rest for as long as the store answers; what is left waits for ``ca2st track sync``."""
    follower.terminate()
    begin, before = time.monotonic(), _signs_of_work(run_dir, follower.pid)
    while follower.poll() is None and time.monotonic() - begin < _patience_seconds(run_dir, follower.pid):
        time.sleep(_POLL_SECONDS)
        if (now := _signs_of_work(run_dir, follower.pid)) != before:
            begin, before = time.monotonic(), now
    if follower.poll() is None:
        follower.kill()
        follower.wait()
    if lacking := missing_words(unsent_bytes(run_dir), read_state(run_dir).progress.pending):
        say(f"warning: MLflow lacks {lacking} of this run; send it by `{sync_command(run_dir)}`")


def patience_seconds(*, is_starting: bool, is_making_tables: bool, is_journal_sent: bool) -> float:
    """Return how long the follower may hear nothing from the store at the end of a training.

    Importing MLflow on a busy machine, making tables and sending files may take long; a store that does not answer
    gets ten seconds.
    """
    return _WORKING_SECONDS if is_starting or is_making_tables or is_journal_sent else _SILENT_SECONDS


def missing_words(num_bytes: int, extras: tuple[str, ...]) -> str:
    """Return what MLflow lacks, in words; empty when it has all."""
    return ", ".join([*([f"{num_bytes} bytes of the journal"] if num_bytes else []), *extras])


def follow(run_dir: Path, *, parent_pid: int, say: Say, interval_seconds: float = 2.0) -> None:
    """Send again and again until SIGTERM asks for the last time, or the process that trains is gone."""
    asked_to_end = threading.Event()
    signal.signal(signal.SIGTERM, lambda _number, _frame: asked_to_end.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # who started this process held it back
    sender, troubles = Sender(run_dir, say), TroubleLog(say=say)
    pause, is_first = interval_seconds, True
    while True:
        is_last = _wait(asked_to_end, parent_pid, pause, interval_seconds)
        try:
            with suppress(SenderBusyError):  # the follower of an earlier attempt does it for us
                sender.send(wait_seconds=_LAST_WAIT_SECONDS if is_last else 0.0, is_last=is_last)
            troubles.succeeded()
            pause = interval_seconds
            if is_first and not is_last and read_state(run_dir).run_id is not None:
                is_first = False
                with suppress(TrackingUnavailableError):  # the next follower finds them too
                    end_orphans(run_dir, host=socket.gethostname(), say=say, is_asked_to_end=asked_to_end.is_set)
        except Exception as error:  # noqa: BLE001  # a full disk, or an answer nobody expected, may pass in a long training
            trouble = _trouble(error)
            troubles.failed(trouble)
            pause = pause_seconds(troubles.failures, interval_seconds=interval_seconds, complaint=trouble.complaint)
        if is_last:
            troubles.close()
            return


def sync(run_dir: Path) -> int:
    """Send what MLflow does not have yet of a run's journal, system metrics and extras; all, if its run was deleted.

    Returns:
        The number of metric values sent.

    Raises:
        TrackingUnavailableError: the store cannot be reached; calling again later loses nothing.
        UserInputError: the folder is none of a training run.
    """
    return Sender(run_dir, say).send(wait_seconds=_SYNC_WAIT_SECONDS, look=True)


def log_metrics(run_dir: Path, metrics: Mapping[str, float], *, step: int) -> None:
    """Add numbers that no journal holds, such as those of a test after the training, to the run's record.

    Their names are cleaned and those that are not finite become tags, as of the journal's numbers. The artefacts are
    sent again: the test has left its predictions.

    Raises:
        TrackingUnavailableError: the store cannot be reached.
    """
    sync(run_dir)
    state = read_state(run_dir)
    assert state.run_id is not None  # sync made it: a training that can be tested has a journal
    uri, now = whole_uri(state.uri, run_dir.parent), int(time.time() * 1000)
    values = [Value(name, value, now, step) for name, value in metrics.items()]
    with reachable(uri, f"repeat the test of {run_dir}"):
        MetricWriter(say).write(open_client(uri), state.run_id, values)
    Sender(run_dir, say).send_again(("artefacts",), wait_seconds=_SYNC_WAIT_SECONDS)


def read_metrics(run_dir: Path, names: Sequence[str]) -> dict[str, float]:
    """Return the run's newest values in MLflow, by the names that `log_metrics` was given.

    Raises:
        TrackingUnavailableError: the store cannot be reached.
        UserInputError: the run has no such metric, or was never sent.
    """
    state = read_state(run_dir)
    if state.run_id is None:
        raise UserInputError(f"{run_dir}: MLflow has no run of it yet; send it by `{sync_command(run_dir)}`")
    uri = whole_uri(state.uri, run_dir.parent)
    with reachable(uri, f"send the run by `{sync_command(run_dir)}`"):
        known = open_client(uri).get_run(state.run_id).data.metrics
    if missing := sorted(name for name in names if clean_name(name) not in known):
        raise UserInputError(f"{run_dir}: MLflow has no {', '.join(missing)} for this run; test it again")
    return {name: known[clean_name(name)] for name in names}


def _start_follower(run_dir: Path, log: IO[bytes]) -> "subprocess.Popen[bytes]":
    """Start it with SIGTERM held back until it listens: a training may be over before MLflow is imported."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        return subprocess.Popen(
            # -P: no folder of the working directory is taken for a package of ours or of MLflow's.
            [sys.executable, "-P", "-m", "ray_jobs.tracking.following", str(run_dir.resolve()), str(os.getpid())],
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _patience_seconds(run_dir: Path, follower_pid: int) -> float:
    return patience_seconds(
        is_starting=not is_ready(run_dir, follower_pid),
        is_making_tables=is_making_tables(read_state(run_dir).uri),
        is_journal_sent=unsent_bytes(run_dir) == 0,
    )


def _signs_of_work(run_dir: Path, follower_pid: int) -> tuple[object, ...]:
    """Return what differs once the follower is ready, the store took something, or its tables are made.

    Until it is ready, its processor time counts as well.

    On a busy machine its low priority may make the import of MLflow take minutes. The values are only compared: the
    times of files are those of their server, whose clock may be another.
    """
    files = [run_dir / name for name in (PROGRESS_NAME, FOLLOWER_LOCK_NAME)]
    times = (path.stat().st_mtime_ns if path.exists() else None for path in files)
    computed = None
    if not is_ready(run_dir, follower_pid):
        with suppress(psutil.Error):  # it has just ended
            computed = sum(psutil.Process(follower_pid).cpu_times()[:2])
    return (computed, is_making_tables(read_state(run_dir).uri), *times)


def _tracking_state(recipe: "Recipe", run_dir: Path, data: "TrainingData") -> TrackingState:
    from ray_jobs.config.recipe import recipe_document

    tracking, code, jobs = recipe.tracking, environment.code_state(), environment.ray_job()
    tags = {**tracking.tags, FOLDER_TAG: str(run_dir.resolve()), HOST_TAG: socket.gethostname()}
    tags |= {"ca2st.name": recipe.name, "mlflow.source.name": environment.started_as()}
    tags |= {"ca2st.command": environment.command_line()}
    tags |= {"mlflow.source.type": "JOB" if "ray.submission_id" in jobs else "LOCAL", **jobs, **code}
    tags |= {"mlflow.source.git.commit": code["git.commit"]} if "git.commit" in code else {}
    tags |= {"mlflow.user": user} if (user := environment.user_name()) else {}
    tags |= {"mlflow.note.content": tracking.note} if tracking.note else {}
    tags |= {f"version.{name}": version for name, version in environment.versions().items()}
    tags |= environment.hardware()
    tags |= {f"data.{role}.fingerprint": fingerprint for role, fingerprint in data.fingerprints.items()}
    tags |= {f"data.{role}.dataset": name for role, name in data.datasets.items()}
    settings = flatten(recipe_document(recipe))
    return TrackingState(
        uri=without_credentials(anchored(tracking.uri or environment.default_tracking_uri(run_dir.parent))),
        experiment=tracking.experiment,
        run_name=tracking.run_name or run_dir.resolve().name,
        params=redacted_values({name: str(value) for name, value in settings.items() if value is not None}),
        tags=redacted_values(tags),
    )


def _trouble(error: Exception) -> StoreError:
    """Return what is to be said of `error`; of one that nobody expected the whole traceback."""
    if isinstance(error, StoreError):
        return error
    if isinstance(error, CA2STError):
        return StoreError(str(error), complaint_of_error(error))
    words = redacted("".join(traceback.format_exception(error)).rstrip())
    return StoreError(words, Complaint(kind="failing", detail=words.splitlines()[-1]))


def _wait(asked_to_end: threading.Event, parent_pid: int, pause: float, interval_seconds: float) -> bool:
    """Wait `pause` seconds; True, at once, when it is time for the last send."""
    end = time.monotonic() + pause
    while (left := end - time.monotonic()) > 0:
        if asked_to_end.wait(min(left, interval_seconds)) or os.getppid() != parent_pid:
            return True
    return False


def _log_line(text: str) -> None:
    """Write a line into the follower's log."""
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    print(f"{stamp} {text}", flush=True)  # noqa: T201  # its standard output is its own log file


if __name__ == "__main__":
    sys.stdout = sys.stderr = RedactedStream(sys.stderr)  # both are the log file
    os.nice(_NICENESS)
    folder = Path(sys.argv[1])
    with alive(folder):
        import mlflow  # noqa: F401  # takes seconds

        show_ready(folder)
        follow(folder, parent_pid=int(sys.argv[2]), say=_log_line)
