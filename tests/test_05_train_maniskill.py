"""05: PPO and GRPO against their definitions, their runs on the toy world, flags; then whole runs
on the real simulator: resume, evaluation, the OOD suite, images, ranks and a process that dies."""

import copy
import functools
import importlib
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conftest import ROOT, one_clear_line, run_script, wrong_call
from envs import maniskill
from test_04_train_libero import (TOY, Toy, content, kill_a_worker, log_of, ran as ran_script,
                                  run_and_cut, same_run, table)
from test_envs_maniskill import renderer  # noqa: F401 (a fixture)

mani = importlib.import_module("05_train_maniskill")
flow, nft, robot = mani.flow, mani.nft, mani.robot
SCRIPT, sim = "05_train_maniskill.py", pytest.mark.sim
ran = functools.partial(ran_script, script=SCRIPT)

# ------------------------------------------------------------------------------------------------
# The baselines


def test_gae_is_the_sum_of_discounted_deltas_of_each_episode():
    """Against the definition, A_i = sum_j (gamma lambda)^j delta_{i+j}; episodes interleave."""
    episode = torch.tensor([0, 1, 0, 1, 1, 0, 1, 2])
    values, success = torch.randn(8), np.array([True, False, True])
    advantages, returns = mani.gae(values, success, episode, gamma=0.9, lam=0.7)
    for e in range(3):
        V = values[episode == e].tolist() + [0.0]
        rewards = [0.0] * (len(V) - 2) + [float(success[e])]
        deltas = [r + 0.9 * V[i + 1] - V[i] for i, r in enumerate(rewards)]
        wanted = [sum(0.63**j * d for j, d in enumerate(deltas[i:])) for i in range(len(deltas))]
        torch.testing.assert_close(advantages[episode == e], torch.tensor(wanted))
    torch.testing.assert_close(returns, advantages + values)


def flow_sde_batch(rows=40, K=4):
    """A batch as `one_noisy_step` records it, from a policy on made-up observations."""
    policy, obs = flow.FlowPolicy(3, 2, state_dim=5, width=16), {"state": torch.randn(rows, 5)}
    with torch.no_grad():
        actions, record = mani.one_noisy_step(policy, K, 0.3)(obs)
    assert torch.equal(actions, policy.denormalise(record["x"][:, -1]))
    return policy, {**obs, **record, "mask": torch.arange(3) < torch.randint(1, 4, (rows, 1)),
                    "y": torch.randn(rows), "returns": torch.rand(rows),
                    "elapsed": torch.rand(rows), "episode": torch.arange(rows)}


def sigma_of(k, K=4, noise_level=0.3):
    t = 1 - k / K
    return noise_level * math.sqrt(t / (1 - (1 - 1 / K if k == 0 else t)))


def test_flow_sde_has_noise_in_one_step_and_the_ode_elsewhere():
    _, batch = flow_sde_batch()
    assert batch["k"].shape == (40, 1) and set(batch["k"].flatten().tolist()) == {0, 1, 2, 3}
    for b, k in enumerate(batch["k"][:, 0].tolist()):
        euler = batch["x"][b, :-1] - 0.25 * batch["v"][b]
        off = (batch["x"][b, 1:] - euler).abs().amax((1, 2))
        assert off[k] > 0.005 and (off[torch.arange(4) != k] < 1e-5).all()
        wanted = [sigma_of(j) if j == k else 0.0 for j in range(4)]
        assert batch["sigma"][b].tolist() == pytest.approx(wanted, abs=1e-6)


