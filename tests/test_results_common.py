"""results/common.py: the csv that resumes, the tuning by halving, paired intervals, the scripts
that a study calls. And results/toy/run.py and results/maniskill/run.py, which are little else."""

import functools
import importlib
import os
import sys
from pathlib import Path

import numpy as np
import pytest

import conftest  # noqa: F401  (the way to the scripts)

common = importlib.import_module("results.common")


def square(job):
    """A run that can be sent to another process."""
    return {"after": job["x"] ** 2}


def jobs_of(xs, **more):
    return [{"x": x, **more} for x in xs]


@pytest.mark.parametrize("workers", [1, 2])
def test_rows_of_the_same_job_are_kept_and_others_are_added(tmp_path, workers):
    path, calls = tmp_path / "a.csv", []
    common.collect(jobs_of([1, 2], lr=1e-3), square, path, workers)
    common.collect(jobs_of([2, 3], lr=1e-3), square, path, workers)
    common.collect(jobs_of([3], lr=3e-4), square, path, workers)
    rows = common.read(path)
    assert sorted((row["x"], row["lr"], row["after"]) for row in rows) == [
        ("1", "0.001", "1"), ("2", "0.001", "4"), ("3", "0.0003", "9"), ("3", "0.001", "9")]
    common.collect(jobs_of([3], lr=3e-4), calls.append, path, workers)
    assert not calls                                                      # nothing again
    assert common.rows_of(jobs_of([3, 7], lr=3e-4), path) == [rows[-1]]


def test_a_job_may_have_a_row_for_each_point_of_a_curve(tmp_path):
    path = tmp_path / "a.csv"
    for _ in range(2):
        common.collect(jobs_of([5]), lambda job: [{"t": t, "y": t * job["x"]} for t in (1, 2)],
                       path)
    assert common.read(path) == [{"x": "5", "t": "1", "y": "5"}, {"x": "5", "t": "2", "y": "10"}]


def test_a_job_that_is_stopped_while_its_rows_are_written_leaves_none(tmp_path):
    """A half-written curve would count as done."""
    class Stop:
        def __str__(self):
            raise KeyboardInterrupt

    path = tmp_path / "a.csv"
    common.collect(jobs_of([5]), lambda job: [{"y": 0.123456}], path)
    before = path.read_text()
    with pytest.raises(SystemExit, match="goes on"):
        common.collect(jobs_of([6]), lambda job: [{"y": 1}, {"y": Stop()}], path)
    assert path.read_text() == before == "x,y\n5,0.12346\n"
    common.collect(jobs_of([6]), lambda job: [{"y": 1}, {"y": 2}], path)
    assert [(row["x"], row["y"]) for row in common.read(path)] == [
        ("5", "0.12346"), ("6", "1"), ("6", "2")]


def test_cores_are_counted_where_no_limit_can_be_asked_for(monkeypatch):
    assert 1 <= common.cores() <= os.cpu_count()
    monkeypatch.delattr(os, "sched_getaffinity")
    assert common.cores() == os.cpu_count()


def test_settings_are_found_again_as_the_csv_writes_them(tmp_path):
    path = tmp_path / "a.csv"
    jobs = [{"ema": ema, "lr": lr, "kl": ""} for ema in ([0.1, 0.995], "0.9 0.9")
            for lr in (1e-5, 3e-4)]
    common.collect(jobs, lambda job: {"after": 1}, path)
    assert [row["ema"] for row in common.rows_of(jobs, path)] == ["0.1 0.995"] * 2 + ["0.9 0.9"] * 2
    common.collect(jobs, None, path)                                       # all of them are there


def test_an_interrupted_study_leaves_what_it_had_and_goes_on(tmp_path):
    path, played = tmp_path / "a.csv", []

    def impatient(job):
        if job["x"] == 2 and len(played) == 2:
            played.append("stop")
            raise KeyboardInterrupt
        played.append(job["x"])
        return square(job)

    with pytest.raises(SystemExit, match="goes on"):
        common.collect(jobs_of(range(4)), impatient, path)
    assert [row["x"] for row in common.read(path)] == ["0", "1"]
    common.collect(jobs_of(range(4)), impatient, path)
    assert played == [0, 1, "stop", 2, 3]


def noisy(best, job):
    """Nearer to the variant's best is better; seed 100 alone says otherwise about setting 5."""
    lucky = 4 * (job["seed"] == 100 and job["g"] == 5)
    return {"after": -abs(job["g"] - best[job["name"]]) + lucky}


def test_tuning_halves_the_grid_on_seeds_of_its_own_and_finds_each_variants_best(tmp_path):
    path, best = tmp_path / "tuning.csv", {"a": 7, "b": 1}
    grid, variants = [{"g": g} for g in range(12)], [{"name": "a"}, {"name": "b"}]
    found = common.tune(variants, grid, functools.partial(noisy, best), path)
    assert found == [{"g": 7}, {"g": 1}]
    rows = common.read(path)
    count = {seed: sum(row["seed"] == seed for row in rows)
             for seed in ("100", "101", "102", "103")}
    assert count == {"100": 24, "101": 12, "102": 6, "103": 6}            # 12, 6, 3, 3 each
    assert {row["g"] for row in rows if (row["name"], row["seed"]) == ("b", "103")} <= set("01235")
    common.tune(variants, grid, None, path)                                    # all of it is there


def test_two_settings_both_play_every_seed(tmp_path):
    common.tune([{"name": "a"}], [{"g": 0}, {"g": 5}], functools.partial(noisy, {"a": 0}),
               tmp_path / "t.csv")
    assert len(common.read(tmp_path / "t.csv")) == 8


