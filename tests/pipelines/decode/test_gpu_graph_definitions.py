"""The graphs for a GPU as far as they can be tried without one: how they are defined, fed, read and rebuilt."""

import dataclasses
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch

from benchmarks.parity import stored_clips
from ca2st.errors import CA2STError, UserInputError
from pipelines.augment.boxes import CropBox
from pipelines.augment.rand_augment import ImageAugment, Operation
from pipelines.benchmark.clips import DrawnClips
from pipelines.decode import dali
from pipelines.decode.backends import RoutedBackend
from pipelines.decode.dali import ClipGraph, GraphBackend, OnCpu, Pipeline, dali_backend
from pipelines.decode.reference import ReferenceBackend
from pipelines.errors import DecoderMemoryError, LoaderClosedError, SampleDamageError
from pipelines.rendering import JpegFrames, RenderRequest, VideoMember
from pipelines.threads import StatsRecorder
from support.fake_shards import FakeSample

FRAMES, SIZE = 3, 24
BOXES = (CropBox(top=1, left=2, height=40, width=36), CropBox(top=0, left=9, height=SIZE, width=SIZE))
ON_HOST = {"ExternalSource", "_TensorSubscript"}
GRAPHS: dict[str, ClipGraph] = {
    "mjpeg": ClipGraph(is_video=False, on_gpu=True, num_frames=FRAMES, crop_size=SIZE, views_per_clip=2),
    "videos": ClipGraph(is_video=True, on_gpu=True, num_frames=FRAMES, crop_size=SIZE, views_per_clip=2),
}


def request(seed: int, *, views: int = 1, flip: bool = False, augment: ImageAugment | None = None) -> RenderRequest:
    sample = FakeSample(key=f"s{seed}", seed=seed, num_frames=FRAMES, height=48, width=64)
    frames = JpegFrames(tuple(sample.frames()))
    return RenderRequest(frames=frames, boxes=BOXES[:views], flip=flip, where=f"sample s{seed}", augment=augment)


def defined(graph: ClipGraph) -> Any:
    """A pipeline with the graph in it; it is not built, which would ask for a device."""
    pipeline = Pipeline(batch_size=4, num_threads=1, device_id=None, prefetch_queue_depth=1)
    with pipeline:
        pipeline.set_outputs(*graph.operators())
    pipeline.serialize()  # only then are the operators there
    return pipeline


# Definition.


@pytest.mark.parametrize("name", GRAPHS)
def test_everything_from_the_decoder_on_is_on_the_device(name: str) -> None:
    pipeline = defined(GRAPHS[name])
    assert b"mixed" in pipeline.serialize()
    kinds = [type(operator._op).__name__ for operator in pipeline._ops]
    assert {kind: kinds.count(kind) for kind in ("Slice", "Resize", "Flip")} == {"Slice": 2, "Resize": 2, "Flip": 2}
    for kind, operator in zip(kinds, pipeline._ops, strict=True):
        where = {operator._spec.OutputDevice(index) for index in range(operator._spec.NumOutput())}
        assert where == {"cpu" if kind in ON_HOST else "gpu"}, kind


def test_nvjpeg_decodes_alike_wherever_a_picture_lies_in_the_batch() -> None:
    assert b"hw_decoder_load" in defined(GRAPHS["mjpeg"]).serialize()
    assert b"jpeg_fancy_upsampling" in defined(GRAPHS["mjpeg"]).serialize()


# Feeding.


@pytest.mark.parametrize("name", GRAPHS)
def test_what_is_fed_is_what_the_graph_asks_for(name: str) -> None:
    graph = GRAPHS[name]
    sources = {op._name for op in defined(graph)._ops if type(op._op).__name__ == "ExternalSource"}
    requests = [request(0, views=2), request(1, views=2, flip=True)]
    if name == "videos":
        requests = [dataclasses.replace(one, frames=VideoMember(b"video", "h264", (4, 0, 4))) for one in requests]
    fed = graph.fed(requests)
    assert set(fed) == sources
    assert {len(arrays) for arrays in fed.values()} == {2 * graph.samples_per_clip}
    flips = [int(flip) for flip in fed["flips"]]
    assert flips == [0] * graph.samples_per_clip + [1] * graph.samples_per_clip
    assert fed["boxes_1"][0].tolist() == [0, 9, SIZE, SIZE]


