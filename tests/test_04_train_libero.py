"""04: its update against the loss of 03 written out by hand, its loop by the diary of a run, its
demonstrations, worlds and flags; whole runs on the toy world in a robot's clothes, then on the real
simulator."""

import copy
import functools
import importlib
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from conftest import ROOT, Opaque, one_clear_line, run_process, wrong_call
from envs import libero, libero_demos
from envs.gap_world import episode_seeds
from policies import load_policy
from policies.small import RobotPolicy
from test_envs_libero import gl, kept_simulators, recorded  # noqa: F401 (fixtures)
from tools import ranks, run
from toy_robot import (ITERATIONS, TOY, Toy, content, diary_of, dress, followed, log_of, ran,
                       robot, run_and_cut, same_run, table)

partial = functools.partial
flow, sde, nft = map(importlib.import_module,
                     ("01_flow_policy", "02_sde_sampler", "03_step_loss"))
SCRIPT, sim = "04_train_libero.py", pytest.mark.sim

# ------------------------------------------------------------------------------------------------
# The update of an iteration. 05 has one of its own, to which the same is asked: each check gets the
# script.


class Foreign(nn.Module):
    """A policy that shares no code with FlowPolicy, with a context nobody can look into."""

    def __init__(self, action_dim=2, horizon=3):
        super().__init__()
        self.horizon, self.action_dim = horizon, action_dim
        size = horizon * action_dim
        self.net = nn.Sequential(nn.Linear(size + 1 + 3, 32), nn.Tanh(), nn.Linear(32, size))
        nn.init.normal_(self.net[-1].weight, std=0.1)
        self.calls = {"encode": 0, "velocity": 0}

    def encode(self, obs):
        self.calls["encode"] += 1
        return Opaque(obs["state"])

    def velocity(self, x_t, t, ctx):
        self.calls["velocity"] += 1
        return self.net(torch.cat([x_t.flatten(1), t[:, None], ctx.content], 1)).view_as(x_t)


def recorded_batch(policy, rows=12, K=4, noise_level=0.3):
    """A labelled rollout's batch made by hand with the policy's own velocities; some actions did
    not run."""
    obs = {"state": torch.randn(rows, 3)}
    x = torch.randn(rows, K + 1, policy.horizon, policy.action_dim)
    ctx = policy.encode(obs)
    v = torch.stack([policy.velocity(x[:, k], torch.full((rows,), 1 - k / K), ctx)
                     for k in range(K)], 1).detach()
    sigma = torch.tensor([noise_level * math.sqrt(t / (1 - min(t, 1 - 1 / K)))
                          for t in (1 - k / K for k in range(K))]).expand(rows, K)
    return {**obs, "x": x, "v": v, "sigma": sigma,
            "y": torch.where(torch.rand(rows) < 0.5, -1.0, 1.0),
            "mask": torch.arange(policy.horizon) < torch.randint(1, policy.horizon + 1, (rows, 1)),
            "episode": torch.arange(rows)}


def method(**changes):
    """The flags that an update looks at."""
    flags = dict(num_steps=4, transitions="all", epochs=1, minibatch=100, target="next", beta=1.0,
                 max_drift=0.5, dpo_beta=1.0, device="cpu")
    return SimpleNamespace(**{**flags, **changes})


