"""A case in a process of its own. The process imports torch anew, so these tests are slow."""

import os
import signal

import pytest

from ca2st.benchmark.case import CaseSpec
from ca2st.benchmark.model import RemoteCase, case_in_process
from ca2st.errors import CA2STError, EnvironmentFault
from support.models import TINY_CLIP, tiny_config

pytestmark = pytest.mark.slow


def _spec(**changes) -> CaseSpec:
    settings = {"config": tiny_config("cava"), "device": "cpu", "variant": "ours", "precision": "fp32"} | changes
    return CaseSpec(clip=TINY_CLIP, per_device_batch_size=1, **settings)


def test_a_process_measures_tells_its_faults_and_when_it_dies():
    with case_in_process(_spec()) as case:
        assert isinstance(case, RemoteCase)
        assert case.seconds("forward") > 0
        case.reset_peak()
        assert case.seconds("training") > 0
        assert case.peak_bytes() > 0
        with pytest.raises(CA2STError, match=r"cava, ours: Traceback(.|\n)*no_such_question"):
            case._ask("no_such_question")
        os.kill(case._process.pid, signal.SIGKILL)
        with pytest.raises(EnvironmentFault, match=r"cava, ours: .*exit code -9.*--batch"):
            case.seconds("forward")
    assert not case._process.is_alive()
