"""What is wrong with a recipe, told at its line, with the nearest known name."""

import datetime
import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from ray_jobs.toml_lines import line_of

_MOVED = {"experts.frozen": ' (now the top-level key trainable: "added" for true, "all" for false)'}


def told(
    mistake: Any,
    recipe_type: type,
    *,
    source: str,
    lines: Mapping[str, int] | None = None,
    overrides: Sequence[str] = (),
) -> str:
    """One of pydantic's mistakes as ``file:line: key: what is wrong``.

    `recipe_type` is the dataclass that was read, `lines` where its keys stand in the file `source`; a key that an
    override set is told as such.
    """
    path = ".".join(str(part) for part in mistake["loc"])
    message = mistake["msg"].removeprefix("Value error, ")
    if not path:  # sections at odds with each other: the recipe's own check names the key
        path, _, message = message.partition(": ")
    where = place_of(path, source=source, lines=lines, overrides=overrides)
    kind = mistake["type"]
    if kind == "unexpected_keyword_argument":
        return f"{where}: {path}: unknown key{_MOVED.get(path) or _suggestion(mistake['loc'], recipe_type)}"
    if kind in ("missing", "missing_argument"):
        return f"{where}: {path}: required, but not given"
    if kind == "value_error":
        return f"{where}: {path}: {message}"
    return f"{where}: {path}: {message}, found {mistake['input']!r}"


def place_of(path: str, *, source: str, lines: Mapping[str, int] | None = None, overrides: Sequence[str] = ()) -> str:
    """Where the key `path` was set: ``--set path``, ``file:line``, or the file alone where it is not in it."""
    if any(override.startswith(f"{path}=") for override in overrides):
        return f"--set {path}"
    line = line_of(dict(lines or {}), path)
    return f"{source}:{line}" if line else source


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
