from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharding.datasets.table import CellError, clock_time, seconds_or_clock_time

milliseconds = st.integers(0, 359_999_999)


def written(total_ms: int, digits: int = 3) -> str:
    seconds, ms = divmod(total_ms, 1000)
    fraction = f".{ms:03d}"[: digits + 1] if digits else ""
    return f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}{fraction}"


@given(milliseconds)
def test_a_clock_time_is_the_float_nearest_to_what_is_written(total_ms: int) -> None:
    assert clock_time(written(total_ms)) == float(Fraction(total_ms, 1000))


@given(milliseconds, st.integers(0, 3))
def test_fewer_decimals_only_cut_the_fraction(total_ms: int, digits: int) -> None:
    kept = total_ms // 10 ** (3 - digits) * 10 ** (3 - digits)
    assert clock_time(written(total_ms, digits)) == kept / 1000


@given(milliseconds, milliseconds)
def test_clock_times_keep_their_order(first: int, second: int) -> None:
    assert (clock_time(written(first)) < clock_time(written(second))) == (first < second)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1.5",
        "00:01",
        "0:00:01",
        "00:60:00",
        "00:00:60",
        "-00:00:01",
        "00:00:01,5",
        "00:00:01.",
        "00:00:1e1",
        "٠٠:٠٠:٠١",
    ],
)
def test_another_form_is_no_clock_time(text: str) -> None:
    with pytest.raises(CellError, match=r"expected a time HH:MM:SS\.sss"):
        clock_time(text)


@pytest.mark.parametrize(("text", "seconds"), [("0", 0.0), ("12.5", 12.5), ("00:02:00.25", 120.25)])
def test_seconds_may_be_plain_numbers_or_clock_times(text: str, seconds: float) -> None:
    assert seconds_or_clock_time(text) == seconds


@given(st.floats(min_value=1e-99, max_value=999_999_999) | st.sampled_from([0.0, 0.1 + 0.2, 10 / 29.97, 1e-7]))
def test_any_float_that_a_program_writes_comes_back(seconds: float) -> None:
    assert seconds_or_clock_time(repr(seconds)) == seconds


@pytest.mark.parametrize("text", ["-1", "+1", "1e3", "1e-999", "nan", "inf", "1,5", "1s", ".", "9" * 400])
def test_signs_exponents_and_words_are_no_seconds(text: str) -> None:
    with pytest.raises(CellError, match=r"expected seconds \(12\.5\) or a time"):
        seconds_or_clock_time(text)
