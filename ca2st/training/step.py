"""One step of a training: clips from the loader, forward and backward over micro-batches and ranks, the update."""

import contextlib
import math
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
import xxhash
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from jaxtyping import Bool, Float
from safetensors.torch import save
from torch import Tensor, nn

from ca2st.batch import MIXING_FIELDS, ClipBatch
from ca2st.durable import write_bytes
from ca2st.errors import UserInputError, listed
from ca2st.training.config import TrainingConfig
from ca2st.training.errors import NonFiniteError, SourceContractError
from ca2st.training.losses import check_label_range, loss_per_clip, mixed_mel, mixed_video
from ca2st.training.optim import LearningRateSchedule, set_learning_rate
from ca2st.training.ranks import Ranks
from ca2st.training.settings import TrainingSettings
from ca2st.training.sharded import whole
from ca2st.training.signals import StopRequest

FAILURES_NAME = "failures"
_MAX_CLIPS = 8
MIXED_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
"""Accelerate's word for each of our precisions."""
GPU_BACKEND = "cpu:gloo,cuda:nccl"
"""Gradients go over NCCL; what the ranks tell each other in words goes over gloo, and no GPU waits for the host."""


def make_accelerator(config: TrainingConfig, *, cpu: bool = False) -> Accelerator:
    """Return an Accelerator for this process; joins the process group that a launcher has described, if any.

    Micro-batches, schedules and data belong to the loop, so Accelerate's own are off. Frozen buffers are equal on all
    ranks by construction and are not broadcast. A process group that is there already keeps its own timeout. In fp16
    Accelerate casts, and the loop's `LossScale` scales: its state is ours to save.
    """
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=MIXED_PRECISION[config.precision],
        gradient_accumulation_steps=1,
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False),
            InitProcessGroupKwargs(
                backend=None if cpu or not torch.cuda.is_available() else GPU_BACKEND,
                timeout=timedelta(seconds=config.collective_timeout_seconds),
            ),
        ],
    )
    if config.precision == "fp16":
        accelerator.scaler = None
        accelerator.native_amp = True  # Accelerate leaves a CPU in fp32, without a word
    return accelerator


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
            f"global_batch_size: expected at least one clip per rank ({accelerator.num_processes} ranks), "
            f"found {config.global_batch_size}; enlarge it or use fewer workers"
        )


@runtime_checkable
class TrainSource(Protocol):
    """Shuffled, endless in principle: any epoch from any step."""

    @property
    def steps_per_epoch(self) -> int:
        """Return steps of one epoch; the same on every rank."""

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[ClipBatch]:
        """Yield this rank's share of each step of `epoch` from `first_step` on; closing it frees its threads."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepIntake:
    """What arrived for one step."""

    share: ClipBatch | None
    """This rank's clips; None when a rank was asked to stop."""
    keys_of_rank: tuple[tuple[str, ...], ...]
    """Sample keys that arrived, by rank: in global order when joined."""
    wait_seconds: float
    """Longest wait for a loader among the ranks."""
    stop_signal: int
    """Signal that asked some rank to stop, or 0."""


def hash_of_keys(keys: Sequence[str]) -> str:
    """Return the xxh3-64 (hex) of `keys` joined by newlines."""
    return xxhash.xxh3_64_hexdigest("\n".join(keys).encode())


