"""Sound cut to the segment (C6) and its spectrogram (C17)."""

import io
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sharding.errors import MediaError
from sharding.format.shard_set import AudioParameters
from sharding.media.audio import EncodedAudio, log_mel, no_spectrogram, npy_bytes
from support.media import Sound, make_clip, remux
from support.sound import RATE, convert_one, pcm_of, sounding

PARAMETERS = AudioParameters(policy="required")


def loudest_hz(pcm: np.ndarray) -> float:
    return float(np.abs(np.fft.rfft(pcm)).argmax() * RATE / len(pcm))


@pytest.mark.parametrize("rate", [8000, 16_000, 24_000, 44_100, 48_000, 96_000])
@pytest.mark.parametrize("layout", ["mono", "stereo", "5.1"])
def test_any_rate_and_layout_becomes_mono_of_the_exact_length_pitch_and_loudness(
    tmp_path: Path, rate: int, layout: str
) -> None:
    path = make_clip(tmp_path / "a.mkv", sound=Sound(seconds=1, rate=rate, layout=layout, codec="flac"))
    result = convert_one(path)
    assert result.audio is not None
    assert len(result.audio.pcm) == RATE
    assert (result.audio.source_rate_hz, result.audio.source_channels) == (
        rate,
        {"mono": 1, "stereo": 2, "5.1": 6}[layout],
    )
    assert loudest_hz(result.audio.pcm) == pytest.approx(1000, abs=1)
    assert np.abs(result.audio.pcm).max() == pytest.approx(0.5, abs=0.01)


def test_sound_that_starts_later_is_preceded_by_silence_and_keeps_the_time_base(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "a.mkv", seconds=2, sound=Sound(seconds=1, delay_seconds=0.3, codec="flac"))
    pcm = pcm_of(path)
    assert len(pcm) == pytest.approx(1.3 * RATE, abs=16)
    assert sounding(pcm) == pytest.approx((0.3, 1.3), abs=0.002)
    assert not pcm[: int(0.29 * RATE)].any()


def test_sound_that_starts_earlier_than_the_picture_is_cut(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "a.mkv", seconds=2, sound=Sound(seconds=1, delay_seconds=-0.25, codec="flac"))
    assert len(pcm_of(path)) == pytest.approx(0.75 * RATE, abs=16)


def test_sound_shorter_than_the_picture_is_not_padded_at_the_end(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "a.mkv", seconds=2, sound=Sound(seconds=0.7, codec="flac"))
    result = convert_one(path)
    assert result.audio is not None
    assert len(result.audio.pcm) == pytest.approx(0.7 * RATE, abs=1)
    assert result.duration_seconds == pytest.approx(2)


@pytest.mark.parametrize(("start", "end"), [(0.5, 1.5), (5.0, 6.0), (4.123, 7.5), (7.5, 9.0)])
@pytest.mark.parametrize("codec", ["flac", "aac"])
def test_a_segment_sounds_like_the_same_part_of_the_whole(tmp_path: Path, start: float, end: float, codec: str) -> None:
    path = make_clip(
        tmp_path / f"a.{'mp4' if codec == 'aac' else 'mkv'}", seconds=8, sound=Sound(seconds=8, codec=codec)
    )
    whole, part = pcm_of(path), pcm_of(path, start, end)
    expected = whole[round(start * RATE) : round(end * RATE)]
    assert abs(len(part) - len(expected)) <= 1
    shared = min(len(part), len(expected))
    half_a_sample = 0.5 * np.pi * 1000 / RATE * 1.05  # of a sine of 1 kHz and amplitude .5, at its steepest
    assert np.abs(part[:shared] - expected[:shared]).max() <= half_a_sample


def test_a_segment_without_sound_in_it_has_no_audio(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "a.mkv", seconds=4, sound=Sound(seconds=1, codec="flac"))
    with pytest.raises(MediaError, match="an audio stream without samples there") as caught:
        convert_one(path, 2.0, 3.0)
    assert caught.value.reason == "no_audio"
    assert convert_one(path, 2.0, 3.0, audio_policy="optional").audio is None


