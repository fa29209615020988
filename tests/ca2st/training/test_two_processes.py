"""Two CPU processes (gloo, loopback) against one, and against themselves after a kill."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load

import support.settle_on_ranks
import support.shard_on_ranks
import support.train_on_ranks
from ca2st.training.checkpoint import list_checkpoints, read_checkpoint
from ca2st.training.journal import read_events, run_sequence
from ca2st.training.loop import train
from support.processes import python_path
from support.tiny_training import TinyEvaluation, TinyModel, TinySource, fresh_accelerator, tiny_settings

pytestmark = pytest.mark.slow


def launch(program: ModuleType, *arguments: str, ranks: int) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return subprocess.run(
        [*launcher, str(program.__file__), *arguments],
        check=False,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1", "PATH": ""},
        timeout=200,
    )


def run(folder: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return launch(support.train_on_ranks, json.dumps({"folder": str(folder), **options}), ranks=2)


def run_alone(folder: Path, **options: Any) -> None:
    settings = tiny_settings(folder)
    train(
        TinyModel(**options),
        TinySource(seed=settings.config.seed),
        accelerator=fresh_accelerator(settings),
        settings=settings,
        validation=TinyEvaluation(),
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


@pytest.mark.parametrize("per_device_batch_size", [4, 2])  # of 3 clips per rank: one micro-batch, then 2 and 1 clips
def test_two_processes_see_the_samples_of_one_and_compute_its_losses(
    tmp_path: Path, per_device_batch_size: int
) -> None:
    run_alone(tmp_path / "one", dropout=0.0)
    succeed(tmp_path / "two", dropout=0.0, per_device_batch_size=per_device_batch_size)
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


def test_t1_killing_a_rank_and_rerunning_gives_the_same_bits_on_two_and_the_same_order_on_one(
    undisturbed: Path, tmp_path: Path
) -> None:
    folder, alone = tmp_path / "two", tmp_path / "alone"
    assert run(folder, fault="step.updated:7", fault_rank=1).returncode != 0
    assert len(steps(folder, "step")) < 8
    shutil.copytree(folder, alone)
    succeed(folder)
    fields = ("step", "loss", "grad_norm", "sample_ids_hash")
    assert steps(folder, *fields) == steps(undisturbed, *fields)
    assert last_files(folder) == last_files(undisturbed)
    run_alone(alone)
    assert steps(alone, "step", "sample_ids_hash") == steps(undisturbed, "step", "sample_ids_hash")
    start = list(read_events(alone / "journal.jsonl", event="start"))[-1]
    assert start["changes"] == ["world_size: 2 -> 1"]


def test_the_first_update_of_an_attempt_sums_gradients_in_the_order_of_all_others() -> None:
    done = launch(support.settle_on_ranks, ranks=3)
    assert done.stdout == "20 gradients, same: True\n", done.stderr


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


def test_t11_a_step_that_one_rank_cannot_compute_is_left_out_by_both(tmp_path: Path) -> None:
    succeed(tmp_path, poison_rank=1, max_skipped_steps=1)
    lines = run_sequence(tmp_path / "journal.jsonl")
    assert [(line["step"], line["skipped_steps"]) for line in lines if line["loss"] is None] == [(6, 1)]
    assert len(lines) == 8


def test_a_sharded_run_that_is_killed_and_resumed_is_the_run_that_is_not_sharded(tmp_path: Path) -> None:
    whole, sharded, alone = (tmp_path / name for name in ("whole", "sharded", "alone"))
    options = {"ema_decay": 0.9, "clip_grad_norm": 1.0}
    succeed(whole, **options)
    assert run(sharded, sharded=True, fault="step.updated:7", fault_rank=1, **options).returncode != 0
    shutil.copytree(sharded, alone)
    succeed(sharded, sharded=True, **options)
    for own, other in zip(steps(sharded, "loss", "grad_norm"), steps(whole, "loss", "grad_norm"), strict=True):
        assert own == pytest.approx(other, rel=1e-5)
    found, expected = last_files(sharded), last_files(whole)
    assert found.keys() == expected.keys()
    for name in ("model", "optimizer", "average"):
        ours, theirs = (load(files[f"{name}.safetensors"]) for files in (found, expected))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    settings = tiny_settings(alone, **options)
    result = train(TinyModel(), TinySource(seed=5), accelerator=fresh_accelerator(settings), settings=settings)
    assert (result.resumed_step, result.steps) == (6, 8)  # in one process, that holds all of it


def test_a_model_of_each_kind_computes_the_same_when_its_experts_are_spread_over_ranks() -> None:
    done = launch(support.shard_on_ranks, ranks=2)
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one["model"] for one in told] == ["cast", "cava", "ca2st", "resnet50", "checkpointed", "bf16"]
    for one in told:
        assert one["largest_difference"] < (0.02 if one["model"] == "bf16" else 1e-5), one
        assert one["held"] < 0.55, "a rank has half of the weights, and what does not divide by two"


def test_t14_a_signal_to_one_rank_stops_both_with_a_checkpoint(undisturbed: Path, tmp_path: Path) -> None:
    done = run(tmp_path, stop_rank=1)
    for rank in (0, 1):
        assert f"rank {rank}: TerminatedError: stopped by signal 15 after step 5" in done.stderr
    assert "exitcode  : 143" in done.stderr
    assert list_checkpoints(tmp_path / "checkpoints")[0].name == "step-5.attempt-1"
    assert steps(tmp_path, "step", "loss") == steps(undisturbed, "step", "loss")[:5]
