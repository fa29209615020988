"""Fine-tuning: a new run begins with a trained model, and from its first checkpoint on needs nothing but itself."""

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from accelerate.state import AcceleratorState

from ca2st.durable import NO_FAULTS, FaultPoints, InjectedFault
from ca2st.errors import UserInputError
from ca2st.training.errors import ResumeRefusedError
from ca2st.weights.model_file import export_model
from pipelines.views import EvaluationViews
from ray_jobs.cli import main
from ray_jobs.config.recipe import Recipe
from ray_jobs.config.recipe_file import load_recipe
from ray_jobs.evaluation.workers import EvaluationReport, evaluate_checkpoint
from ray_jobs.launch import launch
from ray_jobs.runs.inference import load_trained
from ray_jobs.runs.model import begin_model, check_label_spaces, find_checkpoint, read_start
from sharding.format.shard_set import LabelSpace
from support.fake_shards import make_samples, make_shard_set
from support.models import tiny_model
from support.tiny_runs import RECIPE, journal, sequence

CLASSES = {
    "colours": {"label": ("red", "green", "blue")},
    "shapes": {"label": ("round", "square", "long")},
    "both": {"label": ("red", "green", "blue"), "size": ("small", "large", "huge")},
}
HEAD_ONLY = ("trainable=head", "start.head=new", "optim.layer_decay=1")
VIEWS = EvaluationViews(protocol="test", clips=1, crops=1)


