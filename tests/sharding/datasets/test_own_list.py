from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
from pyarrow import parquet

from ca2st.errors import UserInputError
from sharding.datasets import DatasetRequest, read_dataset
from sharding.datasets.label_spaces import label_histogram
from sharding.errors import AnnotationError
from sharding.settings import RejectBudget
from sharding.source import (
    MISSING_MEDIA,
    NO_LABEL,
    SEVERAL_LABELS,
    UNUSED_CLASSES,
    SourceList,
    named_labels,
    note_lines,
)
from support.annotations import touch, write_lines


def read(tmp_path: Path, rows: list[str], *, header: str = "path,label", **options) -> SourceList:
    options.setdefault("check_media", False)
    annotations = write_lines(tmp_path / "list.csv", [header, *rows])
    return read_dataset("csv", DatasetRequest(annotations=annotations, media=tmp_path / "media", **options))


def test_names_become_sorted_classes_and_every_file_a_sample(tmp_path: Path) -> None:
    media = touch(tmp_path / "media", "a.mp4", "deep/b b.webm", "ü.häß\u3000😀.mp4")
    rows = ["deep/b b.webm,dog", "./a.mp4,cat", f"{media}/ü.häß\u3000😀.mp4,dog"]
    source = read(tmp_path, rows, check_media=True)
    assert source.label_spaces[0].classes == ("cat", "dog")
    assert [sample.sample_id for sample in source.samples] == ["deep/b b.webm", "a.mp4", "ü.häß\u3000😀.mp4"]
    assert [sample.labels for sample in source.samples] == [(1,), (0,), (1,)]
    assert all(sample.path.is_file() for sample in source.samples)
    assert source.samples[1].where == f"{tmp_path / 'list.csv'}:3"
    assert label_histogram(source) == {"label": {"cat": 1, "dog": 2}}


def test_segments_are_read_in_seconds_and_clock_times(tmp_path: Path) -> None:
    source = read(
        tmp_path, ["a.mp4,x,0.5,2", "a.mp4,y,00:00:02,00:01:00.25", "b.mp4,x,,"], header="path,label,start,end"
    )
    assert [(s.start_seconds, s.end_seconds) for s in source.samples] == [(0.5, 2.0), (2.0, 60.25), (None, None)]
    assert len({sample.sample_id for sample in source.samples}) == 3


def test_numbers_are_class_indices(tmp_path: Path) -> None:
    source = read(tmp_path, ["a.mp4,2", "b.mp4,0", "c.mp4,1"])
    assert source.label_spaces[0].classes == ("0", "1", "2")
    assert [sample.labels for sample in source.samples] == [(2,), (0,), (1,)]


@pytest.mark.parametrize(("labels", "expected"), [(["dog", "ant"], [2, 0]), (["2", "1"], [2, 1])])
def test_a_class_list_decides_the_indices(tmp_path: Path, labels: list[str], expected: list[int]) -> None:
    classes = write_lines(tmp_path / "classes.txt", ["ant", "bee", "dog"])
    source = read(tmp_path, [f"{n}.mp4,{label}" for n, label in enumerate(labels)], classes=classes)
    assert [sample.labels[0] for sample in source.samples] == expected
    assert source.num_classes == {"label": 3}


def test_numeric_class_names_are_names_when_all_are_known(tmp_path: Path) -> None:
    classes = write_lines(tmp_path / "classes.txt", ["7", "9", "8"])
    assert [s.labels[0] for s in read(tmp_path, ["a.mp4,8", "b.mp4,9"], classes=classes).samples] == [2, 1]


