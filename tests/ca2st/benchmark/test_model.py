import statistics
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from ca2st.benchmark import measure as limits
from ca2st.benchmark.case import CaseSpec, LocalCase, ModelBenchConfig, model_config
from ca2st.benchmark.measure import Limit, machine, measure_limit
from ca2st.benchmark.model import benchmark_models, settle, spread
from ca2st.errors import EnvironmentFault, UserInputError
from ca2st.model.config import SIZES, bridges_of_layer
from support.models import TINY_CLIP
from support.refusals import forced

LIMIT = Limit(tflops=2.0, size=8, dtype="float32", product="mm")


class Clock:
    """Cases whose passes take what the script says, and the order in which they were asked."""

    def __init__(self, **seconds: list[float]) -> None:
        self.asked: list[str] = []
        self._seconds = seconds

    @contextmanager
    def start(self, spec: CaseSpec) -> Iterator["ClockCase"]:
        yield ClockCase(self, spec.variant, iter(self._seconds[spec.variant] * 2))


class ClockCase:
    def __init__(self, clock: Clock, variant: str, seconds: Iterator[float]) -> None:
        self._clock, self._variant, self._seconds = clock, variant, seconds

    def seconds(self, kind) -> float:
        self._clock.asked.append(f"{kind} {self._variant}")
        return next(self._seconds)

    def peak_bytes(self) -> int:
        return 1000

    def reset_peak(self) -> None:
        self._clock.asked.append(f"reset {self._variant}")

    def limit(self) -> Limit:
        return LIMIT


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(limits._SIZE, "cpu", 64)
    monkeypatch.setitem(SIZES, "vit_s", {"dim": 32, "depth": 3, "num_heads": 2})


def _config(**changes) -> ModelBenchConfig:
    return ModelBenchConfig(size="vit_s", device="cpu", clip=TINY_CLIP, **changes)


def test_variants_take_turns_and_the_warm_up_is_not_counted(tiny):
    clock = Clock(ours=[9.0, 1.0, 2.0, 3.0], baseline=[90.0, 2.0, 8.0, 6.0])
    found = benchmark_models(_config(models=("cast",), rounds=3), start_case=clock.start)
    one_pass_kind = [
        "{kind} ours",
        "reset ours",
        "{kind} baseline",
        "reset baseline",
        *("{kind} ours", "{kind} baseline") * 3,
    ]
    assert clock.asked == [asked.format(kind=kind) for kind in ("forward", "training") for asked in one_pass_kind]
    ours = found.models[0].variants["ours"]["training"]
    assert ours.seconds == spread([1.0, 2.0, 3.0])
    assert found.clips_per_second == 1 / 2.0
    assert found.baseline_clips_per_second == 1 / 6.0


def test_the_speed_up_is_taken_round_by_round_so_that_a_busy_moment_cancels(tiny):
    """In the second round both are ten times slower: the ratio does not notice."""
    clock = Clock(ours=[1.0, 1.0, 10.0, 1.0], baseline=[1.0, 2.0, 20.0, 2.0])
    found = benchmark_models(_config(models=("cast",), rounds=3), start_case=clock.start)
    variants = found.models[0].variants
    assert variants["ours"]["training"].speedup == spread([2.0, 2.0, 2.0])
    assert variants["baseline"]["training"].speedup is None


def test_tflops_follow_from_multiply_adds_and_the_share_from_the_limit_of_the_same_run(tiny):
    clock = Clock(ours=[1.0, 0.5])
    found = benchmark_models(
        _config(models=("cava",), rounds=1, baseline=False, per_device_batch_size=2), start_case=clock.start
    )
    (report,) = found.models
    forward = report.variants["ours"]["forward"]
    assert report.computed_gmacs < report.gmacs
    assert forward.tflops == pytest.approx(2 * report.computed_gmacs / 1e3 * 2 / 0.5)
    assert forward.share_of_limit == pytest.approx(forward.tflops / LIMIT.tflops)
    assert report.variants["ours"]["training"].tflops is None
    assert found.baseline_clips_per_second is None


def test_seconds_instead_of_rounds_measure_at_least_twice(tiny):
    clock = Clock(ours=[1.0] * 10)
    found = benchmark_models(_config(models=("cast",), seconds=1e-9, baseline=False), start_case=clock.start)
    assert found.models[0].variants["ours"]["forward"].seconds.count == 2


