"""Training on a folder of one's own videos: what is listed, shared out, chosen, refused and told."""

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ca2st.errors import UserInputError
from ca2st.spec import ClipSpec
from ca2st.weights.importer import EXPERT_KEY, expert_state
from ca2st.weights.tensor_files import read_tensor_file, write_tensor_file
from ray_jobs.commands.train import train
from ray_jobs.config.recipe_file import load_recipe
from ray_jobs.own_data.choices import (
    ExpertSizes,
    Facts,
    choose,
    published_sizes,
    read_expert_sizes,
    settings_of,
    short_side,
)
from ray_jobs.own_data.training import plan_training, train_own_videos
from ray_jobs.own_data.videos import OwnVideos, list_videos, validation_names
from ray_jobs.runs.inference import load_trained
from sharding.errors import AnnotationError, RejectBudgetError
from support.annotations import touch
from support.media import Sound, make_clip
from support.models import TINY_CLIP, tiny_model

FACTS = Facts(device="cpu", classes=("bark", "miaow"), num_clips=100, num_with_sound=80, median_seconds=4.0)


def videos_of_classes(**counts: int) -> list[str]:
    return [f"{name}/{number:03}.mp4" for name, count in counts.items() for number in range(count)]


def names(videos: OwnVideos, split: str) -> set[str]:
    return {sample.sample_id for sample in videos.source(split).samples}


def plan(folder: Path, *overrides: str) -> Any:
    return plan_training(folder, (f"launch.runs_folder={folder / 'runs'}", *overrides), out=None)


# Listing and splits


