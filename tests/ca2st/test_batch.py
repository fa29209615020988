"""ClipBatch refuses what breaks its contract and splits without losing anything."""

from dataclasses import replace

import jaxtyping
import pytest
import torch

from ca2st.batch import BatchContractError, ClipBatch
from ca2st.spec import IMAGENET_MEAN, IMAGENET_STD


def clip_batch(num_clips: int = 3, num_frames: int = 4) -> ClipBatch:
    generator = torch.Generator().manual_seed(0)
    return ClipBatch(
        video=torch.randint(0, 256, (num_clips, 3, num_frames, 8, 8), dtype=torch.uint8, generator=generator),
        mel=torch.randn(num_clips, 16, 128, generator=generator),
        intervals_seconds=torch.rand(num_clips, 1 + num_frames // 2, 2, generator=generator),
        labels=torch.arange(num_clips)[:, None],
        sample_ids=tuple(f"clip-{index}" for index in range(num_clips)),
        has_audio=torch.ones(num_clips, dtype=torch.bool),
        is_padding=torch.zeros(num_clips, dtype=torch.bool),
    )


def test_micro_batches_put_together_are_the_batch() -> None:
    batch = clip_batch(5)
    parts = list(batch.split(2))
    assert [part.num_clips for part in parts] == [2, 2, 1]
    assert torch.equal(torch.cat([part.video for part in parts]), batch.video)
    assert sum((part.sample_ids for part in parts), ()) == batch.sample_ids


def test_normalised_video_is_imagenet_normalised() -> None:
    batch = clip_batch(1)
    expected = (batch.video[0, 1, 0, 0, 0].item() / 255 - IMAGENET_MEAN[1]) / IMAGENET_STD[1]
    assert batch.normalised_video()[0, 1, 0, 0, 0].item() == pytest.approx(expected, abs=1e-6)


def test_intervals_that_do_not_fit_the_frames_are_refused() -> None:
    with pytest.raises(BatchContractError, match=r"intervals_seconds: expected \[3, 3, 2\]"):
        replace(clip_batch(), intervals_seconds=torch.zeros(3, 4, 2))


def test_labels_of_another_batch_size_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the hook would refuse first
    with pytest.raises(BatchContractError, match="labels: expected 3 rows"):
        replace(clip_batch(), labels=torch.zeros(2, 1, dtype=torch.int64))


def test_missing_keys_are_refused() -> None:
    with pytest.raises(BatchContractError, match="sample_ids: expected 3 keys, found 1"):
        replace(clip_batch(), sample_ids=("one",))
