"""What a predictions file is worth, as each dataset's field reports it: metrics, tables by class, confusion.

Every set has top-1, top-5 and the mean accuracy over its classes; verb and noun also the action, by both top-5 rules.
Beside them, by the name of the dataset:

- EPIC-KITCHENS-100: the same for participants that no training video shows (``unseen_``), and top-1 of the tail classes
  (``tail_``; of actions where verb or noun is one).
- EPIC-SOUNDS, HD-EPIC-SOUNDS: mAP, area under the ROC curve and d', each with and without the class ``background``.
- VGG-Sound, KineticsSound, UCF-101 and sets of several labels: mAP, area and d'.
- ActivityNet, whose samples are segments: its owners' numbers by video, mAP, hit@1, hit@3 (``video_``).

A file is read in passes, some thousand rows at a time; what ranks all samples of a class holds the scores of as many
classes as fit into 256 MB.
"""

import csv
import io
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from ca2st.checked_json import encoded
from ca2st.durable import write_bytes
from ca2st.training.metrics import (
    NOUN,
    VERB,
    MetricSums,
    Ranking,
    class_ranking,
    confusion_matrix,
    interpolated_precision,
    mean_over_classes,
    predicted_classes,
    ranking_metrics,
    target_prefix,
)
from ray_jobs.evaluation.predictions import PredictionFacts, Rows, read_facts, read_rows

_RANKED_BYTES = 256_000_000
_MOST_CONFUSED_CLASSES = 2000
"""Of more classes no confusion is counted: the table would have millions of cells."""
_BACKGROUND = "background"
_UNSEEN = {"validation": ("p18", "p32"), "test": ("p33", "p34", "p36")}
_HEAD_VERBS = {*range(10), 11}
_HEAD_NOUNS = {*range(56), 57, 58, 60, 63, 66}
_UNTRAINED_NOUNS = {205, 240, 270, 275, 286, 288, 289, 290, 294, 295, 296}

Part = Callable[[Rows, PredictionFacts], NDArray[np.bool_]]
"""Which rows belong to a part of a set."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SetPart:
    """A part of a dataset that has numbers of its own."""

    prefix: str
    """Of its metrics."""
    rows: Part
    metrics: tuple[str, ...] | None = None
    """Those that are reported; None: all."""


def _of_participants(rows: Rows, facts: PredictionFacts) -> NDArray[np.bool_]:
    wanted = _UNSEEN.get(facts.split, ())
    return np.array([key.split("_", 1)[0] in wanted for key in rows.keys], np.bool_)


def _tail(rows: Rows, target: str) -> NDArray[np.bool_]:
    other = _HEAD_VERBS if target == VERB else _HEAD_NOUNS | _UNTRAINED_NOUNS
    labels = rows.labels[target]
    tail: NDArray[np.bool_] = (labels >= 0) & ~np.isin(labels, list(other))
    return tail


def _without_background(rows: Rows, facts: PredictionFacts) -> NDArray[np.bool_]:
    ((target, labels),) = rows.labels.items()
    classes = facts.targets[target]
    rest: NDArray[np.bool_] = labels != (classes.index(_BACKGROUND) if _BACKGROUND in classes else -1)
    return rest


_EPIC_SOUNDS = (SetPart(prefix="no_background_", rows=_without_background),)
PARTS: dict[str, tuple[SetPart, ...]] = {
    "epic_kitchens_100": (
        SetPart(prefix="unseen_", rows=_of_participants, metrics=("verb_top1", "noun_top1", "action_top1")),
        SetPart(prefix="tail_", rows=lambda rows, _: _tail(rows, VERB) | _tail(rows, NOUN), metrics=("action_top1",)),
        SetPart(prefix="tail_", rows=lambda rows, _: _tail(rows, VERB), metrics=("verb_top1",)),
        SetPart(prefix="tail_", rows=lambda rows, _: _tail(rows, NOUN), metrics=("noun_top1",)),
    ),
    "epic_sounds": _EPIC_SOUNDS,
    "hd_epic_sounds": _EPIC_SOUNDS,
}
"""By dataset: what has numbers of its own."""
RANKED = frozenset({"epic_sounds", "hd_epic_sounds", "vgg_sound", "kinetics_sound", "ucf_101"})
"""Datasets whose field reports mAP, area and d'."""
BY_VIDEO = frozenset({"activitynet"})
"""Datasets whose samples are segments, and whose field also reports numbers by video."""


