"""The decode pool: order, and what happens when a child misbehaves (C5)."""

import ctypes
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from multiprocessing import active_children
from pathlib import Path

import pytest

from ca2st.errors import EnvironmentFault
from ca2st.processes import SPAWN
from sharding import workers
from sharding.workers import DecodePool, Rejected
from support.processes import python_path
from support.stub_jobs import act


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_until_gone(pids: list[int], *, seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(alive(pid) for pid in pids):
            return True
        time.sleep(0.02)
    return False


def test_results_come_back_in_the_order_of_the_jobs() -> None:
    jobs = [("sleep", 0.05 if number % 3 == 0 else 0.0) for number in range(6)] + [
        ("echo", number) for number in range(20)
    ]
    with DecodePool(act, num_workers=2, timeout_seconds=30) as pool:
        results = list(pool.map(jobs))
        assert results == [value for _, value in jobs]
        assert list(pool.map([])) == []
        assert list(pool.map([("echo", 7)])) == [7]


def test_no_more_jobs_are_read_ahead_than_three_a_child() -> None:
    read = []

    def jobs():
        for number in range(40):
            read.append(number)
            yield ("echo", number)

    with DecodePool(act, num_workers=2, timeout_seconds=30) as pool:
        results = pool.map(jobs())
        assert next(results) == 0
        assert len(read) <= 3 * 2 + 2


def test_children_are_started_all_at_once_but_no_more_than_there_are_jobs() -> None:
    for num_jobs in (1, 2, 5):
        with DecodePool(act, num_workers=3, timeout_seconds=30) as pool:
            results = pool.map([("echo", number) for number in range(num_jobs)])
            assert next(results) == 0
            assert len(active_children()) == min(num_jobs, 3)
            assert list(results) == list(range(1, num_jobs))


def test_an_interrupt_of_the_whole_group_does_not_reach_a_child_that_is_still_starting() -> None:
    def interrupt_the_first() -> None:
        while not (begun := active_children()):
            time.sleep(0.001)
        os.kill(begun[0].pid or 0, signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by tests that run in the background
    try:
        threading.Thread(target=interrupt_the_first).start()
        with DecodePool(act, num_workers=2, timeout_seconds=30) as pool:
            assert list(pool.map([("echo", number) for number in range(4)])) == list(range(4))
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_machine_without_room_for_all_children_is_told_from_a_fault_of_ours() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 8, hard))
    try:
        with (
            pytest.raises(EnvironmentFault, match=r"cannot be started: Too many open files; give fewer --workers"),
            DecodePool(act, num_workers=20, timeout_seconds=30) as pool,
        ):
            list(pool.map([("echo", 0)] * 20))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_crash_a_hang_and_a_memory_error_are_one_reject_each_and_the_pool_lives() -> None:
    jobs = [("echo", 0), ("crash", 0), ("echo", 1), ("hang", 0), ("eat", 40 * 2**30), ("exit", 3), ("echo", 2)]
    with DecodePool(act, num_workers=2, timeout_seconds=1.5) as pool:
        results = list(pool.map(jobs))
    assert [result for result in results if not isinstance(result, Rejected)] == [0, 1, 2]
    reasons = {job[0]: result for job, result in zip(jobs, results, strict=True) if isinstance(result, Rejected)}
    assert reasons["crash"] == Rejected("decoder_crash", "the decoding process died: SIGSEGV")
    assert reasons["exit"] == Rejected("decoder_crash", "the decoding process died: exit code 3")
    assert reasons["hang"].reason == "timeout"
    assert reasons["eat"].reason == "out_of_memory"


def test_a_child_that_dies_in_the_middle_of_its_answer_is_one_reject() -> None:
    with DecodePool(act, num_workers=1, timeout_seconds=30) as pool:
        first, second = pool.map([("die answering", 0), ("echo", 1)])
    assert first == Rejected("decoder_crash", "the decoding process died: SIGKILL")
    assert second == 1


def test_c5_memory_is_limited_to_what_the_pool_says() -> None:
    with DecodePool(act, num_workers=1, timeout_seconds=30, memory_bytes=256 * 2**20) as pool:
        little, much = pool.map([("eat", 100 * 2**20), ("eat", 400 * 2**20)])
    assert little == 100 * 2**20
    assert much == Rejected("out_of_memory", "decoding needed more memory than a child may have")


