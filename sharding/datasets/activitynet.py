"""``activitynet``: the owners' ``activity_net.v1-3.min.json``, the CUHK re-release, and CSV lists of segments.

One sample per annotated segment of a long video. Segments of no length are left out, as the owners advise, and of
exact repeats one is kept; an end past the video is clipped when the video is read.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypedDict

from sharding.datasets.label_spaces import class_index, class_name, is_whole_number, published_classes, read_classes
from sharding.datasets.media_tree import Annotation, located
from sharding.datasets.request import DatasetRequest, needed_annotations
from sharding.datasets.table import CellError, Problems, first_line, matching, read_document, read_table
from sharding.errors import AnnotationError
from sharding.format.shard_set import LabelSpace
from sharding.source import NO_LENGTH, REPEATED, SourceList

_SUBSETS = {"train": "training", "validation": "validation", "test": "testing"}
_CSV_COLUMNS = ("video_id", "t_start", "t_end", "label")
_seconds = matching(r"\d{1,6}(\.\d{1,20})?", "not a time", "seconds")
_SUBSETS_FILE = "video_info_new.csv"
"""Names the subset of every video of the CUHK form; it lies beside the annotations."""


class _Segment(TypedDict):
    segment: list[float]
    label: str


class _Video(TypedDict, total=False):
    subset: str
    annotations: list[_Segment]


class _Owners(TypedDict):
    database: dict[str, _Video]


_Found = tuple[str, float, float, int, str]
"""Video id, start and end in seconds, label, and where the segment stands."""


def read(request: DatasetRequest, dataset: str) -> SourceList:
    """Read the segments of one split; the testing subset, which has no labels, is refused.

    A list that numbers its classes has an order of its own: ``--classes`` names it.
    """
    annotations = needed_annotations(request, dataset, what="the owners' activity_net.v1-3.min.json")
    classes = published_classes(dataset) if request.classes is None else read_classes(request.classes)
    problems = Problems(annotations, advice="is this the owners' file? fetch it again")
    if first_line(annotations).lstrip().startswith("{"):
        found = list(_of_document(annotations, request.split, class_name(classes), problems))
    else:
        found = list(_of_table(annotations, request, classes, problems))
    problems.refuse_any()
    kept: dict[tuple[str, float, float, int], Annotation] = {}
    notes: dict[str, list[str]] = {NO_LENGTH: [], REPEATED: []}
    for video_id, start, end, label, where in found:
        if end <= start:
            notes[NO_LENGTH].append(where)
        elif (video_id, start, end, label) in kept:
            notes[REPEATED].append(where)
        else:
            kept[video_id, start, end, label] = Annotation(
                sample_id=f"{video_id}@{start!r}-{end!r}",
                labels=(label,),
                where=where,
                videos=(f"v_{video_id}", video_id),
                start_seconds=start,
                end_seconds=end,
            )
    return located(
        kept.values(),
        request,
        dataset=dataset,
        spaces=[LabelSpace(name="label", classes=classes)],
        what="the folder with v_<id>.mp4 or <id>.mp4",
        notes=notes,
    )


def _of_document(path: Path, split: str, parse: Callable[[str], int], problems: Problems) -> Iterator[_Found]:
    if "database" in read_document(path, dict[str, Any]):
        videos = read_document(path, _Owners)["database"]
        subset_of = {name: video.get("subset") for name, video in videos.items()}
    else:
        videos = read_document(path, dict[str, _Video])
        subset_of = dict(_subsets(path.parent / _SUBSETS_FILE))
    wanted = _SUBSETS.get(split, split)
    for name, video in videos.items():
        if subset_of.get(name) != wanted:
            continue
        for number, one in enumerate(video.get("annotations", []), start=1):
            where = f"{path}: {name}, segment {number}"
            if len(one["segment"]) != 2 or not all(0 <= second < 1e6 for second in one["segment"]):
                problems.add("not a time", f"{where}: expected start and end in seconds, found {one['segment']}")
                continue
            try:
                label = parse(one["label"])
            except CellError as error:
                problems.add(error.kind, f"{where}: expected {error.expected}, found {one['label']!r}")
                continue
            start, end = one["segment"]
            yield name.removeprefix("v_"), start, end, label, where


def _subsets(path: Path) -> dict[str, str]:
    if not path.is_file():
        raise AnnotationError(f"{path}: expected the list of the videos' subsets beside the annotations, found nothing")
    problems = Problems(path)
    _, rows = read_table(path, required=("video", "subset"), problems=problems)
    problems.refuse_any()
    return {row["video"]: row["subset"] for row in rows}


def _of_table(path: Path, request: DatasetRequest, classes: tuple[str, ...], problems: Problems) -> Iterator[_Found]:
    _, rows = read_table(path, required=_CSV_COLUMNS, problems=problems)
    numbered = all(is_whole_number(row["label"]) for row in rows)
    if numbered and request.classes is None:
        raise AnnotationError(
            f"{path}: label: expected class names, found numbers, of which there are several orders; "
            "pass --classes with the names in the order of this list"
        )
    parse = class_index(len(classes)) if numbered else class_name(classes)
    for row in rows:
        start, end = (row.read(column, _seconds) for column in ("t_start", "t_end"))
        label = row.read("label", parse)
        if start is not None and end is not None and label is not None:
            yield row["video_id"].removeprefix("v_"), float(start[0]), float(end[0]), label, row.where
