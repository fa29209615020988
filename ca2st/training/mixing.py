"""Partners mixed on the device: frames, spectrograms and targets as `ClipBatch.mixing` says.

Clips 2k and 2k+1 are partners. A clip that keeps all of itself stays bit for bit what it was, and a partner whose
numbers are not finite reaches only what is taken from it.
"""

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from ca2st.batch import ClipBatch, Mixing


def mixed_video(batch: ClipBatch) -> Float[Tensor, "batch 3 time height width"]:
    """The normalised frames that the model reads: mixed where the batch says so."""
    video, mixing = batch.normalised_video(), batch.mixing
    if mixing is None:
        return video
    own = video
    if bool((mixing.video_share < 1).any()):
        video = _blended(own, mixing.video_share)
    if bool(mixing.video_box[:, 2:].any()):
        inside = box_mask(mixing.video_box, video.shape[3], video.shape[4]).to(video.device)
        video = torch.where(rearrange(inside, "batch h w -> batch 1 1 h w"), partners(own), video)
    return video


def mixed_mel(batch: ClipBatch) -> Float[Tensor, "batch rows bins"]:
    """The spectrograms that the model reads: mixed where the batch says so; a clip without sound lends zeros."""
    mel, mixing = batch.mel, batch.mixing
    if mixing is None:
        return mel
    own = mel
    if bool((mixing.mel_share < 1).any()):
        mel = _blended(own, mixing.mel_share)
    if bool(mixing.mel_box[:, 2:].any()):
        inside = box_mask(mixing.mel_box, mel.shape[1], mel.shape[2]).to(mel.device)
        mel = torch.where(inside, partners(own), mel)
    return mel


def mixed_targets(targets: Float[Tensor, "clips classes"], mixing: Mixing | None) -> Float[Tensor, "clips classes"]:
    """Each clip's class distribution, mixed with its partner's by the share of the labels."""
    return targets if mixing is None else _blended(targets, mixing.label_share)


def partners(rows: Tensor) -> Tensor:
    """Row 2k+1 at 2k and row 2k at 2k+1."""
    return rearrange(rearrange(rows, "(pair two) ... -> pair two ...", two=2).flip(1), "pair two ... -> (pair two) ...")


def box_mask(boxes: Tensor, height: int, width: int) -> Bool[Tensor, "batch {height} {width}"]:
    """True inside each (first row, first column, rows, columns)."""
    top, left, tall, wide = (rearrange(column, "batch -> batch 1") for column in boxes.unbind(dim=1))
    rows, columns = torch.arange(height), torch.arange(width)
    in_rows, in_columns = (rows >= top) & (rows < top + tall), (columns >= left) & (columns < left + wide)
    return rearrange(in_rows, "batch h -> batch h 1") & rearrange(in_columns, "batch w -> batch 1 w")


def _blended(own: Tensor, share: Tensor) -> Tensor:
    weight = share.to(own.device, own.dtype).view(-1, *(1 for _ in own.shape[1:]))
    return torch.where(weight < 1, own * weight + partners(own) * (1 - weight), own)