def vector(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def sgd(policy, lr=0.1):
    return torch.optim.SGD(policy.parameters(), lr=lr)


def check_the_first_step_is_a_reinforce_step(script, transitions="all"):
    """Against log-probabilities of torch.distributions, row by row and step by step; a gradient
    that is longer than 1 is shortened to 1."""
    for beta, dpo_beta in ((1.0, 1.0), (0.5, 0.02)):
        policy, a = Foreign(), 0.3
        batch = recorded_batch(policy, noise_level=a)
        reference, objective, count = copy.deepcopy(policy), 0, 0
        info = script.update(policy, sgd(policy), batch, method(
            beta=beta, dpo_beta=dpo_beta, transitions=transitions))
        for b in range(12):
            for k in range(4) if transitions == "all" else batch["k"][b].tolist():
                t, dt, x_t = 1 - k / 4, 0.25, batch["x"][b, k]
                sigma2 = a**2 * t / (1 - (t if k else 0.75))
                ctx = Opaque(batch["state"][b:b + 1])
                v = reference.velocity(x_t[None], torch.tensor([t]), ctx)[0]
                mean = x_t - dt * v - sigma2 * dt / (2 * t) * (x_t + (1 - t) * v)
                log_prob = torch.distributions.Normal(mean, math.sqrt(sigma2 * dt)).log_prob(
                    batch["x"][b, k + 1]).sum(-1)                                     # (H,)
                factor = beta * dpo_beta * sigma2 * dt / (sigma2 * dt + 1e-4)
                objective += factor * batch["y"][b] * log_prob[batch["mask"][b]].mean()
                count += 1
        assert count == (48 if transitions == "all" else 12)
        (-objective / count).backward()
        gradient = torch.cat([p.grad.flatten() for p in reference.parameters()])
        assert (gradient.norm() > 1) == (beta == 1), gradient.norm()
        assert info["grad_norm"] == pytest.approx(gradient.norm().item(), rel=1e-3)
        wanted = vector(reference) - 0.1 * gradient / max(1, gradient.norm())
        torch.testing.assert_close(vector(policy), wanted, rtol=1e-3, atol=1e-5)


def check_one_step_of_a_row_is_learned_from_on_request(script):
    check_the_first_step_is_a_reinforce_step(script, "one")


def check_all_steps_of_a_row_are_rows_of_03(script):
    """Row by row expanded by hand, the update of 03 learns the same, over three steps."""
    for target in nft.TARGETS:
        policy = Foreign()
        batch, other = recorded_batch(policy), copy.deepcopy(policy)
        copies = torch.arange(12).repeat_interleave(4)
        expanded = {**flow.take(batch, copies), "k": torch.arange(4).repeat(12)}
        info = script.update(policy, sgd(policy), dict(batch), method(epochs=3, target=target))
        wanted = nft.update(other, sgd(other), expanded, epochs=3, target=target, minibatch=100)
        torch.testing.assert_close(vector(policy), vector(other), rtol=1e-4, atol=1e-6)
        assert info == pytest.approx(wanted, rel=1e-3, abs=1e-6)


def check_one_random_step_of_each_row_is_drawn_for_the_whole_update(script):
    """--transitions one: all of the K are met, and each row keeps its own over the epochs."""
    policy, seen = Foreign(), []
    batch = recorded_batch(policy, rows=60)
    velocity = policy.velocity
    policy.velocity = lambda x_t, t, ctx: seen.append(
        (ctx.content[:, 0].tolist(), t.tolist())) or velocity(x_t, t, ctx)
    script.update(policy, sgd(policy), batch, method(transitions="one", epochs=2))
    assert len(seen) == 2 and batch["k"].shape == (60, 1)
    first, second = (dict(zip(*each)) for each in seen)
    assert first == second and len(first) == 60
    assert sorted(set(first.values())) == [0.25, 0.5, 0.75, 1.0]


def check_one_encode_and_a_velocity_for_each_k_in_a_step(script):
    for transitions, n in (("all", 4), ("one", 1)):
        policy, steps = Foreign(), []
        batch, optimizer = recorded_batch(policy, rows=10), sgd(policy)
        optimizer.register_step_post_hook(lambda *_: steps.append(1))
        policy.calls = {"encode": 0, "velocity": 0}
        script.update(policy, optimizer, batch,
                      method(epochs=3, minibatch=4, transitions=transitions))
        assert policy.calls == {"encode": 9, "velocity": 9 * n} and len(steps) == 9  # 4 + 4 + 2


def check_an_epoch_sees_every_row_once_in_random_order(script):
    policy, seen = Foreign(), []
    batch = recorded_batch(policy, rows=20)
    policy.encode = lambda obs: seen.append(obs["state"][:, 0].clone()) or Opaque(obs["state"])
    script.update(policy, sgd(policy), batch, method(epochs=2, minibatch=8))
    assert [len(rows) for rows in seen] == [8, 8, 4] * 2
    first, second, rows = torch.cat(seen[:3]), torch.cat(seen[3:]), batch["state"][:, 0]
    for order in (first, second):
        assert torch.equal(order.sort()[0], rows.sort()[0]) and not torch.equal(order, rows)
    assert not torch.equal(first, second)


def check_the_flags_reach_the_loss(script):
    """Two steps with SGD; the second starts from a drift that the flags then change."""
    start, results = Foreign(), []
    batch = recorded_batch(start)
    for changes in ({}, {"beta": 3.0}, {"max_drift": 1e-3}, {"dpo_beta": 4.0},
                    {"target": "endpoint"}, {"epochs": 3}, {"transitions": "one"},
                    {"minibatch": 5}):
        policy = copy.deepcopy(start)
        torch.manual_seed(1)
        script.update(policy, sgd(policy, 0.5), dict(batch), method(**{"epochs": 2, **changes}))
        results.append(vector(policy))
    assert all((a - b).abs().max() > 1e-6 for i, a in enumerate(results) for b in results[:i])


def check_the_target_picks_error_and_what_is_to_be_explained(script):
    for target in nft.TARGETS:
        policy, seen = Foreign(), []
        batch, loss = recorded_batch(policy), nft.step_nft_loss
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(nft, "step_nft_loss", lambda **steps: seen.append(
                (steps["target"].detach(), steps["error"])) or loss(**steps))
            script.update(policy, sgd(policy), batch, method(target=target))
        (explained, error), = seen
        x = batch["x"]
        wanted = x[:, 1:] if target == "next" else x[:, -1:].expand(-1, 4, -1, -1)
        explained, wanted = explained.flatten(1), wanted.flatten(0, 1).flatten(1)
        assert error is nft.TARGETS[target]
        assert torch.equal(explained.sort(0)[0], wanted.sort(0)[0])


def check_an_update_leaves_the_batch_as_it_was(script):
    policy = Foreign()
    batch = recorded_batch(policy)
    before = copy.deepcopy(batch)
    script.update(policy, sgd(policy), batch, method(epochs=2, minibatch=5))
    for name in before:
        torch.testing.assert_close(batch[name], before[name], rtol=0, atol=0)


def check_info_is_the_mean_over_steps(script):
    """With learning rate 0 every row ties: loss ln 2, no drift, whatever the minibatches."""
    policy = Foreign()
    nn.init.zeros_(policy.net[-1].weight)
    info = script.update(policy, sgd(policy, 0), recorded_batch(policy),
                         method(epochs=2, minibatch=5))
    assert set(info) == {"loss", "rank_accuracy", "margin", "drift", "clipped", "grad_norm"}
    assert info["loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert info["drift"] == info["margin"] == info["clipped"] == info["rank_accuracy"] == 0


def check_uncredited_noise_is_left_out_of_the_loss(script):
    """Other v_old and x_next in a dim that never moved: the same loss, the same update."""
    torch.manual_seed(1)
    start = RobotPolicy(2, 3, state_dim=2, width=16)
    start.action_scale.copy_(torch.tensor([1.0, 0.01, 1.0]))
    obs = {"state": torch.randn(16, 2)}
    _, path = sde.sde_sample(start, obs, 4, 0.3)
    batch = {**obs, **path._asdict(), "episode": torch.arange(16),
             "mask": torch.ones(16, 2, dtype=bool), "y": torch.tensor([1.0, -1.0]).repeat(8)}
    results = []
    for shift in (0, 1):
        policy = copy.deepcopy(start)
        changed = {**batch, "v": batch["v"] + shift * torch.tensor([0, 0.3, 0])}
        info = script.update(policy, sgd(policy), changed, method())
        results.append((vector(policy), info["margin"]))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-6)
    assert not torch.equal(results[0][0], vector(start))
    assert results[0][1] == pytest.approx(results[1][1], abs=1e-6)


def check_a_part_goes_to_the_policys_device(script):
    """All of it, before it is encoded; the rest of the batch stays where it was."""
    policy, gone = Foreign(), []
    batch, to_device = recorded_batch(policy, rows=10), ranks.to_device
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "to_device", lambda part, device: gone.append(
            (len(part["y"]), set(part), device)) or to_device(part, "cpu"))
        script.update(policy, sgd(policy), batch, method(minibatch=6, device="cuda:3"))
    assert gone == [(n, set(batch), "cuda:3") for n in (6, 4)]


