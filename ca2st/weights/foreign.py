"""Read files that others wrote: safetensors here, everything that needs unpickling in a limited child process.

A TorchScript archive (as the official CLIP `.pt` is) is a zip: `data.pkl` describes the module tree, `data/<key>` hold
the raw storages, `code/` holds programs, which are never opened. The description is read by an unpickler that knows
nothing but tensor records, plain containers and inert replacements for the archive's own classes; every other name is
refused.
"""

import argparse
import hashlib
import io
import json
import os
import pickle  # for the name of its error
import re
import resource
import signal
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from ca2st.checked_json import DocumentError, read_json
from ca2st.errors import CA2STError, EnvironmentFault
from ca2st.processes import SPAWN, die_with_parent, start_deaf
from ca2st.weights.tensor_files import ForeignFileRefusedError, WeightsDamageError, read_tensor_file

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
    sha256: str
    """Of the file's bytes, to compare with what its author published; of parts: of the lines ``sha256  name``."""
    container: str
    """`safetensors`, `safetensors in parts`, `TorchScript archive`, `torch.save zip` or `torch.save pickle`."""
    wrapper: str = ""
    """The key that the weights were under, keys within keys joined by dots; or empty."""
    tensors: dict[str, Tensor]
    """Tensors by the file's own names, on the CPU."""
    metadata: dict[str, str] = field(default_factory=dict)
    """Free text fields of a safetensors file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadJob:
    """What the child is to do."""

    path: Path
    out: Path
    """Where the tensors go, as safetensors."""
    cpu_seconds: int


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
    with path.open("rb") as file:  # safetensors by its name, or because an 8-byte length is followed by JSON
        is_safetensors = path.suffix == ".safetensors" or file.read(9)[8:] == b"{"
    if not is_safetensors:
        return _read_in_child(path, sha256, timeout_seconds)
    plain = read_tensor_file(path)
    return ForeignFile(
        path=path, sha256=sha256, container="safetensors", tensors=plain.tensors, metadata=plain.metadata
    )


def _in_folder(folder: Path) -> Path:
    """Return the one checkpoint in safetensors of a folder: an index of parts, or a single file."""
    found = sorted(folder.glob(f"*{_INDEX_ENDING}")) or sorted(folder.glob("*.safetensors"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found[:6]) or "none"
        raise ForeignFileRefusedError(
            f"{folder}: expected one .safetensors file, or parts with one *{_INDEX_ENDING}, found {names}; give the "
            "file itself"
        )
    return found[0]


def _read_parts(index: Path) -> ForeignFile:
    """Return all parts that an index names; each tensor must lie in the part that the index says, and in no other."""
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
        tensors=tensors,
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


def _read_in_child(path: Path, sha256: str, timeout_seconds: float) -> ForeignFile:
    with tempfile.TemporaryDirectory(prefix="ca2st-import-") as folder:
        job = ReadJob(
            path=path.resolve(), out=Path(folder) / "tensors.safetensors", cpu_seconds=int(timeout_seconds) + 1
        )
        answer = _ask_child(job, timeout_seconds)
        if answer["kind"] == "ok":
            tensors = read_tensor_file(job.out).tensors
            return ForeignFile(
                path=path, sha256=sha256, container=answer["container"], wrapper=answer["wrapper"], tensors=tensors
            )
    error = WeightsDamageError if answer["kind"] == "damage" else ForeignFileRefusedError
    raise error(f"{path}: {answer['message']}")


def _ask_child(job: ReadJob, timeout_seconds: float) -> dict[str, str]:
    ours, theirs = SPAWN.Pipe(duplex=False)
    child = SPAWN.Process(target=serve, args=(theirs, job), daemon=True)
    start_deaf(child)
    theirs.close()
    try:
        if not ours.poll(timeout_seconds):
            told = f"expected it to be read within {timeout_seconds:g} s, found it unfinished"
            return {"kind": "refused", "message": told}
        answer: dict[str, str] = json.loads(ours.recv_bytes(_MAX_ANSWER_BYTES))
        return answer
    except EOFError:
        child.join()
        code = child.exitcode
        how = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
        return {"kind": "refused", "message": f"the process that read it died ({how}); do not trust this file"}
    except OSError as error:
        raise EnvironmentFault(f"cannot talk to the process that reads {job.path}: {error}") from error
    finally:
        child.kill()
        child.join()
        ours.close()


MAX_DESCRIPTION_BYTES = 64 * 2**20
"""Largest `data.pkl` that is read; CLIP's has 0.2 MB."""

