"""What the picture and the table of schedules show, read back from the files."""

import csv

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from rewarm.functional.schedule import cosine, linear
from rewarm.schedule_plot import draw

CURVES = {
    "cosine": [3e-4 * cosine(10)(n, 100) for n in range(1, 101)],
    "linear, short": [1e-4 * linear(5)(n, 60) for n in range(1, 61)],
}


def test_the_table_has_every_value_in_full(tmp_path):
    draw(CURVES, csv=tmp_path / "lr.csv")
    with (tmp_path / "lr.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["step", "cosine", "linear, short"]
    assert [row[0] for row in rows] == [str(n) for n in range(1, 101)]
    for column, values in enumerate(CURVES.values(), start=1):
        cells = [row[column] for row in rows]
        assert [float(cell) for cell in cells if cell] == values
        assert set(cells[len(values) :]) <= {""}


def pixels(path, colour):
    """Rows and columns of the pixels of a colour below the legend, which is at the top."""
    image = imread(path)[60:, :, :3]
    return np.nonzero(np.abs(image - np.array(to_rgb(colour))).max(-1) < 0.02)


def test_the_picture_shows_every_curve(tmp_path):
    draw({"up": [0.0, 1.0], "flat": [0.25] * 2}, plot=tmp_path / "lr.png")
    up_rows, up_columns = pixels(tmp_path / "lr.png", "C0")
    flat_rows, flat_columns = pixels(tmp_path / "lr.png", "C1")
    bottom, top = up_rows.max(), up_rows.min()  # rows count from the top
    assert up_rows[up_columns.argmin()] == pytest.approx(bottom, abs=3)
    assert up_rows[up_columns.argmax()] == pytest.approx(top, abs=3)
    assert (bottom - flat_rows.mean()) / (bottom - top) == pytest.approx(0.25, abs=0.01)
    assert np.ptp(up_columns) == pytest.approx(np.ptp(flat_columns), abs=5)
    assert np.ptp(up_columns) > 900
    assert bottom - top > 400


def test_both_files_and_their_folders_are_made(tmp_path):
    draw(CURVES, tmp_path / "a" / "lr.png", tmp_path / "b" / "c" / "lr.csv")
    assert (tmp_path / "a" / "lr.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "b" / "c" / "lr.csv").exists()


def test_a_run_of_one_step_is_visible(tmp_path):
    draw({"one": [1e-3]}, plot=tmp_path / "lr.png")
    assert len(pixels(tmp_path / "lr.png", "C0")[0]) > 20


def test_the_suffix_is_the_format(tmp_path):
    draw(CURVES, plot=tmp_path / "lr.svg")
    assert "<svg" in (tmp_path / "lr.svg").read_text()
    with pytest.raises(ValueError, match="Format 'xyz' is not supported"):
        draw(CURVES, plot=tmp_path / "lr.xyz")


@pytest.mark.parametrize("curves", [{}, {"none": []}, {"some": [1.0], "none": []}])
def test_curves_without_steps_are_refused(tmp_path, curves):
    with pytest.raises(ValueError, match=r"curves have \["):
        draw(curves, csv=tmp_path / "lr.csv")


def test_nowhere_to_write_is_refused():
    with pytest.raises(ValueError, match="plot and csv are None"):
        draw(CURVES)
