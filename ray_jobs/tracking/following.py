"""MLflow follows a training by a process of its own: ``python -m ray_jobs.tracking.following RUN_DIR PARENT_PID``.

Training never waits for it and does not notice when it is killed. Here are both ends: the training starts and ends its
follower (`followed`); the follower sends again and again (`follow`), and ends in MLflow what was killed before
(`end_orphans`).
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

import psutil  # type: ignore[import-untyped]  # it ships no stubs

from ca2st.durable import open_itself
from ca2st.errors import CA2STError, UserInputError
from ca2st.training.journal import JOURNAL_NAME, flatten
from ray_jobs import console, environment
from ray_jobs.errors import TrackingUnavailableError
from ray_jobs.redaction import RedactedStream, redacted, redacted_values, without_credentials
from ray_jobs.tracking import client, state
from ray_jobs.tracking.client import Say
from ray_jobs.tracking.inputs import keep_inputs
from ray_jobs.tracking.sender import EXIT_TAG, Sender

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

    from ray_jobs.config.recipe import Recipe
    from ray_jobs.runs.data import TrainingData

_SILENT_SECONDS = 10.0
_WORKING_SECONDS = 60.0
_POLL_SECONDS = 0.1
_TELL_SECONDS = 1.0
_LAST_WAIT_SECONDS = 5.0
"""At the end, for a follower of an earlier attempt to be done."""
_NICENESS = 10
"""The processors are the training's."""
_MOST_ORPHANS = 200


@contextmanager
def followed(recipe: "Recipe", run_dir: Path, data: "TrainingData") -> Iterator[None]:
    """Have a process of its own send the journal to MLflow while the block runs."""
    kept = state.open_tracking(run_dir, _tracking_state(recipe, run_dir, data))
    if kept.run_id is None and (origin := kept.tags.get(state.COPY_TAG)) is not None:
        console.say(f"{run_dir} was copied from {origin}: in MLflow it is a run of its own")
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


def _tracking_state(recipe: "Recipe", run_dir: Path, data: "TrainingData") -> state.TrackingState:
    from ray_jobs.config.recipe import recipe_document

    tracking, code, jobs = recipe.tracking, environment.code_state(), environment.ray_job()
    tags = {
        **tracking.tags,
        state.FOLDER_TAG: str(run_dir.resolve()),
        state.HOST_TAG: socket.gethostname(),
        "ca2st.name": recipe.name,
        "ca2st.command": environment.command_line(),
        "mlflow.source.name": environment.started_as(),
        "mlflow.source.type": "JOB" if "ray.submission_id" in jobs else "LOCAL",
        **jobs,
        **code,
        **{f"version.{name}": version for name, version in environment.versions().items()},
        **environment.hardware(),
        **{f"data.{role}.fingerprint": fingerprint for role, fingerprint in data.fingerprints.items()},
        **{f"data.{role}.dataset": name for role, name in data.datasets.items()},
    }
    shown = {
        "mlflow.source.git.commit": code.get("git.commit"),
        "mlflow.user": environment.user_name(),
        "mlflow.note.content": tracking.note,
    }
    settings = flatten(recipe_document(recipe))
    return state.TrackingState(
        uri=without_credentials(client.anchored(tracking.uri or environment.default_tracking_uri(run_dir.parent))),
        experiment=tracking.experiment,
        run_name=tracking.run_name or run_dir.resolve().name,
        params=redacted_values({name: str(value) for name, value in settings.items() if value is not None}),
        tags=redacted_values(tags | {name: value for name, value in shown.items() if value}),
    )


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


def _tell_link(run_dir: Path, is_over: threading.Event) -> None:
    """Say where the run can be watched, once MLflow has it."""
    while not is_over.wait(_TELL_SECONDS):
        with suppress(CA2STError, OSError):
            kept = state.read_state(run_dir)
            if (link := state.link_of(kept)) is not None:
                console.say(f"MLflow: {link}{how_to_serve(kept.uri)}")
                return


