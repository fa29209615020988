"""What no tensor shows and a repository tells: the activation that weights were trained with, and their network.

The wrong one loads, and gives wrong features.
"""

from collections.abc import Mapping

from ca2st.model.config import EncoderName
from ca2st.weights.errors import WeightsMismatchError
from ca2st.weights.hub_names import is_quick_gelu

CONFIG_FILES = ("config.json", "open_clip_config.json")
"""Where repositories say it, in the order they are asked."""
ACTIVATIONS: dict[EncoderName, str] = {"clip": "quick_gelu", "videomae": "gelu", "ast": "gelu"}
"""What our experts compute, in transformers' words."""
_ARCHITECTURES: dict[EncoderName, str] = {"resnet50": "resnet50"}
"""In timm's words, where other networks have the same tensors: ResNets with a blur before each stride, for one."""


def architecture_of(config: object) -> str:
    """The network that one of `CONFIG_FILES` names in timm's words; empty where it names none."""
    named = config.get("architecture") if isinstance(config, Mapping) else None
    return named if isinstance(named, str) else ""


def activation_of(config: object, *, repository: str) -> str:
    """The activation that one of `CONFIG_FILES` names, in transformers' words; empty where it names none.

    transformers writes `hidden_act`, of CLIP's visual half below `vision_config`; open_clip writes `quick_gelu`, and
    leaves it out where it is false; timm's CLIPs have it in their `architecture`, or by their tag in timm's list. The
    tag is below `pretrained_cfg`, or at the end of the name of `repository`.
    """
    if not isinstance(config, Mapping):
        return ""
    if "_clip_" in (architecture := architecture_of(config)):
        pretrained = config.get("pretrained_cfg")
        tag = pretrained.get("tag") if isinstance(pretrained, Mapping) else None
        tag = tag or repository.partition("/")[2].partition(".")[2]
        return "quick_gelu" if is_quick_gelu(f"{architecture}.{tag}") else "gelu"
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


def check_architecture(found: str, encoder: EncoderName, *, where: str) -> None:
    """Refuse a public checkpoint of another network whose tensors have our expert's names and shapes.

    An empty `found` is refused too where there are such networks.

    Raises:
        WeightsMismatchError: as said.
    """
    expected = _ARCHITECTURES.get(encoder)
    if expected and found != expected:
        raise WeightsMismatchError(
            f"{where}: expected the architecture {expected}, found {found or 'none in its config.json'}; "
            "other networks have the same tensors and give other features: take another, or give the path of a file "
            "that you know"
        )
