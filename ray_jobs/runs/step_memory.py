"""What a training step needs of a device's memory, counted on tensors that have shapes but no bytes.

The model's own forward and backward pass runs once on fake tensors, a micro-batch of `per_device_batch_size` clips, and
every tensor is counted while something holds it. So attention kernels, bfloat16 and activation checkpointing count as
they are, without an allocation and in seconds.
"""

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from ca2st.batch import ClipBatch
from ca2st.model.network import HolisticModel
from ca2st.model.parameters import build_model, held_precision, hold_experts, set_trainable
from ca2st.spec import ClipSpec
from ca2st.training.losses import loss_per_clip
from ca2st.training.step import model_logits
from ray_jobs.config.recipe import Recipe
from ray_jobs.runs.model import target_specs

_ADAM_MOMENTS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class StepMemory:
    """Bytes of one rank's device, by what they hold."""

    parameters: int
    """Weights and buffers, frozen ones in the type they are held in."""
    gradients: int
    """Of what is trained; twice where ranks exchange them, since the exchange has buckets of its own."""
    optimizer: int
    """AdamW's two moments of what is trained."""
    activations: int
    """Most that a micro-batch holds besides, its own clips and what the backward pass computes with included."""

    @property
    def total(self) -> int:
        """The guess of the peak, without what torch itself needs."""
        return self.parameters + self.gradients + self.optimizer + self.activations


def guess_step_memory(
    recipe: Recipe, classes: Mapping[str, list[str]], *, device: str, world_size: int = 1
) -> StepMemory:
    """Guess the peak of a training by `recipe` on a device of torch's kind `device` (``cpu`` or ``cuda``), in bytes.

    Not in it: torch and its libraries (about 0.5 GB of a process, 0.5 to 1 GB of a GPU), workspaces of kernels, what an
    allocator loses between its blocks, and the loader's batches, which wait in the machine's memory. Kernels are
    counted as they are on a CPU, also for a GPU.

    Measured beside it: how far the resident memory of a CPU process rose above that of one with torch loaded, over
    three updates of small CA2STs in float32, where not said otherwise:

    ========================================  ==========  =============  =====
    model, micro-batch, pixels                guess (MB)  measured (MB)  ratio
    ========================================  ==========  =============  =====
    D 192, 4 layers, 8 clips of 8 x 112       338         449            0.75
    the same, activation checkpointing        164         328            0.50
    the same, bfloat16 autocast               229         371            0.62
    the same, everything trained              495         616            0.80
    the same, the head trained                69          115            0.60
    D 384, 6 layers, 4 clips of 8 x 224       1839        2201           0.84
    the same, activation checkpointing        752         1353           0.56
    ========================================  ==========  =============  =====

    So a CPU process rises to 1.2 to 2 times the guess, most with activation checkpointing: workspaces of kernels, and
    what the allocator keeps free. On a GPU it was not measured.

    Raises:
        UserInputError: sizes of clip and model do not fit.
    """
    with FakeTensorMode():
        model = _model(recipe, classes, device=device)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        trained_bytes = sum(parameter.nbytes for parameter in trained)
        for parameter in trained:  # as after the first micro-batch
            parameter.grad = torch.zeros_like(parameter)
        with LiveBytes() as live:
            _forward_and_backward(model, recipe, classes)
    return StepMemory(
        parameters=sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())),
        gradients=trained_bytes * (2 if world_size > 1 else 1),
        optimizer=_ADAM_MOMENTS * trained_bytes,
        activations=live.peak,
    )


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are made while it is on, until nothing holds them any more."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.live = 0
        """Bytes held now."""
        self.peak = 0
        """Most bytes held at once."""
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation and count what it gives."""
        made = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._count, made)
        return made

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        place, size = id(storage), storage.nbytes()
        known = self._known.get(place)
        if known is not None and known() is storage:
            return

        def gone(_reference: object) -> None:
            self.live -= size
            del self._known[place]

        self._known[place] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)


def _model(recipe: Recipe, classes: Mapping[str, list[str]], *, device: str) -> HolisticModel:
    model = build_model(recipe.model, recipe.clip, target_specs(classes))
    set_trainable(model, recipe.trainable)
    precision = recipe.training.precision
    hold_experts(model, held_precision(recipe.experts.precision, training=precision, device=device))
    model.activation_checkpointing = recipe.training.activation_checkpointing
    return model.train()


def _forward_and_backward(model: HolisticModel, recipe: Recipe, classes: Mapping[str, list[str]]) -> None:
    num_clips = min(recipe.training.per_device_batch_size, recipe.training.global_batch_size)
    batch = _batch(recipe.clip, num_clips, num_targets=len(classes))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=recipe.training.precision == "bf16"):
        logits = model_logits(model, batch)
    losses = loss_per_clip(
        {name: values.float() for name, values in logits.items()},
        batch.labels,
        targets=tuple(classes),
        smoothing=recipe.optim.label_smoothing,
        mixing=None,
    )
    del logits
    losses.sum().backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped


def _batch(clip: ClipSpec, num_clips: int, *, num_targets: int) -> ClipBatch:
    size = clip.crop_size
    return ClipBatch(
        video=torch.empty(num_clips, 3, clip.num_frames, size, size, dtype=torch.uint8),
        mel=torch.empty(num_clips, clip.mel_rows, clip.num_mel_bins),
        intervals_seconds=torch.empty(num_clips, 1 + clip.num_frames // 2, 2),
        labels=torch.zeros(num_clips, num_targets, dtype=torch.int64),
        sample_ids=("",) * num_clips,
        has_audio=torch.ones(num_clips, dtype=torch.bool),
        is_padding=torch.zeros(num_clips, dtype=torch.bool),
    )