@given(counts=st.lists(st.integers(1, 40), min_size=2, max_size=5))
def test_each_video_is_in_one_split_and_every_class_is_trained_on(counts: list[int]) -> None:
    for label, count in enumerate(counts):
        of_class = [f"{label}/{number}.mp4" for number in range(count)]
        validates = validation_names(of_class)
        assert validates < set(of_class)
        assert len(validates) == (0 if count == 1 else max(1, count // 5))


@given(st.sets(st.text(min_size=1, max_size=8), min_size=2, max_size=30), st.randoms(use_true_random=False))
def test_which_videos_validate_depends_on_the_names_alone_not_on_their_order(files: set[str], random: Any) -> None:
    shuffled = sorted(files)
    random.shuffle(shuffled)
    assert validation_names(shuffled) == validation_names(sorted(files))


@given(st.sets(st.integers(0, 999), min_size=3, max_size=40))
def test_another_video_changes_at_most_one_of_those_that_validate(numbers: set[int]) -> None:
    files = [f"a/{number}.mp4" for number in sorted(numbers)]
    assert len(validation_names(files[1:]) - validation_names(files)) <= 1


def test_a_folder_of_classes_is_shared_out_and_a_file_elsewhere_changes_nothing(tmp_path: Path) -> None:
    touch(tmp_path, *videos_of_classes(bark=12, miaow=3, moo=1))
    before = list_videos(tmp_path)
    assert before.classes == ("bark", "miaow", "moo")
    assert (before.count("train"), before.count("validation")) == (
        {"bark": 10, "miaow": 2, "moo": 1},
        {"bark": 2, "miaow": 1, "moo": 0},
    )
    assert before.only_trained == ("moo",)
    touch(tmp_path, "moo/another.mp4")
    after = list_videos(tmp_path)
    assert {name for name in names(after, "validation") if not name.startswith("moo")} == names(before, "validation")


def test_splits_of_the_folder_are_used_as_they_are_and_a_test_split_stays_unseen(tmp_path: Path) -> None:
    touch(tmp_path, "train/a/1.mp4", "train/b/2.mp4", "val/a/3.mp4", "val/b/4.mp4", "test/a/5.mp4", "test/b/6.mp4")
    videos = list_videos(tmp_path)
    assert (names(videos, "train"), names(videos, "validation")) == ({"a/1.mp4", "b/2.mp4"}, {"a/3.mp4", "b/4.mp4"})
    assert videos.splits_given
    assert videos.left_aside == ("test/",)


def test_a_train_folder_alone_is_shared_out(tmp_path: Path) -> None:
    touch(tmp_path, *(f"train/{name}" for name in videos_of_classes(a=5, b=5)))
    videos = list_videos(tmp_path)
    assert (len(videos.train), len(videos.validation), videos.splits_given) == (8, 2, False)


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    touch(tmp_path, *videos_of_classes(train=2, bus=2))
    assert list_videos(tmp_path).classes == ("bus", "train")


def test_files_that_are_no_videos_are_left_aside_by_name(tmp_path: Path) -> None:
    touch(tmp_path, "notes.txt", ".DS_Store", *videos_of_classes(a=2, b=2), "a/Thumbs.db", "a/x.srt", "__MACOSX/a/x")
    videos = list_videos(tmp_path)
    assert videos.left_aside == ("notes.txt", "a/x.srt")
    assert videos.source("train").notes == {"files left aside": ("notes.txt", "a/x.srt")}
    assert videos.source("validation").notes == {}


def test_what_lies_beside_splits_is_left_aside_by_name(tmp_path: Path) -> None:
    touch(tmp_path, "list.txt", "raw/x/1.mp4", *(f"train/{name}" for name in videos_of_classes(a=2, b=2)))
    assert list_videos(tmp_path).left_aside == ("list.txt", "raw/")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "expected a folder per class, in the form DIR/<class>.*, found an empty folder"),
        (["1.mp4", "2.mp4"], "expected a folder per class, in the form DIR/<class>.*, found 2 files and no folder"),
        (["a/1.mp4"], "expected at least two classes, found one, 'a'"),
        (["a/1.mp4", "b/1.txt"], "expected videos .* of every class to train on, found none of the class 'b'"),
        (["a/1.mp4", "b/c/1.mp4"], "c: expected videos directly in a class folder, found a folder"),
        (["val/a/1.mp4", "val/b/1.mp4"], "expected a folder train beside val, found none"),
        (
            ["train/a/1.mp4", "train/b/1.mp4", "val/a/1.mp4", "validation/a/1.mp4"],
            "expected one folder for validation, found val and validation",
        ),
        (
            ["train/a/1.mp4", "train/b/1.mp4", "val/a/1.mp4", "val/c/1.mp4"],
            "expected no class in val that is not in train, found 'c'; nothing would be trained to name them",
        ),
    ],
)
def test_a_folder_of_another_form_is_refused(tmp_path: Path, files: list[str], message: str) -> None:
    touch(tmp_path, *files)
    with pytest.raises(AnnotationError, match=message):
        list_videos(tmp_path)


def test_a_link_that_leads_outside_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "secret.mp4", *(f"videos/{name}" for name in videos_of_classes(a=1, b=1)))
    (tmp_path / "videos" / "a" / "link.mp4").symlink_to(tmp_path / "secret.mp4")
    with pytest.raises(AnnotationError, match=r"link\.mp4: expected a file inside --data-folder .*with --follow-links"):
        list_videos(tmp_path / "videos")
    videos = list_videos(tmp_path / "videos", follow_links=True)
    assert names(videos, "train") | names(videos, "validation") == {"a/000.mp4", "a/link.mp4", "b/000.mp4"}


def test_class_folders_that_are_links_are_read_with_follow_links(tmp_path: Path) -> None:
    touch(tmp_path / "disk", *videos_of_classes(a=2, b=2))
    (tmp_path / "videos").mkdir()
    for name in "ab":
        (tmp_path / "videos" / name).symlink_to(tmp_path / "disk" / name)
    with pytest.raises(AnnotationError, match=r"4 problems \(outside the media folder 4\)"):
        list_videos(tmp_path / "videos")
    found = plan_training(tmp_path / "videos", (), out=None, follow_links=True)
    assert len(found.videos.train) + len(found.videos.validation) == 4


def test_a_class_without_validation_videos_is_only_trained_on(tmp_path: Path) -> None:
    touch(tmp_path, "train/a/1.mp4", "train/b/1.mp4", "train/c/1.mp4", "val/c/2.mp4", "val/b/notes.txt")
    videos = list_videos(tmp_path)
    assert (videos.classes, videos.only_trained) == (("a", "b", "c"), ("a", "b"))
    assert [sample.labels for sample in videos.validation] == [(2,)]
    assert videos.left_aside == ("b/notes.txt",)


