"""Experts that learn alone and at the same time: what is stored, and what finished or failed runs mean."""

from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from ca2st.errors import EnvironmentFault
from ca2st.model.network import build_model
from ca2st.training.journal import read_events
from ca2st.weights.importer import load_expert_file
from ray_jobs.config.recipe import Recipe
from ray_jobs.console import say
from ray_jobs.demo import comparison
from ray_jobs.demo.comparison import Lesson, PretrainedExpert, _recipe_of, _views_of, pretrain
from ray_jobs.runs.inference import load_trained
from ray_jobs.runs.worker import OUTCOME_NAME
from support.tiny_world import make_world_set, tiny_recipe

DONE = PretrainedExpert(expert="audio", factor="audio", top1=0.5, file="f")


@dataclass(frozen=True, slots=True)
class World:
    train: Path
    test: Path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("lesson")
    splits = {split: make_world_set(root / split, split).root for split in ("train", "validation")}
    return World(splits["train"], splits["validation"])


HEAR = Lesson(expert="audio", targets=("audio", "time"), epochs=2, num_frames=2)


def expert_recipe(world: World) -> Recipe:
    recipe: Recipe = tiny_recipe(world.train)
    return replace(recipe, trainable="all", model=replace(recipe.model, kind="spatial", adapters=False))


def test_an_expert_is_trained_alone_tested_on_its_own_labels_and_kept_as_a_file(world: World, tmp_path: Path) -> None:
    expert = comparison._learn(HEAR, expert_recipe(world), world.train, world.test, tmp_path)
    assert (expert.expert, expert.factor) == ("audio", "audio+time")
    assert 0 <= expert.top1 <= 1
    assert len(list(read_events(tmp_path / "expert-audio" / "journal.jsonl", event="step"))) == 4
    trained = load_trained(tmp_path / "expert-audio")
    assert set(trained.classes) == {"audio", "time"}
    full = expert_recipe(world)
    model = build_model(replace(full.model, kind="audio"), full.clip, trained.model.targets, seed=9)
    load_expert_file(model, "audio", Path(expert.file))
    theirs = dict(trained.model.experts["audio"].named_parameters())
    assert all(own.equal(theirs[name]) for name, own in model.experts["audio"].named_parameters())


def test_experts_train_with_one_thread_each_and_are_not_tracked(world: World) -> None:
    recipe = _recipe_of(HEAR, expert_recipe(world), world.train)
    assert (recipe.name, recipe.model.kind, recipe.data.targets) == ("expert-audio", "audio", ("audio", "time"))
    assert (recipe.training.epochs, recipe.launch.threads_per_worker, recipe.tracking.enabled) == (2, 1, False)


def test_a_lesson_of_fewer_frames_is_tested_in_views_that_read_as_many_as_the_models(world: World) -> None:
    full = expert_recipe(world)
    recipe = _recipe_of(HEAR, full, world.train)
    assert recipe.clip.num_frames == 2
    assert recipe.clip.num_frames * _views_of(HEAR, full).num_views == full.clip.num_frames
    whole = replace(HEAR, num_frames=None)
    assert _recipe_of(whole, full, world.train).clip == full.clip
    assert _views_of(whole, full).num_views == 1


def test_finished_experts_are_tested_here_and_start_no_process(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "_learn", lambda *_: DONE)
    monkeypatch.setattr(comparison, "_learn_quietly", None)  # could not even be sent to a process
    (tmp_path / "expert-audio").mkdir()
    (tmp_path / "expert-audio" / OUTCOME_NAME).write_text("{}")
    found = pretrain([HEAR], expert_recipe(world), train=world.train, test=world.test, out=tmp_path)
    assert found == [DONE]


def test_a_process_that_dies_is_told_with_the_expert_and_the_log(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: Future[PretrainedExpert] = Future()
    done.set_result(DONE)
    died: Future[PretrainedExpert] = Future()
    died.set_exception(BrokenProcessPool())
    futures = iter((done, died))
    monkeypatch.setattr(comparison.ProcessPoolExecutor, "submit", lambda *_: next(futures))
    lessons = [replace(HEAR, expert="temporal"), HEAR]
    with pytest.raises(EnvironmentFault, match=r"before the audio expert was ready; .*expert-\*\.log may say why"):
        pretrain(lessons, expert_recipe(world), train=world.train, test=world.test, out=tmp_path)


def test_what_a_process_prints_goes_to_the_log_of_its_expert(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def speak(*_: object) -> PretrainedExpert:
        say("learning")
        return DONE

    monkeypatch.setattr(comparison, "_learn", speak)
    assert comparison._learn_quietly(HEAR, expert_recipe(world), world.train, world.test, tmp_path) == DONE
    assert (tmp_path / "expert-audio.log").read_text() == "learning\n"
    assert capsys.readouterr().err == ""
