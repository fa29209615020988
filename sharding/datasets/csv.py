"""``csv``: anybody's own list, a header ``path,label`` with perhaps ``start,end``, labels as names or numbers."""

from collections.abc import Sequence
from pathlib import Path

from sharding.datasets.label_spaces import label_column
from sharding.datasets.media_root import MediaRoot
from sharding.datasets.request import DatasetRequest, needed_annotations, needed_media, refuse_unused
from sharding.datasets.table import Problems, Row, Table, read_cell, read_segment, read_table, seconds_or_clock_time
from sharding.format.shard_set import LabelSpace
from sharding.source import UNUSED_CLASSES, SourceList, SourceSample

_Segment = tuple[float | None, float | None]


def read(request: DatasetRequest) -> SourceList:
    """Every row, checked: paths inside the media folder, times, labels, no sample twice.

    Raises:
        UserInputError: an option this dataset does not use, or a missing one.
        AnnotationError: a wrong file or rows; every wrong row is counted.
    """
    refuse_unused(request, "csv", "task")
    annotations = needed_annotations(request, "csv", what="a CSV file with the columns path,label[,start,end]")
    if request.check_media:
        needed_media(request, "csv", what="the folder that the paths of the CSV file start from")
    problems = Problems(annotations, advice="correct the file and run again")
    table = read_table(
        annotations, required=("path", "label"), optional=("start", "end"), others=False, problems=problems
    )
    classes, labels = label_column(table.rows, "label", request.classes, problems=problems)
    root = MediaRoot(request.media or Path(), check=request.check_media, follow_links=request.follow_links)
    samples = _samples(table, labels, root, problems=problems)
    problems.refuse_any()
    return SourceList(
        dataset="csv",
        split=request.split,
        label_spaces=(LabelSpace(name="label", classes=classes),),
        targets=("label",),
        samples=tuple(request.first(samples)),
        notes={UNUSED_CLASSES: unused} if request.classes and (unused := _unused(classes, samples)) else {},
    )


def _unused(classes: tuple[str, ...], samples: Sequence[SourceSample]) -> tuple[str, ...]:
    used = {sample.labels[0] for sample in samples}
    return tuple(name for label, name in enumerate(classes) if label not in used)


def _samples(table: Table, labels: Sequence[int | None], root: MediaRoot, *, problems: Problems) -> list[SourceSample]:
    first_rows: dict[str, Row] = {}
    samples = []
    for row, label in zip(table.rows, labels, strict=True):
        path = read_cell(row, "path", root.resolve, problems)
        segment = _segment(row, problems)
        if path is None or segment is None:
            continue
        sample_id = _sample_id(root.name_of(path), segment)
        first = first_rows.setdefault(sample_id, row)
        if first is not row:
            problems.add(
                "sample twice", f"{row.place('path')}: {sample_id!r} was listed before, at {first.place('path')}"
            )
        elif label is not None:
            samples.append(
                SourceSample(
                    sample_id=sample_id,
                    path=path,
                    start_seconds=segment[0],
                    end_seconds=segment[1],
                    labels=(label,),
                    where=row.where,
                )
            )
    return samples


def _sample_id(name: str, segment: _Segment) -> str:
    return name if segment[0] is None else f"{name}@{segment[0]!r}-{segment[1]!r}"


def _segment(row: Row, problems: Problems) -> _Segment | None:
    """The times of a row: (None, None) for the whole file, None when they are wrong."""
    given = [column for column in ("start", "end") if row.get(column)]
    if not given:
        return None, None
    if len(given) == 1:
        other = "end" if given == ["start"] else "start"
        problems.add("half a segment", f"{row.place(given[0])}: expected start and end, or neither, found no {other}")
        return None
    return read_segment(row, "start", "end", seconds_or_clock_time, problems=problems)
