"""What every message has in common: choices by name, and lists that end."""

from dataclasses import dataclass
from typing import Literal

import pytest

from ca2st.errors import UserInputError, check_choice, check_literals, listed


@pytest.mark.parametrize(
    ("items", "count", "text"),
    [
        ([], None, ""),
        (["a"], None, "a"),
        (["a", "b"], None, "a, b"),
        (["a", "b", "c", "d"], None, "a, b and 2 more"),
        (["a", "b"], 9, "a, b and 7 more"),
        ([1], 2, "1 and 1 more"),
    ],
)
def test_a_list_names_the_first_and_counts_the_rest(items: list[object], count: int | None, text: str) -> None:
    assert listed(items, most=2, count=count) == text


def test_other_separators_stand_before_the_count_too() -> None:
    assert listed(["a", "b", "c"], most=2, separator="; ") == "a; b; and 1 more"
    assert listed(["a", "b", "c"], most=1, separator="\n  ") == "a\n  and 2 more"


def test_a_choice_that_is_not_there_is_refused_with_those_there_are_and_the_nearest() -> None:
    check_choice("codec", "mjpeg", {"mjpeg": 1, "h264": 2})
    with pytest.raises(
        UserInputError, match=r"^codec: expected one of mjpeg, h264, found 'mjpg' \(did you mean 'mjpeg'\?\)$"
    ):
        check_choice("codec", "mjpg", {"mjpeg": 1, "h264": 2})
    with pytest.raises(UserInputError, match=r"^head: expected one of keep, new, found None$"):
        check_choice("head", None, ("keep", "new"))


@dataclass(frozen=True)
class Settings:
    kind: Literal["near", "far"] = "near"
    name: str = "any"


def test_a_field_with_literals_takes_only_those() -> None:
    check_literals(Settings(name="other"))
    with pytest.raises(UserInputError, match=r"^lens\.kind: expected one of near, far, found 'fat' \(did you mean"):
        check_literals(Settings(kind="fat"), prefix="lens.")  # type: ignore[arg-type]  # refused
