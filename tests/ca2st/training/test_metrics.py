import math

import pytest
import torch

from ca2st.training.evaluate import (
    evaluation_metrics,
    harmonic_mean,
    joint_label_ranks,
    label_ranks,
    main_metric,
    mean_class_accuracy,
    mean_over_views,
    per_class_accuracy,
    top_k_hits,
)

PROBABILITIES = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.5, 0.1, 0.4], [0.2, 0.5, 0.3]])
LABELS = torch.tensor([0, 1, 2, 2])


def test_ranks_count_the_classes_before_the_label() -> None:
    assert label_ranks(PROBABILITIES, LABELS).tolist() == [0, 0, 1, 1]


def test_a_constant_prediction_is_right_for_the_first_class_only() -> None:
    flat = torch.full((3, 3), 1 / 3)
    assert top_k_hits(flat, torch.tensor([0, 1, 2]), 1).tolist() == [True, False, False]
    assert top_k_hits(flat, torch.tensor([0, 1, 2]), 2).tolist() == [True, True, False]


def test_a_prediction_that_is_not_a_number_is_never_right() -> None:
    assert top_k_hits(torch.full((1, 3), math.nan), torch.tensor([0]), 3).tolist() == [False]


def test_mean_class_accuracy_weighs_classes_and_leaves_out_those_without_samples() -> None:
    assert per_class_accuracy(PROBABILITIES, LABELS).tolist() == [1.0, 1.0, 0.0]
    assert mean_class_accuracy(PROBABILITIES, LABELS) == pytest.approx(2 / 3)
    assert mean_class_accuracy(PROBABILITIES[:2], LABELS[:2]) == 1.0


def test_views_are_averaged_as_probabilities_and_not_as_votes() -> None:
    views = torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.4, 0.6], [0.2, 0.8]])
    mean = mean_over_views(views, torch.tensor([0, 0, 0, 1]), num_samples=2)
    torch.testing.assert_close(mean, torch.tensor([[1.7 / 3, 1.3 / 3], [0.2, 0.8]]).double(), rtol=0, atol=1e-7)


def test_one_target_reports_plain_names() -> None:
    metrics = evaluation_metrics({"label": PROBABILITIES}, LABELS.unsqueeze(1))
    assert metrics == pytest.approx({"top1": 0.5, "top5": 1.0, "mean_class": 2 / 3})


def test_an_action_is_right_only_when_verb_and_noun_are() -> None:
    verb = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.2, 0.8]])
    noun = torch.tensor([[0.8, 0.2], [0.3, 0.7], [0.3, 0.7]])
    labels = torch.tensor([[0, 0], [0, 0], [0, 1]])
    metrics = evaluation_metrics({"verb": verb, "noun": noun}, labels)
    assert metrics["verb_top1"] == pytest.approx(2 / 3)
    assert metrics["noun_top1"] == pytest.approx(2 / 3)
    assert metrics["action_top1"] == pytest.approx(1 / 3)
    assert metrics["action_top5"] == 1.0
    assert metrics["action_joint_top1"] == pytest.approx(1 / 3)


def test_action_columns_follow_the_order_of_the_targets() -> None:
    verb, noun = torch.tensor([[0.9, 0.1]]), torch.tensor([[0.1, 0.2, 0.7]])
    swapped = evaluation_metrics({"noun": noun, "verb": verb}, torch.tensor([[2, 0]]))
    assert swapped["action_top1"] == swapped["action_joint_top1"] == 1.0


def test_the_joint_ranking_equals_a_brute_force_sort_of_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    verb, noun = (torch.rand(300, size, generator=generator).softmax(1).double() for size in (4, 6))
    labels = torch.stack([torch.randint(0, size, (300,), generator=generator) for size in (4, 6)], dim=1)
    expected = []
    for v, n, (i, j) in zip(verb.tolist(), noun.tolist(), labels.tolist(), strict=True):
        products = sorted((a * b for a in v for b in n), reverse=True)
        expected.append(products.index(v[i] * n[j]))
    assert joint_label_ranks(verb, noun, labels).tolist() == expected


def test_the_harmonic_mean_falls_to_the_worst() -> None:
    assert harmonic_mean([0.5, 0.5]) == 0.5
    assert harmonic_mean([0.2, 0.6]) == pytest.approx(0.3)
    assert harmonic_mean([0.9, 0.0]) == 0.0


def test_a_run_is_judged_by_its_one_target_or_by_the_action() -> None:
    assert main_metric(["label"]) == "top1"
    assert main_metric(["verb", "noun"]) == "action_top1"
    assert main_metric(["shape", "tone"]) == "shape_top1"
