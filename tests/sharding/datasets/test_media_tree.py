"""Files of a published dataset, wherever its owners, downloaders or users put them."""

from pathlib import Path

import pytest

from ca2st.errors import UserInputError
from sharding.datasets import DatasetRequest
from sharding.datasets.media_tree import Annotation, MediaTree, located
from sharding.errors import AnnotationError
from sharding.format.shard_set import LabelSpace
from sharding.settings import RejectBudget
from sharding.source import MISSING_MEDIA, SourceList
from support.annotations import touch

CLIP = Annotation(
    sample_id="-5wLopwbGX0_000417_000427",
    labels=(1,),
    where="val.csv:2",
    clips=("-5wLopwbGX0_000417_000427", "-5wLopwbGX0"),
    folder="air drumming",
)
SEGMENT = Annotation(
    sample_id="P01_11_0",
    labels=(0,),
    where="a.csv:2",
    videos=("P01_11",),
    clips=("P01_11_0",),
    start_seconds=1.5,
    end_seconds=2.25,
)


def file_of(tmp_path: Path, one: Annotation, *names: str, split: str = "validation", **options: bool) -> str:
    media = touch(tmp_path / "media", *names)
    (sample,), missing = MediaTree(media, **options).locate([one], split=split)
    assert missing == []
    return sample.path.relative_to(media).as_posix()


@pytest.mark.parametrize(
    "name",
    [
        "-5wLopwbGX0_000417_000427.mp4",
        "-5wLopwbGX0.mkv",
        "val/-5wLopwbGX0_000417_000427.webm",
        "train/air drumming/-5wLopwbGX0_000417_000427.mp4",
        "train/air_drumming/-5wLopwbGX0.MP4",
    ],
)
def test_a_clip_is_found_in_every_usual_layout(tmp_path: Path, name: str) -> None:
    assert file_of(tmp_path, CLIP, name, "other/5wLopwbGX0.mp4", ".hidden/x.mp4") == name


def test_the_exact_name_comes_before_the_short_one(tmp_path: Path) -> None:
    exact = "val/-5wLopwbGX0_000417_000427.mp4"
    assert file_of(tmp_path, CLIP, "-5wLopwbGX0.mp4", exact) == exact


def test_a_replacement_stands_for_the_damaged_original(tmp_path: Path) -> None:
    wanted = "replacement/replacement_for_corrupted_k400/-5wLopwbGX0.mp4"
    assert file_of(tmp_path, CLIP, "val/-5wLopwbGX0.mp4", wanted) == wanted


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (("train/-5wLopwbGX0.mp4", "val/-5wLopwbGX0.mp4"), "val/-5wLopwbGX0.mp4"),
        (("abseiling/-5wLopwbGX0.mp4", "air_drumming/-5wLopwbGX0.mp4"), "air_drumming/-5wLopwbGX0.mp4"),
    ],
)
def test_split_and_class_folders_tell_files_of_one_name_apart(
    tmp_path: Path, names: tuple[str, ...], wanted: str
) -> None:
    assert file_of(tmp_path, CLIP, *names) == wanted


def test_files_of_one_name_that_nothing_tells_apart_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match=r"val\.csv:2: expected one file for -5wL.*, found .*a.* and .*b"):
        file_of(tmp_path, CLIP, "a/-5wLopwbGX0.mp4", "b/-5wLopwbGX0.mp4")


def test_what_archives_leave_beside_files_is_passed_over(tmp_path: Path) -> None:
    assert file_of(tmp_path, CLIP, "._-5wLopwbGX0.mp4", "-5wLopwbGX0.txt", "-5wLopwbGX0.mp4") == "-5wLopwbGX0.mp4"


