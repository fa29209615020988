from pathlib import Path

import pytest

from ca2st.errors import UserInputError
from sharding.datasets import DATASETS, DatasetRequest, SyntheticConfig, read_dataset
from sharding.datasets.label_spaces import published_classes, read_classes
from sharding.errors import AnnotationError
from support.annotations import EPIC_SOUNDS_HEADER, epic_sounds_row, touch, write_lines

HD_SOUNDS_HEADER = "participant_id,video_id,start_timestamp,stop_timestamp,start_sample,stop_sample,class,class_id"
HD_EPIC_ROW = (
    '{"unique_narration_id": "a-1", "video_id": "a", "start_timestamp": 1, "end_timestamp": 2, '
    '"main_action_classes": [[1, 2]]}'
)


@pytest.fixture
def requests(tmp_path: Path) -> dict[str, DatasetRequest]:
    lists = {
        "csv": write_lines(tmp_path / "a.csv", ["path,label", "a.mp4,x"]),
        "epic_sounds": write_lines(tmp_path / "b.csv", [EPIC_SOUNDS_HEADER, epic_sounds_row()]),
        "activitynet": write_lines(tmp_path / "c.csv", ["video_id,t_start,t_end,label", "v_a,1,2,BMX"]),
        "epic_kitchens_100": write_lines(tmp_path / "d.csv", ["P01_01_0,1,2"]),
        "hd_epic": write_lines(tmp_path / "e.jsonl", [HD_EPIC_ROW]),
        "hd_epic_sounds": write_lines(
            tmp_path / "f.csv", [HD_SOUNDS_HEADER, "P01,P01-1,00:00:01.0,00:00:02.0,1,2,rustle,4"]
        ),
        "kinetics_400": write_lines(tmp_path / "g.csv", ["jf7RDuUTrsQ.mp4 325"]),
        "kinetics_sound": write_lines(tmp_path / "h.txt", ["--4-0ihtnBU_000058_000068,10,4"]),
        "list": write_lines(tmp_path / "l.txt", ["a b.mp4 1", "c.mp4 0"]),
        "something_something_v2": write_lines(tmp_path / "i.csv", ["7.mp4 3"]),
        "ucf_101": write_lines(tmp_path / "j.txt", ["Archery/v_Archery_g01_c01.avi 3"]),
        "vgg_sound": write_lines(tmp_path / "k.csv", ["xElEg-6DBtM_000018.mp4,hail"]),
    }
    made = {name: DatasetRequest(annotations=path, check_media=False) for name, path in lists.items()}
    made["folder"] = DatasetRequest(media=touch(tmp_path / "media", "a/x.mp4", "b/y.mp4"))
    made["synthetic"] = DatasetRequest(synthetic=SyntheticConfig(num_samples=3), check_media=False)
    return made


def test_every_dataset_of_the_table_reads_its_own_form(requests: dict[str, DatasetRequest]) -> None:
    assert requests.keys() == DATASETS.keys()
    for name, request in requests.items():
        source = read_dataset(name, request)
        assert source.dataset == name
        assert source.samples
        assert len({sample.sample_id for sample in source.samples}) == len(source.samples)
        spaces = [space.name for space in source.label_spaces]
        assert set(source.targets) <= set(spaces)
        for sample in source.samples:
            for space, label in zip(source.label_spaces, sample.labels, strict=True):
                assert 0 <= label < len(space.classes)


def test_an_unknown_dataset_is_answered_with_the_known_ones() -> None:
    message = r"--dataset: expected one of activitynet, csv, .*, found 'epic-sounds' \(did you mean 'epic_sounds'\?\)"
    with pytest.raises(UserInputError, match=message):
        read_dataset("epic-sounds", DatasetRequest())


@pytest.mark.parametrize("split", ["", "Train", "a/b", "..", "x" * 41])
def test_a_split_that_is_no_plain_name_is_refused(split: str) -> None:
    with pytest.raises(UserInputError, match="--split: expected 1 to 40 of a-z, 0-9, _ and -, found"):
        DatasetRequest(split=split)


def test_a_limit_below_one_is_refused() -> None:
    with pytest.raises(UserInputError, match="--limit: expected at least 1, found 0"):
        DatasetRequest(limit=0)


@pytest.mark.parametrize(
    ("name", "num_classes"),
    [
        ("activitynet", 200),
        ("epic_kitchens_100_nouns", 300),
        ("epic_kitchens_100_verbs", 97),
        ("epic_sounds", 44),
        ("kinetics_400", 400),
        ("kinetics_sound", 31),
        ("something_something_v2", 174),
        ("ucf_101", 101),
        ("vgg_sound", 309),
    ],
)
def test_the_shipped_class_lists_have_their_published_sizes(name: str, num_classes: int) -> None:
    classes = published_classes(name)
    assert len(classes) == len(set(classes)) == num_classes


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([""], "expected class names, one per line, found none"),
        (["a", "", "b"], r"c\.txt:2:1: expected a class name, found an empty line"),
        (["a", "b", "a"], r"c\.txt:3:1: expected every class once, found 'a' as on line 1"),
    ],
)
def test_a_class_list_with_gaps_or_doubles_is_refused(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(AnnotationError, match=message):
        read_classes(write_lines(tmp_path / "c.txt", lines))


def test_a_class_list_may_have_a_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "c.txt", ["a b", "c,d"], line_end="\r\n", encoding="utf-8-sig")
    assert read_classes(path) == ("a b", "c,d")


def test_a_class_list_that_is_not_there_is_named_by_its_option(tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match=r"none\.txt: expected a file of class names, found: .*check --classes"):
        read_classes(tmp_path / "none.txt")
