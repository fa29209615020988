from itertools import pairwise

import numpy as np
import pytest
import torch
from torchaudio.compliance.kaldi import fbank

from ca2st.batch import ClipBatch
from pipelines.augment.spectrogram import MEL_MEAN, MEL_SCALE
from ray_jobs.evaluation.perturbations import PERTURBATIONS, PerturbedSource, num_heard_rows, with_noise
from sharding.format.shard_set import AudioParameters

AUDIO = AudioParameters(policy="required")
RATE = AUDIO.sample_rate_hz


def log_mel(samples: np.ndarray, rate: int = RATE) -> np.ndarray:
    """As conversion makes it."""
    return fbank(
        torch.from_numpy(samples.astype(np.float32))[None],
        htk_compat=True,
        sample_frequency=float(rate),
        use_energy=False,
        window_type="hanning",
        num_mel_bins=128,
        dither=0.0,
    ).numpy()


def noise_of(colour: str, count: int, *, seed: int, rate: int = RATE) -> np.ndarray:
    """A waveform of power 1 between 20 Hz and half the rate."""
    spectrum = np.fft.rfft(np.random.default_rng(seed).normal(size=count))
    hertz = np.fft.rfftfreq(count, 1 / rate)
    spectrum *= np.where(hertz < 20, 0, 1 if colour == "white" else 1 / np.sqrt(np.maximum(hertz, 20)))
    samples = np.fft.irfft(spectrum, count)
    return samples / samples.std()


@pytest.mark.parametrize("rate", [16_000, 24_000])
@pytest.mark.parametrize("decibels", [0.0, 10.0, 20.0])
@pytest.mark.parametrize("colour", ["white", "pink"])
def test_noise_in_the_mel_bins_is_the_noise_of_a_waveform(colour: str, decibels: float, rate: int) -> None:
    seconds = np.arange(20 * rate) / rate
    sound = sum(np.sin(2 * np.pi * hertz * seconds) / hertz for hertz in (220, 440, 880, 3000))
    sound = sound / sound.std() * 0.1
    noise = noise_of(colour, len(sound), seed=1, rate=rate) * 0.1 * 10 ** (-decibels / 20)
    expected = log_mel(sound + noise, rate)
    audio = AudioParameters(policy="required", sample_rate_hz=rate)
    found = with_noise(
        log_mel(sound, rate).astype(np.float64), np.random.default_rng(0), audio, colour, decibels=decibels
    )
    filled = expected.max(axis=0) > -15  # Kaldi's lowest filters may hold no place of the spectrum at all
    power = 10 * np.log10(np.exp(expected[:, filled]).mean(0)), 10 * np.log10(np.exp(found[:, filled]).mean(0))
    assert np.abs(power[0] - power[1]).mean() < 0.5
    assert np.abs(found[:, filled].std(0) - expected[:, filled].std(0)).mean() < 0.25


class OneBatch:
    """Three clips: one padded behind row 60, one whole, one without sound."""

    num_samples = 3

    def batches(self):
        mel = torch.randn(3, 100, 128, generator=torch.Generator().manual_seed(0))
        mel[0, 60:] = -MEL_MEAN / MEL_SCALE
        mel[2] = 0
        yield ClipBatch(
            video=torch.zeros(3, 3, 2, 4, 4, dtype=torch.uint8),
            mel=mel,
            intervals_seconds=torch.zeros(3, 2, 2),
            labels=torch.zeros(3, 1, dtype=torch.int64),
            sample_ids=("a", "b", "c"),
            has_audio=torch.tensor([True, True, False]),
            is_padding=torch.zeros(3, dtype=torch.bool),
        )


def disturbed(name: str, *, seed: int = 0) -> ClipBatch:
    (batch,) = PerturbedSource(OneBatch(), name, seed=seed, audio=AUDIO).batches()
    return batch


CLEAN = next(OneBatch().batches())


@pytest.mark.parametrize("name", [name for name, one in PERTURBATIONS.items() if one.sound is not None])
def test_only_what_is_heard_is_disturbed_and_the_same_each_time(name: str) -> None:
    batch = disturbed(name)
    assert torch.equal(batch.mel[0, 60:], CLEAN.mel[0, 60:])
    assert torch.equal(batch.mel[2], CLEAN.mel[2])
    assert not torch.allclose(batch.mel[0, :60], CLEAN.mel[0, :60])
    assert torch.equal(batch.mel, disturbed(name).mel)
    assert not torch.equal(batch.mel, disturbed(name, seed=1).mel)


def test_a_shift_is_circular_and_keeps_every_row() -> None:
    batch = disturbed("time_shift")
    order = [int((CLEAN.mel[1] - row).abs().sum(1).argmin()) for row in batch.mel[1]]
    assert sorted(order) == list(range(100))
    assert {(after - before) % 100 for before, after in pairwise(order)} == {1}


def test_a_fifth_of_what_is_heard_goes_missing_in_one_piece() -> None:
    batch = disturbed("missing_segment")
    for clip, heard in ((0, 60), (1, 100)):
        gone = (batch.mel[clip, :heard].abs().max(dim=1).values < 1e-6).nonzero().flatten()
        assert len(gone) == heard // 5
        assert int(gone[-1] - gone[0]) == len(gone) - 1


def test_no_sound_is_a_mask_and_masked_keys_leave_the_sound_itself() -> None:
    assert not disturbed("no_sound").has_audio.any()
    assert torch.equal(disturbed("masked_audio_keys").mel, CLEAN.mel)
    assert disturbed("masked_audio_keys").has_audio.tolist() == [True, True, False]


def test_padding_is_told_from_sound() -> None:
    rows = CLEAN.mel.double().numpy() * MEL_SCALE + MEL_MEAN
    assert [num_heard_rows(rows[clip]) for clip in (0, 1)] == [60, 100]
    assert num_heard_rows(np.zeros((5, 128))) == 0
