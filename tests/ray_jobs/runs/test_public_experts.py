"""Recipes that name public experts: files before anything starts, or one line that says why not."""

import socket
import sys
import tomllib
from dataclasses import replace

import pytest
import safetensors.torch
import torch

from ca2st.errors import EnvironmentFault, UserInputError
from ca2st.weights.hub import HubAccess
from ca2st.weights.tensor_files import read_tensor_file
from ray_jobs.cli import main
from ray_jobs.config.recipe import recipe_from_document
from ray_jobs.runs.inference import load_trained
from ray_jobs.runs.model import begin_model, make_model, with_local_experts
from ray_jobs.runs.worker import preflight
from support.fake_hub import fake_hub
from support.foreign import ast_state, awake_expert, clip_state, videomae_state
from support.tiny_runs import make_tiny_run


def _recipe(kind="ca2st", *, more="", **experts):
    named = "\n".join(f'{name} = "{source}"' for name, source in experts.items())
    return recipe_from_document(
        tomllib.loads(f"""
        name = "tiny"
        [model]
        kind = "{kind}"
        dim = 32
        depth = 2
        num_heads = 2
        {more}
        [clip]
        num_frames = 4
        crop_size = 32
        mel_rows = 48
        [experts]
        {named}
        [optim]
        warmup_epochs = 0.0
        [training]
        global_batch_size = 1
        epochs = 1
        """)
    )


def _bytes(state):
    return safetensors.torch.save({name: tensor.clone() for name, tensor in state.items()})


@pytest.fixture
def hub():
    with fake_hub() as running:
        for name, expert, write in (
            ("clip", "spatial", clip_state),
            ("videomae", "temporal", videomae_state),
            ("ast", "audio", ast_state),
        ):
            running.repositories[f"org/{name}"] = {
                "model.safetensors": _bytes(write(awake_expert(expert).state_dict()))
            }
        yield running


@pytest.fixture
def access(hub, tmp_path):
    return HubAccess(endpoint=hub.endpoint, cache_folder=tmp_path / "downloads", answer_seconds=5.0)


def test_every_expert_becomes_a_file_that_the_model_loads(access, tmp_path):
    pretrained = "pretrained_num_frames = 4\npretrained_crop_size = 32"
    recipe = _recipe(more=pretrained, spatial="hf-hub:org/clip", temporal="hf-hub:org/videomae", audio="hf-hub:org/ast")
    local = with_local_experts(recipe, tmp_path / "imported", access)
    files = local.experts.files()
    assert all(path.is_absolute() and path.is_file() for path in files.values())
    model = make_model(local, {"label": ["a", "b"]})
    for name, path in files.items():
        expected = read_tensor_file(path).tensors
        state = model.experts[name].state_dict()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in state.items())
        assert state.keys() == awake_expert(name).state_dict().keys()


def test_the_layout_follows_from_the_encoder_in_the_experts_place(access, tmp_path):
    recipe = _recipe("cast", more='temporal_encoder = "clip"', temporal="hf-hub:org/clip")
    assert with_local_experts(recipe, tmp_path / "imported", access).experts.temporal.endswith(".safetensors")
    with pytest.raises(UserInputError, match="expected one of the layouts CLIP"):
        with_local_experts(_recipe("cast", spatial="hf-hub:org/videomae"), tmp_path / "imported", access)


def test_files_and_experts_that_the_model_lacks_are_left_as_they_are(access, hub, tmp_path):
    recipe = _recipe("cast", spatial="clip.safetensors", audio="hf-hub:org/ast")
    assert with_local_experts(recipe, tmp_path / "imported", access) == recipe
    assert hub.requests == []


