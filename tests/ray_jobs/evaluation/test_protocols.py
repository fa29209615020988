import csv
import io
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.stats import norm
from sklearn import metrics as oracle

from ca2st.training.metrics import joint_label_ranks
from ray_jobs.evaluation.predictions import read_facts
from ray_jobs.evaluation.protocols import class_rows, confusion_picture, measure, rank_classes, write_tables
from support.predictions import random_probabilities, write_predictions

EXACT = 1e-9
COUNT = 700


def labels_of(size: int, *, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, size, COUNT)


def test_every_set_has_top_k_and_the_mean_over_its_classes_equal_to_scikit_learns(tmp_path: Path) -> None:
    scores, labels = random_probabilities(COUNT, 12, seed=0), labels_of(12, seed=0)
    write_predictions(tmp_path / "p.parquet", labels[:, None], {"label": scores}, dataset="kinetics_400")
    found = measure(tmp_path / "p.parquet").metrics
    expected = {
        "top1": oracle.accuracy_score(labels, scores.argmax(1)),
        "top5": oracle.top_k_accuracy_score(labels, scores, k=5, labels=range(12)),
        "mean_class": oracle.balanced_accuracy_score(labels, scores.argmax(1)),
    }
    assert found == pytest.approx(expected, abs=EXACT)


def test_samples_without_a_label_that_the_model_knows_count_in_no_metric(tmp_path: Path) -> None:
    scores, labels = random_probabilities(COUNT, 12, seed=0), labels_of(12, seed=0)
    labels[::3] = -1
    write_predictions(tmp_path / "p.parquet", labels[:, None], {"label": scores}, dataset="vgg_sound")
    found, known = measure(tmp_path / "p.parquet"), labels >= 0
    assert found.facts.num_samples == COUNT
    assert found.metrics["top1"] == pytest.approx(oracle.accuracy_score(labels[known], scores[known].argmax(1)))
    assert found.confusion["label"].sum() == known.sum()


@pytest.fixture
def epic_sounds(tmp_path: Path) -> tuple[Path, np.ndarray, np.ndarray]:
    scores, labels = random_probabilities(COUNT, 9, seed=1), labels_of(8, seed=1)  # no sample of the last class
    names = {"label": [*(f"sound {index}" for index in range(4)), "background", "a", "b", "c", "d"]}
    path = tmp_path / "p.parquet"
    write_predictions(path, labels[:, None], {"label": scores}, dataset="epic_sounds", classes=names)
    return path, scores, labels


def ranked(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """By scikit-learn, macro over the classes that are there."""
    present = np.unique(labels)
    truth = labels[:, None] == present
    area = oracle.roc_auc_score(truth, scores[:, present], average="macro")
    return {
        "map": oracle.average_precision_score(truth, scores[:, present], average="macro"),
        "auc": area,
        "d_prime": math.sqrt(2) * norm.ppf(area),
    }


def test_epic_sounds_is_ranked_with_and_without_background(epic_sounds: tuple[Path, np.ndarray, np.ndarray]) -> None:
    path, scores, labels = epic_sounds
    found, loud = measure(path).metrics, labels != 4
    assert {name: found[name] for name in ("map", "auc", "d_prime")} == pytest.approx(ranked(scores, labels), abs=EXACT)
    expected = {f"no_background_{name}": value for name, value in ranked(scores[loud], labels[loud]).items()}
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=EXACT)
    assert found["no_background_top1"] == pytest.approx(
        oracle.accuracy_score(labels[loud], scores[loud].argmax(1)), abs=EXACT
    )


def test_ranking_in_blocks_of_classes_gives_the_same_numbers(epic_sounds: tuple[Path, np.ndarray, np.ndarray]) -> None:
    path, _, _ = epic_sounds
    facts = read_facts(path)
    whole = rank_classes(path, facts, "label")
    blocks = rank_classes(path, facts, "label", most_bytes=2 * 4 * COUNT)
    assert blocks[:8] == whole[:8]
    assert math.isnan(blocks[8].area)


def test_epic_kitchens_has_both_top_5_rules_unseen_participants_and_tail_classes(tmp_path: Path) -> None:
    verb, noun = random_probabilities(COUNT, 97, seed=2), random_probabilities(COUNT, 300, seed=3)
    labels = np.stack([labels_of(97, seed=4), labels_of(300, seed=5)], axis=1)
    verb[np.arange(0, COUNT, 2), labels[::2, 0]] += 1  # some are right
    noun[np.arange(0, COUNT, 3), labels[::3, 1]] += 1
    people = ["P18", "P32", "P01", "P181"]
    ids = [f"{people[number % 4]}_01_{number}" for number in range(COUNT)]
    path = tmp_path / "p.parquet"
    scores = {"verb": verb, "noun": noun}
    write_predictions(path, labels, scores, ids=ids, dataset="epic_kitchens_100", split="validation")
    found = measure(path).metrics
    right = {"verb": verb.argmax(1) == labels[:, 0], "noun": noun.argmax(1) == labels[:, 1]}
    right["action"] = right["verb"] & right["noun"]
    unseen = np.array([name.split("_")[0] in ("P18", "P32") for name in ids])
    tail_verb = ~np.isin(labels[:, 0], [*range(10), 11])
    untrained = [205, 240, 270, 275, 286, 288, 289, 290, 294, 295, 296]
    tail_noun = ~np.isin(labels[:, 1], [*range(56), 57, 58, 60, 63, 66, *untrained])
    expected = {f"{name}_top1": hits.mean() for name, hits in right.items()}
    expected |= {f"unseen_{name}_top1": hits[unseen].mean() for name, hits in right.items()}
    expected["tail_verb_top1"] = right["verb"][tail_verb].mean()
    expected["tail_noun_top1"] = right["noun"][tail_noun].mean()
    expected["tail_action_top1"] = right["action"][tail_verb | tail_noun].mean()
    five = [
        np.take_along_axis(one.argsort(1), np.full((COUNT, 5), -1) - np.arange(5), 1) == column[:, None]
        for one, column in zip((verb, noun), labels.T, strict=True)
    ]
    expected["action_top5"] = (five[0].any(1) & five[1].any(1)).mean()
    expected["action_joint_top5"] = (joint_label_ranks(verb, noun, labels) < 5).mean()
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=EXACT)
    assert expected["action_top5"] > 0


