"""The picture: a scene and its clutter as pixels."""

import numpy as np
from jaxtyping import Float, UInt8

from sharding.synthetic.clutter import clutter_of, seen_through
from sharding.synthetic.config import SyntheticConfig
from sharding.synthetic.factors import DRAWING, generator
from sharding.synthetic.outlines import OUTLINES, Plane
from sharding.synthetic.scenes import Body, scene_of


def draw_frames(config: SyntheticConfig, split: str, index: int) -> UInt8[np.ndarray, "frames height width 3"]:
    """The RGB frames of sample `index`."""
    scene = scene_of(config, split, index)
    clutter = clutter_of(config, split, index, num_frames=scene.num_frames)
    behind = _texture(scene.background, config.frame_size) + clutter.grain[..., None]
    frames = np.broadcast_to(behind, (scene.num_frames, *behind.shape))
    for body in (*clutter.distractors, *scene.bodies, *clutter.occluders):
        colours = body.colours.astype(np.float32)[:, None, None, :]
        frames = frames + _cover(body, config.frame_size)[..., None] * (colours - frames)
    frames = seen_through(frames, clutter)
    random = generator(config.seed, split, DRAWING, index).spawn(1)[0]
    noise = scene.noise * random.standard_normal(frames.shape[:3], dtype=np.float32)[..., None]
    return np.asarray(np.clip((frames + noise) * 255.0 + 0.5, 0, 255), dtype=np.uint8)


def _texture(colours: Float[np.ndarray, "4 4 3"], size: int) -> Float[np.ndarray, "height width 3"]:
    """The colours of a 4 x 4 grid, blended smoothly and periodically over the frame."""
    at = (np.arange(size, dtype=np.float32) + 0.5) * 4 / size
    near = np.abs((at[:, None] - np.arange(4) + 2.0) % 4 - 2.0)
    weights = np.clip(1.0 - near, 0.0, 1.0)
    return np.asarray(np.einsum("yi,xj,ijc->yxc", weights, weights, colours), dtype=np.float32)


def _cover(body: Body, size: int) -> Plane:
    """How much of each pixel the body covers, 0 to 1, with edges one pixel soft."""
    pixels = (np.arange(size, dtype=np.float32) + 0.5) / size
    centres = body.track.astype(np.float32)
    away_x = (pixels - centres[:, :1] + 0.5) % 1.0 - 0.5
    away_y = (pixels - centres[:, 1:] + 0.5) % 1.0 - 0.5
    x, y = away_x[:, None, :] / body.radius, away_y[:, :, None] / body.radius
    cosine, sine = float(np.cos(body.tilt_radians)), float(np.sin(body.tilt_radians))
    distance = OUTLINES[body.shape](cosine * x + sine * y, cosine * y - sine * x)
    return np.asarray(np.clip(0.5 - distance * body.radius * size, 0.0, 1.0), dtype=np.float32)