@pytest.mark.parametrize("seeds", [2, 5, 12])
def test_a_difference_is_paired_by_seed_with_scipys_interval(seeds):
    from scipy import stats  # not at the top: every worker process would load it
    a, b = np.random.default_rng(seeds).random((2, seeds))
    order = np.random.default_rng(1).permutation(seeds)
    mean, low, high = common.difference({s: a[s] for s in range(seeds)},
                                       {int(s): b[s] for s in order} | {99: 3.0})
    paired = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (mean, low, high) == pytest.approx(((a - b).mean(), paired.low, paired.high))
    assert np.isnan(common.half_interval([0.3]))


# ------------------------------------------------------------------------------------------------
# Scripts that a study calls


def test_what_a_script_printed_last_is_read():
    told = common.call("notebooks/execute.py --help")
    assert "NAME" in told
    line = "progress\nRESULT sft=0.540 stepnft=0.751 episodes=81920 saved=a=b\n"
    assert common.result_line(line) == {"sft": "0.540", "stepnft": "0.751", "episodes": "81920",
                                        "saved": "a=b"}
    with pytest.raises(AssertionError, match="expected a line RESULT"):
        common.result_line("nothing of the kind")


def fail(job):
    """A run that can be sent to another process."""
    common.call("notebooks/execute.py --nonsense")


def test_a_script_that_fails_is_named_in_one_line_and_leaves_no_row(tmp_path, capfd):
    """In a process of its own; in this one: test_results_libero."""
    with pytest.raises(SystemExit, match="for the reason above: notebooks/execute.py --nonsense$"):
        common.collect(jobs_of([1, 2]), fail, tmp_path / "a.csv", 2)
    assert "--nonsense" in capfd.readouterr().err and not list(tmp_path.iterdir())


def test_rows_are_sorted_as_the_jobs_and_others_are_kept(tmp_path):
    path = tmp_path / "a.csv"
    common.collect(jobs_of([9, 2, 10, 1]), square, path)
    rows = common.sort_rows(jobs_of([1, 2, 10, 11]), path)
    assert [row["x"] for row in rows] == ["1", "2", "10"]
    assert common.read(path) == rows + [{"x": "9", "after": "81"}]


def played(commands, files):
    """In place of `call`: the script is a function that writes files and prints a result."""
    def call(command):
        commands.append(command)
        folder = Path(command.split("--out ")[1])
        folder.mkdir(parents=True, exist_ok=True)
        seed = folder.name.removeprefix("seed")
        for name in files:
            (folder / name).write_text(f"{name} of seed {seed}")
        return (f"bar\nRESULT sft=0.{seed}00 stepnft=0.{seed}50 episodes=512 env_steps=99 "
                "seconds=7\n")
    return call


@pytest.mark.parametrize("name, script, columns", [
    ("toy", "03_step_loss.py", "command,sft,stepnft,test_episodes,rl_episodes,seconds"),
    ("maniskill", "05_train_maniskill.py",
     "command,sft,stepnft,test_episodes,rl_episodes,env_steps,seconds")])
def test_a_study_of_seeds_runs_its_script_and_keeps_tables_and_logs(name, script, columns, tmp_path,
                                                                   monkeypatch, capsys):
    study, commands = importlib.import_module(f"results.{name}.run"), []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "call", played(commands, ("log.csv", "test.csv", "learning.png")))
    monkeypatch.setattr(sys, "argv", ["run.py", "--seeds", "2", "--out", "out", "--runs", "runs"])
    study.main()
    assert commands == [f"{script} --seed {seed} --out {tmp_path}/runs/seed{seed}"
                        for seed in (0, 1)]
    first, *rows = (tmp_path / "out/summary.csv").read_text().splitlines()
    assert first == columns
    for seed, row in enumerate(rows):
        assert row.startswith(f"{script} --seed {seed},0.{seed}00,0.{seed}50,")
        assert (tmp_path / f"out/seed{seed}.csv").read_text() == f"log.csv of seed {seed}"
    with_test = (tmp_path / "out/seed1_test.csv").exists()
    assert with_test == (name == "maniskill")
    assert (tmp_path / "out/learning.png").exists() == (name == "toy")
    study.main()                                                          # all of it is there
    assert len(commands) == 2 and len(rows) == 2


def test_a_run_of_05_that_was_cut_goes_on(tmp_path, monkeypatch, capsys):
    study, commands = importlib.import_module("results.maniskill.run"), []
    monkeypatch.setattr(common, "call", played(commands, ("log.csv", "test.csv")))
    (tmp_path / "seed0").mkdir()
    (tmp_path / "seed0/last.pt").touch()
    study.run({"command": "05_train_maniskill.py --seed 0"}, tmp_path, tmp_path)
    assert commands == [f"05_train_maniskill.py --resume --out {tmp_path}/seed0"]


@pytest.mark.parametrize("name, script, tested", [("toy", "03_step_loss", 1000),
                                                  ("maniskill", "05_train_maniskill", 400)])
def test_a_row_tells_how_many_episodes_its_script_tests(name, script, tested, tmp_path):
    """05's default; 03 has no flag for it, so the call in its code is counted."""
    study = importlib.import_module(f"results.{name}.run")
    assert study.TEST_EPISODES == tested
    module = importlib.import_module(script)
    if name == "toy":
        assert 'episode_seeds("test", 1000)' in Path(module.__file__).read_text()
    else:
        assert module.parse_args(["--out", str(tmp_path)]).test_episodes == tested
