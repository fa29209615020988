"""Recipes are strict: every mistake is named with file, line and the nearest known name, before anything runs."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from ca2st.errors import UserInputError
from ca2st.training.ranks import KNOBS
from ray_jobs.config import recipe_file as recipe_file_module
from ray_jobs.config.recipe import StartConfig, identity_settings, recipe_document, recipe_from_document
from ray_jobs.config.recipe_file import known_recipes, load_recipe, stored_recipe
from ray_jobs.errors import RecipeError
from ray_jobs.runs.worker import check_settings

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

[optim]
warmup_epochs = 1.0
"""


def recipe_file(folder: Path, text: str = RECIPE) -> str:
    path = folder / "mine.toml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", known_recipes())
def test_every_recipe_of_the_package_loads_and_says_how_to_run_it(name: str) -> None:
    recipe = load_recipe(name)
    text = (Path(__file__).parents[3] / "ray_jobs" / "recipes" / name).read_text()
    head = text.split("\nname =")[0]
    assert recipe.name == name.removesuffix(".toml")
    assert "ca2st " in head
    assert "Hardware:" in head
    assert "Published result:" in head


# Source: the paper's tables; kind, base rate, layer decay, drop path, epochs, global batch, chance of mixup, sampling
# scheme, rows of sound.
PUBLISHED = {
    "cast_epic_kitchens_100": ("cast", 1e-3, 0.75, 0.2, 50, 384, 0.9, "uniform", None),
    "cast_something_something_v2": ("cast", 1e-3, 0.75, 0.3, 50, 384, 0.9, "uniform", None),
    "cast_kinetics_400": ("cast", 1e-3, 0.75, 0.2, 70, 576, 0.5, "dense", None),
    **{
        f"{kind}_{dataset}": (kind, 5e-4, 0.8, 0.2, 50, 192, 0.9, scheme, None if kind == "cast" else rows)
        for kind in ("cast", "cava", "ca2st")
        for dataset, scheme, rows in (
            ("epic_sounds", "uniform", 400),
            ("vgg_sound", "dense", 1024),
            ("kinetics_sound", "dense", 1024),
            ("ucf_101", "dense", 1024),
        )
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_training_has_the_settings_of_the_paper(name: str) -> None:
    recipe = load_recipe(name)
    kind, rate, decay, drop_path, epochs, batch, mixup, scheme, rows = PUBLISHED[name]
    assert (recipe.model.kind, recipe.model.dim, recipe.model.depth) == (kind, 768, 12)
    assert (recipe.optim.base_lr, recipe.optim.layer_decay, recipe.optim.warmup_epochs) == (rate, decay, 5)
    assert (recipe.model.drop_path_rate, recipe.training.epochs) == (drop_path, epochs)
    assert (recipe.training.global_batch_size, recipe.training.precision) == (batch, "bf16")
    assert (recipe.clip.num_frames, recipe.clip.crop_size, recipe.data.sampling.scheme) == (16, 224, scheme)
    augment = recipe.data.augment
    assert augment.rand_augment == "rand-m7-n4-mstd0.5-inc1"
    assert augment.flip_probability == (0.0 if "something" in name else 0.5)
    assert (augment.mixing.probability, augment.mixing.mixup_alpha, augment.mixing.switch_probability) == (
        mixup,
        0.8,
        0,
    )
    assert recipe.optim.label_smoothing == 0.1
    assert (augment.mixing.spectrogram == "cutmix") == (rows is not None)
    assert rows is None or recipe.clip.mel_rows == rows
    experts = {"cast": {"spatial", "temporal"}, "cava": {"spatial", "audio"}, "ca2st": {"spatial", "temporal", "audio"}}
    assert recipe.experts.sources().keys() == experts[kind]


# Source: the paper's main tables, in percent; of EPIC-KITCHENS-100 the action.
RESULTS = {
    "cast_epic_kitchens_100": 49.3,
    "cast_epic_kitchens_100_resnet50": 43.8,
    "cast_epic_kitchens_100_ablations": 48.7,
    "cast_something_something_v2": 71.6,
    "cast_kinetics_400": 85.3,
    "cast_activitynet": None,
    **dict(zip(("cast_epic_sounds", "cava_epic_sounds", "ca2st_epic_sounds"), (47.8, 60.3, 61.0), strict=True)),
    **dict(zip(("cast_vgg_sound", "cava_vgg_sound", "ca2st_vgg_sound"), (54.7, 68.2, 68.3), strict=True)),
    **dict(
        zip(("cast_kinetics_sound", "cava_kinetics_sound", "ca2st_kinetics_sound"), (91.6, 92.9, 93.3), strict=True)
    ),
    **dict(zip(("cast_ucf_101", "cava_ucf_101", "ca2st_ucf_101"), (96.9, 96.1, 97.2), strict=True)),
}


def test_the_published_recipes_are_the_rows_of_the_paper() -> None:
    found = {name: load_recipe(name).published for name in known_recipes()}
    published = {name.removesuffix(".toml"): one for name, one in found.items() if one is not None}
    assert {name: one.top1 for name, one in published.items()} == RESULTS
    assert {name for name, one in published.items() if one.views != "2x3"} == {"cast_kinetics_400"}
    assert all(one.dataset in name for name, one in published.items())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("published.top1=101", r"published: top1: expected 0 to 100 percent, found 101"),
        ("published.views=six", r"published: views: expected CLIPSxCROPS such as 2x3, found 'six'"),
        ("tracking.run_name= ", r"tracking: run_name: expected a name, found none"),
        ("tracking.tags={'mlflow.user'='me'}", r"tracking: tags: expected names that do not begin .*'mlflow\.user'"),
    ],
)
def test_a_wrong_claim_or_name_is_refused(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe("cast_vgg_sound", [override])


def test_one_of_several_splits_is_chosen_by_a_number() -> None:
    first, second = load_recipe("cava_ucf_101"), load_recipe("ca2st_ucf_101", ["data.split=2"])
    assert (first.data.train, first.folder) == ("shards/ucf_101/split1/train", Path("runs/cava_ucf_101_split1"))
    assert (second.data.validation, second.name) == ("shards/ucf_101/split2/test", "ca2st_ucf_101")
    assert str(second.folder) == "runs/ca2st_ucf_101_split2"
    assert identity_settings(load_recipe("ca2st_ucf_101")) == identity_settings(second)
    other = load_recipe("cava_ucf_101", ["data.train=mine/train", "data.validation=mine/test"])
    assert (other.data.split, other.folder) == (None, Path("runs/cava_ucf_101"))


def test_a_split_that_stands_for_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"--set data\.split: expected \{split\} in data\.train or data\.validation"):
        load_recipe(recipe_file(tmp_path), ["data.split=2"])
    text = RECIPE.replace("shards/train", "shards/{split}/train")
    with pytest.raises(RecipeError, match=r"mine\.toml:14: data\.train: expected data\.split beside \{split\}"):
        load_recipe(recipe_file(tmp_path, text))


