"""The run in MLflow when people delete it, names clash, settings change or everything is killed."""

import fcntl
import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from ca2st.training.errors import RunFolderBusyError
from ca2st.training.journal import locked
from ray_jobs.errors import TrackingUnavailableError
from ray_jobs.tracking.following import end_orphans
from ray_jobs.tracking.run_record import mean_values, step_values
from ray_jobs.tracking.sender import Sender, log_metrics, sync
from ray_jobs.tracking.state import (
    FOLDER_TAG,
    HOST_TAG,
    alive,
    is_alive,
    open_tracking,
    read_state,
    separate_copy,
    unsent_bytes,
)
from support.tracked_runs import end, losses, run_of, start, step, tracked_run, write

HERE = "this-machine"


def client_of(run_dir: Path) -> MlflowClient:
    return MlflowClient(read_state(run_dir).uri)


def resumed(run_dir: Path, like: Path) -> None:
    """Open the tracking of `run_dir` anew, as a training does that resumes there."""
    state = read_state(like)
    open_tracking(run_dir, replace(state, tags={"a": "b", FOLDER_TAG: str(run_dir.resolve())}))


def test_k4_a_copied_run_folder_that_is_resumed_is_a_run_of_its_own(run_dir: Path, tmp_path: Path) -> None:
    resumed(run_dir, run_dir)
    write(run_dir, start(), step(1, 3.0), step(2, 2.0))
    sync(run_dir)
    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy)
    resumed(copy, run_dir)
    write(copy, step(3, 7.0), attempt=2)
    write(run_dir, step(3, 1.0), attempt=2)
    sync(copy)
    sync(run_dir)
    assert losses(run_dir) == [(1, 3.0), (2, 2.0), (3, 1.0)]
    assert losses(copy) == [(1, 3.0), (2, 2.0), (3, 7.0)]
    assert run_of(copy).data.tags["ca2st.copied_from"] == str(run_dir)
    assert "ca2st.copied_from" not in run_of(run_dir).data.tags
    own = read_state(copy).run_id
    resumed(copy, copy)
    assert read_state(copy).run_id == own, "a copy is separated once"


def test_k4_a_copy_that_is_only_sent_is_a_run_of_its_own_too_and_says_so(run_dir: Path, tmp_path: Path) -> None:
    resumed(run_dir, run_dir)
    write(run_dir, start(), step(1, 3.0))
    copy, told = tmp_path / "copy", []
    shutil.copytree(run_dir, copy)
    sync(run_dir)
    Sender(copy, told.append).send()
    assert read_state(copy).run_id != read_state(run_dir).run_id
    assert told[0] == f"{copy} was copied from {run_dir}: in MLflow it is a run of its own"


def test_k4_a_run_folder_that_was_moved_or_has_another_name_keeps_its_run(run_dir: Path, tmp_path: Path) -> None:
    resumed(run_dir, run_dir)
    write(run_dir, start(), step(1, 3.0))
    sync(run_dir)
    run_id = read_state(run_dir).run_id
    link = tmp_path / "link"
    link.symlink_to(run_dir)
    assert separate_copy(link) is None
    moved = run_dir.rename(tmp_path / "moved")
    resumed(moved, moved)
    write(moved, step(2, 2.0))
    sync(moved)
    assert read_state(moved).run_id == run_id
    assert losses(moved) == [(1, 3.0), (2, 2.0)]


def test_k3_a_run_deleted_on_the_server_is_replaced_by_one_that_names_it_and_has_everything(run_dir: Path) -> None:
    write(run_dir, start(), step(1, 3.0), step(2, 2.0))
    sync(run_dir)
    old = read_state(run_dir).run_id
    client_of(run_dir).delete_run(old)
    write(run_dir, step(3, 1.0))
    sync(run_dir)
    run = run_of(run_dir)
    assert run.info.run_id != old
    assert run.data.tags["ca2st.replaces"] == old
    assert run.data.params == {"optim.base_lr": "0.1"}
    assert losses(run_dir) == [(1, 3.0), (2, 2.0), (3, 1.0)]


