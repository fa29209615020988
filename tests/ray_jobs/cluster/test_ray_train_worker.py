"""A Ray worker's life, and what is told of one that died: Ray's part played by the test."""

import contextlib
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayActorError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2._internal.logging.patch_print import redirected_print

from ca2st.durable import InjectedFault
from ca2st.errors import DataDamageError
from ca2st.training.errors import PeerFailedError, StopNotSavedError, TerminatedError
from ray_jobs.cluster import driver
from ray_jobs.cluster import supervision as lost_workers
from ray_jobs.cluster.driver import Fleet, resources_of
from ray_jobs.cluster.ray_access import Node
from ray_jobs.cluster.supervision import LaunchFolder, LostWorkers, death_record, died_of
from ray_jobs.config.recipe import LaunchConfig
from ray_jobs.config.recipe_file import load_recipe
from ray_jobs.console import say
from ray_jobs.runs.failures import read_failure
from ray_jobs.runs.worker import Job, Outcome

OUTCOME = Outcome(checkpoint="c", steps=16, metrics={}, main_metric="top1")


class Group:
    """The workers of one launch, one after the other, each with a training given by the test."""

    def __init__(self, run_dir: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder = LaunchFolder.make(run_dir, "run")
        self.reports: list[dict[str, Any]] = []
        self._patch = patch

    def worker(self, training: Callable[[], Outcome], *, rank: int = 0, attempt: int = 1) -> dict[str, str]:
        """Live as the worker of `rank`; rank 0 decides the attempt by itself."""

        class Context:
            @staticmethod
            def get_world_rank() -> int:
                return rank

        self._patch.setattr("ray.train.get_context", Context)
        self._patch.setattr("ray.train.report", self.reports.append)
        self._patch.setattr(
            "ray.train.collective.broadcast_from_rank_zero",
            lambda value: value if rank == 0 else (attempt, None),
        )
        self._patch.setattr(driver, "preemption_notice", lambda: None)
        self._patch.setattr(driver, "node_name", lambda: f"host{rank} (10.0.0.{rank})")
        self._patch.setattr(driver, "run", lambda *_arguments, **_options: training())
        settings = {"recipe": {}, "run_dir": str(self.folder.run_dir), "folder": str(self.folder.path)}
        return driver.train_on_worker(settings)


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Group:
    return Group(tmp_path, monkeypatch)


def raising(error: Exception) -> Callable[[], Outcome]:
    def training() -> Outcome:
        raise error

    return training


def test_a_worker_that_is_done_reports_without_a_checkpoint_for_ray(group: Group) -> None:
    assert group.worker(lambda: OUTCOME)["status"] == "done"
    assert group.reports == [{"steps": 16}]
    assert read_failure(group.folder.run_dir) is None


def test_t4_a_final_failure_is_put_on_record_and_no_restart_is_spent_on_it(group: Group) -> None:
    ended = group.worker(raising(DataDamageError("shard 3")), rank=1)
    assert ended["status"] == "failed"
    failure = read_failure(group.folder.run_dir)
    assert failure is not None
    assert failure.final
    assert (failure.rank, failure.node, failure.exit_code) == (1, "host1 (10.0.0.1)", 3)
    peer = group.worker(raising(PeerFailedError("rank 1 failed with DataDamageError: shard 3", exit_code=3)))
    assert peer["status"] == "failed"
    assert read_failure(group.folder.run_dir) == failure


def test_t4_workers_started_again_after_a_final_failure_return_at_once(group: Group) -> None:
    group.worker(raising(DataDamageError("shard 3")))
    assert group.worker(raising(AssertionError("must not train")))["status"] == "failed"
    assert group.folder.num_attempts() == 1


def test_t13_a_failure_that_may_pass_is_raised_for_ray_to_start_the_workers_again(group: Group) -> None:
    with pytest.raises(driver.AttemptFailedError, match="attempt 1: InjectedFault: boom"):
        group.worker(raising(InjectedFault("boom")))
    with pytest.raises(driver.AttemptFailedError, match="attempt 2: InjectedFault: bang"):
        group.worker(raising(InjectedFault("bang")))
    failure = read_failure(group.folder.run_dir)
    assert failure is not None
    assert (failure.attempt, failure.message, failure.final) == (2, "bang", False)


def test_t14_a_worker_that_was_asked_to_stop_returns_and_is_not_started_again(group: Group) -> None:
    def training() -> Outcome:
        group.folder.ask_stop(signal.SIGTERM)
        raise TerminatedError("stopped by signal 15 after step 3; rerun to resume")

    ended = group.worker(training)
    assert ended == {"status": "stopped", "message": "stopped by signal 15 after step 3; rerun to resume"}
    assert group.worker(raising(AssertionError("must not train")))["status"] == "stopped"


def test_t14_after_a_preemption_a_worker_holds_its_place_until_ray_takes_it_down(
    group: Group, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class TakenDownError(BaseException):
        """Stands for the end of the process."""

    def take_down(_until: object) -> None:
        raise TakenDownError

    monkeypatch.setattr(driver, "hold", take_down)
    with pytest.raises(TakenDownError):
        group.worker(raising(TerminatedError("stopped by signal 1 after step 6")))
    assert read_failure(group.folder.run_dir) is None
    assert "a node will be taken away: the state is saved; Ray starts the workers again" in capsys.readouterr().err


def test_t14_a_worker_that_holds_its_place_outlives_storage_that_does_not_answer(
    group: Group, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answers: list[int | OSError] = [0, OSError("stale"), OSError("stale"), 0, OSError("stale"), signal.SIGTERM]

    def stop_signal(_folder: LaunchFolder) -> int:
        if isinstance(answer := answers.pop(0), OSError):
            raise answer
        return answer

    monkeypatch.setattr(LaunchFolder, "stop_signal", stop_signal)
    monkeypatch.setattr(driver, "hold", partial(driver.hold, poll_seconds=0.0))
    monkeypatch.setattr(driver, "watching", lambda _ask: contextlib.nullcontext())
    assert group.worker(raising(TerminatedError("stopped by signal 1 after step 6")))["status"] == "stopped"
    assert (answers, caplog.text.count("stale")) == ([], 1)


def test_t14_what_a_full_disk_keeps_off_the_record_the_driver_is_told_with_its_exit_code(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "keep_failure", lambda _folder, new: new)
    ended = group.worker(raising(StopNotSavedError("its state is NOT saved", signal_number=signal.SIGTERM)))
    assert (ended["status"], ended["exit_code"]) == ("failed", "4")
    assert ended["message"].endswith("its state is NOT saved")


# --- T2: workers that died

HEALTH = ActorDiedError()


def test_t2_a_dead_process_is_told_from_a_worker_that_raised() -> None:
    assert died_of(HEALTH) is not None
    assert died_of(WorkerHealthCheckFailedError("worker failed", HEALTH)) is not None
    assert died_of(RayActorError()) is not None
    assert died_of(OutOfMemoryError("worker killed\nadvice")) == "worker killed"
    assert died_of(ValueError("raised")) is None


def test_t2_the_lost_node_is_named_with_its_ranks() -> None:
    places = {1: "b (10.0.0.2)", 2: "b (10.0.0.2)", 3: "c (10.0.0.3)"}
    died = {2: "gone", 1: "The actor died\n\nnode was terminated", 3: "killed"}
    record = death_record(died, places, living={"10.0.0.1", "10.0.0.3"}, attempt=2, launch="one")
    assert record.message == (
        "node b (10.0.0.2) was lost with the worker of rank 1, 2; the worker process of rank 3 on c (10.0.0.3) died "
        "(node was terminated)"
    )
    assert (record.rank, record.node, record.attempt, record.final) == (1, "b (10.0.0.2)", 2, False)


def test_t2_a_worker_that_never_began_is_told_without_a_node() -> None:
    record = death_record({0: ""}, {0: ""}, living={"10.0.0.1"}, attempt=1, launch="one")
    assert record.message == "the worker process of rank 0 on a node not known died (Ray gives no reason)"


def test_t2_a_death_counts_for_more_than_what_the_others_say_of_a_cut_connection(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lost_workers, "living_nodes", lambda: [Node(address="10.0.0.0", node_id="a")])
    group.folder.begin(1, rank=1, node="host1 (10.0.0.1)")
    with pytest.raises(driver.AttemptFailedError):
        group.worker(raising(RuntimeError("[gloo] Connection closed by peer")))
    told = LostWorkers(group.folder.path)
    told.after_exception(None, {0: driver.AttemptFailedError("cut")})
    failure = read_failure(group.folder.run_dir)
    assert failure is not None
    assert failure.rank == 0
    told.after_exception(None, {0: driver.AttemptFailedError("cut"), 1: HEALTH})
    failure = read_failure(group.folder.run_dir)
    assert failure is not None
    assert (failure.kind, failure.rank) == ("WorkerDiedError", 1)
    assert "node host1 (10.0.0.1) was lost" in failure.message


def test_t14_a_death_that_had_been_announced_is_put_on_record_as_such(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lost_workers, "living_nodes", lambda: [Node(address="10.0.0.0", node_id="a")])
    for rank in (0, 1):
        group.folder.begin(1, rank=rank, node=f"host{rank} (10.0.0.{rank})")
    announced = ActorDiedError()
    announced._preempted = True
    told = LostWorkers(group.folder.path)
    told.after_exception(None, {0: HEALTH, 1: WorkerHealthCheckFailedError("worker failed", announced)})
    failure = read_failure(group.folder.run_dir)
    assert failure is not None
    assert failure.preempted
    assert "node host1 (10.0.0.1) was lost with the worker of rank 1" in failure.message


def test_t2_a_cluster_that_does_not_answer_ends_no_run_that_can_go_on(
    group: Group, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def silent() -> list[Node]:
        raise ConnectionError("no answer")

    monkeypatch.setattr(lost_workers, "living_nodes", silent)
    LostWorkers(group.folder.path).after_exception(None, {1: HEALTH})
    assert "no answer" in caplog.text


# --- how Ray is told of it


@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.*")  # of Ray's own, about its own settings
@pytest.mark.parametrize(
    ("launch", "num_workers", "resources"),
    [
        (LaunchConfig(workers=2, gpus_per_worker=0), 2, {"CPU": 1.0}),
        (LaunchConfig(workers=4, min_workers=2, gpus_per_worker=1), (2, 4), {"GPU": 1.0}),
        (LaunchConfig(workers=2, cpus_per_worker=3, placement="STRICT_SPREAD"), 2, {"CPU": 3.0}),
        (LaunchConfig(accelerator_type="H100"), 1, {"GPU": 1.0, "accelerator_type:H100": 0.001}),
    ],
)
def test_t2_ray_gets_the_resources_placement_and_restarts_of_the_recipe(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    launch: LaunchConfig,
    num_workers: object,
    resources: dict[str, float],
) -> None:
    smoke = load_recipe("smoke", ["training.collective_timeout_seconds=70"])
    folder = LaunchFolder.make(tmp_path, "run")
    trainer = Fleet(
        recipe=replace(smoke, launch=launch),
        job=Job(recipe={}, run_dir=str(tmp_path)),
        resources=resources_of(launch, []),
        folder=folder,
    ).trainer()
    scaling, run_config = trainer.scaling_config, trainer.run_config
    assert scaling.num_workers == num_workers
    assert scaling.resources_per_worker == resources
    assert scaling.use_gpu == ("GPU" in resources)
    assert scaling.placement_strategy == launch.placement
    assert trainer.backend_config.backend == ("cpu:gloo,cuda:nccl" if scaling.use_gpu else "gloo")
    assert trainer.backend_config.timeout_s == 70
    hidden = run_config.worker_runtime_env.get("env_vars", {}).get("CUDA_VISIBLE_DEVICES")
    assert hidden == (None if scaling.use_gpu else ""), "workers without a GPU must see none"
    assert run_config.failure_config.max_failures == 3
    assert run_config.failure_config.max_preemption_failures == -1
    assert run_config.name == folder.name
    for with_dashboard in (True, False):
        monkeypatch.setattr("ray_jobs.cluster.ray_access.has_dashboard", lambda answer=with_dashboard: answer)
        callbacks = {type(one).__name__ for one in trainer._create_default_callbacks()}
        assert ("PlacementGroupCleanerCallback" in callbacks) is with_dashboard
        assert "QuietPreemption" in callbacks
        assert "DatasetsCallback" not in callbacks, "its process would only wait"


def test_a_line_for_the_person_is_written_once_where_ray_replaces_print(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("builtins.print", redirected_print)
    caplog.set_level("INFO")
    say("step 1 of 2")
    assert capsys.readouterr().err == "step 1 of 2\n"
    assert caplog.messages == []
