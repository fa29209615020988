"""Checkpoints of every published layout become expert files; anything that does not fit becomes nothing."""

import hashlib
import json
import struct

import pytest
import safetensors.torch
import torch

from ca2st.checked_json import DocumentError
from ca2st.errors import EnvironmentFault, UserInputError
from ca2st.spec import ClipSpec
from ca2st.weights.importer import EXPERT_KEY, ImportOptions, import_weights, load_expert
from ca2st.weights.model_file import UnwrittenSizes
from ca2st.weights.tensor_files import (
    ForeignFileRefusedError,
    WeightsDamageError,
    WeightsMismatchError,
    checksum,
    read_tensor_file,
)
from support.foreign import (
    ast_state,
    awake_expert,
    clip_state,
    open_clip_state,
    torchscript_archive,
    training_checkpoint,
    videomae_state,
)
from support.models import TINY_CLIP, tiny_model

TINY = ImportOptions(sizes=UnwrittenSizes(num_heads=2, mel_rows=TINY_CLIP.mel_rows))
EXPERTS = {"clip": "spatial", "videomae": "temporal", "ast": "audio"}
STATES = {"clip": open_clip_state, "videomae": videomae_state, "ast": ast_state}


@pytest.fixture
def out(tmp_path):
    return tmp_path / "made" / "expert.safetensors"


def _safetensors(folder, state):
    path = folder / "theirs.safetensors"
    safetensors.torch.save_file({name: tensor.clone() for name, tensor in state.items()}, path)
    return path


def _same(out, expert):
    ours, written = expert.state_dict(), read_tensor_file(out).tensors
    return ours.keys() == written.keys() and all(torch.equal(ours[name], written[name]) for name in ours)


@pytest.mark.parametrize("kind", EXPERTS)
def test_an_imported_expert_is_the_expert_that_the_recipe_loads(tmp_path, out, kind):
    expert = awake_expert(EXPERTS[kind])
    path = _safetensors(tmp_path, STATES[kind](expert.state_dict()))
    report = import_weights(path, out, kind=kind, options=TINY)
    assert _same(out, expert)
    whole = tiny_model("ca2st")
    load_expert(whole, EXPERTS[kind], read_tensor_file(out).tensors)
    assert report.sha256 == hashlib.sha256(out.read_bytes()).hexdigest()
    assert report.source_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert report.model["depth"] == 2
    assert report.container == "safetensors"


def test_the_report_accounts_for_every_name_of_the_file(tmp_path, out):
    expert = awake_expert("audio")
    state = ast_state(expert.state_dict())
    report = import_weights(_safetensors(tmp_path, state), out, kind="ast", options=TINY)
    assert set(report.loaded) | set(report.unexpected) == set(state)
    assert set(report.unexpected) == {
        "module.mlp_head.0.weight",
        "module.mlp_head.1.weight",
        "module.v.head.weight",
        "module.v.head_dist.weight",
    }
    assert report.missing == ()
    assert report.checksums == {name: checksum(tensor) for name, tensor in expert.state_dict().items()}
    assert len(set(report.checksums.values())) == len(report.checksums)
    assert json.loads(read_tensor_file(out).metadata[EXPERT_KEY])["source_sha256"] == report.source_sha256


def test_the_same_file_gives_the_same_bytes(tmp_path, out):
    path = _safetensors(tmp_path, clip_state(awake_expert("spatial").state_dict()))
    first = import_weights(path, out, kind="clip", options=TINY).sha256
    assert import_weights(path, tmp_path / "again.safetensors", kind="clip", options=TINY).sha256 == first


def test_clips_torchscript_archive_is_read_without_running_it(tmp_path, out):
    expert = awake_expert("spatial")
    half = {name: tensor.half() for name, tensor in open_clip_state(expert.state_dict()).items()}
    report = import_weights(torchscript_archive(tmp_path / "ViT.pt", half), out, kind="clip", options=TINY)
    assert report.container == "TorchScript archive"
    written = read_tensor_file(out).tensors
    for name, tensor in expert.state_dict().items():
        assert written[name].dtype == torch.float32
        assert torch.equal(written[name], tensor.half().float())


