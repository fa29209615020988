"""Evaluation: every sample once.

Keeps the clips of a step that went wrong, so that they can be looked at.

Multi-view evaluation: every sample exactly once, at any number of ranks, or no metric at all.
"""

import itertools
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import save
from torch import Tensor, nn

from ca2st.batch import MIXING_FIELDS, ClipBatch
from ca2st.durable import write_bytes
from ca2st.errors import listed
from ca2st.training.errors import IncompleteEvaluationError, SourceContractError
from ca2st.training.losses import check_label_range, check_targets
from ca2st.training.metrics import evaluation_metrics, mean_over_views
from ca2st.training.ranks import Ranks
from ca2st.training.stages import EvaluationSource, NamesSamples
from ca2st.training.step import model_logits

FAILURES_NAME = "failures"
_MAX_CLIPS = 8


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """One row: a sample, its labels and the mean probabilities of its views."""

    sample_id: str
    labels: tuple[int, ...]
    """One a target, in the order of `probabilities`."""
    probabilities: Mapping[str, list[float]]
    """By target, one number a class."""


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
        """Samples scored."""
        return len(self.sample_ids)

    def rows(self) -> Iterator[Prediction]:
        """One prediction a sample."""
        for index, sample_id in enumerate(self.sample_ids):
            yield Prediction(
                sample_id=sample_id,
                labels=tuple(self.labels[index].tolist()),
                probabilities={name: values[index].tolist() for name, values in self.probabilities.items()},
            )


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
        metrics=evaluation_metrics(probabilities, labels),
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
