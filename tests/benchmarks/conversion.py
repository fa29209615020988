"""``make bench-convert``: the converter beside FFmpeg and beside the plain loop that people write first, in turns.

FFmpeg does the least there is to do, on one thread: decode, scale, a JPEG per frame, 16 kHz sound. The plain loop is
one process: PyAV, Pillow, torchaudio, webdataset's ShardWriter; no strict decoding, no checks, no index, no resuming:
every frame as a JPEG member, the log-mel spectrogram as an npy. Each way is what its user would start: the command
``ca2st shard build``, ``ffmpeg`` for each file, a Python script. Processor time is that of all processes of a way.
Each way converts all files and a quarter of them: the difference is what a clip takes without the start.
"""

import csv
import io
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import av
import numpy as np
import torch
import typer
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from benchmarks.programs import make_command
from ca2st.benchmark.measure import spread
from ca2st.errors import UserInputError
from ca2st.processes import SPAWN, num_cores
from pipelines.benchmark.clips import source_list
from ray_jobs.bench_data import source_files, work_folder
from ray_jobs.bench_report import bench_facts, write_report
from ray_jobs.cli import main
from ray_jobs.commands.machine import Clips, Codec, Media, Work
from ray_jobs.commands.options import Json, Out
from ray_jobs.console import progress, require_writable_place
from sharding.format.shard_set import AudioParameters
from sharding.settings import LEAST_SHARD_BYTES, TRAILER_BYTES, ConversionConfig, plan_shards


@dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    """One way to convert all files; the medians of its rounds."""

    seconds: float
    """From the start of its process to its end."""
    cpu_seconds: float
    clips_per_second: float
    bytes_per_clip: float
    seconds_per_further_clip: float
    """Without the start: of the files beyond a quarter of them."""
    cpu_seconds_per_further_clip: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversionBenchmark:
    """The converter beside FFmpeg and the plain loop."""

    ways: Mapping[str, Way]
    """``workers``, ``one worker``, ``ffmpeg`` where it is installed, ``baseline``."""
    clips_per_second: float
    """With all workers."""
    baseline_clips_per_second: float
    """One process: PyAV, Pillow, torchaudio, webdataset's ShardWriter."""
    workers_speedup: float
    """Wall time of one worker over that of all, starts included."""
    workers_speedup_per_further_clip: float
    share_of_ffmpeg: float | None
    """Processor time of FFmpeg over that of one worker, starts included: 1 is as fast per core; None without FFmpeg."""
    share_of_ffmpeg_per_further_clip: float | None
    workers: int
    num_clips: int
    num_shards: int
    codec: str
    load_before: float
    """The machine's load average over the minute before; wall times mean something on an idle machine only."""


_JPEG_QUALITY = 85
"""About the size of the converter's quantiser 5."""


app = typer.Typer(add_completion=False)