def test_activitynet_is_also_measured_by_video_as_its_owners_do(tmp_path: Path) -> None:
    size, draw = 6, np.random.default_rng(9)
    videos = [f"-{'aBcD'[number % 4]}b_-{number}-{number % 7}" for number in range(150)]  # they end like times
    video = draw.integers(0, len(videos), COUNT)
    labels = np.where(draw.random(COUNT) < 0.9, video % size, draw.integers(0, size, COUNT))
    scores = random_probabilities(COUNT, size, seed=9)
    scores[np.arange(0, COUNT, 2), labels[::2]] += 0.3
    ids = [f"{videos[at]}@{float(number)!r}-{number + 0.25!r}" for number, at in enumerate(video)]
    write_predictions(tmp_path / "p.parquet", labels[:, None], {"label": scores}, ids=ids, dataset="activitynet")
    found = measure(tmp_path / "p.parquet").metrics
    present = np.unique(video)
    means = np.stack([scores[video == one].astype(np.float64).mean(axis=0) for one in present])
    truth = np.stack([np.isin(np.arange(size), labels[video == one]) for one in present])
    assert (truth.sum(axis=1) > 1).any(), "some videos have several labels"
    precisions = []
    for column in range(size):
        precision, recall, _ = oracle.precision_recall_curve(truth[:, column], means[:, column])
        envelope = np.maximum.accumulate(precision[:-1])  # from all samples to none: the best of this recall or more
        precisions.append(-(np.diff(recall) * envelope).sum())
    assert found["video_map"] == pytest.approx(np.mean(precisions), abs=EXACT)
    for most in (1, 3):
        best = [set(row.argsort()[::-1][:most]) for row in means]
        hits = [bool(own & set(np.flatnonzero(row))) for own, row in zip(best, truth, strict=True)]
        assert found[f"video_hit{most}"] == pytest.approx(np.mean(hits), abs=EXACT)
    assert found["video_hit1"] < found["video_hit3"] < 1


def test_several_labels_per_sample_are_ranked_as_questions_of_their_own(tmp_path: Path) -> None:
    scores = random_probabilities(COUNT, 6, seed=6)
    truth = (np.random.default_rng(7).random((COUNT, 6)) < 0.4).astype(np.int64)
    write_predictions(tmp_path / "p.parquet", truth, {"label": scores}, several=True, dataset="vgg_sound")
    found = measure(tmp_path / "p.parquet").metrics
    expected = oracle.average_precision_score(truth, scores, average="macro")
    assert found["map"] == pytest.approx(expected, abs=EXACT)
    assert found["auc"] == pytest.approx(oracle.roc_auc_score(truth, scores, average="macro"), abs=EXACT)
    assert found["top1"] == pytest.approx(truth[np.arange(COUNT), scores.argmax(1)].mean(), abs=EXACT)


def test_a_set_without_labels_has_predictions_and_no_metric(tmp_path: Path) -> None:
    scores = random_probabilities(COUNT, 6, seed=8)
    none = np.zeros((COUNT, 0), np.int64)
    write_predictions(tmp_path / "p.parquet", none, {"label": scores}, labelled=False, dataset="epic_sounds")
    found = measure(tmp_path / "p.parquet")
    assert (found.metrics, found.facts.num_samples, write_tables(found, tmp_path / "p.parquet")) == ({}, COUNT, [])


def test_the_table_names_for_each_class_what_it_is_taken_for(epic_sounds: tuple[Path, np.ndarray, np.ndarray]) -> None:
    path, scores, labels = epic_sounds
    measures = measure(path)
    rows = list(class_rows(measures, "label"))
    report = oracle.classification_report(labels, scores.argmax(1), output_dict=True, zero_division=0)
    for index, row in enumerate(rows[:8]):
        assert row.top1 == pytest.approx(report[str(index)]["recall"], abs=EXACT)
        assert row.precision == pytest.approx(report[str(index)]["precision"], abs=EXACT)
        assert row.num_samples == report[str(index)]["support"]
    wrong = scores.argmax(1)[(labels == 4) & (scores.argmax(1) != 4)]
    assert rows[4].confused_with == measures.facts.targets["label"][np.bincount(wrong).argmax()]
    table, picture = write_tables(measures, path)
    assert len(list(csv.DictReader(io.StringIO(table.read_text())))) == 9
    assert Image.open(io.BytesIO(picture.read_bytes())).size[0] > 900


def test_the_picture_is_dark_where_a_class_is_always_answered_and_grey_without_samples() -> None:
    image = Image.open(io.BytesIO(confusion_picture(np.array([[4, 0], [0, 0]]), ["a", "b"])))
    colours = {colour: count for count, colour in image.convert("RGB").getcolors(1 << 24)}
    assert colours[(8, 48, 107)] == 450 * 450
    assert 2 * 450 * 450 <= colours[(236, 236, 236)] < 2 * 450 * 450 + 99  # and shades of the letters
