"""What people use today: a torch DataLoader over the original video files.

A worker per core. Each clip: PyAV seeks to the last key frame before the first frame that is needed, decodes from there
and turns only the needed frames into pictures; Pillow and torchvision crop, resize and flip; timm's own RandAugment
works on the Pillow frames, one draw per clip; torchvision makes normalised tensors. The order is ours (crop before
RandAugment), which costs the baseline less than the published order, in which whole frames are augmented.
"""

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ca2st.errors import UserInputError
from ca2st.processes import SPAWN
from ca2st.spec import IMAGENET_MEAN, IMAGENET_STD, ClipSpec
from pipelines.views import dense_train, dense_validation

STAGES = ("decode", "augment", "transform")
"""``augment``: RandAugment; ``transform``: crop, resize, flip, to tensor, normalise."""
PROCESSOR = "processor"
"""Behind the stages: processor time of the worker for the item, its decoder's threads included."""
RAND_AUGMENT = "rand-m7-n4-mstd0.5-inc1"
_FRAME_STRIDE = 4
_AREA, _RATIO = (0.08, 1.0), (3 / 4, 4 / 3)

Picture = Image.Image


@dataclass(frozen=True, kw_only=True, slots=True)
class BaselineConfig:
    """How the baseline reads."""

    clip: ClipSpec
    training: bool
    rand_augment: bool
    batch_size: int
    num_workers: int


class VideoClips(Dataset[tuple[Tensor, Tensor]]):
    """Item i: one view of file i modulo their number, and the seconds of each of `STAGES` and of `PROCESSOR`."""

    def __init__(self, files: Sequence[Path], config: BaselineConfig) -> None:
        self._files, self._config = list(files), config
        self._augment: Callable[[Picture], Picture] | None = None

    def __getitem__(self, index: int) -> tuple[Float[Tensor, "3 time height width"], Float[Tensor, " seconds"]]:
        marks, processor = [time.perf_counter()], time.process_time()
        draws = random.Random(index)  # noqa: S311 - crops, not secrets
        frames = decode_frames(self._files[index % len(self._files)], self._config, draws.random())
        marks.append(time.perf_counter())
        frames = self._cropped(frames, draws)
        marks.append(time.perf_counter())
        if self._config.training and self._config.rand_augment:
            frames = self._augmented(frames, index)
        marks.append(time.perf_counter())
        video = _normalised(frames)
        marks.append(time.perf_counter())
        decode, crop, augment, normalise = np.diff(marks).tolist()
        return video, torch.tensor([decode, augment, crop + normalise, time.process_time() - processor])

    def __len__(self) -> int:
        return len(self._files)

    def _cropped(self, frames: list[Picture], draws: random.Random) -> list[Picture]:
        from torchvision.transforms import functional as F
        from torchvision.transforms.functional import InterpolationMode

        size = self._config.clip.crop_size
        if not self._config.training:
            return [F.center_crop(F.resize(frame, size, InterpolationMode.BILINEAR), size) for frame in frames]
        box, mirrored = _random_box(*frames[0].size, draws), draws.random() < 0.5
        cut = [F.resized_crop(frame, *box, [size, size], InterpolationMode.BILINEAR) for frame in frames]
        return [F.hflip(frame) for frame in cut] if mirrored else cut

    def _augmented(self, frames: list[Picture], index: int) -> list[Picture]:
        """Make one draw for all: timm draws from the global generators, which are set alike before every frame."""
        self._augment = self._augment or _timm_augment(self._config.clip.crop_size)
        augmented = []
        for frame in frames:
            random.seed(index)
            np.random.seed(index % 2**32)  # noqa: NPY002, RUF100 - timm's own generator
            augmented.append(self._augment(frame))
        return augmented


