"""The whole model: experts side by side, joined layer by layer, and heads; CAST, CAVA, CA2ST, or one expert alone.

`build_model` goes from a configuration to a model: what is trained in it, and in which precision the rest lies.

Heads go from the experts' pooled features to logits: which features each target reads, through which last adapter. s,
t, a are the pooled features of the spatial, temporal and audio expert; Ad_x and Q_x are last adapters::

            single label, or several sharing a feature    verb and noun
    CAST    head(Ad_s(s) + Ad_t(t))                       noun = head(s), verb = head(t)
    CAVA    head(Ad_a(a) + Ad_s(s)), Ad with skip         the same sum for both
    CA2ST   head(Ad_s(s) + Ad_t(t) + Q_a(a))              noun = head(Ad_s(s) + Q_n(a))
                                                          verb = head(Ad_t(t) + Q_v(a))
    alone   head(feature)                                 head(feature) for both

With ResNet-50 a Linear P to the width D stands for Ad_s: CAST's single label reads (P(s) + Ad_t(t)) / 2, Ad_t with
skip. Baselines: `late_add` reads the sum of the features, `late_concat` all of them side by side, for every target.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import translate
from typing import Literal, NamedTuple, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ca2st.errors import UserInputError
from ca2st.model.attention import new_linear
from ca2st.model.config import (
    EXPERTS,
    ExpertName,
    ExpertPrecision,
    HeldPrecision,
    ModelConfig,
    ModelKind,
    TargetSpec,
    Trainable,
    all_bridges,
    bridges_of_layer,
    check_clip,
    check_expert_precision,
    check_targets,
    check_trainable,
    stage_of_layer,
    uses_time_codes,
)
from ca2st.model.experts import Adapter, ClipInputs, Expert, build_expert
from ca2st.model.layers import HolisticLayer, only_where
from ca2st.model.tokens import TimeEncoder
from ca2st.spec import ClipSpec

AdapterKind = Literal["plain", "skip", "query", "none"]
Join = Literal["sum", "mean", "concat"]
EVERY_TARGET = "*"


class ModelOutput(NamedTuple):
    """What the model says about a batch."""

    logits: dict[str, Tensor]
    """`[batch, num_classes]` for every target."""
    features: dict[ExpertName, Tensor]
    """Pooled feature of every expert as it goes into the head: `[batch, dim]`, 2048 wide for ResNet-50."""


class HolisticModel(nn.Module):
    """Experts, the layers that join them, time codes and head.

    Parameter names: `experts.<expert>.*` the pretrained encoders; `layers.<i>.adapters|bottlenecks|bridges.*` what is
    added to layer i; `time_codes.*`; `head.*`.
    """

    def __init__(self, config: ModelConfig, clip: ClipSpec, targets: Sequence[TargetSpec]) -> None:
        super().__init__()
        self.config = config
        self.clip = clip
        self.targets = tuple(targets)
        self.activation_checkpointing = False  # whoever trains the model may turn it on
        experts = {name: build_expert(name, config, clip) for name in EXPERTS[config.kind]}
        self.experts = cast("Mapping[ExpertName, Expert]", nn.ModuleDict(experts))
        self.layers = nn.ModuleList(
            HolisticLayer(config, experts, bridges_of_layer(config, index), index=index)
            for index in range(config.depth)
        )
        self.time_codes = TimeEncoder(config, clip) if uses_time_codes(config) else None
        self.head = Head(config, targets, {name: expert.feature_dim for name, expert in experts.items()})

    def forward(
        self,
        video: Float[Tensor, "batch 3 time height width"],
        mel: Float[Tensor, "batch rows bins"],
        intervals_seconds: Float[Tensor, "batch intervals 2"],
        has_audio: Bool[Tensor, " batch"] | None = None,
        *,
        audio_keys: Bool[Tensor, " batch"] | None = None,
    ) -> ModelOutput:
        """Return logits and features of a batch of clips.

        `video` is normalised; `mel` is normalised; row 0 of `intervals_seconds` is the spectrogram's (start, end), the
        rest the video token times. What a model has no expert for is not read.

        `has_audio`: which clips have sound; None: all. Of the others the spectrogram reaches nothing: the visual
        experts get no update from the audio expert, and the head does not read its feature (`late_concat`: zeros).
        `audio_keys`: whose sound the visual experts hear; None: that of `has_audio`.
        """
        keys = (has_audio if audio_keys is None else audio_keys) if "audio" in self.experts else None
        inputs = ClipInputs(video, mel)
        codes = self.time_codes(intervals_seconds) if self.time_codes is not None else None
        tokens = {name: expert.embed(inputs) for name, expert in self.experts.items()}
        # With activation checkpointing only a layer's inputs are kept, and it runs again for its gradients.
        again = self.activation_checkpointing and self.training and torch.is_grad_enabled()
        for index, layer in enumerate(self.layers):
            own = {name: expert.layer_at(index) for name, expert in self.experts.items()}
            if again:
                tokens = checkpoint(layer, tokens, own, codes, keys, use_reentrant=False)
            else:
                tokens = layer(tokens, own, codes, keys)
        features = {name: expert.pool(tokens[name]) for name, expert in self.experts.items()}
        return ModelOutput(logits=self.head(features, has_audio), features=features)


@contextmanager
def whole_last_layer(model: HolisticModel) -> Iterator[None]:
    """Compute all of the last layer inside the block, also what reaches no output."""
    last = cast("HolisticLayer", model.layers[-1])
    before, last.whole = last.whole, True
    try:
        yield
    finally:
        last.whole = before


_RECOMPILE_LIMIT = 64
"""Layers of one structure share a compilation. Each structure (without DropPath, with and without audio) is compiled
anew for training, for evaluation and once for a varying number of clips: more than torch's default of 8 allows."""


