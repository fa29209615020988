"""The reference backend: Pillow decodes, torch resizes by a formula written out here. The oracle of the others.

Pillow and DALI's CPU decoder agree bit for bit on the frames of our shards (tests hold them to it).

Resizing n source pixels to m: target pixel i has its centre at c = (i + 0.5) * n / m - 0.5 on the source grid. Its
value is the mean of the source pixels j, weighted by max(0, 1 - |j - c| / r) with r = max(1, n / m): bilinear
interpolation when growing, a triangle that covers all of the shrunk area when shrinking. Weights are scaled to sum
1, so at the border the pixels inside the crop count alone. Columns first, then rows, in float32; one rounding, half
up, at the end.
"""

import io
import math
from collections.abc import Sequence

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor

from pipelines.backends import RenderRequest
from pipelines.crops import CropBox
from pipelines.errors import SampleDamageError
from pipelines.stats import StatsRecorder


class ReferenceBackend:
    """Renders one clip after the other in the calling thread."""

    name = "reference"

    def __init__(self, *, crop_size: int, stats: StatsRecorder) -> None:
        self._crop_size, self._stats = crop_size, stats

    def render(self, requests: Sequence[RenderRequest]) -> UInt8[Tensor, "views 3 time height width"]:
        """See `ViewBackend.render`."""
        return torch.stack([view for request in requests for view in self._views(request)])

    def close(self) -> None:
        """Nothing is held."""

    def _views(self, request: RenderRequest) -> list[UInt8[Tensor, "3 time height width"]]:
        with self._stats.timed("decode_seconds"):
            frames = decode_frames(request)
        with self._stats.timed("augment_seconds"):
            views = [resized_crop(frames, box, size=self._crop_size) for box in request.boxes]
            return [rearrange(view.flip(-1) if request.flip else view, "t c h w -> c t h w") for view in views]


def decode_frames(request: RenderRequest) -> UInt8[Tensor, "time 3 height width"]:
    """RGB pixels of a clip's frames; a repeated frame is decoded once.

    Raises:
        SampleDamageError: a frame cannot be decoded.
    """
    decoded = {data: _decode(data, request.where) for data in dict.fromkeys(request.frames)}
    return torch.stack([decoded[data] for data in request.frames])


def _decode(data: bytes, where: str) -> UInt8[Tensor, "3 height width"]:
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            pixels = np.array(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise SampleDamageError(
            f"{where}: a frame has the right checksum but cannot be decoded ({error}); convert the set again"
        ) from error
    return rearrange(torch.from_numpy(pixels), "h w c -> c h w")


def resized_crop(
    frames: UInt8[Tensor, "time 3 height width"], box: CropBox, *, size: int
) -> UInt8[Tensor, "time 3 size size"]:
    """The pixels of `box` resized to `size` x `size` by the module's formula."""
    crop = frames[..., box.top : box.top + box.height, box.left : box.left + box.width]
    # Frames and colours last: every tap then copies whole runs of memory.
    planes = rearrange(crop, "t c h w -> h w (t c)").float()
    columns = _resize(planes, dim=1, size=size)
    rows = _resize(columns, dim=0, size=size)
    return rearrange((rows + 0.5).floor().clamp(0, 255).to(torch.uint8), "h w (t c) -> t c h w", c=3)


def _resize(
    planes: Float[Tensor, "height width planes"], *, dim: int, size: int
) -> Float[Tensor, "new_height new_width planes"]:
    taps, weights = triangle_taps(planes.shape[dim], size)
    along = (1, size, 1) if dim else (size, 1, 1)
    total = planes.index_select(dim, taps[0]) * weights[0].view(along)
    for tap, weight in zip(taps[1:], weights[1:], strict=True):
        total += planes.index_select(dim, tap) * weight.view(along)
    return total


def triangle_taps(num_source: int, num_target: int) -> tuple[Int[Tensor, "taps target"], Float[Tensor, "taps target"]]:
    """Source pixels that each target pixel reads, and their weights, as the module's formula says.

    Added tap by tap, so a value never depends on the number of threads.
    """
    scale = num_source / num_target
    radius = max(1.0, scale)
    centre = (torch.arange(num_target, dtype=torch.float64) + 0.5) * scale - 0.5
    first = (centre - radius).ceil()
    taps = first + torch.arange(math.floor(2 * radius) + 1, dtype=torch.float64)[:, None]
    weights = (1 - (taps - centre).abs() / radius).clamp(min=0)
    weights[(taps < 0) | (taps >= num_source)] = 0
    weights /= weights.sum(dim=0)
    return taps.clamp(0, num_source - 1).long(), weights.float()