class ClassRow(NamedTuple):
    """One class in a table."""

    name: str
    num_samples: int
    top1: float
    """Share of its samples that were answered right; NaN without samples."""
    precision: float
    """Share of the answers of this class that were right; NaN where it was never answered."""
    average_precision: float
    area: float
    confused_with: str
    """What its samples were answered as most often when not right; empty: never."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measures:
    """What a predictions file is worth."""

    facts: PredictionFacts
    metrics: dict[str, float]
    """Fractions of 1, and d'; none for a set without labels."""
    confusion: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    """By target: a row per true class, a column per answered one."""
    rankings: dict[str, list[Ranking]] = field(default_factory=dict)
    """By target: of each class, where the field reports them."""


def measure(predictions: Path) -> Measures:
    """Return what a predictions file is worth by the protocol of its dataset.

    Raises:
        UserInputError: it is no predictions file.
    """
    facts = read_facts(predictions)
    if facts.several:
        return _measure_several(predictions, facts)
    targets = {name: len(classes) for name, classes in facts.targets.items()}
    parts = PARTS.get(facts.dataset, ()) if set(facts.labelled) == set(targets) else ()
    whole, sums = MetricSums(targets), [(part, MetricSums(targets)) for part in parts]
    confusion = {
        name: np.zeros((size, size), np.int64)
        for name, size in targets.items()
        if name in facts.labelled and size <= _MOST_CONFUSED_CLASSES
    }
    for rows in read_rows(predictions, facts):
        labels = rows.label_columns(tuple(targets))
        whole.add(rows.probabilities, labels)
        for part, own in sums:
            mask = part.rows(rows, facts)
            own.add({target: values[mask] for target, values in rows.probabilities.items()}, labels[mask])
        for name, matrix in confusion.items():
            known = rows.labels[name] >= 0
            answered = predicted_classes(rows.probabilities[name][known])
            matrix += confusion_matrix(rows.labels[name][known], answered, num_classes=len(matrix))
    metrics = whole.metrics()
    for part, own in sums:
        found = own.metrics()
        metrics |= {f"{part.prefix}{name}": found[name] for name in part.metrics or found if name in found}
    rankings: dict[str, list[Ranking]] = {}
    if facts.dataset in RANKED and facts.labelled:
        (target,) = facts.labelled[:1]
        prefix = target_prefix(target, tuple(targets))
        rankings[target] = rank_classes(predictions, facts, target)
        metrics |= {f"{prefix}{name}": value for name, value in ranking_metrics(rankings[target]).items()}
        for part in parts:
            ranked = ranking_metrics(rank_classes(predictions, facts, target, part=part.rows))
            metrics |= {f"{part.prefix}{prefix}{name}": value for name, value in ranked.items()}
    if facts.dataset in BY_VIDEO and facts.labelled:
        metrics |= video_metrics(predictions, facts, facts.labelled[0])
    return Measures(facts=facts, metrics=metrics, confusion=confusion, rankings=rankings)


_SEGMENT_KEY = re.compile(r"(.+)(?:-\d+-\d+){2}-[0-9a-f]{16}")
"""A key made of ``<video>@<seconds>-<seconds>``, both with a decimal point."""
_VIDEO_HITS = (1, 3)


