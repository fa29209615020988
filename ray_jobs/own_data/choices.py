"""What to train on somebody's own videos: read off the given experts, decided in one pure function, with reasons."""

import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor

from ca2st.errors import UserInputError
from ca2st.model.config import EXPERTS, EncoderName, ExpertName, ModelConfig, ModelKind
from ca2st.spec import MEL_ROW_SECONDS, ClipSpec
from ca2st.weights.importer import EXPERT_KEY
from ca2st.weights.model_file import UnwrittenSizes, expert_sizes
from ca2st.weights.tensor_files import WeightsDamageError, read_tensor_file
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
    classes: tuple[str, ...]
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


class Choice(NamedTuple):
    """Settings that are chosen together."""

    settings: Mapping[str, Any]
    """Values by the recipe's keys, ``section.key``; empty for a choice that has to wait for the videos."""
    reason: str
    """Why, for the person."""


_FROM_NOTHING: Mapping[Device, tuple[int, int, int]] = {"cpu": (6_000, 60, 32), "cuda": (200_000, 100, 64)}
_WITH_EXPERTS: Mapping[Device, tuple[int, int, int]] = {"cpu": (200, 10, 8), "cuda": (20_000, 50, 32)}
"""How long a default training may be: clips shown in all, epochs, and clips per batch."""
_LEAST_EPOCHS = 2
_SHORT_SECONDS = 10.0
_MEL_ROWS = (96, 400)
_MEL_ROWS_STEP = 16
_SIDED = re.compile(r"(?:^|[^a-z])(left|right|leftwards?|rightwards?)(?:$|[^a-z])")


def choose(facts: Facts) -> tuple[Choice, ...]:
    """Return every choice for `facts`, in the order in which they are printed."""
    precision, why = ("bf16", "faster on a GPU") if facts.device == "cuda" else ("fp32", "what a CPU computes in")
    return (
        _kind(facts),
        *_sizes(facts),
        _mel_rows(facts),
        _sampling(facts),
        _augment(facts),
        *_length_and_batch(facts),
        Choice({"training.precision": precision}, why),
    )


def settings_of(choices: tuple[Choice, ...]) -> dict[str, Any]:
    """Return all chosen settings by key."""
    return {key: value for choice in choices for key, value in choice.settings.items()}


def short_side(crop_size: int) -> int:
    """Return the stored height of the videos in pixels: 8/7 of the crop, as 256 is of 224, or the next 16 pixels."""
    return SIDE_MULTIPLE * math.ceil(crop_size * 8 / 7 / SIDE_MULTIPLE)


_SIZES = ("dim", "depth", "num_heads", "patch_size")


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
    vits = {files[name]: config for name, (encoder, config, _) in read.items() if encoder != "resnet50"}
    visual = {files[name]: clip for name, (encoder, _, clip) in read.items() if encoder in ("clip", "videomae")}
    for size in _SIZES:
        _require_equal(size, {path: getattr(config, size) for path, config in vits.items()})
    _require_equal("crop_size", {path: clip.crop_size for path, clip in visual.items()})
    first = next(iter(vits.values()), None)
    sizes = {} if first is None else {f"model.{size}": getattr(first, size) for size in _SIZES}
    encoders = {f"model.{name}_encoder": encoder for name, (encoder, _, _) in read.items() if name != "audio"}
    timed = next((clip for encoder, _, clip in read.values() if encoder == "videomae"), ClipSpec())
    seen = next(iter(visual.values()), ClipSpec())
    return ExpertSizes(
        kind=kind,
        model_settings=sizes | encoders,
        clip_settings={"clip.num_frames": timed.num_frames, "clip.crop_size": seen.crop_size},
        mel_rows=read["audio"][2].mel_rows if "audio" in read else None,
    )


def _kind(facts: Facts) -> Choice:
    kind = _kind_of(facts)
    if kind is None:
        return Choice({}, "model.kind: ca2st if half of the videos have sound, else cast; known once they are read")
    if facts.experts is not None:
        return Choice({"model.kind": kind}, f"what the given experts make: {', '.join(EXPERTS[kind])}")
    silent = f" ({facts.num_silent} more have nothing but silence)" if facts.num_silent else ""
    sound = f"{facts.num_with_sound} of {facts.num_clips} training videos have sound{silent}"
    why = f"{sound}: space, time and audio" if kind == "ca2st" else f"{sound}, fewer than half: space and time alone"
    return Choice({"model.kind": kind}, why)


def _kind_of(facts: Facts) -> ModelKind | None:
    if facts.experts is not None:
        return facts.experts.kind
    if facts.num_with_sound is None:
        return None
    return "ca2st" if 2 * facts.num_with_sound >= facts.num_clips else "cast"


def _sizes(facts: Facts) -> tuple[Choice, Choice, Choice]:
    """Choose the sizes of the model, what of it is trained, and the clip."""
    if (given := facts.experts) is not None:
        return (
            Choice(given.model_settings, "the sizes of the given experts"),
            Choice({"trainable": "added"}, "the given experts stay as they are"),
            Choice(given.clip_settings, "what the given experts were trained on"),
        )
    if facts.device == "cpu":
        dim, depth, num_heads, where = 96, 4, 4, "a CPU in minutes"
        num_frames, crop_size, why = 8, 96, "quick on a CPU"
    else:
        dim, depth, num_heads, where = 192, 6, 6, "one GPU"
        num_frames, crop_size, why = 16, 112, "small pictures for a small model"
    sizes = {"model.dim": dim, "model.depth": depth, "model.num_heads": num_heads, "model.audio_stride": 16}
    return (
        Choice(sizes, f"small enough to learn from nothing on {where}"),
        Choice({"trainable": "all"}, "no pretrained experts are given, so everything is learned"),
        Choice({"clip.num_frames": num_frames, "clip.crop_size": crop_size}, why),
    )


