"""The same bytes and numbers on a GPU: what backends that render there rely on."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ca2st.batch import MIXING_FIELDS, ClipBatch
from ca2st.spec import ClipSpec
from ca2st.training.losses import mixed_mel, mixed_video
from pipelines.augment.boxes import CropBox, ErasedBox
from pipelines.augment.fused import finish_view
from pipelines.augment.mixing import MixingConfig, mixing_of
from pipelines.augment.rand_augment import OPERATION_NAMES, ImageAugment, Operation, argument_of
from support.gpu import require_gpu
from support.tiny_training import batch_of, clip

pytestmark = pytest.mark.gpu

operations = st.builds(
    lambda name, level, negative: Operation(name, argument_of(name, level=level, negative=negative)),
    st.sampled_from(OPERATION_NAMES),
    st.floats(0, 1),
    st.booleans(),
)


@settings(max_examples=50)
@given(runs=st.lists(st.lists(operations, min_size=1, max_size=4), min_size=3, max_size=3))
def test_views_are_finished_on_a_gpu_as_on_the_cpu_to_the_byte(runs: list[list[Operation]]) -> None:
    device = require_gpu()
    box = CropBox(top=2, left=3, height=9, width=8)
    views = torch.randint(0, 256, (3, 3, 2, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    on_gpu = views.to(device)
    for index, run in enumerate(runs):
        augment, erased = ImageAugment(tuple(run)), (ErasedBox(box=box, colour=None, noise=("noise", index)),)
        finish_view(views[index], augment, erased)
        finish_view(on_gpu[index], augment, erased)
    assert torch.equal(on_gpu.cpu(), views)


def test_pairs_are_mixed_on_a_gpu_as_on_the_cpu_within_rounding() -> None:
    device = require_gpu()
    config = MixingConfig(probability=1.0, switch_probability=0.5)
    spec = ClipSpec(num_frames=2, crop_size=16, mel_rows=16, num_mel_bins=16)
    drawn = [config.drawn(("mixing", pair), spec, heard=True) for pair in range(4)]
    keys = [f"clip-{index}" for index in range(8)]
    plain = batch_of([clip(key) for key in keys], keys)
    fields = {name: getattr(plain, name) for name in ("video", "mel", "intervals_seconds", "labels", "has_audio")}
    batch = ClipBatch(**fields, sample_ids=plain.sample_ids, is_padding=plain.is_padding, mixing=mixing_of(drawn))
    torch.testing.assert_close(mixed_video(batch.to(device)).cpu(), mixed_video(batch), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(mixed_mel(batch.to(device)).cpu(), mixed_mel(batch), rtol=1e-6, atol=1e-6)
    assert all(getattr(batch.to(device).mixing, name).device.type == "cpu" for name in MIXING_FIELDS)
