"""Every recipe of the package at a tiny size: its plan without shards, and the very commands of its head.

The head's ``shard build`` lines convert eight generated clips in the dataset's own form, its ``train`` line trains two
steps, its ``evaluate`` line tests in the published views. Sets are shared by the recipes of a dataset.
"""

import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pandas
import pytest
import typer.main

from ca2st.errors import UserInputError
from ca2st.model.config import PRESETS
from ray_jobs.cli import app, main
from ray_jobs.config.recipe import Recipe
from ray_jobs.config.recipe_file import known_recipes, load_recipe, read_recipe
from ray_jobs.runs.plan import make_plan
from ray_jobs.runs.published import PublishedRow, published_recipes, published_rows, rows_lines
from sharding.datasets import DATASETS
from support.annotations import EPIC_SOUNDS_HEADER, epic_sounds_row, write_lines
from support.media import Sound, make_clip

pytestmark = pytest.mark.usefixtures("own_process")
RECIPES = [name.removesuffix(".toml") for name in known_recipes()]
PUBLISHED = [name for name in RECIPES if load_recipe(name).published is not None]
NUM_CLIPS = 8
EK100 = (
    "narration_id,participant_id,video_id,narration_timestamp,start_timestamp,stop_timestamp,start_frame,stop_frame,"
    "narration,verb,verb_class,noun,noun_class,all_nouns,all_noun_classes"
)
TINY = (
    *("model.dim=48", "model.num_heads=3", "model.depth=2", "clip.num_frames=4", "clip.crop_size=64"),
    *("training.epochs=1", "training.max_steps=2", "training.global_batch_size=4", "training.per_device_batch_size=4"),
    *("optim.warmup_epochs=0", "training.precision=fp32", "experts={}", "tracking.enabled=false"),
    "launch.threads_per_worker=1",  # beside other tests more threads mostly wait for each other
)


PROTOCOL = {
    "epic_kitchens_100": {"verb_top1", "action_top5", "action_joint_top5", "unseen_action_top1", "tail_verb_top1"},
    "hd_epic": {"verb_top1", "noun_top1", "action_top1", "action_joint_top5"},
    "epic_sounds": {"mean_class", "map", "auc", "d_prime", "no_background_map"},
    "hd_epic_sounds": {"mean_class", "map", "auc", "d_prime", "no_background_map"},
    "activitynet": {"mean_class", "video_map", "video_hit1"},
    **{name: {"top5", "map", "auc", "d_prime"} for name in ("vgg_sound", "kinetics_sound", "ucf_101")},
}
"""What a test of a dataset reports beside top-1."""
TRANSFERS = {"cast_epic_kitchens_100", "cast_epic_sounds", "cava_epic_sounds", "ca2st_epic_sounds"}


def tiny(name: str) -> list[str]:
    """Settings that make a recipe small: two layers (four where ResNet's stages divide them), 64 pixels, two steps."""
    recipe = load_recipe(name)
    settings = [*TINY, f"clip.mel_rows={min(recipe.clip.mel_rows, 96)}"]
    if recipe.model.spatial_encoder == "resnet50":
        settings.append("model.depth=4")
    if recipe.data.synthetic is not None:
        settings += ["data.synthetic.num_train=8", "data.synthetic.num_validation=4"]
    return [part for setting in settings for part in ("--set", setting)]


def ids(split: str) -> list[str]:
    """Eleven characters each, some of which would be options; no video is in two splits."""
    return [f"-{split[0]}{number}a_b-c_d{number}" for number in range(NUM_CLIPS)]


def epic_kitchens_100(split: str) -> tuple[list[str], list[str]]:
    # a participant whom training does not show in the whole set, and verbs of the tail
    rows = [
        f"P18_{split}_{n},P18,P18_1,,00:00:00.{n}0,00:00:00.{n + 2}0,1,2,x,take,{n + 12},plate,{n},['plate'],[{n}]"
        for n in range(NUM_CLIPS)
    ]
    return [EK100, *rows], ["P18/videos/P18_1.mp4"]


