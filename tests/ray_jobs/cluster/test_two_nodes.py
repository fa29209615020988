"""Training on Ray nodes with addresses of their own: a node is killed, a cable is cut, and the numbers stay."""

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.ray_nodes import NEEDED, Network, ray_network, why_no_namespaces
from support.tiny_runs import ca2st, journal, make_tiny_run, sequence

WHY_NOT = why_no_namespaces()
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(WHY_NOT is not None and not NEEDED, reason=f"network namespaces: {WHY_NOT}"),
    pytest.mark.timeout(580),
]
SETTINGS = ("--set", "tracking.enabled=false", "--set", "training.epochs=8")
SOON = {
    # A node is given up after three checks, a second apart, that are not answered within two seconds.
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
    # Whether a node will be taken away is asked every second.
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
}
NOTICE_SECONDS = 12


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_run(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def two_processes(recipe: Path) -> Path:
    run_dir = recipe.parent / "two_processes"
    done = ca2st("train", recipe, "--out", run_dir, "--workers", 2, *SETTINGS)
    assert done.returncode == 0, done.stderr
    return run_dir


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    assert WHY_NOT is None, f"network namespaces are needed here: {WHY_NOT}"
    with ray_network(SOON) as network:
        network.add_machine()
        yield network


def train_and_disturb(
    network: Network, recipe: Path, run_dir: Path, disturb: Callable[[Path], None], *settings: str
) -> str:
    """Train with two workers on two nodes, call `disturb` with the log's path after some steps; returns the log."""
    log = run_dir.with_suffix(".log")
    command = [sys.executable, "-m", "ray_jobs.cli", "train", str(recipe), "--out", str(run_dir), "--workers", "2"]
    command += ["--ray", "--ray-address", network.ray_address, *SETTINGS, *settings]
    with log.open("wb") as out:
        driver = network.head.popen(command, stdout=out)
    try:
        wait_until(lambda: driver.poll() is not None or num_steps(run_dir) >= 5)
        assert driver.poll() is None, log.read_text()
        disturb(log)
        assert driver.wait(timeout=300) == 0, log.read_text()
    finally:
        driver.kill()
    return log.read_text()


def num_steps(run_dir: Path) -> int:
    path = run_dir / "journal.jsonl"
    return path.read_text().count('"event":"step"') if path.exists() else 0


def wait_until(happened: Callable[[], bool], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def named_as_failed(log: str, address: str) -> bool:
    return any(line.startswith("failed:") and f"({address})" in line for line in log.splitlines())


def num_workers_by_attempt(run_dir: Path) -> list[int]:
    return [line["topology"]["world_size"] for line in journal(run_dir, "start")]


def test_t14_t2_an_announced_end_costs_no_step_and_a_killed_node_is_named_and_replaced(
    network: Network, recipe: Path, two_processes: Path, tmp_path: Path
) -> None:
    for machine in network.machines[1:]:
        machine.kill()
    announced = network.add_machine({"CA2ST_FAULT": "step.logged:5:stop"})  # its worker waits there for the notice
    run_dir, steps_at_its_end = tmp_path / "run", []

    def take_away_then_kill(log: Path) -> None:
        wait_until(announced.has_stopped_processes)
        network.announce_end(announced, seconds=NOTICE_SECONDS)
        # To Ray a node that is gone before its time has failed, announced or not.
        end = time.monotonic() + NOTICE_SECONDS + 1
        announced.continue_stopped_processes()
        wait_until(lambda: "will be taken away" in log.read_text())
        replacement = network.add_machine()
        time.sleep(max(0.0, end - time.monotonic()))
        announced.kill()
        steps_at_its_end.append(num_steps(run_dir))
        wait_until(lambda: num_steps(run_dir) >= 10)
        replacement.kill()
        network.add_machine()

    # One restart is allowed, and the killed node needs it: the announced end must not be counted.
    log = train_and_disturb(network, recipe, run_dir, take_away_then_kill, "--set", "launch.max_failures=1")
    assert 5 <= steps_at_its_end[0] < 10, "the workers wait, their state saved, for the node's end"
    steps = [line["step"] for line in journal(run_dir, "step")]
    assert steps[:10] == list(range(1, 11)), "none was done twice for the notice"
    announced_address, killed_address = (machine.address for machine in network.machines[-3:-1])
    assert named_as_failed(log, killed_address)
    assert not named_as_failed(log, announced_address)
    assert num_workers_by_attempt(run_dir) == [2, 2, 2]
    assert sequence(run_dir) == sequence(two_processes)


def test_t3_a_cut_link_is_noticed_and_the_run_goes_on_when_the_node_is_back(
    network: Network, recipe: Path, two_processes: Path, tmp_path: Path
) -> None:
    far = network.worker()

    def cut_for_a_while(log: Path) -> None:
        far.cut()
        wait_until(lambda: f"({far.address}) was lost" in log.read_text())
        far.repair()
        # The cluster has gone on without the node, which learns of it now and ends; whoever started it starts it again.
        wait_until(lambda: far.started[-1].poll() is not None)
        far.kill()
        far.start_ray("worker", network.ray_address)

    train_and_disturb(network, recipe, tmp_path / "run", cut_for_a_while)
    assert num_workers_by_attempt(tmp_path / "run") == [2, 2]
    assert sequence(tmp_path / "run") == sequence(two_processes)


def test_t2_an_elastic_run_goes_on_with_the_node_that_is_left_and_sees_the_same_samples(
    network: Network, recipe: Path, two_processes: Path, tmp_path: Path
) -> None:
    victim = network.worker()
    settings = ("--set", "launch.min_workers=1")
    log = train_and_disturb(network, recipe, tmp_path / "run", lambda log: victim.kill(), *settings)
    assert "PlacementGroupCleaner" not in log, "this cluster has no dashboard, which the cleaner would ask in vain"
    assert named_as_failed(log, victim.address)
    assert num_workers_by_attempt(tmp_path / "run") == [2, 1]
    ours, theirs = sequence(tmp_path / "run"), sequence(two_processes)
    assert [hashed for _, hashed, _ in ours] == [hashed for _, hashed, _ in theirs]
    assert [loss for _, _, loss in ours] == pytest.approx([loss for _, _, loss in theirs], rel=1e-4)
