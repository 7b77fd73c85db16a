"""results/mechanism/run.py against a linear flow, for which every part is known in closed form."""

import csv
import importlib
import sys

import numpy as np
import pytest
import torch

import conftest  # noqa: F401  (the way to the scripts)
from envs import gap_world

mechanism = importlib.import_module("results.mechanism.run")


class LinearFlow(torch.nn.Module):
    """v = c(t) x_t, so every later point is a number times x_t plus Gaussian noise."""

    horizon, action_dim = 2, 1

    def encode(self, obs):
        return torch.zeros(len(obs["state"]), 0)

    def velocity(self, x_t, t, ctx):
        return (0.4 + 0.5 * t)[:, None, None] * x_t


def slow_parts(x_t, k, a, target):
    """Energy of the three parts for one number x_t, by scalar recursion (K = 4)."""
    times = [1, 0.75, 0.5, 0.25, 0]

    def step(k):                                       # x_next = slope x_t + std noise
        t, after = times[k], times[k + 1]
        dt, v = t - after, 0.4 + 0.5 * t
        sigma = a * (t / (1 - (times[1] if t == 1 else t)))**0.5
        slope = 1 - dt * v - sigma**2 * dt / (2 * t) * (1 + (1 - t) * v)
        return slope, sigma * dt**0.5

    slope, std = step(k)
    if target == "next":
        return 0.0, std**2, 0.0
    rest, later = 1.0, 0.0                             # x_0 = rest x_next + noise of variance later
    for j in range(k + 1, 4):
        s, spread = step(j)
        rest, later = s * rest, s**2 * later + spread**2
    x0_hat = x_t - times[k] * (0.4 + 0.5 * times[k]) * x_t
    return (rest * slope * x_t - x0_hat)**2, rest**2 * std**2, later


@pytest.mark.parametrize("target", ["next", "endpoint"])
@pytest.mark.parametrize("k", [0, 1, 3])
def test_the_three_parts_are_those_of_the_closed_form(target, k):
    policy, x_t = LinearFlow(), torch.randn(8, 2, 1)
    got = mechanism.shares(policy, torch.zeros(8, 0), x_t, k, 0.6, target, draws=4000)
    parts = np.sum([slow_parts(float(x), k, 0.6, target) for x in x_t.flatten()], axis=0)
    assert got == pytest.approx(list(parts / parts.sum()), abs=0.02)
    assert sum(got) == pytest.approx(1)


def test_a_systematic_part_is_not_invented_from_few_draws():
    """Two draws: their mean is far from 0, the estimate of the systematic part is not."""
    policy = LinearFlow()
    found = [mechanism.shares(policy, torch.zeros(200, 0), torch.randn(200, 2, 1), 1, 0.6, "next",
                              draws=2)[0] for _ in range(20)]
    assert abs(np.mean(found)) < 0.03


def test_the_pull_goes_with_the_label_and_crosses_at_half(workplace, monkeypatch):
    """Labels that ignore the chunk: the pull is 1 - 2 x failures, up to noise."""
    class Coin(gap_world.GapWorld):
        def play(self, act, seeds):
            _, rows = super().play(act, seeds)
            chance = np.repeat(np.linspace(0, 1, 10), 200)
            return np.random.default_rng(0).random(len(seeds)) < chance, rows

    monkeypatch.chdir(workplace)
    policy = mechanism.flow.toy_policy(0)
    monkeypatch.setattr(gap_world, "GapWorld", Coin)
    failures, pulls = mechanism.pull(policy, 0.2, gap_world.episode_seeds("test", 10), 200, 10)
    assert failures.shape == (10,) and pulls.shape == (10, 4)
    for k in range(3):                 # in the last step hardly anything is systematic
        np.testing.assert_allclose(pulls[:, k], 1 - 2 * failures, atol=0.35)
        assert mechanism.crossing(failures, pulls[:, k]) == pytest.approx(0.5, abs=0.05)
    assert mechanism.crossing(np.array([0, 1.0]), np.array([1.0, -3.0])) == pytest.approx(0.25)


def test_the_script_writes_a_row_for_each_seed_width_step_and_target(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(mechanism.phase, "NOISE_LEVELS", (0.1, 0.5))
    monkeypatch.setattr(sys, "argv", ["mechanism.py", "--seeds", "1", "--starts", "4", "--out",
                                      "out"])
    mechanism.main()
    with open("out/mechanism.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 4 * 2 and len({tuple(r.values()) for r in rows}) == 16
    for row in rows:
        parts = [float(row[name]) for name in ("systematic", "own", "later")]
        assert sum(parts) == pytest.approx(1, abs=1e-4)
        if row["target"] == "next":
            assert parts[1] == pytest.approx(1, abs=0.02)
        assert bool(row["pull"]) == (row["target"] == "endpoint" and row["step"] != "3")
