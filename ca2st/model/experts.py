"""The experts: CLIP, VideoMAE, AST and ResNet-50, with what adapters and layers are made of.

An expert embeds a clip into tokens, passes layers, pools. A further expert (text, depth) is one more subclass of
`Expert`: the layers that join experts only see its tokens, its layers and the layout of its tokens.
"""

import math
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple, cast

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn.functional import silu

from ca2st.model import attention
from ca2st.model.config import RESNET_STAGES, EncoderName, ExpertName, ModelConfig, encoder_of, stage_of_layer
from ca2st.model.tokens import (
    NUM_AUDIO_PREFIX,
    TokenGrid,
    audio_patches,
    clip_grid,
    pretrained_grid,
    resize_table,
    sinusoid_table,
)
from ca2st.spec import ClipSpec

Activation = Literal["gelu", "quick_gelu"]
_QUICK = 1.702


class QuickGELU(nn.Module):
    """CLIP's activation: x * sigmoid(1.702 x)."""

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Apply it to every element."""
        if torch.compiler.is_compiling():  # the compiler fuses the formula by itself
            return x * torch.sigmoid(_QUICK * x)
        activated: Tensor = _ScaledSiLU.apply(x)  # type: ignore[no-untyped-call]  # torch's own
        return activated


class _ScaledSiLU(torch.autograd.Function):
    """QuickGELU as silu(1.702 x) / 1.702: keeps x alone for the backward pass, and one new tensor in either pass.

    The formula as it stands keeps two tensors as large as the FFN's hidden layer and makes four.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return silu(_QUICK * x, inplace=True).div_(_QUICK)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        scaled = _QUICK * x
        slope: Tensor = torch.ops.aten.silu_backward.grad_input(gradients[0], scaled, grad_input=scaled)
        return slope


ACTIVATIONS: dict[Activation, type[nn.Module]] = {"gelu": nn.GELU, "quick_gelu": QuickGELU}
"""`gelu` is the exact one (erf)."""


class Adapter(nn.Module):
    """down (D -> D/4), activation, up (D/4 -> D); with `skip` the input is added.

    In a layer: the serial adapter after attention has the skip, the parallel one beside the FFN has not.
    """

    def __init__(
        self, dim: int, hidden_dim: int, *, skip: bool = False, activation: Activation = "gelu", zero: bool = True
    ) -> None:
        super().__init__()
        self.skip = skip
        self.down = attention.new_linear(dim, hidden_dim)
        self.activation = ACTIVATIONS[activation]()
        self.up = (attention.zero_linear if zero else attention.new_linear)(hidden_dim, dim)

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Adapt every token."""
        adapted: Tensor = self.up(self.activation(self.down(x)))
        return x + adapted if self.skip else adapted


class FeedForward(nn.Module):
    """FFN of an expert: D -> 4D -> D."""

    def __init__(self, dim: int, *, activation: Activation) -> None:
        super().__init__()
        self.fc1 = attention.expert_linear(dim, 4 * dim)
        self.activation = ACTIVATIONS[activation]()
        self.fc2 = attention.expert_linear(4 * dim, dim)

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Transform every token."""
        out: Tensor = self.fc2(self.activation(self.fc1(x)))
        return out


class ClipInputs(NamedTuple):
    """What a clip offers to the experts; each takes what it reads."""

    video: Float[Tensor, "batch 3 time height width"]
    """Normalised frames."""
    mel: Float[Tensor, "batch rows bins"]
    """Normalised log-mel spectrogram."""


_EPS = 1e-6
_CLIP_EPS = 1e-5


