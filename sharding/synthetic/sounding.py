"""The sound: one tone with random timbre, loudness, onset, wavering and noise. Only its pitch is a label."""

import numpy as np
from jaxtyping import Float

from sharding.synthetic.config import SyntheticConfig
from sharding.synthetic.factors import SOUNDING, TONES_HZ, factors_of, generator

_NUM_HARMONICS = 4
_JITTER_SEMITONES = 1.5
"""Classes are six semitones apart: jittered pitches of two classes stay three apart."""


def sound_samples(
    config: SyntheticConfig, split: str, index: int, *, num_frames: int
) -> Float[np.ndarray, "num_samples"]:
    """Mono sound of sample `index`, -1 to 1, exactly as long as `num_frames` of its video."""
    random = generator(config.seed, split, SOUNDING, index)
    num_samples = round(num_frames * config.sample_rate_hz / config.frames_per_second)
    seconds = np.arange(num_samples) / config.sample_rate_hz
    pitch_hz = TONES_HZ[factors_of(config, split, index).audio] * _jitter(random)
    tone = _tone(random, seconds, pitch_hz) * _envelope(random, seconds)
    noise = random.standard_normal(num_samples)
    noise /= np.sqrt(np.mean(noise**2))
    loudness, noise_db = random.uniform(0.05, 0.3), random.uniform(-20.0, -3.0)
    mixed = loudness * (tone + 10 ** (noise_db / 20) * noise)
    return np.asarray(np.clip(mixed, -1.0, 1.0), dtype=np.float32)


def _jitter(random: np.random.Generator) -> float:
    return float(2 ** (random.uniform(-_JITTER_SEMITONES, _JITTER_SEMITONES) / 12))


def _tone(random: np.random.Generator, seconds: Float[np.ndarray, "n"], pitch_hz: float) -> Float[np.ndarray, "n"]:
    """Harmonics of random strength and phase; pitch wavers by a quarter of a semitone. Mean square 1."""
    waver = 0.25 / 12 * np.log(2) * np.sin(2 * np.pi * (random.uniform(3, 7) * seconds + random.random()))
    phase = np.cumsum(pitch_hz * np.exp(waver)) * (seconds[1] - seconds[0])
    strengths = random.uniform(0.0, 0.8, _NUM_HARMONICS) / np.arange(1, _NUM_HARMONICS + 1)
    strengths[0] = 1.0
    starts = random.random(_NUM_HARMONICS)
    orders = np.arange(1, _NUM_HARMONICS + 1)
    waves = np.sin(2 * np.pi * (orders[:, None] * phase + starts[:, None]))
    tone = strengths @ waves
    return np.asarray(tone / np.sqrt(np.mean(tone**2)))


def _envelope(random: np.random.Generator, seconds: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """Silence, a short rise, then a slow swell or fade."""
    onset, rise = random.uniform(0.0, 0.3), random.uniform(0.01, 0.1)
    slope = random.uniform(-0.5, 0.5)
    swell = 1.0 + slope * (seconds / seconds[-1] - 0.5)
    return np.asarray(np.clip((seconds - onset) / rise, 0.0, 1.0) * swell)
