"""Files that others wrote: safetensors are read here, everything that needs unpickling in a limited child process."""

import hashlib
import json
import re
import signal
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from torch import Tensor

from ca2st.checked_json import DocumentError, read_json
from ca2st.child_processes import SPAWN
from ca2st.errors import EnvironmentFault
from ca2st.weights.errors import ForeignFileRefusedError, WeightsDamageError
from ca2st.weights.foreign_child import ReadFacts, ReadJob, serve
from ca2st.weights.tensor_file import read_tensor_file

MAX_FILE_BYTES = 16 * 2**30
TIMEOUT_SECONDS = 600.0
"""Wall time of reading one file, the start of the child included."""
_MAX_ANSWER_BYTES = 2**20
_MAX_INDEX_BYTES = 2**26
_INDEX_ENDING = ".safetensors.index.json"
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")


@dataclass(frozen=True, kw_only=True, slots=True)
class ForeignFile:
    """The weights in a file, as they are."""

    path: Path
    """Where it was read."""
    sha256: str
    """Of the file's bytes, to compare with what its author published; of parts: of the lines ``sha256  name``."""
    container: str
    """`safetensors`, `safetensors in parts`, `TorchScript archive`, `torch.save zip` or `torch.save pickle`."""
    wrapper: str
    """The key that the weights were under, keys within keys joined by dots; or empty."""
    tensors: dict[str, Tensor]
    """Tensors by the file's own names, on the CPU."""
    metadata: dict[str, str]
    """Free text fields of a safetensors file."""


class _Index(TypedDict):
    """What is read of the index of a checkpoint in parts."""

    weight_map: dict[str, str]


def read_foreign_file(path: Path, *, timeout_seconds: float = TIMEOUT_SECONDS) -> ForeignFile:
    """Read the tensors of a checkpoint in whatever container, without running anything in it.

    A folder stands for the safetensors in it: one file, or parts with their index (``*.safetensors.index.json``).

    Raises:
        ForeignFileRefusedError: no such file, no checkpoint, or one that asks for code, time or memory.
        WeightsDamageError: the file is not whole.
        EnvironmentFault: the file may not be read.
    """
    path = _in_folder(path) if path.is_dir() else path
    if not path.is_file():
        raise ForeignFileRefusedError(f"expected a checkpoint, found no file at {path}; check the path")
    if path.name.endswith(_INDEX_ENDING):
        return _read_parts(path)
    if part := _PART.fullmatch(path.name):
        index = path.with_name(f"{part[1]}{_INDEX_ENDING}")
        raise ForeignFileRefusedError(
            f"{path}: expected a whole checkpoint, found part {int(part[2])} of {int(part[3])}; give {index} or the "
            "folder, with all parts in it"
        )
    _require_size([path])
    sha256 = _sha256(path)
    if _is_safetensors(path):
        plain = read_tensor_file(path)
        facts = ReadFacts(container="safetensors", wrapper="")
        tensors, metadata = plain.tensors, plain.metadata
    else:
        facts, tensors = _read_in_child(path, timeout_seconds)
        metadata = {}
    return ForeignFile(
        path=path,
        sha256=sha256,
        container=facts.container,
        wrapper=facts.wrapper,
        tensors=tensors,
        metadata=metadata,
    )


def _in_folder(folder: Path) -> Path:
    """The one checkpoint in safetensors of a folder: an index of parts, or a single file."""
    found = sorted(folder.glob(f"*{_INDEX_ENDING}")) or sorted(folder.glob("*.safetensors"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found[:6]) or "none"
        raise ForeignFileRefusedError(
            f"{folder}: expected one .safetensors file, or parts with one *{_INDEX_ENDING}, found {names}; give the "
            "file itself"
        )
    return found[0]


def _read_parts(index: Path) -> ForeignFile:
    """All parts that an index names; each tensor must lie in the part that the index says, and in no other."""
    try:
        places = read_json(index, _Index, most_bytes=_MAX_INDEX_BYTES)["weight_map"]
    except DocumentError as error:
        raise WeightsDamageError(f"{error}; fetch it again") from error
    names = sorted(set(places.values()))
    if unsafe := [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]:
        raise ForeignFileRefusedError(
            f"{index}: expected names of .safetensors files beside it, found {unsafe[0]!r}; do not trust this file"
        )
    parts = [index.with_name(name) for name in names]
    if missing := [part.name for part in parts if not part.is_file()]:
        raise WeightsDamageError(
            f"{index}: expected {len(parts)} parts beside it, found no {', '.join(missing[:6])}; fetch the others too"
        )
    _require_size(parts)
    tensors: dict[str, Tensor] = {}
    for part in parts:
        held = read_tensor_file(part).tensors
        told = {tensor for tensor, place in places.items() if place == part.name}
        if other := sorted(told ^ held.keys()):
            raise WeightsDamageError(
                f"{part}: expected the {len(told)} tensors that {index.name} names, found {len(held)}; the first that "
                f"differs is {other[0]}; fetch the parts of one version"
            )
        tensors |= held
    lines = "".join(f"{_sha256(file)}  {file.name}\n" for file in (index, *parts))
    return ForeignFile(
        path=index,
        sha256=hashlib.sha256(lines.encode()).hexdigest(),
        container="safetensors in parts",
        wrapper="",
        tensors=tensors,
        metadata={},
    )


def _require_size(files: Sequence[Path]) -> None:
    if (size := sum(file.stat().st_size for file in files)) > MAX_FILE_BYTES:
        raise ForeignFileRefusedError(f"{files[0]}: expected at most {MAX_FILE_BYTES} bytes, found {size}")


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise EnvironmentFault(f"cannot read {path}: {error.strerror}; check its permissions") from error


def _is_safetensors(path: Path) -> bool:
    """By its name, or because an 8-byte length is followed by JSON."""
    with path.open("rb") as file:
        return path.suffix == ".safetensors" or file.read(9)[8:] == b"{"


def _read_in_child(path: Path, timeout_seconds: float) -> tuple[ReadFacts, dict[str, Tensor]]:
    with tempfile.TemporaryDirectory(prefix="ca2st-import-") as folder:
        job = ReadJob(
            path=path.resolve(), out=Path(folder) / "tensors.safetensors", cpu_seconds=int(timeout_seconds) + 1
        )
        answer = _ask_child(job, timeout_seconds)
        if answer["kind"] == "ok":
            facts = ReadFacts(container=answer["container"], wrapper=answer["wrapper"])
            return facts, read_tensor_file(job.out).tensors
    error = WeightsDamageError if answer["kind"] == "damage" else ForeignFileRefusedError
    raise error(f"{path}: {answer['message']}")


def _ask_child(job: ReadJob, timeout_seconds: float) -> dict[str, str]:
    ours, theirs = SPAWN.Pipe(duplex=False)
    child = SPAWN.Process(target=serve, args=(theirs, job), daemon=True)
    child.start()
    theirs.close()
    try:
        if not ours.poll(timeout_seconds):
            return _refusal(f"expected it to be read within {timeout_seconds:g} s, found it unfinished")
        answer: dict[str, str] = json.loads(ours.recv_bytes(_MAX_ANSWER_BYTES))
        return answer
    except EOFError:
        child.join()
        return _refusal(f"the process that read it died ({_described(child.exitcode)}); do not trust this file")
    except OSError as error:
        raise EnvironmentFault(f"cannot talk to the process that reads {job.path}: {error}") from error
    finally:
        child.kill()
        child.join()
        ours.close()


def _refusal(message: str) -> dict[str, str]:
    return {"kind": "refused", "message": message}


def _described(code: int | None) -> str:
    return signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
