"""``kinetics_400`` and ``kinetics_sound``: the owners' CSV files, the CAST release's and OGM-GE's lists.

Kinetics-400's CSV names a YouTube id, the seconds that were cut from it and a class; its clips are
``<id>_000417_000427.mp4`` or ``<id>.mp4``. KineticsSound is the part of it whose classes can be heard: the 31
of Look, Listen and Learn that Kinetics-400 has, alphabetical, as OGM-GE's lists number them.
"""

from pathlib import Path

from sharding.datasets import table
from sharding.datasets.label_spaces import class_index, class_name, published_classes, read_classes
from sharding.datasets.media_tree import Annotation, located
from sharding.datasets.request import DatasetRequest, needed_annotations
from sharding.errors import AnnotationError
from sharding.format.shard_set import LabelSpace
from sharding.source import SourceList

_COLUMNS = ("youtube_id", "time_start", "time_end", "split")
_SPLITS = {"train": ("train",), "validation": ("val", "validate", "validation"), "test": ("test",)}
"""What the split column holds, by the name of our split."""
_name = table.matching(
    r"(.*/)?(?P<id>[A-Za-z0-9_-]{11})(_(?P<start>\d{1,6})(_(?P<end>\d{1,6}))?)?(\.\w{2,5})?",
    "not a clip",
    "a YouTube id, perhaps with its seconds, as -5wLopwbGX0_000417_000427.mp4",
)
_CLIP_SECONDS = 10


def read(request: DatasetRequest, dataset: str) -> SourceList:
    """Read one split of Kinetics-400 or KineticsSound.

    Kinetics-400: the owners' CSV, or the CAST release's list ``<id>.mp4 <class number>``. KineticsSound:
    Kinetics-400's CSV by class name, or OGM-GE's ``<id>_000058_000068,10,4``; ``--classes`` names other classes than
    the usual 31, for there are papers with 32 and 34.
    """
    is_sound = dataset == "kinetics_sound"
    classes = published_classes(dataset) if request.classes is None else read_classes(request.classes)
    what, advice = "the owners' train.csv or val.csv", "is this the owners' file? fetch it again"
    if is_sound:
        what = "Kinetics-400's CSV file, or my_train.txt or my_test.txt"
        advice += f"; for a list of other than these {len(classes)} classes name them by --classes"
    annotations = needed_annotations(request, dataset, what=what)
    problems = table.Problems(annotations, advice=advice)
    first = table.first_line(annotations)
    if "youtube_id" in first:
        found = _owners(annotations, classes, request, problems, partly=is_sound)
    elif "," in first:
        columns = ("name", "label") if first.count(",") == 1 else ("name", "seconds", "label")
        found = _listed(table.read_rows(annotations, columns=columns, problems=problems), classes)
    else:
        found = _listed(table.read_pairs(annotations, columns=("name", "label"), problems=problems), classes)
    problems.refuse_any()
    return located(
        found,
        request,
        dataset=dataset,
        spaces=[LabelSpace(name="label", classes=classes)],
        what="the folder with <id>_000417_000427.mp4 or <id>.mp4, flat, by split or by class",
    )


def _owners(
    path: Path, classes: tuple[str, ...], request: DatasetRequest, problems: table.Problems, *, partly: bool
) -> list[Annotation]:
    """Return the rows of the split in the owners' CSV; `partly`: those of other classes are no part of the dataset."""
    split = request.split
    columns, all_rows = table.read_table(path, required=_COLUMNS, problems=problems)
    rows = [row for row in all_rows if row["split"] in _SPLITS.get(split, (split,))]
    if not rows:
        held = sorted({row["split"] for row in all_rows})
        raise AnnotationError(f"{path}: expected rows of --split {split}, found those of {', '.join(held)}")
    is_labelled = "label" in columns
    if not is_labelled and partly:
        raise AnnotationError(f"{path}:1:1: expected the column label, whose classes are chosen by, found no labels")
    if not is_labelled:
        request.require_labels(f"{path}:1:1: expected the column label")
    known = set(classes)
    named = class_name(classes)
    found = []
    for row in rows:
        if partly and row["label"] not in known:
            continue
        label = row.read("label", named) if is_labelled else None
        start, end = (row.read(column, table.whole_seconds) for column in ("time_start", "time_end"))
        clip = row.read("youtube_id", _name)
        if (label is not None or not is_labelled) and start is not None and end is not None and clip is not None:
            found.append(_annotation(row, clip["id"], start, end, label, classes))
    return found


def _listed(rows: tuple[table.Row, ...], classes: tuple[str, ...]) -> list[Annotation]:
    """Return rows of a name with its seconds or without, and a class number."""
    indexed = class_index(len(classes))
    found = []
    for row in rows:
        label, clip = row.read("label", indexed), row.read("name", _name)
        if label is not None and clip is not None:
            start = None if clip["start"] is None else int(clip["start"])
            end = int(clip["end"]) if clip["end"] else None if start is None else start + _CLIP_SECONDS
            found.append(_annotation(row, clip["id"], start, end, label, classes))
    return found


def _annotation(
    row: table.Row, video_id: str, start: int | None, end: int | None, label: int | None, classes: tuple[str, ...]
) -> Annotation:
    cut = () if start is None else (f"{video_id}_{start:06d}_{end:06d}", f"{video_id}_{start}")
    return Annotation(
        sample_id=cut[0] if cut else video_id,
        labels=() if label is None else (label,),
        where=row.where,
        clips=(*cut, video_id),
        folder="" if label is None else classes[label],
    )
