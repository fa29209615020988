"""Damage in the documents of a run folder: it is named, and sound checkpoints go on to the same numbers."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from ca2st.checked_json import DocumentError
from ca2st.durable import NO_FAULTS
from ca2st.errors import EnvironmentFault, UserInputError
from ca2st.training.checkpoint import list_checkpoints
from ca2st.training.journal import run_sequence
from ray_jobs.config.recipe import Recipe
from ray_jobs.launch import launch
from ray_jobs.runs.failures import read_failure
from ray_jobs.runs.plan import resume_plan
from ray_jobs.tracking.state import read_state
from support.fake_shards import make_samples, make_shard_set
from support.trained import trained_model

DAMAGE = {
    "other bytes": b"\xff\xfe{",
    "half of it": None,
    "another type": b"[]",
    "no field": b"{}",
    "a number without end": b'{"name": ' + b"9" * 5000 + b"}",
    "nested without end": b"[" * 100_000,
}
damaged = pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)


pytestmark = pytest.mark.usefixtures("own_process")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damaged")
    make_shard_set(folder / "set", make_samples(16))
    return folder


def recipe_in(root: Path) -> Recipe:
    """Four steps, a checkpoint after each."""
    one = trained_model(root, "cast").recipe
    return replace(
        one,
        data=replace(one.data, train=str(root / "set")),
        training=replace(one.training, checkpoint_every_steps=1, keep_checkpoints=4),
        tracking=replace(one.tracking, enabled=False),
    )


@pytest.fixture(scope="module")
def finished(root: Path) -> Path:
    AcceleratorState._reset_state(reset_partial_state=True)
    launch(recipe_in(root), root / "finished", faults=NO_FAULTS)
    return root / "finished"


@pytest.fixture
def run_dir(finished: Path, tmp_path: Path) -> Path:
    """The same run after two of its four steps."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    for checkpoint in list_checkpoints(folder / "checkpoints")[:2]:
        shutil.rmtree(checkpoint)
    return folder


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in run_sequence(folder / "journal.jsonl")]


def put(path: Path, damage: bytes | None) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if damage is None else damage)


@pytest.mark.parametrize("damage", [b"\xff\xfe{", b"[]"])
def test_a_sound_checkpoint_goes_on_though_documents_are_damaged_and_the_damage_is_named(
    root: Path, finished: Path, run_dir: Path, caplog: pytest.LogCaptureFixture, damage: bytes
) -> None:
    names = ("recipe.json", "tracking.json", "tracking_progress.json")
    for name in names:
        (run_dir / name).write_bytes(damage)
    newest = list_checkpoints(run_dir / "checkpoints")[0] / "COMPLETE.json"
    newest.write_bytes(damage)
    outcome = launch(recipe_in(root), run_dir, faults=NO_FAULTS)
    assert outcome.steps == 4
    assert losses(run_dir) == losses(finished)
    told = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    for path in (*(run_dir / name for name in names), newest):
        assert any("DAMAGED" in line and f"{path}: " in line for line in told), path
    assert read_state(run_dir).run_name == run_dir.name
    assert json.loads((run_dir / "recipe.json").read_text())["name"] == "tiny"


def test_another_recipe_is_refused_though_the_file_of_the_recipe_is_damaged(root: Path, run_dir: Path) -> None:
    put(run_dir / "recipe.json", b"\xff")
    one = recipe_in(root)
    other = replace(one, optim=replace(one.optim, base_lr=0.5))
    with pytest.raises(UserInputError, match=r"holds a run of another recipe; .*\n  optim\.base_lr: 0\.001 -> 0\.5"):
        launch(other, run_dir, faults=NO_FAULTS)
    assert (run_dir / "recipe.json").read_bytes() == b"\xff"


def test_a_plan_sees_checkpoints_whose_recipe_is_gone(root: Path, run_dir: Path) -> None:
    (run_dir / "recipe.json").unlink()
    plan = resume_plan(recipe_in(root), run_dir, fingerprints=None, steps=4)
    assert (plan["state"], plan["step"]) == ("resume", 2)


def test_a_marker_that_cannot_be_read_is_passed_over_too(root: Path, finished: Path, run_dir: Path) -> None:
    newest = list_checkpoints(run_dir / "checkpoints")[0] / "COMPLETE.json"
    newest.unlink()
    newest.mkdir()
    assert launch(recipe_in(root), run_dir, faults=NO_FAULTS).steps == 4
    assert losses(run_dir) == losses(finished)


def test_a_damaged_line_inside_a_journal_is_named_and_every_other_counts(
    root: Path, finished: Path, run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = (run_dir / "journal.jsonl").read_bytes().splitlines(keepends=True)
    first_step = next(number for number, line in enumerate(lines) if b'"event":"step"' in line)
    lines[first_step] = lines[first_step][:-20] + b"\xff" + lines[first_step][-19:]
    (run_dir / "journal.jsonl").write_bytes(b"".join(lines))
    assert launch(recipe_in(root), run_dir, faults=NO_FAULTS).steps == 4
    assert losses(run_dir) == losses(finished)[1:]
    assert f"DAMAGED JOURNAL {run_dir / 'journal.jsonl'}:{first_step + 1}: " in caplog.text


@damaged
def test_a_record_of_a_failure_that_is_damaged_is_none(run_dir: Path, damage: bytes | None) -> None:
    (run_dir / "failure.json").write_text('{"kind": "RuntimeError", "message": "", "exit_code": 1, "rank": 0}')
    put(run_dir / "failure.json", damage)
    assert read_failure(run_dir) is None


@damaged
def test_who_reads_the_tracking_state_is_told_its_file_and_how_to_mend_it(run_dir: Path, damage: bytes | None) -> None:
    put(run_dir / "tracking.json", damage)
    with pytest.raises(DocumentError, match=r"tracking\.json: .*; rerun the training's command"):
        read_state(run_dir)


@pytest.mark.parametrize("name", ["run.lock", "journal.jsonl", "failure.lock"])
def test_nothing_is_written_through_a_link_in_a_run_folder(
    root: Path, run_dir: Path, tmp_path: Path, name: str
) -> None:
    kept = tmp_path / "kept"
    kept.write_bytes(b"another's file" * 100)
    (run_dir / name).unlink(missing_ok=True)
    (run_dir / name).symlink_to(kept)
    if name == "failure.lock":
        assert launch(recipe_in(root), run_dir, faults=NO_FAULTS).steps == 4
    else:
        with pytest.raises(EnvironmentFault, match=rf"{name}: .*; remove the symbolic link, which is not followed"):
            launch(recipe_in(root), run_dir, faults=NO_FAULTS)
    assert kept.read_bytes() == b"another's file" * 100
