import hashlib
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import xxhash

from ca2st.batch import ClipBatch
from ca2st.training.errors import LabelRangeError, SourceContractError
from ca2st.training.ranks import Ranks, StageClock
from ca2st.training.signals import StopRequest
from ca2st.training.step import Intake, hash_of_keys
from support.tiny_training import TinySource, fresh_accelerator, tiny_settings


def intake_of(source: TinySource, *, stop: StopRequest | None = None) -> Intake:
    ranks = Ranks(fresh_accelerator(tiny_settings(Path("unused"))))
    return Intake(source, ranks, settings=tiny_settings(Path("unused")), stop=stop or StopRequest())


class Spoilt(TinySource):
    """A source whose second step is changed by a function."""

    def __init__(self, spoil: object) -> None:
        super().__init__()
        self.spoil = spoil

    def make(self, clips: object, keys: object, *, epoch: int, step: int) -> ClipBatch:
        batch = super().make(clips, keys, epoch=epoch, step=step)
        return self.spoil(batch) if step == 1 else batch


def test_the_hash_is_of_the_keys_joined_by_newlines() -> None:
    assert hash_of_keys(["a", "b"]) == xxhash.xxh3_64(b"a\nb").hexdigest()
    assert len(hash_of_keys([hashlib.sha256(b"").hexdigest()])) == 16


def test_steps_arrive_from_the_first_asked_for_and_threads_end_with_them() -> None:
    source = TinySource()
    steps = intake_of(source).epoch(1, first_step=2)
    first = next(steps)
    assert first.keys_of_rank == (tuple(source.keys_of_step(1, 2)),)
    assert source.open_iterators == 1
    steps.close()
    assert source.open_iterators == 0
    assert len(list(intake_of(source).epoch(0, first_step=1))) == source.steps_per_epoch - 1


def test_a_request_to_stop_ends_the_epoch_without_a_batch() -> None:
    stop = StopRequest()
    steps = intake_of(TinySource(), stop=stop).epoch(0, first_step=0)
    assert next(steps).share is not None
    stop.request(signal.SIGTERM)
    last = next(steps)
    assert last.share is None
    assert last.stop_signal == signal.SIGTERM
    assert list(steps) == []


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda b: next(b.split(5)), SourceContractError, "epoch 0, step 1 .*expected 6 clips over all ranks, found 5"),
        (lambda b: replace(b, is_padding=~b.is_padding), SourceContractError, "expected clips without padding"),
        (lambda b: replace(b, labels=b.labels[:, :1]), SourceContractError, "one label column for each of verb, noun"),
        (lambda b: replace(b, labels=b.labels - 5), LabelRangeError, "verb label expected in 0..4"),
    ],
)
def test_a_batch_that_breaks_the_contract_is_refused(spoil: object, error: type[Exception], message: str) -> None:
    steps = intake_of(Spoilt(spoil)).epoch(0, first_step=0)
    next(steps)
    with pytest.raises(error, match=message):
        next(steps)


def test_a_loader_that_ends_early_is_refused() -> None:
    class Short(TinySource):
        def batches(self, epoch: int, first_step: int = 0) -> object:
            batches = super().batches(epoch, first_step)
            return (next(batches) for _ in range(2))

    steps = intake_of(Short()).epoch(0, first_step=0)
    with pytest.raises(SourceContractError, match="step 2 of the epoch: expected a batch, the loader has ended"):
        list(steps)


def test_a_loaders_own_error_passes_through() -> None:
    def fail(batch: ClipBatch) -> ClipBatch:
        raise OSError("disk on fire")

    with pytest.raises(OSError, match="disk on fire"):
        list(intake_of(Spoilt(fail)).epoch(0, first_step=0))


def test_the_wait_is_the_loaders_time_alone() -> None:
    times = iter(torch.arange(0.0, 100.0, 2.5).tolist())
    settings = tiny_settings(Path("unused"))
    ranks = Ranks(fresh_accelerator(settings), stages=StageClock(lambda: next(times)))
    intake = Intake(TinySource(), ranks, settings=settings, stop=StopRequest())
    assert next(intake.epoch(0, first_step=0)).wait_seconds == 2.5
