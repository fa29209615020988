"""``make bench-convert``: the converter beside the plain loop that people write first, on the same files, in turns.

The plain loop is one process: PyAV, Pillow, torchaudio, webdataset's ShardWriter. No strict decoding, no checks, no
index, no resuming: every frame as a JPEG member, the log-mel spectrogram as an npy.
"""

import io
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
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
from ca2st.processes import num_cores
from pipelines.benchmark.clips import source_list
from ray_jobs.bench_report import bench_facts, source_files, work_folder, write_report
from ray_jobs.cli import main
from ray_jobs.commands.machine import Clips, Codec, Media, Work
from ray_jobs.commands.options import Json, Out
from ray_jobs.console import progress, require_writable_place
from sharding.conversion import convert
from sharding.format.shard_set import AudioParameters, read_shard_set
from sharding.settings import ConversionConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversionBenchmark:
    """The converter beside the plain loop."""

    clips_per_second: float
    """On all cores: how one converts."""
    one_worker_clips_per_second: float
    """With one decoding process beside the writing one."""
    baseline_clips_per_second: float
    """One process: PyAV, Pillow, torchaudio, webdataset's ShardWriter."""
    ratio: float
    """`clips_per_second` over the baseline's."""
    workers: int
    """Decoding processes of the first figure."""
    num_clips: int
    codec: str
    shard_bytes_per_clip: float
    baseline_bytes_per_clip: float
    load_before: float
    """The machine's load average over the minute before."""


_JPEG_QUALITY = 85
"""About the size of the converter's quantiser 5."""


app = typer.Typer(add_completion=False)


@app.command(epilog='Example: make bench-convert ARGS="--clips 8 --json"')
def bench(
    clips: Clips = 12,
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
    """Measure clips per second of `ca2st shard build`, beside a plain loop in the same run.

    The baseline is one process: PyAV, Pillow, torchaudio, webdataset's ShardWriter, without a check of anything.
    """
    config = ConversionConfig(codec=codec, workers=workers or num_cores(), audio_policy="optional")
    if out is not None:
        require_writable_place(out, "--out")
    with work_folder(work) as folder:
        files = source_files(clips, media, folder)
        with progress("Converting", rounds * len(_VARIANTS)) as update:
            found = benchmark_conversion(config, files, folder, rounds=rounds, update=update)
    facts = bench_facts(asdict(found), command=make_command("bench-convert", sys.argv[1:]))
    write_report(facts, _lines(found), out=out, as_json=as_json)


def _lines(found: ConversionBenchmark) -> list[str]:
    return [
        f"{found.num_clips} clips to {found.codec}; load before: {found.load_before:.1f}",
        f"  {found.workers} workers  {found.clips_per_second:7.2f} clips/s  {found.ratio:.2f}x the baseline",
        f"  1 worker   {found.one_worker_clips_per_second:7.2f} clips/s",
        f"  baseline   {found.baseline_clips_per_second:7.2f} clips/s",
    ]


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


Update = Callable[[int, str], None]
_VARIANTS = ("all cores", "one worker", "baseline")


@dataclass(frozen=True, slots=True)
class _Passed:
    seconds: float
    bytes_per_clip: float


def benchmark_conversion(
    config: ConversionConfig,
    files: Sequence[Path],
    work: Path,
    *,
    rounds: int = 2,
    update: Update = lambda _done, _note: None,
) -> ConversionBenchmark:
    """Convert `files` under the folder `work` in each way, `rounds` times in turn; what was written is removed.

    `config.workers` decode in the first way. Wall times from the call to the finished manifest, processes' starts
    included. `update` hears how many of ``rounds * 3`` conversions are done.

    Raises:
        CA2STError: whatever the converter refuses.
    """
    load_before = os.getloadavg()[0]
    passed: dict[str, list[_Passed]] = {variant: [] for variant in _VARIANTS}
    for number in range(rounds * len(_VARIANTS)):
        variant = _VARIANTS[number % len(_VARIANTS)]
        update(number, variant)
        passed[variant].append(_convert(variant, config, files, work / "converted"))
    update(rounds * len(_VARIANTS), "")
    rates = {
        variant: spread([len(files) / one.seconds for one in of_variant]).median
        for variant, of_variant in passed.items()
    }
    return ConversionBenchmark(
        clips_per_second=rates["all cores"],
        one_worker_clips_per_second=rates["one worker"],
        baseline_clips_per_second=rates["baseline"],
        ratio=rates["all cores"] / rates["baseline"],
        workers=config.workers,
        num_clips=len(files),
        codec=config.codec,
        shard_bytes_per_clip=passed["all cores"][0].bytes_per_clip,
        baseline_bytes_per_clip=passed["baseline"][0].bytes_per_clip,
        load_before=load_before,
    )


def _convert(variant: str, config: ConversionConfig, files: Sequence[Path], out: Path) -> _Passed:
    begin = time.perf_counter()
    try:
        if variant == "baseline":
            num_bytes = convert_plainly(files, out, short_side=config.short_side, audio=config.audio)
        else:
            workers = config.workers if variant == "all cores" else 1
            convert(source_list(files), out, replace(config, workers=workers))
            num_bytes = sum(shard.bytes for shard in read_shard_set(out).shards)
        return _Passed(time.perf_counter() - begin, num_bytes / len(files))
    finally:
        shutil.rmtree(out, ignore_errors=True)


if __name__ == "__main__":
    main(app)
