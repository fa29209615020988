"""Difficulty, sizes and binding from the command line and from a recipe."""

import json
import sys
from pathlib import Path

import pytest

from ca2st.errors import UserInputError
from ray_jobs.cli import main
from ray_jobs.config.recipe import SyntheticData
from ray_jobs.config.recipe_file import load_recipe
from ray_jobs.errors import RecipeError
from ray_jobs.runs.data import make_split
from sharding.format.shard_set import read_manifest


@pytest.fixture
def build(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Runs ``ca2st shard build --dataset synthetic`` here: exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        words = ["ca2st", "shard", "build", "--dataset", "synthetic", "--workers", "1", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


def test_a_hard_binding_set_of_any_size_is_built_by_one_command(build, tmp_path: Path) -> None:
    code, out, _ = build(
        "--media", tmp_path / "media", "--out", tmp_path / "set", "--task", "binding", "--difficulty", "hard",
        "--num-samples", 2, "--frame-size", 32, "--frame-rate", 8, "--min-frames", 8, "--max-frames", 8, "--json",
    )  # fmt: skip
    assert (code, json.loads(out)["num_classes"]) == (0, 4)
    manifest = read_manifest(tmp_path / "set")
    assert manifest.targets == ("binding",)
    assert manifest.label_space("binding").classes == ("disc", "square", "triangle", "cross")
    world = json.loads((tmp_path / "media" / "train" / "world.json").read_text())
    assert (world["difficulty"], world["binding"], world["frame_size"]) == ("hard", True, 32)
    assert (world["frames_per_second"], world["min_frames"], world["max_frames"]) == (8, 8, 8)


def test_an_unknown_difficulty_is_answered_with_the_known_ones(build) -> None:
    code, _, err = build("--dry-run", "--difficulty", "harder")
    assert code == UserInputError.exit_code
    assert "synthetic.difficulty: expected one of easy, medium, hard, found 'harder'" in err


def test_a_recipe_names_task_difficulty_and_sizes(tmp_path: Path) -> None:
    changes = ["task='binding'", "difficulty='medium'", "frame_size=32", "min_frames=12", "max_frames=12"]
    recipe = load_recipe("smoke", [f"data.synthetic.{change}" for change in [*changes, "num_validation=2"]])
    world = recipe.data.synthetic
    assert world is not None
    shards = make_split(world, "validation", tmp_path)
    manifest = read_manifest(shards)
    assert (manifest.num_samples, manifest.targets) == (2, ("binding",))
    written = json.loads((tmp_path / "media" / "validation" / "world.json").read_text())
    assert (written["difficulty"], written["frame_size"], written["min_frames"]) == ("medium", 32, 12)


def test_a_recipe_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"--set data\.synthetic\.difficulty: .* found 'hrad' \(did you mean 'hard'"):
        load_recipe("smoke", ["data.synthetic.difficulty='hrad'"])
    with pytest.raises(UserInputError, match=r"synthetic\.min_frames: binding .* expected a multiple of 4, found 18"):
        SyntheticData(task="binding", min_frames=18)
    assert list(tmp_path.iterdir()) == []


def test_the_default_world_of_a_recipe_is_the_easy_one_of_old() -> None:
    world = SyntheticData().world("train", workers=2)
    assert (world.num_samples, world.frame_size, world.seed, world.workers) == (512, 64, 0, 2)
    assert "difficulty" not in world.content()
    assert "binding" not in world.content()
    assert SyntheticData().world("validation").num_samples == 128