def test_a_recipe_that_extends_one_of_the_package_changes_what_it_names_alone(tmp_path: Path) -> None:
    text = 'name = "mine"\nextends = "ca2st_vgg_sound"\n[optim]\nbase_lr = 2e-4\n'
    mine, theirs = load_recipe(recipe_file(tmp_path, text)), load_recipe("ca2st_vgg_sound")
    assert mine == replace(theirs, name="mine", optim=replace(theirs.optim, base_lr=2e-4))
    assert load_recipe(recipe_file(tmp_path, text), ["optim.base_lr=3e-4"]).optim.base_lr == 3e-4


@pytest.mark.parametrize("name", ['"ca2st_vgg"', "7", '"../smoke"', '["smoke"]'])
def test_a_recipe_that_extends_none_of_the_package_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(
        RecipeError, match=r"mine\.toml: extends: expected a recipe of the package \(published, .*smoke"
    ):
        load_recipe(recipe_file(tmp_path, f'name = "mine"\nextends = {name}\n'))


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
    with pytest.raises(RecipeError, match=r"mine\.toml:10: clip: num_frames: expected an even number"):
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
        ("training.epochs=2\nname = 5", r"--set 'training\.epochs=2.*: expected one value, found further lines"),
        ("training.stop_at_fit=5", r"--set training\.stop_at_fit: .*expected a share, 0 < x <= 1, or none, found 5"),
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
    assert identity_settings(load_recipe(path, ["trainable=adapters"])) != plain