def log_density(policy, batch):
    """log N of each row's noisy step over its executed actions, row by row, from the definition."""
    densities, dt = [], 0.25
    for b, k in enumerate(batch["k"][:, 0].tolist()):
        t, x_t, sigma = 1 - k / 4, batch["x"][b, k], sigma_of(k)
        obs = {"state": batch["state"][b:b + 1]}
        v = policy.velocity(x_t[None], torch.tensor([t]), policy.encode(obs))[0]
        x0_hat, x1_hat = x_t - t * v, x_t + (1 - t) * v
        mean = (1 - t + dt) * x0_hat + (t - dt - sigma**2 * dt / (2 * t)) * x1_hat
        std = torch.tensor(sigma * math.sqrt(dt))
        density = torch.distributions.Normal(mean, std).log_prob(batch["x"][b, k + 1])
        densities.append(density[batch["mask"][b]].sum())
    return torch.stack(densities)


def test_the_first_ppo_step_is_the_policy_gradient():
    """At ratio 1 the clipped objective's gradient is -E[A grad log pi]; one SGD step shows it."""
    policy, batch = flow_sde_batch()
    reference = copy.deepcopy(policy)
    info = mani.ppo_update(policy, None, torch.optim.SGD(policy.parameters(), lr=1.0), batch,
                           epochs=1, minibatch=40, grad_clip=1e9)
    (batch["y"] * log_density(reference, batch)).mean().backward()
    assert max(p.grad.abs().max() for p in reference.parameters()) > 0.01
    for p, q in zip(policy.parameters(), reference.parameters()):
        torch.testing.assert_close(p.detach(), (q + q.grad).detach(), rtol=1e-3, atol=1e-4)
    assert info["approx_kl"] == pytest.approx(0, abs=1e-4) and info["clipped"] == 0


def test_later_ppo_steps_are_the_gradient_of_the_clipped_objective():
    """From a policy that has moved: rows beyond the clip, on the side that pays, teach nothing."""
    acted, batch = flow_sde_batch()
    policy = copy.deepcopy(acted)
    with torch.no_grad():
        for p in policy.parameters():
            p += 0.3 * torch.randn_like(p)
    reference = copy.deepcopy(policy)
    mani.ppo_update(policy, None, torch.optim.SGD(policy.parameters(), lr=1.0), batch, epochs=1,
                    minibatch=40, grad_clip=1e9, target_kl=1e9)
    with torch.no_grad():
        before = log_density(acted, batch)
    ratio = (log_density(reference, batch) - before).exp()
    gains, clipped = 0, 0
    for r, A in zip(ratio, batch["y"].tolist()):
        if (A > 0 and r > 1.2) or (A < 0 and r < 0.8):
            clipped += 1
        else:
            gains = gains + r * A / 40
    assert 3 < clipped < 37
    gains.backward()
    for p, q in zip(policy.parameters(), reference.parameters()):
        torch.testing.assert_close(p.detach(), (q + q.grad).detach(), rtol=1e-3, atol=1e-3)


def test_ppo_clips_and_its_critic_does_not_train_the_encoder():
    policy, batch = flow_sde_batch()
    critic, before = mani.Critic(5), copy.deepcopy(policy)
    batch["y"] = torch.zeros(40)
    optimizer = torch.optim.Adam([*policy.parameters(), *critic.parameters()], lr=1e-2)
    losses = [mani.ppo_update(policy, critic, optimizer, batch, epochs=20, minibatch=40)
              ["value_loss"] for _ in range(3)]
    assert losses[2] < 0.5 * losses[0]                     # the critic learns its returns
    for p, q in zip(policy.parameters(), before.parameters()):
        assert torch.equal(p, q)                           # no advantage, no change of the policy
    ctx = torch.randn(3, 5, requires_grad=True)
    critic(ctx, torch.rand(3)).sum().backward()
    assert ctx.grad is None
    batch["y"] = torch.ones(40)
    optimizer = torch.optim.SGD(policy.parameters(), lr=2.0)
    for _ in range(5):
        info = mani.ppo_update(policy, None, optimizer, batch, epochs=10, minibatch=40,
                               target_kl=1e9)
    assert info["clipped"] > 0.5


