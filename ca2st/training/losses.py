"""Cross-entropy over class distributions, one number a clip.

A step's loss is the sum over clips and targets divided by the global number of clips, so no split into ranks and
micro-batches changes it. Targets are distributions already, so mixed labels need no other code.
"""

from collections.abc import Iterable, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from ca2st.batch import Mixing
from ca2st.errors import UserInputError
from ca2st.training.errors import LabelRangeError
from ca2st.training.mixing import mixed_targets


def smoothed_targets(
    labels: Int[Tensor, " clips"], num_classes: int, *, smoothing: float
) -> Float[Tensor, "clips {num_classes}"]:
    """One distribution a clip: ``1 - smoothing`` on its label plus ``smoothing / num_classes`` on every class."""
    hot = F.one_hot(labels.long(), num_classes).float()
    return hot * (1 - smoothing) + smoothing / num_classes


def cross_entropy_per_clip(
    logits: Float[Tensor, "clips classes"], targets: Float[Tensor, "clips classes"]
) -> Float[Tensor, " clips"]:
    """Cross-entropy of each clip in float32, whatever the precision of the logits."""
    return -(targets * torch.log_softmax(logits.float(), dim=-1)).sum(dim=-1)


def loss_per_clip(
    logits: Mapping[str, Tensor],
    labels: Int[Tensor, "clips targets"],
    *,
    targets: tuple[str, ...],
    smoothing: float,
    mixing: Mixing | None = None,
) -> Float[Tensor, " clips"]:
    """Sum over the targets of each clip's smoothed cross-entropy; column i of `labels` belongs to ``targets[i]``.

    With `mixing` every head has its own soft targets: the clip's and its partner's, by the share of the labels.
    """
    check_targets(logits, targets)
    terms = []
    for column, name in enumerate(targets):
        wanted = smoothed_targets(labels[:, column], logits[name].shape[-1], smoothing=smoothing)
        terms.append(cross_entropy_per_clip(logits[name], mixed_targets(wanted, mixing)))
    return torch.stack(terms).sum(dim=0)


def check_targets(logits: Iterable[str], targets: tuple[str, ...]) -> None:
    """Refuse targets that the model has no head for.

    Raises:
        UserInputError: names the missing heads and the model's.
    """
    heads = tuple(logits)
    missing = [name for name in targets if name not in heads]
    if missing or not targets:
        raise UserInputError(
            f"targets: expected among the model's heads ({', '.join(heads)}), found {', '.join(missing) or 'none'}; "
            "build the model with one head a target"
        )


def check_label_range(
    labels: Int[Tensor, "clips targets"], sample_ids: tuple[str, ...], *, num_classes: Mapping[str, int]
) -> None:
    """Refuse labels outside the heads' classes, naming the first sample.

    Raises:
        LabelRangeError: a label is negative or not less than its head's number of classes.
    """
    sizes = torch.tensor(list(num_classes.values()), device=labels.device)
    wrong = ((labels < 0) | (labels >= sizes)).nonzero()
    if len(wrong):
        row, column = wrong[0].tolist()
        name = list(num_classes)[column]
        raise LabelRangeError(
            f"sample {sample_ids[row]}: {name} label expected in 0..{num_classes[name] - 1} (the head's classes), "
            f"found {int(labels[row, column])}; the shards and the model's head belong to different class lists"
        )