def test_where_shards_are_kept_and_what_damage_does_may_change_when_a_run_resumes(tmp_path: Path) -> None:
    path = recipe_file(tmp_path)
    settings = ["cache_dir=/fast", "cache_bytes=1000", "retry.attempts=2", "on_error=quarantine"]
    settings += ["quarantine_budget=5", "quarantine_percent=1.5"]
    moved = load_recipe(path, ["data.train=s3://bucket/train", *(f"data.loader.{one}" for one in settings)])
    assert moved.data.loader.storage.cache_bytes == 1000
    assert identity_settings(moved) == identity_settings(load_recipe(path))


@pytest.mark.parametrize("key", ["data.train", "data.validation"])
def test_a_url_with_a_secret_is_refused_in_a_recipe_without_showing_it(tmp_path: Path, key: str) -> None:
    with pytest.raises(RecipeError, match=r"expected https://host/set alone, found a user, password") as found:
        load_recipe(recipe_file(tmp_path), [f"{key}='https://me:hush@host/set'"])
    assert "hush" not in str(found.value)


def test_what_saves_memory_or_time_may_change_when_a_run_resumes(tmp_path: Path) -> None:
    path = recipe_file(tmp_path)
    savings = ["training.activation_checkpointing=true", "training.compile=true", "experts.precision=fp32"]
    assert identity_settings(load_recipe(path, savings)) == identity_settings(load_recipe(path))


def test_a_start_may_move_but_not_begin_otherwise(tmp_path: Path) -> None:
    path = recipe_file(tmp_path)
    start = identity_settings(load_recipe(path, ["start.checkpoint=runs/old"]))
    assert identity_settings(load_recipe(path, ["start.checkpoint=moved/old"])) == start
    assert identity_settings(load_recipe(path, ["start.checkpoint=runs/old", "start.head=new"])) != start
    assert identity_settings(load_recipe(path)) != start


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainable=heads"], r"--set trainable: trainable: expected one of added, .*did you mean 'head'\?"),
        (["trainable=[]"], r"trainable: expected at least one pattern"),
        (
            ["trainable=head"],
            r"mine\.toml:23: optim\.layer_decay: expected 1 where only the head is trained, found 0\.75",
        ),
        (["start.checkpoint=a", "experts.audio=b"], r"--set start\.checkpoint: .* files for audio under \[experts\]"),
        (["start.checkpoint=a", "start.head=fresh"], r"start\.head: Input should be 'keep' or 'new', found 'fresh'"),
        (["start.head=new"], r"start\.checkpoint: required, but not given"),
        (["optim.warmup_epochs=4"], r"--set optim\.warmup_epochs: .*at most training\.epochs = 3, found 4\.0; shorten"),
        (["experts.precision=bf16"], r'--set experts\.precision: .*set training\.precision = "bf16", or'),
        (["experts.frozen=true"], r"experts\.frozen: unknown key; known are spatial, temporal, audio, precision"),
    ],
)
def test_what_sections_ask_of_each_other_is_told_at_the_key_to_change(
    tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe_file(tmp_path), overrides)


def test_patterns_of_what_is_trained_come_back_from_the_document(tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file(tmp_path), ['trainable=["head.*", "layers.*.adapters.*"]'])
    assert recipe.trainable == ("head.*", "layers.*.adapters.*")
    assert recipe_from_document(recipe_document(recipe)) == recipe


def test_a_stored_recipe_of_another_version_is_told_as_such(tmp_path: Path) -> None:
    document = recipe_document(load_recipe(recipe_file(tmp_path)))
    document["experts"]["frozen"] = True
    with pytest.raises(
        RecipeError, match=r"runs/old: its recipe is none of this version of ca2st(.|\n)*experts\.frozen"
    ):
        stored_recipe(document, where="runs/old")