def test_the_critics_loss_is_that_of_its_returns():
    policy, batch = flow_sde_batch()
    critic = mani.Critic(5)
    ctx = policy.encode(batch).detach()
    with torch.no_grad():
        inputs = torch.cat([ctx, batch["elapsed"][:, None]], 1)
        values = critic.net(inputs)[:, 0]
        wanted = (0.5 * (values - batch["returns"])**2).mean().item()
    optimizer = torch.optim.Adam([*policy.parameters(), *critic.parameters()])
    info = mani.ppo_update(policy, critic, optimizer, batch, epochs=1, minibatch=40)
    assert info["value_loss"] == pytest.approx(wanted, rel=1e-4)


def test_the_critic_sees_the_time():
    episode = torch.tensor([0, 1, 0, 2, 1, 0, 2])
    wanted = [episode[:row].tolist().count(e) / 6 for row, e in enumerate(episode.tolist())]
    elapsed = mani.elapsed_time(episode, 6)
    assert elapsed.dtype == torch.float32 and elapsed.tolist() == pytest.approx(wanted)
    critic, ctx = mani.Critic(5), torch.randn(1, 5).expand(2, 5)
    early, late = critic(ctx, torch.tensor([0.0, 1.0])).tolist()
    assert early != late


def vector(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def watched_update(policy, critic, batch, **options):
    """ppo_update with Adam, whole batches -> the policy's (and critic's) parameters before each
    optimisation step and after the last, and the approximate KL of each of these policies."""
    seen, before, optimise = [], log_density(policy, batch).detach(), nft.optimise

    def look():
        with torch.no_grad():
            log_ratio = log_density(policy, batch) - before
        seen.append((vector(policy), vector(critic) if critic else None,
                     (log_ratio.exp() - 1 - log_ratio).mean().item()))

    def watching(*inputs):
        look()
        return optimise(*inputs)

    learners = torch.nn.ModuleList([policy, critic] if critic else [policy])
    optimizer = torch.optim.Adam(learners.parameters(), lr=5e-3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nft, "optimise", watching)
        info = mani.ppo_update(policy, critic, optimizer, batch, epochs=30, minibatch=40, **options)
    look()
    return seen, info


def test_too_far_from_the_old_policy_the_policy_rests_and_the_critic_goes_on():
    """Bitwise, with Adam, whose momentum would go on if a gradient were zero instead of none."""
    policy, batch = flow_sde_batch()
    seen, info = watched_update(policy, mani.Critic(5), batch)
    far = next((i for i, (_, _, kl) in enumerate(seen) if kl > 0.05), 0)
    assert 3 < far < 25 and len(seen) == 31
    for i in range(30):
        (policy_a, critic_a, _), (policy_b, critic_b, _) = seen[i:i + 2]
        assert torch.equal(policy_a, policy_b) == (i >= far)
        assert not torch.equal(critic_a, critic_b)
    assert info["resting"] == pytest.approx((30 - far) / 30)


def test_too_far_from_the_old_policy_grpo_stops():
    policy, batch = flow_sde_batch()
    seen, info = watched_update(policy, None, batch, target_kl=0.02)
    kls = [kl for _, _, kl in seen]
    assert 3 < len(seen) < 25 and kls[-1] > 0.02 >= max(kls[:-1])
    assert "value_loss" not in info


def test_the_critics_gradient_does_not_shorten_the_policys():
    """The same batch with a critic that is far off and without one: the policy moves alike."""
    policy, batch = flow_sde_batch()
    batch["returns"], moved = 100 * batch["returns"], []
    for critic in (None, mani.Critic(5)):
        learner = copy.deepcopy(policy)
        modules = [learner] + ([critic] if critic else [])
        optimizer = torch.optim.SGD([p for m in modules for p in m.parameters()], lr=0.1)
        torch.manual_seed(1)
        mani.ppo_update(learner, critic, optimizer, batch, epochs=1, minibatch=40, grad_clip=0.01)
        moved.append(torch.cat([p.detach().flatten() for p in learner.parameters()]))
    torch.testing.assert_close(*moved)
    assert not torch.equal(moved[0], torch.cat([p.flatten() for p in policy.parameters()]))


def test_an_action_dim_that_hardly_moves_in_the_demos_earns_no_credit():
    policy, batch = flow_sde_batch()
    policy.action_scale[1] = 0.05
    before = policy.head[-1].weight.detach().clone().view(3, 2, -1)               # (H, A, width)
    mani.ppo_update(policy, None, torch.optim.SGD(policy.parameters(), lr=1.0), batch, epochs=1,
                    minibatch=40)
    moved = (policy.head[-1].weight.view(3, 2, -1) - before).abs().amax((0, 2))
    assert moved[0] > 0 and moved[1] == 0


# ------------------------------------------------------------------------------------------------
# Advantages


def learn(monkeypatch, algo, success, batch, policy, **flags):
    """PPO.learn without its update -> the batch that it would have learned from."""
    args = SimpleNamespace(algo=algo, seed=0, device="cpu", epochs=1, minibatch=9, group_size=2,
                           max_steps=10, horizon=3, num_steps=4, noise_level=0.3, target_kl=0.05)
    method = mani.make_method(args, policy)
    seen = []
    monkeypatch.setattr(mani, "ppo_update", lambda policy, critic, optimizer, batch, **options:
                        seen.append((critic, batch)) or {})
    method.learn(policy, None, batch, success)
    return method, *seen[0]


def policy_with_context():
    policy, batch = flow_sde_batch(12)
    policy.context_dim = 5
    batch["episode"] = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 3, 0])
    return policy, batch


