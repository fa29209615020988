"""The loaders measured beside a torch DataLoader: in every round ours and the baseline take a turn.

So a busy moment of the machine falls on both. Then: is it data or compute? The loader alone, the consumer alone on one
batch again and again, and both together.
"""

import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import torch

from ca2st.batch import ClipBatch
from ca2st.benchmark.measure import Spread, spread
from ca2st.errors import UserInputError
from ca2st.processes import SPAWN, num_cores
from ca2st.spec import ClipSpec
from pipelines.augment.config import AugmentConfig
from pipelines.benchmark.clips import (
    PEAK,
    PROCESSOR,
    RAND_AUGMENT,
    STAGES,
    BaselineConfig,
    Stack,
    make_dataloader,
    peak_bytes,
    torchcodec_missing,
)
from pipelines.config import BackendName, EvaluationSetup, LoaderConfig, TrainSetup
from pipelines.errors import check_range
from pipelines.loader import EvaluationLoader, TrainLoader
from sharding.format.shard_set import ShardSet


@dataclass(frozen=True, kw_only=True, slots=True)
class LoaderBenchConfig:
    """A benchmark of the training and the validation loader."""

    seconds: float = 20.0
    """Measured time of each variant in training, and again in validation."""
    rounds: int = 3
    """Turns that this time is cut into: the variants take them in turn, and the median round counts."""
    batch_size: int = 8
    """Clips of a batch."""
    threads: int | None = None
    """Threads that decode, and workers of the baseline. None: the cores this process may use."""
    backend: BackendName = "auto"
    """As in a recipe."""
    rand_augment: bool = True
    """Train with RandAugment (rand-m7-n4-mstd0.5-inc1), ours and the baseline alike."""
    baseline: bool = True
    """Measure the baseline too, and torchcodec's where that is installed."""
    footprint: bool = True
    """Measure memory and the time to the first batch too, each in a process of its own."""
    clip: ClipSpec = field(default_factory=ClipSpec)
    """Sizes of a view. Default: 16 frames of 224 pixels, 4 s of sound."""

    def __post_init__(self) -> None:
        if not 0 < self.seconds < float("inf"):
            raise UserInputError(f"seconds: expected a finite number > 0, found {self.seconds}")
        check_range(self, "", "rounds", "batch_size", "threads", low=1)

    @property
    def num_threads(self) -> int:
        """`threads`, resolved."""
        return self.threads or num_cores()


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitReport:
    """One loader, training or validation."""

    clips_per_second: float
    """Median of the rounds; whole passes by their wall time, with what it takes to begin and to end them."""
    baseline_clips_per_second: float | None
    """The same of the baseline; None where it was not measured."""
    ratio: Spread | None
    """Ours over the baseline, round by round."""
    stages: Mapping[str, float]
    """Milliseconds per clip by stage: thread time, which several threads spend at once; ``wait_ms`` is the
    consumer's."""
    baseline_stages: Mapping[str, float] | None
    """Milliseconds per clip by stage, of a worker."""
    rounds: Spread
    baseline_rounds: Spread | None
    processor_ms_per_clip: float
    """Processor time of all threads: on a busy machine it says more than the rate."""
    baseline_processor_ms_per_clip: float | None
    """The same of the baseline and its workers."""
    bytes_per_clip: float
    """Read by ours."""
    torchcodec: "TorchcodecReport | None" = None
    """The second baseline; None where it was not measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TorchcodecReport:
    """The second baseline: torchcodec and torchvision v2 in a DataLoader."""

    clips_per_second: float
    ratio: Spread
    """Ours over it, round by round."""
    stages: Mapping[str, float]
    """Milliseconds per clip by stage, of a worker."""
    processor_ms_per_clip: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Footprint:
    """A training loader in a fresh process."""

    first_batch_seconds: float
    """From making it to its first batch, workers' starts and imports included."""
    process_bytes: int
    """Most memory of the process that takes the batches (VmHWM), imports included."""
    worker_bytes: int
    """The most of one worker process; 0: it has none."""
    num_workers: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Headspace:
    """Is it data or compute? Rates of the training loader and of a consumer, apart and together."""

    consumer: str
    loader_clips_per_second: float
    """Without a consumer: the most the data can give."""
    consumer_clips_per_second: float
    """The same batch again and again: the most the consumer can take."""
    together_clips_per_second: float
    """The loader feeding the consumer."""
    data_wait_fraction: float
    """Part of that time in which the consumer waited."""
    limited_by: Literal["data", "compute"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LoaderBenchmark:
    """Both loaders, and what they were measured on."""

    train: SplitReport
    validation: SplitReport
    headspace: Headspace
    backend: str
    """The backend in use, ``auto`` resolved."""
    threads: int
    """Decoding threads, and workers of the baseline."""
    num_clips: int
    codec: str
    source_bytes_per_clip: float
    """Of the original files, sound included."""
    shard_bytes_per_clip: float
    torchcodec_missing: str | None
    """Why the second baseline was not measured; None: it was, or no baseline was asked for."""
    footprints: Mapping[str, Footprint]
    load_before: float
    """The machine's load average over the minute before: well below one per core, or others were computing too."""


Consumer = Callable[[ClipBatch], None]
"""What is done with a batch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """What one stretch of running gave."""

    clips: int
    seconds: float
    processor_seconds: float
    """Processor time of all threads and workers: what counts where others use the machine too."""
    stage_seconds: Mapping[str, float]
    """By stage, added up over threads or workers."""
    bytes_read: int = 0

    @property
    def clips_per_second(self) -> float:
        """The rate."""
        return self.clips / self.seconds

    @property
    def processor_ms_per_clip(self) -> float:
        """Milliseconds of processor time."""
        return 1000 * self.processor_seconds / self.clips

    def stages_ms(self) -> dict[str, float]:
        """Return the milliseconds per clip, by stage: ``decode_ms``."""
        return {f"{name}_ms": 1000 * seconds / self.clips for name, seconds in self.stage_seconds.items()}


@runtime_checkable
class LoaderCase(Protocol):
    """Ours or the baseline."""

    def turn(self, seconds: float) -> Turn:
        """Run for at least that long, in whole passes, so that nothing still runs at the end."""
        ...


class OwnCase:
    """Our loader, pass after pass."""

    def __init__(self, loader: TrainLoader | EvaluationLoader, *, consumer: Consumer | None = None) -> None:
        self._loader, self._consumer, self._epoch = loader, consumer, 0

    def turn(self, seconds: float) -> Turn:
        """See `LoaderCase`; clips of padding are not counted."""
        before, begin, processor, clips = self._loader.stats, time.perf_counter(), time.process_time(), 0
        while time.perf_counter() - begin < seconds or not clips:
            if isinstance(self._loader, EvaluationLoader):
                batches = self._loader.batches()
            else:
                batches = self._loader.batches(self._epoch)
                self._epoch += 1
            for batch in batches:
                clips += int((~batch.is_padding).sum())
                if self._consumer is not None:
                    self._consumer(batch)
        passed, counted = time.perf_counter() - begin, self._loader.stats - before
        stages = {name: value for name, value in counted.totals().items() if name.endswith("_seconds")}
        stages["wait_seconds"] = counted.wait_seconds
        return Turn(
            clips=clips,
            seconds=passed,
            processor_seconds=time.process_time() - processor,
            stage_seconds={name.removesuffix("_seconds"): value for name, value in stages.items()},
            bytes_read=counted.bytes_read,
        )


class BaselineCase:
    """The baseline, a batch per worker at a time: when a turn ends no worker has anything left to do."""

    def __init__(self, files: Sequence[Path], config: BaselineConfig) -> None:
        self._dataloader = make_dataloader(files, config)

    def turn(self, seconds: float) -> Turn:
        """See `LoaderCase`."""
        begin, processor, clips, spent = time.perf_counter(), time.process_time(), 0, Counter[str]()
        while time.perf_counter() - begin < seconds or not clips:
            for video, costs in self._dataloader:
                clips += len(video)
                spent.update(dict(zip((*STAGES, PROCESSOR, PEAK), costs.sum(dim=0).tolist(), strict=True)))
        workers = spent.pop(PROCESSOR) if self._dataloader.num_workers else 0.0  # without workers it is this process's
        return Turn(
            clips=clips,
            seconds=time.perf_counter() - begin,
            processor_seconds=time.process_time() - processor + workers,
            stage_seconds={stage: spent[stage] for stage in STAGES},
        )


NORMALISE = "normalise: to the device, as the normalised float frames that the experts read"


def normalise(batch: ClipBatch) -> None:
    """Do what every step does with a batch first, on the GPU where there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch.to(device).normalised_video()
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure_headspace(
    loader: TrainLoader, consumer: Consumer, *, name: str, loader_clips_per_second: float, seconds: float
) -> Headspace:
    """Measure the consumer alone and fed by the loader, each for about `seconds`.

    `loader_clips_per_second` is the loader's rate with no consumer, measured already.
    """
    batches = loader.batches(0)
    batch = next(batches)
    batches.close()  # type: ignore[attr-defined]  # a generator: its threads must not run beside what is measured
    consumer(batch)  # the first one warms up
    begin, clips = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds or not clips:
        consumer(batch)
        clips += batch.num_clips
    alone = clips / (time.perf_counter() - begin)
    together = OwnCase(loader, consumer=consumer).turn(seconds)
    return Headspace(
        consumer=name,
        loader_clips_per_second=loader_clips_per_second,
        consumer_clips_per_second=alone,
        together_clips_per_second=together.clips_per_second,
        data_wait_fraction=together.stage_seconds["wait"] / together.seconds,
        limited_by="data" if loader_clips_per_second < alone else "compute",
    )


def footprint_of_ours(config: LoaderBenchConfig, shard_set: ShardSet) -> Footprint:
    """Measure our training loader, in this process."""
    begin = time.perf_counter()
    with _train_loader(config, shard_set, None) as loader:
        batches = loader.batches(0)
        next(batches)
        first = time.perf_counter() - begin
        for _, _batch in zip(range(_FOOTPRINT_BATCHES), batches, strict=False):
            pass
        return Footprint(first_batch_seconds=first, process_bytes=peak_bytes(), worker_bytes=0, num_workers=0)


def footprint_of_baseline(files: Sequence[Path], config: BaselineConfig) -> Footprint:
    """Measure a baseline in training, in this process and its workers."""
    begin, first, worker = time.perf_counter(), 0.0, 0
    dataloader = make_dataloader(files, config)
    for _ in range(-(-_FOOTPRINT_BATCHES // max(1, config.num_workers))):
        for _video, costs in dataloader:
            first = first or time.perf_counter() - begin
            worker = max(worker, int(costs[:, -1].max()))
    return Footprint(
        first_batch_seconds=first,
        process_bytes=peak_bytes(),
        worker_bytes=worker if config.num_workers else 0,
        num_workers=config.num_workers,
    )


_FOOTPRINT_BATCHES = 8


def _footprints(
    config: LoaderBenchConfig, shard_set: ShardSet, files: Sequence[Path], stacks: Sequence[Stack]
) -> dict[str, Footprint]:
    """Measure every loader in a process of its own, one after the other."""

    def fresh(measure: Callable[..., Footprint], *arguments: object) -> Footprint:
        # A worker of a pool could have no children of its own.
        with ProcessPoolExecutor(1, mp_context=SPAWN) as pool:
            return pool.submit(measure, *arguments).result()

    found = {"ours": fresh(footprint_of_ours, config, shard_set)}
    for stack in stacks:
        found[stack] = fresh(footprint_of_baseline, files, _baseline_config(config, stack, training=True))
    return found


Variant = Literal["ours", "pyav", "torchcodec"]
Update = Callable[[int, str], None]
NUM_STEPS = 4
"""How often `update` is called."""


def benchmark_loader(
    config: LoaderBenchConfig,
    shard_set: ShardSet,
    files: Sequence[Path],
    *,
    consumer: Consumer = normalise,
    consumer_name: str = NORMALISE,
    update: Update = lambda _done, _note: None,
) -> LoaderBenchmark:
    """Measure both loaders on `shard_set`, and the baseline on the original `files` of the same clips.

    `consumer` takes the training batches when headspace is measured; `update` is called with what comes next.

    Raises:
        UserInputError: fewer samples than a batch, or a file without a video.
        CA2STError: whatever the loaders refuse.
    """
    load_before = os.getloadavg()[0]
    missing = torchcodec_missing() if config.baseline else None
    stacks: list[Stack] = [] if not config.baseline else ["pyav"] if missing else ["pyav", "torchcodec"]
    device = torch.device("cuda") if torch.cuda.is_available() else None
    evaluation = EvaluationSetup(
        shard_set=shard_set,
        clip=config.clip,
        targets=shard_set.manifest.targets,
        loader=LoaderConfig(backend=config.backend, decode_threads=config.num_threads),
        global_batch_size=config.batch_size,
        device=device,
    )
    with _train_loader(config, shard_set, device) as train, EvaluationLoader(evaluation) as validation:
        update(0, "training")
        train_report = _split_report(config, OwnCase(train), files, stacks, training=True)
        update(1, "validation")
        validation_report = _split_report(config, OwnCase(validation), files, stacks, training=False)
        update(2, "headspace")
        headspace = measure_headspace(
            train,
            consumer,
            name=consumer_name,
            loader_clips_per_second=train_report.clips_per_second,
            seconds=config.seconds / config.rounds,
        )
    update(3, "memory and start")
    footprints = _footprints(config, shard_set, files, stacks) if config.footprint else {}
    update(NUM_STEPS, "")
    return LoaderBenchmark(
        train=train_report,
        validation=validation_report,
        headspace=headspace,
        backend=train.backend_name,
        threads=config.num_threads,
        num_clips=shard_set.manifest.num_samples,
        codec=shard_set.manifest.video.codec,
        source_bytes_per_clip=sum(file.stat().st_size for file in files) / max(1, len(files)),
        shard_bytes_per_clip=sum(shard.bytes for shard in shard_set.shards) / shard_set.manifest.num_samples,
        torchcodec_missing=missing,
        footprints=footprints,
        load_before=load_before,
    )


def take_turns(cases: Mapping[Variant, LoaderCase], *, rounds: int, seconds: float) -> dict[Variant, list[Turn]]:
    """Run each case once per round; a first pass of each, not counted, starts threads and workers."""
    for case in cases.values():
        case.turn(0.0)
    turns: dict[Variant, list[Turn]] = {variant: [] for variant in cases}
    for _ in range(rounds):
        for variant, case in cases.items():
            turns[variant].append(case.turn(seconds))
    return turns


def _train_loader(config: LoaderBenchConfig, shard_set: ShardSet, device: torch.device | None) -> TrainLoader:
    return TrainLoader(
        TrainSetup(
            shard_sets=[shard_set],
            clip=config.clip,
            targets=shard_set.manifest.targets,
            augment=AugmentConfig(rand_augment=RAND_AUGMENT if config.rand_augment else None),
            loader=LoaderConfig(backend=config.backend, decode_threads=config.num_threads),
            seed=0,
            global_batch_size=config.batch_size,
            device=device,
        )
    )


def _baseline_config(config: LoaderBenchConfig, stack: Stack, *, training: bool) -> BaselineConfig:
    return BaselineConfig(
        clip=config.clip,
        training=training,
        rand_augment=config.rand_augment,
        batch_size=config.batch_size,
        num_workers=config.num_threads,
        stack=stack,
    )


def _split_report(
    config: LoaderBenchConfig, own: LoaderCase, files: Sequence[Path], stacks: Sequence[Stack], *, training: bool
) -> SplitReport:
    cases: dict[Variant, LoaderCase] = {"ours": own}
    for stack in stacks:
        cases[stack] = BaselineCase(files, _baseline_config(config, stack, training=training))
    turns = take_turns(cases, rounds=config.rounds, seconds=config.seconds / config.rounds)
    whole = {variant: _added(made) for variant, made in turns.items()}
    rates = {variant: spread([turn.clips_per_second for turn in made]) for variant, made in turns.items()}
    ours, theirs, second = whole["ours"], whole.get("pyav"), whole.get("torchcodec")

    def ratio(variant: Variant) -> Spread:
        pairs = zip(turns["ours"], turns[variant], strict=True)
        return spread([mine.clips_per_second / other.clips_per_second for mine, other in pairs])

    return SplitReport(
        clips_per_second=rates["ours"].median,
        baseline_clips_per_second=rates["pyav"].median if theirs else None,
        ratio=ratio("pyav") if theirs else None,
        stages=ours.stages_ms(),
        baseline_stages=theirs.stages_ms() if theirs else None,
        rounds=rates["ours"],
        baseline_rounds=rates.get("pyav"),
        processor_ms_per_clip=ours.processor_ms_per_clip,
        baseline_processor_ms_per_clip=theirs.processor_ms_per_clip if theirs else None,
        bytes_per_clip=ours.bytes_read / ours.clips,
        torchcodec=TorchcodecReport(
            clips_per_second=rates["torchcodec"].median,
            ratio=ratio("torchcodec"),
            stages=second.stages_ms(),
            processor_ms_per_clip=second.processor_ms_per_clip,
        )
        if second
        else None,
    )


def _added(turns: Sequence[Turn]) -> Turn:
    stages = Counter[str]()
    for turn in turns:
        stages.update(dict(turn.stage_seconds))
    return Turn(
        clips=sum(turn.clips for turn in turns),
        seconds=sum(turn.seconds for turn in turns),
        processor_seconds=sum(turn.processor_seconds for turn in turns),
        stage_seconds=dict(stages),
        bytes_read=sum(turn.bytes_read for turn in turns),
    )
