"""Names of the checkpoints that people have, one file an expert, as plain tables."""

from typing import Literal

from ca2st.model.structure import ExpertName
from ca2st.weights.layouts.ast import AST_LAYOUTS
from ca2st.weights.layouts.clip import CLIP_LAYOUTS
from ca2st.weights.layouts.layout import Layout, Translation, translate
from ca2st.weights.layouts.videomae import VIDEOMAE_LAYOUTS

ExpertKind = Literal["clip", "videomae", "ast"]

EXPERT_OF_KIND: dict[ExpertKind, ExpertName] = {"clip": "spatial", "videomae": "temporal", "ast": "audio"}
LAYOUTS_OF_KIND: dict[ExpertKind, tuple[Layout, ...]] = {
    "clip": CLIP_LAYOUTS,
    "videomae": VIDEOMAE_LAYOUTS,
    "ast": AST_LAYOUTS,
}

__all__ = ["EXPERT_OF_KIND", "LAYOUTS_OF_KIND", "ExpertKind", "Layout", "Translation", "translate"]
