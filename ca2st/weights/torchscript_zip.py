"""Tensors out of a TorchScript archive (as the official CLIP `.pt` is) without running anything in it.

Such an archive is a zip: `data.pkl` describes the module tree, `data/<key>` hold the raw storages, `code/` holds
programs, which are never opened. The description is read by an unpickler that knows nothing but tensor records, plain
containers and inert stand-ins for the archive's own classes; every other name is refused.
"""

import io
import pickle  # only to derive the restricted unpickler below
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ca2st.weights.errors import ForeignFileRefusedError, WeightsDamageError

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


@dataclass(frozen=True, slots=True)
class _TensorRecord:
    """What the description says about one tensor."""

    dtype: torch.dtype
    key: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


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
            ("torch._utils", "_rebuild_tensor_v2"): _record,
            ("collections", "OrderedDict"): dict,
            ("torch.jit._pickle", "build_intlist"): list,
            ("torch.jit._pickle", "build_doublelist"): list,
            ("torch.jit._pickle", "build_boollist"): list,
            ("torch.jit._pickle", "build_tensorlist"): list,
            ("torch.jit._pickle", "restore_type_tag"): _untagged,
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


def _record(
    storage: tuple[torch.dtype, str], offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *_rest: object
) -> _TensorRecord:
    dtype, key = storage
    return _TensorRecord(dtype=dtype, key=key, offset=int(offset), shape=tuple(shape), stride=tuple(stride))


def _untagged(value: object, _type: str) -> object:
    return value


def is_torchscript(archive: zipfile.ZipFile) -> bool:
    """Whether a torch zip holds programs beside tensors."""
    names = [name.partition("/")[2] for name in archive.namelist()]
    return "constants.pkl" in names or any(name.startswith("code/") for name in names)


def read_torchscript(archive: zipfile.ZipFile) -> dict[str, Tensor]:
    """Tensor attributes of all modules, under dotted names as in a state dict.

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
