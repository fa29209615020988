"""Sound lies where its timestamps say, whole or from a seek alike, and ends with the clip (C6)."""

import json
import tarfile
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest

from ca2st.spec import ClipSpec
from pipelines.views import ClipFacts, EvaluationDraws, EvaluationViews, SamplingConfig
from sharding.conversion import convert
from sharding.errors import MediaError
from sharding.format.shard_set import AudioParameters
from sharding.media.audio import log_mel
from support.media import Sound, joined, make_clip, remux
from support.shards import sample, small_config, source_list
from support.sound import RATE, beeps_of, convert_one, pcm_of, sounding

BEEPS = tuple(0.5 + second for second in range(8))
CLOCK_OF_MATROSKA = 0.0015  # timestamps are rounded to 1 ms, samples of the result to 1/16 ms


@pytest.fixture(scope="module")
def beeping(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight seconds with a beep half-way through each."""
    sound = Sound(seconds=8, codec="flac", beeps=BEEPS)  # frames of 96 ms: no muxer takes times that decrease
    return make_clip(tmp_path_factory.mktemp("beeps") / "a.mkv", seconds=8, fps=10, sound=sound)


def moved_from(source: Path, target: Path, seconds: float, by: float) -> Path:
    """With the sound from `seconds` on dated `by` seconds later, or earlier where negative."""
    return remux(source, target, lambda kind, at: at + by if kind == "audio" and at >= seconds else at)


@pytest.mark.parametrize("by", [0.007, 0.02, 0.04, 0.06, 0.3, -0.007, -0.02, -0.04, -0.06])
def test_sound_behind_a_gap_or_an_overlap_lies_where_its_timestamps_say(
    beeping: Path, tmp_path: Path, by: float
) -> None:
    path = moved_from(beeping, tmp_path / "b.mkv", 5, by)
    expected = [beep if beep < 5 else beep + by for beep in BEEPS]
    clip = convert_one(path)
    assert clip.audio is not None
    assert beeps_of(clip.audio.pcm) == pytest.approx(expected, abs=CLOCK_OF_MATROSKA)
    assert "gaps or overlaps in the sound" in clip.notes
    part = beeps_of(pcm_of(path, 4.2, 8, clock="first-frame"), 4.2)
    assert part == pytest.approx([beep for beep in expected if beep > 4.2], abs=CLOCK_OF_MATROSKA)
    behind = beeps_of(pcm_of(path, 6.3, 8), 6.3)
    assert behind == pytest.approx([beep for beep in expected if beep > 6.3], abs=CLOCK_OF_MATROSKA)


def test_the_spectrogram_row_of_a_beep_behind_a_gap_is_the_row_of_its_moment(beeping: Path, tmp_path: Path) -> None:
    pcm = pcm_of(moved_from(beeping, tmp_path / "b.mkv", 3, 0.04))
    mel = log_mel(pcm, AudioParameters(policy="required")).astype(np.float32).max(axis=1)
    is_loud = mel > (mel.max() + mel.min()) / 2
    rows = np.flatnonzero(is_loud[1:] & ~is_loud[:-1]) + 1
    moments = [beep + 0.04 * (beep > 3) for beep in BEEPS]
    assert np.abs(rows * 0.010 + 0.0125 - moments).max() <= 0.015  # the window's half beside its hop


def test_gaps_too_small_to_see_are_made_good_when_they_add_up(beeping: Path, tmp_path: Path) -> None:
    path = remux(beeping, tmp_path / "b.mkv", lambda kind, at: at + 0.004 * (at // 1) if kind == "audio" else at)
    found = beeps_of(pcm_of(path))
    assert found == pytest.approx([beep + 0.004 * (beep // 1) for beep in BEEPS], abs=0.0065)


def test_a_slow_clock_is_followed(tmp_path: Path) -> None:
    """44.1 kHz that run at 44.1 kHz less 3 in 10 000: 18 ms late at the end of a minute."""
    beeps = (1.5, 20.5, 40.5, 58.5)
    sound = Sound(seconds=60, rate=44_100, codec="pcm_s16le", beeps=beeps)
    whole = make_clip(tmp_path / "a.mkv", seconds=60, fps=2, sound=sound)
    slow = remux(whole, tmp_path / "b.mkv", lambda kind, at: at * 1.0003 if kind == "audio" else at)
    expected = [beep * 1.0003 for beep in beeps]
    assert beeps_of(pcm_of(slow)) == pytest.approx(expected, abs=0.0065)
    assert beeps_of(pcm_of(slow, 50, 60), 50) == pytest.approx(expected[-1:], abs=0.0065)


@pytest.mark.parametrize("most", [0.0, 0.004, 0.012], ids=["rounding", "small", "large"])
def test_jitter_of_timestamps_does_not_tear_the_sound(tmp_path: Path, most: float) -> None:
    whole = make_clip(tmp_path / "a.mkv", seconds=6, fps=10, sound=Sound(seconds=6, rate=44_100, codec="pcm_s16le"))
    draw = np.random.default_rng(0)
    path = remux(
        whole, tmp_path / "b.mkv", lambda kind, at: at + draw.uniform(0, most) if kind == "audio" and at else at
    )
    clip = convert_one(path)
    assert clip.audio is not None
    inner = clip.audio.pcm[RATE // 2 : -RATE // 2]
    turns = np.unwrap(np.angle(np.convolve(inner, np.exp(2j * np.pi * 1000 * np.arange(32) / RATE), "valid")))
    steps = np.abs(np.diff(turns) - 2 * np.pi * 1000 / RATE)
    num_tears = int((steps > 0.3).sum())
    assert num_tears == 0 if most < 0.01 else num_tears < 40


def test_a_fragmented_file_sounds_alike_from_its_start_and_from_a_seek(tmp_path: Path) -> None:
    sound = Sound(seconds=8, rate=44_100, beeps=BEEPS)
    flags = {"movflags": "frag_keyframe+empty_moov"}
    path = make_clip(tmp_path / "a.mp4", seconds=8, sound=sound, container_options=flags)
    whole = [beep for beep in beeps_of(pcm_of(path)) if beep > 4.2]
    assert beeps_of(pcm_of(path, 4.2, 8, clock="first-frame"), 4.2) == pytest.approx(whole, abs=0.001)


CONTAINERS = {
    "aac.mp4": ("libx264", Sound(rate=44_100)),
    "aac.mkv": ("libx264", Sound(rate=44_100)),
    "aac.flv": ("libx264", Sound(rate=44_100)),
    "aac.ts": ("libx264", Sound()),
    "ac3.ts": ("libx264", Sound(codec="ac3")),
    "opus.webm": ("libvpx", Sound(codec="libopus")),
    "opus.mkv": ("libx264", Sound(codec="libopus")),
    "mp3.mp4": ("libx264", Sound(codec="libmp3lame", rate=44_100)),
    "mp3.mkv": ("libx264", Sound(codec="libmp3lame", rate=44_100)),
    "pcm.avi": ("mpeg4", Sound(codec="pcm_s16le")),
    "pcm.mov": ("libx264", Sound(codec="pcm_s16be")),
    "mp2.mpg": ("mpeg2video", Sound(codec="mp2")),
    "wma.wmv": ("wmv2", Sound(codec="wmav2", rate=44_100)),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_beeps_of_any_codec_and_container_lie_within_a_row_of_their_moments(tmp_path: Path, name: str) -> None:
    codec, sound = CONTAINERS[name]
    path = make_clip(
        tmp_path / name, seconds=8, fps=25, codec=codec, sound=replace(sound, seconds=8, beeps=BEEPS), b_frames=0
    )
    assert beeps_of(pcm_of(path)) == pytest.approx(BEEPS, abs=0.008)
    assert beeps_of(pcm_of(path, 4.2, 8, clock="first-frame"), 4.2) == pytest.approx(
        [beep for beep in BEEPS if beep > 4.2], abs=0.008
    )


def test_a_clock_of_33_bits_that_wraps_does_not_matter(tmp_path: Path) -> None:
    first = 2**33 / 90_000 - 3
    sound = Sound(seconds=8, codec="ac3", beeps=BEEPS, delay_seconds=first)
    times = [first + number / 25 for number in range(200)]
    path = make_clip(tmp_path / "a.ts", fps=25, times=times, sound=sound)
    assert beeps_of(pcm_of(path)) == pytest.approx(BEEPS, abs=0.008)
    assert beeps_of(pcm_of(path, 4.2, 8, clock="first-frame"), 4.2) == pytest.approx(
        [beep for beep in BEEPS if beep > 4.2], abs=0.008
    )


@pytest.mark.parametrize(("rate", "layout"), [(44_100, "stereo"), (48_000, "mono"), (32_000, "mono")])
def test_a_rate_or_layout_that_changes_in_mid_stream_is_followed(tmp_path: Path, rate: int, layout: str) -> None:
    parts = [
        make_clip(
            tmp_path / f"{number}.mkv",
            seconds=2,
            fps=10,
            sound=replace(sound, seconds=2, codec="mp2", beeps=(0.5, 1.5)),
        )
        for number, sound in enumerate([Sound(), Sound(rate=rate, layout=layout)])
    ]
    path = joined(tmp_path / "both.mkv", parts, seconds_each=2)
    expected = [0.5, 1.5, 2.5, 3.5]
    assert beeps_of(pcm_of(path)) == pytest.approx(expected, abs=0.012)  # MPEG audio's filter bank is 10 ms long
    assert beeps_of(pcm_of(path, 3.2, 4), 3.2) == pytest.approx(expected[-1:], abs=0.012)


def test_sound_without_a_time_at_the_end_lies_behind_the_sound_before_it(tmp_path: Path) -> None:
    """Windows Media Audio: the last frame that the decoder gives back is not dated."""
    path = make_clip(tmp_path / "a.wmv", seconds=2, codec="wmv2", sound=Sound(seconds=2, codec="wmav2", rate=44_100))
    with av.open(str(path)) as container:
        assert list(container.decode(audio=0))[-1].pts is None, "the file does not show what is tested"
    pcm = pcm_of(path)
    assert len(pcm) == pytest.approx(2 * RATE, abs=0.03 * RATE)
    assert sounding(pcm)[1] == pytest.approx(2, abs=0.03)


def test_c6_sound_longer_than_the_picture_ends_one_window_behind_it(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "a.mkv", seconds=1, sound=Sound(seconds=4, codec="flac"))
    clip = convert_one(path)
    assert clip.audio is not None
    assert clip.duration_seconds == 1
    assert len(clip.audio.pcm) == round(1.025 * RATE)
    assert clip.notes == ("sound goes on behind the picture",)
    assert len(pcm_of(path, 0.5, 3)) == round(0.525 * RATE), "an annotation that goes on does not matter"
    assert len(pcm_of(path, 0.25, 0.75)) == RATE // 2


def test_c6_views_of_an_evaluation_hear_what_they_see(tmp_path: Path) -> None:
    clip = convert_one(make_clip(tmp_path / "a.mkv", seconds=2, sound=Sound(seconds=9, codec="flac")))
    assert clip.audio is not None
    mel = log_mel(clip.audio.pcm, AudioParameters(policy="required"))
    draws = EvaluationDraws(
        clip=ClipSpec(num_frames=8, crop_size=64, mel_rows=112),
        sampling=SamplingConfig(scheme="uniform"),
        view_plan=EvaluationViews(),
    )
    facts = ClipFacts(key="k", frame_ticks=np.arange(60, dtype=np.int32) * 3000, mel_rows=len(mel))
    (view,) = draws.views(facts)
    middle_of_frames = (view.frame_indices[0] + view.frame_indices[-1]) / 2 / 30
    assert (view.mel_start_row + 56) / 100 == pytest.approx(middle_of_frames, abs=0.05)


C6_KINDS: dict[str, tuple[Sound, tuple[str, ...]]] = {
    "as long as the picture": (Sound(seconds=3), ()),
    "digital silence": (Sound(seconds=3, amplitude=0.0), ("silent sound",)),
    "shorter": (Sound(seconds=2), ("sound ends early",)),
    "longer": (Sound(seconds=4), ("sound goes on behind the picture",)),
    "late": (Sound(seconds=2, delay_seconds=1), ("sound starts late",)),
    "early": (Sound(seconds=4, delay_seconds=-1), ("picture starts late",)),
    "24 bits": (Sound(seconds=3, codec="pcm_s24le"), ()),
    "float": (Sound(seconds=3, codec="pcm_f32le"), ()),
    "planar": (Sound(seconds=3, codec="aac"), ()),
    "7.1": (Sound(seconds=3, layout="7.1"), ()),
    "8 kHz": (Sound(seconds=3, rate=8000), ()),
    "96 kHz": (Sound(seconds=3, rate=96_000), ()),
}


@pytest.mark.parametrize("kind", C6_KINDS)
def test_c6_what_is_unusual_about_sound_is_noted(tmp_path: Path, kind: str) -> None:
    sound, notes = C6_KINDS[kind]
    sound = sound if sound.codec != "aac" or kind == "planar" else replace(sound, codec="pcm_s16le")
    clip = convert_one(make_clip(tmp_path / "a.mkv", seconds=3, fps=10, sound=sound), audio_policy="optional")
    assert clip.notes == notes
    assert clip.has_audio == (kind != "digital silence")
    assert clip.audio is not None
    assert len(clip.audio.pcm) == pytest.approx(RATE * {"shorter": 2, "longer": 3.025}.get(kind, 3), abs=RATE * 0.025)
    if clip.has_audio:
        assert np.abs(clip.audio.pcm[RATE : 2 * RATE - 800]).max() == pytest.approx(0.5, abs=0.02)


def test_c6_digital_silence_is_no_sound(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "a.mp4", sound=Sound(amplitude=0.0))
    with pytest.raises(MediaError, match="found digital silence; --audio optional accepts it") as caught:
        convert_one(path)
    assert caught.value.reason == "no_audio"
    assert not convert_one(path, audio_policy="optional").has_audio
    assert convert_one(path, audio_policy="none").notes == ()


def test_c6_the_report_counts_each_kind_of_sound(tmp_path: Path) -> None:
    kinds = {
        "mute": None,
        "silent": Sound(seconds=2, amplitude=0.0),
        "short": Sound(seconds=1),
        "long": Sound(seconds=3),
        "plain": Sound(seconds=2),
    }
    for name, sound in kinds.items():
        make_clip(tmp_path / f"{name}.mkv", seconds=2, fps=10, sound=sound)
    source = source_list([sample(tmp_path / f"{name}.mkv") for name in kinds])
    report = convert(source, tmp_path / "out", small_config(audio_policy="optional", shard_bytes=10**7))
    assert (report.num_samples, report.num_with_audio) == (5, 3)
    assert report.notes == {"silent sound": 1, "sound ends early": 1, "sound goes on behind the picture": 1}
    with tarfile.open(tmp_path / "out" / "ca2st-000000.tar") as tar:
        records = [json.load(tar.extractfile(one)) for one in tar if one.name.endswith(".json")]  # type: ignore[arg-type]  # files
    silent = records[list(kinds).index("silent")]["audio"]
    assert (silent["has_audio"], silent["is_silent"], silent["source_sample_rate_hz"]) == (False, True, 48_000)
