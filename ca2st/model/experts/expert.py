"""What an expert is: embed a clip into tokens, pass layers, pool.

A further expert (text, depth) is one more subclass: the layers that join experts only see its tokens, its layers and
the layout of its tokens.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, cast

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
    """In what the layers of the transformer experts differ."""

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

    adaptable: ClassVar[bool] = True
    """Whether its layers are `EncoderLayer`s, between whose halves adapters and the exchange go. A layer that is not
    runs whole before the exchange and has no adapters."""
    drops_attended: ClassVar[bool] = False
    """Whether DropPath also falls on the first half of its layers."""
    feature_dim: int
    """Width of the pooled feature."""

    @abstractmethod
    def grid_at(self, index: int) -> TokenGrid:
        """Layout of its tokens when the experts exchange them in layer `index` (0 = first)."""

    @abstractmethod
    def layer_at(self, index: int) -> nn.Module:
        """Its own layer `index`."""

    @abstractmethod
    def embed(self, inputs: ClipInputs) -> Float[Tensor, "batch sequences tokens dim"]:
        """Tokens of a clip before the first layer."""

    @abstractmethod
    def pool(self, tokens: Float[Tensor, "batch sequences tokens dim"]) -> Float[Tensor, "batch feature"]:
        """The feature of a clip from the last layer's tokens; holds the expert's final norm, if it has one."""

    @abstractmethod
    def forward(self, inputs: ClipInputs) -> Float[Tensor, "batch feature"]:
        """The expert alone, as it was pretrained."""


class TransformerExpert(Expert):
    """An expert of `depth` equal layers, whose tokens keep one layout."""

    def __init__(self, config: ModelConfig, grid: TokenGrid, flavour: Flavour) -> None:
        super().__init__()
        self.grid = grid
        self.feature_dim = config.dim
        self.layers = cast("Sequence[EncoderLayer]", nn.ModuleList())
        for _ in range(config.depth):
            cast("nn.ModuleList", self.layers).append(EncoderLayer(config, flavour))

    def grid_at(self, index: int) -> TokenGrid:  # noqa: ARG002  # the same in every layer
        """The one layout of its tokens."""
        return self.grid

    def layer_at(self, index: int) -> nn.Module:
        """Transformer layer `index`."""
        return self.layers[index]

    def forward(self, inputs: ClipInputs) -> Float[Tensor, "batch feature"]:
        """The expert alone, as it was pretrained."""
        tokens = self.embed(inputs)
        for layer in self.layers:
            tokens = layer(tokens)
        return self.pool(tokens)