@pytest.mark.parametrize(("prefix", "norm"), [("", "norm"), ("backbone.", "fc_norm"), ("encoder.", "norm")])
def test_videomae_prefixes_and_both_names_of_its_final_norm_are_understood(tmp_path, out, prefix, norm):
    expert = awake_expert("temporal")
    state = videomae_state(expert.state_dict(), prefix=prefix, norm=norm)
    report = import_weights(_safetensors(tmp_path, state), out, kind="videomae", options=TINY)
    assert _same(out, expert)
    assert report.layout == "VideoMAE"


@pytest.mark.parametrize("key", ["model", "module"])
def test_a_training_checkpoint_with_options_and_numpy_numbers_is_read(tmp_path, out, key):
    expert = awake_expert("temporal")
    path = tmp_path / "checkpoint.pth"
    torch.save(training_checkpoint(videomae_state(expert.state_dict()), key=key), path)
    report = import_weights(path, out, kind="videomae", options=TINY)
    assert _same(out, expert)
    assert (report.container, report.wrapper) == ("torch.save zip", key)


def test_the_old_pickle_format_is_read_too(tmp_path, out):
    expert = awake_expert("audio")
    path = tmp_path / "old.pth"
    torch.save(ast_state(expert.state_dict()), path, _use_new_zipfile_serialization=False)
    assert import_weights(path, out, kind="ast", options=TINY).container == "torch.save pickle"
    assert _same(out, expert)


@pytest.mark.parametrize("bias", ["q_bias", "v_bias"])
def test_t10_a_videomae_without_its_query_or_value_bias_is_refused_never_filled_up(tmp_path, out, bias):
    state = videomae_state(awake_expert("temporal").state_dict())
    del state[f"blocks.1.attn.{bias}"]
    with pytest.raises(WeightsMismatchError, match=rf"1 missing: layers\.1\.attention\.{bias}"):
        import_weights(_safetensors(tmp_path, state), out, kind="videomae", options=TINY)
    assert not out.parent.exists()


def test_t10_a_missing_tensor_is_allowed_by_name_only_and_reported(tmp_path, out):
    state = videomae_state(awake_expert("temporal").state_dict())
    del state["fc_norm.weight"], state["fc_norm.bias"]
    path = _safetensors(tmp_path, state)
    with pytest.raises(WeightsMismatchError, match=r"2 missing: norm\.bias, norm\.weight"):
        import_weights(path, out, kind="videomae", options=TINY)
    with pytest.raises(WeightsMismatchError, match=r"allow_missing patterns match nothing that is missing: layers\.9"):
        import_weights(
            path, out, kind="videomae", options=ImportOptions(sizes=TINY.sizes, allow_missing=("norm.*", "layers.9.*"))
        )
    report = import_weights(
        path, out, kind="videomae", options=ImportOptions(sizes=TINY.sizes, allow_missing=("norm.*",))
    )
    assert report.missing == ("norm.bias", "norm.weight")
    assert read_tensor_file(out).tensors["norm.weight"].eq(1).all()


def _without_layer_0(state):
    return {name: tensor for name, tensor in state.items() if ".blocks.0." not in name} | {
        "module.v.blocks.0.attn.qkv.weight": state["module.v.blocks.0.attn.qkv.weight"]
    }


def _reshaped(state):
    return state | {"module.v.blocks.1.mlp.fc1.weight": torch.ones(3, 3)}


def _with_more(state):
    return state | {"module.v.blocks.1.adapter.weight": torch.ones(3)}


def _with_integers(state):
    return state | {"module.v.norm.weight": torch.ones(32, dtype=torch.int32)}


