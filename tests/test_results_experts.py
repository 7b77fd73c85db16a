"""results/experts/run.py: the scripted controllers alone, on both simulators; wrong calls."""

import csv
import importlib

import pytest

from conftest import run_main, wrong_call

SCRIPT = "results/experts/run.py"
experts = importlib.import_module("results.experts.run")


def rows_of(tmp_path, *flags):
    code, out, _ = run_main(SCRIPT, *flags, "--num-envs", 2, "--out", tmp_path / "e.csv")
    assert code is None and out.strip().split("\n")[-1].startswith("RESULT ")
    with open(tmp_path / "e.csv", newline="") as file:
        return out, list(csv.DictReader(file))


@pytest.mark.sim
def test_two_tasks_of_libero(tmp_path, monkeypatch):
    monkeypatch.setattr(experts.libero, "NUM_OFFICIAL", 2)
    out, rows = rows_of(tmp_path, "libero", "--suite", "libero_object", "--tasks", 9, 0)
    assert [(row["suite"], row["task"], row["episodes"], row["success"], row["max_steps"])
            for row in rows] == [("libero_object", task, "2", "1.0", "280") for task in "09"]
    assert "orange juice" in rows[1]["instruction"] and "rows=2 worst=1.000" in out
    # Wilson's interval of two out of two: z^2 = 3.84, from 2 / (2 + z^2) to 1
    assert all(float(row["low"]) == pytest.approx(2 / 5.84, abs=1e-3) and row["high"] == "1.0"
               and 40 < float(row["mean_steps"]) < 150 for row in rows)


@pytest.mark.sim
def test_a_task_of_maniskill_and_its_variants(tmp_path, monkeypatch):
    variants = experts.maniskill.variants("PickCube-v1", "state")
    chosen = [variants[0], next(v for v in variants if v[2] == {"moved": 0.03})]
    monkeypatch.setattr(experts.maniskill, "variants", lambda task, obs: chosen)
    rows_of(tmp_path, "maniskill", "--episodes", 4)
    _, rows = rows_of(tmp_path, "maniskill", "--episodes", 4, "--ood")  # its rows are added
    first, again, moved = rows
    assert first == again and first["success"] == "1.0" and first["episodes"] == "4"
    assert first["variant"] == "as in training" and moved["variant"] == chosen[1][1]
    assert moved["mean_steps"] != first["mean_steps"]
    assert 5 < float(first["mean_steps"]) < 24 == int(first["max_steps"])


@pytest.mark.parametrize("flags, told", [
    ([], "libero | maniskill"),
    (["robocasa"], "robocasa"),
    (["libero", "--suite", "libero_objects"], "--suite libero_objects"),
    (["libero", "--suite", "libero_10", "--tasks", "2"], "--tasks 2: in libero_10"),
    (["libero", "--tasks", "0", "10"], "--tasks 10: in libero_object"),
    (["libero", "--ood"], "--ood"),
    (["maniskill", "--tasks", "0"], "--tasks"),
    (["maniskill", "--task", "PickTube-v1"], "--task PickTube-v1"),
    (["maniskill", "--episodes", "0"], "--episodes"),
    (["maniskill", "--out", "."], "--out ."),
    (["maniskill", "--out", "a_file"], "--out a_file is no table"),
    (["maniskill", "--out", "a_file/x.csv"], "--out a_file"),
])
def test_a_wrong_call_is_told_in_one_line(flags, told):
    assert told in wrong_call(SCRIPT, *flags)


def test_the_help_of_a_world_names_it():
    code, told, _ = run_main(SCRIPT, "libero", "--help")
    assert code == 0 and told.startswith("usage: run.py libero ") and "--suite" in told
