"""Whole models in files: what the header says about a model, or the shapes of its tensors tell; reading and writing."""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from reprlib import repr as shortened
from typing import Literal

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from pydantic_core import from_json
from torch import Tensor

from ca2st.errors import CA2STError
from ca2st.model.config import EXPERTS, BridgeName, EncoderName, ModelConfig, ModelKind, TargetSpec, bridges_of_layer
from ca2st.model.network import HolisticModel, build_model
from ca2st.model.tokens import NUM_AUDIO_PREFIX, audio_patches, clip_grid, pretrained_grid
from ca2st.spec import ClipSpec
from ca2st.weights import tensor_files
from ca2st.weights.published import to_published

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
    clip: ClipSpec
    targets: tuple[TargetSpec, ...]

    @classmethod
    def of(cls, model: HolisticModel) -> "ModelDescription":
        """Return what `model` is made of."""
        return cls(model=model.config, clip=model.clip, targets=model.targets)

    def metadata(self) -> dict[str, str]:
        """For the header of a safetensors file; `read_description` is its inverse."""
        return {MODEL_KEY: json.dumps({"format": _FORMAT, **asdict(self)}, sort_keys=True)}


@with_config(ConfigDict(extra="forbid", strict=True, allow_inf_nan=False))
@dataclass(frozen=True, kw_only=True, slots=True)
class _Header(ModelDescription):
    """`ModelDescription` as it is written. Settings that a file does not name are younger: it has their defaults."""

    format: int


_HEADER = TypeAdapter(_Header)


