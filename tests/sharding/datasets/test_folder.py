import os
from pathlib import Path

import pytest

from ca2st.errors import UserInputError
from sharding.datasets import DatasetRequest, read_dataset
from sharding.errors import AnnotationError
from sharding.source import SourceList
from support.annotations import touch, write_lines


def read(media: Path, **options) -> SourceList:
    return read_dataset("folder", DatasetRequest(media=media, **options))


def test_folders_sorted_by_name_are_the_classes(tmp_path: Path) -> None:
    media = touch(tmp_path, "dog/b.mp4", "cat/x.MOV", "dog/a.webm", "cat/.hidden", ".git/config")
    source = read(media, split="validation")
    assert source.label_spaces[0].classes == ("cat", "dog")
    assert [(s.sample_id, s.labels) for s in source.samples] == [
        ("cat/x.MOV", (0,)),
        ("dog/a.webm", (1,)),
        ("dog/b.mp4", (1,)),
    ]
    assert (source.split, source.targets) == ("validation", ("label",))
    assert all(sample.path.is_file() and sample.start_seconds is None for sample in source.samples)


def test_c9_the_same_name_in_two_folders_is_two_samples(tmp_path: Path) -> None:
    source = read(touch(tmp_path, "a/x.mp4", "b/x.mp4", "b/x.avi", "-y/v 1.2 ü😀.mp4"))
    assert [s.sample_id for s in source.samples] == ["-y/v 1.2 ü😀.mp4", "a/x.mp4", "b/x.avi", "b/x.mp4"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "expected a folder per class with videos inside, found an empty folder"),
        (["a.mp4", "b.mp4"], "expected a folder per class with videos inside, found 2 files and no folder"),
        (
            ["a/.keep", "b/x.txt"],
            r"expected a folder per class .*endings: .*\.mp4.*found no video in any of its folders",
        ),
        (["a/x.mp4"], "expected at least two classes, found one, 'a'"),
        (["a/x.mp4", "b/x\ty.mp4"], r"b/x\\ty\.mp4: expected a file name without control"),
        (["a/x.mp4", "b\nc/y.mp4"], r"b\\nc: expected a class name without control or unwritable characters as the"),
        (["a/x.mp4", "b\x1b[31m/y.mp4"], r"b\\x1b\[31m: expected a class name without control"),
        (
            ["train/a/x.mp4", "val/a/y.mp4"],
            r"a: expected videos directly in a class folder, found a folder .*a split\? then give .*train\)",
        ),
    ],
)
def test_a_folder_of_another_form_is_refused(tmp_path: Path, files: list[str], message: str) -> None:
    with pytest.raises(AnnotationError, match=message):
        read(touch(tmp_path, *files))


def test_c12_a_link_that_leads_outside_is_refused(tmp_path: Path) -> None:
    media = touch(tmp_path / "media", "a/x.mp4", "b/y.mp4")
    touch(tmp_path, "secret.mp4")
    (media / "b" / "z.mp4").symlink_to(tmp_path / "secret.mp4")
    with pytest.raises(AnnotationError, match=r"z\.mp4: expected a file inside --media .*with --follow-links it may"):
        read(media)
    assert len(read(media, follow_links=True).samples) == 3


def test_links_to_nothing_and_in_circles_are_refused_with_follow_links_too(tmp_path: Path) -> None:
    media = touch(tmp_path, "a/x.mp4", "b/y.mp4")
    (media / "a" / "gone.mp4").symlink_to(tmp_path / "nowhere.mp4")
    (media / "b" / "round.mp4").symlink_to(media / "b" / "round.mp4")
    with pytest.raises(AnnotationError, match=r"2 problems \(missing file 2\)"):
        read(media, follow_links=True)


def test_a_class_folder_that_is_a_link_to_nothing_is_no_class_that_vanishes(tmp_path: Path) -> None:
    media = touch(tmp_path, "a/x.mp4", "b/y.mp4")
    (media / "c").symlink_to(tmp_path / "unmounted")
    with pytest.raises(AnnotationError, match=r"c: expected a class folder or a file, found a link to nothing"):
        read(media, follow_links=True)


def test_what_is_no_video_is_named_and_the_rest_is_read(tmp_path: Path) -> None:
    media = touch(tmp_path, "a/x.mp4", "b/Y.MP4", "b/notes.txt", "b/noname", "readme.md", "a/Thumbs.db", "a/.DS_Store")
    source = read(media)
    assert [sample.sample_id for sample in source.samples] == ["a/x.mp4", "b/Y.MP4"]
    assert source.notes == {"files left aside": ("readme.md", "b/noname", "b/notes.txt")}


def test_an_empty_class_folder_is_a_class_without_samples_and_noted(tmp_path: Path) -> None:
    media = touch(tmp_path, "a/x.mp4", "b/.keep", "c/y.mp4")
    source = read(media)
    assert source.label_spaces[0].classes == ("a", "b", "c")
    assert [sample.labels for sample in source.samples] == [(0,), (2,)]
    assert source.notes == {"class folders without videos": ("b",)}


def test_a_class_list_decides_labels_and_some_may_have_no_folder(tmp_path: Path) -> None:
    media = touch(tmp_path / "validation", "dog/y.mp4", "ant/x.mp4", "bee/.keep")
    classes = write_lines(tmp_path / "classes.txt", ["dog", "cat", "bee", "ant"])
    source = read(media, classes=classes)
    assert source.label_spaces[0].classes == ("dog", "cat", "bee", "ant")
    assert [(s.sample_id, s.labels) for s in source.samples] == [("dog/y.mp4", (0,)), ("ant/x.mp4", (3,))]
    assert source.notes == {"class folders without videos": ("bee",), "classes without samples": ("cat",)}
    with pytest.raises(
        AnnotationError, match=r"cats: expected one of the 4 class names \(did you mean 'cat'\?\), found"
    ):
        read(touch(media, "cats/z.mp4"), classes=classes)
    one = touch(tmp_path / "one", "ant/x.mp4")
    assert len(read(one, classes=classes).samples) == 1


def test_c9_a_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "a/x.mp4", "b/y.mp4")
    (tmp_path / "b" / os.fsdecode(b"caf\xe9.mp4")).write_bytes(b"")
    with pytest.raises(
        AnnotationError, match=r"caf.*mp4: expected a file name without control or unwritable"
    ) as caught:
        read(tmp_path)
    str(caught.value).encode()  # printable


def test_the_media_folder_is_needed_and_nothing_else_is_taken(tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match="--dataset folder: expected --media, found none"):
        read_dataset("folder", DatasetRequest())
    with pytest.raises(UserInputError, match="expected a folder, found a file"):
        read(touch(tmp_path, "file") / "file")
    with pytest.raises(UserInputError, match="--annotations: --dataset folder does not use it; leave it out"):
        read(tmp_path, annotations=tmp_path / "list.csv")
