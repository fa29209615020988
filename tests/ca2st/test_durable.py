"""The write protocol: complete under the final name, or not there."""

import errno
import math
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ca2st.durable import (
    FaultPoints,
    InjectedFault,
    append_bytes,
    sweep_temporaries,
    take_lock,
    unwritable,
    write_bytes,
    writing,
)
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


@pytest.mark.parametrize("text", ["here", "here:x", "here:²", "here:1:explode", "a:1:kill:more"])
def test_fault_texts_of_another_form_are_refused(text: str) -> None:
    with pytest.raises(UserInputError, match="expected point:nth"):
        FaultPoints.parse(text)


def test_an_empty_fault_text_is_inert() -> None:
    FaultPoints.parse("").reach("")


def test_a_reader_of_the_old_file_keeps_its_bytes_since_the_new_one_gets_its_name_by_a_rename(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write_bytes(path, b"old")
    with path.open("rb") as reader:
        write_bytes(path, b"new")
        assert reader.read() == b"old"
    assert path.read_bytes() == b"new"


def test_the_file_is_durable_before_it_has_its_name_and_the_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, synced, real = tmp_path / "a.bin", [], os.fsync

    def recorded(descriptor: int) -> None:
        synced.append((os.fstat(descriptor).st_ino, path.exists()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", recorded)
    write_bytes(path, b"bytes")
    assert synced == [(path.stat().st_ino, False), (tmp_path.stat().st_ino, True)]


def test_a_file_of_another_under_a_temporary_name_or_a_link_to_it_is_never_written(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.write_bytes(b"theirs")
    for name in (".a.bin.tmp", f".a.bin.{os.getpid()}.tmp"):
        (tmp_path / name).symlink_to(theirs)
    (tmp_path / "a.bin").symlink_to(theirs)
    write_bytes(tmp_path / "a.bin", b"ours")
    assert theirs.read_bytes() == b"theirs"
    assert not (tmp_path / "a.bin").is_symlink()
    sweep_temporaries(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"a.bin", "theirs"}


def test_no_two_temporary_names_are_the_same_and_none_is_longer_than_a_name_may_be(tmp_path: Path) -> None:
    path, seen = tmp_path / ("\N{LATIN SMALL LETTER U WITH DIAERESIS}" * 125 + ".json"), set()
    for _ in range(3):
        with writing(path) as file:
            seen.add(file.name)
    assert len(seen) == 3
    with pytest.raises(EnvironmentFault, match="File name too long; choose a shorter name"):
        write_bytes(tmp_path / ("x" * 256), b"")


def test_bytes_are_added_to_a_file_but_not_through_a_link(tmp_path: Path) -> None:
    append_bytes(tmp_path / "log", b"a\n")
    append_bytes(tmp_path / "log", b"b\n")
    assert (tmp_path / "log").read_bytes() == b"a\nb\n"
    (tmp_path / "link").symlink_to(tmp_path / "log")
    with pytest.raises(EnvironmentFault, match="symbolic link, which is not followed"):
        append_bytes(tmp_path / "link", b"c\n")
    assert (tmp_path / "log").read_bytes() == b"a\nb\n"


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, r"No space left on device \(\d+ bytes are free there\); free space there, or"),
        (errno.EROFS, "Read-only file system; make its file system writable, or choose another folder"),
        (errno.EACCES, "Permission denied; give this user the right to write into its folder, or"),
        (errno.EDQUOT, "Disk quota exceeded; free space within the quota, or"),
    ],
)
def test_what_the_machine_refuses_is_said_with_what_is_needed(tmp_path: Path, number: int, words: str) -> None:
    with pytest.raises(EnvironmentFault, match=f"^cannot write {tmp_path}/a: {words}"):
        raise unwritable(tmp_path / "a", OSError(number, os.strerror(number)))


def test_a_folder_that_takes_no_files_is_named_without_a_temporary_name(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match=r"^cannot write /proc/self/fdinfo/a: no file can be made in its folder"):
        write_bytes(Path("/proc/self/fdinfo/a"), b"bytes")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserInputError, match=f"^cannot write {tmp_path}/folder: Is a directory; choose another name"):
        write_bytes(tmp_path / "folder", b"bytes")
    (tmp_path / "file").touch()
    with pytest.raises(UserInputError, match=f"^cannot write {tmp_path}/file/a: Not a directory; choose another name"):
        write_bytes(tmp_path / "file" / "a", b"bytes")
    with pytest.raises(FileNotFoundError, match=f"'{tmp_path}/none/a'"):
        write_bytes(tmp_path / "none" / "a", b"bytes")
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["file", "folder"]


def test_a_limit_for_the_size_of_files_is_the_environments_fault(tmp_path: Path) -> None:
    script = (
        "import pathlib, sys; from ca2st.durable import *; from ca2st.errors import EnvironmentFault\n"
        "try: write_bytes(pathlib.Path(sys.argv[1]), bytes(100_000))\n"
        "except EnvironmentFault as error: print(error)"
    )

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "a")],
        preexec_fn=limit,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "File too large; raise the limit for the size of a file (ulimit -f)" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_lock_excludes_others_until_its_file_is_closed_and_a_shared_one_only_those_that_want_it_alone(
    tmp_path: Path,
) -> None:
    path = tmp_path / "lock"
    with path.open("ab") as holder, path.open("rb") as other:
        assert take_lock(holder)
        assert not take_lock(other)
        assert not take_lock(other, shared=True, wait_seconds=0.1)
    with path.open("rb") as one, path.open("rb") as another, path.open("ab") as writer:
        assert take_lock(one, shared=True)
        assert take_lock(another, shared=True, wait_seconds=math.inf)
        assert not take_lock(writer)


def test_a_lock_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with path.open("ab") as holder, path.open("ab") as waiting:
        assert take_lock(holder)
        release = threading.Timer(0.2, holder.close)
        release.start()
        assert take_lock(waiting, wait_seconds=30.0)
        release.join()