def how_to_serve(uri: str) -> str:
    """Return what to start first where the store is a file; nothing where a server has it."""
    return "" if client.sqlite_path(uri) is None else f" (after `mlflow ui --backend-store-uri {shlex.quote(uri)}`)"


def finish_following(run_dir: Path, follower: "subprocess.Popen[bytes]") -> None:
    """Let the follower send the rest for as long as the store answers; what is left waits for ``ca2st track sync``."""
    follower.terminate()
    begin, (patience, before) = time.monotonic(), at_work(run_dir, follower.pid)
    while follower.poll() is None and time.monotonic() - begin < patience:
        time.sleep(_POLL_SECONDS)
        patience, now = at_work(run_dir, follower.pid)
        if now != before:
            begin, before = time.monotonic(), now
    if follower.poll() is None:
        follower.kill()
        follower.wait()
    unsent = state.unsent_bytes(run_dir)
    lacking = [*([f"{unsent} bytes of the journal"] if unsent else []), *state.read_state(run_dir).progress.pending]
    if lacking:
        command = state.sync_command(run_dir)
        console.say(f"warning: MLflow lacks {', '.join(lacking)} of this run; send it by `{command}`")


def at_work(run_dir: Path, follower_pid: int) -> tuple[float, tuple[object, ...]]:
    """Return how many seconds the follower may show no sign of work at the end of a training, and these signs.

    Importing MLflow on a busy machine, making tables and sending files may take long; a store that does not answer gets
    ten seconds. The signs differ once the follower is ready, the store took something, or its tables are made; until it
    is ready its processor time counts as well, since its low priority may make the import take minutes. They are only
    compared: the times of files are those of their server, whose clock may be another.
    """
    is_ready = state.is_ready(run_dir, follower_pid)
    makes_tables = client.is_making_tables(state.read_state(run_dir).uri)
    may_take_long = not is_ready or makes_tables or state.unsent_bytes(run_dir) == 0
    files = [run_dir / name for name in (state.PROGRESS_NAME, state.FOLLOWER_LOCK_NAME)]
    times = (path.stat().st_mtime_ns if path.exists() else None for path in files)
    computed = None
    if not is_ready:
        with suppress(psutil.Error):  # it has just ended
            computed = sum(psutil.Process(follower_pid).cpu_times()[:2])
    return _WORKING_SECONDS if may_take_long else _SILENT_SECONDS, (computed, makes_tables, *times)


