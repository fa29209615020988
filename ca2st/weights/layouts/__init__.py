"""Names of the checkpoints that people have, one file an encoder, as plain tables."""

from ca2st.model.config import EncoderName
from ca2st.weights.layouts.ast import AST_LAYOUTS
from ca2st.weights.layouts.clip import CLIP_LAYOUTS
from ca2st.weights.layouts.layout import COUNTERS, Layout, Translation, bare_names, common_prefix, translate
from ca2st.weights.layouts.resnet import RESNET50_LAYOUTS
from ca2st.weights.layouts.videomae import VIDEOMAE_LAYOUTS

LAYOUTS_OF_ENCODER: dict[EncoderName, tuple[Layout, ...]] = {
    "clip": CLIP_LAYOUTS,
    "videomae": VIDEOMAE_LAYOUTS,
    "ast": AST_LAYOUTS,
    "resnet50": RESNET50_LAYOUTS,
}

__all__ = ["COUNTERS", "LAYOUTS_OF_ENCODER", "Layout", "Translation", "bare_names", "common_prefix", "translate"]
