"""Weights for another clip or head: position tables fitted or refused, and the start of fine-tuning.

A column of spectrogram patches stands for a fixed time (10 rows of 10 ms), so a shorter spectrogram gets a part of the
table, around its centre, and only a longer one gets a stretched table. Learned tables show their grid by their number
of rows. VideoMAE's fixed table is in no file, so only the file's header can tell which clip it was trained on.
ResNet-50 has no tables: it runs on any crop.

Fine-tuning's first step (`transfer_weights`) is strict but for two things. Position tables may belong to another grid
(frames, crop, spectrogram length) and are interpolated when the caller says so; a classifier of another label space
starts anew. Two models of other structure are refused with the full list of what differs, settings that no tensor shows
included.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from glob import escape

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate

from ca2st.errors import listed
from ca2st.model.config import EXPERTS, EncoderName, ModelConfig, all_bridges, bridges_of_layer, encoder_of
from ca2st.model.network import HolisticModel
from ca2st.model.tokens import NUM_AUDIO_PREFIX, audio_patches, resize_table
from ca2st.spec import ClipSpec
from ca2st.weights.model_file import ModelDescription, least_mel_rows
from ca2st.weights.tensor_files import WeightsMismatchError, load_strictly

NUM_CLIP_PREFIX = 1
"""Rows before the patches of CLIP's table: that of the class token, which stays."""


def square_side(num_patches: int) -> int | None:
    """Return patches per side of a square grid; None where `num_patches` make no square."""
    side = math.isqrt(max(num_patches, 0))
    return side if side and side * side == num_patches else None


def fit_image_positions(
    table: Float[Tensor, "tokens dim"], *, side: int, num_prefix: int = 0
) -> Float[Tensor, "fitted dim"]:
    """Resize a table of `num_prefix` rows and a square of patches to `side` patches per side (bicubic).

    The caller has checked that the patches make a square.
    """
    prefix, patches = table[:num_prefix], table[num_prefix:]
    found = math.isqrt(patches.shape[0])
    return torch.cat((prefix, resize_table(patches, from_grid=(found, found), to_grid=(side, side))))


def fit_audio_positions(
    table: Float[Tensor, "tokens dim"], *, rows: int, columns: int, where: str, num_prefix: int = NUM_AUDIO_PREFIX
) -> Float[Tensor, "fitted dim"]:
    """Cut the grid of patches around its centre to `columns`, or stretch it bilinearly when there are more.

    The prefix tokens, two in AST, stay. `rows` is F', equal in both; the 12 x 101 grid of AudioSet files gives columns
    50 - T' // 2 onwards.

    Raises:
        WeightsMismatchError: the table is no grid of `rows` rows.
    """
    patches = table.shape[0] - num_prefix
    if patches < rows or patches % rows:
        raise WeightsMismatchError(
            f"{where}: positions: expected {num_prefix} prefix tokens and a grid of {rows} rows, "
            f"found {table.shape[0]} tokens; only 128 mel bins with stride 10 are known"
        )
    prefix, grid = table[:num_prefix], table[num_prefix:]
    grid = rearrange(grid, "(f t) d -> 1 d f t", f=rows)
    found = grid.shape[-1]
    if columns <= found:
        start = found // 2 - columns // 2
        grid = grid[..., start : start + columns]
    else:
        grid = interpolate(grid.float(), size=(rows, columns), mode="bilinear", align_corners=False)
    return torch.cat((prefix.to(grid.dtype), rearrange(grid, "1 d f t -> (f t) d")))


POSITIONS = "positions"
"""Name of the learned table in CLIP and AST."""


