"""``hd_epic``: HD-EPIC's narrations as a test of EPIC-KITCHENS-100's verbs and nouns.

The owners publish a pickled DataFrame; JSON Lines, Parquet and CSV exports of it are read too. A narration counts if
its first main action is a verb and a noun that EPIC-KITCHENS-100 has. Where the owners' erratum
(``HD_EPIC_Narrations_erratum.csv``) lies beside the file, the narrations that it names are left out.
"""

import ast
import csv
import io
import json
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from reprlib import repr as _shown  # of bounded length: a pickle can nest a value without end
from typing import Any

from sharding.datasets.epic import VERB_NOUN
from sharding.datasets.frame_pickle import read_frame
from sharding.datasets.media_tree import Annotation, located
from sharding.datasets.request import DatasetRequest, needed_annotations
from sharding.datasets.table import Problems, read_records, read_table, read_text
from sharding.errors import AnnotationError
from sharding.source import ERRATUM, NO_LENGTH, OTHER_CLASS, SourceList

_COLUMNS = ("unique_narration_id", "video_id", "start_timestamp", "end_timestamp", "main_action_classes")
_ERRATUM_NAME = "HD_EPIC_Narrations_erratum.csv"
_MOST_SECONDS = 1e6


def read(request: DatasetRequest, dataset: str) -> SourceList:
    """Read the narrations that have a label in EPIC-KITCHENS-100's classes."""
    annotations = needed_annotations(request, dataset, what="HD_EPIC_Narrations.pkl, or its rows as JSON Lines")
    problems = Problems(annotations, advice="is this the owners' file? fetch it again")
    left_out = _erratum(annotations.parent / _ERRATUM_NAME)
    notes: dict[str, list[str]] = {ERRATUM: [], OTHER_CLASS: [], NO_LENGTH: []}
    found = []
    for where, row in _rows(annotations):
        one = _annotation(row, where, notes, problems)
        if one is not None and one.sample_id in left_out:
            notes[ERRATUM].append(one.sample_id)
        elif one is not None:
            found.append(one)
    problems.refuse_any()
    return located(
        found,
        request,
        dataset=dataset,
        spaces=VERB_NOUN,
        what="the folder with <participant>/<video_id>.mp4",
        notes=notes,
    )


def _annotation(
    row: Mapping[str, Any], where: str, notes: dict[str, list[str]], problems: Problems
) -> Annotation | None:
    """Return the narration, or None with a note or a problem."""
    name, video, start, end, actions = (row.get(column) for column in _COLUMNS)
    if not (isinstance(name, str) and name and isinstance(video, str) and video):
        found = f"{_shown(name)}, {_shown(video)}"
        problems.add("no id", f"{where}: expected texts as unique_narration_id and video_id, found {found}")
        return None
    times = [float(one) for one in (start, end) if isinstance(one, (int, float)) and 0 <= one < _MOST_SECONDS]
    if len(times) != 2:
        found = f"{_shown(start)} and {_shown(end)}"
        problems.add("not a time", f"{where}: {name}: expected start and end in seconds, found {found}")
        return None
    if not isinstance(actions, (list, tuple)):
        problems.add("not a list", f"{where}: {name}: expected a list of main_action_classes, found {_shown(actions)}")
        return None
    labels = _labels(actions)
    if labels is None:
        notes[OTHER_CLASS].append(name)
        return None
    if times[1] <= times[0]:
        notes[NO_LENGTH].append(name)
        return None
    return Annotation(
        sample_id=name,
        labels=labels,
        where=where,
        videos=(video,),
        clips=(name,),
        start_seconds=times[0],
        end_seconds=times[1],
    )


def _labels(actions: Sequence[Any]) -> tuple[int, ...] | None:
    """Return verb and noun of the first main action; None where EPIC-KITCHENS-100 has no such classes."""
    first = actions[0] if actions else None
    if not isinstance(first, (list, tuple)) or len(first) != len(VERB_NOUN):
        return None
    known = (type(at) is int and 0 <= at < len(space.classes) for at, space in zip(first, VERB_NOUN, strict=True))
    return tuple(first) if all(known) else None


def _rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the rows of a file of any of the forms, with where each stands."""
    suffix = path.suffix.lower()
    if suffix == ".csv":
        yield from _lines_of_csv(path)
    elif suffix in (".pkl", ".pickle"):
        columns = read_frame(path)
        _require_columns(path, columns)
        for number, values in enumerate(zip(*(columns[name] for name in _COLUMNS), strict=True), start=1):
            yield f"{path}: row {number}", dict(zip(_COLUMNS, values, strict=True))
    else:
        for number, row in read_records(path, columns=_COLUMNS):
            where = f"{path}: row {number}" if suffix == ".parquet" else f"{path}:{number}"
            _require_columns(where, row)
            yield where, row


def _lines_of_csv(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield rows of a CSV export, whose lists are written as JSON or as Python writes them."""
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
    try:
        _require_columns(path, reader.fieldnames or ())
        rows = [(f"{path}:{reader.line_num}", row) for row in reader]
    except csv.Error as error:
        raise AnnotationError(
            f"{path}:{reader.line_num + 1}: expected a line of CSV, found another ({error})"
        ) from error
    for where, row in rows:
        try:
            times = {name: float(row[name]) for name in _COLUMNS[2:4]}
            try:
                actions = json.loads(row[_COLUMNS[4]])
            except ValueError:
                actions = ast.literal_eval(row[_COLUMNS[4]])
        except (TypeError, ValueError, SyntaxError, MemoryError, RecursionError) as error:
            raise AnnotationError(
                f"{where}: expected seconds and a list of pairs, found another form ({error})"
            ) from error
        yield where, {**row, **times, _COLUMNS[4]: actions}


def _require_columns(where: object, found: Container[str]) -> None:
    if missing := [name for name in _COLUMNS if name not in found]:
        raise AnnotationError(f"{where}: expected the columns {', '.join(_COLUMNS)}, found no {', '.join(missing)}")


def _erratum(path: Path) -> frozenset[str]:
    if not path.is_file():
        return frozenset()
    problems = Problems(path)
    _, rows = read_table(path, required=("erratum_narration_id",), problems=problems)
    problems.refuse_any()
    return frozenset(row["erratum_narration_id"] for row in rows)
