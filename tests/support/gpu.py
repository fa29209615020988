"""The CUDA device of a test marked gpu."""

import os

import pytest
import torch


def require_gpu() -> torch.device:
    """A CUDA device; without one the test is skipped, or fails where CA2ST_REQUIRE_GPU=1 promises one."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if os.environ.get("CA2ST_REQUIRE_GPU") == "1":
        pytest.fail("CA2ST_REQUIRE_GPU=1, but torch finds no CUDA device")
    pytest.skip("needs a CUDA device")