def test_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match=r"--data-folder .*nowhere: expected a folder, found nothing there"):
        list_videos(tmp_path / "nowhere")


# Choices

EXPERTS = ExpertSizes(
    kind="cast",
    model_settings={"model.dim": 768, "model.depth": 12, "model.num_heads": 12, "model.patch_size": 16},
    clip_settings={"clip.num_frames": 16, "clip.crop_size": 224},
    mel_rows=None,
)


@pytest.mark.parametrize(
    ("changes", "chosen"),
    [
        ({}, {"model.kind": "ca2st", "trainable": "all", "model.dim": 96, "clip.crop_size": 96}),
        ({"num_with_sound": 50}, {"model.kind": "ca2st"}),
        ({"num_with_sound": 49}, {"model.kind": "cast", "clip.mel_rows": 96}),
        ({"num_with_sound": 0}, {"model.kind": "cast"}),
        ({"device": "cuda"}, {"model.dim": 192, "clip.num_frames": 16, "training.precision": "bf16"}),
        ({}, {"training.epochs": 60, "training.global_batch_size": 8, "training.precision": "fp32"}),
        ({"num_clips": 2, "num_with_sound": 2}, {"training.epochs": 60, "training.global_batch_size": 2}),
        ({"num_clips": 600}, {"training.epochs": 10, "training.global_batch_size": 32}),
        ({"num_clips": 10**6}, {"training.epochs": 2, "training.global_batch_size": 32}),
        ({"num_clips": 600, "device": "cuda"}, {"training.epochs": 100, "training.global_batch_size": 64}),
        ({"median_seconds": 0.2}, {"clip.mel_rows": 96, "data.sampling.scheme": "uniform"}),
        ({"median_seconds": 2.0}, {"clip.mel_rows": 192}),
        ({"median_seconds": 10.0}, {"clip.mel_rows": 400, "data.sampling.scheme": "uniform"}),
        ({"median_seconds": 60.0}, {"data.sampling.scheme": "dense", "data.sampling.frame_stride": 8}),
        ({"classes": ("turn left", "turn right")}, {"data.augment.flip_probability": 0.0}),
        ({"classes": ("leftovers", "bright")}, {"data.augment.flip_probability": 0.5}),
        (
            {"experts": EXPERTS, "num_with_sound": 100},
            {"model.kind": "cast", "trainable": "added", "model.dim": 768, "clip.crop_size": 224},
        ),
        ({"experts": EXPERTS}, {"training.epochs": 2, "training.per_device_batch_size": 8}),
        ({"experts": EXPERTS, "device": "cuda"}, {"training.epochs": 50}),
        ({"experts": replace(EXPERTS, kind="ca2st", mel_rows=1024)}, {"clip.mel_rows": 1024}),
    ],
)
def test_facts_decide_what_is_trained(changes: dict[str, Any], chosen: dict[str, Any]) -> None:
    settings = settings_of(choose(replace(FACTS, **changes)))
    assert {key: settings.get(key) for key in chosen} == chosen


@given(
    device=st.sampled_from(["cpu", "cuda"]),
    num_clips=st.integers(2, 10**6),
    share=st.floats(0, 1),
    seconds=st.floats(0.05, 600),
    experts=st.sampled_from([None, EXPERTS, published_sizes(["spatial", "temporal", "audio"])]),
)
def test_every_choice_makes_a_recipe_that_can_fill_a_batch(
    device: Any, num_clips: int, share: float, seconds: float, experts: ExpertSizes | None
) -> None:
    facts = replace(
        FACTS,
        device=device,
        num_clips=num_clips,
        num_with_sound=round(share * num_clips),
        median_seconds=seconds,
        experts=experts,
    )
    choices = choose(facts)
    recipe = load_recipe("own_data", [f"{key}={json.dumps(value)}" for key, value in settings_of(choices).items()])
    assert recipe.training.global_batch_size <= num_clips
    assert all(choice.reason for choice in choices)
    assert len(settings_of(choices)) == sum(len(choice.settings) for choice in choices)


