"""The reference backend against independent resizers, and DALI against the reference, stage by stage."""

import io
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ca2st.errors import EnvironmentFault
from pipelines.augment.boxes import CropBox
from pipelines.config import BackendName
from pipelines.decode import backends
from pipelines.decode.backends import make_backend
from pipelines.decode.dali import GraphBackend, dali_backend
from pipelines.decode.reference import ReferenceBackend, decode_frames
from pipelines.decode.resizing import resize_into, resized_crop, triangle_taps
from pipelines.errors import LoaderClosedError, SampleDamageError
from pipelines.rendering import JpegFrames, RenderRequest, ViewBackend
from pipelines.threads import StatsRecorder
from support.fake_shards import FakeSample

FRAMES, SIZE, VIEWS = 4, 40, 3
Backends = dict[str, ViewBackend]
HEIGHT, WIDTH = 90, 121
LEAST_PSNR_DB, MOST_LEVELS = 60.0, 1
"""How far DALI's resize may lie from the reference: it rounds in another place."""


def request(seed: int, boxes: tuple[CropBox, ...], *, flip: bool = False) -> RenderRequest:
    sample = FakeSample(key=f"s{seed}", seed=seed, num_frames=FRAMES, height=HEIGHT, width=WIDTH)
    return RenderRequest(
        frames=JpegFrames(tuple(sample.frames())), boxes=boxes, flip=flip, where=f"shard, sample s{seed}"
    )


def jpegs(one: RenderRequest) -> tuple[bytes, ...]:
    assert isinstance(one.frames, JpegFrames)
    return one.frames.frames


def box(top: int, left: int, height: int, width: int) -> CropBox:
    return CropBox(top=top, left=left, height=height, width=width)


@pytest.fixture(scope="module")
def dali() -> Iterator[GraphBackend]:
    backend = dali_backend(
        "mjpeg", num_frames=FRAMES, crop_size=SIZE, views_per_clip=1, threads=2, stats=StatsRecorder()
    )
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def dali_views() -> Iterator[GraphBackend]:
    backend = dali_backend(
        "mjpeg", num_frames=FRAMES, crop_size=SIZE, views_per_clip=VIEWS, threads=1, stats=StatsRecorder()
    )
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def reference() -> ReferenceBackend:
    return ReferenceBackend(crop_size=SIZE, stats=StatsRecorder())


def pillow_frame(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def psnr_db(a: torch.Tensor, b: torch.Tensor) -> float:
    error = (a.double() - b.double()).square().mean().item()
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)


# The reference against others' code.


def test_the_reference_decodes_as_pillow_does() -> None:
    one = request(0, (box(0, 0, 5, 5),))
    decoded = decode_frames(one)
    for frame, data in zip(decoded, jpegs(one), strict=True):
        assert np.array_equal(frame.permute(1, 2, 0).numpy(), pillow_frame(data))


@pytest.mark.parametrize(("height", "width"), [(40, 40), (90, 121), (47, 63), (20, 33), (41, 90), (1, 1)])
def test_the_reference_resizes_as_torch_and_pillow_do(height: int, width: int) -> None:
    frames = decode_frames(request(1, ()))
    found = resized_crop(frames, box(0, 0, height, width), size=SIZE)
    crop = frames[..., :height, :width].float()
    by_torch = torch.nn.functional.interpolate(crop, size=(SIZE, SIZE), mode="bilinear", antialias=True)
    assert (found - by_torch)[INSIDE].abs().max() <= 0.5 + 1e-3
    picture = Image.fromarray(crop[0].permute(1, 2, 0).byte().numpy())
    by_pillow = torch.from_numpy(np.array(picture.resize((SIZE, SIZE), Image.Resampling.BILINEAR))).permute(2, 0, 1)
    assert (found[0].int() - by_pillow.int())[INSIDE].abs().max() <= 1


INSIDE = (..., slice(1, -1), slice(1, -1))
"""Without the outermost pixels, where border rules differ."""


def test_beyond_its_border_a_shrunk_crop_goes_on_with_its_last_pixel() -> None:
    row = torch.tensor([100, 0, 0, 0, 0, 0], dtype=torch.uint8).expand(1, 3, 6, 6)
    found = resized_crop(row, box(0, 0, 6, 6), size=2)
    # Triangle of radius 3 at c = 1: pixels -1 to 3 weigh 1, 2, 3, 2, 1 of 9; pixels -1 and 0 are both 100.
    assert found[0, 0, 0].tolist() == [33, 0]


