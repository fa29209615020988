"""The one reader of JSON that comes from a disk or a server: what is not as it was written is an error with a name.

`read_json(path, kind)` and `parse_json(data, kind, where=...)` give a value of the type `kind`, checked to the last
leaf; a flipped bit, another type, a missing or unknown field, bytes that are no UTF-8, no JSON, nesting without end
and numbers without end are all one `DocumentError`. `kind` may be

* a dataclass: every field of its annotated type; one with a default may be missing, an unknown one may not be there;
* a TypedDict: its required keys must be there; other keys are ignored (for a document of which a few fields matter);
* ``dict[str, Any]``, ``list[str]``, ``tuple[int, ...]``, ``int | None``, ``Literal[...]``, ``str``, ``float``, ...,
  also inside of each other.

What is written for this reader goes through `encoded`.

Standard library only: every package may use it.
"""

import dataclasses
import hashlib
import json
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar, Union, cast, get_args, get_origin

from ca2st.errors import DataDamageError, EnvironmentFault

T = TypeVar("T")
_MOST_BYTES = 1 << 30
_INTEGERS = range(-(2**63), 2**64)  # what any field of ours holds; more digits are damage, and slow
_MOST_SHOWN = 60
_HALF_A_PAIR = re.compile("[\ud800-\udfff]")
_NAMES = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}


class DocumentError(DataDamageError, ValueError):
    """A JSON document is not what its reader expects: ``file: field: expected ..., found ...``."""