def video_metrics(predictions: Path, facts: PredictionFacts, target: str) -> dict[str, float]:
    """Return what a model of segments knows of whole videos: ``video_map``, ``video_hit1``, ``video_hit3``.

    A video's probabilities are the mean over its annotated segments, its labels those of all of them; a hit is any of
    them among the likeliest. Empty where the keys do not say which video a segment is of. Source: ActivityNet's own
    evaluation of untrimmed classification; there a model has to find the segments too.
    """
    size = len(facts.targets[target])
    sums: dict[str, NDArray[np.float64]] = {}
    truth: dict[str, NDArray[np.bool_]] = {}
    counts: Counter[str] = Counter()
    for rows in read_rows(predictions, facts, targets=(target,)):
        for key, label, probabilities in zip(rows.keys, rows.labels[target], rows.probabilities[target], strict=True):
            named = _SEGMENT_KEY.fullmatch(key)
            if named is None:
                return {}
            if label >= 0:
                video = named[1]
                sums[video] = sums.get(video, 0) + probabilities.astype(np.float64)
                truth.setdefault(video, np.zeros(size, np.bool_))[label] = True
                counts[video] += 1
    if not sums:
        return {}
    scores = np.stack([total / counts[video] for video, total in sums.items()])
    labels = np.stack(list(truth.values()))
    precisions = [interpolated_precision(scores[:, one], labels[:, one]) for one in range(size)]
    found = {"video_map": mean_over_classes(np.array(precisions))}
    likeliest = np.argsort(-scores, axis=1, kind="stable")
    for most in _VIDEO_HITS:
        hits = np.take_along_axis(labels, likeliest[:, :most], axis=1).any(axis=1)
        found[f"video_hit{most}"] = float(hits.mean())
    return found


def _measure_several(predictions: Path, facts: PredictionFacts) -> Measures:
    """Measure samples of several labels: how they are ranked, and whether the likeliest class is one of theirs."""
    (target,) = facts.labelled
    sums = MetricSums({target: len(facts.targets[target])})
    for rows in read_rows(predictions, facts):
        sums.add(rows.probabilities, rows.labels[target], labelling="several")
    rankings = rank_classes(predictions, facts, target)
    metrics = sums.metrics() | ranking_metrics(rankings)
    return Measures(facts=facts, metrics=metrics, rankings={target: rankings})


