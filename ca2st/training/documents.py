"""JSON documents whose every byte is accounted for: canonical form, own hash, differences by field."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from ca2st.checked_json import DocumentError, parse_json
from ca2st.training.errors import CheckpointDamagedError


def canonical_json(document: Mapping[str, Any]) -> bytes:
    """Indented UTF-8 JSON with sorted keys: equal documents give equal bytes. Floats are written by repr, exactly."""
    text = json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode()


def sha256_of_document(document: Mapping[str, Any]) -> str:
    """Hash of the canonical JSON of `document`."""
    return hashlib.sha256(canonical_json(document)).hexdigest()


def sealed_json(document: Mapping[str, Any]) -> bytes:
    """Canonical JSON of `document` with ``self_sha256``, the hash of the rest."""
    return canonical_json({**document, "self_sha256": sha256_of_document(document)})


def open_sealed_json(data: bytes, where: str) -> dict[str, Any]:
    """The document inside `sealed_json` bytes, without its hash.

    Raises:
        CheckpointDamagedError: any byte differs from what was written, white space included.
    """
    try:
        document = parse_json(data, dict[str, Any], where=where)
    except DocumentError as error:
        raise CheckpointDamagedError(str(error)) from error
    claimed = document.pop("self_sha256", None)
    if claimed != sha256_of_document(document) or sealed_json(document) != data:
        raise CheckpointDamagedError(f"{where}: its bytes are not those its self_sha256 names")
    return dict(document)


def differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Fields that differ, as ``path.of.field: was -> is``, sorted by path."""
    before, after = flatten(was), flatten(now)
    return [
        f"{path}: {_shown(before, path)} -> {_shown(after, path)}"
        for path in sorted(before.keys() | after.keys())
        if _shown(before, path) != _shown(after, path)
    ]


def flatten(document: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of a document by dotted path; list items are numbered, empty containers are leaves."""
    items: list[tuple[str, Any]] = []
    if isinstance(document, Mapping):
        items = [(str(key), value) for key, value in document.items()]
    elif isinstance(document, list | tuple):
        items = [(str(index), value) for index, value in enumerate(document)]
    if not items:
        return {prefix: document}
    leaves: dict[str, Any] = {}
    for key, value in items:
        leaves |= flatten(value, f"{prefix}.{key}" if prefix else key)
    return leaves


def _shown(leaves: Mapping[str, Any], path: str) -> str:
    return json.dumps(leaves[path], sort_keys=True, ensure_ascii=False) if path in leaves else "(absent)"
