"""The model: frozen experts for space, time and sound, joined by bottleneck cross-attention."""

from ca2st.model.build import build_model
from ca2st.model.config import AudioVisualConfig, ModelConfig, SpatialTemporalConfig, TargetSpec
from ca2st.model.holistic import HolisticModel, ModelOutput
from ca2st.model.info import ModelInfo, PartInfo, model_info
from ca2st.model.parameters import (
    ParameterCount,
    count_parameters,
    layer_index,
    no_weight_decay,
    set_trainable,
    set_trainable_by_rules,
)

__all__ = [
    "AudioVisualConfig",
    "HolisticModel",
    "ModelConfig",
    "ModelInfo",
    "ModelOutput",
    "ParameterCount",
    "PartInfo",
    "SpatialTemporalConfig",
    "TargetSpec",
    "build_model",
    "count_parameters",
    "layer_index",
    "model_info",
    "no_weight_decay",
    "set_trainable",
    "set_trainable_by_rules",
]
