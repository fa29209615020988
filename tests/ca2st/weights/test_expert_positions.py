"""Expert files whose position tables are for another clip: fitted where the model says so, else refused."""

import pytest
import safetensors.torch
import torch

from ca2st.model.tokens import resize_table
from ca2st.spec import ClipSpec
from ca2st.weights.importer import (
    EXPERT_KEY,
    ImportOptions,
    expert_state,
    import_weights,
    load_expert,
    load_expert_file,
)
from ca2st.weights.model_file import UnwrittenSizes
from ca2st.weights.tensor_files import WeightsDamageError, WeightsMismatchError
from support.foreign import ast_state, awake_expert, clip_state, videomae_state
from support.models import TINY_CLIP, tiny_model

WIDE = ClipSpec(num_frames=4, crop_size=48, mel_rows=48)


def _imported(folder, state, kind, **sizes):
    path = folder / "theirs.safetensors"
    safetensors.torch.save_file({name: tensor.clone() for name, tensor in state.items()}, path)
    options = ImportOptions(sizes=UnwrittenSizes(num_heads=2, **sizes))
    return import_weights(path, folder / "ours.safetensors", kind=kind, options=options).out


def test_clip_positions_of_another_crop_are_refused_with_the_setting_that_is_missing():
    state = expert_state(tiny_model("spatial", clip=WIDE), "spatial")
    with pytest.raises(
        WeightsMismatchError,
        match=r"mine: expected positions for crops of 32 pixels, found them for 48; "
        r"set model\.pretrained_crop_size = 48, so that they are interpolated",
    ):
        load_expert(tiny_model("cast"), "spatial", state, where="mine")
    with pytest.raises(WeightsMismatchError, match=r"set model\.pretrained_crop_size = 48"):
        load_expert(tiny_model("cast", pretrained_crop_size=64), "spatial", state)


def test_clip_positions_of_the_pretrained_crop_are_interpolated_and_the_class_token_keeps_its_own():
    wide = awake_expert("spatial", clip=WIDE).state_dict()
    model = tiny_model("cast", pretrained_crop_size=48)
    load_expert(model, "spatial", wide)
    found = model.experts["spatial"].state_dict()
    assert torch.equal(found["positions"][0], wide["positions"][0])
    expected = resize_table(wide["positions"][1:], from_grid=(3, 3), to_grid=(2, 2))
    assert torch.equal(found["positions"][1:], expected)
    others = wide.keys() - {"positions"}
    assert all(torch.equal(found[name], wide[name]) for name in others)


def test_positions_that_were_interpolated_once_are_loaded_back_as_they_are():
    """A run keeps its frozen experts as it trained with them; its settings still name the pretrained crop."""
    model = tiny_model("cast", pretrained_crop_size=48)
    load_expert(model, "spatial", awake_expert("spatial", clip=WIDE).state_dict())
    kept = expert_state(model, "spatial")
    again = tiny_model("cast", pretrained_crop_size=48)
    load_expert(again, "spatial", kept)
    assert torch.equal(again.experts["spatial"].positions, kept["positions"])


def test_clip_as_the_temporal_expert_is_fitted_too():
    wide = awake_expert("spatial", clip=WIDE).state_dict()
    model = tiny_model("cast", temporal_encoder="clip", pretrained_crop_size=48)
    load_expert(model, "temporal", wide)
    assert model.experts["temporal"].positions.shape == (5, 32)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {},
            r"VideoMAE for num_frames 4, found one trained with 16, crop_size 32, found one trained with 224; "
            r"set model\.pretrained_num_frames = 16 and model\.pretrained_crop_size = 224",
        ),
        (
            {"pretrained_crop_size": 224},
            r"num_frames 4, found one trained with 16; set model\.pretrained_num_frames = 16,",
        ),
        (
            {"pretrained_num_frames": 16},
            r"crop_size 32, found one trained with 224; set model\.pretrained_crop_size = 224,",
        ),
    ],
)
def test_a_videomae_of_another_clip_is_refused_with_the_settings_that_are_missing(tmp_path, settings, message):
    path = _imported(tmp_path, videomae_state(awake_expert("temporal").state_dict()), "videomae")
    with pytest.raises(WeightsMismatchError, match=message):
        load_expert_file(tiny_model("cast", **settings), "temporal", path)


