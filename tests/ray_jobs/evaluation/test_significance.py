from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest

from ca2st.errors import UserInputError
from ray_jobs.evaluation.significance import compare_hits, compare_predictions, mcnemar_p_value
from support.predictions import random_probabilities, write_predictions


@pytest.mark.parametrize(("only_first", "only_second"), [(0, 0), (0, 1), (3, 9), (40, 60), (700, 1300), (5, 5)])
def test_mcnemars_exact_test_is_the_two_sided_binomial_test(only_first: int, only_second: int) -> None:
    total = only_first + only_second
    expected = binomtest(only_first, total).pvalue if total else 1.0
    assert mcnemar_p_value(only_first, only_second) == pytest.approx(expected, rel=1e-9)


def test_the_interval_is_that_of_drawing_the_samples_again() -> None:
    generator = np.random.default_rng(0)
    first, second = generator.random(400) < 0.5, generator.random(400) < 0.58
    found = compare_hits(first, second, draws=20_000)
    gains = second.astype(int) - first.astype(int)
    drawn = gains[generator.integers(0, 400, (20_000, 400))].mean(axis=1)
    assert (found.low, found.high) == pytest.approx(np.quantile(drawn, [0.025, 0.975]).tolist(), abs=0.006)
    assert found.difference == pytest.approx(gains.mean())
    assert compare_hits(first, second, draws=20_000) == found


def test_files_are_paired_by_sample_whatever_their_order(tmp_path: Path) -> None:
    scores = {"verb": random_probabilities(50, 5, seed=0), "noun": random_probabilities(50, 7, seed=1)}
    labels = np.stack([np.arange(50) % 5, np.arange(50) % 7], axis=1)
    ids, turned = [f"clip {number}" for number in range(50)], np.arange(50)[::-1]
    write_predictions(tmp_path / "a", labels, scores, ids=ids)
    same = {name: values[turned] for name, values in scores.items()}
    write_predictions(tmp_path / "b", labels[turned], same, ids=[ids[place] for place in turned])
    found = compare_predictions(tmp_path / "a", tmp_path / "b")
    assert [one.metric for one in found] == ["verb_top1", "noun_top1", "action_top1"]
    assert all((one.only_first, one.only_second, one.p_value) == (0, 0, 1.0) for one in found)
    expected = (scores["verb"].argmax(1) == labels[:, 0]) & (scores["noun"].argmax(1) == labels[:, 1])
    assert found[2].first == expected.mean()


def test_models_that_number_their_classes_otherwise_are_compared_by_the_names(tmp_path: Path) -> None:
    scores, labels = random_probabilities(50, 3, seed=0), np.arange(50) % 3
    write_predictions(tmp_path / "a", labels[:, None], {"label": scores}, classes={"label": ["x", "y", "z"]})
    turned, order = np.stack([scores[:, place] for place in (2, 0, 1)], axis=1), {"label": ["z", "x", "y"]}
    write_predictions(tmp_path / "b", (labels[:, None] + 1) % 3, {"label": turned}, classes=order)
    (found,) = compare_predictions(tmp_path / "a", tmp_path / "b")
    assert (found.only_first, found.only_second, found.first) == (0, 0, (scores.argmax(1) == labels).mean())


def test_files_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    scores, labels = {"label": random_probabilities(9, 3, seed=0)}, np.arange(9)[:, None] % 3
    write_predictions(tmp_path / "a", labels, scores)
    write_predictions(tmp_path / "others", labels, scores, ids=[f"other {number}" for number in range(9)])
    write_predictions(tmp_path / "relabelled", (labels + 1) % 3, scores)
    write_predictions(tmp_path / "unlabelled", labels[:, :0], scores, labelled=False)
    for name, message in {
        "others": "expected predictions of the same samples, found others: only in .*a: clip-0",
        "relabelled": "expected the same labels, found others",
        "unlabelled": "expected predictions of samples with a label each, .* found label and none",
    }.items():
        with pytest.raises(UserInputError, match=message):
            compare_predictions(tmp_path / "a", tmp_path / name)
    for wrong in ({"draws": 0}, {"confidence": 1.0}, {"seed": -1}):
        with pytest.raises(UserInputError, match="draws, a confidence between 0 and 1 and a seed of 0 or more, found"):
            compare_predictions(tmp_path / "a", tmp_path / "a", **wrong)