def test_k3_a_run_deleted_after_its_end_is_sent_again_when_somebody_asks_for_it(run_dir: Path) -> None:
    write(run_dir, start(), step(1, 3.0), end("done", 1))
    sync(run_dir)
    old = read_state(run_dir).run_id
    assert sync(run_dir) == 0
    assert read_state(run_dir).run_id == old
    client_of(run_dir).delete_run(old)
    assert Sender(run_dir, print).send() == 0  # a follower asks nothing where nothing is new
    log_metrics(run_dir, {"test/top1": 0.75}, step=1)
    run = run_of(run_dir)
    assert (run.info.lifecycle_stage, run.info.status) == ("active", "FINISHED")
    assert run.data.tags["ca2st.replaces"] == old
    assert losses(run_dir) == [(1, 3.0)]
    assert run.data.metrics["test/top1"] == 0.75


def test_k3_a_run_that_goes_to_another_store_is_sent_there_from_its_start(tmp_path: Path, run_dir: Path) -> None:
    write(run_dir, start(), step(1, 3.0))
    sync(run_dir)
    old = read_state(run_dir).run_id
    progress = run_dir / "tracking_progress.json"
    progress.write_text(progress.read_text().replace(str(old), "0" * 32))  # an id that this store never gave
    write(run_dir, step(2, 2.0))
    sync(run_dir)
    assert losses(run_dir) == [(1, 3.0), (2, 2.0)]


def test_k3_a_deleted_experiment_is_told_with_its_mend_and_nothing_is_lost(run_dir: Path) -> None:
    write(run_dir, start(), step(1, 3.0))
    sync(run_dir)
    old, client = read_state(run_dir).run_id, client_of(run_dir)
    experiment = run_of(run_dir).info.experiment_id
    client.delete_experiment(experiment)
    write(run_dir, step(2, 2.0))
    fix = rf"was deleted there.*mlflow experiments restore --experiment-id {experiment}.*ca2st track sync"
    with pytest.raises(TrackingUnavailableError, match=fix):
        sync(run_dir)
    client.restore_experiment(experiment)
    sync(run_dir)
    assert read_state(run_dir).run_id == old
    assert losses(run_dir) == [(1, 3.0), (2, 2.0)]


