import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ca2st.errors import UserInputError
from ray_jobs.evaluation.submissions import owners_id, parse_supervision, write_beside
from sharding.format.index import sample_key
from support.predictions import random_probabilities, write_predictions

IDS = ["P01_11_0", "P01_11_1", "P37_103_12"]
NONE = np.zeros((3, 0), np.int64)
SLS = {"sls_pt": 2, "sls_tl": 3, "sls_td": 4}
SOUND_SLS = {**SLS, "t_mod": 1}


def sent(path: Path) -> dict[str, Any]:
    with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as archive:
        assert archive.namelist() == ["test.json"]
        found: dict[str, Any] = json.loads(archive.read("test.json"))
    return found


def softmax(scores: dict[str, float]) -> np.ndarray:
    values = np.exp([scores[str(index)] for index in range(len(scores))])
    return values / values.sum()


def test_epic_kitchens_takes_scores_of_verbs_and_nouns_by_narration(tmp_path: Path) -> None:
    scores = {"verb": random_probabilities(3, 97, seed=0), "noun": random_probabilities(3, 300, seed=1)}
    write_predictions(tmp_path / "p", NONE, scores, ids=IDS, labelled=False)
    told = write_beside("epic_kitchens_100", tmp_path / "p", SLS)
    assert told == {"submitted": 3, "submission": str(tmp_path / "p.epic_kitchens_100.zip")}
    found = sent(tmp_path / "p.epic_kitchens_100.zip")
    results = found.pop("results")
    assert found == {"version": "0.2", "challenge": "action_recognition", "sls_pt": 2, "sls_tl": 3, "sls_td": 4}
    assert list(results) == IDS
    for index, name in enumerate(IDS):
        for target, values in scores.items():
            np.testing.assert_allclose(softmax(results[name][target]), values[index], atol=1e-6)


def test_a_model_of_the_challenge_s_targets_in_another_order_fits_too(tmp_path: Path) -> None:
    """Checkpoints name their targets by the alphabet: noun before verb."""
    scores = {"noun": random_probabilities(3, 300, seed=1), "verb": random_probabilities(3, 97, seed=0)}
    write_predictions(tmp_path / "p", NONE, scores, ids=IDS, labelled=False)
    write_beside("epic_kitchens_100", tmp_path / "p", SLS)
    results = sent(tmp_path / "p.epic_kitchens_100.zip")["results"]
    for target, values in scores.items():
        np.testing.assert_allclose(softmax(results[IDS[0]][target]), values[0], atol=1e-6)


def test_epic_sounds_takes_scores_of_interactions_by_annotation(tmp_path: Path) -> None:
    scores = {"label": random_probabilities(3, 44, seed=2)}
    write_predictions(tmp_path / "p", NONE, scores, ids=IDS, labelled=False)
    out = tmp_path / "p.epic_sounds.zip"
    write_beside("epic_sounds", tmp_path / "p", SOUND_SLS)
    first, found = out.read_bytes(), sent(out)
    assert (found["version"], found["challenge"], found["t_mod"]) == ("0.1", "audio_based_interaction_recognition", 1)
    np.testing.assert_allclose(softmax(found["results"]["P37_103_12"]["interaction"]), scores["label"][2], atol=1e-6)
    write_beside("epic_sounds", tmp_path / "p", SOUND_SLS)
    assert out.read_bytes() == first


def test_something_something_takes_the_five_likeliest_classes(tmp_path: Path) -> None:
    scores = {"label": random_probabilities(3, 174, seed=3)}
    write_predictions(tmp_path / "p", NONE, scores, ids=["74225", "1", "220847"], labelled=False)
    told = write_beside("something_something_v2", tmp_path / "p", None)
    assert told == {"submitted": 3, "submission": str(tmp_path / "p.something_something_v2.csv")}
    lines = (tmp_path / "p.something_something_v2.csv").read_text().splitlines()
    assert lines[0].split(";") == ["74225", *map(str, np.argsort(-scores["label"][0])[:5])]
    assert [line.split(";")[0] for line in lines] == ["74225", "1", "220847"]


def test_what_does_not_fit_a_challenge_is_refused(tmp_path: Path) -> None:
    write_predictions(tmp_path / "p", NONE, {"label": random_probabilities(3, 5, seed=4)}, ids=IDS, labelled=False)
    with pytest.raises(UserInputError, match="expected a model of 97 verb, 300 noun classes, found 5 label"):
        write_beside("epic_kitchens_100", tmp_path / "p", SLS)
    two = {"a": random_probabilities(3, 97, seed=4), "b": random_probabilities(3, 300, seed=4)}
    write_predictions(tmp_path / "two", NONE, two, ids=IDS, labelled=False)
    with pytest.raises(UserInputError, match="expected a model of 97 verb, 300 noun classes, found 97 a, 300 b"):
        write_beside("epic_kitchens_100", tmp_path / "two", SLS)
    with pytest.raises(UserInputError, match="--submission: expected one of epic_kitchens_100"):
        parse_supervision(None, submission="kinetics")
    with pytest.raises(UserInputError, match="expected the key of an id such as P01_11_0 or 74225, found another"):
        owners_id(sample_key("My Holiday.mp4"))
    with pytest.raises(UserInputError, match=r"--sls: sls_pt: expected 0\.\.5, found 6"):
        parse_supervision("6,0,0", submission="epic_kitchens_100")
    with pytest.raises(UserInputError, match=r"--sls: t_mod: expected 0\.\.2, found 3"):
        parse_supervision("5,0,0,3", submission="epic_sounds")


def test_supervision_is_asked_for_where_a_challenge_wants_it() -> None:
    assert parse_supervision("2,3,4", submission="epic_kitchens_100") == SLS
    assert parse_supervision("2,3,4,1", submission="epic_sounds") == SOUND_SLS
    assert parse_supervision(None, submission="something_something_v2") is None
    with pytest.raises(UserInputError, match="--sls 1,2,3: something_something_v2 asks for no such numbers"):
        parse_supervision("1,2,3", submission="something_something_v2")
    with pytest.raises(UserInputError, match=r"--sls: expected 4 numbers sls_pt,sls_tl,sls_td,t_mod for epic_sounds"):
        parse_supervision("2,3,4", submission="epic_sounds")
