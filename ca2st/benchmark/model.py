"""A model measured beside a plain formulation, in turns: every round runs each variant once.

Each variant is a case in a process of its own, so that its memory is its own and nobody's leftovers slow it down.
"""

import contextlib
import os
import statistics
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, cast

import torch

from ca2st.benchmark.case import TARGETS, Case, CaseSpec, LocalCase, ModelBenchConfig, PassKind, Variant, model_config
from ca2st.benchmark.measure import Limit, Spread, spread
from ca2st.errors import CA2STError, EnvironmentFault
from ca2st.model.config import bridges_of_layer
from ca2st.model.inspect import FLOP_PER_MULTIPLY_ADD, ModelInfo, model_info
from ca2st.processes import SPAWN
from ca2st.training.config import Precision


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """`ModelBenchConfig` with everything decided that depends on the device."""

    models: tuple[str, ...]
    size: str
    num_layers: int | None
    per_device_batch_size: int
    rounds: int
    seconds: float | None
    device: str
    precision: Precision
    variants: tuple[Variant, ...]
    """Ours first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PassReport:
    """One kind of pass of one variant."""

    clips_per_second: float
    """From the median time."""
    seconds: Spread
    peak_memory_bytes: int
    """Highest memory, weights included: of the CUDA allocator, or (CPU) of the process since before the model."""
    tflops: float | None
    """10^12 floating-point operations per second, from the model's multiply-adds; known for the forward pass."""
    share_of_limit: float | None
    """`tflops` over the device's limit, measured in the same run."""
    speedup: Spread | None
    """Baseline's time over this one's, round by round; None without a baseline and for itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelReport:
    """One model."""

    model: str
    num_layers: int
    """Layers of every expert that were measured."""
    all_layers: int
    """Layers it has at this size."""
    bridges: dict[str, int]
    """How many of the layers carry each bottleneck cross-attention."""
    gmacs: float
    """10^9 multiply-adds of one view with these layers."""
    computed_gmacs: float
    """The same without what reaches no output: what ours computes, and what its share of the limit is counted from."""
    trainable: int
    total: int
    variants: dict[Variant, dict[PassKind, PassReport]]
    """`ours`, and `baseline` and `compiled` where they were asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelBenchmark:
    """All models, with the headline of the first."""

    clips_per_second: float
    """Training step of the first model, ours."""
    baseline_clips_per_second: float | None
    """The same by the plain formulation; None without a baseline."""
    plan: Plan
    limit: Limit
    """The highest rate of a large matrix product that any of the measuring processes saw."""
    load_before: float
    """The machine's load average over the minute before: well below one per core, or others were computing too, and the
    rates are too low. Ratios suffer less, since variants take turns."""
    models: tuple[ModelReport, ...]
    """In the order they were asked for."""


_END = "end"
_PATIENCE_SECONDS = 10.0


class RemoteCase:
    """Asks the process for what a `Case` can do."""

    def __init__(self, connection: Connection, process: Any, spec: CaseSpec) -> None:
        self._connection = connection
        self._process = process
        self._spec = spec

    def seconds(self, kind: PassKind) -> float:
        """Run one pass there, as all here."""
        return cast("float", self._ask("seconds", kind))

    def peak_bytes(self) -> int:
        """Return the highest memory, as `Case` says."""
        return cast("int", self._ask("peak_bytes"))

    def reset_peak(self) -> None:
        """Forget earlier peaks."""
        self._ask("reset_peak")

    def limit(self) -> Limit:
        """Return the device's limit, as `Case` says."""
        return cast("Limit", self._ask("limit"))

    def _ask(self, *request: str) -> object:
        try:
            self._connection.send(request)
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            self._process.join(_PATIENCE_SECONDS)
            raise EnvironmentFault(
                f"{self._spec.config.kind}, {self._spec.variant}: expected the measuring process to answer, found it "
                f"ended with exit code {self._process.exitcode} (-9: the system had no memory left); take fewer clips "
                "(--batch) or layers (--layers)"
            ) from error
        if isinstance(answer, CA2STError):
            raise answer
        return answer


