"""The whole model: experts side by side, joined layer by layer; CAST, CAVA, CA2ST, or one expert alone."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

from jaxtyping import Float
from torch import Tensor, nn

from ca2st.model.config import ModelConfig, TargetSpec
from ca2st.model.experts import EXPERT_TYPES, ClipInputs, Expert
from ca2st.model.heads import Head
from ca2st.model.layer import HolisticLayer
from ca2st.model.structure import EXPERTS, ExpertName, uses_time_codes
from ca2st.model.time_codes import TimeEncoder
from ca2st.spec import ClipSpec


class ModelOutput(NamedTuple):
    """What the model says about a batch."""

    logits: dict[str, Tensor]
    """`[batch, num_classes]` for every target."""
    features: dict[ExpertName, Tensor]
    """Pooled `[batch, dim]` feature of every expert, as it goes into the head."""


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
        self.experts = cast(
            "Mapping[ExpertName, Expert]",
            nn.ModuleDict({name: EXPERT_TYPES[name](config, clip) for name in EXPERTS[config.kind]}),
        )
        grids = {name: expert.grid for name, expert in self.experts.items()}
        self.layers = nn.ModuleList(HolisticLayer(config, grids, index=index) for index in range(config.depth))
        self.time_codes = TimeEncoder(config, clip) if uses_time_codes(config) else None
        self.head = Head(config, targets)

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
            tokens = layer(tokens, {name: expert.layers[index] for name, expert in self.experts.items()}, codes)
        features = {name: expert.pool(tokens[name]) for name, expert in self.experts.items()}
        return ModelOutput(logits=self.head(features), features=features)