def follow(run_dir: Path, *, parent_pid: int, say: Say, interval_seconds: float = 2.0) -> None:
    """Send again and again until SIGTERM asks for the last time, or the process that trains is gone."""
    asked_to_end = threading.Event()
    signal.signal(signal.SIGTERM, lambda _number, _frame: asked_to_end.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # who started this process held it back
    sender, troubles = Sender(run_dir, say), client.TroubleLog(say=say)
    pause, is_first = interval_seconds, True
    while True:
        is_last = _wait(asked_to_end, parent_pid, pause, interval_seconds)
        try:
            with suppress(state.SenderBusyError):  # the follower of an earlier attempt does it for us
                sender.send(wait_seconds=_LAST_WAIT_SECONDS if is_last else 0.0, is_last=is_last)
            troubles.succeeded()
            pause = interval_seconds
            if is_first and not is_last and state.read_state(run_dir).run_id is not None:
                is_first = False
                with suppress(TrackingUnavailableError):  # the next follower finds them too
                    end_orphans(run_dir, host=socket.gethostname(), say=say, is_asked_to_end=asked_to_end.is_set)
        except Exception as error:  # noqa: BLE001  # a full disk or an unexpected answer may pass meanwhile
            trouble = _trouble(error)
            troubles.failed(trouble)
            pause = client.pause_seconds(troubles.failures, trouble.complaint, interval_seconds=interval_seconds)
        if is_last:
            troubles.say_repeats()
            return


def _wait(asked_to_end: threading.Event, parent_pid: int, pause: float, interval_seconds: float) -> bool:
    """Wait `pause` seconds; True, at once, when it is time for the last send."""
    end = time.monotonic() + pause
    while (left := end - time.monotonic()) > 0:
        if asked_to_end.wait(min(left, interval_seconds)) or os.getppid() != parent_pid:
            return True
    return False


def _trouble(error: Exception) -> client.StoreError:
    """Return what is to be said of `error`; of one that nobody expected the whole traceback."""
    if isinstance(error, client.StoreError):
        return error
    if isinstance(error, CA2STError):
        return client.StoreError(str(error), client.complaint_of_error(error))
    words = redacted("".join(traceback.format_exception(error)).rstrip())
    return client.StoreError(words, client.Complaint(kind="failing", detail=words.splitlines()[-1]))


def end_orphans(
    run_dir: Path, *, host: str, say: Say, is_asked_to_end: Callable[[], bool] = lambda: False
) -> list[str]:
    """Send the rest of each orphan in the experiment of `run_dir`'s run and end it as KILLED; returns their ids.

    Orphans are runs that MLflow believes to be running although everything that trained them was killed. Only a run of
    this machine is touched, whose folder is here and belongs to that very run, and in whose folder neither a training
    nor a follower holds its lock. When such a run is resumed it is RUNNING again, in the same MLflow run.

    Once `is_asked_to_end` is true the others, and the one in work, are left for the next start.

    Raises:
        TrackingUnavailableError: the store cannot be reached.
    """
    own = state.read_state(run_dir)
    if own.run_id is None:
        return []
    with client.connected(client.whole_uri(own.uri, run_dir.parent), "start a run") as store:
        experiment_id = store.get_run(own.run_id).info.experiment_id
        running = f"attributes.status = 'RUNNING' and tags.`{state.HOST_TAG}` = '{host}'"
        found = store.search_runs([experiment_id], running, max_results=_MOST_ORPHANS)
        others = [run for run in found if run.info.run_id != own.run_id]
        return [run.info.run_id for run in others if not is_asked_to_end() and _end(store, run, say, is_asked_to_end)]


def _end(store: "MlflowClient", run: "Run", say: Say, is_asked_to_end: Callable[[], bool]) -> bool:
    run_id, folder = run.info.run_id, Path(run.data.tags.get(state.FOLDER_TAG, ""))
    try:
        if not folder.is_absolute() or state.read_state(folder).run_id != run_id or state.is_alive(folder):
            return False
        with suppress(TrackingUnavailableError):  # what cannot be sent stays in its journal
            Sender(folder, say, is_asked_to_end=is_asked_to_end).send()
        if is_asked_to_end():  # a part may be missing still
            return False
        with state.one_sender(folder, wait_seconds=0.0):
            if state.is_alive(folder) or store.get_run(run_id).info.status != "RUNNING":
                return False
            store.set_tag(run_id, EXIT_TAG, "killed")
            journal = folder / JOURNAL_NAME
            last_line = int(journal.stat().st_mtime * 1000) if journal.exists() else None
            store.set_terminated(run_id, status="KILLED", end_time=last_line)
    except (UserInputError, TrackingUnavailableError):  # no folder of ours here, or somebody is sending it
        return False
    except (CA2STError, OSError, ValueError, TypeError, KeyError) as error:  # of another version or user, damaged
        say(f"run {run_id} of {folder} seems to be killed, but is left as it is: {type(error).__name__}: {error}")
        return False
    say(f"run {run_id} of {folder} was killed without an end: it is KILLED in MLflow now, until it is resumed")
    return True


def _log_line(text: str) -> None:
    """Write a line into the follower's log."""
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    print(f"{stamp} {text}", flush=True)  # noqa: T201  # its standard output is its own log file


if __name__ == "__main__":
    sys.stdout = sys.stderr = RedactedStream(sys.stderr)  # both are the log file
    os.nice(_NICENESS)
    folder = Path(sys.argv[1])
    with state.alive(folder):
        import mlflow  # noqa: F401  # takes seconds

        state.show_ready(folder)
        follow(folder, parent_pid=int(sys.argv[2]), say=_log_line)
