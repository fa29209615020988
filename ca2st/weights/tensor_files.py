"""Tensors in safetensors files, read and compared strictly, and the errors of weights.

Safetensors are the only weights format that is read at run time: nothing is ever unpickled. Loading never loads half:
every tensor of the model is given, and every given tensor is used.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ca2st.durable import write_bytes
from ca2st.errors import DataDamageError, EnvironmentFault, UserInputError, listed


class WeightsMismatchError(UserInputError):
    """Weights that do not fit the model: tensors missing, left over, of another shape or at odds with each other."""


class ForeignFileRefusedError(UserInputError):
    """A foreign checkpoint that is not read: it asks for code, for too much, or is no checkpoint at all."""


class WeightsDamageError(DataDamageError):
    """A weights file that is not what was written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadReport:
    """Which names were used and which were not, sorted."""

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    """Tensors of the model that were not given, and that the caller allowed to be missing."""
    unexpected: tuple[str, ...]
    """Given tensors that the model does not have: known names that the method never uses."""


def load_strictly(
    module: nn.Module, state: Mapping[str, Tensor], *, where: str, allow_missing: Sequence[str] = ()
) -> LoadReport:
    """Copy `state` into `module`, all of it or nothing.

    Tensors are cast to the module's type. `where` names the source in messages; `allow_missing` are patterns such as
    `head.*`, each of which must match something that is missing.

    Raises:
        WeightsMismatchError: with the full list of what is missing, unexpected or of another shape.
    """
    own = module.state_dict()
    missing = own.keys() - state.keys()
    matches = {pattern: {name for name in missing if fnmatchcase(name, pattern)} for pattern in allow_missing}
    if idle := sorted(pattern for pattern, names in matches.items() if not names):
        raise WeightsMismatchError(f"{where}: allow_missing patterns match nothing that is missing: {', '.join(idle)}")
    allowed: set[str] = set().union(*matches.values())
    reshaped = [
        f"{name} expected {list(own[name].shape)}, found {list(state[name].shape)}"
        for name in sorted(own.keys() & state.keys())
        if own[name].shape != state[name].shape
    ]
    problems = {
        "missing": sorted(missing - allowed),
        "unexpected": sorted(state.keys() - own.keys()),
        "of another shape": reshaped,
        "not of a floating-point type": sorted(
            name for name, tensor in state.items() if not tensor.is_floating_point()
        ),
    }
    refuse_mismatch(problems, where=where)
    with torch.no_grad():
        for name, tensor in state.items():
            own[name].copy_(tensor)
    return LoadReport(loaded=tuple(sorted(state)), missing=tuple(sorted(allowed)), unexpected=())


def refuse_mismatch(problems: Mapping[str, Sequence[str]], *, where: str) -> None:
    """Raise if any list of `problems` (what is wrong: names) is not empty.

    Raises:
        WeightsMismatchError: naming all kinds of problems.
    """
    told = [f"{len(names)} {what}: {listed(names, most=12)}" for what, names in problems.items() if names]
    if told:
        raise WeightsMismatchError(
            f"{where}: expected exactly the tensors of the model, found {'; '.join(told)}. "
            "Check that kind, sizes, clip and classes of the model are those of the file"
        )


def without_leading_ones(tensor: Tensor, num_dims: int) -> Tensor:
    """Drop leading dimensions of size one until `num_dims` are left: published tables are `[1, tokens, dim]`."""
    while tensor.ndim > num_dims and tensor.shape[0] == 1:
        tensor = tensor[0]
    return tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorFile:
    """What a safetensors file holds: tensors on the CPU, and the free text fields of its header."""

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def read_tensor_file(path: Path) -> TensorFile:
    """Read all tensors of a safetensors file.

    Raises:
        UserInputError: there is no such file.
        WeightsDamageError: the file is not a whole safetensors file.
    """
    if not path.is_file():
        raise UserInputError(f"expected a safetensors file, found none at {path}; check the path")
    with _opened(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
        return TensorFile(path=path, tensors=tensors, metadata=file.metadata() or {})


def read_tensor_metadata(path: Path) -> dict[str, str]:
    """Return the header's free text fields alone; raises as `read_tensor_file`."""
    with _opened(path) as file:
        return file.metadata() or {}


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise WeightsDamageError(
            f"{path}: expected a whole safetensors file, found: {error}; copy or convert it again"
        ) from error


def check_writable_name(out: Path, *, source: Path) -> None:
    """Refuse a place that tensors cannot be written to, before any work is done.

    Raises:
        UserInputError: not a name of a safetensors file, a folder, or the file that is read.
    """
    if out.suffix != ".safetensors":
        raise UserInputError(f"--out: expected a name that ends in .safetensors, found {out}")
    if out.is_dir() or out.resolve() == source.resolve():
        raise UserInputError(f"--out: expected a file other than the one that is read, found {out}")


def write_tensor_file(path: Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str]) -> str:
    """Write tensors in the order of their names, whole or not at all; returns the sha256 of the file.

    Raises:
        EnvironmentFault: the file cannot be written.
    """
    ordered = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    data = safetensors.torch.save(ordered, metadata=dict(metadata))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentFault(f"cannot make the folder of {path}: {error.strerror}; choose another --out") from error
    write_bytes(path, data, point="weights")
    return hashlib.sha256(data).hexdigest()


def checksum(tensor: Tensor) -> str:
    """sha256 of a tensor's bytes in row-major order."""
    return hashlib.sha256(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
