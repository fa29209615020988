"""Published names: released CAST, CAVA and CA2ST checkpoints beside ours, and the golden files that prove them.

The tables go published name -> our name. The letters mislead: `S`/`s` is spatial and `T`/`t` temporal in the files of
CAST and CA2ST, but audio and spatial in those of CAVA. X2Y here always has keys from X and queries from Y; a published
`s2t_cross` need not.

A golden file holds a small model and what an independent implementation computed for it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ca2st.errors import UserInputError
from ca2st.model.config import (
    EXPERTS,
    BridgeName,
    ExpertName,
    ModelConfig,
    ModelKind,
    TargetSpec,
    bridges_of_layer,
    uses_time_codes,
)
from ca2st.model.layers import bottleneck_name
from ca2st.model.network import HolisticModel, ModelOutput, build_model, head_inputs, is_verb_noun
from ca2st.model.tokens import clip_grid, pretrained_grid
from ca2st.spec import ClipSpec
from ca2st.weights import tensor_files
from ca2st.weights.layouts import AST, CLIP, VIDEOMAE, weights_and_biases


def _below(theirs: str, ours: str, names: Mapping[str, str]) -> dict[str, str]:
    return {f"{theirs}{a}": f"{ours}{b}" for a, b in names.items()}


EXPERT_NAMES: dict[ExpertName, dict[str, str]] = {
    "spatial": _below("clip_", "", CLIP.once),
    "temporal": weights_and_biases({"patch_embed.proj": "patch_embed", "vmae_fc_norm": "norm"}),
    "audio": _below("ast_", "", AST.once),
}
"""Below `experts.<expert>.` in our names. Released files keep those of the public encoders, with a prefix."""
EXPERT_LAYER_NAMES: dict[ExpertName, Mapping[str, str]] = {
    "spatial": _below("clip_", "", CLIP.layer),
    "temporal": VIDEOMAE.layer,
    "audio": _below("ast_", "", AST.layer),
}
"""Below `blocks.<i>.` in published names, `experts.<expert>.layers.<i>.` in ours."""


def _attention(prefix: str = "", proj: str = "proj", **positions: str) -> dict[str, str]:
    """Return the names below one direction: `prefix` goes before `q` and `kv`, `positions` are learned tables."""
    projections = {
        f"{prefix}q.weight": "attention.q.weight",
        f"{prefix}q_bias": "attention.q.bias",
        f"{prefix}kv.weight": "attention.kv.weight",
        f"{prefix}kv_bias": "attention.kv.bias",
    }
    return weights_and_biases({proj: "attention.proj"}) | projections | positions


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedBridge:
    """A published B-CA inside a block."""

    prefix: str
    """Before all its names."""
    sides: Mapping[str, ExpertName]
    """The letters of its two sides, in `cross_<letter>_down` and `ln_<letter>_cross`."""
    directions: Mapping[str, tuple[str, Mapping[str, str]]]
    """Its two attentions: our name of the direction, and the names below it."""


# The output projection is `t2s_proj` in both directions of S&T and A&S files, a misnomer frozen into them.
_T2S = _attention(
    "t2s_", "t2s_proj", clip_time_pos="query_positions.time_table", vmae_time_pos="key_positions.time_table"
)
_S2T = _attention(
    "s2t_", "t2s_proj", vmae_space_pos="query_positions.space_table", clip_space_pos="key_positions.space_table"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedLayout:
    """What differs between the files of the three models."""

    adapters: Mapping[str, ExpertName]
    """Prefix of `Adapter` and `MLP_Adapter` in a block."""
    bridges: Mapping[BridgeName, PublishedBridge]
    """The cross-attentions of a block."""
    time_mlp: Mapping[str, str]
    """Indices inside the two time MLPs."""
    last_adapters: Mapping[str, str]
    """Last adapters of a single-label model."""
    verb_noun_last_adapters: Mapping[str, str]
    """Last adapters of a verb + noun model."""


LAYOUTS: dict[ModelKind, PublishedLayout] = {
    "cast": PublishedLayout(
        adapters={"S_": "spatial", "T_": "temporal"},
        bridges={
            "spatial_temporal": PublishedBridge(
                prefix="",
                sides={"s": "spatial", "t": "temporal"},
                directions={"t2s_cross": ("t2s", _T2S), "s2t_cross": ("s2t", _S2T)},
            )
        },
        time_mlp={},
        last_adapters={"noun_last_Adapter": "spatial", "verb_last_Adapter": "temporal"},
        verb_noun_last_adapters={},
    ),
    "cava": PublishedLayout(
        adapters={"S_": "audio", "T_": "spatial"},
        bridges={
            "audio_spatial": PublishedBridge(
                prefix="",
                sides={"s": "audio", "t": "spatial"},
                directions={
                    "s2t_cross": ("a2s", _attention("s2t_", "t2s_proj")),
                    "t2s_cross": ("s2a", _attention("t2s_", "t2s_proj")),
                },
            )
        },
        time_mlp={"0": "0", "2.0": "2", "3.0": "4", "4": "6"},
        last_adapters={"noun_last_Adapter": "audio", "verb_last_Adapter": "spatial"},
        verb_noun_last_adapters={"noun_last_Adapter": "audio", "verb_last_Adapter": "spatial"},
    ),
    "ca2st": PublishedLayout(
        adapters={"S_": "spatial", "T_": "temporal", "Audio_": "audio"},
        bridges={
            "spatial_temporal": PublishedBridge(
                prefix="s_t_b_cast.",
                sides={"l": "spatial", "r": "temporal"},
                directions={"r2l_cross": ("t2s", _T2S), "l2r_cross": ("s2t", _S2T)},
            ),
            "audio_spatial": PublishedBridge(
                prefix="s_audio_b_cast.",
                sides={"l": "spatial", "r": "audio"},
                directions={"r2l_cross": ("a2s", _attention()), "l2r_cross": ("s2a", _attention())},
            ),
            "audio_temporal": PublishedBridge(
                prefix="t_audio_b_cast.",
                sides={"l": "temporal", "r": "audio"},
                directions={"r2l_cross": ("a2t", _attention()), "l2r_cross": ("t2a", _attention())},
            ),
        },
        time_mlp={"0": "0", "2": "2", "4": "4", "6": "6"},
        last_adapters={
            "noun_last_Adapter": "spatial",
            "verb_last_Adapter": "temporal",
            "audio_verb_last_Adapter": "audio",
        },
        verb_noun_last_adapters={
            "noun_last_Adapter": "spatial",
            "verb_last_Adapter": "temporal",
            "audio_verb_last_Adapter": "audio_verb",
            "audio_noun_last_Adapter": "audio_noun",
        },
    ),
}

_ADAPTER = weights_and_biases({"D_fc1": "down", "D_fc2": "up"})
_QUERY_ADAPTER = weights_and_biases({"c_fc": "down", "c_proj": "up"})
"""The audio expert's last adapters in CA2ST."""
NEVER_USED = frozenset({"audio_ln_post.weight", "audio_ln_post.bias"})
"""A LayerNorm that the reference of CAVA and CA2ST trains and never applies; our models do not have it."""


