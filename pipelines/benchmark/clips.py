"""Source files of the benches: drawn scenes of textured, moving things, as H.264 with sound in MP4; or the user's own.

Textures are noise whose amplitude falls with frequency as in photographs, so JPEG and H.264 need about as many bytes
as for filmed clips: at 320 x 240, 30 fps and 10 s about 0.4 MB of H.264 (x264's defaults: preset medium, CRF 23, key
frames at cuts and at most 250 frames apart, B-frames) and 14 kB per JPEG of quality 5. Clips have one to three scenes
with cuts anywhere; the camera pans over a picture larger than the frame, and two smaller ones move on paths of their
own.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
from jaxtyping import Float, UInt8

from ca2st.errors import EnvironmentFault, UserInputError
from ca2st.processes import num_cores
from sharding.datasets.media_root import VIDEO_SUFFIXES
from sharding.format.shard_set import LabelSpace
from sharding.settings import ConversionConfig
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
    """Files."""
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
    """Write the files that `folder` does not have yet, on all cores; `update` hears how many are there.

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


Convert = Callable[[SourceList, Path, ConversionConfig], object]


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
