"""Where ticks go: seconds of the video and hertz of mel bins as percentages of a picture's side."""

import math
from dataclasses import dataclass

_KALDI_LOWEST_HZ = 20.0
_HERTZ = (125, 250, 500, 1000, 2000, 4000, 8000, 16000)
_LEAST_GAP_PERCENT = 11.0
_STEPS_SECONDS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


@dataclass(frozen=True, kw_only=True, slots=True)
class Tick:
    """A label on an axis."""

    percent: float
    """From the left or the top."""
    label: str


def seconds_ticks(start: float, end: float, *, most: int = 6) -> list[Tick]:
    """Round seconds between `start` and `end`, at most about `most`."""
    span = end - start
    step = next((step for step in _STEPS_SECONDS if span / step <= most), _STEPS_SECONDS[-1])
    first, last = math.ceil(start / step - 1e-6), math.floor(end / step + 1e-6)
    decimals = max(0, math.ceil(-math.log10(step) - 1e-9))
    return [
        Tick(percent=100 * (number * step - start) / span, label=f"{number * step:.{decimals}f}")
        for number in range(first, last + 1)
    ]


def hertz_ticks(sample_rate_hz: int) -> list[Tick]:
    """Frequencies on the mel axis of the Kaldi filter bank, 20 Hz to half the sample rate, lowest at the bottom."""
    low, high = _mel(_KALDI_LOWEST_HZ), _mel(sample_rate_hz / 2)
    ticks: list[Tick] = []
    for hertz in _HERTZ:
        percent = 100 * (1 - (_mel(hertz) - low) / (high - low))
        near = bool(ticks) and ticks[-1].percent - percent < _LEAST_GAP_PERCENT
        if percent >= 0 and not near:
            ticks.append(Tick(percent=percent, label=f"{hertz // 1000} kHz" if hertz >= 1000 else f"{hertz} Hz"))
    return ticks


def hertz_of_bin(mel_bin: float, *, num_bins: int, sample_rate_hz: int) -> float:
    """The frequency at a place on the mel axis, counted in bins from its lower end."""
    low, high = _mel(_KALDI_LOWEST_HZ), _mel(sample_rate_hz / 2)
    mel = low + (high - low) * mel_bin / num_bins
    return 700 * (math.exp(mel / 1127) - 1)


def _mel(hertz: float) -> float:
    return 1127 * math.log(1 + hertz / 700)
