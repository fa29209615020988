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
from collections.abc import Callable, Mapping, Sequence
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


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertPlace:
    """Where an expert's weights are to go."""

    encoder: EncoderName
    """What the expert is."""
    config: ModelConfig
    """Structure of the model."""
    clip: ClipSpec
    """Sizes of its view."""


def fit_positions(
    state: Mapping[str, Tensor], place: ExpertPlace, *, made_for: ClipSpec | None, where: str
) -> dict[str, Tensor]:
    """Return the weights with position tables for the model's clip.

    `made_for` is the clip that the file's header names, None where it names none. Tables that are no grid at all are
    left to the strict loader, which lists them.

    Raises:
        WeightsMismatchError: tables for another clip, and no setting that says so.
    """
    return _FITTING[place.encoder](dict(state), place, made_for, where)


def _fit_clip(
    state: dict[str, Tensor], place: ExpertPlace, _made_for: ClipSpec | None, where: str
) -> dict[str, Tensor]:
    table = state.get(POSITIONS)
    found = square_side(table.shape[0] - NUM_CLIP_PREFIX) if table is not None and table.ndim == 2 else None
    patch, wanted = place.config.patch_size, place.clip.crop_size
    if table is None or found is None or found * patch == wanted:
        return state
    if place.config.pretrained_crop_size != found * patch:
        raise WeightsMismatchError(
            f"{where}: expected positions for crops of {wanted} pixels, found them for {found * patch}; "
            f"set model.pretrained_crop_size = {found * patch}, so that they are interpolated"
        )
    return state | {POSITIONS: fit_image_positions(table, side=wanted // patch, num_prefix=NUM_CLIP_PREFIX)}


def _check_videomae(
    state: dict[str, Tensor], place: ExpertPlace, made_for: ClipSpec | None, where: str
) -> dict[str, Tensor]:
    """Return the table is computed, by the model, from the same settings; here only whether they fit the file."""
    if made_for is None:
        return state
    config, clip = place.config, place.clip
    found = {"num_frames": made_for.num_frames, "crop_size": made_for.crop_size}
    read = {
        "num_frames": config.pretrained_num_frames or clip.num_frames,
        "crop_size": config.pretrained_crop_size or clip.crop_size,
    }
    if wrong := [name for name in found if found[name] != read[name]]:
        told = ", ".join(f"{name} {read[name]}, found one trained with {found[name]}" for name in wrong)
        settings = " and ".join(f"model.pretrained_{name} = {found[name]}" for name in wrong)
        raise WeightsMismatchError(
            f"{where}: expected a VideoMAE for {told}; set {settings}, so that its position table is interpolated"
        )
    return state


def _check_ast(
    state: dict[str, Tensor], place: ExpertPlace, _made_for: ClipSpec | None, where: str
) -> dict[str, Tensor]:
    table = state.get(POSITIONS)
    rows, columns = audio_patches(place.config, place.clip)
    patches = table.shape[0] - NUM_AUDIO_PREFIX if table is not None and table.ndim == 2 else 0
    if patches > 0 and patches % rows == 0 and patches // rows != columns:
        found = patches // rows
        least = least_mel_rows(place.config, found)
        raise WeightsMismatchError(
            f"{where}: expected positions for {place.clip.mel_rows} mel rows ({columns} columns of patches), found "
            f"them for {least} to {least + place.config.audio_stride - 1} ({found} columns); import the expert "
            f"again with `ca2st weights import --mel-rows {place.clip.mel_rows}`"
        )
    return state


def _as_it_is(
    state: dict[str, Tensor], _place: ExpertPlace, _made_for: ClipSpec | None, _where: str
) -> dict[str, Tensor]:
    return state


_FITTING: dict[EncoderName, Callable[[dict[str, Tensor], ExpertPlace, ClipSpec | None, str], dict[str, Tensor]]] = {
    "clip": _fit_clip,
    "videomae": _check_videomae,
    "ast": _check_ast,
    "resnet50": _as_it_is,
}


_EXPERT_TABLE = re.compile(r"experts\.(?P<expert>[^.]+)\.positions")
_BRIDGE_TABLE = re.compile(
    r"layers\.\d+\.bridges\.(?P<bridge>[^.]+)\.directions\.(?P<direction>[^.]+)"
    r"\.(?P<side>query|key)_positions\.(?P<axis>time|space)_table"
)
_PREFIX: dict[EncoderName, int] = {"clip": NUM_CLIP_PREFIX, "ast": NUM_AUDIO_PREFIX}


def is_position_table(name: str) -> bool:
    """Whether a tensor of a whole model depends on the clip: the experts' learned positions and those of B-CA."""
    return bool(_EXPERT_TABLE.fullmatch(name) or _BRIDGE_TABLE.fullmatch(name))


@dataclass(frozen=True, kw_only=True, slots=True)
class PositionFitter:
    """Position tables of a model for the clip `source`, and their form for `clip`."""

    config: ModelConfig
    """Structure, the same in both."""
    clip: ClipSpec
    """What tables are wanted for."""
    source: ClipSpec
    """What they were made for."""
    where: str
    """The source, in messages."""

    def differs(self, name: str, table: Tensor, *, rows: int) -> bool:
        """Return whether a table is for another grid than the one wanted, which has `rows` rows in it.

        A spectrogram's grid is compared by its columns: what is not a matter of the clip, such as another width, is
        left to the strict comparison of shapes.
        """
        encoder, axis, _ = self._place(name)
        if encoder == "ast" and axis == "space":
            ours, theirs = audio_patches(self.config, self.clip), audio_patches(self.config, self.source)
            return table.ndim == 2 and ours[0] == theirs[0] and ours[1] != theirs[1]
        return table.ndim == 2 and table.shape[0] != rows

    def fit(self, name: str, table: Tensor, *, rows: int) -> Tensor:
        """Return the table with `rows` rows; unchanged where neither it nor what is wanted is a grid."""
        encoder, axis, num_prefix = self._place(name)
        if axis == "time":
            return resize_table(table, from_grid=(table.shape[0],), to_grid=(rows,))
        if encoder == "ast":
            frequencies, columns = audio_patches(self.config, self.clip)
            return fit_audio_positions(
                table, rows=frequencies, columns=columns, num_prefix=num_prefix, where=f"{self.where}: {name}"
            )
        side = square_side(rows - num_prefix)
        if side is None or square_side(table.shape[0] - num_prefix) is None:
            return table
        return fit_image_positions(table, side=side, num_prefix=num_prefix)

    def _place(self, name: str) -> tuple[EncoderName, str, int]:
        """Return encoder whose tokens the table is for, its axis, and the rows before the patches."""
        if match := _EXPERT_TABLE.fullmatch(name):
            encoder = encoder_of(self.config, match["expert"])
            return encoder, "space", _PREFIX.get(encoder, 0)
        found = _BRIDGE_TABLE.fullmatch(name)
        assert found is not None
        bridges = {bridge.name: bridge for bridge in all_bridges(self.config)}
        directions = {direction.name: direction for direction in bridges[found["bridge"]].directions}
        direction = directions[found["direction"]]
        expert = direction.queries if found["side"] == "query" else direction.keys
        return encoder_of(self.config, expert), found["axis"], 0


SHOWN_BY_NO_TENSOR = (
    "num_heads",
    "audio_stride",
    "fusion",
    "combination",
    "time_code_layout",
    "resnet_grouping",
)
"""Settings that change what a model computes, and neither a name nor a shape of its tensors."""
_HEAD = "head."
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
    own = model.state_dict()
    fresh = _fresh_names(model, source, state, new_head=new_head)
    dropped = _dropped_names(model, source, state, new_head=new_head)
    fitter = PositionFitter(config=model.config, clip=model.clip, source=source.clip, where=where)
    resized = _resized(own, state, fitter)
    if resized and not resize_positions:
        raise WeightsMismatchError(
            f"{where}: expected position tables for the model's clip, found {len(resized)} for another: "
            f"{listed(sorted(resized), most=4)}; "
            "set start.resize_positions = true to interpolate them"
        )
    given = {name: tensor for name, tensor in (dict(state) | resized).items() if name not in fresh | dropped}
    load_strictly(model, given, where=where, allow_missing=[escape(name) for name in sorted(fresh)])
    return TransferReport(
        kept=tuple(sorted(given.keys() - resized.keys())),
        resized=tuple(sorted(resized)),
        fresh=tuple(sorted(fresh)),
    )


def _resized(own: Mapping[str, Tensor], state: Mapping[str, Tensor], fitter: PositionFitter) -> dict[str, Tensor]:
    tables = {name: own[name].shape[0] for name in own.keys() & state.keys() if is_position_table(name)}
    return {
        name: fitter.fit(name, state[name], rows=rows)
        for name, rows in tables.items()
        if fitter.differs(name, state[name], rows=rows)
    }


def _fresh_names(
    model: HolisticModel, source: ModelDescription, state: Mapping[str, Tensor], *, new_head: bool
) -> frozenset[str]:
    """Return the head's tensors that start anew: all, or those of label spaces that the source does not have."""
    head = {name for name in model.state_dict() if name.startswith(_HEAD)}
    if new_head:
        return frozenset(head)
    classes = {target.name: target.num_classes for target in source.targets}
    others = {target.name for target in model.targets if classes.get(target.name) != target.num_classes}
    classifiers = {name for name in head if (match := _CLASSIFIER.fullmatch(name)) is not None and match[1] in others}
    adapters = head - state.keys() if _other_targets(model, source) else set()
    return frozenset(classifiers | adapters)


def _dropped_names(
    model: HolisticModel, source: ModelDescription, state: Mapping[str, Tensor], *, new_head: bool
) -> frozenset[str]:
    """Return tensors of the source's head that the model has no place for, where that is no mistake."""
    head = {name for name in state if name.startswith(_HEAD)}
    if new_head:
        return frozenset(head)
    return frozenset(head - model.state_dict().keys()) if _other_targets(model, source) else frozenset()


def _other_targets(model: HolisticModel, source: ModelDescription) -> bool:
    """Return whether the label spaces have other names; then last adapters and classifiers may be others too."""
    return {target.name for target in model.targets} != {target.name for target in source.targets}


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
        layers = [i for i in range(ours.depth) if bridges_of_layer(ours, i) != bridges_of_layer(theirs, i)]
        told += [f"other cross-attention (windows, directions or positions) in layers {_numbers(layers)}"] * bool(
            layers
        )
    told += _other_fixed_tables(model, source)
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


def _other_fixed_tables(model: HolisticModel, source: ModelDescription) -> list[str]:
    """VideoMAE's table is computed from settings: a new clip must go on naming the clip it was pretrained on."""
    experts = [name for name in EXPERTS[model.config.kind] if encoder_of(model.config, name) == "videomae"]
    if not experts:
        return []
    before = _pretrained(source.model, source)
    after = _pretrained(model.config, ModelDescription.of(model))
    return [
        f"a VideoMAE pretrained with {name} {before[name]} there and {after[name]} here "
        f"(set model.pretrained_{name} = {before[name]})"
        for name in before
        if before[name] != after[name]
    ]


def _pretrained(config: ModelConfig, description: ModelDescription) -> dict[str, int]:
    return {
        "num_frames": config.pretrained_num_frames or description.clip.num_frames,
        "crop_size": config.pretrained_crop_size or description.clip.crop_size,
    }


def _numbers(layers: list[int]) -> str:
    return ", ".join(str(layer + 1) for layer in layers)