UPDATE_CHECKS = [                                        # the quick ones first
    check_one_encode_and_a_velocity_for_each_k_in_a_step,
    check_the_target_picks_error_and_what_is_to_be_explained,
    check_one_random_step_of_each_row_is_drawn_for_the_whole_update,
    check_an_epoch_sees_every_row_once_in_random_order,
    check_a_part_goes_to_the_policys_device, check_an_update_leaves_the_batch_as_it_was,
    check_info_is_the_mean_over_steps, check_uncredited_noise_is_left_out_of_the_loss,
    check_all_steps_of_a_row_are_rows_of_03, check_the_flags_reach_the_loss,
    check_one_step_of_a_row_is_learned_from_on_request, check_the_first_step_is_a_reinforce_step]


@pytest.mark.parametrize("check", UPDATE_CHECKS, ids=lambda check: check.__name__)
def test_update(check):
    check(robot)


# ------------------------------------------------------------------------------------------------
# The loop, by its diary: who acts, learns, is validated, tested, saved and filmed; on which seeds,
# with which draws and learning rate. The clone's mark is 0, every update adds 1 to the learner's.


def alphas(start, end):
    """A half cosine from start to end: (1 + cos x) / 2 = cos^2(x / 2). It would reach the end one
    iteration after the last."""
    return [end - (end - start) * math.cos(math.pi * i / (2 * ITERATIONS))**2
            for i in range(ITERATIONS)]


def train_seeds(iteration):
    return episode_seeds("train", 4, 7, iteration)


kept = functools.cache(diary_of)  # for tests that only look at it


