"""Parts of the GPU check, each in a process of its own: a crash, a hang or a lost device costs only that part's rows.

Only ``parity``, ``speed``, ``damage`` and ``end_to_end`` need DALI, PyAV and the packages of the shards; they import
them themselves.
"""

import contextlib
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch

from ca2st.benchmark.case import TARGETS, Case, CaseSpec, LocalCase, ModelBenchConfig, model_config
from ca2st.benchmark.measure import PEAKS, Limit, find_peak, machine, measure_limit, synchronise
from ca2st.benchmark.model import benchmark_models
from ca2st.errors import EnvironmentFault
from ca2st.model.inspect import model_info, train_tflop
from ca2st.processes import SPAWN
from ca2st.spec import ClipSpec
from ca2st.training.attention_kernel import KERNELS
from ca2st.training.config import AttentionChoice, Precision

if TYPE_CHECKING:
    from benchmarks.parity import StoredClip
    from pipelines.benchmark.clips import DrawnClips

PartName = Literal["device", "limits", "parity", "speed", "damage", "model", "training", "end_to_end"]
BUDGETS: dict[PartName, float] = {
    "device": 25.0,
    "limits": 25.0,
    "parity": 50.0,
    "speed": 95.0,
    "damage": 55.0,
    "model": 105.0,
    "training": 65.0,
    "end_to_end": 55.0,
}
"""Seconds that a part may take, its process's start included; together less than eight minutes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuCheckSettings:
    """Sizes of a run."""

    device: Literal["cuda", "cpu"] = "cuda"
    """``cpu``: a dry run, by the backends for the CPU; its numbers say nothing of a GPU."""
    clip: ClipSpec = field(default_factory=ClipSpec)
    """A view: 16 frames of 224 pixels."""
    codecs: tuple[str, ...] | None = None
    """Those that are tried; None: all."""
    num_drawn: int = 8
    """Different clips in each codec."""
    drawn_width: int = 352
    uneven_width: int = 340
    """Of the pictures that older sets have, no multiple of 16."""
    drawn_height: int = 256
    """The short side that shards have, and more than the engines' smallest pictures."""
    drawn_frames: int = 96
    """Frames of each."""
    batch: int = 32
    """Clips of a step."""
    seconds_per_case: float = 2.0
    """Measured time of each case of speed."""
    gops: tuple[int, ...] = (4, 8, 16, 32)
    """Frames from key frame to key frame."""
    threads: tuple[int, ...] = (1, 4, 7, 8)
    """Threads that feed the decoders: Hopper has 7 video engines."""
    usual_gop: int = 8
    """The converter's default."""
    usual_threads: int = 7
    encoding_threads: int = 16
    """Clips that are encoded at once."""
    copy_bytes: int = 1 << 28
    product_size: int | None = None
    """Rows of the matrix product; None: 8192 on a GPU."""
    damages: tuple[str, ...] | None = None
    """Kinds of damage that are tried; None: all."""
    damage_seconds: float = 45.0
    """Time for one damaged clip, with the start of its process; longer is a hang."""
    damages_at_once: int = 6
    models: tuple[str, ...] = ("cast", "cava", "ca2st")
    model_size: str = "vit_b"
    num_layers: int | None = None
    """Layers of every expert; None: all."""
    model_batch: int = 24
    """Clips of a pass of the model."""
    model_seconds: float | None = 2.5
    """For each model's forward pass, and again for its training step; None: two passes."""
    fed_codecs: tuple[str, ...] = ("h264", "mjpeg")
    """Codecs of the shards that training steps are fed from."""
    fed_models: tuple[str, ...] = ("cast", "cava")
    """Whose steps: the published one, and the fastest, which asks for most data."""
    fed_seconds: float = 4.0
    """Of each fed step, and again of the step alone."""

    @property
    def precision(self) -> Precision:
        """Of products and training steps."""
        return "fp32" if self.is_dry else "bf16"

    @property
    def is_dry(self) -> bool:
        """Whether no GPU is measured."""
        return self.device == "cpu"


def dry_settings() -> GpuCheckSettings:
    """Return the smallest sizes that every part still works with."""
    return GpuCheckSettings(
        device="cpu",
        clip=ClipSpec(num_frames=4, crop_size=32, mel_rows=32, num_mel_bins=32),
        num_drawn=2,
        drawn_width=80,
        uneven_width=84,
        drawn_height=64,
        drawn_frames=20,
        batch=2,
        seconds_per_case=0.01,
        gops=(4, 8),
        threads=(1,),
        usual_threads=1,
        encoding_threads=2,
        copy_bytes=1 << 16,
        product_size=128,
        damages=("none", "half"),
        damages_at_once=2,
        models=("cast",),
        model_size="vit_s",
        num_layers=1,
        model_batch=1,
        model_seconds=None,
        fed_codecs=("mjpeg",),
        fed_models=("cast",),
        fed_seconds=0.01,
    )


