"""Files for the challenge servers, from a predictions file of a test set, whose labels only the server knows.

The servers take scores and apply the softmax themselves. What is written is the logarithm of the probabilities (the
mean over the views): its softmax gives just these probabilities again.

Keys of shards are made of the owners' ids one for one; an id is found again from its key and proved by its hash, so no
shard is read.
"""

import csv
import io
import json
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ca2st.checked_json import encoded
from ca2st.durable import write_bytes
from ca2st.errors import UserInputError, check_choice
from ray_jobs.evaluation.predictions import read_facts, read_rows
from sharding.format.index import sample_key

_FILE_IN_ZIP = "test.json"
_BEST = 5
_EPOCH_OF_ZIP = (1980, 1, 1, 0, 0, 0)
"""Of the file in a zip: the same predictions give the same bytes."""
_LEAST_PROBABILITY = 1e-30


Supervision = Mapping[str, int]
"""How a model was trained, by the challenges' names and rules: ``sls_pt``, ``sls_tl``, ``sls_td`` and ``t_mod``."""
_MOST_LEVELS = {"sls_pt": 5, "sls_tl": 5, "sls_td": 5, "t_mod": 2}
Samples = Iterator[tuple[str, dict[str, NDArray[np.float32]]]]
"""Owner's id and probabilities by target of each sample, in the set's order."""


def parse_supervision(text: str | None, *, submission: str) -> Supervision | None:
    """Return the numbers of ``PT,TL,TD`` or ``PT,TL,TD,T_MOD``; None where the challenge asks for none.

    Raises:
        UserInputError: another form or range, some where the challenge asks for none, or none where it asks for them:
            nobody else can know them.
    """
    check_choice("--submission", submission, SUBMISSIONS)
    asked = SUBMISSIONS[submission].asks
    if asked == 0 and text is None:
        return None
    if asked == 0:
        raise UserInputError(f"--sls {text}: {submission} asks for no such numbers; leave it out")
    names, parts = list(_MOST_LEVELS)[:asked], [] if text is None else text.split(",")
    if len(parts) != asked or not all(part.strip().isdecimal() for part in parts):
        raise UserInputError(
            f"--sls: expected {asked} numbers {','.join(names)} for {submission}, as its rules define them, found "
            f"{text!r}"
        )
    found = dict(zip(names, map(int, parts), strict=True))
    for name, value in found.items():
        if value > _MOST_LEVELS[name]:
            raise UserInputError(
                f"--sls: {name}: expected 0..{_MOST_LEVELS[name]}, found {value}; see the challenge's rules"
            )
    return found


def write_beside(name: str, predictions: Path, supervision: Supervision | None) -> dict[str, object]:
    """Write the file of a challenge's server beside the predictions; returns its place and how many samples it has.

    Raises:
        UserInputError: other targets than the challenge has, or ids that cannot be found again.
    """
    facts, submission = read_facts(predictions), SUBMISSIONS[name]
    check_model_fits(name, facts.targets)
    out = predictions.with_suffix(f".{name}{submission.suffix}")
    samples = (
        (owners_id(key), {target: values[index] for target, values in rows.probabilities.items()})
        for rows in read_rows(predictions, facts)
        for index, key in enumerate(rows.keys)
    )
    write_bytes(out, submission.write(samples, supervision))
    return {"submitted": facts.num_samples, "submission": str(out)}


def check_model_fits(name: str, targets: Mapping[str, Sequence[str]]) -> None:
    """Refuse a model of other targets or numbers of classes than the challenge has; `targets`: its class names.

    Raises:
        UserInputError: as said.
    """
    submission = SUBMISSIONS[name]
    found = {target: len(classes) for target, classes in targets.items()}
    is_one = len(found) == len(submission.classes) == 1
    fits = [*found.values()] == [*submission.classes.values()] if is_one else found == submission.classes
    if not fits:
        raise UserInputError(
            f"--submission {name}: expected a model of {_words(submission.classes)} classes, found {_words(found)}"
        )


def _words(classes: Mapping[str, int]) -> str:
    return ", ".join(f"{size} {target}" for target, size in classes.items())


def owners_id(key: str) -> str:
    """Return the owner's id of a sample: narration, annotation or video.

    Raises:
        UserInputError: the key is of an id that is not written as EPIC-KITCHENS and Something-Something write theirs.
    """
    slug = key.rpartition("-")[0]
    for candidate in (slug.upper(), slug):
        if sample_key(candidate) == key:
            return candidate
    raise UserInputError(
        f"{key}: expected the key of an id such as P01_11_0 or 74225, found another; convert the owners' test list"
    )


def _scores(probabilities: NDArray[np.float32]) -> dict[str, float]:
    values = np.log(np.maximum(probabilities.astype(np.float64), _LEAST_PROBABILITY))
    return {str(index): round(float(value), 6) for index, value in enumerate(values)}


def _zipped(document: Mapping[str, Any]) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as archive:
        entry = zipfile.ZipInfo(_FILE_IN_ZIP, _EPOCH_OF_ZIP)
        entry.compress_type = zipfile.ZIP_DEFLATED
        archive.writestr(entry, encoded(json.dumps(document)))
    return sink.getvalue()


def _epic_kitchens(samples: Samples, supervision: Supervision | None) -> bytes:
    results = {
        name: {target: _scores(probabilities[target]) for target in ("verb", "noun")} for name, probabilities in samples
    }
    return _zipped({"version": "0.2", "challenge": "action_recognition", **(supervision or {}), "results": results})


def _epic_sounds(samples: Samples, supervision: Supervision | None) -> bytes:
    results = {
        name: {"interaction": _scores(scores)} for name, probabilities in samples for scores in probabilities.values()
    }
    challenge = "audio_based_interaction_recognition"
    return _zipped({"version": "0.1", "challenge": challenge, **(supervision or {}), "results": results})


def _something_something(samples: Samples, _supervision: Supervision | None) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, delimiter=";", lineterminator="\n")
    for name, probabilities in samples:
        (scores,) = probabilities.values()
        writer.writerow((name, *np.argsort(-scores, kind="stable")[:_BEST].tolist()))
    return encoded(text.getvalue())


@dataclass(frozen=True, kw_only=True, slots=True)
class Submission:
    """A challenge's server."""

    classes: Mapping[str, int]
    """What a model must predict, in any order; the name of a single target may be another."""
    suffix: str
    """Of the file."""
    asks: int
    """Numbers of `Supervision` that it takes."""
    write: Callable[[Samples, Supervision | None], bytes]


SUBMISSIONS: dict[str, Submission] = {
    "epic_kitchens_100": Submission(classes={"verb": 97, "noun": 300}, suffix=".zip", asks=3, write=_epic_kitchens),
    "epic_sounds": Submission(classes={"interaction": 44}, suffix=".zip", asks=4, write=_epic_sounds),
    "something_something_v2": Submission(classes={"class": 174}, suffix=".csv", asks=0, write=_something_something),
}
"""By the name of the dataset."""