def test_videos_are_never_fed_as_frames_nor_frames_as_videos() -> None:
    video = dataclasses.replace(request(0), frames=VideoMember(b"", "h264", (0,)))
    with pytest.raises(UserInputError, match="sample s0: expected JPEG frames, found codec 'h264'"):
        GRAPHS["mjpeg"].fed([dataclasses.replace(video, boxes=BOXES)])
    with pytest.raises(CA2STError, match="sample s0: expected a video, found single frames"):
        GRAPHS["videos"].fed([request(0)])


# Reading: the same graph on the CPU, through the code that reads a device's outputs.


class _OnGpuTriedOnCpu(ClipGraph):
    """The graph of the GPU with the CPU's decoder: all else is as it is there."""

    def operators(self) -> list[Any]:
        whole = dali.fn.decoders.image
        mixed = dali.fn.decoders
        try:
            mixed.image = lambda jpegs, **options: whole(jpegs, **(options | {"device": "cpu"}))
            return super().operators()
        finally:
            mixed.image = whole


class Recorder(OnCpu):
    """The CPU as if it were a device: notes what is asked of it, and may fail."""

    def __init__(
        self, *, fail_at: tuple[int, ...] = (), why: str = "Current pipeline object is no longer valid"
    ) -> None:
        self.runs, self.handed_over, self._fail_at, self._why = 0, 0, fail_at, why
        self.entered: list[str] = []

    def inside(self) -> AbstractContextManager[object]:
        import threading

        self.entered.append(threading.current_thread().name)
        return nullcontext()

    def run(self, pipeline: Any) -> Sequence[Any]:
        self.runs += 1
        if self.runs in self._fail_at:
            raise RuntimeError(self._why)
        return super().run(pipeline)

    def hand_over(self, views: torch.Tensor) -> None:
        self.handed_over += len(views)


def backend(place: OnCpu, *, views: int = 1) -> GraphBackend:
    graph = _OnGpuTriedOnCpu(is_video=False, on_gpu=True, num_frames=FRAMES, crop_size=SIZE, views_per_clip=views)
    return GraphBackend(graph, name="dali-gpu", threads=2, stats=StatsRecorder(), place=place)


@pytest.mark.parametrize("views", [1, 2])
def test_outputs_are_read_in_the_order_of_the_batch(views: int) -> None:
    requests = [request(seed, views=views, flip=seed % 2 == 1) for seed in range(4)]
    ours = backend(Recorder(), views=views).render(requests)
    oracle = ReferenceBackend(crop_size=SIZE, stats=StatsRecorder()).render(requests)
    assert ours.shape == (4 * views, 3, FRAMES, SIZE, SIZE)
    assert ours.is_contiguous()
    assert (ours.int() - oracle.int()).abs().max() <= 1


def test_a_batch_of_several_runs_is_handed_over_once_and_augmented_in_the_devices_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dali, "MOST_FRAMES", 2 * FRAMES)
    invert = ImageAugment((Operation("Invert"),))
    requests = [request(seed, augment=invert if seed in (1, 4) else None) for seed in range(5)]
    place = Recorder()
    views = backend(place).render(requests)
    assert (place.runs, place.handed_over) == (3, 5)
    assert [name.startswith("clip-augment") for name in place.entered] == [False, True, True]
    alone = backend(Recorder()).render([dataclasses.replace(one, augment=None) for one in requests])
    expected = torch.stack([255 - view if index in (1, 4) else view for index, view in enumerate(alone)])
    assert torch.equal(views, expected)


def test_every_thread_that_touches_a_device_is_set_to_it_and_two_finish_views(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[tuple[str, object]] = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda index: f"stream of {index}")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: f"consumer of {index}")
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: called.append(("device", index)))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: called.append(("stream", stream)) or nullcontext())
    with dali.OnGpu(torch.device("cuda", 3)).inside():
        assert called == [("device", 3), ("stream", "stream of 3")]
    monkeypatch.setattr(GraphBackend, "_build", lambda _: None)
    options = {"name": "dali-gpu", "threads": 12, "stats": StatsRecorder()}
    places = (dali.OnGpu(torch.device("cuda", 3)), OnCpu())
    made = [GraphBackend(GRAPHS["mjpeg"], place=place, **options) for place in places]  # type: ignore[arg-type]
    assert [one._finishers._max_workers for one in made] == [2, 12]


# Rebuilding.


