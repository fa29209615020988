"""High dynamic range and wide gamut made into the BT.709 pictures that screens and models take frames for.

PQ and HLG: signal -> light on a display of 1000 nits (SMPTE ST 2084; BT.2100's HLG with its system gamma of 1.2 on
each of red, green and blue, as FFmpeg's zscale has it) -> BT.709 primaries -> tone curve -> BT.1886 (gamma 2.4). The
unit of light is 203 nits, where BT.2408 puts the white of ordinary video: up to 0.7 of it the curve changes nothing,
from there to 1000 nits it bends smoothly into white. What was ordinary video before it was put into PQ or HLG thus
comes out as it was, but for white (239 instead of 255). The curve works on the largest of red, green and blue, so hue
stays. Ordinary video of a wide gamut: primaries alone.
"""

from functools import lru_cache

import numpy as np

HDR_POLICIES = {
    "tone-map": "PQ and HLG are converted to BT.709, and counted",
    "refuse": "PQ and HLG are rejects",
}
HDR_TRANSFERS = {16: "PQ", 18: "HLG"}
"""Transfer characteristics of high dynamic range, by their number in H.273 (as FFmpeg's)."""
WIDE_PRIMARIES = {9: "BT.2020", 12: "Display P3"}
"""Primaries that are converted, by their number in H.273; those of BT.601 are too close to BT.709 to matter."""

_WHITE_NITS, _PEAK_NITS, _KNEE, _GAMMA = 203.0, 1000.0, 0.7, 2.4
_D65 = (0.3127, 0.3290)
_CHROMATICITIES = {
    1: ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060)),
    9: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
    12: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
}


def standard_rgb(rgb: np.ndarray, *, transfer: int, primaries: int) -> np.ndarray:
    """BT.709 pixels, uint8 [height, width, 3], of others.

    Args:
        rgb: Non-linear, full range, uint16 [height, width, 3].
        transfer: H.273's number; one of HDR_TRANSFERS, or any other for ordinary video.
        primaries: H.273's number; those of high dynamic range are BT.2020 unless they are known.
    """
    if primaries not in _CHROMATICITIES:
        primaries = 9 if transfer in HDR_TRANSFERS else 1
    light: np.ndarray = np.maximum(
        _light_table(transfer if transfer in HDR_TRANSFERS else 1)[rgb] @ _to_bt709(primaries).T, 0
    )
    if transfer in HDR_TRANSFERS:
        brightest = np.maximum(np.maximum(light[..., :1], light[..., 1:2]), light[..., 2:])  # faster than max(axis)
        light *= tone_curve(brightest) / np.maximum(brightest, np.float32(1e-6))
    roots = np.sqrt(np.minimum(light, 1))
    pixels: np.ndarray = _pixels_of_roots()[(roots * np.float32(4095) + np.float32(0.5)).astype(np.uint16)]
    return pixels


def tone_curve(light: np.ndarray) -> np.ndarray:
    """Light on an ordinary screen, 0..1, of light in units of 203 nits: the same up to 0.7, white at 1000 nits."""
    above, room = _PEAK_NITS / _WHITE_NITS - _KNEE, 1 - _KNEE
    bend = np.float32(room * above / (above - room))  # slope 1 at the knee, and 1.0 at the peak
    excess = np.maximum(light - np.float32(_KNEE), 0)
    curve: np.ndarray = np.minimum(light, np.float32(_KNEE)) + np.minimum(excess * bend / (excess + bend), room)
    return curve


@lru_cache(maxsize=4)
def _light_table(transfer: int) -> np.ndarray:
    """Light of every 16-bit signal, float32 [65536], in units of 203 nits."""
    signal = np.arange(65_536) / 65_535
    name = HDR_TRANSFERS.get(transfer)
    if name == "PQ":
        root = signal ** (32 / 2523)
        light = 10_000 * (np.maximum(root - 0.8359375, 0) / (18.8515625 - 18.6875 * root)) ** (16_384 / 2610)
        return (light / _WHITE_NITS).astype(np.float32)
    if name == "HLG":
        upper = (np.exp((signal - 0.55991073) / 0.17883277) + 0.28466892) / 12
        scene = np.where(signal <= 0.5, signal**2 / 3, upper)
        return (scene**1.2 * _PEAK_NITS / _WHITE_NITS).astype(np.float32)
    return (signal**_GAMMA).astype(np.float32)


@lru_cache(maxsize=1)
def _pixels_of_roots() -> np.ndarray:
    """Pixels by the square root of light, uint8 [4096]: the root is fast, and fine enough where light is little."""
    pixels: np.ndarray = np.round(255 * np.linspace(0, 1, 4096) ** (2 / _GAMMA)).astype(np.uint8)
    return pixels


@lru_cache(maxsize=4)
def _to_bt709(primaries: int) -> np.ndarray:
    matrix: np.ndarray = np.linalg.inv(_to_xyz(_CHROMATICITIES[1])) @ _to_xyz(_CHROMATICITIES[primaries])
    return matrix.astype(np.float32)


def _to_xyz(chromaticities: tuple[tuple[float, float], ...]) -> np.ndarray:
    """The matrix from linear RGB of these primaries and D65 to XYZ."""
    columns = np.array([[x / y, 1.0, (1 - x - y) / y] for x, y in (*chromaticities, _D65)]).T
    matrix: np.ndarray = columns[:, :3] * np.linalg.solve(columns[:, :3], columns[:, 3])
    return matrix
