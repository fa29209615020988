"""What is done to the sound of a test clip, to see how much a model depends on it: the paper's settings.

Shards keep log-mel spectrograms and no waveform, so noise is added where its power adds up: in the mel bins. The power
spectrum of a sum is the sum of the power spectra plus a cross term whose mean is zero. The mean of the noise's own
spectrum follows from its colour, the pre-emphasis of the filter bank and its filters; around the mean each bin of a row
varies as the power of Gaussian noise in that filter does. What is approximated: the cross term is left out, rows vary
independently although their windows overlap, and the signal-to-noise ratio counts what lies between 20 Hz and half the
sample rate. A test compares it with noise that was added to waveforms: means agree within half a decibel.

Everything is drawn from (seed, sample), so neither the number of workers nor the order of samples changes a draw.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ca2st.batch import ClipBatch
from ca2st.model.network import HolisticModel, ModelOutput
from ca2st.spec import MEL_ROW_SECONDS
from ca2st.training.evaluate import EvaluationSource
from pipelines.augment.spectrogram import MEL_MEAN, MEL_SCALE
from sharding.format.shard_set import AudioParameters

Colour = Literal["white", "pink"]
MOST_NOISE_DECIBELS = 20.0
"""Signal-to-noise ratios are drawn from 0 to this many decibels."""
MOST_SHIFT_SECONDS = 2.0
"""Sound is shifted by up to so much, earlier or later, circularly within what a view hears."""
MISSING_SHARE = 0.2
"""Share of the rows of a view that is missing, in one piece; it gets what a mask gets: the mean of all spectrograms."""
_PREEMPHASIS = 0.97
_LOWEST_HZ = 20.0
_FLOOR = 1.1920928955078125e-07
"""Kaldi's least energy of a mel bin."""

