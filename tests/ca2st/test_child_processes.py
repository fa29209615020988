"""Children that start without the program that started them, from whatever kind of program, and end with it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from support.processes import python_path

ONCE = """\
import operator
from concurrent.futures import ProcessPoolExecutor
from ca2st.processes import SPAWN
print("started")
with ProcessPoolExecutor(1, mp_context=SPAWN) as pool:
    print(pool.submit(operator.add, 40, 2).result())
"""
HANGS = """\
import time
from concurrent.futures import ProcessPoolExecutor
from ca2st.processes import SPAWN, die_with_parent
pool = ProcessPoolExecutor(1, mp_context=SPAWN, initializer=die_with_parent)
print(pool.submit(time.sleep, 0).result(), flush=True)
pool.submit(time.sleep, 600)
"""


def run(command: list[str], *, folder: Path, text: str | None = None) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *command],
        input=text,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": python_path()},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("how", ["a script", "stdin", "a module", "a command"])
def test_a_program_without_a_guard_is_run_once_and_its_child_works(tmp_path: Path, how: str) -> None:
    (tmp_path / "unguarded.py").write_text(ONCE)
    command = {"a script": ["unguarded.py"], "stdin": ["-"], "a module": ["-m", "unguarded"], "a command": ["-c", ONCE]}
    done = run(command[how], folder=tmp_path, text=ONCE if how == "stdin" else "")
    assert (done.returncode, done.stdout) == (0, "started\n42\n"), done.stderr


def test_files_of_the_working_directory_that_are_named_like_modules_are_not_imported(tmp_path: Path) -> None:
    (tmp_path / "script").mkdir()
    (tmp_path / "script" / "unguarded.py").write_text(ONCE)
    for name in ("pickle", "random", "selectors", "ca2st"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('not mine')\n")
    done = run([str(tmp_path / "script" / "unguarded.py")], folder=tmp_path)
    assert (done.returncode, done.stdout) == (0, "started\n42\n"), done.stderr


def test_a_child_that_hangs_ends_with_its_killed_parent(tmp_path: Path) -> None:
    (tmp_path / "hangs.py").write_text(HANGS)
    environment = os.environ | {"PYTHONPATH": python_path()}
    command = [sys.executable, str(tmp_path / "hangs.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "None\n"
        children = psutil.Process(parent.pid).children()
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children):
        assert time.monotonic() < deadline, "a child outlived its parent"
        time.sleep(0.02)


def test_the_project_starts_processes_by_this_context_alone() -> None:
    root = Path(__file__).parents[2]
    sources = [
        path for package in ("ca2st", "sharding", "pipelines", "ray_jobs") for path in (root / package).rglob("*.py")
    ]
    others = {
        path.relative_to(root).as_posix()
        for path in sources
        if any(
            way in path.read_text()
            for way in ("multiprocessing.get_context(", "multiprocessing.Process(", '"spawn"', "os.fork(")
        )
    }
    assert others == set()
