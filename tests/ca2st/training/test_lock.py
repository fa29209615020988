import os
import subprocess
import sys
from pathlib import Path

import pytest

from ca2st.training.errors import RunFolderBusyError
from ca2st.training.journal import LAUNCH_LOCK_NAME, locked


def test_a_second_run_in_the_folder_is_refused_with_the_holder(tmp_path: Path) -> None:
    with locked(tmp_path / "run"):
        with pytest.raises(RunFolderBusyError, match=f"process {os.getpid()} on .* is training in this run folder"):
            with locked(tmp_path / "run", wait_seconds=0.0):
                pass
    with locked(tmp_path / "run", wait_seconds=0.0):
        pass


def test_a_killed_holder_leaves_no_lock_behind(tmp_path: Path) -> None:
    code = (
        "import os, pathlib, signal, sys\n"
        "from ca2st.training.journal import LAUNCH_LOCK_NAME, locked\n"
        "with locked(pathlib.Path(sys.argv[1])):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == -9
    with locked(tmp_path, wait_seconds=0.0):
        assert f"process {os.getpid()}" in (tmp_path / "run.lock").read_text()


def test_t17_the_lock_of_a_launch_is_not_that_of_its_ranks(tmp_path: Path) -> None:
    with locked(tmp_path, name=LAUNCH_LOCK_NAME), locked(tmp_path, wait_seconds=0.0):
        with pytest.raises(RunFolderBusyError), locked(tmp_path, name=LAUNCH_LOCK_NAME, wait_seconds=0.0):
            pytest.fail("two launches in one folder")
