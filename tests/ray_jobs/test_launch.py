"""What a launch checks, how often, and that a finished run starts nothing."""

import json
import logging
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState

from ca2st.durable import NO_FAULTS
from ca2st.errors import UserInputError
from ca2st.model.network import HolisticModel
from ca2st.training.checkpoint import list_checkpoints
from ca2st.training.errors import ResumeRefusedError
from ray_jobs.config.recipe import Recipe
from ray_jobs.config.recipe_file import load_recipe
from ray_jobs.environment import launched_ranks
from ray_jobs.launch import launch
from ray_jobs.runs.plan import make_plan
from ray_jobs.runs.worker import Job, Outcome
from support.fake_shards import make_samples, make_shard_set
from support.tiny_runs import make_tiny_run, sequence
from support.trained import trained_model

pytestmark = pytest.mark.usefixtures("own_process")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("launch")
    make_shard_set(folder / "set", make_samples(16))
    one = trained_model(folder, "cast").recipe
    return replace(
        one, data=replace(one.data, train=str(folder / "set")), tracking=replace(one.tracking, enabled=False)
    )


@pytest.fixture(scope="module")
def finished(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    AcceleratorState._reset_state(reset_partial_state=True)
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    return run_dir, launch(recipe, run_dir, faults=NO_FAULTS)


def refuse(*_args: Any, **_options: Any) -> Outcome:
    raise AssertionError("a worker was started")


@pytest.mark.parametrize(("workers", "ray_address"), [(1, None), (2, None), (2, "local")])
def test_a_finished_run_says_so_and_starts_no_worker(
    recipe: Recipe,
    finished: tuple[Path, Outcome],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    workers: int,
    ray_address: str | None,
) -> None:
    run_dir, outcome = finished
    for starter in ("ray_jobs.launch.run", "ray_jobs.launch.run_processes"):
        monkeypatch.setattr(starter, refuse)
    if ray_address is not None:
        monkeypatch.setattr("ray_jobs.cluster.driver.joined", refuse)
    before = (run_dir / "journal.jsonl").read_bytes()
    again = replace(recipe, launch=replace(recipe.launch, workers=workers))
    with caplog.at_level(logging.INFO):
        assert launch(again, run_dir, faults=NO_FAULTS, ray_address=ray_address) == outcome
    assert f"already finished, nothing to train: step {outcome.steps} of {outcome.steps} from {run_dir}" in caplog.text
    assert (run_dir / "journal.jsonl").read_bytes() == before


def test_a_run_whose_end_was_not_reported_is_brought_to_its_end(
    recipe: Recipe, finished: tuple[Path, Outcome], tmp_path: Path
) -> None:
    run_dir, outcome = finished
    for name, spoil in (("no outcome", "outcome.json"), ("no last checkpoint", "checkpoints")):
        copy = tmp_path / name
        shutil.copytree(run_dir, copy)
        if spoil == "checkpoints":
            shutil.rmtree(list_checkpoints(copy / "checkpoints")[0])
        else:
            (copy / spoil).unlink()
        again = launch(recipe, copy, faults=NO_FAULTS)
        assert (again.steps, Path(again.checkpoint).parents[1]) == (outcome.steps, copy)
        AcceleratorState._reset_state(reset_partial_state=True)


def test_a_finished_run_on_other_data_is_refused(
    recipe: Recipe, finished: tuple[Path, Outcome], tmp_path: Path
) -> None:
    make_shard_set(tmp_path / "other", make_samples(17))
    other = replace(recipe, data=replace(recipe.data, train=str(tmp_path / "other")))
    with pytest.raises(ResumeRefusedError, match=r"on other data or weights(.|\n)*manifests\.train: "):
        launch(other, finished[0], faults=NO_FAULTS)


def test_settings_and_the_outline_of_the_model_are_checked_once_before_a_worker_starts(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = {"model": 0, "settings": 0}
    make = HolisticModel.__init__

    def counted(self: HolisticModel, *args: Any, **options: Any) -> None:
        counts["model"] += 1
        make(self, *args, **options)

    def settings(checked: Recipe) -> None:
        counts["settings"] += 1

    def stop(job: Job, **_options: Any) -> Outcome:
        raise InterruptedError(job.run_dir)

    monkeypatch.setattr(HolisticModel, "__init__", counted)
    for module in ("worker", "plan"):
        monkeypatch.setattr(f"ray_jobs.runs.{module}.check_settings", settings)
    monkeypatch.setattr("ray_jobs.launch.run", stop)
    with pytest.raises(InterruptedError):
        launch(recipe, tmp_path / "run", faults=NO_FAULTS)
    assert counts == {"model": 1, "settings": 1}
    make_plan(recipe, tmp_path / "run", device="cpu")
    assert counts == {"model": 2, "settings": 2}


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({"WORLD_SIZE": "1"}, None),
        ({"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, (3, 4)),
    ],
)
def test_a_rank_of_torchrun_is_known_by_its_variables(
    variables: dict[str, str], found: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert launched_ranks() == found


@pytest.mark.parametrize(
    ("rank", "message"),
    [("", r"WORLD_SIZE=2: .*found RANK missing; start by torchrun"), ("one", r"WORLD_SIZE=2: .*found other text")],
)
def test_half_of_what_torchrun_sets_is_refused(rank: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    named = {"WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    for name, value in named.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserInputError, match=message):
        launched_ranks()


def test_another_number_of_workers_than_torchrun_started_is_refused(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "WORLD_SIZE": "2",
        "RANK": "1",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "a",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    three = replace(recipe, launch=replace(recipe.launch, workers=3))
    with pytest.raises(
        UserInputError, match=r"launch\.workers: expected the 2 processes .* found 3; leave --workers out"
    ):
        launch(three, tmp_path / "run", faults=NO_FAULTS)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_ranks_of_torchrun_train_as_one_process_does_and_say_the_end_once(tmp_path: Path) -> None:
    path = str(make_tiny_run(tmp_path))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "ray_jobs.cli", "train", path, "--out", str(tmp_path / "two"), "--json"]
    command += ["--set", "tracking.enabled=false"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["steps"] == 16
    launch(load_recipe(path, ["tracking.enabled=false"]), tmp_path / "one", faults=NO_FAULTS)
    two, one = sequence(tmp_path / "two"), sequence(tmp_path / "one")
    assert [line[:2] for line in two] == [line[:2] for line in one], "the same samples in the same order"
    assert [line[2] for line in two] == pytest.approx([line[2] for line in one], abs=1e-5)
