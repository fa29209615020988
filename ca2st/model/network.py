"""The whole network, eager or compiled.

The whole model: experts side by side, joined layer by layer; CAST, CAVA, CA2ST, or one expert alone.

torch.compile of the layers that join the experts, in place: names, state and hooks stay as they are.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ca2st.model.config import ModelConfig, TargetSpec
from ca2st.model.experts import ClipInputs, Expert, build_expert
from ca2st.model.heads import Head
from ca2st.model.layers import HolisticLayer
from ca2st.model.positions import TimeCodes, TimeEncoder
from ca2st.model.structure import EXPERTS, ExpertName, bridges_of_layer, uses_time_codes
from ca2st.spec import ClipSpec


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
    ) -> ModelOutput:
        """Logits and features of a batch of clips.

        `video` is normalised; `mel` is normalised and zero where a clip has no sound; row 0 of `intervals_seconds` is
        the spectrogram's (start, end), the rest the video token times. What a model has no expert for is not read.
        """
        inputs = ClipInputs(video, mel)
        codes = self.time_codes(intervals_seconds) if self.time_codes is not None else None
        tokens = {name: expert.embed(inputs) for name, expert in self.experts.items()}
        for index, layer in enumerate(self.layers):
            own = {name: expert.layer_at(index) for name, expert in self.experts.items()}
            tokens = self._run(layer, tokens, own, codes)
        features = {name: expert.pool(tokens[name]) for name, expert in self.experts.items()}
        return ModelOutput(logits=self.head(features), features=features)

    def _run(
        self,
        layer: nn.Module,
        tokens: dict[ExpertName, Tensor],
        own: dict[ExpertName, nn.Module],
        codes: TimeCodes | None,
    ) -> dict[ExpertName, Tensor]:
        """One layer. With activation checkpointing only its inputs are kept, and it runs again for its gradients."""
        if self.activation_checkpointing and self.training and torch.is_grad_enabled():
            again: dict[ExpertName, Tensor] = checkpoint(layer, tokens, own, codes, use_reentrant=False)
            return again
        out: dict[ExpertName, Tensor] = layer(tokens, own, codes)
        return out


_RECOMPILE_LIMIT = 64
"""Layers of one structure share a compilation. Each structure (without DropPath, with and without audio) is compiled
anew for training, for evaluation and once for a varying number of clips: more than torch's default of 8 allows."""


def compile_layers(model: HolisticModel) -> None:
    """Compile each layer of `model` when it is first called.

    What cannot be compiled, a break in the graph or too many recompilations are errors, never a silent return to eager
    mode. Random draws are eager mode's own, so DropPath drops the same clips. Experts' embeddings, pooling and the head
    stay eager: they take a few per cent of the time.

    Raises dynamo's recompile limit for the whole process and leaves it raised: it is read at every later call, and
    other compiled functions of the process only get more room.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _RECOMPILE_LIMIT)
    for layer in model.layers:
        layer.compile(fullgraph=True, options={"fallback_random": True})