def compile_layers(model: HolisticModel) -> None:
    """Compile each layer of `model` when it is first called.

    What cannot be compiled, a break in the graph or too many recompilations are errors, never a silent return to eager
    mode. Random draws are eager mode's own, so DropPath drops the same clips. Experts' embeddings, pooling and the head
    stay eager: they take a few per cent of the time.

    Raises dynamo's recompile limit for the whole process and leaves it raised: it is read at every later call, and
    other compiled functions of the process only get more room. Nor are graphs cut at the buckets of
    DistributedDataParallel: a layer is small beside a bucket, and the cuts would double the compilations.
    """
    torch._dynamo.config.optimize_ddp = False
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _RECOMPILE_LIMIT)
    for layer in model.layers:
        layer.compile(fullgraph=True, options={"fallback_random": True})


class Term(NamedTuple):
    """One part of a classifier's input: the feature of `expert` through the last adapter `adapter`."""

    expert: ExpertName
    kind: AdapterKind
    """`plain`: GELU adapter whose second Linear starts at zero; `skip`: the same plus its input; `query`: QuickGELU
    adapter that starts like any Linear; `none`: the feature itself. For ResNet's feature, wider than D, a Linear to the
    width D stands in the place of any adapter."""
    adapter: str


class HeadInput(NamedTuple):
    """What a classifier reads: adapted features, joined to one vector."""

    terms: Sequence[Term]
    join: Join = "sum"


_SPATIAL, _TEMPORAL = Term("spatial", "plain", "spatial"), Term("temporal", "plain", "temporal")
_AS_IT_IS = {expert: Term(expert, "none", expert) for expert in ("spatial", "temporal", "audio")}
_INPUTS: dict[ModelKind, HeadInput] = {
    "cast": HeadInput((_SPATIAL, _TEMPORAL)),
    "cava": HeadInput((Term("audio", "skip", "audio"), Term("spatial", "skip", "spatial"))),
    "ca2st": HeadInput((_SPATIAL, _TEMPORAL, Term("audio", "query", "audio"))),
    "spatial": HeadInput((_AS_IT_IS["spatial"],)),
    "temporal": HeadInput((_AS_IT_IS["temporal"],)),
    "audio": HeadInput((_AS_IT_IS["audio"],)),
}
_VERB_NOUN_INPUTS: dict[ModelKind, dict[str, HeadInput]] = {
    "cast": {"noun": HeadInput((_AS_IT_IS["spatial"],)), "verb": HeadInput((_AS_IT_IS["temporal"],))},
    "ca2st": {
        "noun": HeadInput((_SPATIAL, Term("audio", "query", "audio_noun"))),
        "verb": HeadInput((_TEMPORAL, Term("audio", "query", "audio_verb"))),
    },
}


def is_verb_noun(targets: Sequence[TargetSpec]) -> bool:
    """Return whether the targets are exactly `verb` and `noun`, which have heads of their own."""
    return {target.name for target in targets} == {"verb", "noun"}


def head_inputs(config: ModelConfig, targets: Sequence[TargetSpec]) -> dict[str, HeadInput]:
    """Return what each target's classifier reads; the key `*` stands for all targets.

    Raises:
        UserInputError: independent experts, and targets other than verb and noun.
    """
    features = [_AS_IT_IS[expert] for expert in EXPERTS[config.kind]]
    with_resnet = config.spatial_encoder == "resnet50"
    if config.fusion == "late_concat":
        return {EVERY_TARGET: HeadInput(features, join="concat")}
    if config.fusion == "late_add":
        return {EVERY_TARGET: HeadInput([_SPATIAL if with_resnet and f.expert == "spatial" else f for f in features])}
    if config.fusion == "independent" and not is_verb_noun(targets):
        found = ", ".join(target.name for target in targets)
        raise UserInputError(
            f"fusion independent: expected the targets verb and noun, one per expert, found {found}; "
            "for other labels train the experts alone: kind spatial, temporal"
        )
    if is_verb_noun(targets) and config.kind in _VERB_NOUN_INPUTS:
        return _VERB_NOUN_INPUTS[config.kind]
    if config.kind == "cast" and with_resnet:
        return {EVERY_TARGET: HeadInput((_SPATIAL, Term("temporal", "skip", "temporal")), join="mean")}
    return {EVERY_TARGET: _INPUTS[config.kind]}