def epic_sounds(split: str) -> tuple[list[str], list[str]]:
    times = [{"start": f"00:00:00.{n}00", "stop": f"00:00:00.{n + 2}00"} for n in range(NUM_CLIPS)]
    rows = [epic_sounds_row(f"P01_1_{split}_{n}", video="P01_1", **time) for n, time in enumerate(times)]
    return [EPIC_SOUNDS_HEADER, *rows], ["P01/videos/P01_1.mp4"]


def something_something_v2(split: str) -> tuple[list[str], list[str]]:
    names = [f"{len(split)}{n}" for n in range(NUM_CLIPS)]
    return [json.dumps([{"id": name, "template": "Closing [something]"} for name in names])], [
        f"{n}.mp4" for n in names
    ]


def kinetics_400(split: str) -> tuple[list[str], list[str]]:
    word = {"validation": "val"}.get(split, split)
    rows = [f"abseiling,{name},417,427,{word}" for name in ids(split)]
    return ["label,youtube_id,time_start,time_end,split", *rows], [f"{word}/{name}.mp4" for name in ids(split)]


def kinetics_sound(split: str) -> tuple[list[str], list[str]]:
    return [f"{name}_{n},10,{n}" for n, name in enumerate(ids(split))], [f"{name}.mp4" for name in ids(split)]


def activitynet(split: str) -> tuple[list[str], list[str]]:
    del split  # one file has all
    segment = [{"segment": [0.1, 0.9], "label": "Ballet"}]
    subsets = [(subset, name) for subset in ("training", "validation") for name in ids(subset)]
    database = {name: {"subset": subset, "annotations": segment} for subset, name in subsets}
    return [json.dumps({"database": database})], [f"v_{name}.mp4" for name in database]


def vgg_sound(split: str) -> tuple[list[str], list[str]]:
    return [f"{name}_000060.mp4,helicopter" for name in ids(split)], [f"{name}_60.mp4" for name in ids(split)]