Rows = NDArray[np.float64]
"""Log-mel rows `[rows, bins]`, as they are stored: not normalised, without padding."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Perturbation:
    """One way to disturb what a model hears."""

    says: str
    """In a few words, for a plot."""
    sound: Callable[[Rows, np.random.Generator, AudioParameters], Rows] | None = None
    """Gives the rows that are heard instead; None: they stay."""
    has_audio: bool = True
    """Whether the model is given any sound."""
    audio_keys: bool = True
    """Whether the visual experts may attend to the sound."""


def _noisy(rows: Rows, generator: np.random.Generator, audio: AudioParameters, colour: Colour) -> Rows:
    return with_noise(rows, generator, audio, colour, decibels=generator.uniform(0, MOST_NOISE_DECIBELS))


def _shifted(rows: Rows, generator: np.random.Generator, _audio: AudioParameters) -> Rows:
    seconds = generator.uniform(-MOST_SHIFT_SECONDS, MOST_SHIFT_SECONDS)
    return np.roll(rows, round(seconds / MEL_ROW_SECONDS), axis=0)


def _missing(rows: Rows, generator: np.random.Generator, _audio: AudioParameters) -> Rows:
    length = round(MISSING_SHARE * len(rows))
    first = int(generator.integers(0, len(rows) - length + 1))
    left = rows.copy()
    left[first : first + length] = MEL_MEAN
    return left


PERTURBATIONS: dict[str, Perturbation] = {
    "white_noise": Perturbation(says="white noise, 0 to 20 dB", sound=partial(_noisy, colour="white")),
    "pink_noise": Perturbation(says="pink noise, 0 to 20 dB", sound=partial(_noisy, colour="pink")),
    "time_shift": Perturbation(says="shifted by up to 2 s", sound=_shifted),
    "missing_segment": Perturbation(says="20 % missing", sound=_missing),
    "masked_audio_keys": Perturbation(says="audio keys masked", audio_keys=False),
    "no_sound": Perturbation(says="no sound", has_audio=False),
}
"""By name. ``masked_audio_keys``: the visual experts hear nothing, the head reads the audio expert. ``no_sound``: clips
are what clips without a sound track are, see `ca2st.model.network`."""


def with_noise(
    rows: Rows, generator: np.random.Generator, audio: AudioParameters, colour: Colour, *, decibels: float
) -> Rows:
    """Return log-mel rows with noise of a signal-to-noise ratio, in the mean over the rows."""
    noise, degrees, heard = _noise_of_bins(colour, audio.sample_rate_hz, audio.num_mel_bins, audio.frame_length_ms)
    power = np.exp(rows)
    power[power <= _FLOOR * (1 + 1e-3)] = 0.0
    level = float((power @ heard).sum()) / (len(rows) * 10 ** (decibels / 10))
    varying = generator.gamma(degrees, 1 / degrees, size=rows.shape)
    return np.log(np.maximum(power + level * noise * varying, _FLOOR))


@cache
def _noise_of_bins(colour: Colour, rate_hz: int, num_bins: int, window_ms: float) -> tuple[Rows, Rows, Rows]:
    """Return what is known of each mel bin `[bins]`: the mean power of noise in it, how steady it is, and how loud.

    The noise has power 1 between 20 Hz and half the sample rate; how steady: the shape of a gamma distribution; how
    loud: by what to multiply the bin's power to undo the pre-emphasis in the mean over the bin.
    """
    from torchaudio.compliance.kaldi import get_mel_banks

    length = int(rate_hz * window_ms / 1000)
    padded = 1 << (length - 1).bit_length()
    filters = get_mel_banks(num_bins, padded, float(rate_hz), _LOWEST_HZ, 0.0, 100.0, -500.0, 1.0)[0].double().numpy()
    hertz = np.arange(padded // 2) * rate_hz / padded
    gains = 1 + _PREEMPHASIS**2 - 2 * _PREEMPHASIS * np.cos(2 * math.pi * hertz / rate_hz)
    shape = np.where(hertz < _LOWEST_HZ, 0.0, 1.0 if colour == "white" else 1 / np.maximum(hertz, _LOWEST_HZ))
    weights = filters * (gains * shape)
    means = weights.sum(axis=1)
    # The power of two places of the spectrum is alike by their distance, as the window's own spectrum falls.
    window = 0.5 - 0.5 * np.cos(2 * math.pi * np.arange(length) / (length - 1))
    spectrum = np.fft.fft(window**2, 2 * len(hertz))
    likeness = np.abs(spectrum / spectrum[0])[: len(hertz)] ** 2
    apart = np.abs(np.subtract.outer(np.arange(len(hertz)), np.arange(len(hertz))))
    spread = np.einsum("mi,ij,mj->m", weights, likeness[apart], weights)
    degrees = np.where(means > 0, means**2 / np.maximum(spread, 1e-300), 1.0)
    emphasised = (filters * gains).sum(axis=1)
    heard = np.divide(filters.sum(axis=1), emphasised, out=np.zeros(num_bins), where=emphasised > 0)
    return means / float((filters.sum(axis=0) * shape).sum()), degrees, heard


class PerturbedSource:
    """An evaluation source whose sound is disturbed."""

    def __init__(self, source: EvaluationSource, name: str, *, seed: int, audio: AudioParameters) -> None:
        self._source, self._name, self._seed, self._audio = source, name, seed, audio
        self._perturbation = PERTURBATIONS[name]
        self.num_samples = source.num_samples

    def batches(self) -> Iterator[ClipBatch]:
        """As the source's, with other sound; clips without sound stay so."""
        for batch in self._source.batches():
            if not self._perturbation.has_audio:
                yield replace(batch, has_audio=torch.zeros_like(batch.has_audio), mel=torch.zeros_like(batch.mel))
            elif self._perturbation.sound is None:
                yield batch
            else:
                views = zip(batch.mel, batch.sample_ids, batch.has_audio.tolist(), strict=True)
                mel = [self._view(mel, key) if heard else mel for mel, key, heard in views]
                yield replace(batch, mel=torch.stack(mel))

    def _view(self, mel: Tensor, key: str) -> Tensor:
        """Disturb the rows of a view that are sound, not those that pad it; all views of a sample have one draw."""
        assert self._perturbation.sound is not None
        rows = mel.double().numpy() * MEL_SCALE + MEL_MEAN
        heard = num_heard_rows(rows)
        if heard == 0:
            return mel
        words = hashlib.blake2b(f"{self._name}/{self._seed}/{key}".encode(), digest_size=16).digest()
        generator = np.random.default_rng(int.from_bytes(words))
        rows[:heard] = self._perturbation.sound(rows[:heard], generator, self._audio)
        return torch.from_numpy((rows - MEL_MEAN) / MEL_SCALE).to(mel.dtype)


def num_heard_rows(rows: Rows) -> int:
    """Return how many rows come before the padding, whose values are 0 before normalising."""
    sounds = np.flatnonzero(np.abs(rows).max(axis=1) > 1e-4)
    return int(sounds[-1]) + 1 if len(sounds) else 0


class DeafVisualExperts(nn.Module):
    """A model whose visual experts cannot attend to the sound, while its head reads the audio expert."""

    def __init__(self, model: HolisticModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, video: Tensor, mel: Tensor, intervals_seconds: Tensor, has_audio: Tensor) -> ModelOutput:
        """As the model."""
        output: ModelOutput = self.model(
            video, mel, intervals_seconds, has_audio, audio_keys=torch.zeros_like(has_audio)
        )
        return output
