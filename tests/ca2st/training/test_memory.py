"""T12: memory that did not suffice is told as such, with the peak and the settings that lower it."""

import errno
from pathlib import Path

import pytest
import torch

from ca2st.training.errors import OutOfMemoryFault, PeerFailedError
from ca2st.training.loop import train
from ca2st.training.ranks import memory_fault, naming_memory_faults
from support.tiny_training import TinyModel, TinySource, fresh_accelerator, tiny_settings


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has ..."),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried ..."),
        RuntimeError("Critical error in pipeline: CUDA allocation failed"),
        RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("std::bad_alloc"),
        OSError(errno.ENOSPC, "No space left on device", "/dev/shm/torch_1_2"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_t12_memory_that_did_not_suffice_has_its_own_name_with_the_peak_and_what_lowers_it(error: Exception) -> None:
    error.add_note("on rank 1")
    with (
        pytest.raises(OutOfMemoryFault, match=r"peak so far: this process \d+\.\d\d GB") as caught,
        naming_memory_faults(),
    ):
        raise error
    for knob in (
        "training.per_device_batch_size",
        "training.activation_checkpointing",
        "training.precision",
        "experts.precision",
        "data.loader.prefetch_steps",
        "data.loader.decode_threads",
        "workers",
    ):
        assert knob in str(caught.value)
    assert caught.value.exit_code == 4
    assert caught.value.__notes__ == ["on rank 1"]
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("shape mismatch"),
        OSError(errno.ENOSPC, "No space left on device", "/runs/checkpoints/x"),
        PeerFailedError("rank 1 failed with OutOfMemoryFault: out of memory", exit_code=4),
        OutOfMemoryFault("once is enough"),
    ],
)
def test_t12_other_errors_keep_their_names(error: Exception) -> None:
    assert memory_fault(error) is None


def test_t12_a_refused_allocation_of_this_machine_is_recognised() -> None:
    with pytest.raises(OutOfMemoryFault, match=r"out of memory: .*DefaultCPUAllocator"), naming_memory_faults():
        torch.empty(2**60, dtype=torch.uint8)


class Hungry(TinyModel):
    """Asks for more than any machine has at its third forward pass."""

    calls = 0

    def forward(self, *inputs: torch.Tensor) -> object:  # type: ignore[override]  # as the model's, then too much
        Hungry.calls += 1
        if Hungry.calls > 2:
            torch.empty(2**60, dtype=torch.uint8)
        return super().forward(*inputs)


def test_t12_a_step_that_runs_out_of_memory_ends_the_run_with_that_name_and_its_journal_says_so(tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path, per_device_batch_size=6)
    Hungry.calls = 0
    with pytest.raises(OutOfMemoryFault, match="peak so far") as caught:
        train(Hungry(), TinySource(), accelerator=fresh_accelerator(settings), settings=settings)
    assert '"kind":"OutOfMemoryFault","step":2' in (tmp_path / "journal.jsonl").read_text()
    assert caught.value.exit_code == 4
