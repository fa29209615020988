"""What every test runs under."""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, get_args

import jaxtyping
import pytest
from hypothesis import settings
from jaxtyping import AbstractArray

# A busy machine is no failure of a property.
settings.register_profile("without deadline", deadline=None, max_examples=50)
settings.load_profile("without deadline")


def _carries_shapes(annotation: object) -> bool:
    if isinstance(annotation, list | tuple):
        return any(map(_carries_shapes, annotation))
    if isinstance(annotation, str):  # a name that is defined later
        return True
    return (isinstance(annotation, type) and issubclass(annotation, AbstractArray)) or _carries_shapes(
        get_args(annotation)
    )


def _checked_where_shapes_are(checked: Callable[..., Any], thing: Any = None, **how: Any) -> Any:
    """Of all that the import hook would check, leave out what mypy has checked, at a fifth of the time."""
    if thing is None:
        return partial(_checked_where_shapes_are, checked, **how)
    classes = thing.__mro__ if isinstance(thing, type) else (thing,)
    annotations = [x for one in classes for x in getattr(one, "__annotations__", {}).values()]
    return checked(thing, **how) if _carries_shapes(annotations) else thing


jaxtyping.jaxtyped = partial(_checked_where_shapes_are, jaxtyping.jaxtyped)


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