def test_ppos_advantages_are_normalised_gae_of_a_critic_that_knows_the_time(monkeypatch):
    policy, batch = policy_with_context()
    success = np.array([True, False, False, True])
    method, critic, seen = learn(monkeypatch, "ppo", success, dict(batch), policy)
    assert critic is method.critic and method.beside == [critic] and method.decay(3) == 0
    elapsed = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 3]) / 4   # ten steps are four chunks
    torch.testing.assert_close(seen["elapsed"], elapsed)
    with torch.no_grad():
        values = critic.net(torch.cat([policy.encode(batch), elapsed[:, None]], 1))[:, 0]
    wanted = torch.zeros(12)
    for e in range(4):
        rows = torch.where(batch["episode"] == e)[0].tolist()
        A, V_next = 0.0, 0.0
        for i in reversed(rows):
            reward = float(success[e]) if i == rows[-1] else 0.0
            A = reward + 0.99 * V_next - values[i].item() + 0.99 * 0.95 * A
            V_next, wanted[i] = values[i].item(), A
    torch.testing.assert_close(seen["returns"], wanted + values, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen["y"], (wanted - wanted.mean()) / wanted.std(), rtol=1e-3,
                               atol=1e-4)


def test_grpos_advantages_are_normalised_differences_to_the_mean_of_a_start(monkeypatch):
    """And nothing else: the start that always succeeds has none, though its rows are many."""
    policy, batch = policy_with_context()
    success = np.array([True, False, True, True])
    method, critic, seen = learn(monkeypatch, "grpo", success, dict(batch), policy)
    assert critic is None and not method.beside
    raw = torch.tensor([1.0, -1, 0, 0])[batch["episode"]]   # starts: episodes 0 and 1, 2 and 3
    assert raw.mean() != 0
    torch.testing.assert_close(seen["y"], raw / raw.std(), rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------
# Whole runs on the toy world


@pytest.fixture
def toy(monkeypatch):
    def toy_world(args, demo_noise=None, film=None):
        return Toy(11, 4, demo_noise)

    monkeypatch.setattr(mani, "make_world", toy_world)
    monkeypatch.setattr(Toy, "played", [])


@pytest.mark.parametrize("algo", ["stepnft", "ppo", "grpo"])
def test_a_run_cut_short_and_resumed_is_the_run_that_was_not(toy, tmp_path, monkeypatch, algo):
    """Log, tables and every tensor, the critic's and Adam's too; also what the run tells."""
    told, out = run_and_cut(tmp_path, monkeypatch, *TOY, "--algo", algo, script=SCRIPT)
    assert set(told) == {"task", "sft", algo, "episodes", "env_steps", "seconds"}
    log = log_of(tmp_path / "whole")
    assert ("value_loss" in log[0]) == (algo == "ppo") and ("drift" in log[0]) == (
        algo == "stepnft")
    assert any(name.startswith("/beside0") for name in content(tmp_path / "whole")) == (
        algo == "ppo")
    resumed, _ = ran("--resume", "--out", tmp_path / "cut")
    same_run(tmp_path / "whole", tmp_path / "cut")
    assert {**told, "seconds": ""} == {**resumed, "seconds": ""}
    only, _ = ran("--eval-only", tmp_path / "cut" / "last.pt", "--out", tmp_path / "cut")
    assert only["success"] == told[algo] and len(table(tmp_path / "cut" / "test.csv")) == 3


def test_training_validation_test_and_ood_share_no_start(toy, tmp_path):
    ran(*TOY, "--eval-ood", "--ood-episodes", 7, "--seed", 123456789, "--out", tmp_path / "new")
    demos = [seeds for scripted, seeds in Toy.played if scripted]
    others = [seeds for scripted, seeds in Toy.played if not scripted]
    validation, train, test = (others[i] for i in (0, 1, 6))
    ood = others[8:]
    suite = maniskill.variants("PickCube-v1", "state")
    assert len(ood) == 2 * len(suite) and all(seeds == ood[0] for seeds in ood)
    assert others[3] == others[5] == validation and others[7] == test
    kinds = [set(seeds) for seeds in (sum(demos, []), train, others[2], others[4], validation,
                                      test, ood[0])]
    assert [len(kind) for kind in kinds] == [3, 2, 2, 2, 9, 10, 7]
    assert len(set.union(*kinds)) == sum(map(len, kinds))


def test_the_ood_mean_is_the_mean_of_the_axes(tmp_path, monkeypatch, capsys):
    """Successes chosen per variant; the printed means and the rows against the definition."""
    args = SimpleNamespace(task="PutOnPad-v1", obs="state", ood_episodes=10, num_steps=4,
                           out=tmp_path)
    suite, now = maniskill.variants(args.task, args.obs), []
    wins = {variant: k % 4 for k, (_, variant, _) in enumerate(suite)}
    named = {str(changes): variant for _, variant, changes in suite}
    world = SimpleNamespace(change=lambda changes: now.append(named[str(changes)]))
    monkeypatch.setattr(robot, "evaluate", lambda policy, world, seeds, steps:
                        np.arange(len(seeds)) < wins[now[-1]] + policy)
    mani.test_ood({"a": 0, "b": 3}, args, world)
    assert now == [variant for _, variant, _ in suite]
    header, a, b = [line.split() for line in capsys.readouterr().out.splitlines()[-3:]]
    assert header == ["in-distribution", "vision", "semantic", "execution", "OOD", "mean"]
    for line, bonus in ((a, 0), (b, 3)):
        means = [np.mean([wins[v] + bonus for axis, v, _ in suite if axis == x]) / 10
                 for x in header[:4]]
        assert [float(z) for z in line[1:]] == pytest.approx([*means, np.mean(means[1:])],
                                                             abs=6e-4)
    rows = table(tmp_path / "test.csv")
    assert [(row["axis"], row["variant"], row["policy"]) for row in rows] == [
        (axis, variant, name) for axis, variant, _ in suite for name in ("a", "b")]
    for row in rows:
        assert float(row["success"]) == (wins[row["variant"]] + 3 * (row["policy"] == "b")) / 10


# ------------------------------------------------------------------------------------------------
# Flags


def parse(*flags):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [SCRIPT])
        return mani.parse_args([str(flag) for flag in flags])