_DTYPES = {
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class _TensorRecord:
    """What the description says about one tensor; stands in for the function that rebuilds it."""

    def __init__(
        self,
        storage: tuple[torch.dtype, str],
        offset: int,
        shape: tuple[int, ...],
        stride: tuple[int, ...],
        *_rest: object,
    ) -> None:
        self.dtype, self.key = storage
        self.offset, self.shape, self.stride = int(offset), tuple(shape), tuple(stride)


class _Module:
    """Stands in for every class that the archive defines; keeps the attributes, has no behaviour."""

    def __init__(self, *_arguments: object) -> None:
        self.attributes: dict[str, Any] = {}

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            self.attributes = state


class _Description(pickle.Unpickler):
    """The restricted unpickler."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return _Module
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        known = {
            ("torch._utils", "_rebuild_tensor_v2"): _TensorRecord,
            ("collections", "OrderedDict"): dict,
            ("torch.jit._pickle", "build_intlist"): list,
            ("torch.jit._pickle", "build_doublelist"): list,
            ("torch.jit._pickle", "build_boollist"): list,
            ("torch.jit._pickle", "build_tensorlist"): list,
            ("torch.jit._pickle", "restore_type_tag"): lambda value, _type: value,
        }
        if (module, name) not in known:
            raise ForeignFileRefusedError(
                f"expected tensors and containers only, found the name {module}.{name} in data.pkl; "
                "an archive of weights does not need it, do not trust this file"
            )
        return known[module, name]

    def persistent_load(self, pid: Any) -> tuple[torch.dtype, str]:
        """('storage', type, key, device, number of elements): only type and key matter, sizes come from the zip."""
        kind, dtype, key = pid[:3]
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str):
            raise ForeignFileRefusedError("expected a storage, found another persistent object in data.pkl")
        return dtype, key


def read_torchscript(archive: zipfile.ZipFile) -> dict[str, Tensor]:
    """Return tensor attributes of all modules, under dotted names as in a state dict.

    The caller has checked that members are stored uncompressed and whole.

    Raises:
        ForeignFileRefusedError: the description needs more than tensors and containers.
        WeightsDamageError: a storage is missing or too short.
    """
    described = [info for info in archive.infolist() if info.filename.partition("/")[2] == "data.pkl"]
    if len(described) != 1:
        raise WeightsDamageError(f"expected one data.pkl in the archive, found {len(described)}")
    if described[0].file_size > MAX_DESCRIPTION_BYTES:
        raise ForeignFileRefusedError(
            f"expected a data.pkl of at most {MAX_DESCRIPTION_BYTES} bytes, found {described[0].file_size}"
        )
    root = _Description(io.BytesIO(archive.read(described[0]))).load()
    folder = described[0].filename.removesuffix("data.pkl")
    return {name: _tensor(archive, folder, record, name) for name, record in _records(root, "")}


def _records(value: object, prefix: str) -> Iterator[tuple[str, _TensorRecord]]:
    """Walk the module tree; a module that contains itself ends in RecursionError, which the caller reports."""
    if isinstance(value, _Module):
        for name, child in value.attributes.items():
            yield from _records(child, f"{prefix}.{name}" if prefix else str(name))
    elif isinstance(value, _TensorRecord):
        yield prefix, value


def _tensor(archive: zipfile.ZipFile, folder: str, record: _TensorRecord, name: str) -> Tensor:
    try:
        data = bytearray(archive.read(f"{folder}data/{record.key}"))
    except KeyError:
        raise WeightsDamageError(f"{name}: expected its storage data/{record.key} in the archive, found none") from None
    if sys.byteorder != "little":
        raise ForeignFileRefusedError("expected a little-endian machine: the archive's storages are little-endian")
    flat = torch.frombuffer(data, dtype=record.dtype) if data else torch.empty(0, dtype=record.dtype)
    numbers = (record.offset, *record.shape, *record.stride)
    if len(record.shape) != len(record.stride) or any(not isinstance(n, int) or n < 0 for n in numbers):
        raise WeightsDamageError(f"{name}: expected sizes and strides >= 0, found {record.shape}, {record.stride}")
    last = record.offset + sum((size - 1) * step for size, step in zip(record.shape, record.stride, strict=True))
    wanted = torch.Size(record.shape).numel()
    if wanted > flat.numel() or (wanted and last >= flat.numel()):
        raise WeightsDamageError(
            f"{name}: expected a storage for shape {list(record.shape)}, found {flat.numel()} elements"
        )
    return flat.as_strided(record.shape, record.stride, record.offset).clone()


WRAPPERS = ("model", "module", "state_dict", "model_state_dict")
"""Keys under which training programs keep the weights, in the order they are looked for."""
_MOST_WRAPPERS = 4

_FORBIDDEN_EVENTS = ("socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork", "ctypes.dlopen")
_ZIP_MAGIC = b"PK\x03\x04"
_PICKLE_MAGIC = b"\x80"
_SPARE_BYTES = 2**30
_NUMPY_SCALARS = ("Float16", "Float32", "Float64", "Int8", "Int16", "Int32", "Int64", "UInt8", "Bool")


def serve(connection: Connection, job: ReadJob) -> None:
    """Read, write, answer with one line of JSON; the child's whole life.

    The answer is not pickled: the parent trusts a child that touched a foreign file no more than the file.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    die_with_parent()
    _limit(job)
    sys.addaudithook(_refuse_reaching_out)
    connection.send_bytes(json.dumps(answer(job.path, job.out)).encode())


def answer(path: Path, out: Path) -> dict[str, str]:
    """Return what `read` gave or refused, as plain words: `kind` ok, damage or refused, with facts or a message."""
    try:
        container, wrapper = read(path, out)
    except CA2STError as error:
        return {"kind": "damage" if isinstance(error, WeightsDamageError) else "refused", "message": str(error)}
    except (MemoryError, RecursionError) as error:
        told = f"expected a checkpoint that needs memory for its own size, found {type(error).__name__}"
        return {"kind": "refused", "message": told}
    except Exception as error:  # noqa: BLE001  # whatever a hostile file provokes becomes one message
        return {"kind": "refused", "message": f"expected a checkpoint, found: {_first_line(error)}"}
    return {"kind": "ok", "container": container, "wrapper": wrapper}


def read(path: Path, out: Path) -> tuple[str, str]:
    """Read the tensors of `path` into the safetensors file `out`; return container and wrapper as in `ForeignFile`.

    Raises:
        ForeignFileRefusedError: the file asks for anything but data, or holds no tensors.
        WeightsDamageError: the file is not whole.
    """
    with path.open("rb") as file:
        magic = file.read(16)
    if not magic:
        raise WeightsDamageError("expected a checkpoint, found 0 bytes; fetch the file again")
    if magic.startswith(_ZIP_MAGIC):
        container, found = _read_zip(path)
    elif magic.startswith(_PICKLE_MAGIC):
        container, found = "torch.save pickle", _unpickle(path)
    else:
        raise ForeignFileRefusedError(
            f"expected a safetensors file, a torch.save file or a TorchScript archive, found a file that begins with "
            f"{magic!r}"
        )
    wrapper, tensors = _unwrap(found)
    _check_tensors(tensors)
    safetensors.torch.save_file({name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}, out)
    return container, wrapper


def _read_zip(path: Path) -> tuple[str, object]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.partition("/")[2] for name in archive.namelist()]
            scripted = "constants.pkl" in names or any(name.startswith("code/") for name in names)
            _check_archive(archive, path.stat().st_size, scripted=scripted)
            if scripted:
                return "TorchScript archive", read_torchscript(archive)
    # NotImplementedError is zipfile's own, for a method or feature no torch.save writes: a damaged header
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise WeightsDamageError(f"expected a whole zip archive, found: {error}; fetch the file again") from error
    return "torch.save zip", _unpickle(path)


