"""The driver while the workers train, and how they hear of each other: with a clock and workers made up."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest

from ca2st.errors import DataDamageError, RetriesUsedUpError
from ca2st.training.errors import InterruptedRunError, TerminatedError
from ca2st.training.signals import StopRequest
from ray_jobs.config.recipe import Recipe
from ray_jobs.config.recipe_file import load_recipe
from ray_jobs.ray_train.demand import demand_of
from ray_jobs.ray_train.driver import Fleet
from ray_jobs.ray_train.launch_folder import LaunchFolder
from ray_jobs.ray_train.stopping import ended_by_signals, hold, preemption_notice, watching
from ray_jobs.ray_train.supervision import FINAL_GRACE_SECONDS, Situation, Supervision, next_move
from ray_jobs.running.failure_record import FailureRecord, keep_failure
from ray_jobs.running.worker import Job

WAITING = Situation(
    ended=False, stop_asked=False, since_passed_on=None, started=True, since_final=None, grace_seconds=25.0
)


@pytest.mark.parametrize(
    ("changes", "move"),
    [
        ({}, "wait"),
        ({"ended": True, "stop_asked": True}, "finish"),
        ({"stop_asked": True}, "pass stop on"),
        ({"stop_asked": True, "since_passed_on": 24.0}, "wait"),
        ({"stop_asked": True, "since_passed_on": 25.0}, "end stopped"),
        ({"stop_asked": True, "since_passed_on": 0.0, "started": False}, "end stopped"),
        ({"since_final": FINAL_GRACE_SECONDS - 1}, "wait"),
        ({"since_final": FINAL_GRACE_SECONDS}, "end failed"),
        ({"since_final": FINAL_GRACE_SECONDS, "ended": True}, "finish"),
    ],
)
def test_t14_the_driver_waits_as_long_as_workers_may_need_and_no_longer(changes: dict[str, object], move: str) -> None:
    assert next_move(replace(WAITING, **changes)) == move  # type: ignore[arg-type]  # the names of its fields


class Driver:
    """A supervision over a clock that only its own waiting moves."""

    def __init__(self, run_dir: Path) -> None:
        self.folder = LaunchFolder.make(run_dir, "run")
        self.stop = StopRequest()
        self.fit: Future[dict[str, str]] = Future()
        self.now = 0.0
        self.at: dict[float, Callable[[], None]] = {}
        """What happens after so many seconds."""
        self.supervision = Supervision(
            self.folder, self.stop, grace_seconds=25.0, clock=lambda: self.now, sleep=self.sleep
        )

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        for moment in sorted(moment for moment in self.at if moment <= self.now):
            self.at.pop(moment)()

    def ends(self, status: str, message: str = "") -> None:
        self.fit.set_result({"status": status, "message": message})

    def fails(self, *, final: bool, attempt: int = 1, preempted: bool = False) -> None:
        keep_failure(
            self.folder.run_dir,
            FailureRecord(
                kind="DataDamageError",
                message="shard 3",
                exit_code=3,
                rank=1,
                node="b",
                attempt=attempt,
                final=final,
                launch=self.folder.name,
                preempted=preempted,
            ),
        )

    def watch(self) -> None:
        self.supervision.until_over(self.fit)


@pytest.fixture
def driver(tmp_path: Path) -> Driver:
    made = Driver(tmp_path)
    made.folder.begin(1, rank=0, node="a")
    return made


def test_a_run_that_is_done_is_over(driver: Driver) -> None:
    driver.at[3.0] = lambda: driver.ends("done")
    driver.watch()
    assert driver.now == 3.0


@pytest.mark.parametrize(("number", "kind"), [(signal.SIGTERM, TerminatedError), (signal.SIGINT, InterruptedRunError)])
def test_t14_a_signal_to_the_driver_reaches_the_workers_and_ends_the_run_resumable(
    driver: Driver, number: int, kind: type[Exception]
) -> None:
    seen: list[int] = []
    driver.at[1.0] = lambda: driver.stop.request(number)
    driver.at[4.0] = lambda: (seen.append(driver.folder.stop_signal()), driver.ends("stopped", "rerun to resume"))[1]
    with pytest.raises(kind, match="rerun to resume"):
        driver.watch()
    assert seen == [number]
    assert driver.now == 4.0


def test_t14_workers_that_do_not_end_in_their_grace_are_not_waited_for(driver: Driver) -> None:
    driver.at[1.0] = driver.stop.request
    with pytest.raises(TerminatedError, match="had not ended"):
        driver.watch()
    assert driver.now == 26.0


def test_j6_a_signal_before_any_worker_has_begun_ends_at_once(tmp_path: Path) -> None:
    driver = Driver(tmp_path)
    driver.at[10.0] = driver.stop.request
    with pytest.raises(TerminatedError):
        driver.watch()
    assert driver.now == 10.0


def test_t4_a_failure_that_no_restart_mends_ends_the_run_by_its_own_error(driver: Driver) -> None:
    driver.at[1.0] = lambda: driver.fails(final=True)
    driver.at[2.0] = lambda: driver.ends("failed")
    with pytest.raises(DataDamageError, match="rank 1 on b, attempt 1: DataDamageError: shard 3"):
        driver.watch()


def test_t4_ranks_that_wait_for_the_failed_one_for_ever_are_ended_within_ten_seconds(driver: Driver) -> None:
    driver.at[1.0] = lambda: driver.fails(final=True)
    with pytest.raises(DataDamageError, match="shard 3"):
        driver.watch()
    assert driver.now - 1.0 < 10.0


def test_t13_each_failed_attempt_is_told_once(driver: Driver, capsys: pytest.CaptureFixture[str]) -> None:
    driver.at[1.0] = lambda: driver.fails(final=False, attempt=1)
    driver.at[5.0] = lambda: driver.fails(final=False, attempt=2)
    driver.at[9.0] = lambda: driver.ends("done")
    driver.watch()
    told = capsys.readouterr().err
    assert told.count("attempt 1: ") == told.count("attempt 2: ") == 1


def test_t14_a_node_taken_away_as_announced_is_not_told_as_a_failure(
    driver: Driver, capsys: pytest.CaptureFixture[str]
) -> None:
    driver.at[1.0] = lambda: driver.fails(final=False, preempted=True)
    driver.at[9.0] = lambda: driver.ends("done")
    driver.watch()
    told = capsys.readouterr().err
    assert "taken away as announced: rank 1 on b, attempt 1" in told
    assert "failed:" not in told


def test_a_failure_of_an_earlier_launch_counts_for_nothing(driver: Driver) -> None:
    driver.fails(final=True)
    later = Driver(driver.folder.run_dir)
    assert later.supervision.failure() is None
    later.at[20.0] = lambda: later.ends("done")
    later.watch()


def test_what_ray_raises_passes_through(driver: Driver) -> None:
    driver.fit.set_exception(RuntimeError("controller died"))
    with pytest.raises(RuntimeError, match="controller died"):
        driver.watch()


@pytest.mark.parametrize(("number", "kind"), [(signal.SIGTERM, TerminatedError), (signal.SIGINT, InterruptedRunError)])
def test_j6_a_signal_while_nothing_is_to_be_saved_ends_through_the_cleaning_up(
    number: int, kind: type[Exception]
) -> None:
    before, cleaned = signal.getsignal(number), list[object]()

    def connect() -> None:
        try:
            with contextlib.suppress(Exception):  # as a library might, that tries again
                os.kill(os.getpid(), number)
                time.sleep(10)
        finally:
            cleaned.append(signal.getsignal(number))

    with pytest.raises(kind, match="rerun to resume"), ended_by_signals("rerun to resume"):
        connect()
    assert cleaned == [signal.SIG_DFL], "a second signal ends at once"
    assert signal.getsignal(number) == before


# --- how a worker learns of a stop


def test_t14_a_worker_hears_of_the_stop_file_in_a_thread_of_its_own(tmp_path: Path) -> None:
    folder = LaunchFolder.make(tmp_path, "run")
    with watching(folder.stop_signal, poll_seconds=0.01) as stop:
        time.sleep(0.05)
        assert stop.signal_number == 0
        folder.ask_stop(signal.SIGINT)
        _until(lambda: stop.signal_number == signal.SIGINT)


def test_t14_storage_that_does_not_answer_is_asked_again(caplog: pytest.LogCaptureFixture) -> None:
    answers = iter([OSError("stale file handle"), OSError("stale file handle"), ValueError("half a file")])

    def ask() -> int:
        error = next(answers, None)
        if error is not None:
            raise error
        return int(signal.SIGTERM)

    with watching(ask, poll_seconds=0.01) as stop:
        _until(lambda: stop.signal_number == signal.SIGTERM)
    assert caplog.text.count("stale file handle") == 1
    assert "half a file" not in caplog.text


def test_t14_after_a_notice_a_worker_holds_until_somebody_stops_the_run(tmp_path: Path) -> None:
    folder = LaunchFolder.make(tmp_path, "run")
    holding = threading.Thread(target=hold, args=(folder.stop_signal,), kwargs={"poll_seconds": 0.01})
    holding.start()
    holding.join(0.05)
    assert holding.is_alive()
    folder.ask_stop(signal.SIGTERM)
    holding.join(10)
    assert not holding.is_alive()


def test_t14_rays_notice_is_read_where_ray_keeps_it() -> None:
    from ray.train.v2._internal.execution import context
    from ray.train.v2._internal.execution.preemption import PreemptionContext
    from ray.train.v2.api.preemption import PreemptionInfo

    class Context:
        preemption_context = PreemptionContext()

    info = PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"a" * 56: [1]})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(context, "_train_context", Context)
        assert preemption_notice() is None
        Context.preemption_context.preemption_info = info
        assert preemption_notice() is info


def _until(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    pytest.fail("never happened")


# --- the files between driver and workers


def test_t15_every_launch_has_a_folder_of_its_own(tmp_path: Path) -> None:
    first, second = LaunchFolder.make(tmp_path, "run"), LaunchFolder.make(tmp_path, "run")
    assert first.name != second.name
    assert first.run_dir == tmp_path
    first.ask_stop(signal.SIGTERM)
    assert second.stop_signal() == 0
    first.remove()
    assert not first.path.exists()


def test_a_run_whose_name_is_a_path_has_one_launch_folder_in_its_run_folder(tmp_path: Path) -> None:
    folder = LaunchFolder.make(tmp_path, "group/it's mine")
    assert folder.run_dir == tmp_path
    assert folder.name.startswith("group-it-s-mine-")


def test_attempts_and_the_places_of_their_workers_are_known(tmp_path: Path) -> None:
    folder = LaunchFolder.make(tmp_path, "run")
    assert folder.num_attempts() == 0
    for attempt in (1, 2):
        folder.begin(attempt, rank=1, node=f"b{attempt}")
        folder.begin(attempt, rank=0, node="a")
    assert folder.num_attempts() == 2
    assert folder.node_of(1, 1) == "b1"
    assert folder.node_of(2, 1) == "b2"
    assert folder.node_of(3, 1) == ""


def test_t4_a_final_failure_is_told_as_such_though_a_rank_that_only_heard_of_it_used_up_the_restarts(
    driver: Driver, tiny_recipe: Recipe
) -> None:
    from ray.train import TrainingFailedError

    fleet = fleet_of(driver, tiny_recipe)
    # As `train` asks it.
    assert isinstance(fleet._ended_by(TrainingFailedError("gone"), driver.supervision), RetriesUsedUpError)
    driver.fails(final=True)
    assert isinstance(fleet._ended_by(TrainingFailedError("gone"), driver.supervision), DataDamageError)


def test_t14_nodes_taken_away_too_often_end_the_run_by_the_setting_that_allows_more(
    driver: Driver, tiny_recipe: Recipe
) -> None:
    from ray.train.v2.api.exceptions import PreemptionError, WorkerGroupError
    from ray.train.v2.api.preemption import PreemptionInfo

    fleet = fleet_of(driver, tiny_recipe)
    info = PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"a" * 56: [1]})
    used_up = fleet._ended_by(PreemptionError(info, drain_timed_out=True), driver.supervision)  # as `train` asks it
    assert isinstance(used_up, RetriesUsedUpError)
    assert "launch.max_preemptions (-1)" in str(used_up)
    driver.fails(final=False)
    died = WorkerGroupError("a worker died", {1: RuntimeError("died")})
    assert "max_preemptions" not in str(fleet._ended_by(died, driver.supervision))
    driver.fails(final=False, attempt=2, preempted=True)
    assert "max_preemptions" in str(fleet._ended_by(died, driver.supervision))


def fleet_of(driver: Driver, recipe: Recipe) -> Fleet:
    return Fleet(
        recipe=recipe,
        job=Job(recipe={}, run_dir=str(driver.folder.run_dir)),
        demand=demand_of(recipe.launch, []),
        folder=driver.folder,
        has_dashboard=False,
    )


@pytest.fixture
def tiny_recipe() -> Recipe:
    return load_recipe("smoke")
