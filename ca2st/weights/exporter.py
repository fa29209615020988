"""`ca2st weights export`: a whole model in one safetensors file, under our names or the published ones."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ca2st.model.holistic import HolisticModel
from ca2st.weights.model_file import ModelDescription
from ca2st.weights.published import to_published
from ca2st.weights.tensor_file import write_tensor_file

NameScheme = Literal["ours", "published"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportReport:
    """What was written."""

    out: Path
    """The file."""
    names: NameScheme
    """Whose names the tensors have."""
    num_tensors: int
    """How many; published names give shared tensors twice."""
    sha256: str
    """Of the file."""


def export_model(
    model: HolisticModel, out: Path, *, names: NameScheme = "ours", notes: Mapping[str, str] | None = None
) -> ExportReport:
    """Write every tensor of `model`, its experts included, and in the header what the model is made of, with `notes`.

    Raises:
        UserInputError: a configuration that has no published names.
        EnvironmentFault: the file cannot be written.
    """
    tensors = to_published(model) if names == "published" else model.state_dict()
    sha256 = write_tensor_file(out, tensors, metadata=ModelDescription.of(model).metadata() | dict(notes or {}))
    return ExportReport(out=out, names=names, num_tensors=len(tensors), sha256=sha256)
