"""A whole model in one safetensors file: its tensors under our or published names, and what it is made of."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ca2st.model.build import build_model
from ca2st.model.config import AudioVisualConfig, ModelConfig, SpatialTemporalConfig, TargetSpec
from ca2st.model.holistic import HolisticModel
from ca2st.spec import ClipSpec
from ca2st.weights.errors import WeightsDamageError, WeightsMismatchError
from ca2st.weights.strict import load_strictly
from ca2st.weights.tensor_file import read_tensor_file

MODEL_KEY = "ca2st_model"
"""Metadata key of the description."""
_FORMAT = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelDescription:
    """Everything `build_model` needs."""

    model: ModelConfig
    """Structure."""
    clip: ClipSpec
    """Sizes of a view."""
    targets: tuple[TargetSpec, ...]
    """What is predicted."""

    @classmethod
    def of(cls, model: HolisticModel) -> "ModelDescription":
        """What `model` is made of."""
        return cls(model=model.config, clip=model.clip, targets=model.targets)

    def metadata(self) -> dict[str, str]:
        """For the header of a safetensors file; `read_description` is its inverse."""
        return {MODEL_KEY: json.dumps({"format": _FORMAT, **asdict(self)}, sort_keys=True)}


def read_description(metadata: Mapping[str, str], *, where: str) -> ModelDescription | None:
    """The description in a file's metadata, or None where there is none.

    Raises:
        WeightsMismatchError: it is of a newer format, or has settings that are not known here.
        WeightsDamageError: it cannot be read.
    """
    if MODEL_KEY not in metadata:
        return None
    try:
        document: dict[str, Any] = json.loads(metadata[MODEL_KEY])
        if document["format"] != _FORMAT:
            raise WeightsMismatchError(
                f"{where}: expected a model of format {_FORMAT}, found {document['format']}; use a newer ca2st"
            )
        return ModelDescription(
            model=_model_config(document["model"], where=where),
            clip=ClipSpec(**document["clip"]),
            targets=tuple(TargetSpec(**target) for target in document["targets"]),
        )
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise WeightsDamageError(f"{where}: cannot read the metadata key {MODEL_KEY!r}: {error!r}") from error


def read_model_file(path: Path) -> HolisticModel:
    """The model in a file that `ca2st weights import` or `export` wrote with our names, in evaluation mode.

    Raises:
        UserInputError: no such file, or no whole model of ours.
        WeightsDamageError: the file is not what was written.
    """
    file = read_tensor_file(path)
    description = read_description(file.metadata, where=str(path))
    if description is None:
        raise WeightsMismatchError(f"{path}: expected a whole model (metadata key {MODEL_KEY!r}), found none")
    model = build_model(description.model, description.clip, description.targets)
    load_strictly(model, file.tensors, where=str(path))
    return model.eval()


_PARTS: dict[str, type[SpatialTemporalConfig | AudioVisualConfig]] = {
    "spatial_temporal": SpatialTemporalConfig,
    "audio_spatial": AudioVisualConfig,
    "audio_temporal": AudioVisualConfig,
}


def _model_config(document: dict[str, Any], *, where: str) -> ModelConfig:
    """Settings that a file does not name are younger than the file: it has their defaults."""
    made = {
        name: part(**_known(part, document.get(name, {}), section=f"{name}.", where=where))
        for name, part in _PARTS.items()
    }
    return ModelConfig(**{**_known(ModelConfig, document, section="", where=where), **made})


def _known(
    config_type: type[ModelConfig | SpatialTemporalConfig | AudioVisualConfig],
    document: Mapping[str, Any],
    *,
    section: str,
    where: str,
) -> dict[str, Any]:
    """Arguments of a configuration out of JSON, where a tuple is a list."""
    if unknown := sorted(document.keys() - {entry.name for entry in fields(config_type)}):
        raise WeightsMismatchError(
            f"{where}: expected settings that this ca2st knows, found "
            f"{', '.join(section + name for name in unknown)}; use a newer ca2st"
        )
    return {name: tuple(value) if isinstance(value, list) else value for name, value in document.items()}
