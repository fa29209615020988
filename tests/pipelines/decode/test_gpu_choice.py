"""Which device decodes, by what the driver says of it: tried with made-up devices."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ca2st.errors import EnvironmentFault, UserInputError
from ca2st.spec import ClipSpec
from pipelines import loader as rank_loader
from pipelines.config import DecodeOn, EvaluationSetup, LoaderConfig, TrainSetup
from pipelines.decode import backends, dali
from pipelines.decode import backends as cuda_decoders
from pipelines.decode.backends import CudaDecoders, VideoDecoder, asked, choose_backend, make_backend
from pipelines.decode.reference import ReferenceBackend
from pipelines.loader import EvaluationLoader
from pipelines.threads import StatsRecorder
from sharding.format.shard_set import ShardSet
from sharding.media.codecs import STORED_CODECS
from support.gpu import require_gpu
from support.refusals import forced

DECODER = VideoDecoder(engines=7, least_width=144, least_height=128, most_width=4096, most_height=8192)
GPU = CudaDecoders(index=0, name="Imagined", video={"h264": DECODER, "hevc": DECODER})
NO_LIBRARY = CudaDecoders(index=0, name="Imagined", video={}, missing="the library is not there")


def chosen(codec: str, gpu: CudaDecoders | None, short_side: int | None = 256, name: str = "auto") -> tuple[str, str]:
    choice = choose_backend(name, codec, dali_installed=True, gpu=gpu, short_side=short_side)
    return choice.backend, choice.reason


@pytest.mark.parametrize("codec", ["h264", "hevc", "mjpeg"])
def test_a_device_that_decodes_the_codec_is_taken_and_named(codec: str) -> None:
    assert chosen(codec, GPU) == ("dali-gpu", f"chosen by auto; {codec} is decoded and augmented on Imagined")
    assert chosen(codec, GPU, name="dali")[0] == "dali-gpu"


@pytest.mark.parametrize(
    ("codec", "gpu", "short_side", "backend", "why"),
    [
        ("vp9", GPU, 256, "dali", "not on the GPU: Imagined has no decoder for vp9 of 8 bit 4:2:0"),
        ("h264", GPU, 128, "reference", "Imagined decodes h264 of 144 to 4096 pixels per side, the shards have 128"),
        ("h264", GPU, 5000, "reference", "144 to 4096 pixels per side, the shards have 5000"),
        ("hevc", NO_LIBRARY, 256, "reference", "not on the GPU: the library is not there"),
    ],
)
def test_what_the_device_does_not_decode_goes_to_the_cpu_and_says_why(
    codec: str, gpu: CudaDecoders, short_side: int, backend: str, why: str
) -> None:
    taken, reason = chosen(codec, gpu, short_side)
    assert taken == backend
    assert why in reason


def test_jpeg_frames_need_no_video_library() -> None:
    assert chosen("mjpeg", NO_LIBRARY)[0] == "dali-gpu"


def test_dali_by_name_refuses_what_neither_decodes_and_says_why_the_gpu_does_not() -> None:
    with pytest.raises(EnvironmentFault, match="decodes h264 on a GPU only, Imagined decodes h264 of 144 to 4096"):
        chosen("h264", GPU, 64, name="dali")
    with pytest.raises(EnvironmentFault, match="decodes h264 on a GPU only, found none to use"):
        chosen("h264", None, name="dali")


def test_the_reference_by_name_stays_the_reference_beside_a_gpu() -> None:
    assert chosen("h264", GPU, name="reference") == ("reference", "asked for by name")


def test_without_dali_a_gpu_is_of_no_use() -> None:
    assert choose_backend("auto", "h264", dali_installed=False, gpu=GPU).backend == "reference"


def test_the_driver_is_asked_for_8_bit_420_of_every_codec_and_believed() -> None:
    def driver(caps: cuda_decoders._Caps) -> int:
        assert (caps.chroma_format, caps.bit_depth_minus_8) == (1, 0)
        if caps.codec == 11:
            return 1  # as for a codec that the library does not know
        caps.is_supported, caps.num_engines = int(caps.codec != 10), 7
        caps.least_width, caps.least_height, caps.most_width, caps.most_height = 144, 128, 4096, 8192
        return 0

    assert asked(driver) == {"h264": DECODER, "hevc": DECODER}


def test_the_structure_has_the_size_and_places_of_the_sdk() -> None:
    caps = cuda_decoders._Caps
    assert cuda_decoders.ctypes.sizeof(caps) == 88
    assert (caps.is_supported.offset, caps.num_engines.offset, caps.most_width.offset) == (24, 25, 28)
    assert (caps.least_width.offset, caps.least_height.offset) == (40, 42)


def test_every_stored_video_codec_has_a_number_of_the_drivers() -> None:
    assert {name for name, codec in STORED_CODECS.items() if not codec.has_frame_ranges} <= set(
        cuda_decoders.NVCUVID_CODECS
    )


def test_a_cpu_has_no_decoders_of_cuda() -> None:
    assert cuda_decoders.cuda_decoders(None) is None
    assert cuda_decoders.cuda_decoders(torch.device("cpu")) is None


def test_a_driver_without_its_video_library_is_named_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Imagined")
    monkeypatch.setattr(cuda_decoders, "LIBRARY", "libnothing-of-this-name.so.1")
    found = cuda_decoders.cuda_decoders(torch.device("cuda"))
    assert found is not None
    assert "NVIDIA_DRIVER_CAPABILITIES=compute,utility,video" in (found.refusal("h264", short_side=256) or "")


@contextmanager
def imagined_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, torch.device]]]:
    """A device that decodes H.264 and JPEGs, with the reference in place of its backend."""
    made: list[tuple[str, torch.device]] = []

    def stub(
        codec: str, *, device: torch.device | None, crop_size: int, stats: StatsRecorder, **_: int
    ) -> ReferenceBackend:
        if device is not None:
            made.append((codec, device))
        return ReferenceBackend(crop_size=crop_size, stats=stats)

    monkeypatch.setattr(backends, "cuda_decoders", lambda device: None if device is None else GPU)
    monkeypatch.setattr(dali, "dali_backend", stub)
    yield made


def test_the_choice_is_one_log_line_per_codec(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with imagined_gpu(monkeypatch) as made, caplog.at_level(logging.INFO, logger=backends.__name__):
        make_backend(
            "auto",
            codecs=["h264", "mjpeg"],
            num_frames=4,
            crop_size=8,
            views_per_clip=1,
            threads=1,
            stats=StatsRecorder(),
            device=torch.device("cuda", 3),
            short_sides={"h264": 256, "mjpeg": 32},
            uneven={"h264", "mjpeg"},
        ).close()
    assert made == [("h264", torch.device("cuda", 3)), ("mjpeg", torch.device("cuda", 3))]
    assert caplog.messages == [
        "backend dali-gpu: chosen by auto; h264 is decoded and augmented on Imagined",
        "backend dali-gpu: chosen by auto; mjpeg is decoded and augmented on Imagined",
        "h264 shards from before sides were multiples of 16: DALI 2.4 makes a GPU decoder anew for every such clip "
        "(tens of milliseconds), and rarely decodes wrong colours; convert them again, or decode_on = 'cpu'",
    ]
    assert [record.levelname for record in caplog.records] == ["INFO", "INFO", "WARNING"]


@pytest.mark.parametrize(("decode_on", "expected"), [("auto", 1), ("cpu", 0)])
def test_a_loader_decodes_on_its_ranks_device_unless_told_not_to(
    intact_set: ShardSet, clip: ClipSpec, monkeypatch: pytest.MonkeyPatch, decode_on: DecodeOn, expected: int
) -> None:
    setup = EvaluationSetup(
        shard_set=intact_set,
        clip=clip,
        targets=("label",),
        loader=LoaderConfig(decode_on=decode_on, prefetch_steps=0),
        global_batch_size=4,
        device=torch.device("cuda", 1),
    )
    with imagined_gpu(monkeypatch) as made, EvaluationLoader(setup):
        assert made == [("mjpeg", torch.device("cuda", 1))] * expected


def test_a_place_to_decode_that_is_not_known_is_refused() -> None:
    with pytest.raises(UserInputError, match=r"loader.decode_on: expected one of"):
        forced(LoaderConfig(), decode_on="gpu")


def test_the_smallest_side_of_several_sets_counts(
    intact_set: ShardSet, clip: ClipSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    side = intact_set.manifest.video.short_side
    small = replace(intact_set.manifest, video=replace(intact_set.manifest.video, short_side=side - 1))
    sets = [intact_set, replace(intact_set, manifest=small)]
    asked: list[dict[str, int]] = []
    backend = ReferenceBackend(crop_size=8, stats=StatsRecorder())
    monkeypatch.setattr(rank_loader, "make_backend", lambda *_, short_sides, **__: asked.append(short_sides) or backend)
    setup = TrainSetup(shard_sets=sets, clip=clip, targets=("label",), seed=0, global_batch_size=4)
    rank_loader._backend(setup, StatsRecorder())
    assert asked == [{"mjpeg": side - 1}]


@pytest.mark.parametrize("promised", [None, "0", "1"])
def test_tests_marked_gpu_skip_without_a_device_and_fail_where_one_is_promised(
    monkeypatch: pytest.MonkeyPatch, promised: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if promised is None:
        monkeypatch.delenv("CA2ST_REQUIRE_GPU", raising=False)
    else:
        monkeypatch.setenv("CA2ST_REQUIRE_GPU", promised)
    kind = pytest.fail.Exception if promised == "1" else pytest.skip.Exception
    with pytest.raises(kind, match="CUDA device"):
        require_gpu()


def test_every_test_marked_gpu_asks_for_the_device() -> None:
    """A gpu test that does not would pass on a machine without one."""
    for path in Path(__file__).parents[2].rglob("test_*.py"):
        text = path.read_text()
        if "pytest.mark." + "gpu" in text:
            assert "require_gpu" in text, path
