"""torch.compile of the layers that join the experts, in place: names, state and hooks stay as they are."""

import torch

from ca2st.model.holistic import HolisticModel

_RECOMPILE_LIMIT = 64
"""Layers of one structure share a compilation. Each structure (without DropPath, with and without audio) is compiled
anew for training, for evaluation and once for a varying number of clips: more than torch's default of 8 allows."""


def compile_layers(model: HolisticModel) -> None:
    """Compile each layer of `model` when it is first called.

    What cannot be compiled, a break in the graph or too many recompilations are errors, never a silent return to eager
    mode. Random draws are eager mode's own, so DropPath drops the same clips. Experts' embeddings, pooling and the head
    stay eager: they take a few per cent of the time.

    Raises dynamo's recompile limit for the whole process and leaves it raised: it is read at every later call, and
    other compiled functions of the process only get more room.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _RECOMPILE_LIMIT)
    for layer in model.layers:
        layer.compile(fullgraph=True, options={"fallback_random": True})