def test_a_preset_lies_below_what_the_recipe_says_itself(tmp_path: Path) -> None:
    text = RECIPE.replace('kind = "cast"', 'preset = "cast_t2s_only"\nspatial_temporal = { t2s_window = "space_time" }')
    model = load_recipe(recipe_file(tmp_path, text)).model
    assert (model.kind, model.dim, model.drop_path_rate) == ("cast", 48, 0.2)
    assert (model.spatial_temporal.directions, model.spatial_temporal.t2s_window) == ("t2s", "space_time")
    later = load_recipe(recipe_file(tmp_path), ["model.preset=ca2st_parallel"]).model
    assert (later.kind, later.combination) == ("cast", "parallel")


def test_an_unknown_preset_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    text = RECIPE.replace('kind = "cast"', 'preset = "cast_late_ad"')
    with pytest.raises(
        RecipeError, match=r"mine\.toml:4: model\.preset: .*found 'cast_late_ad' \(did you mean 'cast_late_add'"
    ):
        load_recipe(recipe_file(tmp_path, text))
    with pytest.raises(RecipeError, match=r"--set model\.preset: model\.preset: expected one of "):
        load_recipe(recipe_file(tmp_path), ["model.preset=cast_late_ad"])


def test_dates_are_told_at_their_keys(tmp_path: Path) -> None:
    text = RECIPE.replace('"shards/train"', "2024-01-01T10:00:00").replace("epochs = 3", "epochs = [10:00:00]")
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe_file(tmp_path, text), ["name=2024-01-01"])
    assert str(caught.value).splitlines() == [
        '--set name: name: expected no date or time, found 2024-01-01; write text in quotes: "2024-01-01"',
        f"{tmp_path}/mine.toml:14: data.train: expected no date or time, found 2024-01-01T10:00:00; write text in "
        'quotes: "2024-01-01T10:00:00"',
        f"{tmp_path}/mine.toml:20: training.epochs: expected no date or time, found 10:00:00; write text in quotes: "
        '"10:00:00"',
    ]


def test_exact_layers_are_written_as_a_list(tmp_path: Path) -> None:
    text = RECIPE.replace('kind = "cast"', 'kind = "cast"\nspatial_temporal = { layers = [1] }')
    recipe = load_recipe(recipe_file(tmp_path, text))
    assert recipe.model.spatial_temporal.layers == (1,)
    assert recipe_from_document(recipe_document(recipe)) == recipe


AUGMENTED = (
    RECIPE
    + """
[data.augment]
rand_augment = "rand-m7-n4-mstd0.5-inc1"

[data.augment.erasing]
mode = "pixel"

[data.augment.spectrogram]
time_masks = 2

[data.augment.mixing]
probability = 0.9
spectrogram = "mixup"
"""
)


def test_the_whole_augmentation_is_set_in_a_recipe_and_counts_as_its_identity(tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file(tmp_path, AUGMENTED), ["training.per_device_batch_size=4"])
    assert recipe.data.augment.mixing.probability == 0.9
    assert recipe_from_document(recipe_document(recipe)) == recipe
    settings = identity_settings(recipe)
    assert settings["data.augment.rand_augment"] == "rand-m7-n4-mstd0.5-inc1"
    assert settings["data.augment.spectrogram.time_masks"] == 2
    check_settings(recipe)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.per_device_batch_size=3", r"training\.per_device_batch_size: expected an even number .* found 3"),
        ("training.global_batch_size=9", r"training\.global_batch_size: expected an even number .* found 9"),
        ("data.augment.rand_augment=rand-m7", r"augment\.rand_augment: expected timm's notation"),
        ("data.augment.mixing.alpha=0.8", r"data\.augment\.mixing\.alpha: unknown key"),
        ("data.augment.erasing.mode=noise", r"erasing\.mode: Input should be 'const', 'rand' or 'pixel'"),
    ],
)
def test_a_wrong_augmentation_is_refused_with_its_place(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe_file(tmp_path, AUGMENTED), [override])


def test_labels_that_follow_a_spectrogram_that_is_never_heard_are_refused(tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file(tmp_path, AUGMENTED), ["data.augment.mixing.spectrogram=cutmix"])
    with pytest.raises(UserInputError, match=r"data.augment.mixing.spectrogram: expected 'mixup' for cast"):
        check_settings(recipe)


