"""J7: a dry run tells the whole plan of a training and leaves no trace."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from ca2st.errors import UserInputError
from ca2st.training.checkpoint import CHECKPOINTS_NAME, CheckpointMarker, save_checkpoint
from ca2st.training.errors import CheckpointDamagedError, ResumeRefusedError
from ca2st.training.optim import build_optimizer
from ca2st.training.resume import MODEL_FILE, OPTIMIZER_FILE, collect_state
from pipelines.errors import PlanError
from ray_jobs.cli import main
from ray_jobs.config.recipe import Recipe, recipe_document
from ray_jobs.config.recipe_file import load_recipe
from ray_jobs.runs.data import open_data
from ray_jobs.runs.model import keep_frozen, make_model
from ray_jobs.runs.plan import (
    batch_plan,
    disk_plan,
    make_plan,
    plan_lines,
    read_without_traces,
    readable_bytes,
    resume_plan,
    waiting_bytes,
)
from ray_jobs.runs.worker import _parameter_rules
from support.tiny_runs import make_tiny_run

CLASSES = {"a": ["x", "y", "z"]}


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every file and folder below, with its bytes."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def resume_of(recipe: Path, run_dir: Path, *overrides: str, steps: int = 16) -> dict[str, Any]:
    loaded = load_recipe(str(recipe), overrides)
    return resume_plan(loaded, run_dir, fingerprints=open_data(loaded).fingerprints, steps=steps)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return make_tiny_run(tmp_path)


def test_j7_a_dry_run_tells_the_whole_plan_and_leaves_no_trace(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = tree(tmp_path)
    small = ("--set", "model.kind=spatial", "--workers", "2")
    monkeypatch.setattr(sys, "argv", ["ca2st", "train", str(tiny), *small, "--dry-run", "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    facts = json.loads(capsys.readouterr().out)
    assert (ended.value.code or 0) == 0
    assert tree(tmp_path) == before
    assert (facts["steps"], facts["epochs"], facts["steps_per_epoch"], facts["num_samples"]) == (16, 4, 4, 25)
    assert facts["batches"] == {
        "global_batch_size": 6,
        "per_rank": 4,
        "per_rank_least": 2,
        "per_device_batch_size": 2,
        "micro_batches": 2,
    }
    assert facts["learning_rate"]["peak"] == pytest.approx(1e-3 * 6 / 256)
    assert (facts["learning_rate"]["first"], facts["learning_rate"]["warmup_steps"]) == (0.0, 2)
    assert facts["learning_rate"]["last"] > facts["learning_rate"]["minimum"] == pytest.approx(1e-6 * 6 / 256)
    model = make_model(load_recipe(str(tiny), ["model.kind=spatial"]), CLASSES)
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    assert (facts["memory"]["gradients"], facts["memory"]["optimizer"]) == (2 * trained, 2 * trained)
    assert facts["memory"]["parameters"] == num_bytes(dict(model.named_parameters()), dict(model.named_buffers()))
    assert (facts["disk"]["num_written"], facts["disk"]["num_kept"]) == (7, 3)  # 3 6 8 9 12 15 16
    train = facts["data"]["train"][0]
    files = [path for path in (tmp_path / "shards" / "train").iterdir() if path.name.startswith("ca2st-")]
    assert train["num_samples"] == 25
    assert (train["num_shards"], train["bytes"]) == (len(files) // 2, sum(path.stat().st_size for path in files))
    assert facts["data"]["validation"]["num_samples"] == 5
    assert (facts["resume"]["state"], facts["resume"]["attempt"]) == ("new", 1)
    told = plan_lines(facts)
    for words in ("16 steps: 4 epochs of 4 steps, 25 samples", "2 workers of 2 to 4, in 2 micro-batches of at most 2"):
        assert words in told
    for words in ("-> 2.34e-05 in 2 steps ->", "25 samples in 4 shards", "runs/tiny: a new run"):
        assert words in told


def test_j7_a_world_that_is_not_drawn_is_planned_without_drawing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["model.kind=spatial", "model.depth=1", "training.keep_checkpoints=9"]
    facts = make_plan(load_recipe("smoke", small), tmp_path / "runs" / "smoke", device="cpu")
    assert "made first: synthetic holistic, 128 + 32 clips" in plan_lines(facts)
    assert (facts["steps"], facts["disk"]["num_written"], facts["disk"]["num_kept"]) == (
        32,
        7,
        7,
    )  # 8 10 16 20 24 30 32
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("count", "told"), [(999, "999 B"), (1_234, "1.23 KB"), (5e9, "5 GB"), (2e15, "2e+03 TB"), (0, "0 B")]
)
def test_bytes_are_told_in_powers_of_a_thousand(count: float, told: str) -> None:
    assert readable_bytes(count) == told


@pytest.mark.parametrize(("prefetch_steps", "batches"), [(0, 1), (1, 3), (2, 4)])
def test_the_plan_counts_batches_that_are_ready_and_those_that_are_being_made(
    prefetch_steps: int, batches: int
) -> None:
    recipe = load_recipe("smoke", [f"data.loader.prefetch_steps={prefetch_steps}"])
    clip_bytes = 3 * 8 * 64 * 64 + 4 * 96 * 128  # frames as bytes, spectrogram in float32
    assert waiting_bytes(recipe) == batches * 16 * clip_bytes


def test_j7_what_the_training_would_refuse_the_plan_refuses_too(tiny: Path) -> None:
    with pytest.raises(PlanError, match="global_batch_size 6 on 4 ranks"):
        read_without_traces(load_recipe(str(tiny), ["launch.workers=4"]))
    with pytest.raises(PlanError, match="too few samples: 128 samples, global_batch_size 256"):
        read_without_traces(load_recipe("smoke", ["training.global_batch_size=256"]))


def test_j7_too_few_of_the_published_samples_are_refused_as_by_the_training(tmp_path: Path) -> None:
    published = ["data.select.limit=20", "training.global_batch_size=24"]
    with pytest.raises(PlanError, match="too few samples: 20 samples, global_batch_size 24"):
        make_plan(load_recipe("cast_ucf_101", published), tmp_path / "run", device="cpu", assume_counts=True)


def test_j7_a_split_that_was_never_published_is_named_as_the_one_to_train_on(tmp_path: Path) -> None:
    recipe = load_recipe("cast_ucf_101", ["data.split=9"])
    with pytest.raises(UserInputError, match="found train 9"):
        make_plan(recipe, tmp_path / "run", device="cpu", assume_counts=True)


def test_j7_an_undrawn_world_is_counted_with_its_repeats_and_limits() -> None:
    limits = ["data.repeats=3", "data.select.limit=20", "data.remainder=wrap"]
    reading = read_without_traces(load_recipe("smoke", limits))
    assert (reading.num_samples, reading.steps_per_epoch) == (20, 4)


def begun(recipe: Recipe, run_dir: Path, *, step: int) -> Path:
    """A run folder with one checkpoint."""
    run_dir.mkdir(exist_ok=True)
    (run_dir / "recipe.json").write_text(json.dumps(recipe_document(recipe)))
    marker = CheckpointMarker(
        step=step,
        attempt=2,
        seed=0,
        global_batch_size=6,
        manifests=open_data(recipe).fingerprints,
        recipe_sha256="",
        topology={"world_size": 2, "per_device_batch_size": 2, "precision": "fp32", "compile": False},
        versions={},
    )
    return save_checkpoint(run_dir / CHECKPOINTS_NAME, {"one.json": b"{}"}, marker)


def test_j7_what_would_be_resumed_is_told(tiny: Path, tmp_path: Path) -> None:
    run_dir, recipe = tmp_path / "run", load_recipe(str(tiny))
    begun(recipe, run_dir, step=9)
    found = resume_of(tiny, run_dir)
    assert (found["state"], found["checkpoint"], found["step"], found["attempt"]) == (
        "resume",
        "step-9.attempt-2",
        9,
        3,
    )
    assert found["changes"] == ["world_size: 2 -> 1"]
    newest = begun(recipe, run_dir, step=12)
    (newest / "one.json").write_bytes(b"[]")
    found = resume_of(tiny, run_dir)
    assert (found["step"], len(found["damaged"])) == (9, 1)
    (newest / "one.json").write_bytes(b"{}")
    assert resume_of(tiny, run_dir, steps=12)["state"] == "finished"


def test_j7_a_run_of_another_recipe_or_other_data_is_refused_as_by_the_training(tiny: Path, tmp_path: Path) -> None:
    run_dir, recipe = tmp_path / "run", load_recipe(str(tiny))
    folder = begun(recipe, run_dir, step=9)
    with pytest.raises(UserInputError, match=r"holds a run of another recipe(.|\n)*optim\.base_lr: 0\.001 -> 0\.5"):
        resume_of(tiny, run_dir, "optim.base_lr=0.5")
    with pytest.raises(ResumeRefusedError, match="holds a run on other data"):
        resume_of(tiny, run_dir, f"data.train={tmp_path / 'shards' / 'validation'}")
    (folder / "one.json").unlink()
    with pytest.raises(CheckpointDamagedError, match="no sound checkpoint is left"):
        resume_of(tiny, run_dir)
    for path in (folder / "COMPLETE.json", folder):
        path.unlink() if path.is_file() else path.rmdir()
    assert resume_of(tiny, run_dir)["state"] == "begin again"


def num_bytes(*states: dict[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for state in states for tensor in state.values())


def test_j7_the_disk_of_a_checkpoint_and_of_frozen_weights_is_what_they_take(tiny: Path, tmp_path: Path) -> None:
    recipe = load_recipe(str(tiny))
    model = make_model(recipe, CLASSES)
    optimizer = build_optimizer(model, recipe.optim, rules=_parameter_rules(model))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    hashes = keep_frozen(model, tmp_path).values()
    files = collect_state(model, optimizer)
    written = [load(files[name]) for name in (MODEL_FILE, OPTIMIZER_FILE)]
    kept = [load((tmp_path / "experts" / f"{sha256}.safetensors").read_bytes()) for sha256 in hashes]
    disk = disk_plan(recipe, model, tmp_path / "run", steps=16, steps_per_epoch=4)
    assert disk["checkpoint"] == num_bytes(*written)
    assert disk["frozen_weights"] == num_bytes(*kept)
    assert disk["total"] == 4 * disk["checkpoint"] + disk["frozen_weights"]
    assert disk_plan(recipe, model, tmp_path / "run", steps=1, steps_per_epoch=4)["total"] == (
        disk["checkpoint"] + disk["frozen_weights"]
    )


def test_j7_shards_of_ones_own_leave_the_validation_of_a_synthetic_world_out_of_the_plan(tmp_path: Path) -> None:
    recipe = load_recipe("smoke", [f"data.train={tmp_path}", "training.checkpoint_every_steps=100"])
    disk = disk_plan(recipe, make_model(recipe, CLASSES), tmp_path / "run", steps=16, steps_per_epoch=4)
    assert (disk["num_written"], disk["num_kept"]) == (1, 1)
    world = load_recipe("smoke", ["training.checkpoint_every_steps=100"])
    disk = disk_plan(world, make_model(world, CLASSES), tmp_path / "run", steps=16, steps_per_epoch=4)
    assert (disk["num_written"], disk["num_kept"]) == (4, 3)


def test_j7_a_batch_that_no_rank_shares_is_one_rank_s() -> None:
    training = replace(load_recipe("smoke").training, global_batch_size=10, per_device_batch_size=4)
    assert batch_plan(training, world_size=1)["micro_batches"] == 3
