"""What MLflow takes as names and values, and how everything else is changed so that nothing is refused or lost.

MLflow refuses a whole batch for one bad name. Names here are letters and digits of any script, ``_ - . : /`` and
spaces, at most 250 characters, and would mean the same as a path. A changed name ends in the hash of the original:
two names never become one.
"""

import hashlib
import posixpath
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

MAX_NAME_CHARACTERS = 250
MAX_PARAM_CHARACTERS = 6000
MAX_TAG_CHARACTERS = 8000
MAX_RUN_NAME_CHARACTERS = 250
MAX_EXPERIMENT_CHARACTERS = 250
MAX_PARAMS = 10_000
LEFT_OUT = "ca2st.params_left_out"
"""The param that says how many were left out."""
_BAD_CHARACTER = re.compile(r"[^/\w.\- :]")
_BATCH_BYTES = 500_000  # a server takes a request of at most a million
_BATCH_ITEMS = 100
_CUT = "...(cut)"


@dataclass(frozen=True, kw_only=True, slots=True)
class Cleaned:
    """Names and values that MLflow takes, and what was done to the originals."""

    values: Mapping[str, str]
    changes: tuple[str, ...]
    """A sentence for each name or value that is not as it was."""


def clean_name(name: str) -> str:
    """`name`, or the nearest name that MLflow takes, ending in eight hexadecimal digits of the original's hash."""
    if _is_taken(name):
        return name
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    path = posixpath.normpath(_BAD_CHARACTER.sub("_", name)).lstrip("/.").strip() or "unnamed"
    return f"{path[: MAX_NAME_CHARACTERS - 9].rstrip('/')}-{digest}"


def clean_value(value: str, limit: int) -> str:
    """`value` as text that every store can hold, of at most `limit` characters; a cut is marked at its end."""
    text = value.replace("\0", "\\0").encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= limit else text[: limit - len(_CUT)] + _CUT


def clean_params(params: Mapping[str, str], *, limit: int = MAX_PARAMS) -> Cleaned:
    """At most `limit` params; the last of more says how many were left out."""
    if len(params) <= limit:
        return _cleaned("param", params, MAX_PARAM_CHARACTERS)
    kept = dict(list(params.items())[: limit - 1])
    note = f"{len(params) - len(kept)} of {len(params)}; the run folder's recipe.json has all"
    clean = _cleaned("param", {**kept, LEFT_OUT: note}, MAX_PARAM_CHARACTERS)
    return Cleaned(values=clean.values, changes=(*clean.changes, f"params left out: {note}"))


def clean_tags(tags: Mapping[str, str]) -> Cleaned:
    """Tags that MLflow takes."""
    return _cleaned("tag", tags, MAX_TAG_CHARACTERS)


def batches(values: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """`values` in their order, in parts small enough for one call."""
    part: dict[str, str] = {}
    num_bytes = 0
    for name, value in values.items():
        size = len(name.encode()) + len(value.encode())
        if part and (len(part) == _BATCH_ITEMS or num_bytes + size > _BATCH_BYTES):
            yield part
            part, num_bytes = {}, 0
        part[name] = value
        num_bytes += size
    if part:
        yield part


def _cleaned(kind: str, values: Mapping[str, str], limit: int) -> Cleaned:
    clean: dict[str, str] = {}
    changes = []
    for name, value in values.items():
        new_name, new_value = clean_name(name), clean_value(value, limit)
        if new_name != name:
            changes.append(f"{kind} {name!a} is called {new_name}")
        if new_value != value:
            changes.append(f"the value of {kind} {new_name}, {len(value)} characters, was cut or cleaned")
        clean[new_name] = new_value
    return Cleaned(values=clean, changes=tuple(changes))


def _is_taken(name: str) -> bool:
    is_plain = bool(name) and len(name) <= MAX_NAME_CHARACTERS and not _BAD_CHARACTER.search(name)
    return is_plain and posixpath.normpath(name) == name and name != "." and not name.startswith(("..", "/"))
