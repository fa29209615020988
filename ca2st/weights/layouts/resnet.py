"""Names of ResNet-50 as torchvision and timm write it.

Other networks have exactly these names and shapes (timm's resnetaa50 and resnetblur50 filter before each stride): a
public name tells them apart (`hub_config.check_architecture`), in a plain file it cannot be seen.
"""

from ca2st.weights.layouts.layout import Layout
from ca2st.weights.published_tables import Names

BLOCKS_OF_STAGE = (3, 4, 6, 3)
_NORM_TENSORS = ("weight", "bias", "running_mean", "running_var")


def _unit(theirs: tuple[str, str], ours: tuple[str, str]) -> dict[str, str]:
    """A convolution without a bias and its BatchNorm."""
    (their_conv, their_norm), (our_conv, our_norm) = theirs, ours
    return {f"{their_conv}.weight": f"{our_conv}.weight"} | {
        f"{their_norm}.{tensor}": f"{our_norm}.{tensor}" for tensor in _NORM_TENSORS
    }


def _tensors() -> dict[str, str]:
    names = _unit(("conv1", "bn1"), ("stem.conv", "stem.norm"))
    for stage, num_blocks in enumerate(BLOCKS_OF_STAGE):
        for block in range(num_blocks):
            theirs, ours = f"layer{stage + 1}.{block}.", f"stages.{stage}.{block}."
            units = [(f"conv{i}", f"bn{i}") for i in (1, 2, 3)]
            units += [("downsample.0", "downsample.1")] if block == 0 else []
            for conv, norm in units:
                names |= _unit((theirs + conv, theirs + norm), (ours + conv, ours + norm))
    return names


_ORIGINAL = Layout(
    name="ResNet-50",
    prefixes=("module.", ""),
    marker="layer1.0.conv1.weight",
    once=Names(modules={}, tensors=_tensors()),
    ignored=("*.num_batches_tracked", "fc.*", "module.fc.*"),
)
"""The classifier and the counters of training are left aside. Running statistics are frozen weights here."""

RESNET50_LAYOUTS = (_ORIGINAL,)