def test_k3_an_experiment_that_another_run_makes_at_the_same_moment_is_shared(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, name, find = client_of(run_dir), read_state(run_dir).experiment, MlflowClient.get_experiment_by_name
    made = client.create_experiment(name)
    asked: list[str] = []

    def late(self: MlflowClient, wanted: str) -> Any:
        asked.append(wanted)
        return None if len(asked) == 1 else find(self, wanted)

    monkeypatch.setattr(MlflowClient, "get_experiment_by_name", late)
    write(run_dir, start())
    sync(run_dir)
    assert run_of(run_dir).info.experiment_id == made
    assert len(asked) == 2


def test_k3_runs_of_one_name_are_runs_of_their_own(tmp_path: Path, run_dir: Path, store: str) -> None:
    other = tracked_run(tmp_path / "elsewhere" / "mine", store, experiment=read_state(run_dir).experiment)
    for folder, loss in ((run_dir, 3.0), (other, 1.0)):
        write(folder, start(), step(1, loss))
        sync(folder)
    assert run_of(run_dir).info.run_name == run_of(other).info.run_name
    assert (losses(run_dir), losses(other)) == ([(1, 3.0)], [(1, 1.0)])


def test_k3_a_setting_changed_on_resume_is_kept_as_a_tag_and_the_param_stays(run_dir: Path) -> None:
    write(run_dir, start(), step(1, 3.0))
    sync(run_dir)
    changed = {"optim.base_lr": "0.1", "launch.workers": "4", "new": "x"}
    state = read_state(run_dir)
    tracked_run(run_dir, state.uri, params=changed, tags={"git.commit": "abc"})
    write(run_dir, start(1), attempt=2)
    sync(run_dir)
    tracked_run(run_dir, state.uri, params={**changed, "launch.workers": "2"})
    write(run_dir, start(1), attempt=3)
    sync(run_dir)
    data = run_of(run_dir).data
    assert data.params == changed
    assert data.tags["ca2st.changed.launch.workers"] == "4 -> 2 from attempt 3"
    assert data.tags["git.commit"] == "abc"


def local_run(folder: Path, store: str, experiment: str, *, host: str = HERE) -> Path:
    """A run that began on `host` and has no end."""
    run_dir = tracked_run(folder, store, experiment, tags={HOST_TAG: host, FOLDER_TAG: str(folder)})
    write(run_dir, start(), step(1, 3.0))
    sync(run_dir)
    return run_dir


@pytest.fixture
def next_run(tmp_path: Path, store: str) -> Path:
    return local_run(tmp_path / "runs" / "next", store, tmp_path.name)


@pytest.fixture
def killed_run(tmp_path: Path, store: str) -> Path:
    return local_run(tmp_path / "runs" / "killed", store, tmp_path.name)


def test_k5_the_next_start_marks_an_orphan_killed_and_its_resume_makes_it_run_again(
    killed_run: Path, next_run: Path
) -> None:
    write(killed_run, step(2, 2.0))  # written, never sent
    told: list[str] = []
    orphan = read_state(killed_run).run_id
    assert end_orphans(next_run, host=HERE, say=told.append) == [orphan]
    run = run_of(killed_run)
    assert (run.info.status, run.data.tags["ca2st.exit_status"]) == ("KILLED", "killed")
    assert run.info.end_time is not None
    assert losses(killed_run) == [(1, 3.0), (2, 2.0)]
    assert "KILLED in MLflow now, until it is resumed" in told[0]
    assert run_of(next_run).info.status == "RUNNING"
    write(killed_run, start(1), step(3, 1.0), attempt=2)
    sync(killed_run)
    assert read_state(killed_run).run_id == orphan
    assert run_of(killed_run).info.status == "RUNNING"


def test_k5_an_orphan_whose_end_was_only_not_sent_ends_as_it_did(killed_run: Path, next_run: Path) -> None:
    write(killed_run, end("done", 1))
    assert end_orphans(next_run, host=HERE, say=print) == []
    assert run_of(killed_run).info.status == "FINISHED"


def test_k5_an_orphan_half_sent_when_its_sender_must_end_is_left_for_the_next(killed_run: Path, next_run: Path) -> None:
    write(killed_run, *(step(number, 1 / number) for number in range(2, 401)))
    before = read_state(killed_run).progress.sent_bytes

    def is_asked_to_end() -> bool:
        return read_state(killed_run).progress.sent_bytes > before

    assert end_orphans(next_run, host=HERE, say=print, is_asked_to_end=is_asked_to_end) == []
    assert unsent_bytes(killed_run) > 0
    assert run_of(killed_run).info.status == "RUNNING"
    assert end_orphans(next_run, host=HERE, say=print) == [read_state(killed_run).run_id]
    assert len(losses(killed_run)) == 400


@pytest.mark.parametrize("lock", ["run.lock", "follower.lock"])
def test_k5_a_run_that_somebody_trains_or_follows_is_left_alone(killed_run: Path, next_run: Path, lock: str) -> None:
    with (killed_run / lock).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_SH if lock == "follower.lock" else fcntl.LOCK_EX)
        assert is_alive(killed_run)
        assert end_orphans(next_run, host=HERE, say=print) == []
    assert run_of(killed_run).info.status == "RUNNING"
    assert not is_alive(killed_run)


def held_for_a_moment(path: Path, kind: int, *, seconds: float) -> threading.Timer:
    """Hold a lock as somebody who looks does, and let go of it after `seconds`."""
    file = path.open("a+")
    fcntl.flock(file, kind)
    letting_go = threading.Timer(seconds, file.close)
    letting_go.start()
    return letting_go


