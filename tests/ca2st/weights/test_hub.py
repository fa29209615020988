"""Public names: what they stand for, fetching from a hub on the loopback interface, and doing without a network."""

import hashlib
import json
import socket
import time
from dataclasses import replace

import pytest
import safetensors.torch
import torch

from ca2st.errors import EnvironmentFault, UserInputError
from ca2st.model.experts import ACTIVATIONS as MODULES
from ca2st.model.experts import build_expert
from ca2st.spec import ClipSpec
from ca2st.weights.hub import ACTIVATIONS, PLAIN_FILES, HubAccess, activation_of, fetch, is_hub_name, resolve_hub_name
from ca2st.weights.importer import EXPERT_KEY, ImportOptions, import_weights, imported_expert
from ca2st.weights.model_file import ALONE, UnwrittenSizes
from ca2st.weights.tensor_files import (
    ForeignFileRefusedError,
    WeightsDamageError,
    WeightsMismatchError,
    read_tensor_file,
)
from support.fake_hub import COMMIT, fake_hub
from support.foreign import awake_expert, clip_state, open_clip_state

SIZES = UnwrittenSizes(num_heads=2)


@pytest.fixture
def hub():
    with fake_hub() as running:
        yield running


@pytest.fixture
def access(hub, tmp_path):
    return HubAccess(endpoint=hub.endpoint, cache_folder=tmp_path / "downloads", answer_seconds=5.0)


@pytest.fixture
def clip_bytes():
    state = {name: tensor.clone() for name, tensor in clip_state(awake_expert("spatial").state_dict()).items()}
    return safetensors.torch.save(state)


def _closed_endpoint():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def test_paths_are_no_public_names():
    for text in ("hf-hub:a/b", "open_clip:ViT-B-16/openai", "timm:resnet50"):
        assert is_hub_name(text)
    for text in ("experts/clip.safetensors", "hf-hub", "timm", "C:/experts/clip.pt", "./hf-hub_clip.pt"):
        assert not is_hub_name(text)
    with pytest.raises(
        UserInputError, match=r"expected hf-hub:\.\.\., open_clip:\.\.\., timm:\.\.\., or a file's path"
    ):
        resolve_hub_name("s3:bucket/key")


def test_a_repository_may_be_named_with_a_revision():
    assert resolve_hub_name("hf-hub:laion/CLIP-x").revision is None
    source = resolve_hub_name("hf-hub:laion/CLIP-x@refs/pr/1")
    assert (source.repository, source.revision, source.files) == ("laion/CLIP-x", "refs/pr/1", PLAIN_FILES)


@pytest.mark.parametrize(
    "rest", ["", "clip", "a/b/c", "a/b@", "a/../b", "a b/c", "a/b@x y", "../..", "./a", "a/.", "a/b@../x", "a/b@x/.."]
)
def test_what_is_no_repository_is_refused(rest):
    with pytest.raises(UserInputError, match="expected hf-hub:ORGANISATION/NAME"):
        resolve_hub_name(f"hf-hub:{rest}")


