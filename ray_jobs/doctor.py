"""What works on this machine, tried: libraries, GPUs, media, memory, disk, MLflow's store, Ray, ports and who listens.

Libraries are imported inside the checks: one that is missing is a finding of its own check, not the end of all.
"""

import contextlib
import io
import os
import platform
import resource
import shutil
import socket
import sqlite3
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from importlib import metadata
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from ca2st.processes import num_cores
from ray_jobs.environment import basic_authorization, default_tracking_uri, ray_auth_mode, tracking_authorization
from ray_jobs.redaction import without_credentials
from ray_jobs.tracking.client import sqlite_path

if TYPE_CHECKING:
    import numpy as np

_GIB = 2**30
_LEAST_DISK_BYTES = 5 * _GIB
_LEAST_MEMORY_BYTES = 4 * _GIB
_LEAST_SHARED_BYTES = 64 * 2**20
_LEAST_OPEN_FILES = 1024
_CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
_INSTALL = "make install, or pip install --require-hashes -r requirements.lock"
_ENCODERS = {"h264": "libx264", "hevc": "libx265", "vp9": "libvpx-vp9", "mjpeg": "mjpeg"}
_QUIET = {"libx265": {"x265-params": "log-level=none"}}
_NUM_FRAMES, _SIZE = 4, 64
_FIX = "install the PyAV wheel of requirements.lock: it carries FFmpeg with all of these"


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that was tried."""

    name: str = ""
    """What: ``torch``, ``video h264``, ``disk runs``; `examine` fills it in."""
    ok: bool
    what: str
    """What was found."""
    fix: str = ""
    """What to do where it is not ok."""
    needed: bool = True
    """False where the project works without it, only slower or with less."""
    node: str | None = None
    """The cluster's node it was tried on; None: this machine, or the cluster as a whole."""


Check = Callable[[], Finding]


def machine_checks() -> dict[str, Check]:
    """Return what is tried on every machine that trains, by name."""
    return {
        "packages": check_packages,
        "torch": check_torch_family,
        "gpu": check_gpu,
        "dali cpu": check_dali,
        **{f"video {codec}": partial(check_video, codec) for codec in _ENCODERS},
        "audio aac": check_audio,
        "processor": check_processor,
        "memory": check_memory,
        "shared memory": check_shared_memory,
        "open files": check_open_files,
        "c++ compiler": check_compiler,
    }


def examine(checks: dict[str, Check]) -> Iterator[Finding]:
    """Yield the finding of each check, as it comes; whatever a check raises becomes a finding that is not ok."""
    for name, check in checks.items():
        try:
            yield replace(check(), name=name)
        except Exception as error:  # noqa: BLE001 - a broken library may raise anything, and that is what is asked
            fix = "install the package again in a fresh environment (make install)"
            yield Finding(name=name, ok=False, what=f"{type(error).__name__}: {error}", fix=fix)


def check_processor() -> Finding:
    """Count the cores this process may use."""
    from ca2st.benchmark.measure import machine

    return Finding(ok=True, what=f"{num_cores()} cores, {machine('cpu').processor}")


def check_memory() -> Finding:
    """Measure the memory this process may use, a container's limit included."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [int(text) for path in _CGROUP_LIMITS if path.is_file() and (text := path.read_text().strip()).isdigit()]
    usable = min([total, *limits])
    return Finding(
        ok=usable >= _LEAST_MEMORY_BYTES,
        what=f"{usable / _GIB:.1f} GiB usable",
        fix=f"a worker with a small model needs 2 GiB: give the machine {_LEAST_MEMORY_BYTES // _GIB} or more",
    )


def check_shared_memory() -> Finding:
    """Measure the room of Ray's object store."""
    folder = "/dev/shm"  # noqa: S108 - the place is what is asked about
    free = shutil.disk_usage(folder).free
    return Finding(
        ok=free >= _LEAST_SHARED_BYTES,
        what=f"{free / _GIB:.2f} GiB free in {folder}",
        fix="start the container with --shm-size=8g; Ray falls back to slower files without",
        needed=False,
    )


