"""What is written about a run before it is followed."""

import signal
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from ray_jobs.running.wiring import TrainingData
from ray_jobs.tracking.following import followed
from ray_jobs.tracking.state import read_state, unsent_bytes
from support.fake_shards import make_samples, make_shard_set
from support.tiny_world import tiny_recipe
from support.tracked_runs import end, start, write

SECRET = "hunter2"


def test_a_training_that_is_over_before_its_follower_has_started_is_sent_all_the_same(
    tmp_path: Path, store: str
) -> None:
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
