"""``[launch]``: refused where it contradicts itself, and the threads of a worker stay the same when workers go."""

import pytest

from ca2st.errors import UserInputError
from ray_jobs.config.recipe import LaunchConfig


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"workers": 0}, "workers: expected at least 1"),
        ({"workers": 2, "min_workers": 3}, "min_workers: expected 1 to workers = 2, found 3"),
        ({"min_workers": 0}, "min_workers: expected 1 to workers = 1, found 0"),
        ({"workers": 4, "min_workers": 2, "placement": "STRICT_SPREAD"}, "placement: expected PACK or SPREAD"),
        ({"cpus_per_worker": 0.0}, "cpus_per_worker: expected more than 0"),
        ({"cpus_per_worker": float("nan")}, "cpus_per_worker: expected more than 0"),
        ({"threads_per_worker": 0}, "threads_per_worker: expected more than 0"),
        ({"accelerator_type": "H100", "gpus_per_worker": 0}, "accelerator_type: expected gpus_per_worker = 1"),
        ({"max_failures": -2}, "max_failures: expected at least 0, or -1"),
        ({"max_preemptions": -2}, "max_preemptions: expected at least 0, or -1"),
        ({"runs_folder": ""}, "runs_folder: expected a folder"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, object], told: str) -> None:
    with pytest.raises(UserInputError, match=told):
        LaunchConfig(**settings)  # type: ignore[arg-type]  # wrong on purpose


def test_restarts_are_on_by_default_and_a_preemption_costs_none() -> None:
    assert LaunchConfig().max_failures > 0
    assert LaunchConfig().max_preemptions == -1


def test_a_worker_has_as_many_threads_whatever_the_number_of_workers_is_just_now() -> None:
    elastic = LaunchConfig(workers=4, min_workers=1)
    assert elastic.elastic
    assert elastic.torch_threads(16) == LaunchConfig(workers=4).torch_threads(16) == 4
    assert LaunchConfig(workers=4, cpus_per_worker=2.5).torch_threads(16) == 2
    assert LaunchConfig(workers=4, cpus_per_worker=0.5).torch_threads(16) == 1
    assert LaunchConfig(workers=4, cpus_per_worker=2.5, threads_per_worker=3).torch_threads(16) == 3
    assert LaunchConfig(workers=4).torch_threads(2) == 1


def test_as_few_workers_as_many_is_no_elastic_run() -> None:
    assert not LaunchConfig(workers=2, min_workers=2).elastic