def test_p7_a_run_that_fails_names_the_sample_and_the_backend_lives_on() -> None:
    good = request(0)
    assert isinstance(good.frames, JpegFrames)
    spoilt = JpegFrames((good.frames.frames[0], b"\xff\xd8 no picture", good.frames.frames[2]))
    bad = dataclasses.replace(good, frames=spoilt, where="ca2st-000009.tar, sample bad")
    place = Recorder()
    ours = backend(place)
    before = ours.render([good])
    with pytest.raises(SampleDamageError, match=r"ca2st-000009.tar, sample bad: .*cannot be decoded"):
        ours.render([good, bad])
    assert torch.equal(ours.render([good]), before)


def test_a_run_that_only_the_device_fails_on_names_all_of_it_and_who_decodes_it() -> None:
    ours = backend(Recorder(fail_at=(1,)))
    with pytest.raises(
        CA2STError, match=r"dali-gpu: DALI failed on clips that Pillow decodes \(sample s0, sample s1\)"
    ):
        ours.render([request(0), request(1)])
    assert len(ours.render([request(0)])) == 1


def test_a_clip_that_only_the_device_fails_on_is_found_by_running_each_alone() -> None:
    ours = backend(Recorder(fail_at=(1, 3)))
    with pytest.raises(CA2STError, match=r"DALI failed on clips that Pillow decodes \(sample s1\)"):
        ours.render([request(0), request(1), request(2)])
    assert len(ours.render([request(0)])) == 1


@pytest.mark.parametrize("why", ["CUDA allocation failed", "cuMemCreate: CUDA_ERROR_OUT_OF_MEMORY", "std::bad_alloc"])
def test_t12_a_device_out_of_memory_is_no_damaged_clip_and_no_second_pipeline_is_made_beside_the_first(
    monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    ours = backend(Recorder(fail_at=(1,), why=why))
    alive, made = weakref.ref(ours._pipeline), list[bool]()
    build = ours._build
    monkeypatch.setattr(ours, "_build", lambda: made.append(alive() is None) or build())
    with pytest.raises(
        DecoderMemoryError, match=r"dali-gpu: out of memory while decoding 2 clips; lower training\.per"
    ):
        ours.render([request(0), request(1)])
    assert made == []
    assert len(ours.render([request(0), request(1)])) == 2
    assert made == [True]


def test_codecs_that_the_device_does_not_decode_follow_the_others_to_it() -> None:
    class OnDevice:
        name = "device"

        def render(self, requests: Sequence[RenderRequest]) -> torch.Tensor:
            return torch.empty(len(requests), 3, FRAMES, SIZE, SIZE, dtype=torch.uint8, device="meta")

        def close(self) -> None:
            """Nothing is held."""

    cpu = ReferenceBackend(crop_size=SIZE, stats=StatsRecorder())
    routed = RoutedBackend({"h264": OnDevice(), "mjpeg": cpu})
    video = dataclasses.replace(request(0), frames=VideoMember(b"", "h264", (0,)))
    assert routed.render([request(1), video, request(2)]).device.type == "meta"
    assert routed.render([request(1)]).device.type == "cpu"


def test_a_closed_backend_of_a_device_refuses_to_render() -> None:
    ours = backend(Recorder())
    ours.close()
    with pytest.raises(LoaderClosedError, match="backend dali-gpu: closed"):
        ours.render([request(0)])


def test_the_cpu_and_the_gpu_run_the_same_engine() -> None:
    cpu = dali_backend("mjpeg", num_frames=FRAMES, crop_size=SIZE, views_per_clip=1, threads=1, stats=StatsRecorder())
    assert isinstance(cpu, GraphBackend)
    cpu.close()


def test_a_frame_behind_the_end_of_a_video_is_an_error_of_the_graph_and_never_black() -> None:
    (clip,) = stored_clips("vp9", DrawnClips(count=1, width=64, height=48, num_frames=9), num_gop_frames=4, threads=1)
    ours = dali_backend("vp9", num_frames=2, crop_size=SIZE, views_per_clip=1, threads=1, stats=StatsRecorder())
    one = dataclasses.replace(request(0), frames=clip.frames((0, 8)))
    assert ours.render([one]).float().std() > 1
    with pytest.raises(SampleDamageError, match=r"sample s0: the vp9 video .*expected frame 9, found 9 frames"):
        ours.render([dataclasses.replace(one, frames=clip.frames((0, 9)))])
