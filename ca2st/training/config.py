"""Settings of optimisation and of the training loop."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from ca2st.errors import UserInputError, check_literals

Precision = Literal["fp32", "bf16", "fp16"]
AttentionChoice = Literal["auto", "flash", "cudnn", "efficient", "math"]


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """AdamW, its schedule and the loss's smoothing. Source: the paper's training settings."""

    base_lr: float = 1e-3
    """Learning rate at a global batch of 256; the peak is ``base_lr * global_batch_size / 256``. Audio-visual
    recipes use 5e-4."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of AdamW's first and second moment."""
    eps: float = 1e-8
    """Added to AdamW's denominator."""
    weight_decay: float = 0.05
    """Decoupled weight decay; never on 1-D parameters, biases and position tables."""
    layer_decay: float = 0.75
    """Parameters of layer i of d are trained at ``layer_decay ** (d - i)`` times the rate; 1 turns it off."""
    warmup_epochs: float = 5.0
    """Epochs of linear warm-up from 0 to the peak; may be a fraction."""
    min_lr: float = 1e-6
    """Where the cosine ends, at a global batch of 256; scaled as `base_lr` is."""
    clip_grad_norm: float | None = None
    """Largest global gradient norm, or None (the published runs do not clip)."""
    label_smoothing: float = 0.1
    """Share of the target spread evenly over all classes."""

    def __post_init__(self) -> None:
        _check(self, _positive, "a finite number > 0", "base_lr", "eps")
        _check(self, _not_negative, "a finite number >= 0", "weight_decay", "warmup_epochs")
        _check(self, lambda x: 0 < x <= 1, "a number in (0, 1]", "layer_decay")
        _check(self, lambda x: 0 <= x <= self.base_lr, f"a number in [0, base_lr = {self.base_lr}]", "min_lr")
        _check(self, lambda x: 0 <= x < 1, "a number in [0, 1)", "label_smoothing")
        _check(self, _or_none(_positive), "a finite number > 0, or none", "clip_grad_norm")
        for beta in self.betas:
            if not 0 <= beta < 1:
                raise UserInputError(f"betas: expected two numbers in [0, 1), found {beta}")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """Length, batch, cadence and precision of a run."""

    epochs: int = 50
    """Passes over the training set; the schedule spans all of them."""
    max_steps: int | None = None
    """Stop after this many steps, or None. The schedule still spans `epochs`, so a run cut short is an exact
    beginning of the whole run."""
    global_batch_size: int = 192
    """Clips per step, over all ranks."""
    per_device_batch_size: int = 6
    """Clips of one forward pass; a rank's share of a step is cut into micro-batches of this size. Sets the memory
    used, not the result."""
    seed: int = 0
    """Keys every random draw: order, augmentation, DropPath."""
    checkpoint_every_steps: int = 500
    """Steps between checkpoints: the most work that a kill can cost."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept; older ones go once the newest is verified."""
    keep_best: int = 1
    """Best checkpoints kept beside the newest, by `best_metric`; every validation has a checkpoint. 0: none."""
    best_metric: str | None = None
    """Validation metric that tells which checkpoint is the best, ``top1``, ``mean_class``, ``verb_top1``, ...; None:
    the one that stands for the run (``top1``, or ``action_top1`` of verb and noun). Of equal ones the earlier."""
    validate_every_epochs: int = 1
    """Epochs between validations; 0: only at the end. The last step is always validated."""
    validate_every_steps: int | None = None
    """Steps between validations, besides those of `validate_every_epochs`; None: none."""
    early_stopping: int | None = None
    """End the run once so many validations in a row were no better than the best before them; None: never. A rerun
    with more of them goes on."""
    least_improvement: float = 0.0
    """What `early_stopping` takes for better: `best_metric` must be better by more than this."""
    stop_at: float | None = None
    """End the run once `best_metric` is at least this; None: never."""
    stop_at_fit: float | None = None
    """End the run once at least this share of an epoch's training clips was answered right; None: never. For sanity
    runs: it says that the model can learn, not that it has learned anything of use."""
    ema_decay: float | None = None
    """Keep an exponential moving average of the trained weights, with this decay per step; None: none. Warm-up: the
    decay of step t is at most (1 + t) / (10 + t). Validation, tests and predictions then use the average."""
    max_hours: float | None = None
    """Save and end, as SIGTERM would, once this attempt has lasted so long; None: no limit. A rerun goes on."""
    max_skipped_steps: int = 0
    """Steps of the whole run that may be left out because a loss or gradient was not finite, with their clips on
    record; one more ends the run. 0: the first ends it. A rerun with more goes on from the last checkpoint."""
    profile_steps: int = 0
    """Steps of this attempt, from its third on, that torch's profiler records, rank by rank, into ``profile/`` of the
    run folder, for chrome://tracing or Perfetto; 0: none."""
    precision: Precision = "fp32"
    """``fp32``, or ``bf16`` or ``fp16`` autocast with float32 parameters, optimizer and losses. ``fp16`` scales its
    losses so that small gradients survive; a step whose gradients overflow is left out, and the scale halved."""
    deterministic: bool = False
    """On a GPU: only kernels that give the same bits each time, attention's backward pass too, or an error where there
    is none. Slower. A CPU needs no such setting."""
    attention: AttentionChoice = "auto"
    """Kernel of all attentions, by torch's names for them. ``auto``: on a GPU the fastest one for each shape, measured
    when the run first starts there; on a CPU the only one that makes no matrix of scores."""
    activation_checkpointing: bool = False
    """Keep only the inputs of each layer and compute the layer again for its gradients: the same numbers, much less
    memory, about a third more time."""
    sharded: bool = False
    """Spread every weight, frozen ones too, over the workers (FSDP2), for models larger than a device: the same numbers
    up to rounding, less memory, more traffic. Checkpoints are those of any other run."""
    compile: bool = False
    """Compile the layers with torch.compile: minutes at the start, faster steps, numbers that differ by rounding. On a
    CPU it needs a C++ compiler. What cannot be compiled is an error."""
    grace_seconds: float = 25.0
    """Time from SIGTERM to a forced exit; the checkpoint must fit in. Launchers allow about 30 s."""
    collective_timeout_seconds: float = 600.0
    """Longest that a rank waits for the others in one exchange; then the run ends and names who is silent. More than a
    loader's stall, the writing of a checkpoint, and what one rank may take longer than another in a validation."""

    def __post_init__(self) -> None:
        _check(self, _at_least_one, "an integer >= 1", "epochs", "global_batch_size", "per_device_batch_size")
        _check(self, _at_least_one, "an integer >= 1", "checkpoint_every_steps", "keep_checkpoints")
        _check(self, _not_negative, "an integer >= 0", "validate_every_epochs", "keep_best")
        _check(self, _not_negative, "an integer >= 0", "max_skipped_steps", "profile_steps")
        _check(
            self,
            _or_none(_at_least_one),
            "an integer >= 1, or none",
            "max_steps",
            "validate_every_steps",
            "early_stopping",
        )
        _check(self, lambda x: 0 <= x < 2**63, "an integer in [0, 2**63)", "seed")
        _check(self, _not_negative, "a finite number >= 0", "least_improvement")
        _check(self, _positive, "a finite number > 0", "grace_seconds", "collective_timeout_seconds")
        _check(self, _or_none(_positive), "a finite number > 0, or none", "max_hours")
        _check(self, _or_none(lambda x: 0 < x <= 1), "a share, 0 < x <= 1, or none", "stop_at_fit")
        _check(self, _or_none(lambda x: 0 < x < 1), "a number in (0, 1), or none", "ema_decay")
        check_literals(self)

    def total_steps(self, steps_per_epoch: int) -> int:
        """Return the steps of the run: all epochs, or `max_steps` if that is less."""
        whole = self.epochs * steps_per_epoch
        return whole if self.max_steps is None else min(whole, self.max_steps)


def _check(settings: object, accepts: Callable[[Any], bool], expected: str, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if not accepts(value):
            raise UserInputError(f"{name}: expected {expected}, found {value}")


def _or_none(accepts: Callable[[float], bool]) -> Callable[[float | None], bool]:
    return lambda value: value is None or accepts(value)


def _at_least_one(value: float | int) -> bool:
    return value >= 1


def _positive(value: float | int) -> bool:
    return math.isfinite(value) and value > 0


def _not_negative(value: float | int) -> bool:
    return math.isfinite(value) and value >= 0
