"""How pairs are mixed: one lambda, boxes and labels that follow from it, the same for any split into ranks."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.data.mixup import rand_bbox

from ca2st.batch import MIXING_FIELDS, Mixing
from ca2st.errors import UserInputError
from ca2st.spec import ClipSpec
from pipelines.augment.config import AugmentConfig
from pipelines.augment.mixing import NO_BOX, UNMIXED, MixingConfig, PairMixing, beta, cut_box
from pipelines.views import SamplingConfig, TrainDraws
from support.refusals import forced

CLIP = ClipSpec(num_frames=8, crop_size=64, mel_rows=96)
MEL_AREA = CLIP.mel_rows * CLIP.num_mel_bins
PUBLISHED = MixingConfig(probability=0.9)


def draws(config: MixingConfig = PUBLISHED, *, first_pair: int = 0, epoch: int = 0) -> TrainDraws:
    return TrainDraws(
        clip=CLIP,
        sampling=SamplingConfig(),
        augment=AugmentConfig(mixing=config),
        seed=0,
        epoch=epoch,
        first_pair=first_pair,
    )


def mixed(draws: TrainDraws, step: int, has_audio: list[bool]) -> Mixing:
    found = draws.mixing(step, has_audio)
    assert found is not None
    return found


def pairs(config: MixingConfig, count: int = 1500, *, heard: bool = True) -> list[PairMixing]:
    return [config.drawn(("mixing", 0, 0, step, 0), CLIP, heard=heard) for step in range(count)]


def test_as_many_pairs_are_mixed_as_asked() -> None:
    changed = [pair for pair in pairs(PUBLISHED) if pair != UNMIXED]
    assert len(changed) / 1500 == pytest.approx(0.9, abs=0.03)
    assert all(pair.video_box == NO_BOX for pair in changed), "published runs never cut the video"


def test_the_box_of_the_spectrogram_comes_from_the_videos_lambda_and_decides_the_label() -> None:
    for pair in pairs(MixingConfig(probability=1.0), 300):
        rows, bins = pair.mel_box[2:]
        part = math.sqrt(1 - pair.video_share)
        assert rows <= int(CLIP.mel_rows * part)
        assert bins <= int(CLIP.num_mel_bins * part)
        assert pair.mel_share == 1
        assert pair.label_share == pytest.approx(1 - rows * bins / MEL_AREA)
        assert pair.label_share >= pair.video_share - 1e-9, (
            "a box that is cut at a border leaves more to the clip itself"
        )


def test_where_nobody_has_sound_the_label_follows_the_video() -> None:
    for pair in pairs(MixingConfig(probability=1.0), 50, heard=False):
        assert pair.label_share == pair.video_share


def test_both_blended_share_one_lambda() -> None:
    for pair in pairs(MixingConfig(probability=1.0, spectrogram="mixup"), 50):
        assert pair.video_share == pair.mel_share == pair.label_share
        assert pair.mel_box == pair.video_box == NO_BOX


def test_a_cut_video_gives_its_area_to_the_label_and_with_a_cut_spectrogram_the_mean_of_both() -> None:
    alone = MixingConfig(probability=1.0, switch_probability=1.0, spectrogram="mixup")
    for pair in pairs(alone, 50):
        assert pair.video_share == 1
        assert pair.label_share == pytest.approx(1 - pair.video_box[2] * pair.video_box[3] / CLIP.crop_size**2)
    for pair in pairs(MixingConfig(probability=1.0, switch_probability=1.0), 50):
        areas = [
            pair.video_box[2] * pair.video_box[3] / CLIP.crop_size**2,
            pair.mel_box[2] * pair.mel_box[3] / MEL_AREA,
        ]
        assert pair.label_share == pytest.approx(1 - sum(areas) / 2)


def test_switching_cuts_as_many_videos_as_asked() -> None:
    cut = [pair.video_box != NO_BOX for pair in pairs(MixingConfig(probability=1.0, switch_probability=0.3))]
    assert np.mean(cut) == pytest.approx(0.3, abs=0.05)


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0])
def test_lambda_is_beta_distributed(alpha: float) -> None:
    rng = np.random.default_rng(0)
    ours = np.sort([beta(alpha, rng.random(128).tolist()) for _ in range(4000)])
    theirs = np.sort(rng.beta(alpha, alpha, 40_000))
    quantiles = np.linspace(0.02, 0.98, 49)
    assert np.quantile(ours, quantiles) == pytest.approx(np.quantile(theirs, quantiles), abs=0.035)


def test_a_box_is_the_one_timm_would_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        share, *middles = rng.random(3).tolist()
        places = iter([int(u * size) for u, size in zip(middles, (96, 128), strict=True)])
        monkeypatch.setattr("timm.data.mixup.np.random.randint", lambda *_, places=places, **__: next(places))
        top, bottom, left, right = (int(edge) for edge in rand_bbox((96, 128), share))
        assert cut_box(share, (96, 128), middles) == (top, left, bottom - top, right - left)


@given(
    world=st.sampled_from([1, 2, 3, 4, 6]),
    step=st.integers(0, 9),
    audio=st.lists(st.booleans(), min_size=24, max_size=24),
)
def test_any_split_into_ranks_mixes_every_pair_alike(world: int, step: int, audio: list[bool]) -> None:
    whole, size = mixed(draws(), step, audio), 24 // world
    for rank in range(world):
        here = slice(rank * size, (rank + 1) * size)
        part = mixed(draws(first_pair=rank * size // 2), step, audio[here])
        for name in MIXING_FIELDS:
            assert torch.equal(getattr(part, name), getattr(whole, name)[here]), name


def test_partners_are_neighbours_that_are_mixed_alike() -> None:
    mixing = mixed(draws(MixingConfig(probability=1.0, switch_probability=0.5)), 3, [True] * 12)
    for name in MIXING_FIELDS:
        rows = getattr(mixing, name)
        assert torch.equal(rows[::2], rows[1::2])
    assert len(set(mixing.label_share.tolist())) == 6


def test_a_pair_depends_on_seed_epoch_step_and_its_number() -> None:
    one = draws(MixingConfig(probability=1.0))
    shares = {share for step in range(4) for share in mixed(one, step, [True] * 8).label_share.tolist()}
    shares |= set(mixed(draws(MixingConfig(probability=1.0), epoch=1), 0, [True] * 2).label_share.tolist())
    assert len(shares) == 17
    again = mixed(draws(MixingConfig(probability=1.0)), 2, [True] * 4)
    assert torch.equal(mixed(one, 2, [True] * 4).label_share, again.label_share)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"probability": -0.1}, "augment.mixing.probability: expected 0..1, found -0.1"),
        ({"switch_probability": 2.0}, "augment.mixing.switch_probability: expected 0..1"),
        ({"mixup_alpha": 0.0}, "augment.mixing.mixup_alpha: expected above 0 and at most 1"),
        ({"cutmix_alpha": 1.5}, "augment.mixing.cutmix_alpha: expected above 0 and at most 1"),
        ({"spectrogram": "cut"}, "augment.mixing.spectrogram: expected one of cutmix, mixup, found 'cut'"),
    ],
)
def test_a_wrong_setting_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserInputError, match=message):
        forced(MixingConfig(), **values)


def test_an_odd_number_of_clips_is_refused_only_where_pairs_are_mixed() -> None:
    with pytest.raises(UserInputError, match=r"training.per_device_batch_size: expected an even number .* found 5"):
        PUBLISHED.check_even("training.per_device_batch_size", 5)
    MixingConfig().check_even("training.per_device_batch_size", 5)