def rank_classes(
    predictions: Path,
    facts: PredictionFacts,
    target: str,
    *,
    part: Part | None = None,
    most_bytes: int = _RANKED_BYTES,
) -> list[Ranking]:
    """Return how each class of a target ranks the samples that have a label of it; `part`: those rows alone.

    The file is read once for as many classes as `most_bytes` hold the scores of.
    """
    num_classes = len(facts.targets[target])
    block = max(1, most_bytes // max(1, facts.num_samples * 4))
    rankings: list[Ranking] = []
    for first in range(0, num_classes, block):
        scores, truth = _columns(predictions, facts, target, classes=slice(first, first + block), part=part)
        for column in range(scores.shape[1]):
            positives = truth[:, column] > 0 if facts.several else truth == first + column
            rankings.append(class_ranking(scores[:, column], positives))
    return rankings


def _columns(
    predictions: Path, facts: PredictionFacts, target: str, *, classes: slice, part: Part | None
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    scores, truth = [], []
    for rows in read_rows(predictions, facts, targets=(target,)):
        labels = rows.labels[target]
        known = np.ones(len(labels), np.bool_) if facts.several else labels >= 0
        mask = known if part is None else known & part(rows, facts)
        scores.append(rows.probabilities[target][mask][:, classes])
        truth.append((labels[:, classes] if facts.several else labels)[mask])
    return np.concatenate(scores), np.concatenate(truth)


def class_rows(measures: Measures, target: str) -> Iterator[ClassRow]:
    """Yield what is known of each class of a target."""
    names = measures.facts.targets[target]
    matrix = measures.confusion.get(target)
    rankings = measures.rankings.get(target) or [Ranking(math.nan, math.nan)] * len(names)
    for index, name in enumerate(names):
        own = np.zeros(len(names), np.int64) if matrix is None else matrix[index].copy()
        answered = 0 if matrix is None else int(matrix[:, index].sum())
        right, count = int(own[index]), int(own.sum())
        own[index] = 0
        yield ClassRow(
            name=name,
            num_samples=count,
            top1=right / count if count else math.nan,
            precision=right / answered if answered else math.nan,
            average_precision=rankings[index].average_precision,
            area=rankings[index].area,
            confused_with=names[int(own.argmax())] if own.any() else "",
        )


def write_tables(measures: Measures, predictions: Path) -> list[Path]:
    """Write the table by class and the picture of the confusion of each target beside a predictions file."""
    written = []
    for target, matrix in measures.confusion.items():
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("class", "samples", "top1", "precision", "average_precision", "area", "confused_with"))
        for row in class_rows(measures, target):
            name, num_samples, *numbers, confused_with = row
            shown = ["" if math.isnan(number) else f"{number:.6g}" for number in numbers]
            writer.writerow((name, num_samples, *shown, confused_with))
        table = predictions.with_suffix(f".classes.{target}.csv")
        write_bytes(table, encoded(text.getvalue()))
        picture = predictions.with_suffix(f".confusion.{target}.png")
        write_bytes(picture, confusion_picture(matrix, measures.facts.targets[target]))
        written += [table, picture]
    return written


_PICTURE_SIDE = 900
_MOST_NAMED = 60
_NAME_CHARACTERS = 28
_MARGIN = 12
_INK, _PAPER = (32, 33, 36), (255, 255, 255)


def confusion_picture(matrix: NDArray[np.int64], names: Sequence[str]) -> bytes:
    """Return a PNG of the shares of each true class (row) that were answered as each class (column).

    White: none; dark blue: all; grey rows have no samples. Up to 60 classes are named.
    """
    counts = matrix.sum(axis=1, keepdims=True)
    shares = np.divide(matrix, counts, out=np.zeros(matrix.shape), where=counts > 0)
    depth = np.sqrt(shares)[..., None]  # so that a few per cent are seen
    pixels = (255 - depth * (255 - np.array([8, 48, 107]))).astype(np.uint8)
    pixels[counts[:, 0] == 0] = 236
    cell = max(2, _PICTURE_SIDE // max(1, len(names)))
    image = Image.fromarray(np.repeat(np.repeat(pixels, cell, axis=0), cell, axis=1))
    font = ImageFont.load_default(size=float(min(15, max(9, cell - 2))))
    labels = [name if len(name) <= _NAME_CHARACTERS else f"{name[: _NAME_CHARACTERS - 1]}…" for name in names]
    named = len(names) <= _MOST_NAMED
    left = _MARGIN + (round(max(font.getlength(name) for name in labels)) + 8 if named else 24)
    top = left if named else 40
    page = Image.new("RGB", (left + image.width + _MARGIN, top + image.height + 40), _PAPER)
    page.paste(image, (left, top))
    draw = ImageDraw.Draw(page)
    draw.rectangle((left - 1, top - 1, left + image.width, top + image.height), outline=_INK)
    if named:
        for index, name in enumerate(labels):
            middle = top + index * cell + cell / 2
            draw.text((left - 6, middle), name, fill=_INK, font=font, anchor="rm")
        columns = Image.new("RGB", (top - 6, image.width), _PAPER)
        turned = ImageDraw.Draw(columns)
        for index, name in enumerate(labels):
            turned.text((0, index * cell + cell / 2), name, fill=_INK, font=font, anchor="lm")
        page.paste(columns.rotate(90, expand=True), (left, 0))
    caption = ImageFont.load_default(size=14.0)
    draw.text((left, top + image.height + 10), "row: true class, column: answer", fill=_INK, font=caption)
    sink = io.BytesIO()
    page.save(sink, "PNG")
    return sink.getvalue()
