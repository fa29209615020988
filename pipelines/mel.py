"""The spectrogram member: parsed by hand-checked header, cropped, padded and normalised."""

import io
import tokenize

import numpy as np
from numpy.typing import NDArray

from pipelines.augment.spectrogram import UNCHANGED, SpectrogramDraw
from pipelines.errors import SampleDamageError

MEL_MEAN = -4.2677393
MEL_SCALE = 2 * 4.5689974
"""(x - MEL_MEAN) / MEL_SCALE is what the audio expert was trained on (AudioSet statistics of AST)."""
_HEADER_ERRORS = (ValueError, TypeError, SyntaxError, tokenize.TokenError, RecursionError, MemoryError)
"""What NumPy's parser of headers raises, which reads them as Python literals."""


def parse_mel(data: bytes, *, num_rows: int, num_bins: int, where: str) -> NDArray[np.float16]:
    """The float16 [rows, bins] array of a ``.mel.npy`` member; `where` names it in messages.

    The shape comes from the index and the header must agree, so a hostile header reserves no memory.

    Raises:
        SampleDamageError: not an npy file of that dtype, shape, order and size.
    """
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        if version != (1, 0):
            raise ValueError(f"npy version {version}")
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
    except _HEADER_ERRORS as error:
        raise SampleDamageError(f"{where}: not a spectrogram ({error}); convert the set again") from error
    found = (shape, dtype.str, fortran_order, len(data) - stream.tell())
    expected = ((num_rows, num_bins), "<f2", False, 2 * num_rows * num_bins)
    if found != expected:
        raise SampleDamageError(
            f"{where}: expected (shape, dtype, Fortran order, bytes) {expected}, found {found}; convert the set again"
        )
    return np.frombuffer(data, dtype="<f2", offset=stream.tell()).reshape(num_rows, num_bins)


def mel_view(
    mel: NDArray[np.float16],
    *,
    start_row: int,
    num_rows: int,
    has_audio: bool,
    draw: SpectrogramDraw = UNCHANGED,
) -> NDArray[np.float32]:
    """`num_rows` rows from `start_row`, zero rows appended where the clip ends, rolled, normalised, noise and masks.

    Without audio all zeros: the mean of what the expert reads, not the value of a padded row.
    """
    view = np.zeros((num_rows, mel.shape[1]), dtype=np.float32)
    if not has_audio:
        return view
    rows = mel[start_row : start_row + num_rows]
    view[: len(rows)] = rows
    if draw.roll:
        view = np.roll(view, draw.roll, axis=0)
    return draw.finish((view - np.float32(MEL_MEAN)) / np.float32(MEL_SCALE))