def test_real_passes_of_every_model_are_timed_and_weighed(tiny):
    @contextmanager
    def start(spec: CaseSpec) -> Iterator[LocalCase]:
        yield LocalCase(spec)

    found = benchmark_models(_config(rounds=1, num_layers=1), start_case=start)
    assert [report.model for report in found.models] == ["cast", "cava", "ca2st"]
    for report in found.models:
        assert (report.num_layers, report.all_layers) == (1, 3)
        for passes in report.variants.values():
            for facts in passes.values():
                assert facts.clips_per_second == pytest.approx(1 / facts.seconds.median)
                assert facts.peak_memory_bytes >= 0
    assert found.limit.tflops > 0


def test_a_training_step_of_a_case_changes_the_added_parameters_and_no_frozen_one(tiny):
    case = LocalCase(
        CaseSpec(
            config=model_config("ca2st", "vit_s", num_layers=2),
            clip=TINY_CLIP,
            per_device_batch_size=2,
            device="cpu",
            precision="fp32",
            variant="ours",
        )
    )
    before = {name: p.detach().clone() for name, p in case._model.named_parameters()}
    assert case.seconds("training") > 0
    changed = {name for name, p in case._model.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert changed <= {name for name, p in case._model.named_parameters() if p.requires_grad}


def test_two_layers_of_ca2st_still_have_all_three_bridges():
    config = model_config("ca2st", "vit_b", num_layers=2)
    names = [{bridge.name for bridge in bridges_of_layer(config, layer)} for layer in range(2)]
    assert names == [{"spatial_temporal"}, {"spatial_temporal", "audio_spatial", "audio_temporal"}]


@pytest.mark.parametrize(("size", "audio_layers"), [("vit_s", 3), ("vit_b", 3), ("vit_l", 3)])
def test_all_layers_are_the_published_model(size, audio_layers):
    config = model_config("ca2st", size, num_layers=None)
    carrying = [layer for layer in range(config.depth) if len(bridges_of_layer(config, layer)) == 3]
    assert carrying == list(range(config.depth - audio_layers, config.depth))


def test_on_a_cpu_the_defaults_are_two_layers_in_float32_without_compiling(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    plan = settle(ModelBenchConfig())
    assert (plan.device, plan.num_layers, plan.precision, plan.per_device_batch_size) == ("cpu", 2, "fp32", 1)
    assert plan.variants == ("ours", "baseline")
    assert settle(ModelBenchConfig(compiled=True, baseline=False)).variants == ("ours", "compiled")


def test_on_a_gpu_the_defaults_are_the_whole_model_in_bfloat16_compiled_too(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    plan = settle(ModelBenchConfig())
    assert (plan.device, plan.num_layers, plan.precision, plan.per_device_batch_size) == ("cuda", None, "bf16", 6)
    assert plan.variants == ("ours", "baseline", "compiled")


def test_a_gpu_that_is_not_there_is_a_fault_of_the_environment(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EnvironmentFault, match=r"expected a CUDA GPU.*--device cpu"):
        settle(ModelBenchConfig(device="cuda"))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"models": ("cats",)}, r"models: .*found 'cats' \(did you mean 'cast'"),
        ({"models": ()}, "expected at least one, found none"),
        ({"size": "vit_x"}, "size: expected one of vit_s, vit_b, vit_l, found 'vit_x'"),
        ({"device": "gpu"}, "device: expected one of"),
        ({"precision": "fp8"}, "precision: expected one of"),
        ({"num_layers": 0}, "num_layers: expected at least 1"),
        ({"rounds": 0}, "rounds: expected at least 1"),
        ({"seconds": 0.0}, "seconds: expected a finite number > 0"),
        ({"rounds": 2, "seconds": 2.0}, "either a number of steps or a number of seconds"),
    ],
)
def test_settings_that_mean_nothing_are_refused(changes, told):
    with pytest.raises(UserInputError, match=told):
        forced(ModelBenchConfig(), **changes)


def test_the_limit_is_the_faster_of_the_products_the_model_uses():
    limit = measure_limit(torch.device("cpu"), "fp32", size=256)
    assert limit.tflops > 0
    assert limit.product in ("mm", "token_linear")


def test_a_spread_is_median_and_range():
    assert spread([3.0, 1.0, 2.0]).median == statistics.median([3.0, 1.0, 2.0])
    assert (spread([3.0, 1.0, 2.0]).lowest, spread([3.0, 1.0, 2.0]).highest) == (1.0, 3.0)


def test_the_machine_is_told_without_its_name():
    import platform

    facts = machine("cpu")
    assert facts.num_cores >= 1
    assert platform.node() not in (facts.processor, facts.gpu)
