"""The activation that weights were trained with: no tensor shows it, and the wrong one gives wrong features."""

from collections.abc import Mapping
from typing import Any

from ca2st.model.config import EncoderName
from ca2st.weights.errors import WeightsMismatchError

CONFIG_FILES = ("config.json", "open_clip_config.json")
"""Where repositories say it, in the order they are asked."""
ACTIVATIONS: dict[EncoderName, str] = {"clip": "quick_gelu", "videomae": "gelu", "ast": "gelu"}
"""What our experts compute, in transformers' words."""


def activation_of(config: Mapping[str, Any]) -> str:
    """The activation that one of `CONFIG_FILES` names, in transformers' words; empty where it names none.

    transformers writes `hidden_act`, of CLIP's visual half below `vision_config`; open_clip writes `quick_gelu`, and
    leaves it out where it is false.
    """
    model = config.get("model_cfg")
    if isinstance(model, Mapping):
        return "quick_gelu" if model.get("quick_gelu") else "gelu"
    vision = config.get("vision_config")
    named = vision.get("hidden_act") if isinstance(vision, Mapping) else config.get("hidden_act")
    return named if isinstance(named, str) else ""


def check_activation(found: str, encoder: EncoderName, *, where: str) -> None:
    """Refuse weights that were trained with another activation; an empty `found` is not known and passes.

    Raises:
        WeightsMismatchError: as said.
    """
    expected = ACTIVATIONS.get(encoder, "")
    if found and expected and found != expected:
        raise WeightsMismatchError(
            f"{where}: expected weights trained with {expected}, as our {encoder} computes, found {found}; "
            "they would load and give wrong features: take others"
        )
