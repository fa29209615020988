"""Where a view sits in the picture: every crop ends as one box of source pixels, resized to the view's size."""

import math
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class CropBox:
    """A rectangle of source pixels."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SquareCrop:
    """The square of the short side, at `fraction` of the room along the long side (0.5: the centre).

    Cropping this square and resizing it equals resizing the short side first and cropping then, up to the parts of
    a pixel by which the resized long side would be off.
    """

    fraction: float = 0.5

    def box(self, *, height: int, width: int) -> CropBox:
        """Return the square in a picture of that size."""
        side = min(height, width)
        top, left = (int(self.fraction * (size - side)) for size in (height, width))
        return CropBox(top=top, left=left, height=side, width=side)


@dataclass(frozen=True, kw_only=True, slots=True)
class RandomCrop:
    """Random resized crop: the first of some candidate shapes that fits, at a random place."""

    area_fractions: tuple[float, ...]
    """Candidate areas as parts of the picture's."""
    aspect_ratios: tuple[float, ...]
    """Candidate width / height, one per area."""
    vertical: float
    """Place along the vertical room, in [0, 1)."""
    horizontal: float
    """Place along the horizontal room, in [0, 1)."""

    def box(self, *, height: int, width: int) -> CropBox:
        """Return the box in a picture of that size; where no candidate fits, the largest centred one of near ratio."""
        for crop_height, crop_width in self._shapes(height * width):
            if 0 < crop_height <= height and 0 < crop_width <= width:
                top = int(self.vertical * (height - crop_height + 1))
                left = int(self.horizontal * (width - crop_width + 1))
                return CropBox(top=top, left=left, height=crop_height, width=crop_width)
        return self._centred(height, width)

    def _shapes(self, area: int) -> Iterator[tuple[int, int]]:
        for fraction, ratio in zip(self.area_fractions, self.aspect_ratios, strict=True):
            yield round(math.sqrt(area * fraction / ratio)), round(math.sqrt(area * fraction * ratio))

    def _centred(self, height: int, width: int) -> CropBox:
        ratio = min(max(width / height, min(self.aspect_ratios)), max(self.aspect_ratios))
        crop_height = min(height, max(1, round(width / ratio)))
        crop_width = min(width, max(1, round(height * ratio)))
        return CropBox(
            top=(height - crop_height) // 2, left=(width - crop_width) // 2, height=crop_height, width=crop_width
        )


Crop = RandomCrop | SquareCrop
"""A choice of place that becomes a box once the size of the picture is known."""
