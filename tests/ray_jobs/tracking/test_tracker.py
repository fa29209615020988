"""MLflow gets everything the journal holds, once, whenever it can be reached."""

import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from ca2st.errors import UserInputError
from ray_jobs.errors import TrackingUnavailableError
from ray_jobs.tracking import tracker
from ray_jobs.tracking.tracker import TrackingState, open_tracking, read_state, sync, unsent_bytes


def tracked_run(run_dir: Path, uri: str) -> Path:
    run_dir.mkdir(parents=True, exist_ok=True)
    state = TrackingState(
        uri=uri, experiment="tests", run_name="mine", params={"optim.base_lr": "0.1"}, tags={"a": "b"}
    )
    open_tracking(run_dir, state)
    return run_dir


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose tables exist: making them takes MLflow seconds."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def run_dir(tmp_path: Path, empty_store: Path) -> Path:
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return tracked_run(tmp_path / "runs" / "mine", f"sqlite:///{tmp_path}/mlflow.db")


def write(run_dir: Path, *events: dict[str, Any], attempt: int = 1) -> None:
    with (run_dir / "journal.jsonl").open("a") as file:
        for event in events:
            file.write(json.dumps({"attempt": attempt, "time": 1_700_000_000.5} | event) + "\n")


def step(number: int, loss: float) -> dict[str, Any]:
    return {"event": "step", "step": number, "epoch": 0, "loss": loss, "lr": 0.1, "sample_ids_hash": "abc"}


def losses(run_dir: Path) -> list[tuple[int, float]]:
    state = read_state(run_dir)
    assert state.run_id is not None
    history = MlflowClient(state.uri).get_metric_history(state.run_id, "train/loss")
    return [(metric.step, metric.value) for metric in history]


def status(run_dir: Path) -> str:
    state = read_state(run_dir)
    return str(MlflowClient(state.uri).get_run(state.run_id).info.status)


def test_stage_times_and_counts_of_the_loader_arrive_under_flat_names(run_dir: Path) -> None:
    stages = {"data_wait_seconds": 0.25, "forward_seconds": 0.5}
    counts = {"decode_seconds": 1.5, "bytes_read": 4096}
    write(run_dir, step(1, 2.5) | {"step_seconds": 0.75, "stages": stages, "loader": counts})
    sync(run_dir)
    state = read_state(run_dir)
    found = MlflowClient(state.uri).get_run(state.run_id).data.metrics
    assert found == {
        "train/epoch": 0,
        "train/loss": 2.5,
        "train/lr": 0.1,
        "train/step_seconds": 0.75,
        "stage/data_wait_seconds": 0.25,
        "stage/forward_seconds": 0.5,
        "stage/decode_seconds": 1.5,
        "data/bytes_read": 4096,
    }


def test_a_training_that_ends_before_its_first_line_leaves_no_run_behind(run_dir: Path) -> None:
    assert sync(run_dir) == 0
    assert read_state(run_dir).run_id is None
    write(run_dir, {"event": "start", "step": 0})
    sync(run_dir)
    assert status(run_dir) == "RUNNING"


def test_a_run_has_its_params_tags_and_every_step(run_dir: Path) -> None:
    write(run_dir, {"event": "start", "step": 0}, step(1, 2.5), step(2, 2.25))
    write(
        run_dir,
        {"event": "eval", "step": 2, "split": "validation", "metrics": {"top1": 0.5, "top5": None}},
        {"event": "end", "step": 2, "status": "done"},
    )
    sync(run_dir)
    state = read_state(run_dir)
    run = MlflowClient(state.uri).get_run(state.run_id)
    assert run.data.params == {"optim.base_lr": "0.1"}
    assert run.data.tags["a"] == "b"
    assert run.data.metrics["validation/top1"] == 0.5
    assert losses(run_dir) == [(1, 2.5), (2, 2.25)]
    assert run.info.status == "FINISHED"
    assert unsent_bytes(run_dir) == 0


