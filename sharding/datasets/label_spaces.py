"""Label spaces: class names, shipped or of the user's own list, and labels in annotations, as names or numbers."""

import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from ca2st.errors import did_you_mean
from sharding.datasets.table import CellError, Problems, Row, read_text, split_lines
from sharding.errors import AnnotationError
from sharding.format.shard_set import written
from sharding.source import INVISIBLE, LOOK_ALIKE, MISSING_LABELS, ONE_CLASS, SEVERAL_LABELS, SourceList

_MAX_HINTS = 20  # the search for a near name takes milliseconds
_FOLDER = Path(__file__).parent / "classes"
_MOST_CHARACTERS = 500
_APART = re.compile(r"[|;]")
_MISSING = re.compile(r"(?i:nan|null|n/a|#n/a|#value!|undefined)|None")
_PERHAPS_APART = re.compile(r"[,/+&]")


def published_classes(name: str) -> tuple[str, ...]:
    """Return the class names of a public dataset in label order."""
    return read_classes(_FOLDER / f"{name}.txt")


def read_classes(path: Path) -> tuple[str, ...]:
    """Return class names from a text file, one per line; line 1 is label 0.

    Raises:
        AnnotationError: unreadable, no names, an empty line between names, or a name twice.
    """
    text = read_text(path, what="a file of class names", option="--classes")
    names = [line.strip() for line in split_lines(text)]
    while names and not names[-1]:
        names.pop()
    if not names:
        raise AnnotationError(f"{path}: expected class names, one per line, found none")
    problems = Problems(path)
    first: dict[str, int] = {}
    for line, name in enumerate(names, start=1):
        if not name:
            problems.add("empty line", f"{path}:{line}:1: expected a class name, found an empty line")
        elif name in first:
            problems.add(
                "class twice", f"{path}:{line}:1: expected every class once, found {name!r} as on line {first[name]}"
            )
        else:
            try:
                check_class_name(name)
            except CellError as error:
                problems.add(error.kind, f"{path}:{line}:1: expected {error.expected}, found {name[:80]!a}")
        first.setdefault(name, line)
    problems.refuse_any()
    return tuple(names)


def check_class_name(name: str) -> None:
    """Refuse what cannot be a line of a class list: it would break terminals, tables and the list itself.

    Raises:
        CellError: control characters, line or paragraph separators, no text, or a text of any length.
    """
    if any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in name):
        raise CellError("unsafe label", "a class name without control or unwritable characters")
    if len(name) > _MOST_CHARACTERS:
        raise CellError("unsafe label", f"a class name of at most {_MOST_CHARACTERS} characters")


