import errno
import json
import math
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ca2st.errors import EnvironmentFault
from ca2st.training import journal as module
from ca2st.training.best import validations
from ca2st.training.journal import Journal, cut_torn_end, last_attempt, read_events, run_sequence, skipped_steps


def write_run(path: Path, attempt: int, losses: dict[int, float]) -> None:
    journal = Journal(path, attempt=attempt, wall_clock=lambda: 12.5)
    journal.write("start", step=0)
    for step, loss in losses.items():
        journal.write("step", step=step, loss=loss)
    journal.close()


def test_a_line_holds_event_attempt_time_and_fields(tmp_path: Path) -> None:
    write_run(tmp_path / "j", 3, {7: 0.5})
    lines = [json.loads(line) for line in (tmp_path / "j").read_text().splitlines()]
    assert lines[1] == {"event": "step", "attempt": 3, "time": 12.5, "step": 7, "loss": 0.5}


def test_a_name_that_is_no_utf_8_is_written_as_text_that_is_read_back(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", attempt=1)
    journal.write("end", status="failed", error="cannot read /data/caf\udce9")
    journal.close()
    assert next(read_events(tmp_path / "j"))["error"] == r"cannot read /data/caf\udce9"


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_comes_back_exactly(tmp_path_factory: pytest.TempPathFactory, value: float) -> None:
    path = tmp_path_factory.mktemp("journal") / "j"
    write_run(path, 1, {1: value})
    assert next(read_events(path, event="step"))["loss"] == value


def test_the_sequence_is_the_last_line_of_each_step(tmp_path: Path) -> None:
    write_run(tmp_path / "j", 1, {1: 0.1, 2: 0.2, 3: 0.3})
    write_run(tmp_path / "j", 2, {3: 0.33, 4: 0.4})
    assert [(line["step"], line["loss"]) for line in run_sequence(tmp_path / "j")] == [
        (1, 0.1),
        (2, 0.2),
        (3, 0.33),
        (4, 0.4),
    ]
    assert last_attempt(tmp_path / "j") == 2
    assert last_attempt(tmp_path / "none") == 0


@pytest.mark.parametrize("tear", [b'{"event":"st', b'{"event":"step"}', b"\0\0\0\0", b"\0\0\n", b"\n\n", b'7\n"x"\n'])
def test_a_torn_end_is_cut_and_the_whole_lines_stay(tmp_path: Path, tear: bytes) -> None:
    path = tmp_path / "j"
    write_run(path, 1, {1: 0.1})
    whole = path.read_bytes()
    path.write_bytes(whole + tear)
    assert cut_torn_end(path) == len(tear)
    assert path.read_bytes() == whole
    assert cut_torn_end(path) == 0


@given(st.integers(0, 200))
def test_a_journal_cut_anywhere_keeps_exactly_its_whole_lines(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    path = tmp_path_factory.mktemp("journal") / "j"
    write_run(path, 1, {1: 0.1, 2: 0.2})
    data = path.read_bytes()[:cut]
    path.write_bytes(data)
    cut_torn_end(path)
    assert path.read_bytes() == data[: data.rfind(b"\n") + 1]


def test_a_reader_of_a_living_journal_leaves_the_unfinished_line_out(tmp_path: Path) -> None:
    path = tmp_path / "j"
    write_run(path, 1, {1: 0.1})
    with path.open("ab") as file:
        file.write(b'{"event":"step","st')
    assert [line["event"] for line in read_events(path)] == ["start", "step"]


def test_a_loss_that_is_not_finite_is_never_written(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", attempt=1)
    with pytest.raises(ValueError, match="not JSON compliant"):
        journal.write("step", loss=math.nan)
    journal.close()
    assert (tmp_path / "j").read_bytes() == b""


def test_lines_wait_for_space_on_a_full_disk_and_follow_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path / "j", attempt=1)
    real_write, room = os.write, [5]

    def write(descriptor: int, data: bytes) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        count = real_write(descriptor, data[: room[0]])
        room[0] -= count
        return count

    monkeypatch.setattr(module.os, "write", write)
    journal.write("step", step=1)
    journal.write("step", step=2)
    with pytest.raises(EnvironmentFault, match="No space left on device; free space"):
        journal.sync()
    room[0] = 10**6
    journal.write("step", step=3)
    journal.close()
    assert [line["step"] for line in read_events(tmp_path / "j")] == [1, 2, 3]


def test_closing_says_when_lines_are_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(descriptor: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    journal = Journal(tmp_path / "j", attempt=1)
    monkeypatch.setattr(module.os, "write", write)
    journal.write("end")
    with pytest.raises(EnvironmentFault, match="No space left"):
        journal.close()


def test_a_folder_that_is_not_there_is_an_environment_fault(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match=r"cannot write .*choose another run folder"):
        Journal(tmp_path / "none" / "j", attempt=1)


@pytest.mark.parametrize("event", ["start", "step", "eval", "fault", "end"])
def test_a_line_without_its_fields_is_left_out_and_a_resume_reads_the_others(
    tmp_path: Path, event: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "j"
    path.write_text(f'{{"event":"{event}","attempt":1,"time":1.0}}\n')
    journal = Journal(path, attempt=1)
    journal.write("fault", kind="skipped_step", step=2)
    journal.close()
    assert skipped_steps(path, until=3) == [2]
    assert validations(path) == {}
    assert [line["event"] for line in read_events(path)] == ["fault"]
    assert f"DAMAGED JOURNAL {path}:1" in caplog.text
