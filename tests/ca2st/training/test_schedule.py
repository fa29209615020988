import math

import pytest

from ca2st.errors import UserInputError
from ca2st.training.config import OptimConfig
from ca2st.training.optim import LearningRateSchedule, schedule_for


def test_rates_equal_those_computed_by_hand() -> None:
    schedule = LearningRateSchedule(peak=8.0, minimum=2.0, warmup_steps=4, total_steps=12)
    by_hand = {
        0: 0.0,
        1: 2.0,
        3: 6.0,
        4: 8.0,
        6: 2 + 6 * (1 + math.sqrt(0.5)) / 2,
        8: 5.0,
        10: 2 + 6 * (1 - math.sqrt(0.5)) / 2,
    }
    assert {step: schedule.at(step) for step in by_hand} == pytest.approx(by_hand, abs=1e-12)
    assert schedule.at(12) == pytest.approx(2.0)


def test_the_published_ca2st_run_peaks_at_its_scaled_rate() -> None:
    config = OptimConfig(base_lr=5e-4, min_lr=1e-6, warmup_epochs=5.0)
    schedule = schedule_for(config, global_batch_size=192, epochs=50, steps_per_epoch=100)
    assert schedule.at(0) == 0.0
    assert schedule.at(250) == pytest.approx(0.5 * 5e-4 * 192 / 256)
    assert schedule.at(500) == pytest.approx(3.75e-4)
    assert schedule.at(5000) == pytest.approx(7.5e-7)
    assert max(schedule.at(step) for step in range(5000)) == schedule.at(500)


def test_a_run_without_warm_up_starts_at_its_peak() -> None:
    schedule = schedule_for(OptimConfig(warmup_epochs=0.0), global_batch_size=256, epochs=1, steps_per_epoch=10)
    assert schedule.at(0) == pytest.approx(1e-3)


def test_a_run_that_is_all_warm_up_never_divides_by_zero() -> None:
    schedule = LearningRateSchedule(peak=1.0, minimum=0.1, warmup_steps=4, total_steps=4)
    assert [schedule.at(step) for step in range(5)] == [0.0, 0.25, 0.5, 0.75, 0.1]


def test_a_warm_up_longer_than_the_run_is_refused() -> None:
    with pytest.raises(UserInputError, match=r"warmup_epochs: expected at most epochs = 2, found 5.0"):
        schedule_for(OptimConfig(), global_batch_size=256, epochs=2, steps_per_epoch=10)
