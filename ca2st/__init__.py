"""CA2ST: frozen experts for audio, space and time, joined by bottleneck cross-attention."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ca2st.batch import ClipBatch as ClipBatch
    from ca2st.errors import CA2STError as CA2STError
    from ca2st.model.config import AudioVisualConfig as AudioVisualConfig
    from ca2st.model.network import HolisticModel as HolisticModel
    from ca2st.model.network import build_model as build_model
    from ca2st.spec import ClipSpec as ClipSpec

__version__ = "0.1.0"

_HOMES = {
    "AudioVisualConfig": "ca2st.model.config",
    "CA2STError": "ca2st.errors",
    "ClipBatch": "ca2st.batch",
    "ClipSpec": "ca2st.spec",
    "HolisticModel": "ca2st.model.network",
    "build_model": "ca2st.model.network",
}

__all__ = [
    "AudioVisualConfig",
    "CA2STError",
    "ClipBatch",
    "ClipSpec",
    "HolisticModel",
    "__version__",
    "build_model",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its home when it is first asked for; nothing heavy is imported before."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
