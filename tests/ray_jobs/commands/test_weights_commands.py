"""`ca2st weights import` and `export` at the command line: facts as JSON, stable exit codes, nothing half-written."""

import hashlib
import json
import os
import tomllib
from pathlib import Path
from typing import get_args

import pytest
import safetensors.torch
import torch

from ca2st.weights.tensor_files import read_tensor_file
from ray_jobs.commands.models import WeightsKind
from ray_jobs.config.recipe import recipe_from_document
from ray_jobs.runs.inference import load_trained
from ray_jobs.runs.model import make_model
from support.commands import Command
from support.fake_hub import COMMIT, fake_hub
from support.foreign import awake_expert, clip_state, videomae_state
from support.models import model_of_file
from support.tiny_runs import make_tiny_run

SIZES = ("--heads", 2, "--mel-rows", 48)


@pytest.fixture
def ca2st(capsys, monkeypatch):
    return Command(capsys, monkeypatch)


@pytest.fixture
def clip_file(tmp_path):
    path = tmp_path / "clip.safetensors"
    state = clip_state(awake_expert("spatial").state_dict())
    safetensors.torch.save_file({name: tensor.clone() for name, tensor in state.items()}, path)
    return path


@pytest.mark.parametrize("command", ["import", "export", "check-golden"])
def test_every_weights_command_has_help_with_an_example(ca2st, command):
    code, out, _ = ca2st("weights", command, "--help")
    assert code == 0
    assert f"Example: ca2st weights {command}" in " ".join(out.split())


def test_every_kind_of_the_command_has_an_importer():
    from ca2st.model.config import EncoderName
    from ca2st.weights.importer import ReleasedKind

    assert set(get_args(WeightsKind)) == {*get_args(EncoderName), *get_args(ReleasedKind)}


def test_the_report_as_json(ca2st, tmp_path, clip_file):
    out = tmp_path / "ours.safetensors"
    code, text, err = ca2st("weights", "import", "--kind", "clip", clip_file, "--out", out, *SIZES, "--json")
    facts = json.loads(text)
    assert code == 0, err
    assert facts["sha256"] == hashlib.sha256(out.read_bytes()).hexdigest()
    assert len(facts["loaded"]) == len(read_tensor_file(out).tensors) == len(facts["checksums"])
    assert (facts["missing"], facts["unexpected"]) == ([], ["proj"])


def test_the_report_for_a_person_names_what_was_left_aside(ca2st, tmp_path, clip_file):
    code, text, _ = ca2st("weights", "import", "--kind", "clip", clip_file, "--out", tmp_path / "o.safetensors", *SIZES)
    assert code == 0
    assert "CLIP (safetensors): 31 tensors loaded" in text
    assert "1 left aside: proj" in text


def test_a_recipe_reads_the_imported_expert(ca2st, tmp_path, clip_file):
    out = tmp_path / "ours.safetensors"
    ca2st("weights", "import", "--kind", "clip", clip_file, "--out", out, *SIZES)
    recipe = recipe_from_document(
        tomllib.loads(f"""
        name = "tiny"
        [model]
        kind = "cast"
        dim = 32
        depth = 2
        num_heads = 2
        [clip]
        num_frames = 4
        crop_size = 32
        [experts]
        spatial = "{out}"
        [optim]
        warmup_epochs = 0.0
        [training]
        global_batch_size = 1
        epochs = 1
        """)
    )
    model = make_model(recipe, {"label": ["a", "b"]})
    expected = read_tensor_file(out).tensors
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.experts["spatial"].state_dict().items())


def test_a_missing_bias_ends_with_2_and_leave_by_name_with_0(ca2st, tmp_path):
    state = videomae_state(awake_expert("temporal").state_dict())
    del state["fc_norm.weight"], state["fc_norm.bias"]
    path, out = tmp_path / "v.safetensors", tmp_path / "new" / "o.safetensors"
    safetensors.torch.save_file({name: tensor.clone() for name, tensor in state.items()}, path)
    command = ("weights", "import", "--kind", "videomae", path, "--out", out, "--heads", 2)
    code, text, err = ca2st(*command)
    assert (code, text) == (2, "")
    assert "2 missing: norm.bias, norm.weight" in err
    assert not out.parent.exists()
    code, text, _ = ca2st(*command, "--allow-missing", "norm.*", "--json")
    assert (code, json.loads(text)["missing"]) == (0, ["norm.bias", "norm.weight"])


class _Evil:
    def __reduce__(self):
        return os.system, ("exit 1",)


def _evil(path: Path) -> None:
    torch.save({"model": _Evil()}, path)


def _truncated(path: Path) -> None:
    torch.save({"a": torch.ones(99)}, path)
    path.write_bytes(path.read_bytes()[:-50])


