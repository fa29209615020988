"""How fast each parameter is trained: learning rates, parameter groups and AdamW; and the average of the weights.

The learning rate is a pure function of the step: nothing to save, nothing to lose. Every rule must match something: a
rule that silently matches nothing is how a fine-tuning recipe goes wrong unseen.

The exponential moving average of the trained weights is kept beside them, to validate, test and predict with::

    average(t) = d(t) * average(t - 1) + (1 - d(t)) * weights(t),    d(t) = min(decay, (1 + t) / (10 + t))

The warm-up d(t) lets the average forget the weights that training began with. It is a function of the step, so a
checkpoint holds the average alone and a resumed run makes the same bits.
"""

import inspect
import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from ca2st.errors import UserInputError
from ca2st.training.config import OptimConfig
from ca2st.training.errors import ParameterRuleError
from ca2st.training.resume import put_model_tensors, trained_tensors

REFERENCE_BATCH = 256
"""Global batch size at which `base_lr` and `min_lr` are stated."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LearningRateSchedule:
    """Linear warm-up from 0 to `peak`, then a half cosine to `minimum`, per step."""

    peak: float
    minimum: float
    """Rate that the cosine reaches at `total_steps`."""
    warmup_steps: int
    """Steps of warm-up; step 0 has rate 0 unless there are none."""
    total_steps: int
    """Steps of the whole schedule, warm-up included."""

    def at(self, step: int) -> float:
        """Return the rate of the update that follows `step` finished ones (0 <= step < total_steps)."""
        if step < self.warmup_steps:
            return self.peak * step / self.warmup_steps
        span = self.total_steps - self.warmup_steps
        progress = min(1.0, (step - self.warmup_steps) / span) if span > 0 else 1.0
        return self.minimum + (self.peak - self.minimum) * 0.5 * (1 + math.cos(math.pi * progress))


def schedule_for(
    config: OptimConfig, *, global_batch_size: int, epochs: int, steps_per_epoch: int
) -> LearningRateSchedule:
    """Return the schedule of a run: rates scaled by ``global_batch_size / 256``, epochs turned into steps.

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


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterRules:
    """What the optimizer must know of a model."""

    layer_index: Callable[[str], int | None]
    """Layer 0..d-1 of a parameter by name; None, of heads and other parts after the last layer: the full rate."""
    num_layers: int
    """Layers of the model (d): layer i is scaled by ``layer_decay ** (d - i)``."""
    no_weight_decay: Collection[str] = field(default=())
    """Names of parameters without decay besides the 1-D ones and biases: position tables, class tokens."""


class AdamW(torch.optim.AdamW):
    """torch's AdamW without what exempts it from torch's compiler: importing that takes longer than torch itself.

    No optimizer of ours is compiled. Where torch wraps a method no longer, it is torch's own that stands here.
    """

    add_param_group = inspect.unwrap(torch.optim.AdamW.add_param_group)
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))
    zero_grad = inspect.unwrap(torch.optim.AdamW.zero_grad)


def build_optimizer(model: nn.Module, config: OptimConfig, *, rules: ParameterRules) -> torch.optim.AdamW:
    """Return AdamW over the trained parameters, in groups of one rate and one decay.

    Each group carries the ``names`` of its parameters, in the model's order, and ``lr_scale``, its factor on the
    scheduled rate. Rates are 0 until `set_learning_rate`.

    Raises:
        ParameterRuleError: nothing is trained, or a rule names or matches nothing.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    _check_rules(model, trained, config, rules=rules)
    members: dict[tuple[float, float], list[str]] = {}
    for name, parameter in trained.items():
        layer = rules.layer_index(name)
        if layer is not None and not 0 <= layer < rules.num_layers:
            raise ParameterRuleError(
                f"layer of {name}: expected 0..{rules.num_layers - 1}, found {layer}; fix the model's layer_index"
            )
        # a recipe may say 1 for 1.0: checkpoints always have a float, or a resume would find another optimizer
        scale = 1.0 if layer is None else float(config.layer_decay ** (rules.num_layers - layer))
        decay = 0.0 if _is_undecayed(name, parameter, rules) else config.weight_decay
        members.setdefault((scale, decay), []).append(name)
    groups = [
        {
            "params": [trained[name] for name in names],
            "names": tuple(names),
            "lr_scale": scale,
            "weight_decay": decay,
        }
        for (scale, decay), names in members.items()
    ]
    return AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group the scheduled rate times its own factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]


def _is_undecayed(name: str, parameter: nn.Parameter, rules: ParameterRules) -> bool:
    return parameter.ndim <= 1 or name.rpartition(".")[2] == "bias" or name in rules.no_weight_decay


def _check_rules(
    model: nn.Module, trained: dict[str, nn.Parameter], config: OptimConfig, *, rules: ParameterRules
) -> None:
    if not trained:
        raise ParameterRuleError("trained parameters: expected some, found none; call set_trainable before training")
    unknown = sorted(set(rules.no_weight_decay) - {name for name, _ in model.named_parameters()})
    if unknown:
        raise ParameterRuleError(f"no_weight_decay: expected names of the model's parameters, found {unknown}")
    undecayed = [name for name, parameter in trained.items() if _is_undecayed(name, parameter, rules)]
    if config.weight_decay > 0 and len(undecayed) == len(trained):
        raise ParameterRuleError(f"weight_decay = {config.weight_decay} applies to none of {len(trained)} parameters")
    if config.weight_decay > 0 and not undecayed:
        raise ParameterRuleError(
            "no decay for 1-D parameters, biases and position tables: the model trains none of them"
        )
    if config.layer_decay < 1 and all(rules.layer_index(name) is None for name in trained):
        raise ParameterRuleError(
            f"layer_decay = {config.layer_decay}: no trained parameter belongs to a layer; set it to 1 or train layers"
        )


def decay_at(decay: float, step: int) -> float:
    """Return the decay of update number `step` (from 1)."""
    return min(decay, (1 + step) / (10 + step))


class WeightAverage:
    """Averages the trained parameters of a model; buffers beside them (running statistics) are taken as they are."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Begin with the weights that `model` has now, on its device."""
        self._model, self._decay = model, decay
        self._parameters = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.tensors = {name: tensor.detach().clone() for name, tensor in trained_tensors(model).items()}
        """The average, by the names of the model's trained tensors."""

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after update number `step`."""
        weight = 1 - decay_at(self._decay, step)
        for name, now in trained_tensors(self._model).items():
            if name in self._parameters and now.is_floating_point():
                self.tensors[name].lerp_(now.detach(), weight)
            else:
                self.tensors[name].copy_(now)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the model have the average while the block runs, then its own weights again, bit for bit."""
        own = {name: tensor.detach().clone() for name, tensor in trained_tensors(self._model).items()}
        put_model_tensors(self._model, tensors=self.tensors)
        try:
            yield
        finally:
            put_model_tensors(self._model, tensors=own)
