"""Sizes and views as people write them."""

import pytest

from ca2st.errors import UserInputError
from ray_jobs.console import parse_bytes, parse_views


@pytest.mark.parametrize(
    ("text", "expected"), [("1GB", 10**9), ("256 MB", 256 * 10**6), ("1048576", 2**20), ("1.5GiB", 3 * 2**29)]
)
def test_sizes_are_read_with_their_units(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1 parsec", "1e9"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(UserInputError, match="expected a number with a unit such as 1GB"):
        parse_bytes(text)


def test_views_are_clips_by_crops() -> None:
    assert parse_views("5x3") == (5, 3)


@pytest.mark.parametrize("text", ["2", "0x3", "2x", "2 x 3", "2x3x4"])
def test_other_views_are_refused(text: str) -> None:
    with pytest.raises(UserInputError, match="expected CLIPSxCROPS such as 2x3"):
        parse_views(text)
