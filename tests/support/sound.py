"""Sound of a segment as the converter cuts it, and where it lies."""

from pathlib import Path

import numpy as np

from sharding.media.encode import EncodedClip, encode_clip
from sharding.settings import ConversionConfig
from sharding.source import SourceSample

RATE = 16_000


def convert_one(path: Path, start: float | None = None, end: float | None = None, **options: object) -> EncodedClip:
    sample = SourceSample(
        sample_id=path.stem, path=path, start_seconds=start, end_seconds=end, labels=(0,), where="list.csv:1"
    )
    return encode_clip(ConversionConfig(**({"audio_policy": "required"} | options)).job(sample))  # type: ignore[arg-type]  # test options


def pcm_of(path: Path, start: float | None = None, end: float | None = None, **options: object) -> np.ndarray:
    audio = convert_one(path, start, end, **options).audio
    assert audio is not None
    return audio.pcm


def sounding(pcm: np.ndarray) -> tuple[float, float]:
    """First and last moment, in seconds, at which there is sound."""
    loud = np.flatnonzero(np.abs(pcm) > 0.1)
    return loud[0] / RATE, loud[-1] / RATE


def beeps_of(pcm: np.ndarray, start: float = 0.0) -> list[float]:
    """Seconds at which a tone of 1 kHz begins: where its energy over 10 ms reaches half of its most."""
    tone = np.exp(-2j * np.pi * 1000 * np.arange(160) / RATE)
    energy = np.abs(np.convolve(pcm, tone, "same"))
    is_loud = energy > energy.max() / 2
    return [start + at / RATE for at in np.flatnonzero(is_loud[1:] & ~is_loud[:-1]) + 1]
