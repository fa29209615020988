"""Reading safetensors files: the only weights format that is read at run time. Nothing is ever unpickled."""

from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ca2st.errors import UserInputError
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
