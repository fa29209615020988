from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from ca2st.errors import DataDamageError, UserInputError
from ca2st.training.errors import IncompleteEvaluationError
from ray_jobs.evaluation.predictions import (
    ExpectedKeys,
    PredictionFacts,
    join_parts,
    read_facts,
    read_rows,
    writing_part,
)
from support.predictions import random_probabilities, scored_of, write_predictions

KEYS = [f"clip-{number}" for number in range(9)]
FACTS = PredictionFacts(targets={"label": ["a", "b", "c"]}, labelled=("label",), num_samples=9)
SCORES = random_probabilities(9, 3, seed=0)
LABELS = np.arange(9)[:, None] % 3 - np.array([[1]])  # every third has none


def write_parts(folder: Path, *parts: list[str]) -> list[Path]:
    """A part for each list of keys, with the numbers of these samples."""
    files = [folder / f"part-{rank}" for rank in range(len(parts))]
    for file, keys in zip(files, parts, strict=True):
        with writing_part(file, FACTS) as add:
            rows = [KEYS.index(key) if key in KEYS else 0 for key in keys]
            add(scored_of(keys, LABELS[rows], {"label": SCORES[rows]}))
    return files


def join(folder: Path, *parts: list[str], views: int = 1) -> Path:
    out = folder / "predictions.parquet"
    join_parts(write_parts(folder, *parts), out, FACTS, ExpectedKeys(lambda: KEYS, 9), num_views=views)
    return out


@pytest.mark.parametrize("cut", [[], [4], [3, 6], [0, 9]])
def test_parts_of_any_number_of_ranks_give_the_sets_order(tmp_path: Path, cut: list[int]) -> None:
    edges = [0, *cut, 9]
    parts = [KEYS[first:last] for first, last in pairwise(edges)]
    (rows,) = read_rows(join(tmp_path, *parts), FACTS)
    assert rows.keys == KEYS
    assert rows.labels["label"].tolist() == LABELS[:, 0].tolist()
    np.testing.assert_array_equal(rows.probabilities["label"], SCORES)
    assert read_facts(tmp_path / "predictions.parquet") == FACTS


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((KEYS[:4], KEYS[5:]), "found 1 never scored: clip-4; no metric"),
        ((KEYS[:5], KEYS[4:]), "found 1 scored more than once: clip-4; no metric"),
        ((KEYS[:4], ["other"], KEYS[5:]), "found 1 never scored: clip-4"),
        ((KEYS, ["other"]), "found 1 not in the set: other"),
        ((KEYS[4:], KEYS[:4]), "found another order"),
        (([],), "found 9 never scored: clip-0, clip-1, clip-2, clip-3, clip-4 and 4 more"),
    ],
)
def test_p13_parts_that_are_not_the_set_are_refused_by_name_and_leave_no_file(
    tmp_path: Path, parts: tuple[list[str], ...], message: str
) -> None:
    with pytest.raises(IncompleteEvaluationError, match=message):
        join(tmp_path, *parts)
    assert not (tmp_path / "predictions.parquet").exists()


def test_p13_a_sample_with_fewer_views_than_asked_for_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IncompleteEvaluationError, match="by as many views as were asked for"):
        join(tmp_path, KEYS, views=6)


def test_a_file_that_is_no_predictions_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match=r"nowhere\.parquet: expected a predictions file .*, found none"):
        read_facts(tmp_path / "nowhere.parquet")
    (tmp_path / "text.parquet").write_text("no parquet")
    with pytest.raises(UserInputError, match=r"text\.parquet: expected a predictions file"):
        read_facts(tmp_path / "text.parquet")
    with pytest.raises(UserInputError, match="found one that does not say what made it"):
        read_facts(write_parts(tmp_path, KEYS)[0])


def test_a_changed_byte_of_a_predictions_file_is_damage_or_changes_no_row(tmp_path: Path) -> None:
    path, labels = tmp_path / "p.parquet", np.arange(40)[:, None] % 3
    facts = write_predictions(path, labels, {"label": random_probabilities(40, 3, seed=0)})
    sound, said = path.read_bytes(), []
    (expected,) = read_rows(path, facts)
    for at in range(4, len(sound) - 4, 13):
        path.write_bytes(sound[:at] + bytes([sound[at] ^ 16]) + sound[at + 1 :])
        try:
            (rows,) = read_rows(path, facts)
        except DataDamageError as error:
            said.append(str(error))
        else:
            assert rows.keys == expected.keys
            np.testing.assert_array_equal(rows.labels["label"], expected.labels["label"])
            np.testing.assert_array_equal(rows.probabilities["label"], expected.probabilities["label"])
    assert len(said) > 50
    assert all(f"{path}: expected the predictions that were written, found others (" in one for one in said)
