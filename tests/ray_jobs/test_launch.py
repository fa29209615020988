"""What a launch checks, how often, and that a finished run starts nothing."""

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState

from ca2st.durable import NO_FAULTS
from ca2st.model.network import HolisticModel
from ca2st.training.checkpoint import list_checkpoints
from ca2st.training.errors import ResumeRefusedError
from ray_jobs.config.recipe import Recipe
from ray_jobs.launch import launch
from ray_jobs.runs.plan import make_plan
from ray_jobs.runs.worker import Job, Outcome
from support.fake_shards import make_samples, make_shard_set
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
    for module in ("start", "plan"):
        monkeypatch.setattr(f"ray_jobs.runs.{module}.check_settings", settings)
    monkeypatch.setattr("ray_jobs.launch.run", stop)
    with pytest.raises(InterruptedError):
        launch(recipe, tmp_path / "run", faults=NO_FAULTS)
    assert counts == {"model": 1, "settings": 1}
    make_plan(recipe, tmp_path / "run", device="cpu")
    assert counts == {"model": 2, "settings": 2}
