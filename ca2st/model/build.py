"""From a configuration to a model."""

from collections.abc import Sequence

import torch

from ca2st.model.config import ModelConfig, TargetSpec, check_clip, check_targets
from ca2st.model.holistic import HolisticModel
from ca2st.model.parameters import set_trainable
from ca2st.spec import ClipSpec


def build_model(config: ModelConfig, clip: ClipSpec, targets: Sequence[TargetSpec], *, seed: int = 0) -> HolisticModel:
    """Build a model with random weights drawn from `seed` alone, its experts frozen (`set_trainable` changes that).

    Torch's own generator is left as it was. Inside `torch.device("meta")` nothing is allocated.

    Raises:
        UserInputError: sizes of clip and model do not fit, or the targets are not usable.
    """
    check_clip(config, clip)
    check_targets(targets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = HolisticModel(config, clip, targets)
    set_trainable(model, "added")
    return model
