"""``csv`` and ``list``: anybody's own list of files with labels.

``csv``: columns ``path,label[,start,end]``, ``path,verb,noun[,start,end]`` or ``path,labels[,start,end]`` (several per
row, as ``a|b`` or as a list), labels as names or numbers, in CSV, Parquet (``.parquet``) or JSON Lines (``.jsonl``); a
test split may be without labels. A column ``audio`` names a file of its own for the sound. ``list``: lines ``path
label`` without a header, as many projects write them; the last field is the label, paths may hold spaces.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ca2st.errors import UserInputError
from sharding.datasets import table
from sharding.datasets.label_spaces import label_column, read_classes, spelled_alike
from sharding.datasets.request import UNLABELLED_SPLIT, DatasetRequest, MediaRoot, needed_annotations, needed_media
from sharding.format.shard_set import Labelling, LabelSpace
from sharding.source import LOOK_ALIKE, MISSING_MEDIA, NO_LABEL, UNUSED_CLASSES, SourceList, SourceSample

_TARGETS = (("label",), ("verb", "noun"), ("labels",))
"""Columns of labels that a list may have."""
_APART = "\x1f"
"""Stands before each label of a list in Parquet or JSON Lines, when it has become the text of a cell."""
_TIMES = ("start", "end")
_SOUND = "audio"
_MISSING_FILE = "missing file"
_Missing = dict[str, tuple[table.Row, str, str]]
"""Rows without a file by their place, with the column that names it and what was expected."""
_Labels = tuple[Labelling, tuple[LabelSpace, ...], Sequence[tuple[int, ...] | None], tuple[str, ...]]
"""How many labels a row has, their spaces, those of each row (None where one is wrong), and what became one class
though it was written in several ways."""


def read(request: DatasetRequest, dataset: str) -> SourceList:
    """Read every row, checked: paths inside the media folder, times, labels, no sample twice."""
    what = {
        "csv": "a CSV, Parquet or JSON Lines file with the columns path,label[,start,end] or path,labels[,start,end]",
        "list": "a text file with lines `path label`",
    }
    annotations = needed_annotations(request, dataset, what=what[dataset])
    if request.check_media:
        needed_media(request, dataset, what="the folder that the paths of the list start from")
    problems = table.Problems(annotations, advice="correct the file and run again")
    if dataset == "list":
        columns: tuple[str, ...] = ("path", "label")
        rows = table.read_pairs(annotations, columns=("path", "label"), problems=problems)
    else:
        columns, rows = _table(annotations, request.split, problems)
    labelling, spaces, labels, alike = _labels(columns, rows, request, problems)
    roots = _roots(columns, request)
    missing: _Missing = {}
    samples = _samples(rows, labels, roots, missing)
    if not request.max_missing.allows(len(missing), len(rows)):
        for row, column, expected in missing.values():
            row.refuse(column, _MISSING_FILE, expected)
    problems.refuse_any()
    used = {label for sample in samples for label in sample.labels}
    listed = spaces[0].classes if request.classes is not None and labelling != "none" else ()
    notes = {
        UNUSED_CLASSES: tuple(name for label, name in enumerate(listed) if label not in used),
        MISSING_MEDIA: tuple(missing),
        LOOK_ALIKE: alike,
        NO_LABEL: tuple(one.where for one in samples if not one.labels) if labelling == "several" else (),
    }
    return SourceList(
        dataset=dataset,
        split=request.split,
        label_spaces=spaces,
        targets=tuple(space.name for space in spaces),
        samples=samples[: request.limit],
        notes={kind: places for kind, places in notes.items() if places},
        labelling=labelling,
    )


def _roots(columns: Sequence[str], request: DatasetRequest) -> dict[str, MediaRoot]:
    """Return the folders that the paths of a column start from."""
    check, follow_links, sound = request.check_media, request.follow_links, request.audio_root
    roots = {"path": MediaRoot(request.media or Path(), check=check, follow_links=follow_links)}
    if _SOUND not in columns:
        if sound is not None:
            raise UserInputError(
                f"--audio-root: expected a column {_SOUND} in {request.annotations}, found none; leave it out"
            )
    elif sound is None:
        roots[_SOUND] = roots["path"]
    elif check and not sound.is_dir():
        raise UserInputError(f"--audio-root {sound}: expected a folder, found none; check it")
    else:
        roots[_SOUND] = MediaRoot(sound, check=check, follow_links=follow_links, option="--audio-root")
    return roots


def _labels(
    columns: tuple[str, ...], rows: Sequence[table.Row], request: DatasetRequest, problems: table.Problems
) -> _Labels:
    if (targets := _targets(columns)) is None:
        spaces = () if request.classes is None else (LabelSpace(name="label", classes=read_classes(request.classes)),)
        return "none", spaces, [()] * len(rows), ()
    if targets == ("labels",):
        return _several_labels(columns.index("labels"), rows, request, problems)
    if len(targets) > 1 and request.classes is not None:
        raise UserInputError(f"--classes: expected one column of labels, found {' and '.join(targets)}; leave it out")
    found = {name: label_column(rows, name, request.classes) for name in targets}
    return (
        "one",
        tuple(LabelSpace(name=name, classes=classes) for name, (classes, _) in found.items()),
        [_known(labels) for labels in zip(*(labels for _, labels in found.values()), strict=True)],
        sum((spelled_alike(rows, name, labels) for name, (_, labels) in found.items()), ()),
    )


def _several_labels(at: int, rows: Sequence[table.Row], request: DatasetRequest, problems: table.Problems) -> _Labels:
    """Return the labels of column number `at`, ``labels``; each of them is read as a cell of its own."""
    cells: list[table.Row] = []
    counts = []
    for row in rows:
        cell = row["labels"]
        if cell.startswith(_APART):
            parts = cell.split(_APART)[1:]
        else:
            parts = [part.strip() for part in cell.split(request.label_separator or "|")] if cell else []
        counts.append(len(parts))
        cells += [replace(row, cells=(*row.cells[:at], part, *row.cells[at + 1 :])) for part in parts]
    if not cells:
        problems.add(
            "empty label", f"{request.annotations}: labels: expected at least one label, found none in any row"
        )
    names, found = label_column(cells, "labels", request.classes)
    labels = iter(found)
    of_row = [_known(tuple(next(labels) for _ in range(count))) for count in counts]
    for row, own in zip(rows, of_row, strict=True):
        if own is not None and len(set(own)) < len(own):
            twice = ", ".join(sorted({names[label] for label in own if own.count(label) > 1}))
            row.problems.add("label twice", f"{row.place('labels')}: expected each label once, found {twice!r} again")
    space = LabelSpace(name="label", classes=names)
    in_order = [own if own is None else tuple(sorted(own)) for own in of_row]
    return "several", (space,), in_order, spelled_alike(cells, "labels", found)


def _known(labels: tuple[int | None, ...]) -> tuple[int, ...] | None:
    known = tuple(label for label in labels if label is not None)
    return known if len(known) == len(labels) else None


def _targets(columns: Sequence[str]) -> tuple[str, ...] | None:
    """Return the columns of labels that a table has, or begins to have; None: not one of them."""
    return next((names for names in _TARGETS if set(names) & set(columns)), None)


def _table(path: Path, split: str, problems: table.Problems) -> tuple[tuple[str, ...], tuple[table.Row, ...]]:
    if path.suffix.lower() in (".parquet", ".jsonl", ".ndjson"):
        records = table.read_records(path)
        columns = tuple(dict.fromkeys(name for _, record in records for name in record))
        found = (_row(path, number, record, columns, problems) for number, record in records)
        rows = tuple(row for row in found if row is not None)
    else:
        optional = (*sum(_TARGETS, ()), *_TIMES, _SOUND)
        columns, rows = table.read_table(path, required=("path",), optional=optional, problems=problems)
    targets = _targets(columns) or (() if split == UNLABELLED_SPLIT else _TARGETS[0])
    table.check_columns(f"{path}:1:1", columns, required=("path", *targets), optional=(*_TIMES, _SOUND))
    return columns, rows


def _row(
    path: Path, number: int, record: dict[str, Any], columns: tuple[str, ...], problems: table.Problems
) -> table.Row | None:
    """Return a record of texts and numbers as a row of cells."""
    cells = []
    for name in columns:
        value = record.get(name)
        if name == "labels" and isinstance(value, list) and all(map(_is_label, value)):
            cells.append("".join(f"{_APART}{str(one).strip()}" for one in value))
        elif isinstance(value, (bool, list, dict, bytes)):
            problems.add("not a cell", f"{path}:{number}: {name}: expected a text or a number, found {value!r:.80}")
            return None
        else:
            cells.append("" if value is None else str(value).strip())
    return table.Row(path=path, line=number, text="", columns=columns, cells=tuple(cells), problems=problems)


def _is_label(value: object) -> bool:
    return (isinstance(value, str) and _APART not in value) or (isinstance(value, int) and not isinstance(value, bool))


def _samples(
    rows: Sequence[table.Row],
    labels: Sequence[tuple[int, ...] | None],
    roots: dict[str, MediaRoot],
    missing: _Missing,
) -> list[SourceSample]:
    """Return the samples; rows without a file go to `missing`."""
    first_rows: dict[str, table.Row] = {}
    samples = []
    for row, of_row in zip(rows, labels, strict=True):
        paths = {
            name: _resolved(row, name, root, missing) for name, root in roots.items() if name == "path" or row.get(name)
        }
        path = paths["path"]
        if path is None or None in paths.values():
            continue
        segment = _segment(row)
        if segment is None:
            continue
        start, end = segment
        name = roots["path"].name_of(path)
        sample_id = name if start is None else f"{name}@{start!r}-{end!r}"
        first = first_rows.setdefault(sample_id, row)
        if first is not row:
            row.problems.add(
                "sample twice", f"{row.place('path')}: {sample_id!r} was listed before, at {first.place('path')}"
            )
        elif of_row is not None:
            samples.append(
                SourceSample(
                    sample_id=sample_id,
                    path=path,
                    start_seconds=start,
                    end_seconds=end,
                    labels=of_row,
                    where=row.where,
                    sound_path=paths.get(_SOUND),
                )
            )
    return samples


def _resolved(row: table.Row, column: str, root: MediaRoot, missing: _Missing) -> Path | None:
    """Return the file that a cell names; None where it is missing, which is counted, or cannot be meant: a problem."""
    try:
        return root.resolve(row[column])
    except table.CellError as error:
        if error.kind == _MISSING_FILE:
            missing.setdefault(row.where, (row, column, error.expected))
        else:
            row.refuse(column, error.kind, error.expected)
        return None


def _segment(row: table.Row) -> tuple[float | None, float | None] | None:
    """Return the times of a row: (None, None) for the whole file, None when they are wrong."""
    given = [column for column in _TIMES if row.get(column)]
    if not given:
        return None, None
    if len(given) == 1:
        other = "end" if given == ["start"] else "start"
        row.problems.add(
            "half a segment", f"{row.place(given[0])}: expected start and end, or neither, found no {other}"
        )
        return None
    return row.read_segment("start", "end", table.seconds_or_clock_time)
