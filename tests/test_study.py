"""results/study.py: the csv that resumes, the tuning by halving, paired intervals."""

import functools
import importlib
import os
import sys

import numpy as np
import pytest
from scipy import stats

from conftest import ROOT

sys.path.insert(0, str(ROOT / "results"))
study = importlib.import_module("study")


def square(job):
    """A run that can be sent to another process."""
    return {"after": job["x"] ** 2}


def jobs_of(xs, **more):
    return [{"x": x, **more} for x in xs]


@pytest.mark.parametrize("workers", [1, 2])
def test_rows_of_the_same_job_are_kept_and_others_are_added(tmp_path, workers):
    path, calls = tmp_path / "a.csv", []
    study.collect(jobs_of([1, 2], lr=1e-3), square, path, workers)
    study.collect(jobs_of([2, 3], lr=1e-3), square, path, workers)
    study.collect(jobs_of([3], lr=3e-4), square, path, workers)
    rows = study.read(path)
    assert sorted((row["x"], row["lr"], row["after"]) for row in rows) == [
        ("1", "0.001", "1"), ("2", "0.001", "4"), ("3", "0.0003", "9"), ("3", "0.001", "9")]
    study.collect(jobs_of([3], lr=3e-4), calls.append, path, workers)
    assert not calls                                                      # nothing again
    assert study.rows_of(jobs_of([3, 7], lr=3e-4), path) == [rows[-1]]


def test_a_job_may_have_a_row_for_each_point_of_a_curve(tmp_path):
    path = tmp_path / "a.csv"
    for _ in range(2):
        study.collect(jobs_of([5]), lambda job: [{"t": t, "y": t * job["x"]} for t in (1, 2)], path)
    assert study.read(path) == [{"x": "5", "t": "1", "y": "5"}, {"x": "5", "t": "2", "y": "10"}]


def test_a_job_that_is_stopped_while_its_rows_are_written_leaves_none(tmp_path):
    """A half-written curve would count as done."""
    class Stop:
        def __str__(self):
            raise KeyboardInterrupt

    path = tmp_path / "a.csv"
    study.collect(jobs_of([5]), lambda job: [{"y": 0.123456}], path)
    before = path.read_text()
    with pytest.raises(SystemExit, match="goes on"):
        study.collect(jobs_of([6]), lambda job: [{"y": 1}, {"y": Stop()}], path)
    assert path.read_text() == before == "x,y\n5,0.12346\n"
    study.collect(jobs_of([6]), lambda job: [{"y": 1}, {"y": 2}], path)
    assert [(row["x"], row["y"]) for row in study.read(path)] == [
        ("5", "0.12346"), ("6", "1"), ("6", "2")]


def test_cores_are_counted_where_no_limit_can_be_asked_for(monkeypatch):
    assert 1 <= study.cores() <= os.cpu_count()
    monkeypatch.delattr(os, "sched_getaffinity")
    assert study.cores() == os.cpu_count()


def test_settings_are_found_again_as_the_csv_writes_them(tmp_path):
    path = tmp_path / "a.csv"
    jobs = [{"ema": ema, "lr": lr, "kl": ""} for ema in ([0.1, 0.995], "0.9 0.9")
            for lr in (1e-5, 3e-4)]
    study.collect(jobs, lambda job: {"after": 1}, path)
    assert [row["ema"] for row in study.rows_of(jobs, path)] == ["0.1 0.995"] * 2 + ["0.9 0.9"] * 2
    study.collect(jobs, None, path)                                       # all of them are there


def test_an_interrupted_study_leaves_what_it_had_and_goes_on(tmp_path):
    path, played = tmp_path / "a.csv", []

    def impatient(job):
        if job["x"] == 2 and len(played) == 2:
            played.append("stop")
            raise KeyboardInterrupt
        played.append(job["x"])
        return square(job)

    with pytest.raises(SystemExit, match="goes on"):
        study.collect(jobs_of(range(4)), impatient, path)
    assert [row["x"] for row in study.read(path)] == ["0", "1"]
    study.collect(jobs_of(range(4)), impatient, path)
    assert played == [0, 1, "stop", 2, 3]


def noisy(best, job):
    """Nearer to the arm's best is better; seed 100 alone says otherwise about setting 5."""
    lucky = 4 * (job["seed"] == 100 and job["g"] == 5)
    return {"after": -abs(job["g"] - best[job["arm"]]) + lucky}


def test_tuning_halves_the_grid_on_seeds_of_its_own_and_finds_each_arms_best(tmp_path):
    path, best = tmp_path / "tuning.csv", {"a": 7, "b": 1}
    grid, arms = [{"g": g} for g in range(12)], [{"arm": "a"}, {"arm": "b"}]
    found = study.tune(arms, grid, functools.partial(noisy, best), path)
    assert found == [{"g": 7}, {"g": 1}]
    rows = study.read(path)
    count = {seed: sum(row["seed"] == seed for row in rows)
             for seed in ("100", "101", "102", "103")}
    assert count == {"100": 24, "101": 12, "102": 6, "103": 6}            # 12, 6, 3, 3 an arm
    assert {row["g"] for row in rows if (row["arm"], row["seed"]) == ("b", "103")} <= set("01235")
    study.tune(arms, grid, None, path)                                    # all of it is there


def test_two_settings_both_play_every_seed(tmp_path):
    study.tune([{"arm": "a"}], [{"g": 0}, {"g": 5}], functools.partial(noisy, {"a": 0}),
               tmp_path / "t.csv")
    assert len(study.read(tmp_path / "t.csv")) == 8


@pytest.mark.parametrize("seeds", [2, 5, 12])
def test_a_difference_is_paired_by_seed_with_scipys_interval(seeds):
    a, b = np.random.default_rng(seeds).random((2, seeds))
    order = np.random.default_rng(1).permutation(seeds)
    mean, low, high = study.difference({s: a[s] for s in range(seeds)},
                                       {int(s): b[s] for s in order} | {99: 3.0})
    paired = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (mean, low, high) == pytest.approx(((a - b).mean(), paired.low, paired.high))
    assert np.isnan(study.half_interval([0.3]))
