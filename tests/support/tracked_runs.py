"""Run folders with journals for the tests of tracking."""

import json
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Run

from ray_jobs.tracking.state import TrackingState, open_tracking, read_state


def tracked_run(run_dir: Path, uri: str, experiment: str = "tests", **fields: Any) -> Path:
    run_dir.mkdir(parents=True, exist_ok=True)
    settings = {"run_name": "mine", "params": {"optim.base_lr": "0.1"}, "tags": {"a": "b"}} | fields
    open_tracking(run_dir, TrackingState(uri=uri, experiment=experiment, **settings))
    return run_dir


def remote_run(run_dir: Path, uri: str) -> Path:
    """A run at a server's address with two lines to send."""
    tracked_run(run_dir, uri)
    write(run_dir, start(), step(1, 3.0))
    return run_dir


def write(run_dir: Path, *events: dict[str, Any], attempt: int = 1) -> None:
    with (run_dir / "journal.jsonl").open("a") as file:
        for event in events:
            line = {"attempt": attempt, "time": 1_700_000_000.5} | event
            file.write(json.dumps(line, separators=(",", ":")) + "\n")


def start(number: int = 0) -> dict[str, Any]:
    return {"event": "start", "step": number}


def step(number: int, loss: float) -> dict[str, Any]:
    return {"event": "step", "step": number, "epoch": 0, "loss": loss, "lr": 0.1, "sample_ids_hash": "abc"}


def end(status: str, number: int = 0) -> dict[str, Any]:
    return {"event": "end", "step": number, "status": status}


def run_of(run_dir: Path) -> Run:
    state = read_state(run_dir)
    assert state.run_id is not None
    return MlflowClient(state.uri).get_run(state.run_id)


def losses(run_dir: Path) -> list[tuple[int, float]]:
    state = read_state(run_dir)
    assert state.run_id is not None
    history = MlflowClient(state.uri).get_metric_history(state.run_id, "train/loss")
    return [(metric.step, metric.value) for metric in history]
