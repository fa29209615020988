"""A recipe as a TOML file: preset expanded, settings of the command line put over it, every mistake at its line."""

import datetime
import json
import re
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

import pydantic

from ca2st.errors import UserInputError, did_you_mean
from ca2st.model.config import find_preset
from ray_jobs.config.recipe import Recipe, recipe_from_document
from ray_jobs.errors import ConflictsError, RecipeError

_MOST_NESTED = 20
_MOST_NAME_BYTES = 200
_NOT_IN_NAMES = re.compile(r"[/\x00-\x1f\x7f]")
_SPLIT = "{split}"
_TABLE = re.compile(r"^\s*(\[\[?)\s*([^\[\]]+?)\s*\]")
_KEY = re.compile(r"""^\s*((?:[\w-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[\w-]+|"[^"]*"|'[^']*'))*)\s*=""")


@dataclass(frozen=True, slots=True)
class _Places:
    """Where the settings of a recipe were given: in its file, or on the command line over it."""

    source: str
    lines: Mapping[str, int] = field(default_factory=dict)
    """Of every key of the file by its dotted path, from 1."""
    overrides: Sequence[str] = ()

    def of(self, path: str) -> str:
        """Return ``--set path``, ``file:line`` of the key or the nearest table around it, or the file alone.

        An override of a section around the key has set it too.
        """
        for override in reversed(self.overrides):
            key = override.partition("=")[0]
            if path == key or path.startswith(f"{key}."):
                return f"--set {key}"
        while path and path not in self.lines:
            path = path.rpartition(".")[0]
        return f"{self.source}:{self.lines[path]}" if path else self.source


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, or one that ships with the package by its name, with ``a.b=value`` overrides.

    Raises:
        UserInputError: no such recipe.
        RecipeError: every mistake in it, with file:line.
    """
    text, source = read_recipe(name_or_path)
    too_deep = f"{source}: expected sections in sections at most {_MOST_NESTED} deep, found more"
    try:
        document = tomllib.loads(text)
    except RecursionError:
        raise RecipeError(too_deep) from None
    except ValueError as error:  # TOMLDecodeError is one; a number of thousands of digits gives another
        raise RecipeError(f"{source}: not valid TOML: {error}") from error
    document = _extended(document, source)
    for override in overrides:
        _apply_override(document, override)
    if _is_deeper(document, _MOST_NESTED):
        raise RecipeError(too_deep)
    places = _Places(source, key_lines(text), overrides)
    _check_name(document.get("name"), places.of("name"))
    if dates := list(_dates_in(document)):
        raise RecipeError(
            "\n".join(
                f'{places.of(key)}: {key}: expected no date or time, found {found}; write text in quotes: "{found}"'
                for key, found in dates
            )
        )
    _fill_split(document, places)
    try:
        _expand_preset(document)
    except UserInputError as error:
        raise RecipeError(f"{places.of('model.preset')}: model.{error}") from error
    try:
        return recipe_from_document(document)
    except pydantic.ValidationError as error:
        raise RecipeError("\n".join(dict.fromkeys(_every_mistake(document, error, places)))) from error


def _extended(document: dict[str, Any], source: str, inside: tuple[str, ...] = ()) -> dict[str, Any]:
    """`document` over the recipe of the package that it extends, if any, which may extend one not yet `inside`.

    Raises:
        RecipeError: there is no such recipe.
    """
    if (name := document.pop("extends", None)) is None:
        return document
    file = f"{name}.toml"
    folder = resources.files("ray_jobs") / "recipes"
    known = {entry: place / entry for place in (folder / "bases", folder) for entry in _names_in(place)}
    if file not in known or file in inside:
        names = [known_name.removesuffix(".toml") for known_name in known]
        raise RecipeError(
            f"{source}: extends: expected a recipe of the package ({', '.join(names)}), found {shortened(name)}"
        )
    base = tomllib.loads(known[file].read_text(encoding="utf-8"))
    base.pop("name", None)
    return _below(_extended(base, file, (*inside, file)), document)


def _check_name(name: object, where: str) -> None:
    """Refuse a name that is no name of a folder: it would lead out of the runs' folder, or could not be made."""
    if not isinstance(name, str):
        return  # reported with the other mistakes
    if not name or name in (".", "..") or len(name.encode()) > _MOST_NAME_BYTES or _NOT_IN_NAMES.search(name):
        raise RecipeError(
            f"{where}: name: expected a name for the run's folder, without / and of at most {_MOST_NAME_BYTES} bytes, "
            f"found {shortened(name)}"
        )


