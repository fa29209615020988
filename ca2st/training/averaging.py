"""An exponential moving average of the trained weights, kept beside them and used to validate, test and predict.

    average(t) = d(t) * average(t - 1) + (1 - d(t)) * weights(t),    d(t) = min(decay, (1 + t) / (10 + t))

The warm-up d(t) lets the average forget the weights that training began with. It is a function of the step, so a
checkpoint holds the average alone and a resumed run makes the same bits.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ca2st.training.resume import put_model_tensors, trained_tensors


def decay_at(decay: float, step: int) -> float:
    """Return the decay of update number `step` (from 1)."""
    return min(decay, (1 + step) / (10 + step))


class WeightAverage:
    """Averages the trained parameters of a model; buffers beside them (running statistics) are taken as they are."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Begin with the weights that `model` has now, on its device."""
        self._model, self._decay = model, decay
        self._parameters = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._average = {name: tensor.detach().clone() for name, tensor in trained_tensors(model).items()}

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """Return the average, by the names of the model's trained tensors."""
        return self._average

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from an average that was saved."""
        for name, target in self._average.items():
            target.copy_(tensors[name])

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after update number `step`."""
        weight = 1 - decay_at(self._decay, step)
        for name, now in trained_tensors(self._model).items():
            if name in self._parameters and now.is_floating_point():
                self._average[name].lerp_(now.detach(), weight)
            else:
                self._average[name].copy_(now)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the model have the average while the block runs, then its own weights again, bit for bit."""
        own = {name: tensor.detach().clone() for name, tensor in trained_tensors(self._model).items()}
        put_model_tensors(self._model, tensors=self._average)
        try:
            yield
        finally:
            put_model_tensors(self._model, tensors=own)
