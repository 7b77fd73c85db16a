"""results/pixel_gap/run.py: the statistic against worked examples, the critic's explained variance,
the flags of a run, its loop against 05's; then the whole study, tiny."""

import importlib
import sys

import numpy as np
import pytest
import torch
from scipy import stats

import conftest  # noqa: F401  (the way to the scripts)
from envs import pixel_gap as world
from envs.gap_world import episode_seeds
from policies import load_policy

pixel_gap, statistic, common = map(importlib.import_module, (
    "results.pixel_gap.run", "results.pixel_gap.statistic", "results.common"))
compare = pixel_gap.compare


def run_rows(success, ood, algo="ppo", seed="0", scenes="64"):
    """A run as main.csv holds it; its three conditions differ, their mean is `ood`."""
    rows = [{"algo": algo, "seed": seed, "scenes": scenes, "iteration": str(20 * i), "id": str(s),
             "textures": str(o - 0.1), "gaps": str(o + 0.1), "both": str(o), "starts": "0.5",
             "critic_trained": "0.4", "critic_fresh": "0.3", "critic_unseen": "-0.1"}
            for i, (s, o) in enumerate(zip(success, ood))]
    return rows[::-1]


# ------------------------------------------------------------------------------------------------
# The statistic


def test_the_running_mean_is_of_three_of_two_at_the_end_and_leaves_the_clone_alone():
    assert statistic.smooth([0.0, 3.0, 6.0, 0.0]) == pytest.approx([0.0, 3.0, 3.0, 3.0])


@pytest.mark.parametrize("level, where", [(0.5, 0), (0.6, 0.5), (0.7, 1), (0.8, 2.5), (0.9, 3)])
def test_a_level_is_first_reached_between_two_evaluations(level, where):
    assert statistic.where_first(np.array([0.5, 0.7, 0.7, 0.9]), level
                                 ) == pytest.approx(where)


def test_runs_are_compared_where_both_are_equally_good_in_distribution():
    """Straight lines, which a running mean of three leaves alone inside. a reaches .8 smoothed at
    its end, b .6: c = .6. There a has OOD .1 + .5 * (.6 - .3) and b .2 + .1 * (.6 - .3) / .3."""
    x = np.linspace(0, 1, 21)
    a = run_rows(0.3 + 0.5 * x, 0.1 + 0.25 * x)
    b = run_rows(0.3 + 0.3 * x, 0.2 + 0.1 * x)
    level = (0.3 + 0.3 * x)[-2:].mean()                    # the highest that b's mean reaches
    wanted = 0.1 + 0.5 * (level - 0.3) - (0.2 + (level - 0.3) / 3)
    assert statistic.matched(a, b) == pytest.approx(wanted, abs=1e-3)
    assert statistic.matched(b, a) == pytest.approx(-wanted, abs=1e-3)
    assert statistic.matched(a, a) == 0
    for names, ahead in ((["id"], 0.2), (statistic.OOD, 0.05)):
        assert statistic.at_end(a, names) - statistic.at_end(b, names) == pytest.approx(ahead)


def test_a_method_that_never_rises_is_compared_at_the_clone():
    x = np.linspace(0, 1, 9)
    rising, falling = run_rows(0.5 + 0.4 * x, 0.2 + 0.5 * x), run_rows(0.5 - 0.3 * x, 0.2 - 0.1 * x)
    assert statistic.matched(rising, falling) == pytest.approx(0)


@pytest.mark.parametrize("gain, spread, verdict", [
    (0.08, 0.01, "supported"), (0.03, 0.005, "not supported here"), (0.03, 0.05, "undecided"),
    (-0.1, 0.01, "not supported here"), (0.045, 0.03, "undecided")])
def test_a_verdict_follows_the_rule_that_was_fixed(gain, spread, verdict):
    rows, x = [], np.linspace(0, 1, 9)
    gains = gain + spread * np.array([-1, -0.3, 0.3, 1.0])
    for seed, own in enumerate(gains):
        rows += run_rows(0.5 + 0.4 * x, 0.3 + 0.2 * x, "ppo", str(seed))
        rows += run_rows(0.5 + 0.4 * x, 0.3 + 0.2 * x + own, "stepnft", str(seed))
    row = next(r for r in statistic.verdicts(rows) if r["measure"].startswith("OOD at equal"))
    interval = stats.ttest_1samp(100 * gains, 0).confidence_interval(0.95)
    assert (row["comparison"], row["seeds"]) == ("stepnft - ppo", 4)
    assert (row["mean"], row["low"], row["high"]) == pytest.approx(
        (100 * gain, interval.low, interval.high), abs=1e-6)
    assert row["verdict"] == verdict


