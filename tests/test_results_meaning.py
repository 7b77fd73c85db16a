"""results/meaning/run.py: its policy, its eyes, its two critics; the statistic; the study, tiny."""

import importlib
import sys

import numpy as np
import pytest
import torch
from scipy import stats

import conftest  # noqa: F401  (the way to the scripts)
from envs.gap_world import episode_seeds
from envs.two_gaps import TwoGaps

meaning, eyes, common = map(importlib.import_module, (
    "results.meaning.run", "results.meaning.eyes", "results.common"))


def observations(count=30):
    return TwoGaps().reset(episode_seeds("test", count))


def test_a_row_is_encoded_as_if_it_were_alone():
    """Few pictures and sentences in a batch are different, and each is encoded once."""
    policy, obs = eyes.AskedPolicy(), observations()
    obs = {name: torch.cat([values, values]) for name, values in obs.items()}
    ctx = policy.encode(obs)
    assert ctx.shape == (60, policy.context_dim)
    for i in (0, 7, 45):
        alone = policy.encode({name: values[i:i + 1] for name, values in obs.items()})
        torch.testing.assert_close(ctx[i:i + 1], alone, rtol=1e-4, atol=1e-5)


def test_the_sentence_decides_what_is_looked_at():
    policy, obs = eyes.AskedPolicy(), observations(2)
    obs = {name: values[:1].repeat(2, *[1] * (values.ndim - 1)) for name, values in obs.items()}
    obs["tokens"] = torch.stack([torch.from_numpy(meaning.two_gaps.tokens(
        f"go through the {color} gap").copy()) for color in ("red", "blue")])
    looked = policy.encode(obs)[:, 2:2 + 32]
    assert (looked[0] - looked[1]).abs().max() > 1e-4


def test_the_shared_critic_trains_the_encoder_and_the_papers_does_not():
    for make_critic, reaches in ((eyes.Critic, False), (eyes.SharedCritic, True)):
        policy = eyes.AskedPolicy()
        critic = make_critic(policy.context_dim)
        critic(policy.encode(observations(4)), torch.rand(4)).sum().backward()
        assert (policy.maps.weight.grad is not None) == reaches


def test_the_shared_critic_is_the_other_one_on_the_same_weights():
    a, b = eyes.Critic(7), eyes.SharedCritic(7)
    b.load_state_dict(a.state_dict())
    ctx, elapsed = torch.randn(5, 7), torch.rand(5)
    assert torch.equal(a(ctx, elapsed), b(ctx, elapsed))


def run_rows(success, semantic, method, seed):
    """A run as main.csv holds it; its four semantic columns differ, their mean is `semantic`."""
    return [{"method": method, "seed": seed, "iteration": str(20 * i), "id": str(s),
             "pairs": str(o - 0.1), "words": str(o + 0.1), "order": str(o), "third": str(o),
             "textures": "0.3", "gaps": "0.5", "starts": "0.2"}
            for i, (s, o) in enumerate(zip(success, semantic))]


@pytest.mark.parametrize("gain, spread, verdict", [
    (0.08, 0.01, "supported"), (0.03, 0.005, "not supported here"), (0.03, 0.05, "undecided"),
    (-0.1, 0.01, "contradicted"), (0.045, 0.03, "undecided")])
def test_a_verdict_follows_the_rule_that_was_fixed(gain, spread, verdict):
    rows, x = [], np.linspace(0, 1, 9)
    gains = gain + spread * np.array([-1, -0.3, 0.3, 1.0])
    for seed, own in enumerate(gains):
        rows += run_rows(0.5 + 0.4 * x, 0.3 + 0.2 * x, "ppo", str(seed))
        rows += run_rows(0.5 + 0.4 * x, 0.3 + 0.2 * x + own, "stepnft", str(seed))
    found = {(row["axis"], row["when"]): row for row in meaning.verdicts(rows)}
    interval = stats.ttest_1samp(100 * gains, 0).confidence_interval(0.95)
    for when in ("at equal in-distribution success", "at the end"):
        row = found["semantic", when]
        assert (row["comparison"], row["seeds"]) == ("stepnft - ppo", 4)
        assert (row["mean"], row["low"], row["high"]) == pytest.approx(
            (100 * gain, interval.low, interval.high), abs=1e-6)
        assert row["verdict"] == verdict
    assert found["vision", "at the end"]["mean"] == 0


@pytest.mark.parametrize("method", meaning.METHODS)
def test_every_setting_of_the_grid_is_flags_that_05_takes(method, tmp_path):
    for setting in meaning.grid(method):
        flags = {"algo": method.removesuffix("-shared"), "iterations": 240, "seed": 3, **setting}
        args = meaning.compare.parse_args(["--task", "PixelGap", "--out", str(tmp_path),
                                           *meaning.pixel_gap.flags_of(flags)])
        assert (args.lr, args.noise_level) == (setting["lr"], setting["noise_level"])
    assert len({common.key(setting) for setting in meaning.grid(method)}) == 6


def test_the_study_tiny_and_again(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "ROUNDS", ((100,),))
    monkeypatch.setattr(meaning, "WHILE_TRAINING", 10)
    monkeypatch.setattr(meaning, "AT_THE_END", 20)
    for name, steps in (("eyes", 3), ("clone_of", 5)):
        monkeypatch.setattr(getattr(eyes, name), "__defaults__", (steps,))
    monkeypatch.setattr(meaning, "grid", lambda method, grid=meaning.grid: grid(method)[:2])
    monkeypatch.setattr(sys, "argv", ["run.py", "--seeds", "2", "--iterations", "1", "--episodes",
                                      "8", "--jobs", "1", "--out", "out"])
    meaning.main()
    rows = common.read(tmp_path / "out/main.csv")
    assert len(rows) == 3 * 2 * 2 and {row["method"] for row in rows} == set(meaning.METHODS)
    starts = {}
    for row in rows:
        if row["iteration"] == "0":                     # one clone a seed, tested alike
            starts.setdefault(row["seed"], set()).add(tuple(row[c] for c in meaning.CONDITIONS))
    assert len(starts) == 2 and all(len(same) == 1 for same in starts.values())
    assert "RESULT runs=6" in capsys.readouterr().out
    assert (tmp_path / "out/meaning.png").stat().st_size > 1e4
    monkeypatch.setattr(meaning, "run", None)                             # all of it is there
    meaning.main()
    assert "RESULT runs=6" in capsys.readouterr().out
