"""Hugging Face models with random weights, saved to a file, imported, and compared feature by feature.

Small ones, and one through its file at the published size; `test_parity_full_size.py` has all three at that size.
"""

import warnings

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import layer_norm

from ca2st.model.config import ModelConfig
from ca2st.model.experts import ClipInputs, build_expert
from ca2st.spec import ClipSpec
from ca2st.weights.importer import ImportOptions, import_weights
from ca2st.weights.model_file import UnwrittenSizes
from ca2st.weights.tensor_files import load_strictly, read_tensor_file
from support.models import TINY_CLIP, expert_inputs

TOLERANCE = 1e-4
TINY = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY |= {"image_size": 32, "num_frames": 4, "max_length": 48}
FULL = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
FULL |= {"image_size": 224, "num_frames": 16, "max_length": 400}
SIZES = [pytest.param(TINY, id="tiny"), pytest.param(FULL, id="ViT-B", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def transformers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own affairs at import
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
    return transformers


def _config(config_type, sizes, **more):
    """The experts' own eps where transformers' default, 1e-12, is not that of the networks it ports."""
    known = config_type().to_dict()
    eps = known["layer_norm_eps"] if known["layer_norm_eps"] > 1e-6 else 1e-6
    given = {name: value for name, value in sizes.items() if name in known}
    return config_type(**given, patch_size=16, layer_norm_eps=eps, **more)


def _random(model):
    """Every parameter random, biases and norms too: what starts at 0 or 1 would hide a mix-up."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return model.eval()


def _clip(sizes):
    return ClipSpec(num_frames=sizes["num_frames"], crop_size=sizes["image_size"], mel_rows=sizes["max_length"])


def _saved(model, folder, *, pickled=False):
    """As `save_pretrained` writes it, or the module's own names in a pickle."""
    if pickled:
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
        return folder / "pytorch_model.bin"
    model.save_pretrained(folder)
    return folder / "model.safetensors"


def _imported(path, tmp_path, kind, sizes, **options):
    out = tmp_path / "ours.safetensors"
    unwritten = UnwrittenSizes(num_heads=sizes["num_attention_heads"], mel_rows=sizes["max_length"])
    report = import_weights(path, out, kind=kind, options=ImportOptions(sizes=unwritten, **options))
    name = {"clip": "spatial", "videomae": "temporal", "ast": "audio"}[kind]
    config = ModelConfig(
        kind=name,
        dim=sizes["hidden_size"],
        depth=sizes["num_hidden_layers"],
        num_heads=sizes["num_attention_heads"],
        adapters=False,
    )
    expert = build_expert(name, config, _clip(sizes))
    load_strictly(expert, read_tensor_file(out).tensors, where=str(out))
    return expert.eval(), report


def _agree(ours, theirs):
    assert ours.shape == theirs.shape
    assert theirs.std() > 0.01
    assert (ours - theirs).abs().max() / theirs.abs().max() <= TOLERANCE


@pytest.mark.parametrize("sizes", SIZES)
@torch.no_grad()
def test_clip_features_are_those_of_transformers(transformers, tmp_path, sizes):
    theirs = _random(transformers.CLIPVisionModel(_config(transformers.CLIPVisionConfig, sizes)))
    assert theirs.config.hidden_act == "quick_gelu"
    ours, report = _imported(_saved(theirs, tmp_path), tmp_path, "clip", sizes)
    video = expert_inputs(_clip(sizes), batch=1).video
    image = video[:, :, 1]
    expected = theirs(pixel_values=image).pooler_output
    still = ClipInputs(image[:, :, None].expand_as(video), torch.zeros(1, _clip(sizes).mel_rows, 128))
    _agree(ours(still), expected)
    assert report.layout == "Hugging Face CLIPVisionModel"


@torch.no_grad()
def test_a_pickled_hugging_face_file_and_a_two_tower_file_give_the_same_expert(transformers, tmp_path):
    vision = _config(transformers.CLIPVisionConfig, TINY).to_dict()
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    both = _random(transformers.CLIPModel(transformers.CLIPConfig(vision_config=vision, text_config=text)))
    _, whole = _imported(_saved(both, tmp_path, pickled=True), tmp_path, "clip", TINY)
    assert {name.partition(".")[0] for name in whole.unexpected} >= {"text_model", "visual_projection", "logit_scale"}
    alone = transformers.CLIPVisionModel(both.vision_model.config)
    alone.load_state_dict({name.removeprefix("vision_model."): x for name, x in both.vision_model.state_dict().items()})
    assert _imported(_saved(alone, tmp_path), tmp_path, "clip", TINY)[1].checksums == whole.checksums


@torch.no_grad()
def test_clip_as_timm_keeps_it_gives_timms_features(tmp_path):
    import timm

    sizes = {"img_size": 32, "embed_dim": 64, "depth": 2, "num_heads": 4, "num_classes": 8}
    theirs = _random(timm.create_model("vit_base_patch16_clip_quickgelu_224", pretrained=False, **sizes))
    save_file(theirs.state_dict(), tmp_path / "timm.safetensors")
    ours, report = _imported(tmp_path / "timm.safetensors", tmp_path, "clip", TINY)
    video = expert_inputs(_clip(TINY), batch=1).video
    still = ClipInputs(video[:, :, 1:2].expand_as(video), torch.zeros(1, _clip(TINY).mel_rows, 128))
    _agree(ours(still), theirs.forward_head(theirs.forward_features(video[:, :, 1]), pre_logits=True))
    assert (report.layout, report.unexpected) == ("timm's CLIP", ("head.bias", "head.weight"))


@torch.no_grad()
def test_videomae_features_are_those_of_transformers(transformers, tmp_path):
    sizes = TINY
    config = _config(transformers.VideoMAEConfig, sizes, use_mean_pooling=True)
    theirs = _random(transformers.VideoMAEForVideoClassification(config))
    theirs.classifier = torch.nn.Identity()  # what is left is the pooled feature after its final norm
    video = expert_inputs(_clip(sizes), batch=1).video
    ours, report = _imported(_saved(theirs, tmp_path), tmp_path, "videomae", sizes)
    _agree(ours(ClipInputs(video, torch.zeros(1, 48, 128))), theirs(pixel_values=video.transpose(1, 2)).logits)
    assert report.missing == ()


@torch.no_grad()
def test_a_bare_videomae_model_without_a_final_norm_needs_leave_and_agrees_up_to_it(transformers, tmp_path):
    theirs = _random(transformers.VideoMAEModel(_config(transformers.VideoMAEConfig, TINY, use_mean_pooling=True)))
    path = _saved(theirs, tmp_path, pickled=True)
    with pytest.raises(ValueError, match=r"2 missing: norm\.bias, norm\.weight"):
        _imported(path, tmp_path, "videomae", TINY)
    ours, _ = _imported(path, tmp_path, "videomae", TINY, allow_missing=("norm.*",))
    video = expert_inputs(_clip(TINY), batch=1).video
    mean = theirs(pixel_values=video.transpose(1, 2)).last_hidden_state.mean(dim=1)
    _agree(ours(ClipInputs(video, torch.zeros(1, 48, 128))), layer_norm(mean, mean.shape[-1:], eps=1e-6))


@torch.no_grad()
def test_a_pretrained_videomae_brings_its_encoder_norm_and_leaves_its_decoder(transformers, tmp_path):
    decoder = {"decoder_hidden_size": 32, "decoder_intermediate_size": 64, "decoder_num_hidden_layers": 1}
    config = _config(
        transformers.VideoMAEConfig, TINY, use_mean_pooling=False, decoder_num_attention_heads=2, **decoder
    )
    theirs = _random(transformers.VideoMAEForPreTraining(config))
    ours, report = _imported(_saved(theirs, tmp_path), tmp_path, "videomae", TINY)
    assert torch.equal(ours.norm.weight, theirs.videomae.layernorm.weight)
    assert any(name.startswith("decoder.") for name in report.unexpected)


@torch.no_grad()
def test_ast_features_are_those_of_transformers(transformers, tmp_path):
    sizes = TINY
    theirs = _random(transformers.ASTModel(_config(transformers.ASTConfig, sizes)))
    mel = expert_inputs(_clip(sizes), batch=1).mel
    expected = theirs(input_values=mel).pooler_output
    for pickled in (False, True):
        ours, report = _imported(_saved(theirs, tmp_path, pickled=pickled), tmp_path, "ast", sizes)
        _agree(ours(ClipInputs(torch.zeros(1, 3, 2, 32, 32), mel)), expected)
        assert report.layout.startswith("Hugging Face ASTModel")


def test_the_tiny_clip_is_the_one_that_other_tests_use():
    assert _clip(TINY) == TINY_CLIP
