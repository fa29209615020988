"""Rounds: in every one ours and the baseline take a turn, so that a busy moment of the machine falls on both."""

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch

from ca2st.cores import num_cores
from pipelines.augment.config import AugmentConfig
from pipelines.benchmark.baseline import BaselineConfig
from pipelines.benchmark.case import BaselineCase, Consumer, LoaderCase, OwnCase, Turn
from pipelines.benchmark.config import LoaderBenchConfig
from pipelines.benchmark.headspace import NORMALISE, measure_headspace, normalise
from pipelines.benchmark.report import LoaderBenchmark, SplitReport, Spread, spread
from pipelines.draws import EvaluationViews
from pipelines.loader import EvaluationLoader, TrainLoader
from pipelines.loader_config import LoaderConfig
from pipelines.sampling import SamplingConfig
from sharding.shard_set import ShardSet

Variant = Literal["ours", "baseline"]
Update = Callable[[int, str], None]
NUM_STEPS = 3
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

    `consumer` stands behind the training loader when headspace is measured; `update` hears what is next.

    Raises:
        UserInputError: fewer samples than a batch, or a file without a video.
        CA2STError: whatever the loaders refuse.
    """
    load_before = os.getloadavg()[0]
    device = torch.device("cuda") if torch.cuda.is_available() else None
    with _train_loader(config, shard_set, device) as train, _evaluation_loader(config, shard_set, device) as validation:
        update(0, "training")
        train_report = _split_report(config, OwnCase(train), files, training=True)
        update(1, "validation")
        validation_report = _split_report(config, OwnCase(validation), files, training=False)
        update(2, "headspace")
        headspace = measure_headspace(
            train,
            consumer,
            name=consumer_name,
            loader_clips_per_second=train_report.clips_per_second,
            seconds=config.seconds / config.rounds,
        )
        update(NUM_STEPS, "")
    return LoaderBenchmark(
        train=train_report,
        validation=validation_report,
        headspace=headspace,
        backend=train.backend_name,
        threads=_threads(config),
        num_clips=shard_set.manifest.num_samples,
        codec=shard_set.manifest.video.codec,
        source_bytes_per_clip=sum(file.stat().st_size for file in files) / max(1, len(files)),
        shard_bytes_per_clip=sum(shard.bytes for shard in shard_set.shards) / shard_set.manifest.num_samples,
        load_before=load_before,
    )


def augment_config(rand_augment: bool) -> AugmentConfig:
    """The published training transform, with or without RandAugment."""
    return AugmentConfig(rand_augment="rand-m7-n4-mstd0.5-inc1") if rand_augment else AugmentConfig()


def _train_loader(config: LoaderBenchConfig, shard_set: ShardSet, device: torch.device | None) -> TrainLoader:
    return TrainLoader(
        shard_set,
        config.clip,
        shard_set.manifest.targets,
        SamplingConfig(),
        augment_config(config.rand_augment),
        _loader_config(config),
        seed=0,
        global_batch_size=config.batch_size,
        device=device,
    )


def _evaluation_loader(config: LoaderBenchConfig, shard_set: ShardSet, device: torch.device | None) -> EvaluationLoader:
    return EvaluationLoader(
        shard_set,
        config.clip,
        shard_set.manifest.targets,
        SamplingConfig(),
        EvaluationViews(),
        _loader_config(config),
        global_batch_size=config.batch_size,
        device=device,
    )


def _loader_config(config: LoaderBenchConfig) -> LoaderConfig:
    return LoaderConfig(backend=config.backend, decode_threads=_threads(config))


def _threads(config: LoaderBenchConfig) -> int:
    return config.threads or num_cores()


def _split_report(config: LoaderBenchConfig, ours: LoaderCase, files: Sequence[Path], *, training: bool) -> SplitReport:
    cases: dict[Variant, LoaderCase] = {"ours": ours}
    if config.baseline:
        baseline = BaselineConfig(
            clip=config.clip,
            training=training,
            rand_augment=config.rand_augment,
            batch_size=config.batch_size,
            num_workers=_threads(config),
        )
        cases["baseline"] = BaselineCase(files, baseline)
    turns = take_turns(cases, rounds=config.rounds, seconds=config.seconds / config.rounds)
    mine, theirs = turns["ours"], turns.get("baseline", [])
    rates, whole = _rates(mine), _added(mine)
    ratios = [a.clips_per_second / b.clips_per_second for a, b in zip(mine, theirs, strict=False)]
    return SplitReport(
        clips_per_second=rates.median,
        baseline_clips_per_second=_rates(theirs).median if theirs else None,
        ratio=spread(ratios) if theirs else None,
        stages=whole.stages_ms(),
        baseline_stages=_added(theirs).stages_ms() if theirs else None,
        rounds=rates,
        baseline_rounds=_rates(theirs) if theirs else None,
        processor_ms_per_clip=_processor_ms(mine),
        baseline_processor_ms_per_clip=_processor_ms(theirs) if theirs else None,
        bytes_per_clip=whole.bytes_read / whole.clips,
    )


def _processor_ms(turns: Sequence[Turn]) -> float:
    whole = _added(turns)
    return 1000 * whole.processor_seconds / whole.clips


def _rates(turns: Sequence[Turn]) -> Spread:
    return spread([turn.clips_per_second for turn in turns])


def take_turns(cases: Mapping[Variant, LoaderCase], *, rounds: int, seconds: float) -> dict[Variant, list[Turn]]:
    """Each case once a round; a first pass of each, not counted, starts threads and workers."""
    for case in cases.values():
        case.turn(0.0)
    turns: dict[Variant, list[Turn]] = {variant: [] for variant in cases}
    for _ in range(rounds):
        for variant, case in cases.items():
            turns[variant].append(case.turn(seconds))
    return turns


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
