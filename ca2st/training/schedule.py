"""Learning rate as a pure function of the step: nothing to save, nothing to lose."""

import math
from dataclasses import dataclass

from ca2st.errors import UserInputError
from ca2st.training.config import OptimConfig

REFERENCE_BATCH = 256
"""Global batch size at which `base_lr` and `min_lr` are stated."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LearningRateSchedule:
    """Linear warm-up from 0 to `peak`, then a half cosine to `minimum`, per step."""

    peak: float
    """Rate at the end of the warm-up."""
    minimum: float
    """Rate that the cosine reaches at `total_steps`."""
    warmup_steps: int
    """Steps of warm-up; step 0 has rate 0 unless there are none."""
    total_steps: int
    """Steps of the whole schedule, warm-up included."""

    def at(self, step: int) -> float:
        """Rate of the update that follows `step` finished ones (0 <= step < total_steps)."""
        if step < self.warmup_steps:
            return self.peak * step / self.warmup_steps
        span = self.total_steps - self.warmup_steps
        progress = min(1.0, (step - self.warmup_steps) / span) if span > 0 else 1.0
        return self.minimum + (self.peak - self.minimum) * 0.5 * (1 + math.cos(math.pi * progress))


def schedule_for(
    config: OptimConfig, *, global_batch_size: int, epochs: int, steps_per_epoch: int
) -> LearningRateSchedule:
    """The schedule of a run: rates scaled by ``global_batch_size / 256``, epochs turned into steps.

    Raises:
        UserInputError: the warm-up is longer than the run.
    """
    if config.warmup_epochs > epochs:
        raise UserInputError(
            f"warmup_epochs: expected at most epochs = {epochs}, found {config.warmup_epochs}; "
            "shorten the warm-up or train longer"
        )
    scale = global_batch_size / REFERENCE_BATCH
    return LearningRateSchedule(
        peak=config.base_lr * scale,
        minimum=config.min_lr * scale,
        warmup_steps=round(config.warmup_epochs * steps_per_epoch),
        total_steps=epochs * steps_per_epoch,
    )
