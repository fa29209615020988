"""``vgg_sound``: the owners' ``vggsound.csv``, ``train.csv`` and ``test.csv``, and lists that number the classes.

10 s clips of YouTube videos, named by id and start: ``<id>_000030.mp4``, also ``<id>_30.mp4`` and
``<id>_30000_40000.mp4`` (milliseconds).
"""

import csv
from collections.abc import Callable

from sharding.datasets.label_spaces import class_index, class_name, published_classes
from sharding.datasets.media_tree import Annotation, located
from sharding.datasets.request import DatasetRequest, needed_annotations
from sharding.datasets.table import Problems, Row, first_line, matching, read_rows, whole_seconds
from sharding.errors import AnnotationError
from sharding.format.shard_set import LabelSpace
from sharding.source import OTHER_CLASS, SourceList

_NOT_COUNTED = "extending ladders"
"""A 310th label of ``vggsound.csv``, which no list of a split and no class list of the owners has."""
_SPLITS = {"validation": "test"}
_WITH_NUMBERS = ("name", "label", "number")
_FORMS = {2: ("name", "label"), 3: _WITH_NUMBERS, 4: ("id", "start", "label", "split")}
"""Columns by their number: a split's list, one that numbers the classes beside their names, the whole list."""
_clip = matching(
    r"(?P<id>[A-Za-z0-9_-]{11})_(?P<start>\d{1,6})(\.\w{2,5})?",
    "not a clip",
    "a YouTube id with its start, as -5wLopwbGX0_000417.mp4",
)
_id = matching(r"[A-Za-z0-9_-]{11}", "not an id", "a YouTube id of 11 letters, digits, _ and -")
_CLIP_SECONDS = 10


def read(request: DatasetRequest, dataset: str) -> SourceList:
    """Read one split; ``validation`` of the whole list is the owners' test split, on which papers report."""
    annotations = needed_annotations(request, dataset, what="the owners' vggsound.csv, train.csv or test.csv")
    classes = published_classes(dataset)
    problems = Problems(annotations, advice="is this the owners' file? fetch it again")
    line = first_line(annotations)
    first = next(csv.reader([line])) if len(line) <= csv.field_size_limit() else [line]
    columns = _FORMS.get(len(first), _FORMS[2])
    rows = read_rows(annotations, columns=columns, problems=problems)
    if len(first) == len(_WITH_NUMBERS) and not first[-1].strip().isdigit():
        rows = rows[1:]  # a header
    if "split" in columns:
        wanted = _SPLITS.get(request.split, request.split)
        if not (rows := tuple(row for row in rows if row["split"] == wanted)):
            raise AnnotationError(f"{annotations}: expected rows of {wanted} for --split {request.split}, found none")
    aside = [row.where for row in rows if row["label"] == _NOT_COUNTED]
    named, numbered = class_name(classes), class_index(len(classes))
    counted = (row for row in rows if row["label"] != _NOT_COUNTED)
    found = [one for row in counted if (one := _annotation(row, named, numbered))]
    problems.refuse_any()
    return located(
        found,
        request,
        dataset=dataset,
        spaces=[LabelSpace(name="label", classes=classes)],
        what="the folder with <id>_000030.mp4, flat, by split or by class",
        notes={OTHER_CLASS: aside},
    )


def _annotation(row: Row, named: Callable[[str], int], numbered: Callable[[str], int]) -> Annotation | None:
    label = row.read("label", named)
    if row.get("number"):
        number = row.read("number", numbered)
        if number != label and None not in (number, label):
            row.refuse("number", "name and number differ", f"{label}, the index of {row['label']!r}")
    if "name" in row.columns:
        clip = row.read("name", _clip)
        video_id, start = (clip["id"], int(clip["start"])) if clip else ("", None)
    else:
        found_id, start = row.read("id", _id), row.read("start", whole_seconds)
        video_id = found_id[0] if found_id else ""
    if label is None or not video_id or start is None:
        return None
    milliseconds = f"{video_id}_{1000 * start}_{1000 * (start + _CLIP_SECONDS)}"
    name = f"{video_id}_{start:06d}"
    return Annotation(
        sample_id=name,
        labels=(label,),
        where=row.where,
        clips=(name, f"{video_id}_{start}", milliseconds, f"{name}_{start + _CLIP_SECONDS:06d}"),
        folder=row["label"],
    )
