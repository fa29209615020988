"""The page: one HTML file with its pictures, style and script inside."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import PurePath

from ca2st import __version__
from ca2st.spec import MEL_ROW_SECONDS
from ray_jobs.explain.charts import entropy_charts
from ray_jobs.explain.explanation import Explanation, Sound
from ray_jobs.explain.pictures import LESS, MORE
from ray_jobs.explain.places import AudioBox, Places
from ray_jobs.explain.views import direction_views
from ray_jobs.inference.prediction import Prediction
from ray_jobs.pages.axes import Tick, hertz_ticks, seconds_ticks
from ray_jobs.pages.pictures import frame_jpeg, spectrogram_png
from ray_jobs.pages.templates import page_environment

MODEL_NAMES = {"cast": "CAST", "cava": "CAVA", "ca2st": "CA\N{SUPERSCRIPT TWO}ST"}
EXPERT_SENSES = {
    "spatial": "what things look like, frame by frame",
    "temporal": "how things move, over frame pairs",
    "audio": "how things sound, on a mel spectrogram",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Spectrogram:
    """The picture of the sound with its axes."""

    picture: str
    seconds: list[Tick]
    hertz: list[Tick]
    frames: list[float]
    """Where the sampled frame pairs are, in percent of the width; only those inside."""
    heard: float
    """Percent of the width that is sound; what follows is padding."""
    box: AudioBox

    @property
    def is_silent(self) -> bool:
        """Whether the video has no sound at all."""
        return self.heard == 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """The predictions of one label space."""

    name: str
    predictions: list[Prediction]


def render_page(explanation: Explanation) -> str:
    """The whole page; it asks nothing of any network."""
    places = Places(explanation=explanation)
    sound = explanation.sound
    template = page_environment("ray_jobs.explain").get_template("page.html")
    return template.render(
        title=PurePath(explanation.video).name,
        model_name=MODEL_NAMES[explanation.model.kind],
        facts=_facts(explanation),
        version=__version__,
        targets=_targets(explanation.predictions),
        frames=[frame_jpeg(frame) for frame in explanation.frames],
        frame_seconds=explanation.frame_seconds,
        pair_seconds=places.frame_seconds,
        spectrogram=_spectrogram(sound, places) if sound is not None else None,
        views=direction_views(explanation.maps, places),
        charts=entropy_charts(explanation.maps, depth=explanation.model.depth),
        depth=explanation.model.depth,
        senses={name: EXPERT_SENSES[name] for name in _experts(explanation)},
        colours={"more": MORE, "less": LESS},
    )


def _facts(explanation: Explanation) -> list[str]:
    clip, sound = explanation.clip, explanation.sound
    facts = [
        f"{explanation.model.depth} layers, {explanation.model.num_heads} heads",
        f"{clip.num_frames} frames of {clip.crop_size} × {clip.crop_size} pixels",
    ]
    if sound is not None:
        facts.append(f"{clip.mel_rows * MEL_ROW_SECONDS:.2f} s of spectrogram")
    return [*facts, explanation.checkpoint]


def _experts(explanation: Explanation) -> Iterable[str]:
    """In the order in which they are first heard of."""
    return dict.fromkeys(
        expert for found in explanation.maps for expert in (found.direction.queries, found.direction.keys)
    )


def _targets(predictions: list[Prediction]) -> list[Target]:
    return [
        Target(name=name, predictions=list(group))
        for name, group in groupby(predictions, key=lambda prediction: prediction.target)
    ]


def _spectrogram(sound: Sound, places: Places) -> Spectrogram:
    span = sound.end_seconds - sound.start_seconds
    marks = [100 * (seconds - sound.start_seconds) / span for seconds in places.frame_seconds]
    return Spectrogram(
        picture=spectrogram_png(sound.mel, sound.num_heard_rows),
        seconds=seconds_ticks(sound.start_seconds, sound.end_seconds),
        hertz=hertz_ticks(sound.sample_rate_hz),
        frames=[mark for mark in marks if 0 <= mark <= 100],
        heard=100 * sound.num_heard_rows / len(sound.mel),
        box=places.audio_box(),
    )
