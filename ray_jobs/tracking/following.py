"""A follower of its own process.

A process of its own follows a training while it lasts, and is told what the run is called.

What a person or the program asks of a run's record: send the rest of it, add numbers to it, read them back.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import psutil  # type: ignore[import-untyped]  # it ships no stubs

from ca2st.durable import open_itself
from ca2st.errors import UserInputError
from ca2st.training.journal import flatten
from ray_jobs import environment
from ray_jobs.config.recipe import Recipe, recipe_document
from ray_jobs.console import say
from ray_jobs.redaction import redacted_values, without_credentials
from ray_jobs.runs.data import TrainingData
from ray_jobs.tracking.client import anchored, clean_name, is_making_tables, open_client, reachable, whole_uri
from ray_jobs.tracking.events import (
    COPY_TAG,
    FOLDER_TAG,
    PROGRESS_NAME,
    TrackingState,
    Value,
    open_tracking,
    read_state,
    unsent_bytes,
)
from ray_jobs.tracking.inputs import keep_inputs
from ray_jobs.tracking.orphans import FOLLOWER_LOCK_NAME, HOST_TAG, is_ready
from ray_jobs.tracking.run_record import MetricWriter
from ray_jobs.tracking.sender import Sender

_SILENT_SECONDS = 10.0
_WORKING_SECONDS = 60.0
_POLL_SECONDS = 0.1


@contextmanager
def followed(recipe: Recipe, run_dir: Path, data: TrainingData) -> Iterator[None]:
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
    try:
        yield
    finally:
        finish_following(run_dir, follower)


def _start_follower(run_dir: Path, log: IO[bytes]) -> "subprocess.Popen[bytes]":
    """Start it with SIGTERM held back until it listens: a training may be over before MLflow is imported."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        return subprocess.Popen(
            # -P: no folder of the working directory is taken for a package of ours or of MLflow's.
            [sys.executable, "-P", "-m", "ray_jobs.tracking.follower", str(run_dir.resolve()), str(os.getpid())],
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


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
        say(f"warning: MLflow lacks {lacking} of this run; send it by `ca2st track sync {run_dir}`")


def patience_seconds(*, is_starting: bool, is_making_tables: bool, is_journal_sent: bool) -> float:
    """How long the follower may be without a word from the store at the end of a training.

    Importing MLflow on a busy machine, making tables and sending files may take long; a store that does not answer
    gets ten seconds.
    """
    return _WORKING_SECONDS if is_starting or is_making_tables or is_journal_sent else _SILENT_SECONDS


def missing_words(num_bytes: int, extras: tuple[str, ...]) -> str:
    """What MLflow lacks, in words; empty when it has all."""
    return ", ".join([*([f"{num_bytes} bytes of the journal"] if num_bytes else []), *extras])


def _patience_seconds(run_dir: Path, follower_pid: int) -> float:
    return patience_seconds(
        is_starting=not is_ready(run_dir, follower_pid),
        is_making_tables=is_making_tables(read_state(run_dir).uri),
        is_journal_sent=unsent_bytes(run_dir) == 0,
    )


def _signs_of_work(run_dir: Path, follower_pid: int) -> tuple[object, ...]:
    """Differs once the follower is ready, the store took something, or its tables are made; before, while it computes.

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


def _tracking_state(recipe: Recipe, run_dir: Path, data: TrainingData) -> TrackingState:
    tags = {FOLDER_TAG: str(run_dir.resolve()), HOST_TAG: socket.gethostname(), "ca2st.name": recipe.name}
    tags |= environment.git_state(Path.cwd())
    tags |= {f"version.{name}": version for name, version in environment.versions().items()}
    tags |= environment.hardware()
    tags |= {f"data.{role}.fingerprint": fingerprint for role, fingerprint in data.fingerprints.items()}
    tags |= {f"data.{role}.dataset": name for role, name in data.datasets.items()}
    settings = flatten(recipe_document(recipe))
    return TrackingState(
        uri=without_credentials(anchored(recipe.tracking.uri or environment.default_tracking_uri(run_dir.parent))),
        experiment=recipe.tracking.experiment,
        run_name=recipe.name,
        params=redacted_values({name: str(value) for name, value in settings.items() if value is not None}),
        tags=redacted_values(tags),
    )


_WAIT_SECONDS = 60.0
"""For a follower to end that is still sending the run."""


def sync(run_dir: Path) -> int:
    """Send what MLflow does not have yet of a run's journal, system metrics and extras; all, if its run was deleted.

    Returns:
        The number of metric values sent.

    Raises:
        TrackingUnavailableError: the store cannot be reached; calling again later loses nothing.
        UserInputError: the folder is none of a training run.
    """
    return Sender(run_dir, say).send(wait_seconds=_WAIT_SECONDS, look=True)


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
    Sender(run_dir, say).send_again(("artefacts",), wait_seconds=_WAIT_SECONDS)


def read_metrics(run_dir: Path, names: Sequence[str]) -> dict[str, float]:
    """The run's newest values in MLflow, by the names that `log_metrics` was given.

    Raises:
        TrackingUnavailableError: the store cannot be reached.
        UserInputError: the run has no such metric, or was never sent.
    """
    state = read_state(run_dir)
    if state.run_id is None:
        raise UserInputError(f"{run_dir}: MLflow has no run of it yet; send it by `ca2st track sync {run_dir}`")
    uri = whole_uri(state.uri, run_dir.parent)
    with reachable(uri, f"send the run by `ca2st track sync {run_dir}`"):
        known = open_client(uri).get_run(state.run_id).data.metrics
    if missing := sorted(name for name in names if clean_name(name) not in known):
        raise UserInputError(f"{run_dir}: MLflow has no {', '.join(missing)} for this run; test it again")
    return {name: known[clean_name(name)] for name in names}
