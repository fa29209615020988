"""The synthetic world's picture and sound carry what their labels say, and nothing of the other labels."""

import functools
import math
from collections import Counter
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ca2st.errors import UserInputError
from sharding.synthetic.clips import draw_frames, scene_of, sound_samples
from sharding.synthetic.config import SyntheticConfig
from sharding.synthetic.factors import MOTIONS, SHAPES, TONES_HZ, factors_of, label_spaces, labels_of

SMALL = SyntheticConfig(frame_size=32, min_frames=8, max_frames=8)
FACTORS = ("space", "time", "audio")


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.integers(2, 6),
    motions=st.integers(2, 8),
    tones=st.integers(2, 8),
    num_samples=st.integers(1, 400),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_first_samples_hold_combinations_and_classes_evenly(shapes, motions, tones, num_samples, seed) -> None:
    config = SyntheticConfig(num_shapes=shapes, num_motions=motions, num_tones=tones, seed=seed)
    found = [factors_of(config, "train", index) for index in range(num_samples)]
    combinations = Counter(found)
    even = num_samples / math.prod(config.sizes)
    assert set(combinations.values()) <= {math.floor(even), math.ceil(even)}
    for name, size in zip(FACTORS, config.sizes, strict=True):
        counts = Counter(getattr(factors, name) for factors in found)
        assert {counts[label] for label in range(size)} <= {num_samples // size, -(-num_samples // size)}


def test_whole_blocks_make_the_factors_exactly_independent() -> None:
    found = [factors_of(SyntheticConfig(), "train", index) for index in range(128)]
    for first, second in (("space", "time"), ("space", "audio"), ("time", "audio")):
        pairs = Counter((getattr(factors, first), getattr(factors, second)) for factors in found)
        assert pairs == dict.fromkeys(product(range(4), range(4)), 8)


def test_the_holistic_class_is_the_combination_of_the_others() -> None:
    config = SyntheticConfig(num_shapes=3, num_motions=5, num_tones=2)
    spaces = label_spaces(config)
    assert [len(space.classes) for space in spaces] == [3, 5, 2, 30]
    for index in range(30):
        labels = labels_of(config, "train", index)
        named = [space.classes[label] for space, label in zip(spaces, labels, strict=True)]
        assert named[3] == " ".join(named[:3])


def test_splits_and_seeds_share_no_order_and_no_draws() -> None:
    worlds = [("train", 0), ("validation", 0), ("train", 1)]
    orders = {tuple(factors_of(SyntheticConfig(seed=seed), split, n) for n in range(64)) for split, seed in worlds}
    scenes = [scene_of(SyntheticConfig(seed=seed), split, n) for split, seed in worlds for n in range(20)]
    starts = {tuple(scene.bodies[0].track[0]) for scene in scenes}
    assert (len(orders), len(starts)) == (3, 60)


@functools.cache
def drawn(num_samples: int) -> np.ndarray:
    """The middle frame of every sample, in grey."""
    return np.stack([draw_frames(SMALL, "train", n)[4].mean(axis=-1) for n in range(num_samples)])


@functools.cache
def spectra(num_samples: int) -> np.ndarray:
    sounds = [sound_samples(SMALL, "train", n, num_frames=8) for n in range(num_samples)]
    return np.stack([np.log(np.abs(np.fft.rfft(sound)[40:400]).reshape(-1, 5).mean(axis=1) + 1e-6) for sound in sounds])


def accuracy_of_a_linear_probe(features: np.ndarray, labels: np.ndarray) -> float:
    """Held-out accuracy of ridge regression onto one-hot labels."""
    flat = features.reshape(len(features), -1)
    flat = np.c_[(flat - flat.mean(axis=0)) / (flat.std() + 1e-9), np.ones(len(flat))]
    half = len(flat) // 2
    gram = flat[:half].T @ flat[:half] + 30.0 * np.eye(flat.shape[1])
    weights = np.linalg.solve(gram, flat[:half].T @ np.eye(4)[labels[:half]])
    return float(np.mean((flat[half:] @ weights).argmax(axis=1) == labels[half:]))


def labels(name: str, num_samples: int) -> np.ndarray:
    return np.array([getattr(factors_of(SMALL, "train", n), name) for n in range(num_samples)])


@pytest.mark.parametrize("name", ["time", "audio"])
def test_one_frame_reveals_neither_motion_nor_tone(name: str) -> None:
    assert accuracy_of_a_linear_probe(drawn(1600), labels(name, 1600)) < 0.31  # chance .25, four deviations .037


@pytest.mark.parametrize("name", ["space", "time"])
def test_the_sound_reveals_neither_shape_nor_motion(name: str) -> None:
    assert accuracy_of_a_linear_probe(spectra(1600), labels(name, 1600)) < 0.31


def test_the_sound_reveals_the_tone() -> None:
    assert accuracy_of_a_linear_probe(spectra(1600), labels("audio", 1600)) > 0.9


@pytest.mark.parametrize("motion", range(4))
def test_at_every_moment_the_position_is_uniform_whatever_the_motion(motion: int) -> None:
    config = SyntheticConfig(min_frames=16, max_frames=16)
    indices = [n for n in range(2400) if factors_of(config, "train", n).time == motion]
    places = np.stack([scene_of(config, "train", n).bodies[0].track for n in indices])
    expected = (np.arange(len(indices)) + 0.5) / len(indices)
    gaps = np.abs(np.sort(places, axis=0) - expected[:, None, None]).max(axis=0)
    assert len(indices) == 600
    assert gaps.max() < 0.09  # Kolmogorov and Smirnov: .08 is the 0.1 % point of one; 32 are looked at


def test_two_frames_reveal_the_motion() -> None:
    """The peak of the circular correlation between frames is the step of the shape."""
    steps = np.array(list(MOTIONS.values())[:4])
    right = 0
    for n in range(100):
        frames = draw_frames(SyntheticConfig(), "train", n).astype(float).mean(axis=-1)
        changes = frames - frames.mean(axis=0)
        first, second = np.fft.fft2(changes[2]), np.fft.fft2(changes[5])
        peak = np.unravel_index(np.fft.ifft2(second * first.conj()).real.argmax(), (64, 64))
        step = (np.array(peak)[::-1] + 32) % 64 - 32
        right += int((steps @ step).argmax()) == factors_of(SyntheticConfig(), "train", n).time
    assert right >= 95


def test_every_shape_covers_about_the_same_area_and_looks_different() -> None:
    config = SyntheticConfig(num_shapes=6, frame_size=64)
    areas: dict[int, list[float]] = {shape: [] for shape in range(6)}
    for n in range(96):
        scene, shape = scene_of(config, "train", n), factors_of(config, "train", n).space
        bright = draw_frames(config, "train", n)[0].mean(axis=-1) > 128
        areas[shape].append(float(bright.mean()) / scene.bodies[0].radius ** 2)
    means = [float(np.mean(values)) for values in areas.values()]
    assert len(means) == len(SHAPES)
    assert max(means) < 1.15 * min(means)


@pytest.mark.parametrize("tone", range(8))
def test_the_pitch_is_that_of_the_class_within_its_jitter(tone: int) -> None:
    config = SyntheticConfig(num_tones=8)
    indices = [n for n in range(256) if factors_of(config, "train", n).audio == tone][:6]
    for n in indices:
        sound = sound_samples(config, "train", n, num_frames=20)
        spectrum = np.abs(np.fft.rfft(sound * np.hanning(len(sound)), n=2**16))
        pitch = spectrum.argmax() * config.sample_rate_hz / 2**16
        assert abs(12 * math.log2(pitch / TONES_HZ[tone])) < 2.0  # semitones; the classes are six apart


def test_sound_is_as_long_as_the_video_and_never_clips_flat() -> None:
    for n in range(20):
        num_frames = scene_of(SyntheticConfig(), "train", n).num_frames
        sound = sound_samples(SyntheticConfig(), "train", n, num_frames=num_frames)
        assert len(sound) == num_frames * 1000
        assert 0.02 < np.abs(sound).max() <= 1.0
        assert np.mean(np.abs(sound) == 1.0) < 0.01


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, r"synthetic\.num_samples: expected 1 to 999999, found 0"),
        ({"seed": -1}, r"synthetic\.seed: expected 0 to 4294967295, found -1"),
        ({"num_shapes": 7}, r"synthetic\.num_shapes: expected 2 to 6, found 7"),
        ({"num_motions": 1}, r"synthetic\.num_motions: expected 2 to 8"),
        ({"num_tones": 9}, r"synthetic\.num_tones: expected 2 to 8"),
        ({"frame_size": 33}, r"synthetic\.frame_size: expected an even number of pixels, found 33"),
        ({"min_frames": 30}, r"synthetic\.max_frames: expected at least min_frames \(30\), found 21"),
        ({"sample_rate_hz": 10_000}, r"synthetic\.sample_rate_hz: expected one of 8000, .*, found 10000"),
        ({"workers": 0}, r"synthetic\.workers: expected 1 to 256, found 0"),
        ({"difficulty": "hrad"}, r"synthetic\.difficulty: expected one of easy, medium, hard, found 'hrad' \(did you"),
        ({"binding": True, "min_frames": 18}, r"synthetic\.min_frames: binding .* a multiple of 4, found 18"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, int | str], message: str) -> None:
    with pytest.raises(UserInputError, match=message):
        SyntheticConfig(**options)