def _check_archive(archive: zipfile.ZipFile, file_bytes: int, *, scripted: bool) -> None:
    """Check that members are stored as they are and fit into the file (no bombs), with right checksums."""
    infos = archive.infolist()
    if scripted:  # the programs are compressed, and never opened
        infos = [info for info in infos if info.filename.partition("/")[2].startswith("data")]
    if locked := [info.filename for info in infos if info.flag_bits & 1]:
        raise ForeignFileRefusedError(
            f"expected members without a password, as torch.save writes them, found {locked[0]} encrypted; fetch the "
            "file again, or save it without one"
        )
    packed = [info.filename for info in infos if info.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise ForeignFileRefusedError(
            f"expected members stored without compression, as torch.save writes them, found {packed[0]} compressed; "
            "a small file could unpack to any size"
        )
    claimed = sum(info.file_size for info in infos)
    if claimed > file_bytes or len({info.filename for info in infos}) != len(infos):
        raise ForeignFileRefusedError(
            f"expected distinct members that fit into the file's {file_bytes} bytes, found {len(infos)} of "
            f"{claimed} bytes together"
        )
    for info in infos:
        with archive.open(info) as member:  # raises BadZipFile when the checksum differs
            while member.read(2**22):
                pass


def _unpickle(path: Path) -> object:
    # Training programs put parsed options and NumPy scalars (best accuracy so far) beside the weights.
    scalar = np._core.multiarray.scalar  # type: ignore[attr-defined]  # NumPy pickles its scalars by this name
    types = [getattr(np.dtypes, f"{name}DType") for name in _NUMPY_SCALARS]
    scalars = [(scalar, name) for name in ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")]
    try:
        with (
            warnings.catch_warnings(),
            torch.serialization.safe_globals([argparse.Namespace, np.dtype, *types, *scalars]),
        ):
            warnings.simplefilter("ignore")  # about pickles that are refused right after
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ForeignFileRefusedError(
            f"expected tensors, containers, numbers and argparse.Namespace only, found: {_first_line(error)}; "
            "nothing of the file was run. Ask its author for a safetensors file"
        ) from error
    except (EOFError, OSError) as error:
        raise WeightsDamageError(f"expected a whole torch.save file, found: {_first_line(error)}") from error


def _unwrap(found: object) -> tuple[str, dict[str, Tensor]]:
    keys: list[str] = []
    while isinstance(found, Mapping) and len(keys) < _MOST_WRAPPERS and (key := _wrapper(found)):
        keys.append(key)
        found = found[key]
    if not isinstance(found, Mapping) or not found:
        raise ForeignFileRefusedError(
            f"expected a dict of tensors, or one under {', '.join(WRAPPERS)}, found {type(found).__name__}"
        )
    others = [str(name) for name, value in found.items() if not (isinstance(name, str) and isinstance(value, Tensor))]
    if others:
        shown = json.dumps(others[:8])
        raise ForeignFileRefusedError(f"expected tensors only among the weights, found other values under {shown}")
    return ".".join(keys), dict(found)


def _wrapper(found: Mapping[Any, object]) -> str:
    """Return the key of the weights: a known one, else the only one of nothing but named tensors, else nothing."""
    if known := next((key for key in WRAPPERS if isinstance(found.get(key), Mapping)), ""):
        return known
    states = [
        key
        for key, value in found.items()
        if isinstance(key, str) and isinstance(value, Mapping) and value
        if all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items())
    ]
    if len(states) > 1:
        raise ForeignFileRefusedError(
            f"expected one set of weights, found several, under {', '.join(map(repr, states[:8]))}; save the one that "
            "is wanted alone"
        )
    return states[0] if states else ""


def _check_tensors(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu" or tensor.is_complex():
            raise ForeignFileRefusedError(
                f"{name}: expected a plain dense tensor, found {tensor.layout} {tensor.dtype}"
            )
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ForeignFileRefusedError(
                f"{name}: expected {list(tensor.shape)} values in the file, found "
                f"{tensor.untyped_storage().nbytes()} bytes that claim to be as many"
            )


def _limit(job: ReadJob) -> None:
    size = job.path.stat().st_size
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    address_space = pages * os.sysconf("SC_PAGE_SIZE") + 4 * size + _SPARE_BYTES
    for limit, value in (
        (resource.RLIMIT_AS, address_space),
        (resource.RLIMIT_CPU, job.cpu_seconds),
        (resource.RLIMIT_FSIZE, 2 * size + _SPARE_BYTES),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(limit)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))


def _refuse_reaching_out(event: str, _arguments: object) -> None:
    if event.startswith(_FORBIDDEN_EVENTS):
        raise ForeignFileRefusedError(f"expected a file of weights, found one that tries {event}; do not trust it")


def _first_line(error: BaseException) -> str:
    """Return what was found, in a line: torch wraps it into a page of advice to switch checks off."""
    inner = error.__context__ if isinstance(error.__context__, pickle.UnpicklingError) else error
    line = str(inner).strip().partition("\n")[0].partition(" was not an allowed")[0]
    if not line or "weights_only" in line:
        line = "instructions that weights do not need"
    return f"{type(error).__name__}: {line[:200]}"
