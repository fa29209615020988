"""What given expert files decide: which model they make, its width and depth, and the clip they were trained on."""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ca2st.errors import UserInputError
from ca2st.model.config import EXPERTS, EncoderName, ExpertName, ModelConfig, ModelKind
from ca2st.spec import ClipSpec
from ca2st.weights.errors import WeightsDamageError
from ca2st.weights.expert_files import EXPERT_KEY
from ca2st.weights.sizes import UnwrittenSizes, expert_sizes
from ca2st.weights.tensor_files import TensorFile, read_tensor_file

_USUAL: Mapping[ExpertName, EncoderName] = {"spatial": "clip", "temporal": "videomae", "audio": "ast"}
_SIZES = ("dim", "depth", "num_heads", "patch_size")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertSizes:
    """What the given experts have in common."""

    kind: ModelKind
    """The model whose experts are just these."""
    model_settings: Mapping[str, Any]
    """Width, depth, heads and encoders, by the recipe's keys."""
    clip_settings: Mapping[str, Any]
    """Frames and pixels that they were trained on, by the recipe's keys."""
    mel_rows: int | None
    """Spectrogram rows of the audio expert; None without one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _One:
    """One expert file."""

    path: Path
    encoder: EncoderName
    config: ModelConfig
    clip: ClipSpec


def kind_of(files: Collection[ExpertName]) -> ModelKind:
    """The model whose experts are just these.

    Raises:
        UserInputError: there is none.
    """
    for kind, experts in EXPERTS.items():
        if set(experts) == set(files):
            return kind
    known = "; ".join(f"{' + '.join(experts)} ({kind})" for kind, experts in EXPERTS.items())
    raise UserInputError(f"experts: expected the experts of a model ({known}), found {' + '.join(files)}")


def published_sizes(experts: Collection[ExpertName]) -> ExpertSizes:
    """What public experts are before they are fetched: ViT-B of the published clip; raises as `kind_of`."""
    config, clip = ModelConfig(), ClipSpec()
    return ExpertSizes(
        kind=kind_of(experts),
        model_settings={f"model.{size}": getattr(config, size) for size in _SIZES},
        clip_settings={"clip.num_frames": clip.num_frames, "clip.crop_size": clip.crop_size},
        mel_rows=clip.mel_rows if "audio" in experts else None,
    )


def read_expert_sizes(files: Mapping[ExpertName, Path], *, num_heads: int | None = None) -> ExpertSizes:
    """Read what the experts are off their files. `num_heads` counts where a file does not say it.

    Raises:
        UserInputError: no such file, no model has just these experts, or their sizes do not fit each other.
        WeightsDamageError: a file cannot be read.
    """
    kind = kind_of(files)
    read = {name: _read(name, path, num_heads=num_heads) for name, path in files.items()}
    for size in _SIZES:
        _require_equal(size, {one.path: getattr(one.config, size) for one in read.values() if _is_vit(one)})
    _require_equal("crop_size", {one.path: one.clip.crop_size for one in read.values() if _is_visual(one)})
    vit = next((one for one in read.values() if _is_vit(one)), None)
    return ExpertSizes(
        kind=kind,
        model_settings=_model_settings(read, vit),
        clip_settings=_clip_settings(read),
        mel_rows=read["audio"].clip.mel_rows if "audio" in read else None,
    )


def _read(name: ExpertName, path: Path, *, num_heads: int | None) -> _One:
    file = read_tensor_file(path)
    header = _header(file)
    encoder: EncoderName = header.get("encoder") or _encoder_of(name, file.tensors)
    sizes = UnwrittenSizes(num_heads=header.get("num_heads") or num_heads)
    config, clip = expert_sizes(encoder, file.tensors, sizes, where=str(path))
    try:
        clip = ClipSpec(**header["clip"]) if header else clip
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsDamageError(f"{path}: cannot read the metadata key {EXPERT_KEY!r}: {error!r}") from error
    return _One(path=path, encoder=encoder, config=config, clip=clip)


def _header(file: TensorFile) -> dict[str, Any]:
    try:
        header = json.loads(file.metadata.get(EXPERT_KEY, "{}"))
    except ValueError as error:
        raise WeightsDamageError(f"{file.path}: cannot read the metadata key {EXPERT_KEY!r}: {error!r}") from error
    return header if isinstance(header, dict) else {}


def _encoder_of(name: ExpertName, tensors: Mapping[str, Tensor]) -> EncoderName:
    """Of a file without a header: told by its tensors where another than the usual one can be meant."""
    if "stem.conv.weight" in tensors:
        return "resnet50"
    patches = tensors.get("patch_embed.weight")
    if name != "audio" and patches is not None:
        return "videomae" if patches.ndim == 5 else "clip"
    return _USUAL[name]


def _is_vit(one: _One) -> bool:
    return one.encoder != "resnet50"


def _is_visual(one: _One) -> bool:
    return one.encoder in ("clip", "videomae")


def _require_equal(size: str, values: Mapping[Path, int]) -> None:
    if len(set(values.values())) > 1:
        told = ", ".join(f"{value} in {path}" for path, value in values.items())
        raise UserInputError(f"experts: expected one {size} in all of them, found {told}; take experts of one size")


def _model_settings(read: Mapping[ExpertName, _One], vit: _One | None) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    if vit is not None:
        settings = {f"model.{size}": getattr(vit.config, size) for size in _SIZES}
    encoders = {name: one.encoder for name, one in read.items() if name != "audio"}
    return settings | {f"model.{name}_encoder": encoder for name, encoder in encoders.items()}


def _clip_settings(read: Mapping[ExpertName, _One]) -> dict[str, Any]:
    visual = [one for one in read.values() if _is_visual(one)]
    timed = next((one for one in visual if one.encoder == "videomae"), None)
    crop_size = visual[0].clip.crop_size if visual else ClipSpec().crop_size
    num_frames = (timed.clip if timed else ClipSpec()).num_frames
    return {"clip.num_frames": num_frames, "clip.crop_size": crop_size}
