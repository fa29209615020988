"""One store for all tests of tracking: making its tables takes MLflow seconds."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from ray_jobs.tracking.client import open_client
from support.fake_mlflow import FakeMlflow, served
from support.tracked_runs import tracked_run


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URI of an SQLite store with tables; experiments and runs of all tests are in it."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"
    open_client(uri)
    yield uri
    gc.collect()  # MLflow's engines are closed when they are collected: not in the middle of another test


@pytest.fixture
def run_dir(tmp_path: Path, store: str) -> Path:
    """The folder of a training run that is about to begin, in an experiment of its own."""
    return tracked_run(tmp_path / "runs" / "mine", store, experiment=tmp_path.name)


@pytest.fixture(autouse=True)
def extras(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Inputs, artefacts and the registered model are tested by themselves; here only that their time came."""
    from ray_jobs.tracking.sender import EXTRAS

    called: list[str] = []
    for name in EXTRAS:
        monkeypatch.setitem(EXTRAS, name, lambda client, run_id, folder, name=name: called.append(name))
    return called


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeMlflow:
    """A server that is away until it is served, and a client that soon gives up."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    server = FakeMlflow()
    with served(server):
        pass  # it has a port now, at which nobody listens
    server.released.clear()
    return server
