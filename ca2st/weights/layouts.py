"""Layouts of foreign checkpoints (CLIP, VideoMAE, AST, ResNet-50) and their translation by tables: nothing is guessed.

What the names do not tell: CLIP's activation (ours is QuickGELU), and the network of a ResNet-50: others have exactly
its names and shapes (timm's resnetaa50 and resnetblur50 filter before each stride). A public name tells them apart
(`ca2st.weights.hub.check_origin`); in a plain file it cannot be seen. In VideoMAE q and v have biases and k has
none: a file without them is refused, never filled up.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import takewhile

import torch
from torch import Tensor

from ca2st.model.config import EncoderName
from ca2st.weights.tensor_files import WeightsMismatchError, refuse_mismatch

COUNTERS = ("n_averaged",)
"""Names that a wrapper of a model (an average of weights) adds beside those of the model."""
_WRAPPING = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"})
"""Parts of a name that torch.compile, FSDP, checkpointing and DeepSpeed put in, at any place; no model has them."""


def weights_and_biases(modules: Mapping[str, str]) -> dict[str, str]:
    """Return the names of the tensors of modules that have a `weight` and a `bias`."""
    return {f"{theirs}.{kind}": f"{ours}.{kind}" for theirs, ours in modules.items() for kind in ("weight", "bias")}


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Names of one family of checkpoints of one expert; tables go from their names to ours."""

    name: str
    """As the report calls it."""
    prefixes: tuple[str, ...]
    """What may stand before all the expert's names, longest first; the empty one too where it is allowed."""
    marker: str
    """A name below the prefix that only this layout has."""
    once: Mapping[str, str]
    """Names below the prefix, outside the layers."""
    layer_prefix: str = ""
    """Before the number of a layer, below the prefix; empty where no two layers are alike."""
    layer: Mapping[str, str] = field(default_factory=dict)
    """Names below a layer, below `layers.<i>.` in ours."""
    joined: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Ours below a layer -> the names below a layer whose tensors are concatenated into it, in this order."""
    outside: Mapping[str, str] = field(default_factory=dict)
    """Whole names that belong to the expert although they lack the prefix."""
    ignored: tuple[str, ...] = ()
    """Patterns of whole names that are no part of the expert: decoders, heads, the text half."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Translation:
    """Foreign tensors under our names."""

    layout: Layout
    tensors: dict[str, Tensor]
    """By our names."""
    used: tuple[str, ...]
    """The file's names that went into them."""
    ignored: tuple[str, ...]
    """The file's names that are known to be no part of the expert."""


def translate(state: Mapping[str, Tensor], layouts: Sequence[Layout], *, where: str) -> Translation:
    """Find the layout of `state` by its names and give the tensors our names.

    What wrappers put before or into the names (``_orig_mod.``, ``model.`` and the like) is passed over.

    Raises:
        WeightsMismatchError: no layout fits, a name is unknown, or two names claim the same tensor.
    """
    bare = bare_names(state, where=where)
    layout, prefix, outer = _detect(bare, layouts, where=where)
    outside = sorted(bare[name] for name in bare if not name.startswith(outer) and name not in COUNTERS)
    refuse_mismatch({f"beside those that begin with {outer!r}": outside}, where=where)
    written = {name.removeprefix(outer): theirs for name, theirs in bare.items() if name not in COUNTERS}
    claimed = _targets(written, layout, prefix)
    unknown = sorted(
        written[name]
        for name in written.keys() - claimed.keys()
        if not any(fnmatchcase(name, pattern) for pattern in layout.ignored)
    )
    refuse_mismatch({f"unexpected in the layout {layout.name!r}": unknown}, where=where)
    targets = {written[name]: target for name, target in claimed.items()}
    parts: dict[str, dict[int, Tensor]] = {}
    for theirs, (ours, index) in targets.items():
        if index in parts.setdefault(ours, {}):
            raise WeightsMismatchError(
                f"{where}: {theirs} and another name both stand for {ours}; expected one of them, found both"
            )
        parts[ours][index] = state[theirs]
    tensors = {ours: _join(ours, found, layout, where=where) for ours, found in parts.items()}
    ignored = tuple(sorted(state.keys() - targets.keys()))
    return Translation(layout=layout, tensors=tensors, used=tuple(sorted(targets)), ignored=ignored)