def test_the_limit_keeps_the_first_rows_but_checks_all(tmp_path: Path) -> None:
    assert len(read(tmp_path, ["a.mp4,x", "b.mp4,y", "c.mp4,x"], limit=2).samples) == 2
    with pytest.raises(AnnotationError, match=r"list\.csv:4:1: path: expected a file inside"):
        read(tmp_path, ["a.mp4,x", "b.mp4,y", "../y,x"], limit=2)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["-1", "0"], r":2:7: label: expected a whole number from 0, found '-1'"),
        (["0", "1.0"], r":3:7: label: expected a whole number from 0, as in other rows, found '1\.0'"),
        (["0.0", "1.0"], "label not a whole number 2"),
        (["1", "2", "2"], "expected class numbers from 0 without gaps, found none with 0 .*counted from 1.*--classes"),
        (["0", "2"], r"found none with 1 \(2 classes, 0 to 2\); pass --classes"),
        (["0", "cat"], "expected a whole number from 0, as in other rows, found 'cat'"),
        (["cat", ""], r":3:7: label: expected a class name, found ''"),
    ],
)
def test_c11_labels_that_cannot_be_meant_are_refused(tmp_path: Path, labels: list[str], message: str) -> None:
    with pytest.raises(AnnotationError, match=message):
        read(tmp_path, [f"{n}.mp4,{label}" for n, label in enumerate(labels)])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["0", "3"], r":3:7: label: expected a class index 0 to 2, found '3'"),
        (["0", "-1"], "label: expected a class index 0 to 2, found '-1'"),
        (["ant", "bea"], r"expected one of the 3 class names \(did you mean 'bee'\?\), found 'bea'"),
        (["ant", "1"], "expected one of the 3 class names, found '1'"),
        (["x", "y", "y"], r"3 problems \(unknown class 3\)"),
    ],
)
def test_c11_labels_outside_a_class_list_are_refused(tmp_path: Path, labels: list[str], message: str) -> None:
    classes = write_lines(tmp_path / "classes.txt", ["ant", "bee", "dog"])
    with pytest.raises(AnnotationError, match=message):
        read(tmp_path, [f"{n}.mp4,{label}" for n, label in enumerate(labels)], classes=classes)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("../a.mp4", r":2:1: path: expected a file inside --media .*media, links followed, found '\.\./a\.mp4'"),
        ("x/../../a.mp4", "expected a file inside --media"),
        ("/etc/passwd", "expected a file inside --media"),
        ("concat:a.mp4|b.mp4", r"expected a file name, not a protocol \(\./concat:"),
        ("http://h/a.mp4", "not a protocol"),
        ("", "expected the name of a media file, found ''"),
        ("a\x07.mp4", "expected a file name without control or unwritable characters"),
    ],
)
def test_c12_a_path_that_leads_outside_or_to_a_program_is_refused(tmp_path: Path, path: str, message: str) -> None:
    with pytest.raises(AnnotationError, match=message):
        read(tmp_path, [f"{path},cat"])


def test_c12_a_link_that_leads_outside_is_refused_and_one_inside_is_not(tmp_path: Path) -> None:
    media = touch(tmp_path / "media", "a.mp4")
    touch(tmp_path, "secret.mp4")
    (media / "inside.mp4").symlink_to(media / "a.mp4")
    (media / "outside.mp4").symlink_to(tmp_path / "secret.mp4")
    (media / "circle.mp4").symlink_to(media / "circle.mp4")
    assert len(read(tmp_path, ["inside.mp4,x"], check_media=True).samples) == 1
    with pytest.raises(AnnotationError, match=r":2:1: path: expected a file inside --media .*found 'outside\.mp4'"):
        read(tmp_path, ["outside.mp4,x"], check_media=True)
    with pytest.raises(AnnotationError, match="expected an existing file inside --media"):
        read(tmp_path, ["circle.mp4,x"], check_media=True)


def test_a_media_folder_that_is_a_link_is_fine(tmp_path: Path) -> None:
    touch(tmp_path / "disk", "a.mp4")
    (tmp_path / "media").symlink_to(tmp_path / "disk")
    rows = ["a.mp4,x", f"{tmp_path / 'disk' / 'a.mp4'},x"]
    assert read(tmp_path, rows[:1], check_media=True).samples[0].sample_id == "a.mp4"
    with pytest.raises(AnnotationError, match=r":3:1: path: 'a\.mp4' was listed before, at .*list\.csv:2:1"):
        read(tmp_path, rows, check_media=True)


@pytest.mark.parametrize("name", ["missing.mp4", "x" * 300 + ".mp4", "folder"])
def test_c9_a_file_that_is_not_there_is_named_with_its_row(tmp_path: Path, name: str) -> None:
    touch(tmp_path / "media", "folder/a.mp4")
    with pytest.raises(AnnotationError, match=rf":2:1: path: expected an existing file .* found '{name}'"):
        read(tmp_path, [f"{name},x"], check_media=True)


