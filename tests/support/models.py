"""Models small enough to run in milliseconds, and inputs for them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ca2st.model.config import ModelConfig, TargetSpec
from ca2st.model.experts import ClipInputs
from ca2st.model.network import HolisticModel, build_model
from ca2st.spec import ClipSpec
from ca2st.weights.model_file import build_described, read_description, refuse_published_names
from ca2st.weights.tensor_files import read_tensor_file

KINDS = ("cast", "cava", "ca2st", "spatial", "temporal", "audio")
JOINED_KINDS = ("cast", "cava", "ca2st")
TINY_CLIP = ClipSpec(num_frames=4, crop_size=32, mel_rows=48)
ONE_TARGET = (TargetSpec(name="label", num_classes=5),)
VERB_NOUN = (TargetSpec(name="verb", num_classes=97), TargetSpec(name="noun", num_classes=300))


def tiny_config(kind: str, **changes: Any) -> ModelConfig:
    return replace(ModelConfig(kind=kind, dim=32, depth=2, num_heads=2), **changes)  # type: ignore[arg-type]  # tests pass plain strings


def tiny_model(
    kind: str, *, clip: ClipSpec = TINY_CLIP, targets: tuple[TargetSpec, ...] = ONE_TARGET, **changes: Any
) -> HolisticModel:
    return build_model(tiny_config(kind, **changes), clip, targets).eval()


def model_of_file(path: Path) -> HolisticModel:
    """The whole model in a file that `ca2st weights import` or `export` wrote with our names."""
    file = read_tensor_file(path)
    description = read_description(file.metadata, where=str(path))
    assert description is not None, f"{path} holds no whole model"
    refuse_published_names(file.tensors, description, path=path)
    model, _ = build_described(description, file.tensors, where=str(path))
    return model.eval()


def inputs_for(clip: ClipSpec = TINY_CLIP, *, batch: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Video, spectrogram and intervals as the model takes them."""
    generator = torch.Generator().manual_seed(seed)
    video = torch.randn(batch, 3, clip.num_frames, clip.crop_size, clip.crop_size, generator=generator)
    mel = torch.randn(batch, clip.mel_rows, clip.num_mel_bins, generator=generator)
    starts = torch.rand(batch, 1 + clip.num_frames // 2, 1, generator=generator)
    return video, mel, torch.cat((starts, starts + 0.5), dim=-1)


def expert_inputs(clip: ClipSpec = TINY_CLIP, *, batch: int = 2, seed: int = 0) -> ClipInputs:
    video, mel, _ = inputs_for(clip, batch=batch, seed=seed)
    return ClipInputs(video, mel)


def wake(module: torch.nn.Module, *, seed: int = 0) -> None:
    """Give every parameter random values, so that nothing is zero only because training has not begun."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            scale = 0.3 if parameter.ndim > 1 else 0.1
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