def _is_deeper(document: Any, most: int) -> bool:
    """Return whether tables and lists lie in each other more than `most` deep; without recursion."""
    level = [document]
    for _ in range(most + 1):
        inner = [value for one in level for value in (one.values() if isinstance(one, dict) else one)]
        level = [value for value in inner if isinstance(value, dict | list)]
        if not level:
            return False
    return True


def _every_mistake(document: dict[str, Any], error: pydantic.ValidationError, places: _Places) -> Iterator[str]:
    """Yield the mistakes of `error`, and those that hide behind them.

    A section names one value that it refuses at a time, and sections are compared once each of them is right. So what
    was refused is taken out and the rest is read again, as long as something is taken out. What is then refused and
    speaks of a key that was taken out may be about its default, and is not reported.
    """
    removed: set[str] = set()
    while True:
        before = frozenset(removed)
        for mistake in error.errors():
            for key, line in _explained(mistake, places):
                if not before or not before & set(re.findall(r"\w+", line.removeprefix(places.source))):
                    yield line
                if _take_out(document, key):
                    removed.add(key.rpartition(".")[2])
        if removed == before:
            return
        try:
            recipe_from_document(document)
        except pydantic.ValidationError as more:
            error = more
        else:
            return


def _take_out(document: dict[str, Any], path: str) -> bool:
    """Remove the key `path`, never a whole section; False where it is none or not there."""
    *tables, key = path.split(".")
    inner: Any = document
    for table in tables:
        inner = inner.get(table) if isinstance(inner, dict) else None
    if not isinstance(inner, dict) or key not in inner or isinstance(inner[key], dict):
        return False
    del inner[key]
    return True


def known_recipes() -> list[str]:
    """Return the file names of the recipes that ship with the package."""
    return _names_in(resources.files("ray_jobs") / "recipes")


def _names_in(folder: Traversable) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".toml"))


def _expand_preset(document: dict[str, Any]) -> None:
    """Put the settings of `[model] preset` below those that the recipe gives itself."""
    model = document.get("model")
    if not isinstance(model, dict) or "preset" not in model:
        return
    own = {key: value for key, value in model.items() if key != "preset"}
    document["model"] = _below(json.loads(json.dumps(asdict(find_preset(str(model["preset"])).config))), own)


def _fill_split(document: dict[str, Any], places: _Places) -> None:
    """Put `data.split` in place of ``{split}`` in the places of the shards."""
    data = document.get("data")
    if not isinstance(data, dict):
        return
    marked = [key for key in ("train", "validation") if _SPLIT in str(data.get(key))]
    split = data.get("split")
    if marked and split is None:
        key = f"data.{marked[0]}"
        raise RecipeError(
            f"{places.of(key)}: {key}: expected data.split beside {_SPLIT}, found none; add --set data.split=1"
        )
    if split is not None and not marked:
        if (place := places.of("data.split")).startswith("--set"):
            raise RecipeError(
                f"{place}: expected {_SPLIT} in data.train or data.validation, which it stands for, found it in "
                "neither; leave data.split out"
            )
        del data["split"]  # the recipe's own, where other shards are given
    for key in marked:
        data[key] = str(data[key]).replace(_SPLIT, str(split))