def test_a_path_with_backslashes_is_told_how_folders_are_separated(tmp_path: Path) -> None:
    touch(tmp_path / "media", "x/a.mp4")
    with pytest.raises(AnnotationError, match=r"expected an existing file .* \(folders are separated by /\), found 'x"):
        read(tmp_path, ["x\\a.mp4,x"], check_media=True)


def test_a_dry_run_looks_at_no_media(tmp_path: Path) -> None:
    assert not (tmp_path / "media").exists()
    assert len(read(tmp_path, ["missing.mp4,x"]).samples) == 1


def test_c9_duplicates_are_listed_with_both_lines(tmp_path: Path) -> None:
    rows = ["a.mp4,x,0,1", "b.mp4,x,0,1", "./a.mp4,y,0.0,00:00:01"]
    message = r"list\.csv:4:1: path: 'a\.mp4@0\.0-1\.0' was listed before, at .*list\.csv:2:1"
    with pytest.raises(AnnotationError, match=message):
        read(tmp_path, rows, header="path,label,start,end")


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ("2,1", r":2:11: end: expected a time after start \(2\), found '1'"),
        ("1,1", "expected a time after start"),
        ("-1,1", r":2:9: start: expected seconds \(12\.5\) or a time HH:MM:SS\.sss, found '-1'"),
        ("1,", "expected start and end, or neither, found no end"),
        (",1", "expected start and end, or neither, found no start"),
    ],
)
def test_segments_that_are_none_are_refused(tmp_path: Path, times: str, message: str) -> None:
    with pytest.raises(AnnotationError, match=message):
        read(tmp_path, [f"a.mp4,x,{times}"], header="path,label,start,end")


ROWS: list[dict[str, Any]] = [
    {"path": "a b.mp4", "label": "dog", "start": 0.5, "end": 2.0},
    {"path": "c.mp4", "label": "cat", "start": None, "end": None},
]


@pytest.mark.parametrize("form", ["csv", "parquet", "jsonl"])
def test_csv_parquet_and_json_lines_say_the_same(tmp_path: Path, form: str) -> None:
    path, frame = tmp_path / f"list.{form}", pd.DataFrame(ROWS)
    if form == "csv":
        frame.to_csv(path, index=False)
    elif form == "parquet":
        frame.to_parquet(path)
    else:
        frame.to_json(path, orient="records", lines=True)
    source = read_dataset("csv", DatasetRequest(annotations=path, check_media=False))
    assert source.label_spaces[0].classes == ("cat", "dog")
    assert [(one.path.name, one.labels, one.start_seconds, one.end_seconds) for one in source.samples] == [
        ("a b.mp4", (1,), 0.5, 2.0),
        ("c.mp4", (0,), None, None),
    ]


def test_a_parquet_file_with_a_time_that_python_cannot_hold_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "list.parquet"
    times = pa.array([2**62], pa.timestamp("ms"))
    parquet.write_table(pa.table({"path": ["a.mp4"], "label": ["cat"], "start": times}), path)
    with pytest.raises(
        AnnotationError, match=r"list\.parquet: expected a Parquet file, found something else \(.*too large"
    ):
        read_dataset("csv", DatasetRequest(annotations=path, check_media=False))


def test_a_parquet_file_without_rows_is_refused_for_that_and_not_for_its_columns(tmp_path: Path) -> None:
    path = tmp_path / "list.parquet"
    parquet.write_table(pa.table({"path": pa.array([], pa.string()), "label": pa.array([], pa.string())}), path)
    with pytest.raises(AnnotationError, match=r"list\.parquet: expected rows, found none"):
        read_dataset("csv", DatasetRequest(annotations=path, check_media=False))


def test_json_lines_of_another_form_are_refused_with_their_line(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "list.jsonl", ['{"path": "a.mp4", "label": 0}', '{"path": "b.mp4", "label": [1, 2]}'])
    with pytest.raises(AnnotationError, match=r"list\.jsonl:2: label: expected a text or a number, found \[1, 2\]"):
        read_dataset("csv", DatasetRequest(annotations=path, check_media=False))
    write_lines(path, ['{"path": "a.mp4", "lable": 0}'])
    with pytest.raises(AnnotationError, match=r"expected the columns path,label, found 'path,lable'; missing: label"):
        read_dataset("csv", DatasetRequest(annotations=path, check_media=False))


