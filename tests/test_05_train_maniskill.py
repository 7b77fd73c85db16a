"""05 as a whole: small runs with resume and evaluation, wrong flags, the baselines."""

import csv
import importlib
import math

import numpy as np
import pytest
import torch

from conftest import one_clear_line, run_script

mani = importlib.import_module("05_train_maniskill")
flow, nft = mani.flow, mani.nft

TINY = ["--num-demos", "3", "--sft-steps", "40", "--iterations", "1", "--episodes", "8",
        "--num-envs", "2", "--eval-episodes", "4", "--test-episodes", "4", "--eval-every", "1",
        "--device", "cpu"]


def test_a_whole_run_resumes_evaluates_and_keeps_its_results(tmp_path):
    out = tmp_path / "run"
    result = run_script("05_train_maniskill.py", *TINY, "--out", str(out), cwd=tmp_path)
    last = result.stdout.strip().splitlines()[-1]
    fields = dict(pair.split("=") for pair in last.removeprefix("RESULT ").split())
    assert set(fields) == {"task", "sft", "stepnft", "episodes", "env_steps", "seconds"}
    assert fields["task"] == "PickCube-v1" and fields["episodes"] == "8"
    assert 8 <= int(fields["env_steps"]) <= 8 * 24
    assert (out / "learning.png").stat().st_size > 5000
    before = (out / "log.csv").read_text()

    again = run_script("05_train_maniskill.py", *TINY, "--out", out, cwd=tmp_path, ok=False)
    assert "--resume" in one_clear_line(again)
    assert (out / "log.csv").read_text() == before

    more = [*TINY, "--out", str(out), "--resume"]
    more[more.index("--iterations") + 1] = "2"
    result = run_script("05_train_maniskill.py", *more, cwd=tmp_path)
    rows = list(csv.DictReader((out / "log.csv").open()))
    assert [r["iteration"] for r in rows] == ["1", "2"]
    assert int(rows[1]["env_steps"]) > int(rows[0]["env_steps"])
    assert all(math.isfinite(float(r["loss"])) for r in rows)

    only = run_script("05_train_maniskill.py", "--eval-only", str(out / "sft.pt"),
                      "--test-episodes", "4", "--num-envs", "1", "--device", "cpu", cwd=tmp_path)
    assert f"success={fields['sft']} " in only.stdout.strip().splitlines()[-1]

    other = run_script("05_train_maniskill.py", "--eval-only", str(out / "sft.pt"),
                       "--horizon", "8", "--device", "cpu", cwd=tmp_path, ok=False)
    assert "--horizon" in one_clear_line(other)


@pytest.mark.parametrize("flags, words", [
    (["--task", "PickCub-v1"], ["--task PickCub-v1", "PickCube-v1"]),
    (["--task", "PickSingleYCB-v1"], ["--task PickSingleYCB-v1", "controller"]),
    (["--task", "RollBall-v1"], ["--task RollBall-v1", "controller"]),
    (["--sft", "nothing.pt"], ["--sft", "nothing.pt"]),
    (["--ood-episodes", "0"], ["--ood-episodes"]),
    (["--algo", "ppo", "--dpo-beta", "0.5"], ["--dpo-beta", "--algo ppo"]),
    (["--num-demos", "0"], ["--num-demos"]),
    (["--episodes", "12"], ["--episodes 12", "8"]),
    (["--eval-only", "nothing.pt"], ["--eval-only", "nothing.pt"]),
    (["--resume"], ["--resume", "last.pt"]),
])
def test_bad_input_gets_one_line_naming_the_flag(tmp_path, flags, words):
    result = run_script("05_train_maniskill.py", *flags, "--device", "cpu", "--out", "new",
                        cwd=tmp_path, ok=False)
    line = one_clear_line(result)
    assert all(word in line for word in words)
    assert not (tmp_path / "new").exists()


def test_gae_is_the_sum_of_discounted_deltas_of_each_episode():
    """Against the definition, A_i = sum_j (gamma lambda)^j delta_{i+j}; episodes interleave."""
    episode = torch.tensor([0, 1, 0, 1, 1, 0, 1])
    values, success = torch.randn(7), np.array([True, False])
    advantages, returns = mani.gae(values, success, episode, gamma=0.9, lam=0.7)
    for e in (0, 1):
        V = values[episode == e].tolist() + [0.0]
        rewards = [0.0] * (len(V) - 2) + [float(success[e])]
        deltas = [r + 0.9 * V[i + 1] - V[i] for i, r in enumerate(rewards)]
        wanted = [sum(0.63**j * d for j, d in enumerate(deltas[i:])) for i in range(len(deltas))]
        torch.testing.assert_close(advantages[episode == e], torch.tensor(wanted))
    torch.testing.assert_close(returns, advantages + values)


def test_one_step_of_a_chunk_is_noisy_and_the_others_are_the_odes():
    policy = flow.FlowPolicy(3, 2, state_dim=5, width=16)
    _, record = mani.one_noisy_step(policy, 4, 0.3)({"state": torch.randn(10, 5)})
    for b, k in enumerate(record["k"][:, 0].tolist()):
        euler = record["x"][b, :-1] - 0.25 * record["v"][b]
        off = (record["x"][b, 1:] - euler).abs().amax((1, 2))
        assert off[k] > 0.01 and (off[torch.arange(4) != k] < 1e-5).all()


@pytest.mark.parametrize("algo", ["ppo", "grpo"])
def test_a_baseline_trains_and_resumes(tmp_path, algo):
    run_script("05_train_maniskill.py", *TINY, "--algo", algo, "--out", "new", cwd=tmp_path)
    run = run_script("05_train_maniskill.py", *TINY, "--algo", algo, "--out", "new", "--resume",
                     "--iterations", "2", cwd=tmp_path)
    log = list(csv.DictReader(open(tmp_path / "new/log.csv")))
    assert [row["iteration"] for row in log] == ["1", "2"] and f" {algo}=" in run.stdout
    assert ("value_loss" in log[0]) == (algo == "ppo")
    other = run_script("05_train_maniskill.py", *TINY, "--algo", "stepnft", "--out", "new",
                       "--resume", cwd=tmp_path, ok=False)
    assert "--algo stepnft" in one_clear_line(other) and algo in one_clear_line(other)
