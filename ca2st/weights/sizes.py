"""Sizes of a model read off the shapes of its tensors, and what no shape tells, from the caller."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from ca2st.model.config import EXPERTS, BridgeName, EncoderName, ModelConfig, ModelKind, TargetSpec, bridges_of_layer
from ca2st.model.tokens import NUM_AUDIO_PREFIX, audio_patches
from ca2st.spec import ClipSpec
from ca2st.weights.errors import WeightsMismatchError
from ca2st.weights.model_file import ModelDescription
from ca2st.weights.positions import least_mel_rows

HEAD_DIM = 64
"""Features of an attention head in every ViT that was published: 12 heads of 64 at ViT-B."""
_USUAL_MEL_ROWS = (400, 1024)
_USUAL_PATCHES = 14


@dataclass(frozen=True, kw_only=True, slots=True)
class UnwrittenSizes:
    """What the shapes of tensors do not tell."""

    num_heads: int | None = None
    """Attention heads; None: 64 features a head."""
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
    """Configuration of an expert alone whose tensors have our names. ResNet-50 has one size and fits every clip.

    Raises:
        UserInputError: a tensor that decides a size is missing or has another number of axes.
    """
    if encoder == "resnet50":
        return ALONE[encoder], ClipSpec()
    patch_embed = shape_of(tensors, "patch_embed.weight", ndim=5 if encoder == "videomae" else 4, where=where)
    dim, patch = patch_embed[0], patch_embed[-1]
    crop_size = sizes.crop_size or _USUAL_PATCHES * patch
    clip = ClipSpec(
        num_frames=sizes.num_frames or ClipSpec().num_frames,
        crop_size=_crop_size(tensors, "positions", patch, sizes, where=where) if encoder == "clip" else crop_size,
        mel_rows=sizes.mel_rows or ClipSpec().mel_rows,
    )
    config = replace(
        ALONE[encoder],
        dim=dim,
        depth=_depth(tensors, r"layers\.(\d+)\.", where=where),
        num_heads=_num_heads(dim, sizes, where=where),
        patch_size=patch,
    )
    return config, clip


def released_sizes(
    kind: ModelKind, tensors: Mapping[str, Tensor], sizes: UnwrittenSizes, *, where: str
) -> ModelDescription:
    """Description of a whole model whose tensors have the names of a released checkpoint.

    Raises:
        UserInputError: a tensor that decides a size is missing, has another number of axes, or contradicts `sizes`.
    """
    patch = shape_of(tensors, "clip_conv1.weight", ndim=4, where=where)[-1]
    depth = _depth(tensors, r"blocks\.(\d+)\.", where=where)
    last = f"blocks.{depth - 1}."
    model = _released_config(kind, tensors, sizes, depth=depth, where=where)
    clip = ClipSpec(
        num_frames=_num_frames(kind, tensors, last, sizes, where=where),
        crop_size=_crop_size(tensors, "clip_positional_embedding", patch, sizes, where=where),
        mel_rows=_mel_rows(model, tensors, sizes, where=where) if "audio" in EXPERTS[kind] else ClipSpec().mel_rows,
    )
    return ModelDescription(model=model, clip=clip, targets=_targets(tensors, sizes, where=where))


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


def _released_config(
    kind: ModelKind, tensors: Mapping[str, Tensor], sizes: UnwrittenSizes, *, depth: int, where: str
) -> ModelConfig:
    dim, _, _, patch = shape_of(tensors, "clip_conv1.weight", ndim=4, where=where)
    marks, last = _BRIDGE_MARKS[kind], f"blocks.{depth - 1}."
    width = shape_of(tensors, last + next(iter(marks.values())), ndim=2, where=where)[0]
    adapter = shape_of(tensors, f"{last}S_Adapter.D_fc1.weight", ndim=2, where=where)[0]
    plain = ModelConfig(
        kind=kind,
        dim=dim,
        depth=depth,
        num_heads=_num_heads(dim, sizes, where=where),
        patch_size=patch,
        adapter_ratio=adapter / dim,
        bottleneck_ratio=width / dim,
    )
    found = {name: sum(f"blocks.{i}.{mark}" in tensors for i in range(depth)) for name, mark in marks.items()}
    usual = {
        name: sum(bridge.name == name for layer in range(depth) for bridge in bridges_of_layer(plain, layer))
        for name in marks
    }
    other = {
        name: replace(getattr(plain, name), last_layers=count) for name, count in found.items() if count != usual[name]
    }
    return replace(plain, **other)


def shape_of(tensors: Mapping[str, Tensor], name: str, *, ndim: int, where: str) -> tuple[int, ...]:
    """Shape of a tensor that decides a size, without leading ones beyond `ndim` axes.

    Raises:
        WeightsMismatchError: it is not there, or is not of `ndim` axes.
    """
    if name not in tensors:
        found = ", ".join(sorted(tensors)[:6])
        raise WeightsMismatchError(
            f"{where}: expected the tensor {name}, which decides a size, found none (but {found}, ...); check --kind"
        )
    shape = tuple(tensors[name].shape)
    while len(shape) > ndim and shape[0] == 1:
        shape = shape[1:]
    if len(shape) != ndim or 0 in shape:
        raise WeightsMismatchError(
            f"{where}: {name}: expected {ndim} axes that are not empty, found shape {list(tensors[name].shape)}"
        )
    return shape


def _depth(names: Iterable[str], pattern: str, *, where: str) -> int:
    layers = {int(match[1]) for name in names if (match := re.match(pattern, name))}
    if not layers:
        raise WeightsMismatchError(f"{where}: expected at least one layer, found none; check --kind")
    if absent := sorted(set(range(max(layers) + 1)) - layers)[:8]:
        raise WeightsMismatchError(f"{where}: expected all layers up to {max(layers)}, found none of number {absent}")
    return max(layers) + 1


def _num_heads(dim: int, sizes: UnwrittenSizes, *, where: str) -> int:
    if sizes.num_heads is None and dim % HEAD_DIM:
        raise WeightsMismatchError(
            f"{where}: expected a width that is a multiple of {HEAD_DIM} features a head, found {dim}; give --heads"
        )
    return sizes.num_heads or dim // HEAD_DIM


def _crop_size(tensors: Mapping[str, Tensor], name: str, patch: int, sizes: UnwrittenSizes, *, where: str) -> int:
    rows = shape_of(tensors, name, ndim=2, where=where)[0]
    side = math.isqrt(max(rows - 1, 0))
    if side * side != rows - 1 or not side:
        raise WeightsMismatchError(
            f"{where}: {name}: expected one cls token and a square of patches, found {rows} rows"
        )
    if sizes.crop_size not in (None, side * patch):
        raise WeightsMismatchError(
            f"{where}: expected crops of {sizes.crop_size} pixels as asked, found positions for {side * patch}"
        )
    return side * patch


def _num_frames(kind: ModelKind, tensors: Mapping[str, Tensor], last: str, sizes: UnwrittenSizes, *, where: str) -> int:
    if kind == "cava":
        return sizes.num_frames or ClipSpec().num_frames
    table = "s_t_b_cast.r2l_cross.clip_time_pos" if kind == "ca2st" else "t2s_cross.clip_time_pos"
    found = 2 * shape_of(tensors, last + table, ndim=2, where=where)[0]
    if sizes.num_frames not in (None, found):
        raise WeightsMismatchError(f"{where}: expected {sizes.num_frames} frames as asked, found tables for {found}")
    return found


def _mel_rows(config: ModelConfig, tensors: Mapping[str, Tensor], sizes: UnwrittenSizes, *, where: str) -> int:
    tokens = shape_of(tensors, "ast_pos_embed", ndim=2, where=where)[0] - NUM_AUDIO_PREFIX
    frequencies = audio_patches(config, ClipSpec())[0]
    columns, rest = divmod(tokens, frequencies)
    if rest or columns < 1:
        raise WeightsMismatchError(
            f"{where}: ast_pos_embed: expected a grid of {frequencies} rows, found {tokens} patches"
        )
    least = least_mel_rows(config, columns)
    fitting = range(least, least + config.audio_stride)
    if sizes.mel_rows is not None and sizes.mel_rows not in fitting:
        raise WeightsMismatchError(
            f"{where}: expected positions for {sizes.mel_rows} mel rows, found them for {least} to {fitting[-1]}"
        )
    return sizes.mel_rows or next((rows for rows in _USUAL_MEL_ROWS if rows in fitting), least)


def _targets(tensors: Mapping[str, Tensor], sizes: UnwrittenSizes, *, where: str) -> tuple[TargetSpec, ...]:
    heads = {"verb": "head_verb.weight", "noun": "head_noun.weight"}
    if not any(name in tensors for name in heads.values()):
        heads = {sizes.target: "head.weight"}
    return tuple(
        TargetSpec(name=target, num_classes=shape_of(tensors, name, ndim=2, where=where)[0])
        for target, name in heads.items()
    )