def test_a_resize_to_the_same_size_changes_nothing() -> None:
    frames = decode_frames(request(2, ()))
    assert torch.equal(resized_crop(frames, box(7, 9, SIZE, SIZE), size=SIZE), frames[..., 7:47, 9:49])


@pytest.mark.parametrize(("source", "target"), [(1, 8), (8, 8), (13, 8), (100, 7), (7, 100)])
def test_weights_of_every_target_pixel_sum_to_one_and_mirror(source: int, target: int) -> None:
    taps, weights = triangle_taps(source, target)
    matrix = np.zeros((target, source))
    np.add.at(matrix, (np.arange(target), taps), weights)
    assert np.allclose(matrix.sum(axis=1), 1)
    assert np.allclose(matrix, matrix[::-1, ::-1], atol=1e-6)


# DALI against the reference.


@pytest.mark.parametrize("place", [(0, 0), (7, 9), (13, 40), (HEIGHT - SIZE, WIDTH - SIZE)])
def test_dali_decodes_a_region_bit_for_bit_as_the_reference_does(
    dali: GraphBackend, reference: ReferenceBackend, place: tuple[int, int]
) -> None:
    one = request(3, (box(*place, SIZE, SIZE),))
    assert torch.equal(dali.render([one]), reference.render([one]))


def test_dali_decodes_whole_frames_bit_for_bit_as_the_reference_does(
    dali_views: GraphBackend, reference: ReferenceBackend
) -> None:
    one = request(4, tuple(box(0, left, SIZE, SIZE) for left in (0, 31, WIDTH - SIZE)))
    assert torch.equal(dali_views.render([one]), reference.render([one]))


@pytest.mark.parametrize("shape", [(HEIGHT, WIDTH), (61, 47), (25, 33), (41, 90)])
def test_dali_resizes_and_flips_as_the_reference_does_within_the_stated_tolerance(
    dali: GraphBackend, reference: ReferenceBackend, shape: tuple[int, int]
) -> None:
    requests = [request(seed, (box(0, 0, *shape),), flip=bool(seed % 2)) for seed in range(3)]
    ours, oracle = dali.render(requests), reference.render(requests)
    assert ours.shape == (3, 3, FRAMES, SIZE, SIZE)
    assert (ours.int() - oracle.int()).abs().max() <= MOST_LEVELS
    assert psnr_db(ours, oracle) >= LEAST_PSNR_DB


@pytest.mark.parametrize("size", [8, 40, 224])
def test_every_crop_is_resized_as_by_the_reference_to_its_border(size: int) -> None:
    random = np.random.default_rng(size)
    shapes = [(1, 1), (3, 60), (4, 4), (37, 2), (size, size), *random.integers(4, 500, (12, 2)).tolist()]
    for height, width in shapes:
        noise = random.integers(0, 256, (1, 3, height, width), np.uint8)
        found = np.empty((3, 1, size, size), np.uint8)
        resize_into(found, [noise[0].transpose(1, 2, 0)])
        expected = resized_crop(torch.from_numpy(noise), box(0, 0, height, width), size=size)
        ours = torch.from_numpy(found).transpose(0, 1)
        assert (ours.int() - expected.int()).abs().max() <= MOST_LEVELS, (height, width)
        assert psnr_db(ours, expected) >= LEAST_PSNR_DB - 1, (height, width)  # of noise; of pictures 70


def test_views_come_request_by_request_and_box_by_box(dali_views: GraphBackend, reference: ReferenceBackend) -> None:
    requests = [request(seed, tuple(box(0, left, HEIGHT, HEIGHT) for left in (0, 15, 31))) for seed in (5, 6)]
    ours, oracle = dali_views.render(requests), reference.render(requests)
    alone = torch.cat([reference.render([replace(one, boxes=(b,))]) for one in requests for b in one.boxes])
    assert torch.equal(oracle, alone)
    assert psnr_db(ours, oracle) >= LEAST_PSNR_DB


@pytest.mark.parametrize("name", ["dali", "reference"])
def test_a_flip_mirrors_the_view_exactly(name: str, request_backend: Backends) -> None:
    backend = request_backend[name]
    one = request(7, (box(3, 5, 61, 71),))
    straight, mirrored = backend.render([one]), backend.render([replace(one, flip=True)])
    assert torch.equal(mirrored, straight.flip(-1))