def _timm_augment(crop_size: int) -> Callable[[Picture], Picture]:
    from timm.data.auto_augment import rand_augment_transform

    fill = tuple(round(255 * part) for part in IMAGENET_MEAN)
    made: Callable[[Picture], Picture] = rand_augment_transform(
        RAND_AUGMENT,
        {"translate_const": int(0.45 * crop_size), "img_mean": fill, "interpolation": Image.Resampling.BILINEAR},
    )
    return made


def _random_box(width: int, height: int, draws: random.Random) -> tuple[int, int, int, int]:
    """Return (top, left, height, width) by torchvision's rule for RandomResizedCrop."""
    for _ in range(10):
        area = width * height * draws.uniform(*_AREA)
        ratio = math.exp(draws.uniform(math.log(_RATIO[0]), math.log(_RATIO[1])))
        box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            return draws.randint(0, height - box_height), draws.randint(0, width - box_width), box_height, box_width
    side = min(width, height)
    return (height - side) // 2, (width - side) // 2, side, side


def decode_frames(path: Path, config: BaselineConfig, u: float) -> list[Picture]:
    """Return the frames of a dense window, in its centre or where `u` in [0, 1) says, as RGB pictures.

    Raises:
        UserInputError: the file has no video, or fewer frames than it says.
    """
    with av.open(str(path)) as container:
        if not container.streams.video:
            raise UserInputError(f"{path}: expected a video, found none; remove it from the benchmark's files")
        stream = container.streams.video[0]
        assert stream.average_rate is not None
        assert stream.time_base is not None
        rate, first_pts = float(stream.average_rate), stream.start_time or 0
        indices = _indices(_num_frames(stream, rate), config, u)
        container.seek(first_pts + int(indices[0] / rate / stream.time_base), stream=stream)
        wanted, pictures = set(indices), dict[int, Picture]()
        for frame in container.decode(stream):
            assert frame.pts is not None
            index = round(float((frame.pts - first_pts) * stream.time_base) * rate)
            if index in wanted:
                pictures[index] = Image.fromarray(frame.to_ndarray(format="rgb24"))
            if index >= indices[-1]:
                break
    if not pictures:
        raise UserInputError(f"{path}: expected frames {indices[0]} to {indices[-1]}, found none of them")
    return [pictures[min(pictures, key=lambda have: abs(have - index))] for index in indices]


def _num_frames(stream: Any, rate: float) -> int:
    return int(stream.frames) or max(1, round(float((stream.duration or 0) * stream.time_base) * rate))


def _indices(n: int, config: BaselineConfig, u: float) -> tuple[int, ...]:
    count = config.clip.num_frames
    if config.training:
        return dense_train(n, num_frames=count, stride=_FRAME_STRIDE, u=u)
    return dense_validation(n, num_frames=count, stride=_FRAME_STRIDE)


def _normalised(frames: Sequence[Picture]) -> Float[Tensor, "3 time height width"]:
    from torchvision.transforms import functional as F

    tensors = [F.normalize(F.to_tensor(frame), list(IMAGENET_MEAN), list(IMAGENET_STD)) for frame in frames]
    return torch.stack(tensors, dim=1)


class RunningBatches(Sampler[list[int]]):
    """Each pass gives one batch per worker, of indices that go on where the last pass ended."""

    def __init__(self, config: BaselineConfig) -> None:
        self._size, self._count, self._next = config.batch_size, max(1, config.num_workers), 0

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(self._count):
            first, self._next = self._next, self._next + self._size
            yield list(range(first, self._next))

    def __len__(self) -> int:
        return self._count


def make_dataloader(files: Sequence[Path], config: BaselineConfig) -> "DataLoader[tuple[Tensor, Tensor]]":
    """Return a DataLoader whose workers outlive a pass; spawned, since forking after decoding hangs."""
    several: dict[str, Any] = {"persistent_workers": True, "multiprocessing_context": SPAWN}
    return DataLoader(
        VideoClips(files, config),
        batch_sampler=RunningBatches(config),
        num_workers=config.num_workers,
        **(several if config.num_workers else {}),
    )
