"""The experts: one idea, one file each."""

from collections.abc import Callable

from ca2st.model.config import ModelConfig
from ca2st.model.experts.audio import AudioExpert
from ca2st.model.experts.expert import ClipInputs, EncoderLayer, Expert
from ca2st.model.experts.spatial import SpatialExpert
from ca2st.model.experts.temporal import TemporalExpert
from ca2st.model.structure import ExpertName
from ca2st.spec import ClipSpec

EXPERT_TYPES: dict[ExpertName, Callable[[ModelConfig, ClipSpec], Expert]] = {
    "spatial": SpatialExpert,
    "temporal": TemporalExpert,
    "audio": AudioExpert,
}

__all__ = [
    "EXPERT_TYPES",
    "AudioExpert",
    "ClipInputs",
    "EncoderLayer",
    "Expert",
    "SpatialExpert",
    "TemporalExpert",
]