@pytest.fixture(scope="module")
def run05(tmp_path_factory):
    """The folder of a finished toy run with --algo grpo, never changed."""
    folder = tmp_path_factory.mktemp("runs") / "grpo"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mani, "make_world", lambda args, demo_noise=None, film=None:
                      Toy(11, 4, demo_noise))
        ran(*TOY, "--iterations", 1, "--algo", "grpo", "--out", folder)
    return folder


WRONG = [
    ("--task PickCub-v1", "--task PickCub-v1", "PickCube-v1"),
    ("--task PickSingleYCB-v1", "--task PickSingleYCB-v1", "controller"),
    ("--task RollBall-v1", "--task RollBall-v1", "controller"),
    ("--sft nothing.pt", "--sft", "nothing.pt"), ("--sft README", "--sft", "checkpoint"),
    ("--ood-episodes 0", "--ood-episodes"), ("--test-episodes 0", "--test-episodes"),
    ("--num-demos 0", "--num-demos"), ("--episodes 12", "--episodes 12", "8"),
    ("--eval-only nothing.pt", "--eval-only", "nothing.pt"), ("--eval-only README", "--eval-only"),
    ("--resume", "--resume", "last.pt"), ("--out RUN", "--out", "--resume"),
    ("--out a_file/new", "--out a_file"), ("--device nonsense", "--device"),
    ("--lr 0", "--lr"), ("--lr nan", "--lr"), ("--noise-level nan", "--noise-level"),
    ("--ema 2 3", "--ema"), ("--ema 0.9 0.1", "--ema 0.9 0.1"), ("--eval-every 0", "--eval-every"),
    ("--minibatch 0", "--minibatch"), ("--epochs 0", "--epochs"), ("--seed -1", "--seed"),
    ("--horizon 0", "--horizon"), ("--algo reinforce", "--algo"), ("--rollout ode", "--rollout"),
    ("--algo grpo --group-size 1", "--group-size 1", "grpo"),
    ("--resume --out RUN --algo stepnft", "--algo stepnft", "grpo"),
    ("--resume --out RUN --algo ppo", "--algo ppo", "grpo"),
    ("--resume --out RUN --task PushCube-v1", "--task PushCube-v1"),
    ("--eval-only RUN/last.pt --horizon 8", "--horizon 8"),
    ("--eval-only RUN/sft.pt --obs rgb", "--obs rgb"),
    ("--sft RUN/sft.pt --task PutOnPad-v1", "--sft"),
    *[(f"--algo {algo} {flag}", flag.split()[0], algo) for algo in ("ppo", "grpo")
      for flag in ("--target endpoint", "--beta 0.5", "--max-drift 1", "--dpo-beta 0.1",
                   "--ema 0.1 0.9", "--transitions one")]]