def gpu_settings() -> GpuCheckSettings:
    """Return the settings of everything, on the GPU that torch takes first.

    Raises:
        EnvironmentFault: there is none that torch can use.
    """
    if not torch.cuda.is_available():
        raise EnvironmentFault(
            "make gpu: expected a CUDA device that torch can use, found none; run it where there is one, or try the "
            "program itself with ARGS=--dry-run"
        )
    return GpuCheckSettings()


Row = dict[str, Any]
_PATIENCE_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class PartResult:
    """What a part gave."""

    rows: list[Row]
    """As many as it found."""
    error: str | None
    """Why there are no more; None: it came to its end."""
    seconds: float
    budget_seconds: float


RunPart = Callable[[PartName, GpuCheckSettings, float], PartResult]
"""Runs a part within some seconds."""


def run_in_process(name: PartName, settings: GpuCheckSettings, seconds: float) -> PartResult:
    """Run a part in a process of its own, which is ended when its time is up."""
    begin, rows, error, own_end = time.monotonic(), list[Row](), None, None
    ours, theirs = SPAWN.Pipe(duplex=False)
    process = SPAWN.Process(target=_serve, args=(theirs, name, settings))
    process.start()
    theirs.close()
    try:
        for row in _received(ours, begin + seconds):
            rows.append(row)
        process.join(_PATIENCE_SECONDS)
        own_end = process.exitcode  # None: it lingers, with all its rows told
    except _EndError as end:
        error = str(end)
    finally:
        ours.close()
        _end(process)
    if own_end:
        error = f"its process ended with exit code {own_end}"
    return PartResult(rows=rows, error=error, seconds=time.monotonic() - begin, budget_seconds=seconds)


def run_here(name: PartName, settings: GpuCheckSettings, seconds: float) -> PartResult:
    """Run a part in this process; its time is not limited."""
    begin, rows, error = time.monotonic(), list[Row](), None
    try:
        rows.extend(PARTS[name](settings))
    except Exception as raised:  # noqa: BLE001 - a part that fails is a result, and the others go on
        error = _described(raised)
    return PartResult(rows=rows, error=error, seconds=time.monotonic() - begin, budget_seconds=seconds)


class _EndError(Exception):
    """The part gives no more rows."""


def _received(connection: Connection, deadline: float) -> Iterator[Row]:
    while True:
        if not connection.poll(max(0.0, deadline - time.monotonic())):
            raise _EndError("its time is up")
        try:
            kind, value = connection.recv()
        except EOFError:
            raise _EndError("its process ended without a word") from None
        if kind == "row":
            yield value
        elif kind == "error":
            raise _EndError(value)
        else:
            return


def _serve(connection: Connection, name: PartName, settings: GpuCheckSettings) -> None:
    try:
        for row in PARTS[name](settings):
            connection.send(("row", row))
        connection.send(("end", None))
    except Exception as error:  # noqa: BLE001 - reported to the parent
        connection.send(("error", _described(error)))


def _described(error: Exception) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} (line {last.lineno} of {last.name})"


def _end(process: Any) -> None:
    if process.is_alive():
        process.terminate()
        process.join(_PATIENCE_SECONDS)
    if process.is_alive():
        process.kill()
        process.join()


def _device_rows(settings: GpuCheckSettings) -> Iterator[Row]:
    """Yield the device, and what its video engines say of themselves."""
    yield asdict(machine(settings.device))
    if settings.is_dry:
        return
    from pipelines.decode.backends import cuda_decoders

    device = torch.device("cuda")
    properties = torch.cuda.get_device_properties(device)
    yield {
        "memory_bytes": properties.total_memory,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
    }
    decoders = cuda_decoders(device)
    assert decoders is not None
    yield {"missing": decoders.missing, "decoders": {name: asdict(one) for name, one in decoders.video.items()}}


def _limit_rows(settings: GpuCheckSettings) -> Iterator[Row]:
    device = torch.device(settings.device)
    yield asdict(measure_copies(device, num_bytes=settings.copy_bytes))
    yield asdict(measure_limit(device, settings.precision, size=settings.product_size))


_COPIES = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class CopyLimits:
    """Highest rates seen, in 10^9 bytes copied per second; inside the device a byte is read and written."""

    host_to_device: float
    device_to_host: float
    device_to_device: float
    num_bytes: int
    """Of one copy."""