class EncoderLayer(nn.Module):
    """One pre-norm transformer layer of an expert: X + MHSA(LN(X)), then + FFN(LN(.))."""

    def __init__(self, config: ModelConfig, *, activation: Activation, bias: attention.QkvBias, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim, eps=eps)
        self.attention = attention.SelfAttention(config.dim, config.num_heads, bias=bias)
        self.norm2 = nn.LayerNorm(config.dim, eps=eps)
        self.mlp = FeedForward(config.dim, activation=activation)

    def forward(
        self, tokens: Float[Tensor, "batch sequences tokens dim"]
    ) -> Float[Tensor, "batch sequences tokens dim"]:
        """Run the layer as it was pretrained, with nothing added."""
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
    pools_prefix: ClassVar[bool] = False
    """Whether `pool` reads nothing but the prefix tokens, so that the last layer need not make new patches."""
    num_layers: int
    """Layers of the model; in each the expert runs what `layer_at` returns."""
    feature_dim: int
    """Width of the pooled feature."""

    @abstractmethod
    def grid_at(self, index: int) -> TokenGrid:
        """Return the layout of its tokens when the experts exchange them in layer `index` (0 = first)."""

    @abstractmethod
    def layer_at(self, index: int) -> nn.Module:
        """Return its own layer `index`."""

    @abstractmethod
    def embed(self, inputs: ClipInputs) -> Float[Tensor, "batch sequences tokens dim"]:
        """Return the tokens of a clip before the first layer."""

    @abstractmethod
    def pool(self, tokens: Float[Tensor, "batch sequences tokens dim"]) -> Float[Tensor, "batch feature"]:
        """Return the feature of a clip from the last layer's tokens; holds the expert's final norm, if it has one."""

    def forward(self, inputs: ClipInputs) -> Float[Tensor, "batch feature"]:
        """Run the expert alone, as it was pretrained."""
        tokens = self.embed(inputs)
        for index in range(self.num_layers):
            tokens = self.layer_at(index)(tokens)
        return self.pool(tokens)


class TransformerExpert(Expert):
    """An expert of `depth` equal layers, whose tokens keep one layout.

    `activation` is the FFN's, `bias` which of queries, keys and values have one, `eps` that of the layers' norms.
    """

    def __init__(
        self,
        config: ModelConfig,
        grid: TokenGrid,
        *,
        activation: Activation = "gelu",
        bias: attention.QkvBias = "qkv",
        eps: float = _EPS,
    ) -> None:
        super().__init__()
        self.grid = grid
        self.num_layers = config.depth
        self.feature_dim = config.dim
        self.layers = nn.ModuleList(
            EncoderLayer(config, activation=activation, bias=bias, eps=eps) for _ in range(config.depth)
        )

    def grid_at(self, index: int) -> TokenGrid:  # noqa: ARG002  # the same in every layer
        """Return the one layout of its tokens."""
        return self.grid

    def layer_at(self, index: int) -> nn.Module:
        """Return transformer layer `index`."""
        return self.layers[index]


class ClipExpert(TransformerExpert):
    """CLIP: the visual half of its ViT, on every second frame; the published spatial expert.

    Each of the frames 1, 3, 5, ... (the second of each tubelet) is an image of one cls token and its patches.
    """

    pools_prefix = True

    def __init__(self, config: ModelConfig, clip: ClipSpec) -> None:
        frames, rows, columns = clip_grid(config, clip)
        grid = TokenGrid(
            num_sequences=frames, num_prefix=1, num_frames=frames, num_patches=rows * columns, dim=config.dim
        )
        super().__init__(config, grid, activation="quick_gelu", eps=_CLIP_EPS)
        patch = config.patch_size
        self.patch_embed = nn.Conv2d(3, config.dim, kernel_size=patch, stride=patch, bias=False)
        attention.start_patch_embedding(self.patch_embed)
        self.class_token = attention.new_table(config.dim)
        self.positions = attention.new_table(1 + grid.num_patches, config.dim)
        self.norm_pre = nn.LayerNorm(config.dim, eps=_CLIP_EPS)
        self.norm = nn.LayerNorm(config.dim, eps=_EPS if config.kind == "cava" else _CLIP_EPS)

    def embed(self, inputs: ClipInputs) -> Float[Tensor, "batch sequences tokens dim"]:
        """Return patches and cls of each image, with positions, normed."""
        images = rearrange(inputs.video[:, :, 1::2], "b c t h w -> (b t) c h w")
        batch = inputs.video.shape[0]
        patches = rearrange(self.patch_embed(images), "(b t) d h w -> b t (h w) d", b=batch)
        cls = repeat(self.class_token, "d -> b t 1 d", b=batch, t=patches.shape[1])
        tokens: Tensor = self.norm_pre(torch.cat((cls, patches), dim=2) + self.positions)
        return tokens

    def pool(self, tokens: Float[Tensor, "batch sequences tokens dim"]) -> Float[Tensor, "batch dim"]:
        """Return the LN of the mean over frames of the cls token."""
        feature: Tensor = self.norm(tokens[:, :, 0].mean(dim=1))
        return feature


