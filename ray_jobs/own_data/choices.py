"""What to train on somebody's own videos: read off the given experts, decided in one pure function, with reasons."""

import json
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from ca2st.errors import UserInputError
from ca2st.model.config import EXPERTS, EncoderName, ExpertName, ModelConfig, ModelKind
from ca2st.spec import MEL_ROW_SECONDS, ClipSpec
from ca2st.weights.importer import EXPERT_KEY
from ca2st.weights.model_file import UnwrittenSizes, expert_sizes
from ca2st.weights.tensor_files import TensorFile, WeightsDamageError, read_tensor_file
from sharding.media.codecs import SIDE_MULTIPLE

Device = Literal["cpu", "cuda"]


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
class Facts:
    """What choices are made from. None: not known before the videos are read."""

    device: Device
    """What this machine trains on."""
    classes: tuple[str, ...]
    """Names of the classes."""
    num_clips: int
    """Videos to train on."""
    num_with_sound: int | None = None
    """How many of them have sound that is not silent."""
    num_silent: int = 0
    """How many have digital silence for sound."""
    median_seconds: float | None = None
    """Duration that half of them stay below."""
    experts: ExpertSizes | None = None
    """Pretrained experts that were given; None: none were."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """Settings that are chosen together."""

    settings: Mapping[str, Any]
    """Values by the recipe's keys, ``section.key``; empty for a choice that has to wait for the videos."""
    reason: str
    """Why, for the person."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Budget:
    """How long a default training may be on a device."""

    passes: int
    """Clips shown in all."""
    max_epochs: int
    max_batch: int


_FROM_NOTHING: Mapping[Device, _Budget] = {
    "cpu": _Budget(passes=6_000, max_epochs=60, max_batch=32),
    "cuda": _Budget(passes=200_000, max_epochs=100, max_batch=64),
}
_WITH_EXPERTS: Mapping[Device, _Budget] = {
    "cpu": _Budget(passes=200, max_epochs=10, max_batch=8),
    "cuda": _Budget(passes=20_000, max_epochs=50, max_batch=32),
}
_LEAST_EPOCHS = 2
_SHORT_SECONDS = 10.0
_MEL_ROWS = (96, 400)
_MEL_ROWS_STEP = 16
_SIDED = re.compile(r"(?:^|[^a-z])(left|right|leftwards?|rightwards?)(?:$|[^a-z])")


def choose(facts: Facts) -> tuple[Choice, ...]:
    """Return every choice for `facts`, in the order in which they are printed."""
    return tuple(part(facts) for part in _PARTS)


def settings_of(choices: tuple[Choice, ...]) -> dict[str, Any]:
    """Return all chosen settings by key."""
    return {key: value for choice in choices for key, value in choice.settings.items()}


def short_side(crop_size: int) -> int:
    """Return the stored height of the videos in pixels: 8/7 of the crop, as 256 is of 224, or the next 16 pixels."""
    return SIDE_MULTIPLE * math.ceil(crop_size * 8 / 7 / SIDE_MULTIPLE)


_USUAL: Mapping[ExpertName, EncoderName] = {"spatial": "clip", "temporal": "videomae", "audio": "ast"}
_SIZES = ("dim", "depth", "num_heads", "patch_size")


@dataclass(frozen=True, kw_only=True, slots=True)
class _One:
    """One expert file."""

    path: Path
    encoder: EncoderName
    config: ModelConfig
    clip: ClipSpec


def kind_of(files: Collection[ExpertName]) -> ModelKind:
    """Return the model whose experts are just these.

    Raises:
        UserInputError: there is none.
    """
    for kind, experts in EXPERTS.items():
        if set(experts) == set(files):
            return kind
    known = "; ".join(f"{' + '.join(experts)} ({kind})" for kind, experts in EXPERTS.items())
    raise UserInputError(f"experts: expected the experts of a model ({known}), found {' + '.join(files)}")


def published_sizes(experts: Collection[ExpertName]) -> ExpertSizes:
    """Return what public experts are before they are fetched: ViT-B of the published clip; raises as `kind_of`."""
    config, clip = ModelConfig(), ClipSpec()
    return ExpertSizes(
        kind=kind_of(experts),
        model_settings={f"model.{size}": getattr(config, size) for size in _SIZES},
        clip_settings={"clip.num_frames": clip.num_frames, "clip.crop_size": clip.crop_size},
        mel_rows=clip.mel_rows if "audio" in experts else None,
    )


def read_expert_sizes(files: Mapping[ExpertName, Path], *, num_heads: int | None = None) -> ExpertSizes:
    """Read the sizes of the experts from their files. `num_heads` counts where a file does not say it.

    Raises:
        UserInputError: no such file, no model has just these experts, or their sizes do not fit each other.
        WeightsDamageError: a file cannot be read.
    """
    kind = kind_of(files)
    read = {name: _read(name, path, num_heads=num_heads) for name, path in files.items()}
    vits = [one for one in read.values() if one.encoder != "resnet50"]
    visual = [one for one in vits if one.encoder in ("clip", "videomae")]
    for size in _SIZES:
        _require_equal(size, {one.path: getattr(one.config, size) for one in vits})
    _require_equal("crop_size", {one.path: one.clip.crop_size for one in visual})
    sizes = {f"model.{size}": getattr(vits[0].config, size) for size in _SIZES} if vits else {}
    encoders = {f"model.{name}_encoder": one.encoder for name, one in read.items() if name != "audio"}
    timed = next((one.clip for one in visual if one.encoder == "videomae"), ClipSpec())
    seen = visual[0].clip if visual else ClipSpec()
    return ExpertSizes(
        kind=kind,
        model_settings=sizes | encoders,
        clip_settings={"clip.num_frames": timed.num_frames, "clip.crop_size": seen.crop_size},
        mel_rows=read["audio"].clip.mel_rows if "audio" in read else None,
    )


def _kind(facts: Facts) -> Choice:
    kind = _kind_of(facts)
    if kind is None:
        return Choice(
            settings={},
            reason="model.kind: ca2st if half of the videos have sound, else cast; known once they are read",
        )
    if facts.experts is not None:
        return Choice(settings={"model.kind": kind}, reason=f"what the given experts make: {', '.join(EXPERTS[kind])}")
    silent = f" ({facts.num_silent} more have nothing but silence)" if facts.num_silent else ""
    sound = f"{facts.num_with_sound} of {facts.num_clips} training videos have sound{silent}"
    why = f"{sound}: space, time and audio" if kind == "ca2st" else f"{sound}, fewer than half: space and time alone"
    return Choice(settings={"model.kind": kind}, reason=why)


def _kind_of(facts: Facts) -> ModelKind | None:
    if facts.experts is not None:
        return facts.experts.kind
    if facts.num_with_sound is None:
        return None
    return "ca2st" if 2 * facts.num_with_sound >= facts.num_clips else "cast"


def _size(facts: Facts) -> Choice:
    if facts.experts is not None:
        return Choice(settings=facts.experts.model_settings, reason="the sizes of the given experts")
    if facts.device == "cpu":
        return Choice(
            settings={"model.dim": 96, "model.depth": 4, "model.num_heads": 4, "model.audio_stride": 16},
            reason="small enough to learn from nothing on a CPU in minutes",
        )
    return Choice(
        settings={"model.dim": 192, "model.depth": 6, "model.num_heads": 6, "model.audio_stride": 16},
        reason="small enough to learn from nothing on one GPU",
    )


def _trained(facts: Facts) -> Choice:
    if facts.experts is None:
        return Choice(settings={"trainable": "all"}, reason="no pretrained experts are given, so everything is learned")
    return Choice(settings={"trainable": "added"}, reason="the given experts stay as they are")


def _clip(facts: Facts) -> Choice:
    if facts.experts is not None:
        return Choice(settings=facts.experts.clip_settings, reason="what the given experts were trained on")
    if facts.device == "cpu":
        return Choice(settings={"clip.num_frames": 8, "clip.crop_size": 96}, reason="quick on a CPU")
    return Choice(settings={"clip.num_frames": 16, "clip.crop_size": 112}, reason="small pictures for a small model")


def _mel_rows(facts: Facts) -> Choice:
    low, high = _MEL_ROWS
    kind = _kind_of(facts)
    if kind is not None and "audio" not in EXPERTS[kind]:
        return Choice(settings={"clip.mel_rows": low}, reason="sound is not used, so little of it is read")
    if facts.experts is not None:
        rows = facts.experts.mel_rows
        return Choice(settings={"clip.mel_rows": rows}, reason="what the given audio expert was trained on")
    if facts.median_seconds is None:
        return Choice(settings={}, reason="clip.mel_rows: by the median duration; known once the videos are read")
    rows = int(facts.median_seconds / MEL_ROW_SECONDS) // _MEL_ROWS_STEP * _MEL_ROWS_STEP
    rows = min(max(rows, low), high)
    seconds = f"{rows * MEL_ROW_SECONDS:.1f} s of sound"
    return Choice(
        settings={"clip.mel_rows": rows}, reason=f"{seconds}; the median video has {facts.median_seconds:.1f} s"
    )


def _sampling(facts: Facts) -> Choice:
    seconds = facts.median_seconds
    if seconds is None:
        return Choice(
            settings={}, reason="data.sampling.scheme: by the median duration; known once the videos are read"
        )
    if seconds <= _SHORT_SECONDS:
        return Choice(
            settings={"data.sampling.scheme": "uniform"},
            reason=f"the median video has {seconds:.1f} s: frames are spread over a whole video",
        )
    return Choice(
        settings={"data.sampling.scheme": "dense", "data.sampling.frame_stride": 8},
        reason=f"the median video has {seconds:.1f} s: a window of it at a time, so that motion can be seen",
    )


def _augment(facts: Facts) -> Choice:
    low = 0.5 if facts.experts is None else 0.25
    sided = [name for name in facts.classes if _SIDED.search(name.lower())]
    settings = {"data.augment.crop_area": [low, 1.0], "data.augment.flip_probability": 0.0 if sided else 0.5}
    if sided:
        return Choice(settings=settings, reason=f"never mirrored: the class {sided[0]!r} names a side")
    return Choice(settings=settings, reason="mirrored half the time; set 0.0 where left and right tell classes apart")


def _length(facts: Facts) -> Choice:
    budget = _budget(facts)
    epochs = min(max(budget.passes // facts.num_clips, _LEAST_EPOCHS), budget.max_epochs)
    shown = f"{epochs * facts.num_clips:,}".replace(",", " ")
    slow = facts.device == "cpu" and facts.experts is not None
    where = "experts of this size want a GPU: kept short for a CPU" if slow else "minutes, not hours"
    if epochs * facts.num_clips > budget.passes:
        where = "the least that is of use; many videos take longer"
    return Choice(
        settings={"training.epochs": epochs, "training.validate_every_epochs": math.ceil(epochs / 5)},
        reason=f"{facts.num_clips} videos, {shown} showings in all: {where}",
    )


def _batch(facts: Facts) -> Choice:
    """Choose a power of two, about eight steps per epoch; the rate follows its root, as AdamW's noise does."""
    budget = _budget(facts)
    wanted = max(2, facts.num_clips // 8)
    batch = min(1 << (wanted.bit_length() - 1), budget.max_batch, facts.num_clips)
    peak = (1e-3 if facts.experts is None else 5e-4) * math.sqrt(batch / 32)
    per_device = batch if facts.experts is None else min(batch, 8)
    return Choice(
        settings={
            "training.global_batch_size": batch,
            "training.per_device_batch_size": per_device,
            "optim.base_lr": float(f"{peak * 256 / batch:.3g}"),
            "optim.warmup_epochs": 1.0,
            "optim.layer_decay": 1.0,
        },
        reason=f"so that {facts.num_clips} videos make steps enough; the rate fits the batch",
    )


def _precision(facts: Facts) -> Choice:
    if facts.device == "cuda":
        return Choice(settings={"training.precision": "bf16"}, reason="faster on a GPU")
    return Choice(settings={"training.precision": "fp32"}, reason="what a CPU computes in")


def _budget(facts: Facts) -> _Budget:
    return (_FROM_NOTHING if facts.experts is None else _WITH_EXPERTS)[facts.device]


_PARTS: tuple[Callable[[Facts], Choice], ...] = (
    _kind,
    _size,
    _trained,
    _clip,
    _mel_rows,
    _sampling,
    _augment,
    _length,
    _batch,
    _precision,
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
    """Return the encoder of a file without a header: by its tensors where another than the usual one can be meant."""
    if "stem.conv.weight" in tensors:
        return "resnet50"
    patches = tensors.get("patch_embed.weight")
    if name != "audio" and patches is not None:
        return "videomae" if patches.ndim == 5 else "clip"
    return _USUAL[name]


def _require_equal(size: str, values: Mapping[Path, int]) -> None:
    if len(set(values.values())) > 1:
        found = ", ".join(f"{value} in {path}" for path, value in values.items())
        raise UserInputError(f"experts: expected one {size} in all of them, found {found}; take experts of one size")