@contextlib.contextmanager
def case_in_process(spec: CaseSpec) -> Iterator[Case]:
    """Start a process with the case in it; ends it with the block.

    Raises:
        EnvironmentFault: in any of the case's methods, when the process ended or ran out of the device's memory.
        CA2STError: anything else that went wrong there, with its traceback.
    """
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=_serve, args=(theirs, spec), daemon=False)
    process.start()
    theirs.close()
    try:
        yield RemoteCase(ours, process, spec)
    finally:
        with ours, contextlib.suppress(OSError):  # it has ended already
            ours.send((_END,))
        process.join(_PATIENCE_SECONDS)
        if process.is_alive():
            process.kill()
            process.join()


StartCase = Callable[[CaseSpec], AbstractContextManager[Case]]
Update = Callable[[int, str], None]
PASSES: tuple[PassKind, ...] = ("forward", "training")
_FEWEST_ROUNDS = 2


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


def _serve(connection: Connection, spec: CaseSpec) -> None:
    """Answer requests until asked to end; a fault is an answer too."""
    case: LocalCase | None = None
    with contextlib.suppress(EOFError):  # the parent is gone
        while (request := connection.recv())[0] != _END:
            try:
                case = case or LocalCase(spec)
                connection.send(getattr(case, request[0])(*request[1:]))
            except Exception as error:  # noqa: BLE001  # whatever it is, the parent reports it
                connection.send(_described(error, spec))


def _described(error: Exception, spec: CaseSpec) -> CA2STError:
    from torch.cuda import OutOfMemoryError

    where = f"{spec.config.kind}, {spec.variant}"
    if isinstance(error, CA2STError):
        return error
    if isinstance(error, OutOfMemoryError):
        return EnvironmentFault(
            f"{where}: expected {spec.per_device_batch_size} clips to fit on the GPU, found its memory used up; "
            "take fewer (--batch)"
        )
    return CA2STError(f"{where}: " + "".join(traceback.format_exception(error)))


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
    start, done = time.monotonic(), 0
    while (
        done < plan.rounds if plan.seconds is None else done < _FEWEST_ROUNDS or time.monotonic() - start < plan.seconds
    ):
        for variant, case in cases.items():
            seconds[variant].append(case.seconds(kind))
        done += 1
    return seconds, {variant: case.peak_bytes() for variant, case in cases.items()}


def _report(plan: Plan, timings: _Timings, limit: Limit) -> ModelReport:
    config = timings.spec.config
    info = model_info(config, timings.spec.clip, TARGETS)
    bridges = Counter(bridge.name for layer in range(config.depth) for bridge in bridges_of_layer(config, layer))
    return ModelReport(
        model=config.kind,
        num_layers=config.depth,
        all_layers=model_config(config.kind, plan.size, num_layers=None).depth,
        bridges=dict(bridges),
        gmacs=info.gmacs,
        computed_gmacs=info.computed_gmacs,
        trainable=info.trainable,
        total=info.total,
        variants={
            variant: {kind: _pass_report(timings, variant, kind, info=info, limit=limit) for kind in PASSES}
            for variant in plan.variants
        },
    )


def _pass_report(timings: _Timings, variant: Variant, kind: PassKind, *, info: ModelInfo, limit: Limit) -> PassReport:
    ours = timings.seconds[kind][variant]
    clips_per_second = timings.spec.per_device_batch_size / statistics.median(ours)
    gmacs = info.gmacs if variant == "baseline" else info.computed_gmacs
    tflops = clips_per_second * gmacs * FLOP_PER_MULTIPLY_ADD / 1e3 if kind == "forward" else None
    baseline = timings.seconds[kind].get("baseline", ()) if variant != "baseline" else ()
    return PassReport(
        clips_per_second=clips_per_second,
        seconds=spread(ours),
        peak_memory_bytes=timings.peaks[kind][variant],
        tflops=tflops,
        share_of_limit=None if tflops is None else tflops / limit.tflops,
        speedup=spread([theirs / mine for theirs, mine in zip(baseline, ours, strict=True)]) if baseline else None,
    )
