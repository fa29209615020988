"""``--checkpoint best|last|STEP``: which checkpoint of a run folder is meant."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from pydantic import ValidationError

from ca2st.checked_json import canonical_json
from ca2st.errors import UserInputError
from ca2st.training.checkpoint import CheckpointMarker, save_checkpoint
from ray_jobs.config.recipe import identity_settings, recipe_document
from ray_jobs.config.recipe_file import load_recipe
from ray_jobs.runs.model import find_checkpoint
from sharding.format.shard_set import AudioParameters, VideoParameters


def save(run_dir: Path, step: int) -> Path:
    document = {
        "recipe": recipe_document(load_recipe("smoke")),
        "classes": {"label": ["a", "b"]},
        "audio": asdict(AudioParameters(policy="none")),
        "video": asdict(VideoParameters(short_side=48)),
    }
    marker = CheckpointMarker(
        step=step,
        attempt=1,
        seed=0,
        global_batch_size=1,
        manifests={},
        recipe_sha256="0" * 64,
        topology={},
        versions={},
    )
    return save_checkpoint(run_dir / "checkpoints", {"run.json": canonical_json(document)}, marker)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Checkpoints of steps 4, 8 and 12; step 8 has the best validation."""
    for step in (4, 8, 12):
        save(tmp_path, step)
    scores = {2: 0.9, 4: 0.5, 8: 0.75, 12: 0.25}
    validate(tmp_path, {step: scores[step] for step in (4, 8, 12)})
    return tmp_path


def validate(run_dir: Path, scores: dict[int, float]) -> None:
    lines = [
        {"event": "eval", "attempt": 1, "time": 1e9, "step": step, "split": "validation", "metrics": {"top1": top1}}
        for step, top1 in scores.items()
    ]
    text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
    (run_dir / "journal.jsonl").write_text(text)


@pytest.mark.parametrize(("which", "step"), [("last", 12), ("best", 8), ("4", 4), ("0012", 12)])
def test_a_checkpoint_is_chosen_by_word_or_step(run_dir: Path, which: str, step: int) -> None:
    assert find_checkpoint(run_dir, which).name == f"step-{step}.attempt-1"


@pytest.mark.parametrize(
    ("which", "said"),
    [
        ("5", r"--checkpoint: expected best, last or a step of which .* keeps the checkpoint \(12, 8, 4\), found '5'"),
        ("newest", "found 'newest'"),
        ("9" * 5000, "keeps the checkpoint"),
    ],
)
def test_a_checkpoint_that_is_not_there_is_refused_with_those_that_are(run_dir: Path, which: str, said: str) -> None:
    with pytest.raises(UserInputError, match=said):
        find_checkpoint(run_dir, which)


def test_a_best_that_is_not_kept_or_not_known_is_never_replaced_silently(run_dir: Path) -> None:
    validate(run_dir, {2: 0.9, 4: 0.5})
    with pytest.raises(UserInputError, match=r"top1 0\.9000, was at step 2, whose checkpoint is not kept"):
        find_checkpoint(run_dir, "best")
    validate(run_dir, {})
    with pytest.raises(UserInputError, match="has no validation yet"):
        find_checkpoint(run_dir, "best")
    with pytest.raises(UserInputError, match="expected a run folder to choose from"):
        find_checkpoint(run_dir / "checkpoints" / "step-4.attempt-1", "best")


def test_settings_that_came_later_are_no_part_of_an_older_runs_identity() -> None:
    settings = identity_settings(load_recipe("smoke"))
    assert "training.ema_decay" not in settings
    assert not [name for name in settings if name.startswith("published")]
    averaged = identity_settings(load_recipe("smoke", ["training.ema_decay=0.99"]))
    assert averaged["training.ema_decay"] == 0.99
    free = ["training.keep_best=3", "training.early_stopping=2", "training.validate_every_steps=5"]
    assert identity_settings(load_recipe("smoke", free)) == settings


def test_early_stopping_without_validations_is_refused() -> None:
    smoke = load_recipe("smoke")
    alone = replace(smoke, data=replace(smoke.data, synthetic=None, train="shards"))
    with pytest.raises(ValidationError, match=r"training.early_stopping: expected data.validation beside it"):
        replace(alone, training=replace(alone.training, early_stopping=2))
