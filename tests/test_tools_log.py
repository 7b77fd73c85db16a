"""tools/log.py: a csv that comes back, and curves that show its numbers."""

import csv
import math

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

import conftest  # noqa: F401  (the way to the tools)
from tools import log

matplotlib.use("Agg")


def test_a_log_has_one_header_and_rounds_numbers_to_five_decimals(tmp_path):
    path = tmp_path / "log.csv"
    log.log_row(path, {"iteration": 1, "loss": 0.123456789, "rate": ""})
    log.log_row(path, {"iteration": 2, "loss": np.float64(2 / 3), "rate": 0.5})
    assert path.read_text().splitlines() == ["iteration,loss,rate", "1,0.12346,", "2,0.66667,0.5"]


def test_a_name_with_a_comma_is_one_cell(tmp_path):
    log.log_row(tmp_path / "test.csv", {"policy": "a,b", "episodes": 7})
    with open(tmp_path / "test.csv", newline="") as file:
        assert list(csv.DictReader(file)) == [{"policy": "a,b", "episodes": "7"}]


def test_a_log_comes_back_with_nan_in_empty_cells(tmp_path):
    path = tmp_path / "log.csv"
    log.log_row(path, {"a": 1, "b": 0.5})
    log.log_row(path, {"a": 2, "b": ""})
    back = log.read_log(path)
    assert back["a"].tolist() == [1, 2] and back["b"][0] == 0.5 and math.isnan(back["b"][1])
    assert set(back) == {"a", "b"}


def three_iterations(path):
    for i, (train, rate, loss) in enumerate([(0.1, "", 0.7), (0.2, 0.4, 0.6), (0.3, 0.8, 0.5)], 1):
        log.log_row(path, {"episodes": 2000 * i, "train_sde": train, "eval_ode": rate,
                           "loss": loss})
    return path


def test_the_curves_show_every_rollout_each_evaluation_and_the_loss(tmp_path):
    """Against thousands of episodes; iterations without an evaluation leave no hole."""
    success, loss = Figure().subplots(1, 2)
    log.draw_learning(log.read_log(three_iterations(tmp_path / "log.csv")), success, loss)
    acting, trained = (line.get_xydata().tolist() for line in success.get_lines())
    assert acting == [[2, 0.1], [4, 0.2], [6, 0.3]] and trained == [[4, 0.4], [6, 0.8]]
    line, = loss.get_lines()
    assert line.get_xydata().tolist() == [[2, 0.7], [4, 0.6], [6, 0.5]]
    labels = [text.get_text() for text in success.get_legend().get_texts()]
    assert "old policy" in labels[0] and "trained policy" in labels[1]
    low, high = success.get_ylim()
    assert low == 0 and high == pytest.approx(1.02)


def test_a_picture_is_drawn_without_a_screen(tmp_path):
    log.learning_figure(three_iterations(tmp_path / "log.csv"), tmp_path / "learning.png")
    assert (tmp_path / "learning.png").stat().st_size > 5000
