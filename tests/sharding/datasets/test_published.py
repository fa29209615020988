"""The owners' annotation files and the lists of others, in hand-made rows with their oddities."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
from pyarrow import parquet

from sharding.datasets import DatasetRequest, label_spaces, read_dataset
from sharding.datasets.label_spaces import published_classes
from sharding.errors import AnnotationError
from sharding.source import ERRATUM, NO_LENGTH, OTHER_CLASS, OTHER_COUNT, REPEATED, SourceList, doubtful
from support.annotations import write_lines


def read(dataset: str, path: Path, *, split: str = "validation", **options: Any) -> SourceList:
    return read_dataset(dataset, DatasetRequest(annotations=path, split=split, check_media=False, **options))


def read_rows(
    tmp_path: Path, dataset: str, rows: Sequence[str], *, name: str = "list.csv", **options: Any
) -> SourceList:
    return read(dataset, write_lines(tmp_path / name, rows, line_end=options.pop("line_end", "\n")), **options)


def ids(source: SourceList) -> list[str]:
    return [sample.sample_id for sample in source.samples]


def labels(source: SourceList) -> list[tuple[str, ...]]:
    """Class names, which do not depend on how classes are numbered."""
    spaces = source.label_spaces
    return [
        tuple(space.classes[label] for space, label in zip(spaces, one.labels, strict=True)) for one in source.samples
    ]


EK100_HEADER = (
    "narration_id,participant_id,video_id,narration_timestamp,start_timestamp,stop_timestamp,start_frame,stop_frame,"
    "narration,verb,verb_class,noun,noun_class,all_nouns,all_noun_classes"
)


def test_epic_kitchens_reads_two_integers_and_neither_words_nor_frames(tmp_path: Path) -> None:
    rows = [
        EK100_HEADER,
        "P21_02_54,P21,P21_02,,00:00:01.50,00:00:02.25,90,135,bring into pan,bring-into,89,pan,5,['pan'],[5]",
        'P01_101_3,P01,P01_101,00:00:03.1,01:00:00.001,01:00:10.00,1,2,"put lid, pan",put,1,lid,6,'
        "\"['lid', 'pan']\",\"[6, 5]\"",
    ]
    source = read_rows(tmp_path, "epic_kitchens_100", rows)
    assert source.targets == ("verb", "noun")
    assert source.num_classes == {"verb": 97, "noun": 300}
    assert [sample.labels for sample in source.samples] == [(89, 5), (1, 6)]
    assert [(one.start_seconds, one.end_seconds) for one in source.samples] == [(1.5, 2.25), (3600.001, 3610.0)]
    assert [one.path.name for one in source.samples] == ["P21_02.MP4", "P01_101.MP4"]


def test_epic_kitchens_reads_the_list_of_ready_cut_clips(tmp_path: Path) -> None:
    source = read_rows(tmp_path, "epic_kitchens_100", ["P20_01_0,6,0", "P20_01_10,1,28"], split="train")
    assert [(one.sample_id, one.labels, one.start_seconds) for one in source.samples] == [
        ("P20_01_0", (6, 0), None),
        ("P20_01_10", (1, 28), None),
    ]


@pytest.mark.parametrize(
    ("dataset", "header", "message"),
    [
        (
            "epic_kitchens_100",
            EK100_HEADER.rpartition(",narration,")[0],
            "expected the columns verb_class, noun_class, found no labels; a list without labels cannot be learned",
        ),
        (
            "epic_sounds",
            "annotation_id,participant_id,video_id,start_timestamp,stop_timestamp,start_sample,stop_sample,description",
            "expected the columns class, class_id, found no labels; .* with --split test it becomes",
        ),
    ],
)
def test_a_list_of_the_kitchens_without_labels_is_refused_in_these_words(
    tmp_path: Path, dataset: str, header: str, message: str
) -> None:
    row = ",".join(["x"] * (header.count(",") + 1))
    with pytest.raises(AnnotationError, match=message):
        read_rows(tmp_path, dataset, [header, row])
    column = "verb_class" if dataset == "epic_kitchens_100" else "class"
    with pytest.raises(AnnotationError, match=r"missing: (noun_class|class_id)"):
        read_rows(tmp_path, dataset, [f"{header},{column}", f"{row},x"], split="test")


@pytest.mark.parametrize(
    ("dataset", "rows", "num_classes"),
    [
        (
            "epic_kitchens_100",
            [
                "narration_id,participant_id,video_id,narration_timestamp,start_timestamp,stop_timestamp,"
                "start_frame,stop_frame",
                "P01_101_0,P01,P01_101,00:00:02.851,00:00:02.86,00:00:03.87,143,193",
            ],
            {"verb": 97, "noun": 300},
        ),
        (
            "epic_sounds",
            [
                "annotation_id,participant_id,video_id,start_timestamp,stop_timestamp,start_sample,stop_sample",
                "P02_106_0,P02,P02_106,00:00:03.855,00:00:04.142,92520,99408",
            ],
            {"label": 44},
        ),
        ("something_something_v2", ['[{"id":"1420"},', '{"id":"166429"}]'], {"label": 174}),
        ("kinetics_400", ["youtube_id,time_start,time_end,split", "--6bJUbfpnQ,17,27,test"], {"label": 400}),
    ],
)
def test_the_owners_test_lists_become_sets_without_labels(
    tmp_path: Path, dataset: str, rows: list[str], num_classes: dict[str, int]
) -> None:
    source = read_rows(tmp_path, dataset, rows, split="test")
    assert source.labelling == "none"
    assert source.num_classes == num_classes
    assert {sample.labels for sample in source.samples} == {()}


@pytest.mark.parametrize(("verb", "noun", "column"), [("97", "0", "verb_class"), ("0", "300", "noun_class")])
def test_a_label_outside_its_space_is_named_with_its_place(tmp_path: Path, verb: str, noun: str, column: str) -> None:
    row = f"P01_1_0,P01,P01_1,,00:00:01.50,00:00:02.25,1,2,x,x,{verb},y,{noun},[],[]"
    with pytest.raises(AnnotationError, match=rf"list\.csv:2:\d+: {column}: expected a class index"):
        read_rows(tmp_path, "epic_kitchens_100", [EK100_HEADER, row])


def test_hd_epic_sounds_makes_ids_of_samples_and_keeps_two_rows_that_share_one(tmp_path: Path) -> None:
    rows = [
        "participant_id,video_id,start_timestamp,stop_timestamp,start_sample,stop_sample,class,class_id",
        "P06,P06-20240510-090328,00:26:15.381,00:33:36.461,75618288,96790128,sizzling / boiling,29",
        "P06,P06-20240510-090328,00:26:15.381,00:33:36.461,75618288,96790128,background,13",
    ]
    source = read_rows(tmp_path, "hd_epic_sounds", rows, split="test")
    name = "P06-20240510-090328-75618288-96790128"
    assert ids(source) == [name, f"{name}#2"]
    assert labels(source) == [("sizzling / boiling",), ("background",)]
    assert source.samples[0].start_seconds == 1575.381


HD_ROWS: list[dict[str, Any]] = [
    {"unique_narration_id": "P08-20240613-122900-1", "start_timestamp": 3.31, "main_action_classes": [(61, 165)]},
    {"unique_narration_id": "P08-20240613-122900-2", "start_timestamp": 4.5, "main_action_classes": []},
    {
        "unique_narration_id": "P08-20240613-122900-3",
        "start_timestamp": 8.79,
        "main_action_classes": [(97, 42), (1, 2)],
    },
    {"unique_narration_id": "P08-20240613-122900-4", "start_timestamp": 9.0, "main_action_classes": [(1, 300)]},
    {"unique_narration_id": "P08-20240613-122900-5", "start_timestamp": 99.0, "main_action_classes": [(0, 1)]},
    {
        "unique_narration_id": "P08-20240613-122900-6",
        "start_timestamp": 20.25,
        "main_action_classes": [(3, 165), (0, 1)],
    },
]
for hd_row in HD_ROWS:
    hd_row |= {"video_id": "P08-20240613-122900", "end_timestamp": 30.5}


def hd_file(tmp_path: Path, form: str) -> Path:
    frame = pd.DataFrame({name: pd.Series([row[name] for row in HD_ROWS], dtype=object) for name in HD_ROWS[0]})
    frame.columns = pd.Index(list(frame.columns), dtype=object)
    path = tmp_path / f"HD_EPIC_Narrations.{form}"
    if form == "pkl":
        frame.to_pickle(path)
    elif form == "parquet":
        listed = frame.assign(
            main_action_classes=[[list(pair) for pair in row["main_action_classes"]] for row in HD_ROWS]
        )
        listed.to_parquet(path)
    elif form == "csv":
        frame.to_csv(path, index=False)
    else:
        frame.to_json(path, orient="records", lines=True)
    return path


@pytest.mark.parametrize("form", ["pkl", "jsonl", "parquet", "csv"])
def test_hd_epic_keeps_first_actions_that_epic_kitchens_knows_in_every_form(tmp_path: Path, form: str) -> None:
    source = read("hd_epic", hd_file(tmp_path, form), split="test")
    assert [(one.sample_id[-1], one.labels) for one in source.samples] == [("1", (61, 165)), ("6", (3, 165))]
    assert (source.samples[1].start_seconds, source.samples[1].end_seconds) == (20.25, 30.5)
    assert source.samples[0].path.name == "P08-20240613-122900.mp4"
    assert {kind: [name[-1] for name in places] for kind, places in source.notes.items()} == {
        OTHER_CLASS: ["2", "3", "4"],
        NO_LENGTH: ["5"],
    }


def test_c10_a_csv_of_other_columns_is_refused_for_these_before_its_long_lines(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "list.csv", ["path,label", f"a.mp4,{'x' * 200_000}"])
    with pytest.raises(AnnotationError, match=r"list\.csv: expected the columns unique_narration_id"):
        read("hd_epic", path)


def test_of_a_parquet_file_of_hd_epic_only_the_columns_in_use_are_read(tmp_path: Path) -> None:
    path = hd_file(tmp_path, "parquet")
    rows = parquet.read_table(path)
    unreadable = pa.array([2**62] * len(rows), pa.timestamp("ms"))
    parquet.write_table(rows.append_column("filmed", unreadable), path)
    assert len(read("hd_epic", path, split="test").samples) == 2


def test_c10_a_cell_of_any_length_in_a_csv_of_hd_epic_is_refused_with_its_line(tmp_path: Path) -> None:
    path = hd_file(tmp_path, "csv")
    lines = path.read_text().splitlines()
    write_lines(path, [*lines, f'a,b,1,2,"{"x" * 200_000}"'])
    message = rf"\.csv:{len(lines) + 1}: expected a line of CSV, found another \(field larger than field limit"
    with pytest.raises(AnnotationError, match=message):
        read("hd_epic", path, split="test")


def test_hd_epic_leaves_out_what_the_erratum_beside_it_names(tmp_path: Path) -> None:
    write_lines(
        tmp_path / "HD_EPIC_Narrations_erratum.csv", ["erratum_narration_id", HD_ROWS[0]["unique_narration_id"]]
    )
    source = read("hd_epic", hd_file(tmp_path, "jsonl"), split="test")
    assert [name[-1] for name in ids(source)] == ["6"]
    assert source.notes[ERRATUM] == (HD_ROWS[0]["unique_narration_id"],)


def test_hd_epic_without_its_columns_is_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", [json.dumps({"unique_narration_id": "a"})])
    with pytest.raises(AnnotationError, match="found no video_id, start_timestamp, end_timestamp, main_action_classes"):
        read("hd_epic", path, split="test")


TEMPLATES = ["Spinning [something] that quickly stops spinning", "Stacking [number of] [something]"]


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_something_something_takes_the_template_without_its_square_brackets(tmp_path: Path, line_end: str) -> None:
    entries = [
        {"id": str(number), "label": "x", "template": template, "placeholders": ["a"]}
        for number, template in enumerate(TEMPLATES, start=7)
    ]
    source = read_rows(
        tmp_path, "something_something_v2", json.dumps(entries, indent=0).splitlines(), line_end=line_end
    )
    assert ids(source) == ["7", "8"]
    assert labels(source) == [("Spinning something that quickly stops spinning",), ("Stacking number of something",)]
    assert source.samples[0].path.name == "7.webm"


def test_something_something_reads_answers_and_the_list_of_numbers(tmp_path: Path) -> None:
    answers = read_rows(
        tmp_path,
        "something_something_v2",
        ["208583;Trying to pour something into something, but missing so it spills next to it"],
    )
    listed = read_rows(tmp_path, "something_something_v2", ["208583.mp4 162", "7.mp4\t0"])
    assert labels(answers) == [("Trying to pour something into something, but missing so it spills next to it",)]
    assert [one.labels for one in listed.samples] == [(162,), (0,)]


def test_something_something_without_labels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match="expected entries with a template, found no labels; a list without"):
        read_rows(tmp_path, "something_something_v2", ['[{"id":"1420"},', '{"id":"166429"}]'], split="validation")
    with pytest.raises(AnnotationError, match=r"entry 1 \(id '1'\): expected one of the 174 class names"):
        read_rows(tmp_path, "something_something_v2", ['[{"id":"1","template":"Flying [something]"}]'])
    with pytest.raises(AnnotationError, match=r"entry 1 \(id 'x7'\): expected a video's number, found 'x7'"):
        read_rows(tmp_path, "something_something_v2", ['[{"id":"x7","template":"Stacking [number of] [something]"}]'])


K400_HEADER = "label,youtube_id,time_start,time_end,split,is_cc"


def test_kinetics_reads_the_rows_of_its_split_by_name(tmp_path: Path) -> None:
    rows = [
        K400_HEADER,
        "abseiling,0wR5jVB-WPk,417,427,val,0",
        '"answering questions",--nQbRBEz2s,2934,2944,val,0',
        '"hurling (sport)",034KeIezQZ8,0,10,train,0',
    ]
    source = read_rows(tmp_path, "kinetics_400", rows)
    assert ids(source) == ["0wR5jVB-WPk_000417_000427", "--nQbRBEz2s_002934_002944"]
    assert labels(source) == [("abseiling",), ("answering questions",)]
    train = read_rows(tmp_path, "kinetics_400", rows, split="train")
    assert labels(train) == [("hurling (sport)",)]
    with pytest.raises(AnnotationError, match="expected rows of --split test, found those of train, val"):
        read_rows(tmp_path, "kinetics_400", rows, split="test")


def test_kinetics_reads_the_list_of_ids_to_its_last_line(tmp_path: Path) -> None:
    path = tmp_path / "val.csv"
    path.write_bytes(b"jf7RDuUTrsQ.mp4 325\n-5wLopwbGX0.mp4 132")  # no line end at the end
    source = read("kinetics_400", path)
    assert [(one.sample_id, one.labels) for one in source.samples] == [("jf7RDuUTrsQ", (325,)), ("-5wLopwbGX0", (132,))]


def test_kinetics_without_labels_is_refused(tmp_path: Path) -> None:
    rows = ["youtube_id,time_start,time_end,split", "--6bJUbfpnQ,17,27,train"]
    with pytest.raises(AnnotationError, match="expected the column label, found no labels"):
        read_rows(tmp_path, "kinetics_400", rows, split="train")
    with pytest.raises(AnnotationError, match="expected the column label, whose classes are chosen by"):
        read_rows(tmp_path, "kinetics_sound", rows, split="train")


def test_kinetics_sound_is_the_part_of_kinetics_that_can_be_heard(tmp_path: Path) -> None:
    rows = [
        K400_HEADER,
        "abseiling,0wR5jVB-WPk,417,427,val,0",
        "bowling,3caPS4FHFF8,36,46,val,0",
        '"tapping pen",034KeIezQZ8,0,10,val,0',
    ]
    source = read_rows(tmp_path, "kinetics_sound", rows)
    assert source.num_classes == {"label": 31}
    assert labels(source) == [("bowling",), ("tapping pen",)]
    classes = published_classes("kinetics_sound")
    assert set(classes) < set(published_classes("kinetics_400"))
    assert list(classes) == sorted(classes)


def test_kinetics_sound_reads_the_lists_with_padded_and_plain_seconds(tmp_path: Path) -> None:
    train = read_rows(tmp_path, "kinetics_sound", ["--4-0ihtnBU_000058_000068,10,4"], split="train")
    test = read_rows(tmp_path, "kinetics_sound", ["-74csnCOiUs_0,10,30"], split="test", line_end="\r\n")
    assert (ids(train), labels(train)) == (["--4-0ihtnBU_000058_000068"], [("dribbling basketball",)])
    assert (ids(test), labels(test)) == (["-74csnCOiUs_000000_000010"], [("tickling",)])


def test_kinetics_sound_takes_other_classes_from_a_list(tmp_path: Path) -> None:
    classes = write_lines(tmp_path / "classes.txt", sorted([*published_classes("kinetics_sound"), "strumming guitar"]))
    rows = ["val/v52Gi2rgV3w_000005_000015.mp4,31"]
    with pytest.raises(AnnotationError, match=r"0 to 30, found '31'.* other than these 31 classes name them by --cla"):
        read_rows(tmp_path, "kinetics_sound", rows)
    source = read_rows(tmp_path, "kinetics_sound", rows, classes=classes)
    assert source.num_classes == {"label": 32}
    assert ids(source) == ["v52Gi2rgV3w_000005_000015"]


VIDEOS: dict[str, dict[str, Any]] = {
    "QOlSCBRmfWY": {
        "duration": 82.73,
        "subset": "training",
        "annotations": [
            {"segment": [6.195294851794072, 77.73085420904837], "label": "Ballet"},
            {"segment": [0.0, 0.0], "label": "Ballet"},
            {"segment": [6.195294851794072, 77.73085420904837], "label": "Ballet"},
            {"segment": [6.195294851794072, 77.73085420904837], "label": "Archery"},
        ],
    },
    "--6bJUbfpnQ": {"duration": 5.0, "subset": "validation", "annotations": [{"segment": [1, 6], "label": "BMX"}]},
    "K6Tm5xHkJ5c": {"duration": 9.0, "subset": "testing", "annotations": []},
}


def activitynet(tmp_path: Path, form: str) -> Path:
    path = tmp_path / "activitynet.json"
    if form == "owners":
        path.write_text(json.dumps({"database": VIDEOS, "taxonomy": [], "version": "VERSION 1.3"}))
        return path
    named = {f"v_{name}": {"duration_second": 1.0, "annotations": one["annotations"]} for name, one in VIDEOS.items()}
    path.write_text(json.dumps(named))
    rows = [f"v_{name},100,4.0,25.0,25.0,{video['subset']},16" for name, video in VIDEOS.items()]
    write_lines(tmp_path / "video_info_new.csv", ["video,numFrame,seconds,fps,rfps,subset,featureFrame", *rows])
    return path


@pytest.mark.parametrize("form", ["owners", "re-release"])
def test_activitynet_makes_a_sample_per_segment_without_empty_and_repeated_ones(tmp_path: Path, form: str) -> None:
    source = read("activitynet", activitynet(tmp_path, form), split="train")
    assert labels(source) == [("Ballet",), ("Archery",)]
    assert [(one.start_seconds, one.end_seconds) for one in source.samples] == [
        (6.195294851794072, 77.73085420904837)
    ] * 2
    assert ids(source)[1] == f"{ids(source)[0]}#2"
    assert {kind: len(places) for kind, places in source.notes.items()} == {NO_LENGTH: 1, REPEATED: 1, OTHER_COUNT: 1}
    assert source.notes[OTHER_COUNT] == ("2 instead of 14822",)
    assert doubtful({kind: len(places) for kind, places in source.notes.items()}) == {}
    other = read("activitynet", activitynet(tmp_path, form))
    assert [(one.path.name, one.end_seconds) for one in other.samples] == [("v_--6bJUbfpnQ.mp4", 6)]


def test_activitynet_without_labels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match="expected rows of activitynet, found none"):
        read("activitynet", activitynet(tmp_path, "owners"), split="test")


def test_activitynet_lists_with_numbers_need_the_order_of_their_classes(tmp_path: Path) -> None:
    rows = ["video_id,video_duration,t_start,t_end,label", "v_QOlSCBRmfWY,82.73,6.195294851794072,77.73,1"]
    with pytest.raises(AnnotationError, match="found numbers, of which there are several orders; pass --classes"):
        read_rows(tmp_path, "activitynet", rows)
    classes = write_lines(tmp_path / "classes.txt", ["Zumba", "Ballet"])
    source = read_rows(tmp_path, "activitynet", rows, classes=classes)
    assert labels(source) == [("Ballet",)]
    assert source.samples[0].start_seconds == 6.195294851794072


def test_vgg_sound_reads_the_whole_list_by_split_without_the_label_that_no_split_has(tmp_path: Path) -> None:
    rows = [
        "---g-f_I2yQ,1,people marching,test",
        '--9O4XZOge4,30,"female speech, woman speaking",train',
        "--0PQM4-hqg,30,extending ladders,train",
        "-2PCw_b6c2k,116,playing timpani,train",
        "-2PCw_b6c2k,226,playing tympani,train",
    ]
    source = read_rows(tmp_path, "vgg_sound", rows, split="train", name="vggsound.csv")
    assert ids(source) == ["--9O4XZOge4_000030", "-2PCw_b6c2k_000116", "-2PCw_b6c2k_000226"]
    assert labels(source) == [("female speech, woman speaking",), ("playing timpani",), ("playing tympani",)]
    assert len(source.notes[OTHER_CLASS]) == 1
    assert labels(read_rows(tmp_path, "vgg_sound", rows, name="vggsound.csv")) == [("people marching",)]


@pytest.mark.parametrize("wide", ["x" * 200_000, f'xElEg-6DBtM_000018.mp4,"{"x" * 200_000}"'])
def test_c10_a_first_line_of_vgg_sound_of_any_length_is_refused_in_words(tmp_path: Path, wide: str) -> None:
    message = rf"list\.csv:1:1: expected a line of at most 131072 characters, found {len(wide)};"
    with pytest.raises(AnnotationError, match=message):
        read_rows(tmp_path, "vgg_sound", [wide, "xElEg-6DBtM_000018.mp4,hail"])


def test_vgg_sound_reads_the_lists_of_a_split_and_numbers_that_must_agree(tmp_path: Path) -> None:
    source = read_rows(tmp_path, "vgg_sound", ['-XxUW9gW6mc_000060.mp4,"pigeon, dove cooing"'], line_end="\r\n")
    assert (ids(source), labels(source)) == (["-XxUW9gW6mc_000060"], [("pigeon, dove cooing",)])
    number = published_classes("vgg_sound").index("hail")
    header = "file,name,number"
    assert labels(read_rows(tmp_path, "vgg_sound", [header, f"xElEg-6DBtM_000018.mp4,hail,{number}"])) == [("hail",)]
    with pytest.raises(AnnotationError, match=rf"number: expected {number}, the index of 'hail', found '{number - 1}'"):
        read_rows(tmp_path, "vgg_sound", [header, f"xElEg-6DBtM_000018.mp4,hail,{number - 1}"])


def test_ucf_takes_the_class_from_the_folder_and_numbers_that_must_agree(tmp_path: Path) -> None:
    rows = [
        "HandstandPushups/v_HandStandPushups_g08_c01.avi 37",
        "HammerThrow/v_HammerThrow_g10_c01.avi",
        "Hammering/v_Hammering_g08_c01.avi 35",
    ]
    source = read_rows(tmp_path, "ucf_101", rows, split="train", line_end="\r\n")
    assert labels(source) == [("HandstandPushups",), ("HammerThrow",), ("Hammering",)]
    assert [one.labels for one in source.samples] == [(36,), (35,), (34,)]
    assert ids(source)[0] == "HandstandPushups/v_HandStandPushups_g08_c01"
    with pytest.raises(AnnotationError, match="expected 35, the number of 'Hammering', found '36'"):
        read_rows(tmp_path, "ucf_101", ["Hammering/v_Hammering_g08_c01.avi 36"])
    short = read_rows(tmp_path, "ucf_101", ["v_HandStandPushups_g01_c01,37"], split="test")
    assert labels(short) == [("HandstandPushups",)]


def test_the_published_number_of_rows_is_no_note(tmp_path: Path) -> None:
    rows = [f"P20_01_{number},0,0" for number in range(9668)]
    assert read_rows(tmp_path, "epic_kitchens_100", rows).notes == {}


@pytest.mark.parametrize(
    ("dataset", "row"),
    [
        ("vgg_sound", "xElEg-6DBtM_000018.mp4,hail {}"),
        ("ucf_101", "Hammering{}/v_Hammering_g08_c01.avi"),
        ("epic_sounds", "P01_02_{0},P01,P01_02,00:00:01.0,00:00:02.0,1,2,rustle {0},4"),
    ],
)
def test_the_nearest_class_is_looked_for_a_few_times_however_many_rows_are_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dataset: str, row: str
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(label_spaces, "did_you_mean", lambda name, _: asked.append(name) or "")
    header = [
        "annotation_id,participant_id,video_id,start_timestamp,stop_timestamp,start_sample,stop_sample,class,class_id"
    ]
    rows = [row.format("abcdefghijklmnopqrstuvwxyz"[number]) for number in range(26)]
    with pytest.raises(AnnotationError, match="unknown class 26"):
        read_rows(tmp_path, dataset, (header if dataset == "epic_sounds" else []) + rows)
    assert len(asked) == 20