@pytest.mark.parametrize("lost, verdict", [([0.3, 0.35, 0.4], "overfits"),
                                           ([-0.3, 0.1, 0.4], "does not show")])
def test_the_critic_overfits_if_it_explains_less_elsewhere(lost, verdict):
    runs = {str(s): [{**row, "critic_fresh": str(0.1 + x), "critic_unseen": "0.1"}
                     for row in run_rows([0.5], [0.5], seed=str(s))] for s, x in enumerate(lost)}
    rows, scenes = statistic.critic_overfits(runs, "64"), statistic.critic_overfits(runs, "64")[1]
    assert [row["measure"] for row in rows] == ["explains trained - fresh",
                                                "explains fresh - unseen"]
    interval = stats.ttest_1samp(lost, 0).confidence_interval(0.95)
    assert (scenes["mean"], scenes["low"], scenes["high"]) == pytest.approx(
        (np.mean(lost), interval.low, interval.high))
    assert scenes["verdict"] == verdict


# ------------------------------------------------------------------------------------------------
# A run


def test_explained_variance_of_a_critic_that_knows_everything_the_mean_and_nothing(tmp_path):
    args = compare.parse_args(["--task", "PixelGap", "--out", str(tmp_path / "run")])
    episode, success = torch.tensor([0, 1, 0, 1, 0]), np.array([True, False])
    returns = torch.tensor([0.99**2, 0, 0.99, 0, 1])       # a reward of 1 in the last chunk

    class Still:
        def encode(self, batch):
            return batch["episode"]

    def critic(values):
        return lambda ctx, elapsed: values

    def explained(values):
        return pixel_gap.explained_variance(critic(values), Still(), args, {"episode": episode},
                                            success)

    assert explained(returns) == pytest.approx(1)
    assert explained(torch.full((5,), returns.mean().item())) == pytest.approx(0, abs=1e-6)
    assert explained(-returns) == pytest.approx(-3)
    assert explained(returns + 1) == pytest.approx(1)  # the level alone is wrong: no overfitting


@pytest.mark.parametrize("algo", pixel_gap.ALGOS)
def test_every_setting_of_the_grid_is_flags_that_05_takes(algo, tmp_path):
    grid = pixel_gap.grid(algo)
    assert len({tuple(sorted(setting.items())) for setting in grid}) == 12
    for setting in grid:
        job = {"algo": algo, "scenes": 64, "iterations": 160, "episodes": 512, "seed": 3, **setting}
        args = compare.parse_args(["--task", "PixelGap", "--out", str(tmp_path),
                                   *pixel_gap.flags_of(job)])
        assert (args.algo, args.scenes, args.seed, args.lr, args.noise_level) == (
            algo, 64, 3, setting["lr"], setting["noise_level"])
        assert (args.transitions, args.group_size, args.epochs, args.max_steps) == ("one", 8, 3, 24)
        if algo == "stepnft":
            assert common.text(args.ema) == setting["ema"]
        else:
            assert args.target_kl == setting["target_kl"]


@pytest.mark.parametrize("flags", ["--ema 0.1 0.5", "--algo ppo --target-kl 0.1",
                                   "--algo grpo --target-kl 0.1",
                                   "--algo ppo-action --noise-level 0.1"])
