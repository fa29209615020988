"""Position tables of experts, resized.

Learned positions of square pictures for another crop: of CLIP, and of the patches in cross-attention.

Learned positions of spectrogram patches for another length of spectrogram.

A column of patches stands for a fixed time (10 rows of 10 ms), so a shorter spectrogram gets a part of the table,
around its centre, and only a longer one gets a stretched table.

Position tables of an expert file and the clip of a model: fitted where a setting says so, refused where none does.

Learned tables show their grid by their number of rows. VideoMAE's fixed table is in no file, so only the file's header
can tell which clip it was trained on. ResNet-50 has no tables: it runs on any crop.

Which tensors of a whole model are position tables, what grid each belongs to, and its form for another clip.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate

from ca2st.model.config import EncoderName, ModelConfig, all_bridges, encoder_of
from ca2st.model.tokens import NUM_AUDIO_PREFIX, audio_patches, resize_grid_table, resize_time_table
from ca2st.spec import ClipSpec
from ca2st.weights.errors import WeightsMismatchError

NUM_CLIP_PREFIX = 1
"""Rows before the patches of CLIP's table: that of the class token, which stays."""


def square_side(num_patches: int) -> int | None:
    """Patches on a side of a square grid; None where `num_patches` make no square."""
    side = math.isqrt(max(num_patches, 0))
    return side if side and side * side == num_patches else None


def fit_image_positions(
    table: Float[Tensor, "tokens dim"], *, side: int, num_prefix: int = 0
) -> Float[Tensor, "fitted dim"]:
    """Resize a table of `num_prefix` rows and a square of patches to `side` patches on a side (bicubic).

    The caller has checked that the patches make a square.
    """
    prefix, patches = table[:num_prefix], table[num_prefix:]
    found = math.isqrt(patches.shape[0])
    return torch.cat((prefix, resize_grid_table(patches, from_grid=(found, found), to_grid=(side, side))))


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


def least_mel_rows(config: ModelConfig, columns: int) -> int:
    """Rows of the shortest spectrogram that has `columns` columns of patches."""
    return (columns - 1) * config.audio_stride + config.patch_size


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
    """The weights with position tables for the model's clip.

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
    """The table is computed, by the model, from the same settings; here only whether they fit the file."""
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
        """Whether a table is for another grid than the one wanted, which has `rows` rows in it.

        A spectrogram's grid is compared by its columns: what is not a matter of the clip, such as another width, is
        left to the strict comparison of shapes.
        """
        encoder, axis, _ = self._place(name)
        if encoder == "ast" and axis == "space":
            ours, theirs = audio_patches(self.config, self.clip), audio_patches(self.config, self.source)
            return table.ndim == 2 and ours[0] == theirs[0] and ours[1] != theirs[1]
        return table.ndim == 2 and table.shape[0] != rows

    def fit(self, name: str, table: Tensor, *, rows: int) -> Tensor:
        """The table with `rows` rows; unchanged where neither it nor what is wanted is a grid."""
        encoder, axis, num_prefix = self._place(name)
        if axis == "time":
            return resize_time_table(table, rows)
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
        """Encoder whose tokens the table is for, its axis, and the rows before the patches."""
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