def measure_copies(device: torch.device, *, num_bytes: int) -> CopyLimits:
    """Copy blocks of `num_bytes`; the fastest single copy counts. On a CPU all three are copies in its memory."""
    host = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    here, there = (torch.zeros(num_bytes, dtype=torch.uint8, device=device) for _ in range(2))

    def rate(copy: Callable[[], object]) -> float:
        return num_bytes / min(_seconds(copy, device) for _ in range(_COPIES)) / 1e9

    return CopyLimits(
        host_to_device=rate(lambda: here.copy_(host, non_blocking=True)),
        device_to_host=rate(lambda: host.copy_(here, non_blocking=True)),
        device_to_device=rate(lambda: there.copy_(here)),
        num_bytes=num_bytes,
    )


def _seconds(copy: Callable[[], object], device: torch.device) -> float:
    synchronise(device)
    begin = time.perf_counter()
    copy()
    synchronise(device)
    return time.perf_counter() - begin


def _codecs(settings: GpuCheckSettings) -> tuple[str, ...]:
    from sharding.media.codecs import STORED_CODECS

    return tuple(STORED_CODECS) if settings.codecs is None else settings.codecs


def _clips(settings: GpuCheckSettings, codec: str, gop: int | None, *, is_uneven: bool = False) -> "list[StoredClip]":
    from benchmarks.parity import stored_clips

    drawn = _drawn(settings, is_uneven=is_uneven)
    return stored_clips(codec, drawn, num_gop_frames=gop, threads=settings.encoding_threads)


def _drawn(settings: GpuCheckSettings, *, is_uneven: bool = False) -> "DrawnClips":
    from pipelines.benchmark.clips import DrawnClips

    return DrawnClips(
        count=settings.num_drawn,
        width=settings.uneven_width if is_uneven else settings.drawn_width,
        height=settings.drawn_height,
        num_frames=settings.drawn_frames,
    )


def _parity_rows(settings: GpuCheckSettings) -> Iterator[Row]:
    from benchmarks.parity import augment_parity, codec_parity, resize_parity

    device, clips = torch.device(settings.device), list["StoredClip"]()
    for codec in _codecs(settings):
        clips = _clips(settings, codec, settings.usual_gop)
        for row in codec_parity(clips, settings.clip, device, threads=settings.usual_threads):
            yield asdict(row)
    yield asdict(resize_parity(clips, settings.clip, device))
    for row in augment_parity(clips, settings.clip, device):
        yield asdict(row)


def _speed_rows(settings: GpuCheckSettings) -> Iterator[Row]:
    from benchmarks.parity import measure_speed, speed_cases

    device, stored = torch.device(settings.device), dict[tuple[str, int | None, bool], "list[StoredClip]"]()
    cases = speed_cases(
        _codecs(settings),
        gops=settings.gops,
        threads=settings.threads,
        usual_gop=settings.usual_gop,
        usual_threads=settings.usual_threads,
    )
    for case in cases:
        key = (case.codec, case.num_gop_frames, case.is_uneven)
        if key not in stored:
            stored[key] = _clips(settings, case.codec, case.num_gop_frames, is_uneven=case.is_uneven)
        report = measure_speed(
            case, stored[key], settings.clip, device, batch=settings.batch, seconds=settings.seconds_per_case
        )
        yield asdict(report)


def _damage_rows(settings: GpuCheckSettings) -> Iterator[Row]:
    from benchmarks.damage import DAMAGES, try_damages
    from sharding.media.codecs import stored_codec

    with tempfile.TemporaryDirectory(prefix="ca2st-damage-") as folder:
        for codec in (name for name in _codecs(settings) if not stored_codec(name).has_frame_ranges):
            clip = _clips(settings, codec, settings.usual_gop)[0]
            trials = try_damages(
                clip,
                settings.clip,
                Path(folder),
                device=settings.device,
                damages=tuple(DAMAGES) if settings.damages is None else settings.damages,
                seconds=settings.damage_seconds,
                at_once=settings.damages_at_once,
            )
            for trial in trials:
                yield asdict(trial) | {"is_sound": trial.is_sound}


def _model_rows(settings: GpuCheckSettings) -> Iterator[Row]:
    """Yield one benchmark per model, and at last the first one compiled, which is slow to start."""
    variants = [(name, False) for name in settings.models]
    if not settings.is_dry:
        variants.append((settings.models[0], True))
    for name, compiled in variants:
        config = ModelBenchConfig(
            models=(name,),
            size=settings.model_size,
            num_layers=settings.num_layers,
            per_device_batch_size=settings.model_batch,
            rounds=2 if settings.model_seconds is None else None,
            seconds=settings.model_seconds,
            device=settings.device,
            compiled=compiled,
            baseline=not compiled,
            clip=settings.clip,
        )
        yield asdict(benchmark_models(config, start_case=_small_case if settings.is_dry else None))


