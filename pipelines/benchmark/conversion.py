"""The converter beside the plain loop, on the same files, in turns."""

import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipelines.benchmark.plain_conversion import convert_plainly
from pipelines.benchmark.report import ConversionBenchmark, spread
from pipelines.benchmark.sources import source_list
from sharding.conversion import ConversionConfig
from sharding.convert import convert
from sharding.shard_set import read_shard_set

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
