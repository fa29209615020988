"""Several labels per sample, from a list of videos to predictions; and sets without labels."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import average_precision_score

from ca2st.errors import UserInputError
from pipelines.storage.index import set_facts
from pipelines.views import EvaluationViews
from ray_jobs.config.recipe_file import load_recipe
from ray_jobs.evaluation.workers import evaluate_checkpoint, facts_of
from ray_jobs.runs.data import open_data
from ray_jobs.runs.inference import write_features
from ray_jobs.runs.prediction import predict_videos
from ray_jobs.set_card import facts_in_words, render_set_card
from sharding.conversion import convert
from sharding.datasets import DatasetRequest, read_dataset
from sharding.format.shard_set import read_shard_set
from sharding.settings import ConversionConfig
from support.annotations import write_lines
from support.media import Sound, make_clip
from support.tiny_runs import RECIPE, ca2st, journal

LABELS = ["x|y", "y", "", "x", "z", "x|z"]
VIEWS = EvaluationViews(protocol="test", clips=1, crops=1)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six videos of several labels as shards, a tiny model trained on them; the same videos without labels."""
    root = tmp_path_factory.mktemp("several")
    media = root / "media"
    media.mkdir()
    for number in range(len(LABELS)):
        make_clip(media / f"{number}.mp4", seconds=0.6, size=(48, 48), sound=Sound(seconds=0.6))
    labelled = ["path,labels", *(f"{number}.mp4,{labels}" for number, labels in enumerate(LABELS))]
    alone = ["path", *(f"{number}.mp4" for number in range(len(LABELS)))]
    for split, lines in (("train", labelled), ("validation", labelled), ("test", alone)):
        annotations = write_lines(root / f"{split}.csv", lines)
        source = read_dataset("csv", DatasetRequest(annotations=annotations, media=media, split=split))
        convert(source, root / "shards" / split, ConversionConfig())
    (root / "tiny.toml").write_text(RECIPE.format(root=root))
    mixed = ("--set", "data.augment.mixing.probability=1.0", "--set", "data.balance.rule=sqrt")
    alone = ("--set", "tracking.enabled=false")
    done = ca2st("train", root / "tiny.toml", "--out", root / "run", *mixed, *alone, "--json")
    assert done.returncode == 0, done.stderr
    (root / "trained.json").write_text(done.stdout)
    return root


def test_a_training_on_several_labels_is_judged_by_mean_average_precision(root: Path) -> None:
    facts = json.loads((root / "trained.json").read_text())
    assert set(facts["metrics"]) == {"map", "top1"}
    assert facts["top1"] == facts["metrics"]["top1"]
    losses = [line["loss"] for line in journal(root / "run", "step")]
    assert all(0.1 < loss < 2 for loss in losses)  # the mean over classes of numbers about log 2
    (*_, last) = journal(root / "run", "eval")
    assert last["metrics"]["map"] == facts["metrics"]["map"]


def test_an_evaluation_of_several_labels_writes_sigmoids_and_their_precision(root: Path) -> None:
    report = evaluate_checkpoint(root / "run", root / "shards/validation", VIEWS)
    table = pq.read_table(report.predictions).to_pydict()
    assert table["label_label"] == [[0, 1], [1], [], [0], [2], [0, 2]]
    scores = np.array(table["label_probabilities"])
    truth = np.array([[one in labels for one in range(3)] for labels in table["label_label"]])
    assert report.main_metric == "map"
    assert report.metrics["map"] == pytest.approx(average_precision_score(truth, scores, average="macro"))
    assert facts_of(report, "1x1")["top1"] == report.metrics["top1"]
    assert np.abs(scores.sum(axis=1) - 1).max() > 0.05  # each class is a question of its own


def test_a_prediction_of_several_labels_is_a_probability_of_each(root: Path) -> None:
    (video,) = predict_videos(root / "run", [root / "media/0.mp4"], top=3)
    assert sorted(one.label for one in video.predictions) == ["x", "y", "z"]
    probabilities = [one.probability for one in video.predictions]
    assert probabilities == sorted(probabilities, reverse=True)
    assert abs(sum(probabilities) - 1) > 0.05


def test_features_of_several_labels_have_lists_and_those_of_no_label_have_none(root: Path) -> None:
    several = write_features(root / "run", root / "shards/validation", VIEWS)
    assert pq.read_table(several.features).to_pydict()["label_label"] == [[0, 1], [1], [], [0], [2], [0, 2]]
    none = write_features(root / "run", root / "shards/test", VIEWS)
    assert "label_label" not in pq.read_table(none.features).column_names


def test_a_set_without_labels_gives_predictions_and_no_metric(root: Path) -> None:
    report = evaluate_checkpoint(root / "run", root / "shards/test", VIEWS)
    assert (report.metrics, report.top1, report.num_samples) == ({}, None, len(LABELS))
    columns = pq.read_table(report.predictions).to_pydict()
    assert set(columns) == {"key", "has_audio", "label_probabilities"}


@pytest.mark.parametrize(("role", "what"), [("train", "training"), ("validation", "validation")])
def test_a_training_on_a_set_without_labels_is_refused_in_words(root: Path, role: str, what: str) -> None:
    recipe = load_recipe(str(root / "tiny.toml"), [f"data.{role}={root}/shards/test"])
    with pytest.raises(
        UserInputError, match=rf"expected labels, which {what} needs, found a set without any \(csv, test"
    ):
        open_data(recipe)


@pytest.mark.parametrize(
    ("split", "said"), [("validation", "0 to 2 per sample"), ("test", "none: a set to predict on")]
)
def test_inspect_says_how_many_labels_a_sample_has(root: Path, split: str, said: str) -> None:
    shard_set = read_shard_set(root / "shards" / split)
    assert said in str(facts_in_words(set_facts(shard_set))["labels"])
    page = render_set_card(shard_set, set_facts(shard_set))
    assert ("<h3>x · y</h3>" if split == "validation" else "<h3>no label</h3>") in page
