"""Source files of the benches, and the baseline that reads them.

Files are drawn (or the user's own): scenes of textured, moving things, as H.264 with sound in MP4. Textures are noise
whose amplitude falls with frequency as in photographs, so JPEG and H.264 need about as many bytes as for filmed clips:
at 320 x 240, 30 fps and 10 s about 0.4 MB of H.264 (x264's defaults: preset medium, CRF 23, key frames at cuts and at
most 250 frames apart, B-frames) and 14 kB per JPEG of quality 5. Clips have one to three scenes with cuts anywhere; the
camera pans over a picture larger than the frame, and two smaller ones move on paths of their own.

The baseline is what people use today: a torch DataLoader with a worker per core. Each clip: PyAV seeks to the last key
frame before the first frame that is needed, decodes from there and turns only the needed frames into pictures; Pillow
and torchvision crop, resize and flip; timm's own RandAugment works on the Pillow frames, one draw per clip; torchvision
makes normalised tensors. The order is ours (crop before RandAugment), which costs the baseline less than the published
order, in which whole frames are augmented.

The second baseline is the fastest stack we know of: a DataLoader of torchcodec's decoder, torchvision's v2 transforms
on the uint8 tensors of a clip, one draw per clip; it hands over bytes, as we do. Its RandAugment applies all operations
it draws: two, as many as are applied of our four, at the same magnitude.
"""

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, cast

import av
import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ca2st.errors import EnvironmentFault, UserInputError
from ca2st.processes import SPAWN, num_cores
from ca2st.spec import IMAGENET_MEAN, IMAGENET_STD, ClipSpec
from pipelines.views import dense_window
from sharding.datasets.request import VIDEO_SUFFIXES
from sharding.format.shard_set import LabelSpace
from sharding.source import SourceList, SourceSample

_MOST_SCENES = 3
_SLOPE = 1.3
"""How fast the amplitude falls with frequency; photographs: about 1 to 2."""
_SPREAD = 52.0
_SOUND_HZ = 44_100
_PARTIAL = ".partial"


@dataclass(frozen=True, kw_only=True, slots=True)
class DrawnClips:
    """What is drawn; the same settings give the same pictures."""

    count: int
    width: int = 320
    height: int = 240
    frames_per_second: int = 30
    num_frames: int = 300
    """Of every clip; 300 are 10 s."""

    def __post_init__(self) -> None:
        if min(self.count, self.num_frames, self.frames_per_second) < 1 or min(self.width, self.height) < 16:
            raise UserInputError(f"drawn clips: expected counts >= 1 and at least 16 x 16 pixels, found {self}")


def draw_clips(
    wanted: DrawnClips, folder: Path, *, update: Callable[[int], None] = lambda _done: None
) -> tuple[Path, ...]:
    """Write the files that `folder` does not have yet, on all cores; `update` is called with how many are there.

    Raises:
        EnvironmentFault: this PyAV has no H.264 encoder.
    """
    if "libx264" not in av.codecs_available:
        raise EnvironmentFault("H.264: expected PyAV with libx264 to make source files, found none; name your own")
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{wanted.width}x{wanted.height}-{wanted.frames_per_second}fps-{wanted.num_frames}"
    paths = tuple(folder / f"drawn-{name}-{number:04d}.mp4" for number in range(wanted.count))
    with ThreadPoolExecutor(num_cores()) as pool:
        for done, _ in enumerate(pool.map(lambda item: _write_missing(wanted, *item), enumerate(paths)), start=1):
            update(done)
    return paths


def _write_missing(wanted: DrawnClips, number: int, path: Path) -> None:
    if path.exists():
        return
    partial = path.with_suffix(_PARTIAL)
    with av.open(str(partial), "w", format="mp4") as container:
        video = container.add_stream("libx264", rate=wanted.frames_per_second)
        assert isinstance(video, av.VideoStream)
        video.width, video.height, video.pix_fmt = wanted.width, wanted.height, "yuv420p"
        video.codec_context.thread_count = 1
        audio = container.add_stream("aac", rate=_SOUND_HZ, layout="mono")
        for frame in drawn_frames(wanted, seed=number):
            container.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(video.encode())
        sound = av.AudioFrame.from_ndarray(_sound(wanted, number)[None], format="fltp", layout="mono")
        sound.sample_rate = _SOUND_HZ
        container.mux(audio.encode(sound))
        container.mux(audio.encode())
    partial.replace(path)


