import math

import numpy as np
import pytest
from scipy.stats import norm
from sklearn import metrics as oracle

from ca2st.training.metrics import (
    MetricSums,
    action_hits,
    class_ranking,
    class_rankings,
    confusion_matrix,
    d_prime,
    evaluation_metrics,
    harmonic_mean,
    joint_label_ranks,
    label_ranks,
    main_metric,
    predicted_classes,
    ranking_metrics,
)

PROBABILITIES = np.array([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.5, 0.1, 0.4], [0.2, 0.5, 0.3]])
LABELS = np.array([0, 1, 2, 2])
EXACT = 1e-9


def random_scores(num_samples: int, num_classes: int, *, seed: int, steps: int | None = None) -> np.ndarray:
    """Softmax outputs; with `steps` rounded to so many different values, so that many are equal."""
    drawn = np.random.default_rng(seed).normal(size=(num_samples, num_classes))
    scores = np.exp(drawn) / np.exp(drawn).sum(axis=1, keepdims=True)
    return scores if steps is None else np.floor(scores * steps) / steps


def random_labels(num_samples: int, num_classes: int, *, seed: int) -> np.ndarray:
    return np.random.default_rng(seed + 1000).integers(0, num_classes, num_samples)


def test_ranks_count_the_classes_before_the_label() -> None:
    assert label_ranks(PROBABILITIES, LABELS).tolist() == [0, 0, 1, 1]


def test_a_constant_prediction_is_right_for_the_first_class_only() -> None:
    flat = np.full((3, 3), 1 / 3)
    assert (label_ranks(flat, np.array([0, 1, 2])) < 1).tolist() == [True, False, False]
    assert (label_ranks(flat, np.array([0, 1, 2])) < 2).tolist() == [True, True, False]
    assert evaluation_metrics({"label": flat}, np.array([[0], [1], [2]]))["top1"] == pytest.approx(1 / 3)


def test_a_prediction_that_is_not_a_number_is_never_right_and_of_no_class() -> None:
    lost = np.full((1, 3), math.nan)
    assert (label_ranks(lost, np.array([0])) < 3).tolist() == [False]
    assert evaluation_metrics({"label": lost}, np.array([[0]]))["top5"] == 0.0  # though there are but three classes
    assert predicted_classes(lost).tolist() == [-1]
    assert confusion_matrix(np.array([0]), np.array([-1]), num_classes=3).sum() == 0
    both = {"verb": lost, "noun": np.array([[0.9, 0.1]])}
    assert {evaluation_metrics(both, np.array([[0, 0]]))[f"action_{rule}"] for rule in ("top1", "joint_top5")} == {0.0}


def test_a_sample_whose_score_is_not_a_number_stands_last_in_its_class() -> None:
    positives = np.array([True, False, False])
    assert class_ranking(np.array([math.nan, 0.1, 0.2]), positives).area == 0.0
    assert class_ranking(np.array([0.3, 0.1, math.nan]), positives).area == 1.0


@pytest.mark.parametrize("k", [1, 2, 5])
def test_top_k_is_that_of_scikit_learn(k: int) -> None:
    scores, labels = random_scores(500, 11, seed=k), random_labels(500, 11, seed=k)
    expected = oracle.top_k_accuracy_score(labels, scores, k=k, labels=range(11))
    assert (label_ranks(scores, labels) < k).mean() == pytest.approx(expected, abs=EXACT)
    metrics = evaluation_metrics({"label": scores}, labels[:, None])
    assert metrics.get(f"top{k}", expected) == pytest.approx(expected, abs=EXACT)


def test_confusion_and_mean_class_accuracy_are_those_of_scikit_learn() -> None:
    scores, labels = random_scores(400, 7, seed=2), random_labels(400, 6, seed=2)
    predicted = predicted_classes(scores)
    matrix = confusion_matrix(labels, predicted, num_classes=7)
    assert matrix.tolist() == oracle.confusion_matrix(labels, predicted, labels=range(7)).tolist()
    assert not (labels == 6).any()  # a class that no sample has
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        expected = oracle.balanced_accuracy_score(labels, predicted)
    found = evaluation_metrics({"label": scores}, labels[:, None])
    assert found["mean_class"] == pytest.approx(expected, abs=EXACT)


def test_mean_class_accuracy_weighs_classes_and_leaves_out_those_without_samples() -> None:
    sums = MetricSums({"label": 3})
    sums.add({"label": PROBABILITIES}, LABELS[:, None])
    assert (sums.right["label"] / sums.counts["label"]).tolist() == [1.0, 1.0, 0.0]
    assert evaluation_metrics({"label": PROBABILITIES[:2]}, LABELS[:2, None])["mean_class"] == 1.0


@pytest.mark.parametrize("steps", [None, 20])
def test_map_and_area_of_one_label_per_sample_are_those_of_scikit_learn(steps: int | None) -> None:
    scores, labels = random_scores(600, 9, seed=3, steps=steps), random_labels(600, 8, seed=3)
    truth = labels[:, None] == np.arange(9)
    expected = oracle.average_precision_score(truth[:, :8], scores[:, :8], average="macro")
    assert ranking_metrics(class_rankings(scores, truth))["map"] == pytest.approx(expected, abs=EXACT)
    area = oracle.roc_auc_score(truth[:, :8], scores[:, :8], average="macro")
    assert ranking_metrics(class_rankings(scores, truth))["auc"] == pytest.approx(area, abs=EXACT)
    assert d_prime(area) == pytest.approx(math.sqrt(2) * norm.ppf(area), abs=EXACT)