def check_who_does_what(diary, ema):
    """old acts; the learner learns, and is validated after iterations 3 and 4 of 4; clone and
    learner are tested, the learner is filmed."""
    assert diary.marks("act") == pytest.approx(followed(ema)[:-1], abs=1e-3)
    assert diary.marks("learn") == [0, 1, 2, 3]
    order = [page.what for page in diary.of("play", "act", "learn")]
    assert order[:11] == ["play"] + ["act", "learn"] * 3 + ["play", "act", "learn", "play"]
    assert diary.marks("play")[:3] == [0, 3, 4]                  # validated
    tested = diary.marks("play")[3:]
    assert tested and tested == [0, 4] * (len(tested) // 2)
    assert diary.marks("film") == [4]


def check_what_is_saved(diary, ema):
    """The clone as it was; the learner, who acts, and the learner's optimiser."""
    assert diary.clone.mark == 0 and diary.sft["policy"]["mark"] == 0
    assert diary.last["policy"]["mark"] == 4
    assert diary.last["old"]["mark"].item() == pytest.approx(followed(ema)[-1], abs=1e-3)
    assert diary.last["state"]["iteration"] == 4
    assert diary.last["optimizer"]["param_groups"][0]["lr"] == pytest.approx(0.5 / 4)
    learner = diary.of("learn")[0].policy
    assert learner is not diary.clone
    assert all(page.policy is learner for page in diary.of("learn"))


def check_the_learning_rate_falls_linearly(diary):
    """0.5 from the start, and would be 0 after the last; the optimiser holds the learner."""
    for i, page in enumerate(diary.of("learn")):
        lr, parameters = page.groups[0]
        assert lr == pytest.approx(0.5 * (1 - i / ITERATIONS))
        assert parameters == [id(page.policy.mark)]


def check_each_iteration_has_its_starts(diary, place):
    """The run's own, each for a group of two neighbours; validation and test belong to no run.
    place(seeds) -> the world's."""
    for i, page in enumerate(diary.of("act")):
        assert page.seeds == place(train_seeds(i)).repeat(2).tolist()
    played = [page.seeds for page in diary.of("play")]
    assert played[:3] == [place(episode_seeds("validation", 5)).tolist()] * 3
    assert place(episode_seeds("test", 6)).tolist() in played[3:]
    film, = diary.of("film")
    assert film.seeds == place(episode_seeds("test", 6)).tolist()


def check_each_iteration_has_its_random_stream(diary, before=lambda: None):
    """before(): what is drawn before the noise that a chunk starts from."""
    for i, page in enumerate(diary.of("act")):
        torch.manual_seed(int(train_seeds(i)[0]))
        before()
        assert torch.equal(page.x_1, torch.randn(page.x_1.shape)), f"iteration {i}"


def check_the_log(diary, repeat, ema):
    log, success = diary.log, [np.mean(np.array(page.seeds) % 3 == 0) for page in diary.of("act")]
    assert [row["iteration"] for row in log] == ["1", "2", "3", "4"]
    assert [row["episodes"] for row in log] == ["8", "16", "24", "32"]
    assert [int(row["env_steps"]) for row in log] == [8 * 2 * repeat * i for i in (1, 2, 3, 4)]
    assert [float(row["train_sde"]) for row in log] == pytest.approx(success)
    assert [float(row["alpha"]) for row in log] == pytest.approx(ema, abs=1e-5)
    validation = np.mean(np.array(diary.of("play")[0].seeds) % 3 == 0)
    assert [row["eval_ode"] for row in log] == ["", "", f"{validation:g}", f"{validation:g}"]
    assert all(row["loss"] == "0.5" for row in log)
    assert diary.result["episodes"] == "32" and diary.result["env_steps"] == log[-1]["env_steps"]


def check_noise_in_every_step(diary, level):
    for page in diary.of("act"):
        for k, sigma in enumerate(page.sigma.T):
            t = 1 - k / 4
            wanted = level * math.sqrt(t / (1 - min(t, 0.75)))
            torch.testing.assert_close(sigma, torch.full((8,), wanted))


def on_task_0(seeds):
    return 1000 + seeds


def check_labels(diary):
    """+1 and -1, of which the mean of a start is taken off: two that start alike do the same here.
    And `won` says which succeeded, for baselines."""
    successes = []
    for acted, page in zip(diary.of("act"), diary.of("learn")):
        success = [seed % 3 == 0 for seed in acted.seeds]
        assert page.batch["won"].tolist() == success and not page.batch["y"].any()
        successes += success
    assert set(successes) == {True, False}


def check_worlds_of_the_test(diary):
    """Training's world is closed first. Those of the test know it, and are closed as well."""
    made = [(page.what, vars(page).get("suite"), vars(page).get("test"))
            for page in diary.of("made", "closed")]
    test = ("libero_object", True)
    assert made == [("made", None, None), ("closed", None, None), ("made", *test),
                    ("closed", *test), ("made", None, True)]
    film, = diary.of("film")
    assert film.made.keys() == {"test", "film"} and film.made["film"].name == "videos"
    official, placed = [*range(50)], on_task_0(episode_seeds("test", 6)).tolist()
    assert [page.seeds for page in diary.of("play")[3:]] == [official] * 2 + [placed] * 2


EMA, FILM = alphas(0.1, 0.5), ("--video", 2)
LOOP_CHECKS = {
    "who acts, learns, is validated, tested and filmed": partial(check_who_does_what, ema=EMA),
    "the clone as it was and the learner are saved": partial(check_what_is_saved, ema=EMA),
    "the learning rate falls linearly": check_the_learning_rate_falls_linearly,
    "each iteration has its starts": partial(check_each_iteration_has_its_starts, place=on_task_0),
    "each iteration has its random stream": check_each_iteration_has_its_random_stream,
    "a row of the log tells the iteration": partial(check_the_log, repeat=4, ema=EMA),
    "noise in every step": partial(check_noise_in_every_step, level=0.5),
    "labels are centred on their start": check_labels,
    "one world at a time": check_worlds_of_the_test}


@pytest.mark.parametrize("check", LOOP_CHECKS.values(), ids=LOOP_CHECKS)
def test_the_loop(check):
    check(kept(SCRIPT, *FILM))


def check_the_loop():
    """All of that on a run of its own."""
    diary = diary_of(SCRIPT, *FILM)
    for check in LOOP_CHECKS.values():
        check(diary)


def test_a_label_is_the_success_of_an_episode():
    diary = diary_of(SCRIPT, "--group-size", 1)
    for acted, page in zip(diary.of("act"), diary.of("learn")):
        assert page.batch["y"].tolist() == [1 if seed % 3 == 0 else -1 for seed in acted.seeds]


def test_the_test_plays_official_and_random_starts_then_further_suites_official_ones():
    diary = diary_of(SCRIPT, "--eval-suites", "_lan", "--test-states", 3)
    made = [(page.what, vars(page).get("suite")) for page in diary.of("made", "closed")[2:]]
    assert made == [(what, suite) for suite in ("libero_object", "libero_object_lan")
                    for what in ("made", "closed")]
    played = [(page.made.get("suite"), page.seeds) for page in diary.of("play")[3:]]
    official, placed = [0, 1, 2], on_task_0(episode_seeds("test", 6)).tolist()
    assert played == [("libero_object", official)] * 2 + [("libero_object", placed)] * 2 + [
        ("libero_object_lan", official)] * 2
    assert [(row["policy"], row["suite"], row["task"], row["episodes"]) for row in diary.test] == [
        (policy, suite, "0", episodes) for suite, episodes in (
            ("libero_object", "3"), ("libero_object", "6"), ("libero_object_lan", "3"))
        for policy in ("SFT", "pi-StepNFT")]
    # RESULT tells the official starts of the suite that was trained on
    assert diary.result["sft"] == diary.result["stepnft"] == f"{1 / 3:.3f}"


def test_without_iterations_the_clone_alone_is_tested():
    diary = diary_of(SCRIPT, "--iterations", 0)
    assert not {"log.csv", "last.pt"} & diary.files
    assert diary.marks("play") == [0, 0] and not diary.of("act", "learn")
    assert "stepnft" not in diary.result and diary.result["episodes"] == "0"


def test_each_task_has_rows_of_its_own_in_the_test():
    """Successes are told apart by the task of their seed; official starts are what is told."""
    args = SimpleNamespace(suite="libero_object", tasks=[2, 5], test_states=3, test_episodes=3,
                           eval_only=None, eval_suites=[], device="cpu", num_steps=4, video=0)

    class World:
        def play(self, act, seeds):
            return np.asarray(seeds) // libero.TASK == 5, {}       # the second task always succeeds

        def close(self):
            pass

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        args.out = Path(folder)
        patch.setattr(robot, "make_world", lambda *z, **more: World())
        assert robot.test_all({"SFT": None}, args) == {"SFT": 0.5}
        rows = table(args.out / "test.csv")
    assert [(row["task"], row["starts"], row["episodes"], row["success"]) for row in rows] == [
        ("2", "official initial states", "3", "0.0"), ("5", "official initial states", "3", "1.0"),
        ("2", "random placements", "2", "0.0"), ("5", "random placements", "1", "1.0")]


# ------------------------------------------------------------------------------------------------
# Whole runs on the toy world


@pytest.fixture
def toy(monkeypatch):
    dress(monkeypatch)


def test_a_run_trains_tests_logs_and_draws(monkeypatch, tmp_path):
    dress(monkeypatch, curves=True)
    result, out = ran(*TOY, "--out", tmp_path / "new")
    assert set(result) == {"suite", "task", "sft", "stepnft", "episodes", "env_steps", "seconds"}
    assert result["episodes"] == "48" and result["suite"] == "libero_object"
    log, rows = log_of(tmp_path / "new"), table(tmp_path / "new" / "test.csv")
    assert [row["episodes"] for row in log] == ["16", "32", "48"]
    assert log[-1]["env_steps"] == result["env_steps"]
    assert [row["eval_ode"] != "" for row in log] == [False, True, True]
    assert all(math.isfinite(float(row["loss"])) for row in log)
    assert [(row["policy"], row["starts"], row["episodes"]) for row in rows] == [
        (policy, *starts) for starts in (("official initial states", "5"),
                                         ("random placements", "10"))
        for policy in ("SFT", "pi-StepNFT")]
    assert rows[0]["success"][:5].startswith(str(float(result["sft"])))
    assert (tmp_path / "new" / "learning.png").stat().st_size > 5000
    sft, last = content(tmp_path / "new", "sft.pt"), content(tmp_path / "new")
    assert any(not torch.equal(sft[name], last[name]) for name in sft)
    assert "max_steps=160" in out.split("\n")[0].split()         # the flags as they were filled in
    for what in ("validation, SFT", "validation, iteration 3", "pi-StepNFT", "SFT: flow matching"):
        assert what in out


def test_demos_training_validation_and_test_share_no_start(toy, tmp_path):
    ran(*TOY, "--out", tmp_path / "new", "--group-size", 4)
    demos = [seeds for scripted, seeds in Toy.played if scripted]
    others = [seeds for scripted, seeds in Toy.played if not scripted]
    validation, train = [others[i] for i in (0, 3, 5)], [others[i] for i in (1, 2, 4)]
    official, test = others[6:8], others[8:]
    assert official == [[0, 1, 2, 3, 4]] * 2
    assert validation == [validation[0]] * 3 and test == [test[0]] * 2
    kinds = [set(sum(demos, [])), set(sum(train, [])), set(validation[0]), set(test[0]),
             set(official[0])]
    assert [len(kind) for kind in kinds] == [3, 3 * 16 // 4, 9, 10, 5]
    assert len(set.union(*kinds)) == sum(map(len, kinds))
    for seeds in train:                                    # four neighbours share their start
        assert [len(set(seeds[i:i + 4])) for i in range(0, 16, 4)] == [1] * 4


def test_a_run_cut_short_and_resumed_is_the_run_that_was_not(toy, tmp_path, monkeypatch):
    """Log, tables and every tensor; a row whose checkpoint is missing does not come twice."""
    told, _ = run_and_cut(tmp_path, monkeypatch, *TOY, after=2)
    assert [row["iteration"] for row in log_of(tmp_path / "cut")] == ["1", "2", "3"]
    resumed, _ = ran("--resume", "--out", tmp_path / "cut")
    same_run(tmp_path / "whole", tmp_path / "cut")
    assert {**told, "seconds": ""} == {**resumed, "seconds": ""}
    ran("--resume", "--out", tmp_path / "cut", "--iterations", 4)  # and may grow
    assert [row["iteration"] for row in log_of(tmp_path / "cut")] == ["1", "2", "3", "4"]


def test_two_tasks_share_a_policy_that_can_be_tested_on_one(toy, tmp_path):
    """--eval-only needs no flag; its rows are added to the table under the path of the policy."""
    out = tmp_path / "new"
    result, _ = ran(*TOY, "--tasks", 0, 3, "--iterations", 1, "--out", out)
    assert result["task"] == "0,3"
    assert load_policy(out / "last.pt").config["language"]
    before = table(out / "test.csv")
    assert [(row["task"], row["episodes"]) for row in before[:4]] == [("0", "5"), ("3", "5")] * 2
    again, _ = ran("--eval-only", out / "last.pt", "--out", out)
    assert again["task"] == "0,3" and again["success"] == result["stepnft"]
    alone, _ = ran("--eval-only", out / "last.pt", "--out", out, "--tasks", 3)
    assert alone["task"] == "3"
    rows = table(out / "test.csv")
    assert rows[:len(before)] == before and len(rows) == 8 + 4 + 2
    assert {row["policy"] for row in rows[8:]} == {str(out / "last.pt")}
    assert [row["task"] for row in rows[8:]] == ["0", "3", "0", "3", "3", "3"]


@pytest.mark.parametrize("seed", [123456789, 2**40])
def test_any_seed_works(toy, tmp_path, seed):
    ran(*TOY, "--iterations", 1, "--seed", seed, "--out", tmp_path / "new")
    assert all(0 <= s < 2**31 + 1000 for _, seeds in Toy.played for s in seeds)


def test_sft_of_another_run_is_where_a_run_starts(toy, tmp_path):
    result, _ = ran(*TOY, "--iterations", 0, "--out", tmp_path / "first")
    assert "sft" in result and "stepnft" not in result             # nothing was trained
    assert not (tmp_path / "first" / "log.csv").exists()
    Toy.played.clear()
    ran(*TOY, "--sft", tmp_path / "first" / "sft.pt", "--out", tmp_path / "second", "--lr", 1e-9)
    assert not any(scripted for scripted, _ in Toy.played)         # no demos are needed
    first, second = (content(tmp_path / name, "sft.pt") for name in ("first", "second"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert table(tmp_path / "first" / "test.csv")[0] == table(tmp_path / "second" / "test.csv")[0]


# ------------------------------------------------------------------------------------------------
# Starts, demonstrations, worlds


def test_ten_tasks_take_turns_and_groups_stay_together():
    args = SimpleNamespace(tasks=[2, 5, 7])
    seeds = robot.random_starts(args, "train", 12, 0, 4, group_size=2)
    tasks, numbers = seeds // libero.TASK, seeds % libero.TASK
    assert tasks.tolist() == [2, 2, 5, 5, 7, 7] * 2
    assert (numbers[::2] == numbers[1::2]).all() and len(set(numbers.tolist())) == 6
    assert (numbers >= 1000).all()


def test_every_task_is_trained_when_an_iteration_has_fewer_starts_than_tasks():
    args, played = SimpleNamespace(tasks=list(range(10))), []
    for iteration in range(5):
        seeds = robot.random_starts(args, "train", 32, 0, iteration, group_size=8)
        assert len(set(seeds.tolist())) == 4 and (seeds.reshape(4, 8) == seeds[::8, None]).all()
        played += (seeds[::8] // libero.TASK).tolist()
    assert played == [*range(10)] * 2                     # in turn, across iterations


def test_an_action_that_is_held_is_the_mean_of_the_steps_that_it_replaces():
    seen = []
    args = SimpleNamespace(resume=None, sft=None, horizon=2, action_repeat=3, seed=0, device="cpu",
                           sft_steps=1, sft_lr=1e-3, sft_batch=256, out=None, tasks=[0],
                           obs="state", state_dim=18, policy=None, micro_batch=32)
    actions = [torch.rand(7, 7) * 2 - 1, torch.rand(4, 7)]
    demos = [({"state": torch.randn(len(a), 18)}, a) for a in actions]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flow, "train_sft", lambda policy, obs, chunks, *rest: seen.append(
            (policy, obs, chunks, rest)) or 0.0)
        patch.setattr(run, "save", lambda *content: None)
        patch.setattr(robot, "collect_demos", lambda args: demos)
        args.out = Path("nowhere")
        robot.clone(args)
    (policy, obs, chunks, rest), = seen
    assert policy.horizon == 2 and rest == (1, 1e-3, 256)
    assert torch.equal(obs["state"], torch.cat([d["state"] for d, _ in demos]))
    wanted = [[[sum(a[min(i + 3 * h + r, len(a) - 1), dim].item() for r in range(3)) / 3
                for dim in range(7)] for h in range(2)] for a in actions for i in range(len(a))]
    torch.testing.assert_close(chunks, torch.tensor(wanted))


@pytest.mark.parametrize("tasks", [[0], [2, 5]])
def test_scripted_demos_are_tried_on_the_demo_starts_of_the_run_in_each_task(tasks):
    check_scripted_demos(tasks)


def check_scripted_demos(tasks=(2, 5)):
    args = SimpleNamespace(demos="scripted", demo_noise=0.3, num_demos=2, seed=7, tasks=tasks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(robot, "make_world", lambda args, **made: made)
        patch.setattr(robot, "scripted_demos", lambda *told: told)
        world, candidates, num_demos = robot.collect_demos(args)
    assert world == {"demo_noise": 0.3} and num_demos == 2
    starts = episode_seeds("demo", 20, 7).astype(int)
    assert [own.tolist() for own in candidates] == [
        (task * libero.TASK + 1000 + starts).tolist() for task in tasks]


def test_recorded_demos_are_read_as_asked():
    args = SimpleNamespace(suite="libero_goal", tasks=[3], demos="a/folder", num_demos=4,
                           skip_no_ops=True, obs="rgb", image_size=96)
    for args.policy in (None, "a/pi0"):          # a published policy has sentences of its own
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(libero_demos, "recorded_demos", lambda *told, **more: (told, more))
            told = robot.collect_demos(args)
        assert told == (("libero_goal", [3], "a/folder", 4, True, "rgb", 96),
                        {"published": args.policy == "a/pi0"})


def test_a_world_is_made_as_the_flags_say():
    args = SimpleNamespace(suite="libero_goal", tasks=[3], num_envs=6, video=2, obs="rgb",
                           state_dim=6, horizon=5, action_repeat=3, image_size=96, max_steps=77,
                           test_max_steps=None, gl="egl", policy="a/pi0", meshes="simple")
    told = dict(obs="rgb", state_dim=6, horizon=5, action_repeat=3, image_size=96, gl="egl",
                published=True, meshes="simple")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(libero, "make_workers", lambda *names, **more: (names, more))
        for call, names, more in (
                ({}, ("libero_goal", [3], 6), dict(max_steps=77, demo_noise=None, film=None)),
                (dict(demo_noise=0.3), ("libero_goal", [3], 6),
                 dict(max_steps=77, demo_noise=0.3, film=None)),
                (dict(test=True, film="x"), ("libero_goal", [3], 2),
                 dict(max_steps=300, demo_noise=None, film="x"))):
            assert robot.make_world(args, **call) == (names, {**told, **more})


# ------------------------------------------------------------------------------------------------
# Flags


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of finished toy runs of 04 (and, for its script, one of 05), never changed."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        dress(patch, small=False)
        ran(*TOY, "--iterations", 1, "--seed", 3, "--tasks", 0, 1, "--out", folder / "04")
    shutil.copytree(folder / "04", folder / "05")
    content = torch.load(folder / "04" / "last.pt", weights_only=True)
    content["flags"]["script"] = "05_train_maniskill.py"
    torch.save(content, folder / "05" / "last.pt")
    return folder


def filled(flags, runs):
    return [str(flag).replace("RUN", str(runs / "04")).replace("OTHER", str(runs / "05"))
            .replace("README", str(ROOT / "README.md")) for flag in flags.split()]


WRONG = [
    ("--suite libero_objects", "--suite libero_objects"), ("--tasks 10", "--tasks", "10", "0 to 9"),
    ("--tasks x", "--tasks", "x"), ("--tasks -1", "--tasks"), ("--num-demos 0", "--num-demos"),
    ("--suite libero_10 --tasks 2", "--tasks", "no scripted expert", "libero_10"),
    ("--suite libero_10 --tasks all", "--tasks", "no scripted expert"),
    ("--eval-only nothing.pt", "--eval-only", "nothing.pt"), ("--eval-only README", "--eval-only"),
    ("--sft README", "--sft", "checkpoint"), ("--sft nothing.pt", "--sft", "nothing.pt"),
    ("--device nonsense", "--device", "nonsense"), ("--action-repeat 0", "--action-repeat"),
    ("--sft-steps 0", "--sft-steps"), ("--eval-suites libero_10", "--eval-suites libero_10"),
    ("--eval-suites nonsense", "--eval-suites", "nonsense"), ("--out a_file/new", "--out a_file"),
    ("--noise-level nan", "--noise-level"), ("--noise-level inf", "--noise-level"),
    ("--noise-level 0", "--noise-level"), ("--lr 0", "--lr"), ("--lr -1", "--lr"),
    ("--ema 2 3", "--ema"), ("--ema 0.9 0.1", "--ema 0.9 0.1"), ("--eval-every 0", "--eval-every"),
    ("--minibatch 0", "--minibatch"), ("--epochs 0", "--epochs"), ("--horizon 0", "--horizon"),
    ("--episodes 12", "--episodes 12", "8"), ("--demos nowhere", "--demos nowhere"),
    ("--image-size 8", "--image-size"), ("--seed -1", "--seed"), ("--max-steps 0", "--max-steps"),
    ("--demo-noise -1", "--demo-noise"), ("--num-envs 0", "--num-envs"), ("--video -1", "--video"),
    ("--resume --out missing", "--resume", "last.pt"), ("--resume --out a_file", "--resume"),
    ("--out RUN", "--out", "--resume"), ("--steps 3", "--steps"), ("--obs depth", "--obs"),
    ("--resume --out RUN --seed 5", "--seed 5"), ("--resume --out RUN --lr 1e-4", "--lr"),
    ("--resume --out RUN --suite libero_goal", "--suite libero_goal"),
    ("--resume --out RUN --horizon 3", "--horizon 3"),
    ("--resume --out RUN --tasks 0", "--tasks"),
    ("--eval-only RUN/last.pt --seed 5", "--seed 5"),
    ("--eval-only RUN/last.pt --horizon 8", "--horizon 8"),
    ("--eval-only RUN/sft.pt --suite libero_goal", "--suite libero_goal"),
    ("--eval-only OTHER/last.pt", "05_train_maniskill.py"),
    ("--resume --out OTHER", "05_train_maniskill.py"),
    ("--sft RUN/sft.pt --tasks 0 1 --horizon 3", "--sft", "horizon"),
    ("--sft RUN/sft.pt --tasks 0", "--sft", "language"),
]


@pytest.mark.parametrize("flags, words", [(flags, words) for flags, *words in WRONG],
                         ids=[flags for flags, *_ in WRONG])
def test_a_wrong_call_gets_one_line_that_names_the_flag(flags, words, runs):
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*")}
    line = wrong_call(SCRIPT, *filled(flags, runs))
    assert all(word in line for word in words), line
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*")} == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_a_gpu_that_is_not_there_gets_one_line():
    assert "--device" in wrong_call(SCRIPT, "--device", "cuda")


def test_a_broken_last_checkpoint_gets_one_line(tmp_path):
    (tmp_path / "last.pt").write_bytes(b"half")
    line = wrong_call(SCRIPT, "--resume", "--out", tmp_path)
    assert "--resume" in line and "sft.pt, log.csv" in line
    for name in ("sft.pt", "log.csv"):
        (tmp_path / name).touch()
    assert "last.pt" in wrong_call(SCRIPT, "--resume", "--out", tmp_path)


def test_a_run_killed_before_its_first_checkpoint_can_start_again(toy, tmp_path):
    """Its log may hold a row: neither `--resume` nor a new start may be refused for ever."""
    (tmp_path / "log.csv").write_text("iteration,episodes,loss\n1,16,0.7\n")
    ran(*TOY, "--iterations", 1, "--out", tmp_path)
    assert [row["iteration"] for row in log_of(tmp_path)] == ["1"]


def test_a_run_resumed_keeps_the_sft_policy_it_started_from(runs, capsys):
    with pytest.raises(SystemExit):
        parse("--resume", "--out", runs / "04", "--sft", runs / "04" / "last.pt")
    assert "--sft" in capsys.readouterr().err


def test_a_wrong_call_leaves_nothing_but_its_line(tmp_path):
    """Once as a user calls it: no warning beside the line, either."""
    done = run_process(SCRIPT, "--out", ROOT / "README.md" / "new", cwd=tmp_path, ok=False)
    assert "--out" in one_clear_line(done) and not any(tmp_path.iterdir())


def parse(*flags):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [SCRIPT])
        return robot.parse_args([str(flag) for flag in flags])


def test_flags_come_from_the_checkpoint(runs, tmp_path):
    """Those of the run, but where and on what to compute is the call's business."""
    for call in (["--resume", "--out", runs / "04"], ["--eval-only", runs / "04" / "sft.pt",
                                                      "--out", tmp_path / "new"]):
        args = parse(*call)
        assert (args.seed, args.tasks, args.episodes, args.lr) == (3, [0, 1], 16, 1e-3)
        assert args.out == Path(call[-1]) and args.test_episodes == 10
    same = parse("--resume", "--out", runs / "04", "--seed", 3, "--lr", 1e-3, "--num-envs", 3,
                 "--test-episodes", 50, "--iterations", 9)
    assert (same.num_envs, same.test_episodes, same.iterations, same.seed) == (3, 50, 9, 3)
    assert same.resume == runs / "04" / "last.pt"


def test_a_policy_can_be_tested_where_its_recorded_demos_are_not(runs, tmp_path):
    """Checkpoints are exchanged; the demonstrations stay where they were."""
    content = torch.load(runs / "04" / "last.pt", weights_only=True)
    content["flags"]["demos"] = "/a/folder/elsewhere"
    torch.save(content, tmp_path / "last.pt")
    args = parse("--eval-only", tmp_path / "last.pt", "--out", tmp_path / "new")
    assert args.max_steps == libero.TIME_LIMITS["libero_object"]


def test_meshes_are_simple_where_software_draws_what_is_learned_from(tmp_path, monkeypatch):
    monkeypatch.setattr(libero, "find_gl", lambda: "egl")
    for software, flags, meshes in (
            (True, "--obs rgb", "simple"), (False, "--obs rgb", "full"), (True, "", "full"),
            (True, "--video 1", "full"), (True, "--obs rgb --demos .", "full"),
            (True, "--obs rgb --meshes full", "full"), (False, "--obs rgb --meshes simple",
                                                        "simple")):
        monkeypatch.setattr(libero, "in_software", lambda gl: software)
        args = parse(*flags.split(), "--out", tmp_path)
        assert args.meshes == args.flags["meshes"] == meshes, flags


@pytest.mark.parametrize("stored", ["simple", "full", None])
def test_meshes_are_those_of_the_checkpoint(stored, runs, tmp_path, monkeypatch):
    """And a run from before there was the flag saw full ones."""
    monkeypatch.setattr(libero, "find_gl", lambda: "egl")
    monkeypatch.setattr(libero, "in_software", lambda gl: True)
    shutil.copytree(runs / "04", tmp_path / "run")
    last = tmp_path / "run" / "last.pt"
    content = torch.load(last, weights_only=True)
    content["flags"].update(obs="rgb", meshes=stored)
    if not stored:
        del content["flags"]["meshes"]
    torch.save(content, last)
    for call in (["--resume", "--out", last.parent], ["--eval-only", last]):
        args = parse(*call)
        assert args.meshes == args.flags["meshes"] == (stored or "full")
    other = {"simple": "full"}.get(stored, "simple")
    assert parse("--eval-only", last, "--meshes", other).meshes == other
    if stored:
        with pytest.raises(SystemExit):
            parse("--resume", "--out", last.parent, "--meshes", other)


def test_a_perturbed_suite_may_be_named_by_its_ending(tmp_path):
    args = parse("--eval-suites", "_lan", "libero_object_swap", "--out", tmp_path)
    assert args.eval_suites == ["libero_object_lan", "libero_object_swap"]


def test_every_suite_is_tested_under_its_own_time_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(libero, "make_workers", lambda *rest, max_steps, **more: max_steps)
    flags = ["--suite", "libero_goal", "--tasks", 1, "--eval-suites", "libero_spatial", "--out",
             tmp_path]
    args = parse(*flags)
    assert [robot.make_world(args, suite, test=True) for suite in
            (None, "libero_goal_lan", "libero_spatial")] == [300, 300, 220]
    assert robot.make_world(args) == 160                           # training
    args = parse(*flags, "--test-max-steps", 400)
    assert robot.make_world(args, "libero_spatial", test=True) == 400
    assert robot.make_world(args) == 200


def test_a_clone_is_compared_without_building_a_network(runs, tmp_path, monkeypatch):
    """A large one would need its memory twice. The wrong calls above say what is refused."""
    monkeypatch.setattr(robot, "build_policy", None)
    args = parse("--sft", runs / "04" / "sft.pt", "--tasks", 0, 1, "--out", tmp_path)
    config = torch.load(args.sft, weights_only=True)["config"]
    assert config == robot.policy_config(args)                     # nothing is left to a default


@pytest.mark.parametrize("flags, words", [
    ("--episodes 24", ["--episodes 24", "16"]), ("--test-episodes 1", ["--test-episodes"])])
def test_ranks_that_cannot_share_get_one_line(flags, words, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    line = wrong_call(SCRIPT, *flags.split())
    assert all(word in line for word in words), line


# ------------------------------------------------------------------------------------------------
# The real simulator


@sim
def test_rgb_from_recorded_demos_to_evaluation_and_film(recorded, tmp_path, gl,  # noqa: F811
                                                        kept_simulators, monkeypatch):  # noqa: F811
    monkeypatch.setattr(libero, "NUM_OFFICIAL", 1)
    result, told = ran(*"--obs rgb --image-size 48 --sft-steps 3 --episodes 8 --iterations 1 "
                       "--max-steps 4 --test-max-steps 4 --eval-episodes 1 --eval-every 1 "
                       "--num-envs 1 --test-episodes 1 --video 1".split(),
                       "--demos", recorded[0], "--out", tmp_path / "new")
    assert result.keys() >= {"sft", "stepnft"}
    log, = log_of(tmp_path / "new")
    assert log["env_steps"] == "32" and 0 < float(log["loss"]) < 2
    assert log["train_sde"] == "0.0" and "no episode succeeded" in told  # in four control steps
    film, = (tmp_path / "new" / "videos").iterdir()
    assert film.name.startswith("task0_") and film.suffix == ".mp4" and film.stat().st_size > 1000
    policy = load_policy(tmp_path / "new" / "last.pt")
    assert policy.config["cameras"] == 2 and policy.config["state_dim"] == 6


@sim
def test_rgb_sft_beats_a_policy_that_sees_nothing(gl):
    """One rendered demo of the expert trains, another is held out."""
    args = SimpleNamespace(suite="libero_object", tasks=[0], obs="rgb", num_demos=2, seed=0, gl=gl,
                           demos="scripted", demo_noise=0.2, image_size=48, num_envs=2, horizon=4,
                           state_dim=6, action_repeat=1, max_steps=140, policy=None,
                           meshes="simple")
    demos = robot.collect_demos(args)
    assert len(demos) == 2 and demos[0][0]["rgb"].shape[1:] == (2, 3, 48, 48)
    losses = []
    for seen in (1, 0):
        shown = [{k: seen * rows[k] for k in ("state", "rgb")} for rows, _ in demos]
        chunks = [flow.sliding_chunks(actions, 4) for _, actions in demos]
        torch.manual_seed(0)
        policy = RobotPolicy(4, 7, state_dim=6, cameras=2)
        flow.train_sft(policy, shown[0], chunks[0], 200, batch_size=32)
        with torch.no_grad():
            torch.manual_seed(1)
            losses.append(np.mean([flow.flow_matching_loss(
                policy, shown[1], policy.normalise(chunks[1])).item() for _ in range(5)]))
    assert losses[0] < 0.9 * losses[1], losses


def children(pid):
    """Worker processes of a run, from /proc."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            told, command = path.read_text(), (path.parent / "cmdline").read_text()
        except OSError:
            continue
        if told.rsplit(")", 1)[1].split()[1] == str(pid) and "spawn_main" in command:
            found.append(int(path.parent.name))
    return found


def kill_a_worker(script, *flags, cwd, when, wait=1.0):
    """A run whose worker process is killed after a line with `when` -> the one line it answers."""
    run = subprocess.Popen([sys.executable, str(ROOT / script), *map(str, flags)], cwd=cwd,
                           text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE,
                           env={**os.environ, "OMP_NUM_THREADS": "1"})
    while when not in run.stdout.readline():
        assert run.poll() is None, run.stderr.read()
    time.sleep(wait)
    os.kill(children(run.pid)[-1], signal.SIGKILL)
    _, errors = run.communicate(timeout=120)
    lines = errors.strip().splitlines()
    assert run.returncode == 1 and len(lines) == 1, errors
    return lines[0]


@sim
def test_a_worker_that_dies_a_run_resumed_and_perturbed_suites(recorded, tmp_path,  # noqa: F811
                                                               kept_simulators,  # noqa: F811
                                                               monkeypatch):
    """Cut after one iteration, resumed, killed in the second, resumed again: as if never cut."""
    flags = ("--sft-steps 5 --iterations 2 --episodes 48 --max-steps 8 --eval-every 1 "
             "--test-max-steps 8 --eval-episodes 2 --test-episodes 1 --num-envs 1 "
             "--eval-suites _lan --lr 1e-3").split() + ["--demos", recorded[0]]
    monkeypatch.setattr(libero, "NUM_OFFICIAL", 2)
    told, _ = run_and_cut(tmp_path, monkeypatch, *flags)
    line = kill_a_worker(SCRIPT, "--resume", "--out", tmp_path / "cut", "--num-envs", 1,
                         cwd=tmp_path, when="iteration 2/2")
    assert "--resume" in line and "task 0 from placement " in line
    seed = int(line.split("(seed ")[1].split(")")[0])
    assert seed in robot.random_starts(SimpleNamespace(tasks=[0]), "train", 48, 0, 1, group_size=8)
    resumed, _ = ran("--resume", "--out", tmp_path / "cut", "--num-envs", 1)
    same_run(tmp_path / "whole", tmp_path / "cut")
    assert {**told, "seconds": ""} == {**resumed, "seconds": ""}
    rows = table(tmp_path / "cut" / "test.csv")
    assert [(row["policy"], row["suite"], row["episodes"]) for row in rows] == [
        (policy, suite, episodes) for suite, episodes in (
            ("libero_object", "2"), ("libero_object", "1"), ("libero_object_lan", "2"))
        for policy in ("SFT", "pi-StepNFT")]