def test_k4_a_resume_keeps_the_run_and_sends_no_step_twice(run_dir: Path) -> None:
    write(run_dir, {"event": "start", "step": 0}, step(1, 3.0), step(2, 2.0))
    sync(run_dir)
    first = read_state(run_dir).run_id
    tracked_run(run_dir, read_state(run_dir).uri)
    write(run_dir, {"event": "start", "step": 1}, step(2, 2.0), step(3, 1.0), attempt=2)
    sync(run_dir)
    assert read_state(run_dir).run_id == first
    assert losses(run_dir) == [(1, 3.0), (2, 2.0), (3, 1.0)]


def test_a_torn_last_line_waits_for_its_end(run_dir: Path) -> None:
    write(run_dir, step(1, 3.0))
    with (run_dir / "journal.jsonl").open("a") as file:
        file.write('{"event":"step","st')
    sync(run_dir)
    assert losses(run_dir) == [(1, 3.0)]
    assert unsent_bytes(run_dir) > 0


def test_a_run_that_never_began_has_nothing_to_send(run_dir: Path) -> None:
    assert unsent_bytes(run_dir) == 0
    assert sync(run_dir) == 0


def test_thousands_of_steps_go_in_batches_and_all_arrive(run_dir: Path) -> None:
    write(run_dir, *(step(number, 1 / number) for number in range(1, 2001)))
    sync(run_dir)
    assert losses(run_dir) == [(number, 1 / number) for number in range(1, 2001)]


@pytest.mark.parametrize(("ended", "expected"), [("done", "FINISHED"), ("stopped", "KILLED"), ("failed", "FAILED")])
def test_the_run_ends_as_the_training_did(run_dir: Path, ended: str, expected: str) -> None:
    write(run_dir, {"event": "start", "step": 0}, {"event": "end", "step": 0, "status": ended})
    sync(run_dir)
    assert status(run_dir) == expected


def test_k1_an_unreachable_store_costs_nothing_and_gets_everything_later(tmp_path: Path, empty_store: Path) -> None:
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the store's folder should be")
    run_dir = tracked_run(tmp_path / "run", f"sqlite:///{blocked}/mlflow.db")
    write(run_dir, step(1, 3.0))
    with pytest.raises(TrackingUnavailableError, match="ca2st track sync"):
        sync(run_dir)
    blocked.unlink()
    blocked.mkdir()
    shutil.copy(empty_store, blocked / "mlflow.db")
    assert sync(run_dir) > 0
    assert losses(run_dir) == [(1, 3.0)]


def test_k7_numbers_that_are_not_finite_are_left_out(run_dir: Path) -> None:
    write(run_dir, step(1, float("nan")), step(2, 1.0))
    sync(run_dir)
    assert losses(run_dir) == [(2, 1.0)]


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match="expected the folder of a training run"):
        sync(tmp_path)


@pytest.fixture(autouse=True)
def _closed_databases() -> Iterator[None]:
    """MLflow keeps engines open until they are collected; do it here so that no warning lands in another test."""
    yield
    import gc

    gc.collect()


def test_a_follower_that_outlives_its_attempt_and_the_next_ones_make_one_run(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first is slow to make its run: the second attempt and its follower begin in the meantime."""
    write(run_dir, {"event": "start", "step": 0}, step(1, 3.0))
    create, made, begun = tracker._create_run, [], threading.Event()

    def slowly(client: MlflowClient, state: TrackingState) -> str:
        begun.set()
        time.sleep(0.3)
        made.append(create(client, state))
        return str(made[-1])

    monkeypatch.setattr(tracker, "_create_run", slowly)
    first = threading.Thread(target=sync, args=(run_dir,))
    first.start()
    assert begun.wait(60)
    tracked_run(run_dir, read_state(run_dir).uri)
    sync(run_dir)
    first.join(60)
    assert made == [read_state(run_dir).run_id]
    assert losses(run_dir) == [(1, 3.0)]
