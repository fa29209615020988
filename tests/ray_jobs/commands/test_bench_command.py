"""``ca2st bench model``: what it prints and how it refuses. The model is tiny and measured in this process."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from ca2st.benchmark import measure as limits
from ca2st.benchmark import model
from ca2st.benchmark.case import CaseSpec, LocalCase
from ca2st.model.config import SIZES
from ray_jobs import console as output_file
from support.commands import Command


@contextmanager
def _here(spec: CaseSpec) -> Iterator[LocalCase]:
    yield LocalCase(spec)


@pytest.fixture
def bench(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    monkeypatch.setitem(SIZES, "vit_s", {"dim": 32, "depth": 2, "num_heads": 1})
    monkeypatch.setitem(limits._SIZE, "cpu", 64)
    monkeypatch.setattr(model, "case_in_process", _here)
    return Command(capsys, monkeypatch, "bench", "model")


TINY = ("--size", "vit_s", "--device", "cpu", "--layers", 1, "--steps", 1)


def test_json_and_file_hold_the_headline_and_everything_it_comes_from(bench: Command, tmp_path: Path) -> None:
    out_file = tmp_path / "report.json"
    code, out, err = bench(*TINY, "--models", "cava, cast", "--json", "--out", out_file)
    assert code == 0, err
    facts = json.loads(out)
    assert facts == json.loads(out_file.read_text())
    first = facts["models"][0]
    training = first["variants"]["ours"]["training"]
    assert facts["clips_per_second"] == training["clips_per_second"]
    assert facts["baseline_clips_per_second"] == first["variants"]["baseline"]["training"]["clips_per_second"]
    assert [report["model"] for report in facts["models"]] == ["cava", "cast"]
    assert (first["num_layers"], first["all_layers"], first["bridges"]) == (1, 2, {"audio_spatial": 1})
    assert training["speedup"]["count"] == 1
    assert facts["limit"]["tflops"] > 0
    assert facts["load_before"] >= 0
    assert facts["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert facts["machine"]["device"] == "cpu"
    assert facts["command"].startswith("ca2st bench model --size vit_s")
    assert facts["date"].endswith("Z")


def test_without_json_a_person_reads_rates_memory_and_ratio(bench: Command) -> None:
    code, out, _ = bench(*TINY, "--models", "cast")
    assert code == 0
    assert "cast: 1 of 2 layers (spatial_temporal in 1)" in out
    assert "x the baseline" in out
    assert "of the limit" in out
    assert "baseline  training" in out


def test_without_a_baseline_there_is_no_ratio(bench: Command) -> None:
    code, out, _ = bench(*TINY, "--models", "cast", "--no-baseline", "--json")
    facts = json.loads(out)
    assert (code, facts["baseline_clips_per_second"]) == (0, None)
    assert set(facts["models"][0]["variants"]) == {"ours"}


def test_help_has_an_example(bench: Command) -> None:
    code, out, _ = bench("--help")
    assert code == 0
    assert "Example: ca2st bench model --json" in " ".join(out.split())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--models", "cats"), "did you mean 'cast'"),
        (("--models", ","), "models: expected at least one"),
        (("--layers", 0), "Invalid value for '--layers'"),
        (("--steps", 0), "Invalid value for '--steps'"),
        (("--batch", 0), "Invalid value for '--batch'"),
        (("--steps", 2, "--seconds", 2), "either a number of steps or a number of seconds"),
        (("--out", "nowhere/report.json"), "found no nowhere"),
        (("--out", "."), "--out: expected the name of a file, found the folder ."),
    ],
)
def test_bad_input_is_told_before_anything_is_measured(
    bench: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[object, ...], told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = bench(*arguments)
    assert (code, out) == (2, "")
    assert told in err
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_folder_is_told_before_anything_is_measured(
    bench: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_file.os, "access", lambda *_: False)
    code, out, err = bench(*TINY, "--out", tmp_path / "report.json")
    assert (code, out) == (2, "")
    assert "--out: expected a folder that can be written to" in err


def test_a_gpu_that_is_not_there_ends_with_4(bench: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, err = bench("--device", "cuda")
    assert code == 4
    assert "expected a CUDA GPU" in err
