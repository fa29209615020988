"""The edge: the only module that reads environment variables (but for Ray's), and what a run records of its machine."""

import base64
import contextlib
import getpass
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from ca2st import __version__
from ca2st.durable import FaultPoints
from ca2st.errors import UserInputError
from ca2st.processes import num_cores

if TYPE_CHECKING:
    from ca2st.weights.hub import HubAccess

RECORDED_PACKAGES = (
    "ca2st",
    "torch",
    "torchaudio",
    "nvidia-dali-cuda130",
    "accelerate",
    "numpy",
    "pillow",
    "ray",
    "webdataset",
)
"""Packages that can change a run's numbers."""
_GIT_VARIABLE = "CA2ST_GIT"
_RAY_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Ray's job server tells an entrypoint by it which job it is."""
_LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_GIT_FACTS = ("git.commit", "git.dirty")


def fault_points(*, restart: bool = False) -> FaultPoints:
    """Return the fault of ``CA2ST_FAULT=point:nth[:kind]``, inert without the variable and in a `restart`ed worker."""
    return FaultPoints.parse("" if restart else os.environ.get("CA2ST_FAULT", ""))


def wait_passively() -> None:
    """Let torch's threads sleep while they wait for each other, unless ``OMP_WAIT_POLICY`` says otherwise.

    By default they spin. Where another process wants the same cores, and data loading always does, a training step
    on a CPU then takes many times as long. Only heard before torch is imported; child processes inherit it.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def use_deterministic_kernels() -> None:
    """Let torch use kernels alone that give the same bits each time, and raise where it has none.

    Of attention's kernels FlashAttention has a deterministic backward pass on request, and the plain formula needs
    none; the others are left out.
    """
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it, before its first product
    torch.use_deterministic_algorithms(True)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)


def default_tracking_uri(runs_root: Path) -> str:
    """Return ``MLFLOW_TRACKING_URI``, or an SQLite file under the folder of all runs."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(runs_root / 'mlflow.db').resolve()}"


def ray_auth_mode() -> str | None:
    """``RAY_AUTH_MODE``: ``token`` where a cluster started here asks for one."""
    return os.environ.get("RAY_AUTH_MODE")


def passed_variables(names: Sequence[str]) -> dict[str, str]:
    """Return the values of the variables that the user names to be passed on.

    Raises:
        UserInputError: one is not set, or a value stands where only names may: command lines are seen by everybody.
    """
    for name in names:
        if "=" in name:
            shown = name.partition("=")[0]
            raise UserInputError(
                f"--env {shown}: expected a name alone, found a value too; export {shown} and pass its name"
            )
        if name not in os.environ:
            raise UserInputError(f"--env {name}: expected a variable of this environment, found none; export it first")
    return {name: os.environ[name] for name in names}


def waiting_policy() -> str:
    """``OMP_WAIT_POLICY`` as `wait_passively` has set or found it."""
    return os.environ.get("OMP_WAIT_POLICY", "PASSIVE")


def tracking_uri() -> str | None:
    """Return ``MLFLOW_TRACKING_URI``, if it is set."""
    return os.environ.get("MLFLOW_TRACKING_URI")


def tracking_authorization() -> str | None:
    """Return the header by which MLflow's client shows the credentials of the environment, if there are any."""
    user, password = os.environ.get("MLFLOW_TRACKING_USERNAME"), os.environ.get("MLFLOW_TRACKING_PASSWORD")
    if user and password:
        return basic_authorization(user, password)
    token = os.environ.get("MLFLOW_TRACKING_TOKEN")
    return f"Bearer {token}" if token else None


def visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [one for one in named.split(",") if one]
    return [str(number) for number in range(torch.cuda.device_count())]


def local_world_size() -> int:
    """Return how many workers of this training run on this machine, as its launcher says; 1 where none does."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def basic_authorization(user: str, password: str) -> str:
    """Return the HTTP header ``Authorization`` of a user with a password."""
    return f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"


def hub_access() -> "HubAccess":
    """Return the hub of public weights: ``HF_ENDPOINT`` and ``HF_HUB_CACHE``, or huggingface_hub's defaults."""
    from ca2st.weights.hub import HubAccess

    cache = os.environ.get("HF_HUB_CACHE")
    return HubAccess(endpoint=os.environ.get("HF_ENDPOINT") or None, cache_folder=Path(cache) if cache else None)


