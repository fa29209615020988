"""Which kernel computes each attention in a training: one that is named, or on a GPU the fastest for each shape.

Which one torch takes by itself differs between its versions, and none is best for all shapes: 1568 tokens that attend
to each other, and windows of 8. What was measured is kept in the run's folder, so that a resumed run computes alike.
"""

import json
import logging
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ca2st.checked_json import encoded, read_json
from ca2st.durable import write_bytes
from ca2st.errors import UserInputError
from ca2st.model.attention import Attend
from ca2st.model.network import HolisticModel, build_model, whole_last_layer
from ca2st.training.config import Precision, TrainingConfig

FILE_NAME = "attention.json"
KERNELS: Mapping[str, SDPBackend] = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
_DETERMINISTIC = ("flash", "math")
_MOST_MATH_KEYS = 16
"""More keys than T2S has times: the matrix of scores is never made."""
_WARM_UP, _PASSES = 3, 10
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_LOGGER = logging.getLogger(__name__)


class AttentionShape(NamedTuple):
    """What one attention works on in a pass."""

    windows: int
    heads: int
    queries: int
    keys: int
    head_dim: int

    def __str__(self) -> str:
        return " x ".join(str(size) for size in self)


Seconds = Callable[[AttentionShape, str], float | None]
"""Time of a forward and backward pass of a shape by a kernel; None: the kernel does not take it."""


def attention_shapes(model: HolisticModel, *, num_clips: int) -> dict[str, AttentionShape]:
    """Return the shape of every attention in a pass over `num_clips`, by the name of its `Attend`."""
    clip, shapes = model.clip, dict[str, AttentionShape]()
    # on the meta device nothing is held or computed: a pass costs milliseconds, whatever the model
    with torch.device("meta"), torch.no_grad():
        outline = build_model(model.config, clip, model.targets)
        for name, module in outline.named_modules():
            if isinstance(module, Attend):
                module.register_forward_pre_hook(partial(_note, shapes, name))
        with whole_last_layer(outline):
            outline(
                torch.empty(num_clips, 3, clip.num_frames, clip.crop_size, clip.crop_size),
                torch.empty(num_clips, clip.mel_rows, clip.num_mel_bins),
                torch.empty(num_clips, 1 + clip.num_frames // 2, 2),
            )
    return shapes


def _note(shapes: dict[str, AttentionShape], name: str, _: nn.Module, qkv: tuple[Tensor, ...]) -> None:
    shapes[name] = AttentionShape(*qkv[0].shape[:3], *qkv[1].shape[2:])


def fastest(shapes: Iterable[AttentionShape], seconds: Seconds, *, deterministic: bool) -> dict[str, str]:
    """Return the name of the fastest kernel for each shape (by its words); shapes that none takes are left out."""
    chosen: dict[str, str] = {}
    for shape in dict.fromkeys(shapes):
        may_make_scores = shape.keys <= _MOST_MATH_KEYS
        names = [n for n in (_DETERMINISTIC if deterministic else KERNELS) if may_make_scores or n != "math"]
        found = {name: taken for name in names if (taken := seconds(shape, name)) is not None}
        if found:
            chosen[str(shape)] = min(found, key=found.__getitem__)
    return chosen


def set_kernels(model: nn.Module, shapes: Mapping[str, AttentionShape], of_shape: Mapping[str, str]) -> None:
    """Let each `Attend` of `shapes` compute by the kernel that `of_shape` has for the words of its shape."""
    for name, shape in shapes.items():
        if str(shape) in of_shape:
            attend = model.get_submodule(name)
            assert isinstance(attend, Attend)
            attend.kernel = KERNELS[of_shape[str(shape)]]


def kernel_seconds(shape: AttentionShape, kernel: str, *, precision: Precision, device: torch.device) -> float | None:
    """Return the mean time of a forward and backward pass: with all but the first two arguments set, a `Seconds`."""

    def rows(tokens: int) -> Tensor:
        size = (shape.windows, tokens, shape.heads, shape.head_dim)
        return torch.randn(size, dtype=_DTYPES[precision], device=device).transpose(1, 2).requires_grad_()

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    try:
        with sdpa_kernel(KERNELS[kernel]), warnings.catch_warnings(action="ignore"):  # it says why it is not taken
            q, k, v = rows(shape.queries), rows(shape.keys), rows(shape.keys)
            slope = torch.randn_like(q)
            for index in range(_WARM_UP + _PASSES):
                if index == _WARM_UP:
                    wait()
                    begin = time.perf_counter()
                torch.autograd.grad(scaled_dot_product_attention(q, k, v), (q, k, v), slope)
            wait()
    except RuntimeError:  # torch's only word for a kernel that does not take a shape, or for too little memory
        return None
    return (time.perf_counter() - begin) / _PASSES


OnMain = Callable[[Callable[[], dict[str, str]]], dict[str, str]]
"""`Ranks.on_main`: what the main rank finds is what every rank gets."""


def settle_attention(
    model: HolisticModel, config: TrainingConfig, *, device: torch.device, folder: Path, on_main: OnMain
) -> dict[str, str]:
    """Set the kernels of a training, the same on every rank; returns the kernel of each shape, for the topology.

    Raises:
        UserInputError: a kernel was named that does not take one of the shapes on this device.
    """
    if config.attention == "auto" and device.type != "cuda":
        return {}
    stopwatch = partial(kernel_seconds, precision=config.precision, device=device)
    shapes = attention_shapes(model, num_clips=config.per_device_batch_size)
    if config.attention == "auto":
        where = f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, {config.precision}"
        path, deterministic = folder / FILE_NAME, config.deterministic
        of_shape = on_main(
            lambda: kept_or_measured(path, where, shapes.values(), stopwatch, deterministic=deterministic)
        )
        set_kernels(model, shapes, of_shape)
        return of_shape
    for shape in sorted({shape._replace(windows=1, heads=1) for shape in shapes.values()}):
        if stopwatch(shape, config.attention) is None:
            raise UserInputError(
                f"training.attention: expected a kernel that takes {config.precision} on {device.type}, found "
                f"{config.attention}, which does not take {shape} (windows, heads, queries, keys, head width); "
                'leave it at "auto"'
            )
    set_kernels(model, shapes, {str(shape): config.attention for shape in shapes.values()})
    return {"every shape": config.attention}


def kept_or_measured(
    path: Path, where: str, shapes: Iterable[AttentionShape], seconds: Seconds, *, deterministic: bool
) -> dict[str, str]:
    """Return what `path` says of `shapes` on this device and version (`where`), or measure and write it there."""
    words, wanted = f"{where}, deterministic" if deterministic else where, sorted(set(shapes))
    known = read_json(path, dict[str, dict[str, str]]) if path.exists() else {}
    if not known.get(words, {}).keys() >= {str(shape) for shape in wanted}:
        known[words] = fastest(wanted, seconds, deterministic=deterministic)
        write_bytes(path, encoded(json.dumps(known, indent=1) + "\n"))
        _LOGGER.info("attention on %s: %s", words, "; ".join(f"{x}: {name}" for x, name in known[words].items()))
    return known[words]
