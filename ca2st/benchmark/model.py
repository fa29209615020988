"""Rounds: every one runs each variant once, so that a busy moment of the machine falls on all of them."""

import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass

import torch

from ca2st.benchmark.case import TARGETS, Case, CaseSpec, PassKind, Variant
from ca2st.benchmark.config import ModelBenchConfig, model_config
from ca2st.benchmark.limits import Limit
from ca2st.benchmark.process import case_in_process
from ca2st.benchmark.report import ModelBenchmark, ModelReport, PassReport, Plan, spread
from ca2st.errors import EnvironmentFault
from ca2st.model.info import ModelInfo, model_info
from ca2st.model.structure import bridges_of_layer

StartCase = Callable[[CaseSpec], AbstractContextManager[Case]]
Update = Callable[[int, str], None]
PASSES: tuple[PassKind, ...] = ("forward", "training")
_FEWEST_ROUNDS = 2
_FLOP_PER_MULTIPLY_ADD = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class _Timings:
    """What the rounds of one model gave, before the limit is known."""

    spec: CaseSpec
    seconds: Mapping[PassKind, Mapping[Variant, Sequence[float]]]
    peaks: Mapping[PassKind, Mapping[Variant, int]]
    limits: Sequence[Limit]


def settle(config: ModelBenchConfig) -> Plan:
    """Decide what the configuration leaves to the device.

    Raises:
        EnvironmentFault: a GPU is asked for and there is none.
    """
    has_gpu = torch.cuda.is_available()
    if config.device == "cuda" and not has_gpu:
        raise EnvironmentFault("device: expected a CUDA GPU that torch can use, found none; take --device cpu")
    on_gpu = has_gpu if config.device == "auto" else config.device == "cuda"
    compiled = on_gpu if config.compiled is None else config.compiled
    variants: dict[Variant, bool] = {"ours": True, "baseline": config.baseline, "compiled": compiled}
    return Plan(
        models=config.models,
        size=config.size,
        num_layers=config.num_layers or (None if on_gpu else 2),
        per_device_batch_size=config.per_device_batch_size or (6 if on_gpu else 1),
        rounds=config.rounds or (20 if on_gpu else 3),
        seconds=config.seconds,
        device="cuda" if on_gpu else "cpu",
        precision=config.precision or ("bf16" if on_gpu else "fp32"),
        variants=tuple(variant for variant, wanted in variants.items() if wanted),
    )


def benchmark_models(
    config: ModelBenchConfig,
    *,
    start_case: StartCase | None = None,
    update: Update = lambda _done, _note: None,
) -> ModelBenchmark:
    """Measure each model in each variant.

    `start_case` starts a case, by default in a process of its own; `update` hears how many models are done and which
    one is next.

    Raises:
        EnvironmentFault: no such device, or its memory is used up.
    """
    plan = settle(config)
    load_before = os.getloadavg()[0]
    timings = []
    for number, kind in enumerate(plan.models):
        update(number, kind)
        timings.append(_measure(plan, config, kind, start_case=start_case or case_in_process))
    update(len(plan.models), "")
    limit = max((limit for each in timings for limit in each.limits), key=lambda limit: limit.tflops)
    models = tuple(_report(plan, each, limit) for each in timings)
    first = models[0].variants
    return ModelBenchmark(
        clips_per_second=first["ours"]["training"].clips_per_second,
        baseline_clips_per_second=first["baseline"]["training"].clips_per_second if "baseline" in first else None,
        plan=plan,
        limit=limit,
        load_before=load_before,
        models=models,
    )


def _measure(plan: Plan, config: ModelBenchConfig, kind: str, *, start_case: StartCase) -> _Timings:
    specs = {
        variant: CaseSpec(
            config=model_config(kind, plan.size, num_layers=plan.num_layers),
            clip=config.clip,
            per_device_batch_size=plan.per_device_batch_size,
            device=plan.device,
            precision=plan.precision,
            variant=variant,
        )
        for variant in plan.variants
    }
    seconds: dict[PassKind, dict[Variant, list[float]]] = {}
    peaks: dict[PassKind, dict[Variant, int]] = {}
    with ExitStack() as running:
        cases = {variant: running.enter_context(start_case(spec)) for variant, spec in specs.items()}
        limits = [cases["ours"].limit()]
        for pass_kind in PASSES:
            seconds[pass_kind], peaks[pass_kind] = _time_passes(cases, pass_kind, plan)
        limits.append(cases["ours"].limit())
    return _Timings(spec=specs["ours"], seconds=seconds, peaks=peaks, limits=limits)


def _time_passes(
    cases: Mapping[Variant, Case], kind: PassKind, plan: Plan
) -> tuple[dict[Variant, list[float]], dict[Variant, int]]:
    for case in cases.values():
        case.seconds(kind)
        case.reset_peak()
    seconds: dict[Variant, list[float]] = {variant: [] for variant in cases}
    for _ in _rounds(plan):
        for variant, case in cases.items():
            seconds[variant].append(case.seconds(kind))
    return seconds, {variant: case.peak_bytes() for variant, case in cases.items()}


def _rounds(plan: Plan) -> Iterator[int]:
    start, done = time.monotonic(), 0
    while (
        done < plan.rounds if plan.seconds is None else done < _FEWEST_ROUNDS or time.monotonic() - start < plan.seconds
    ):
        yield done
        done += 1


def _report(plan: Plan, timings: _Timings, limit: Limit) -> ModelReport:
    info = model_info(timings.spec.config, timings.spec.clip, TARGETS)
    return ModelReport(
        model=timings.spec.config.kind,
        num_layers=timings.spec.config.depth,
        all_layers=model_config(timings.spec.config.kind, plan.size, num_layers=None).depth,
        bridges=_bridges(timings.spec),
        gmacs=info.gmacs,
        trainable=info.trainable,
        total=info.total,
        variants={
            variant: {kind: _pass_report(timings, variant, kind, info=info, limit=limit) for kind in PASSES}
            for variant in plan.variants
        },
    )


def _bridges(spec: CaseSpec) -> dict[str, int]:
    return dict(
        Counter(bridge.name for layer in range(spec.config.depth) for bridge in bridges_of_layer(spec.config, layer))
    )


def _pass_report(timings: _Timings, variant: Variant, kind: PassKind, *, info: ModelInfo, limit: Limit) -> PassReport:
    ours = timings.seconds[kind][variant]
    clips_per_second = timings.spec.per_device_batch_size / statistics.median(ours)
    tflops = clips_per_second * info.gmacs * _FLOP_PER_MULTIPLY_ADD / 1e3 if kind == "forward" else None
    baseline = timings.seconds[kind].get("baseline", ()) if variant != "baseline" else ()
    return PassReport(
        clips_per_second=clips_per_second,
        seconds=spread(ours),
        peak_memory_bytes=timings.peaks[kind][variant],
        tflops=tflops,
        share_of_limit=None if tflops is None else tflops / limit.tflops,
        speedup=spread([theirs / mine for theirs, mine in zip(baseline, ours, strict=True)]) if baseline else None,
    )
