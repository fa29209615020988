"""Safetensors files: the only weights format that is read at run time. Nothing is ever unpickled."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ca2st.durable import write_bytes
from ca2st.errors import EnvironmentFault, UserInputError
from ca2st.weights.errors import WeightsDamageError


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorFile:
    """What a safetensors file holds."""

    path: Path
    """Where it was read."""
    tensors: dict[str, Tensor]
    """Tensors by name, on the CPU."""
    metadata: dict[str, str]
    """The header's free text fields."""


def read_tensor_file(path: Path) -> TensorFile:
    """Read all tensors of a safetensors file.

    Raises:
        UserInputError: there is no such file.
        WeightsDamageError: the file is not a whole safetensors file.
    """
    if not path.is_file():
        raise UserInputError(f"expected a safetensors file, found none at {path}; check the path")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
            return TensorFile(path=path, tensors=tensors, metadata=file.metadata() or {})
    except SafetensorError as error:
        raise WeightsDamageError(
            f"{path}: expected a whole safetensors file, found: {error}; copy or convert it again"
        ) from error


def read_tensor_metadata(path: Path) -> dict[str, str]:
    """The header's free text fields alone; raises as `read_tensor_file`."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
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


def check_finite(state: Mapping[str, Tensor], *, where: str) -> None:
    """Refuse tensors with values that are no numbers; `where` names the file they come from.

    Raises:
        WeightsDamageError: naming the tensors.
    """
    broken = [name for name, tensor in state.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise WeightsDamageError(
            f"{where}: expected finite float32 values, found NaN or infinity in {len(broken)} tensors: "
            f"{', '.join(broken[:8])}; fetch the file again"
        )
