"""``csv`` and ``list``: anybody's own list of files with labels.

``csv``: columns ``path,label[,start,end]``, ``path,verb,noun[,start,end]`` or ``path,labels[,start,end]`` (several a
row, as ``a|b`` or as a list), labels as names or numbers, in CSV, Parquet (``.parquet``) or JSON Lines (``.jsonl``); a
test split may be without labels. A column ``audio`` names a file of its own for the sound. ``list``: lines ``path
label`` without a header, as many projects write them; the last field is the label, paths may hold spaces.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from ca2st.checked_json import DocumentError, parse_json
from ca2st.errors import UserInputError
from sharding.datasets.label_spaces import label_column, read_classes, spelled_alike
from sharding.datasets.request import (
    UNLABELLED_SPLIT,
    DatasetRequest,
    MediaRoot,
    needed_annotations,
    needed_media,
    refuse_unused,
)
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
from sharding.format.shard_set import Labelling, LabelSpace
from sharding.source import LOOK_ALIKE, MISSING_MEDIA, NO_LABEL, UNUSED_CLASSES, SourceList, SourceSample

_Segment = tuple[float | None, float | None]
_TARGETS = (("label",), ("verb", "noun"), ("labels",))
"""Columns of labels that a list may have."""
_APART = "\x1f"
"""Stands before each label of a list in Parquet or JSON Lines, when it has become the text of a cell."""
_TIMES = ("start", "end")
_SOUND = "audio"
_MISSING_FILE = "missing file"


def read(request: DatasetRequest) -> SourceList:
    """Read every row, checked: paths inside the media folder, times, labels, no sample twice.

    Raises:
        UserInputError: an option this dataset does not use, a missing one, or more files missing than allowed.
        AnnotationError: a wrong file or rows; every wrong row is counted.
    """
    what = "a CSV, Parquet or JSON Lines file with the columns path,label[,start,end] or path,labels[,start,end]"
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
    table = _table(annotations, dataset, request.split, problems)
    found = _labels(table, request, problems)
    roots = _roots(request, table)
    missing: dict[str, tuple[Row, str]] = {}
    samples = _samples(table, found.of_row, roots, problems=problems, missing=missing)
    _count_missing(missing, request, roots, problems, total=len(table.rows))
    problems.refuse_any()
    has_list = request.classes is not None and found.labelling != "none"
    notes = {
        UNUSED_CLASSES: _unused(found.spaces[0].classes, samples) if has_list else (),
        MISSING_MEDIA: tuple(missing),
        LOOK_ALIKE: found.alike,
        NO_LABEL: tuple(one.where for one in samples if not one.labels) if found.labelling == "several" else (),
    }
    return SourceList(
        dataset=dataset,
        split=request.split,
        label_spaces=found.spaces,
        targets=tuple(space.name for space in found.spaces),
        samples=tuple(request.first(samples)),
        notes={kind: places for kind, places in notes.items() if places},
        labelling=found.labelling,
    )


def _roots(request: DatasetRequest, table: Table) -> dict[str, MediaRoot]:
    """Return the folders that the paths of a column start from."""
    media = MediaRoot(request.media or Path(), check=request.check_media, follow_links=request.follow_links)
    if _SOUND not in table.columns:
        if request.audio_root is not None:
            raise UserInputError(f"--audio-root: expected a column {_SOUND} in {table.path}, found none; leave it out")
        return {"path": media}
    if request.audio_root is None:
        return {"path": media, _SOUND: media}
    if request.check_media and not request.audio_root.is_dir():
        raise UserInputError(f"--audio-root {request.audio_root}: expected a folder, found none; check it")
    sound = MediaRoot(
        request.audio_root, check=request.check_media, follow_links=request.follow_links, option="--audio-root"
    )
    return {"path": media, _SOUND: sound}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Labels:
    """The labels of a table."""

    labelling: Labelling
    spaces: tuple[LabelSpace, ...]
    of_row: list[tuple[int, ...] | None]
    """None where one is wrong."""
    alike: tuple[str, ...] = ()
    """What became one class though it was written in several ways."""


def _labels(table: Table, request: DatasetRequest, problems: Problems) -> _Labels:
    rows = table.rows
    if (targets := _targets(table.columns)) is None:
        spaces = () if request.classes is None else (LabelSpace(name="label", classes=read_classes(request.classes)),)
        return _Labels(labelling="none", spaces=spaces, of_row=[()] * len(rows))
    if targets == ("labels",):
        return _several_labels(table, request, problems)
    if len(targets) > 1 and request.classes is not None:
        raise UserInputError(f"--classes: expected one column of labels, found {' and '.join(targets)}; leave it out")
    columns = [label_column(rows, name, request.classes, problems=problems) for name in targets]
    alike = [spelled_alike(rows, name, found) for name, (_, found) in zip(targets, columns, strict=True)]
    return _Labels(
        labelling="one",
        spaces=tuple(LabelSpace(name=name, classes=names) for name, (names, _) in zip(targets, columns, strict=True)),
        of_row=[_known(labels) for labels in zip(*(labels for _, labels in columns), strict=True)],
        alike=sum(alike, ()),
    )


def _several_labels(table: Table, request: DatasetRequest, problems: Problems) -> _Labels:
    """Return the labels of the column ``labels``; every one of them is read as a cell of its own."""
    at = table.columns.index("labels")
    cells: list[Row] = []
    counts = []
    for row in table.rows:
        parts = _parts(row["labels"], request.label_separator or "|")
        counts.append(len(parts))
        cells += [replace(row, cells=(*row.cells[:at], part, *row.cells[at + 1 :])) for part in parts]
    if not cells:
        problems.add("empty label", f"{table.path}: labels: expected at least one label, found none in any row")
    names, found = label_column(cells, "labels", request.classes, problems=problems)
    labels = iter(found)
    of_row = [_known(tuple(next(labels) for _ in range(count))) for count in counts]
    for row, own in zip(table.rows, of_row, strict=True):
        if own is not None and len(set(own)) < len(own):
            twice = ", ".join(sorted({names[label] for label in own if own.count(label) > 1}))
            problems.add("label twice", f"{row.place('labels')}: expected each label once, found {twice!r} again")
    return _Labels(
        labelling="several",
        spaces=(LabelSpace(name="label", classes=names),),
        of_row=[own if own is None else tuple(sorted(own)) for own in of_row],
        alike=spelled_alike(cells, "labels", found),
    )


def _parts(cell: str, separator: str) -> list[str]:
    if cell.startswith(_APART):
        return cell.split(_APART)[1:]
    return [part.strip() for part in cell.split(separator)] if cell else []


def _known(labels: tuple[int | None, ...]) -> tuple[int, ...] | None:
    known = tuple(label for label in labels if label is not None)
    return known if len(known) == len(labels) else None


def _targets(columns: Sequence[str]) -> tuple[str, ...] | None:
    """Return the columns of labels that a table has, or begins to have; None: not one of them."""
    return next((names for names in _TARGETS if set(names) & set(columns)), None)


def _table(path: Path, dataset: str, split: str, problems: Problems) -> Table:
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
        optional = (*sum(_TARGETS, ()), *_TIMES, _SOUND)
        table = read_table(path, required=("path",), optional=optional, others=False, problems=problems)
        _check(path, table.columns, split)
        return table
    columns = tuple(dict.fromkeys(name for _, row in numbered for name in row))
    _check(path, columns, split)
    rows_of_text = (_row(path, number, row, columns, problems) for number, row in numbered)
    return Table(path=path, columns=columns, rows=tuple(row for row in rows_of_text if row is not None))


def _check(path: Path, columns: tuple[str, ...], split: str) -> None:
    targets = _targets(columns) or (() if split == UNLABELLED_SPLIT else _TARGETS[0])
    check_columns(f"{path}:1:1", columns, required=("path", *targets), optional=(*_TIMES, _SOUND))


def _row(path: Path, number: int, row: dict[str, Any], columns: tuple[str, ...], problems: Problems) -> Row | None:
    """Return a row of texts and numbers as a row of cells."""
    cells = []
    for name in columns:
        value = row.get(name)
        if name == "labels" and isinstance(value, list) and all(map(_is_label, value)):
            cells.append("".join(f"{_APART}{str(one).strip()}" for one in value))
            continue
        if isinstance(value, (bool, list, dict, bytes)):
            problems.add("not a cell", f"{path}:{number}: {name}: expected a text or a number, found {value!r:.80}")
            return None
        cells.append("" if value is None else str(value).strip())
    return Row(path=path, line=number, text="", columns=columns, cells=tuple(cells))


def _is_label(value: object) -> bool:
    return (isinstance(value, str) and _APART not in value) or (isinstance(value, int) and not isinstance(value, bool))


def _unused(classes: tuple[str, ...], samples: Sequence[SourceSample]) -> tuple[str, ...]:
    used = {label for sample in samples for label in sample.labels}
    return tuple(name for label, name in enumerate(classes) if label not in used)


def _samples(
    table: Table,
    labels: Sequence[tuple[int, ...] | None],
    roots: dict[str, MediaRoot],
    *,
    problems: Problems,
    missing: dict[str, tuple[Row, str]],
) -> list[SourceSample]:
    """Return the samples; rows without their file go to `missing`, by place, with the column that names it."""
    first_rows: dict[str, Row] = {}
    samples = []
    for row, of_row in zip(table.rows, labels, strict=True):
        paths = {name: _resolved(row, name, root, problems, missing) for name, root in roots.items() if row.get(name)}
        if not row["path"]:
            read_cell(row, "path", roots["path"].resolve, problems)
        path = paths.get("path")
        if path is None or None in paths.values():
            continue
        segment = _segment(row, problems)
        if segment is None:
            continue
        sample_id = _sample_id(roots["path"].name_of(path), segment)
        first = first_rows.setdefault(sample_id, row)
        if first is not row:
            problems.add(
                "sample twice", f"{row.place('path')}: {sample_id!r} was listed before, at {first.place('path')}"
            )
        elif of_row is not None:
            samples.append(
                SourceSample(
                    sample_id=sample_id,
                    path=path,
                    start_seconds=segment[0],
                    end_seconds=segment[1],
                    labels=of_row,
                    where=row.where,
                    sound_path=paths.get(_SOUND),
                )
            )
    return samples


def _resolved(
    row: Row, column: str, root: MediaRoot, problems: Problems, missing: dict[str, tuple[Row, str]]
) -> Path | None:
    """Return the file that a cell names; None where it is missing, which is counted, or cannot be meant: a problem."""
    try:
        return root.resolve(row[column])
    except CellError as error:
        if error.kind == _MISSING_FILE:
            missing.setdefault(row.where, (row, column))
        else:
            problems.add(error.kind, f"{row.place(column)}: expected {error.expected}, found {row[column]!r}")
    return None


def _count_missing(
    missing: dict[str, tuple[Row, str]],
    request: DatasetRequest,
    roots: dict[str, MediaRoot],
    problems: Problems,
    *,
    total: int,
) -> None:
    """Within ``--max-missing`` the rows are left out; otherwise each is a problem with its place."""
    if not request.max_missing.allows(len(missing), total):
        for row, column in missing.values():
            read_cell(row, column, roots[column].resolve, problems)


def _sample_id(name: str, segment: _Segment) -> str:
    return name if segment[0] is None else f"{name}@{segment[0]!r}-{segment[1]!r}"


def _segment(row: Row, problems: Problems) -> _Segment | None:
    """Return the times of a row: (None, None) for the whole file, None when they are wrong."""
    given = [column for column in _TIMES if row.get(column)]
    if not given:
        return None, None
    if len(given) == 1:
        other = "end" if given == ["start"] else "start"
        problems.add("half a segment", f"{row.place(given[0])}: expected start and end, or neither, found no {other}")
        return None
    return read_segment(row, "start", "end", seconds_or_clock_time, problems=problems)
