import runpy
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "plug_into_your_project.py"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_example_is_short_and_learns():
    assert len(EXAMPLE.read_text().splitlines()) < 60
    assert runpy.run_path(str(EXAMPLE))["main"]() > 0.95