def _with_a_gap(state):
    return {name.replace("blocks.1.", "blocks.2."): tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without_layer_0, r"11 missing: layers\.0\."),
        (_reshaped, r"1 of another shape: layers\.1\.mlp\.fc1\.weight expected \[128, 32\], found \[3, 3\]"),
        (_with_more, r"1 unexpected in the layout 'AST': module\.v\.blocks\.1\.adapter\.weight"),
        (_with_integers, r"1 not of a floating-point type: norm\.weight"),
        (_with_a_gap, r"expected all layers up to 2, found none of number \[1\]"),
    ],
)
def test_t10_tensors_that_do_not_fit_are_listed_and_nothing_is_written(tmp_path, out, change, message):
    path = _safetensors(tmp_path, change(ast_state(awake_expert("audio").state_dict())))
    with pytest.raises(WeightsMismatchError, match=message):
        import_weights(path, out, kind="ast", options=TINY)
    assert not out.parent.exists()


def test_an_expert_of_another_depth_is_refused_where_it_is_loaded(tmp_path, out):
    state = ast_state(awake_expert("audio").state_dict())
    shallow = {name: tensor for name, tensor in state.items() if "blocks.1." not in name}
    report = import_weights(_safetensors(tmp_path, shallow), out, kind="ast", options=TINY)
    assert report.model["depth"] == 1
    with pytest.raises(WeightsMismatchError, match=r"12 missing: layers\.1\."):
        load_expert(tiny_model("cava"), "audio", read_tensor_file(out).tensors)


def test_a_checkpoint_of_another_kind_names_the_layouts_that_were_expected(tmp_path, out):
    path = _safetensors(tmp_path, open_clip_state(awake_expert("spatial").state_dict()))
    with pytest.raises(WeightsMismatchError, match=r"expected one of the layouts AST .*; found names .*; check --kind"):
        import_weights(path, out, kind="ast", options=TINY)


def test_two_names_for_the_final_norm_are_refused(tmp_path, out):
    state = videomae_state(awake_expert("temporal").state_dict())
    state |= {"norm.weight": state["fc_norm.weight"], "norm.bias": state["fc_norm.bias"]}
    with pytest.raises(WeightsMismatchError, match=r"both stand for norm\.(weight|bias)"):
        import_weights(_safetensors(tmp_path, state), out, kind="videomae", options=TINY)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_damage_and_named(tmp_path, out, value):
    state = clip_state(awake_expert("spatial").state_dict())
    state["ln_post.bias"][3] = value
    with pytest.raises(WeightsDamageError, match=r"NaN or infinity in 1 tensors: norm\.bias"):
        import_weights(_safetensors(tmp_path, state), out, kind="clip", options=TINY)
    assert not out.parent.exists()


@pytest.mark.parametrize(("mel_rows", "first"), [(48, 2), (96, 0)])
def test_ast_positions_are_cut_around_the_centre(tmp_path, out, mel_rows, first):
    clip = ClipSpec(num_frames=4, crop_size=32, mel_rows=96)
    expert = awake_expert("audio", clip=clip)
    grid = torch.arange(12 * 9 * 32, dtype=torch.float32).reshape(12, 9, 32)
    positions = torch.cat((expert.positions[:2].detach(), grid.flatten(0, 1)))
    path = _safetensors(tmp_path, ast_state(expert.state_dict(), positions=positions))
    import_weights(path, out, kind="ast", options=ImportOptions(sizes=UnwrittenSizes(num_heads=2, mel_rows=mel_rows)))
    columns = (mel_rows - 16) // 10 + 1
    written = read_tensor_file(out).tensors["positions"]
    assert torch.equal(written[:2], expert.positions[:2])
    assert torch.equal(written[2:].reshape(12, columns, 32), grid[:, first : first + columns])


