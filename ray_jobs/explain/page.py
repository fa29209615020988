"""``ca2st explain``: what each expert of a model listened to in a video, as one HTML page and as numbers."""

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path, PurePath

import numpy as np
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image

from ca2st import __version__
from ca2st.durable import write_bytes
from ca2st.model.config import Direction
from ca2st.model.inspect import AttentionMap
from ca2st.spec import MEL_ROW_SECONDS
from ray_jobs.console import require_writable_place
from ray_jobs.explain.explanation import Explanation, Sound, run_recorded
from ray_jobs.pages import charts
from ray_jobs.runs.inference import load_trained
from ray_jobs.runs.prediction import Prediction, require_videos

MORE, LESS = (255, 138, 0, 220), (38, 84, 214, 160)
"""Red, green, blue and the highest opacity of more and of less than the even share. Orange and blue stay apart for
every kind of colour vision; what was ignored is veiled, not hidden."""
_EVEN = 127
_LEAST_RANGE, _MOST_RANGE = math.log2(1.25), 6.0


def times_even(share: NDArray[np.float32], *, num_keys: int | None = None) -> NDArray[np.float32]:
    """Return log2 of share / (1 / num_keys): 0 where a key gets what it would get if all got the same.

    `num_keys` None: as many as there are shares.
    """
    return np.log2(np.maximum(share * (num_keys or share.size), 2.0**-24)).astype(np.float32)


def colour_range(values: list[NDArray[np.float32]]) -> float:
    """Return the log2 that gets the full colour: nearly the largest of all, within bounds that keep noise pale."""
    highest = max(float(np.quantile(value, 0.995)) for value in values)
    return min(max(highest, _LEAST_RANGE), _MOST_RANGE)


def levels(log_times: NDArray[np.float32], limit: float) -> NDArray[np.uint8]:
    """0..254 from -limit to limit; 127 is the even share."""
    level: NDArray[np.uint8] = np.round(_EVEN + _EVEN * np.clip(log_times / limit, -1, 1)).astype(np.uint8)
    return level


def heat_png(level: NDArray[np.uint8]) -> str:
    """Return a data URI of [rows, columns] levels: one pixel per cell, clear at the even share."""
    signed = (level.astype(np.float32) - _EVEN) / _EVEN
    rgba = np.where(signed[..., None] > 0, MORE, LESS).astype(np.float32)
    rgba[..., 3] *= np.abs(signed)
    return charts.data_uri(Image.fromarray(np.round(rgba).astype(np.uint8)), "PNG")


def times(log_times: float) -> str:
    """Return ``3.1×`` for a log2 of it."""
    number = 2.0**log_times
    return f"{number:.0f}×" if number >= 9.95 else f"{number:.2g}×"


_MOST_LAYER_MARKS = 12
_SEES = {
    ("time", False): "A query sees its own place in every frame: a frame's colours say when its places were looked at.",
    ("space", False): "A query sees every place of its own frame, so time plays no part here.",
    ("space_time", False): "A query sees every place of every frame.",
    ("space_time", True): "A query sees the whole spectrogram.",
}
_NEARLY_EVEN = math.log2(1.05)


@dataclass(frozen=True, kw_only=True, slots=True)
class EntropyRow:
    """How widely the attention of one direction was spread in one layer."""

    direction: str
    """`t2s`, ...: keys from the first expert, queries from the second."""
    layer: int
    """Counted from 1."""
    bits: float
    """Mean over heads and queries."""
    share: float
    """Of the most it could be, log2 of the keys a query sees."""


def entropy_of(found: AttentionMap) -> EntropyRow:
    """Return how widely a map's attention was spread."""
    bits, share = float(found.entropy_bits[0]), float(found.entropy_share[0])
    return EntropyRow(direction=found.direction.name, layer=found.layer, bits=bits, share=share)