def test_a_sharded_training_is_not_compiled(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"training\.sharded: expected training\.compile = false beside it"):
        load_recipe(recipe_file(tmp_path), ["training.sharded=true", "training.compile=true"])


def mistakes(folder: Path, text: str = RECIPE, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe_file(folder, text), overrides)
    return [line.removeprefix(f"{folder}/") for line in str(caught.value).splitlines()]


def test_j1_mistakes_of_a_section_and_between_sections_are_told_at_once_each_at_its_line(tmp_path: Path) -> None:
    text = RECIPE.replace("num_frames = 8", "num_frames = 7").replace("crop_size = 64", "crop_size = 3")
    text = text.replace("epochs = 3", "epochs = 0").replace("global_batch_size", "global_batch")
    told = mistakes(tmp_path, text, "experts.precision=bf16", "trainable=heads", "optim.layer_decay=7")
    assert [line.split(" expected")[0] for line in told] == [
        "mine.toml:10: clip: num_frames:",
        "--set optim.layer_decay: optim: layer_decay:",
        "mine.toml:21: training.global_batch: unknown key (did you mean 'global_batch_size'?)",
        "mine.toml:11: clip: crop_size:",
        "mine.toml:20: training: epochs:",
        "--set trainable: trainable:",
        '--set experts.precision: experts.precision: "bf16" is read under bfloat16 autocast only, found '
        'training.precision = "fp32"; set training.precision = "bf16", or experts.precision = "auto"',
    ]


def test_j1_what_hides_behind_a_mistake_is_not_told_where_it_may_be_about_a_default(tmp_path: Path) -> None:
    told = mistakes(tmp_path, RECIPE, "model.num_heads=0")  # the default 12 does not divide the recipe's dim of 48
    assert told == ["--set model.num_heads: model: num_heads: expected at least 1, found 0"]


INLINE = RECIPE.replace('kind = "cast"', 'kind = "cast"\nspatial_temporal = { layers = [1] }')


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("model.spatial_temporal.last_layers=1", "--set model.spatial_temporal.last_layers: model.spatial_temporal: "),
        ("model.spatial_temporal.layerz=1", "--set model.spatial_temporal.layerz: model.spatial_temporal.layerz: un"),
        ("model.spatial_temporal={layerz=1}", "--set model.spatial_temporal: model.spatial_temporal.layerz: unknown"),
        ("clip.crop_size=3", "--set clip.crop_size: clip: crop_size: expected at least one"),
        ("model.depth=0", "--set model.depth: model: depth: expected at least 1, found 0"),
    ],
)
def test_j1_what_an_override_made_wrong_is_told_at_the_override(tmp_path: Path, override: str, told: str) -> None:
    (found,) = mistakes(tmp_path, INLINE, override)
    assert found.startswith(told)


def test_j1_a_mistake_inside_an_inline_table_is_told_at_the_line_of_the_table(tmp_path: Path) -> None:
    (found,) = mistakes(tmp_path, INLINE.replace("layers", "layerz"), "model.depth=3")
    assert found.startswith("mine.toml:5: model.spatial_temporal.layerz: unknown key (did you mean 'layers'?)")