def test_c5_processor_time_is_limited_anew_for_each_clip() -> None:
    asked = ("limits", [resource.RLIMIT_CPU])
    with DecodePool(act, num_workers=1, timeout_seconds=600) as pool:
        (first,), _, (later,) = pool.map([asked, ("spin", 3.5), asked])
    assert 601 <= first <= 604
    assert first + 1 <= later <= 606


def test_c5_a_child_that_nobody_watches_computes_no_longer_than_a_clip_may_take() -> None:
    child = SPAWN.Process(target=_spin_under_the_limit, daemon=True)
    child.start()
    child.join(240)
    assert child.exitcode == -signal.SIGXCPU
    with DecodePool(act, num_workers=1, timeout_seconds=30) as pool:
        (late,) = pool.map([("signal", signal.SIGXCPU)])
    assert late == Rejected("timeout", "expected the clip within the clip timeout, found it unfinished")


def _spin_under_the_limit() -> None:
    workers._limit_processor_time(0.1)
    act(("spin", 60))


def test_a_child_can_neither_write_nor_start_programs_nor_connect(tmp_path: Path) -> None:
    """What a kernel without Landlock leaves is that no file grows and few are open."""
    (tmp_path / "old").write_bytes(b"x")
    with socket.create_server(("127.0.0.1", 0)) as server, DecodePool(act, num_workers=1, timeout_seconds=30) as pool:
        (refused,) = pool.map([("reach out", (tmp_path, server.getsockname()[1]))])
    version = ctypes.CDLL(None).syscall(444, None, 0, 1)
    every = ["make a file", "make a folder", "make a link", "rename", "remove", "start a program"]
    assert {"grow a file", "open many files"} <= set(refused)
    assert set(every if version >= 1 else []) <= set(refused)
    assert version < 3 or "empty a file" in refused
    assert version < 4 or "connect" in refused
    assert version < 3 or [path.name for path in tmp_path.iterdir()] == ["old"]


def test_a_refusal_and_an_unexpected_exception_carry_their_words() -> None:
    with DecodePool(act, num_workers=1, timeout_seconds=30) as pool:
        refusal, ffmpeg, bug = pool.map([("refuse", "grey frame"), ("ffmpeg", "not supported"), ("bug", "nowhere")])
    assert refusal == Rejected("decode_error", "grey frame")
    assert ffmpeg == Rejected("decode_error", "FFmpeg: not supported")
    assert bug == Rejected("internal_error", "KeyError: 'nowhere'")


def test_a_child_imports_neither_torch_nor_ray() -> None:
    with DecodePool(act, num_workers=1, timeout_seconds=30) as pool:
        assert list(pool.map([("modules", ["torch", "ray", "av", "numpy"])])) == [["av", "numpy"]]


def test_a_child_that_cannot_start_is_a_fault_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sharding.workers.serve", os._exit)
    with (
        DecodePool(act, num_workers=1, timeout_seconds=5) as pool,
        pytest.raises(EnvironmentFault, match="while starting"),
    ):
        list(pool.map([("echo", 1)]))


def test_closing_after_an_exception_leaves_no_child() -> None:
    pids: list[int] = []

    def interrupted() -> None:
        with DecodePool(act, num_workers=2, timeout_seconds=60) as pool:
            for pid in pool.map([("pid", 0), ("pid", 0), ("hang", 0), ("hang", 0)]):
                pids.append(pid)
                if len(pids) == 2:
                    raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert wait_until_gone(pids)


def test_children_of_a_killed_parent_die_with_it_even_when_they_hang() -> None:
    script = (
        "from sharding.workers import DecodePool\nfrom support.stub_jobs import act\n"
        "pool = DecodePool(act, num_workers=1, timeout_seconds=600)\n"
        "for pid in pool.map([('pid', 0), ('hang', 0)]):\n"
        "    print(pid, flush=True)\n"
    )
    environment = {**os.environ, "PYTHONPATH": python_path()}
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment)
    assert parent.stdout is not None
    with parent.stdout as lines:
        child = int(lines.readline())
        time.sleep(0.3)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    assert wait_until_gone([child])
