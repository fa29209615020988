"""`ca2st explain`: from a checkpoint and a video to a page, and the facts of it as numbers."""

from dataclasses import dataclass
from pathlib import Path

from ca2st.durable import write_bytes
from ray_jobs.explain.explanation import Explanation, require_attention, run_recorded
from ray_jobs.explain.page import render_page
from ray_jobs.inference.prediction import Prediction, require_videos
from ray_jobs.inference.trained import load_trained
from ray_jobs.output_file import require_writable_place


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
    trained = load_trained(checkpoint)
    require_attention(trained)
    explanation = run_recorded(trained, video)
    write_bytes(page, render_page(explanation).encode())
    return ExplainReport(html=page, predictions=explanation.predictions, entropy=entropy_rows(explanation))


def entropy_rows(explanation: Explanation) -> list[EntropyRow]:
    """One row a direction and layer."""
    return [
        EntropyRow(
            direction=found.direction.name,
            layer=found.layer,
            bits=float(found.entropy_bits[0]),
            share=float(found.entropy_share[0]),
        )
        for found in explanation.maps
    ]