@pytest.mark.parametrize("flags, words", [(flags, words) for flags, *words in WRONG],
                         ids=[flags for flags, *_ in WRONG])
def test_a_wrong_call_gets_one_line_that_names_the_flag(flags, words, run05):
    before = {path: path.stat().st_mtime_ns for path in run05.rglob("*")}
    flags = [flag.replace("RUN", str(run05)).replace("README", str(ROOT / "README.md"))
             for flag in flags.split()]
    line = wrong_call(SCRIPT, *flags)
    assert all(word in line for word in words), line
    assert {path: path.stat().st_mtime_ns for path in run05.rglob("*")} == before


def test_a_checkpoint_of_05_is_refused_by_04(run05):
    for call in (("--eval-only", run05 / "last.pt"), ("--resume", "--out", run05)):
        assert SCRIPT in wrong_call("04_train_libero.py", *call)
    assert "--sft" in wrong_call("04_train_libero.py", "--sft", run05 / "sft.pt")


def test_a_wrong_call_leaves_nothing_but_its_line(tmp_path):
    """Once as a user calls it: no warning beside the line, either."""
    done = run_script(SCRIPT, "--task", "PickCub-v1", cwd=tmp_path, ok=False)
    assert "--task PickCub-v1" in one_clear_line(done) and not any(tmp_path.iterdir())