def check_open_files() -> Finding:
    """Check how many files a process may hold open: shards, sockets of Ray."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return Finding(
        ok=soft >= _LEAST_OPEN_FILES or soft == resource.RLIM_INFINITY,
        what=f"{soft} per process (at most {hard})",
        fix="ulimit -n 65536 before the command, or LimitNOFILE= of the service",
    )


def check_folder(folder: Path) -> Finding:
    """Write and link a file in `folder` (or the nearest place above it that is there), and measure its room."""
    place = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    if not place.is_dir():
        return Finding(ok=False, what=f"{place}: a file, no folder", fix="give another folder")
    free = shutil.disk_usage(place).free
    try:
        with tempfile.NamedTemporaryFile(dir=place) as file:
            file.write(b"ca2st")
            os.fsync(file.fileno())
            Path(f"{file.name}.renamed").hardlink_to(file.name)
            Path(f"{file.name}.renamed").unlink()
    except OSError as error:
        return Finding(
            ok=False,
            what=f"{place}: cannot write there ({error.strerror})",
            fix="give another folder, or the right to write to it",
        )
    return Finding(
        ok=free >= _LEAST_DISK_BYTES,
        what=f"{place}: writable, {free / _GIB:.0f} GiB free",
        fix=f"make room: at least {_LEAST_DISK_BYTES // _GIB} GiB for checkpoints and logs",
    )


def check_compiler() -> Finding:
    """Look for a C++ compiler, which torch.compile needs on a CPU."""
    found = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    return Finding(
        ok=found is not None,
        what=found or "none on PATH",
        fix="apt-get install g++; only training.compile needs it",
        needed=False,
    )


def check_gpu() -> Finding:
    """Compute on every CUDA device, in bfloat16 too."""
    import torch

    if not torch.cuda.is_available():
        return Finding(
            ok=False,
            what="torch sees no CUDA device",
            fix="small models train on the CPU; for ViT-B use a machine with a GPU and a driver for "
            f"CUDA {torch.version.cuda}",
            needed=False,
        )
    found = []
    for index in range(torch.cuda.device_count()):
        with torch.cuda.device(index):
            ones = torch.ones(64, 64, device="cuda", dtype=torch.bfloat16)
            if float((ones @ ones).sum()) != 64**3:
                fix = "the device gives wrong sums: check its driver and its memory (nvidia-smi -q)"
                return Finding(ok=False, what=f"device {index} multiplies wrongly", fix=fix)
            free, total = torch.cuda.mem_get_info()
            found.append(f"{torch.cuda.get_device_name()}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free")
    return Finding(ok=True, what="; ".join(found))


def check_packages() -> Finding:
    """Compare every direct dependency with the version that ours asks for."""
    from packaging.requirements import Requirement

    asked = [Requirement(text) for text in metadata.requires("ca2st") or ()]
    wanted = [one for one in asked if one.marker is None or one.marker.evaluate({"extra": ""})]
    wrong = []
    for one in wanted:
        try:
            found = metadata.version(one.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{one.name}: expected {one.specifier or 'any version'}, found none")
            continue
        if not one.specifier.contains(found, prereleases=True):
            wrong.append(f"{one.name}: expected {one.specifier}, found {found}")
    if wrong:
        return Finding(ok=False, what="; ".join(wrong), fix=_INSTALL)
    return Finding(ok=True, what=f"Python {platform.python_version()}, all of {len(wanted)} as asked for")


def check_torch_family() -> Finding:
    """Import torch, torchvision and torchaudio together: they must be built for one CUDA version."""
    import torch
    import torchaudio
    import torchvision

    found = ", ".join(f"{one.__name__} {one.__version__}" for one in (torch, torchvision, torchaudio))
    torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)  # fails where the builds do not fit
    return Finding(ok=True, what=f"{found}, CUDA {torch.version.cuda or 'none'}")


def check_video(codec: str) -> Finding:
    """Encode a few frames, decode them again, compare."""
    import av
    import numpy as np

    encoder = _ENCODERS[codec]
    if encoder not in av.codecs_available:
        return Finding(ok=False, what=f"no encoder {encoder}", fix=_FIX, needed=codec == "mjpeg")
    frames = _frames()
    with av.open(io.BytesIO(_encoded(encoder, frames)), "r") as container:
        found = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    if len(found) != len(frames):
        return Finding(ok=False, what=f"{len(frames)} frames in, {len(found)} out", fix=_FIX)
    error = float(np.abs(np.stack(found).astype(float) - frames).mean())
    ok = error < 16
    return Finding(ok=ok, what=f"{encoder} and back: {error:.1f} of 255 off on average", fix="" if ok else _FIX)


def check_audio() -> Finding:
    """Encode a second of AAC and decode it."""
    import av
    import numpy as np

    sink, rate = io.BytesIO(), 16_000
    tone = np.sin(np.arange(rate, dtype=np.float32) * (2 * np.pi * 440 / rate))[None]
    with av.open(sink, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(tone, format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    sink.seek(0)
    with av.open(sink, "r") as container:
        found = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])
    ok = len(found) >= rate and float(np.abs(found).max()) > 0.5
    return Finding(ok=ok, what=f"{rate} samples in, {len(found)} out", fix="" if ok else _FIX, needed=False)


def check_dali() -> Finding:
    """Decode a JPEG by DALI on the CPU, as training does, and compare with the pixels of Pillow."""
    from PIL import Image

    from pipelines.decode.backends import dali_is_installed

    fix = "pip install nvidia-dali-cuda130==2.4.0; until then the slower reference backend is used"
    if not dali_is_installed():
        return Finding(ok=False, what="nvidia-dali is not installed", fix=fix, needed=False)
    from pipelines.augment.boxes import CropBox
    from pipelines.decode.dali import dali_backend
    from pipelines.decode.reference import ReferenceBackend
    from pipelines.rendering import JpegFrames, RenderRequest
    from pipelines.threads import StatsRecorder

    sink = io.BytesIO()
    Image.fromarray(_frames()[0]).save(sink, format="JPEG", quality=90)
    request = RenderRequest(
        frames=JpegFrames(frames=(sink.getvalue(),) * 2),
        boxes=(CropBox(top=0, left=0, height=_SIZE, width=_SIZE),),
        flip=False,
        where="a picture of the doctor's",
    )
    dali = dali_backend("mjpeg", num_frames=2, crop_size=_SIZE, views_per_clip=1, threads=1, stats=StatsRecorder())
    try:
        found = dali.render([request])
    finally:
        dali.close()
    expected = ReferenceBackend(crop_size=_SIZE, stats=StatsRecorder()).render([request])
    worst = int((found.int() - expected.int()).abs().max())
    version = metadata.version("nvidia-dali-cuda130")
    return Finding(ok=worst <= 1, what=f"DALI {version}: at most {worst} of 255 off Pillow", fix=fix, needed=False)


def _frames() -> "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]":
    import numpy as np

    y, x = np.mgrid[:_SIZE, :_SIZE]
    return np.stack([np.stack([x * 3 + 4 * i, y * 3, x + y], axis=-1) for i in range(_NUM_FRAMES)]).astype(np.uint8)


def _encoded(encoder: str, frames: "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]") -> bytes:
    import av

    sink = io.BytesIO()
    with av.open(sink, "w", format="mp4") as container:
        stream = container.add_stream(encoder, rate=25, options=_QUIET.get(encoder, {}))
        assert isinstance(stream, av.VideoStream)
        stream.width = stream.height = _SIZE
        stream.pix_fmt = "yuvj420p" if encoder == "mjpeg" else "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return sink.getvalue()


_ANSWER_SECONDS = 5.0
_LOOPBACK = "127.0.0.1"
_PORTS = {"MLflow": 5000, "Ray": 6379, "Ray dashboard": 8265}


def all_checks(runs: Path, *, tracking_uri: str | None = None) -> dict[str, Check]:
    """Return what is tried, by name. `runs` is the folder that runs are written under."""
    return {
        **machine_checks(),
        "disk runs": partial(check_folder, runs),
        "mlflow": partial(check_tracking, tracking_uri or default_tracking_uri(runs), tracking_authorization()),
        "ray": partial(check_ray, ray_auth_mode()),
        "loopback": check_loopback,
        "ports": partial(check_ports, _PORTS),
        "listening": check_listening,
    }


def check_tracking(uri: str, authorization: str | None = None) -> Finding:
    """Check that the tracking store can be written: an SQLite file, or a server that answers within seconds.

    `authorization` is the header that a server is shown where the address itself holds no credentials.
    """
    if (path := sqlite_path(uri)) is not None:
        return _check_sqlite(path)
    if uri.startswith(("http://", "https://")):
        return _check_server(uri, authorization)
    return Finding(ok=True, what=f"a {urlsplit(uri).scheme} store: not tried", fix="", needed=False)


def _check_sqlite(path: Path) -> Finding:
    if not path.is_file():
        folder = next(one for one in path.absolute().parents if one.is_dir())
        return Finding(
            ok=os.access(folder, os.W_OK),
            what=f"SQLite, not there yet: {path}",
            fix=f"make {folder} writable, or set MLFLOW_TRACKING_URI",
        )
    fix = "another process may hold it for long: end that, or set MLFLOW_TRACKING_URI to another store"
    try:
        connection = sqlite3.connect(path, timeout=_ANSWER_SECONDS, isolation_level=None)
        try:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("ROLLBACK")
        finally:
            connection.close()
    except sqlite3.Error as error:
        return Finding(ok=False, what=f"{path}: {error}", fix=fix)
    return Finding(ok=True, what=f"SQLite, writable: {path}")


def _check_server(uri: str, authorization: str | None) -> Finding:
    where, parts = without_credentials(uri).rstrip("/"), urlsplit(uri)
    if parts.username is not None:  # urllib takes none from an address, and would show them in its errors
        authorization = basic_authorization(unquote(parts.username), unquote(parts.password or ""))
    request = urllib.request.Request(f"{where}/version")  # noqa: S310 - http or https, by the caller
    if authorization:
        request.add_unredirected_header("Authorization", authorization)
    try:
        with urllib.request.urlopen(request, timeout=_ANSWER_SECONDS) as answer:  # noqa: S310 - as above
            version = answer.read(64).decode(errors="replace")
    except urllib.error.HTTPError as error:
        what, fix = f"{where} answers {error.code}", "set MLFLOW_TRACKING_TOKEN, or user and password"
        return Finding(ok=False, what=what, fix=fix)
    except OSError as error:
        reason = getattr(error, "reason", error)
        fix = "start the server or correct MLFLOW_TRACKING_URI; runs go on without it, `ca2st track sync` sends later"
        return Finding(ok=False, what=f"{where}: no answer ({reason})", fix=fix, needed=False)
    return Finding(ok=True, what=f"{where} answers, version {version}")


def check_loopback() -> Finding:
    """Connect two ends of this machine: ranks and Ray need it."""
    with socket.socket() as server:
        server.bind((_LOOPBACK, 0))
        server.listen(1)
        port = server.getsockname()[1]
        with socket.create_connection((_LOOPBACK, port), timeout=_ANSWER_SECONDS):
            pass
    return Finding(ok=True, what="connections within this machine work")


def check_ports(ports: dict[str, int]) -> Finding:
    """Look which of the usual ports something already listens on."""
    taken = []
    for name, port in ports.items():
        with socket.socket() as probe:
            probe.settimeout(_ANSWER_SECONDS)
            if probe.connect_ex((_LOOPBACK, port)) == 0:
                taken.append(f"{port} ({name})")
    return Finding(
        ok=not taken,
        what=f"taken: {', '.join(taken)}" if taken else f"free: {', '.join(str(port) for port in ports.values())}",
        fix="a server of yours may be running already; otherwise start ours on other ports",
        needed=False,
    )


def check_listening() -> Finding:
    """List our processes that other machines can talk to: Ray, for one, listens on every interface."""
    import psutil  # type: ignore[import-untyped]  # it ships no stubs

    ports: dict[str, set[int]] = {}
    for one in psutil.net_connections("tcp"):
        if one.status == psutil.CONN_LISTEN and one.pid and not _is_loopback(one.laddr.ip):
            with contextlib.suppress(psutil.Error):  # it ended meanwhile
                ports.setdefault(psutil.Process(one.pid).name(), set()).add(one.laddr.port)
    listening = "; ".join(f"{name} {', '.join(map(str, sorted(of)))}" for name, of in sorted(ports.items()))
    return Finding(ok=True, what=f"to other machines: {listening}" if listening else "to this machine alone")


def _is_loopback(address: str) -> bool:
    """Return whether an address is of this machine alone, also as IPv6 sockets write it: ``::ffff:127.0.0.1``."""
    found = ip_address(address)
    return (getattr(found, "ipv4_mapped", None) or found).is_loopback


def check_ray(auth_mode: str | None) -> Finding:
    """Check that Ray is there, and whether a cluster started here asks for a token."""
    version = metadata.version("ray")
    ok = auth_mode == "token"
    return Finding(
        ok=ok,
        what=f"Ray {version}, RAY_AUTH_MODE={auth_mode or 'not set'}",
        fix="export RAY_AUTH_MODE=token before `ray start`: without it anybody who reaches the cluster can run jobs",
        needed=False,
    )