class Intake:
    """Takes the steps of consecutive epochs out of a source, in step with the other ranks."""

    def __init__(self, source: TrainSource, ranks: Ranks, *, settings: TrainingSettings, stop: StopRequest) -> None:
        self._source, self._ranks, self._stop = source, ranks, stop
        self._targets, self._global_batch_size = settings.targets, settings.config.global_batch_size

    def epoch(self, epoch: int, *, first_step: int) -> Generator[StepIntake]:
        """Yield steps `first_step` .. of `epoch`; ends after a stop was asked for.

        Raises:
            SourceContractError: a share of the wrong size, padding, too few steps.
            LabelRangeError: a label beyond the model's heads.
            PeerFailedError: another rank's loader failed.
        """
        batches = self._source.batches(epoch, first_step)
        with contextlib.ExitStack() as stack:
            stack.callback(getattr(batches, "close", lambda: None))
            for step in range(first_step, self._source.steps_per_epoch):
                intake = self._take(batches, where=f"epoch {epoch}, step {step} of the epoch")
                yield intake
                if intake.stop_signal:
                    return

    def _take(self, batches: Iterator[ClipBatch], *, where: str) -> StepIntake:
        # the clips stay on their rank: only what `receive` returns is exchanged
        share: ClipBatch | None = None
        stages = self._ranks.stages

        def receive() -> tuple[tuple[str, ...], float, int]:
            """Return this rank's keys, the seconds it waited for them and the signal that asked it to stop."""
            nonlocal share
            if self._stop.signal_number:
                return (), 0.0, self._stop.signal_number
            with stages.stage("data_wait"):
                share = next(batches, None)
            if share is None:
                raise SourceContractError(f"{where}: expected a batch, the loader has ended")
            self._check(share, where)
            return share.sample_ids, stages.seconds()["data_wait"], 0

        with stages.stage("gather"):
            keys_of_rank, waits, signals = zip(*self._ranks.together(receive), strict=True)
        stop_signal, count = max(signals), sum(len(keys) for keys in keys_of_rank)
        if not stop_signal and count != self._global_batch_size:
            raise SourceContractError(
                f"{where}: expected {self._global_batch_size} clips over all ranks, found {count}"
            )
        return StepIntake(
            share=None if stop_signal else share,
            keys_of_rank=keys_of_rank,
            wait_seconds=max(waits),
            stop_signal=stop_signal,
        )

    def _check(self, share: ClipBatch, where: str) -> None:
        if share.num_clips == 0 or bool(share.is_padding.any()):
            raise SourceContractError(f"{where}: expected clips without padding, found {share.num_clips} with padding")
        if share.labelling == "none":
            raise SourceContractError(f"{where}: expected clips with labels, found clips without any")
        if share.labelling == "one" and share.labels.shape[1] != len(self._targets):
            raise SourceContractError(
                f"{where}: expected one label column for each of {', '.join(self._targets)}, "
                f"found {share.labels.shape[1]}"
            )
        check_label_range(share.labels, share.sample_ids, num_classes=self._targets, labelling=share.labelling)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """Numbers of one finished update, equal on every rank."""

    loss: float
    """Sum over clips and targets divided by the global number of clips."""
    lr: float
    """Scheduled rate of the update, before layer-wise decay."""
    grad_norm: float | None
    """Global gradient norm before clipping; None: it was not finite, and the update was left out (fp16 alone)."""
    loss_scale: float | None = None
    """What the losses were scaled by; None: not scaled."""
    right: float | None = None
    """Share of the step's clips that were answered right before the update, every target of them or each of several
    labels; None where clips are mixed."""


class LossScale:
    """Factor on the losses of fp16, so that small gradients do not vanish; the same on every rank.

    Halved when gradients overflow, doubled after 2000 steps without; powers of two, so that scaling changes no digit.
    Source: Micikevicius et al., "Mixed precision training" (ICLR 2018); the numbers are those of torch's GradScaler.
    """

    GROWTH_STEPS = 2000

    def __init__(self, *, is_on: bool) -> None:
        self._is_on = is_on
        self.factor = 2.0**16 if is_on else 1.0
        self._good_steps = 0

    def state(self) -> dict[str, float] | None:
        """Return what a checkpoint keeps; None where nothing is scaled."""
        return {"factor": self.factor, "good_steps": self._good_steps} if self._is_on else None

    def put(self, state: Mapping[str, float] | None) -> None:
        """Go on from a saved state."""
        if state is not None:
            self.factor, self._good_steps = float(state["factor"]), int(state["good_steps"])

    def overflowed(self) -> bool:
        """Halve the factor; False where none is left to halve: then it is no overflow of scaled gradients."""
        if not self._is_on or self.factor <= 1:
            return False
        self.factor, self._good_steps = self.factor / 2, 0
        return True

    def held(self) -> None:
        """Count a step whose gradients were finite."""
        self._good_steps += 1
        if self._is_on and self._good_steps == self.GROWTH_STEPS:
            self.factor, self._good_steps = self.factor * 2, 0


