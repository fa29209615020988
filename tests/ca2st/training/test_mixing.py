"""Pairs mixed in the training step: pixels, spectrograms, targets, and that no split of the batch changes a number."""

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from timm.data.mixup import mixup_target
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ca2st.batch import MIXING_FIELDS, BatchContractError, ClipBatch, Mixing
from ca2st.training.errors import NonFiniteError, SourceContractError
from ca2st.training.evaluate import evaluate
from ca2st.training.losses import (
    box_mask,
    loss_per_clip,
    mixed_mel,
    mixed_targets,
    mixed_video,
    partners,
    smoothed_targets,
)
from ca2st.training.optim import LearningRateSchedule
from ca2st.training.ranks import Ranks
from ca2st.training.step import Stepper, keep_failing_clips, model_logits
from support.gpu import require_gpu
from support.refusals import forced
from support.tiny_training import TARGETS, TinyEvaluation, TinyModel, batch_of, clip, fresh_accelerator, tiny_settings

CLIPS = 12


def mixing(clips: int = CLIPS, *, seed: int = 0, boxes: bool = True) -> Mixing:
    """Shares and boxes of random pairs; every third pair is left as it is."""
    generator = torch.Generator().manual_seed(seed)
    pairs = clips // 2
    shares = torch.rand(3, pairs, generator=generator)
    shares[:, ::3] = 1
    box = torch.randint(0, 3, (2, pairs, 4), generator=generator) * int(boxes)
    box[:, ::3] = 0
    video, mel, label = shares.repeat_interleave(2, dim=1)
    video_box, mel_box = box.repeat_interleave(2, dim=1)
    return Mixing(video_share=video, video_box=video_box, mel_share=mel, mel_box=mel_box, label_share=label)


def batch(clips: int = CLIPS, *, mixed: Mixing | None = None) -> ClipBatch:
    keys = [f"clip-{index}" for index in range(clips)]
    made = batch_of([clip(key) for key in keys], keys)
    fields = {name: getattr(made, name) for name in ("video", "mel", "intervals_seconds", "labels", "has_audio")}
    return ClipBatch(**fields, sample_ids=made.sample_ids, is_padding=made.is_padding, mixing=mixed)


def only(**values: torch.Tensor) -> Mixing:
    """Two clips that keep all of themselves but for `values`."""
    fields = {
        name: torch.ones(2) if name.endswith("share") else torch.zeros(2, 4, dtype=torch.int64)
        for name in MIXING_FIELDS
    }
    return Mixing(**(fields | values))


def test_partners_are_neighbours() -> None:
    assert partners(torch.arange(6)).tolist() == [1, 0, 3, 2, 5, 4]


def test_a_blended_pair_keeps_its_share_of_frames_and_spectrogram() -> None:
    share = torch.full((2,), 0.3)
    mixed, plain = batch(2, mixed=only(video_share=share, mel_share=share)), batch(2)
    video, mel = plain.normalised_video(), plain.mel
    torch.testing.assert_close(mixed_video(mixed), 0.3 * video + 0.7 * video.flip(0))
    torch.testing.assert_close(mixed_mel(mixed), 0.3 * mel + 0.7 * mel.flip(0))


def test_a_box_is_taken_from_the_partner_in_every_frame_and_nothing_else() -> None:
    box = torch.tensor([[1, 2, 2, 1], [1, 2, 2, 1]])
    plain = batch(2)
    video, mel = plain.normalised_video(), plain.mel.clone()
    cut = mixed_video(batch(2, mixed=only(video_box=box)))
    assert torch.equal(cut[..., 1:3, 2:3], video.flip(0)[..., 1:3, 2:3])
    outside = ~box_mask(box, 4, 4)[:, None, None].expand_as(video)
    assert torch.equal(cut[outside], video[outside])
    mel[:, 1:3, 2:3] = plain.mel.flip(0)[:, 1:3, 2:3]
    assert torch.equal(mixed_mel(batch(2, mixed=only(mel_box=box))), mel)


def test_a_pair_that_is_not_mixed_stays_as_it_is_to_the_bit() -> None:
    mixed, plain = batch(mixed=mixing()), batch()
    for rows in (slice(0, 2), slice(6, 8)):
        assert torch.equal(mixed_video(mixed)[rows], plain.normalised_video()[rows])
        assert torch.equal(mixed_mel(mixed)[rows], plain.mel[rows])
    assert not torch.equal(mixed_video(mixed)[2:4], plain.normalised_video()[2:4])


