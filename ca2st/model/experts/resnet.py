"""ResNet-50: the convolutional spatial expert. Its four stages run in layers 3, 6, 9 and 12 of the temporal expert.

torchvision's layout with BatchNorm as it was at the end of pretraining: statistics, scale and shift are buffers, so
nothing about them ever trains. Between the layers a map [C, H, W] travels as H W tokens of width C, row by row.
"""

from collections.abc import Mapping, Sequence
from typing import cast

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from ca2st.model.config import ModelConfig
from ca2st.model.experts.expert import ClipInputs, Expert
from ca2st.model.structure import RESNET_STAGES, stage_of_layer
from ca2st.model.tokens import TokenGrid, map_grid
from ca2st.spec import ClipSpec

_BLOCKS_OF_STAGE = (3, 4, 6, 3)
_STEM_STRIDE, _STEM_DIM = 4, 64
_FIRST_STAGE_DIM = 256


class Stem(nn.Module):
    """7 x 7 convolution, norm, ReLU, max pooling: a quarter of the frame's side, 64 channels."""

    def __init__(self, conv: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.conv = conv
        self.norm = norm
        self.activation = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)

    def forward(self, images: Float[Tensor, "images 3 height width"]) -> Float[Tensor, "images 64 rows columns"]:
        """The map that the first stage reads."""
        features: Tensor = self.pool(self.activation(self.norm(self.conv(images))))
        return features


class Stage(nn.Sequential):
    """One stage of bottleneck blocks, from tokens to tokens."""

    def forward(
        self, tokens: Float[Tensor, "batch frames places channels"]
    ) -> Float[Tensor, "batch frames new_places new_channels"]:
        """The next, coarser map."""
        side = round(tokens.shape[2] ** 0.5)
        images = rearrange(tokens, "b t (h w) c -> (b t) c h w", h=side)
        for block in self:
            images = block(images)
        return rearrange(images, "(b t) c h w -> b t (h w) c", b=tokens.shape[0])


class ResNetExpert(Expert):
    """The same T images that CLIP reads; the feature is the mean over frames of the globally pooled last map (2048)."""

    adaptable = False

    def __init__(self, config: ModelConfig, clip: ClipSpec) -> None:
        # Imported here: it takes seconds, and no other expert needs it.
        from torchvision.models.resnet import Bottleneck, ResNet
        from torchvision.ops import FrozenBatchNorm2d

        super().__init__()
        network = ResNet(Bottleneck, list(_BLOCKS_OF_STAGE), norm_layer=FrozenBatchNorm2d)
        self.stem = Stem(network.conv1, network.bn1)
        stages = cast("list[nn.Sequential]", [network.layer1, network.layer2, network.layer3, network.layer4])
        self.stages = cast("Sequence[Stage]", nn.ModuleList(Stage(*stage) for stage in stages))
        self.stage_of_layer: Mapping[int, int] = stage_of_layer(config.depth)
        self.no_stage = nn.Identity()
        self.grids = [_grid(clip, stage) for stage in range(RESNET_STAGES)]
        self.stem_grid = map_grid(clip, stride=_STEM_STRIDE, dim=_STEM_DIM)
        self.feature_dim = self.grids[-1].dim

    def grid_at(self, index: int) -> TokenGrid:
        """The map of the newest stage that has run by then."""
        run = [stage for layer, stage in self.stage_of_layer.items() if layer <= index]
        return self.grids[max(run)] if run else self.stem_grid

    def layer_at(self, index: int) -> nn.Module:
        """The stage that runs in layer `index`; most layers have none and carry the map on."""
        return self.stages[self.stage_of_layer[index]] if index in self.stage_of_layer else self.no_stage

    def embed(self, inputs: ClipInputs) -> Float[Tensor, "batch sequences tokens dim"]:
        """The stem's maps of frames 1, 3, 5, ..."""
        images = rearrange(inputs.video[:, :, 1::2], "b c t h w -> (b t) c h w")
        tokens: Tensor = rearrange(self.stem(images), "(b t) c h w -> b t (h w) c", b=inputs.video.shape[0])
        return tokens

    def pool(self, tokens: Float[Tensor, "batch sequences tokens dim"]) -> Float[Tensor, "batch feature"]:
        """Mean over places and frames; there is no final norm."""
        return tokens.mean(dim=(1, 2))

    def forward(self, inputs: ClipInputs) -> Float[Tensor, "batch feature"]:
        """The expert alone, as it was pretrained."""
        tokens = self.embed(inputs)
        for stage in self.stages:
            tokens = stage(tokens)
        return self.pool(tokens)


def _grid(clip: ClipSpec, stage: int) -> TokenGrid:
    return map_grid(clip, stride=_STEM_STRIDE * 2**stage, dim=_FIRST_STAGE_DIM * 2**stage)
