"""The write protocol: complete under the final name, or not there."""

import errno
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ca2st.durable import FaultPoints, InjectedFault, sweep_temporaries, write_bytes, writing
from ca2st.errors import EnvironmentFault, UserInputError


def test_a_written_file_has_its_bytes_and_leaves_no_temporary(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a.bin", b"bytes")
    assert (tmp_path / "a.bin").read_bytes() == b"bytes"
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


def test_an_error_inside_the_block_leaves_the_old_file_untouched(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write_bytes(path, b"old")

    def overwrite_badly() -> None:
        with writing(path) as file:
            file.write(b"new, but")
            raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"):
        overwrite_badly()
    assert path.read_bytes() == b"old"
    assert sweep_temporaries(tmp_path) == []


def test_no_space_is_an_environment_fault_that_names_the_path(tmp_path: Path) -> None:
    faults = FaultPoints.parse("file.written:1:enospc")
    with pytest.raises(EnvironmentFault, match=r"cannot write .*a\.bin: No space left"):
        write_bytes(tmp_path / "a.bin", b"bytes", faults=faults)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_bytes(tmp_path / "missing" / "a.bin", b"bytes")


@pytest.mark.parametrize(("point", "expected"), [("file.written", b"old"), ("file.renamed", b"new")])
def test_a_kill_leaves_the_old_or_the_new_file_never_a_mixture(tmp_path: Path, point: str, expected: bytes) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    script = (
        "import pathlib, sys; from ca2st.durable import *;"
        "write_bytes(pathlib.Path(sys.argv[1]), b'new', faults=FaultPoints.parse(sys.argv[2]))"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(path), f"{point}:1"], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert path.read_bytes() == expected
    sweep_temporaries(tmp_path)
    assert [left.name for left in tmp_path.iterdir()] == ["a.bin"]


def test_a_fault_happens_at_the_nth_arrival_only() -> None:
    faults = FaultPoints.parse("here:2:raise")
    faults.reach("here")
    faults.reach("elsewhere")
    with pytest.raises(InjectedFault, match="arrival 2"):
        faults.reach("here")
    faults.reach("here")


def test_an_enospc_fault_is_the_error_of_a_full_disk() -> None:
    with pytest.raises(OSError) as caught:
        FaultPoints.parse("here:1:enospc").reach("here")
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize("text", ["here", "here:x", "here:1:explode", "a:1:kill:more"])
def test_fault_texts_of_another_form_are_refused(text: str) -> None:
    with pytest.raises(UserInputError, match="expected point:nth"):
        FaultPoints.parse(text)


def test_an_empty_fault_text_is_inert() -> None:
    FaultPoints.parse("").reach("")