class VideoMAEExpert(TransformerExpert):
    """VideoMAE: a ViT on all frames; the published temporal expert.

    Tubelets of 2 frames x patch x patch, no cls token, fixed positions, no bias on the keys.
    """

    positions: Float[Tensor, "tokens dim"]

    def __init__(self, config: ModelConfig, clip: ClipSpec) -> None:
        frames, rows, columns = clip_grid(config, clip)
        grid = TokenGrid(num_sequences=1, num_prefix=0, num_frames=frames, num_patches=rows * columns, dim=config.dim)
        super().__init__(config, grid, bias="qv")
        tubelet = (2, config.patch_size, config.patch_size)
        self.patch_embed = nn.Conv3d(3, config.dim, kernel_size=tubelet, stride=tubelet)
        attention.start_patch_embedding(self.patch_embed)
        known = pretrained_grid(config, clip)
        table = sinusoid_table(math.prod(known), config.dim)
        table = resize_table(table, from_grid=known, to_grid=(frames, rows, columns))
        self.register_buffer("positions", table, persistent=False)
        self.norm = nn.LayerNorm(config.dim, eps=_EPS)

    def embed(self, inputs: ClipInputs) -> Float[Tensor, "batch sequences tokens dim"]:
        """Return tubelets in the order time, row, column, plus positions."""
        patches: Tensor = rearrange(self.patch_embed(inputs.video), "b d t h w -> b 1 (t h w) d")
        return patches + self.positions

    def pool(self, tokens: Float[Tensor, "batch sequences tokens dim"]) -> Float[Tensor, "batch dim"]:
        """Return the LN of the mean of all tokens."""
        feature: Tensor = self.norm(tokens.mean(dim=(1, 2)))
        return feature


class ASTExpert(TransformerExpert):
    """AST: a distilled DeiT on the log-mel spectrogram, the audio expert.

    cls and distillation token, then F' x T' patches of 16 x 16 with stride 10, row-major (frequency, then time).
    """

    drops_attended = True
    pools_prefix = True

    def __init__(self, config: ModelConfig, clip: ClipSpec) -> None:
        rows, columns = audio_patches(config, clip)
        grid = TokenGrid(
            num_sequences=1, num_prefix=NUM_AUDIO_PREFIX, num_frames=1, num_patches=rows * columns, dim=config.dim
        )
        super().__init__(config, grid)
        self.patch_embed = nn.Conv2d(1, config.dim, kernel_size=config.patch_size, stride=config.audio_stride)
        attention.start_patch_embedding(self.patch_embed)
        self.class_token = attention.new_table(config.dim)
        self.distillation_token = attention.new_table(config.dim)
        self.positions = attention.new_table(grid.num_tokens, config.dim)
        self.norm = nn.LayerNorm(config.dim, eps=_EPS)

    def embed(self, inputs: ClipInputs) -> Float[Tensor, "batch sequences tokens dim"]:
        """Return prefix tokens and spectrogram patches, plus positions."""
        image = rearrange(inputs.mel, "b rows bins -> b 1 bins rows")
        patches = rearrange(self.patch_embed(image), "b d f t -> b 1 (f t) d")
        prefix = torch.stack((self.class_token, self.distillation_token))
        tokens: Tensor = torch.cat((repeat(prefix, "n d -> b 1 n d", b=patches.shape[0]), patches), dim=2)
        return tokens + self.positions

    def pool(self, tokens: Float[Tensor, "batch sequences tokens dim"]) -> Float[Tensor, "batch dim"]:
        """Return the mean of the cls and the distillation token after the final norm."""
        feature: Tensor = self.norm(tokens[:, 0, :NUM_AUDIO_PREFIX]).mean(dim=1)
        return feature


_STEM_STRIDE, _STEM_DIM = 4, 64