pytestmark = pytest.mark.usefixtures("own_process")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of `CLASSES`: six training clips each, and three of validation."""
    folder = tmp_path_factory.mktemp("fine_tuning")
    for name, classes in CLASSES.items():
        spaces = tuple(LabelSpace(name=target, classes=names) for target, names in classes.items())
        for split, count in (("train", 6), ("validation", 3)):
            samples = [replace(sample, labels=sample.labels * len(spaces)) for sample in make_samples(count)]
            make_shard_set(folder / name / split, samples, split=split, label_spaces=spaces, targets=tuple(classes))
    return folder


def recipe(root: Path, data: str, *overrides: str) -> Recipe:
    """Epochs of two steps, a checkpoint after each step."""
    path = root / "tiny.toml"
    path.write_text(RECIPE.format(root=root))
    settings = (
        "tracking.enabled=false",
        "data.loader.backend=reference",
        f"data.train={str(root / data / 'train')!r}",
        f"data.validation={str(root / data / 'validation')!r}",
        "training.epochs=1",
        "training.global_batch_size=3",
        "training.per_device_batch_size=3",
        "training.checkpoint_every_steps=1",
    )
    return load_recipe(str(path), (*settings, *overrides))


@pytest.fixture(scope="module")
def old(root: Path) -> Path:
    """A finished run on colours."""
    AcceleratorState._reset_state(reset_partial_state=True)
    launch(recipe(root, "colours"), root / "old", faults=NO_FAULTS)
    return root / "old"


def tuning(root: Path, start: Path) -> Recipe:
    """Two epochs of only a new head, for other classes."""
    return recipe(root, "shapes", *HEAD_ONLY, f"start.checkpoint={str(start)!r}", "training.epochs=2")


@pytest.fixture(scope="module")
def tuned(root: Path, old: Path) -> Path:
    AcceleratorState._reset_state(reset_partial_state=True)
    launch(tuning(root, old), root / "tuned", faults=NO_FAULTS)
    return root / "tuned"


def state_of(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_trained(run_dir).model.state_dict()


def evaluated(root: Path, run_dir: Path) -> EvaluationReport:
    return evaluate_checkpoint(run_dir, root / "shapes" / "validation", VIEWS, predictions=run_dir / "p.parquet")


@pytest.mark.slow
def test_training_the_head_alone_leaves_every_other_tensor_bit_equal(old: Path, tuned: Path) -> None:
    before, after = state_of(old), state_of(tuned)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith("head.")}


@pytest.mark.slow
def test_the_journal_says_what_a_run_began_with(old: Path, tuned: Path) -> None:
    (start,) = journal(tuned, "start")
    began = start["started_from"]
    assert began["checkpoint"] == str(find_checkpoint(old))
    assert began["sha256"] == read_start(old).sha256
    assert began["kept"] == len([name for name in state_of(old) if not name.startswith("head.")])
    assert began["resized"] == []
    assert "head.classifiers.label.weight" in began["fresh"]
    assert journal(old, "start")[0]["started_from"] == {}


@pytest.mark.slow
def test_a_killed_run_goes_on_without_the_folder_it_began_with(root: Path, old: Path, tuned: Path) -> None:
    start, run_dir = shutil.copytree(old, root / "moved"), root / "killed"
    with pytest.raises(InjectedFault):
        launch(tuning(root, start), run_dir, faults=FaultPoints(point="step.logged", nth=3, kind="raise"))
    shutil.rmtree(start)
    AcceleratorState._reset_state(reset_partial_state=True)
    launch(tuning(root, start), run_dir, faults=NO_FAULTS)
    assert sequence(run_dir) == sequence(tuned)
    assert [line["resumed_from"] for line in journal(run_dir, "start")] == [None, "step-2.attempt-1"]
    assert [line["started_from"]["sha256"] for line in journal(run_dir, "start")] == [read_start(old).sha256] * 2
    found, expected = state_of(run_dir), state_of(tuned)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    AcceleratorState._reset_state(reset_partial_state=True)
    report = evaluated(root, run_dir)
    assert report.metrics == evaluated(root, tuned).metrics
    ours, undisturbed = (pq.ParquetFile(path).read() for path in (report.predictions, tuned / "p.parquet"))
    assert ours.equals(undisturbed)  # but for the name of the checkpoint's attempt beside the table


def test_a_start_that_is_gone_before_the_first_checkpoint_is_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match=r"start\.checkpoint: expected a checkpoint folder.* found nothing at"):
        launch(tuning(root, tmp_path / "gone"), tmp_path / "run", faults=NO_FAULTS)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_resuming_from_another_start_is_refused_with_the_difference(root: Path, old: Path, tuned: Path) -> None:
    earlier = old / "checkpoints" / "step-1.attempt-1"
    with pytest.raises(ResumeRefusedError, match=r'start\.sha256: "[0-9a-f]{64}" -> "[0-9a-f]{64}"'):
        launch(tuning(root, earlier), tuned, faults=NO_FAULTS)


def test_a_model_file_is_a_start_like_the_checkpoint_it_was_exported_from(root: Path, old: Path) -> None:
    file = root / "model.safetensors"
    report = export_model(load_trained(old).model, file)
    source, checkpoint = read_start(file), read_start(old)
    assert source.sha256 == report.sha256
    assert source.description == checkpoint.description
    assert source.state.keys() == checkpoint.state.keys()
    assert all(torch.equal(source.state[name], tensor) for name, tensor in checkpoint.state.items())


def test_a_file_under_published_names_or_of_another_kind_is_refused_with_what_to_give(tmp_path: Path) -> None:
    published = tmp_path / "published.safetensors"
    export_model(tiny_model("cast"), published, names="published")
    with pytest.raises(UserInputError, match=rf"published names; run `ca2st weights import --kind cast {published} "):
        read_start(published)
    recipe_file = tmp_path / "r.toml"
    recipe_file.write_text("")
    with pytest.raises(UserInputError, match=r"start\.checkpoint: .*that ends in \.safetensors, found .*r\.toml; give"):
        read_start(recipe_file)


def test_a_target_of_the_same_classes_keeps_its_classifier_and_a_new_one_starts_anew(root: Path, old: Path) -> None:
    begun = begin_model(recipe(root, "both", f"start.checkpoint={str(old)!r}"), CLASSES["both"], root / "run")
    before, after = state_of(old), begun.model.state_dict()
    assert begun.note["fresh"] == ["head.classifiers.size.bias", "head.classifiers.size.weight"]
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (
            {"label": ("red", "blue", "green")},
            r"label space 'label' with 3 classes \(class 1 is 'blue', there 'green'\)",
        ),
        ({"label": ("red", "green")}, r"label space 'label' with 2 classes here and 3 classes in .*step-2"),
        ({"sound": ("loud", "soft")}, r'needs a label space in common, found sound here and label in .*"new"'),
    ],
)
def test_a_head_of_other_classes_is_not_kept(old: Path, classes: dict[str, tuple[str, ...]], message: str) -> None:
    with pytest.raises(UserInputError, match=message):
        check_label_spaces(read_start(old), classes)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (('trainable=["head.*","heads.*"]',), r"found none for: heads\.\* \(nearest names: head\."),
        (("start.checkpoint='{old}'", "model.combination=parallel"), "combination 'sequential' there and 'parallel'"),
        (("start.checkpoint='{old}'", "model.bottleneck_ratio=1.0"), "of another shape: layers"),
        (("start.checkpoint='{old}'", "clip.num_frames=8", "model.pretrained_num_frames=4"), "resize_positions = true"),
        (("start.checkpoint='{file}'",), "expected a whole model"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_folder_is_made(
    root: Path, old: Path, tmp_path: Path, overrides: tuple[str, ...], message: str
) -> None:
    expert = next((old / "experts").iterdir())
    settings = (text.format(old=old, file=expert) if "{" in text else text for text in overrides)
    with pytest.raises(UserInputError, match=message):
        launch(recipe(root, "colours", *settings), tmp_path / "run", faults=NO_FAULTS)
    assert not (tmp_path / "run").exists()


def test_the_plan_tells_what_trains_and_what_it_starts_from(
    root: Path, old: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe(root, "shapes")
    shards = [f"data.{split}={str(root / 'shapes' / split)!r}" for split in ("train", "validation")]
    settings = [*shards, f"start.checkpoint={str(old)!r}", *HEAD_ONLY]
    arguments = [part for setting in settings for part in ("--set", setting)]
    command = ["ca2st", "train", str(root / "tiny.toml"), "--dry-run", "--out", str(root / "planned"), *arguments]
    monkeypatch.setattr(sys, "argv", [*command, "--json"])
    with pytest.raises(SystemExit):
        main()
    plan = json.loads(capsys.readouterr().out)
    assert (plan["trains"], plan["experts_precision"]) == ("head", "fp32")
    assert plan["start"]["checkpoint"] == str(find_checkpoint(old))
    assert plan["trainable"] == sum(x.numel() for name, x in state_of(old).items() if name.startswith("head."))
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit):
        main()
    assert re.search(rf"^ +start +sha256 {plan['start']['sha256']}", capsys.readouterr().out, re.MULTILINE)
    assert not (root / "planned").exists()
