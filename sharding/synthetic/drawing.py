"""The picture: one shape in steady motion over a still, textured background, on a frame whose edges meet.

A single frame shows the shape and nothing of the motion: the start is uniform over the frame and the edges wrap, so
at every moment the position is uniform whatever the motion. Colours, size, tilt, speed, background and noise are
distractors, drawn independently of every label.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8

from sharding.synthetic.config import SyntheticConfig
from sharding.synthetic.factors import DRAWING, MOTIONS, SHAPES, factors_of, generator

_Plane = Float[np.ndarray, "frames height width"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """Everything drawn by chance for one clip; lengths are fractions of the frame's side."""

    num_frames: int
    start: tuple[float, float]
    velocity: tuple[float, float]
    """Frame sides a second, x and y."""
    radius: float
    tilt_radians: float
    colour: Float[np.ndarray, "3"]
    """Of the shape, 0 to 1; in the bright part, so that it stands out from the background."""
    background: Float[np.ndarray, "4 4 3"]
    """Colours of a smooth texture, 0 to 1; in the dark part."""
    noise: float
    """Standard deviation of the noise that changes in every frame."""


def scene_of(config: SyntheticConfig, split: str, index: int) -> Scene:
    """The scene of sample `index`."""
    random = generator(config.seed, split, DRAWING, index)
    step = tuple(MOTIONS.values())[factors_of(config, split, index).time]
    speed = random.uniform(0.6, 1.0)
    return Scene(
        num_frames=int(random.integers(config.min_frames, config.max_frames + 1)),
        start=(random.random(), random.random()),
        velocity=(speed * step[0], speed * step[1]),
        radius=random.uniform(0.2, 0.28),
        tilt_radians=random.uniform(-0.35, 0.35),
        colour=random.uniform(0.6, 1.0, 3),
        background=random.uniform(0.0, 0.4, (4, 4, 3)),
        noise=random.uniform(0.01, 0.04),
    )


def positions(scene: Scene, frames_per_second: float) -> Float[np.ndarray, "frames 2"]:
    """Centre of the shape in every frame, x and y in 0 to 1."""
    seconds = np.arange(scene.num_frames)[:, None] / frames_per_second
    return np.asarray((np.asarray(scene.start) + seconds * np.asarray(scene.velocity)) % 1.0)


def draw_frames(config: SyntheticConfig, split: str, index: int) -> UInt8[np.ndarray, "frames height width 3"]:
    """The RGB frames of sample `index`."""
    scene = scene_of(config, split, index)
    shape = SHAPES[factors_of(config, split, index).space]
    cover = _cover(scene, shape, config)[..., None]
    background = _texture(scene.background, config.frame_size)
    frames = background + cover * (scene.colour.astype(np.float32) - background)
    random = generator(config.seed, split, DRAWING, index).spawn(1)[0]
    frames += scene.noise * random.standard_normal(frames.shape[:3], dtype=np.float32)[..., None]
    return np.asarray(np.clip(frames * 255.0 + 0.5, 0, 255), dtype=np.uint8)


def _texture(colours: Float[np.ndarray, "4 4 3"], size: int) -> Float[np.ndarray, "height width 3"]:
    """The colours of a 4 x 4 grid, blended smoothly and periodically over the frame."""
    at = (np.arange(size, dtype=np.float32) + 0.5) * 4 / size
    near = np.abs((at[:, None] - np.arange(4) + 2.0) % 4 - 2.0)
    weights = np.clip(1.0 - near, 0.0, 1.0)
    return np.asarray(np.einsum("yi,xj,ijc->yxc", weights, weights, colours), dtype=np.float32)


def _cover(scene: Scene, shape: str, config: SyntheticConfig) -> _Plane:
    """How much of each pixel the shape covers, 0 to 1, with edges one pixel soft."""
    size = config.frame_size
    pixels = (np.arange(size, dtype=np.float32) + 0.5) / size
    centres = positions(scene, config.frames_per_second).astype(np.float32)
    away_x = (pixels - centres[:, :1] + 0.5) % 1.0 - 0.5
    away_y = (pixels - centres[:, 1:] + 0.5) % 1.0 - 0.5
    x, y = away_x[:, None, :] / scene.radius, away_y[:, :, None] / scene.radius
    cosine, sine = float(np.cos(scene.tilt_radians)), float(np.sin(scene.tilt_radians))
    distance = _OUTLINES[shape](cosine * x + sine * y, cosine * y - sine * x)
    return np.asarray(np.clip(0.5 - distance * scene.radius * size, 0.0, 1.0), dtype=np.float32)


def _disc(x: _Plane, y: _Plane) -> _Plane:
    return np.asarray(np.hypot(x, y) - 0.8)


def _square(x: _Plane, y: _Plane) -> _Plane:
    return np.asarray(np.maximum(np.abs(x), np.abs(y)) - 0.71)


def _triangle(x: _Plane, y: _Plane) -> _Plane:
    slope = np.sqrt(0.75)
    return np.asarray(np.maximum(np.maximum(slope * x - 0.5 * y, -slope * x - 0.5 * y), y) - 0.62)


def _cross(x: _Plane, y: _Plane) -> _Plane:
    upright = np.maximum(np.abs(x) - 0.33, np.abs(y) - 0.95)
    lying = np.maximum(np.abs(x) - 0.95, np.abs(y) - 0.33)
    return np.asarray(np.minimum(upright, lying))


def _ring(x: _Plane, y: _Plane) -> _Plane:
    return np.asarray(np.abs(np.hypot(x, y) - 0.75) - 0.22)


def _star(x: _Plane, y: _Plane) -> _Plane:
    """Five points, folded onto one edge: the line from a tip (radius 1.22) to a notch (0.55) half a point further."""
    half_point = np.pi / 5
    angle = np.abs((np.arctan2(x, -y) / (2 * half_point) + 0.5) % 1.0 - 0.5) * 2 * half_point
    along, across = np.cos(angle) * np.hypot(x, y), np.sin(angle) * np.hypot(x, y)
    normal = np.array([0.55 * np.sin(half_point), 1.22 - 0.55 * np.cos(half_point)])
    normal /= np.hypot(*normal)
    return np.asarray((along - 1.22) * float(normal[0]) + across * float(normal[1]))


_OUTLINES: dict[str, Callable[[_Plane, _Plane], _Plane]] = {
    "disc": _disc,
    "square": _square,
    "triangle": _triangle,
    "cross": _cross,
    "ring": _ring,
    "star": _star,
}
"""Signed distance to each outline, negative inside, in units of the radius; areas are about equal."""
