"""Recipes are strict: every mistake is named with file, line and the nearest known name, before anything runs."""

from pathlib import Path

import pytest

from ca2st.errors import UserInputError
from ray_jobs.config import (
    identity_settings,
    known_recipes,
    load_recipe,
    recipe_document,
    recipe_from_document,
)
from ray_jobs.errors import RecipeError

RECIPE = """\
name = "mine"

[model]
kind = "cast"
dim = 48
depth = 2
num_heads = 2

[clip]
num_frames = 8
crop_size = 64

[data]
train = "shards/train"

[data.sampling]
scheme = "uniform"

[training]
epochs = 3
global_batch_size = 8
"""


def recipe_file(folder: Path, text: str = RECIPE) -> str:
    path = folder / "mine.toml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", known_recipes())
def test_every_recipe_of_the_package_loads_and_says_how_to_run_it(name: str) -> None:
    recipe = load_recipe(name)
    text = (Path(__file__).parents[2] / "ray_jobs" / "recipes" / name).read_text()
    head = text.split("\nname =")[0]
    assert recipe.name == name.removesuffix(".toml")
    assert "ca2st " in head
    assert "Hardware:" in head
    assert "Published result:" in head


def test_a_recipe_is_found_by_its_name_alone() -> None:
    assert load_recipe("smoke") == load_recipe("smoke.toml")


def test_a_recipe_comes_back_from_its_document() -> None:
    recipe = load_recipe("smoke")
    assert recipe_from_document(recipe_document(recipe)) == recipe


def test_an_unknown_key_is_named_with_its_line_and_the_nearest_known_one(tmp_path: Path) -> None:
    text = RECIPE.replace("global_batch_size", "global_batch")
    with pytest.raises(
        RecipeError, match=r"mine\.toml:21: training\.global_batch: unknown key \(did you mean 'global_batch_size'\?\)"
    ):
        load_recipe(recipe_file(tmp_path, text))


def test_every_mistake_is_told_at_once(tmp_path: Path) -> None:
    text = RECIPE.replace("epochs = 3", 'epochs = "three"').replace('scheme = "uniform"', "stride = 3")
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe_file(tmp_path, text))
    told = str(caught.value)
    assert "mine.toml:20: training.epochs: Input should be a valid integer, found 'three'" in told
    assert "mine.toml:17: data.sampling.stride: unknown key" in told


def test_a_value_that_a_component_refuses_is_placed_in_the_file(tmp_path: Path) -> None:
    text = RECIPE.replace("num_frames = 8", "num_frames = 7")
    with pytest.raises(RecipeError, match=r"mine\.toml:9: clip: num_frames: expected an even number"):
        load_recipe(recipe_file(tmp_path, text))


def test_a_missing_section_is_named(tmp_path: Path) -> None:
    text = RECIPE.split("[training]")[0]
    with pytest.raises(RecipeError, match="training: required, but not given"):
        load_recipe(recipe_file(tmp_path, text))


def test_overrides_replace_single_settings(tmp_path: Path) -> None:
    path = recipe_file(tmp_path)
    recipe = load_recipe(path, ["training.epochs=9", "data.train=else/where", "launch.workers=2", "name=other"])
    assert (recipe.training.epochs, recipe.data.train) == (9, "else/where")
    assert (recipe.launch.workers, recipe.name) == (2, "other")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.epoch=9", r"--set training\.epoch: training\.epoch: unknown key \(did you mean 'epochs'\?\)"),
        ("training.epochs=nine", r"--set training\.epochs: .*valid integer, found 'nine'"),
        ("training.epochs", "expected section.key=value"),
        ("name.first=x", "name is a value, not a section"),
    ],
)
def test_a_wrong_override_is_told_as_such(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe_file(tmp_path), [override])


def test_a_recipe_that_is_not_there_lists_those_of_the_package() -> None:
    with pytest.raises(UserInputError, match=r"nor a recipe of the package; those are .*smoke\.toml"):
        load_recipe("smok")


def test_a_file_that_is_not_toml_is_told_with_its_place(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"mine\.toml: not valid TOML: .*line 2"):
        load_recipe(recipe_file(tmp_path, 'name = "mine"\nmodel = what\n'))


def test_only_what_changes_the_numbers_belongs_to_the_identity(tmp_path: Path) -> None:
    path = recipe_file(tmp_path)
    plain = identity_settings(load_recipe(path))
    elsewhere = ["name=other", "launch.workers=2", "data.train=moved", "training.keep_checkpoints=9"]
    assert identity_settings(load_recipe(path, elsewhere)) == plain
    assert identity_settings(load_recipe(path, ["optim.base_lr=0.5"])) != plain