@pytest.mark.parametrize("kind", [fcntl.LOCK_SH, fcntl.LOCK_EX])
def test_k5_a_training_that_starts_while_somebody_looks_at_its_folder_begins(tmp_path: Path, kind: int) -> None:
    letting_go = held_for_a_moment(tmp_path / "run.lock", kind, seconds=0.3)
    with pytest.raises(RunFolderBusyError), locked(tmp_path, wait_seconds=0.0):
        pass
    with locked(tmp_path):  # for as long as a training waits by default
        assert is_alive(tmp_path)
    letting_go.join()


@pytest.mark.parametrize("lock", ["run.lock", "follower.lock"])
def test_k5_who_looks_at_the_same_moment_is_not_taken_for_somebody_who_trains(tmp_path: Path, lock: str) -> None:
    kind = fcntl.LOCK_SH if lock == "run.lock" else fcntl.LOCK_EX
    letting_go = held_for_a_moment(tmp_path / lock, kind, seconds=0.02)
    assert not is_alive(tmp_path)
    letting_go.join()


def test_k5_a_run_of_another_machine_is_left_alone(tmp_path: Path, store: str, next_run: Path) -> None:
    there = local_run(tmp_path / "runs" / "there", store, tmp_path.name, host="another-machine")
    assert end_orphans(next_run, host=HERE, say=print) == []
    assert run_of(there).info.status == "RUNNING"


def test_k5_a_run_whose_folder_is_not_here_or_is_another_runs_is_left_alone(
    killed_run: Path, next_run: Path, run_dir: Path
) -> None:
    kept, run = read_state(killed_run), run_of(killed_run)
    killed_run.rename(killed_run.with_name("moved"))
    assert end_orphans(next_run, host=HERE, say=print) == []
    tracked_run(killed_run, kept.uri, kept.experiment, tags=kept.tags)
    write(killed_run, start())
    assert end_orphans(next_run, host=HERE, say=print) == []
    assert MlflowClient(kept.uri).get_run(run.info.run_id).info.status == "RUNNING"


def test_k5_a_folder_of_another_version_is_left_alone_and_hides_no_other_orphan(
    tmp_path: Path, store: str, killed_run: Path, next_run: Path
) -> None:
    strange = local_run(tmp_path / "runs" / "strange", store, tmp_path.name)
    state = json.loads((strange / "tracking.json").read_text())
    (strange / "tracking.json").write_text(json.dumps(state | {"of_another_version": 1}))
    told: list[str] = []
    assert end_orphans(next_run, host=HERE, say=told.append) == [read_state(killed_run).run_id]
    assert any(
        "strange seems to be killed, but is left as it is: DocumentError" in line and "of_another_version" in line
        for line in told
    )


def test_two_followers_of_one_run_may_live_at_once(run_dir: Path) -> None:
    with alive(run_dir), alive(run_dir):
        assert is_alive(run_dir)
    assert not is_alive(run_dir)


def test_t11_a_step_that_was_left_out_is_counted_in_mlflow_and_has_no_loss() -> None:
    line = {"event": "step", "step": 6, "time": 1.0, "loss": None, "grad_norm": None, "lr": 0.1, "skipped_steps": 1}
    assert {one.name: one.value for one in step_values(line)} == {"train/lr": 0.1, "train/skipped_steps": 1.0}


def test_rates_and_stages_end_with_their_means_over_the_run() -> None:
    steps = [
        {
            "step": 1,
            "step_seconds": 1.0,
            "clips_per_second": 8.0,
            "data_wait_fraction": 0.5,
            "stages": {"f_seconds": 0.2},
        },
        {
            "step": 2,
            "step_seconds": 3.0,
            "clips_per_second": 4.0,
            "data_wait_fraction": 0.1,
            "stages": {"f_seconds": 0.6},
        },
    ]
    found = {one.name: one.value for one in mean_values(steps, {"time": 5.0})}
    assert found == {
        "train/clips_per_second": pytest.approx(20 / 4),
        "train/data_wait_fraction": pytest.approx(0.8 / 4),
        "train/step_seconds": 2.0,
        "work/stage/f_seconds": pytest.approx(0.4),
    }
    assert {(one.step, one.milliseconds) for one in mean_values(steps, {"time": 5.0})} == {(2, 5000)}
    assert list(mean_values([], {"time": 5.0})) == []
