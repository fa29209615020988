"""What every test runs under."""

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
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