def read_json(path: Path, kind: type[T] | types.GenericAlias, *, most_bytes: int = _MOST_BYTES) -> T:
    """Return the JSON document in the file `path` as a value of the type `kind` (see the module).

    Raises:
        FileNotFoundError: there is no such file.
        EnvironmentFault: it cannot be read.
        DocumentError: it is not such a document; callers with an error or a remedy of their own catch it.
    """
    try:
        with path.open("rb") as file:
            data = file.read(most_bytes + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise EnvironmentFault(f"cannot read {path}: {error.strerror}; check the file and its permissions") from error
    if len(data) > most_bytes:
        raise DocumentError(f"{path}: expected at most {most_bytes} bytes, found more")
    return parse_json(data, kind, where=str(path))


def parse_json(data: bytes | str, kind: type[T] | types.GenericAlias, *, where: str) -> T:
    """Return the JSON document `data` as a value of the type `kind`; `where` names it in messages.

    Raises:
        DocumentError: it is not such a document.
    """
    try:
        text = data if isinstance(data, str) else data.decode()  # json.loads would guess UTF-16 too
        value = json.loads(text, parse_int=_whole_number, object_pairs_hook=_of_different_keys)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    except UnicodeError as error:
        raise DocumentError(f"{where}: expected UTF-8 text, found other bytes ({error})") from None
    except RecursionError:
        raise DocumentError(f"{where}: expected a JSON document, found one nested without end") from None
    except ValueError as error:
        raise DocumentError(f"{where}: expected a JSON document, found something else ({error})") from error
    return checked(value, kind, where=where)


def _of_different_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object with the key {twice!r} twice")
    return value


def encoded(text: str) -> bytes:
    r"""Return JSON text, made with ``ensure_ascii=False``, as bytes that `parse_json` takes.

    Half of a surrogate pair, which Python has for a byte of a file name that is no UTF-8, becomes the text ``\udce9``.
    """
    return _HALF_A_PAIR.sub(lambda half: rf"\\u{ord(half[0]):04x}", text).encode()


def finite(value: object, *, default: Callable[[Any], object] | None = None) -> Any:
    """Return a value as JSON can hold it: None in place of every number that is not finite.

    `default` is as for `json.dumps`.
    """
    return json.loads(json.dumps(value, default=default), parse_constant=lambda _: None)


def canonical_json(value: object, *, is_compact: bool = False) -> bytes:
    """Return UTF-8 JSON with sorted keys: equal values give equal bytes. Floats are written by repr, exactly.

    Indented, with a line break at the end; or without any white space, as hashes are taken over it.
    """
    if is_compact:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def sha256_of_json(value: object) -> str:
    """Return the hash of the compact canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value, is_compact=True)).hexdigest()


def checked(value: Any, kind: type[T] | types.GenericAlias, *, where: str) -> T:
    """Return a value as `json.loads` gives it, as a value of the type `kind`; raises as `parse_json`."""
    return cast(T, _checked(value, kind, where))


def _whole_number(digits: str) -> int:
    if len(digits) > 20 or (number := int(digits)) not in _INTEGERS:
        raise ValueError(f"a whole number of {len(digits)} digits")
    return number


def _checked(value: Any, kind: Any, where: str) -> Any:
    origin = get_origin(kind)
    if kind is Any or kind is object:
        return value
    if origin in (Union, types.UnionType):
        return _one_of(value, get_args(kind), where)
    if origin is typing.Literal:
        if any(value == choice and type(value) is type(choice) for choice in get_args(kind)):
            return value
        _refuse(f"one of {', '.join(map(repr, get_args(kind)))}", value, where)
    if dataclasses.is_dataclass(kind) or typing.is_typeddict(kind):
        return _record(value, kind, where)
    outer = origin or kind
    if outer in (dict, Mapping):
        _, inner = get_args(kind) or (str, Any)
        if not isinstance(value, dict):
            _refuse("an object", value, where)
        return {name: _checked(item, inner, f"{where}: {name}") for name, item in value.items()}
    if outer in (list, tuple, Sequence):
        return _items(value, kind, where)
    if kind is float and type(value) is int:
        return value  # as it was written: a document that is written again has the same bytes and hash
    if type(value) is not kind:  # a bool is no number here
        _refuse(_NAMES.get(kind, str(kind)), value, where)
    return value


def _one_of(value: Any, kinds: tuple[Any, ...], where: str) -> Any:
    errors = []
    for kind in kinds:
        try:
            return _checked(value, kind, where)
        except DocumentError as error:
            errors.append(error)
    raise errors[0]


def _items(value: Any, kind: Any, where: str) -> Any:
    if not isinstance(value, list):
        _refuse("a list", value, where)
    outer, inner = get_origin(kind) or kind, get_args(kind) or (Any,)
    if outer is not tuple or len(inner) == 1 or inner[1] is Ellipsis:
        inner = inner[:1] * len(value)
    elif len(value) != len(inner):
        _refuse(f"a list of {len(inner)}", value, where)
    items = [_checked(item, one, f"{where}[{at}]") for at, (item, one) in enumerate(zip(value, inner, strict=True))]
    return items if outer is list else tuple(items)


def _record(value: Any, kind: Any, where: str) -> Any:
    if not isinstance(value, dict):
        _refuse("an object", value, where)
    hints = typing.get_type_hints(kind)
    if dataclasses.is_dataclass(kind):
        fields = [field for field in dataclasses.fields(kind) if field.init]
        known = {field.name for field in fields}
        required = {
            field.name
            for field in fields
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        }
        if unknown := sorted(value.keys() - known):
            raise DocumentError(
                f"{where}: expected the fields {', '.join(sorted(known))}, found also {unknown[0]!r:.99}"
            )
    else:
        known, required = set(hints), set(kind.__required_keys__)
    if missing := sorted(required - value.keys()):
        raise DocumentError(f"{where}: expected the field {missing[0]!r}, found none")
    values = {name: _checked(value[name], hints[name], f"{where}: {name}") for name in known & value.keys()}
    try:
        return kind(**values)
    except DocumentError:
        raise
    except ValueError as error:  # a dataclass that checks its own fields
        raise DocumentError(f"{where}: {error}") from error


def _refuse(expected: str, value: Any, where: str) -> NoReturn:
    if isinstance(value, dict | list):
        found = f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    else:
        found = json.dumps(value, ensure_ascii=False)
    more = "..." if len(found) > _MOST_SHOWN else ""
    raise DocumentError(f"{where}: expected {expected}, found {found[:_MOST_SHOWN]}{more}")