@pytest.mark.parametrize(
    ("spoil", "expected_code", "message"),
    [(_evil, 2, "nothing of the file was run"), (_truncated, 3, "expected a whole zip archive")],
)
def test_5_1_a_hostile_file_ends_with_2_and_a_damaged_one_with_3(ca2st, tmp_path, spoil, expected_code, message):
    path, out = tmp_path / "their.pth", tmp_path / "new" / "o.safetensors"
    spoil(path)
    code, text, err = ca2st("weights", "import", "--kind", "videomae", path, "--out", out, "--json")
    assert (code, text) == (expected_code, "")
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert not out.parent.exists()


def test_a_kind_that_nobody_reads_is_refused_with_the_known_ones(ca2st, tmp_path):
    code, _, err = ca2st("weights", "import", "--kind", "dinov2", "a.pth", "--out", tmp_path / "o.safetensors")
    assert code == 2
    assert "'dinov2' is not one of" in " ".join(err.split())
    assert "videomae" in err


def test_a_public_name_is_fetched_and_its_commit_told(ca2st, tmp_path, clip_file, monkeypatch):
    with fake_hub() as hub:
        hub.repositories["org/clip"] = {"model.safetensors": clip_file.read_bytes()}
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "downloads"))
        command = ("weights", "import", "--kind", "clip", "hf-hub:org/clip@v1", "--out", tmp_path / "o.safetensors")
        code, text, err = ca2st(*command, *SIZES, "--json")
        assert code == 0, err
        facts = json.loads(text)
        assert facts["source_sha256"] == hashlib.sha256(clip_file.read_bytes()).hexdigest()
        assert facts["origin"] == {
            "source": "hf-hub:org/clip@v1",
            "repository": "org/clip",
            "revision": COMMIT,
            "file": "model.safetensors",
            "activation": "",
            "architecture": "",
        }
        code, text, _ = ca2st(*command, *SIZES)
        assert f"model.safetensors of org/clip at {COMMIT}" in text


def test_without_a_network_a_public_name_ends_with_4_and_one_line(ca2st, tmp_path, monkeypatch):
    with fake_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    out = tmp_path / "new" / "o.safetensors"
    code, text, err = ca2st("weights", "import", "--kind", "clip", "hf-hub:org/clip", "--out", out, "--json")
    assert (code, text) == (4, "")
    assert err.startswith("error: hf-hub:org/clip: cannot get org/clip (revision main) from http://127.0.0.1:")
    assert "give its path instead of the name" in err
    assert err.count("\n") == 1
    assert not out.parent.exists()


def test_an_unknown_public_name_ends_with_2(ca2st, tmp_path):
    code, _, err = ca2st("weights", "import", "--kind", "clip", "hf-hub:clip", "--out", tmp_path / "o.safetensors")
    assert code == 2
    assert "expected hf-hub:ORGANISATION/NAME" in err


def test_what_is_no_checkpoint_is_not_exported(ca2st, tmp_path):
    code, _, err = ca2st("weights", "export", tmp_path, "--out", tmp_path / "o.safetensors")
    assert code in (2, 3)
    assert err.startswith("error: ")
    assert not (tmp_path / "o.safetensors").exists()


@pytest.mark.slow
def test_a_trained_run_is_exported_and_imported_whole(ca2st, tmp_path):
    run_dir = tmp_path / "run"
    options = ("--set", "tracking.enabled=false", "--set", "training.epochs=1", "--workers", 1)
    assert ca2st("train", make_tiny_run(tmp_path), "--out", run_dir, *options)[0] == 0
    expected = load_trained(run_dir).model.state_dict()
    for names in ("ours", "published"):
        exported, back = tmp_path / f"{names}.safetensors", tmp_path / f"{names}_back.safetensors"
        code, text, err = ca2st("weights", "export", run_dir, "--out", exported, "--names", names, "--json")
        assert code == 0, err
        assert json.loads(text)["sha256"] == hashlib.sha256(exported.read_bytes()).hexdigest()
        assert ca2st("weights", "import", "--kind", "ca2st", exported, "--out", back)[0] == 0
        found = model_of_file(back).state_dict()
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_golden_file_without_an_expected_output_fails_by_its_name(ca2st, tmp_path):
    file = read_tensor_file(Path(__file__).parents[2] / "data/golden/cast_single.safetensors")
    kept = {name: tensor for name, tensor in file.tensors.items() if not name.startswith("expected/")}
    bare = tmp_path / "bare.safetensors"
    safetensors.torch.save_file(kept, bare, metadata=dict(file.metadata))
    code, out, _ = ca2st("weights", "check-golden", bare)
    assert (code, out) == (3, f"FAIL {bare}  no expected output\n")