def test_verb_and_noun_are_two_targets(tmp_path: Path) -> None:
    source = read(tmp_path, ["a.mp4,cut,onion", "b.mp4,cut,pan", "c.mp4,wash,pan"], header="path,verb,noun")
    assert source.targets == ("verb", "noun")
    assert [space.classes for space in source.label_spaces] == [("cut", "wash"), ("onion", "pan")]
    assert [one.labels for one in source.samples] == [(0, 0), (0, 1), (1, 1)]
    classes = write_lines(tmp_path / "classes.txt", ["cut", "wash"])
    with pytest.raises(UserInputError, match="--classes: expected one column of labels, found verb and noun"):
        read(tmp_path, ["a.mp4,cut,onion"], header="path,verb,noun", classes=classes)


def test_a_list_of_paths_and_labels_needs_no_header(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "train.txt", ["deep/a b.mp4 1", "-c.mp4\t0", "d.mp4   1"], line_end="\r\n")
    source = read_dataset("list", DatasetRequest(annotations=path, check_media=False))
    assert [(one.sample_id, one.labels) for one in source.samples] == [
        ("deep/a b.mp4", (1,)),
        ("-c.mp4", (0,)),
        ("d.mp4", (1,)),
    ]
    write_lines(path, ["a.mp4 1", "b.mp4"])
    with pytest.raises(AnnotationError, match=r"train\.txt:2:1: expected path and label, found 'b\.mp4'"):
        read_dataset("list", DatasetRequest(annotations=path, check_media=False))


def test_missing_files_are_left_out_as_asked_and_all_named_otherwise(tmp_path: Path) -> None:
    touch(tmp_path / "media", "a.mp4", "b.mp4")
    rows = ["a.mp4,x", "gone.mp4,y", "b.mp4,y"]
    source = read(tmp_path, rows, check_media=True, max_missing=RejectBudget(count=1))
    assert [one.sample_id for one in source.samples] == ["a.mp4", "b.mp4"]
    assert source.notes == {MISSING_MEDIA: (f"{tmp_path / 'list.csv'}:3",)}
    with pytest.raises(AnnotationError, match=r"list\.csv:3:1: path: expected an existing file .*, found 'gone\.mp4'"):
        read(tmp_path, rows, check_media=True, max_missing=RejectBudget(fraction=0.3))


def test_what_is_missing_is_asked_for(tmp_path: Path) -> None:
    annotations = write_lines(tmp_path / "list.csv", ["path,label", "a.mp4,x"])
    with pytest.raises(
        UserInputError, match="--dataset csv: expected --annotations, found none; pass a CSV, Parquet or JSON Lines"
    ):
        read_dataset("csv", DatasetRequest())
    with pytest.raises(UserInputError, match="--dataset csv: expected --media, found none; pass the folder"):
        read_dataset("csv", DatasetRequest(annotations=annotations))
    with pytest.raises(UserInputError, match=r"--media .*none: expected a folder, found nothing there"):
        read_dataset("csv", DatasetRequest(annotations=annotations, media=tmp_path / "none"))
    with pytest.raises(UserInputError, match="--task: --dataset csv does not use it"):
        read_dataset("csv", DatasetRequest(annotations=annotations, media=tmp_path, task="space"))


def test_several_labels_a_sample_are_ascending_classes_of_one_space(tmp_path: Path) -> None:
    source = read(tmp_path, ["a.mp4,dog|cat", "b.mp4,  cat ", "c.mp4,dog | ant"], header="path,labels")
    assert source.labelling == "several"
    assert (source.targets, source.label_spaces[0].classes) == (("label",), ("ant", "cat", "dog"))
    assert [sample.labels for sample in source.samples] == [(1, 2), (1,), (0, 2)]
    assert label_histogram(source) == {"label": {"ant": 1, "cat": 2, "dog": 2}}
    assert named_labels((1, 2), source.label_spaces, source.labelling) == {
        "label": [{"index": 1, "name": "cat"}, {"index": 2, "name": "dog"}]
    }