def test_what_only_the_videos_tell_waits_for_them() -> None:
    choices = choose(replace(FACTS, num_with_sound=None, median_seconds=None))
    waiting = [choice.reason for choice in choices if not choice.settings]
    assert [reason.partition(":")[0] for reason in waiting] == ["model.kind", "clip.mel_rows", "data.sampling.scheme"]


def test_videos_are_stored_as_much_larger_than_the_crop_as_published() -> None:
    assert [short_side(crop) for crop in (64, 96, 224)] == [80, 112, 256]


# Given experts


def expert_file(path: Path, kind: str, *, header: bool = True, clip: ClipSpec = TINY_CLIP, **changes: Any) -> Path:
    """The single expert of a tiny model of `kind` in a file of its own."""
    model = tiny_model(kind, clip=clip, adapters=False, **changes)
    told = {"encoder": {"spatial": "clip", "temporal": "videomae", "audio": "ast"}[kind], "num_heads": 2}
    told |= {"clip": {"num_frames": clip.num_frames, "crop_size": clip.crop_size, "mel_rows": clip.mel_rows}}
    metadata = {EXPERT_KEY: json.dumps(told)} if header else {}
    write_tensor_file(path, expert_state(model, kind), metadata=metadata)
    return path


def test_sizes_are_read_off_expert_files(tmp_path: Path) -> None:
    files = {kind: expert_file(tmp_path / f"{kind}.safetensors", kind) for kind in ("spatial", "temporal", "audio")}
    sizes = read_expert_sizes(files)
    assert (sizes.kind, sizes.mel_rows) == ("ca2st", 48)
    assert sizes.clip_settings == {"clip.num_frames": 4, "clip.crop_size": 32}
    assert (sizes.model_settings["model.dim"], sizes.model_settings["model.num_heads"]) == (32, 2)
    assert sizes.model_settings["model.temporal_encoder"] == "videomae"


def test_a_file_without_a_header_is_told_by_its_tensors(tmp_path: Path) -> None:
    file = expert_file(tmp_path / "e.safetensors", "spatial", header=False)
    sizes = read_expert_sizes({"spatial": file}, num_heads=2)
    assert (sizes.kind, sizes.model_settings["model.spatial_encoder"]) == ("spatial", "clip")
    assert sizes.clip_settings["clip.crop_size"] == 32


def test_experts_of_no_model_and_of_different_widths_are_refused(tmp_path: Path) -> None:
    temporal = expert_file(tmp_path / "t.safetensors", "temporal")
    with pytest.raises(UserInputError, match=r"experts of a model \(.*\), found temporal \+ audio"):
        read_expert_sizes({"temporal": temporal, "audio": temporal})
    wide = expert_file(tmp_path / "wide.safetensors", "spatial", dim=64)
    with pytest.raises(UserInputError, match=r"expected one dim in all of them, found 64 in .*, 32 in"):
        read_expert_sizes({"spatial": wide, "temporal": temporal})


# Plans


def test_a_set_value_wins_over_the_choice_and_is_marked(tmp_path: Path) -> None:
    touch(tmp_path, *videos_of_classes(a=5, b=5))
    found = plan(tmp_path, "training.epochs=3", "clip.crop_size=64")
    assert (found.recipe.training.epochs, found.recipe.clip.crop_size, found.recipe.model.dim) == (3, 64, 96)
    marked = {key for choice in found.chosen() for key in choice["set_by_you"]}
    assert marked == {"training.epochs", "clip.crop_size"}


def test_a_section_that_is_set_as_a_whole_is_marked_and_wins(tmp_path: Path) -> None:
    touch(tmp_path, *videos_of_classes(a=5, b=5))
    found = plan(tmp_path, "clip={num_frames=4, crop_size=64}")
    assert (found.recipe.clip.num_frames, found.recipe.clip.crop_size) == (4, 64)
    clip = next(choice for choice in found.chosen() if "clip.crop_size" in choice["settings"])
    assert (clip["reason"], clip["set_by_you"]) == ("set by you", ["clip.crop_size", "clip.num_frames"])