def drawn_frames(wanted: DrawnClips, *, seed: int) -> Iterator[UInt8[np.ndarray, "height width 3"]]:
    """Return the pictures of one clip."""
    random = np.random.default_rng(seed)
    cuts = random.integers(0, wanted.num_frames, seed % _MOST_SCENES).tolist()
    for start, end in pairwise([0, *sorted(cuts), wanted.num_frames]):
        yield from _scene(wanted, random, end - start)


def _scene(
    wanted: DrawnClips, random: np.random.Generator, num_frames: int
) -> Iterator[UInt8[np.ndarray, "height width 3"]]:
    height, width = wanted.height, wanted.width
    ground = texture(random, 2 * height, 2 * width)
    things = [texture(random, height // 3, height // 3) for _ in range(2)]
    phases, speeds = random.uniform(0, 2 * np.pi, (3, 2)), random.uniform(0.5, 1.5, (3, 2))
    for moment in np.arange(num_frames) / 30:
        places = 0.5 + 0.5 * np.sin(phases + speeds * moment * np.array([[0.6], [2.0], [2.5]]))
        top, left = (places[0] * (height, width)).astype(int)
        frame = ground[top : top + height, left : left + width].copy()
        for thing, place in zip(things, places[1:], strict=True):
            side = len(thing)
            top, left = (place * (height - side, width - side)).astype(int)
            frame[top : top + side, left : left + side] = thing
        yield frame


def texture(random: np.random.Generator, height: int, width: int) -> UInt8[np.ndarray, "height width 3"]:
    """Return noise with the spectrum of a photograph; the colours share most of it."""
    vertical, horizontal = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    amplitude = 1 / np.maximum(np.hypot(vertical, horizontal), 1 / max(height, width)) ** _SLOPE

    def plane() -> Float[np.ndarray, "height width"]:
        phases = np.exp(2j * np.pi * random.random(amplitude.shape))
        values = np.fft.irfft2(amplitude * phases, s=(height, width))
        return np.asarray(values / values.std())

    grey = plane()
    colours = np.stack([grey, *(0.75 * grey + 0.25 * plane() for _ in range(2))], axis=-1)
    return (128 + _SPREAD * colours).clip(0, 255).astype(np.uint8)


def _sound(wanted: DrawnClips, number: int) -> Float[np.ndarray, " samples"]:
    random = np.random.default_rng((number, 1))
    seconds = np.arange(_SOUND_HZ * wanted.num_frames // wanted.frames_per_second) / _SOUND_HZ
    tone = np.sin(2 * np.pi * random.uniform(200, 2000) * seconds) * (0.5 + 0.5 * np.sin(3 * seconds))
    return (0.3 * tone + 0.05 * random.standard_normal(len(seconds))).astype(np.float32)


@dataclass(frozen=True, slots=True)
class BenchSources:
    """Shards, and the original files that the baseline reads."""

    shards: Path
    files: tuple[Path, ...]


def source_list(files: Sequence[Path]) -> SourceList:
    """Return whole files as samples of two classes in turn."""
    return SourceList(
        dataset="benchmark",
        split="train",
        label_spaces=(LabelSpace(name="label", classes=("even", "odd")),),
        targets=("label",),
        samples=tuple(
            SourceSample(
                sample_id=file.name,
                path=file,
                start_seconds=None,
                end_seconds=None,
                labels=(number % 2,),
                where=f"{file}:1",
            )
            for number, file in enumerate(files)
        ),
    )


def video_files(folder: Path) -> tuple[Path, ...]:
    """Return every video file under `folder`, sorted.

    Raises:
        UserInputError: there is none.
    """
    found = tuple(sorted(path for path in folder.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES))
    if not found:
        raise UserInputError(f"--media {folder}: expected video files, found none; name the folder of the originals")
    return found


Stack = Literal["pyav", "torchcodec"]
STAGES = ("decode", "augment", "transform")
"""``augment``: RandAugment; ``transform``: crop, resize, flip, to tensor, normalise."""
PROCESSOR = "processor"
"""Behind the stages: processor time of the worker for the item, its decoder's threads included."""
PEAK = "peak"
"""Behind that: most bytes that the worker held in memory so far."""
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
    stack: Stack = "pyav"
    """What it is made of."""


class VideoClips(Dataset[tuple[Tensor, Tensor]]):
    """Item i: one view of file i modulo their number, and what it took: seconds of `STAGES` and `PROCESSOR`, `PEAK`."""

    def __init__(self, files: Sequence[Path], config: BaselineConfig) -> None:
        self._files, self._config = list(files), config
        self._augment: Callable[[Picture], Picture] | None = None

    def __getitem__(self, index: int) -> tuple[Tensor, Float[Tensor, " costs"]]:
        marks, processor = [time.perf_counter()], time.process_time()
        draws = random.Random(index)  # noqa: S311 - crops, not secrets
        frames = self._decoded(self._files[index % len(self._files)], draws.random())
        marks.append(time.perf_counter())
        frames = self._cropped(frames, draws)
        marks.append(time.perf_counter())
        if self._config.training and self._config.rand_augment:
            frames = self._augmented(frames, index)
        marks.append(time.perf_counter())
        video = self._finished(frames)
        marks.append(time.perf_counter())
        decode, crop, augment, finish = np.diff(marks).tolist()
        costs = [decode, augment, crop + finish, time.process_time() - processor, float(peak_bytes())]
        return video, torch.tensor(costs, dtype=torch.float64)

    def __len__(self) -> int:
        return len(self._files)

    def _decoded(self, path: Path, u: float) -> Any:
        return decode_frames(path, self._config, u)

    def _finished(self, frames: Any) -> Tensor:
        from torchvision.transforms import functional as F

        tensors = [F.normalize(F.to_tensor(frame), list(IMAGENET_MEAN), list(IMAGENET_STD)) for frame in frames]
        return torch.stack(tensors, dim=1)

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
        if self._augment is None:
            from timm.data.auto_augment import rand_augment_transform

            fill = tuple(round(255 * part) for part in IMAGENET_MEAN)
            shift, bilinear = int(0.45 * self._config.clip.crop_size), Image.Resampling.BILINEAR
            settings = {"translate_const": shift, "img_mean": fill, "interpolation": bilinear}
            self._augment = rand_augment_transform(RAND_AUGMENT, settings)
        augmented = []
        for frame in frames:
            random.seed(index)
            np.random.seed(index % 2**32)  # noqa: NPY002, RUF100 - timm's own generator
            augmented.append(self._augment(frame))
        return augmented


class TorchcodecClips(VideoClips):
    """The same views by torchcodec and torchvision's v2 transforms, as uint8 [time, 3, height, width]."""

    def _decoded(self, path: Path, u: float) -> Any:
        from torchcodec.decoders import VideoDecoder

        decoder = VideoDecoder(str(path), num_ffmpeg_threads=1, seek_mode="approximate")
        return decoder.get_frames_at(indices=list(_indices(len(decoder), self._config, u))).data

    def _finished(self, frames: Any) -> Tensor:
        return cast(Tensor, frames)

    def _cropped(self, frames: Any, draws: random.Random) -> Any:
        from torchvision.transforms.v2 import functional as F

        size = self._config.clip.crop_size
        if not self._config.training:
            return F.center_crop(F.resize(frames, [size], antialias=True), [size, size])
        height, width = frames.shape[-2:]
        box, mirrored = _random_box(width, height, draws), draws.random() < 0.5
        cut = F.resized_crop(frames, *box, [size, size], antialias=True)
        return F.horizontal_flip(cut) if mirrored else cut

    def _augmented(self, frames: Any, index: int) -> Any:
        from torchvision.transforms import v2

        torch.manual_seed(index)
        bilinear, fill = v2.InterpolationMode.BILINEAR, [round(255 * part) for part in IMAGENET_MEAN]
        return v2.RandAugment(num_ops=2, magnitude=21, interpolation=bilinear, fill=fill)(frames)


def torchcodec_missing() -> str | None:
    """Return why the second baseline cannot run here; None: it can."""
    try:
        import torchcodec.decoders  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return f"torchcodec is not measured: it, or FFmpeg's shared libraries that it needs, cannot be loaded ({first})"
    return None


def peak_bytes() -> int:
    """Return the most bytes that this process has held in memory so far (VmHWM: not those of who started it)."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


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
        duration = float((stream.duration or 0) * stream.time_base)
        indices = _indices(int(stream.frames) or max(1, round(duration * rate)), config, u)
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


def _indices(n: int, config: BaselineConfig, u: float) -> tuple[int, ...]:
    place = u if config.training else 0.5
    return dense_window(n, num_frames=config.clip.num_frames, stride=_FRAME_STRIDE, u=place)


class RunningBatches(Sampler[list[int]]):
    """Each pass gives one batch per worker, of indices that continue where the last pass ended."""

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
    clips = TorchcodecClips if config.stack == "torchcodec" else VideoClips
    return DataLoader(
        clips(files, config),
        batch_sampler=RunningBatches(config),
        num_workers=config.num_workers,
        **(several if config.num_workers else {}),
    )
