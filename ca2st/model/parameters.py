"""Which parameters are trained, which layer they belong to, and which are spared weight decay."""

import re
from collections.abc import Mapping
from typing import Literal, NamedTuple

from torch import nn

from ca2st.errors import CA2STError
from ca2st.model.config import ModelConfig
from ca2st.model.holistic import HolisticModel
from ca2st.model.structure import EXPERTS, all_bridges, uses_time_codes

Trainable = Literal["added", "all"]

_LAYER = re.compile(r"(?:experts\.\w+\.)?layers\.(\d+)\.")
_EMBEDDING = re.compile(r"experts\.\w+\.(?:patch_embed|positions|class_token|distillation_token|norm_pre)\b")
_TABLES = frozenset({"positions", "time_table", "space_table", "class_token", "distillation_token"})


class RuleMatchesNothingError(CA2STError):
    """A rule that names parameters which the model does not have: rule and model have grown apart."""


class ParameterCount(NamedTuple):
    """Numbers of scalars."""

    trainable: int
    """Of parameters that get a gradient."""
    total: int
    """Of all parameters."""


def added_rules(config: ModelConfig) -> dict[str, str]:
    """The published set: what each rule is called, and the pattern its parameter names begin with."""
    rules = {"head": r"head\."}
    if config.adapters:
        rules["adapters"] = r"layers\.\d+\.adapters\."
    if all_bridges(config):
        rules["bottleneck cross-attention"] = r"layers\.\d+\.(?:bottlenecks|bridges)\."
    if uses_time_codes(config):
        rules["time codes"] = r"time_codes\."
    for expert in EXPERTS[config.kind]:
        if expert != "audio":
            rules[f"final norm of the {expert} expert"] = rf"experts\.{expert}\.norm\."
    return rules


def set_trainable(model: HolisticModel, which: Trainable) -> None:
    """Let `added` (the published set: B-CA, adapters, time codes, final norms of visual experts, head) or `all` learn.

    Raises:
        RuleMatchesNothingError: a rule names nothing in this model.
    """
    set_trainable_by_rules(model, added_rules(model.config) if which == "added" else {"all": ""})


def set_trainable_by_rules(model: nn.Module, rules: Mapping[str, str]) -> None:
    """Let exactly the parameters learn whose name begins with one of the `rules`' patterns.

    Raises:
        RuleMatchesNothingError: a rule names nothing in this model.
    """
    patterns = {rule: re.compile(pattern) for rule, pattern in rules.items()}
    unused = set(rules)
    for name, parameter in model.named_parameters():
        matching = {rule for rule, pattern in patterns.items() if pattern.match(name)}
        unused -= matching
        parameter.requires_grad_(bool(matching))
    if unused:
        listed = ", ".join(f"{rule} ({rules[rule]})" for rule in sorted(unused))
        raise RuleMatchesNothingError(f"expected every rule to name parameters of the model, found none for: {listed}")


def layer_index(name: str) -> int | None:
    """Layer (0 = first) of a parameter, for layer-wise learning-rate decay g: its factor is g^(depth - layer).

    Adapters and B-CA count with the layer they sit in, the experts' embeddings with the first layer; None for heads,
    last adapters, final norms and time codes, whose factor is 1.
    """
    if match := _LAYER.match(name):
        return int(match[1])
    return 0 if _EMBEDDING.match(name) else None


def no_weight_decay(model: nn.Module) -> frozenset[str]:
    """Names of parameters without weight decay: 1-D ones, biases, and the tables of positions and tokens."""
    return frozenset(
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim <= 1 or name.endswith("bias") or name.rpartition(".")[2] in _TABLES
    )


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count scalars; works on the meta device too."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return ParameterCount(trainable=sum(n for n, trained in sizes if trained), total=sum(n for n, _ in sizes))
