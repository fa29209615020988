"""The driver while the workers train, and how they hear of each other: with a clock and workers made up."""

import signal
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import pytest

from ca2st.errors import DataDamageError, EnvironmentFault, RetriesUsedUpError
from ca2st.training.errors import InterruptedRunError, TerminatedError
from ca2st.training.signals import StopRequest
from ray_jobs.cluster.driver import Fleet, resources_of
from ray_jobs.cluster.ray_access import Node
from ray_jobs.cluster.supervision import LaunchFolder, Supervision
from ray_jobs.config.recipe import Recipe
from ray_jobs.config.recipe_file import load_recipe
from ray_jobs.runs.failures import FailureRecord, keep_failure
from ray_jobs.runs.worker import Job


class Driver:
    """A supervision over a clock that only its own waiting moves."""

    def __init__(self, run_dir: Path) -> None:
        self.folder = LaunchFolder.make(run_dir, "run")
        self.stop = StopRequest()
        self.fit: Future[dict[str, str]] = Future()
        self.now = 0.0
        self.at: dict[float, Callable[[], None]] = {}
        """What happens after so many seconds."""
        self.nodes = [Node(address="10.0.0.1", node_id="1"), Node(address="10.0.0.2", node_id="2")]
        self.supervision = Supervision(
            self.folder,
            self.stop,
            grace_seconds=25.0,
            clock=lambda: self.now,
            sleep=self.sleep,
            nodes=lambda: self.nodes,
        )

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        for moment in sorted(moment for moment in self.at if moment <= self.now):
            self.at.pop(moment)()

    def ends(self, status: str, message: str = "") -> None:
        self.fit.set_result({"status": status, "message": message})

    def fails(self, *, final: bool, attempt: int = 1, preempted: bool = False, echo: bool = False) -> None:
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
                echo=echo,
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


def test_t14_workers_that_end_at_the_last_moment_of_their_grace_are_waited_for(driver: Driver) -> None:
    driver.at[1.0] = driver.stop.request
    driver.at[25.5] = lambda: driver.ends("stopped", "saved after step 7")
    with pytest.raises(TerminatedError, match="saved after step 7"):
        driver.watch()


def test_t4_a_final_failure_counts_for_more_than_a_stop_that_comes_with_it(driver: Driver) -> None:
    driver.at[1.0] = driver.stop.request
    driver.at[25.0] = lambda: driver.fails(final=True)
    with pytest.raises(DataDamageError, match="shard 3"):
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


@pytest.mark.parametrize("attempt", [None, 1])
def test_t14_a_failure_that_a_full_disk_left_off_the_record_still_ends_by_its_own_exit_code(
    driver: Driver, attempt: int | None
) -> None:
    if attempt is not None:
        driver.fails(final=False, attempt=attempt)
    told = {"status": "failed", "message": "rank 0: its state is NOT saved", "exit_code": "4"}
    driver.at[1.0] = lambda: driver.fit.set_result(told)
    with pytest.raises(EnvironmentFault, match="its state is NOT saved"):
        driver.watch()


def test_t14_a_stop_that_finds_no_worker_training_does_not_say_that_one_saved(driver: Driver) -> None:
    driver.at[1.0] = driver.stop.request
    driver.at[2.0] = lambda: driver.ends("stopped")
    with pytest.raises(TerminatedError, match="the newest checkpoint counts; rerun to resume"):
        driver.watch()


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
    assert folder.places(1)[1] == "b1"
    assert folder.places(2)[1] == "b2"
    assert folder.places(3) == {}


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
    from ray.exceptions import ActorDiedError
    from ray.train.v2.api.exceptions import ControllerError, PreemptionError, WorkerGroupError
    from ray.train.v2.api.preemption import PreemptionInfo

    fleet = fleet_of(driver, tiny_recipe)
    info = PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"a" * 56: [1]})
    used_up = fleet._ended_by(PreemptionError(info, drain_timed_out=True), driver.supervision)  # as `train` asks it
    assert isinstance(used_up, RetriesUsedUpError)
    assert "launch.max_preemptions (-1)" in str(used_up)
    announced = ActorDiedError()
    announced._preempted = True
    driver.fails(final=False)  # on record is who spoke first; what is counted is what Ray found
    taken = WorkerGroupError("a worker died", {0: RuntimeError("cut"), 1: announced})
    assert "max_preemptions" in str(fleet._ended_by(taken, driver.supervision))
    died = WorkerGroupError("a worker died", {1: RuntimeError("died")})
    assert "max_preemptions" not in str(fleet._ended_by(died, driver.supervision))
    driver.fails(final=False, attempt=2, preempted=True)
    unable = ControllerError(RuntimeError("cannot place the workers"))
    assert "cannot place the workers" in str(fleet._ended_by(unable, driver.supervision))


def fleet_of(driver: Driver, recipe: Recipe) -> Fleet:
    return Fleet(
        recipe=recipe,
        job=Job(recipe={}, run_dir=str(driver.folder.run_dir)),
        resources=resources_of(recipe.launch, []),
        folder=driver.folder,
    )


@pytest.fixture
def tiny_recipe() -> Recipe:
    return load_recipe("smoke")


@pytest.mark.parametrize("is_gone", [True, False])
def test_t2_a_lost_node_of_which_only_an_echo_came_is_named_when_the_workers_begin_again(
    driver: Driver, capsys: pytest.CaptureFixture[str], is_gone: bool
) -> None:
    driver.folder.begin(1, rank=0, node="here (10.0.0.1)")
    driver.folder.begin(1, rank=1, node="there (10.0.0.2)")
    driver.at[1.0] = lambda: driver.fails(final=False, echo=True)
    driver.at[3.0] = lambda: driver.nodes.pop() if is_gone else None
    driver.at[5.0] = lambda: driver.folder.begin(2, rank=0, node="here (10.0.0.1)")
    driver.at[7.0] = lambda: driver.ends("done")
    driver.watch()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("failed:")]
    assert ("node there (10.0.0.2) was lost with the worker of rank 1 (shard 3)" in line) is is_gone
    assert "shard 3" in line
