"""Parameters, budgets, estimates, keys (C9)."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st

from ca2st.errors import UserInputError
from sharding.forecast import forecast_of
from sharding.format.index import sample_key
from sharding.settings import ConversionConfig, RejectBudget, conversion_identity, plan_shards
from support.shards import sample, source_list


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"audio_policy": "maybe"}, "audio policy: expected one of required, optional, none, found 'maybe'"),
        ({"quality": 1}, "quality: expected 2"),
        ({"quality": 32}, "quality: expected 2"),
        ({"short_side": 255}, "short_side: expected an even number"),
        ({"short_side": 8}, "short_side: expected an even number"),
        ({"frames_per_second": 0.0}, "frames_per_second: expected a rate above 0"),
        ({"sample_rate_hz": 44}, "sample_rate_hz: expected 4000"),
        ({"shard_bytes": 3}, "shard_bytes: expected at least 13312, the size of a tar of one sample, found 3"),
        ({"clip_seconds": 0.0}, "clip_seconds: expected seconds above 0, found 0.0"),
        ({"workers": 0}, "workers: expected more than 0, found 0"),
        ({"clip_timeout_seconds": -1.0}, "clip_timeout_seconds: expected more than 0"),
    ],
)
def test_a_wrong_parameter_is_refused_by_name(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(UserInputError, match=re.escape(message)):
        ConversionConfig(**wrong)  # type: ignore[arg-type]  # test values


def test_budgets_are_counts_or_shares() -> None:
    assert RejectBudget.parse("0") == RejectBudget()
    assert RejectBudget.parse("12").allows(12, 12)
    assert not RejectBudget.parse("12").allows(13, 10**6)
    assert RejectBudget.parse("2.5%").allows(25, 1000)
    assert not RejectBudget.parse("2.5%").allows(26, 1000)
    assert str(RejectBudget.parse("2.5%")) == "2.5%"
    for wrong in ("-1", "5 %", "many", "", "101%"):
        with pytest.raises(UserInputError, match=r"max.rejects: expected a count"):
            RejectBudget.parse(wrong)
        with pytest.raises(UserInputError, match=r"^--max-missing: expected a count"):
            RejectBudget.parse(wrong, option="--max-missing")


def test_the_identity_holds_what_decides_the_bytes_and_nothing_else() -> None:
    source = source_list([sample(Path("a.mp4"))])
    base = conversion_identity(source, ConversionConfig())
    for same in ({"workers": 8}, {"max_rejects": RejectBudget(count=5)}, {"clip_timeout_seconds": 9.0}):
        assert conversion_identity(source, replace(ConversionConfig(), **same)) == base
    for other in ({"quality": 6}, {"sample_rate_hz": 24_000}, {"shard_bytes": 50_000}, {"frames_per_second": 15.0}):
        assert conversion_identity(source, replace(ConversionConfig(), **other)) != base


def test_the_estimate_follows_the_annotated_times() -> None:
    timed = [sample(Path(f"{number}.mp4"), start=float(number), end=number + 4.0) for number in range(10)]
    estimate = forecast_of(source_list([*timed, sample(Path("whole.mp4"))]), ConversionConfig(), {})
    assert estimate.num_samples == 11
    assert estimate.duration_seconds == pytest.approx(44)
    assert estimate.num_frames == 44 * 30
    assert estimate.video_bytes == pytest.approx(44 * 30 * 13_600)
    assert estimate.mel_bytes == 44 * 100 * 128 * 2
    assert estimate.total_bytes == estimate.video_bytes + estimate.mel_bytes + estimate.other_bytes
    thin = forecast_of(source_list(timed), ConversionConfig(frames_per_second=10, audio_policy="none"), {})
    assert thin.num_frames == 400
    assert thin.mel_bytes == 0
    assert forecast_of(source_list([sample(Path("a.mp4"))]), ConversionConfig(), {}).duration_seconds == 10


PLANNED = st.lists(st.one_of(st.none(), st.floats(0.1, 900)), min_size=1, max_size=60)
"""Seconds of the samples of a list; None: a whole file."""


@given(PLANNED, st.integers(20_000, 10**9))
def test_the_plan_covers_every_sample_once_and_no_shard_is_forecast_beyond_its_size(
    seconds: list[float | None], shard_bytes: int
) -> None:
    samples = [
        sample(Path(f"{number}.mp4"), start=None if one is None else 5.0, end=None if one is None else 5.0 + one)
        for number, one in enumerate(seconds)
    ]
    config = ConversionConfig(shard_bytes=shard_bytes)
    starts = plan_shards(source_list(samples), config).starts
    assert starts[0] == 0
    assert list(starts) == sorted(set(starts))
    for first, end in zip(starts, (*starts[1:], len(samples)), strict=True):
        if end - first > 1:
            part = forecast_of(source_list(samples[first:end]), config, {})
            untimed = sum(one is None for one in seconds[first:end])
            fits = part.video_bytes + part.mel_bytes <= shard_bytes
            assert fits or untimed, "those without times are as long as the others of the whole list"
    assert plan_shards(source_list(samples), replace(config, workers=7)).starts == starts


def test_the_plan_is_that_of_a_hand_calculation() -> None:
    """30 frames of 13 600 bytes and 100 rows of 256 a second: a 10 s clip is 4 336 000 bytes and 4 096 beside them."""
    clips = source_list([sample(Path(f"{number}.mp4"), start=0.0, end=10.0) for number in range(7)])
    for shard_bytes, starts in ((3 * 4_340_096 + 10_240, [0, 3, 6]), (3 * 4_340_096 + 10_239, [0, 2, 4, 6])):
        plan = plan_shards(clips, ConversionConfig(shard_bytes=shard_bytes))
        assert (list(plan.starts), plan.num_bytes) == (starts, 7 * 4_340_096)
        assert [plan.range(place) for place in (0, len(plan) - 1, len(plan))] == [
            range(starts[1]), range(6, 7), range(0),
        ]  # fmt: skip
    whole = source_list([sample(Path(f"{number}.mp4")) for number in range(4)])
    assert list(plan_shards(whole, ConversionConfig(clip_seconds=300)).starts) == [0]
    assert list(plan_shards(whole, ConversionConfig(clip_seconds=1000)).starts) == [0, 2]


@given(st.text(max_size=400))
def test_keys_are_short_ascii_and_stand_for_their_id(sample_id: str) -> None:
    key = sample_key(sample_id)
    assert re.fullmatch(r"[a-z0-9_-]{1,80}", key)
    assert key == sample_key(sample_id)
    assert key != sample_key(sample_id + "x")


def test_ids_that_differ_only_in_what_a_key_cannot_hold_keep_apart() -> None:
    ids = [
        "vid.1.5s",
        "vid.2.0s",
        "Vid 1 5s",
        "vid_1_5s",
        "влог",
        "映像",
        "🎬",
        "a/b.mp4",
        "b.mp4",
        "",
        "x" * 300,
        "x" * 301,
    ]
    keys = [sample_key(one) for one in ids]
    assert len(set(keys)) == len(ids)
    assert keys[0].startswith("vid-1-5s-")
    for key in keys:
        assert webdataset.tariterators.base_plus_ext(f"{key}.mel.npy") == (key, "mel.npy")


def test_a_name_that_is_not_utf_8_has_a_key_too() -> None:
    assert sample_key("caf\udce9.mp4").startswith("caf")
