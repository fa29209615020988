from pathlib import Path

import pytest

from ca2st.errors import UserInputError
from sharding.datasets import DatasetRequest, read_dataset
from sharding.datasets.label_spaces import label_histogram
from sharding.errors import AnnotationError
from sharding.settings import RejectBudget
from sharding.source import MISSING_MEDIA, SourceList
from support.annotations import EPIC_SOUNDS_HEADER, epic_sounds_row, touch, write_lines

ROWS = [
    epic_sounds_row("P01_02_0"),
    epic_sounds_row("P01_02_1", start="01:00:00.001", stop="01:00:10.000", class_name="drink / eat", class_id="43"),
    epic_sounds_row("P22_107_7", video="P22_107", class_name="metal-only collision", class_id="0"),
]


def read(tmp_path: Path, rows: list[str], *, media: Path | None = None, **options) -> SourceList:
    annotations = write_lines(tmp_path / "EPIC_Sounds_validation.csv", [EPIC_SOUNDS_HEADER, *rows])
    options.setdefault("check_media", media is not None)
    return read_dataset(
        "epic_sounds", DatasetRequest(annotations=annotations, media=media, split="validation", **options)
    )


def test_the_published_form_is_read_without_media(tmp_path: Path) -> None:
    source = read(tmp_path, ROWS)
    assert source.num_classes == {"label": 44}
    assert [s.sample_id for s in source.samples] == ["P01_02_0", "P01_02_1", "P22_107_7"]
    assert [s.labels for s in source.samples] == [(4,), (43,), (0,)]
    assert (source.samples[1].start_seconds, source.samples[1].end_seconds) == (3600.001, 3610.0)
    assert source.samples[2].path.name == "P22_107.MP4"
    counts = label_histogram(source)["label"]
    assert len(counts) == 44
    assert sum(counts.values()) == 3
    assert counts["water"] == 0


@pytest.mark.parametrize(
    "files",
    [
        ("P01_02.MP4", "P22_107.mp4"),
        ("P01/videos/P01_02.MP4", "P22/videos/P22_107.MP4"),
        ("P01/P01_02.mkv", "P22_107.MP4", "notes.txt"),
    ],
)
def test_long_videos_are_found_and_cut_by_time(tmp_path: Path, files: tuple[str, ...]) -> None:
    source = read(tmp_path, ROWS, media=touch(tmp_path / "media", *files))
    assert [s.path.relative_to(tmp_path / "media").as_posix() for s in source.samples] == [files[0], files[0], files[1]]
    assert source.samples[0].start_seconds == 1.5


def test_clips_are_found_and_taken_whole(tmp_path: Path) -> None:
    media = touch(tmp_path / "media", "P01_02_0.mp4", "P01_02_1.mp4", "P22/P22_107_7.mp4")
    source = read(tmp_path, ROWS, media=media)
    assert [s.path.stem for s in source.samples] == [s.sample_id for s in source.samples]
    assert all(s.start_seconds is None and s.end_seconds is None for s in source.samples)


def test_a_single_missing_video_is_refused_or_left_out_as_asked(tmp_path: Path) -> None:
    media = touch(tmp_path / "media", "P01_02.MP4")
    with pytest.raises(UserInputError, match=r"found none for 1 \(P22_107_7\); .* --max-missing 33\.4%"):
        read(tmp_path, ROWS, media=media)
    source = read(tmp_path, ROWS, media=media, max_missing=RejectBudget.parse("33.4%"))
    assert [s.sample_id for s in source.samples] == ["P01_02_0", "P01_02_1"]
    assert source.notes[MISSING_MEDIA] == ("P22_107_7",)


def test_a_media_folder_without_any_of_the_videos_is_refused(tmp_path: Path) -> None:
    message = r"expected P01_02\.mp4 or P01_02_0\.mp4 and so on, in any folder .*, found none of 3 segments"
    with pytest.raises(UserInputError, match=message):
        read(tmp_path, ROWS, media=touch(tmp_path / "media", "other.MP4"))


