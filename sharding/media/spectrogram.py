"""Log-mel spectrograms."""

import contextlib
import io
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from sharding.errors import MediaError
from sharding.format.shard_set import AudioParameters

_FLOOR = float(np.log(np.finfo(np.float32).eps))
"""Kaldi's floor: the value of a bin without energy."""
_AUDIBLE = 1e-3  # peak of a waveform that cannot give a spectrogram of nothing but the floor

Spectrogram = npt.NDArray[np.float16]


def log_mel(pcm: npt.NDArray[np.float32], parameters: AudioParameters) -> Spectrogram:
    """float16 [rows, num_mel_bins] of mono samples; sound shorter than a window is padded to one.

    Raises:
        MediaError: ``bad_spectrogram`` for NaN, infinity, or one value everywhere although there is sound.
    """
    window = round(parameters.sample_rate_hz * parameters.frame_length_ms / 1000)
    if not np.isfinite(pcm).all():
        raise MediaError("bad_spectrogram", "expected finite audio samples, found NaN or infinity")
    centred = pcm - pcm.mean(dtype=np.float64).astype(np.float32)
    mel = _filter_bank(np.pad(centred, (0, max(0, window - len(centred)))), parameters)
    check_spectrogram(mel, parameters.num_mel_bins)
    inner = centred[window:-window]  # a click at the very ends lies where the windows fade out, or behind the last one
    if mel.max() == mel.min() and np.abs(inner).max(initial=0.0) > _AUDIBLE:
        raise MediaError("bad_spectrogram", f"expected a picture of the sound, found {mel.flat[0]} everywhere")
    return mel.astype(np.float16)


def check_spectrogram(mel: npt.NDArray[np.floating], num_mel_bins: int) -> None:
    """Refuse a spectrogram of another width, with NaN or infinity, or constant above the floor.

    Raises:
        MediaError: ``bad_spectrogram``.
    """
    if mel.ndim != 2 or mel.shape[1] != num_mel_bins:
        raise MediaError("bad_spectrogram", f"expected [rows, {num_mel_bins}], found {list(mel.shape)}")
    if not np.isfinite(mel).all():
        raise MediaError("bad_spectrogram", "expected finite values, found NaN or infinity")
    if mel.size and mel.max() == mel.min() and mel.flat[0] > _FLOOR + 0.01:
        raise MediaError("bad_spectrogram", f"expected a picture of the sound, found {mel.flat[0]} everywhere")


def no_spectrogram(parameters: AudioParameters) -> Spectrogram:
    """The spectrogram of a sample without audio: no rows."""
    return np.zeros((0, parameters.num_mel_bins), np.float16)


def npy_bytes(mel: Spectrogram) -> bytes:
    """The array as a .npy file (version 1.0, no pickle)."""
    sink = io.BytesIO()
    np.lib.format.write_array(sink, np.ascontiguousarray(mel), version=(1, 0), allow_pickle=False)
    return sink.getvalue()


def _filter_bank(pcm: npt.NDArray[np.float32], parameters: AudioParameters) -> npt.NDArray[np.float32]:
    import torch
    from torchaudio.compliance.kaldi import fbank

    with _one_torch_thread(), torch.inference_mode():
        mel = fbank(
            torch.from_numpy(np.ascontiguousarray(pcm, np.float32))[None],
            htk_compat=True,
            sample_frequency=float(parameters.sample_rate_hz),
            use_energy=False,
            window_type="hanning",
            num_mel_bins=parameters.num_mel_bins,
            dither=0.0,
            frame_length=parameters.frame_length_ms,
            frame_shift=parameters.frame_shift_ms,
        )
    result: npt.NDArray[np.float32] = mel.numpy()
    return result


@contextlib.contextmanager
def _one_torch_thread() -> Iterator[None]:
    """The same sums in the same order on every machine; the caller's setting comes back."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
