"""Fine-tuning's first step: the weights of a trained model in a new model of another clip or with another head.

Everything is strict but two things. Position tables may belong to another grid (frames, crop, spectrogram length) and
are interpolated when the caller says so; a classifier of another label space starts anew. Two models of other
structure are refused with the full list of what differs, settings that no tensor shows included.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from glob import escape

from torch import Tensor

from ca2st.errors import listed
from ca2st.model.config import EXPERTS, ModelConfig, bridges_of_layer, encoder_of
from ca2st.model.network import HolisticModel
from ca2st.weights.errors import WeightsMismatchError
from ca2st.weights.model_file import ModelDescription
from ca2st.weights.positions import PositionFitter, is_position_table
from ca2st.weights.tensor_files import load_strictly

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
    """Tensors of the model's head that start anew: all, or those of label spaces that the source does not have."""
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
    """Tensors of the source's head that the model has no place for, where that is no mistake."""
    head = {name for name in state if name.startswith(_HEAD)}
    if new_head:
        return frozenset(head)
    return frozenset(head - model.state_dict().keys()) if _other_targets(model, source) else frozenset()


def _other_targets(model: HolisticModel, source: ModelDescription) -> bool:
    """Whether the label spaces have other names; then last adapters and classifiers may be others too."""
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
    """Which experts there are and what they are; where these differ all else does too, and is not worth naming."""
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
