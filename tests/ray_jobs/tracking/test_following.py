"""What is written about a run before it is followed, and by the process that follows it."""

import getpass
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

import ray_jobs
from ray_jobs.runs.data import TrainingData
from ray_jobs.tracking import following
from ray_jobs.tracking.artefacts import RECIPE_NAME, read_run
from ray_jobs.tracking.following import _start_follower, _tell_link, followed, how_to_serve
from ray_jobs.tracking.sender import sync
from ray_jobs.tracking.state import TrackingState, link_of, read_state, sync_command, unsent_bytes
from support.fake_shards import make_samples, make_shard_set
from support.processes import python_path
from support.tiny_world import tiny_recipe
from support.tracked_runs import end, run_of, start, tracked_run, write

SECRET = "hunter2"


@pytest.mark.slow
def test_a_training_that_is_over_before_its_follower_has_started_is_sent_all_the_same(
    tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "_WORKING_SECONDS", 5.0)  # less than it takes to start
    shards = make_shard_set(tmp_path / "shards", make_samples(3))
    data = TrainingData(train_sets=(shards,), validation=None, targets=("label",))
    recipe, run_dir = tiny_recipe(tmp_path / "shards"), tmp_path / "run"
    run_dir.mkdir()
    tracking = replace(recipe.tracking, enabled=True, uri=store, experiment=tmp_path.name)
    with followed(replace(recipe, tracking=tracking), run_dir, data):
        write(run_dir, start(), end("failed"))
    assert unsent_bytes(run_dir) == 0
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_k8_no_file_of_a_run_folder_holds_the_password_of_the_environments_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"https://me:{SECRET}@mlflow.example.org")
    shards = make_shard_set(tmp_path / "shards", make_samples(3))
    data = TrainingData(train_sets=(shards,), validation=None, targets=("label",))
    recipe, run_dir = tiny_recipe(tmp_path / "shards"), tmp_path / "run"
    run_dir.mkdir()
    assert not recipe.tracking.enabled
    with followed(replace(recipe, name="mine"), run_dir, data):
        pass
    state = read_state(run_dir)
    assert state.uri == "https://mlflow.example.org"
    assert state.tags.items() >= {"ca2st.host": socket.gethostname(), "ca2st.run_dir": str(run_dir)}.items()
    assert state.tags["data.train.fingerprint"] == shards.manifest.fingerprint
    assert state.params["training.epochs"] == "1"
    kept = [path.read_bytes() for path in run_dir.rglob("*") if path.is_file()]
    assert kept
    assert not any(SECRET.encode() in content for content in kept)


def test_a_submitted_job_is_recorded_with_the_commit_it_was_sent_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CA2ST_GIT", f"{'a' * 40} false")
    shards = make_shard_set(tmp_path / "shards", make_samples(3))
    data = TrainingData(train_sets=(shards,), validation=None, targets=("label",))
    recipe, run_dir = tiny_recipe(tmp_path / "shards"), tmp_path / "run"
    run_dir.mkdir()
    (run_dir / RECIPE_NAME).write_text("{}")
    with followed(recipe, run_dir, data):
        pass
    told = {"git.commit": "a" * 40, "git.dirty": "false"}
    assert read_state(run_dir).tags.items() >= told.items()
    assert read_run(run_dir).tags.items() >= told.items()


def followed_state(tmp_path: Path, **tracking: object) -> TrackingState:
    """What is kept of a run in the folder ``tmp_path / "second try"``."""
    shards = make_shard_set(tmp_path / "shards", make_samples(3))
    data = TrainingData(train_sets=(shards,), validation=None, targets=("label",))
    recipe, run_dir = tiny_recipe(tmp_path / "shards"), tmp_path / "second try"
    run_dir.mkdir()
    changed = replace(recipe.tracking, **tracking)  # type: ignore[arg-type]  # its fields
    with followed(replace(recipe, tracking=changed), run_dir, data):
        pass
    return read_state(run_dir)