@pytest.mark.parametrize(
    ("override", "told"),
    [
        (
            "data.epoch_samples=100000000000000000000000",
            r"data\.epoch_samples: expected at most 1,000,000,000, found 1000",
        ),
        ("data.augment.spectrogram.time_masks=1000000000000", r"time_masks: expected at most 100, found 1000000000000"),
        ("training.max_steps=10000000000000", r"max_steps: expected at most 1,000,000,000,000, found 10000000000000"),
        ("model.depth=100000", r"model\.depth: expected at most 1,000, found 100000"),
        ("optim.base_lr=1e308", r"optim\.base_lr: expected at most 1,000,000,000,000, found 1e\+308"),
        (
            "training.collective_timeout_seconds=1e300",
            r"timeout_seconds: expected at most 1,000,000,000, found 1e\+300",
        ),
    ],
)
def test_j1_a_count_beyond_all_sense_is_refused(tmp_path: Path, override: str, told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        load_recipe(recipe_file(tmp_path), [override])


@pytest.mark.parametrize("key", ["training.stop_at", "training.stop_at_fit", "tracking.system_metrics_seconds"])
@pytest.mark.parametrize("number", ["nan", "inf", "-inf"])
def test_j1_a_number_that_json_does_not_have_is_refused_at_every_key(tmp_path: Path, key: str, number: str) -> None:
    told = rf"--set {key}: .*: expected .*, found {number}"
    assert any(re.match(told, found) for found in mistakes(tmp_path, RECIPE, f"{key}={number}"))


def test_j1_ending_early_asks_for_a_validation_split_that_is_read(tmp_path: Path) -> None:
    world = f"{RECIPE}\n[data.synthetic]\nnum_train = 8\n"
    found = mistakes(tmp_path, world, "training.early_stopping=2")  # data.train is named, so no world is made
    assert found == [
        "--set training.early_stopping: training.early_stopping: expected data.validation beside it, whose results it "
        "waits for, found none; name the shards of a validation split or remove it"
    ]
    load_recipe(recipe_file(tmp_path, world.replace('train = "shards/train"', "")), ["training.early_stopping=2"])


def test_j1_a_label_space_named_twice_is_refused(tmp_path: Path) -> None:
    (found,) = mistakes(tmp_path, RECIPE, 'data.targets=["verb", "noun", "verb"]')
    assert found == "--set data.targets: data: targets: expected each label space once, found verb more often"


def test_t12_what_short_memory_asks_to_change_and_rerun_is_no_part_of_a_runs_identity(tmp_path: Path) -> None:
    identity = identity_settings(load_recipe(recipe_file(tmp_path)))
    rerun, elsewhere = KNOBS.split("in another run folder")
    named = [re.findall(r"(?:training|experts|data)\.[\w.]+\w", part) for part in (rerun, elsewhere)]
    assert [len(keys) for keys in named] == [4, 2]
    assert not set(named[0]) & set(identity)
    assert set(named[1]) <= set(identity)


def test_a_recipe_may_be_called_like_the_one_it_extends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smoke.toml").write_text('extends = "smoke"\nname = "mine"\n')
    assert load_recipe("smoke.toml") == replace(load_recipe("smoke"), name="mine")


def test_recipes_of_the_package_that_extend_each_other_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipes" / "bases").mkdir(parents=True)
    for own, other in (("one", "two"), ("two", "one")):
        (tmp_path / "recipes" / f"{own}.toml").write_text(f'extends = "{other}"\nname = "{own}"\n')
    monkeypatch.setattr(recipe_file_module.resources, "files", lambda _package: tmp_path)
    with pytest.raises(RecipeError, match="extends: expected a recipe of the package"):
        load_recipe("one")


def test_j1_seeds_and_bytes_may_be_large(tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file(tmp_path), [f"training.seed={2**63 - 1}", f"data.loader.cache_bytes={10**15}"])
    assert recipe.training.seed == 2**63 - 1


def test_j1_a_roll_of_more_than_half_the_spectrogram_is_refused(tmp_path: Path) -> None:
    half = load_recipe(recipe_file(tmp_path), ["data.augment.spectrogram.roll_rows=200"])
    assert half.data.augment.spectrogram.roll_rows == 200
    (found,) = mistakes(tmp_path, RECIPE, "data.augment.spectrogram.roll_rows=201")
    assert found.startswith("--set data.augment.spectrogram.roll_rows: ")
    assert "expected at most half of clip.mel_rows = 400, that is 200, found 201; most rows would go round" in found


def test_j1_settings_that_do_not_fit_model_and_files_are_told_together(tmp_path: Path) -> None:
    wrong = ["clip.crop_size=65", "experts.audio=there", "experts.spatial=nowhere"]
    with pytest.raises(UserInputError) as caught:
        check_settings(load_recipe(recipe_file(tmp_path), wrong))
    assert [line.partition(":")[0] for line in str(caught.value).splitlines()] == [
        "clip.crop_size",
        "experts.spatial",
        "experts.audio",
    ]


def test_a_start_made_in_python_refuses_an_unknown_head() -> None:
    with pytest.raises(UserInputError, match=r"head: expected one of keep, new.*'nwe'"):
        StartConfig(checkpoint="runs/first", head="nwe")  # type: ignore[arg-type]  # what is asked
