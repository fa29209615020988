"""How hard the synthetic world is to see and to hear: every number that makes a clip harder has a name here.

Difficulty never changes which label a clip has, nor how likely: it changes how the clip looks and sounds, and in the
binding scenes how many objects there are to choose from.
"""

from dataclasses import dataclass

from ca2st.errors import UserInputError, did_you_mean

Range = tuple[float, float]
"""Lowest and highest value; one is drawn uniformly for each clip."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Difficulty:
    """Settings of one difficulty. Lengths are fractions of the frame's side, colours and brightness are 0 to 1."""

    colours: tuple[str, ...] = ()
    """Named colours of the labelled object, a factor of its own; none: any bright colour, and nothing to name."""
    speeds: tuple[tuple[str, Range], ...] = (("steady", (0.6, 1.0)),)
    """Speeds of the labelled object in frame sides a second; two or more are a factor of their own."""
    keyed_sound: bool = False
    """True: the tone sounds in two of the clip's four quarters, its rhythm, a factor of its own."""
    radius: Range = (0.2, 0.28)
    """Of the labelled object."""
    tilt_radians: float = 0.35
    """Objects are turned by up to this angle either way."""
    background: Range = (0.0, 0.4)
    """Brightness of the smooth colours behind everything."""
    noise: Range = (0.01, 0.04)
    """Standard deviation of the noise that changes in every frame."""
    grain: float = 0.0
    """Standard deviation of the background's fixed texture of single pixels."""
    num_distractors: int = 0
    """Small grey shapes that move about and mean nothing."""
    distractor_radius: Range = (0.05, 0.08)
    """Small enough never to be taken for a labelled object."""
    occluder_width: float = 0.0
    """Of one grey bar in front of everything, upright or lying; 0: no bar. No labelled object is ever hidden whole."""
    camera_shake: float = 0.0
    """Standard deviation of each frame's own displacement."""
    flicker: float = 0.0
    """Each frame is brighter or darker than drawn by up to this share."""
    contrast: Range = (1.0, 1.0)
    """1: full; lower values pull every pixel towards middle grey."""
    hiss_db: Range = (-20.0, -3.0)
    """Power of white noise under the sound, relative to the tone."""
    clicks_per_second: float = 0.0
    """Mean number of short clicks, at times of their own."""
    hum: float = 0.0
    """Amplitude of a hum below every tone, relative to the tone."""
    num_objects: int = 2
    """Binding scenes: objects in every clip, one of each shape; the number of classes."""
    object_radius: Range = (0.13, 0.16)
    """Binding scenes: of every object."""
    hop: float = 0.1
    """Binding scenes: how high an object jumps in each of its beats."""
    rest_brightness: float = 0.35
    """Binding scenes: brightness of an object that rests, as a share of its brightness in a beat."""


_COLOURS = ("red", "green", "blue", "yellow")
_SPEEDS = (("slow", (0.45, 0.6)), ("fast", (0.9, 1.1)))

DIFFICULTIES: dict[str, Difficulty] = {
    "easy": Difficulty(),
    "medium": Difficulty(
        colours=_COLOURS,
        speeds=_SPEEDS,
        keyed_sound=True,
        radius=(0.18, 0.25),
        background=(0.0, 0.45),
        noise=(0.02, 0.06),
        grain=0.04,
        num_distractors=1,
        occluder_width=0.06,
        camera_shake=0.012,
        flicker=0.1,
        contrast=(0.8, 1.0),
        hiss_db=(-16.0, 0.0),
        clicks_per_second=3.0,
        hum=0.15,
        num_objects=3,
        object_radius=(0.12, 0.15),
        rest_brightness=0.45,
    ),
    "hard": Difficulty(
        colours=_COLOURS,
        speeds=_SPEEDS,
        keyed_sound=True,
        radius=(0.16, 0.23),
        tilt_radians=0.5,
        background=(0.0, 0.5),
        noise=(0.04, 0.09),
        grain=0.08,
        num_distractors=3,
        occluder_width=0.1,
        camera_shake=0.025,
        flicker=0.25,
        contrast=(0.6, 1.0),
        hiss_db=(-12.0, 3.0),
        clicks_per_second=8.0,
        hum=0.4,
        num_objects=4,
        object_radius=(0.11, 0.14),
        hop=0.08,
        rest_brightness=0.6,
    ),
}
"""``easy`` is the world of the demo's published figures: its clips stay as they are."""


def difficulty_of(name: str) -> Difficulty:
    """The settings of that name.

    Raises:
        UserInputError: there are none of that name.
    """
    if name not in DIFFICULTIES:
        known = list(DIFFICULTIES)
        raise UserInputError(
            f"synthetic.difficulty: expected one of {', '.join(known)}, found {name!r}{did_you_mean(name, known)}"
        )
    return DIFFICULTIES[name]
