"""The expert store: frozen experts are kept once, under the hash of their bytes, and checked whenever they are read."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load, save
from torch import Tensor

from ca2st.durable import NO_FAULTS, FaultPoints, write_bytes
from ca2st.errors import UserInputError
from ca2st.weights.errors import WeightsDamageError


@dataclass(frozen=True, slots=True)
class ExpertStore:
    """A folder of files `<sha256>.safetensors`."""

    folder: Path
    """Usually `experts` beside the checkpoints; made when the first expert is put."""

    def put(self, state: Mapping[str, Tensor], *, faults: FaultPoints = NO_FAULTS) -> str:
        """Keep the tensors and return their sha256 (of the file's bytes). Equal tensors are kept once.

        Raises:
            EnvironmentFault: the folder cannot be written.
        """
        data = save({name: state[name].detach().cpu().contiguous() for name in sorted(state)})
        sha256 = hashlib.sha256(data).hexdigest()
        path = self.path(sha256)
        if not (path.is_file() and _hash_of(path) == sha256):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_bytes(path, data, faults=faults, point="expert")
        return sha256

    def get(self, sha256: str) -> dict[str, Tensor]:
        """The tensors that were put, on the CPU.

        Raises:
            UserInputError: the store has no such expert.
            WeightsDamageError: the file's bytes are not those that were put.
        """
        path = self.path(sha256)
        if not path.is_file():
            raise UserInputError(
                f"expected an expert at {path}, found none; copy the experts folder with the checkpoints"
            )
        data = path.read_bytes()
        found = hashlib.sha256(data).hexdigest()
        if found != sha256:
            raise WeightsDamageError(
                f"{path}: expected sha256 {sha256}, found {found}: the file is damaged; restore it from a copy"
            )
        return load(data)

    def path(self, sha256: str) -> Path:
        """Where the expert of this hash is kept."""
        return self.folder / f"{sha256}.safetensors"


def _hash_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