@pytest.mark.parametrize(
    ("name", "repository", "first"),
    [
        ("open_clip:ViT-B-16-quickgelu/openai", "timm/vit_base_patch16_clip_224.openai", "open_clip_model.safetensors"),
        ("open_clip:ViT-B-16/dfn2b", "apple/DFN2B-CLIP-ViT-B-16", "open_clip_model.safetensors"),
        (
            "timm:vit_base_patch16_clip_quickgelu_224.openai",
            "timm/vit_base_patch16_clip_224.openai",
            "model.safetensors",
        ),
        ("timm:vit_base_patch16_clip_224.openai", "timm/vit_base_patch16_clip_224.openai", "model.safetensors"),
        ("timm:resnet50.tv_in1k", "timm/resnet50.tv_in1k", "model.safetensors"),
        ("timm:resnet50", "timm/resnet50.a1_in1k", "model.safetensors"),
    ],
)
def test_names_of_open_clip_and_timm_stand_for_the_repository_in_their_tables(name, repository, first):
    source = resolve_hub_name(name)
    assert (source.repository, source.files[0]) == (repository, first)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("open_clip:ViT-B-61/openai", r"a model that open_clip knows, found 'ViT-B-61' \(did you mean 'ViT-B-16'\?\)"),
        ("open_clip:ViT-B-16", r"expected open_clip:MODEL/TAG .* found 'ViT-B-16'"),
        ("open_clip:ViT-B-16/openapi", r"expected one of the tags openai, .*, found 'openapi'"),
        ("open_clip:ViT-B-16/laion2b_s34b_b88k", "trained with QuickGELU, as the spatial expert has it, found GELU"),
        ("timm:vit_base_patch16_clip_224.laion2b", "trained with QuickGELU, as the spatial expert has it, found GELU"),
        ("timm:resnet5", r"a pretrained model that timm knows, found 'resnet5' \(did you mean 'resnet"),
        ("open_clip:RN50/cc12m_nope", "expected one of the tags"),
    ],
)
def test_unknown_names_and_other_networks_are_refused_before_anything_is_fetched(name, message):
    with pytest.raises(UserInputError, match=message):
        resolve_hub_name(name)


@pytest.mark.parametrize(
    ("written", "repository", "file"),
    [
        ("clip", "clip", "open_clip_model.safetensors"),
        ("org/clip/", "org/clip", "open_clip_model.safetensors"),
        ("org/clip/a/b.pt", "org/clip", "a/b.pt"),
    ],
)
def test_a_registrys_repository_may_lack_an_organisation_or_name_a_file(monkeypatch, written, repository, file):
    from open_clip import pretrained

    monkeypatch.setitem(pretrained._PRETRAINED["ViT-B-16"], "elsewhere", {"hf_hub": written, "quick_gelu": True})
    source = resolve_hub_name("open_clip:ViT-B-16/elsewhere")
    assert (source.repository, source.files[0]) == (repository, file)


def test_a_model_that_only_has_an_address_says_so(monkeypatch):
    from open_clip import pretrained

    only_url = {"url": "https://example.org/weights.pt", "quick_gelu": True}
    monkeypatch.setitem(pretrained._PRETRAINED["ViT-B-16"], "elsewhere", only_url)
    with pytest.raises(UserInputError, match=r"found none; fetch https://example\.org/weights\.pt and give the file's"):
        resolve_hub_name("open_clip:ViT-B-16/elsewhere")


def test_a_repositorys_file_is_fetched_once_and_imported_like_any_other(hub, access, clip_bytes, tmp_path):
    hub.repositories["org/clip"] = {"README.md": b"x", "model.safetensors": clip_bytes}
    path, origin = fetch("hf-hub:org/clip@v1", access)
    assert path.read_bytes() == clip_bytes
    out = tmp_path / "ours.safetensors"
    options = ImportOptions(sizes=SIZES, origin=origin)
    report = import_weights(path, out, kind="clip", options=options)
    assert report.source_sha256 == hashlib.sha256(clip_bytes).hexdigest()
    told = json.loads(read_tensor_file(out).metadata[EXPERT_KEY])
    expected = {
        "source": "hf-hub:org/clip@v1",
        "repository": "org/clip",
        "revision": COMMIT,
        "file": "model.safetensors",
    }
    assert expected.items() <= told.items()
    assert told["source_sha256"] == report.source_sha256
    hub.requests.clear()
    assert fetch("hf-hub:org/clip@v1", access)[0] == path
    assert hub.requests == ["GET /api/models/org/clip/revision/v1"]


@pytest.mark.parametrize("first", range(len(PLAIN_FILES)))
def test_the_weights_are_looked_for_in_a_fixed_order(hub, access, first):
    hub.repositories["org/clip"] = {name: name.encode() for name in ("README.md", *reversed(PLAIN_FILES[first:]))}
    path, origin = fetch("hf-hub:org/clip", access)
    assert (origin.file, path.read_bytes()) == (PLAIN_FILES[first], PLAIN_FILES[first].encode())


