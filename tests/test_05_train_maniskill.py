"""05 on the real simulator: physics equal to ManiSkill's own, episodes that do not leak, the
expert, and a whole small run with resume, evaluation and everything a user can get wrong."""

import csv
import importlib
import math

import gymnasium as gym
import numpy as np
import pytest
import torch

from conftest import one_clear_line, run_script

mani = importlib.import_module("05_train_maniskill")
flow, nft = mani.flow, mani.nft

TINY = ["--num-demos", "3", "--sft-steps", "40", "--iterations", "1", "--episodes", "8",
        "--num-envs", "2", "--eval-episodes", "4", "--test-episodes", "4", "--eval-every", "1",
        "--device", "cpu"]


@pytest.fixture(scope="module")
def sim():
    return mani.ManiSkillSim("PickCube-v1")


def episode(sim, seed, actions):
    """The states and successes of one episode under fixed actions."""
    sim.reset([seed], [0])
    states, success = [sim.env.get_state().numpy().copy()], []
    for action in actions:
        success.append(bool(sim.advance(action[None])[0]))
        states.append(sim.env.get_state().numpy().copy())
    return np.concatenate(states), success


def solve(sim, seed):
    """The scripted controller for at most 40 steps -> (its actions, success)."""
    sim.reset([seed], [0])
    actions = []
    while len(actions) < 40:
        actions.append(mani.expert(sim.observe()["state"])[0])
        if sim.advance(actions[-1][None])[0]:
            return actions, True
    return actions, False


def test_the_expert_solves_unseen_episodes(sim):
    lengths = [len(actions) for actions, ok in (solve(sim, s) for s in range(300, 320)) if ok]
    assert len(lengths) == 20 and max(lengths) <= 24


def test_physics_equals_env_step_to_the_last_bit(sim):
    """A whole grasp and random actions, some out of range, against ManiSkill's own step."""
    official = gym.make("PickCube-v1", num_envs=1, sim_backend="physx_cpu", render_backend="none",
                        obs_mode="state", control_mode="pd_ee_delta_pos").unwrapped
    random = np.random.default_rng(0).uniform(-1.5, 1.5, (20, 4)).astype(np.float32)
    for seed, actions in ((7, solve(sim, 7)[0]), (8, list(random))):
        states, success = episode(sim, seed, actions)
        official.reset(seed=seed, options={"reconfigure": True})
        expected = [official.get_state().numpy().copy()]
        for action in actions:
            *_, info = official.step(torch.from_numpy(np.clip(action, -1, 1))[None])
            expected.append(official.get_state().numpy().copy())
        assert np.array_equal(states, np.concatenate(expected))
        assert success[-1] == bool(info["success"])


def test_an_episode_does_not_depend_on_the_one_before(sim):
    actions = solve(sim, 11)[0]
    first = episode(sim, 11, actions)[0]
    for other in (12, 13, 14):
        solve(sim, other)                       # ends with a cube in the hand
        assert np.array_equal(episode(sim, 11, actions)[0], first)
    assert not np.array_equal(episode(sim, 12, actions)[0], first)


def test_the_batched_world_of_the_gpu_path_equals_the_worker_of_the_cpu_path():
    """CudaEnvs and ChunkEnv play the same chunks, here both on the CPU with one simulator."""
    space = gym.spaces.Dict({"state": gym.spaces.Box(-np.inf, np.inf, (mani.STATE_DIM,))})
    one = nft.ChunkEnv(lambda: mani.OneSim("PickCube-v1"), space, 4, 22, 4)
    many = mani.CudaEnvs("PickCube-v1", 1, 22, backend="physx_cpu")
    rng = np.random.default_rng(1)
    for seed, clever in ((21, True), (22, False)):
        a, b = one.reset(seed=seed)[0], many.reset(seed=[seed])[0]
        over = False
        while not over:
            assert np.array_equal(a["state"], b["state"][0])
            chunk = (np.repeat(mani.expert(b["state"]), 1, 0)[:, None] if clever
                     else rng.uniform(-1, 1, (1, 4, 4)).astype(np.float32))
            a, _, *ends_a, info_a = one.step(chunk[0])
            b, _, *ends_b, info_b = many.step(chunk)
            assert [bool(e) for e in ends_a] == [bool(e[0]) for e in ends_b]
            assert (info_a["executed"], info_a["success"]) == (info_b["executed"][0],
                                                               info_b["success"][0])
            over = any(ends_a)
        assert info_a["success"] == clever
        assert one.step(chunk[0])[-1]["executed"] == 0      # nothing happens after the end


def test_validation_test_and_training_never_share_an_episode():
    args = dict(first=mani.TRAIN + 9 * 1_000_000, episodes=256)
    for kind in ("binary", "grouped"):
        assert nft.start_seeds(*args.values(), kind).min() > mani.TEST + 100_000
    assert mani.VALIDATION + 100_000 < mani.TEST


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
    (["--task", "PickSingleYCB-v1"], ["--task PickSingleYCB-v1", "download"]),
    (["--task", "StackCube-v1"], ["--task StackCube-v1", "controller"]),
    (["--num-demos", "0"], ["--num-demos"]),
    (["--episodes", "12"], ["--episodes 12", "8"]),
    (["--eval-only", "nothing.pt"], ["--eval-only nothing.pt"]),
    (["--resume"], ["--resume", "last.pt"]),
    (["--rollout", "ode"], ["--rollout ode", "--target endpoint"]),
])
def test_bad_input_gets_one_line_naming_the_flag(tmp_path, flags, words):
    result = run_script("05_train_maniskill.py", *flags, "--device", "cpu", "--out", "new",
                        cwd=tmp_path, ok=False)
    line = one_clear_line(result)
    assert all(word in line for word in words)
    assert not (tmp_path / "new").exists()