def draw_seed(seed: int, *, step: int, rank: int, micro_batch: int) -> int:
    """Return the seed of torch's generators before a forward pass, by where the run is: nothing has to be saved."""
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
        ranks: Ranks,
        settings: TrainingSettings,
        schedule: LearningRateSchedule,
    ) -> None:
        self._model, self._optimizer, self._schedule = model, optimizer, schedule
        self._accelerator, self._ranks, self._stages = accelerator, ranks, ranks.stages
        self._config, self._optim, self._targets = settings.config, settings.optim, tuple(settings.targets)
        # not `unwrap_model`: it imports torch's compiler, to ask whether the model is compiled
        own = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        self._trained = {name: parameter for name, parameter in own.named_parameters() if parameter.requires_grad}
        self._settled = ranks.world_size == 1
        self.loss_scale = LossScale(is_on=self._config.precision == "fp16")
        """What the losses are scaled by."""

    def update(self, share: ClipBatch, keys_of_rank: Sequence[tuple[str, ...]], *, step: int) -> StepResult:
        """Make update number `step` (from 1) from this rank's share of its clips.

        Raises:
            NonFiniteError: a loss or gradient is NaN or infinite on any rank; raised on all of them before the
                optimizer has changed anything, with the samples' keys.
        """
        self._settle(share)
        parts = list(share.split(self._config.per_device_batch_size))
        losses, right = [], []
        for index, part in enumerate(parts):
            synchronise = index == len(parts) - 1
            with contextlib.nullcontext() if synchronise else self._accelerator.no_sync(self._model):
                losses_of_part, right_of_part = self._backward(part, step=step, micro_batch=index)
                losses.append(losses_of_part)
                right.append(right_of_part)
        with self._stages.stage("gather"):
            num_right = None if share.mixing is not None else int(torch.cat(right).sum())
            gathered = self._ranks.gather((torch.cat(losses).tolist(), num_right))
        losses_of_rank, right_of_rank = zip(*gathered, strict=True)
        _check_losses(losses_of_rank, keys_of_rank, step)
        rate = self._schedule.at(step - 1)
        scaled_by = self.loss_scale.factor if self._config.precision == "fp16" else None
        with self._stages.stage("optimizer"):
            norm = self._optimize(share, rate=rate, step=step)
        total = math.fsum(loss for rank_losses in losses_of_rank for loss in rank_losses)
        mean = total / self._config.global_batch_size
        known = [count for count in right_of_rank if count is not None]
        share_right = sum(known) / self._config.global_batch_size if len(known) == len(right_of_rank) else None
        return StepResult(loss=mean, lr=rate, grad_norm=norm, loss_scale=scaled_by, right=share_right)

    def _optimize(self, share: ClipBatch, *, rate: float, step: int) -> float | None:
        """Check the gradient, clip it, update; returns its norm before clipping, None where it overflowed."""
        gradients = [parameter.grad for parameter in self._trained.values() if parameter.grad is not None]
        if self.loss_scale.factor != 1:  # a power of two: exact
            for gradient in gradients:
                gradient.mul_(1 / self.loss_scale.factor)
        norm = float(whole(torch.nn.utils.get_total_norm(gradients)))
        if not math.isfinite(norm):
            if self.loss_scale.overflowed():
                self._optimizer.zero_grad(set_to_none=True)
                return None
            self._blame_gradient(share, step)
        self.loss_scale.held()
        if self._optim.clip_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(
                self._trained.values(), self._optim.clip_grad_norm, torch.tensor(norm, device=self._accelerator.device)
            )
        set_learning_rate(self._optimizer, rate)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def _backward(
        self, part: ClipBatch, *, step: int, micro_batch: int
    ) -> tuple[Float[Tensor, " clips"], Bool[Tensor, " clips"]]:
        """Return the loss of each clip, and whether it was answered right."""
        torch.manual_seed(draw_seed(self._config.seed, step=step, rank=self._ranks.rank, micro_batch=micro_batch))
        with self._stages.stage("to_device"):
            part = part.to(self._accelerator.device)
        with self._stages.stage("forward"):
            logits = model_logits(self._model, part)
            losses = loss_per_clip(
                logits,
                part.labels,
                targets=self._targets,
                smoothing=self._optim.label_smoothing,
                labelling=part.labelling,
                mixing=part.mixing,
            )
        # DistributedDataParallel averages over ranks: times world_size makes it the sum over ranks.
        scale = self._ranks.world_size / self._config.global_batch_size * self.loss_scale.factor
        with self._stages.stage("backward"):
            self._accelerator.backward(losses.sum() * scale)
        return losses.detach(), _answered_right(part, logits, self._targets)

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
        self._backward(next(share.split(self._config.per_device_batch_size)), step=0, micro_batch=0)
        self._model.train(training)
        self._optimizer.zero_grad(set_to_none=True)
        self._settled = True

    def _blame_gradient(self, share: ClipBatch, step: int) -> None:
        """Repeat the step's backward passes one micro-batch at a time, unsynchronised, to find whose gradient it is."""
        keys: list[str] = []
        names: set[str] = set()
        for index, part in enumerate(share.split(self._config.per_device_batch_size)):
            self._optimizer.zero_grad(set_to_none=True)
            with self._accelerator.no_sync(self._model):
                self._backward(part, step=step, micro_batch=index)
            grads = {name: whole(one.grad) for name, one in self._trained.items() if one.grad is not None}
            wrong = {name for name, grad in grads.items() if not bool(grad.isfinite().all())}
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
    """Run the model on a batch that lies on its device, its pairs mixed as it says.

    Its output's ``logits``: one [clips, classes] tensor per head, by the head's name.
    """
    output = model(mixed_video(batch), mixed_mel(batch), batch.intervals_seconds, batch.has_audio)
    logits: Mapping[str, Tensor] = output.logits
    return logits


