"""The baseline reads what it should: the right frames, one draw a clip, torchvision's own pixels."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from ca2st.errors import UserInputError
from ca2st.spec import IMAGENET_MEAN, IMAGENET_STD, ClipSpec
from pipelines.benchmark.clips import (
    BaselineConfig,
    RunningBatches,
    TorchcodecClips,
    VideoClips,
    decode_frames,
    make_dataloader,
    torchcodec_missing,
)
from pipelines.views import dense_window
from support.media import Sound, make_clip, read_number

VALIDATION = BaselineConfig(
    clip=ClipSpec(num_frames=4, crop_size=32), training=False, rand_augment=True, batch_size=2, num_workers=0
)
TRAINING = replace(VALIDATION, training=True)


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clip(tmp_path_factory.mktemp("clips") / "numbered.mp4", seconds=2.0, gop=12, b_frames=2)


def test_just_the_frames_of_the_window_are_read_after_a_seek(clip_file: Path) -> None:
    found = [read_number(np.asarray(frame)) for frame in decode_frames(clip_file, VALIDATION, 0.0)]
    assert tuple(found) == dense_window(60, num_frames=4, stride=4, u=0.5)
    for u in (0.0, 0.4, 0.99):
        found = [read_number(np.asarray(frame)) for frame in decode_frames(clip_file, TRAINING, u)]
        assert tuple(found) == dense_window(60, num_frames=4, stride=4, u=u)


def test_a_validation_view_is_what_torchvision_makes(clip_file: Path) -> None:
    view, seconds = VideoClips([clip_file], VALIDATION)[0]
    compose = transforms.Compose(
        [
            transforms.Resize(32),
            transforms.CenterCrop(32),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    frames = decode_frames(clip_file, VALIDATION, 0.0)
    assert torch.equal(view, torch.stack([compose(frame) for frame in frames], dim=1))
    assert view.shape == (3, 4, 32, 32)
    assert (seconds >= 0).all()


def test_rand_augment_draws_once_a_clip_and_anew_for_the_next(clip_file: Path) -> None:
    clips = VideoClips([clip_file], TRAINING)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    augmented = [
        np.stack([np.asarray(frame) for frame in clips._augmented([picture] * 3, index)]) for index in range(6)
    ]
    assert all((of_clip == of_clip[0]).all() for of_clip in augmented)
    assert len({of_clip.tobytes() for of_clip in augmented}) > 3


def test_training_views_differ_by_index_and_not_by_call(clip_file: Path) -> None:
    clips = VideoClips([clip_file], TRAINING)
    assert torch.equal(clips[3][0], clips[3][0])
    assert not torch.equal(clips[3][0], clips[4][0])


def test_every_pass_goes_on_where_the_last_one_ended(clip_file: Path) -> None:
    sampler = RunningBatches(replace(VALIDATION, num_workers=2))
    assert [list(sampler), list(sampler)] == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
    assert len(sampler) == 2
    ((video, seconds),) = make_dataloader([clip_file], VALIDATION)
    assert video.shape == (2, 3, 4, 32, 32)
    assert seconds.shape == (2, 5)


def test_a_file_without_a_video_is_told(tmp_path: Path) -> None:
    import av

    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16_000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(UserInputError, match=r"sound\.mp4: expected a video, found none"):
        decode_frames(path, VALIDATION, 0.0)


def test_a_clip_with_sound_is_read_alike(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "with_sound.mp4", seconds=1.0, sound=Sound())
    assert len(decode_frames(path, VALIDATION, 0.0)) == 4


def test_the_torchcodec_stack_reads_the_same_frames_and_hands_over_bytes(clip_file: Path) -> None:
    if missing := torchcodec_missing():
        pytest.skip(missing)
    plain = replace(VALIDATION, stack="torchcodec", clip=ClipSpec(num_frames=4, crop_size=48))
    frames = TorchcodecClips([clip_file], plain)._decoded(clip_file, 0.0)
    found = [read_number(frame.permute(1, 2, 0).numpy()) for frame in frames]
    assert tuple(found) == dense_window(60, num_frames=4, stride=4, u=0.5)
    view, _ = TorchcodecClips([clip_file], plain)[0]
    assert (view.shape, view.dtype) == ((4, 3, 48, 48), torch.uint8)
    training = TorchcodecClips([clip_file], replace(plain, training=True))
    assert torch.equal(training[3][0], training[3][0])
    assert not torch.equal(training[3][0], training[4][0])
