import pytest
from hypothesis import given
from hypothesis import strategies as st

from ca2st.checked_json import canonical_json
from ca2st.training.errors import CheckpointDamagedError
from ca2st.training.journal import differences, open_sealed_json, sealed_json

DOCUMENT = {"step": 3, "lr": 0.1, "names": ["a", "ü"], "nested": {"empty": {}, "none": None}}


def test_a_sealed_document_comes_back() -> None:
    assert open_sealed_json(sealed_json(DOCUMENT), "here") == DOCUMENT


@given(st.data())
def test_one_flipped_bit_anywhere_breaks_the_seal(data: st.DataObject) -> None:
    sealed = bytearray(sealed_json(DOCUMENT))
    position = data.draw(st.integers(0, len(sealed) - 1))
    sealed[position] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(CheckpointDamagedError, match="here: "):
        open_sealed_json(bytes(sealed), "here")


def test_equal_documents_give_equal_bytes_whatever_their_order() -> None:
    assert canonical_json({"a": 1, "b": (1, 2)}) == canonical_json({"b": [1, 2], "a": 1})


def test_canonical_json_has_an_indented_form_and_one_without_white_space() -> None:
    assert canonical_json({"b": "ü", "a": [1.5]}) == '{\n "a": [\n  1.5\n ],\n "b": "ü"\n}\n'.encode()
    assert canonical_json({"b": "ü", "a": [1.5]}, is_compact=True) == '{"a":[1.5],"b":"ü"}'.encode()
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json({"loss": float("nan")})


def test_differences_name_each_field_with_what_it_was_and_is() -> None:
    was = {"seed": 1, "data": {"path": "x", "sizes": [1, 2]}, "gone": True}
    now = {"seed": 2, "data": {"path": "x", "sizes": [1, 3, 4]}, "new": None}
    assert differences(was, now) == [
        "data.sizes.1: 2 -> 3",
        "data.sizes.2: (absent) -> 4",
        "gone: true -> (absent)",
        "new: (absent) -> null",
        "seed: 1 -> 2",
    ]
    assert differences(was, was) == []
