import csv
import io
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sharding.datasets.label_spaces import class_index
from sharding.datasets.table import Problems, Row, read_table
from sharding.errors import AnnotationError
from support.annotations import write_lines

cell = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12).map(str.strip).filter(bool)


def read(path: Path, *, optional: tuple[str, ...] | None = None) -> tuple[Row, ...]:
    problems = Problems(path)
    _, rows = read_table(path, required=("path", "label"), optional=optional, problems=problems)
    problems.refuse_any()
    return rows


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(
    rows=st.lists(st.tuples(cell, cell, cell), min_size=1, max_size=6),
    line_end=st.sampled_from(["\n", "\r\n", "\r"]),
    mark=st.booleans(),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
def test_whatever_a_csv_writer_wrote_is_read_back(tmp_path: Path, rows, line_end, mark, quoting) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator=line_end, quoting=quoting).writerows([("path", "label", "start"), *rows])
    path = tmp_path / "rows.csv"
    path.write_bytes(text.getvalue().encode("utf-8-sig" if mark else "utf-8"))
    found = read(path)
    assert [row.cells for row in found] == rows
    assert [row.line for row in found] == list(range(2, len(rows) + 2))


def test_columns_may_come_in_any_order_with_spaces_and_empty_lines_around(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.csv", ["", "label, path", "", " cat , a.mp4", ""])
    (row,) = read(path)
    assert (row["path"], row["label"], row.where) == ("a.mp4", "cat", f"{path}:4")


@pytest.mark.parametrize(
    ("line", "columns"),
    [
        ("a.mp4,x,1", (1, 7, 9)),
        ("a.mp4,,", (1, 7, 8)),
        ('"a,b.mp4",x,1', (1, 11, 13)),
        ('"a ""b"",c",x,1', (1, 13, 15)),
        ('5" pipe, but,x', (1, 9, 14)),
    ],
)
def test_the_place_of_a_cell_counts_characters_of_the_line(tmp_path: Path, line: str, columns: tuple[int, ...]) -> None:
    (row,) = read(write_lines(tmp_path / "a.csv", ["path,label,start", line]))
    for name, column in zip(row.columns, columns, strict=True):
        assert row.place(name) == f"{row.path}:2:{column}: {name}"


def test_every_wrong_row_is_counted_and_the_first_twenty_are_listed(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.csv", ["path,label", *(f"{n}.mp4,{n}" for n in range(50))])
    rows = read(path)
    for row in rows:
        row.read("label", class_index(10))
    with pytest.raises(AnnotationError, match=r"a\.csv: 40 problems \(label out of range 40\)") as caught:
        rows[0].problems.refuse_any()
    lines = str(caught.value).splitlines()
    assert len(lines) == 22
    assert lines[1].endswith("a.csv:12:8: label: expected a class index 0 to 9, found '10'")
    assert lines[-1].strip() == "and 20 more"


def test_one_wrong_row_is_one_line(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.csv", ["path,label", "a.mp4"])
    with pytest.raises(
        AnnotationError, match=r"a\.csv:2:1: expected 2 cells \(path,label\), found 1; correct it"
    ) as caught:
        read(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("path;label", "expected commas between the columns, found semicolons; save it comma-separated"),
        ("path\tlabel", "found tabs"),
        ("path label", "found spaces"),
        ('"path"|"label"', "found bars"),
        ("path,lable", r"missing: label \(did you mean 'lable'\?\)"),
        ("a.mp4,cat", "expected the columns path,label, found 'a.mp4,cat'"),
        ("path,label,path", "expected every column once, found path several times"),
        ("path,label,strat", r"found 'strat' \(did you mean 'start'\?\); rename or remove it"),
        ('path,"label', "expected the header path,label, found"),
    ],
)
def test_c10_a_wrong_header_is_refused_with_what_was_expected(tmp_path: Path, header: str, message: str) -> None:
    path = write_lines(tmp_path / "a.csv", [header, "a.mp4,cat"])
    with pytest.raises(AnnotationError, match=message) as caught:
        read(path, optional=("start",))
    assert str(caught.value).startswith(f"{path}:1:1: ")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("a.mp4,cat,dog", r":3:11: expected 2 cells \(path,label\), found 3; quote cells that hold commas"),
        ('a.mp4,"cat', r":3:7: expected quotes closed on the same line, found 'a\.mp4,"),
        ('a.mp4,"two\nlines"', r":3:7: expected quotes closed on the same line"),
        (f'a.mp4,"{"x" * 200_000}"', r":3:1: expected a line of at most 131072 characters, found 200008"),
    ],
)
def test_c10_a_row_of_a_wrong_form_is_named(tmp_path: Path, row: str, message: str) -> None:
    path = write_lines(tmp_path / "a.csv", ["path,label", "b.mp4,cat", row])
    with pytest.raises(AnnotationError, match=message):
        read(path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "expected a header path,label, found an empty file"),
        (b"\xef\xbb\xbf\n\n", "found an empty file"),
        (b"path,label\n\n", "expected rows below the header, found none"),
        ("path,label\na.mp4,caf\u00e9\n".encode("latin-1"), r":2:10: expected UTF-8, found byte 0xe9 \(Latin-1"),
        ("path,label\n".encode("utf-16"), "expected UTF-8 text, found UTF-16"),
        (b"PK\x03\x04rest", "found a spreadsheet"),
        (b"path,label\na\0b,c\n", r":2:2: expected text, found a zero byte"),
    ],
)
def test_c10_a_file_that_is_no_csv_text_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(data)
    with pytest.raises(AnnotationError, match=message):
        read(path)


def test_a_missing_file_or_a_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match=r"none\.csv: expected an annotation file, found: No such file"):
        read(tmp_path / "none.csv")
    with pytest.raises(AnnotationError, match="expected an annotation file, found: Is a directory"):
        read(tmp_path)