def test_a_clip_without_sound_lends_zeros() -> None:
    silent = batch(2, mixed=only(mel_box=torch.tensor([[0, 0, 2, 4]] * 2)))
    silent.mel[1] = 0
    assert not mixed_mel(silent)[0, :2].any()
    assert torch.equal(mixed_mel(silent)[1, :2], silent.mel[0, :2])


def test_targets_are_mixed_as_timm_mixes_them_with_smoothing() -> None:
    labels = torch.tensor([1, 4])
    ours = mixed_targets(smoothed_targets(labels, 7, smoothing=0.1), only(label_share=torch.full((2,), 0.3)))
    torch.testing.assert_close(ours, mixup_target(labels, 7, lam=0.3, smoothing=0.1))


def test_every_head_has_its_own_soft_targets() -> None:
    made, mixed = batch(), mixing()
    logits = model_logits(TinyModel(dropout=0.0), made)
    found = loss_per_clip(logits, made.labels, targets=tuple(TARGETS), smoothing=0.1, mixing=mixed)
    expected = torch.zeros(CLIPS)
    for column, name in enumerate(TARGETS):
        own, other = (
            F.cross_entropy(logits[name], labels, label_smoothing=0.1, reduction="none")
            for labels in (made.labels[:, column], partners(made.labels)[:, column])
        )
        expected += mixed.label_share * own + (1 - mixed.label_share) * other
    torch.testing.assert_close(found, expected)


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(1, 5), max_size=4), seed=st.integers(0, 20))
def test_any_split_that_keeps_pairs_gives_the_same_loss_and_gradient(cuts: list[int], seed: int) -> None:
    whole = batch(mixed=mixing(seed=seed))
    edges = [0, *(2 * cut for cut in sorted(set(cuts))), CLIPS]
    losses, gradients = run([whole])
    pieces = [piece for start, end in itertools.pairwise(edges) for piece in rows_of(whole, start, end)]
    part_losses, part_gradients = run(pieces)
    torch.testing.assert_close(part_losses, losses, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(part_gradients, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def rows_of(whole: ClipBatch, start: int, end: int) -> list[ClipBatch]:
    """Clips start .. end as a rank would hold them, cut from the whole by micro-batches of two."""
    return list(whole.split(2))[start // 2 : end // 2]


def run(parts: list[ClipBatch]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    model = TinyModel(dropout=0.0)
    losses = []
    for part in parts:
        each = loss_per_clip(
            model_logits(model, part), part.labels, targets=tuple(TARGETS), smoothing=0.1, mixing=part.mixing
        )
        (each.sum() / CLIPS).backward()
        losses.append(each.detach())
    return torch.cat(losses), [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


# The step.


def stepper(folder: Path, *, per_device_batch_size: int) -> tuple[Stepper, TinyModel]:
    settings = tiny_settings(folder, global_batch_size=CLIPS, per_device_batch_size=per_device_batch_size)
    accelerator = fresh_accelerator(settings)
    model = TinyModel(dropout=0.0)
    made = Stepper(
        model,
        torch.optim.SGD([{"params": list(model.layers.parameters()), "lr_scale": 1.0}]),
        accelerator=accelerator,
        ranks=Ranks(accelerator),
        settings=settings,
        schedule=LearningRateSchedule(peak=0.1, minimum=0.0, warmup_steps=0, total_steps=10),
    )
    return made, model


@pytest.mark.parametrize("size", [2, 4, 12])
def test_micro_batches_of_any_even_size_make_the_same_update(size: int, tmp_path: Path) -> None:
    share = batch(mixed=mixing())
    whole, expected = stepper(tmp_path, per_device_batch_size=CLIPS)
    first = whole.update(share, [share.sample_ids], step=1)
    parted, model = stepper(tmp_path, per_device_batch_size=size)
    second = parted.update(share, [share.sample_ids], step=1)
    assert second.loss == pytest.approx(first.loss, rel=1e-6)
    assert first.loss != pytest.approx(
        stepper(tmp_path, per_device_batch_size=CLIPS)[0].update(batch(), [share.sample_ids], step=1).loss
    )
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_an_odd_micro_batch_would_part_a_pair_and_is_refused(tmp_path: Path) -> None:
    share = batch(mixed=mixing())
    odd, _ = stepper(tmp_path, per_device_batch_size=3)
    with pytest.raises(
        BatchContractError, match=r"even number of clips, .* found 3; use an even per_device_batch_size"
    ):
        odd.update(share, [share.sample_ids], step=1)


@pytest.mark.parametrize(("cut", "blamed"), [(True, ("clip-2", "clip-3")), (False, ("clip-2",))])
def test_a_clip_that_is_not_finite_is_blamed_with_the_partner_that_took_of_it(
    cut: bool, blamed: tuple[str, ...], tmp_path: Path
) -> None:
    mixed = mixing(boxes=False)
    mixed.mel_share[:] = 1
    mixed.mel_box[2:4] = torch.tensor([0, 0, 2, 4] if cut else [0, 0, 0, 0])
    share = batch(mixed=mixed)
    share.mel[2] = torch.nan
    made, _ = stepper(tmp_path, per_device_batch_size=4)
    with pytest.raises(NonFiniteError) as caught:
        made.update(share, [share.sample_ids], step=1)
    assert caught.value.keys == blamed


def test_failing_clips_are_kept_with_what_they_kept_and_took(tmp_path: Path) -> None:
    share = batch(mixed=mixing())
    path = keep_failing_clips(tmp_path, share, ("clip-2", "clip-3"), name="step-1")
    assert path is not None
    with safe_open(path, framework="pt") as file:
        assert torch.equal(file.get_tensor("mixing.video_share"), mixing().video_share[2:4])
        assert torch.equal(file.get_tensor("video"), share.video[2:4])


# The contract.


def test_parts_and_moved_batches_keep_their_mixing() -> None:
    mixed = mixing()
    first, second = batch(mixed=mixed).to(torch.device("cpu")).split(8)
    assert first.mixing is not None
    assert second.mixing is not None
    for name in MIXING_FIELDS:
        joined = torch.cat([getattr(part.mixing, name) for part in (first, second)])
        assert torch.equal(joined, getattr(mixed, name))


def test_mixing_of_another_number_of_clips_is_refused() -> None:
    with pytest.raises(BatchContractError, match="mixing: expected 12 rows"):
        batch(mixed=mixing(10))
    with pytest.raises(BatchContractError, match=r"mixing.label_share: expected 2 rows"):
        forced(only(), label_share=torch.ones(4))


def test_evaluation_refuses_a_batch_that_is_to_be_mixed(tmp_path: Path) -> None:
    class Mixed(TinyEvaluation):
        def batches(self):  # type: ignore[no-untyped-def]
            yield batch(mixed=mixing())

    accelerator = fresh_accelerator(tiny_settings(tmp_path))
    with pytest.raises(SourceContractError, match="evaluation: expected clips as they are"):
        evaluate(TinyModel(), Mixed(), accelerator=accelerator, targets=TARGETS, per_device_batch_size=4)


class _Crossings(TorchDispatchMode):
    """Elements of every tensor that is copied from one device to another."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        source = args[1] if func is torch.ops.aten.copy_.default else args[0] if args else None
        if isinstance(found, torch.Tensor) and isinstance(source, torch.Tensor) and found.device != source.device:
            self.sizes.append(source.numel())
        return found


def test_a_step_reads_nothing_from_the_device_and_copies_a_few_numbers_a_clip_to_it():
    # A tensor on "meta" has no values: whoever asks for one, as a wait for a GPU would, gets an error.
    there = batch(mixed=mixing()).to(torch.device("meta"))
    mixed_video(there)
    with _Crossings() as crossings:
        video, mel = mixed_video(there), mixed_mel(there)
        logits = {name: torch.zeros(CLIPS, size, device="meta") for name, size in TARGETS.items()}
        losses = loss_per_clip(logits, there.labels, targets=tuple(TARGETS), smoothing=0.1, mixing=there.mixing)
    assert {x.device.type for x in (video, mel, losses)} == {"meta"}
    assert max(crossings.sizes) <= CLIPS * 4
    assert len(crossings.sizes) <= 4 + len(TARGETS)  # shares and boxes of frames and sound, and the labels' shares


@pytest.mark.gpu
def test_on_a_gpu_the_host_does_not_wait_while_a_batch_is_moved_normalised_and_mixed():
    device = require_gpu()
    here = batch(mixed=mixing())
    mixed_video(here.to(device))
    torch.cuda.set_sync_debug_mode("error")
    try:
        there = here.to(device)
        found = mixed_video(there), mixed_mel(there)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for ours, expected in zip(found, (mixed_video(here), mixed_mel(here)), strict=True):
        torch.testing.assert_close(ours.cpu(), expected)
