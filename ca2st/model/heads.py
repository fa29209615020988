"""From the experts' pooled features to logits: which features each target reads, through which last adapter.

s, t, a are the pooled features of the spatial, temporal and audio expert; Ad_x and Q_x are last adapters::

            single label, or several sharing a feature    verb and noun
    CAST    head(Ad_s(s) + Ad_t(t))                       noun = head(s), verb = head(t)
    CAVA    head(Ad_a(a) + Ad_s(s)), Ad with skip         the same sum for both
    CA2ST   head(Ad_s(s) + Ad_t(t) + Q_a(a))              noun = head(Ad_s(s) + Q_n(a))
                                                          verb = head(Ad_t(t) + Q_v(a))
    alone   head(feature)                                 head(feature) for both
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ca2st.model.adapter import Adapter
from ca2st.model.config import ModelConfig, ModelKind, TargetSpec
from ca2st.model.initial import new_linear
from ca2st.model.structure import ExpertName

AdapterKind = Literal["plain", "skip", "query", "none"]
EVERY_TARGET = "*"


@dataclass(frozen=True, kw_only=True, slots=True)
class Term:
    """One summand of a classifier's input: the feature of `expert` through the last adapter `adapter`."""

    expert: ExpertName
    """Whose feature."""
    kind: AdapterKind
    """`plain`: GELU adapter whose second Linear starts at zero; `skip`: the same plus its input; `query`: QuickGELU
    adapter that starts like any Linear; `none`: the feature itself."""
    adapter: str
    """Name of the adapter inside the head."""


def _term(expert: ExpertName, kind: AdapterKind, *, adapter: str = "") -> Term:
    return Term(expert=expert, kind=kind, adapter=adapter or expert)


_SPATIAL, _TEMPORAL = _term("spatial", "plain"), _term("temporal", "plain")
_SUMS: dict[ModelKind, dict[str, tuple[Term, ...]]] = {
    "cast": {EVERY_TARGET: (_SPATIAL, _TEMPORAL)},
    "cava": {EVERY_TARGET: (_term("audio", "skip"), _term("spatial", "skip"))},
    "ca2st": {EVERY_TARGET: (_SPATIAL, _TEMPORAL, _term("audio", "query"))},
    "spatial": {EVERY_TARGET: (_term("spatial", "none"),)},
    "temporal": {EVERY_TARGET: (_term("temporal", "none"),)},
    "audio": {EVERY_TARGET: (_term("audio", "none"),)},
}
_VERB_NOUN_SUMS: dict[ModelKind, dict[str, tuple[Term, ...]]] = {
    "cast": {"noun": (_term("spatial", "none"),), "verb": (_term("temporal", "none"),)},
    "ca2st": {
        "noun": (_SPATIAL, _term("audio", "query", adapter="audio_noun")),
        "verb": (_TEMPORAL, _term("audio", "query", adapter="audio_verb")),
    },
}


def is_verb_noun(targets: Sequence[TargetSpec]) -> bool:
    """Whether the targets are exactly `verb` and `noun`, which have heads of their own."""
    return {target.name for target in targets} == {"verb", "noun"}


def sums_of(kind: ModelKind, targets: Sequence[TargetSpec]) -> dict[str, tuple[Term, ...]]:
    """Summands of each target's classifier; the key `*` stands for all targets."""
    return _VERB_NOUN_SUMS.get(kind, _SUMS[kind]) if is_verb_noun(targets) else _SUMS[kind]


class Head(nn.Module):
    """Last adapters and one Linear classifier a target."""

    def __init__(self, config: ModelConfig, targets: Sequence[TargetSpec]) -> None:
        super().__init__()
        self.sums = sums_of(config.kind, targets)
        terms = {term.adapter: term for summands in self.sums.values() for term in summands if term.kind != "none"}
        self.adapters = nn.ModuleDict({name: _last_adapter(config, term.kind) for name, term in terms.items()})
        self.classifiers = cast(
            "Mapping[str, nn.Linear]",
            nn.ModuleDict({target.name: new_linear(config.dim, target.num_classes) for target in targets}),
        )
        with torch.no_grad():
            for classifier in self.classifiers.values():
                classifier.weight.mul_(config.head_init_scale)

    def forward(self, features: Mapping[ExpertName, Float[Tensor, "batch dim"]]) -> dict[str, Tensor]:
        """Logits `[batch, num_classes]` of every target."""
        inputs = {name: self._sum(summands, features) for name, summands in self.sums.items()}
        return {
            name: classifier(inputs[name if name in inputs else EVERY_TARGET])
            for name, classifier in self.classifiers.items()
        }

    def _sum(self, summands: Sequence[Term], features: Mapping[ExpertName, Tensor]) -> Tensor:
        adapted = [
            features[term.expert] if term.kind == "none" else self.adapters[term.adapter](features[term.expert])
            for term in summands
        ]
        total = adapted[0]
        for summand in adapted[1:]:
            total = total + summand
        return total


def _last_adapter(config: ModelConfig, kind: AdapterKind) -> Adapter:
    if kind == "query":
        return Adapter(config.dim, config.adapter_dim, activation="quick_gelu", zero=False)
    return Adapter(config.dim, config.adapter_dim, skip=kind == "skip")