def test_a_videomae_goes_where_its_clip_is_named_or_is_the_models_own(tmp_path):
    expert = awake_expert("temporal")
    state = videomae_state(expert.state_dict())
    published = _imported(tmp_path, state, "videomae")
    load_expert_file(tiny_model("cast", pretrained_num_frames=16, pretrained_crop_size=224), "temporal", published)
    own = _imported(tmp_path, state, "videomae", num_frames=4, crop_size=32)
    model = tiny_model("cast")
    load_expert_file(model, "temporal", own)
    found = expert_state(model, "temporal")
    assert all(torch.equal(found[name], tensor) for name, tensor in expert.state_dict().items())


def test_an_expert_without_a_header_is_taken_for_the_models_clip(tmp_path):
    path = tmp_path / "own.safetensors"
    safetensors.torch.save_file(expert_state(tiny_model("temporal"), "temporal"), path)
    load_expert_file(tiny_model("cast"), "temporal", path)


def test_a_header_that_cannot_be_read_is_damage(tmp_path):
    path = tmp_path / "own.safetensors"
    safetensors.torch.save_file(expert_state(tiny_model("temporal"), "temporal"), path, metadata={EXPERT_KEY: "{}"})
    with pytest.raises(WeightsDamageError, match="cannot read the metadata key 'ca2st_expert'"):
        load_expert_file(tiny_model("cast"), "temporal", path)


@pytest.mark.parametrize(("made", "wanted", "found"), [(96, 48, "96 to 105"), (48, 96, "46 to 55")])
def test_positions_for_other_mel_rows_name_the_option_of_the_import(tmp_path, made, wanted, found):
    made_clip = ClipSpec(num_frames=4, crop_size=32, mel_rows=made)
    path = _imported(tmp_path, ast_state(awake_expert("audio", clip=made_clip).state_dict()), "ast", mel_rows=made)
    with pytest.raises(
        WeightsMismatchError,
        match=rf"expected positions for {wanted} mel rows \(\d columns of patches\), found them for {found} "
        rf"\(\d columns\); import the expert again with `ca2st weights import --mel-rows {wanted}`",
    ):
        load_expert_file(tiny_model("cava", clip=ClipSpec(num_frames=4, crop_size=32, mel_rows=wanted)), "audio", path)
    load_expert_file(tiny_model("cava", clip=made_clip), "audio", path)


def test_mel_rows_that_give_the_same_patches_are_the_same_table():
    state = expert_state(tiny_model("audio"), "audio")
    load_expert(tiny_model("cava", clip=ClipSpec(num_frames=4, crop_size=32, mel_rows=55)), "audio", state)


def test_a_crop_that_contradicts_the_file_is_refused_at_import(tmp_path):
    with pytest.raises(WeightsMismatchError, match=r"expected crops of 64 pixels as asked, found positions for 32"):
        _imported(tmp_path, clip_state(awake_expert("spatial").state_dict()), "clip", crop_size=64)


def test_the_header_says_where_the_file_came_from_but_not_where_it_lay(tmp_path):
    import json

    from ca2st.weights.tensor_files import read_tensor_file

    out = _imported(tmp_path, clip_state(awake_expert("spatial").state_dict()), "clip")
    told = json.loads(read_tensor_file(out).metadata[EXPERT_KEY])
    assert (told["encoder"], told["layout"], told["source"]) == ("clip", "CLIP", "theirs.safetensors")
    assert told["clip"]["crop_size"] == TINY_CLIP.crop_size
    assert str(tmp_path) not in json.dumps(told)