def test_the_three_policies_treat_a_file_without_sound(tmp_path: Path) -> None:
    mute = make_clip(tmp_path / "mute.mp4")
    loud = make_clip(tmp_path / "loud.mp4", sound=Sound())
    with pytest.raises(MediaError, match="found no audio stream; --audio optional accepts it"):
        convert_one(mute)
    assert convert_one(mute, audio_policy="optional").audio is None
    assert convert_one(loud, audio_policy="optional").audio is not None
    assert convert_one(loud, audio_policy="none").audio is None


def test_damaged_sound_is_rejected_unless_sound_is_not_read(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "a.mkv", seconds=1, sound=Sound(codec="flac"))
    data = bytearray(path.read_bytes())
    frames = [at for at in range(len(data)) if data[at : at + 2] == b"\xff\xf8"]
    for at in frames[5:]:
        data[at + 8 : at + 40] = bytes(32)
    (tmp_path / "b.mkv").write_bytes(data)
    with pytest.raises(MediaError) as caught:
        convert_one(tmp_path / "b.mkv")
    assert caught.value.reason == "decode_error"
    assert convert_one(tmp_path / "b.mkv", audio_policy="none").audio is None


def test_a_gap_in_the_track_stays_a_gap_of_silence(tmp_path: Path) -> None:
    whole = make_clip(tmp_path / "a.mkv", seconds=2, sound=Sound(seconds=2, codec="flac"))
    holed = remux(whole, tmp_path / "b.mkv", lambda kind, at: None if kind == "audio" and 0.5 <= at < 1.0 else at)
    pcm = pcm_of(holed)
    assert len(pcm) == pytest.approx(2 * RATE, abs=32)
    assert not pcm[round(0.65 * RATE) : round(0.95 * RATE)].any()
    assert np.abs(pcm[round(1.2 * RATE) : round(1.9 * RATE)]).max() == pytest.approx(0.5, abs=0.01)