@pytest.fixture
def request_backend(dali: GraphBackend, reference: ReferenceBackend) -> Backends:
    return {"dali": dali, "reference": reference}


def test_pixels_do_not_depend_on_how_many_clips_share_a_run(dali: GraphBackend) -> None:
    clips_per_run = dali._clips_per_run
    many = [request(seed % 5, (box(seed % 7, 3, 50, 60),)) for seed in range(clips_per_run + 3)]
    together = dali.render(many)
    alone = torch.cat([dali.render([one]) for one in many])
    assert torch.equal(together, alone)


def test_pictures_that_wait_to_be_finished_survive_the_runs_that_follow(dali: GraphBackend) -> None:
    first = [request(seed, (box(2, 3, 70, 60),)) for seed in range(3)]
    views, jobs = dali._run(first)
    for seed in range(3, 9):
        dali.render([request(seed, (box(0, 0, 90, 90),))])
    for job in jobs:
        job()
    assert torch.equal(views, dali.render(first))


def test_calls_from_several_threads_give_the_pixels_of_calls_one_after_the_other(dali: GraphBackend) -> None:
    batches = [[request(seed, (box(1, 2, 60, 70),)) for seed in range(start, start + 3)] for start in range(8)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(dali.render, batches))
    assert torch.equal(torch.cat(together), torch.cat([dali.render(batch) for batch in batches]))


def test_pixels_do_not_depend_on_the_number_of_threads(dali: GraphBackend) -> None:
    requests = [request(seed, (box(1, 2, 80, 70),)) for seed in range(4)]
    other = dali_backend("mjpeg", num_frames=FRAMES, crop_size=SIZE, views_per_clip=1, threads=5, stats=StatsRecorder())
    assert torch.equal(dali.render(requests), other.render(requests))
    other.close()


@pytest.mark.parametrize("name", ["dali", "reference"])
def test_p7_a_frame_that_cannot_be_decoded_is_named_and_the_backend_lives_on(
    name: str, request_backend: Backends
) -> None:
    backend, good = request_backend[name], request(8, (box(0, 0, 50, 50),))
    first, second, *others = jpegs(good)
    bad = replace(
        good, frames=JpegFrames((first, second[: len(second) // 2], *others)), where="ca2st-000009.tar, sample bad"
    )
    before = backend.render([good])
    with pytest.raises(SampleDamageError, match=r"ca2st-000009.tar, sample bad: .*cannot be decoded"):
        backend.render([good, bad])
    assert torch.equal(backend.render([good]), before)


def test_a_closed_dali_backend_refuses_to_render() -> None:
    backend = dali_backend(
        "mjpeg", num_frames=FRAMES, crop_size=SIZE, views_per_clip=1, threads=1, stats=StatsRecorder()
    )
    backend.close()
    with pytest.raises(LoaderClosedError, match="backend dali: closed"):
        backend.render([request(9, (box(0, 0, 50, 50),))])


# The choice.


def made(name: BackendName) -> str:
    backend = make_backend(name, num_frames=FRAMES, crop_size=SIZE, views_per_clip=1, threads=1, stats=StatsRecorder())
    backend.close()
    return backend.name


def test_auto_takes_dali_where_it_is_installed_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="pipelines.decode.backends"):
        assert made("auto") == "dali"
    assert caplog.messages == [
        "backend dali: chosen by auto, nvidia-dali is installed; JPEG frames are decoded on the CPU"
    ]


def test_auto_without_dali_takes_the_reference_and_warns(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(backends, "dali_is_installed", lambda: False)
    assert made("auto") == "reference"
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_dali_asked_for_by_name_is_never_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "dali_is_installed", lambda: False)
    with pytest.raises(EnvironmentFault, match="backend dali: nvidia-dali is not installed"):
        made("dali")
    assert made("reference") == "reference"


def test_nvidia_is_imported_by_the_graphs_alone_and_these_only_where_one_is_made() -> None:
    sources = {path.name: path.read_text() for path in Path(backends.__file__).parent.glob("*.py")}
    assert [name for name, text in sources.items() if "import nvidia" in text] == ["dali.py"]
    lines = [line for text in sources.values() for line in text.splitlines() if "from pipelines.decode.dali" in line]
    assert [line.strip() for line in lines] == ["from pipelines.decode.dali import dali_backend"]
    assert all(line.startswith("    ") for line in lines)