def test_a_run_is_named_after_its_folder_and_has_the_tags_that_mlflow_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # no checkout is here
    monkeypatch.delenv("CA2ST_GIT", raising=False)
    monkeypatch.setattr(sys, "argv", ["/usr/bin/ca2st", "train", "my/tiny.toml", "--out", "/runs/a"])
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"metadata": {"job_submission_id": "raysubmit_1"}}')
    state = followed_state(tmp_path)
    commit = subprocess.run(
        ["git", "-C", str(Path(ray_jobs.__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    assert state.run_name == "second try"
    expected = {
        "mlflow.source.name": "ca2st train tiny.toml",
        "ca2st.command": "ca2st train my/tiny.toml --out /runs/a",
        "mlflow.source.type": "JOB",
        "mlflow.user": getpass.getuser(),
        "ray.submission_id": "raysubmit_1",
        "ca2st.name": "tiny",
    } | ({"mlflow.source.git.commit": commit, "git.commit": commit} if commit else {})
    assert state.tags.items() >= expected.items()
    assert "mlflow.note.content" not in state.tags


def test_a_recipe_names_its_run_and_adds_tags_and_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    state = followed_state(tmp_path, run_name="the long one", tags={"table": "main"}, note="Row **three**.")
    assert state.run_name == "the long one"
    assert state.tags.items() >= {"table": "main", "mlflow.note.content": "Row **three**."}.items()
    assert state.tags["mlflow.source.type"] == "LOCAL"


@pytest.mark.parametrize(
    ("uri", "server"),
    [("https://mlflow.example.org/", "https://mlflow.example.org"), ("sqlite:////a/b.db", "http://127.0.0.1:5000")],
)
def test_the_link_opens_the_experiment_as_model_training(uri: str, server: str) -> None:
    state = TrackingState(uri=uri, experiment="e", run_name="r", params={}, tags={})
    assert link_of(state) is None
    known = replace(state, progress=replace(state.progress, experiment_id="7"))
    assert link_of(known) == f"{server}/#/experiments/7/runs?workflowType=machine_learning"


def test_commands_to_go_on_with_are_ready_for_a_shell() -> None:
    assert sync_command(Path("runs/my run")) == "ca2st track sync 'runs/my run'"
    assert how_to_serve("sqlite:////a b.db") == " (after `mlflow ui --backend-store-uri 'sqlite:////a b.db'`)"


def test_the_link_is_told_as_soon_as_mlflow_has_the_run(
    tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(following, "_TELL_SECONDS", 0.05)
    run_dir = tracked_run(tmp_path / "run", store)
    write(run_dir, start())
    teller = threading.Thread(target=_tell_link, args=(run_dir, threading.Event()))
    teller.start()
    sync(run_dir)
    teller.join()
    experiment = run_of(run_dir).info.experiment_id
    told = capsys.readouterr().err
    assert f"MLflow: http://127.0.0.1:5000/#/experiments/{experiment}/runs?workflowType=machine_learning" in told
    assert f"(after `mlflow ui --backend-store-uri {store}`)" in told


def test_a_follower_takes_no_folder_of_the_working_directory_for_a_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("sharding", "ray_jobs", "ca2st", "mlflow"):
        (tmp_path / "work" / name).mkdir(parents=True)
        (tmp_path / "work" / name / "__init__.py").write_text(f"raise SystemExit('imported the {name} of a user')")
    monkeypatch.chdir(tmp_path / "work")
    with (tmp_path / "log").open("wb") as log:
        _start_follower(tmp_path / "no such run", log).wait()
    told = (tmp_path / "log").read_text()
    assert "of a user" not in told
    assert "no such run/follower.lock" in told, "it got as far as its run folder"


def test_every_python_that_is_started_by_hand_keeps_the_working_directory_off_its_path() -> None:
    root = Path(ray_jobs.__file__).parents[1]
    sources = [path for name in ("ca2st", "sharding", "pipelines", "ray_jobs") for path in (root / name).rglob("*.py")]
    commands = [command for path in sources for command in re.findall(r"\[sys\.executable,[^\]]*", path.read_text())]
    assert commands
    assert [command for command in commands if '"-P"' not in command] == []


def log_of_a_follower(run_dir: Path) -> str:
    """What a follower leaves in its log that sends once, since nobody trains."""
    parent_that_is_gone = "-1"
    command = [sys.executable, "-m", "ray_jobs.tracking.following", str(run_dir), parent_that_is_gone]
    with (run_dir / "follower.log").open("wb") as log:
        subprocess.run(command, stdout=log, stderr=log, env=os.environ | {"PYTHONPATH": python_path()}, check=True)
    return (run_dir / "follower.log").read_text()


def test_k8_a_follower_that_fails_leaves_its_traceback_in_its_log_without_secrets(tmp_path: Path, store: str) -> None:
    run_dir = tracked_run(tmp_path / "runs" / f"token={SECRET}", store, experiment=tmp_path.name)
    (run_dir / "journal.jsonl").mkdir()  # nothing that a follower expects
    told = log_of_a_follower(run_dir)
    assert "Traceback (most recent call last)" in told
    assert "IsADirectoryError: [Errno 21] Is a directory:" in told
    assert "runs/token=[hidden]" in told
    assert SECRET not in told


def test_k8_a_damaged_line_of_system_metrics_is_left_out_and_named_without_secrets(run_dir: Path) -> None:
    write(run_dir, start())
    (run_dir / "system").mkdir()
    damaged = {"time": 1.7e9, "step": f"https://me:{SECRET}@host", "metrics": {"cpu": 5}}
    (run_dir / "system" / "alpha.jsonl").write_text(json.dumps(damaged) + "\n")
    told = log_of_a_follower(run_dir)
    assert 'step: expected a whole number, found "https://[hidden]@host"; the line is left out' in told
    assert "Traceback" not in told
    assert SECRET not in told
