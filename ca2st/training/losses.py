"""Losses as one number per clip, and the mixing of pairs on the device.

A step's loss is the sum over clips and targets divided by the global number of clips, so no split into ranks and
micro-batches changes it. Targets are distributions already, so mixed labels need no other code. Where a clip may have
several labels, each class is a question of its own: binary cross-entropy, the mean over the classes.

Clips 2k and 2k+1 are partners (`ClipBatch.mixing`). A clip that keeps all of itself stays bit for bit what it was, and
a partner whose numbers are not finite reaches only what is taken from it.
"""

from collections.abc import Iterable, Mapping

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from ca2st.batch import ClipBatch, Labelling, Mixing, on_device
from ca2st.errors import UserInputError
from ca2st.training.errors import LabelRangeError


def mixed_video(batch: ClipBatch) -> Float[Tensor, "batch 3 time height width"]:
    """Return the normalised frames that the model reads: mixed where the batch says so."""
    video, mixing = batch.normalised_video(), batch.mixing
    return video if mixing is None else _mixed(video, mixing.video_share, mixing.video_box)


def mixed_mel(batch: ClipBatch) -> Float[Tensor, "batch rows bins"]:
    """Return the spectrograms that the model reads: mixed where the batch says so; a clip without sound lends zeros."""
    mel, mixing = batch.mel, batch.mixing
    return mel if mixing is None else _mixed(mel, mixing.mel_share, mixing.mel_box)


def _mixed(own: Tensor, share: Tensor, box: Tensor) -> Tensor:
    """Return `own` blended by `share`, then with each box of its last two axes taken from the partner."""
    mixed = own
    if bool((share < 1).any()):
        mixed = _blended(own, share)
    if bool(box[:, 2:].any()):
        inside = box_mask(on_device(box, own.device), *own.shape[-2:])
        inside = inside.view(len(own), *(1 for _ in own.shape[3:]), *own.shape[-2:])
        mixed = torch.where(inside, partners(own), mixed)
    return mixed


def mixed_targets(targets: Float[Tensor, "clips classes"], mixing: Mixing | None) -> Float[Tensor, "clips classes"]:
    """Return each clip's class distribution, mixed with its partner's by the share of the labels."""
    return targets if mixing is None else _blended(targets, mixing.label_share)


def partners(rows: Tensor) -> Tensor:
    """Row 2k+1 at 2k and row 2k at 2k+1."""
    return rearrange(rearrange(rows, "(pair two) ... -> pair two ...", two=2).flip(1), "pair two ... -> (pair two) ...")


def box_mask(boxes: Tensor, height: int, width: int) -> Bool[Tensor, "batch {height} {width}"]:
    """Return True inside each (first row, first column, rows, columns)."""
    top, left, tall, wide = (rearrange(column, "batch -> batch 1") for column in boxes.unbind(dim=1))
    rows, columns = (torch.arange(size, device=boxes.device) for size in (height, width))
    in_rows, in_columns = (rows >= top) & (rows < top + tall), (columns >= left) & (columns < left + wide)
    return rearrange(in_rows, "batch h -> batch h 1") & rearrange(in_columns, "batch w -> batch 1 w")


def _blended(own: Tensor, share: Tensor) -> Tensor:
    weight = on_device(share, own.device).to(own.dtype).view(-1, *(1 for _ in own.shape[1:]))
    # `where`: a sum alone would take 0 * NaN from a partner of which nothing is taken
    return torch.where(weight < 1, own * weight + partners(own) * (1 - weight), own)


def smoothed_targets(
    labels: Int[Tensor, " clips"], num_classes: int, *, smoothing: float
) -> Float[Tensor, "clips {num_classes}"]:
    """Return a distribution per clip: ``1 - smoothing`` on its label, ``smoothing / num_classes`` on every class."""
    return smoothed(F.one_hot(labels.long(), num_classes), smoothing=smoothing)


def smoothed(hot: Int[Tensor, "clips classes"], *, smoothing: float) -> Float[Tensor, "clips classes"]:
    """Return targets of 0 and 1 less `smoothing`, of which ``smoothing / classes`` goes to every class."""
    return hot.float() * (1 - smoothing) + smoothing / hot.shape[1]


def cross_entropy_per_clip(
    logits: Float[Tensor, "clips classes"], targets: Float[Tensor, "clips classes"]
) -> Float[Tensor, " clips"]:
    """Return the cross-entropy of each clip in float32, whatever the precision of the logits."""
    return -(targets * torch.log_softmax(logits.float(), dim=-1)).sum(dim=-1)


def loss_per_clip(
    logits: Mapping[str, Tensor],
    labels: Int[Tensor, "clips columns"],
    *,
    targets: tuple[str, ...],
    smoothing: float,
    labelling: Labelling = "one",
    mixing: Mixing | None = None,
) -> Float[Tensor, " clips"]:
    """Return the sum over targets of each clip's smoothed cross-entropy; label column i belongs to ``targets[i]``.

    `labelling` ``several``: the binary cross-entropy of the one target, whose classes the columns are. With `mixing`
    every head has its own soft targets: the clip's and its partner's, by the share of the labels.
    """
    check_targets(logits, targets)
    if labelling == "several":
        (name,) = targets
        wanted = mixed_targets(smoothed(labels, smoothing=smoothing), mixing)
        return F.binary_cross_entropy_with_logits(logits[name].float(), wanted, reduction="none").mean(dim=-1)
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
            "build the model with one head per target"
        )


def check_label_range(
    labels: Int[Tensor, "clips columns"],
    sample_ids: tuple[str, ...],
    *,
    num_classes: Mapping[str, int],
    labelling: Labelling = "one",
) -> None:
    """Refuse labels outside the heads' classes, naming the first sample; of several labels per clip, other columns.

    Raises:
        LabelRangeError: a label is negative or not less than its head's number of classes, or of several labels per
            clip there is not a column for each class.
    """
    if labelling == "none":
        return
    if labelling == "several":
        if [labels.shape[1]] != list(num_classes.values()):
            raise LabelRangeError(
                f"sample {sample_ids[0]}: expected labels of {dict(num_classes)} classes (the head's), found "
                f"{labels.shape[1]}; the shards and the model's head belong to different class lists"
            )
        return
    sizes = torch.tensor(list(num_classes.values()), device=labels.device)
    wrong = ((labels < 0) | (labels >= sizes)).nonzero()
    if len(wrong):
        row, column = wrong[0].tolist()
        name = list(num_classes)[column]
        raise LabelRangeError(
            f"sample {sample_ids[row]}: {name} label expected in 0..{num_classes[name] - 1} (the head's classes), "
            f"found {int(labels[row, column])}; the shards and the model's head belong to different class lists"
        )