def bare_names(names: Iterable[str], *, where: str) -> dict[str, str]:
    """Return the names of a file by what is left of them without the parts that wrappers put in.

    Raises:
        WeightsMismatchError: nothing but such parts tells two names apart.
    """
    bare: dict[str, str] = {}
    for name in names:
        left = ".".join(part for part in name.split(".") if part not in _WRAPPING)
        if left in bare:
            raise WeightsMismatchError(f"{where}: {name} and {bare[left]} both stand for {left}; expected one of them")
        bare[left] = name
    return bare


def common_prefix(names: Iterable[str]) -> str:
    """Return what all names begin with, up to and with a dot; counters beside the model do not count."""
    folders = [name.split(".")[:-1] for name in names if name not in COUNTERS]
    common = takewhile(lambda parts: len(set(parts)) == 1, zip(*folders, strict=False))
    return "".join(f"{parts[0]}." for parts in common)


def _detect(names: Iterable[str], layouts: Sequence[Layout], *, where: str) -> tuple[Layout, str, str]:
    """Return the layout, its prefix, and what a wrapper put before both: empty, or a name that ends with a dot."""
    state = frozenset(names)
    marks = [(layout, prefix, f"{prefix}{layout.marker}") for layout in layouts for prefix in layout.prefixes]
    for layout, prefix, mark in marks:
        if mark in state:
            return layout, prefix, ""
    for layout, prefix, mark in marks:
        outer = sorted(name.removesuffix(mark) for name in state if name.endswith(f".{mark}"))
        if len(outer) > 1:
            raise WeightsMismatchError(
                f"{where}: expected one {layout.name}, found several, below {', '.join(outer)}; save one of them alone"
            )
        if outer:
            return layout, prefix, outer[0]
    known = "; ".join(f"{layout.name} (has {layout.marker})" for layout in layouts)
    found = ", ".join(sorted(state)[:6])
    raise WeightsMismatchError(f"{where}: expected one of the layouts {known}; found names {found}; check --kind")


def _targets(names: Iterable[str], layout: Layout, prefix: str) -> dict[str, tuple[str, int]]:
    """Return the file's name -> our name and its place among the joined parts."""
    joined = {theirs: (ours, place) for ours, parts in layout.joined.items() for place, theirs in enumerate(parts)}
    in_layer = re.compile(rf"{re.escape(prefix + layout.layer_prefix)}(\d+)\.(.+)")
    targets: dict[str, tuple[str, int]] = {}
    for name in names:
        if match := in_layer.fullmatch(name):
            ours, place = joined.get(match[2], (layout.layer.get(match[2], ""), 0))
            if ours:
                targets[name] = (f"layers.{int(match[1])}.{ours}", place)
        elif name.startswith(prefix) and name.removeprefix(prefix) in layout.once:
            targets[name] = (layout.once[name.removeprefix(prefix)], 0)
        elif name in layout.outside:
            targets[name] = (layout.outside[name], 0)
    return targets


def _join(ours: str, found: Mapping[int, Tensor], layout: Layout, *, where: str) -> Tensor:
    match = re.fullmatch(r"layers\.(\d+)\.(.+)", ours)
    names = layout.joined.get(match[2], ()) if match else ()
    if not names:
        return found[0]
    missing = [f"{layout.layer_prefix}{match[1]}.{name}" for i, name in enumerate(names) if match and i not in found]
    refuse_mismatch({"missing": missing}, where=where)
    shapes = {tuple(tensor.shape) for tensor in found.values()}
    if len(shapes) != 1:
        raise WeightsMismatchError(f"{where}: {ours}: expected parts of one shape to join, found {sorted(shapes)}")
    return torch.cat([found[place] for place in range(len(names))])