def ucf_101(split: str, number: int = 1) -> tuple[list[str], list[str]]:
    """Split `number` is tested on its group, of whose clips 2, 4 or 6 are of the class that training has alone."""
    groups = [number] if split == "test" else [group for group in (1, 2, 3) if group != number]
    if split == "test":
        names = ["Hammering"] * 2 * number + ["HammerThrow"] * (NUM_CLIPS - 2 * number)
        clips = [f"{name}/v_{name}_g0{number}_c0{n}.avi" for n, name in enumerate(names)]
        return clips, clips
    clips = [f"Hammering/v_Hammering_g0{group}_c0{n}.avi" for group in groups for n in range(NUM_CLIPS // 2)]
    return [f"{clip} 35" for clip in clips], clips


HD_VIDEO = "P01-20240202-110250"


def hd_epic(split: str) -> tuple[list[str], list[str]]:
    del split
    rows = [
        {
            "unique_narration_id": f"{HD_VIDEO}-{n}",
            "video_id": HD_VIDEO,
            "start_timestamp": n / 10,
            "end_timestamp": n / 10 + 0.2,
            "main_action_classes": [(n, n)],
        }
        for n in range(NUM_CLIPS)
    ]
    return [json.dumps(row) for row in rows], [f"Videos/P01/{HD_VIDEO}.mp4"]


def hd_epic_sounds(split: str) -> tuple[list[str], list[str]]:
    del split
    header = "participant_id,video_id,start_timestamp,stop_timestamp,start_sample,stop_sample,class,class_id"
    rows = [f"P01,{HD_VIDEO},00:00:00.{n}00,00:00:00.{n + 2}00,{n},{n + 2},rustle,4" for n in range(NUM_CLIPS)]
    return [header, *rows], [f"Videos/P01/{HD_VIDEO}.mp4"]


FORMS: dict[str, Callable[..., tuple[list[str], list[str]]]] = {
    function.__name__: function
    for function in (
        *(epic_kitchens_100, epic_sounds, something_something_v2, kinetics_400),
        *(kinetics_sound, activitynet, vgg_sound, ucf_101, hd_epic, hd_epic_sounds),
    )
}
"""By dataset: the lines of its owners' file of a split, and its media."""


@cache
def rows_by_name() -> dict[str, PublishedRow]:
    return {row.name: row for row in published_rows(published_recipes(), with_hours=False)}


def commands_of(name: str, word: str) -> list[list[str]]:
    """The commands of a recipe's head that begin with ``ca2st <word>``, the first of a loop over splits."""
    head = read_recipe(name)[0].split("\nname = ")[0]
    text = re.sub(r"\\\n#\s*", " ", head).replace("$split", "1")
    lines = [line.lstrip("# ").partition("  #")[0] for line in text.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith(f"ca2st {word}")]


def option(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


class Desk:
    """A folder for each dataset, in which the commands of its recipes are run."""

    def __init__(self, root: Path, clip: Path) -> None:
        self._root, self._clip = root, clip

    def folder(self, dataset: str) -> Path:
        (self._root / dataset).mkdir(exist_ok=True)
        return self._root / dataset

    def lay_out(self, command: list[str], folder: Path, **which: int) -> None:
        """Write into `folder` the annotations and media that a ``shard build`` reads."""
        lines, media = FORMS[option(command, "--dataset")](option(command, "--split"), **which)
        annotations = folder / option(command, "--annotations")
        if annotations.suffix == ".pkl":
            rows = [json.loads(line) for line in lines]
            kinds = {name: float if isinstance(value, float) else object for name, value in rows[0].items()}
            frame = pandas.DataFrame({n: pandas.Series([row[n] for row in rows], dtype=kinds[n]) for n in kinds})
            frame.columns = pandas.Index(list(kinds), dtype=object)  # the owners' file knows no type of texts
            frame.to_pickle(annotations)
        else:
            write_lines(annotations, lines)
        for name in media:
            target = folder / option(command, "--media") / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self._clip, target)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    root = tmp_path_factory.mktemp("recipes")
    return Desk(root, make_clip(root / "clip.mp4", size=(64, 64), sound=Sound()))


@pytest.fixture
def ca2st(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """Run a command in this process; returns what it prints as JSON."""

    def run(*arguments: str) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", ["ca2st", *arguments, "--json"])
        with pytest.raises(SystemExit) as ended:
            main()
        told = capsys.readouterr()
        assert (ended.value.code or 0) == 0, told.err
        return dict(json.loads(told.out))

    return run


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_recipe_is_planned_without_shards_and_weights(
    name: str, tmp_path: Path, ca2st: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    size = [part for part in tiny(name) if part != "--set" and part.startswith(("model.", "clip."))]
    settings = [part for setting in size for part in ("--set", setting)]
    plan = ca2st("train", name, *settings, "--dry-run", "--assume-published-counts", "--device", "H200")
    recipe = load_recipe(name)
    row = rows_by_name()[name]
    assert plan["num_samples"] == row.clips
    assert plan["steps"] == recipe.training.epochs * (row.clips // recipe.training.global_batch_size)
    assert plan["hours"] > 0
    assert len(plan["notes"]) == len(recipe.experts.sources()), "each file of weights is a note"
    assert list(tmp_path.iterdir()) == []


OF_CAST = (1e-3, 0.75, 0.2, 50, 384, 0.9, "2x3")
SETTINGS = {
    **dict.fromkeys(("cast_epic_kitchens_100", "cast_epic_kitchens_100_resnet50", "cast_activitynet"), OF_CAST),
    "cast_epic_kitchens_100_ablations": (1e-3, 0.8, 0.2, 50, 384, 0.9, "2x3"),
    "cast_something_something_v2": (1e-3, 0.75, 0.3, 50, 384, 0.9, "2x3"),
    "cast_kinetics_400": (1e-3, 0.75, 0.2, 70, 576, 0.5, "5x3"),
}
"""Base rate, layer decay, drop path, epochs, global batch, mixup's probability, views: of the paper and its code."""
OF_SOUND = (5e-4, 0.8, 0.2, 50, 192, 0.9, "2x3")


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_recipe_has_the_published_settings(name: str) -> None:
    recipe = load_recipe(name)
    optim, training, augment = recipe.optim, recipe.training, recipe.data.augment
    assert recipe.published is not None
    assert (
        *(optim.base_lr, optim.layer_decay, recipe.model.drop_path_rate, training.epochs),
        *(training.global_batch_size, augment.mixing.probability, recipe.published.views),
    ) == SETTINGS.get(name, OF_SOUND)
    assert (optim.betas, optim.eps, optim.weight_decay, optim.warmup_epochs) == ((0.9, 0.999), 1e-8, 0.05, 5)
    assert (optim.min_lr, optim.label_smoothing, augment.mixing.mixup_alpha) == (1e-6, 0.1, 0.8)
    assert (recipe.clip.num_frames, recipe.clip.crop_size) == (16, 224)
    assert augment.rand_augment == "rand-m7-n4-mstd0.5-inc1"
    is_dense = recipe.published.dataset in ("kinetics_400", "kinetics_sound", "vgg_sound", "ucf_101")
    assert recipe.data.sampling.scheme == ("dense" if is_dense else "uniform")
    has_sides = recipe.published.dataset == "something_something_v2"  # left and right are its labels
    assert augment.flip_probability == (0.0 if has_sides else 0.5)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_head_of_a_published_recipe_says_all_that_is_asked_of_it(name: str) -> None:
    recipe = load_recipe(name)
    head = read_recipe(name)[0].split("\nname = ")[0]
    assert recipe.published is not None
    assert recipe.published.top1 is None or f"{recipe.published.top1}" in head
    assert all(
        words in head for words in ("Ours: not run yet", "Hardware:", "Assumed, since the paper does not say it")
    )
    assert all(option(one, "--views") == recipe.published.views for one in commands_of(name, "evaluate"))
    assert any(name in one for one in commands_of(name, "train"))
    if name != "cast_epic_kitchens_100_ablations":  # whose shards and weights are those of the main recipe
        built = {option(one, "--out") for one in commands_of(name, "shard build")}
        assert {recipe.data.train, recipe.data.validation} <= built
        imported = {option(one, "--out") for one in commands_of(name, "weights import")}
        assert imported == set(recipe.experts.sources().values())


@pytest.mark.parametrize("name", RECIPES)
def test_every_command_in_the_head_of_a_recipe_is_one_of_the_command_line(name: str) -> None:
    commands = commands_of(name, "")
    assert any(command[0] in ("train", "demo") for command in commands)
    for words in commands:
        command, context = typer.main.get_command(app), None
        while hasattr(command, "resolve_command"):
            context = command.make_context("ca2st", words[:1], parent=context, resilient_parsing=True)
            _, command, _ = command.resolve_command(context, words)
            assert command is not None, words
            words = words[1:]
        command.make_context("ca2st", [*words], parent=context)  # refuses options and choices that do not exist
        if "--dataset" in words:
            assert option(words, "--dataset") in DATASETS
        if command.name == "train" and not words[0].startswith("--"):
            load_recipe(words[0])


def test_the_ablations_name_a_preset_and_the_published_figure_of_each_row() -> None:
    name = "cast_epic_kitchens_100_ablations"
    rows = dict(re.findall(r"(cast_\w+) +(\d\d\.\d) ", read_recipe(name)[0]))
    published = {preset: one.published_top1 for preset, one in PRESETS.items() if preset in rows}
    assert {preset: float(figure) for preset, figure in rows.items()} == published
    missing = {preset for preset, one in PRESETS.items() if one.published_top1 is not None} - rows.keys()
    assert missing == {"cast", "cast_resnet50"}, "the two rows of the main table have recipes of their own"
    for preset in rows:
        assert load_recipe(name, [f"model.preset={preset}"]).model == PRESETS[preset].config


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_commands_of_a_published_recipe_convert_train_and_test(
    name: str, desk: Desk, ca2st: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(name)
    assert recipe.published is not None
    monkeypatch.chdir(desk.folder(recipe.published.dataset))
    places = {recipe.data.train, recipe.data.validation}
    source = "cast_epic_kitchens_100" if name.endswith("_ablations") else name
    for command in commands_of(source, "shard build"):
        out = option(command, "--out")
        if out in places and not (Path(out) / "manifest.json").exists():
            desk.lay_out(command, Path.cwd())
            assert ca2st(*command, "--workers", "1")["num_samples"] == NUM_CLIPS
    trained = ca2st("train", name, *tiny(name))
    assert trained["steps"] == 2
    assert (Path(recipe.folder) / "journal.jsonl").is_file()
    evaluate, *transfers = commands_of(name, "evaluate")
    evaluate = [evaluate[0], str(recipe.folder), "--data", str(recipe.data.validation), *evaluate[4:]]
    tested = ca2st(*evaluate, "--no-track")
    assert (tested["num_samples"], tested["views"]) == (NUM_CLIPS, recipe.published.views)
    assert 0 <= tested["top1"] <= 1
    assert PROTOCOL.get(recipe.published.dataset, set()) <= tested.keys()
    assert len(transfers) == (1 if name in TRANSFERS else 0)
    for transfer in transfers:
        build = next(
            one for one in commands_of(name, "shard build") if option(one, "--out") == option(transfer, "--data")
        )
        desk.lay_out(build, Path.cwd())
        if not (Path(option(build, "--out")) / "manifest.json").exists():
            assert ca2st(*build, "--workers", "1")["num_samples"] == NUM_CLIPS
        found = ca2st(*transfer, "--no-track")
        assert (found["num_samples"], found["set"]) == (NUM_CLIPS, f"{option(build, '--dataset')}-test")
        assert found.keys() >= {*PROTOCOL[option(build, "--dataset")], "unmatched"}


@pytest.mark.slow
def test_the_three_splits_of_ucf_101_are_trained_tested_and_averaged_by_one_command(
    tmp_path: Path, desk: Desk, ca2st: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for number in (1, 2, 3):
        for command in commands_of("cast_ucf_101", "shard build"):
            command = [part.replace("split1", f"split{number}").replace("list01", f"list0{number}") for part in command]
            desk.lay_out(command, tmp_path, number=number)
            assert ca2st(*command, "--workers", "1")["num_samples"] == NUM_CLIPS
    one_class = ("--set", "optim.base_lr=1.0")  # enough to give every clip the class that training has alone
    found = ca2st("train", "cast_ucf_101", "--splits", "1,2,3", *tiny("cast_ucf_101"), *one_class)
    assert [(one["split"], one["run_dir"], one["views"]) for one in found["splits"]] == [
        (number, f"runs/cast_ucf_101_split{number}", "2x3") for number in (1, 2, 3)
    ]
    by_hand = [top1_by_hand(tmp_path / one["run_dir"]) for one in found["splits"]]
    assert by_hand == [0.25, 0.5, 0.75]
    assert [one["top1"] for one in found["splits"]] == by_hand
    assert found["top1"] == pytest.approx(sum(by_hand) / 3)


def top1_by_hand(run_dir: Path) -> float:
    (file,) = run_dir.glob("*.parquet")
    rows = pandas.read_parquet(file)
    assert len(rows) == NUM_CLIPS
    answers = [int(probabilities.argmax()) for probabilities in rows["label_probabilities"]]
    return sum(map(int.__eq__, answers, rows["label_label"])) / NUM_CLIPS


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RECIPES if name not in PUBLISHED and name != "own_data"])
def test_a_recipe_on_a_drawn_world_trains_and_is_tested(
    name: str, tmp_path: Path, ca2st: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert ca2st("train", name, *tiny(name), "--dry-run")["steps"] == 2
    assert ca2st("train", name, *tiny(name))["steps"] == 2
    (validation,) = tmp_path.glob("runs/data/*/shards/validation")
    assert ca2st("evaluate", f"runs/{name}", "--data", str(validation), "--no-track")["num_samples"] == 4


def test_the_table_of_recipes_has_a_row_of_each_and_says_which_shards_are_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shards/vgg_sound/train").mkdir(parents=True)
    (tmp_path / "shards/vgg_sound/train/manifest.json").touch()
    rows = published_rows(published_recipes(), with_hours=False)
    assert [row.name for row in rows] == PUBLISHED
    assert {row.name: row.shards for row in rows if row.shards} == {
        f"{model}_vgg_sound": ["train"] for model in ("cast", "cava", "ca2st")
    }
    told = rows_lines(rows)
    assert re.search(r"cast_kinetics_400 +kinetics_400 +cast +85\.3 +5x3 +246,534 +70 +none", told)


def small(name: str) -> Recipe:
    """The recipe at the published length, of a model that is counted in no time."""
    return load_recipe(name, [setting for setting in tiny(name) if setting.startswith(("model.", "clip."))])


def test_hours_of_all_recipes_follow_from_clips_epochs_and_the_model() -> None:
    recipes = [small(name) for name in PUBLISHED]
    one = {row.name: row.hours for row in published_rows(recipes, with_hours=True, device="h200")}
    eight = {row.name: row.hours for row in published_rows(recipes[:2], with_hours=True, device="H200", workers=8)}
    assert [*one] == PUBLISHED
    assert all(hours is not None and hours > 0 for hours in one.values())
    assert eight == {name: pytest.approx((one[name] or 0) / 8) for name in (recipe.name for recipe in recipes[:2])}
    ratio = (one["cast_epic_sounds"] or 0) / (one["cast_kinetics_sound"] or 1)
    assert ratio == pytest.approx(60_055 / 14_799, rel=0.05), "the same model on more clips"


@pytest.mark.slow
def test_the_hours_of_a_whole_recipe_are_those_of_a_calculation_by_hand(tmp_path: Path) -> None:
    recipe = load_recipe("cast_epic_kitchens_100")
    plan = make_plan(recipe, tmp_path / "run", device="cuda", other_device="H200", assume_counts=True)
    # 67 217 clips x 50 epochs x 1.80 TFLOP / (0.3 x 989 TFLOP/s); our last layer computes less.
    assert plan["hours"] == pytest.approx(67_217 * 50 * 1.8 / (0.3 * 989) / 3600, rel=0.15)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--measure",), r"--measure: expected a recipe and --dry-run beside it"),
        (("--device", "H200"), r"--device: expected a recipe and --dry-run beside it"),
        (("--dry-run", "--measure", "--device", "H200"), r"--measure: expected no --device H200"),
        (("--splits", "1,2", "--dry-run"), r"--splits: expected a recipe and no --dry-run"),
        (("--splits", "1,1"), r"--splits: expected different numbers with commas between them"),
        (("--splits", "1,2"), r"data.split: expected {split} in data.train or data.validation"),
        (("--splits", "1,2", "--set", "data.train=s{split}"), r"data.validation: expected the shards that each split"),
        (("--dry-run", "--assume-published-counts"), r"expected a recipe with \[published\] dataset = one of"),
        (("--dry-run", "--device", "H2000"), r"--device: expected one of .*found 'H2000' \(did you mean 'H200'"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    options: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["ca2st", "train", "smoke", *options])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == UserInputError.exit_code
    assert re.search(message, capsys.readouterr().err)
