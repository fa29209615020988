"""``make gpu`` as far as it can be tried without a GPU: a dry run, parts that fail, what is written down."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import gpu as report
from benchmarks import gpu_parts as parts
from benchmarks.gpu import aims, app, as_document, file_name, lines, run_parts
from benchmarks.gpu_parts import (
    BUDGETS,
    GpuCheckSettings,
    PartResult,
    dry_settings,
    gpu_settings,
    measure_copies,
    mfu,
    run_here,
    run_in_process,
)
from ca2st.benchmark.case import TARGETS, model_config
from ca2st.benchmark.measure import PEAKS
from ca2st.errors import EnvironmentFault, UserInputError
from ca2st.model.inspect import model_info, train_tflop
from ca2st.spec import ClipSpec
from ray_jobs.bench_report import driver_version, package_version

SMALL = replace(dry_settings(), codecs=("vp9", "mjpeg"), gops=(8,), damages=())
GPU = GpuCheckSettings()


@pytest.fixture(scope="module")
def dry_results() -> dict[Any, PartResult]:
    return run_parts(SMALL, run_here)


def test_a_dry_run_goes_through_every_part(dry_results: dict[Any, PartResult]) -> None:
    assert list(dry_results) == list(parts.PARTS) == list(BUDGETS)
    assert {name: result.error for name, result in dry_results.items()} == dict.fromkeys(BUDGETS)
    assert {name for name, result in dry_results.items() if not result.rows} == {"damage"}
    assert [(row["codec"], row["stage"]) for row in dry_results["parity"].rows] == [
        ("vp9", "decode"),
        ("vp9", "whole"),
        ("mjpeg", "decode"),
        ("mjpeg", "whole"),
        ("any", "resize"),
        ("any", "pointwise"),
        ("any", "warp"),
    ]
    assert {row["backend"] for row in dry_results["speed"].rows} == {"dali"}


def test_a_dry_run_can_never_be_taken_for_a_gpus(dry_results: dict[Any, PartResult]) -> None:
    document = json.loads(json.dumps(as_document(dry_results, SMALL, command="make gpu ARGS=--dry-run")))
    assert (document["device"], document["is_dry_run"], document["aims"]) == ("cpu", True, [])
    assert file_name(document).endswith("-cpu-dry-run-bench-gpu.json")
    assert lines(document)[0].startswith("DRY RUN on the CPU")
    assert document["parts"]["device"]["rows"][0]["device"] == "cpu"


def test_a_dry_run_trains_by_every_kernel_and_a_kernel_that_is_not_there_costs_its_row_alone(
    dry_results: dict[Any, PartResult],
) -> None:
    rows = {(row["attention"], row["checkpointed"], row["clips"]): row for row in dry_results["training"].rows[1:]}
    failed = {way[0] for way, row in rows.items() if "error" in row}
    assert failed == {"cudnn", "efficient"}
    assert {way for way, row in rows.items() if "error" not in row} == {
        ("flash", False, 1),
        ("math", False, 1),
        ("auto", False, 2),
        ("auto", True, 1),
        ("auto", True, 4),
    }


def test_a_dry_run_counts_what_a_step_computes_and_compares_it_with_a_product_where_no_datasheet_is_known(
    dry_results: dict[Any, PartResult],
) -> None:
    peak, *ways = dry_results["training"].rows
    assert peak["datasheet_tflops"] is None
    assert peak["product_tflops"] > 0
    (work,) = peak["train_tflop"].values()
    shares = [(row["clips_per_second"] * work / peak["product_tflops"], row["mfu"]) for row in ways if "mfu" in row]
    assert [share for share, _ in shares] == pytest.approx([share for _, share in shares])
    assert len(shares) == 5


def test_a_dry_run_feeds_a_training_step_from_shards(dry_results: dict[Any, PartResult]) -> None:
    (row,) = dry_results["end_to_end"].rows
    assert (row["model"], row["codec"], row["backend"]) == ("cast", "mjpeg", "dali")
    assert row["num_steps"] >= 2
    assert 0 <= row["data_wait_fraction"] < 1
    assert min(row["clips_per_second"], row["alone_clips_per_second"]) > 0


def test_the_share_of_the_peak_is_the_datasheets_where_that_is_known() -> None:
    peak = {"datasheet_tflops": 989.0, "product_tflops": 790.0, "train_tflop": {"cast": 1.661}}
    assert mfu(336.0, "cast", peak) == pytest.approx(0.5643, abs=1e-4)
    assert mfu(336.0, "cast", peak | {"datasheet_tflops": None}) == pytest.approx(0.7064, abs=1e-4)


@pytest.mark.slow
def test_the_aims_of_training_are_the_shares_of_an_h200_that_they_are_said_to_be() -> None:
    shares = {}
    for kind, aim in report.TRAINING_AIMS.items():
        info = model_info(model_config(kind, "vit_b", num_layers=None), ClipSpec(), TARGETS)
        shares[kind] = round(100 * aim * train_tflop(info, again=False) / PEAKS["H200"].bf16)
    assert shares == {"cast": 56, "cava": 55, "ca2st": 56}


def test_what_parts_found_is_handed_on_after_each(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in BUDGETS:
        monkeypatch.setitem(parts.PARTS, name, lambda _: iter([]))
    handed: list[list[str]] = []
    run_parts(SMALL, run_here, done=lambda found: handed.append(list(found)))
    assert handed == [list(BUDGETS)[: count + 1] for count in range(len(BUDGETS))]


def test_what_is_written_names_versions_command_and_date(dry_results: dict[Any, PartResult]) -> None:
    document = as_document(dry_results, SMALL, command="make gpu ARGS=--dry-run")
    assert {"torch", "nvidia-dali-cuda130", "cuda", "driver"} <= set(document["versions"])
    assert document["command"] == "make gpu ARGS=--dry-run"
    assert document["date"].endswith("Z")
    shown = "\n".join(lines(document))
    assert all(f"\n{name}: " in shown for name in BUDGETS)


def result(*rows: dict[str, Any], error: str | None = None) -> PartResult:
    return PartResult(rows=[*rows], error=error, seconds=1.0, budget_seconds=2.0)


def speed(rate: float, *, backend: str = "dali-gpu", rand_augment: bool = True) -> dict[str, Any]:
    return {"case": {"rand_augment": rand_augment}, "backend": backend, "clips_per_second": rate}


def fed(model: str, wait: float, *, backend: str = "dali-gpu") -> dict[str, Any]:
    return {"model": model, "backend": backend, "data_wait_fraction": wait}


def test_aims_are_judged_by_what_trains_on_the_gpu_and_by_nothing_else() -> None:
    passes = {"training": {"clips_per_second": 240.0}}
    compiled = {"training": {"clips_per_second": 250.0}}
    baseline = {"training": {"clips_per_second": 999.0}}
    models = {"models": [{"model": "cast", "variants": {"ours": passes, "compiled": compiled, "baseline": baseline}}]}
    rates = [speed(547.0), speed(9999.0, backend="dali"), speed(601.0, rand_augment=False)]
    peak = {"datasheet_tflops": 1000.0, "product_tflops": 800.0, "train_tflop": {"cast": 2.0, "cava": 1.0}}
    ways = [peak, {"model": "cast", "error": "no kernel"}, {"model": "cava", "clips_per_second": 548.0}]
    waits = [fed("cast", 0.3), fed("cast", 0.019), fed("cast", 0.0, backend="dali"), fed("cava", 0.02)]
    found = {"speed": rates, "model": [models], "training": ways, "end_to_end": waits}
    decoding, loader, cast, cava, ca2st, cast_wait, cava_wait = aims(
        {name: result(*rows) for name, rows in found.items()}, GPU
    )
    assert (decoding.aim, decoding.found, decoding.is_met) == (600.0, 601.0, True)
    assert (loader.found, loader.is_met) == (547.0, False)
    assert (cast.found, cast.is_met, cast.mfu) == (250.0, False, 0.5)
    assert (cava.found, cava.is_met, cava.mfu) == (548.0, True, 0.548)
    assert (cast_wait.found, cast_wait.is_met) == (pytest.approx(1.9), True)
    assert (cava_wait.found, cava_wait.is_met) == (2.0, False)
    missing = [ca2st, *aims({"speed": result(error="its time is up")}, GPU)]
    assert {(aim.found, aim.is_met, aim.mfu) for aim in missing} == {(None, False, None)}
    without_count = aims({"model": result(models)}, GPU)[2]
    assert (without_count.found, without_count.mfu) == (250.0, None)


def test_aims_are_shown_beside_what_was_found() -> None:
    peak = {"datasheet_tflops": 1000.0, "product_tflops": 800.0, "train_tflop": {"cast": 2.0}}
    way = {"model": "cast", "attention": "auto", "checkpointed": False, "clips": 24, "clips_per_second": 250.0}
    waits = fed("cast", 0.013) | {"codec": "h264", "clips_per_second": 240.0, "alone_clips_per_second": 250.0}
    found = {
        "training": result(peak, way | {"mfu": 0.5, "peak_memory_bytes": 1 << 30}),
        "end_to_end": result(waits),
    }
    shown = lines(as_document(found, GPU, command="c"))
    assert "aim 336, found 250 (50% MFU): clips/s of cast's training step, best way  NOT MET" in shown
    assert "aim under 2, found 1.3: % of cast's fed training step spent waiting for data, best codec" in shown
    assert "aim 600, found not measured: clips/s decoded, best codec, key frames and threads  NOT MET" in shown
    assert any("250.00 clips/s   50.0% MFU" in line for line in shown)
    assert any("waits 1.3% of its time" in line for line in shown)


def test_the_file_is_named_after_date_and_device() -> None:
    document = as_document({"device": result({"gpu": "NVIDIA H200", "processor": "x"})}, GPU, command="c")
    assert document["device"] == "cuda"
    assert file_name(document) == f"{document['date'][:10]}-nvidia-h200-bench-gpu.json"


def test_a_part_that_fails_is_told_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: GpuCheckSettings) -> Iterator[dict[str, Any]]:
        yield {"found": 1}
        raise ValueError("the device is gone")

    monkeypatch.setitem(parts.PARTS, "limits", broken)
    for other in ("device", "parity", "speed", "damage", "model", "training", "end_to_end"):
        monkeypatch.setitem(parts.PARTS, other, lambda _: iter([{"other": 2}]))
    found = run_parts(SMALL, run_here)
    assert found["limits"].rows == [{"found": 1}]
    assert "ValueError: the device is gone" in (found["limits"].error or "")
    assert all(one.error is None and one.rows == [{"other": 2}] for name, one in found.items() if name != "limits")


def test_all_parts_fit_into_eight_minutes_and_the_last_lack_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sum(BUDGETS.values()) <= report.MOST_SECONDS < 480
    monkeypatch.setattr(report, "MOST_SECONDS", 100.0)
    clock = iter([0.0, 0.0, 30.0, 70.0, 97.0, 97.0, 97.0, 97.0, 97.0])
    monkeypatch.setattr(report.time, "monotonic", lambda: next(clock))
    given = []

    def run(name: str, _: GpuCheckSettings, seconds: float) -> PartResult:
        given.append((name, seconds))
        return result()

    found = run_parts(SMALL, run)
    assert given == [("device", 25.0), ("limits", 25.0), ("parity", 30.0)]
    assert found["speed"].error == "no time was left for it"


class _Process:
    """A process of a part, with what it says given beforehand."""

    exitcode = 0

    def __init__(self, target: Any, args: tuple[Any, ...]) -> None:
        self._connection, self._name, _ = args

    def start(self) -> None:
        for message in {"device": [("row", {"a": 1}), ("end", None)], "speed": [("row", {"a": 1})]}.get(self._name, []):
            self._connection.send(message)
        self._open = self._connection if self._name == "model" else None
        if self._name == "model":
            self._connection.send(("error", "ValueError: no"))

    def join(self, _: float | None = None) -> None:
        """It has ended."""

    def is_alive(self) -> bool:
        return False


@pytest.mark.parametrize(
    ("name", "rows", "error"),
    [
        ("device", [{"a": 1}], None),
        ("speed", [{"a": 1}], "its process ended without a word"),
        ("model", [], "ValueError: no"),
    ],
)
def test_what_a_process_found_before_it_ended_is_kept(
    monkeypatch: pytest.MonkeyPatch, name: Any, rows: list[dict[str, int]], error: str | None
) -> None:
    monkeypatch.setattr(type(parts.SPAWN), "Process", staticmethod(lambda **words: _Process(**words)))
    found = run_in_process(name, SMALL, 5.0)
    assert (found.rows, found.error) == (rows, error)


class _Lingering(_Process):
    """A process that told everything and does not end until it is ended."""

    exitcode: int | None = None  # type: ignore[assignment]

    def is_alive(self) -> bool:
        return self.exitcode is None

    def terminate(self) -> None:
        self.exitcode = -15


class _Crashing(_Process):
    """A process that told everything and crashes then."""

    exitcode = -11


@pytest.mark.parametrize(
    ("process", "error"), [(_Lingering, None), (_Crashing, "its process ended with exit code -11")]
)
def test_a_process_that_crashes_behind_its_last_row_is_told_and_one_that_lingers_is_ended(
    monkeypatch: pytest.MonkeyPatch, process: type[_Process], error: str | None
) -> None:
    monkeypatch.setattr(type(parts.SPAWN), "Process", staticmethod(lambda **words: process(**words)))
    found = run_in_process("device", SMALL, 5.0)
    assert (found.rows, found.error) == ([{"a": 1}], error)


def test_rows_are_waited_for_no_longer_than_the_budget() -> None:
    ours, theirs = parts.SPAWN.Pipe(duplex=False)
    begin = time.monotonic()
    with pytest.raises(parts._EndError, match="its time is up"):
        list(parts._received(ours, begin + 0.05))
    assert time.monotonic() - begin < 5
    ours.close()
    theirs.close()


@pytest.mark.slow
def test_a_part_in_a_process_of_its_own_gives_its_rows_and_ends_when_its_time_is_up() -> None:
    found = run_in_process("limits", SMALL, 120.0)
    assert found.error is None
    assert len(found.rows) == 2
    late = run_in_process("parity", SMALL, 0.2)
    assert (late.rows, late.error) == ([], "its time is up")


def test_without_a_gpu_the_program_says_where_to_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EnvironmentFault, match=r"expected a CUDA device .* ARGS=--dry-run"):
        gpu_settings()


def test_the_command_writes_its_report_and_fails_where_a_part_did(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in BUDGETS:
        monkeypatch.setitem(parts.PARTS, name, lambda _: iter([]))
    done = CliRunner().invoke(app, ["--dry-run", "--json", "--results", str(tmp_path)])
    assert done.exit_code == 0, done.output
    (written,) = tmp_path.iterdir()
    assert json.loads(written.read_text())["device"] == "cpu"
    assert json.loads(done.stdout.splitlines()[-1])["is_dry_run"] is True

    def broken(_: GpuCheckSettings) -> Iterator[dict[str, Any]]:
        raise ValueError("gone")

    monkeypatch.setitem(parts.PARTS, "speed", broken)
    failed = CliRunner().invoke(app, ["--dry-run", "--results", str(tmp_path)])
    assert failed.exit_code != 0
    assert json.loads(written.read_text())["parts"]["speed"]["error"].startswith("ValueError: gone")


def test_copies_are_measured_in_every_direction() -> None:
    found = measure_copies(torch.device("cpu"), num_bytes=1 << 16)
    assert min(found.host_to_device, found.device_to_host, found.device_to_device) > 0
    assert found.num_bytes == 1 << 16


def test_the_drivers_version_is_read_from_its_own_words(tmp_path: Path) -> None:
    words = tmp_path / "version"
    words.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\nGCC version: 12\n"
    )
    assert driver_version(words) == "580.65.06"
    assert driver_version(tmp_path / "none") == "none"
    assert package_version("a-package-of-no-name") == "not installed"


def test_parts_are_chosen_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in BUDGETS:
        monkeypatch.setitem(parts.PARTS, name, lambda _: iter([]))
    done = CliRunner().invoke(app, ["--dry-run", "--json", "--only", "model, limits"])
    assert list(json.loads(done.stdout.splitlines()[-1])["parts"]) == ["limits", "model"]
    with pytest.raises(
        UserInputError, match=r"--only: expected one of device, .*, found 'modle' .did you mean 'model'"
    ):
        CliRunner().invoke(app, ["--dry-run", "--only", "modle"], catch_exceptions=False)


WITHOUT_DECODERS = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name in ("nvidia.dali", "av", "webdataset", "pyarrow", "ray", "mlflow", "accelerate"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
from benchmarks.gpu import app, main
sys.argv = ["gpu", "--dry-run", "--only", "device,limits,model,training", "--json"]
main(app)
"""


@pytest.mark.slow
def test_what_concerns_the_model_runs_where_neither_dali_nor_pyav_is_installed() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_DECODERS],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["parts"]
    parts_tried = ("device", "limits", "model", "training")
    assert {name: part["error"] for name, part in found.items()} == dict.fromkeys(parts_tried)
    assert found["model"]["rows"]
