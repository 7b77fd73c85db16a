"""results/recovery/run.py: its worlds by hand, what is counted, differences; the study, tiny."""

import importlib
import sys

import numpy as np
import pytest
import torch
from scipy import stats

import conftest  # noqa: F401  (the way to the scripts)
from envs.gap_world import GapWorld, episode_seeds, expert

recovery, common = map(importlib.import_module, ("results.recovery.run", "results.common"))
SEEDS = episode_seeds("test", 50)


def test_a_push_comes_once_after_the_first_chunk_sideways():
    """Robots that stand still: where they are after each chunk."""
    still = lambda obs: (torch.zeros(len(obs["state"]), 4, 2), {})          # noqa: E731
    world = recovery.Pushed(0.15)
    _, rows = world.play(still, SEEDS)
    assert np.abs(world.trail[0][:, 1]).max() <= 0.3
    moved = rows["state"].view(6, 50, 3)[:, :, 1] - torch.from_numpy(world.trail[0][:, 1]).float()
    assert (moved[0] == 0).all() and (moved[1:].abs() - 0.15).abs().max() < 1e-6
    up = (moved[1] > 0).float().mean().item()
    assert 0.3 < up < 0.7 and (moved[1:] == moved[1]).all()


def test_who_is_pushed_after_the_end_stays_there():
    world = recovery.Pushed(0.15)
    world.reset(SEEDS)
    world.over[:] = True
    before = world.position.copy()
    world.step(np.ones((50, 4, 2)))
    np.testing.assert_array_equal(world.position, before)


def test_the_diary_counts_each_move_where_it_ended():
    world, counted = recovery.Diary(), GapWorld(0.3)
    for seeds in (SEEDS, episode_seeds("train", 20)):
        world.play(expert, seeds)
    _, first = counted.play(expert, SEEDS)
    _, second = counted.play(expert, episode_seeds("train", 20))
    assert world.places.sum() == len(first["state"]) + len(second["state"])
    assert world.places[:, 45:].sum() == 0                  # the expert never goes above y = 0.5


def test_success_is_by_where_an_episode_starts(monkeypatch):
    """A policy of which everything is known: it succeeds where |y| is below 0.5, and nobody who
    was pushed does."""
    def evaluate(policy, world, seeds, num_steps):
        pushed = isinstance(world, recovery.Pushed)
        away = np.abs(world.reset(seeds)["state"][:, 1].numpy())
        return (away < 0.5) & (not pushed)

    monkeypatch.setattr(recovery.flow, "evaluate", evaluate)
    told = recovery.tested(None, 4)
    assert told["visited"] == 1 and told["push_0.15"] == told["push_0.3"] == 0
    assert told["unvisited"] == pytest.approx(1 / 3, abs=0.03)              # .3 to .5 of .3 to .9
    assert [told[f"start_{i / 10}"] for i in range(9)] == [1] * 5 + [0] * 4


def test_differences_are_paired_by_seed(tmp_path, capsys):
    rng, rows, values = np.random.default_rng(0), [], {}
    for seed in range(5):
        for way in ("ode", "next-0.5"):
            values[way, seed], sft = rng.random(), 0.1 * seed
            rows.append({"way": way, "seed": str(seed), **{
                name: str(value) for test in recovery.TESTS
                for name, value in ((test, values[way, seed]), (f"sft_{test}", sft))}})
    recovery.verdicts(rows, tmp_path / "verdicts.csv")
    found = {row["comparison"]: row for row in common.read(tmp_path / "verdicts.csv")
             if row["test"] == "unvisited"}
    assert set(found) == {"next-0.5 - ode", "ode - sft", "next-0.5 - sft"}
    gains = [values["next-0.5", seed] - values["ode", seed] for seed in range(5)]
    interval = stats.ttest_1samp(gains, 0).confidence_interval(0.95)
    row = found["next-0.5 - ode"]
    assert [float(row[name]) for name in ("mean", "low", "high")] == pytest.approx(
        [np.mean(gains), interval.low, interval.high], abs=1e-4)


def study_in(folder, monkeypatch, *flags):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(common, "ROUNDS", ((100,), (101,)))
    monkeypatch.setattr(recovery, "GRID", recovery.GRID[:2])
    monkeypatch.setattr(recovery, "TEST_EPISODES", 150)
    monkeypatch.setattr(recovery.flow, "toy_policy", lambda seed: (
        torch.manual_seed(seed), recovery.flow.FlowPolicy(4, 2, 3, width=8))[-1])
    monkeypatch.setattr(sys, "argv", ["run.py", "--iterations", "1", "--episodes", "8", "--jobs",
                                      "1", "--out", "out", *flags])
    recovery.main()


def test_the_study_tiny_and_an_arm_of_a_seed_alone(tmp_path, monkeypatch, capsys):
    study_in(tmp_path, monkeypatch, "--seeds", "2")
    rows = common.read(tmp_path / "out/recovery.csv")
    assert {(row["way"], row["seed"]) for row in rows} == {
        (way, seed) for way in recovery.WAYS for seed in ("30", "31")}
    assert (tmp_path / "out/recovery.png").stat().st_size > 1e4
    assert "RESULT ways=5 runs=10" in capsys.readouterr().out
    row = next(row for row in rows if row["way"] == "next-0.5" and row["seed"] == "31")
    study_in(tmp_path, monkeypatch, "next-0.5", "--seed", "31")             # nothing is tuned again
    told = capsys.readouterr().out
    assert f"unvisited={float(row['unvisited']):.3f} visited={float(row['visited']):.3f}" in told
    assert common.read(tmp_path / "out/recovery.csv") == rows


@pytest.mark.parametrize("call, named", [
    ("next-0.3", "next-0.5"), ("ode --out results/recovery", "--out"), ("ode --seed 101", "--seed"),
    ("--first-seed 95", "--seeds")])
def test_a_call_that_cannot_work_is_one_line(call, named, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        study_in(tmp_path, monkeypatch, *call.split())
    err = capsys.readouterr().err
    assert named in err and len(err.strip().splitlines()) == 1 and not list(tmp_path.iterdir())
