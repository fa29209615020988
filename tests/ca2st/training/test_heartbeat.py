"""T3: a rank that says nothing more is told from one that is slow, and named."""

import json
import threading
from pathlib import Path

import pytest

from ca2st.training.ranks import Beat, Heartbeat, Whereabouts, describe, read_beat

FORWARD = Whereabouts(step=7, stage="forward", seconds=3.0, keys=("a", "b", "c", "d", "e"))
WAITING = Whereabouts(step=7, stage="gather", seconds=40.0)


def beat(count: int, where: Whereabouts = FORWARD) -> Beat:
    return Beat(count=count, where=where)


def test_t3_a_rank_whose_count_stands_still_is_silent_and_the_others_are_alive_or_gone() -> None:
    told = describe({1: beat(4), 2: beat(9), 3: beat(1)}, {1: beat(4), 2: beat(10, WAITING)}, ranks=[1, 2, 3])
    assert told == (
        "rank 1 is silent, last seen in forward after step 7, for 3 s with a, b, c, d ...; rank 3 has left the run; "
        "rank 2 is alive in gather after step 7, for 40 s"
    )


def heart(
    folder: Path, *, timeout_seconds: float = 2.0, where: Whereabouts = WAITING, world_size: int = 2
) -> Heartbeat:
    return Heartbeat(folder, rank=0, world_size=world_size, timeout_seconds=timeout_seconds, where=lambda: where)


def stands_still(folder: Path, *, stage: str = "forward", seconds: float = 0.1) -> None:
    """Rank 1 wrote once and never again."""
    (folder / "heartbeats").mkdir(exist_ok=True)
    document = {"count": 3, "where": {"step": 7, "stage": stage, "seconds": seconds, "keys": ["x"]}}
    (folder / "heartbeats" / "rank-1.json").write_text(json.dumps(document))


def test_t3_an_exchange_that_was_given_up_names_the_silent_rank(tmp_path: Path) -> None:
    stands_still(tmp_path)
    with heart(tmp_path) as own:
        timed_out = RuntimeError("[../third_party/gloo/...] Timed out waiting 2000ms for recv operation to complete")
        error = own.explain(timed_out)
        assert own.explain(RuntimeError("Connection closed by peer [127.0.0.1]:4711")) is None
        assert own.explain(ValueError("Timed out waiting")) is None
    assert str(error).startswith(
        "rank 0 waited 2 s for the other ranks after step 7: rank 1 is silent, last seen in forward after step 7, for "
        "0 s with x; look at that process and its machine"
    )
    assert error is not None
    assert error.exit_code == 4


def test_t3_a_rank_beats_while_it_lives_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "heartbeats" / "rank-0.json"
    counts: set[int] = set()
    with heart(tmp_path):
        changed = threading.Event()
        while len(counts) < 3:
            changed.wait(0.02)
            if (found := read_beat(path)) is not None:
                counts.add(found.count)
                assert found.where == WAITING
    assert not path.parent.exists()


def test_t3_a_rank_alone_neither_beats_nor_explains(tmp_path: Path) -> None:
    with heart(tmp_path, world_size=1) as own:
        assert own.explain(RuntimeError("Timed out waiting")) is None
        assert list(tmp_path.iterdir()) == []


def test_t3_the_stacks_are_dumped_before_the_timeout_ends_the_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    stands_still(tmp_path)
    told = ""
    with heart(tmp_path):
        while "most recent call first" not in told:
            told += capfd.readouterr().err
            threading.Event().wait(0.05)
    assert "rank 0 waits for other ranks in gather after step 7, for 40 s: rank 1 is silent, last seen" in told


@pytest.mark.parametrize("stage", ["forward", "validation", "checkpoint"])
def test_t3_a_rank_that_hangs_and_lives_dumps_its_own_stacks_once_others_wait_for_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], stage: str
) -> None:
    stands_still(tmp_path, stage="gather", seconds=1.7)
    told = ""
    with heart(tmp_path, where=Whereabouts(step=7, stage=stage, seconds=1.9)):
        while "most recent call first" not in told:
            told += capfd.readouterr().err
            threading.Event().wait(0.05)
    assert f"rank 0 is waited for by rank 1 and stands in {stage} after step 7, for 2 s; its threads:" in told
    assert "test_t3_a_rank_that_hangs" in told + capfd.readouterr().err


@pytest.mark.parametrize(("stage", "seconds"), [("gather", 0.1), ("validation", 60.0)])
def test_t3_a_long_validation_that_nobody_waits_for_dumps_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], stage: str, seconds: float
) -> None:
    stands_still(tmp_path, stage=stage, seconds=seconds)
    path = tmp_path / "heartbeats" / "rank-0.json"
    with heart(tmp_path, where=Whereabouts(step=7, stage="validation", seconds=60.0)):
        while (found := read_beat(path)) is None or found.count < 6:
            threading.Event().wait(0.02)
    assert capfd.readouterr().err == ""


def test_a_file_that_is_none_of_ours_is_no_beat(tmp_path: Path) -> None:
    path = tmp_path / "rank-1.json"
    assert read_beat(path) is None
    path.write_text('{"count": 1}')
    assert read_beat(path) is None