def _never(*_arguments, **_options):
    raise AssertionError("a file was unpickled in this process")


def test_open_clips_name_takes_open_clips_file_and_our_importer_reads_it(hub, access, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "load", _never)
    monkeypatch.setattr(torch.jit, "load", _never)
    expert = awake_expert("spatial")
    state = {name: tensor.clone() for name, tensor in open_clip_state(expert.state_dict()).items()}
    files = {"model.safetensors": b"timm's", "open_clip_model.safetensors": safetensors.torch.save(state)}
    hub.repositories["timm/vit_base_patch16_clip_224.openai"] = files
    path, _ = fetch("open_clip:ViT-B-16-quickgelu/openai", access)
    import_weights(path, tmp_path / "o.safetensors", kind="clip", options=ImportOptions(sizes=SIZES))
    written = read_tensor_file(tmp_path / "o.safetensors").tensors
    assert all(torch.equal(written[name], tensor) for name, tensor in expert.state_dict().items())


@pytest.mark.parametrize(
    ("config", "activation"),
    [
        ({"config.json": {"vision_config": {"hidden_act": "quick_gelu"}, "hidden_act": "relu"}}, "quick_gelu"),
        ({"config.json": {"vision_config": {}}}, ""),
        ({"config.json": {"hidden_act": "gelu"}}, "gelu"),
        ({"open_clip_config.json": {"model_cfg": {"embed_dim": 512, "quick_gelu": True}}}, "quick_gelu"),
        ({"open_clip_config.json": {"model_cfg": {"embed_dim": 512}}}, "gelu"),
        (
            {"config.json": {"architecture": "vit_base_patch16_clip_224", "pretrained_cfg": {"tag": "openai"}}},
            "quick_gelu",
        ),
        (
            {"config.json": {"architecture": "vit_base_patch16_clip_224", "pretrained_cfg": {"tag": "laion2b"}}},
            "gelu",
        ),
        ({"config.json": {"architecture": "vit_base_patch16_clip_224"}}, "gelu"),
        ({"config.json": {"architecture": "vit_base_patch16_clip_quickgelu_224"}}, "quick_gelu"),
        ({"config.json": []}, ""),
        ({"config.json": "x", "open_clip_config.json": {"model_cfg": {}}}, "gelu"),
        (
            {"config.json": {"architecture": "x"}, "open_clip_config.json": {"model_cfg": {"quick_gelu": True}}},
            "quick_gelu",
        ),
    ],
)
def test_weights_of_another_activation_are_refused_where_the_repository_names_it(
    hub, access, clip_bytes, tmp_path, config, activation
):
    """Most of open_clip's own CLIPs have GELU: every tensor would fit, and every feature be wrong."""
    files = {name: json.dumps(document).encode() for name, document in config.items()}
    hub.repositories["org/clip"] = {"model.safetensors": clip_bytes, **files}
    path, origin = fetch("hf-hub:org/clip", access)
    assert origin.activation == activation
    options = ImportOptions(sizes=SIZES, origin=origin)
    out = tmp_path / "new" / "o.safetensors"
    if activation == "gelu":
        message = "hf-hub:org/clip: expected weights trained with quick_gelu, as our clip computes, found gelu"
        with pytest.raises(WeightsMismatchError, match=message):
            import_weights(path, out, kind="clip", options=options)
        assert not out.parent.exists()
    else:
        import_weights(path, out, kind="clip", options=options)


@pytest.mark.parametrize(("tag", "activation"), [("openai", "quick_gelu"), ("laion2b", "gelu")])
def test_the_repositorys_name_has_the_tag_where_timms_config_has_none(tag, activation):
    config = {"architecture": "vit_base_patch16_clip_224"}
    assert activation_of(config, repository=f"timm/vit_base_patch16_clip_224.{tag}") == activation


