"""``something_something_v2``: the owners' JSON lists and test answers, and the CAST release's lists.

A class is a template without its square brackets: ``Spinning [something] that quickly stops spinning``.
"""

from typing import Required, TypedDict

from sharding.datasets.label_spaces import class_index, class_name, published_classes
from sharding.datasets.media_tree import Annotation, located
from sharding.datasets.request import DatasetRequest, needed_annotations, refuse_unused
from sharding.datasets.table import CellError, Problems, first_line, read_cell, read_document, read_pairs
from sharding.format.shard_set import LabelSpace
from sharding.source import SourceList


class _Entry(TypedDict, total=False):
    id: Required[str]
    template: str


def read(request: DatasetRequest) -> SourceList:
    """Read ``train.json``, ``validation.json``, ``test.json`` (without labels) or ``test-answers.csv``, or a list.

    Its lines are ``<id>.mp4 <class number>``.

    Raises:
        UserInputError: an option this dataset does not use, a missing one, or media as `located` says.
        AnnotationError: a wrong file or rows, or a list without labels of another split than ``test``.
    """
    refuse_unused(request, "something_something_v2", "classes", "task")
    what = "the owners' train.json, validation.json or test-answers.csv"
    annotations = needed_annotations(request, "something_something_v2", what=what)
    classes = published_classes("something_something_v2")
    problems = Problems(annotations, advice="is this the owners' file? fetch it again")
    first = first_line(annotations).lstrip()
    if first.startswith(("[", "{")):
        found = _entries(request, classes, problems)
    else:
        separator = ";" if ";" in first else None
        rows = read_pairs(annotations, columns=("id", "label"), problems=problems, separator=separator).rows
        parse = class_name(classes) if separator else class_index(len(classes))
        names = [read_cell(row, "id", _video_id, problems) for row in rows]
        labels = [read_cell(row, "label", parse, problems) for row in rows]
        found = [
            _annotation(name, (label,), row.where)
            for row, name, label in zip(rows, names, labels, strict=True)
            if name is not None and label is not None
        ]
    problems.refuse_any()
    return located(
        found,
        request,
        dataset="something_something_v2",
        spaces=[LabelSpace(name="label", classes=classes)],
        what="the folder with <id>.webm or <id>.mp4",
        suffix=".webm",
    )


def _entries(request: DatasetRequest, classes: tuple[str, ...], problems: Problems) -> list[Annotation]:
    path = needed_annotations(request, "something_something_v2", what="a list")
    entries = read_document(path, list[_Entry])
    is_labelled = any("template" in entry for entry in entries) or not entries
    if not is_labelled:
        request.require_labels(f"{path}: expected entries with a template")
    named = class_name(classes)
    found = []
    for number, entry in enumerate(entries, start=1):
        where = f"{path}: entry {number}"
        try:
            name = _video_id(entry["id"])
            template = entry.get("template", "").translate({ord("["): None, ord("]"): None})
            labels = (named(template),) if is_labelled else ()
        except CellError as error:
            shown = entry.get("template", "")
            problems.add(error.kind, f"{where} (id {entry['id']!r}): expected {error.expected}, found {shown!r}")
        else:
            found.append(_annotation(name, labels, where))
    return found


def _annotation(name: str, labels: tuple[int, ...], where: str) -> Annotation:
    return Annotation(sample_id=name, labels=labels, where=where, clips=(name,))


def _video_id(text: str) -> str:
    name = text.removesuffix(".mp4").removesuffix(".webm")
    if not (name.isascii() and name.isdigit()):
        raise CellError("not an id", "a video's number")
    return name