def test_ast_positions_are_stretched_when_the_spectrogram_is_longer(tmp_path, out):
    expert = awake_expert("audio")
    ramp = torch.arange(4, dtype=torch.float32).reshape(1, 4, 1).expand(12, 4, 32).reshape(-1, 32)
    path = _safetensors(
        tmp_path, ast_state(expert.state_dict(), positions=torch.cat((expert.positions[:2].detach(), ramp)))
    )
    import_weights(path, out, kind="ast", options=ImportOptions(sizes=UnwrittenSizes(num_heads=2, mel_rows=96)))
    stretched = read_tensor_file(out).tensors["positions"][2:].reshape(12, 9, 32)
    expected = torch.tensor([0, 1 / 6, 11 / 18, 19 / 18, 1.5, 35 / 18, 43 / 18, 17 / 6, 3])
    assert torch.allclose(stretched, expected.reshape(1, 9, 1).expand(12, 9, 32), atol=1e-6)


def test_the_official_grid_is_cut_from_column_50_minus_half():
    from ca2st.weights.positions import fit_audio_positions

    table = torch.cat((torch.full((2, 1), -1.0), torch.arange(101.0).repeat(12).reshape(-1, 1)))
    cut = fit_audio_positions(table, rows=12, columns=39, where="here")
    assert cut[2:41, 0].tolist() == list(range(50 - 39 // 2, 50 - 39 // 2 + 39))
    with pytest.raises(WeightsMismatchError, match="a grid of 12 rows, found 1213 tokens"):
        fit_audio_positions(table[:-1], rows=12, columns=39, where="here")


def test_the_number_of_heads_is_asked_for_where_the_width_does_not_tell(tmp_path, out):
    path = _safetensors(tmp_path, clip_state(awake_expert("spatial").state_dict()))
    with pytest.raises(WeightsMismatchError, match=r"multiple of 64 features per head, found 32; give --heads"):
        import_weights(path, out, kind="clip")


@pytest.mark.parametrize("name", ["expert.pt", "expert"])
def test_the_output_must_be_called_safetensors(tmp_path, name):
    with pytest.raises(UserInputError, match=r"--out: expected a name that ends in \.safetensors"):
        import_weights(tmp_path / "a.pth", tmp_path / name, kind="clip")


def test_an_output_folder_that_cannot_be_made_is_named(tmp_path):
    path = _safetensors(tmp_path, clip_state(awake_expert("spatial").state_dict()))
    with pytest.raises(EnvironmentFault, match=r"cannot make the folder of .*theirs\.safetensors/o\.safetensors"):
        import_weights(path, path / "o.safetensors", kind="clip", options=TINY)


def test_the_input_is_never_the_output(tmp_path):
    path = _safetensors(tmp_path, clip_state(awake_expert("spatial").state_dict()))
    before = path.read_bytes()
    with pytest.raises(UserInputError, match="expected a file other than the one that is read"):
        import_weights(path, path, kind="clip", options=TINY)
    assert path.read_bytes() == before


def test_a_missing_file_and_a_truncated_safetensors_file_are_named(tmp_path, out):
    with pytest.raises(ForeignFileRefusedError, match="expected a checkpoint, found no file at"):
        import_weights(tmp_path / "nowhere.pth", out, kind="clip")
    path = _safetensors(tmp_path, clip_state(awake_expert("spatial").state_dict()))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(WeightsDamageError, match="expected a whole safetensors file"):
        import_weights(path, out, kind="clip")
    path.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    with pytest.raises(WeightsDamageError, match="expected a whole safetensors file"):
        import_weights(path, out, kind="clip")


@pytest.mark.parametrize("kind", EXPERTS)
@pytest.mark.parametrize(
    "wrap",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"model.{name}",
        lambda name: f"state_dict.my_net.{name}",
        lambda name: ".".join((name.split(".")[0], "_fsdp_wrapped_module", *name.split(".")[1:])),
        lambda name: name.replace("blocks.0.", "blocks.0._orig_mod._checkpoint_wrapped_module."),
    ],
)
def test_what_wrappers_put_into_every_name_is_passed_over(tmp_path, out, kind, wrap):
    expert = awake_expert(EXPERTS[kind])
    state = {wrap(name): tensor for name, tensor in STATES[kind](expert.state_dict()).items()}
    report = import_weights(_safetensors(tmp_path, state), out, kind=kind, options=TINY)
    assert _same(out, expert)
    assert set(report.loaded) | set(report.unexpected) == set(state)


def test_an_average_of_weights_is_read_without_its_counter(tmp_path, out):
    expert = awake_expert("temporal")
    state = {f"module.{name}": tensor for name, tensor in videomae_state(expert.state_dict()).items()}
    report = import_weights(
        _safetensors(tmp_path, state | {"n_averaged": torch.tensor(3)}), out, kind="videomae", options=TINY
    )
    assert _same(out, expert)
    assert "n_averaged" not in report.loaded


def test_a_name_beside_the_wrapped_ones_is_refused_by_name(tmp_path, out):
    state = {f"model.{name}": tensor for name, tensor in videomae_state(awake_expert("temporal").state_dict()).items()}
    path = _safetensors(tmp_path, state | {"criterion.weight": torch.ones(3)})
    with pytest.raises(WeightsMismatchError, match=r"1 beside those that begin with 'model\.': criterion\.weight"):
        import_weights(path, out, kind="videomae", options=TINY)


def test_two_models_in_one_file_are_refused(tmp_path, out):
    state = videomae_state(awake_expert("temporal").state_dict())
    both = {f"{who}.{name}": tensor for who in ("student", "teacher") for name, tensor in state.items()}
    with pytest.raises(
        WeightsMismatchError, match=r"found several, below student\., teacher\.; save one of them alone"
    ):
        import_weights(_safetensors(tmp_path, both), out, kind="videomae", options=TINY)


def test_two_names_that_only_wrapping_tells_apart_are_refused(tmp_path, out):
    state = videomae_state(awake_expert("temporal").state_dict())
    state["blocks.0._orig_mod.attn.proj.weight"] = torch.ones(1)
    with pytest.raises(WeightsMismatchError, match=r"both stand for blocks\.0\.attn\.proj\.weight; expected"):
        import_weights(_safetensors(tmp_path, state), out, kind="videomae", options=TINY)


def test_a_checkpoint_of_lightning_is_read(tmp_path, out):
    expert = awake_expert("temporal")
    state = {f"net.{name}": tensor for name, tensor in videomae_state(expert.state_dict()).items()}
    document = {
        "epoch": 3,
        "global_step": 12,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": state,
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 0.1}]}],
        "lr_schedulers": [],
        "hyper_parameters": {"lr": 1e-3},
    }
    torch.save(document, tmp_path / "last.ckpt")
    report = import_weights(tmp_path / "last.ckpt", out, kind="videomae", options=TINY)
    assert _same(out, expert)
    assert report.wrapper == "state_dict"


