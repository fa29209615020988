"""One step of a training.

The one way an Accelerator is made, so that nothing is left to its environment variables' defaults.

One update: forward and backward over micro-batches and ranks, all numbers checked, then the optimizer.
"""

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import xxhash
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from jaxtyping import Float
from torch import Tensor, nn

from ca2st.batch import ClipBatch
from ca2st.errors import UserInputError, listed
from ca2st.training.config import OptimConfig, TrainingConfig
from ca2st.training.errors import NonFiniteError
from ca2st.training.losses import loss_per_clip, mixed_mel, mixed_video
from ca2st.training.optim import LearningRateSchedule, set_learning_rate
from ca2st.training.ranks import Ranks
from ca2st.training.stages import HasLogits, StageClock

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


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """Numbers of one finished update, equal on every rank."""

    loss: float
    """Sum over clips and targets divided by the global number of clips."""
    lr: float
    """Scheduled rate of the update, before layer-wise decay."""
    grad_norm: float
    """Global gradient norm before clipping."""


def draw_seed(seed: int, *, step: int, rank: int, micro_batch: int) -> int:
    """Seed of torch's generators before a forward pass: a function of where the run is, so nothing is saved."""
    return xxhash.xxh3_64_intdigest(f"{seed}/{step}/{rank}/{micro_batch}".encode())


