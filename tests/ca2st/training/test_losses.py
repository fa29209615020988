import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from ca2st.batch import Mixing
from ca2st.errors import UserInputError
from ca2st.training.errors import LabelRangeError
from ca2st.training.losses import check_label_range, cross_entropy_per_clip, loss_per_clip, smoothed_targets

TARGETS = ("verb", "noun")


def make_step(seed: int, clips: int = 12) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = {"verb": torch.randn(clips, 5, generator=generator), "noun": torch.randn(clips, 7, generator=generator)}
    labels = torch.stack([torch.randint(0, size, (clips,), generator=generator) for size in (5, 7)], dim=1)
    return logits, labels


def test_smoothing_spreads_its_share_over_all_classes() -> None:
    targets = smoothed_targets(torch.tensor([1]), 4, smoothing=0.2)
    torch.testing.assert_close(targets, torch.tensor([[0.05, 0.85, 0.05, 0.05]]))


def test_the_loss_equals_torchs_label_smoothing_summed_over_targets() -> None:
    logits, labels = make_step(0)
    expected = sum(
        F.cross_entropy(logits[name], labels[:, i], label_smoothing=0.1, reduction="none")
        for i, name in enumerate(TARGETS)
    )
    torch.testing.assert_close(loss_per_clip(logits, labels, targets=TARGETS, smoothing=0.1), expected)


def test_mixed_targets_cost_the_mix_of_their_losses() -> None:
    logits, _ = make_step(1, clips=1)
    first, second = (smoothed_targets(torch.tensor([label]), 5, smoothing=0.0) for label in (0, 3))
    mixed = cross_entropy_per_clip(logits["verb"], 0.3 * first + 0.7 * second)
    apart = 0.3 * cross_entropy_per_clip(logits["verb"], first) + 0.7 * cross_entropy_per_clip(logits["verb"], second)
    torch.testing.assert_close(mixed, apart)


def test_half_precision_logits_are_summed_in_float32() -> None:
    logits = torch.full((1, 400), 8.0, dtype=torch.bfloat16)
    loss = cross_entropy_per_clip(logits, smoothed_targets(torch.tensor([0]), 400, smoothing=0.1))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(math.log(400), abs=1e-5)


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(1, 11), max_size=6), seed=st.integers(0, 100))
def test_any_split_into_ranks_and_micro_batches_gives_the_same_loss_and_gradient(cuts: list[int], seed: int) -> None:
    logits, labels = make_step(seed)
    whole = {name: value.double().requires_grad_() for name, value in logits.items()}
    at_once = loss_per_clip(whole, labels, targets=TARGETS, smoothing=0.1)
    (at_once.sum() / 12).backward()
    parts = {name: value.double().requires_grad_() for name, value in logits.items()}
    edges = [0, *sorted(set(cuts)), 12]
    losses = []
    for start, end in itertools.pairwise(edges):
        part = {name: value[start:end] for name, value in parts.items()}
        each = loss_per_clip(part, labels[start:end], targets=TARGETS, smoothing=0.1)
        (each.sum() / 12).backward()
        losses += each.tolist()
    assert math.fsum(losses) / 12 == math.fsum(at_once.tolist()) / 12
    for name in TARGETS:
        torch.testing.assert_close(parts[name].grad, whole[name].grad)


def test_a_target_without_a_head_is_refused() -> None:
    logits, labels = make_step(0)
    with pytest.raises(UserInputError, match=r"heads \(verb, noun\), found action"):
        loss_per_clip(logits, labels, targets=("verb", "action"), smoothing=0.1)


@pytest.mark.parametrize("label", [-1, 7])
def test_a_label_outside_the_head_is_refused_with_its_sample(label: int) -> None:
    labels = torch.tensor([[0, 6], [4, label]])
    with pytest.raises(LabelRangeError, match=rf"sample second: noun label expected in 0..6 .* found {label}"):
        check_label_range(labels, ("first", "second"), num_classes={"verb": 5, "noun": 7})


def test_the_loss_of_several_labels_is_torchs_binary_cross_entropy() -> None:
    logits, labels = torch.randn(4, 6, generator=torch.Generator().manual_seed(1)), torch.randint(0, 2, (4, 6))
    found = loss_per_clip({"label": logits}, labels, targets=("label",), smoothing=0.0, labelling="several")
    expected = [F.binary_cross_entropy_with_logits(row, own.float()) for row, own in zip(logits, labels, strict=True)]
    assert torch.allclose(found, torch.stack(expected))


def test_several_labels_are_smoothed_and_mixed_like_one() -> None:
    logits, labels = torch.tensor([[2.0, -1.0], [0.5, 0.0]]), torch.tensor([[1, 1], [0, 1]])
    none = torch.zeros(2, 4, dtype=torch.long)
    share, whole = torch.tensor([0.75, 0.75]), torch.ones(2)
    mixing = Mixing(video_share=whole, video_box=none, mel_share=whole, mel_box=none, label_share=share)
    found = loss_per_clip(
        {"label": logits}, labels, targets=("label",), smoothing=0.1, labelling="several", mixing=mixing
    )
    smooth = torch.tensor([[0.95, 0.95], [0.05, 0.95]])  # 0.9 + 0.1 / 2 and 0.1 / 2
    targets = 0.75 * smooth + 0.25 * smooth.flip(0)
    probabilities = torch.sigmoid(logits)
    terms = -(targets * probabilities.log() + (1 - targets) * (1 - probabilities).log())
    assert torch.allclose(found, terms.mean(dim=1), atol=1e-6)


def test_labels_of_another_number_of_classes_are_refused() -> None:
    labels = torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(LabelRangeError, match=r"sample a: expected labels of \{'label': 4\} classes .*, found 3"):
        check_label_range(labels, ("a",), num_classes={"label": 4}, labelling="several")
    check_label_range(labels, ("a",), num_classes={"label": 3}, labelling="several")