@pytest.mark.parametrize("keys", [("ema",), ("state_dict", "model")])
def test_weights_below_keys_of_any_name_are_read_where_there_is_one_set_of_them(tmp_path, out, keys):
    expert = awake_expert("temporal")
    document = videomae_state(expert.state_dict())
    for key in reversed(keys):
        document = {key: document, "epoch": 1}
    torch.save(document, tmp_path / "any.pt")
    assert import_weights(tmp_path / "any.pt", out, kind="videomae", options=TINY).wrapper == ".".join(keys)
    assert _same(out, expert)


def test_two_sets_of_weights_below_keys_are_refused(tmp_path, out):
    state = videomae_state(awake_expert("temporal").state_dict())
    torch.save({"student": state, "teacher": state}, tmp_path / "dino.pt")
    with pytest.raises(
        ForeignFileRefusedError, match="expected one set of weights, found several, under 'student', 't"
    ):
        import_weights(tmp_path / "dino.pt", out, kind="videomae", options=TINY)


def _parts(folder, state):
    """As transformers saves a large model: an index and parts."""
    names = sorted(state)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, held in halves.items():
        safetensors.torch.save_file({name: state[name].clone() for name in held}, folder / file)
    places = {name: file for file, held in halves.items() for name in held}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return index


@pytest.mark.parametrize("given", ["index", "folder"])
def test_a_checkpoint_in_parts_is_read_by_its_index(tmp_path, out, given):
    expert = awake_expert("temporal")
    index = _parts(tmp_path, videomae_state(expert.state_dict()))
    path = index if given == "index" else tmp_path
    report = import_weights(path, out, kind="videomae", options=TINY)
    assert _same(out, expert)
    files = (index, *sorted(tmp_path.glob("model-*.safetensors")))
    lines = "".join(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files)
    assert report.source_sha256 == hashlib.sha256(lines.encode()).hexdigest()
    assert report.container == "safetensors in parts"