@dataclass(frozen=True, kw_only=True, slots=True)
class Matrix:
    """Query times (down) by key times (to the right)."""

    picture: str
    """Data URI, one pixel per cell."""
    query_ticks: list[charts.Tick]
    key_ticks: list[charts.Tick]


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerPanel:
    """One layer of one direction."""

    entropy: EntropyRow
    heats: list[str]
    """Attention received, as data URIs: one per frame for visual keys, one for a spectrogram."""
    strongest: str
    """The key with the most attention, in words."""
    matrix: Matrix | None
    """None where every query sees its own frame alone."""
    rows: int
    """Of a picture of attention."""
    columns: int
    levels: str
    """Base64 of the levels by query time, key picture, row and column, for the page's own script; empty without a
    matrix to choose a time from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DirectionView:
    """One direction in all of its layers."""

    direction: Direction
    panels: list[LayerPanel]
    sees: str
    """What a query sees, as a sentence."""
    most: str
    """What the fullest colours stand for, such as ``4×``."""
    least: str
    matrix_most: str
    """The same for the matrices of times, which are means over places and so paler."""
    query_labels: list[str]
    """The time of each query time."""

    @property
    def name(self) -> str:
        """T2S, ..."""
        return self.direction.name.upper()

    @property
    def hears(self) -> bool:
        """Whether the keys are sounds."""
        return self.direction.keys == "audio"


def direction_views(maps: Sequence[AttentionMap], explanation: Explanation) -> list[DirectionView]:
    """Return a view of each direction, in the order in which the model's last layer computes them."""
    names = dict.fromkeys(found.direction.name for found in sorted(maps, key=lambda found: -found.layer))
    return [_view([found for found in maps if found.direction.name == name], explanation) for name in names]


def pictures_of(cells: NDArray[np.float32], keys: str) -> NDArray[np.float32]:
    """Return [key_times, key_places] as [pictures, rows, columns]: squares, or a spectrogram with low tones below."""
    if keys == "audio":
        return rearrange(cells, "t f -> 1 f t")[:, ::-1]
    return rearrange(cells, "t (h w) -> t h w", h=math.isqrt(cells.shape[1]))


MODEL_NAMES = {"cast": "CAST", "cava": "CAVA", "ca2st": "CA\N{SUPERSCRIPT TWO}ST"}
EXPERT_SENSES = {
    "spatial": "what things look like, frame by frame",
    "temporal": "how things move, over frame pairs",
    "audio": "how things sound, on a mel spectrogram",
}


