"""The experts: one encoder a file, and which of them an expert of the model is."""

from collections.abc import Callable

from ca2st.model.config import EncoderName, ModelConfig
from ca2st.model.experts.ast import ASTExpert
from ca2st.model.experts.clip import ClipExpert
from ca2st.model.experts.expert import ClipInputs, EncoderLayer, Expert, TransformerExpert
from ca2st.model.experts.resnet import ResNetExpert
from ca2st.model.experts.videomae import VideoMAEExpert
from ca2st.model.structure import ExpertName, encoder_of
from ca2st.spec import ClipSpec

ENCODERS: dict[EncoderName, Callable[[ModelConfig, ClipSpec], Expert]] = {
    "clip": ClipExpert,
    "videomae": VideoMAEExpert,
    "ast": ASTExpert,
    "resnet50": ResNetExpert,
}


def build_expert(name: ExpertName, config: ModelConfig, clip: ClipSpec) -> Expert:
    """The expert `name` (spatial, temporal, audio) of a model, by the encoder that `config` gives it."""
    return ENCODERS[encoder_of(config, name)](config, clip)


__all__ = [
    "ENCODERS",
    "ASTExpert",
    "ClipExpert",
    "ClipInputs",
    "EncoderLayer",
    "Expert",
    "ResNetExpert",
    "TransformerExpert",
    "VideoMAEExpert",
    "build_expert",
]