_PUBLISHED = {"spatial_encoder": "clip", "temporal_encoder": "videomae", "fusion": "cross_attention"}
"""What every released model is made of; their files have names for nothing else."""


def published_names(config: ModelConfig, targets: Sequence[TargetSpec]) -> dict[str, str]:
    """Return published tensor name -> our tensor name; several published names may share one of ours (down and up).

    Raises:
        UserInputError: there is no published layout for this kind of model or these targets.
    """
    if config.kind not in LAYOUTS:
        raise UserInputError(f"published names: expected kind {', '.join(LAYOUTS)}, found {config.kind}")
    other = {name: getattr(config, name) for name, value in _PUBLISHED.items() if getattr(config, name) != value}
    if other:
        told = ", ".join(f"{name} {value}" for name, value in other.items())
        expected = ", ".join(f"{name} {_PUBLISHED[name]}" for name in other)
        raise UserInputError(
            f"published names: expected {expected}, found {told}: no such model was ever released; use our own names"
        )
    layout = LAYOUTS[config.kind]
    names: dict[str, str] = {}
    for expert in EXPERTS[config.kind]:
        names |= _below("", f"experts.{expert}.", EXPERT_NAMES[expert])
        for index in range(config.depth):
            names |= _below(f"blocks.{index}.", f"experts.{expert}.layers.{index}.", EXPERT_LAYER_NAMES[expert])
    for index in range(config.depth):
        names |= _below(f"blocks.{index}.", f"layers.{index}.", _added_names(config, layout, index))
    if uses_time_codes(config):
        for theirs, ours in (("time_mlp", "video"), ("audio_time_mlp", "audio")):
            names |= _below(f"{theirs}.", f"time_codes.{ours}.", weights_and_biases(layout.time_mlp))
    return names | _head_names(layout, config, targets)


