"""Everything the doctor tries, by name, in the order it is told."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from ray_jobs.doctor import devices, libraries, machine, media, services
from ray_jobs.doctor.finding import Check, Finding, tried
from ray_jobs.environment import default_tracking_uri, ray_auth_mode, tracking_authorization

_PORTS = {"MLflow": 5000, "Ray": 6379, "Ray dashboard": 8265}


def all_checks(runs: Path, *, tracking_uri: str | None = None) -> dict[str, Check]:
    """What is tried, by name. `runs` is the folder that runs are written under."""
    return {
        **machine_checks(),
        "disk runs": partial(machine.check_folder, "disk runs", runs),
        "mlflow": partial(
            services.check_tracking, tracking_uri or default_tracking_uri(runs), tracking_authorization()
        ),
        "ray": partial(services.check_ray, ray_auth_mode()),
        "loopback": services.check_loopback,
        "ports": partial(services.check_ports, _PORTS),
        "listening": services.check_listening,
    }


def machine_checks() -> dict[str, Check]:
    """What is tried on every machine that trains."""
    return {
        "packages": libraries.check_packages,
        "torch": libraries.check_torch_family,
        "gpu": devices.check_gpu,
        "dali cpu": media.check_dali,
        **media.video_checks(),
        "audio aac": media.check_audio,
        "processor": machine.check_processor,
        "memory": machine.check_memory,
        "shared memory": machine.check_shared_memory,
        "open files": machine.check_open_files,
        "c++ compiler": machine.check_compiler,
    }


def examine(checks: dict[str, Check]) -> Iterator[Finding]:
    """The finding of each check, as it comes."""
    for name, check in checks.items():
        yield tried(check, name=name)
