"""The comparison: one world, one budget, a row per model that says what was reached and what could be."""

from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient

from ca2st.errors import UserInputError
from ca2st.model.network import count_parameters
from ca2st.training.journal import read_events
from pipelines.views import EvaluationViews
from ray_jobs.demo.comparison import (
    CEILING,
    CLIPS_PER_SECOND,
    COMPARED,
    TOP1,
    TRAINABLE,
    ComparisonRow,
    Contest,
    recipe_of,
    run_contest,
)
from ray_jobs.runs.inference import load_trained
from sharding.synthetic.factors import SENSE_SETS, ceilings
from support.tiny_world import WORLD, make_world_set, tiny_recipe


def make_contest(root: Path, *, uri: str | None = None) -> Contest:
    train, test = make_world_set(root / "train", "train"), make_world_set(root / "test", "validation")
    return Contest(
        recipe=tiny_recipe(train.root, uri=uri),
        train=train.root,
        test=test.root,
        experts={},
        out=root / "runs",
        views=EvaluationViews(),
    )


@pytest.fixture(scope="module")
def contest(tmp_path_factory: pytest.TempPathFactory) -> Contest:
    return make_contest(tmp_path_factory.mktemp("contest"))


@pytest.fixture(scope="module")
def rows(contest: Contest) -> list[ComparisonRow]:
    return list(run_contest(contest, ("audio", "ca2st")))


def test_there_is_a_row_a_model_in_the_order_asked_for(rows: list[ComparisonRow]) -> None:
    assert [(row.model, row.target, row.seed, row.run_id) for row in rows] == [
        ("audio", "holistic", 0, None),
        ("ca2st", "holistic", 0, None),
    ]


def test_ceilings_are_those_of_the_world_by_what_a_model_is_given(rows: list[ComparisonRow]) -> None:
    assert [(row.ceiling, row.chance) for row in rows] == [(1 / 16, 1 / 64), (1.0, 1 / 64)]


def test_every_compared_model_has_a_ceiling_and_a_recipe_that_builds(contest: Contest) -> None:
    known = ceilings(WORLD.task, WORLD.world("train"))
    for name, compared in COMPARED.items():
        assert compared.senses in SENSE_SETS
        assert known[compared.senses] > 1 / 64
        model = recipe_of(contest, name, 3).model
        assert {setting: getattr(model, setting) for setting in compared.changes} == dict(compared.changes)


def test_top1_is_the_share_of_the_written_predictions_that_are_right(rows: list[ComparisonRow]) -> None:
    for row in rows:
        table = pq.read_table(row.predictions)
        best = [max(range(64), key=values.__getitem__) for values in table["holistic_probabilities"].to_pylist()]
        labels = table["holistic_label"].to_pylist()
        assert len(labels) == 8
        assert row.top1 == sum(map(int.__eq__, best, labels)) / 8


def test_a_row_tells_size_and_speed_of_what_was_trained(rows: list[ComparisonRow]) -> None:
    for row in rows:
        assert row.trainable == count_parameters(load_trained(Path(row.checkpoint)).model).trainable
        assert row.clips_per_second > 0
        assert row.seconds > 0
    assert rows[0].trainable < rows[1].trainable


def test_a_finished_contest_is_tested_again_but_trained_no_more(contest: Contest, rows: list[ComparisonRow]) -> None:
    journal = Path(rows[0].run_dir) / "journal.jsonl"
    steps = list(read_events(journal, event="step"))
    (again,) = run_contest(contest, ("audio",))
    assert list(read_events(journal, event="step")) == steps
    assert len(steps) == 2
    assert again.seconds > steps[-1]["time"] - steps[0]["time"]
    assert (again.top1, again.checkpoint, again.trainable) == (rows[0].top1, rows[0].checkpoint, rows[0].trainable)


def test_every_seed_is_a_run_of_its_own(contest: Contest, rows: list[ComparisonRow]) -> None:
    first, second = run_contest(replace(contest, seeds=(0, 1)), ("audio",))
    assert (first.run_dir, first.seed, second.seed) == (rows[0].run_dir, 0, 1)
    assert pq.read_table(first.predictions) == pq.read_table(rows[0].predictions)
    assert pq.read_table(second.predictions) != pq.read_table(rows[0].predictions)


def test_experts_are_given_to_the_models_that_have_them_and_seeds_to_all(contest: Contest) -> None:
    with_experts = replace(contest, experts={"spatial": "s.safetensors", "audio": "a.safetensors"})
    cast, cava = recipe_of(with_experts, "cast", 5), recipe_of(with_experts, "cava", 5)
    assert (cast.experts.spatial, cast.experts.temporal, cast.experts.audio) == ("s.safetensors", None, None)
    assert (cava.experts.spatial, cava.experts.audio) == ("s.safetensors", "a.safetensors")
    assert (cast.name, cast.training.seed) == ("cast-seed-5", 5)


def test_an_unknown_model_is_refused_with_the_nearest_before_anything_is_trained(
    contest: Contest, tmp_path: Path
) -> None:
    with pytest.raises(UserInputError, match=r"model: expected one of spatial, .*found 'cats' .*did you mean 'cast'"):
        next(run_contest(replace(contest, out=tmp_path / "runs"), ("ca2st", "cats")))
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_the_numbers_of_a_row_are_those_that_mlflow_keeps(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = MlflowClient(uri)
    client.search_experiments()  # makes the tables: that takes longer than the training
    (row,) = run_contest(make_contest(tmp_path, uri=uri), ("audio",))
    assert row.run_id is not None
    kept = client.get_run(row.run_id).data.metrics
    found = {
        TOP1: row.top1,
        CEILING: row.ceiling,
        TRAINABLE: row.trainable,
        CLIPS_PER_SECOND: row.clips_per_second,
    }
    assert {name: kept[name] for name in found} == found
    assert len(client.get_metric_history(row.run_id, "train/loss")) == 2
