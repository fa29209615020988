"""Every setting of a difficulty does what it says and nothing else; easy clips stay as they were."""

from dataclasses import fields, replace

import numpy as np
import pytest

from sharding.synthetic.clips import clutter_of, draw_frames, make_clip, scene_of, sound_samples
from sharding.synthetic.config import DIFFICULTIES, Difficulty, SyntheticConfig
from sharding.synthetic.factors import BAR

SETTINGS = DIFFICULTIES["hard"]
FIELDS = [setting.name for setting in fields(Difficulty)]
OF_SOUND = {"keyed_sound", "hiss_db", "clicks_per_second", "hum"}
OF_BINDING = {"num_objects", "object_radius", "hop", "rest_brightness"}


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch):
    """Makes a configuration whose difficulty is `base` with the given settings changed."""

    def make(base: str = "easy", *, binding: bool = False, **changes: object) -> SyntheticConfig:
        monkeypatch.setitem(DIFFICULTIES, "probe", replace(DIFFICULTIES[base], **changes))
        return SyntheticConfig(difficulty="probe", binding=binding)

    return make


def frames_and_sound(config: SyntheticConfig, n: int) -> tuple[np.ndarray, np.ndarray]:
    frames = draw_frames(config, "train", n)
    return frames, sound_samples(config, "train", n, num_frames=len(frames))


@pytest.mark.parametrize("name", FIELDS)
def test_a_setting_alters_the_picture_or_the_sound_and_not_the_other(name: str, world) -> None:
    base = "medium" if name == "distractor_radius" else "easy"  # where there are any
    binding = name in OF_BINDING
    before = [frames_and_sound(world(base, binding=binding), n) for n in range(4)]
    changed = (0.03, 0.04) if name == "distractor_radius" else getattr(SETTINGS, name)
    config = world(base, binding=binding, **{name: changed})
    after = [frames_and_sound(config, n) for n in range(4)]
    seen = any(
        one.shape != other.shape or (one != other).any() for (one, _), (other, _) in zip(before, after, strict=True)
    )
    sounds = any((one != other).any() for (_, one), (_, other) in zip(before, after, strict=True))
    assert seen == (name not in OF_SOUND)
    assert sounds == (name in OF_SOUND or name == "num_objects")  # other objects, other keepers


@pytest.mark.parametrize(("easier", "harder"), [("easy", "medium"), ("medium", "hard")])
def test_every_step_of_difficulty_is_harder_in_every_respect(easier: str, harder: str) -> None:
    first, second = DIFFICULTIES[easier], DIFFICULTIES[harder]
    for name in (
        "noise", "grain", "num_distractors", "occluder_width", "camera_shake", "flicker", "hiss_db",
        "clicks_per_second", "hum", "num_objects", "rest_brightness", "background",
    ):  # fmt: skip
        assert getattr(first, name) < getattr(second, name), name
    for name in ("radius", "contrast", "object_radius"):
        assert getattr(first, name) > getattr(second, name), name


EASY = [
    (19, 70.6853, 35.1211, 0.271592, 0.04210285),
    (19, 72.8265, 36.5901, 0.169960, 0.01667803),
    (20, 81.0143, 40.5092, 0.216337, 0.03051889),
    (17, 65.6342, 33.0815, 0.219223, 0.03038978),
]
"""Of the first clips: frames, mean level, mean level times place, sound level, sound power times time."""


def test_easy_clips_are_those_that_the_demos_figures_were_measured_on() -> None:
    for n, expected in enumerate(EASY):
        frames, sound = (part.astype(float) for part in frames_and_sound(SyntheticConfig(), n))
        place, time = np.linspace(0, 1, frames.size).reshape(frames.shape), np.linspace(0, 1, len(sound))
        found = (
            len(frames),
            frames.mean(),
            (frames * place).mean(),
            np.sqrt((sound**2).mean()),
            (sound**2 * time).mean(),
        )
        assert np.allclose(found, expected, rtol=1e-4)


def test_clutter_is_as_much_as_its_settings_say() -> None:
    config = SyntheticConfig(difficulty="hard")
    found = [clutter_of(config, "train", n, num_frames=20) for n in range(60)]
    assert {len(clutter.distractors) for clutter in found} == {SETTINGS.num_distractors}
    assert {body.shape for clutter in found for body in clutter.occluders} == {BAR}
    assert {2 * body.radius for clutter in found for body in clutter.occluders} == {SETTINGS.occluder_width}
    assert np.std([clutter.grain for clutter in found]) == pytest.approx(SETTINGS.grain, rel=0.01)
    shake = np.std([clutter.shifts for clutter in found])
    assert shake == pytest.approx(SETTINGS.camera_shake * 64, rel=0.1)
    gains = np.array([clutter.gains for clutter in found])
    assert 0.9 * SETTINGS.flicker < np.abs(gains - 1).max() <= SETTINGS.flicker
    contrasts = [clutter.contrast for clutter in found]
    assert SETTINGS.contrast[0] <= min(contrasts) < max(contrasts) <= SETTINGS.contrast[1]


@pytest.mark.parametrize("binding", [False, True])
def test_distractors_are_smaller_than_every_labelled_object_and_bars_hide_none_whole(binding: bool) -> None:
    for name, settings in DIFFICULTIES.items():
        config = SyntheticConfig(difficulty=name, binding=binding)
        smallest = min(body.radius for n in range(80) for body in scene_of(config, "train", n).bodies)
        assert smallest > 1.2 * settings.distractor_radius[1]
        assert settings.occluder_width < 2 * 0.71 * smallest  # the least wide shape, the square


def test_hiss_hum_and_clicks_are_as_loud_as_their_settings_say(world) -> None:
    def level(**changes: object) -> float:
        """Mean power of the sound of some clips, each relative to its loudness."""
        config = world(hiss_db=(-60.0, -60.0), **changes)
        tones = [frames_and_sound(config, n)[1] for n in range(12)]
        quiet = [frames_and_sound(world(hiss_db=(-60.0, -60.0)), n)[1] for n in range(12)]
        return float(np.mean([(one - other).var() / other.var() for one, other in zip(tones, quiet, strict=True)]))

    assert level(hum=0.4) == pytest.approx(0.4**2 / 2 / 0.85, rel=0.2)  # the tone is silent for .15 of a clip
    few, many = level(clicks_per_second=2.0), level(clicks_per_second=16.0)
    assert many > 4 * few > 0


def test_a_keyed_tone_rests_in_two_quarters_and_a_steady_one_in_none(world) -> None:
    for keyed, resting in ((True, 2), (False, 0)):
        config = world(keyed_sound=keyed, hiss_db=(-60.0, -60.0))
        for n in range(6):
            sound = frames_and_sound(config, n)[1]
            levels = [part.std() for part in np.array_split(sound, 4)]
            assert sum(level < 0.02 * max(levels) for level in levels) == resting


@pytest.mark.parametrize("binding", [False, True])
@pytest.mark.parametrize("difficulty", ["medium", "hard"])
def test_harder_clips_are_the_same_bytes_every_time_and_others_than_easy_ones(difficulty: str, binding: bool) -> None:
    config = SyntheticConfig(difficulty=difficulty, binding=binding)
    assert make_clip(config, "train", 5) == make_clip(config, "train", 5)
    assert make_clip(config, "train", 5) != make_clip(replace(config, difficulty="easy"), "train", 5)
    assert make_clip(config, "train", 5) != make_clip(replace(config, seed=1), "train", 5)
