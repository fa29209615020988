"""What is wrong with a recipe, told at its line, with the nearest known name."""

import datetime
import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from ray_jobs.config.toml_lines import line_of
from ray_jobs.errors import ConflictsError

_MOVED = {"experts.frozen": ' (now the top-level key trainable: "added" for true, "all" for false)'}


def told(
    mistake: Any,
    recipe_type: type,
    *,
    source: str,
    lines: Mapping[str, int] | None = None,
    overrides: Sequence[str] = (),
) -> list[tuple[str, str]]:
    """One of pydantic's mistakes as (key to change, ``file:line: key: what is wrong``); more where sections disagree.

    `recipe_type` is the dataclass that was read, `lines` where its keys stand in the file `source`; a key that an
    override set is told as such.
    """
    path = ".".join(str(part) for part in mistake["loc"])
    kind, told_lines = mistake["type"], list[tuple[str, str]]()
    for message in _messages(mistake):
        key, text = path, message
        if not path:  # sections at odds with each other: the recipe's own check names the key
            key, _, text = message.partition(": ")
        elif kind == "unexpected_keyword_argument":
            text = f"unknown key{_MOVED.get(path) or _suggestion(mistake['loc'], recipe_type)}"
        elif kind in ("missing", "missing_argument"):
            text = "required, but not given"
        elif kind != "value_error":
            text = f"{message}, found {mistake['input']!r}"
        blamed = blamed_key(key, text, recipe_type, overrides) if kind == "value_error" else key
        place = place_of(blamed, source=source, lines=lines, overrides=overrides)
        told_lines.append((blamed, f"{place}: {key}: {text}"))
    return told_lines


def blamed_key(path: str, message: str, recipe_type: type, overrides: Sequence[str] = ()) -> str:
    """The key that a refusal of the section `path` is about.

    It is the one that the message begins with, or one that it names and an override has set; else `path` itself.
    """
    known = _known_keys(path.split("."), recipe_type)
    first = re.split(r"[:, ]", message, maxsplit=1)[0].rpartition(".")[2]
    words = set(re.findall(r"\w+", message))
    set_here = [override.partition("=")[0] for override in overrides]
    named = [key for key in set_here if key.startswith(f"{path}.") and key.rpartition(".")[2] in words]
    if first in known and f"{path}.{first}" in set_here:
        return f"{path}.{first}"
    if named:
        return named[0]
    return f"{path}.{first}" if first in known else path


def place_of(path: str, *, source: str, lines: Mapping[str, int] | None = None, overrides: Sequence[str] = ()) -> str:
    """Where the key `path` was set: ``--set path``, ``file:line``, or the file alone where it is not in it.

    An override of a section around the key has set it too.
    """
    for override in reversed(overrides):
        key = override.partition("=")[0]
        if path == key or path.startswith(f"{key}."):
            return f"--set {key}"
    line = line_of(dict(lines or {}), path)
    return f"{source}:{line}" if line else source


def _messages(mistake: Any) -> list[str]:
    error = mistake.get("ctx", {}).get("error")
    if isinstance(error, ConflictsError):
        return list(error.messages)
    return [mistake["msg"].removeprefix("Value error, ")]


def dates_in(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Key and text of every date or time in a TOML document: values that TOML has and no setting takes."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from dates_in(inner, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for inner in value:
            yield from dates_in(inner, path)
    elif isinstance(value, datetime.date | datetime.time):
        yield path, value.isoformat()


def _suggestion(loc: Sequence[Any], recipe_type: type) -> str:
    known = _known_keys([str(part) for part in loc[:-1]], recipe_type)
    near = difflib.get_close_matches(str(loc[-1]), known, n=1)
    return f" (did you mean {near[0]!r}?)" if near else f"; known are {', '.join(known)}"


def _known_keys(tables: Sequence[str], recipe_type: type) -> list[str]:
    """Field names of the section at `tables`."""
    current: Any = recipe_type
    for table in tables:
        if table.isdigit():  # a table of an array, whose kind was found under the array's name
            continue
        kinds = {entry.name: entry.type for entry in fields(current)}
        current = next((kind for kind in _options(kinds.get(table)) if is_dataclass(kind)), None)
        if current is None:
            return []
    return [entry.name for entry in fields(current)]


def _options(kind: Any) -> tuple[Any, ...]:
    return getattr(kind, "__args__", (kind,))
