"""``csv`` and ``list``: anybody's own list of files with labels.

``csv``: columns ``path,label[,start,end]`` or ``path,verb,noun[,start,end]``, labels as names or numbers, in CSV,
Parquet (``.parquet``) or JSON Lines (``.jsonl``). ``list``: lines ``path label`` without a header, as many projects
write them; the last field is the label, paths may hold spaces.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from ca2st.checked_json import DocumentError, parse_json
from ca2st.errors import UserInputError
from sharding.datasets.label_spaces import label_column, spelled_alike
from sharding.datasets.request import DatasetRequest, MediaRoot, needed_annotations, needed_media, refuse_unused
from sharding.datasets.table import (
    CellError,
    Problems,
    Row,
    Table,
    check_columns,
    numbered_lines,
    read_cell,
    read_pairs,
    read_segment,
    read_table,
    seconds_or_clock_time,
)
from sharding.errors import AnnotationError
from sharding.format.index import read_parquet
from sharding.format.shard_set import LabelSpace
from sharding.source import LOOK_ALIKE, MISSING_MEDIA, UNUSED_CLASSES, SourceList, SourceSample

_Segment = tuple[float | None, float | None]
_TARGETS = (("label",), ("verb", "noun"))
"""Columns of labels that a list may have."""
_TIMES = ("start", "end")
_MISSING_FILE = "missing file"


def read(request: DatasetRequest) -> SourceList:
    """Read every row, checked: paths inside the media folder, times, labels, no sample twice.

    Raises:
        UserInputError: an option this dataset does not use, a missing one, or more files missing than allowed.
        AnnotationError: a wrong file or rows; every wrong row is counted.
    """
    what = "a CSV, Parquet or JSON Lines file with the columns path,label[,start,end]"
    return _read(request, "csv", what=what)


def read_list(request: DatasetRequest) -> SourceList:
    """Read lines ``path label``; raises as `read`."""
    return _read(request, "list", what="a text file with lines `path label`")


def _read(request: DatasetRequest, dataset: str, *, what: str) -> SourceList:
    refuse_unused(request, dataset, "task")
    annotations = needed_annotations(request, dataset, what=what)
    if request.check_media:
        needed_media(request, dataset, what="the folder that the paths of the list start from")
    problems = Problems(annotations, advice="correct the file and run again")
    table = _table(annotations, dataset, problems)
    targets = next((names for names in _TARGETS if set(names) <= set(table.columns)), _TARGETS[0])
    if len(targets) > 1 and request.classes is not None:
        raise UserInputError(f"--classes: expected one column of labels, found {' and '.join(targets)}; leave it out")
    columns = [label_column(table.rows, name, request.classes, problems=problems) for name in targets]
    root = MediaRoot(request.media or Path(), check=request.check_media, follow_links=request.follow_links)
    missing: dict[str, Row] = {}
    labels = list(zip(*(labels for _, labels in columns), strict=True))
    samples = _samples(table, labels, root, problems=problems, missing=missing)
    _count_missing(missing, request, root, problems, total=len(table.rows))
    problems.refuse_any()
    spaces = tuple(LabelSpace(name=name, classes=names) for name, (names, _) in zip(targets, columns, strict=True))
    unused = _unused(spaces[0].classes, samples) if request.classes else ()
    alike = [spelled_alike(table.rows, name, found) for name, (_, found) in zip(targets, columns, strict=True)]
    notes = {UNUSED_CLASSES: unused, MISSING_MEDIA: tuple(missing), LOOK_ALIKE: sum(alike, ())}
    return SourceList(
        dataset=dataset,
        split=request.split,
        label_spaces=spaces,
        targets=targets,
        samples=tuple(request.first(samples)),
        notes={kind: places for kind, places in notes.items() if places},
    )


def _table(path: Path, dataset: str, problems: Problems) -> Table:
    if dataset == "list":
        return read_pairs(path, columns=("path", "label"), problems=problems)
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        try:
            rows: list[dict[str, Any]] = read_parquet(path).to_pylist()
        except (OSError, ValueError, pa.ArrowException) as error:
            raise AnnotationError(f"{path}: expected a Parquet file, found something else ({error})") from error
        numbered = list(enumerate(rows, start=1))
    elif suffix in (".jsonl", ".ndjson"):
        try:
            numbered = [
                (number, parse_json(line, dict[str, Any], where=f"{path}:{number}"))
                for number, line in numbered_lines(path)
            ]
        except DocumentError as error:
            raise AnnotationError(f"{error}; expected one row per line (JSON Lines)") from error
    else:
        optional = ("label", "verb", "noun", *_TIMES)
        table = read_table(path, required=("path",), optional=optional, others=False, problems=problems)
        _check(path, table.columns)
        return table
    columns = tuple(dict.fromkeys(name for _, row in numbered for name in row))
    _check(path, columns)
    rows_of_text = (_row(path, number, row, columns, problems) for number, row in numbered)
    return Table(path=path, columns=columns, rows=tuple(row for row in rows_of_text if row is not None))


def _check(path: Path, columns: tuple[str, ...]) -> None:
    targets = _TARGETS[1] if "label" not in columns and {"verb", "noun"} & set(columns) else _TARGETS[0]
    check_columns(f"{path}:1:1", columns, required=("path", *targets), optional=_TIMES)


def _row(path: Path, number: int, row: dict[str, Any], columns: tuple[str, ...], problems: Problems) -> Row | None:
    """A row of texts and numbers as a row of cells."""
    cells = []
    for name in columns:
        value = row.get(name)
        if isinstance(value, (bool, list, dict, bytes)):
            problems.add("not a cell", f"{path}:{number}: {name}: expected a text or a number, found {value!r:.80}")
            return None
        cells.append("" if value is None else str(value).strip())
    return Row(path=path, line=number, text="", columns=columns, cells=tuple(cells))


def _unused(classes: tuple[str, ...], samples: Sequence[SourceSample]) -> tuple[str, ...]:
    used = {sample.labels[0] for sample in samples}
    return tuple(name for label, name in enumerate(classes) if label not in used)


def _samples(
    table: Table,
    labels: Sequence[tuple[int | None, ...]],
    root: MediaRoot,
    *,
    problems: Problems,
    missing: dict[str, Row],
) -> list[SourceSample]:
    """The samples; rows whose file is not there go to `missing`, by what they name."""
    first_rows: dict[str, Row] = {}
    samples = []
    for row, of_row in zip(table.rows, labels, strict=True):
        try:
            path = root.resolve(row["path"])
        except CellError as error:
            if error.kind == _MISSING_FILE:
                missing[row.where] = row
            else:
                problems.add(error.kind, f"{row.place('path')}: expected {error.expected}, found {row['path']!r}")
            continue
        segment = _segment(row, problems)
        if segment is None:
            continue
        sample_id = _sample_id(root.name_of(path), segment)
        first = first_rows.setdefault(sample_id, row)
        known = tuple(label for label in of_row if label is not None)
        if first is not row:
            problems.add(
                "sample twice", f"{row.place('path')}: {sample_id!r} was listed before, at {first.place('path')}"
            )
        elif len(known) == len(of_row):
            samples.append(
                SourceSample(
                    sample_id=sample_id,
                    path=path,
                    start_seconds=segment[0],
                    end_seconds=segment[1],
                    labels=known,
                    where=row.where,
                )
            )
    return samples


def _count_missing(
    missing: dict[str, Row], request: DatasetRequest, root: MediaRoot, problems: Problems, *, total: int
) -> None:
    """Within ``--max-missing`` the rows are left out; otherwise each is a problem with its place."""
    if not request.max_missing.allows(len(missing), total):
        for row in missing.values():
            read_cell(row, "path", root.resolve, problems)


def _sample_id(name: str, segment: _Segment) -> str:
    return name if segment[0] is None else f"{name}@{segment[0]!r}-{segment[1]!r}"


def _segment(row: Row, problems: Problems) -> _Segment | None:
    """The times of a row: (None, None) for the whole file, None when they are wrong."""
    given = [column for column in _TIMES if row.get(column)]
    if not given:
        return None, None
    if len(given) == 1:
        other = "end" if given == ["start"] else "start"
        problems.add("half a segment", f"{row.place(given[0])}: expected start and end, or neither, found no {other}")
        return None
    return read_segment(row, "start", "end", seconds_or_clock_time, problems=problems)