@pytest.mark.parametrize("steps", [None, 20])
def test_map_and_area_of_several_labels_per_sample_are_those_of_scikit_learn(steps: int | None) -> None:
    scores = random_scores(300, 6, seed=4, steps=steps)
    truth = np.random.default_rng(5).random((300, 6)) < 0.3
    truth[:, 5] = False  # a class that no sample has
    expected = oracle.average_precision_score(truth[:, :5], scores[:, :5], average="macro")
    assert ranking_metrics(class_rankings(scores, truth))["map"] == pytest.approx(expected, abs=EXACT)
    area = oracle.roc_auc_score(truth[:, :5], scores[:, :5], average="macro")
    assert ranking_metrics(class_rankings(scores, truth))["auc"] == pytest.approx(area, abs=EXACT)


def test_a_class_that_every_sample_has_counts_in_map_and_in_no_area() -> None:
    ranking = class_ranking(np.array([0.2, 0.4]), np.array([True, True]))
    assert ranking.average_precision == 1.0
    assert math.isnan(ranking.area)


def test_a_perfect_separation_is_infinite_and_none_at_all_is_zero() -> None:
    assert d_prime(1.0) == math.inf
    assert d_prime(0.0) == -math.inf
    assert d_prime(0.5) == 0.0
    assert math.isnan(d_prime(math.nan))


def test_one_target_reports_plain_names() -> None:
    metrics = evaluation_metrics({"label": PROBABILITIES}, LABELS[:, None])
    assert metrics == pytest.approx({"top1": 0.5, "top5": 1.0, "mean_class": 2 / 3})


def test_an_action_is_right_only_when_verb_and_noun_are() -> None:
    verb = np.array([[0.9, 0.1], [0.9, 0.1], [0.2, 0.8]])
    noun = np.array([[0.8, 0.2], [0.3, 0.7], [0.3, 0.7]])
    metrics = evaluation_metrics({"verb": verb, "noun": noun}, np.array([[0, 0], [0, 0], [0, 1]]))
    assert metrics["verb_top1"] == pytest.approx(2 / 3)
    assert metrics["noun_top1"] == pytest.approx(2 / 3)
    assert metrics["action_top1"] == pytest.approx(1 / 3)
    assert metrics["action_top5"] == 1.0
    assert metrics["action_joint_top1"] == pytest.approx(1 / 3)


def test_action_columns_follow_the_order_of_the_targets() -> None:
    verb, noun = np.array([[0.9, 0.1]]), np.array([[0.1, 0.2, 0.7]])
    swapped = evaluation_metrics({"noun": noun, "verb": verb}, np.array([[2, 0]]))
    assert swapped["action_top1"] == swapped["action_joint_top1"] == 1.0


def test_the_two_top_5_rules_of_actions_differ() -> None:
    verb = np.array([[0.4, 0.3, 0.2, 0.05, 0.04, 0.01]])
    noun = np.array([[0.4, 0.3, 0.2, 0.05, 0.04, 0.01]])
    hits = action_hits(verb, noun, np.array([[4, 4]]))
    assert hits["action_top5"].all()
    assert not hits["action_joint_top5"].any()


@pytest.mark.parametrize(("num_verbs", "num_nouns"), [(4, 6), (97, 300)])
def test_the_joint_ranking_equals_a_sort_of_the_pairs_of_the_best_hundred(num_verbs: int, num_nouns: int) -> None:
    verb, noun = random_scores(60, num_verbs, seed=6), random_scores(60, num_nouns, seed=7)
    labels = np.stack([random_labels(60, size, seed=size) for size in (num_verbs, num_nouns)], axis=1)
    expected = []
    for v, n, (i, j) in zip(verb, noun, labels, strict=True):
        best = {"v": np.argsort(v)[::-1][:100], "n": np.argsort(n)[::-1][:100]}
        pairs = sorted(((v[a] * n[b], a, b) for a in best["v"] for b in best["n"]), reverse=True)
        places = [place for place, (_, a, b) in enumerate(pairs) if (a, b) == (i, j)]
        expected.append(places[0] if places else num_verbs * num_nouns)
    assert joint_label_ranks(verb, noun, labels).tolist() == expected
    assert num_nouns < 300 or max(expected) == num_verbs * num_nouns  # some true nouns are beyond the best hundred


def test_the_harmonic_mean_falls_to_the_worst() -> None:
    assert harmonic_mean([0.5, 0.5]) == 0.5
    assert harmonic_mean([0.2, 0.6]) == pytest.approx(0.3)
    assert harmonic_mean([0.9, 0.0]) == 0.0


def test_a_run_is_judged_by_its_one_target_or_by_the_action() -> None:
    assert main_metric(["label"]) == "top1"
    assert main_metric(["label"], labelling="several") == "map"
    assert main_metric(["verb", "noun"]) == "action_top1"
    assert main_metric(["shape", "tone"]) == "shape_top1"