@pytest.mark.parametrize("second", ["P01_02.mp4", "P01/videos/P01_02.MP4", "P01_02_0.mp4"])
def test_media_in_two_places_is_refused(tmp_path: Path, second: str) -> None:
    media = touch(tmp_path / "media", "P01_02.MP4", second)
    with pytest.raises(
        AnnotationError, match=r"csv:2: expected one file for P01_02_0, found .* and .*; keep one of them"
    ):
        read(tmp_path, ROWS[:1], media=media)


def test_c12_a_video_that_a_link_takes_from_outside_is_refused(tmp_path: Path) -> None:
    media = touch(tmp_path / "media", "x")
    (media / "P01_02.MP4").symlink_to(touch(tmp_path, "elsewhere.MP4") / "elsewhere.MP4")
    with pytest.raises(AnnotationError, match=r"csv:2: .*P01_02\.MP4: expected a file inside --media"):
        read(tmp_path, ROWS[:1], media=media)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (epic_sounds_row(class_id="44"), r"csv:2:78: class_id: expected a class index 0 to 43, found '44'"),
        (epic_sounds_row(class_id="-1"), "class_id: expected a class index 0 to 43, found '-1'"),
        (epic_sounds_row(class_id="4.0"), "class_id: expected a class index 0 to 43, found '4.0'"),
        (epic_sounds_row(class_id="four"), "class_id: expected a class index 0 to 43, found 'four'"),
        (epic_sounds_row(class_id="5"), "class_id: expected 4, the index of 'rustle', found '5'"),
        (epic_sounds_row(class_name="rustl"), r"class: expected one of the 44 class names \(did you mean 'rustle'\?\)"),
        (epic_sounds_row(start="1.5"), r"csv:2:21: start_timestamp: expected a time HH:MM:SS\.sss, found '1\.5'"),
        (
            epic_sounds_row(stop="00:00:01.500"),
            r"stop_timestamp: expected a time after start_timestamp \(00:00:01\.500\)",
        ),
        (epic_sounds_row("../../x"), r"csv:2:1: annotation_id: expected an id of letters, digits, _ and -"),
        (epic_sounds_row(video="P01/../../x"), r"csv:2:\d+: video_id: expected an id"),
        ("P01_02_0,P01", r"csv:2:10: expected 10 cells"),
    ],
)
def test_c11_a_wrong_cell_is_named_with_file_line_and_column(tmp_path: Path, row: str, message: str) -> None:
    with pytest.raises(AnnotationError, match=message):
        read(tmp_path, [row])


def test_c11_every_wrong_row_is_counted_by_kind(tmp_path: Path) -> None:
    rows = [epic_sounds_row(f"a_{n}", class_id=str(n)) for n in (4, 44, 45, 5)]
    with pytest.raises(AnnotationError, match=r"3 problems \(label out of range 2, class and class_id differ 1\)"):
        read(tmp_path, rows)


def test_c9_an_id_twice_is_listed_with_both_lines(tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match=r"csv:4:1: annotation_id: .*'P01_02_0' was listed before, at .*csv:2:1"):
        read(tmp_path, [ROWS[0], ROWS[1], ROWS[0]])


def test_a_test_list_without_classes_is_refused(tmp_path: Path) -> None:
    columns = EPIC_SOUNDS_HEADER.split(",")[:7]
    path = write_lines(tmp_path / "test.csv", [",".join(columns), "a,P01,P01_01,00:00:00.0,00:00:01.0,0,24000"])
    with pytest.raises(AnnotationError, match="expected the columns class, class_id, found no labels"):
        read_dataset("epic_sounds", DatasetRequest(annotations=path, check_media=False))


def test_the_limit_only_asks_for_the_media_it_keeps(tmp_path: Path) -> None:
    media = touch(tmp_path / "media", "P01_02.MP4")
    assert [s.path.is_file() for s in read(tmp_path, ROWS, media=media, limit=2).samples] == [True, True]


def test_what_is_missing_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match=r"expected --annotations, found none; pass EPIC_Sounds_train\.csv or"):
        read_dataset("epic_sounds", DatasetRequest())
    with pytest.raises(
        UserInputError, match="--dataset epic_sounds: expected --media, found none; pass the folder with"
    ):
        read(tmp_path, ROWS, check_media=True)
