"""The page of the demo: one HTML file with its pictures and style inside."""

import math
from pathlib import Path, PurePath

from ca2st import __version__
from ca2st.durable import write_bytes
from ca2st.training.journal import JOURNAL_NAME, run_sequence
from ray_jobs.config.recipe import Recipe
from ray_jobs.pages.templates import page_environment
from ray_jobs.synthetic.comparison import ComparisonRow
from ray_jobs.synthetic.demo_page.answers import Answers, Factors, factors_of_set, read_all_answers, shown
from ray_jobs.synthetic.demo_page.clips import sample_clips
from ray_jobs.synthetic.demo_page.confusion import confusion_chart
from ray_jobs.synthetic.demo_page.curves import LossChart, least_loss, loss_chart
from ray_jobs.synthetic.demo_page.tables import MODEL_NAMES, model_results, recipe_of_run
from ray_jobs.synthetic.demo_report import DemoReport, next_steps
from sharding.keys import sample_key
from sharding.manifest import read_manifest

PAGE_NAME = "index.html"
_FACTOR_NAMES = {"space": "Shape", "time": "Motion", "audio": "Tone"}
_EXPERT_FACTORS = {"space": "shapes", "time": "motions", "audio": "tones"}


def write_demo_page(report: DemoReport, out: Path) -> Path:
    """Write `index.html` into the folder `out` and return its path.

    Raises:
        DataDamageError: shards or predictions are not what was written.
    """
    page = out / PAGE_NAME
    write_bytes(page, render_demo_page(report).encode())
    return page


def render_demo_page(report: DemoReport) -> str:
    """The whole page; it asks nothing of any network."""
    manifest = read_manifest(Path(report.test_shards))
    factors, answers = factors_of_set(manifest), read_all_answers(report.runs)
    recipe = recipe_of_run(report.runs[-1])
    assert recipe.data.train is not None  # the contest names its shards
    environment = page_environment("ray_jobs.synthetic.demo_page")
    environment.filters["shown"] = shown
    return environment.get_template("page.html").render(
        version=__version__,
        report=report,
        num_train=read_manifest(Path(recipe.data.train)).num_samples,
        num_test=manifest.num_samples,
        epochs=recipe.training.epochs,
        video_name=PurePath(report.prediction.video).name,
        video_truth=_truth(answers[-1], factors, report.prediction.video),
        results=model_results(report.runs, answers, factors),
        chart=_losses(report.runs, recipe, num_classes=math.prod(factors.sizes)),
        confusion=confusion_chart(answers[-1], factors),
        clips=sample_clips(answers, factors, Path(report.test_shards)),
        steps=next_steps(report),
        model_names=MODEL_NAMES,
        factor_names=_FACTOR_NAMES,
        expert_factors=_EXPERT_FACTORS,
    )


def _truth(answers: Answers, factors: Factors, video: str) -> str | None:
    """The true class of a video of the test set, in words; None where it is another."""
    split, _, number = PurePath(video).stem.partition("-")
    key = sample_key(f"{split}/{number}")  # as the synthetic world names its samples and their files
    return " · ".join(factors.labels(int(answers.labels[answers.keys.index(key)]))) if key in answers.keys else None


def _losses(rows: list[ComparisonRow], recipe: Recipe, *, num_classes: int) -> LossChart:
    smoothing = recipe.optim.label_smoothing
    return loss_chart(
        {
            row.model: [(step["step"], step["loss"]) for step in run_sequence(Path(row.run_dir) / JOURNAL_NAME)]
            for row in rows
        },
        {row.model: least_loss(row.ceiling, num_classes=num_classes, smoothing=smoothing) for row in rows},
        num_classes=num_classes,
    )