def label_notes(classes: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return what a user should know about class names: nothing is merged or split, whatever they look like.

    Noted are names that look alike (Unicode normalisation, case, white space, dashes and invisible characters aside),
    one that seems to be several labels (``a|b``; ``a, b`` where a and b are classes too), what programs write where a
    value is missing (``NaN``), invisible characters, and a class that is alone.
    """
    alike: dict[str, list[str]] = {}
    for name in classes:
        alike.setdefault(_look(name), []).append(name)
    known = frozenset(classes)
    found = {
        LOOK_ALIKE: [" = ".join(map(written, names)) for names in alike.values() if len(names) > 1],
        SEVERAL_LABELS: [written(name) for name in classes if _is_several(name, known)],
        INVISIBLE: [written(name) for name in classes if _visible(name) != name],
        MISSING_LABELS: [written(name) for name in classes if _MISSING.fullmatch(name)],
        ONE_CLASS: [written(name) for name in classes] if len(classes) == 1 else [],
    }
    return {kind: tuple(places) for kind, places in found.items() if places}


def spelled_alike(rows: Sequence[Row], column: str, labels: Sequence[int | None]) -> tuple[str, ...]:
    """Return what became one class though it was written in several ways: the numbers ``01`` and ``1``."""
    texts: dict[int, dict[str, None]] = {}
    for row, label in zip(rows, labels, strict=True):
        if label is not None:
            texts.setdefault(label, {})[row[column]] = None
    return tuple(" = ".join(map(written, several)) for several in texts.values() if len(several) > 1)


def with_label_notes(source: SourceList) -> SourceList:
    """Return the list with the notes about its class names behind its own."""
    notes = dict(source.notes)
    for space in source.label_spaces:
        for kind, places in label_notes(space.classes).items():
            notes[kind] = (*notes.get(kind, ()), *places)
    return replace(source, notes=notes)


def _look(name: str) -> str:
    """Return what is left of a name when one only glances at it."""
    dashes = "".join(" " if unicodedata.category(c) in ("Pd", "Pc") else c for c in unicodedata.normalize("NFKC", name))
    return " ".join(_visible(dashes).casefold().split())


def _visible(name: str) -> str:
    """Without format characters (zero width, direction) and with plain spaces only."""
    kept = (" " if unicodedata.category(c) == "Zs" else c for c in name if unicodedata.category(c) != "Cf")
    return "".join(kept)


def _is_several(name: str, known: frozenset[str]) -> bool:
    parts = [part.strip() for part in _APART.split(name)]
    if len(parts) > 1 and all(parts):
        return True
    if re.fullmatch(r"[\[{(].*[\]})]", name) and "," in name:
        return True
    parts = [part.strip() for part in _PERHAPS_APART.split(name)]
    return len(parts) > 1 and all(part in known for part in parts)


def class_index(num_classes: int) -> Callable[[str], int]:
    """Return a cell parser for a label written as a number."""

    def parse(text: str) -> int:
        expected = f"a class index 0 to {num_classes - 1}"
        if not is_whole_number(text):
            raise CellError("label not a whole number", expected)
        if not 0 <= int(text) < num_classes:
            raise CellError("label out of range", expected)
        return int(text)

    return parse


def class_name(classes: tuple[str, ...]) -> Callable[[str], int]:
    """Return a cell parser for a label written as a class name."""
    indices = {name: index for index, name in enumerate(classes)}
    hint = functools.lru_cache(maxsize=None)(lambda text: did_you_mean(text, list(classes)))

    def parse(text: str) -> int:
        if text not in indices:
            near = hint(text) if hint.cache_info().currsize < _MAX_HINTS else ""
            raise CellError("unknown class", f"one of the {len(classes)} class names{near}")
        return indices[text]

    return parse


def is_whole_number(text: str) -> bool:
    """Whether a cell is an integer in plain digits, perhaps with a minus sign, and short enough to be a label."""
    digits = text.removeprefix("-")
    return digits.isascii() and digits.isdigit() and len(digits) <= 9


def label_histogram(source: SourceList) -> dict[str, dict[str, int]]:
    """Return samples per class, by label space; classes without samples are there with 0. None without labels."""
    if source.labelling == "none":
        return {}
    found = {}
    for number, space in enumerate(source.label_spaces):
        own = slice(None) if source.labelling == "several" else slice(number, number + 1)
        counts = Counter(label for sample in source.samples for label in sample.labels[own])
        found[space.name] = {name: counts[label] for label, name in enumerate(space.classes)}
    return found


_DECIMAL = re.compile(r"[-+]?(\d+\.\d*|\.\d+|\d+)([eE][-+]?\d+)?", re.ASCII)


def label_column(rows: Sequence[Row], column: str, classes: Path | None) -> tuple[tuple[str, ...], list[int | None]]:
    """Return the classes, and each row's label or None where it is wrong.

    With a class list: a column of numbers that are no names of it holds indices into it, any other column names.
    Without: all numbers are indices, which must run from 0 without gaps; names are sorted.
    """
    texts = [row[column] for row in rows]
    if classes is not None:
        names = read_classes(classes)
        numbers = all(map(is_whole_number, texts)) and not set(texts) <= set(names)
        parse = class_index(len(names)) if numbers else class_name(names)
        return names, [row.read(column, parse) for row in rows]
    if not any(map(is_whole_number, texts)):
        named = [row.read(column, _name) for row in rows]
        names = tuple(sorted({name for name in named if name is not None}))
        indices = {name: index for index, name in enumerate(names)}
        return names, [None if name is None else indices[name] for name in named]
    labels = [row.read(column, _number) for row in rows]
    used = sorted({label for label in labels if label is not None})
    if None not in labels and used != list(range(len(used))):
        gap = next(number for number in range(len(used)) if number != used[number])
        hint = "are they counted from 1? " if used[0] == 1 else ""
        rows[0].problems.add(
            "class without samples",
            f"{rows[0].path}: {column}: expected class numbers from 0 without gaps, found none with {gap} "
            f"({len(used)} classes, {used[0]} to {used[-1]}); {hint}pass --classes with all class names",
        )
    return tuple(map(str, range(len(used)))), labels


def _name(text: str) -> str:
    if not text:
        raise CellError("empty label", "a class name")
    if _DECIMAL.fullmatch(text):
        raise CellError("label not a whole number", "a class name or a whole number from 0")
    check_class_name(text)
    return text


def _number(text: str) -> int:
    if not is_whole_number(text):
        raise CellError("label not a whole number", "a whole number from 0, as in other rows")
    if int(text) < 0:
        raise CellError("label out of range", "a whole number from 0")
    return int(text)
