"""Position tables of an expert file and the clip of a model: fitted where a setting says so, refused where none does.

Learned tables show their grid by their number of rows. VideoMAE's fixed table is in no file, so only the file's header
can tell which clip it was trained on. ResNet-50 has no tables: it runs on any crop.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from ca2st.model.config import EncoderName, ModelConfig
from ca2st.model.tokens import NUM_AUDIO_PREFIX, audio_patches
from ca2st.spec import ClipSpec
from ca2st.weights.audio_positions import least_mel_rows
from ca2st.weights.errors import WeightsMismatchError
from ca2st.weights.image_positions import NUM_CLIP_PREFIX, fit_image_positions, square_side

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