_TIMM_LAYER = weights_and_biases(
    {
        "norm1": "norm1",
        "attn.qkv": "attention.qkv",
        "attn.proj": "attention.proj",
        "norm2": "norm2",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
)
"""A layer of timm's vision transformers, which AST's own files keep too."""
_HUGGING_FACE_LAYER = weights_and_biases(
    {
        "layernorm_before": "norm1",
        "attention.output.dense": "attention.proj",
        "layernorm_after": "norm2",
        "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
    }
)
"""A layer of transformers' VideoMAE and AST, but for queries, keys and values."""

CLIP = Layout(
    name="CLIP",
    prefixes=("module.visual.", "visual.", ""),
    marker="transformer.resblocks.0.attn.in_proj_weight",
    once=weights_and_biases({"ln_pre": "norm_pre", "ln_post": "norm"})
    | {
        "conv1.weight": "patch_embed.weight",
        "class_embedding": "class_token",
        "positional_embedding": "positions",
    },
    layer_prefix="transformer.resblocks.",
    layer=weights_and_biases(
        {
            "ln_1": "norm1",
            "attn.out_proj": "attention.proj",
            "ln_2": "norm2",
            "mlp.c_fc": "mlp.fc1",
            "mlp.c_proj": "mlp.fc2",
        }
    )
    | {"attn.in_proj_weight": "attention.qkv.weight", "attn.in_proj_bias": "attention.qkv.bias"},
    ignored=tuple(
        f"{prefix}{name}"
        for prefix in ("", "module.")
        for name in (
            "visual.proj",
            "proj",
            "transformer.*",
            "token_embedding.weight",
            "positional_embedding",
            "ln_final.*",
            "text_projection",
            "logit_scale",
            "logit_bias",
            "attn_mask",
            "input_resolution",
            "context_length",
            "vocab_size",
        )
    ),
)
"""OpenAI's archive and open_clip: the projection into the joint space and the text half are left aside."""

_HUGGING_FACE_CLIP = Layout(
    name="Hugging Face CLIPVisionModel",
    prefixes=("vision_model.", ""),
    marker="encoder.layers.0.self_attn.q_proj.weight",
    once=weights_and_biases({"pre_layrnorm": "norm_pre", "post_layernorm": "norm"})
    | {
        "embeddings.patch_embedding.weight": "patch_embed.weight",
        "embeddings.class_embedding": "class_token",
        "embeddings.position_embedding.weight": "positions",
    },
    layer_prefix="encoder.layers.",
    layer=weights_and_biases(
        {
            "layer_norm1": "norm1",
            "self_attn.out_proj": "attention.proj",
            "layer_norm2": "norm2",
            "mlp.fc1": "mlp.fc1",
            "mlp.fc2": "mlp.fc2",
        }
    ),
    joined={
        f"attention.qkv.{what}": tuple(f"self_attn.{part}_proj.{what}" for part in "qkv") for what in ("weight", "bias")
    },
    ignored=(
        "text_model.*",
        "visual_projection.weight",
        "text_projection.weight",
        "logit_scale",
        "embeddings.position_ids",
        "vision_model.embeddings.position_ids",
    ),
)

_TIMM_CLIP = Layout(
    name="timm's CLIP",
    prefixes=("",),
    marker="norm_pre.weight",
    once=weights_and_biases({"norm_pre": "norm_pre", "norm": "norm"})
    | {"patch_embed.proj.weight": "patch_embed.weight", "cls_token": "class_token", "pos_embed": "positions"},
    layer_prefix="blocks.",
    layer=_TIMM_LAYER,
    ignored=("head.*",),
)
"""The visual half as timm keeps it in its repositories; the head is the projection into the joint space."""

VIDEOMAE = Layout(
    name="VideoMAE",
    prefixes=("module.backbone.", "module.encoder.", "module.", "backbone.", "encoder.", ""),
    marker="blocks.0.attn.qkv.weight",
    once=weights_and_biases({"patch_embed.proj": "patch_embed", "norm": "norm", "fc_norm": "norm"}),
    layer_prefix="blocks.",
    layer=weights_and_biases(
        {
            "norm1": "norm1",
            "attn.proj": "attention.proj",
            "norm2": "norm2",
            "mlp.fc1": "mlp.fc1",
            "mlp.fc2": "mlp.fc2",
        }
    )
    | {
        "attn.qkv.weight": "attention.qkv.weight",
        "attn.q_bias": "attention.q_bias",
        "attn.v_bias": "attention.v_bias",
    },
    ignored=tuple(
        f"{prefix}{name}"
        for prefix in ("", "module.", "backbone.", "module.backbone.")
        for name in ("decoder.*", "encoder_to_decoder.*", "mask_token", "head.*")
    ),
)
"""Pretrained (`encoder.`, `norm`) and fine-tuned (`fc_norm`) files."""

_HUGGING_FACE_VIDEOMAE = Layout(
    name="Hugging Face VideoMAEModel",
    prefixes=("videomae.", ""),
    marker="encoder.layer.0.attention.attention.query.weight",
    once=weights_and_biases({"embeddings.patch_embeddings.projection": "patch_embed", "layernorm": "norm"}),
    outside=weights_and_biases({"fc_norm": "norm"}),
    layer_prefix="encoder.layer.",
    layer=_HUGGING_FACE_LAYER
    | {
        "attention.attention.query.bias": "attention.q_bias",
        "attention.attention.q_bias": "attention.q_bias",
        "attention.attention.value.bias": "attention.v_bias",
        "attention.attention.v_bias": "attention.v_bias",
    },
    joined={
        "attention.qkv.weight": tuple(f"attention.attention.{part}.weight" for part in ("query", "key", "value")),
    },
    ignored=("classifier.*", "decoder.*", "encoder_to_decoder.*", "mask_token"),
)
"""Old files call the biases `q_bias` and `v_bias`. With mean pooling the final norm is the classifier's `fc_norm`."""

AST = Layout(
    name="AST",
    prefixes=("module.v.", "v."),
    marker="blocks.0.attn.qkv.weight",
    once=weights_and_biases({"patch_embed.proj": "patch_embed", "norm": "norm"})
    | {"cls_token": "class_token", "dist_token": "distillation_token", "pos_embed": "positions"},
    layer_prefix="blocks.",
    layer=_TIMM_LAYER,
    ignored=tuple(
        f"{prefix}{name}" for prefix in ("", "module.") for name in ("mlp_head.*", "v.head.*", "v.head_dist.*")
    ),
)
"""AST's own head, and the ImageNet heads of the DeiT inside it, are left aside."""

_HUGGING_FACE_AST = Layout(
    name="Hugging Face ASTModel",
    prefixes=("audio_spectrogram_transformer.", ""),
    marker="encoder.layer.0.attention.attention.query.weight",
    once=weights_and_biases({"embeddings.patch_embeddings.projection": "patch_embed", "layernorm": "norm"})
    | {
        "embeddings.cls_token": "class_token",
        "embeddings.distillation_token": "distillation_token",
        "embeddings.position_embeddings": "positions",
    },
    layer_prefix="encoder.layer.",
    layer=_HUGGING_FACE_LAYER,
    joined={
        f"attention.qkv.{what}": tuple(f"attention.attention.{part}.{what}" for part in ("query", "key", "value"))
        for what in ("weight", "bias")
    },
    ignored=("classifier.*",),
)
"""As published."""

_HUGGING_FACE_5_AST = replace(
    _HUGGING_FACE_AST,
    name="Hugging Face ASTModel (transformers 5)",
    marker="layers.0.attention.q_proj.weight",
    layer_prefix="layers.",
    layer=weights_and_biases(
        {
            "layernorm_before": "norm1",
            "attention.o_proj": "attention.proj",
            "layernorm_after": "norm2",
            "mlp.fc1": "mlp.fc1",
            "mlp.fc2": "mlp.fc2",
        }
    ),
    joined={
        f"attention.qkv.{what}": tuple(f"attention.{part}_proj.{what}" for part in "qkv") for what in ("weight", "bias")
    },
)
"""As transformers 5 names the modules in memory."""


def _resnet50_names() -> dict[str, str]:
    """Return the tensors of all convolutions, which have no bias, and of their BatchNorms."""
    units = [("conv1", "bn1", "stem.conv", "stem.norm")]
    for stage, num_blocks in enumerate((3, 4, 6, 3)):
        for block in range(num_blocks):
            theirs, ours = f"layer{stage + 1}.{block}.", f"stages.{stage}.{block}."
            inside = [(f"conv{i}", f"bn{i}") for i in (1, 2, 3)]
            if block == 0:
                inside.append(("downsample.0", "downsample.1"))
            units += [(theirs + conv, theirs + norm, ours + conv, ours + norm) for conv, norm in inside]
    names: dict[str, str] = {}
    for their_conv, their_norm, our_conv, our_norm in units:
        names[f"{their_conv}.weight"] = f"{our_conv}.weight"
        names |= {f"{their_norm}.{x}": f"{our_norm}.{x}" for x in ("weight", "bias", "running_mean", "running_var")}
    return names


_RESNET50 = Layout(
    name="ResNet-50",
    prefixes=("module.", ""),
    marker="layer1.0.conv1.weight",
    once=_resnet50_names(),
    ignored=("*.num_batches_tracked", "fc.*", "module.fc.*"),
)
"""The classifier and the counters of training are left aside. Running statistics are frozen weights here."""

LAYOUTS_OF_ENCODER: dict[EncoderName, tuple[Layout, ...]] = {
    "clip": (CLIP, _HUGGING_FACE_CLIP, _TIMM_CLIP),
    "videomae": (VIDEOMAE, _HUGGING_FACE_VIDEOMAE),
    "ast": (AST, _HUGGING_FACE_AST, _HUGGING_FACE_5_AST),
    "resnet50": (_RESNET50,),
}