def _mel_rows(facts: Facts) -> Choice:
    low, high = _MEL_ROWS
    kind = _kind_of(facts)
    if kind is not None and "audio" not in EXPERTS[kind]:
        return Choice({"clip.mel_rows": low}, "sound is not used, so little of it is read")
    if facts.experts is not None:
        rows = facts.experts.mel_rows
        return Choice({"clip.mel_rows": rows}, "what the given audio expert was trained on")
    if facts.median_seconds is None:
        return Choice({}, "clip.mel_rows: by the median duration; known once the videos are read")
    rows = int(facts.median_seconds / MEL_ROW_SECONDS) // _MEL_ROWS_STEP * _MEL_ROWS_STEP
    rows = min(max(rows, low), high)
    seconds = f"{rows * MEL_ROW_SECONDS:.1f} s of sound"
    return Choice({"clip.mel_rows": rows}, f"{seconds}; the median video has {facts.median_seconds:.1f} s")


def _sampling(facts: Facts) -> Choice:
    seconds = facts.median_seconds
    if seconds is None:
        return Choice({}, "data.sampling.scheme: by the median duration; known once the videos are read")
    if seconds <= _SHORT_SECONDS:
        return Choice(
            {"data.sampling.scheme": "uniform"},
            f"the median video has {seconds:.1f} s: frames are spread over a whole video",
        )
    return Choice(
        {"data.sampling.scheme": "dense", "data.sampling.frame_stride": 8},
        f"the median video has {seconds:.1f} s: a window of it at a time, so that motion can be seen",
    )


def _augment(facts: Facts) -> Choice:
    low = 0.5 if facts.experts is None else 0.25
    sided = [name for name in facts.classes if _SIDED.search(name.lower())]
    settings = {"data.augment.crop_area": [low, 1.0], "data.augment.flip_probability": 0.0 if sided else 0.5}
    if sided:
        return Choice(settings, f"never mirrored: the class {sided[0]!r} names a side")
    return Choice(settings, "mirrored half the time; set 0.0 where left and right tell classes apart")


def _length_and_batch(facts: Facts) -> tuple[Choice, Choice]:
    """Choose the epochs, and the batch with the rate that fits it.

    The batch is a power of two that makes about eight steps per epoch; the rate follows its root, as AdamW's noise
    does.
    """
    given, num_clips = facts.experts is not None, facts.num_clips
    passes, max_epochs, max_batch = (_WITH_EXPERTS if given else _FROM_NOTHING)[facts.device]
    epochs = min(max(passes // num_clips, _LEAST_EPOCHS), max_epochs)
    shown = f"{epochs * num_clips:,}".replace(",", " ")
    if epochs * num_clips > passes:
        where = "the least that is of use; many videos take longer"
    elif given and facts.device == "cpu":
        where = "experts of this size want a GPU: kept short for a CPU"
    else:
        where = "minutes, not hours"
    batch = min(1 << (max(2, num_clips // 8).bit_length() - 1), max_batch, num_clips)
    peak = (5e-4 if given else 1e-3) * math.sqrt(batch / 32)
    length = Choice(
        {"training.epochs": epochs, "training.validate_every_epochs": math.ceil(epochs / 5)},
        f"{num_clips} videos, {shown} showings in all: {where}",
    )
    batches = Choice(
        {
            "training.global_batch_size": batch,
            "training.per_device_batch_size": min(batch, 8) if given else batch,
            "optim.base_lr": float(f"{peak * 256 / batch:.3g}"),
            "optim.warmup_epochs": 1.0,
            "optim.layer_decay": 1.0,
        },
        f"so that {num_clips} videos make steps enough; the rate fits the batch",
    )
    return length, batches


def _read(name: ExpertName, path: Path, *, num_heads: int | None) -> tuple[EncoderName, ModelConfig, ClipSpec]:
    """Return what an expert file says of itself, in its header or by its tensors."""
    file = read_tensor_file(path)
    try:
        header = json.loads(file.metadata.get(EXPERT_KEY, "{}"))
        header = header if isinstance(header, dict) else {}
        clip = ClipSpec(**header["clip"]) if header else None
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsDamageError(f"{path}: cannot read the metadata key {EXPERT_KEY!r}: {error!r}") from error
    encoder: EncoderName = header.get("encoder") or _encoder_of(name, file.tensors)
    sizes = UnwrittenSizes(num_heads=header.get("num_heads") or num_heads)
    config, likely = expert_sizes(encoder, file.tensors, sizes, where=str(path))
    return encoder, config, clip or likely


def _encoder_of(name: ExpertName, tensors: Mapping[str, Tensor]) -> EncoderName:
    """Return the encoder of a file without a header: by its tensors where another than the usual one can be meant."""
    if "stem.conv.weight" in tensors:
        return "resnet50"
    patches = tensors.get("patch_embed.weight")
    if name != "audio" and patches is not None:
        return "videomae" if patches.ndim == 5 else "clip"
    usual: Mapping[ExpertName, EncoderName] = {"spatial": "clip", "temporal": "videomae", "audio": "ast"}
    return usual[name]


def _require_equal(size: str, values: Mapping[Path, int]) -> None:
    if len(set(values.values())) > 1:
        found = ", ".join(f"{value} in {path}" for path, value in values.items())
        raise UserInputError(f"experts: expected one {size} in all of them, found {found}; take experts of one size")