def fit_positions(
    state: Mapping[str, Tensor],
    encoder: EncoderName,
    *,
    config: ModelConfig,
    clip: ClipSpec,
    made_for: ClipSpec | None,
    where: str,
) -> Mapping[str, Tensor]:
    """Return an expert's weights with position tables for a model's clip.

    `made_for` is the clip that the file's header names, None where it names none. Tables that are no grid at all are
    left to the strict loader, which lists them.

    Raises:
        WeightsMismatchError: tables for another clip, and no setting that says so.
    """
    table = state.get(POSITIONS)
    if encoder == "videomae" and made_for is not None:
        _check_videomae(config, clip, made_for, where=where)
    elif encoder == "ast" and table is not None and table.ndim == 2:
        _check_ast(table.shape[0] - NUM_AUDIO_PREFIX, config, clip, where=where)
    elif encoder == "clip" and table is not None and table.ndim == 2:
        found = square_side(table.shape[0] - NUM_CLIP_PREFIX)
        patch, wanted = config.patch_size, clip.crop_size
        if found is None or found * patch == wanted:
            return state
        if config.pretrained_crop_size != found * patch:
            raise WeightsMismatchError(
                f"{where}: expected positions for crops of {wanted} pixels, found them for {found * patch}; "
                f"set model.pretrained_crop_size = {found * patch}, so that they are interpolated"
            )
        fitted = fit_image_positions(table, side=wanted // patch, num_prefix=NUM_CLIP_PREFIX)
        return dict(state) | {POSITIONS: fitted}
    return state


def _check_videomae(config: ModelConfig, clip: ClipSpec, made_for: ClipSpec, *, where: str) -> None:
    """Compare the settings with the file's clip: the model itself computes the table from them."""
    found = {"num_frames": made_for.num_frames, "crop_size": made_for.crop_size}
    read = _pretrained(config, clip)
    if wrong := [name for name in found if found[name] != read[name]]:
        told = ", ".join(f"{name} {read[name]}, found one trained with {found[name]}" for name in wrong)
        settings = " and ".join(f"model.pretrained_{name} = {found[name]}" for name in wrong)
        raise WeightsMismatchError(
            f"{where}: expected a VideoMAE for {told}; set {settings}, so that its position table is interpolated"
        )


def _check_ast(num_patches: int, config: ModelConfig, clip: ClipSpec, *, where: str) -> None:
    rows, columns = audio_patches(config, clip)
    found, rest = divmod(num_patches, rows)
    if num_patches > 0 and not rest and found != columns:
        least = least_mel_rows(config, found)
        raise WeightsMismatchError(
            f"{where}: expected positions for {clip.mel_rows} mel rows ({columns} columns of patches), found "
            f"them for {least} to {least + config.audio_stride - 1} ({found} columns); import the expert "
            f"again with `ca2st weights import --mel-rows {clip.mel_rows}`"
        )


def _pretrained(config: ModelConfig, clip: ClipSpec) -> dict[str, int]:
    return {
        "num_frames": config.pretrained_num_frames or clip.num_frames,
        "crop_size": config.pretrained_crop_size or clip.crop_size,
    }


_EXPERT_TABLE = re.compile(r"experts\.(?P<expert>[^.]+)\.positions")
_BRIDGE_TABLE = re.compile(
    r"layers\.\d+\.bridges\.[^.]+\.directions\.(?P<direction>[^.]+)"
    r"\.(?P<side>query|key)_positions\.(?P<axis>time|space)_table"
)
_PREFIX: dict[EncoderName, int] = {"clip": NUM_CLIP_PREFIX, "ast": NUM_AUDIO_PREFIX}


def _resized(model: HolisticModel, state: Mapping[str, Tensor], source: ClipSpec, *, where: str) -> dict[str, Tensor]:
    """Return the position tables of `state`, a model for the clip `source`, that are for another grid than `model`'s.

    A spectrogram's grid is compared by its columns. What is not a matter of the clip, such as another width, and what
    is no grid is left as it is to the strict comparison of shapes.
    """
    config = model.config
    ours, theirs = audio_patches(config, model.clip), audio_patches(config, source)
    resized: dict[str, Tensor] = {}
    for name, own in model.state_dict().items():
        table, place = state.get(name), _place_of(name, config)
        if table is None or table.ndim != 2 or place is None:
            continue
        encoder, axis, num_prefix = place
        rows, found = own.shape[0], table.shape[0]
        if encoder == "ast" and axis == "space":
            if ours[0] == theirs[0] and ours[1] != theirs[1]:
                resized[name] = fit_audio_positions(
                    table, rows=ours[0], columns=ours[1], num_prefix=num_prefix, where=f"{where}: {name}"
                )
        elif found != rows and axis == "time":
            resized[name] = resize_table(table, from_grid=(found,), to_grid=(rows,))
        elif found != rows:
            side, is_grid = square_side(rows - num_prefix), square_side(found - num_prefix) is not None
            resized[name] = fit_image_positions(table, side=side, num_prefix=num_prefix) if side and is_grid else table
    return resized


def _place_of(name: str, config: ModelConfig) -> tuple[EncoderName, str, int] | None:
    """Return the encoder whose tokens a position table is for, its axis, and its rows before the patches, or None."""
    if match := _EXPERT_TABLE.fullmatch(name):
        encoder = encoder_of(config, match["expert"])
        return encoder, "space", _PREFIX.get(encoder, 0)
    if match := _BRIDGE_TABLE.fullmatch(name):
        directions = {direction.name: direction for bridge in all_bridges(config) for direction in bridge.directions}
        direction = directions[match["direction"]]
        expert = direction.queries if match["side"] == "query" else direction.keys
        return encoder_of(config, expert), match["axis"], 0
    return None


SHOWN_BY_NO_TENSOR = (
    "num_heads",
    "audio_stride",
    "fusion",
    "combination",
    "time_code_layout",
    "resnet_grouping",
)
"""Settings that change what a model computes, and neither a name nor a shape of its tensors."""
_CLASSIFIER = re.compile(r"head\.classifiers\.(.+)\.(?:weight|bias)")


@dataclass(frozen=True, kw_only=True, slots=True)
class TransferReport:
    """What became of every tensor of the new model, sorted."""

    kept: tuple[str, ...]
    """Taken as they were."""
    resized: tuple[str, ...]
    """Position tables that were fitted to the new clip."""
    fresh: tuple[str, ...]
    """Left as a new model starts: the head, or the parts of it that the label space changes."""


def transfer_weights(
    model: HolisticModel,
    state: Mapping[str, Tensor],
    *,
    source: ModelDescription,
    where: str,
    resize_positions: bool,
    new_head: bool = False,
) -> TransferReport:
    """Put the state of one of our whole models, `source`, into `model`, all that fits by these rules or nothing.

    `new_head` leaves the whole head, last adapters included, as a new model starts; otherwise it is kept where the
    targets agree in name and number of classes. `where` names the source in messages.

    Raises:
        WeightsMismatchError: structures differ beyond clip and head, a position table differs without
            `resize_positions`, or VideoMAE's fixed table would become another one.
    """
    _refuse_other_settings(model, source, where=where)
    fresh, dropped = _other_heads(model, source, state, new_head=new_head)
    resized = _resized(model, state, source.clip, where=where)
    if resized and not resize_positions:
        raise WeightsMismatchError(
            f"{where}: expected position tables for the model's clip, found {len(resized)} for another: "
            f"{listed(sorted(resized), most=4)}; set start.resize_positions = true to interpolate them"
        )
    given = {name: tensor for name, tensor in (dict(state) | resized).items() if name not in fresh | dropped}
    load_strictly(model, given, where=where, allow_missing=[escape(name) for name in sorted(fresh)])
    return TransferReport(
        kept=tuple(sorted(given.keys() - resized.keys())),
        resized=tuple(sorted(resized)),
        fresh=tuple(sorted(fresh)),
    )


def _other_heads(
    model: HolisticModel, source: ModelDescription, state: Mapping[str, Tensor], *, new_head: bool
) -> tuple[set[str], set[str]]:
    """Return the head's tensors that start anew, and those of the source that the model rightly has no place for."""
    own = {name for name in model.state_dict() if name.startswith("head.")}
    given = {name for name in state if name.startswith("head.")}
    if new_head:
        return own, given
    classes = {target.name: target.num_classes for target in source.targets}
    others = {target.name for target in model.targets if classes.get(target.name) != target.num_classes}
    fresh = {name for name in own if (match := _CLASSIFIER.fullmatch(name)) is not None and match[1] in others}
    if classes.keys() == {target.name for target in model.targets}:
        return fresh, set()
    return fresh | (own - given), given - own  # label spaces of other names may have other last adapters too


def _refuse_other_settings(model: HolisticModel, source: ModelDescription, *, where: str) -> None:
    """Compare what no tensor shows; bridges are compared layer by layer, as their settings have many spellings."""
    ours, theirs = model.config, source.model
    _refuse(_other_experts(ours, theirs), where=where)
    told = [
        f"{name} {getattr(theirs, name)!r} there and {getattr(ours, name)!r} here"
        for name in SHOWN_BY_NO_TENSOR
        if getattr(theirs, name) != getattr(ours, name)
    ]
    if ours.depth == theirs.depth:
        layers = [i + 1 for i in range(ours.depth) if bridges_of_layer(ours, i) != bridges_of_layer(theirs, i)]
        if layers:
            numbers = ", ".join(map(str, layers))
            told.append(f"other cross-attention (windows, directions or positions) in layers {numbers}")
    # VideoMAE's table is computed from settings: a new clip must go on naming the clip it was pretrained on.
    if "videomae" in [encoder_of(ours, name) for name in EXPERTS[ours.kind]]:
        before, after = _pretrained(theirs, source.clip), _pretrained(ours, model.clip)
        told += [
            f"a VideoMAE pretrained with {name} {before[name]} there and {after[name]} here "
            f"(set model.pretrained_{name} = {before[name]})"
            for name in before
            if before[name] != after[name]
        ]
    _refuse(told, where=where)


def _refuse(told: Sequence[str], *, where: str) -> None:
    if told:
        raise WeightsMismatchError(
            f"{where}: expected a model of the same structure, found {'; '.join(told)}. Change the [model] section, "
            "or train from experts instead"
        )


def _other_experts(ours: ModelConfig, theirs: ModelConfig) -> list[str]:
    """Return where the experts themselves differ; all else then does too, and is not worth naming."""
    told = [f"kind {theirs.kind!r} there and {ours.kind!r} here"] * (ours.kind != theirs.kind)
    shared = [name for name in EXPERTS[ours.kind] if name in EXPERTS[theirs.kind]]
    return told + [
        f"the {name} expert {encoder_of(theirs, name)} there and {encoder_of(ours, name)} here"
        for name in shared
        if encoder_of(theirs, name) != encoder_of(ours, name)
    ]
