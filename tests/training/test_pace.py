"""How a training spends a limited time."""

import time

import pytest
from accelerate import Accelerator

from restnet_hf.training.pace import Pace


@pytest.mark.parametrize(
    "seconds, evaluation, evaluations", [(None, 50.0, 20), (100.0, 0.1, 20), (100.0, 2.0, 6), (100.0, 11.0, 1)]
)
def test_evaluations_take_a_tenth_of_a_limited_time(seconds, evaluation, evaluations):
    """Besides the last one; without a limit there are as many as are wanted."""
    pace = Pace(1000, seconds, time.perf_counter(), 0.1, 100, Accelerator())
    assert pace.evaluations == 20  # none was measured yet
    pace.evaluated(evaluation)
    assert pace.evaluations == evaluations
    pace.progress = 0.999
    assert pace.evaluation_number == evaluations - 1
    pace.progress = 1.0
    assert pace.evaluation_number == evaluations
