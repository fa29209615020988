"""The experts at the size that is published: ViT-B, 12 layers of 768, against transformers' own code, token by token.

Weights go from memory to memory, under the names that transformers gives its modules; `test_parity.py` takes the way
through files.
"""

import pytest
import torch
from torch import nn

from ca2st.model.experts import ClipInputs, build_expert
from ca2st.spec import ClipSpec
from ca2st.weights.layouts import LAYOUTS_OF_ENCODER, translate
from ca2st.weights.model_file import UnwrittenSizes, expert_sizes
from ca2st.weights.tensor_files import load_strictly, without_leading_ones

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def transformers():
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own affairs at import
        import transformers
    return transformers


@pytest.fixture(autouse=True)
def _two_threads(_one_torch_thread):
    """These tensors are large."""
    torch.set_num_threads(2)


def _random(make):
    """A network of theirs, each of its parameters drawn once: no zeros or ones that would hide a mix-up."""
    from transformers.initialization import no_init_weights

    with no_init_weights():
        model = make()
    torch.manual_seed(3)
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                parameter.normal_(0, 0.02 if parameter.ndim > 1 else 0.1)
                if isinstance(module, nn.LayerNorm) and name == "weight":
                    parameter.add_(1)
    return model.eval()


def _ours(theirs, encoder, clip):
    found = translate(theirs.state_dict(), LAYOUTS_OF_ENCODER[encoder], where="memory").tensors
    config, _ = expert_sizes(encoder, found, UnwrittenSizes(), where="memory")
    assert (config.dim, config.depth, config.num_heads, config.patch_size) == (768, 12, 12, 16)
    expert = build_expert(config.kind, config, clip)
    own = expert.state_dict()
    load_strictly(expert, {k: without_leading_ones(x, own[k].ndim) for k, x in found.items()}, where="memory")
    return expert.eval()


def _tokens(expert, *, video=None, mel=None):
    batch = 1 if video is None else video.shape[0]
    inputs = ClipInputs(
        torch.zeros(batch, 3, 2, 16, 16) if video is None else video, torch.zeros(batch, 16, 16) if mel is None else mel
    )
    tokens = expert.embed(inputs)
    for index in range(12):
        tokens = expert.layer_at(index)(tokens)
    return tokens


def _agree(ours, theirs):
    assert ours.shape == theirs.shape
    assert theirs.std() > 0.1
    assert (ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max()


def _noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def test_clip_vit_b_is_transformers_clip_vision_model(transformers):
    config = transformers.CLIPVisionConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, patch_size=16
    )
    theirs = _random(lambda: transformers.CLIPVisionModel(config))
    ours = _ours(theirs, "clip", ClipSpec(num_frames=2))
    video = _noise(1, 3, 2, 224, 224)
    expected = theirs(pixel_values=video[:, :, 1])
    tokens = _tokens(ours, video=video)
    _agree(tokens[:, 0], expected.last_hidden_state)
    _agree(ours.pool(tokens), expected.pooler_output)


@torch.inference_mode()
def test_videomae_vit_b_is_transformers_videomae_model_on_16_frames(transformers):
    config = transformers.VideoMAEConfig(use_mean_pooling=False, layer_norm_eps=1e-6)
    assert (config.hidden_size, config.num_hidden_layers, config.num_frames, config.image_size) == (768, 12, 16, 224)
    theirs = _random(lambda: transformers.VideoMAEModel(config))
    ours = _ours(theirs, "videomae", ClipSpec())
    video = _noise(1, 3, 16, 224, 224)
    tokens = _tokens(ours, video=video)
    assert tokens.shape == (1, 1, 1568, 768)
    _agree(ours.norm(tokens[:, 0]), theirs(pixel_values=video.transpose(1, 2)).last_hidden_state)


@torch.inference_mode()
def test_ast_vit_b_is_transformers_ast_model(transformers):
    config = transformers.ASTConfig(max_length=400, layer_norm_eps=1e-6)
    assert (config.hidden_size, config.num_hidden_layers, config.num_mel_bins) == (768, 12, 128)
    theirs = _random(lambda: transformers.ASTModel(config))
    ours = _ours(theirs, "ast", ClipSpec())
    mel = _noise(1, 400, 128)
    expected = theirs(input_values=mel)
    tokens = _tokens(ours, mel=mel)
    assert tokens.shape == (1, 1, 2 + 12 * 39, 768)
    _agree(ours.norm(tokens[:, 0]), expected.last_hidden_state)
    _agree(ours.pool(tokens), expected.pooler_output)