def _one_part(folder, index):
    return folder / "model-00002-of-00002.safetensors"


def _without_a_part(folder, index):
    (folder / "model-00002-of-00002.safetensors").unlink()
    return index


def _of_another_version(folder, index):
    safetensors.torch.save_file({"x": torch.ones(1)}, folder / "model-00002-of-00002.safetensors")
    return index


def _reaching_out(folder, index):
    index.write_text(json.dumps({"weight_map": {"x": "../model.safetensors"}}))
    return index


def _no_map(folder, index):
    index.write_text("{}")
    return index


def _two_files(folder, index):
    index.unlink()
    return folder


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (_one_part, ForeignFileRefusedError, "found part 2 of 2; give .*model.safetensors.index.json or the folder"),
        (_without_a_part, WeightsDamageError, "expected 2 parts beside it, found no model-00002-of-00002"),
        (
            _of_another_version,
            WeightsDamageError,
            "00002.safetensors: expected the .* tensors that .*fetch the parts of",
        ),
        (_reaching_out, ForeignFileRefusedError, r"found '\.\./model\.safetensors'; do not trust this file"),
        (_no_map, WeightsDamageError, "expected the field 'weight_map', found none; fetch it again"),
        (
            _two_files,
            ForeignFileRefusedError,
            "expected one .safetensors file, or parts with one .* give the file itself",
        ),
    ],
)
def test_parts_that_are_no_whole_checkpoint_are_refused(tmp_path, out, damage, error, message):
    index = _parts(tmp_path, videomae_state(awake_expert("temporal").state_dict()))
    with pytest.raises(error, match=message):
        import_weights(damage(tmp_path, index), out, kind="videomae", options=TINY)
    assert not out.exists()


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"hidden_act": "gelu"}, "gelu"),
        ({"vision_config": {"hidden_act": "gelu"}}, "gelu"),
        ({"model_cfg": {"embed_dim": 512}}, "gelu"),
        ({"hidden_act": "quick_gelu"}, ""),
        ({"vision_config": {}}, ""),
    ],
)
def test_a_config_beside_a_clip_tells_its_activation_and_another_one_is_refused(tmp_path, out, config, found):
    path = _safetensors(tmp_path, clip_state(awake_expert("spatial").state_dict()))
    (tmp_path / "config.json").write_text(json.dumps(config))
    if not found:
        import_weights(path, out, kind="clip", options=TINY)
        return
    with pytest.raises(WeightsMismatchError, match=r"trained with quick_gelu, as our clip computes, found gelu"):
        import_weights(path, out, kind="clip", options=TINY)
    assert not out.exists()


def test_a_config_beside_a_file_that_is_no_json_is_refused(tmp_path, out):
    path = _safetensors(tmp_path, clip_state(awake_expert("spatial").state_dict()))
    (tmp_path / "config.json").write_text("<html>")
    with pytest.raises(DocumentError, match=r"config\.json: expected a JSON document"):
        import_weights(path, out, kind="clip", options=TINY)