@pytest.mark.parametrize(
    ("settings", "out", "run_dir"),
    [
        ((), None, "runs/own"),
        (("launch.runs_folder=elsewhere",), None, "elsewhere/own"),
        (("launch.runs_folder=elsewhere", "name=mine"), None, "elsewhere/mine"),
        (("launch.runs_folder=elsewhere",), Path("here/first"), "here/first"),
    ],
)
def test_the_runs_folder_and_the_name_that_are_set_say_where_run_and_shards_lie(
    tmp_path: Path, settings: tuple[str, ...], out: Path | None, run_dir: str
) -> None:
    touch(tmp_path, *(f"own/{name}" for name in videos_of_classes(a=2, b=2)))
    found = plan_training(tmp_path / "own", settings, out=out)
    assert found.run_dir == Path(run_dir)
    assert found.shards.parent == Path(run_dir).parent / "data"


def test_the_reason_tells_how_many_videos_have_nothing_but_silence() -> None:
    (kind, *_) = choose(replace(FACTS, num_with_sound=20, num_silent=75))
    assert kind.settings == {"model.kind": "cast"}
    assert kind.reason.startswith("20 of 100 training videos have sound (75 more have nothing but silence), fewer")


def test_shards_are_kept_by_what_the_folder_holds_and_the_size_they_are_stored_in(tmp_path: Path) -> None:
    touch(tmp_path, *videos_of_classes(a=2, b=2))
    before = plan(tmp_path).shards
    assert plan(tmp_path, "training.epochs=3").shards == before
    assert plan(tmp_path, "clip.crop_size=64").shards != before
    (tmp_path / "a" / "000.mp4").write_text("longer")
    assert plan(tmp_path).shards != before


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.train=shards", "--set data.train: --data-folder makes the shards"),
        ("data={validation='shards'}", "--set data.validation: --data-folder makes the shards"),
        ("data.mixture=[{train='a'}, {train='b'}]", "--set data.mixture: --data-folder makes the shards"),
        ("data.synthetic={task='space'}", "--set data.synthetic: --data-folder makes the shards"),
        ("model.preset=cast_late_add", "--set model.preset: --data-folder chooses kind and sizes of the model"),
        ("training.epoch=3", "did you mean 'epochs'"),
        ("model.dim=98", "expected a multiple of num_heads"),
        ("experts.spatial=nowhere.safetensors", "expected a safetensors file, found none at nowhere"),
    ],
)
def test_a_wrong_setting_is_refused_before_anything_is_made(tmp_path: Path, override: str, message: str) -> None:
    touch(tmp_path, *videos_of_classes(a=2, b=2))
    with pytest.raises(UserInputError, match=message):
        plan(tmp_path, override)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize(
    "arguments",
    [{}, {"recipe": "smoke", "data_folder": Path("videos")}, {"data": "shards", "data_folder": Path("videos")}],
)
def test_either_a_recipe_or_a_folder_is_asked_for(arguments: dict[str, Any]) -> None:
    with pytest.raises(UserInputError, match=r"expected either a recipe .* or --data-folder DIR"):
        train(**arguments)


# Whole runs


def run(folder: Path, *overrides: str, dry_run: bool = False, as_json: bool = False, out: Path | None = None) -> None:
    train_own_videos(
        folder,
        ["tracking.enabled=false", f"launch.runs_folder={folder.parent / 'runs'}", *overrides],
        out=out,
        ray_address=None,
        accept_open_ray=False,
        dry_run=dry_run,
        as_json=as_json,
    )


def test_a_dry_run_tells_choices_and_reasons_and_makes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    touch(tmp_path, *(f"own/{name}" for name in videos_of_classes(a=8, b=8)))
    run(tmp_path / "own", dry_run=True)
    out = capsys.readouterr().out
    assert "own: 16 videos of 2 classes; 14 train, 2 validate" in out
    assert "model.dim 96" in out
    assert "Pretrained ones would be far better: `ca2st weights import" in out
    run(tmp_path / "own", dry_run=True, as_json=True)
    facts = json.loads(capsys.readouterr().out)
    assert (facts["num_train"], facts["steps"], facts["model"]) == (14, 60 * 7, "ca2st")
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


