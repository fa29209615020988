"""Arrays as pictures inside a page: frames and spectrograms as data URIs."""

import base64
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_FRAME_QUALITY = 88
_SILENT_GREY = 34


def frame_jpeg(frame: NDArray[np.uint8]) -> str:
    """A data URI of an RGB frame."""
    return data_uri(Image.fromarray(frame), "JPEG", quality=_FRAME_QUALITY)


def spectrogram_png(mel: NDArray[np.float32], num_heard_rows: int) -> str:
    """A data URI of [rows, bins] as a grey picture, time to the right, low frequencies at the bottom.

    Contrast is that of the sound alone; what is padding or silence is one dark grey.
    """
    grey = np.full(mel.shape, _SILENT_GREY, np.uint8)
    if num_heard_rows:
        heard = mel[:num_heard_rows]
        low, high = np.quantile(heard, (0.02, 0.998))
        grey[:num_heard_rows] = np.round(255 * np.clip((heard - low) / max(high - low, 1e-6), 0, 1))
    return data_uri(Image.fromarray(np.ascontiguousarray(grey.T[::-1])), "PNG")


def data_uri(image: Image.Image, kind: str, **options: int) -> str:
    """An image as the text of a data URI; `options` are those of Pillow's encoder."""
    sink = io.BytesIO()
    image.save(sink, kind, optimize=True, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(sink.getvalue()).decode()}"