# ------------------------------------------------------------------------------------------------
# The baselines


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


def flow_sde_batch(rows=10, K=4):
    """A batch as rollout(sampler="flow-sde") records it, from a policy on made-up observations."""
    policy = flow.FlowPolicy(3, 2, state_dim=5, width=16)
    obs, k = {"state": torch.randn(rows, 5)}, torch.arange(rows) % K
    _, path = mani.sde.sde_sample(policy, obs, K, 0.3, noisy=k[:, None])
    mask = torch.arange(3) < torch.randint(1, 4, (rows, 1))
    return policy, {"obs": obs, "x": path.x, "v": path.v, "k": k[:, None], "mask": mask,
                    "y": torch.randn(rows), "returns": torch.rand(rows),
                    "episode": torch.arange(rows)}


def test_flow_sde_has_noise_in_one_step_and_the_ode_elsewhere():
    policy, batch = flow_sde_batch()
    for b, k in enumerate(batch["k"][:, 0].tolist()):
        euler = batch["x"][b, :-1] - 0.25 * batch["v"][b]
        off = (batch["x"][b, 1:] - euler).abs().amax((1, 2))
        assert off[k] > 0.01 and (off[torch.arange(4) != k] < 1e-5).all()


def test_the_first_ppo_step_is_the_policy_gradient():
    """At ratio 1 the clipped objective's gradient is -E[A grad log pi]; one SGD step shows it."""
    policy, batch = flow_sde_batch()
    reference = mani.copy.deepcopy(policy)
    info = mani.ppo_update(policy, None, torch.optim.SGD(policy.parameters(), lr=1.0), batch,
                           noise_level=0.3, epochs=1, minibatch=10, grad_clip=1e9)
    objective, dt = 0, 0.25
    for b, k in enumerate(batch["k"][:, 0].tolist()):
        t, x_t = 1 - k / 4, batch["x"][b, k]
        sigma = 0.3 * math.sqrt(t / (1 - (0.75 if k == 0 else t)))
        obs = {"state": batch["obs"]["state"][b:b + 1]}
        v = reference.velocity(x_t[None], torch.tensor([t]), reference.encode(obs))[0]
        x0_hat, x1_hat = x_t - t * v, x_t + (1 - t) * v
        mean = (1 - t + dt) * x0_hat + (t - dt - sigma**2 * dt / (2 * t)) * x1_hat
        std = torch.tensor(sigma * math.sqrt(dt))
        density = torch.distributions.Normal(mean, std).log_prob(batch["x"][b, k + 1])
        objective = objective + batch["y"][b] * density[batch["mask"][b]].sum() / 10
    objective.backward()
    for p, q in zip(policy.parameters(), reference.parameters()):
        torch.testing.assert_close(p.detach(), (q + q.grad).detach(), rtol=1e-3, atol=1e-5)
    assert info["ratio"] == pytest.approx(1, abs=1e-4) and info["clipped"] == 0


def test_ppo_clips_and_its_critic_does_not_train_the_encoder():
    policy, batch = flow_sde_batch()
    critic, before = mani.Critic(5), mani.copy.deepcopy(policy)
    batch["y"] = torch.zeros(10)
    optimizer = torch.optim.Adam([*policy.parameters(), *critic.parameters()], lr=1e-2)
    losses = [mani.ppo_update(policy, critic, optimizer, batch, noise_level=0.3, epochs=20,
                              minibatch=10)["value_loss"] for _ in range(3)]
    assert losses[2] < 0.5 * losses[0]                     # the critic learns its returns
    for p, q in zip(policy.parameters(), before.parameters()):
        torch.testing.assert_close(p, q)                   # no advantage, no change of the policy
    batch["y"] = torch.ones(10)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.5)
    for _ in range(5):
        info = mani.ppo_update(policy, None, optimizer, batch, noise_level=0.3, epochs=10,
                               minibatch=10)
    assert info["clipped"] > 0.5 and info["grad_norm"] < 10


@pytest.mark.parametrize("algo", ["ppo", "grpo"])
def test_a_baseline_trains_and_resumes(tmp_path, algo):
    run_script("05_train_maniskill.py", *TINY, "--algo", algo, "--out", "new", cwd=tmp_path)
    run = run_script("05_train_maniskill.py", *TINY, "--algo", algo, "--out", "new", "--resume",
                     "--iterations", "2", cwd=tmp_path)
    log = list(csv.DictReader(open(tmp_path / "new/log.csv")))
    assert [row["iteration"] for row in log] == ["1", "2"] and f" {algo}=" in run.stdout
    assert ("value_loss" in log[0]) == (algo == "ppo")
