"""Golden files: small models and what an independent implementation computed for them, against ours."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ca2st.errors import UserInputError
from ca2st.model.config import ModelConfig, TargetSpec
from ca2st.model.network import HolisticModel, ModelOutput
from ca2st.model.parameters import build_model
from ca2st.spec import ClipSpec
from ca2st.weights.errors import WeightsDamageError
from ca2st.weights.published import load_published
from ca2st.weights.tensor_files import TensorFile, read_tensor_file

TOLERANCE = 2e-5
"""Largest absolute difference allowed on any expected tensor, in float32."""

_SINGLE_TARGET = "label"
_VERB_NOUN = (TargetSpec(name="verb", num_classes=97), TargetSpec(name="noun", num_classes=300))
_WEIGHTS, _EXPECTED, _INTERVALS = "weights/", "expected/", "input/intervals_seconds"


@dataclass(frozen=True, kw_only=True, slots=True)
class GoldenReport:
    """How far our model is from one golden file."""

    file: Path
    """The file."""
    max_abs_diff: dict[str, float]
    """Largest absolute difference of every expected tensor; infinite where ours is not finite."""
    ok: bool
    """Whether all are within the tolerance."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Recipe:
    """The metadata of a golden file."""

    kind: str
    dim: int
    heads: int
    depth: int
    num_frames: int
    audio_frames: int
    classes: int
    composition: bool
    seed: int
    batch: int


def pix(shape: Sequence[int], *, salt: int) -> Float[Tensor, "..."]:
    """Reproducible input values in [-1, 1]: a multiplicative hash of the flat index.

    v = ((i * 2654435761 + salt * 40503) mod 2^32) >> 16, value = (v mod 997) / 498 - 1.
    """
    index = np.arange(int(np.prod(shape)), dtype=np.uint64)
    hashed = ((index * np.uint64(2654435761) + np.uint64(salt * 40503)) % np.uint64(2**32)) >> np.uint64(16)
    return torch.from_numpy(((hashed % 997) / 498 - 1).astype(np.float32)).reshape(tuple(shape))


def check_golden(paths: Sequence[Path], *, tolerance: float = TOLERANCE) -> list[GoldenReport]:
    """Build the model of each file, load its weights, run its input and compare every expected tensor.

    Raises:
        UserInputError: a file is missing, is no golden file, or its weights do not fit the model it describes.
        WeightsDamageError: a file is not a whole safetensors file.
    """
    return [_check(read_tensor_file(path), tolerance=tolerance) for path in paths]


def golden_model(file: TensorFile) -> HolisticModel:
    """The model that a golden file describes, with its weights, in evaluation mode.

    Raises:
        UserInputError: no golden file, or weights that do not fit.
    """
    recipe = _recipe(file)
    config = ModelConfig(
        kind=recipe.kind,  # type: ignore[arg-type]  # checked by the configuration
        dim=recipe.dim,
        num_heads=recipe.heads,
        depth=recipe.depth,
    )
    clip = ClipSpec(num_frames=recipe.num_frames, mel_rows=recipe.audio_frames or ClipSpec().mel_rows)
    single = (TargetSpec(name=_SINGLE_TARGET, num_classes=max(recipe.classes, 1)),)
    model = build_model(config, clip, _VERB_NOUN if recipe.composition else single)
    load_published(model, _below(file, _WEIGHTS), where=str(file.path))
    return model.eval()


def golden_output(model: HolisticModel, file: TensorFile) -> ModelOutput:
    """What `model` says about the input of a golden file."""
    recipe, clip = _recipe(file), model.clip
    frames, side = clip.num_frames, clip.crop_size
    no_intervals = torch.zeros(recipe.batch, 1 + frames // 2, 2)
    with torch.no_grad():
        output: ModelOutput = model(
            pix((recipe.batch, 3, frames, side, side), salt=recipe.seed),
            pix((recipe.batch, clip.mel_rows, clip.num_mel_bins), salt=recipe.seed + 1),
            file.tensors.get(_INTERVALS, no_intervals),
        )
    return output


def _check(file: TensorFile, *, tolerance: float) -> GoldenReport:
    output = golden_output(golden_model(file), file)
    differences = {
        name: _largest_difference(_found(output, name, where=file.path), expected)
        for name, expected in sorted(_below(file, _EXPECTED).items())
    }
    ok = bool(differences) and all(difference <= tolerance for difference in differences.values())
    return GoldenReport(file=file.path, max_abs_diff=differences, ok=ok)


def _found(output: ModelOutput, name: str, *, where: Path) -> Tensor:
    logits = {f"logits_{target}": tensor for target, tensor in output.logits.items()}
    known = {"logits" if key == f"logits_{_SINGLE_TARGET}" else key: tensor for key, tensor in logits.items()}
    known |= {f"feature_{expert}": tensor for expert, tensor in output.features.items()}
    if name not in known:
        raise UserInputError(f"{where}: expected/{name}: expected one of {', '.join(sorted(known))}")
    return known[name]


def _largest_difference(ours: Tensor, expected: Tensor) -> float:
    if ours.shape != expected.shape or not bool(torch.isfinite(ours).all()):
        return float("inf")
    return float((ours.double() - expected.double()).abs().max())


def _below(file: TensorFile, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in file.tensors.items() if name.startswith(prefix)}


def _recipe(file: TensorFile) -> _Recipe:
    if "golden" not in file.metadata:
        raise UserInputError(f"{file.path}: expected a golden file (metadata key 'golden'), found none; see its README")
    try:
        return _Recipe(**json.loads(file.metadata["golden"]))
    except (ValueError, TypeError) as error:
        raise WeightsDamageError(f"{file.path}: cannot read the metadata key 'golden': {error}") from error
