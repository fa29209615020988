"""What a layout of foreign names is, and the translation into ours: by tables, nothing is guessed."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from ca2st.weights.errors import WeightsMismatchError
from ca2st.weights.published_tables import Names
from ca2st.weights.strict import refuse_mismatch

TIMM_LAYER = Names(
    modules={
        "norm1": "norm1",
        "attn.qkv": "attention.qkv",
        "attn.proj": "attention.proj",
        "norm2": "norm2",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
)
"""A layer of timm's vision transformers, which AST's own files keep too."""
COUNTERS = ("n_averaged",)
"""Names that a wrapper of a model (an average of weights) adds beside those of the model."""
_WRAPPING = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"})
"""Parts of a name that torch.compile, FSDP, checkpointing and DeepSpeed put in, at any place; no model has them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Names of one family of checkpoints of one expert."""

    name: str
    """As the report calls it."""
    prefixes: tuple[str, ...]
    """What may stand before all the expert's names, longest first; the empty one too where it is allowed."""
    marker: str
    """A name below the prefix that only this layout has."""
    once: Names
    """Names below the prefix -> ours, outside the layers."""
    layer_prefix: str = ""
    """Before the number of a layer, below the prefix; empty where no two layers are alike."""
    layer: Names = field(default_factory=lambda: Names(modules={}))
    """Names below a layer -> ours below `layers.<i>.`."""
    joined: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Ours below a layer -> the names below a layer whose tensors are concatenated into it, in this order."""
    outside: Names = field(default_factory=lambda: Names(modules={}))
    """Whole names that belong to the expert although they lack the prefix."""
    ignored: tuple[str, ...] = ()
    """Patterns of whole names that are no part of the expert: decoders, heads, the text half."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Translation:
    """Foreign tensors under our names."""

    layout: Layout
    """The layout that was found."""
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
    unknown = sorted(written[name] for name in written if name not in claimed and not _is_ignored(name, layout))
    refuse_mismatch({f"unexpected in the layout {layout.name!r}": unknown}, where=where)
    targets = {written[name]: target for name, target in claimed.items()}
    tensors: dict[str, Tensor] = {}
    parts: dict[str, dict[int, Tensor]] = {}
    for theirs, (ours, index) in targets.items():
        if index in parts.setdefault(ours, {}):
            raise WeightsMismatchError(
                f"{where}: {theirs} and another name both stand for {ours}; expected one of them, found both"
            )
        parts[ours][index] = state[theirs]
    for ours, found in parts.items():
        tensors[ours] = _join(ours, found, layout, where=where)
    ignored = tuple(sorted(state.keys() - targets.keys()))
    return Translation(layout=layout, tensors=tensors, used=tuple(sorted(targets)), ignored=ignored)


def bare_names(names: Iterable[str], *, where: str) -> dict[str, str]:
    """The names of a file by what is left of them without the parts that wrappers put in.

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
    """What all names begin with, up to and with a dot; counters beside the model do not count."""
    folders = [name.split(".")[:-1] for name in names if name not in COUNTERS]
    common: list[str] = []
    for parts in zip(*folders, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return "".join(f"{part}." for part in common)


def _detect(names: Iterable[str], layouts: Sequence[Layout], *, where: str) -> tuple[Layout, str, str]:
    """The layout, its prefix, and what a wrapper put before both: empty, or a name that ends with a dot."""
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
    """The file's name -> our name and its place among the joined parts."""
    once, layer, outside = layout.once.pairs(), layout.layer.pairs(), layout.outside.pairs()
    joined = {theirs: (ours, place) for ours, parts in layout.joined.items() for place, theirs in enumerate(parts)}
    in_layer = re.compile(rf"{re.escape(prefix + layout.layer_prefix)}(\d+)\.(.+)")
    targets: dict[str, tuple[str, int]] = {}
    for name in names:
        if match := in_layer.fullmatch(name):
            ours, place = joined.get(match[2], (layer.get(match[2], ""), 0))
            if ours:
                targets[name] = (f"layers.{int(match[1])}.{ours}", place)
        elif name.startswith(prefix) and name.removeprefix(prefix) in once:
            targets[name] = (once[name.removeprefix(prefix)], 0)
        elif name in outside:
            targets[name] = (outside[name], 0)
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


def _is_ignored(name: str, layout: Layout) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in layout.ignored)
