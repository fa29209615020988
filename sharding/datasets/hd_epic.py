"""``hd_epic``: HD-EPIC's narrations as a test of EPIC-KITCHENS-100's verbs and nouns.

The owners publish a pickled DataFrame; JSON Lines, Parquet and CSV exports of it are read too. A narration counts if
its first main action is a verb and a noun that EPIC-KITCHENS-100 has. Where the owners' erratum
(``HD_EPIC_Narrations_erratum.csv``) lies beside the file, the narrations that it names are left out.
"""

import ast
import csv
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from reprlib import repr as _shown  # of bounded length: a pickle can nest a value without end
from typing import Any

import pyarrow as pa

from ca2st.checked_json import DocumentError, parse_json
from sharding.datasets.epic import VERB_NOUN
from sharding.datasets.frame_pickle import read_frame
from sharding.datasets.media_tree import Annotation, located
from sharding.datasets.request import DatasetRequest, needed_annotations, refuse_unused
from sharding.datasets.table import Problems, numbered_lines, read_table, read_text
from sharding.errors import AnnotationError
from sharding.format.index import read_parquet
from sharding.source import ERRATUM, NO_LENGTH, OTHER_CLASS, SourceList

_COLUMNS = ("unique_narration_id", "video_id", "start_timestamp", "end_timestamp", "main_action_classes")
_ERRATUM_NAME = "HD_EPIC_Narrations_erratum.csv"
_MOST_SECONDS = 1e6


def read(request: DatasetRequest) -> SourceList:
    """Read the narrations that have a label in EPIC-KITCHENS-100's classes.

    Raises:
        UserInputError: an option this dataset does not use, a missing one, or media as `located` says.
        AnnotationError: a wrong file or rows.
    """
    refuse_unused(request, "hd_epic", "classes", "task")
    annotations = needed_annotations(request, "hd_epic", what="HD_EPIC_Narrations.pkl, or its rows as JSON Lines")
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
        dataset="hd_epic",
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
        problems.add(
            "no id",
            f"{where}: expected texts as unique_narration_id and video_id, found {_shown(name)}, {_shown(video)}",
        )
        return None
    times = [float(one) for one in (start, end) if isinstance(one, (int, float)) and 0 <= one < _MOST_SECONDS]
    if len(times) != 2:
        problems.add(
            "not a time", f"{where}: {name}: expected start and end in seconds, found {_shown(start)} and {_shown(end)}"
        )
        return None
    if not isinstance(actions, (list, tuple)):
        problems.add("not a list", f"{where}: {name}: expected a list of main_action_classes, found {_shown(actions)}")
        return None
    labels = _pair(actions)
    if labels is None or any(not 0 <= at < len(s.classes) for at, s in zip(labels, VERB_NOUN, strict=True)):
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


def _pair(actions: "list[Any] | tuple[Any, ...]") -> tuple[int, int] | None:
    """Verb and noun of the first main action; None where it is no pair of whole numbers."""
    first = actions[0] if actions else None
    if isinstance(first, (list, tuple)) and len(first) == 2 and all(type(part) is int for part in first):
        return first[0], first[1]
    return None


def _rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the rows of a file of any of the forms, with where each stands."""
    suffix = path.suffix.lower()
    if suffix in (".pkl", ".pickle"):
        columns = read_frame(path)
        _require_columns(path, columns)
        return _zipped(path, columns)
    if suffix == ".parquet":
        try:
            table = read_parquet(path)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise AnnotationError(f"{path}: expected a Parquet file, found something else ({error})") from error
        _require_columns(path, table.column_names)
        return _zipped(path, {name: table[name].to_pylist() for name in _COLUMNS})
    return _lines_of_csv(path) if suffix == ".csv" else _lines_of_json(path)


def _zipped(path: Path, columns: Mapping[str, list[Any]]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, values in enumerate(zip(*(columns[name] for name in _COLUMNS), strict=True), start=1):
        yield f"{path}: row {number}", dict(zip(_COLUMNS, values, strict=True))


def _lines_of_json(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in numbered_lines(path):
        try:
            row = parse_json(line, dict[str, Any], where=f"{path}:{number}")
        except DocumentError as error:
            raise AnnotationError(f"{error}; expected one row per line (JSON Lines)") from error
        _require_columns(path, row)
        yield f"{path}:{number}", row


def _lines_of_csv(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield rows of a CSV export, whose lists are written as JSON or as Python writes them."""
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
    _require_columns(path, reader.fieldnames or ())
    for row in reader:
        where = f"{path}:{reader.line_num}"
        try:
            times = {name: float(row[name]) for name in _COLUMNS[2:4]}
            actions = _list(row[_COLUMNS[4]])
        except (TypeError, ValueError, SyntaxError, MemoryError, RecursionError) as error:
            raise AnnotationError(
                f"{where}: expected seconds and a list of pairs, found another form ({error})"
            ) from error
        yield where, {**row, **times, _COLUMNS[4]: actions}


def _list(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return ast.literal_eval(text)


def _require_columns(path: Path, found: Any) -> None:
    if missing := [name for name in _COLUMNS if name not in found]:
        raise AnnotationError(f"{path}: expected the columns {', '.join(_COLUMNS)}, found no {', '.join(missing)}")


def _erratum(path: Path) -> frozenset[str]:
    if not path.is_file():
        return frozenset()
    problems = Problems(path)
    rows = read_table(path, required=("erratum_narration_id",), others=True, problems=problems).rows
    problems.refuse_any()
    return frozenset(row["erratum_narration_id"] for row in rows)
