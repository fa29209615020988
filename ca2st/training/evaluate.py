"""Evaluation: every sample exactly once, by all its views, at any number of ranks, or no metric at all."""

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from accelerate import Accelerator
from jaxtyping import Float, Int
from torch import Tensor, nn

from ca2st.batch import ClipBatch
from ca2st.errors import listed
from ca2st.training.errors import IncompleteEvaluationError, SourceContractError
from ca2st.training.losses import check_label_range, check_targets
from ca2st.training.metrics import evaluation_metrics
from ca2st.training.ranks import Ranks
from ca2st.training.step import model_logits


@runtime_checkable
class EvaluationSource(Protocol):
    """Every view of every sample once. Batch i of the ranks, joined in rank order, is batch i of the set."""

    @property
    def num_samples(self) -> int:
        """Return the samples of the whole set, over all ranks."""
        ...

    def batches(self) -> Iterator[ClipBatch]:
        """Return this rank's views; the views of a sample share its key; padding is marked."""
        ...


@runtime_checkable
class NamesSamples(Protocol):
    """An evaluation source that can also say which samples must have been scored at the end."""

    def sample_ids(self) -> Sequence[str]:
        """Return the keys of all samples of the whole set."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationResult:
    """Metrics and predictions of a set, equal on every rank, in the set's order."""

    metrics: Mapping[str, float]
    """Fractions of 1: see `metrics.evaluation_metrics`."""
    sample_ids: tuple[str, ...]
    """Keys of the samples."""
    labels: Tensor
    """[samples, targets]."""
    probabilities: Mapping[str, Tensor]
    """By target: [samples, classes], float64."""

    @property
    def num_samples(self) -> int:
        """Return the samples scored."""
        return len(self.sample_ids)


@dataclass(frozen=True, slots=True)
class _Views:
    """Scored views of one batch of one rank, without padding."""

    keys: list[str]
    labels: Tensor
    probabilities: dict[str, Tensor]


def evaluate(
    model: nn.Module,
    source: EvaluationSource,
    *,
    accelerator: Accelerator,
    targets: Mapping[str, int],
    per_device_batch_size: int,
    ranks: Ranks | None = None,
) -> EvaluationResult:
    """Score every sample of `source` with `model` on all ranks.

    Args:
        model: Prepared or not; put in evaluation mode for the time.
        source: This rank's part of the set.
        accelerator: Gives device, autocast and the other ranks.
        targets: Classes of each target, in the order of the label columns.
        per_device_batch_size: Views of one forward pass.
        ranks: How this rank meets the others; None: without a clock for it.

    Raises:
        IncompleteEvaluationError: the scored samples are not the set's, each by all its views.
        LabelRangeError: a label beyond the model's heads.
        PeerFailedError: another rank failed.
    """
    own = accelerator.unwrap_model(model)
    batches_of_rank = (ranks or Ranks(accelerator)).together(
        lambda: _score(own, source, accelerator=accelerator, targets=targets, num_clips=per_device_batch_size)
    )
    views = [batch for step in itertools.zip_longest(*batches_of_rank) for batch in step if batch is not None]
    _check_complete([key for batch in views for key in batch.keys], source)
    return _combine(views, tuple(targets))


def _combine(views: Sequence[_Views], targets: tuple[str, ...]) -> EvaluationResult:
    """Average the views of each sample, in the order the samples first came."""
    keys = [key for batch in views for key in batch.keys]
    order = {key: index for index, key in enumerate(dict.fromkeys(keys))}
    sample_of_view = torch.tensor([order[key] for key in keys], dtype=torch.long)
    labels = torch.zeros(len(order), len(targets), dtype=torch.long)
    labels[sample_of_view] = torch.cat([batch.labels for batch in views]).long()
    probabilities = {
        name: mean_over_views(
            torch.cat([batch.probabilities[name] for batch in views]), sample_of_view, num_samples=len(order)
        )
        for name in targets
    }
    return EvaluationResult(
        metrics=evaluation_metrics({name: one.numpy() for name, one in probabilities.items()}, labels.numpy()),
        sample_ids=tuple(order),
        labels=labels,
        probabilities=probabilities,
    )


def _score(
    model: nn.Module, source: EvaluationSource, *, accelerator: Accelerator, targets: Mapping[str, int], num_clips: int
) -> list[_Views]:
    views, training = [], model.training
    model.eval()
    try:
        with torch.no_grad(), accelerator.autocast():
            for batch in source.batches():
                _check_unmixed(batch)
                check_label_range(batch.labels, batch.sample_ids, num_classes=targets)
                parts = batch.split(num_clips)
                logits = [model_logits(model, part.to(accelerator.device)) for part in parts]
                views.append(_without_padding(batch, logits, tuple(targets)))
    finally:
        model.train(training)
    return views


def _check_unmixed(batch: ClipBatch) -> None:
    if batch.mixing is not None:
        raise SourceContractError("evaluation: expected clips as they are, found a batch whose pairs are to be mixed")


def _without_padding(batch: ClipBatch, logits: Sequence[Mapping[str, Tensor]], targets: tuple[str, ...]) -> _Views:
    check_targets(logits[0], targets)
    real = ~batch.is_padding.cpu()
    return _Views(
        keys=[key for key, keep in zip(batch.sample_ids, real.tolist(), strict=True) if keep],
        labels=batch.labels.cpu()[real],
        probabilities={
            name: torch.cat([part[name].float().softmax(dim=-1).cpu() for part in logits])[real] for name in targets
        },
    )


def _check_complete(keys: Sequence[str], source: EvaluationSource) -> None:
    """Compare what was scored with what the set holds: each sample once, by as many views as every other."""
    scored = Counter(keys)
    usual = scored.most_common()[len(scored) // 2][1] if scored else 0
    findings = {
        "scored by another number of views than the rest": [key for key, count in scored.items() if count != usual]
    }
    if isinstance(source, NamesSamples):
        expected = Counter(source.sample_ids())
        findings["never scored"] = [key for key in expected if key not in scored]
        findings["not in the set"] = [key for key in scored if key not in expected]
        findings["twice in the set"] = [key for key, count in expected.items() if count > 1]
    for what, names in findings.items():
        if names:
            raise IncompleteEvaluationError(
                f"evaluation: expected each of {source.num_samples} samples exactly once, found {len(names)} {what}: "
                f"{listed(sorted(names))}; no metric is reported"
            )
    if len(scored) != source.num_samples or not scored:
        raise IncompleteEvaluationError(
            f"evaluation: expected {source.num_samples} samples (at least one), found {len(scored)} scored; "
            "no metric is reported"
        )


def mean_over_views(
    probabilities: Float[Tensor, "views classes"], sample_of_view: Int[Tensor, " views"], *, num_samples: int
) -> Float[Tensor, "samples classes"]:
    """Return the mean of the softmax of each sample's views, in float64; samples without a view are NaN."""
    wide = probabilities.double()
    sums = wide.new_zeros(num_samples, wide.shape[1]).index_add_(0, sample_of_view, wide)
    counts = torch.bincount(sample_of_view, minlength=num_samples)
    return sums / counts.unsqueeze(1)