def render_page(explanation: Explanation) -> str:
    """Return the whole page; it asks nothing of any network."""
    maps, depth = explanation.maps, explanation.model.depth
    entropy = [entropy_of(found) for found in maps]
    share = [(row.direction, row.layer, 100 * row.share) for row in entropy]
    bits = [(row.direction, row.layer, row.bits) for row in entropy]
    bits_places = charts.places(0, max(1, *(row.bits for row in entropy)))
    experts = dict.fromkeys(expert for found in maps for expert in (found.direction.queries, found.direction.keys))
    by_target = groupby(explanation.predictions, key=lambda prediction: prediction.target)
    return (
        charts.page_environment()
        .get_template("explain.html")
        .render(
            title=PurePath(explanation.video).name,
            model_name=MODEL_NAMES[explanation.model.kind],
            facts=_facts(explanation),
            version=__version__,
            targets=[(name, list(group)) for name, group in by_target],
            frames=[charts.frame_jpeg(frame) for frame in explanation.frames],
            frame_seconds=explanation.frame_seconds,
            pair_seconds=explanation.pair_seconds,
            spectrogram=None if explanation.sound is None else _spectrogram(explanation.sound, explanation),
            views=direction_views(maps, explanation),
            charts=[
                _entropy_chart(
                    "Share of the maximum", share, [0, 25, 50, 75, 100], depth, axis="{:g} %", point="{:.1f} %"
                ),
                _entropy_chart("In bits", bits, bits_places, depth, axis="{:g}", point="{:.2f} bits"),
            ],
            senses={name: EXPERT_SENSES[name] for name in experts},
            colours={"more": MORE, "less": LESS},
        )
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ExplainReport:
    """What was written, in numbers."""

    html: Path
    predictions: list[Prediction]
    """By target, the likeliest first."""
    entropy: list[EntropyRow]
    """By layer, in the order of computation."""


def explain_video(checkpoint: Path, video: Path, *, out: Path | None = None) -> ExplainReport:
    """Write the page about `video`; by default beside nothing but its name, in the current folder.

    Raises:
        UserInputError: no such video, `checkpoint` is none, or its model has nothing to explain.
        RejectBudgetError: the video cannot be decoded; the message says why.
    """
    require_videos([video])
    page = out or Path(f"{video.stem}.explain.html")
    require_writable_place(page, "--out")
    explanation = run_recorded(load_trained(checkpoint), video)
    write_bytes(page, render_page(explanation).encode())
    entropy = [entropy_of(found) for found in explanation.maps]
    return ExplainReport(html=page, predictions=explanation.predictions, entropy=entropy)


def _entropy_chart(
    title: str,
    values: Sequence[tuple[str, int, float]],
    y_places: Sequence[float],
    depth: int,
    *,
    axis: str,
    point: str,
) -> charts.Chart:
    frame = charts.Frame(x_range=(0.5, depth + 0.5), y_range=(0, y_places[-1]), width=360, height=230)
    every = -(-depth // _MOST_LAYER_MARKS)

    def line(name: str) -> charts.Line:
        of_direction = [(layer, value) for of, layer, value in values if of == name]
        points = frame.points(
            of_direction, lambda layer, value: f"{name.upper()}, layer {layer:g}: {point.format(value)}"
        )
        return charts.Line(css=name, name=name.upper(), points=points)

    return charts.Chart(
        title=title,
        says=f"Entropy by layer, a line per direction: {title.lower()}",
        x_label="layer",
        frame=frame,
        lines=[line(name) for name in dict.fromkeys(name for name, _, _ in values)],
        x_marks=[charts.Mark(at=frame.x(layer), label=str(layer)) for layer in range(every, depth + 1, every)],
        y_marks=[charts.Mark(at=frame.y(place), label=axis.format(place)) for place in y_places],
    )


def _view(maps: Sequence[AttentionMap], explanation: Explanation) -> DirectionView:
    direction = maps[0].direction
    received = [times_even(found.received[0].numpy()) for found in maps]
    by_time = [times_even(found.by_time[0].numpy(), num_keys=found.by_time.shape[-1]) for found in maps]
    limit, matrix_limit = colour_range(received), colour_range(by_time)
    panels = []
    for found, own, times_own in zip(maps, received, by_time, strict=True):
        matrix, moments = None, ""
        pictures = pictures_of(own, direction.keys)
        if direction.window != "space":
            matrix = Matrix(
                picture=heat_png(levels(times_own, matrix_limit)),
                query_ticks=explanation.ticks(direction.queries),
                key_ticks=explanation.ticks(direction.keys),
            )
            given = times_even(found.given[0].numpy(), num_keys=own.size)
            cells = levels(np.stack([pictures_of(one, direction.keys) for one in given]), limit)
            moments = base64.b64encode(cells.tobytes()).decode()
        panels.append(
            LayerPanel(
                entropy=entropy_of(found),
                heats=[heat_png(levels(picture, limit)) for picture in pictures],
                strongest=_strongest(own, direction.keys, explanation),
                matrix=matrix,
                rows=pictures.shape[1],
                columns=pictures.shape[2],
                levels=moments,
            )
        )
    return DirectionView(
        direction=direction,
        panels=panels,
        sees=_SEES[direction.window, direction.keys == "audio"],
        most=times(limit),
        least=times(-limit),
        matrix_most=times(matrix_limit),
        query_labels=[f"{seconds:.2f} s" for seconds in explanation.token_seconds(direction.queries)],
    )


def _strongest(received: NDArray[np.float32], keys: str, explanation: Explanation) -> str:
    if received.max() < _NEARLY_EVEN:
        return "no key stands out: each gets about the even share"
    time, place = np.unravel_index(int(received.argmax()), received.shape)
    where = explanation.key_in_words(keys, int(time), int(place), num_places=received.shape[1])
    return f"{where}: {times(float(received.max()))} the even share"


def _facts(explanation: Explanation) -> list[str]:
    clip, sound = explanation.clip, explanation.sound
    facts = [
        f"{explanation.model.depth} layers, {explanation.model.num_heads} heads",
        f"{clip.num_frames} frames of {clip.crop_size} × {clip.crop_size} pixels",
    ]
    if sound is not None:
        facts.append(f"{clip.mel_rows * MEL_ROW_SECONDS:.2f} s of spectrogram")
    return [*facts, explanation.checkpoint]


def _spectrogram(sound: Sound, explanation: Explanation) -> dict[str, object]:
    """Return the picture of the sound with its axes."""
    span = sound.end_seconds - sound.start_seconds
    marks = [100 * (seconds - sound.start_seconds) / span for seconds in explanation.pair_seconds]
    return {
        "picture": charts.spectrogram_png(sound.mel, sound.num_heard_rows),
        "seconds": charts.seconds_ticks(sound.start_seconds, sound.end_seconds),
        "hertz": charts.hertz_ticks(sound.sample_rate_hz),
        "frames": [mark for mark in marks if 0 <= mark <= 100],  # percent of the width, of the frame pairs inside
        "heard": 100 * sound.num_heard_rows / len(sound.mel),  # percent of the width; what follows is padding
        "is_silent": sound.num_heard_rows == 0,
        "box": explanation.audio_box(),
    }