@pytest.mark.parametrize(
    ("name", "config", "found"),
    [
        ("hf-hub:timm/resnet50.a1_in1k", {"architecture": "resnet50"}, None),
        ("timm:resnet50.a1_in1k", {}, None),
        ("hf-hub:timm/resnet50.a1_in1k", {"architecture": "resnetaa50"}, "resnetaa50"),
        ("timm:resnetblur50.bt_in1k", {"architecture": "resnet50"}, "resnetblur50"),
        ("hf-hub:timm/resnet50.a1_in1k", [], r"none in its config\.json"),
    ],
)
def test_networks_with_the_tensors_of_resnet50_are_refused_by_their_names(hub, access, tmp_path, name, config, found):
    files = {"model.safetensors": safetensors.torch.save({"a": torch.ones(1)}), "config.json": json.dumps(config)}
    hub.repositories["timm/" + name.partition(":")[2].removeprefix("timm/")] = {
        file: content if isinstance(content, bytes) else content.encode() for file, content in files.items()
    }
    path, origin = fetch(name, access)
    message = f"{name}: expected the architecture resnet50, found {found}; other networks have the same tensors"
    with pytest.raises(WeightsMismatchError, match=message if found else "expected one of the layouts ResNet-50"):
        import_weights(path, tmp_path / "o.safetensors", kind="resnet50", options=ImportOptions(origin=origin))


@pytest.mark.parametrize("encoder", ACTIVATIONS)
def test_the_activation_that_is_asked_of_a_repository_is_the_one_our_expert_computes(encoder):
    config = replace(ALONE[encoder], dim=64, depth=1, num_heads=1)
    expert = build_expert(config.kind, config, ClipSpec())
    assert type(expert.layers[0].mlp.activation) is MODULES[ACTIVATIONS[encoder]]


@pytest.mark.slow
def test_5_1_a_fetched_pickle_is_read_in_the_limited_child_like_any_other(hub, access, tmp_path):
    import os

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    torch.save({"model": Evil()}, tmp_path / "evil.bin")
    hub.repositories["org/evil"] = {"pytorch_model.bin": (tmp_path / "evil.bin").read_bytes()}
    with pytest.raises(ForeignFileRefusedError, match="nothing of the file was run"):
        import_weights(fetch("hf-hub:org/evil", access)[0], tmp_path / "o.safetensors", kind="clip")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("hf-hub:org/none", UserInputError, r"has no org/none \(revision main\), or not for everyone; check the name"),
        ("hf-hub:org/clip@v9", UserInputError, r"has no org/clip \(revision v9\); check the revision"),
        ("hf-hub:org/empty", UserInputError, r"expected one of model\.safetensors, .* in org/empty, found README\.md"),
        (
            "hf-hub:org/gated",
            EnvironmentFault,
            r"gives org/gated .* to accounts only; fetch model\.safetensors .* from",
        ),
    ],
)
def test_what_a_hub_refuses_is_one_line(hub, access, name, error, message):
    hub.repositories |= {"org/clip": {"model.safetensors": b""}, "org/empty": {"README.md": b"x"}, "org/gated": {}}
    hub.gated.add("org/gated")
    with pytest.raises(error, match=message) as caught:
        fetch(name, access)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("commit", ["", "main", "../../../etc", COMMIT.upper()])
def test_what_names_no_commit_is_no_hub(hub, access, commit):
    hub.repositories["org/clip"], hub.commit = {"model.safetensors": b"x"}, commit
    with pytest.raises(UserInputError, match=r"to name a commit of org/clip, found .*; is it a hub\?"):
        fetch("hf-hub:org/clip", access)
    assert not access.cache_folder.exists()


@pytest.mark.slow
def test_a_file_that_breaks_off_again_and_again_is_given_up_within_seconds(hub, access):
    hub.repositories["org/clip"], hub.torn = {"model.safetensors": bytes(1000)}, True
    begin = time.monotonic()
    with pytest.raises(EnvironmentFault, match=r"cannot get org/clip .*peer closed connection"):
        fetch("hf-hub:org/clip", access)
    assert time.monotonic() - begin < 60
    assert not list(access.cache_folder.rglob("model.safetensors"))


