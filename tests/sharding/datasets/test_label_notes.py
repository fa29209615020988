"""Class names that look alike, may be several, or cannot be seen: noted, never merged or split, refused by --strict."""

import json
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ca2st.errors import UserInputError
from ray_jobs.cli import main
from sharding import datasets
from sharding.conversion import check_notes, convert
from sharding.datasets import DatasetRequest, read_dataset
from sharding.datasets.label_spaces import label_notes, read_classes
from sharding.errors import AnnotationError
from sharding.format.shard_set import read_shard_set
from sharding.source import SourceList, note_lines
from support.annotations import EPIC_SOUNDS_HEADER, epic_sounds_row, touch, write_lines
from support.media import make_clip
from support.shards import small_config

CAFE, CAFE_APART = "caf\u00e9", "cafe\u0301"


def from_csv(folder: Path, labels: list[str], **options) -> SourceList:
    rows = [f'{number}.mp4,"{label}"' for number, label in enumerate(labels)]
    annotations = write_lines(folder / "list.csv", ["path,label", *rows])
    return read_dataset("csv", DatasetRequest(annotations=annotations, check_media=False, **options))


@pytest.mark.parametrize(
    "names",
    [
        (CAFE, CAFE_APART),
        ("dog", "dog\u200b"),
        ("dog", "Dog", "DOG"),
        ("ride bike", "ride  bike"),
        ("ride bike", "ride\u00a0bike"),
        ("ride bike", "ride_bike", "ride-bike", "ride\u2013bike"),
        ("\uff24og", "Dog"),
        ("stra\u00dfe", "STRASSE"),
    ],
)
def test_names_that_look_alike_are_noted_and_stay_classes_of_their_own(names: tuple[str, ...], tmp_path: Path) -> None:
    source = from_csv(tmp_path, [*names, "other"])
    assert len(source.label_spaces[0].classes) == len(names) + 1
    (group,) = source.notes["labels that look alike"]
    assert all(repr(name) in group for name in names)
    assert "other" not in group


def test_the_note_shows_what_looks_the_same_by_its_code_points() -> None:
    (line, *_) = note_lines(label_notes(sorted((CAFE, CAFE_APART))))
    assert line == (f"warning: 1 labels that look alike ('{CAFE_APART}' 'cafe\\u0301' = '{CAFE}' 'caf\\xe9')")


@pytest.mark.parametrize(
    ("classes", "several"),
    [
        (("a|b", "a", "b"), ["a|b"]),
        (("walk; run",), ["walk; run"]),
        (("walk, run", "walk", "run"), ["walk, run"]),
        (("walk + run", "run", "walk", "sit"), ["walk + run"]),
        (("['a', 'b']",), ["['a', 'b']"]),
        (("walk, then sit", "walk", "run"), []),
        (("rock & roll", "rock"), []),
        (("|", "a|"), []),
        (("clap (hands, loud)",), []),
    ],
)
def test_a_text_that_may_be_several_labels_is_noted(classes: tuple[str, ...], several: list[str]) -> None:
    assert list(label_notes(classes).get("labels that may be several", ())) == [repr(name) for name in several]


@pytest.mark.parametrize("name", ["dog\u200b", "\ufeffdog", "\u202edog", "hot\u00a0dog"])
def test_a_character_that_cannot_be_seen_is_noted_in_a_single_label_too(name: str) -> None:
    assert set(label_notes((name, "cat"))) == {"labels with invisible characters"}


def test_what_programs_write_for_a_missing_value_is_noted() -> None:
    found = label_notes(("dog", "nan", "None", "null", "N/A", "none", "nano"))
    assert found == {"labels that may be missing values": ("'nan'", "'None'", "'null'", "'N/A'")} | {
        "labels that look alike": ("'None' = 'none'",)
    }


def test_a_class_alone_is_noted(tmp_path: Path) -> None:
    assert from_csv(tmp_path, ["dog", "dog"]).notes == {"class alone": ("'dog'",)}


@pytest.mark.parametrize(
    "path", sorted((Path(datasets.__file__).parent / "classes").iterdir()), ids=lambda path: path.stem
)
def test_the_published_classes_need_no_note(path: Path) -> None:
    assert label_notes(read_classes(path)) == {}


@given(st.sets(st.text(st.characters(categories=["Ll", "Nd"]), min_size=1, max_size=6), min_size=1, max_size=8))
def test_a_name_and_its_other_normal_form_are_always_found(names: set[str]) -> None:
    both = {unicodedata.normalize(form, name) for name in names for form in ("NFC", "NFD")}
    found = " ".join(label_notes(sorted(both)).get("labels that look alike", ()))
    for name in names:
        forms = {unicodedata.normalize(form, name) for form in ("NFC", "NFD")}
        assert len(forms) == 1 or all(repr(form) in found for form in forms)