def test_without_a_network_nothing_is_started(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{probe.getsockname()[1]}"
    access = HubAccess(endpoint=endpoint, cache_folder=tmp_path / "downloads")
    with pytest.raises(EnvironmentFault, match="hf-hub:org/clip: cannot get"):
        with_local_experts(_recipe(spatial="hf-hub:org/clip"), tmp_path / "imported", access)
    assert not (tmp_path / "imported").exists()


def test_preflight_knows_public_names_from_paths():
    with pytest.raises(
        UserInputError, match=r"experts\.spatial: expected a safetensors file, found none at no\.where; "
    ):
        preflight(_recipe(spatial="no.where"))
    with pytest.raises(UserInputError, match="expected hf-hub:ORGANISATION/NAME"):
        preflight(_recipe(spatial="hf-hub:clip"))
    with pytest.raises(UserInputError, match=r"data\.train: names no shards"):
        preflight(_recipe(spatial="hf-hub:org/clip"))


def test_an_expert_that_the_kind_lacks_is_refused_before_anything_is_fetched(hub):
    with pytest.raises(
        UserInputError, match=r"experts\.audio: expected experts of cast, which are spatial, temporal, "
    ):
        preflight(_recipe("cast", audio="hf-hub:org/ast"))
    assert hub.requests == []


def test_expert_files_are_compared_with_the_model_before_anything_starts(access, tmp_path):
    good = with_local_experts(_recipe("cast", spatial="hf-hub:org/clip"), tmp_path / "imported", access)
    begin_model(good, {"label": ["a", "b"]}, tmp_path, is_outline=True)
    deeper = replace(good, model=replace(good.model, depth=3))
    with pytest.raises(UserInputError, match=r"experts\.spatial: .*missing: layers\.2\."):
        begin_model(deeper, {"label": ["a", "b"]}, tmp_path, is_outline=True)
    swapped = replace(good, experts=replace(good.experts, spatial=None, temporal=good.experts.spatial))
    with pytest.raises(UserInputError, match=r"experts\.temporal: .*unexpected: "):
        begin_model(swapped, {"label": ["a", "b"]}, tmp_path, is_outline=True)


def test_a_whole_model_is_no_expert_file(tmp_path):
    recipe = _recipe("cast")
    path = tmp_path / "whole.safetensors"
    safetensors.torch.save_file(make_model(recipe, {"label": ["a", "b"]}).state_dict(), path)
    with pytest.raises(UserInputError, match=r"experts\.spatial: .*whole\.safetensors: .*unexpected: "):
        begin_model(
            replace(recipe, experts=replace(recipe.experts, spatial=str(path))),
            {"label": ["a"]},
            tmp_path,
            is_outline=True,
        )


@pytest.mark.slow
def test_a_run_begins_with_a_public_expert_and_resumes_without_a_network(hub, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "downloads"))
    settings = ("model.kind=cast", "model.dim=32", "tracking.enabled=false", "training.epochs=1")
    command = ["ca2st", "train", str(make_tiny_run(tmp_path)), "--out", str(tmp_path / "runs" / "one")]
    for setting in (*settings, 'experts.spatial="hf-hub:org/clip"'):
        command += ["--set", setting]
    for endpoint in (hub.endpoint, "http://127.0.0.1:1"):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as ended:
            main()
        assert int(ended.value.code or 0) == 0, capsys.readouterr().err
    trained = load_trained(tmp_path / "runs" / "one").model.experts["spatial"].state_dict()
    kept = {name: x for name, x in awake_expert("spatial").state_dict().items() if not name.startswith("norm.")}
    assert all(torch.equal(trained[name], tensor) for name, tensor in kept.items())
    assert len(list((tmp_path / "runs" / "imported").glob("*.safetensors"))) == 1


def test_two_recipes_that_differ_in_what_the_file_does_not_tell_have_a_file_each(access, tmp_path):
    recipe = _recipe("cava", audio="hf-hub:org/ast")
    longer = replace(recipe, clip=replace(recipe.clip, mel_rows=96))
    files = {with_local_experts(one, tmp_path / "imported", access).experts.audio for one in (recipe, longer, recipe)}
    assert len(files) == 2
