"""The tasks on which ways to join experts are compared: what the experts learn first, and which models there are.

`holistic` asks for three independent factors at once: each sense knows its own part. `binding` asks which object keeps
time with the sound: no sense knows any part. There the expert that sees keeps the order of frames (VideoMAE in the
place of CAVA's images), and the models are ways to join it with the one that hears.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ca2st.model.config import AudioVisualConfig
from pipelines.views.draws import EvaluationViews
from ray_jobs.demo.comparison import COMPARED, ComparedModel
from ray_jobs.demo.pretraining import Lesson


@dataclass(frozen=True, kw_only=True, slots=True)
class FusionTask:
    """A world, its experts and the models that join them."""

    recipe: str
    """Name of the recipe that all models share but for `[model]`; its `data.synthetic` is the world."""
    expert_recipe: str
    """Name of the recipe of all experts."""
    lessons: tuple[Lesson, ...]
    """What each expert learns first. The longest lesson first."""
    models: Mapping[str, ComparedModel]
    """Every model that may be named; all of them by default."""
    once: Collection[str] = ()
    """Those of them that are run with the first seed only."""
    views: EvaluationViews
    """Views of a sample in tests."""


def _heard_and_seen(says: str, /, **changes: object) -> ComparedModel:
    return ComparedModel(changes=changes, senses="temporal+audio", says=says)


def _exchange(says: str, /, **changes: Any) -> ComparedModel:
    """CAVA with another setting of its exchange."""
    return _heard_and_seen(says, audio_spatial=AudioVisualConfig(**changes))


_BASELINES: dict[str, ComparedModel] = {
    "video": ComparedModel(changes={"kind": "spatial"}, senses="temporal", says="the expert that sees, alone"),
    "audio": ComparedModel(changes={"kind": "audio"}, senses="audio", says="the expert that hears, alone"),
    "late_add": _heard_and_seen("both, features added", fusion="late_add"),
    "late_concat": _heard_and_seen("both, features side by side", fusion="late_concat"),
    "lateral": _heard_and_seen("both, lateral connections in all layers", fusion="lateral"),
    "cava": _heard_and_seen("both, B-CA in all layers"),
}
ABLATIONS: dict[str, ComparedModel] = {
    "from_audio": _exchange("sound is heard, does not listen (A2S)", directions="from_audio"),
    "to_audio": _exchange("sound listens, is not heard (S2A)", directions="to_audio"),
    "last_layer": _exchange("B-CA in the last layer", last_layers=1),
    "last_2_layers": _exchange("B-CA in the last two layers", last_layers=2),
    "no_positions": _exchange("no position codes", positions="none"),
    "learned_positions": _exchange("learned tables in place of time codes", positions="learned"),
    "reference_time_codes": _heard_and_seen("audio time codes laid out as published", time_code_layout="reference"),
    "ratio_1_8": _heard_and_seen("bottleneck D/8", bottleneck_ratio=1 / 8),
    "ratio_1_4": _heard_and_seen("bottleneck D/4", bottleneck_ratio=1 / 4),
    "ratio_1": _heard_and_seen("no bottleneck, D", bottleneck_ratio=1.0),
    "no_adapters": _heard_and_seen("B-CA alone, no adapters", adapters=False),
}
"""CAVA with one thing changed: the published ablations that an exchange of picture and sound has."""

FUSION_TASKS: dict[str, FusionTask] = {
    "holistic": FusionTask(
        recipe="demo_ca2st",
        expert_recipe="demo_expert",
        lessons=(
            Lesson(expert="spatial", targets=("space",), epochs=10),
            Lesson(expert="temporal", targets=("time",), epochs=4),
            Lesson(expert="audio", targets=("audio",), epochs=3),
        ),
        models=COMPARED,
        views=EvaluationViews(protocol="test", clips=2, crops=3),
    ),
    "binding": FusionTask(
        recipe="binding_cava",
        expert_recipe="binding_expert",
        lessons=(
            Lesson(expert="spatial", targets=("disc_rhythm", "square_rhythm"), epochs=30),
            Lesson(expert="audio", targets=("rhythm",), epochs=10),
        ),
        models=_BASELINES | ABLATIONS,
        once=ABLATIONS,
        views=EvaluationViews(),
    ),
}
"""By the name that `ca2st bench fusion --task` takes."""