class Stage(nn.Sequential):
    """One stage of bottleneck blocks, from tokens to tokens."""

    def forward(
        self, tokens: Float[Tensor, "batch frames places channels"]
    ) -> Float[Tensor, "batch frames new_places new_channels"]:
        """Return the next, coarser map."""
        side = round(tokens.shape[2] ** 0.5)
        images = rearrange(tokens, "b t (h w) c -> (b t) c h w", h=side)
        for block in self:
            images = block(images)
        return rearrange(images, "(b t) c h w -> b t (h w) c", b=tokens.shape[0])


class ResNetExpert(Expert):
    """ResNet-50: the convolutional spatial expert. Its four stages run in layers 3, 6, 9 and 12 of the temporal expert.

    It reads the same T images as CLIP; the feature is the mean over frames of the globally pooled last map (2048).
    torchvision's layout with BatchNorm as it was at the end of pretraining: statistics, scale and shift are buffers, so
    nothing about them ever trains. Between the layers a map [C, H, W] travels as H W tokens of width C, row by row.
    """

    adaptable = False

    def __init__(self, config: ModelConfig, clip: ClipSpec) -> None:
        # Imported here: it takes seconds, and no other expert needs it.
        from torchvision.models.resnet import Bottleneck, ResNet
        from torchvision.ops import FrozenBatchNorm2d

        super().__init__()
        network = ResNet(Bottleneck, [3, 4, 6, 3], norm_layer=FrozenBatchNorm2d)
        stem = OrderedDict(conv=network.conv1, norm=network.bn1, activation=network.relu, pool=network.maxpool)
        self.stem = nn.Sequential(stem)
        stages = cast("list[nn.Sequential]", [network.layer1, network.layer2, network.layer3, network.layer4])
        self.stages = nn.ModuleList(Stage(*stage) for stage in stages)
        self.stage_of_layer = stage_of_layer(config.depth)
        self.num_layers = config.depth
        self.no_stage = nn.Identity()
        self.stem_grid = _map_grid(clip, stride=_STEM_STRIDE, dim=_STEM_DIM)
        self.grids = [
            _map_grid(clip, stride=_STEM_STRIDE * 2**stage, dim=256 * 2**stage) for stage in range(RESNET_STAGES)
        ]
        self.feature_dim = self.grids[-1].dim

    def grid_at(self, index: int) -> TokenGrid:
        """Return the layout of the map of the newest stage that has run by then."""
        run = [stage for layer, stage in self.stage_of_layer.items() if layer <= index]
        return self.grids[max(run)] if run else self.stem_grid

    def layer_at(self, index: int) -> nn.Module:
        """Return the stage that runs in layer `index`; most layers have none and carry the map on."""
        return self.stages[self.stage_of_layer[index]] if index in self.stage_of_layer else self.no_stage

    def embed(self, inputs: ClipInputs) -> Float[Tensor, "batch sequences tokens dim"]:
        """Return the stem's maps of frames 1, 3, 5, ..."""
        images = rearrange(inputs.video[:, :, 1::2], "b c t h w -> (b t) c h w")
        tokens: Tensor = rearrange(self.stem(images), "(b t) c h w -> b t (h w) c", b=inputs.video.shape[0])
        return tokens

    def pool(self, tokens: Float[Tensor, "batch sequences tokens dim"]) -> Float[Tensor, "batch feature"]:
        """Return the mean over places and frames; there is no final norm."""
        return tokens.mean(dim=(1, 2))


def _map_grid(clip: ClipSpec, *, stride: int, dim: int) -> TokenGrid:
    """Return the layout of one feature map per token time, each crop_size / `stride` on a side."""
    frames = clip.num_frames // 2
    return TokenGrid(
        num_sequences=frames, num_prefix=0, num_frames=frames, num_patches=(clip.crop_size // stride) ** 2, dim=dim
    )


ENCODERS: dict[EncoderName, Callable[[ModelConfig, ClipSpec], Expert]] = {
    "clip": ClipExpert,
    "videomae": VideoMAEExpert,
    "ast": ASTExpert,
    "resnet50": ResNetExpert,
}


def build_expert(name: ExpertName, config: ModelConfig, clip: ClipSpec) -> Expert:
    """Return the expert `name` (spatial, temporal, audio) of a model, by the encoder that `config` gives it."""
    return ENCODERS[encoder_of(config, name)](config, clip)