def load_published(
    model: HolisticModel, state: Mapping[str, Tensor], *, where: str, allow_missing: Sequence[str] = ()
) -> tensor_files.LoadReport:
    """Put the tensors of a released checkpoint into `model`, all or nothing; the report speaks published names.

    `audio_ln_post.*`, which the method never uses, is the only thing left aside. `allow_missing` are patterns of our
    names, as in `load_strictly`.

    Raises:
        WeightsMismatchError: anything is missing, left over, of another shape, or given twice with different values.
    """
    names = _names_of(model)
    unexpected = sorted(state.keys() - names.keys() - NEVER_USED)
    tensor_files.refuse_mismatch({"unexpected": unexpected}, where=where)
    own = model.state_dict()
    translated: dict[str, Tensor] = {}
    for theirs, ours in names.items():
        if theirs in state:
            tensor = tensor_files.without_leading_ones(state[theirs], own[ours].ndim)
            if ours in translated and not torch.equal(translated[ours], tensor):
                raise tensor_files.WeightsMismatchError(
                    f"{where}: {theirs} is shared with another name, expected equal values under both, found different "
                    "ones; the file does not come from a model with shared down and up projections"
                )
            translated[ours] = tensor
    incomplete = sorted(theirs for theirs, ours in names.items() if ours in translated and theirs not in state)
    tensor_files.refuse_mismatch({"missing": incomplete}, where=where)
    report = tensor_files.load_strictly(model, translated, where=where, allow_missing=allow_missing)
    return tensor_files.LoadReport(
        loaded=tuple(sorted(state.keys() & names.keys())),
        missing=tuple(sorted(theirs for theirs, ours in names.items() if ours in report.missing)),
        unexpected=tuple(sorted(state.keys() & NEVER_USED)),
    )


def to_published(model: HolisticModel) -> dict[str, Tensor]:
    """Return the model's tensors under published names; tensors that two names share are given under both.

    Raises:
        UserInputError: the model computes something that no released model does.
    """
    config, clip = model.config, model.clip
    pretrained, grid = pretrained_grid(config, clip), clip_grid(config, clip)
    # VideoMAE's table is in no file: whoever reads published names computes a new one for the clip.
    if "temporal" in EXPERTS[config.kind] and pretrained != grid:
        raise UserInputError(
            f"published names: expected VideoMAE's own position table for times, rows, columns {grid}, found one "
            f"interpolated from {pretrained}, which released code does not compute; use our own names"
        )
    own = model.state_dict()
    state = {theirs: own[ours].detach().cpu().clone() for theirs, ours in _names_of(model).items()}
    for name in ("ast_pos_embed", "ast_cls_token", "ast_dist_token"):
        if name in state:
            state[name] = state[name].reshape(1, -1, config.dim)
    return state


def _names_of(model: HolisticModel) -> dict[str, str]:
    names = published_names(model.config, model.targets)
    odd = sorted(model.state_dict().keys() ^ set(names.values()))
    if odd:
        raise UserInputError(
            f"published names: this configuration was never published; it differs in {', '.join(odd[:6])}; "
            "use our own names"
        )
    return names


def _added_names(config: ModelConfig, layout: PublishedLayout, index: int) -> dict[str, str]:
    names: dict[str, str] = {}
    for prefix, expert in layout.adapters.items():
        for theirs, ours in (("Adapter", "serial"), ("MLP_Adapter", "parallel")):
            names |= _below(f"{prefix}{theirs}.", f"adapters.{expert}.{ours}.", _ADAPTER)
    for bridge in bridges_of_layer(config, index):
        published, bridge_name = layout.bridges[bridge.name], f"bridges.{bridge.name}"
        for letter, expert in published.sides.items():
            bottleneck = bottleneck_name(bridge.name, expert, shared=config.shared_bottleneck)
            modules = {
                f"cross_{letter}_down": f"bottlenecks.{bottleneck}.down",
                f"cross_{letter}_up": f"bottlenecks.{bottleneck}.up",
                f"ln_{letter}_cross": f"{bridge_name}.norms.{expert}",
            }
            names |= _below(published.prefix, "", weights_and_biases(modules))
        for theirs, (ours, inside) in published.directions.items():
            names |= _below(f"{published.prefix}{theirs}.", f"{bridge_name}.directions.{ours}.", inside)
    return names


def _head_names(layout: PublishedLayout, config: ModelConfig, targets: Sequence[TargetSpec]) -> dict[str, str]:
    verb_noun = is_verb_noun(targets)
    if not verb_noun and len(targets) != 1:
        found = ", ".join(target.name for target in targets)
        raise UserInputError(f"published names: expected one target, or verb and noun, found {found}")
    kinds = {term.adapter: term.kind for read in head_inputs(config, targets).values() for term in read.terms}
    names: dict[str, str] = {}
    for theirs, ours in (layout.verb_noun_last_adapters if verb_noun else layout.last_adapters).items():
        inside = _QUERY_ADAPTER if kinds[ours] == "query" else _ADAPTER
        names |= _below(f"{theirs}.", f"head.adapters.{ours}.", inside)
    heads = {(f"head_{t.name}" if verb_noun else "head"): f"head.classifiers.{t.name}" for t in targets}
    return names | weights_and_biases(heads)


TOLERANCE = 2e-5
"""Largest absolute difference allowed on any expected tensor, in float32."""

