"""The index arithmetic against the published formulas in floating point, at many lengths."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ca2st.errors import UserInputError
from ca2st.spec import ClipSpec
from pipelines import views as sampling
from pipelines.augment.config import AugmentConfig
from pipelines.views import ClipFacts, SamplingConfig, ShortClip, TrainDraws
from support.refusals import forced

lengths = st.integers(1, 700)
frame_counts = st.sampled_from([2, 8, 16, 32])
fractions = st.floats(0, 1, exclude_max=True)


def published_dense(n: int, start: int, frames: int = 16, stride: int = 4) -> list[int]:
    """The reference's own arithmetic for a window that starts at `start`, in NumPy floats."""
    if n <= frames * stride:
        points = np.linspace(0, n, num=n // stride)
        points = np.concatenate((points, np.ones(frames - n // stride) * n))
        return np.clip(points, 0, n - 1).astype(np.int64).tolist()
    end = start + frames * stride
    return np.clip(np.linspace(start, end, num=frames), start, end - 1).astype(np.int64).tolist()


@given(n=lengths, u=fractions)
def test_dense_training_is_the_published_window(n: int, u: float) -> None:
    found = sampling.dense_window(n, num_frames=16, stride=4, u=u)
    start = int(u * (n - 64)) if n > 64 else 0
    assert list(found) == published_dense(n, start)


@given(n=st.integers(65, 700))
def test_a_dense_window_reaches_both_ends_of_the_published_range(n: int) -> None:
    last = np.nextafter(1.0, 0.0)
    assert sampling.dense_window(n, num_frames=16, stride=4, u=0.0)[0] == 0
    assert sampling.dense_window(n, num_frames=16, stride=4, u=last)[0] == n - 1 - 64


@given(n=lengths, frames=frame_counts, stride=st.integers(1, 9), u=fractions)
def test_dense_indices_rise_and_stay_inside_the_clip(n: int, frames: int, stride: int, u: float) -> None:
    for found in (
        sampling.dense_window(n, num_frames=frames, stride=stride, u=u),
        sampling.dense_window(n, num_frames=frames, stride=stride, u=0.5),
    ):
        assert len(found) == frames
        assert list(found) == sorted(found)
        assert found[0] >= 0
        assert found[-1] < n


@pytest.mark.parametrize("n", [65, 66, 100, 300, 301])
def test_dense_validation_is_the_centred_window_every_time(n: int) -> None:
    found = sampling.dense_window(n, num_frames=16, stride=4, u=0.5)
    assert list(found) == published_dense(n, (n - 64) // 2)
    before, after = found[0], n - 1 - found[-1]
    assert abs(before - after) <= 1


@given(n=lengths, clips=st.integers(1, 5))
def test_dense_test_clips_are_the_published_ones(n: int, clips: int) -> None:
    points = list(range(0, n, 4))
    points += [points[-1]] * (16 - len(points))
    for clip in range(clips):
        start = int(clip * max((len(points) - 16) / (clips - 1), 0)) if clips > 1 else (len(points) - 16) // 2
        found = sampling.dense_test(n, num_frames=16, stride=4, clip=clip, num_clips=clips)
        assert list(found) == points[start : start + 16]


@given(n=lengths, numbers=st.lists(fractions, min_size=16, max_size=16))
def test_uniform_training_takes_one_frame_of_every_segment(n: int, numbers: list[float]) -> None:
    found = sampling.uniform_train(n, num_frames=16, uniforms=numbers)
    segment = n // 16
    if segment:
        assert all(i * segment <= index < (i + 1) * segment for i, index in enumerate(found))
    else:
        assert set(found) == set(range(n))
        assert list(found) == sorted(found)


@pytest.mark.parametrize("n", [16, 17, 24, 31])
def test_uniform_training_of_16_to_31_frames_takes_the_first_sixteen(n: int) -> None:
    assert sampling.uniform_train(n, num_frames=16, uniforms=[0.99] * 16) == tuple(range(16))


@pytest.mark.parametrize("n", [1, 7, 15])
def test_a_short_clip_repeats_its_first_frame_only_by_the_reference_rule(n: int) -> None:
    facts = ClipFacts(key="k", frame_ticks=np.arange(n, dtype=np.int32) * 3000, mel_rows=0)

    def frames(short_clip: ShortClip) -> tuple[int, ...]:
        config = SamplingConfig(scheme="uniform", short_clip=short_clip)
        (view,) = TrainDraws(clip=ClipSpec(), sampling=config, augment=AugmentConfig(), seed=0, epoch=0).views(facts)
        return view.frame_indices

    assert frames("reference") == (0,) * 16
    assert set(frames("spread")) == set(range(n))


@given(n=lengths, frames=frame_counts)
def test_uniform_validation_takes_segment_centres(n: int, frames: int) -> None:
    found = sampling.uniform_test(n, num_frames=frames, clip=0, num_clips=1)
    assert all(abs(index + 0.5 - n / frames * (i + 0.5)) <= 0.5 + 1e-9 for i, index in enumerate(found))
    assert 0 <= found[0] <= found[-1] < n


@given(n=lengths, clips=st.integers(1, 5))
def test_uniform_test_clips_are_the_published_ones(n: int, clips: int) -> None:
    for clip in range(clips):
        found = sampling.uniform_test(n, num_frames=16, clip=clip, num_clips=clips)
        shift = clip / clips if clips > 1 else 0.5
        exact = [n / 16 * (i + shift) for i in range(16)]
        # Equal to the float formula wherever that is not on the very edge between two frames.
        assert all(index == int(x) or abs(x - round(x)) < 1e-9 for index, x in zip(found, exact, strict=True))
        assert 0 <= found[0] <= found[-1] < n


def test_two_uniform_test_clips_are_segment_starts_and_middles() -> None:
    starts, middles = (sampling.uniform_test(160, num_frames=16, clip=clip, num_clips=2) for clip in (0, 1))
    assert starts == tuple(range(0, 160, 10))
    assert middles == tuple(range(5, 160, 10))


@pytest.mark.parametrize(
    ("rate", "stride"), [(23.976, 4), (25.0, 4), (30.0, 4), (50.0, 7), (59.94, 8), (60.0, 8), (15.0, 2), (5.0, 1)]
)
def test_the_stride_keeps_its_time_at_other_frame_rates(rate: float, stride: int) -> None:
    assert sampling.scaled_stride(4, rate) == stride


def test_the_frame_rate_comes_from_stored_times() -> None:
    def rate(ticks: list[int]) -> float:
        return sampling.frames_per_second(np.array(ticks, np.int32))

    assert rate([0, 1500, 3000]) == pytest.approx(60)
    assert rate([100, 3103, 6106]) == pytest.approx(29.97, abs=1e-3)
    assert rate([0]) == rate([5, 5]) == 30


@pytest.mark.parametrize("rate", [10.0, 12.5, 15.0, 24.0, 25.0, 29.97, 30.0, 48.0, 50.0, 59.94, 60.0, 90.0, 120.0])
def test_a_dense_window_spans_about_the_same_time_at_every_rate(rate: float) -> None:
    stride = sampling.scaled_stride(4, rate)
    n = round(20 * rate)
    found = sampling.dense_window(n, num_frames=16, stride=stride, u=0.5)
    seconds = (found[-1] - found[0]) / rate
    nominal = 64 / 30
    # 23.5 to 36 frames per second count as 30; elsewhere the stride is off by at most half a frame.
    assert seconds == pytest.approx(nominal, rel=0.5 / stride + 0.05 if not 23.5 <= rate <= 36 else 0.3)


@pytest.mark.parametrize(("frames", "stride"), [(16, 4), (8, 4), (32, 2), (16, 7), (2, 1)])
def test_a_dense_window_shows_what_is_on_screen_at_evenly_spaced_moments(frames: int, stride: int) -> None:
    span = frames * stride
    for n in range(1, 2 * span + 9):
        found = sampling.dense_window(n, num_frames=frames, stride=stride, u=0.5)
        if n > span:  # moments on the window's time line, its end included; a frame is on screen until the next
            moments = [(n - span) // 2 + Fraction(i, frames - 1) * span for i in range(frames)]
            last = (n - span) // 2 + span - 1
        else:  # so many moments on the clip's, then its last frame
            moments = [Fraction(i * n, max(n // stride - 1, 1)) for i in range(n // stride)]
            moments += [Fraction(n)] * (frames - len(moments))
            last = n - 1
        shown = [max(frame for frame in range(last + 1) if frame <= moment) for moment in moments]
        assert list(found) == shown


@pytest.mark.parametrize(("frames", "stride"), [(16, 4), (8, 3), (32, 2)])
def test_dense_test_clips_are_runs_of_the_thinned_clip_whose_ends_are_both_reached(frames: int, stride: int) -> None:
    for n in range(1, 3 * frames * stride):
        thinned = [frame for frame in range(n) if frame % stride == 0]
        while len(thinned) < frames:
            thinned.append(thinned[-1])
        runs = [tuple(thinned[start : start + frames]) for start in range(len(thinned) - frames + 1)]
        for clips in (1, 2, 3, 5):
            found = [
                sampling.dense_test(n, num_frames=frames, stride=stride, clip=c, num_clips=clips) for c in range(clips)
            ]
            places = [Fraction(c, clips - 1) for c in range(clips)] if clips > 1 else [Fraction(1, 2)]
            assert found == [runs[int(place * (len(runs) - 1))] for place in places]
            if clips > 1:
                assert (found[0], found[-1]) == (runs[0], runs[-1])


@pytest.mark.parametrize("frames", [2, 8, 16, 32])
def test_uniform_frames_lie_where_cutting_the_clip_into_segments_puts_them(frames: int) -> None:
    for n in range(1, 3 * frames + 2):
        starts = sampling.uniform_train(n, num_frames=frames, uniforms=[0.0] * frames)
        ends = sampling.uniform_train(n, num_frames=frames, uniforms=[0.999] * frames)
        if n >= frames:  # whole segments of n // frames; what is left over at the end is not drawn from
            segments = [list(range(n))[i * (n // frames) : (i + 1) * (n // frames)] for i in range(frames)]
            assert list(starts) == [segment[0] for segment in segments]
            assert list(ends) == [segment[-1] for segment in segments]
        else:
            counts = [starts.count(frame) for frame in range(n)]
            assert starts == ends
            assert max(counts) - min(counts) <= 1
        for clips in (1, 2, 3, 5):
            for clip in range(clips):
                moments = [
                    Fraction(n, frames) * (i + (Fraction(clip, clips) if clips > 1 else Fraction(1, 2)))
                    for i in range(frames)
                ]
                shown = [moment.numerator // moment.denominator for moment in moments]
                assert list(sampling.uniform_test(n, num_frames=frames, clip=clip, num_clips=clips)) == shown


@pytest.mark.parametrize(("clips", "crops"), [(1, 1), (2, 3), (5, 3), (3, 2)])
def test_spectrograms_of_test_views_are_cut_at_the_exact_published_row(clips: int, crops: int) -> None:
    views = clips * crops
    for room in range(0, 1300, 7):
        found = [
            sampling.mel_start(
                400 + room,
                rows_read=400,
                fraction=sampling.mel_test_fraction(clip=c, crop=k, num_clips=clips, num_crops=crops),
            )
            for c in range(clips)
            for k in range(crops)
        ]
        assert found == [(view + 3) * room // (views + 6) for view in range(views)]
        assert found == sorted(found)
        assert sampling.mel_start(400 + room, rows_read=400, fraction=0.5) == room // 2


@given(rows=st.integers(0, 3000), fraction=fractions)
def test_a_spectrogram_crop_stays_inside_or_starts_at_zero(rows: int, fraction: float) -> None:
    start = sampling.mel_start(rows, rows_read=400, fraction=fraction)
    assert start == 0 if rows <= 400 else 0 <= start <= rows - 400


def test_spectrograms_of_test_views_are_cut_where_published() -> None:
    places = [sampling.mel_test_fraction(clip=c, crop=k, num_clips=2, num_crops=3) for c in (0, 1) for k in (0, 1, 2)]
    assert places == pytest.approx([3 / 12, 4 / 12, 5 / 12, 6 / 12, 7 / 12, 8 / 12])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"scheme": "dens"},
            r"sampling.scheme: expected one of dense, uniform, found 'dens' \(did you mean 'dense'\?\)",
        ),
        ({"short_clip": "loop"}, "sampling.short_clip: expected one of reference, spread"),
        ({"frame_stride": 0}, "sampling.frame_stride: expected at least 1, found 0"),
    ],
)
def test_a_wrong_sampling_configuration_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserInputError, match=message):
        forced(SamplingConfig(), **values)