def test_a_dry_run_says_that_its_folder_holds_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    touch(tmp_path, *(f"own/{name}" for name in videos_of_classes(a=8, b=8)), "run/journal.jsonl")
    run(tmp_path / "own", out=tmp_path / "run", dry_run=True)
    assert f"{tmp_path / 'run'} holds a run: with its videos and settings it goes on" in capsys.readouterr().out


def test_more_unreadable_videos_than_a_few_stop_with_the_first_named(tmp_path: Path) -> None:
    touch(tmp_path, *(f"own/{name}" for name in videos_of_classes(a=3, b=3)))
    make_clip(tmp_path / "own" / "a" / "good.mp4", seconds=0.2)
    with pytest.raises(RejectBudgetError, match=r"empty_file \d \(.*own/a/000\.mp4") as refused:
        run(tmp_path / "own")
    assert "leaves out one unreadable video in 10" in refused.value.__notes__[0]


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """Two classes of three clips with sound, one of them unreadable in training, and a note."""
    folder = tmp_path / "own videos"
    for label in ("bark", "it's a miaow"):
        (folder / label).mkdir(parents=True)
        for number in range(3):
            make_clip(folder / label / f"{number}.mp4", seconds=0.4, sound=Sound(seconds=0.4))
    touch(folder, "bark/broken.mp4", "readme.txt")
    return folder


SMALL = ("model.dim=16", "model.depth=2", "model.num_heads=2", "clip.crop_size=32", "clip.num_frames=4")


@pytest.mark.slow
def test_a_folder_becomes_a_trained_model_and_goes_on_where_it_was_stopped(
    own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(own, *SMALL, "training.max_steps=3", as_json=True)
    told = capsys.readouterr()
    facts = json.loads(told.out)
    assert "bark/broken.mp4: empty_file" in told.err
    assert "left aside, no training or validation videos: readme.txt" in told.err
    assert "model.kind ca2st: 4 of 4 training videos have sound" in told.err
    assert (facts["steps"], [video["video"] for video in facts["left_out"]]) == (3, ["bark/broken.mp4"])
    assert facts["chance"] == 0.5
    assert facts["top1"] == pytest.approx(1 - len(facts["mistakes"]) / 2)
    assert all(Path(folder, "manifest.json").is_file() for folder in facts["shards"].values())
    assert all(Path(mistake["video"]).is_file() for mistake in facts["mistakes"])
    run(own, *SMALL, "training.max_steps=3")
    lines = capsys.readouterr().out.splitlines()
    commands = [shlex.split(line) for line in lines if line.startswith("  ca2st ")]
    assert [command[1] for command in commands] == ["predict", "explain", "evaluate", "train"]
    assert Path(commands[0][3]).is_file()
    make_clip(own / "bark" / "more.mp4", seconds=0.4, sound=Sound(seconds=0.4))
    with pytest.raises(UserInputError, match="holds a run on 4 training videos, the folder now gives 5"):
        run(own, *SMALL, "training.max_steps=3")


@pytest.mark.slow
def test_given_experts_decide_the_sizes_and_stay_as_they_are(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kinds = ("spatial", "temporal")
    files = {kind: expert_file(own.parent / f"{kind}.safetensors", kind) for kind in kinds}
    given = [f"experts.{kind}={json.dumps(str(path))}" for kind, path in files.items()]
    run(own, *given, "training.max_steps=1", as_json=True)
    told = capsys.readouterr()
    assert "model.kind cast: what the given experts make: spatial, temporal" in told.err
    assert "would be far better" not in told.err
    model = load_trained(Path(json.loads(told.out)["checkpoint"])).model
    assert model.config.dim == 32
    for kind, path in files.items():
        kept = expert_state(model, kind)
        assert all(torch.equal(kept[name], tensor) for name, tensor in read_tensor_file(path).tensors.items())
