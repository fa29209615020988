import os
from pathlib import Path

import pytest

from ca2st.errors import UserInputError
from sharding.datasets import DatasetRequest, read_dataset
from sharding.errors import AnnotationError
from sharding.source import SourceList
from support.annotations import touch


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
        ([], "expected a folder a class with videos inside, found an empty folder"),
        (["a.mp4", "b.mp4"], "expected a folder a class with videos inside, found 2 files"),
        (
            ["a/x.mp4", "b/y.mp4", "z.mp4"],
            r"z\.mp4: expected only class folders here, found a file; move, rename or remove",
        ),
        (["a/x.mp4", "b/.keep"], r"b: expected videos of the class 'b', found none"),
        (["a/x.mp4", "b/y.mp4", "b/notes.txt"], r"notes\.txt: expected a video \(.*\.mp4.*\), found '\.txt'"),
        (["a/x.mp4", "b/y.mp4", "b/noname"], "found 'no suffix'"),
        (["a/x.mp4"], "expected at least two class folders, found one, 'a'"),
        (
            ["train/a/x.mp4", "val/a/y.mp4"],
            r"a: expected videos directly in a class folder, found a folder .*--media .*train\)",
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
    with pytest.raises(AnnotationError, match=r"z\.mp4: expected a file inside --media .*links followed"):
        read(media)


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
