"""What the demo made, and what a person may try next."""

import shlex
from dataclasses import dataclass

from ray_jobs.inference.prediction import VideoPrediction
from ray_jobs.synthetic.comparison import ComparisonRow
from ray_jobs.synthetic.pretraining import PretrainedExpert


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoReport:
    """What the demo made."""

    shards: list[str]
    """Folders of shard sets, verified."""
    test_shards: str
    """The one of them on which all models were tested."""
    experts: list[PretrainedExpert]
    runs: list[ComparisonRow]
    """The comparison, read back from MLflow; the fullest model last."""
    prediction: VideoPrediction
    """What the fullest model says about one clip."""
    tracking_uri: str
    page: str
    """All of it to look at, one HTML file."""
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class NextStep:
    """A command to try."""

    command: str
    """As a shell takes it; capitals stand for what the person has."""
    says: str
    """What it does, in a few words."""


def next_steps(report: DemoReport) -> tuple[NextStep, NextStep, NextStep]:
    """From the runs side by side to videos of one's own."""
    return (
        NextStep(
            command=shlex.join(["mlflow", "ui", "--backend-store-uri", report.tracking_uri]),
            says="Compare the runs in a browser: every setting, every curve.",
        ),
        NextStep(
            command=shlex.join(["ca2st", "explain", report.runs[-1].checkpoint, report.prediction.video]),
            says="See what each expert listened to in this clip, or in a video of your own, layer by layer.",
        ),
        NextStep(
            command="ca2st train --data-folder YOUR_VIDEOS",
            says="Train on videos of your own, a folder a class: no recipe needed, and rerunning goes on.",
        ),
    )