_SINGLE_TARGET = "label"
_VERB_NOUN = (TargetSpec(name="verb", num_classes=97), TargetSpec(name="noun", num_classes=300))
_WEIGHTS, _EXPECTED, _INTERVALS = "weights/", "expected/", "input/intervals_seconds"


@dataclass(frozen=True, kw_only=True, slots=True)
class GoldenReport:
    """How far our model is from one golden file."""

    file: Path
    max_abs_diff: dict[str, float]
    """Largest absolute difference of every expected tensor; infinite where ours is not finite."""
    ok: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class _Recipe:
    """The metadata of a golden file."""

    kind: str
    dim: int
    heads: int
    depth: int
    num_frames: int
    audio_frames: int
    classes: int
    composition: bool
    seed: int
    batch: int


def pix(shape: Sequence[int], *, salt: int) -> Float[Tensor, "..."]:
    """Return reproducible input values in [-1, 1]: a multiplicative hash of the flat index.

    v = ((i * 2654435761 + salt * 40503) mod 2^32) >> 16, value = (v mod 997) / 498 - 1.
    """
    index = np.arange(int(np.prod(shape)), dtype=np.uint64)
    hashed = ((index * np.uint64(2654435761) + np.uint64(salt * 40503)) % np.uint64(2**32)) >> np.uint64(16)
    return torch.from_numpy(((hashed % 997) / 498 - 1).astype(np.float32)).reshape(tuple(shape))


def check_golden(paths: Sequence[Path], *, tolerance: float = TOLERANCE) -> list[GoldenReport]:
    """Build the model of each file, load its weights, run its input and compare every expected tensor.

    Raises:
        UserInputError: a file is missing, is no golden file, or its weights do not fit the model it describes.
        WeightsDamageError: a file is not a whole safetensors file.
    """
    reports = []
    for path in paths:
        file = tensor_files.read_tensor_file(path)
        output = golden_output(golden_model(file), file)
        ours = {"logits" if name == _SINGLE_TARGET else f"logits_{name}": x for name, x in output.logits.items()}
        ours |= {f"feature_{expert}": tensor for expert, tensor in output.features.items()}
        differences = {}
        for name, expected in sorted(_tensors_below(file, _EXPECTED).items()):
            if name not in ours:
                raise UserInputError(f"{path}: expected/{name}: expected one of {', '.join(sorted(ours))}")
            comparable = ours[name].shape == expected.shape and bool(torch.isfinite(ours[name]).all())
            difference = float((ours[name].double() - expected.double()).abs().max()) if comparable else float("inf")
            differences[name] = difference
        ok = bool(differences) and all(difference <= tolerance for difference in differences.values())
        reports.append(GoldenReport(file=path, max_abs_diff=differences, ok=ok))
    return reports


def golden_model(file: tensor_files.TensorFile) -> HolisticModel:
    """Return the model that a golden file describes, with its weights, in evaluation mode.

    Raises:
        UserInputError: no golden file, or weights that do not fit.
    """
    recipe = _recipe(file)
    config = ModelConfig(
        kind=recipe.kind,  # type: ignore[arg-type]  # checked by the configuration
        dim=recipe.dim,
        num_heads=recipe.heads,
        depth=recipe.depth,
    )
    clip = ClipSpec(num_frames=recipe.num_frames, mel_rows=recipe.audio_frames or ClipSpec().mel_rows)
    single = (TargetSpec(name=_SINGLE_TARGET, num_classes=max(recipe.classes, 1)),)
    model = build_model(config, clip, _VERB_NOUN if recipe.composition else single)
    load_published(model, _tensors_below(file, _WEIGHTS), where=str(file.path))
    return model.eval()


def golden_output(model: HolisticModel, file: tensor_files.TensorFile) -> ModelOutput:
    """Return what `model` says about the input of a golden file."""
    recipe, clip = _recipe(file), model.clip
    frames, side = clip.num_frames, clip.crop_size
    no_intervals = torch.zeros(recipe.batch, 1 + frames // 2, 2)
    with torch.no_grad():
        output: ModelOutput = model(
            pix((recipe.batch, 3, frames, side, side), salt=recipe.seed),
            pix((recipe.batch, clip.mel_rows, clip.num_mel_bins), salt=recipe.seed + 1),
            file.tensors.get(_INTERVALS, no_intervals),
        )
    return output


def _tensors_below(file: tensor_files.TensorFile, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in file.tensors.items() if name.startswith(prefix)}


def _recipe(file: tensor_files.TensorFile) -> _Recipe:
    if "golden" not in file.metadata:
        raise UserInputError(f"{file.path}: expected a golden file (metadata key 'golden'), found none; see its README")
    try:
        return _Recipe(**json.loads(file.metadata["golden"]))
    except (ValueError, TypeError) as error:
        raise tensor_files.WeightsDamageError(f"{file.path}: cannot read the metadata key 'golden': {error}") from error