def _training_rows(settings: GpuCheckSettings) -> Iterator[Row]:
    """Yield what a device could do, then training steps: by each kernel of attention, with more clips, checkpointed."""
    peak = _training_peak(settings)
    yield peak
    clips, first = settings.model_batch, settings.models[0]
    ways = [(first, name, False, clips) for name in KERNELS]
    for kind in settings.models:
        ways += [
            (kind, "auto", is_checkpointed, clips * n) for is_checkpointed, n in ((False, 2), (True, 1), (True, 4))
        ]
    for kind, attention, is_checkpointed, num_clips in ways:
        spec = CaseSpec(
            config=model_config(kind, settings.model_size, num_layers=settings.num_layers),
            clip=settings.clip,
            per_device_batch_size=num_clips,
            device=settings.device,
            precision=settings.precision,
            variant="ours",
            attention=cast("AttentionChoice", attention),
            activation_checkpointing=is_checkpointed,
        )
        way = {"model": kind, "attention": attention, "checkpointed": is_checkpointed, "clips": num_clips}
        try:
            row = _training_row(spec, settings.model_seconds or 0.0)
            yield way | row | {"mfu": mfu(row["clips_per_second"], kind, peak)}
        except RuntimeError as error:  # no such kernel here, or too little memory: the next way may do
            yield way | {"error": str(error).splitlines()[0]}


def _training_peak(settings: GpuCheckSettings) -> Row:
    """Return the device's rate, stated (None: not known) and measured, in TFLOP/s, and the TFLOP to train a clip."""
    device, stated = torch.device(settings.device), None
    if not settings.is_dry and (known := find_peak(torch.cuda.get_device_name(device))) is not None:
        stated = PEAKS[known].bf16
    infos = {
        kind: model_info(
            model_config(kind, settings.model_size, num_layers=settings.num_layers), settings.clip, TARGETS
        )
        for kind in settings.models
    }
    return {
        "datasheet_tflops": stated,
        "product_tflops": measure_limit(device, settings.precision, size=settings.product_size).tflops,
        "train_tflop": {kind: train_tflop(info, again=False) for kind, info in infos.items()},
    }


def mfu(clips_per_second: float, kind: str, peak: Row) -> float:
    """Return the counted operations of a model's training over the device's stated peak, or else its measured product.

    Layers that are computed again for their gradients count once.
    """
    return float(clips_per_second * peak["train_tflop"][kind] / (peak["datasheet_tflops"] or peak["product_tflops"]))


def _training_row(spec: CaseSpec, seconds: float) -> Row:
    case, begin, taken = LocalCase(spec), 0.0, list[float]()
    for _ in range(_WARM_UP_STEPS):
        case.seconds("training")
    case.reset_peak()
    begin = time.monotonic()
    while not taken or time.monotonic() - begin < seconds:
        taken.append(case.seconds("training"))
    return {
        "clips_per_second": spec.per_device_batch_size / statistics.median(taken),
        "peak_memory_bytes": case.peak_bytes(),
    }


_WARM_UP_STEPS = 2


def _end_to_end_rows(settings: GpuCheckSettings) -> Iterator[Row]:
    """Yield training steps that are fed from shards, by codec and model."""
    from benchmarks.feeding import FedConfig, drawn_shards, measure_fed
    from ray_jobs.bench_data import training_consumer

    device = torch.device(settings.device)
    fed = FedConfig(clip=settings.clip, batch=settings.model_batch, seconds=settings.fed_seconds, device=device)
    consumers = {
        kind: training_consumer(
            kind, settings.model_size, num_layers=settings.num_layers, clip=settings.clip, device=device
        )
        for kind in settings.fed_models
    }
    with tempfile.TemporaryDirectory(prefix="ca2st-fed-") as folder:
        for codec in settings.fed_codecs:
            shards = drawn_shards(
                _drawn(settings),
                Path(folder),
                codec=codec,
                clip=settings.clip,
                gop=settings.usual_gop,
                workers=settings.encoding_threads,
            )
            for kind, (consume, name) in consumers.items():
                yield {"model": kind} | asdict(measure_fed(shards, consume, fed, consumer=name))


@contextlib.contextmanager
def _small_case(spec: CaseSpec) -> Iterator[Case]:
    yield _SmallCase(spec)


class _SmallCase(LocalCase):
    """A case in this process that does not measure the device's limit in earnest."""

    def limit(self) -> Limit:
        """Return the rate of a small product."""
        return measure_limit(torch.device("cpu"), "fp32", size=128)


PARTS: dict[PartName, Callable[[GpuCheckSettings], Iterator[Row]]] = {
    "device": _device_rows,
    "limits": _limit_rows,
    "parity": _parity_rows,
    "speed": _speed_rows,
    "damage": _damage_rows,
    "model": _model_rows,
    "training": _training_rows,
    "end_to_end": _end_to_end_rows,
}
"""In the order in which they are run."""
