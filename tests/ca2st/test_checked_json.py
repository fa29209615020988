"""The reader of JSON from disk: the value as it was written, or an error that names file and field."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ca2st.checked_json import DocumentError, checked, encoded, parse_json, read_json
from ca2st.errors import EnvironmentFault


@dataclass(frozen=True, kw_only=True)
class Part:
    name: str
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Whole:
    number: int
    parts: tuple[Part, ...]
    kind: Literal["a", "b"]
    by_name: dict[str, int]
    note: str | None = None


class Glimpse(TypedDict):
    number: int


WHOLE = Whole(number=3, parts=(Part(name="x"), Part(name="y", weight=2.5)), kind="a", by_name={"z": 1})
DATA = json.dumps(asdict(WHOLE)).encode()


def test_a_document_comes_back_as_the_dataclass_it_was_written_from() -> None:
    assert parse_json(DATA, Whole, where="d") == WHOLE


def test_a_whole_number_where_any_number_is_due_stays_as_it_was_written() -> None:
    found = parse_json(b'{"name": "x", "weight": 8}', Part, where="d")
    assert json.dumps(asdict(found)) == '{"name": "x", "weight": 8}'


def test_what_no_text_can_hold_is_written_so_that_it_can_be_read() -> None:
    odd = {"caf\udce9": "\ud800 \U0001f525 \\ \n"}
    found = parse_json(encoded(json.dumps(odd, ensure_ascii=False)), dict[str, str], where="d")
    assert found == {r"caf\udce9": "\\ud800 \U0001f525 \\ \n"}


def test_a_typed_dict_takes_its_keys_and_leaves_the_others_alone() -> None:
    assert parse_json(DATA, Glimpse, where="d") == {"number": 3}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"number": "3"}, 'd: number: expected a whole number, found "3"'),
        ({"number": True}, "d: number: expected a whole number, found true"),
        ({"number": 3.0}, "d: number: expected a whole number, found 3.0"),
        ({"parts": [{"name": 1}]}, r"d: parts\[0\]: name: expected a text, found 1"),
        ({"parts": [{}]}, r"d: parts\[0\]: expected the field 'name', found none"),
        ({"parts": {"name": "x"}}, "d: parts: expected a list, found an object of 1"),
        ({"kind": "c"}, "d: kind: expected one of 'a', 'b', found \"c\""),
        ({"by_name": {"z": None}}, "d: by_name: z: expected a whole number, found null"),
        ({"by_name": []}, "d: by_name: expected an object, found a list of 0"),
        ({"nunber": 3}, "d: expected the fields .*, found also 'nunber'"),
        ({"note": 5}, "d: note: expected a text, found 5"),
    ],
)
def test_a_field_of_another_type_is_named_with_what_was_expected(change: dict[str, Any], words: str) -> None:
    with pytest.raises(DocumentError, match=words):
        parse_json(json.dumps(asdict(WHOLE) | change).encode(), Whole, where="d")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "expected a JSON document"),
        (b"{", "expected a JSON document"),
        (b"[1]", "expected an object, found a list of 1"),
        (b'{"a": "\xff"}', "expected UTF-8 text"),
        ('{"a": 1}'.encode("utf-16"), "expected UTF-8 text"),
        (b'{"a": "\\ud800"}', "expected UTF-8 text"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested without end"),
        (b'{"a": ' + b"9" * 5000 + b"}", "a whole number of 5000 digits"),
        (b'{"a": 99999999999999999999}', "a whole number of 20 digits"),
        (b"null", "expected an object, found null"),
        (b'{"b": {"path": "x", "label": 0, "label": 1}}', "an object with the key 'label' twice"),
    ],
)
def test_bytes_that_are_no_document_are_damage_by_name(data: bytes, words: str) -> None:
    with pytest.raises(DocumentError, match=f"^there: .*{words}"):
        parse_json(data, dict[str, Any], where="there")


@given(at=st.integers(0, len(DATA) - 1), flip=st.integers(1, 255))
def test_any_damaged_byte_gives_a_value_of_the_type_or_the_one_error(at: int, flip: int) -> None:
    damaged = bytearray(DATA)
    damaged[at] ^= flip
    try:
        found = parse_json(bytes(damaged), Whole, where="d")
    except DocumentError:
        return
    assert checked(json.loads(json.dumps(asdict(found))), Whole, where="d") == found


def test_a_file_is_read_or_said_to_be_missing_unreadable_or_too_large(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    with pytest.raises(FileNotFoundError):
        read_json(path, Whole)
    path.write_bytes(DATA)
    assert read_json(path, Whole) == WHOLE
    with pytest.raises(DocumentError, match=r"d\.json: expected at most 10 bytes, found more"):
        read_json(path, Whole, most_bytes=10)
    with pytest.raises(EnvironmentFault, match=r"cannot read .*: Is a directory"):
        read_json(tmp_path, Whole)
