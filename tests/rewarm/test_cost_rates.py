"""Rates that turn operations into seconds."""

import pytest

from rewarm.cost_rates import Rates, measured
from rewarm.cost_step import work_cost
from rewarm.cost_work import read_work
from tests.cost_configs import SHORT, config


def test_rates_turn_operations_into_seconds(tmp_path):
    made = work_cost(read_work(config(tmp_path, data=SHORT)))
    rates = Rates(1e9, float("inf"), float("inf"), "")
    assert rates.step_seconds(made) == pytest.approx(made.flops / 1e9)


def test_rates_of_this_machine_are_measured(tmp_path):
    rates = measured(read_work(config(tmp_path, data=SHORT)))
    assert 1e6 < rates.flops < 1e16
    assert 1e6 < rates.training_bytes < 1e14