def kaldi_by_numpy(pcm: np.ndarray, rate: int, num_bins: int = 128) -> np.ndarray:
    """The filter bank from its definition, in float64."""
    length, shift = round(0.025 * rate), round(0.010 * rate)
    size = 1 << (length - 1).bit_length()
    pcm = pcm.astype(np.float64) - pcm.mean()
    rows = []
    for at in range(0, len(pcm) - length + 1, shift):
        frame = pcm[at : at + length] - pcm[at : at + length].mean()
        frame = frame - 0.97 * np.concatenate([frame[:1], frame[:-1]])
        frame = frame * (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(length) / (length - 1)))
        rows.append(np.abs(np.fft.rfft(frame, size)) ** 2)

    def mel(hz: np.ndarray) -> np.ndarray:
        return 1127 * np.log(1 + hz / 700)

    edges = np.linspace(mel(np.array(20.0)), mel(np.array(rate / 2)), num_bins + 2)
    places = mel(np.arange(size // 2) * rate / size)
    rising = (places[None] - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - places[None]) / (edges[2:] - edges[1:-1])[:, None]
    filters = np.maximum(0, np.minimum(rising, falling))
    power = np.array(rows)[:, : size // 2] @ filters.T
    return np.log(np.maximum(power, np.finfo(np.float32).eps))


def speech_like(seconds: float, rate: int, seed: int = 0) -> np.ndarray:
    times = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(seed).normal(0, 0.02, len(times))
    return (0.3 * np.sin(2 * np.pi * (200 + 900 * times) * times) * (1 + np.sin(9 * times)) / 2 + noise).astype(
        np.float32
    )


@pytest.mark.parametrize("rate", [16_000, 24_000])
def test_the_spectrogram_agrees_with_its_definition_within_half_precision(rate: int) -> None:
    pcm = speech_like(1.0, rate)
    mel = log_mel(pcm, AudioParameters(policy="required", sample_rate_hz=rate))
    expected = kaldi_by_numpy(pcm, rate)
    assert mel.shape == expected.shape == (98, 128)
    assert mel.dtype == np.float16
    assert np.abs(mel.astype(np.float64) - expected).max() <= 0.02  # float16 holds -16..16 to 0.008


@settings(max_examples=25, deadline=None)
@given(num_samples=st.integers(1, 6000))
@example(num_samples=2)
def test_rows_follow_from_the_length_and_any_sound_has_at_least_one(num_samples: int) -> None:
    mel = log_mel(speech_like(1, RATE)[:num_samples] + np.float32(0.1), PARAMETERS)
    assert len(mel) == 1 + max(0, num_samples - 400) // 160


def is_silent(pcm: np.ndarray) -> bool:
    return EncodedAudio(pcm=pcm, source_rate_hz=RATE, source_channels=1).is_silent


def test_silence_is_a_floor_and_is_known_to_be_silence() -> None:
    for value in (0.0, 0.25):
        pcm = np.full(RATE, value, np.float32)
        assert is_silent(pcm)
        assert np.unique(log_mel(pcm, PARAMETERS)).size == 1
    assert not is_silent(speech_like(1, RATE))
    one_step = np.zeros(RATE, np.float32)
    one_step[5] = 1 / 32768
    assert not is_silent(one_step), "one step of 16-bit sound is something to hear"
    assert is_silent(one_step / 2)


@pytest.mark.parametrize("place", [0, RATE - 1, RATE - 30])
def test_a_click_at_the_edge_of_silence_is_no_fault(place: int) -> None:
    pcm = np.zeros(RATE, np.float32)
    pcm[place] = 0.5
    assert len(log_mel(pcm, PARAMETERS)) == 98


def test_c17_a_spectrogram_that_shows_nothing_of_the_sound_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    floor = np.full((98, 128), np.log(np.finfo(np.float32).eps), np.float32)
    monkeypatch.setattr("sharding.media.audio._filter_bank", lambda *_: floor)
    with pytest.raises(MediaError, match=r"expected a picture of the sound, found -15.9.* everywhere"):
        log_mel(speech_like(1, RATE), PARAMETERS)
    assert len(log_mel(np.zeros(RATE, np.float32), PARAMETERS)) == 98


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_c17_samples_that_are_no_numbers_are_rejected(bad: float) -> None:
    pcm = speech_like(1, RATE)
    pcm[100] = bad
    with pytest.raises(MediaError, match="found NaN or infinity") as caught:
        log_mel(pcm, PARAMETERS)
    assert caught.value.reason == "bad_spectrogram"


@pytest.mark.parametrize(
    ("value", "message"), [(np.nan, "found NaN or infinity"), (np.inf, "found NaN"), (2.0, "found 2.0 everywhere")]
)
def test_c17_a_wrong_spectrogram_is_refused(value: float, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sharding.media.audio._filter_bank", lambda *_: np.full((98, 128), value, np.float32))
    for pcm in (np.zeros(RATE, np.float32), speech_like(1, RATE)):
        with pytest.raises(MediaError, match=message) as caught:
            log_mel(pcm, PARAMETERS)
        assert caught.value.reason == "bad_spectrogram"


def test_a_spectrogram_round_trips_through_npy_and_none_is_empty() -> None:
    mel = log_mel(speech_like(0.5, RATE), PARAMETERS)
    assert np.array_equal(np.load(io.BytesIO(npy_bytes(mel)), allow_pickle=False), mel)
    empty = np.load(io.BytesIO(npy_bytes(no_spectrogram(PARAMETERS))))
    assert (empty.shape, empty.dtype) == ((0, 128), np.float16)


def test_the_caller_keeps_its_torch_threads() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        log_mel(speech_like(0.1, RATE), PARAMETERS)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_rows_and_frames_share_their_first_moment(tmp_path: Path) -> None:
    """A tone that starts with frame 15 starts in the row of that frame's tick."""
    path = make_clip(tmp_path / "a.mkv", seconds=2, sound=Sound(seconds=1, delay_seconds=0.5, codec="flac"))
    result = convert_one(path, 0.25, 1.75)
    assert result.audio is not None
    mel = log_mel(result.audio.pcm, PARAMETERS).astype(np.float32)
    first_loud = int(np.flatnonzero(mel.max(axis=1) > 0)[0])
    tick = next(tick for tick in result.video.frame_ticks if Fraction(tick, 90_000) >= Fraction(1, 4))
    assert abs(first_loud * 0.010 + 0.0125 - tick / 90_000) <= 0.015
