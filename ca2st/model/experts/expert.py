"""What an expert is: embed a clip into tokens, pass layers, pool.

A further expert (text, depth) is one more subclass: the layers that join experts only see its tokens, its layers and
the layout of its tokens.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

from jaxtyping import Float
from torch import Tensor, nn

from ca2st.model.adapter import Activation, FeedForward
from ca2st.model.attention import QkvBias, SelfAttention
from ca2st.model.config import ModelConfig
from ca2st.model.tokens import TokenGrid


class ClipInputs(NamedTuple):
    """What a clip offers to the experts; each takes what it reads."""

    video: Float[Tensor, "batch 3 time height width"]
    """Normalised frames."""
    mel: Float[Tensor, "batch rows bins"]
    """Normalised log-mel spectrogram."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Flavour:
    """In what the layers of the experts differ."""

    activation: Activation
    """Of the FFN."""
    bias: QkvBias
    """Which of queries, keys and values have a bias."""
    eps: float
    """Of the layers' norms."""


class EncoderLayer(nn.Module):
    """One pre-norm transformer layer of an expert: X + MHSA(LN(X)), then + FFN(LN(.))."""

    def __init__(self, config: ModelConfig, flavour: Flavour) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim, eps=flavour.eps)
        self.attention = SelfAttention(config.dim, config.num_heads, bias=flavour.bias)
        self.norm2 = nn.LayerNorm(config.dim, eps=flavour.eps)
        self.mlp = FeedForward(config.dim, activation=flavour.activation)

    def forward(
        self, tokens: Float[Tensor, "batch sequences tokens dim"]
    ) -> Float[Tensor, "batch sequences tokens dim"]:
        """The layer as it was pretrained, with nothing added."""
        attended: Tensor = tokens + self.attention(self.norm1(tokens))
        out: Tensor = attended + self.mlp(self.norm2(attended))
        return out


class Expert(nn.Module, ABC):
    """A pretrained encoder. Layers are called one by one by the model, so that experts can exchange tokens between."""

    def __init__(self, config: ModelConfig, grid: TokenGrid, flavour: Flavour) -> None:
        super().__init__()
        self.grid = grid
        self.layers = cast("Sequence[EncoderLayer]", nn.ModuleList())
        for _ in range(config.depth):
            cast("nn.ModuleList", self.layers).append(EncoderLayer(config, flavour))

    @abstractmethod
    def embed(self, inputs: ClipInputs) -> Float[Tensor, "batch sequences tokens dim"]:
        """Tokens of a clip, laid out as `grid` says."""

    @abstractmethod
    def pool(self, tokens: Float[Tensor, "batch sequences tokens dim"]) -> Float[Tensor, "batch dim"]:
        """The feature of a clip from the last layer's tokens; holds the expert's final norm."""

    def forward(self, inputs: ClipInputs) -> Float[Tensor, "batch dim"]:
        """The expert alone, as it was pretrained."""
        tokens = self.embed(inputs)
        for layer in self.layers:
            tokens = layer(tokens)
        return self.pool(tokens)