def read_description(metadata: Mapping[str, str], *, where: str) -> ModelDescription | None:
    """Return the description in a file's metadata, or None where there is none.

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
            raise tensor_files.WeightsMismatchError(
                f"{where}: expected a model of format {_FORMAT}, found {shortened(number)}; use a newer ca2st"
            )
        header = _HEADER.validate_json(text)
    except ValidationError as error:
        raise _not_understood(error, where=where) from error
    except (ValueError, OverflowError) as error:  # the last: a width of hundreds of digits
        if isinstance(error, CA2STError):
            raise
        raise tensor_files.WeightsDamageError(
            f"{where}: cannot read the metadata key {MODEL_KEY!r}: {error}"
        ) from error
    description = ModelDescription(model=header.model, clip=header.clip, targets=header.targets)
    _check_sizes(description, where=where)
    return description


def _not_understood(error: ValidationError, *, where: str) -> CA2STError:
    """Return settings of a newer version where all mistakes are such, damage otherwise."""
    mistakes = error.errors(include_url=False)
    if all(mistake["type"] in _NEWER for mistake in mistakes):
        names = [".".join(map(str, mistake["loc"])).removeprefix("model.") for mistake in mistakes]
        return tensor_files.WeightsMismatchError(
            f"{where}: expected settings that this ca2st knows, found {', '.join(sorted(names))}; use a newer ca2st"
        )
    told = [
        f"{'.'.join(map(str, mistake['loc']))}: {mistake['msg'].removeprefix('Value error, ')}, "
        f"found {shortened(mistake['input'])}"
        for mistake in mistakes[:_MOST_MISTAKES]
    ]
    return tensor_files.WeightsDamageError(f"{where}: cannot read the metadata key {MODEL_KEY!r}: {'; '.join(told)}")


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
        raise tensor_files.WeightsDamageError(
            f"{where}: expected the sizes of a model in its header, found {', '.join(told)}"
        )


def build_described(
    description: ModelDescription,
    tensors: Mapping[str, Tensor],
    *,
    where: str,
    load: Callable[..., tensor_files.LoadReport] = tensor_files.load_strictly,
    allow_missing: Sequence[str] = (),
) -> tuple[HolisticModel, tensor_files.LoadReport]:
    """Return a model as described, with `tensors` in it; nothing is allocated before all names and shapes are right.

    `load` is `load_strictly`, or the same for other names.

    Raises:
        WeightsMismatchError: the tensors are not those of such a model.
        WeightsDamageError: what the tensors leave open is larger than in any model.
    """
    config, clip, targets = description.model, description.clip, description.targets
    if config.depth > len(tensors):
        raise tensor_files.WeightsMismatchError(
            f"{where}: expected the tensors of {config.depth} layers, as described, found {len(tensors)} in all"
        )
    with torch.device("meta"):
        tried = build_model(config, clip, targets)
    load(tried, tensors, where=where, allow_missing=allow_missing)
    left = sum(x.numel() for x in (*tried.parameters(), *tried.buffers())) - sum(x.numel() for x in tensors.values())
    if left > _MOST_LEFT_OPEN:
        raise tensor_files.WeightsDamageError(
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
        raise tensor_files.WeightsMismatchError(
            f"{path}: expected tensors under our names (experts.*), found none: published names; run "
            f"`ca2st weights import --kind {description.model.kind} {path} --out OURS.safetensors` first and give that"
        )


NameScheme = Literal["ours", "published"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportReport:
    """What was written."""

    out: Path
    names: NameScheme
    num_tensors: int
    """How many; published names give shared tensors twice."""
    sha256: str


def export_model(
    model: HolisticModel, out: Path, *, names: NameScheme = "ours", notes: Mapping[str, str] | None = None
) -> ExportReport:
    """Write every tensor of `model`, its experts included, and in the header what the model is made of, with `notes`.

    Raises:
        UserInputError: a configuration that has no published names.
        EnvironmentFault: the file cannot be written.
    """
    tensors = to_published(model) if names == "published" else model.state_dict()
    sha256 = tensor_files.write_tensor_file(
        out, tensors, metadata=ModelDescription.of(model).metadata() | dict(notes or {})
    )
    return ExportReport(out=out, names=names, num_tensors=len(tensors), sha256=sha256)


HEAD_DIM = 64
"""Features of an attention head in every ViT that was published: 12 heads of 64 at ViT-B."""
_USUAL_MEL_ROWS = (400, 1024)
_USUAL_PATCHES = 14


@dataclass(frozen=True, kw_only=True, slots=True)
class UnwrittenSizes:
    """What the shapes of tensors do not tell."""

    num_heads: int | None = None
    """Attention heads; None: 64 features per head."""
    mel_rows: int | None = None
    """Spectrogram rows; None: 400 for an expert, what fits the positions for a whole model (400 and 1024 first)."""
    num_frames: int | None = None
    """Frames of a clip where no table in the file depends on them (VideoMAE, CAVA); None: 16."""
    crop_size: int | None = None
    """Pixels of a crop where no table in the file depends on them (VideoMAE); None: 14 patches, 224 at ViT-B/16."""
    target: str = "label"
    """Name of the single label space of a whole model."""


ALONE: dict[EncoderName, ModelConfig] = {
    "clip": ModelConfig(kind="spatial", adapters=False),
    "videomae": ModelConfig(kind="temporal", adapters=False),
    "ast": ModelConfig(kind="audio", adapters=False),
    "resnet50": ModelConfig(kind="spatial", spatial_encoder="resnet50", adapters=False),
}
"""Each encoder as the only expert of a model: what it is built as to be loaded."""


def expert_sizes(
    encoder: EncoderName, tensors: Mapping[str, Tensor], sizes: UnwrittenSizes, *, where: str
) -> tuple[ModelConfig, ClipSpec]:
    """Return configuration of an expert alone whose tensors have our names. ResNet-50 has one size and fits every clip.

    Raises:
        UserInputError: a tensor that decides a size is missing or has another number of axes.
    """
    if encoder == "resnet50":
        return ALONE[encoder], ClipSpec()
    file = _Evidence(tensors, sizes, where)
    dim, *_, patch = file.shape_of("patch_embed.weight", ndim=5 if encoder == "videomae" else 4)
    crop_size = sizes.crop_size or _USUAL_PATCHES * patch
    clip = ClipSpec(
        num_frames=sizes.num_frames or ClipSpec().num_frames,
        crop_size=file.crop_size("positions", patch) if encoder == "clip" else crop_size,
        mel_rows=sizes.mel_rows or ClipSpec().mel_rows,
    )
    depth, num_heads = file.depth(r"layers\.(\d+)\."), file.num_heads(dim)
    return replace(ALONE[encoder], dim=dim, depth=depth, num_heads=num_heads, patch_size=patch), clip


_BRIDGE_MARKS: dict[ModelKind, dict[BridgeName, str]] = {
    "cast": {"spatial_temporal": "cross_s_down.weight"},
    "cava": {"audio_spatial": "cross_s_down.weight"},
    "ca2st": {
        "spatial_temporal": "s_t_b_cast.cross_l_down.weight",
        "audio_spatial": "s_audio_b_cast.cross_l_down.weight",
        "audio_temporal": "t_audio_b_cast.cross_l_down.weight",
    },
}
"""A tensor of each bridge, below a block that carries it; the first one tells the width of the bottleneck."""


def released_sizes(
    kind: ModelKind, tensors: Mapping[str, Tensor], sizes: UnwrittenSizes, *, where: str
) -> ModelDescription:
    """Return description of a whole model whose tensors have the names of a released checkpoint.

    Raises:
        UserInputError: a tensor that decides a size is missing, has another number of axes, or contradicts `sizes`.
    """
    file, marks = _Evidence(tensors, sizes, where), _BRIDGE_MARKS[kind]
    dim, _, _, patch = file.shape_of("clip_conv1.weight", ndim=4)
    depth = file.depth(r"blocks\.(\d+)\.")
    last = f"blocks.{depth - 1}."
    model = ModelConfig(
        kind=kind,
        dim=dim,
        depth=depth,
        num_heads=file.num_heads(dim),
        patch_size=patch,
        bottleneck_ratio=file.shape_of(last + next(iter(marks.values())), ndim=2)[0] / dim,
        adapter_ratio=file.shape_of(f"{last}S_Adapter.D_fc1.weight", ndim=2)[0] / dim,
    )
    usual = Counter(bridge.name for layer in range(depth) for bridge in bridges_of_layer(model, layer))
    for name, mark in marks.items():
        found = sum(f"blocks.{i}.{mark}" in tensors for i in range(depth))
        if found != usual[name]:
            model = replace(model, **{name: replace(getattr(model, name), last_layers=found)})
    clip = ClipSpec(
        num_frames=file.num_frames(kind, last),
        crop_size=file.crop_size("clip_positional_embedding", patch),
        mel_rows=file.mel_rows(model) if "audio" in EXPERTS[kind] else ClipSpec().mel_rows,
    )
    heads = {"verb": "head_verb.weight", "noun": "head_noun.weight"}
    if not any(name in tensors for name in heads.values()):
        heads = {sizes.target: "head.weight"}
    targets = tuple(
        TargetSpec(name=target, num_classes=file.shape_of(name, ndim=2)[0]) for target, name in heads.items()
    )
    return ModelDescription(model=model, clip=clip, targets=targets)


@dataclass(frozen=True, slots=True)
class _Evidence:
    """What tells the sizes of a model: its tensors, and what the caller says."""

    tensors: Mapping[str, Tensor]
    sizes: UnwrittenSizes
    where: str

    def refusal(self, told: str) -> tensor_files.WeightsMismatchError:
        return tensor_files.WeightsMismatchError(f"{self.where}: {told}")

    def shape_of(self, name: str, *, ndim: int) -> tuple[int, ...]:
        """Return the shape of a tensor that decides a size, without leading ones beyond `ndim` axes."""
        if name not in self.tensors:
            found = ", ".join(sorted(self.tensors)[:6])
            raise self.refusal(
                f"expected the tensor {name}, which decides a size, found none (but {found}, ...); check --kind"
            )
        tensor = tensor_files.without_leading_ones(self.tensors[name], ndim)
        if tensor.ndim != ndim or 0 in tensor.shape:
            shape = list(self.tensors[name].shape)
            raise self.refusal(f"{name}: expected {ndim} axes that are not empty, found shape {shape}")
        return tuple(tensor.shape)

    def depth(self, pattern: str) -> int:
        layers = {int(match[1]) for name in self.tensors if (match := re.match(pattern, name))}
        if not layers:
            raise self.refusal("expected at least one layer, found none; check --kind")
        if absent := sorted(set(range(max(layers) + 1)) - layers)[:8]:
            raise self.refusal(f"expected all layers up to {max(layers)}, found none of number {absent}")
        return max(layers) + 1

    def num_heads(self, dim: int) -> int:
        if self.sizes.num_heads is None and dim % HEAD_DIM:
            raise self.refusal(
                f"expected a width that is a multiple of {HEAD_DIM} features per head, found {dim}; give --heads"
            )
        return self.sizes.num_heads or dim // HEAD_DIM

    def crop_size(self, table: str, patch: int) -> int:
        rows, asked = self.shape_of(table, ndim=2)[0], self.sizes.crop_size
        side = math.isqrt(max(rows - 1, 0))
        if side * side != rows - 1 or not side:
            raise self.refusal(f"{table}: expected one cls token and a square of patches, found {rows} rows")
        if asked not in (None, side * patch):
            raise self.refusal(f"expected crops of {asked} pixels as asked, found positions for {side * patch}")
        return side * patch

    def num_frames(self, kind: ModelKind, last: str) -> int:
        asked = self.sizes.num_frames
        if kind == "cava":
            return asked or ClipSpec().num_frames
        table = "s_t_b_cast.r2l_cross.clip_time_pos" if kind == "ca2st" else "t2s_cross.clip_time_pos"
        found = 2 * self.shape_of(last + table, ndim=2)[0]
        if asked not in (None, found):
            raise self.refusal(f"expected {asked} frames as asked, found tables for {found}")
        return found

    def mel_rows(self, config: ModelConfig) -> int:
        asked = self.sizes.mel_rows
        tokens = self.shape_of("ast_pos_embed", ndim=2)[0] - NUM_AUDIO_PREFIX
        frequencies = audio_patches(config, ClipSpec())[0]
        columns, rest = divmod(tokens, frequencies)
        if rest or columns < 1:
            raise self.refusal(f"ast_pos_embed: expected a grid of {frequencies} rows, found {tokens} patches")
        least = least_mel_rows(config, columns)
        fitting = range(least, least + config.audio_stride)
        if asked is not None and asked not in fitting:
            raise self.refusal(f"expected positions for {asked} mel rows, found them for {least} to {fitting[-1]}")
        return asked or next((rows for rows in _USUAL_MEL_ROWS if rows in fitting), least)


def least_mel_rows(config: ModelConfig, columns: int) -> int:
    """Return rows of the shortest spectrogram that has `columns` columns of patches."""
    return (columns - 1) * config.audio_stride + config.patch_size
