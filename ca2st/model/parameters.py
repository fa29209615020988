"""From a configuration to a model: built, what is trained in it, and in which precision the rest lies.

Frozen experts are held in float32 as they were read, or in bfloat16 where autocast would cast them anyway: under
bfloat16 autocast every Linear and convolution casts its weights on every use. A frozen weight never changes, so holding
it in bfloat16 gives the same products (bit for bit where the same kernel makes them), in half the memory and without
the cast, whose result autograd would also keep for the backward pass. Norms, tables of positions and tokens, running
statistics, and everything that is trained stay float32.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from fnmatch import translate
from typing import NamedTuple

import torch
from torch import nn

from ca2st.errors import UserInputError
from ca2st.model.config import (
    ExpertPrecision,
    HeldPrecision,
    ModelConfig,
    TargetSpec,
    Trainable,
    all_bridges,
    check_clip,
    check_expert_precision,
    check_targets,
    check_trainable,
    stage_of_layer,
    uses_time_codes,
)
from ca2st.model.network import HolisticModel
from ca2st.spec import ClipSpec

_CAST_BY_AUTOCAST = (nn.Linear, nn.Conv2d, nn.Conv3d)


def build_model(config: ModelConfig, clip: ClipSpec, targets: Sequence[TargetSpec], *, seed: int = 0) -> HolisticModel:
    """Build a model with random weights drawn from `seed` alone, its experts frozen (`set_trainable` changes that).

    Torch's own generator is left as it was. Inside `torch.device("meta")` nothing is allocated.

    Raises:
        UserInputError: sizes of clip and model do not fit, or the targets are not usable.
    """
    check_clip(config, clip)
    check_targets(targets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = HolisticModel(config, clip, targets)
    set_trainable(model, "added")
    return model


def held_precision(wanted: ExpertPrecision, *, training: HeldPrecision, device: str) -> HeldPrecision:
    """Return what `auto` means here: bfloat16 on a GPU that computes in it, float32 otherwise.

    `training` is the precision of the computation, `device` torch's word for the kind of device. Raises as
    `check_expert_precision`.
    """
    check_expert_precision(wanted, training=training)
    if wanted != "auto":
        return wanted
    return "bf16" if device == "cuda" and training == "bf16" else "fp32"


def hold_experts(model: HolisticModel, precision: HeldPrecision) -> None:
    """Hold the experts' frozen weights and biases of Linears and convolutions in `precision`, in place.

    Call it after weights are loaded, kept and marked as trained or frozen. Once in bfloat16 the model computes under
    bfloat16 autocast only, and `fp32` does not bring the lost bits back: it leaves the model as it is.
    """
    if precision == "fp32":
        return
    for expert in model.experts.values():
        for module in expert.modules():
            if isinstance(module, _CAST_BY_AUTOCAST):
                for parameter in module.parameters(recurse=False):
                    if not parameter.requires_grad:
                        parameter.data = parameter.data.to(torch.bfloat16)


Rules = Mapping[str, Sequence[str]]
"""What a rule is called -> patterns (`*` any characters, dots too), one of which at least must name something."""

_HEAD: Rules = {"head": ("head.*",)}
_ADAPTERS: Rules = {"adapters": ("layers.*.adapters.*",)}
_LAYER = re.compile(r"(?:experts\.\w+\.)?layers\.(\d+)\.")
_STAGE = re.compile(r"experts\.\w+\.stages\.(\d+)\.")
_EMBEDDING = re.compile(r"experts\.\w+\.(?:patch_embed|positions|class_token|distillation_token|norm_pre|stem)\b")
_TABLES = frozenset({"positions", "time_table", "space_table", "class_token", "distillation_token"})


class RuleMatchesNothingError(UserInputError):
    """A rule that names parameters which the model does not have."""


class ParameterCount(NamedTuple):
    """Numbers of scalars."""

    trainable: int
    """Of parameters that get a gradient."""
    total: int
    """Of all parameters."""


def trainable_rules(model: HolisticModel, which: Trainable) -> Rules:
    """Return the rules of a set, or each pattern of a list as a rule of its own; raises as `check_trainable`."""
    check_trainable(which)
    if not isinstance(which, str):
        return {pattern: (pattern,) for pattern in which}
    return {
        "added": added_rules(model),
        "head": _HEAD,
        "adapters": {**_HEAD, **_ADAPTERS},
        "all": {"all": ("*",)},
    }[which]


def added_rules(model: HolisticModel) -> Rules:
    """Return the published set: head, adapters, B-CA or its baselines, time codes, final norms of visual experts."""
    rules = dict(_HEAD)
    if model.config.adapters and any(expert.adaptable for expert in model.experts.values()):
        rules |= _ADAPTERS
    if all_bridges(model.config):
        rules["bottleneck cross-attention"] = ("layers.*.bottlenecks.*", "layers.*.bridges.*")
    if uses_time_codes(model.config):
        rules["time codes"] = ("time_codes.*",)
    for name, expert in model.experts.items():
        if name != "audio" and isinstance(getattr(expert, "norm", None), nn.Module):
            rules[f"final norm of the {name} expert"] = (f"experts.{name}.norm.*",)
    return rules


def set_trainable(model: HolisticModel, which: Trainable) -> None:
    """Let a set of `TRAINABLE_SETS`, or exactly what a list of patterns names, learn; the rest is frozen.

    Raises:
        UserInputError: no such set, or an empty list.
        RuleMatchesNothingError: a rule or pattern names nothing in this model.
    """
    set_trainable_by_rules(model, trainable_rules(model, which))


def set_trainable_by_rules(model: nn.Module, rules: Rules) -> None:
    """Let exactly the parameters learn whose whole name fits one of the rules' patterns.

    Raises:
        RuleMatchesNothingError: a rule names nothing in this model; nothing is changed.
    """
    parameters = dict(model.named_parameters())
    named: dict[str, set[str]] = {}
    for rule, patterns in rules.items():
        compiled = [re.compile(translate(pattern)) for pattern in patterns]
        named[rule] = {name for name in parameters if any(pattern.match(name) for pattern in compiled)}
    if idle := [rule for rule, names in named.items() if not names]:
        listed = "; ".join(_idle_rule(rule, rules[rule], list(parameters)) for rule in idle)
        raise RuleMatchesNothingError(
            f"trainable: expected every rule to name parameters of the model, found none for: {listed}"
        )
    trained = set().union(*named.values())
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in trained)


def layer_index(name: str, *, depth: int) -> int | None:
    """Return a parameter's layer (0 = first), for layer-wise learning-rate decay g: its factor is g^(depth - layer).

    Adapters and B-CA count with the layer they sit in, ResNet's stages with the layer they run in, the experts'
    embeddings and ResNet's stem with the first layer; None for heads, last adapters, final norms and time codes, whose
    factor is 1.
    """
    if match := _LAYER.match(name):
        return int(match[1])
    if match := _STAGE.match(name):
        stage = int(match[1])
        return next(layer for layer, running in stage_of_layer(depth).items() if running == stage)
    return 0 if _EMBEDDING.match(name) else None


def no_weight_decay(model: nn.Module) -> frozenset[str]:
    """Return the names of parameters without weight decay: 1-D ones, biases, tables of positions and tokens."""
    return frozenset(
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim <= 1 or name.endswith("bias") or name.rpartition(".")[2] in _TABLES
    )


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count scalars; works on the meta device too."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return ParameterCount(trainable=sum(n for n, trained in sizes if trained), total=sum(n for n, _ in sizes))


def _idle_rule(rule: str, patterns: Sequence[str], names: Sequence[str]) -> str:
    """Return the rule, its patterns, and the names that look most like them."""
    shown = rule if tuple(patterns) == (rule,) else f"{rule} ({', '.join(patterns)})"
    near = difflib.get_close_matches(patterns[0], names, n=3, cutoff=0.0)
    return f"{shown} (nearest names: {', '.join(near)})"
