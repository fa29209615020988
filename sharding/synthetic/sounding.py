"""The sound: one tone with random timbre, loudness, wavering and noise; steady, or keyed on and off by a rhythm.

Only its pitch is the label ``audio``; only its rhythm is the label ``rhythm`` and decides ``binding``.
"""

import numpy as np
from jaxtyping import Float

from sharding.synthetic.config import NUM_QUARTERS, RHYTHMS, Difficulty, SyntheticConfig, beats, phases
from sharding.synthetic.factors import CLUTTERING, SOUNDING, TONES_HZ, binding_of, details_of, factors_of, generator

_NUM_HARMONICS = 4
_JITTER_SEMITONES = 1.5
"""Classes are six semitones apart: jittered pitches of two classes stay three apart."""
_RAMP_SECONDS = 0.01
"""Rise and fall of a keyed tone."""
_CLICK_SECONDS = 0.004
_HUM_HZ = (45.0, 65.0)
_Sound = Float[np.ndarray, "num_samples"]


def sound_samples(config: SyntheticConfig, split: str, index: int, *, num_frames: int) -> _Sound:
    """Mono sound of sample `index`, -1 to 1, exactly as long as `num_frames` of its video."""
    random, settings = generator(config.seed, split, SOUNDING, index), config.settings
    num_samples = round(num_frames * config.sample_rate_hz / config.frames_per_second)
    seconds = np.arange(num_samples) / config.sample_rate_hz
    number, rhythm = heard(config, split, index)
    tone = _tone(random, seconds, TONES_HZ[number] * _jitter(random)) * _envelope(random, seconds, rhythm)
    noise = random.standard_normal(num_samples)
    noise /= np.sqrt(np.mean(noise**2))
    loudness, noise_db = random.uniform(0.05, 0.3), random.uniform(*settings.hiss_db)
    clutter = _clutter(generator(config.seed, split, CLUTTERING, index), seconds, settings)
    mixed = loudness * (tone + 10 ** (noise_db / 20) * noise + clutter)
    return np.asarray(np.clip(mixed, -1.0, 1.0), dtype=np.float32)


def heard(config: SyntheticConfig, split: str, index: int) -> tuple[int, str | None]:
    """Pitch class and rhythm of the sound of sample `index`; None: a steady tone."""
    if config.binding:
        binding = binding_of(config, split, index)
        return binding.tone, RHYTHMS[binding.heard]
    rhythm = RHYTHMS[details_of(config, split, index).rhythm] if config.settings.keyed_sound else None
    return factors_of(config, split, index).audio, rhythm


def _jitter(random: np.random.Generator) -> float:
    return float(2 ** (random.uniform(-_JITTER_SEMITONES, _JITTER_SEMITONES) / 12))


def _tone(random: np.random.Generator, seconds: _Sound, pitch_hz: float) -> _Sound:
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


def _envelope(random: np.random.Generator, seconds: _Sound, rhythm: str | None) -> _Sound:
    """A slow swell or fade; before it a short silence and rise, or the beats of `rhythm`."""
    onset, rise = random.uniform(0.0, 0.3), random.uniform(0.01, 0.1)
    slope = random.uniform(-0.5, 0.5)
    swell = 1.0 + slope * (seconds / seconds[-1] - 0.5)
    gate = np.clip((seconds - onset) / rise, 0.0, 1.0) if rhythm is None else _keyed(rhythm, seconds)
    return np.asarray(gate * swell)


def _keyed(rhythm: str, seconds: _Sound) -> _Sound:
    """1 in the beats, 0 in the rests, with short ramps inside the beats; two beats in a row are two tones."""
    duration_seconds = seconds[-1] + seconds[1]
    moments = seconds / duration_seconds
    from_edge = np.minimum(phases(moments), 1.0 - phases(moments)) * duration_seconds / NUM_QUARTERS
    return np.asarray(beats(rhythm, moments) * np.clip(from_edge / _RAMP_SECONDS, 0.0, 1.0))


def _clutter(random: np.random.Generator, seconds: _Sound, settings: Difficulty) -> _Sound:
    """Hum below the tones, and clicks at random times."""
    hum_hz, start = random.uniform(*_HUM_HZ), random.random()
    sound = settings.hum * np.sin(2 * np.pi * (hum_hz * seconds + start))
    for moment in random.uniform(0.0, seconds[-1], random.poisson(settings.clicks_per_second * seconds[-1])):
        since = np.maximum(seconds - moment, 0.0)
        fading = np.where(seconds >= moment, np.exp(-since / _CLICK_SECONDS), 0.0)
        sound = sound + random.uniform(1.0, 3.0) * fading * random.standard_normal(len(seconds))
    return np.asarray(sound)
