"""One decoded frame made ready to be encoded: upright, at most so large, even sizes, one pixel format and colour."""

from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

from sharding.errors import MediaError

_SCALER = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT


@dataclass(frozen=True, kw_only=True, slots=True)
class PictureForm:
    """Pixel format and colours of the stored pictures: 4:2:0 with eight bits."""

    pixel_format: str
    colour_range: ColorRange
    colour_space: Colorspace = Colorspace.ITU601


FULL_RANGE = PictureForm(pixel_format="yuvj420p", colour_range=ColorRange.JPEG)
"""0..255, as JPEG has it."""
LIMITED_RANGE = PictureForm(pixel_format="yuv420p", colour_range=ColorRange.MPEG)
"""16..235, as video has it."""


def output_size(width: int, height: int, short_side: int) -> tuple[int, int]:
    """Even width and height with the shorter at most `short_side` and the source's shape."""
    scale = min(Fraction(1), Fraction(short_side, min(width, height)))
    return _even(width * scale), _even(height * scale)


def _even(pixels: Fraction) -> int:
    return max(2, 2 * round(pixels / 2) if pixels.denominator > 1 else int(pixels) // 2 * 2)


class PictureMaker:
    """Makes the pictures of one clip; the first frame decides their size."""

    def __init__(self, *, short_side: int, form: PictureForm) -> None:
        self._short_side, self._form = short_side, form
        self._scaler = VideoReformatter()
        self._size = (0, 0)

    def upright(self, picture: av.VideoFrame) -> av.VideoFrame:
        """The frame scaled, converted and turned as its rotation says.

        Raises:
            MediaError: ``decode_error`` for a pixel format that cannot be converted.
        """
        turns = round(picture.rotation / 90) % 4
        if self._size == (0, 0):
            self._size = output_size(picture.width, picture.height, self._short_side)
        try:
            scaled = self._scaler.reformat(
                picture,
                *self._size,
                format=self._form.pixel_format,
                dst_colorspace=self._form.colour_space,
                dst_color_range=self._form.colour_range,
                interpolation=_SCALER,
                threads=1,
            )
        except ValueError as error:
            raise MediaError(
                "decode_error", f"pixel format {picture.format.name}: cannot be converted ({error})"
            ) from error
        return self._rotated(scaled, turns) if turns else scaled

    def _rotated(self, picture: av.VideoFrame, turns: int) -> av.VideoFrame:
        """The planes of a 4:2:0 frame turned counter-clockwise by `turns` quarters."""
        width, height = picture.width, picture.height
        flat = picture.to_ndarray().reshape(-1)
        luma, chroma = width * height, width * height // 4
        shapes = (
            (0, luma, height, width),
            (luma, chroma, height // 2, width // 2),
            (luma + chroma, chroma, height // 2, width // 2),
        )
        planes = [np.rot90(flat[at : at + size].reshape(rows, columns), turns) for at, size, rows, columns in shapes]
        rows, columns = planes[0].shape
        data = np.concatenate([plane.reshape(-1) for plane in planes]).reshape(rows * 3 // 2, columns)
        turned = av.VideoFrame.from_ndarray(data, format=self._form.pixel_format)
        turned.color_range, turned.colorspace = self._form.colour_range, self._form.colour_space
        return turned