def test_without_a_driver_one_line_says_how_to_get_one(tmp_path, monkeypatch):
    monkeypatch.setenv("VK_ICD_FILENAMES", str(tmp_path / "none.json"))
    line = wrong_call(SCRIPT, "--obs", "rgb")
    assert "--obs rgb" in line and "chromium-common" in line and "VK_ICD_FILENAMES" in line


# ------------------------------------------------------------------------------------------------
# The real simulator


TINY = ("--num-demos 2 --sft-steps 20 --iterations 2 --episodes 8 --num-envs 1 --eval-episodes 2 "
        "--test-episodes 2 --eval-every 2 --max-steps 12 --demo-noise 0.02 --device cpu").split()


@pytest.fixture(scope="module")
def shared():
    """Simulators are built once and handed to every run of this file that asks for the same ones:
    an episode does not depend on the one before."""
    made, make_workers = {}, maniskill.make_workers

    def make(*args, **more):
        key = str((args, more))
        if key not in made:
            made[key] = make_workers(*args, **more)
            made[key].really_close, made[key].close = made[key].close, lambda: None
        made[key].change(changes={})
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(maniskill, "make_workers", make)
        yield
    for workers in made.values():
        workers.really_close()


@sim
@pytest.mark.parametrize("algo", ["stepnft", "grpo"])
def test_a_run_on_the_simulator_resumes_and_evaluates(shared, tmp_path, monkeypatch, algo):
    told, _ = run_and_cut(tmp_path, monkeypatch, *TINY, "--algo", algo, script=SCRIPT)
    assert told["task"] == "PickCube-v1" and told["episodes"] == "16"
    assert 16 <= int(told["env_steps"]) <= 16 * 12
    assert (tmp_path / "whole" / "learning.png").stat().st_size > 5000
    assert all(math.isfinite(float(row["loss"])) for row in log_of(tmp_path / "whole"))
    ran("--resume", "--out", tmp_path / "cut", "--num-envs", 1)
    same_run(tmp_path / "whole", tmp_path / "cut")
    only, _ = ran("--eval-only", tmp_path / "cut" / "sft.pt", "--out", tmp_path / "only",
                  "--num-envs", 1)
    assert only["success"] == told["sft"] and only["episodes"] == "2"


@sim
def test_the_ood_table_has_a_row_with_its_interval_for_each_variant(shared, tmp_path):
    args = parse("--task", "PutOnPad-v1", "--max-steps", 4, "--device", "cpu", "--test-episodes", 2,
                 "--out", tmp_path)
    robot.save(tmp_path / "p.pt", mani.make_policy(args),
               SimpleNamespace(flags=args.flags))
    _, out = ran("--eval-only", tmp_path / "p.pt", "--eval-ood", "--ood-episodes", 2, "--num-envs",
                 1, "--out", tmp_path / "new")
    rows, suite = table(tmp_path / "new" / "test.csv"), maniskill.variants(args.task, "state")
    assert [(row["axis"], row["variant"]) for row in rows] == [("test", "as in training")] + [
        (axis, variant) for axis, variant, _ in suite]
    for row in rows:
        assert row["episodes"] == "2" and row["policy"] == str(tmp_path / "p.pt")
        interval = robot.rated(np.arange(2) < 2 * float(row["success"]))
        assert float(row["low"]) == pytest.approx(interval["low"], abs=1e-4)
        assert float(row["high"]) == pytest.approx(interval["high"], abs=1e-4)
    assert "OOD mean" in out


