"""What every test runs under."""

import sys
from collections.abc import Iterator

import pytest
from hypothesis import settings

# A busy machine is no failure of a property.
settings.register_profile("without deadline", deadline=None)
settings.load_profile("without deadline")


@pytest.fixture(autouse=True)
def _one_torch_thread() -> Iterator[None]:
    """For tensors this small a second thread only waits, and waits long when the machine is busy."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def own_process() -> Iterator[None]:
    """Every run makes its Accelerator as a new process would."""
    _forget_accelerator()
    yield
    _forget_accelerator()


@pytest.fixture(autouse=True, scope="module")
def _no_accelerator_of_other_modules() -> Iterator[None]:
    """Accelerate keeps the precision of a process's first Accelerator for all later ones."""
    yield
    _forget_accelerator()


def _forget_accelerator() -> None:
    if (state := sys.modules.get("accelerate.state")) is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)
