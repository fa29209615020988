"""The kitchens: ``epic_kitchens_100`` (verb and noun), ``epic_sounds`` and ``hd_epic_sounds``.

Annotated segments of long videos, in the CSV files of their owners; the media are those videos, or clips cut by segment
and named by its id. Frame and sample numbers of the files are never used: they count at rates that the videos do not
have.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from sharding.datasets import table
from sharding.datasets.label_spaces import class_index, class_name, published_classes
from sharding.datasets.media_tree import Annotation, located
from sharding.datasets.request import DatasetRequest, needed_annotations
from sharding.format.shard_set import LabelSpace
from sharding.source import SourceList

_plain_name = table.matching(r"[A-Za-z0-9_-]{1,80}", "not an id", "an id of letters, digits, _ and -")
_TIMES = ("start_timestamp", "stop_timestamp")
_SEGMENT = ("participant_id", "video_id", *_TIMES)
_SAMPLES = ("start_sample", "stop_sample")
_LABELS = re.compile(r"[A-Za-z0-9_-]+,\d+,\d+", re.ASCII)
"""A line of the CAST release: id, verb, noun."""
_MEDIA = "the folder with <video_id>.MP4, <participant_id>/videos/<video_id>.MP4 or clips <id>.mp4"

VERB_NOUN = (
    LabelSpace(name="verb", classes=published_classes("epic_kitchens_100_verbs")),
    LabelSpace(name="noun", classes=published_classes("epic_kitchens_100_nouns")),
)
"""Label spaces of EPIC-KITCHENS-100, which HD-EPIC is tested in."""

_Labels = tuple[int, ...] | None


def read_kitchens(request: DatasetRequest, dataset: str) -> SourceList:
    """Read EPIC-KITCHENS-100: a verb and a noun per segment; also the CAST release's ``id,verb,noun`` of clips."""
    annotations = needed_annotations(request, dataset, what="EPIC_100_train.csv or EPIC_100_validation.csv")
    problems = table.Problems(annotations, advice="is this the owners' file? fetch it again")
    if _LABELS.fullmatch(table.first_line(annotations).strip()):
        rows = table.read_rows(annotations, columns=("narration_id", "verb_class", "noun_class"), problems=problems)
    else:
        rows = _owners(annotations, ("narration_id", *_SEGMENT), ("verb_class", "noun_class"), request, problems)

    def labels(row: table.Row) -> _Labels:
        if "verb_class" not in row.columns:
            return ()
        read = [row.read(f"{space.name}_class", class_index(len(space.classes))) for space in VERB_NOUN]
        return None if None in read else tuple(label for label in read if label is not None)

    found = _annotations(rows, "narration_id", labels, problems)
    return located(found, request, dataset=dataset, spaces=VERB_NOUN, what=_MEDIA, suffix=".MP4")


def read_sounds(request: DatasetRequest, dataset: str) -> SourceList:
    """Read EPIC-SOUNDS or HD-EPIC-SOUNDS: one of 44 classes per segment, whose name and number must agree.

    Rows of HD-EPIC-SOUNDS have no id: their video and samples make one. Two pairs of rows share one; the second has
    ``#2`` behind it.
    """
    if dataset == "epic_sounds":
        what, id_column = "EPIC_Sounds_train.csv or EPIC_Sounds_validation.csv", "annotation_id"
    else:
        what, id_column = "HD_EPIC_Sounds.csv", None
    annotations = needed_annotations(request, dataset, what=what)
    problems = table.Problems(annotations, advice="is this the owners' file? fetch it again")
    identity = _SAMPLES if id_column is None else (id_column,)
    rows = _owners(annotations, (*identity, *_SEGMENT), ("class", "class_id"), request, problems)
    classes = published_classes("epic_sounds")
    numbered, named = class_index(len(classes)), class_name(classes)

    def labels(row: table.Row) -> _Labels:
        if "class_id" not in row.columns:
            return ()
        index, of_name = row.read("class_id", numbered), row.read("class", named)
        if index is not None and of_name is not None and index != of_name:
            row.refuse("class_id", "class and class_id differ", f"{of_name}, the index of {row['class']!r}")
        return None if index is None or index != of_name else (index,)

    found = _annotations(rows, id_column, labels, problems)
    space = LabelSpace(name="label", classes=classes)
    return located(found, request, dataset=dataset, spaces=[space], what=_MEDIA, suffix=".MP4")


def _owners(
    path: Path, segment: Sequence[str], labels: Sequence[str], request: DatasetRequest, problems: table.Problems
) -> tuple[table.Row, ...]:
    """Return the rows of an owners' CSV; a list of test segments has no columns of labels."""
    columns, rows = table.read_table(path, required=segment, problems=problems)
    missing = [name for name in labels if name not in columns]
    if len(missing) == len(labels):
        request.require_labels(f"{path}:1:1: expected the columns {', '.join(labels)}")
    elif missing:
        table.check_columns(f"{path}:1:1", columns, required=labels, optional=None)
    return rows


def _annotations(
    rows: Sequence[table.Row], id_column: str | None, labels: Callable[[table.Row], _Labels], problems: table.Problems
) -> list[Annotation]:
    """Return the segments with their labels; every wrong row is a problem, and so is an id that comes twice."""
    first_rows: dict[str, table.Row] = {}
    found = [_annotation(row, id_column, labels(row), first_rows) for row in rows]
    problems.refuse_any()
    return [one for one in found if one is not None]


def _annotation(
    row: table.Row, id_column: str | None, labels: _Labels, first_rows: dict[str, table.Row]
) -> Annotation | None:
    is_clip = "video_id" not in row.columns
    names = [] if is_clip else [row.read(column, _plain_name) for column in _SEGMENT[:2]]
    times = (None, None) if is_clip else row.read_segment(*_TIMES, table.clock_time)
    if id_column is None:
        names += [row.read(column, _plain_name) for column in _SAMPLES]
        sample_id = "-".join(row[column] for column in ("video_id", *_SAMPLES))
    else:
        names.append(row.read(id_column, _plain_name))
        sample_id = row[id_column]
        if (first := first_rows.setdefault(sample_id, row)) is not row:
            found = f"{sample_id!r} was listed before, at {first.place(id_column)}"
            row.problems.add("sample twice", f"{row.place(id_column)}: expected every id once, found {found}")
    if labels is None or times is None or None in names:
        return None
    return Annotation(
        sample_id=sample_id,
        labels=labels,
        where=row.where,
        videos=() if is_clip else (row["video_id"],),
        clips=(sample_id,),
        start_seconds=times[0],
        end_seconds=times[1],
    )
