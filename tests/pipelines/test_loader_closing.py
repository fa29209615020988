"""Parts of a loader that were made before one that cannot be made are closed again."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ca2st.errors import EnvironmentFault
from ca2st.spec import ClipSpec
from pipelines import loader as rank_loader
from pipelines.config import EvaluationSetup, TrainSetup
from pipelines.decode import dali, reference
from pipelines.decode.backends import make_backend
from pipelines.errors import ShardSetDamageError
from pipelines.loader import EvaluationLoader, TrainLoader
from pipelines.rendering import RenderRequest
from pipelines.storage.shard_sets import SetReaders
from pipelines.threads import StatsRecorder
from pipelines.views import SamplingConfig
from sharding.format.shard_set import ShardSet
from support.fake_shards import flip_byte


class OpenBackend:
    """A backend that says whether it is open."""

    name = "open"

    def __init__(self, **_: Any) -> None:
        self.is_open = True

    def render(self, requests: Sequence[RenderRequest]) -> Tensor:
        return torch.empty(len(requests))

    def close(self) -> None:
        self.is_open = False


def refuse(*_: Any, **__: Any) -> None:
    raise EnvironmentFault("no room for a decoder")


def test_a_backend_that_cannot_be_made_closes_those_made_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[OpenBackend] = []
    monkeypatch.setattr(dali, "dali_backend", lambda *_, **__: made.append(OpenBackend()) or made[-1])
    monkeypatch.setattr(reference, "ReferenceBackend", refuse)
    with pytest.raises(EnvironmentFault, match="no room for a decoder"):
        make_backend(
            "auto",
            codecs=["mjpeg", "h264"],
            num_frames=4,
            crop_size=8,
            views_per_clip=1,
            threads=1,
            stats=StatsRecorder(),
        )
    assert [backend.is_open for backend in made] == [False]


def test_backends_that_could_all_be_made_stay_open_until_they_are_closed_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[OpenBackend] = []
    monkeypatch.setattr(dali, "dali_backend", lambda *_, **__: made.append(OpenBackend()) or made[-1])
    monkeypatch.setattr(reference, "ReferenceBackend", lambda **_: made.append(OpenBackend()) or made[-1])
    backend = make_backend(
        "auto", codecs=["mjpeg", "h264"], num_frames=4, crop_size=8, views_per_clip=1, threads=1, stats=StatsRecorder()
    )
    assert [one.is_open for one in made] == [True, True]
    backend.close()
    assert [one.is_open for one in made] == [False, False]


def test_a_loader_without_a_backend_closes_its_files(
    intact_set: ShardSet, clip: ClipSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[SetReaders] = []
    monkeypatch.setattr(SetReaders, "close", lambda self: closed.append(self))
    monkeypatch.setattr(rank_loader, "make_backend", refuse)
    with pytest.raises(EnvironmentFault, match="no room for a decoder"):
        EvaluationLoader(EvaluationSetup(shard_set=intact_set, clip=clip, targets=("label",), global_batch_size=4))
    assert len(closed) == 1


def test_a_loader_closes_its_backend_before_its_files_and_neither_twice(
    intact_set: ShardSet, clip: ClipSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[str] = []
    backend = OpenBackend()
    monkeypatch.setattr(backend, "close", lambda: closed.append("backend"))
    monkeypatch.setattr(SetReaders, "close", lambda _: closed.append("files"))
    monkeypatch.setattr(rank_loader, "make_backend", lambda *_, **__: backend)
    setup = EvaluationSetup(shard_set=intact_set, clip=clip, targets=("label",), global_batch_size=4)
    with EvaluationLoader(setup) as loader:
        loader.close()
    assert closed == ["backend", "files"]


def test_a_training_loader_whose_first_index_is_damaged_closes_its_backend(
    fresh_set: ShardSet, clip: ClipSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = OpenBackend()
    monkeypatch.setattr(rank_loader, "make_backend", lambda *_, **__: backend)
    flip_byte(index_of_first_shard(fresh_set), 40)
    setup = TrainSetup(
        shard_sets=[fresh_set],
        clip=clip,
        targets=("label",),
        sampling=SamplingConfig(scheme="dense"),
        seed=0,
        global_batch_size=4,
    )
    with pytest.raises(ShardSetDamageError, match=r"000000.index.parquet: sha256 differs"):
        TrainLoader(setup)
    assert not backend.is_open


def index_of_first_shard(shard_set: ShardSet) -> Path:
    return shard_set.root / shard_set.shards[0].index_name