class Stepper:
    """Makes updates with a prepared model and optimizer.

    torch's global generators are seeded anew before every forward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        accelerator: Accelerator,
        config: TrainingConfig,
        optim: OptimConfig,
        schedule: LearningRateSchedule,
        targets: tuple[str, ...],
        stages: StageClock | None = None,
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._accelerator = accelerator
        self._ranks = Ranks(accelerator)
        self._config = config
        self._optim = optim
        self._schedule = schedule
        self._targets = targets
        self._stages = stages or StageClock()
        self._trained = {
            name: parameter
            for name, parameter in accelerator.unwrap_model(model).named_parameters()
            if parameter.requires_grad
        }
        self._settled = self._ranks.world_size == 1

    def update(self, share: ClipBatch, keys_of_rank: Sequence[tuple[str, ...]], *, step: int) -> StepResult:
        """Make update number `step` (from 1) from this rank's share of its clips.

        Raises:
            NonFiniteError: a loss or gradient is NaN or infinite on any rank; raised on all of them before the
                optimizer has changed anything, with the samples' keys.
        """
        self._settle(share)
        losses = self._backward(share, step=step)
        with self._stages.stage("gather"):
            losses_of_rank = self._ranks.gather(losses.tolist())
        _check_losses(losses_of_rank, keys_of_rank, step)
        rate = self._schedule.at(step - 1)
        with self._stages.stage("optimizer"):
            norm = self._optimize(share, rate=rate, step=step)
        total = math.fsum(loss for rank_losses in losses_of_rank for loss in rank_losses)
        return StepResult(loss=total / self._config.global_batch_size, lr=rate, grad_norm=norm)

    def _optimize(self, share: ClipBatch, *, rate: float, step: int) -> float:
        """Check the gradient, clip it, update; returns its norm before clipping."""
        norm = self._gradient_norm()
        if not math.isfinite(norm):
            self._blame_gradient(share, step)
        if self._optim.clip_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(
                self._trained.values(), self._optim.clip_grad_norm, torch.tensor(norm, device=self._accelerator.device)
            )
        set_learning_rate(self._optimizer, rate)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def _backward(self, share: ClipBatch, *, step: int) -> Float[Tensor, " clips"]:
        parts = list(share.split(self._config.per_device_batch_size))
        losses = []
        for index, part in enumerate(parts):
            synchronise = index == len(parts) - 1
            with contextlib.nullcontext() if synchronise else self._accelerator.no_sync(self._model):
                losses.append(self._backward_part(part, step=step, micro_batch=index))
        return torch.cat(losses)

    def _backward_part(self, part: ClipBatch, *, step: int, micro_batch: int) -> Float[Tensor, " clips"]:
        seed = draw_seed(self._config.seed, step=step, rank=self._ranks.rank, micro_batch=micro_batch)
        torch.manual_seed(seed)
        with self._stages.stage("to_device"):
            part = part.to(self._accelerator.device)
        with self._stages.stage("forward"):
            losses = loss_per_clip(
                model_logits(self._model, part),
                part.labels,
                targets=self._targets,
                smoothing=self._optim.label_smoothing,
                mixing=part.mixing,
            )
        # DistributedDataParallel averages over ranks: times world_size makes it the sum over ranks.
        scale = self._ranks.world_size / self._config.global_batch_size
        with self._stages.stage("backward"):
            self._accelerator.backward(losses.sum() * scale)
        return losses.detach()

    def _settle(self, share: ClipBatch) -> None:
        """Let DistributedDataParallel choose its buckets before the first update of an attempt.

        It sums gradients in another grouping from its second synchronised backward pass on. A resumed run would sum
        its first step's gradients in another order than the undisturbed run did, and differ in the last bits; one
        thrown-away pass at every start makes all steps alike.
        """
        if self._settled:
            return
        training = self._model.training
        self._model.eval()  # no running statistics move
        self._backward_part(next(share.split(self._config.per_device_batch_size)), step=0, micro_batch=0)
        self._model.train(training)
        self._optimizer.zero_grad(set_to_none=True)
        self._settled = True

    def _gradient_norm(self) -> float:
        gradients = [parameter.grad for parameter in self._trained.values() if parameter.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))

    def _blame_gradient(self, share: ClipBatch, step: int) -> None:
        """Repeat the step's backward passes one micro-batch at a time, unsynchronised, to find whose gradient it is."""
        keys: list[str] = []
        names: set[str] = set()
        for index, part in enumerate(share.split(self._config.per_device_batch_size)):
            self._optimizer.zero_grad(set_to_none=True)
            with self._accelerator.no_sync(self._model):
                self._backward_part(part, step=step, micro_batch=index)
            wrong = {n for n, p in self._trained.items() if p.grad is not None and not bool(p.grad.isfinite().all())}
            keys += part.sample_ids if wrong else ()
            names |= wrong
        self._optimizer.zero_grad(set_to_none=True)
        gathered = self._ranks.gather((tuple(keys), tuple(sorted(names))))
        all_keys = tuple(key for rank_keys, _ in gathered for key in rank_keys)
        all_names = tuple(sorted({name for _, rank_names in gathered for name in rank_names}))
        ranks = [rank for rank, (rank_keys, _) in enumerate(gathered) if rank_keys]
        raise NonFiniteError(
            f"step {step}: gradient expected finite, found NaN or infinity in "
            f"{listed(all_names, most=8) or 'its norm'} from the micro-batches of "
            f"{listed(all_keys, most=8) or 'all samples together'} on ranks {ranks}; nothing was updated; "
            "lower the rate, clip, or look at these samples",
            keys=all_keys,
            parameters=all_names,
        )


def model_logits(model: nn.Module, batch: ClipBatch) -> Mapping[str, Tensor]:
    """Run the model on a batch that lies on its device, its pairs mixed as it says; the logits of each head."""
    output = model(mixed_video(batch), mixed_mel(batch), batch.intervals_seconds)
    assert isinstance(output, HasLogits)
    return output.logits


def _check_losses(losses_of_rank: Sequence[Sequence[float]], keys_of_rank: Sequence[Sequence[str]], step: int) -> None:
    wrong = [
        (rank, key, loss)
        for rank, (losses, keys) in enumerate(zip(losses_of_rank, keys_of_rank, strict=True))
        for loss, key in zip(losses, keys, strict=True)
        if not math.isfinite(loss)
    ]
    if wrong:
        shown = listed([f"{key} ({loss}, rank {rank})" for rank, key, loss in wrong], most=8)
        raise NonFiniteError(
            f"step {step}: loss expected finite, found {shown}; nothing was updated; "
            "lower the rate, or look at these samples",
            keys=tuple(key for _, key, _ in wrong),
        )
