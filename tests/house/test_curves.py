"""Losses, logs and weights of short fits are what they were when they were recorded."""

import json
import math

import pytest

from tests.house.curves import CASES, CURVES, machine, run, write_data

RECORD = json.loads(CURVES.read_text())
TOLERANCE = 1e-5  # relative, on another machine or with other versions


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("curves")
    write_data(made)
    return made


def assert_close(found, expected):
    assert [entry[:2] for entry in found["scalars"]] == [entry[:2] for entry in expected["scalars"]]
    numbers = {name: [] for _, name, _ in expected["scalars"]}
    for (_, name, one), (_, _, other) in zip(found["scalars"], expected["scalars"], strict=True):
        numbers[name].append((float.fromhex(one), float.fromhex(other)))
    numbers["norm"] = [tuple(float.fromhex(curve["weights"]["norm"]) for curve in (found, expected))]
    for name, pairs in numbers.items():
        if name == "train/accuracy":  # rounding decides whether the margins of 0 at the start are above 0
            continue
        # Log-probabilities have an error of 1e-7 or so, of which alone the sampler's gap may consist.
        scale = max(0.1, *(abs(other) for _, other in pairs if math.isfinite(other)))
        for one, other in pairs:
            alike = math.isnan(one) and math.isnan(other)
            assert alike or abs(one - other) <= TOLERANCE * scale, (name, one, other)


def test_these_versions_and_this_processor_are_those_recorded():
    if machine() != RECORD["machine"]:
        pytest.skip(f"curves compared to {TOLERANCE}, not exactly: {machine()} is not {RECORD['machine']}")


def test_every_case_is_recorded_and_no_other():
    assert RECORD["curves"].keys() == CASES.keys()


@pytest.mark.filterwarnings("ignore")  # of Lightning's, about what these fits do on purpose
@pytest.mark.parametrize("name", CASES)
def test_losses_logs_and_weights_are_the_recorded_ones(name, folder, capfd):
    found, expected = run(name, folder), RECORD["curves"][name]
    assert_close(found, expected)
    if machine() == RECORD["machine"]:
        assert found == expected
