"""A real MLflow server, away when a training starts and ends, and killed while a follower sends."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from mlflow import MlflowClient

from ray_jobs.tracking.state import read_state, unsent_bytes
from support.processes import python_path
from support.tiny_runs import ca2st, make_tiny_run, sequence
from support.tracked_runs import end, start, step, tracked_run, write

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SECONDS = 240


def wait_until(is_so: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not is_so():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


@contextmanager
def server(folder: Path, port: int) -> Iterator[str]:
    """MLflow's own server on the loopback interface; killed at the end with all its processes."""
    uri = f"http://127.0.0.1:{port}"
    command = ["-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", f"{folder}/files"]
    with (folder / "server.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, *command],
            env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        wait_until(lambda: answers(uri), f"the server did not start, see {folder}/server.log")
        yield uri
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def answers(uri: str) -> bool:
    try:
        with urllib.request.urlopen(f"{uri}/health", timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def steps_in_mlflow(run_dir: Path) -> list[int]:
    state = read_state(run_dir)
    return [one.step for one in MlflowClient(state.uri).get_metric_history(state.run_id, "train/loss")]


def test_k1_a_training_and_a_follower_outlive_a_real_server(tmp_path: Path, port: int) -> None:
    recipe, run_dir = make_tiny_run(tmp_path), tmp_path / "run"
    options = ("--set", f"tracking.uri='http://127.0.0.1:{port}'", "--set", "training.epochs=1")
    done = ca2st("train", recipe, "--out", run_dir, *options, environment={"PYTHONPROFILEIMPORTTIME": "1"})
    assert done.returncode == 0, done.stderr
    assert f"send it by `ca2st track sync {run_dir}`" in done.stderr
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "import time:" in line}
    assert "torch" in imported
    assert not {name for name in imported if name.split(".")[0] == "mlflow"}, "only the follower talks to MLflow"
    assert len(sequence(run_dir)) == 4
    (tmp_path / "store").mkdir()
    with server(tmp_path / "store", port):
        synced = ca2st("track", "sync", run_dir, "--json")
        assert synced.returncode == 0, synced.stderr
        assert json.loads(synced.stdout)["lacking"] == [], "one object alone"
        assert steps_in_mlflow(run_dir) == list(range(1, 5))
        followed = tracked_run(tmp_path / "followed", f"http://127.0.0.1:{port}")
        write(followed, start(), step(1, 3.0))
        command = [sys.executable, "-m", "ray_jobs.tracking.following", str(followed), str(os.getpid())]
        follower = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": python_path()})
        wait_until(lambda: read_state(followed).progress.last_step == 1, "the follower sent nothing")
    write(followed, step(2, 2.0))
    with server(tmp_path / "store", port):
        wait_until(lambda: read_state(followed).progress.last_step == 2, "the follower did not come back")
        write(followed, step(3, 1.0), end("done", 3))
        follower.terminate()
        assert follower.wait(SECONDS) == 0
        assert steps_in_mlflow(followed) == [1, 2, 3]
        assert unsent_bytes(followed) == 0
