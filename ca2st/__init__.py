"""CA2ST: frozen experts for audio, space and time, joined by bottleneck cross-attention."""

__version__ = "0.1.0"