def _answered_right(part: ClipBatch, logits: Mapping[str, Tensor], targets: tuple[str, ...]) -> Bool[Tensor, " clips"]:
    """Return whether each clip's likeliest class is its label, for all targets; of mixed clips it means nothing.

    Of several labels: whether each class is likelier than not where the clip has it, and nowhere else.
    """
    if part.labelling == "several":
        (name,) = targets
        return ((logits[name].detach() > 0) == (part.labels > 0)).all(dim=1)
    right = [logits[name].detach().argmax(dim=-1) == part.labels[:, column] for column, name in enumerate(targets)]
    return torch.stack(right).all(dim=0)


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


def keep_failing_clips(folder: Path, share: ClipBatch, keys: Collection[str], *, name: str) -> Path | None:
    """Write the tensors of up to eight clips of `share` that are among `keys` to ``failures/<name>.safetensors``.

    The keys are in the file's metadata, in order. A mixed clip is written as it was read, with what it kept and took
    (``mixing.*``). None when this rank has none of them.
    """
    rows = [index for index, key in enumerate(share.sample_ids) if key in keys][:_MAX_CLIPS]
    if not rows:
        return None
    index = torch.tensor(rows, device=share.labels.device)
    tensors = {
        field: getattr(share, field)[index.to(getattr(share, field).device)].cpu().contiguous()
        for field in ("video", "mel", "intervals_seconds", "labels", "has_audio")
    }
    if share.mixing is not None:
        tensors |= {f"mixing.{field}": getattr(share.mixing, field)[rows].contiguous() for field in MIXING_FIELDS}
    data = save(tensors, metadata={"sample_ids": "\n".join(share.sample_ids[row] for row in rows)})
    path = folder / FAILURES_NAME / f"{name}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, data)
    return path
