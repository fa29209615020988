"""Binding: neither sense alone knows the label, both together do, and pixels and samples show what they say."""

import functools
from collections import Counter
from itertools import permutations

import numpy as np
import pytest

from sharding.synthetic.clips import draw_frames, scene_of, sound_samples
from sharding.synthetic.config import DIFFICULTIES, RHYTHMS, SyntheticConfig, beats, moments_of
from sharding.synthetic.factors import Binding, binding_of, label_spaces, labels_of, object_shapes
from support.independence import dependence

WORLDS = {name: SyntheticConfig(difficulty=name, binding=True) for name in DIFFICULTIES}


@functools.cache
def bindings(name: str, num_samples: int) -> list[Binding]:
    return [binding_of(WORLDS[name], "train", n) for n in range(num_samples)]


@pytest.mark.parametrize("name", WORLDS)
def test_the_label_is_independent_of_the_picture_and_of_the_sound(name: str) -> None:
    found = bindings(name, 6_000)
    keepers = np.array([binding.keeper for binding in found])
    _, pictures = np.unique([binding.rhythms for binding in found], axis=0, return_inverse=True)
    assert dependence(keepers, pictures) < 4.0  # all objects' rhythms together
    assert dependence(keepers, np.array([binding.heard for binding in found])) < 4.0
    assert dependence(keepers, np.array([binding.tone for binding in found])) < 4.0


def test_by_construction_every_pairing_is_equally_likely() -> None:
    """Each order of rhythms comes with each keeper equally often: the two marginals factorise exactly."""
    found = Counter((binding.rhythms, binding.keeper) for binding in bindings("easy", 12_000))
    cells = len(list(permutations(range(6), 2))) * 2
    assert len(found) == cells
    assert max(abs(count - 12_000 / cells) for count in found.values()) < 5 * np.sqrt(12_000 / cells)


@pytest.mark.parametrize("name", WORLDS)
def test_only_the_pairing_tells_and_it_tells_everything(name: str) -> None:
    for binding in bindings(name, 500):
        assert len(set(binding.rhythms)) == len(binding.rhythms) == DIFFICULTIES[name].num_objects
        assert [n for n, rhythm in enumerate(binding.rhythms) if rhythm == binding.heard] == [binding.keeper]


@pytest.mark.parametrize("name", WORLDS)
def test_any_first_samples_hold_the_keepers_evenly(name: str) -> None:
    classes = DIFFICULTIES[name].num_objects
    for num_samples in (7, 60, 121):
        counts = Counter(binding.keeper for binding in bindings(name, num_samples))
        assert {counts[label] for label in range(classes)} <= {num_samples // classes, -(-num_samples // classes)}


@pytest.mark.parametrize("name", WORLDS)
def test_every_clip_shows_one_object_of_each_shape_hopping_and_shining_in_its_beats_only(name: str) -> None:
    config = WORLDS[name]
    for n in range(30):
        scene, binding = scene_of(config, "train", n), binding_of(config, "train", n)
        assert scene.num_frames == config.min_frames
        assert sorted(body.shape for body in scene.bodies) == sorted(object_shapes(config))
        for body in scene.bodies:
            number = object_shapes(config).index(body.shape)
            beating = beats(RHYTHMS[binding.rhythms[number]], moments_of(16))
            brightness = body.colours.sum(axis=1)
            shares = brightness / brightness.max()
            assert np.allclose(shares, np.where(beating, 1.0, DIFFICULTIES[name].rest_brightness))
            hops = np.ptp(body.track[:, 1].reshape(4, 4), axis=1) > 1e-9
            assert hops.tolist() == beating[::4].tolist()


@pytest.mark.parametrize("name", WORLDS)
def test_objects_never_touch_and_stay_whole(name: str) -> None:
    config = WORLDS[name]
    for n in range(60):
        bodies = scene_of(config, "train", n).bodies
        for body in bodies:
            assert (body.track > 0.8 * body.radius).all()
            assert (body.track < 1.0 - 0.8 * body.radius).all()
        for first, second in permutations(bodies, 2):
            apart = np.hypot(*(first.track - second.track).T)
            assert apart.min() > 0.8 * (first.radius + second.radius)


@pytest.mark.parametrize("name", WORLDS)
def test_the_sound_is_heard_in_the_keepers_beats(name: str) -> None:
    config = WORLDS[name]
    for n in range(12):
        sound = sound_samples(config, "train", n, num_frames=16)
        assert len(sound) == 16_000
        spectrum = np.abs(np.fft.rfft(sound.reshape(4, 4_000)))
        tone = spectrum[:, 45:180].max(axis=1)  # 4 Hz a bin: from below the lowest to above the highest fundamental
        loudest = "".join("x" if number in np.argsort(tone)[2:] else "." for number in range(4))
        assert loudest == RHYTHMS[binding_of(config, "train", n).heard]


def test_the_beats_can_be_read_from_the_pixels() -> None:
    """In the places where an object is, its beats are brighter than its rests."""
    config = WORLDS["easy"]
    for n in range(12):
        frames, binding = draw_frames(config, "train", n).astype(float), binding_of(config, "train", n)
        for body in scene_of(config, "train", n).bodies:
            columns, rows = (body.track * 64).astype(int).T
            seen = (
                np.array(
                    [
                        frame[row - 2 : row + 3, column - 2 : column + 3].mean()
                        for frame, row, column in zip(frames, rows, columns, strict=True)
                    ]
                )
                .reshape(4, 4)
                .mean(axis=1)
            )
            loudest = "".join("x" if number in np.argsort(seen)[2:] else "." for number in range(4))
            assert loudest == RHYTHMS[binding.rhythms[object_shapes(config).index(body.shape)]]


def test_the_label_spaces_name_the_keeper_the_sound_and_every_objects_rhythm() -> None:
    config = WORLDS["medium"]
    spaces = label_spaces(config)
    assert [space.name for space in spaces] == [
        "binding", "audio", "rhythm", "disc_rhythm", "square_rhythm", "triangle_rhythm",
    ]  # fmt: skip
    assert spaces[0].classes == ("disc", "square", "triangle")
    for n in range(50):
        keeper, tone, heard, *seen = labels_of(config, "train", n)
        assert seen[keeper] == heard
        assert tone < len(spaces[1].classes)
