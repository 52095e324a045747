"""Rates that turn operations into seconds."""

from dataclasses import replace

import pytest

from rewarm.commands.plan_memory import work_of
from rewarm.costs import cost_rates
from rewarm.costs.cost_rates import Rates, measured, measured_for
from rewarm.costs.cost_step import work_cost
from tests.cost_configs import SHORT, config


def test_rates_turn_operations_into_seconds(tmp_path):
    made = work_cost(work_of(config(tmp_path, data=SHORT)))
    rates = Rates(1e9, float("inf"), float("inf"), "")
    assert rates.step_seconds(made) == pytest.approx(made.flops / 1e9)


def test_rates_of_this_machine_are_measured(tmp_path):
    rates = measured(work_of(config(tmp_path, data=SHORT)))
    assert 1e6 < rates.flops < 1e16
    assert 1e6 < rates.training_bytes < 1e14


def test_each_model_and_precision_is_measured_once(tmp_path, monkeypatch):
    seen = []

    def measure(work, clock):
        seen.append(work.precision)
        return Rates(float(len(seen)), 1.0, 1.0, "")

    monkeypatch.setattr(cost_rates, "measured", measure)
    wide = work_of(config(tmp_path, data=SHORT))
    narrow = replace(wide, precision="bf16-mixed")
    found = measured_for([wide, narrow, replace(wide, rows=7), narrow])
    assert [rates.flops for rates in found] == [1.0, 2.0, 1.0, 2.0]
    assert seen == ["32-true", "bf16-mixed"]
