"""One worker of a node writes down what the node does, and never disturbs the training."""

import json
import logging
import sys
import threading
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from ray_jobs.runs.node_metrics import NodeMetrics, NodeProbe, node_file, node_files

LONG = 3600.0
"""Seconds: the thread measures at the end of the block alone."""


def numbers() -> Mapping[str, float]:
    return {"cpu_utilization_percentage": 12.34567}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_block_however_short_leaves_a_measurement_of_its_node(tmp_path: Path) -> None:
    with NodeMetrics(tmp_path, every_seconds=LONG, node="gpu-1", measure=numbers) as metrics:
        pass
    (line,) = lines(tmp_path / "system" / "gpu-1.jsonl")
    assert metrics.path == tmp_path / "system" / "gpu-1.jsonl"
    assert line["step"] == 0
    assert line["metrics"] == {"cpu_utilization_percentage": 12.346}
    assert line["time"] > 1_700_000_000


def test_measurements_go_on_while_the_block_runs(tmp_path: Path) -> None:
    third, calls = threading.Event(), []

    def counted() -> Mapping[str, float]:
        calls.append(None)
        if len(calls) == 3:
            third.set()
        return numbers()

    with NodeMetrics(tmp_path, every_seconds=0.001, node="a", measure=counted) as metrics:
        assert third.wait(60)
    found = [line["step"] for line in lines(metrics.path)]
    assert found == list(range(len(calls)))
    assert len(found) >= 3


def test_a_resumed_attempt_cuts_the_torn_line_and_counts_on(tmp_path: Path) -> None:
    path = node_file(tmp_path, "a")
    path.parent.mkdir()
    path.write_text('{"time":1.0,"step":6,"metrics":{}}\n{"time":2.0,"st')
    with NodeMetrics(tmp_path, every_seconds=LONG, node="a", measure=numbers):
        pass
    assert [line["step"] for line in lines(path)] == [6, 7]


def test_of_two_workers_on_a_node_one_writes(tmp_path: Path) -> None:
    begun = threading.Event()

    def first() -> Mapping[str, float]:
        begun.set()
        return {"first": 1.0}

    with NodeMetrics(tmp_path, every_seconds=0.001, node="a", measure=first):
        assert begun.wait(60)
        with NodeMetrics(tmp_path, every_seconds=0.001, node="a", measure=lambda: {"second": 1.0}):
            pass
    assert {name for line in lines(node_file(tmp_path, "a")) for name in line["metrics"]} == {"first"}


@pytest.mark.parametrize(
    ("node", "name"),
    [("gpu-7.rack_2", "gpu-7.rack_2.jsonl"), ("../etc/x y", "etc-x-y.jsonl"), ("..", "node.jsonl"), ("", "node.jsonl")],
)
def test_a_host_name_makes_a_safe_file_name(tmp_path: Path, node: str, name: str) -> None:
    assert node_file(tmp_path, node) == tmp_path / "system" / name


def test_files_are_found_by_node(tmp_path: Path) -> None:
    assert node_files(tmp_path) == {}
    for node in ("b", "a.local"):
        with NodeMetrics(tmp_path, every_seconds=LONG, node=node, measure=numbers):
            pass
    assert node_files(tmp_path) == {node: node_file(tmp_path, node) for node in ("a.local", "b")}


def full_disk() -> Mapping[str, float]:
    raise OSError("No space left on device")


def no_place(tmp_path: Path) -> NodeMetrics:
    (tmp_path / "system").write_text("a file where the folder should be")
    return NodeMetrics(tmp_path, every_seconds=0.001, node="a", measure=numbers)


def failing(tmp_path: Path) -> NodeMetrics:
    return NodeMetrics(tmp_path, every_seconds=0.001, node="a", measure=full_disk)


@pytest.mark.parametrize("make", [no_place, failing])
def test_what_fails_ends_the_measurements_with_one_warning_and_no_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, make: Callable[[Path], NodeMetrics]
) -> None:
    with caplog.at_level(logging.WARNING), make(tmp_path):
        pass
    assert [record.getMessage().partition(": ")[2][:23] for record in caplog.records] == ["system metrics end here"]


def test_this_machine_has_plausible_numbers_under_mlflows_names(tmp_path: Path) -> None:
    found = NodeProbe(tmp_path).measure()
    assert 0 <= found["cpu_utilization_percentage"] <= 100
    assert 0 < found["system_memory_usage_percentage"] < 100
    assert 0 <= found["disk_usage_percentage"] <= 100
    assert found["system_memory_usage_megabytes"] > 10
    assert found["network_receive_megabytes"] >= 0
    assert found["network_transmit_megabytes"] >= 0


class FakeNvmlError(Exception):
    """The driver's."""


def fake_nvml(**changes: Any) -> types.ModuleType:
    module = types.ModuleType("pynvml")
    functions: dict[str, Any] = {
        "nvmlInit": lambda: None,
        "nvmlDeviceGetCount": lambda: 2,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetMemoryInfo": lambda handle: types.SimpleNamespace(used=10e9 * (handle + 1), total=40e9),
        "nvmlDeviceGetUtilizationRates": lambda handle: types.SimpleNamespace(gpu=90 + handle),
        "nvmlDeviceGetPowerUsage": lambda handle: 350_000,
        "nvmlDeviceGetEnforcedPowerLimit": lambda handle: 700_000,
    }
    for name, value in {**functions, "NVMLError": FakeNvmlError, **changes}.items():
        setattr(module, name, value)
    return module


def refuse(*_: object) -> None:
    raise FakeNvmlError("Not Supported")


def test_every_gpu_of_the_driver_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml())
    found = NodeProbe(tmp_path).measure()
    assert {name: value for name, value in found.items() if name.startswith("gpu_1")} == {
        "gpu_1_memory_usage_percentage": 50.0,
        "gpu_1_memory_usage_megabytes": 20_000.0,
        "gpu_1_utilization_percentage": 91.0,
        "gpu_1_power_usage_watts": 350.0,
        "gpu_1_power_usage_percentage": 50.0,
    }
    assert found["gpu_0_utilization_percentage"] == 90.0


def test_a_number_that_a_gpu_does_not_have_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(nvmlDeviceGetPowerUsage=refuse))
    found = NodeProbe(tmp_path).measure()
    assert "gpu_0_utilization_percentage" in found
    assert "gpu_0_power_usage_watts" not in found


def test_a_machine_without_a_driver_has_no_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(nvmlInit=refuse))
    assert not [name for name in NodeProbe(tmp_path).measure() if name.startswith("gpu")]