def test_the_separator_of_labels_is_an_option(tmp_path: Path) -> None:
    rows = ["a.mp4,x|y;z", 'b.mp4,"z, w"']
    semicolons = read(tmp_path, rows, header="path,labels", label_separator=";")
    assert semicolons.label_spaces[0].classes == ("x|y", "z", "z, w")
    commas = read(tmp_path, rows, header="path,labels", label_separator=",")
    assert [sample.labels for sample in commas.samples] == [(1,), (0, 2)]
    with pytest.raises(UserInputError, match="--label-separator: expected one or more characters, no spaces"):
        read(tmp_path, rows, header="path,labels", label_separator=" ")
    with pytest.raises(UserInputError, match="--label-separator: --dataset list does not use it, only csv"):
        read_dataset("list", DatasetRequest(annotations=tmp_path / "list.csv", label_separator=";"))


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_lists_of_labels_are_read_as_they_are(tmp_path: Path, ending: str) -> None:
    rows = pd.DataFrame({"path": ["a.mp4", "b.mp4", "c.mp4"], "labels": [["x|y", "z"], ["z"], []]})
    path = tmp_path / f"list.{ending}"
    if ending == "parquet":
        rows.to_parquet(path)
    else:
        rows.to_json(path, orient="records", lines=True)
    source = read_dataset("csv", DatasetRequest(annotations=path, check_media=False))
    assert source.label_spaces[0].classes == ("x|y", "z")
    assert [sample.labels for sample in source.samples] == [(0, 1), (1,), ()]
    assert source.notes[NO_LABEL] == (f"{path}:3",)


def test_numbers_and_class_lists_serve_several_labels_too(tmp_path: Path) -> None:
    assert [s.labels for s in read(tmp_path, ["a.mp4,2|0", "b.mp4,1"], header="path,labels").samples] == [(0, 2), (1,)]
    classes = write_lines(tmp_path / "classes.txt", ["dog", "bee", "ant"])
    source = read(tmp_path, ["a.mp4,ant|dog"], header="path,labels", classes=classes)
    assert source.samples[0].labels == (0, 2)
    assert source.notes[UNUSED_CLASSES] == ("bee",)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("x||y", r":2:7: labels: expected a class name, found ''"),
        ("x|y|x", r":2:7: labels: expected each label once, found 'x' again"),
        ("1|3", "expected class numbers from 0 without gaps"),
        ("", "labels: expected at least one label, found none in any row"),
    ],
)
def test_c11_several_labels_that_cannot_be_meant_are_refused(tmp_path: Path, labels: str, message: str) -> None:
    with pytest.raises(AnnotationError, match=message):
        read(tmp_path, [f"a.mp4,{labels}"], header="path,labels")


def test_labels_that_are_no_texts_or_numbers_are_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "list.jsonl", ['{"path": "a.mp4", "labels": [["x"]]}'])
    with pytest.raises(AnnotationError, match="labels: expected a text or a number, found"):
        read_dataset("csv", DatasetRequest(annotations=path, check_media=False))
    with pytest.raises(AnnotationError, match="expected only the columns path, label, start, end, audio, found"):
        read(tmp_path, ["a.mp4,x,y"], header="path,label,labels")


def test_c11_a_label_that_may_be_several_is_noted_with_what_to_do(tmp_path: Path) -> None:
    source = read(tmp_path, ["a.mp4,dog|cat", "b.mp4,cat"])
    assert source.notes[SEVERAL_LABELS] == ("'dog|cat'",)
    (line,) = (line for line in note_lines(source.notes) if SEVERAL_LABELS in line)
    assert "each is one class; for several labels per sample name the column `labels`" in line


def test_a_test_list_may_be_without_labels_and_no_other(tmp_path: Path) -> None:
    rows = ["a.mp4,1,2", "b.mp4,,"]
    source = read(tmp_path, rows, header="path,start,end", split="test")
    assert (source.labelling, source.label_spaces, source.targets) == ("none", (), ())
    assert [sample.labels for sample in source.samples] == [(), ()]
    classes = write_lines(tmp_path / "classes.txt", ["ant", "bee"])
    assert read(tmp_path, rows, header="path,start,end", split="test", classes=classes).num_classes == {"label": 2}
    with pytest.raises(AnnotationError, match="missing: label"):
        read(tmp_path, rows, header="path,start,end", split="validation")
    with pytest.raises(AnnotationError, match="lable"):
        read(tmp_path, ["a.mp4,x"], header="path,lable", split="test")