@sim
def test_a_worker_that_dies_ends_the_run_in_one_line(tmp_path):
    flags = [*TINY, "--iterations", 1, "--episodes", 800, "--out", "new"]
    line = kill_a_worker(SCRIPT, *flags, cwd=tmp_path, when="iteration 1/1")
    assert "--resume" in line and " of PickCube-v1" in line
    seeds = gap_world.episode_seeds("train", 100, 0, 0)
    assert int(line.split("episode ")[1].split()[0]) in seeds


@sim
def test_two_ranks_of_torchrun_share_the_episodes_of_one_run(tmp_path):
    flags = [*TINY, *"--algo ppo --eval-ood --ood-episodes 2 --iterations 1 --episodes 16 "
             "--test-episodes 3 --out new".split(), "--sft", str(tmp_path / "sft.pt")]
    policy = robot.RobotPolicy(4, 4, state_dim=11, width=256)
    robot.save(tmp_path / "sft.pt", policy, SimpleNamespace(flags={}))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    run = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2",
                          "--standalone", str(ROOT / SCRIPT), *flags], cwd=tmp_path, text=True,
                         capture_output=True, timeout=400, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.count("RESULT") == 1          # rank 1 is silent
    log, = log_of(tmp_path / "new")
    assert 16 <= int(log["env_steps"]) <= 16 * 12 and float(log["train_sde"]) * 16 % 1 == 0
    rows = table(tmp_path / "new" / "test.csv")
    assert [row["variant"] for row in rows[2::2]] == [
        variant for _, variant, _ in maniskill.variants("PickCube-v1", "state")]
    assert all(row["episodes"] == ("3" if row["axis"] == "test" else "2") for row in rows)
    assert {path.name for path in tmp_path.iterdir()} == {"new", "sft.pt"}


@sim
def test_images_train_end_to_end_and_are_filmed(renderer, tmp_path, monkeypatch):
    """PutOnPad by camera, with a sentence; sampled, learned from, tested and filmed. The simulator
    takes long to build where nothing but the CPU draws, so SFT is borrowed. Its two episodes would
    fail alike, and teach nothing: one is called a success."""
    import imageio
    monkeypatch.setattr(nft, "labels", lambda success, episode, group_size: 1.0 - 2 * episode)
    optimise, gradients = nft.optimise, []

    def watching(policy, *more):
        norm = optimise(policy, *more)
        gradients.extend(p.grad.abs().max() for p in policy.image_encoder.parameters())
        return norm

    monkeypatch.setattr(nft, "optimise", watching)
    flags = parse("--task", "PutOnPad-v1", "--obs", "rgb", "--out", tmp_path).flags
    sft = robot.RobotPolicy(4, 4, state_dim=5, cameras=1, language=True, width=256)
    robot.save(tmp_path / "sft.pt", sft, SimpleNamespace(flags=flags))
    result, _ = ran(*"--task PutOnPad-v1 --obs rgb --iterations 1 --episodes 2 --group-size 2 "
                    "--max-steps 8 --eval-every 1 --eval-episodes 1 --test-episodes 1 --num-envs 1 "
                    "--video 1 --lr 1e-3 --device cpu".split(), "--sft", tmp_path / "sft.pt",
                    "--out", tmp_path / "new")
    assert 2 <= int(result["env_steps"]) <= 2 * 8
    film, = (tmp_path / "new" / "videos").glob("*.mp4")
    assert film.name.split("_")[-1] in ("success.mp4", "failure.mp4")
    assert 1 <= imageio.get_reader(film).count_frames() <= 8
    policy = robot.load_policy(tmp_path / "new" / "last.pt")
    assert policy.config == sft.config
    assert not torch.equal(vector(policy.image_encoder), vector(sft.image_encoder))
    assert max(gradients) > 1e-8  # Adam makes steps of rounding errors, too
