"""Conversion measured beside a plain loop.

The plain loop that people write first: one process, PyAV, Pillow, torchaudio, webdataset's ShardWriter.

No strict decoding, no checks, no index, no resuming: every frame as a JPEG member, the log-mel spectrogram as an npy.

The converter beside the plain loop, on the same files, in turns.
"""

import io
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import av
import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from pipelines.benchmark.clips import source_list
from pipelines.benchmark.report import ConversionBenchmark, spread
from sharding.conversion import convert
from sharding.format.shard_set import AudioParameters, read_shard_set
from sharding.settings import ConversionConfig

_JPEG_QUALITY = 85
"""About the size of the converter's quantiser 5."""


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


def num_conversions(rounds: int) -> int:
    """How often `update` is called, but for the last time."""
    return rounds * len(_VARIANTS)


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
