"""Two CPU processes (gloo, loopback) against one, and against themselves after a kill."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import support.train_on_ranks
from support.processes import python_path

from ca2st.training.checkpoint import list_checkpoints, read_checkpoint
from ca2st.training.journal import read_events, run_sequence

pytestmark = pytest.mark.slow


def run(folder: Path, *, ranks: int = 2, **options: Any) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return subprocess.run(
        [*launcher, support.train_on_ranks.__file__, json.dumps({"folder": str(folder), **options})],
        check=False,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1", "PATH": ""},
        timeout=200,
    )


def succeed(folder: Path, **options: Any) -> None:
    done = run(folder, **options)
    assert done.returncode == 0, done.stderr


def steps(folder: Path, *fields: str) -> list[tuple[Any, ...]]:
    return [tuple(line[field] for field in fields) for line in run_sequence(folder / "journal.jsonl")]


def last_files(folder: Path) -> dict[str, bytes]:
    return dict(read_checkpoint(list_checkpoints(folder / "checkpoints")[0]).files)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    succeed(folder)
    return folder


def test_two_processes_see_the_samples_of_one_and_compute_its_losses(tmp_path: Path) -> None:
    succeed(tmp_path / "one", ranks=1, dropout=0.0)
    succeed(tmp_path / "two", ranks=2, dropout=0.0)
    assert steps(tmp_path / "one", "step", "epoch", "sample_ids_hash", "lr") == steps(
        tmp_path / "two", "step", "epoch", "sample_ids_hash", "lr"
    )
    one, two = (steps(tmp_path / name, "loss", "grad_norm") for name in ("one", "two"))
    for own, other in zip(one, two, strict=True):
        assert own == pytest.approx(other, rel=1e-6)
    evals = [
        [e["metrics"] for e in read_events(tmp_path / name / "journal.jsonl", event="eval")] for name in ("one", "two")
    ]
    assert len(evals[0]) == 2
    assert evals[0] == evals[1]


@pytest.mark.parametrize(("rank", "fault"), [(0, "step.logged:5"), (1, "step.updated:7")])
def test_t1_killing_either_rank_and_rerunning_gives_the_same_bits(
    undisturbed: Path, tmp_path: Path, rank: int, fault: str
) -> None:
    assert run(tmp_path, fault=fault, fault_rank=rank).returncode != 0
    assert len(steps(tmp_path, "step")) < 8
    succeed(tmp_path)
    fields = ("step", "loss", "grad_norm", "sample_ids_hash")
    assert steps(tmp_path, *fields) == steps(undisturbed, *fields)
    assert last_files(tmp_path) == last_files(undisturbed)


def test_a_run_of_two_processes_goes_on_with_one_in_the_same_order(undisturbed: Path, tmp_path: Path) -> None:
    succeed(tmp_path, max_steps=5)
    succeed(tmp_path, ranks=1)
    assert steps(tmp_path, "step", "sample_ids_hash") == steps(undisturbed, "step", "sample_ids_hash")
    start = list(read_events(tmp_path / "journal.jsonl", event="start"))[-1]
    assert start["changes"] == ["world_size: 2 -> 1"]


def test_t4_a_loader_that_fails_on_one_rank_ends_both_with_its_error(tmp_path: Path) -> None:
    done = run(tmp_path, spoil_rank=1)
    assert "rank 1: DataDamageError: shard 7, clip-3: damaged" in done.stderr
    assert "rank 0: PeerFailedError: rank 1 failed with DataDamageError: shard 7, clip-3: damaged" in done.stderr
    assert "exitcode  : 3" in done.stderr
    fault = next(read_events(tmp_path / "journal.jsonl", event="fault"))
    assert fault["error"].startswith("rank 1 failed with DataDamageError")


def test_t11_numbers_that_are_none_on_one_rank_stop_both_before_the_update(tmp_path: Path) -> None:
    done = run(tmp_path, poison_rank=1)
    for rank in (0, 1):
        assert f"rank {rank}: NonFiniteError: step 6: loss expected finite, found clip-" in done.stderr
    assert "(nan, rank 1)" in done.stderr
    assert "exitcode  : 5" in done.stderr
    assert [path.name for path in (tmp_path / "failures").iterdir()] == ["step-6.attempt-1.rank-1.safetensors"]


def test_t14_a_signal_to_one_rank_stops_both_with_a_checkpoint(undisturbed: Path, tmp_path: Path) -> None:
    done = run(tmp_path, stop_rank=1)
    for rank in (0, 1):
        assert f"rank {rank}: TerminatedError: stopped by signal 15 after step 5" in done.stderr
    assert "exitcode  : 143" in done.stderr
    succeed(tmp_path)
    assert steps(tmp_path, "step", "loss") == steps(undisturbed, "step", "loss")
    assert last_files(tmp_path) == last_files(undisturbed)