def versions() -> dict[str, str]:
    """Return the versions of Python, ca2st and the installed packages that can change a run's numbers."""
    found = {"python": platform.python_version(), "ca2st": __version__}  # no metadata where a job brought ca2st
    for name in RECORDED_PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def git_state(folder: Path) -> dict[str, str]:
    """Return ``git.commit`` and ``git.dirty`` of the checkout around `folder`, else of ``CA2ST_GIT``, else nothing.

    Cleanliness is left out where git does not tell it.

    Raises:
        UserInputError: ``CA2ST_GIT`` is not what `git_variable` makes.
    """
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        text = os.environ.get(_GIT_VARIABLE)
        if not text:
            return {}
        if re.fullmatch(r"[0-9a-f]{40,64}( true| false)?", text) is None:
            raise UserInputError(
                f"{_GIT_VARIABLE}: expected a commit and true or false (changed since), as `ca2st submit` sets it, "
                "found something else; unset it"
            )
        return dict(zip(_GIT_FACTS, text.split(" "), strict=False))
    changes = _git(folder, "status", "--porcelain")
    return {"git.commit": commit} | ({} if changes is None else {"git.dirty": str(bool(changes)).lower()})


def launched_ranks() -> tuple[int, int] | None:
    """Return (rank, world size) where a launcher as torchrun started this process beside others; else None.

    Raises:
        UserInputError: only a part of what such a launcher sets is there.
    """
    world_size = os.environ.get("WORLD_SIZE", "1")
    if world_size == "1":
        return None
    missing = [name for name in _LAUNCHER_VARIABLES if not os.environ.get(name)]
    if missing or not (world_size.isdecimal() and os.environ["RANK"].isdecimal()):
        found = f"{', '.join(missing)} missing" if missing else "other text"
        raise UserInputError(
            f"WORLD_SIZE={world_size}: expected numbers, and {', '.join(_LAUNCHER_VARIABLES)} beside it, as torchrun "
            f"sets them, found {found}; start by torchrun, or unset WORLD_SIZE"
        )
    return int(os.environ["RANK"]), int(world_size)


def code_state() -> dict[str, str]:
    """Return `git_state` of the checkout that this very code lies in; without one, or in a job, of where it runs.

    The working directory may be a checkout of something else.
    """
    own = Path(__file__)
    is_own = _GIT_VARIABLE not in os.environ and _git(own.parent, "ls-files", "--error-unmatch", own.name) is not None
    return git_state(own.parent if is_own else Path.cwd())


def command_line() -> str:
    """Return how this program was started, the name of the program without its folder."""
    return " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])


def started_as() -> str:
    """Return program, command and recipe without folders and options: MLflow cuts a source's name at its last ``/``."""
    words = takewhile(lambda word: not word.startswith("-"), sys.argv)
    return " ".join(Path(word).name for word in words)


def user_name() -> str | None:
    """Return who started it; None where the system does not know (a container with a bare number)."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return None


def ray_job() -> dict[str, str]:
    """Return the Ray job that this process drives: ``ray.submission_id`` where it was submitted.

    And ``ray.job_id`` where it has joined a cluster. Empty without Ray.
    """
    found = {}
    with contextlib.suppress(ValueError, AttributeError):  # written by Ray: of another form, it tells nothing
        metadata = json.loads(os.environ.get(_RAY_JOB_VARIABLE, "{}")).get("metadata", {})
        found = {"ray.submission_id": str(metadata["job_submission_id"])} if "job_submission_id" in metadata else {}
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        found["ray.job_id"] = str(ray.get_runtime_context().get_job_id())
    return found


def git_variable(state: Mapping[str, str]) -> dict[str, str]:
    """Return ``CA2ST_GIT``, by which a job without a checkout knows the `git_state` it was sent from."""
    return {_GIT_VARIABLE: " ".join(state[name] for name in _GIT_FACTS if name in state)} if state else {}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def hardware() -> dict[str, str]:
    """Return the processor count, and the CUDA devices torch sees."""
    import torch

    facts = {"hardware.cpu_count": str(num_cores()), "hardware.machine": platform.machine()}
    if torch.cuda.is_available():
        facts["hardware.gpus"] = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return facts
