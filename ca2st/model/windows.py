"""Windows of cross-attention: which queries meet which keys, as a rearrangement of both.

`time` groups by patch position: a query sees the keys at its own place in all frames. `space` groups by frame: it sees
every patch of its own frame. `space_time` is one group a clip.

Where one side has more patches than the other (a ResNet map against a grid of tokens), a place of the coarser side
meets a group of the finer side's patches: the `square` of patches that lies under it, or as many neighbours in `raster`
order.
"""

import math
from typing import Literal

from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from ca2st.model.config import Window

Grouping = Literal["raster", "square"]

_INTO: dict[Window, str] = {
    "time": "b t (g n) (h e) -> (b g) h (t n) e",
    "space": "b t p (h e) -> (b t) h p e",
    "space_time": "b t p (h e) -> b h (t p) e",
}
_OUT_OF: dict[Window, str] = {
    "time": "(b g) h (t n) e -> b t (g n) (h e)",
    "space": "(b t) h p e -> b t p (h e)",
    "space_time": "b h (t p) e -> b t p (h e)",
}
"""b clips, t token times, p patches of a time, g places of the coarser side with n patches each, h heads, e features of
a head. What stands in the first place attends alone."""


def into_windows(
    patches: Float[Tensor, "batch frames patches dim"],
    window: Window,
    *,
    num_heads: int,
    num_places: int,
    grouping: Grouping,
) -> Float[Tensor, "windows heads tokens head_dim"]:
    """Give every window a row of its own. `num_places`: patches of the coarser side."""
    if window == "time":
        together = _regroup(patches, _TOGETHER, num_places=num_places, grouping=grouping)
        return rearrange(together, _INTO[window], h=num_heads, g=num_places)
    return rearrange(patches, _INTO[window], h=num_heads)


def out_of_windows(
    attended: Float[Tensor, "windows heads tokens head_dim"],
    window: Window,
    *,
    batch: int,
    frames: int,
    num_places: int,
    grouping: Grouping,
) -> Float[Tensor, "batch frames patches dim"]:
    """The inverse of `into_windows`."""
    if window == "time":
        patches = rearrange(attended, _OUT_OF[window], b=batch, t=frames)
        return _regroup(patches, _APART, num_places=num_places, grouping=grouping)
    sizes = {"t": frames} if window == "space_time" else {"b": batch}
    return rearrange(attended, _OUT_OF[window], **sizes)


_TOGETHER = "b t (gy y gx x) d -> b t (gy gx y x) d"
_APART = "b t (gy gx y x) d -> b t (gy y gx x) d"
"""Between raster order and the order in which the y x patches of a square lie side by side."""


def _regroup(patches: Tensor, pattern: str, *, num_places: int, grouping: Grouping) -> Tensor:
    num_patches = patches.shape[2]
    if grouping == "raster" or num_patches == num_places:
        return patches
    rows, side = math.isqrt(num_places), math.isqrt(num_patches // num_places)
    return rearrange(patches, pattern, gy=rows, gx=rows, y=side, x=side)