def test_without_a_network_one_line_says_how_to_do_without_it_and_soon(tmp_path):
    endpoint = _closed_endpoint()
    begin = time.monotonic()
    with pytest.raises(
        EnvironmentFault,
        match=rf"hf-hub:org/clip: cannot get org/clip \(revision main\) from {endpoint} \(.*refused.*\); "
        rf"fetch model\.safetensors or .* from {endpoint}/org/clip where there is a network, bring the file here and "
        r"give its path instead of the name",
    ) as caught:
        fetch("hf-hub:org/clip", HubAccess(endpoint=endpoint, cache_folder=tmp_path))
    assert "\n" not in str(caught.value)
    assert time.monotonic() - begin < 10


def test_a_hub_that_does_not_answer_is_waited_for_no_longer_than_said(tmp_path):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        access = HubAccess(
            endpoint=f"http://127.0.0.1:{silent.getsockname()[1]}", cache_folder=tmp_path, answer_seconds=0.3
        )
        begin = time.monotonic()
        with pytest.raises(EnvironmentFault, match=r"cannot get org/clip .*timed out"):
            fetch("hf-hub:org/clip", access)
    assert time.monotonic() - begin < 10


def test_a_name_in_a_recipe_is_imported_once_and_then_needs_no_network(hub, access, clip_bytes, tmp_path):
    hub.repositories["org/clip"] = {"model.safetensors": clip_bytes}
    folder = tmp_path / "imported"
    path = imported_expert(folder, "hf-hub:org/clip", encoder="clip", sizes=SIZES, access=access)
    assert path.stem == hashlib.sha256(path.read_bytes()).hexdigest()
    offline = HubAccess(endpoint=_closed_endpoint(), cache_folder=tmp_path / "nothing", answer_seconds=1.0)
    assert imported_expert(folder, "hf-hub:org/clip", encoder="clip", sizes=SIZES, access=offline) == path
    assert sorted(entry.suffix for entry in folder.iterdir()) == [".json", ".safetensors"]
    note = json.loads(next(folder.glob("*.json")).read_text())
    assert (note["source"], note["revision"], note["sha256"]) == ("hf-hub:org/clip", COMMIT, path.stem)
    with pytest.raises(EnvironmentFault, match="cannot get org/clip"):
        imported_expert(folder, "hf-hub:org/clip@v1", encoder="clip", sizes=SIZES, access=offline)


def test_a_kept_expert_that_was_changed_is_damage(hub, access, clip_bytes, tmp_path):
    hub.repositories["org/clip"] = {"model.safetensors": clip_bytes}
    folder = tmp_path / "imported"
    path = imported_expert(folder, "hf-hub:org/clip", encoder="clip", sizes=SIZES, access=access)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(WeightsDamageError, match=r"expected that sha256, found .*; remove it to import anew"):
        imported_expert(folder, "hf-hub:org/clip", encoder="clip", sizes=SIZES, access=access)
    path.unlink()
    assert imported_expert(folder, "hf-hub:org/clip", encoder="clip", sizes=SIZES, access=access) == path
    next(folder.glob("*.json")).write_text("{")
    with pytest.raises(WeightsDamageError, match="remove it to import anew"):
        imported_expert(folder, "hf-hub:org/clip", encoder="clip", sizes=SIZES, access=access)


def test_a_repository_of_another_encoder_leaves_nothing_in_the_folder(hub, access, clip_bytes, tmp_path):
    hub.repositories["org/clip"] = {"model.safetensors": clip_bytes}
    folder = tmp_path / "imported"
    with pytest.raises(UserInputError, match="expected one of the layouts VideoMAE"):
        imported_expert(folder, "hf-hub:org/clip", encoder="videomae", sizes=SIZES, access=access)
    assert not folder.exists()