class Head(nn.Module):
    """Last adapters and one Linear classifier per target."""

    def __init__(
        self, config: ModelConfig, targets: Sequence[TargetSpec], feature_dims: Mapping[ExpertName, int]
    ) -> None:
        super().__init__()
        self.inputs = head_inputs(config, targets)
        terms = {term.adapter: term for read in self.inputs.values() for term in read.terms if term.kind != "none"}
        self.adapters = nn.ModuleDict(
            {name: _last_adapter(config, term, feature_dims[term.expert]) for name, term in terms.items()}
        )
        widths = {}
        for name, read in self.inputs.items():
            dims = [feature_dims[term.expert] if term.kind == "none" else config.dim for term in read.terms]
            widths[name] = sum(dims) if read.join == "concat" else dims[0]
        self.input_of = {t.name: t.name if t.name in self.inputs else EVERY_TARGET for t in targets}
        self.classifiers = nn.ModuleDict(
            {target.name: new_linear(widths[self.input_of[target.name]], target.num_classes) for target in targets}
        )
        with torch.no_grad():
            for classifier in cast("Mapping[str, nn.Linear]", self.classifiers).values():
                classifier.weight.mul_(config.head_init_scale)

    def forward(
        self, features: Mapping[ExpertName, Float[Tensor, "batch _"]], has_audio: Bool[Tensor, " batch"] | None = None
    ) -> dict[str, Tensor]:
        """Return logits `[batch, num_classes]` of every target; `has_audio`: clips whose sound is read, None: all."""
        joined = {name: self._join(read, features, has_audio) for name, read in self.inputs.items()}
        return {name: classifier(joined[self.input_of[name]]) for name, classifier in self.classifiers.items()}

    def _join(self, read: HeadInput, features: Mapping[ExpertName, Tensor], has_audio: Tensor | None) -> Tensor:
        adapted = []
        for expert, kind, adapter in read.terms:
            value = features[expert] if kind == "none" else self.adapters[adapter](features[expert])
            adapted.append(only_where(has_audio, value) if expert == "audio" and has_audio is not None else value)
        if read.join == "concat":
            return torch.cat(adapted, dim=-1)
        total = adapted[0]
        for summand in adapted[1:]:
            total = total + summand
        return total / len(adapted) if read.join == "mean" else total


def _last_adapter(config: ModelConfig, term: Term, feature_dim: int) -> nn.Module:
    if term.expert == "spatial" and config.spatial_encoder == "resnet50":
        return new_linear(feature_dim, config.dim)
    if term.kind == "query":
        return Adapter(config.dim, config.adapter_dim, activation="quick_gelu", zero=False)
    return Adapter(config.dim, config.adapter_dim, skip=term.kind == "skip")


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


def held_precision(wanted: ExpertPrecision, *, training: str, device: str) -> HeldPrecision:
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
    """Numbers of scalars: those that get a gradient, and all."""

    trainable: int
    total: int


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
        RuleMatchesNothingError: a rule or pattern names nothing in this model; nothing is changed.
    """
    check_trainable(which)
    rules: Rules
    if isinstance(which, str):
        rules = {
            "added": added_rules(model),
            "head": _HEAD,
            "adapters": {**_HEAD, **_ADAPTERS},
            "all": {"all": ("*",)},
        }[which]
    else:
        rules = {pattern: (pattern,) for pattern in which}
    parameters = dict(model.named_parameters())
    trained: set[str] = set()
    idle: list[str] = []
    for rule, patterns in rules.items():
        compiled = [re.compile(translate(pattern)) for pattern in patterns]
        named = {name for name in parameters if any(pattern.match(name) for pattern in compiled)}
        trained |= named
        if not named:
            shown = rule if tuple(patterns) == (rule,) else f"{rule} ({', '.join(patterns)})"
            near = difflib.get_close_matches(patterns[0], parameters, n=3, cutoff=0.0)
            idle.append(f"{shown} (nearest names: {', '.join(near)})")
    if idle:
        raise RuleMatchesNothingError(
            f"trainable: expected every rule to name parameters of the model, found none for: {'; '.join(idle)}"
        )
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