@app.command(epilog='Example: make bench-convert ARGS="--clips 8 --json"')
def bench(
    clips: Clips = 24,
    rounds: Annotated[int, typer.Option(min=1, help="Conversions in each way.")] = 2,
    codec: Codec = "mjpeg",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Decoding processes; default: the machine's cores.")
    ] = None,
    media: Media = None,
    work: Work = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Measure clips per second and processor time of `ca2st shard build`, beside FFmpeg and a plain loop.

    The baseline is one process: PyAV, Pillow, torchaudio, webdataset's ShardWriter, without a check of anything.
    """
    config = ConversionConfig(codec=codec, workers=workers or num_cores())
    if out is not None:
        require_writable_place(out, "--out")
    with work_folder(work) as folder:
        files = source_files(clips, media, folder)
        with progress("Converting", rounds * len(_WAYS)) as update:
            found = benchmark_conversion(config, files, folder, rounds=rounds, update=update)
    facts = bench_facts(asdict(found), command=make_command("bench-convert", sys.argv[1:]))
    write_report(facts, _lines(found), out=out, as_json=as_json)


def _lines(found: ConversionBenchmark) -> list[str]:
    lines = [
        f"{found.num_clips} clips to {found.codec}, {found.num_shards} shards; load before: {found.load_before:.1f}"
    ]
    lines.append(f"  {'':<12}{'seconds':>9}{'processor':>11}{'clips/s':>9}   each further clip, and processor time")
    for name, way in found.ways.items():
        named = f"{found.workers} workers" if name == "workers" else name
        whole = f"{way.seconds:9.1f}{way.cpu_seconds:11.1f}{way.clips_per_second:9.2f}"
        further = f"{way.seconds_per_further_clip:7.3f}{way.cpu_seconds_per_further_clip:8.3f}"
        lines.append(f"  {named:<12}{whole}   {further}")
    speedup, without_start = found.workers_speedup, found.workers_speedup_per_further_clip
    lines.append(f"{found.workers} workers are {speedup:.2f}x one worker, {without_start:.2f}x without the start")
    if found.share_of_ffmpeg is not None:
        share = f"{found.share_of_ffmpeg:.2f} of FFmpeg's speed per core"
        lines.append(f"one worker has {share}, {found.share_of_ffmpeg_per_further_clip:.2f} without the start")
    return lines


def convert_plainly(files: Sequence[Path], out: Path, *, short_side: int, audio: AudioParameters) -> int:
    """Write `files` as a WebDataset under the new folder `out`; returns its bytes."""
    from webdataset import ShardWriter

    out.mkdir()
    with ShardWriter(str(out / "plain-%06d.tar"), verbose=0) as writer:
        for number, file in enumerate(files):
            frames = {f"{i:05d}.jpg": jpeg for i, jpeg in enumerate(_jpegs(file, short_side))}
            mel = _log_mel(file, audio)
            writer.write({"__key__": f"{number:06d}", **frames, "mel.npy": mel, "json": {"source": file.name}})
    return sum(path.stat().st_size for path in out.iterdir())


def _jpegs(file: Path, short_side: int) -> list[bytes]:
    jpegs = []
    with av.open(str(file)) as container:
        for frame in container.decode(video=0):
            picture = Image.fromarray(frame.to_ndarray(format="rgb24"))
            scale = min(1.0, short_side / min(picture.size))
            if scale < 1:
                picture = picture.resize([round(side * scale) for side in picture.size], Image.Resampling.BICUBIC)
            sink = io.BytesIO()
            picture.save(sink, "JPEG", quality=_JPEG_QUALITY)
            jpegs.append(sink.getvalue())
    return jpegs


def _log_mel(file: Path, audio: AudioParameters) -> np.ndarray[tuple[int, int], np.dtype[np.float16]]:
    from torchaudio.compliance.kaldi import fbank
    from torchaudio.functional import resample

    with av.open(str(file)) as container:
        if not container.streams.audio:
            return np.zeros((0, audio.num_mel_bins), np.float16)
        rate = container.streams.audio[0].rate
        blocks = [frame.to_ndarray() for frame in container.decode(audio=0)]
    wave: Float[Tensor, "1 samples"] = torch.from_numpy(np.concatenate(blocks, axis=1)).float().mean(0, keepdim=True)
    wave = resample(wave, rate, audio.sample_rate_hz)
    rows = fbank(
        wave - wave.mean(),
        sample_frequency=audio.sample_rate_hz,
        num_mel_bins=audio.num_mel_bins,
        htk_compat=True,
        use_energy=False,
        window_type="hanning",
        dither=0.0,
    )
    return np.asarray(rows.numpy(), dtype=np.float16)


def convert_by_ffmpeg(files: Sequence[Path], out: Path, *, short_side: int, quality: int) -> int:
    """Have FFmpeg decode `files` on one thread into JPEGs and 16 kHz sound in the new folder `out`; returns bytes."""
    out.mkdir()
    scale = f"scale='if(gt(iw,ih),-2,min(iw,{short_side}))':'if(gt(iw,ih),min(ih,{short_side}),-2)'"
    for number, file in enumerate(files):
        command = ["ffmpeg", "-v", "error", "-threads", "1", "-filter_threads", "1", "-i", f"file:{file}"]
        command += ["-map", "0:v:0", "-vf", scale, "-c:v", "mjpeg", "-q:v", str(quality), "-pix_fmt", "yuvj420p"]
        command += ["-threads", "1", str(out / f"{number}.mov")]
        command += ["-map", "0:a:0?", "-ac", "1", "-ar", "16000", "-c:a", "pcm_s16le", str(out / f"{number}.wav")]
        _run(command)
    return sum(path.stat().st_size for path in out.iterdir())


Update = Callable[[int, str], None]
_WAYS = ("workers", "one worker", "ffmpeg", "baseline")
_SHARDS_PER_WORKER = 2
_PARTS = 4


def benchmark_conversion(
    config: ConversionConfig,
    files: Sequence[Path],
    work: Path,
    *,
    rounds: int = 2,
    update: Update = lambda _done, _note: None,
) -> ConversionBenchmark:
    """Convert `files` under the folder `work` in each way, `rounds` times in turn; what was written is removed.

    The shards are cut so that every worker has two. `update` hears how many conversions are done.

    Raises:
        UserInputError: fewer than four files.
        RuntimeError: a way ended with an error.
    """
    if len(files) < _PARTS:
        raise UserInputError(f"expected at least {_PARTS} video files, found {len(files)}; name more, or draw them")
    load_before, source = os.getloadavg()[0], source_list(files)
    each = plan_shards(source, config).num_bytes / (_SHARDS_PER_WORKER * config.workers)
    config = replace(config, shard_bytes=max(LEAST_SHARD_BYTES, min(config.shard_bytes, round(each) + TRAILER_BYTES)))
    ways = [way for way in _WAYS if way != "ffmpeg" or shutil.which("ffmpeg")]
    passed: dict[str, list[Way]] = {way: [] for way in ways}
    for number in range(rounds * len(ways)):
        way = ways[number % len(ways)]
        update(number, way)
        passed[way].append(_measured(way, config, files, work / "converted"))
    update(rounds * len(ways), "")
    medians = {
        way: Way(**{name: spread([getattr(one, name) for one in found]).median for name in asdict(found[0])})
        for way, found in passed.items()
    }
    all_workers, one, ffmpeg = medians["workers"], medians["one worker"], medians.get("ffmpeg")
    return ConversionBenchmark(
        ways=medians,
        clips_per_second=all_workers.clips_per_second,
        baseline_clips_per_second=medians["baseline"].clips_per_second,
        workers_speedup=one.seconds / all_workers.seconds,
        workers_speedup_per_further_clip=one.seconds_per_further_clip / all_workers.seconds_per_further_clip,
        share_of_ffmpeg=ffmpeg.cpu_seconds / one.cpu_seconds if ffmpeg else None,
        share_of_ffmpeg_per_further_clip=(
            ffmpeg.cpu_seconds_per_further_clip / one.cpu_seconds_per_further_clip if ffmpeg else None
        ),
        workers=config.workers,
        num_clips=len(files),
        num_shards=len(plan_shards(source, config)),
        codec=config.codec,
        load_before=load_before,
    )


def _measured(way: str, config: ConversionConfig, files: Sequence[Path], out: Path) -> Way:
    """Convert all files and a quarter of them in one of `_WAYS`."""
    part = files[: len(files) // _PARTS]
    part_seconds, part_cpu, _ = _converted(way, config, part, out)
    seconds, cpu_seconds, num_bytes = _converted(way, config, files, out)
    further = len(files) - len(part)
    return Way(
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        clips_per_second=len(files) / seconds,
        bytes_per_clip=num_bytes / len(files),
        seconds_per_further_clip=(seconds - part_seconds) / further,
        cpu_seconds_per_further_clip=(cpu_seconds - part_cpu) / further,
    )


def _converted(way: str, config: ConversionConfig, files: Sequence[Path], out: Path) -> tuple[float, float, int]:
    """Convert in processes of its own; returns seconds, processor seconds, and bytes that were written."""
    begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    try:
        if way == "ffmpeg":
            convert_by_ffmpeg(files, out, short_side=config.short_side, quality=config.video.quality)
        elif way == "baseline":
            _convert_plainly_elsewhere(files, out, config)
        else:
            _build(files, out, config if way == "workers" else replace(config, workers=1))
        seconds, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu_seconds = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
        return seconds, cpu_seconds, sum(path.stat().st_size for path in out.iterdir())
    finally:
        shutil.rmtree(out, ignore_errors=True)


def _build(files: Sequence[Path], out: Path, config: ConversionConfig) -> None:
    """Run the command that a user runs, on a list of the files."""
    media = os.path.commonpath([file.parent for file in files])
    listing = out.with_suffix(".csv")
    with listing.open("w", newline="") as sink:
        rows = csv.writer(sink)
        rows.writerow(("path", "label"))
        rows.writerows((file.relative_to(media), number % 2) for number, file in enumerate(files))
    command = [sys.executable, "-m", "ray_jobs.cli", "shard", "build", "--dataset", "csv", "--media", media]
    command += ["--annotations", str(listing), "--codec", config.codec, "--audio", "optional", "--out", str(out)]
    command += ["--workers", str(config.workers), "--shard-size", f"{config.shard_bytes}B"]
    try:
        _run(command)
    finally:
        listing.unlink()


def _convert_plainly_elsewhere(files: Sequence[Path], out: Path, config: ConversionConfig) -> None:
    from benchmarks import conversion  # this module, by a name that a child can import when it is the main script

    job = partial(conversion.convert_plainly, files, out, short_side=config.short_side, audio=config.audio)
    process = SPAWN.Process(target=job, daemon=False)
    process.start()
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"the plain loop ended with {process.exitcode}")


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")


if __name__ == "__main__":
    main(app)
