"""``make bench-scale``: the process of a conversion at the size of 100 million samples, with simulated workers.

The list is made up sample by sample and never in memory. Everything that the conversion's own process does is real:
check and hash the list, plan the shards, cut and pickle every task, take every result, keep ``sources.jsonl``, write
the table of shards and the manifest. Only the workers are not: a shard is made at once and has no bytes.
"""

import hashlib
import pickle
import resource
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Annotated, Self, overload

import typer

from benchmarks.programs import make_command
from ray_jobs.bench_report import bench_facts, write_report
from ray_jobs.cli import main
from ray_jobs.commands.options import Json, Out
from ray_jobs.console import require_writable_place
from sharding.conversion import convert
from sharding.folder import DoneShard
from sharding.format.shard_set import LabelSpace, ShardEntry
from sharding.format.writer import ShardRange, shard_name
from sharding.settings import ConversionConfig
from sharding.shard_task import MadeShard, OnSample, ShardSetup, ShardTask
from sharding.source import SourceList, SourceSample

app = typer.Typer(add_completion=False)
_CLASSES = 400
_CLIPS_PER_FILE = 10


@dataclass(frozen=True, slots=True)
class SimulatedSamples(Sequence[SourceSample]):
    """Clips of 4 to 13 s, ten from each file; made when they are asked for."""

    num_samples: int
    path: Path

    def __len__(self) -> int:
        return self.num_samples

    @overload
    def __getitem__(self, at: int) -> SourceSample: ...
    @overload
    def __getitem__(self, at: slice) -> list[SourceSample]: ...
    def __getitem__(self, at: int | slice) -> SourceSample | list[SourceSample]:
        if isinstance(at, slice):
            return [self._sample(position) for position in range(*at.indices(self.num_samples))]
        return self._sample(range(self.num_samples)[at])

    def __iter__(self) -> Iterator[SourceSample]:
        return map(self._sample, range(self.num_samples))

    def _sample(self, position: int) -> SourceSample:
        start = 15.0 * (position % _CLIPS_PER_FILE)
        return SourceSample(
            sample_id=f"video_{position:09d}",
            path=self.path,
            start_seconds=start,
            end_seconds=start + 4.0 + position % 10,
            labels=(position % _CLASSES,),
            where="simulated",
        )


class _SimulatedWorkers:
    """Takes tasks as a real pool does, and has made each at once."""

    def __init__(self, setup: ShardSetup, _num_tasks: int) -> None:
        self._setup = setup

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing was started."""

    def run(self, tasks: Iterable[ShardTask], *, on_sample: OnSample) -> Iterator[MadeShard]:
        del on_sample
        for task in tasks:
            digest = hashlib.sha256(pickle.dumps(task)).hexdigest()
            count = len(task.samples)
            entry = ShardEntry(
                name=shard_name(task.number),
                bytes=10**9,
                sha256=digest,
                index_bytes=10**6,
                index_sha256=digest[::-1],
                num_samples=count,
            )
            covers = ShardRange(first=task.first, end=task.first + count, rejects=())
            shard = DoneShard(entry=entry, covers=covers, conversion=self._setup.identity, num_with_audio=count)
            states = tuple((10**7, 1_700_000_000_000_000_000 + place) for place in range(count))
            yield pickle.loads(
                pickle.dumps(MadeShard(number=task.number, num_sources=count, shard=shard, states=states))
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ScaleBenchmark:
    """What the process of a conversion needs, beside its workers."""

    num_samples: int
    num_shards: int
    conversion_seconds: float
    conversion_cpu_seconds: float
    cpu_microseconds_per_sample: float
    memory_before_bytes: int
    """Most memory of the process before, imports included."""
    memory_peak_bytes: int
    sources_bytes: int
    """Size of ``sources.jsonl``."""


def measure_scale(num_samples: int, work: Path) -> ScaleBenchmark:
    """Run the driver of a conversion of `num_samples` simulated samples in the folder `work`."""
    video = work / "video.mp4"
    video.touch()
    space = LabelSpace(name="label", classes=tuple(f"class {number}" for number in range(_CLASSES)))
    source = SourceList(
        dataset="simulated",
        split="train",
        label_spaces=(space,),
        targets=("label",),
        samples=SimulatedSamples(num_samples, video),
    )
    config, before = ConversionConfig(), _memory_peak()
    begin, cpu = time.perf_counter(), time.process_time()
    report = convert(source, work / "set", config, pool=_SimulatedWorkers)
    took, cpu = time.perf_counter() - begin, time.process_time() - cpu
    return ScaleBenchmark(
        num_samples=report.num_samples,
        num_shards=report.num_shards,
        conversion_seconds=took,
        conversion_cpu_seconds=cpu,
        cpu_microseconds_per_sample=1e6 * cpu / num_samples,
        memory_before_bytes=before,
        memory_peak_bytes=_memory_peak(),
        sources_bytes=(work / "set" / "sources.jsonl").stat().st_size,
    )


def _memory_peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@app.command(epilog="Example: make bench-scale ARGS='--samples 1000000'")
def bench(
    samples: Annotated[int, typer.Option(min=1, help="Samples of the simulated list.")] = 1_000_000,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Measure memory and time of a conversion's own process, its workers simulated."""
    if out is not None:
        require_writable_place(out, "--out")
    with tempfile.TemporaryDirectory(prefix="ca2st-scale-") as folder:
        found = measure_scale(samples, Path(folder))
    facts = bench_facts(asdict(found), command=make_command("bench-scale", sys.argv[1:]), device="cpu")
    lines = [
        f"{found.num_samples} samples in {found.num_shards} shards",
        f"  {found.conversion_seconds:.0f} s, {found.conversion_cpu_seconds:.0f} of them on the processor, "
        f"{found.cpu_microseconds_per_sample:.1f} microseconds per sample",
        f"  {found.memory_peak_bytes / 1e9:.2f} GB of memory at most, {found.memory_before_bytes / 1e9:.2f} before",
    ]
    write_report(facts, lines, out=out, as_json=as_json)


if __name__ == "__main__":
    main(app)
