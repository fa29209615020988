"""The one way an Accelerator is made, so that nothing is left to its environment variables' defaults."""

from datetime import timedelta

from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

from ca2st.errors import UserInputError
from ca2st.training.config import TrainingConfig

MIXED_PRECISION = {"fp32": "no", "bf16": "bf16"}
"""Accelerate's word for each of our precisions."""


def make_accelerator(config: TrainingConfig, *, cpu: bool = False) -> Accelerator:
    """An Accelerator for this process; joins the process group that a launcher has described, if any.

    Micro-batches, schedules and data belong to the loop, so Accelerate's own are off. Frozen buffers are equal on all
    ranks by construction and are not broadcast. A process group that is there already keeps its own timeout.
    """
    return Accelerator(
        cpu=cpu,
        mixed_precision=MIXED_PRECISION[config.precision],
        gradient_accumulation_steps=1,
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False),
            InitProcessGroupKwargs(timeout=timedelta(seconds=config.collective_timeout_seconds)),
        ],
    )


def check_accelerator(accelerator: Accelerator, config: TrainingConfig) -> None:
    """Refuse an Accelerator that would train otherwise than `config` says.

    Raises:
        UserInputError: another precision, its own accumulation, or more ranks than clips in a step.
    """
    expected = MIXED_PRECISION[config.precision]
    if accelerator.mixed_precision != expected:
        raise UserInputError(
            f"precision {config.precision}: expected an Accelerator with mixed_precision={expected!r}, "
            f"found {accelerator.mixed_precision!r}; make it with make_accelerator"
        )
    if accelerator.gradient_accumulation_steps != 1:
        raise UserInputError(
            "gradient_accumulation_steps: expected 1 (the loop cuts its own micro-batches), "
            f"found {accelerator.gradient_accumulation_steps}; make the Accelerator with make_accelerator"
        )
    if accelerator.num_processes > config.global_batch_size:
        raise UserInputError(
            f"global_batch_size: expected at least one clip a rank ({accelerator.num_processes} ranks), "
            f"found {config.global_batch_size}; enlarge it or use fewer workers"
        )
