"""``something_something_v2``: the owners' JSON lists and test answers, and the CAST release's lists.

A class is a template without its square brackets: ``Spinning [something] that quickly stops spinning``.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Required, TypedDict

from sharding.datasets.label_spaces import class_index, class_name, published_classes
from sharding.datasets.media_tree import Annotation, located
from sharding.datasets.request import DatasetRequest, needed_annotations
from sharding.datasets.table import CellError, Problems, first_line, read_document, read_pairs
from sharding.format.shard_set import LabelSpace
from sharding.source import SourceList


class _Entry(TypedDict, total=False):
    id: Required[str]
    template: str


def read(request: DatasetRequest, dataset: str) -> SourceList:
    """Read ``train.json``, ``validation.json``, ``test.json`` (without labels), ``test-answers.csv``, or a list.

    Its lines are ``<id>.mp4 <class number>``.
    """
    what = "the owners' train.json, validation.json or test-answers.csv"
    annotations = needed_annotations(request, dataset, what=what)
    classes = published_classes(dataset)
    problems = Problems(annotations, advice="is this the owners' file? fetch it again")
    first = first_line(annotations).lstrip()
    if first.startswith(("[", "{")):
        found = _entries(annotations, request, class_name(classes), problems)
    else:
        separator = ";" if ";" in first else None
        rows = read_pairs(annotations, columns=("id", "label"), problems=problems, separator=separator)
        parse = class_name(classes) if separator else class_index(len(classes))
        found = []
        for row in rows:
            name, label = row.read("id", _video_id), row.read("label", parse)
            if name is not None and label is not None:
                found.append(Annotation(sample_id=name, labels=(label,), where=row.where, clips=(name,)))
    problems.refuse_any()
    return located(
        found,
        request,
        dataset=dataset,
        spaces=[LabelSpace(name="label", classes=classes)],
        what="the folder with <id>.webm or <id>.mp4",
        suffix=".webm",
    )


def _entries(path: Path, request: DatasetRequest, named: Callable[[str], int], problems: Problems) -> list[Annotation]:
    entries = read_document(path, list[_Entry])
    is_labelled = any("template" in entry for entry in entries) or not entries
    if not is_labelled:
        request.require_labels(f"{path}: expected entries with a template")
    found = []
    for number, entry in enumerate(entries, start=1):
        where, template = f"{path}: entry {number}", entry.get("template", "")
        try:
            name = _video_id(entry["id"])
            labels = (named(template.translate({ord("["): None, ord("]"): None})),) if is_labelled else ()
        except CellError as error:
            shown = entry["id"] if error.kind == "not an id" else template
            problems.add(error.kind, f"{where} (id {entry['id']!r}): expected {error.expected}, found {shown!r}")
        else:
            found.append(Annotation(sample_id=name, labels=labels, where=where, clips=(name,)))
    return found


def _video_id(text: str) -> str:
    name = text.removesuffix(".mp4").removesuffix(".webm")
    if not (name.isascii() and name.isdigit()):
        raise CellError("not an id", "a video's number")
    return name
