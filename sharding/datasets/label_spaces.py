"""Class names: those of the public datasets, shipped as facts, and those in a file of the user's."""

import functools
from collections.abc import Callable
from pathlib import Path

from ca2st.errors import did_you_mean
from sharding.datasets.problems import Problems
from sharding.datasets.table import CellError, read_text, split_lines
from sharding.errors import AnnotationError
from sharding.manifest import LabelSpace
from sharding.source import SourceList

NUM_CLASSES: dict[str, int] = {
    "activitynet": 200,
    "epic_kitchens_100_nouns": 300,
    "epic_kitchens_100_verbs": 97,
    "epic_sounds": 44,
    "kinetics_400": 400,
    "something_something_v2": 174,
    "ucf_101": 101,
    "vgg_sound": 309,
}
"""The shipped class lists and their published sizes."""

_MAX_HINTS = 20  # the search for a near name takes milliseconds
_FOLDER = Path(__file__).parent / "classes"


def published_classes(name: str) -> tuple[str, ...]:
    """The class names of a public dataset in label order."""
    classes = read_classes(_FOLDER / f"{name}.txt")
    if len(classes) != NUM_CLASSES[name]:
        raise AnnotationError(f"{_FOLDER / name}.txt: expected {NUM_CLASSES[name]} classes, found {len(classes)}")
    return classes


def read_classes(path: Path) -> tuple[str, ...]:
    """Class names from a text file, one a line; line 1 is label 0.

    Raises:
        AnnotationError: unreadable, no names, an empty line between names, or a name twice.
    """
    names = [line.strip() for line in split_lines(read_text(path))]
    while names and not names[-1]:
        names.pop()
    if not names:
        raise AnnotationError(f"{path}: expected class names, one a line, found none")
    problems = Problems(path)
    first: dict[str, int] = {}
    for line, name in enumerate(names, start=1):
        if not name:
            problems.add("empty line", f"{path}:{line}:1: expected a class name, found an empty line")
        elif name in first:
            problems.add(
                "class twice", f"{path}:{line}:1: expected every class once, found {name!r} as on line {first[name]}"
            )
        first.setdefault(name, line)
    problems.refuse_any()
    return tuple(names)


def class_index(num_classes: int) -> Callable[[str], int]:
    """A cell parser for a label written as a number."""

    def parse(text: str) -> int:
        expected = f"a class index 0 to {num_classes - 1}"
        if not is_whole_number(text):
            raise CellError("label not a whole number", expected)
        if not 0 <= int(text) < num_classes:
            raise CellError("label out of range", expected)
        return int(text)

    return parse


def class_name(classes: tuple[str, ...]) -> Callable[[str], int]:
    """A cell parser for a label written as a class name."""
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
    """Samples a class, by label space; classes without samples are there with 0."""
    return {
        space.name: _counted(space, [s.labels[number] for s in source.samples])
        for number, space in enumerate(source.label_spaces)
    }


def _counted(space: LabelSpace, labels: list[int]) -> dict[str, int]:
    counts = dict.fromkeys(space.classes, 0)
    for label in labels:
        counts[space.classes[label]] += 1
    return counts
