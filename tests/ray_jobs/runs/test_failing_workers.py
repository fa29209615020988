"""T3, T4, T12: one of several processes fails, is stopped or killed: all end, and the first failure is told."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from ca2st.durable import FaultPoints
from ca2st.errors import UserInputError
from ca2st.training.errors import RunFolderBusyError
from ca2st.training.journal import LAUNCH_LOCK_NAME, locked, read_events
from ray_jobs.config.recipe_file import load_recipe
from ray_jobs.launch import (
    _failure,
    _record,
    ended_badly,
    how_it_stopped,
    launch,
    refuse_more_workers_than_gpus,
)
from ray_jobs.runs.failures import death_of, read_failure
from ray_jobs.runs.worker import _with_own_cores
from support.tiny_runs import ca2st, journal, make_tiny_run, sequence


def end(exit_code: int, after_seconds: float = 0.0) -> None:
    time.sleep(after_seconds)
    os._exit(exit_code)


def end_by(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(60)


def blamed(*works: tuple[object, ...]) -> tuple[int | None, list[int | None]]:
    """Who is to blame of processes that run `works` (function and arguments), and all exit codes."""
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=work, args=arguments) for work, *arguments in works]  # type: ignore[misc, arg-type]  # a short table
    for worker in workers:
        worker.start()
    return ended_badly(workers), [worker.exitcode for worker in workers]


def test_t4_workers_that_end_well_are_waited_for() -> None:
    assert blamed((end, 0), (end, 0, 0.3)) == (None, [0, 0])


def test_t4_who_fails_first_is_blamed_and_the_rest_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray_jobs.launch._LAST_WORDS_SECONDS", 1.0)
    assert blamed((end, 0, 60), (end, 3), (end, 4, 0.3)) == (1, [-signal.SIGKILL, 3, 4])


def test_t12_who_is_ended_by_a_signal_is_blamed_for_the_connections_that_broke() -> None:
    assert blamed((end, 1), (end_by, signal.SIGKILL)) == (1, [1, -signal.SIGKILL])


def test_t3_a_stopped_worker_is_ended_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray_jobs.launch._LAST_WORDS_SECONDS", 0.5)
    assert blamed((end, 4, 0.2), (end_by, signal.SIGSTOP)) == (0, [4, -signal.SIGKILL])


@pytest.mark.parametrize(
    ("code", "exit_code", "words"),
    [
        (137, 4, ("rank 1 was killed (SIGKILL)", "2.50 GB", "dmesg", "training.per_device_batch_size")),
        (135, 4, ("bus error", "/dev/shm is full (12 MB are free now", "ca2st shard verify")),
        (134, 134, ("rank 1 was ended by a library (SIGABRT)", "training.collective_timeout_seconds", "rerun")),
        (139, 139, ("rank 1 ended with exit code 139",)),
        (143, 143, ("rank 1 ended with exit code 143",)),
    ],
)
def test_t12_a_worker_that_ended_without_a_word_is_explained_by_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, code: int, exit_code: int, words: tuple[str, ...]
) -> None:
    monkeypatch.setattr("resource.getrusage", lambda _who: SimpleNamespace(ru_maxrss=2_500_000_000 // 1024))
    monkeypatch.setattr("shutil.disk_usage", lambda _folder: SimpleNamespace(free=12_000_000))
    error = death_of(1, code)
    assert error.exit_code == exit_code
    for word in words:
        assert word in str(error)


def test_more_workers_than_gpus_are_refused_before_anything_starts() -> None:
    with pytest.raises(UserInputError, match=r"launch.workers = 3: expected at most one worker per GPU, found 2"):
        refuse_more_workers_than_gpus(3, 2)
    for num_workers, num_gpus in ((2, 2), (1, 8), (16, 0)):
        refuse_more_workers_than_gpus(num_workers, num_gpus)


@pytest.mark.parametrize(("others", "threads"), [("1", 8), ("4", 2), ("16", 1)])
def test_workers_of_one_machine_share_its_cores_for_decoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, others: str, threads: int
) -> None:
    recipe = load_recipe(str(make_tiny_run(tmp_path)), [])
    monkeypatch.setattr("ray_jobs.runs.worker.num_cores", lambda: 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", others)
    assert _with_own_cores(recipe).data.loader.decode_threads == threads
    named = load_recipe(str(tmp_path / "tiny.toml"), ["data.loader.decode_threads=3"])
    assert _with_own_cores(named).data.loader.decode_threads == 3


@pytest.mark.parametrize("ray_address", [None, "local"])
def test_t17_a_second_launch_in_a_busy_folder_is_refused_before_a_worker_starts(
    tmp_path: Path, ray_address: str | None
) -> None:
    recipe, run_dir = load_recipe(str(make_tiny_run(tmp_path)), ["launch.workers=2"]), tmp_path / "run"
    with (
        locked(run_dir, name=LAUNCH_LOCK_NAME),
        pytest.raises(RunFolderBusyError, match=f"process {os.getpid()} on .* is training in this run folder"),
    ):
        launch(recipe, run_dir, faults=FaultPoints.parse(""), ray_address=ray_address)
    assert [path.name for path in run_dir.iterdir()] == [LAUNCH_LOCK_NAME]


ECHO = RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4711")


def test_t4_the_record_names_the_rank_that_was_killed_and_not_the_one_that_lost_it(tmp_path: Path) -> None:
    _record(0, ECHO, tmp_path, "launch")
    error = _failure(tmp_path, "launch", rank=1, exit_code=128 + signal.SIGKILL)
    assert "rank 1 was killed (SIGKILL)" in str(error)
    record = read_failure(tmp_path)
    assert record is not None
    assert (record.rank, record.echo, record.exit_code, record.message) == (1, False, 4, str(error))


def test_t4_where_every_rank_only_lost_another_the_first_is_told(tmp_path: Path) -> None:
    _record(1, ECHO, tmp_path, "launch")
    _record(0, ECHO, tmp_path, "launch")
    error = _failure(tmp_path, "launch", rank=0, exit_code=1)
    assert str(error).startswith("first failure, on rank 1: RuntimeError: [gloo/transport/tcp/pair.cc:534] Connection")


@pytest.mark.parametrize(
    ("sent", "exit_code", "told"),
    [
        (("stopped after step 3", 143), 143, "stopped after step 3"),
        (("its state is NOT saved", 4), 4, "its state is NOT saved"),
        (("stopped after step 3", 143), 139, None),
        (None, 143, None),
    ],
)
def test_t14_what_rank_0_said_of_a_stop_is_told_where_it_ended_the_launch(
    sent: tuple[str, int] | None, exit_code: int, told: str | None
) -> None:
    reader, writer = multiprocessing.Pipe(duplex=False)
    assert how_it_stopped(reader, exit_code) is None
    if sent is not None:
        writer.send(sent)
    writer.close()
    error = how_it_stopped(reader, exit_code)
    assert (None if error is None else (str(error), error.exit_code)) == (None if told is None else (told, exit_code))


def stopped_by_its_terminal(
    recipe: Path, run_dir: Path, *settings: str, fault: str = "", steps: int = 4
) -> tuple[int, str]:
    """Exit code and stderr of two processes that get a Ctrl-C after `steps` steps; 0: as soon as both are started."""
    options = ["tracking.enabled=false", "training.epochs=4000", *settings]
    process = subprocess.Popen(
        [sys.executable, "-m", "ray_jobs.cli", "train", recipe, "--workers", "2", "--out", run_dir]
        + [part for option in options for part in ("--set", option)],
        env=os.environ | {"CA2ST_FAULT": fault},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while (
        len(psutil.Process(process.pid).children()) < 3  # one is multiprocessing's own
        or sum(1 for _ in read_events(run_dir / "journal.jsonl", event="step")) < steps
    ):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # to every process of the group, as a terminal does
    stderr = process.communicate(timeout=60)[1]
    return process.returncode, stderr


def told_of_the_end(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if "stopped by" in line or "error" in line or "interrupted" in line]


@pytest.mark.slow
def test_t14_ctrl_c_in_a_terminal_saves_and_is_told_in_one_line_and_a_full_disk_is_a_failure(tmp_path: Path) -> None:
    recipe, run_dir = make_tiny_run(tmp_path), tmp_path / "run"
    code, stderr = stopped_by_its_terminal(recipe, run_dir)
    step = sequence(run_dir)[-1][0]
    checkpoint = f"{run_dir}/checkpoints/step-{step}.attempt-1"
    assert (code, told_of_the_end(stderr)) == (
        130,
        [f"error: stopped by signal 2 after step {step}; its state is in {checkpoint}; rerun to resume"],
    )
    rarely = ("training.checkpoint_every_steps=1000000", "training.validate_every_epochs=0")
    fault = "checkpoint.model.safetensors.written:1:enospc"
    code, stderr = stopped_by_its_terminal(recipe, tmp_path / "full", *rarely, fault=fault)
    (told,) = (line for line in told_of_the_end(stderr) if line.startswith("error"))
    assert code == 4
    assert "but its state is NOT saved: cannot write " in told
    assert told.endswith("there is no checkpoint, so a rerun begins anew")


@pytest.mark.slow
def test_j6_ctrl_c_while_the_workers_start_is_told_in_one_line_and_ends_at_once(tmp_path: Path) -> None:
    recipe = make_tiny_run(tmp_path)
    begin = time.monotonic()
    code, stderr = stopped_by_its_terminal(recipe, tmp_path / "run", steps=0)
    assert (code, told_of_the_end(stderr)) == (
        130,
        ["error: stopped by signal 2 before it had begun; rerun to resume"],
    )
    assert "Traceback" not in stderr
    assert time.monotonic() - begin < 60


def last_line(stderr: str) -> str:
    return stderr.strip().splitlines()[-1]


@pytest.mark.slow
def test_t4_t12_an_exception_and_then_a_kill_on_one_rank_end_both_and_are_told(tmp_path: Path) -> None:
    recipe, run_dir = make_tiny_run(tmp_path), tmp_path / "run"
    command = ("train", recipe, "--workers", 2, "--out", run_dir, "--set", "tracking.enabled=false")
    raised = ca2st(*command, fault="step.received:5:raise:1")  # rank 0 then waits in the backward pass
    assert raised.returncode == 1, raised.stderr
    assert last_line(raised.stderr).startswith("error: first failure, on rank 1: InjectedFault: fault point step.recei")
    assert raised.stderr.count("Traceback") == 1
    killed = ca2st(*command, fault="step.updated:5:kill:1")  # rank 0 then waits in the gathering of the next step
    assert killed.returncode == 4, killed.stderr
    assert last_line(killed.stderr).startswith("error: rank 1 was killed (SIGKILL) and left no word")
    assert [line["step"] for line in journal(run_dir, "start")] == [0, 3]
    assert sequence(run_dir)[-1][0] == 8


@pytest.mark.slow
def test_t3_a_stopped_rank_is_found_named_and_ended_and_the_rerun_goes_on(tmp_path: Path) -> None:
    recipe, run_dir = make_tiny_run(tmp_path), tmp_path / "run"
    settings = ("--set", "tracking.enabled=false", "--set", "training.collective_timeout_seconds=10")
    command = ("train", recipe, "--workers", 2, "--out", run_dir, *settings)
    stopped = ca2st(*command, fault="step.received:5:stop:1")
    assert stopped.returncode == 4, stopped.stderr
    told = last_line(stopped.stderr)
    assert told.startswith("error: first failure, on rank 0: RanksSilentError: rank 0 waited 10 s for the other ranks")
    assert "rank 1 is silent, last seen in " in told
    assert "rank 0 waits for other ranks in backward after step 4" in stopped.stderr
    assert 'File "' in stopped.stderr.partition("its threads:")[2]
    assert not (run_dir / "heartbeats").exists() or not list((run_dir / "heartbeats").glob("rank-0*"))
    assert ca2st(*command).returncode == 0
    assert [step for step, _, _ in sequence(run_dir)] == list(range(1, 17))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "waits", "silent", "step"),
    [("validation.begun:1:stop:1", 0, 1, 8), ("checkpoint.model.safetensors.written:1:stop:0", 1, 0, 3)],
    ids=["in a validation", "in a save"],
)
def test_t3_a_rank_that_is_stopped_between_two_steps_is_named_with_the_stacks_of_who_waits(
    tmp_path: Path, fault: str, waits: int, silent: int, step: int
) -> None:
    recipe, run_dir = make_tiny_run(tmp_path), tmp_path / "run"
    settings = ("--set", "tracking.enabled=false", "--set", "training.collective_timeout_seconds=10")
    stopped = ca2st("train", recipe, "--workers", 2, "--out", run_dir, *settings, fault=fault)
    assert stopped.returncode == 4, stopped.stderr
    told = last_line(stopped.stderr)
    assert told.startswith(f"error: first failure, on rank {waits}: RanksSilentError: rank {waits} waited 10 s for the")
    assert f"after step {step}: rank {silent} is silent, last seen in " in told
    assert f"rank {waits} waits for other ranks in gather after step {step}" in stopped.stderr
    assert 'File "' in stopped.stderr.partition("its threads:")[2]