def test_its_loop_is_that_of_05(flags, tmp_path, monkeypatch, capsys):
    """From one clone, with the same flags, to the last bit: the policy that 05 saves, and the
    success that it validates."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(compare.pixel_gap.RUN, "sft_steps", 50)
    sft = pixel_gap.clone_of(3, 16)
    rest = (f"--task PixelGap --seed 3 --scenes 16 --iterations 3 --episodes 16 --eval-every 2 "
            f"--eval-episodes 20 --test-episodes 8 --device cpu --sft {sft} {flags}").split()
    monkeypatch.setattr(sys, "argv", ["05_train_maniskill.py", *rest, "--out", "theirs"])
    compare.main()
    args, seen = compare.parse_args([*rest, "--out", "mine"]), []

    def measure(iteration, policy, critic, batch, success):
        seeds = pixel_gap.episode_seeds("validation", 20)
        rate = pixel_gap.flow.evaluate(policy, world.PixelGap(16), seeds, 4).mean()
        seen.append((iteration, rate))
        assert (critic is None) == ("ppo" not in flags)
        assert (batch is None) == (success is None) == (iteration == 0)

    policy = pixel_gap.train(args, load_policy(sft), world.PixelGap(16), measure)
    for mine, theirs in zip(policy.parameters(), load_policy("theirs/last.pt").parameters()):
        assert torch.equal(mine, theirs)
    log = {int(row["iteration"]): row["eval_ode"] for row in common.read("theirs/log.csv")}
    assert [iteration for iteration, _ in seen] == [0, 2, 3]
    assert [rate for _, rate in seen[1:]] == [float(log[2]), float(log[3])]


def study_in(folder, monkeypatch, capsys, *flags):
    """The whole study with less of everything -> its RESULT line."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(common, "ROUNDS", ((100,), (101,)))
    monkeypatch.setattr(pixel_gap, "TESTED", (10, 10))
    monkeypatch.setattr(pixel_gap, "grid", lambda algo, grid=pixel_gap.grid: grid(algo)[:3])
    monkeypatch.setattr(pixel_gap, "episode_seeds", lambda split, count, *rest, **more: (
        episode_seeds(split, min(count, 32), *rest, **more)))      # 512 watch a critic
    monkeypatch.setitem(compare.pixel_gap.RUN, "sft_steps", 3)
    monkeypatch.setattr(sys, "argv", ["run.py", "--seeds", "2", "--dose-seeds", "1",
                                      "--iterations", "1", "--episodes", "8", "--jobs", "1",
                                      "--out", "out", *flags])
    pixel_gap.main()
    return capsys.readouterr().out.strip().splitlines()[-1]


def test_the_study_tiny_and_again(tmp_path, monkeypatch, capsys):
    told = study_in(tmp_path, monkeypatch, capsys)
    files = {name: common.read(tmp_path / "out" / f"{name}.csv") for name in (
        "tuning", "main", "dose", "verdicts")}
    assert len(files["tuning"]) == 4 * (3 + 3) and {r["seed"] for r in files["tuning"]} == {
        "100", "101"}
    assert len(files["main"]) == 4 * 2 * 2 and len(files["dose"]) == 2 * 2 * 2
    for row in files["main"]:
        for name in ("id", "textures", "gaps", "both", "starts"):
            assert 0 <= float(row[name]) <= 1
        watched = row["algo"].startswith("ppo") and row["iteration"] == "1"
        assert bool(row["critic_fresh"]) == bool(row["critic_trained"]) == watched
    for algo in pixel_gap.ALGOS:  # the setting with the best mean of the two that played on
        tuned = [row for row in files["tuning"] if row["algo"] == algo]
        left = [row for row in tuned if row["seed"] == "101"]
        names = ("lr", "noise_level", "ema", "target_kl")
        mean = {tuple(row[n] for n in names): np.mean([float(other["after"]) for other in tuned if [
            other[n] for n in names] == [row[n] for n in names]]) for row in left}
        used = {tuple(row[n] for n in names) for row in files["main"] if row["algo"] == algo}
        assert len(used) == 1 and mean[used.pop()] == max(mean.values())
    # a seed's methods start from one clone, and test it alike
    starts = {}
    for row in files["main"]:
        if row["iteration"] == "0":
            starts.setdefault(row["seed"], set()).add(tuple(row[c] for c in pixel_gap.CONDITIONS))
    assert len(starts) == 2 and all(len(same) == 1 for same in starts.values())
    assert {row["comparison"] for row in files["verdicts"]} == {
        "stepnft - ppo", "grpo - ppo", "stepnft - grpo", "ppo-action - ppo",
        "ppo-action - stepnft", "critic of ppo"}
    assert "RESULT runs=12" in told and (tmp_path / "out/pixel_gap.png").stat().st_size > 1e4
    monkeypatch.setattr(pixel_gap, "run", None)                           # all of it is there
    assert "RESULT runs=12" in study_in(tmp_path, monkeypatch, capsys)
