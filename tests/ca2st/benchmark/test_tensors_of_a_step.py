"""Which tensors a training step makes: no matrix of scores, no gradient of a frozen weight. Every operation is seen."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ca2st.benchmark.case import plain_model
from ca2st.model.network import HolisticModel, set_trainable
from ca2st.spec import ClipSpec
from support.models import inputs_for, tiny_model

HEADS = 4
LONG_CLIP = ClipSpec(num_frames=16, crop_size=64, mel_rows=400)
VIDEO_PATCHES, AUDIO_PATCHES = 8 * 4 * 4, 12 * 39
GLOBAL_SCORES = HEADS * VIDEO_PATCHES * AUDIO_PATCHES


class Made(TorchDispatchMode):
    """Sizes and shapes of all tensors that operations make, forward and backward; views of parameters are not made."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.sizes: set[int] = set()
        self.shapes: set[tuple[int, ...]] = set()
        self._parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in self._parameters:
                self.sizes.add(leaf.numel())
                self.shapes.add(tuple(leaf.shape))
        return result


def _made_in_a_step(model: HolisticModel, clip: ClipSpec) -> Made:
    model.train()
    inputs = inputs_for(clip, batch=1)
    with Made(model) as made:
        model(*inputs).logits["label"].sum().backward()
    return made


@pytest.mark.parametrize("kind", ["cava", "ca2st"])
def test_global_audio_visual_attention_never_makes_the_matrix_of_scores(kind):
    model = tiny_model(kind, clip=LONG_CLIP, num_heads=HEADS)
    plain = _made_in_a_step(plain_model(model), LONG_CLIP)
    ours = _made_in_a_step(model, LONG_CLIP)
    assert GLOBAL_SCORES in plain.sizes, "the search must find the scores where they are made"
    assert max(ours.sizes) < GLOBAL_SCORES


def test_a_training_step_makes_no_gradient_of_a_frozen_weight():
    """The FFN's weights have shapes of their own, so a gradient of theirs would be seen even if it were thrown away."""
    clip = ClipSpec(num_frames=4, crop_size=32, mel_rows=48)
    model = tiny_model("ca2st", clip=clip, dim=256, num_heads=4)
    frozen = {tuple(layer.mlp.fc1.weight.shape) for expert in model.experts.values() for layer in expert.layers}
    made = _made_in_a_step(model, clip)
    assert not frozen & made.shapes
    assert [name for name, p in model.named_parameters() if p.grad is not None and not p.requires_grad] == []
    assert [name for name, p in model.named_parameters() if p.grad is None and p.requires_grad] == []
    set_trainable(model, "all")
    assert frozen <= _made_in_a_step(model, clip).shapes