def test_numbers_written_in_several_ways_become_one_class_and_are_noted(tmp_path: Path) -> None:
    source = from_csv(tmp_path, ["0", "1", "01", "1", "001", "2"])
    assert [one.labels for one in source.samples] == [(0,), (1,), (1,), (1,), (1,), (2,)]
    assert source.notes == {"labels that look alike": ("'1' = '01' = '001'",)}
    with pytest.raises(UserInputError, match=r"--strict: .*found 1 labels that look alike \('1' = '01' = '001'\)"):
        check_notes(source, small_config(strict=True))
    classes = write_lines(tmp_path / "classes.txt", ["ant", "bee"])
    assert from_csv(tmp_path, ["00", "1"], classes=classes).notes == {}
    assert from_csv(tmp_path, ["00", "0", "1"], classes=classes).notes == {"labels that look alike": ("'00' = '0'",)}


def test_epic_sounds_and_folders_carry_the_notes_too(tmp_path: Path) -> None:
    media = touch(tmp_path / "media", "dog/1.mp4", "Dog/2.mp4")
    assert set(read_dataset("folder", DatasetRequest(media=media)).notes) == {"labels that look alike"}
    annotations = write_lines(tmp_path / "epic.csv", [EPIC_SOUNDS_HEADER, epic_sounds_row()])
    assert read_dataset("epic_sounds", DatasetRequest(annotations=annotations, check_media=False)).notes == {
        "row count that is not the published one": ("1 instead of 60055",)
    }


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("a\x1b[31mb", "expected a class name without control or unwritable characters"),
        ("a\u2028b", "expected a class name without control"),
        ("a\tb", "expected a class name without control"),
        ("x" * 501, "expected a class name of at most 500 characters"),
    ],
)
def test_c11_a_label_that_breaks_lists_and_terminals_is_refused(label: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match=message):
        from_csv(tmp_path, [label, "dog"])
    classes = write_lines(tmp_path / "classes.txt", [label, "dog"])
    with pytest.raises(AnnotationError, match=message) as caught:
        from_csv(tmp_path, ["dog"], classes=classes)
    assert not {"\x1b", "\u2028", "\t"} & set(str(caught.value))


def test_strict_refuses_a_list_with_doubts_before_anything_is_made(tmp_path: Path) -> None:
    source = from_csv(tmp_path, ["dog", "Dog", "a|b"])
    touch(tmp_path, "0.mp4", "1.mp4", "2.mp4")
    with pytest.raises(
        UserInputError, match=r"--strict: .*found 1 labels that look alike \('Dog' = 'dog'\); 1 labels that"
    ):
        check_notes(source, small_config(strict=True))
    check_notes(source, small_config())


def test_classes_without_samples_are_noted_and_no_doubt(tmp_path: Path) -> None:
    classes = write_lines(tmp_path / "classes.txt", ["dog", "cat", "ant"])
    source = from_csv(tmp_path, ["dog"], classes=classes)
    assert source.notes == {"classes without samples": ("cat", "ant")}
    check_notes(source, small_config(strict=True))
    assert list(note_lines(source.notes)) == ["note: 2 classes without samples (cat, ant)"]


@pytest.fixture
def ca2st(capsys, monkeypatch):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["ca2st", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


def test_the_command_names_doubtful_labels_in_a_dry_run_and_strict_refuses(ca2st, tmp_path: Path) -> None:
    media = tmp_path / "media"
    for name in ("dog/1.mp4", "Dog/2.mp4"):
        (media / name).parent.mkdir(parents=True)
        make_clip(media / name, seconds=0.3)
    build = ("shard", "build", "--dataset", "folder", "--media", media, "--audio", "none", "--workers", 1)
    code, out, err = ca2st(*build, "--dry-run", "--json")
    assert (code, json.loads(out)["notes"]) == (0, {"labels that look alike": 1})
    assert "warning: 1 labels that look alike ('Dog' = 'dog')" in err
    for more in (("--dry-run",), ("--out", tmp_path / "shards")):
        code, _, err = ca2st(*build, "--strict", *more)
        assert code == 2
        assert "--strict: expected nothing that questions the data" in err
    assert not (tmp_path / "shards").exists()
    code, out, _ = ca2st(*build, "--out", tmp_path / "shards", "--json")
    assert (code, json.loads(out)["notes"]) == (0, {"labels that look alike": 1})
    assert read_shard_set(tmp_path / "shards").manifest.notes == {"labels that look alike": 1}
    assert ca2st(*build, "--strict", "--out", tmp_path / "shards")[0] == 2


def test_a_label_of_three_hundred_characters_goes_through_a_conversion(tmp_path: Path) -> None:
    make_clip(tmp_path / "0.mp4", seconds=0.3)
    make_clip(tmp_path / "1.mp4", seconds=0.3)
    long = "\u00e9" * 300
    annotations = write_lines(tmp_path / "list.csv", ["path,label", f"0.mp4,{long}", "1.mp4,b"])
    source = read_dataset("csv", DatasetRequest(annotations=annotations, media=tmp_path))
    convert(source, tmp_path / "shards", small_config(audio_policy="none"))
    assert read_shard_set(tmp_path / "shards").manifest.label_spaces[0].classes == ("b", long)
