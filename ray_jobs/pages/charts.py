"""What all pages draw with: templates, axes of seconds and hertz, one line chart, clips as stills over their sound."""

import base64
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from einops import rearrange
from jinja2 import Environment, PackageLoader, StrictUndefined
from numpy.typing import NDArray
from PIL import Image

from ca2st.spec import MEL_ROW_SECONDS
from pipelines.decode.reference import decode_frames
from pipelines.rendering import JpegFrames, RenderRequest
from pipelines.storage.samples import FetchedSample, SampleReader
from sharding.format.index import TICKS_PER_SECOND
from sharding.format.shard_set import ShardSet

Curve = tuple[tuple[int, float], ...]
"""(step, value), steps ascending."""


def page_environment() -> Environment:
    """Return the templates of all pages; a page extends ``layout.html``.

    Whatever is filled in is escaped, and what is not given is an error.
    """
    environment = Environment(
        loader=PackageLoader("ray_jobs.pages", "page_files"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": lambda value: f"{value:.4g}", "duration": duration_in_words}
    return environment


def duration_in_words(seconds: float) -> str:
    """Return a duration as ``2 h 5 min``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.3g} s"


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """A place on a line."""

    x: float
    y: float
    label: str
    """What a pointer that rests on it shows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One curve in the units of the drawing."""

    css: str
    """Classes that give its colour and dashes."""
    name: str
    points: list[Point]
    is_faint: bool = False
    """Whether it stands behind the others, thin and pale."""

    @property
    def path(self) -> str:
        """The line through its points, as SVG writes it."""
        return " ".join(
            f"{'L' if index else 'M'}{point.x:.1f} {point.y:.1f}" for index, point in enumerate(self.points)
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """A tick: its place in the drawing and its text."""

    at: float
    label: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Level:
    """A horizontal line at a value: across the drawing, or a short piece of it."""

    css: str
    y: float
    left: float
    right: float
    text: str = ""
    """Above its right end."""
    title: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    """Where values stand in a drawing of `width` x `height`."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]
    width: float = 720
    height: float = 300
    left: ClassVar[float] = 52
    top: ClassVar[float] = 14

    @property
    def right(self) -> float:
        """Right end of the x axis."""
        return self.width - 14

    @property
    def bottom(self) -> float:
        """Lower end of the y axis."""
        return self.height - 42

    def x(self, value: float) -> float:
        """Return the place of a value on the x axis."""
        low, high = self.x_range
        return self.left + (self.right - self.left) * (value - low) / (high - low)

    def y(self, value: float) -> float:
        """Return the place of a value on the y axis; greater values stand higher."""
        low, high = self.y_range
        return self.bottom - (self.bottom - self.top) * (value - low) / (high - low)

    def points(self, values: Iterable[tuple[float, float]], label: Callable[[float, float], str]) -> list[Point]:
        """Return the points of (x, y) values, with what `label` says of each."""
        return [Point(x=self.x(x), y=self.y(y), label=label(x, y)) for x, y in values]


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """A drawing of lines, as ``chart.html`` draws it."""

    title: str
    says: str
    """What it shows, for who cannot see it."""
    x_label: str
    y_label: str = ""
    frame: Frame
    lines: list[Line]
    x_marks: list[Mark]
    y_marks: list[Mark]
    levels: Sequence[Level] = ()


def chart_svg(chart: Chart) -> str:
    """Return one drawing as a file of its own."""
    return page_environment().get_template("chart_file.svg").render(chart=chart)


_NUM_TONES, _NUM_DASHES = 8, 3
_MOST_POINTS = 400
_MOST_MARKS = 8


def tone(number: int) -> str:
    """Return the classes of the colour and the dashes of line `number`: lines beyond eight share colours."""
    return f"t{number % _NUM_TONES} d{number // _NUM_TONES % _NUM_DASHES}"


def metric_charts(curves_of_run: Sequence[Mapping[str, Curve]], *, names: Sequence[str] = ("",)) -> list[Chart]:
    """Return a drawing for each metric that some run has at two steps or more; `names` are the runs'."""
    metrics = sorted({metric for curves in curves_of_run for metric, curve in curves.items() if len(curve) > 1})
    return [_metric_chart(metric, [curves.get(metric, ()) for curves in curves_of_run], names) for metric in metrics]


def _metric_chart(metric: str, curves: Sequence[Curve], names: Sequence[str]) -> Chart:
    values = [value for curve in curves for _, value in curve]
    last = max(step for curve in curves for step, _ in curve)
    x_places, y_places = places(0, last, whole=True), places(min(values), max(values))
    frame = Frame(x_range=(x_places[0], max(x_places[-1], last)), y_range=(y_places[0], y_places[-1]))

    def line(number: int, curve: Curve) -> Line:
        of_run = f"{names[number]}, " if names[number] else ""
        points = frame.points(thinned(curve), lambda step, value: f"{of_run}step {step:g}: {value:.4g}")
        return Line(css=tone(number), name=names[number], points=points)

    return Chart(
        title=metric,
        says=f"{metric} by training step",
        x_label="training step",
        frame=frame,
        lines=[line(number, curve) for number, curve in enumerate(curves) if curve],
        x_marks=[Mark(at=frame.x(place), label=f"{place:g}") for place in x_places],
        y_marks=[Mark(at=frame.y(place), label=f"{place:g}") for place in y_places],
    )


def thinned(curve: Curve) -> Curve:
    """Return at most some hundred points: evenly chosen, the last one kept."""
    every = -(-len(curve) // _MOST_POINTS)
    return curve[-1::-every][::-1] if curve else curve


def places(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Return round numbers in even steps, two at least, from `low` or below to `high` or above (below, if `whole`).

    Of values that are as good as one the step is that of their size, of zeros that of 1.
    """
    size = max(abs(low), abs(high)) or 1.0
    span = high - low if high - low > 1e-6 * size else size
    least = max(span, 1e-9) / _MOST_MARKS
    power = 10.0 ** math.floor(math.log10(least))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))
    if whole:
        step = max(1.0, step)
    first = math.floor(low / step + 1e-9)
    last = math.floor(high / step + 1e-9) if whole else math.ceil(high / step - 1e-9)
    decimals = max(0, 1 - math.floor(math.log10(step)))
    return [round(number * step, decimals) for number in range(first, max(last, first + 1) + 1)]


_KALDI_LOWEST_HZ = 20.0
_HERTZ = (125, 250, 500, 1000, 2000, 4000, 8000, 16000)
_LEAST_GAP_PERCENT = 11.0
_STEPS_SECONDS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


@dataclass(frozen=True, kw_only=True, slots=True)
class Tick:
    """A label on an axis."""

    percent: float
    """From the left or the top."""
    label: str


def seconds_ticks(start: float, end: float, *, most: int = 6) -> list[Tick]:
    """Return round seconds between `start` and `end`, at most about `most`."""
    span = end - start
    step = next((step for step in _STEPS_SECONDS if span / step <= most), _STEPS_SECONDS[-1])
    first, last = math.ceil(start / step - 1e-6), math.floor(end / step + 1e-6)
    decimals = max(0, math.ceil(-math.log10(step) - 1e-9))
    return [
        Tick(percent=100 * (number * step - start) / span, label=f"{number * step:.{decimals}f}")
        for number in range(first, last + 1)
    ]


def hertz_ticks(sample_rate_hz: int) -> list[Tick]:
    """Return frequencies on the mel axis of Kaldi's filters, 20 Hz to half the sample rate, lowest at the bottom."""
    low, high = _mel(_KALDI_LOWEST_HZ), _mel(sample_rate_hz / 2)
    ticks: list[Tick] = []
    for hertz in _HERTZ:
        percent = 100 * (1 - (_mel(hertz) - low) / (high - low))
        near = bool(ticks) and ticks[-1].percent - percent < _LEAST_GAP_PERCENT
        if percent >= 0 and not near:
            ticks.append(Tick(percent=percent, label=f"{hertz // 1000} kHz" if hertz >= 1000 else f"{hertz} Hz"))
    return ticks


def hertz_of_bin(mel_bin: float, *, num_bins: int, sample_rate_hz: int) -> float:
    """Return the frequency at a place on the mel axis, counted in bins from its lower end."""
    low, high = _mel(_KALDI_LOWEST_HZ), _mel(sample_rate_hz / 2)
    mel = low + (high - low) * mel_bin / num_bins
    return 700 * (math.exp(mel / 1127) - 1)


def _mel(hertz: float) -> float:
    return 1127 * math.log(1 + hertz / 700)


_FRAME_QUALITY = 88
_SILENT_GREY = 34


def frame_jpeg(frame: NDArray[np.uint8]) -> str:
    """Return a data URI of an RGB frame."""
    return data_uri(Image.fromarray(frame), "JPEG", quality=_FRAME_QUALITY)


def spectrogram_png(mel: NDArray[np.float32], num_heard_rows: int) -> str:
    """Return a data URI of [rows, bins] as a grey picture, time to the right, low frequencies at the bottom.

    Contrast is that of the sound alone; what is padding or silence is one dark grey.
    """
    grey = np.full(mel.shape, _SILENT_GREY, np.uint8)
    if num_heard_rows:
        heard = mel[:num_heard_rows]
        low, high = np.quantile(heard, (0.02, 0.998))
        grey[:num_heard_rows] = np.round(255 * np.clip((heard - low) / max(high - low, 1e-6), 0, 1))
    return data_uri(Image.fromarray(np.ascontiguousarray(grey.T[::-1])), "PNG")


def data_uri(image: Image.Image, kind: str, **options: int) -> str:
    """Return an image as the text of a data URI; `options` are those of Pillow's encoder."""
    sink = io.BytesIO()
    image.save(sink, kind, optimize=True, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(sink.getvalue()).decode()}"


NUM_STILLS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Pictures:
    """What of a stored clip is shown."""

    stills: list[str]
    """Data URIs, in order."""
    still_seconds: list[float]
    spectrogram: str
    """Data URI, time to the right, low frequencies at the bottom."""
    has_audio: bool
    seconds: list[Tick]
    hertz: list[Tick]


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredClip:
    """A clip with its key and labels."""

    key: str
    labels: tuple[int, ...]
    """One per label space of the manifest."""
    pictures: Pictures


def read_pictures(shard_set: ShardSet, keys: Sequence[str]) -> list[Pictures]:
    """Return the stills and the spectrogram of each named sample.

    Raises:
        DataDamageError: the shards are not what was written.
    """
    reader = SampleReader(shard_set)
    places = [(number, row) for number, shard in enumerate(shard_set.shards) for row in range(shard.num_samples)]
    place_of = dict(zip(reader.indexes.sample_ids(), places, strict=True))
    return [clip.pictures for clip in _read(reader, [place_of[key] for key in keys])]


def read_spread_clips(shard_set: ShardSet, *, most: int) -> list[StoredClip]:
    """Return up to `most` clips, evenly spread over the set in stored order; raises as `read_pictures`."""
    num_samples = shard_set.manifest.num_samples
    count = min(most, num_samples)
    ends = np.cumsum([shard.num_samples for shard in shard_set.shards])
    places = []
    for number in range(count):
        place = (2 * number + 1) * num_samples // (2 * count)
        shard = int(np.searchsorted(ends, place, side="right"))
        places.append((shard, place - int(ends[shard]) + shard_set.shards[shard].num_samples))
    return _read(SampleReader(shard_set), places)


def _read(reader: SampleReader, places: Sequence[tuple[int, int]]) -> list[StoredClip]:
    rate = reader.shard_set.manifest.audio.sample_rate_hz
    with closing(reader):
        clips = []
        for place in places:
            entry = reader.indexes.entry(*place)
            stills = tuple(int((still + 0.5) * entry.num_frames / NUM_STILLS) for still in range(NUM_STILLS))
            pictures = _pictures(reader.fetch(entry, stills), stills, sample_rate_hz=rate)
            clips.append(StoredClip(key=entry.key, labels=entry.labels, pictures=pictures))
        return clips


def _pictures(sample: FetchedSample, stills: tuple[int, ...], *, sample_rate_hz: int) -> Pictures:
    mel = sample.mel.astype(np.float32)
    last_frame = float(sample.entry.frame_ticks[-1]) / TICKS_PER_SECOND
    seconds = len(mel) * MEL_ROW_SECONDS or max(last_frame, MEL_ROW_SECONDS)
    shown = mel if len(mel) else np.zeros((1, 1), np.float32)
    frames = sample.clip_frames(stills)
    if isinstance(frames, JpegFrames):  # shown as they are stored
        shown_stills = [f"data:image/jpeg;base64,{base64.b64encode(data).decode()}" for data in frames.frames]
    else:
        decoded = decode_frames(RenderRequest(frames=frames, boxes=(), flip=False, where=sample.entry.where))
        shown_stills = [frame_jpeg(frame) for frame in rearrange(decoded, "t c h w -> t h w c").numpy()]
    return Pictures(
        stills=shown_stills,
        still_seconds=[float(sample.entry.frame_ticks[still]) / TICKS_PER_SECOND for still in stills],
        spectrogram=spectrogram_png(shown, len(mel)),
        has_audio=sample.entry.has_audio,
        seconds=seconds_ticks(0.0, seconds),
        hertz=hertz_ticks(sample_rate_hz),
    )