def _below(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return `own` over `base`, table by table."""
    merged = dict(base)
    for key, value in own.items():
        inner = merged.get(key)
        merged[key] = _below(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged


def read_recipe(name_or_path: str) -> tuple[str, str]:
    """Return a recipe's text as it was written, and where it is from: its path, or its name in the package.

    Raises:
        UserInputError: no such recipe.
    """
    path = Path(name_or_path)
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8-sig"), str(path)  # some editors of Windows begin with a mark
        except UnicodeDecodeError as error:
            raise RecipeError(
                f"{path}: expected UTF-8 text, found other bytes at byte {error.start}; save it as UTF-8"
            ) from error
    name = name_or_path if name_or_path.endswith(".toml") else f"{name_or_path}.toml"
    known = known_recipes()
    if name in known:
        return (resources.files("ray_jobs") / "recipes" / name).read_text(encoding="utf-8"), name
    raise UserInputError(
        f"recipe {name_or_path}: no such file, nor a recipe of the package; those are {', '.join(known)}"
    )


def _apply_override(document: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise RecipeError(f"--set: expected section.key=value, found {shortened(override)}")
    *tables, key = path.split(".")
    try:
        found = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        found = {"value": text}  # a bare word is a string
    except (ValueError, RecursionError):
        raise RecipeError(
            f"--set {shortened(override)}: expected a value of a recipe, found no such number or list"
        ) from None
    if len(found) > 1:
        raise RecipeError(f"--set {shortened(override)}: expected one value, found further lines; set each by --set")
    if len(tables) > _MOST_NESTED:
        raise RecipeError(f"--set {shortened(override)}: expected at most {_MOST_NESTED} sections in sections")
    for table in tables:
        inner = document.setdefault(table, {})
        if not isinstance(inner, dict):
            raise RecipeError(f"--set {override}: {table} is a value, not a section")
        document = inner
    document[key] = found["value"]


def stored_recipe(document: Mapping[str, Any], *, where: str) -> Recipe:
    """Return the recipe that a run folder or checkpoint (`where`) keeps.

    Raises:
        RecipeError: it was written by a version whose recipes had other settings.
    """
    try:
        return recipe_from_document(document)
    except pydantic.ValidationError as error:
        mistakes = "\n  ".join(line for mistake in error.errors() for _, line in _explained(mistake, _Places(where)))
        raise RecipeError(
            f"{where}: its recipe is none of this version of ca2st; use the version that wrote it:\n  {mistakes}"
        ) from error


def key_lines(text: str) -> dict[str, int]:
    """Return the line (from 1) of every dotted key and table header in `text`; tables of an array count from 0.

    Lines inside multi-line strings may add entries that match no real key; they are never asked for.
    """
    lines: dict[str, int] = {}
    table, counts = "", Counter[str]()
    for number, line in enumerate(text.splitlines(), start=1):
        if header := _TABLE.match(line):
            table = _dotted(header[2])
            if header[1] == "[[":
                lines.setdefault(table, number)
                counts[table] += 1
                table = f"{table}.{counts[table] - 1}"
            lines.setdefault(table, number)
        elif key := _KEY.match(line):
            path = f"{table}.{_dotted(key[1])}" if table else _dotted(key[1])
            lines.setdefault(path, number)
    return lines


def _dotted(text: str) -> str:
    return ".".join(part.strip().strip("\"'") for part in text.split("."))


def _explained(mistake: Any, places: _Places) -> list[tuple[str, str]]:
    """Return pydantic's mistake as (key to change, ``file:line: key: what is wrong``); more where sections disagree."""
    path = ".".join(map(str, mistake["loc"]))
    kind, error = mistake["type"], mistake.get("ctx", {}).get("error")
    messages = error.messages if isinstance(error, ConflictsError) else [mistake["msg"].removeprefix("Value error, ")]
    found = []
    for message in messages:
        key, text = path, message
        if not path:  # sections at odds with each other: the recipe's own check names the key
            key, _, text = message.partition(": ")
        elif kind == "unexpected_keyword_argument":
            *section, unknown = map(str, mistake["loc"])
            known = _known_keys(".".join(section))
            text = "unknown key" + (did_you_mean(unknown, known) or f"; known are {', '.join(known)}")
        elif kind in ("missing", "missing_argument"):
            text = "required, but not given"
        elif kind != "value_error":
            text = f"{message}, found {mistake['input']!r}"
        blamed = _blamed_key(key, text, places.overrides) if kind == "value_error" else key
        found.append((blamed, f"{places.of(blamed)}: {key}: {text}"))
    return found


def _blamed_key(path: str, message: str, overrides: Sequence[str]) -> str:
    """Return the key that a refusal of the section `path` is about.

    It is the one that the message begins with, or one that it names and an override has set; else `path` itself.
    """
    first = re.split(r"[:, ]", message, maxsplit=1)[0].rpartition(".")[2]
    begins = f"{path}.{first}" if first in _known_keys(path) else None
    words = set(re.findall(r"\w+", message))
    set_here = [override.partition("=")[0] for override in overrides]
    named = [key for key in set_here if key.startswith(f"{path}.") and key.rpartition(".")[2] in words]
    if named and begins not in set_here:
        return named[0]
    return begins or path


def _dates_in(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield key and text of every date or time in a TOML document: values that TOML has and no setting takes."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _dates_in(inner, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for inner in value:
            yield from _dates_in(inner, path)
    elif isinstance(value, datetime.date | datetime.time):
        yield path, value.isoformat()


def _known_keys(section: str) -> list[str]:
    """Return the names of the settings of a section by its dotted path; none where it is a setting itself."""
    current: Any = Recipe
    for table in section.split(".") if section else ():
        if table.isdigit():  # a table of an array, whose kind was found under the array's name
            continue
        kind = {entry.name: entry.type for entry in fields(current)}.get(table)
        current = next((one for one in getattr(kind, "__args__", (kind,)) if is_dataclass(one)), None)
        if current is None:
            return []
    return [entry.name for entry in fields(current)]
