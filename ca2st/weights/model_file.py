"""A whole model as one file.

A whole model in one safetensors file: its tensors under our or published names, and what it is made of.

`ca2st weights export`: a whole model in one safetensors file, under our names or the published ones.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from reprlib import repr as shortened
from typing import Literal, Protocol, runtime_checkable

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from pydantic_core import from_json
from torch import Tensor

from ca2st.errors import CA2STError
from ca2st.model.config import ModelConfig, TargetSpec
from ca2st.model.network import HolisticModel
from ca2st.model.parameters import build_model
from ca2st.model.tokens import audio_patches, clip_grid, pretrained_grid
from ca2st.spec import ClipSpec
from ca2st.weights.errors import WeightsDamageError, WeightsMismatchError
from ca2st.weights.published import to_published
from ca2st.weights.tensor_files import LoadReport, load_strictly, read_tensor_file, write_tensor_file

MODEL_KEY = "ca2st_model"
"""Metadata key of the description."""
_FORMAT = 1
_NEWER = ("unexpected_keyword_argument", "literal_error")
"""Mistakes that the description of a newer version has."""
_MOST_MISTAKES = 4
_MOST_LEFT_OPEN = 2**29
"""Numbers of a model that its file need not give: fixed tables, and what a caller allows to be missing."""


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


@with_config(ConfigDict(extra="forbid", strict=True, allow_inf_nan=False))
@dataclass(frozen=True, kw_only=True, slots=True)
class _Header:
    """`ModelDescription` as it is written. Settings that a file does not name are younger: it has their defaults."""

    format: int
    model: ModelConfig
    clip: ClipSpec
    targets: tuple[TargetSpec, ...]


_HEADER = TypeAdapter(_Header)


def read_description(metadata: Mapping[str, str], *, where: str) -> ModelDescription | None:
    """The description in a file's metadata, or None where there is none.

    Raises:
        WeightsMismatchError: it is of a newer format, or has settings that are not known here.
        WeightsDamageError: it cannot be read, or has sizes that no model has.
    """
    if MODEL_KEY not in metadata:
        return None
    text = metadata[MODEL_KEY]
    try:
        written = from_json(text)
        number = written.get("format", _FORMAT) if isinstance(written, dict) else _FORMAT
        if number != _FORMAT:
            raise WeightsMismatchError(
                f"{where}: expected a model of format {_FORMAT}, found {shortened(number)}; use a newer ca2st"
            )
        header = _HEADER.validate_json(text)
    except ValidationError as error:
        raise _not_understood(error, where=where) from error
    except (ValueError, OverflowError) as error:  # the last: a width of hundreds of digits
        if isinstance(error, CA2STError):
            raise
        raise WeightsDamageError(f"{where}: cannot read the metadata key {MODEL_KEY!r}: {error}") from error
    description = ModelDescription(model=header.model, clip=header.clip, targets=header.targets)
    _check_sizes(description, where=where)
    return description


def _not_understood(error: ValidationError, *, where: str) -> CA2STError:
    """Settings of a newer version where all mistakes are such, damage otherwise."""
    mistakes = error.errors(include_url=False)
    if all(mistake["type"] in _NEWER for mistake in mistakes):
        names = [".".join(map(str, mistake["loc"])).removeprefix("model.") for mistake in mistakes]
        return WeightsMismatchError(
            f"{where}: expected settings that this ca2st knows, found {', '.join(sorted(names))}; use a newer ca2st"
        )
    told = [
        f"{'.'.join(map(str, mistake['loc']))}: {mistake['msg'].removeprefix('Value error, ')}, "
        f"found {shortened(mistake['input'])}"
        for mistake in mistakes[:_MOST_MISTAKES]
    ]
    return WeightsDamageError(f"{where}: cannot read the metadata key {MODEL_KEY!r}: {'; '.join(told)}")


def _check_sizes(description: ModelDescription, *, where: str) -> None:
    """Refuse sizes that would cost time or memory before names and shapes could be compared."""
    config, clip = description.model, description.clip
    tokens = max(math.prod(clip_grid(config, clip)), math.prod(pretrained_grid(config, clip)))
    sizes = {
        "depth": (config.depth, 1024),
        "dim": (config.dim, 2**16),
        "dim * adapter_ratio": (config.adapter_dim, 2**18),
        "dim * bottleneck_ratio": (config.bottleneck_dim, 2**18),
        "patch_size": (config.patch_size, 2**12),
        "tokens of a clip * dim": (tokens * config.dim, 2**26),
        "patches of a spectrogram": (math.prod(audio_patches(config, clip)), 2**20),
        "targets": (len(description.targets), 1024),
        "classes": (max((target.num_classes for target in description.targets), default=0), 2**24),
    }
    told = [f"{name} {size} (most: {most})" for name, (size, most) in sizes.items() if size > most]
    if told:
        raise WeightsDamageError(f"{where}: expected the sizes of a model in its header, found {', '.join(told)}")


@runtime_checkable
class ModelLoader(Protocol):
    """`load_strictly`, or the same for other names."""

    def __call__(
        self, model: HolisticModel, state: Mapping[str, Tensor], /, *, where: str, allow_missing: Sequence[str] = ()
    ) -> LoadReport:
        """Put all of `state` into `model`, or nothing."""


def build_described(
    description: ModelDescription,
    tensors: Mapping[str, Tensor],
    *,
    where: str,
    load: ModelLoader = load_strictly,
    allow_missing: Sequence[str] = (),
) -> tuple[HolisticModel, LoadReport]:
    """A model as described, with `tensors` in it; nothing is allocated before all names and shapes are those described.

    Raises:
        WeightsMismatchError: the tensors are not those of such a model.
        WeightsDamageError: what the tensors leave open is larger than in any model.
    """
    config, clip, targets = description.model, description.clip, description.targets
    if config.depth > len(tensors):
        raise WeightsMismatchError(
            f"{where}: expected the tensors of {config.depth} layers, as described, found {len(tensors)} in all"
        )
    with torch.device("meta"):
        tried = build_model(config, clip, targets)
    load(tried, tensors, where=where, allow_missing=allow_missing)
    left = sum(x.numel() for x in (*tried.parameters(), *tried.buffers())) - sum(x.numel() for x in tensors.values())
    if left > _MOST_LEFT_OPEN:
        raise WeightsDamageError(
            f"{where}: expected at most {_MOST_LEFT_OPEN} numbers that the file does not give, found {left}"
        )
    model = build_model(config, clip, targets)
    return model, load(model, tensors, where=where, allow_missing=allow_missing)


def refuse_published_names(names: Iterable[str], description: ModelDescription, *, path: Path) -> None:
    """Refuse a described model whose tensors are not under our names.

    Raises:
        WeightsMismatchError: saying how to translate them.
    """
    if not any(name.startswith("experts.") for name in names):
        raise WeightsMismatchError(
            f"{path}: expected tensors under our names (experts.*), found none: published names; run "
            f"`ca2st weights import --kind {description.model.kind} {path} --out OURS.safetensors` first and give that"
        )


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
    refuse_published_names(file.tensors, description, path=path)
    model, _ = build_described(description, file.tensors, where=str(path))
    return model.eval()


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