def test_a_name_of_another_case_is_found_where_there_is_one(tmp_path: Path) -> None:
    video = Annotation(sample_id="v", labels=(0,), where="l:1", clips=("v_HandStandPushups_g01_c01",))
    assert file_of(tmp_path, video, "v_HandstandPushups_g01_c01.avi") == "v_HandstandPushups_g01_c01.avi"
    with pytest.raises(UserInputError, match="found none of 1 segments"):
        file_of(tmp_path / "two", video, "a/v_HandstandPushups_g01_c01.avi", "b/v_HANDSTANDPUSHUPS_g01_c01.avi")


def test_a_segment_is_cut_from_its_video_and_a_clip_taken_whole(tmp_path: Path) -> None:
    (video,), _ = MediaTree(touch(tmp_path / "a", "P01/videos/P01_11.MP4")).locate([SEGMENT], split="train")
    (clip,), _ = MediaTree(touch(tmp_path / "b", "P01_11_0.mp4")).locate([SEGMENT], split="train")
    assert (video.start_seconds, video.end_seconds) == (1.5, 2.25)
    assert (clip.start_seconds, clip.end_seconds) == (None, None)


def test_a_link_that_leads_outside_needs_the_option(tmp_path: Path) -> None:
    outside = touch(tmp_path / "elsewhere", "P01_11.MP4")
    media = touch(tmp_path / "media", "x.mp4")
    (media / "P01_11.MP4").symlink_to(outside / "P01_11.MP4")
    with pytest.raises(AnnotationError, match=r"a\.csv:2: .*expected a file inside .* with --follow-links it may"):
        MediaTree(media).locate([SEGMENT], split="train")
    (sample,), _ = MediaTree(media, follow_links=True).locate([SEGMENT], split="train")
    assert sample.path == media / "P01_11.MP4"


def test_a_folder_that_is_a_link_is_named_where_files_are_missing(tmp_path: Path) -> None:
    touch(tmp_path / "elsewhere", "P01_11.MP4")
    media = touch(tmp_path / "media", "x.mp4")
    (media / "P01").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserInputError, match=r"folders that are links were not searched: with --follow-links they are"):
        MediaTree(media).locate([SEGMENT], split="train")
    (sample,), _ = MediaTree(media, follow_links=True).locate([SEGMENT], split="train")
    assert sample.path == media / "P01" / "P01_11.MP4"


def read(tmp_path: Path, num_segments: int, *, budget: str) -> SourceList:
    media = touch(tmp_path / "media", *(f"P01_{number}.MP4" for number in range(8)))
    segments = [
        Annotation(sample_id=f"s{number}", labels=(0,), where=f"a:{number}", videos=(f"P01_{number}",))
        for number in range(num_segments)
    ]
    request = DatasetRequest(media=media, max_missing=RejectBudget.parse(budget))
    space = LabelSpace(name="label", classes=("a", "b"))
    return located(segments, request, dataset="mine", spaces=[space], what="videos")


def test_missing_files_are_left_out_and_counted_within_the_budget(tmp_path: Path) -> None:
    source = read(tmp_path, 10, budget="20%")
    assert [sample.sample_id for sample in source.samples] == [f"s{number}" for number in range(8)]
    assert source.notes == {MISSING_MEDIA: ("s8", "s9")}
    assert len(read(tmp_path, 8, budget="0").samples) == 8


def test_more_missing_files_than_the_budget_are_refused_with_their_names_and_the_way(tmp_path: Path) -> None:
    message = r"a file for each of 10 samples, found none for 2 \(s8, s9\); fetch .* --max-missing 20%"
    for budget in ("0", "1", "19%"):
        with pytest.raises(UserInputError, match=message):
            read(tmp_path, 10, budget=budget)


def test_an_id_that_comes_again_gets_a_number(tmp_path: Path) -> None:
    media = touch(tmp_path / "media", "P01_11.MP4")
    request = DatasetRequest(media=media)
    space = LabelSpace(name="label", classes=("a", "b"))
    source = located([SEGMENT] * 3, request, dataset="mine", spaces=[space], what="videos")
    assert [sample.sample_id for sample in source.samples] == ["P01_11_0", "P01_11_0#2", "P01_11_0#3"]
