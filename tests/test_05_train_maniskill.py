"""05: PPO and GRPO against their definitions, the update that it shares with 04, its loop by the
diary of a run, flags; whole runs on the toy world and on PixelGap; then the real simulator."""

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
from scipy import stats

from conftest import ROOT, one_clear_line, run_process, wrong_call
from envs import maniskill, pixel_gap
from envs.gap_world import episode_seeds
from policies import build_policy, load_policy
from policies.critic import Critic
from policies.small import RobotPolicy
from test_04_train_libero import (FILM, UPDATE_CHECKS, alphas,
                                  check_each_iteration_has_its_random_stream,
                                  check_each_iteration_has_its_starts, check_noise_in_every_step,
                                  check_the_learning_rate_falls_linearly, check_the_log,
                                  check_what_is_saved, check_who_does_what, kept, kill_a_worker,
                                  vector)
from test_envs_maniskill import renderer  # noqa: F401 (a fixture)
from tools import ranks, run
from toy_robot import (TOY, Toy, compare as mani, content, diary_of, dress, log_of,
                       ran as ran_script, run_and_cut, same_run, table)

flow, nft = map(importlib.import_module, ("01_flow_policy", "03_step_loss"))
SCRIPT, sim = "05_train_maniskill.py", pytest.mark.sim
ran = functools.partial(ran_script, script=SCRIPT)


@pytest.mark.parametrize("check", UPDATE_CHECKS, ids=lambda check: check.__name__)
def test_update(check):
    check(mani)


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


def flags(**changes):
    """The flags that `ppo_update` looks at: whole batches, and no rest."""
    given = dict(algo="ppo", epochs=1, minibatch=40, target_kl=1e9, device="cpu", num_steps=4,
                 noise_level=0.3)
    return SimpleNamespace(**{**given, **changes})


def flow_sde_batch(rows=40, K=4, algo="ppo"):
    """A batch as 05 records it, from a policy on made-up observations."""
    policy, obs = flow.FlowPolicy(3, 2, state_dim=5, width=16), {"state": torch.randn(rows, 5)}
    policy.action_scale.copy_(torch.tensor([0.5, 0.8]))
    with torch.no_grad():
        explore = mani.noisy_chunk if algo == "ppo-action" else mani.one_noisy_step
        actions, record = explore(policy, K, 0.3)(obs)
    acted = record["chunk"] if algo == "ppo-action" else record["x"][:, -1]
    assert torch.equal(actions, policy.denormalise(acted))
    return policy, {**obs, **record, "mask": torch.arange(3) < torch.randint(1, 4, (rows, 1)),
                    "y": torch.randn(rows), "returns": torch.rand(rows),
                    "elapsed": torch.rand(rows), "episode": torch.arange(rows)}


def sigma_of(k, K=4, noise_level=0.3):
    t = 1 - k / K
    return noise_level * math.sqrt(t / (1 - (1 - 1 / K if k == 0 else t)))


def test_flow_sde_has_noise_in_one_step_and_the_ode_elsewhere():
    _, batch = flow_sde_batch()
    assert batch["k"].shape == (40,) and set(batch["k"].tolist()) == {0, 1, 2, 3}
    for b, k in enumerate(batch["k"].tolist()):
        euler = batch["x"][b, :-1] - 0.25 * batch["v"][b]
        off = (batch["x"][b, 1:] - euler).abs().amax((1, 2))
        assert off[k] > 0.005 and (off[torch.arange(4) != k] < 1e-5).all()
        wanted = [sigma_of(j) if j == k else 0.0 for j in range(4)]
        assert batch["sigma"][b].tolist() == pytest.approx(wanted, abs=1e-6)


def test_the_chunks_noise_is_on_the_executed_actions_alone():
    policy, batch = flow_sde_batch(rows=300, algo="ppo-action")
    torch.testing.assert_close(batch["x"], flow.ode_path(policy, batch, 4, batch["x"][:, 0]))
    noise = (batch["chunk"] - batch["x"][:, -1]) / 0.3
    assert stats.kstest(noise.flatten(), "norm").pvalue > 1e-3


def log_density(policy, batch):
    """log N of what was noisy in each row over its executed actions, row by row, from the
    definition: of the chunk, or of one step."""
    densities, dt = [], 0.25
    if "chunk" in batch:
        for b in range(len(batch["chunk"])):
            x, ctx = batch["x"][b:b + 1, 0], policy.encode({"state": batch["state"][b:b + 1]})
            for t in (1.0, 0.75, 0.5, 0.25):
                x = x - dt * policy.velocity(x, torch.tensor([t]), ctx)
            density = torch.distributions.Normal(x[0], torch.tensor(0.3)).log_prob(
                batch["chunk"][b])
            densities.append(density[batch["mask"][b]].sum())
        return torch.stack(densities)
    for b, k in enumerate(batch["k"].tolist()):
        t, x_t, sigma = 1 - k / 4, batch["x"][b, k], sigma_of(k)
        obs = {"state": batch["state"][b:b + 1]}
        v = policy.velocity(x_t[None], torch.tensor([t]), policy.encode(obs))[0]
        x0_hat, x1_hat = x_t - t * v, x_t + (1 - t) * v
        mean = (1 - t + dt) * x0_hat + (t - dt - sigma**2 * dt / (2 * t)) * x1_hat
        std = torch.tensor(sigma * math.sqrt(dt))
        density = torch.distributions.Normal(mean, std).log_prob(batch["x"][b, k + 1])
        densities.append(density[batch["mask"][b]].sum())
    return torch.stack(densities)


def check_a_step_of_one(policy, reference, info, tolerance=1e-4):
    """SGD with learning rate 1 went up reference's gradient, which is cut at length 1."""
    gradient = torch.cat([p.grad.flatten() for p in reference.parameters()])
    assert info["grad_norm"] == pytest.approx(gradient.norm().item(), rel=1e-3)
    wanted = vector(reference) + gradient / max(1, gradient.norm())
    torch.testing.assert_close(vector(policy), wanted, rtol=1e-3, atol=tolerance)


@pytest.mark.parametrize("algo", ["ppo", "ppo-action"])
def test_the_first_ppo_step_is_the_policy_gradient(algo):
    """At ratio 1 the clipped objective's gradient is -E[A grad log pi]; one SGD step shows it."""
    policy, batch = flow_sde_batch(algo=algo)
    reference = copy.deepcopy(policy)
    info = mani.ppo_update(policy, None, torch.optim.SGD(policy.parameters(), lr=1.0), batch,
                           flags(algo=algo))
    (batch["y"] * log_density(reference, batch)).mean().backward()
    assert max(p.grad.abs().max() for p in reference.parameters()) > 0.01
    check_a_step_of_one(policy, reference, info)
    assert info["approx_kl"] == pytest.approx(0, abs=1e-4) and info["clipped"] == 0


@pytest.mark.parametrize("algo", ["ppo", "ppo-action"])
def test_later_ppo_steps_are_the_gradient_of_the_clipped_objective(algo):
    """From a policy that has moved: rows beyond the clip, on the side that pays, teach nothing."""
    acted, batch = flow_sde_batch(algo=algo)
    policy = copy.deepcopy(acted)
    with torch.no_grad():
        for p in policy.parameters():
            p += 0.3 * torch.randn_like(p)
    reference = copy.deepcopy(policy)
    info = mani.ppo_update(policy, None, torch.optim.SGD(policy.parameters(), lr=1.0), batch,
                           flags(algo=algo))
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
    check_a_step_of_one(policy, reference, info, tolerance=1e-3)
    assert info["clipped"] == pytest.approx(((ratio - 1).abs() > 0.2).float().mean().item())


def test_ppo_clips_and_its_critic_does_not_train_the_encoder():
    policy, batch = flow_sde_batch()
    critic, before = Critic(5), copy.deepcopy(policy)
    batch["y"] = torch.zeros(40)
    optimizer = torch.optim.Adam([*policy.parameters(), *critic.parameters()], lr=1e-2)
    losses = [mani.ppo_update(policy, critic, optimizer, batch, flags(epochs=20))["value_loss"]
              for _ in range(3)]
    assert losses[2] < 0.5 * losses[0]                     # the critic learns its returns
    for p, q in zip(policy.parameters(), before.parameters()):
        assert torch.equal(p, q)                           # no advantage, no change of the policy
    ctx = torch.randn(3, 5, requires_grad=True)
    critic(ctx, torch.rand(3)).sum().backward()
    assert ctx.grad is None
    batch["y"] = torch.ones(40)
    optimizer = torch.optim.SGD(policy.parameters(), lr=2.0)
    for _ in range(5):
        info = mani.ppo_update(policy, None, optimizer, batch, flags(epochs=10))
    assert info["clipped"] > 0.5


def test_the_critics_loss_is_that_of_its_returns():
    policy, batch = flow_sde_batch()
    critic = Critic(5)
    ctx = policy.encode(batch).detach()
    with torch.no_grad():
        inputs = torch.cat([ctx, batch["elapsed"][:, None]], 1)
        values = critic.net(inputs)[:, 0]
        wanted = (0.5 * (values - batch["returns"])**2).mean().item()
    optimizer = torch.optim.Adam([*policy.parameters(), *critic.parameters()])
    info = mani.ppo_update(policy, critic, optimizer, batch, flags())
    assert info["value_loss"] == pytest.approx(wanted, rel=1e-4)


def test_the_critic_sees_the_time():
    episode = torch.tensor([0, 1, 0, 2, 1, 0, 2])
    wanted = [episode[:row].tolist().count(e) / 6 for row, e in enumerate(episode.tolist())]
    elapsed = mani.elapsed_time(episode, 6)
    assert elapsed.dtype == torch.float32 and elapsed.tolist() == pytest.approx(wanted)
    critic, ctx = Critic(5), torch.randn(1, 5).expand(2, 5)
    early, late = critic(ctx, torch.tensor([0.0, 1.0])).tolist()
    assert early != late


def watched_update(policy, critic, batch, target_kl=0.05):
    """ppo_update with Adam, whole batches -> the policy's (and critic's) parameters before each
    optimisation step and after the last, and the approximate KL of each of these policies."""
    seen, before, optimise = [], log_density(policy, batch).detach(), nft.optimise

    def look():
        with torch.no_grad():
            log_ratio = log_density(policy, batch) - before
        seen.append((vector(policy), vector(critic) if critic else None,
                     (log_ratio.exp() - 1 - log_ratio).mean().item()))

    def watching(*inputs, **more):
        look()
        return optimise(*inputs, **more)

    learners = torch.nn.ModuleList([policy, critic] if critic else [policy])
    optimizer = torch.optim.Adam(learners.parameters(), lr=5e-3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nft, "optimise", watching)
        info = mani.ppo_update(policy, critic, optimizer, batch,
                               flags(epochs=30, target_kl=target_kl))
    look()
    return seen, info


def test_too_far_from_the_old_policy_the_policy_rests_and_the_critic_goes_on():
    """Bitwise, with Adam, whose momentum would go on if a gradient were zero instead of none."""
    policy, batch = flow_sde_batch(rows=16)
    seen, info = watched_update(policy, Critic(5), batch)
    far = next((i for i, (_, _, kl) in enumerate(seen) if kl > 0.05), 0)
    assert 3 < far < 25 and len(seen) == 31
    for i in range(30):
        (policy_a, critic_a, _), (policy_b, critic_b, _) = seen[i:i + 2]
        assert torch.equal(policy_a, policy_b) == (i >= far)
        assert not torch.equal(critic_a, critic_b)
    assert info["resting"] == pytest.approx((30 - far) / 30)


def test_too_far_from_the_old_policy_grpo_stops():
    policy, batch = flow_sde_batch(rows=16)
    seen, info = watched_update(policy, None, batch, target_kl=0.02)
    kls = [kl for _, _, kl in seen]
    assert 3 < len(seen) < 25 and kls[-1] > 0.02 >= max(kls[:-1])
    assert "value_loss" not in info


def test_the_critics_gradient_does_not_shorten_the_policys():
    """The same batch with a critic that is far off and without one: the policy moves alike."""
    policy, batch = flow_sde_batch()
    batch["returns"], moved = 1e4 * batch["returns"], []
    batch["y"] = 50 * batch["y"]                                   # so the policy's is cut, too
    for critic in (None, Critic(5)):
        learner = copy.deepcopy(policy)
        modules = [learner] + ([critic] if critic else [])
        optimizer = torch.optim.SGD([p for m in modules for p in m.parameters()], lr=0.1)
        torch.manual_seed(1)
        mani.ppo_update(learner, critic, optimizer, batch, flags())
        moved.append(torch.cat([p.detach().flatten() for p in learner.parameters()]))
    torch.testing.assert_close(*moved)
    assert not torch.equal(moved[0], torch.cat([p.flatten() for p in policy.parameters()]))


def test_an_action_dim_that_hardly_moves_in_the_demos_earns_no_credit():
    policy, batch = flow_sde_batch()
    policy.action_scale[1] = 0.05
    before = policy.head[-1].weight.detach().clone().view(3, 2, -1)               # (H, A, width)
    mani.ppo_update(policy, None, torch.optim.SGD(policy.parameters(), lr=1.0), batch, flags())
    moved = (policy.head[-1].weight.view(3, 2, -1) - before).abs().amax((0, 2))
    assert moved[0] > 0 and moved[1] == 0


def test_ppo_sees_every_row_once_in_an_epoch_in_random_order():
    policy, batch = flow_sde_batch()
    seen, encode = [], policy.encode
    policy.encode = lambda obs: seen.append(obs["state"][:, 0].clone()) or encode(obs)
    mani.ppo_update(policy, None, torch.optim.SGD(policy.parameters(), lr=1e-4), batch,
                    flags(epochs=2, minibatch=16))
    assert [len(rows) for rows in seen] == [16, 16, 8] * 2
    first, second, rows = torch.cat(seen[:3]), torch.cat(seen[3:]), batch["state"][:, 0]
    for order in (first, second):
        assert torch.equal(order.sort()[0], rows.sort()[0]) and not torch.equal(order, rows)
    assert not torch.equal(first, second)


def test_the_policy_rests_when_the_ranks_are_too_far_on_average():
    """One that is not far itself rests with the others: all take the same steps."""
    policy, batch = flow_sde_batch()
    for others, rests in ((1.0, True), (0.0, False)):
        def gather(values):
            if values.is_floating_point():                         # the kl; else counts of rows
                values = torch.cat([values, torch.full_like(values, others)])
            return values

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ranks, "gather", gather)
            info = mani.ppo_update(copy.deepcopy(policy), Critic(5), torch.optim.SGD(
                policy.parameters(), lr=0.1), batch, flags(target_kl=0.4))
        assert info["resting"] == rests


# ------------------------------------------------------------------------------------------------
# Advantages


def advantages_of(critic, success, batch, policy):
    """-> (advantages, batch with what the critic learns)."""
    args = SimpleNamespace(device="cpu", group_size=2, max_steps=10, horizon=3)
    batch = dict(batch)
    return mani.advantages(policy, critic, batch, success, args), batch


def policy_with_context():
    policy, batch = flow_sde_batch(12)
    policy.context_dim = 5
    batch["episode"] = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 3, 0])
    return policy, batch


def test_ppos_advantages_are_normalised_gae_of_a_critic_that_knows_the_time():
    policy, batch = policy_with_context()
    success, critic = np.array([True, False, False, True]), Critic(5)
    y, seen = advantages_of(critic, success, batch, policy)
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
    assert not seen["returns"].requires_grad and not y.requires_grad
    torch.testing.assert_close(y, (wanted - wanted.mean()) / wanted.std(), rtol=1e-3, atol=1e-4)


def test_grpos_advantages_are_normalised_differences_to_the_mean_of_a_start():
    """And nothing else: the start that always succeeds has none, though its rows are many."""
    policy, batch = policy_with_context()
    success = np.array([True, False, True, True])
    y, seen = advantages_of(None, success, batch, policy)
    assert seen.keys() == batch.keys()
    raw = torch.tensor([1.0, -1, 0, 0])[batch["episode"]]   # starts: episodes 0 and 1, 2 and 3
    assert raw.mean() != 0
    torch.testing.assert_close(y, raw / raw.std(), rtol=1e-4, atol=1e-4)


def test_advantages_are_normalised_over_the_rows_of_all_ranks():
    """Another rank's rows are a thousand times as far from the mean."""
    policy, batch = policy_with_context()
    success, other = np.array([True, False, False, True]), torch.tensor([1000.0, -3000.0])
    alone = [advantages_of(critic, success, batch, policy)[0] for critic in (None,)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "gather", lambda values: torch.cat([values, other]))
        y, _ = advantages_of(None, success, batch, policy)
        raw = torch.tensor([1.0, -1, -1, 1])[batch["episode"]]      # less the means, 0 and 0
        std = torch.cat([raw, other]).std()
        torch.testing.assert_close(y, raw / std, rtol=1e-4, atol=1e-6)
        critic = Critic(5)
        y, seen = advantages_of(critic, success, batch, policy)
        A = seen["returns"] - critic(policy.encode(batch), seen["elapsed"]).detach()
        A = A - torch.cat([A, other]).mean()
        torch.testing.assert_close(y, A / torch.cat([A, other]).std(), rtol=1e-3, atol=1e-4)
    assert not torch.equal(alone[0], y)


# ------------------------------------------------------------------------------------------------
# The loop, by its diary: see test_04. The method's old policy follows, the baselines' is the
# trained one.


EMA = {"stepnft": alphas(0.1, 0.5), "ppo": [0.0] * 4, "grpo": [0.0] * 4}
ALGOS = pytest.mark.parametrize("algo", list(EMA))


def as_it_is(seeds):
    return seeds


def check_the_critic(diary, algo):
    """Its learning rate stays; it starts from the run's seed, whatever was drawn before."""
    assert ("critic" in diary.last) == (algo == "ppo")
    for page in diary.of("learn"):
        if algo == "ppo":
            assert len(page.groups) == 2
            lr, parameters = page.groups[1]
            assert lr == 1e-3 and parameters == [id(p) for p in page.critic.parameters()]
            torch.manual_seed(7)
            assert type(page.critic) is Critic
            assert torch.equal(vector(page.critic), vector(Critic(2)))
        else:
            assert page.critic is None and len(page.groups) == 1


def check_noise(diary, algo):
    """The method's in every step; the baselines' in one of each chunk."""
    if algo == "stepnft":
        return check_noise_in_every_step(diary, level=0.3)
    for page in diary.of("act"):
        assert (page.sigma > 0).sum(1).tolist() == [1] * 8
        for k, sigma in enumerate(page.sigma.T):
            torch.testing.assert_close(sigma, (sigma > 0) * sigma_of(k))


def check_labels(diary, algo):
    """Two that start alike do the same here: what is centred on a start is 0. An episode has one
    chunk: its advantage is the reward minus V, and V that of one observation."""
    for acted, page in zip(diary.of("act"), diary.of("learn")):
        reward = torch.tensor([float(seed % 3 == 0) for seed in acted.seeds])
        if algo != "ppo":
            assert not page.batch["y"].any() and "returns" not in page.batch
            continue
        torch.testing.assert_close(page.batch["returns"], reward)
        wanted = (reward - reward.mean()) / (reward.std() + 1e-6)
        torch.testing.assert_close(page.batch["y"], wanted, rtol=1e-3, atol=1e-4)
        assert not page.batch["elapsed"].any()


def draws_of_a_baseline():
    """First which of the four steps is noisy, for each of eight episodes."""
    torch.randint(4, (8,))


LOOP_CHECKS = {
    "who acts, learns, is validated, tested and filmed": (
        lambda diary, algo: check_who_does_what(diary, EMA[algo])),
    "the clone as it was and the learner are saved": (
        lambda diary, algo: check_what_is_saved(diary, EMA[algo])),
    "the learning rate falls linearly": (
        lambda diary, algo: check_the_learning_rate_falls_linearly(diary)),
    "the critic's stays": check_the_critic,
    "each iteration has its starts": (
        lambda diary, algo: check_each_iteration_has_its_starts(diary, as_it_is)),
    "each iteration has its random stream": (
        lambda diary, algo: check_each_iteration_has_its_random_stream(
            diary, *[draws_of_a_baseline] * (algo != "stepnft"))),
    "a row of the log tells the iteration": (
        lambda diary, algo: check_the_log(diary, 1, EMA[algo])),
    "noise in every step or in one": check_noise, "every algorithm has its labels": check_labels}


@ALGOS
@pytest.mark.parametrize("check", LOOP_CHECKS.values(), ids=LOOP_CHECKS)
def test_the_loop(check, algo):
    check(kept(SCRIPT, "--algo", algo, *FILM), algo)


def check_the_loop(algo):
    """All of that on a run of its own."""
    diary = diary_of(SCRIPT, "--algo", algo, *FILM)
    for check in LOOP_CHECKS.values():
        check(diary, algo)


def test_a_label_is_the_success_of_an_episode():
    diary = diary_of(SCRIPT, "--group-size", 1)
    for acted, page in zip(diary.of("act"), diary.of("learn")):
        assert page.batch["y"].tolist() == [1 if seed % 3 == 0 else -1 for seed in acted.seeds]


def test_every_variant_is_played_by_every_policy_on_the_same_seeds():
    """In the world of the training, changed; closed at the end. The test comes first, unchanged."""
    diary = diary_of(SCRIPT, "--eval-ood", "--ood-episodes", 3, *FILM)
    pages = diary.of("play", "changed", "closed")[3:]
    assert [page.what for page in pages[:2]] == ["play"] * 2
    suite = maniskill.variants("PickCube-v1", "state")
    for i, (axis, variant, changes) in enumerate(suite):
        changed, first, second = pages[2 + 3 * i:5 + 3 * i]
        assert changed.changes == changes and (first.mark, second.mark) == (0, 4)
        assert first.seeds == second.seeds == episode_seeds("test", 3, iteration=1).tolist()
    assert [page.what for page in pages[2 + 3 * len(suite):]] == ["closed"]
    assert diary.marks("film") == [4]
    assert [page.made.keys() for page in diary.of("film")] == [{"film"}]
    columns = ("axis", "variant", "policy", "episodes")
    assert [tuple(row[name] for name in columns) for row in diary.test] == [
        (axis, variant, policy, episodes)
        for axis, variant, episodes in [("test", "as in training", "6"),
                                        *((*names, "3") for *names, _ in suite)]
        for policy in ("SFT", "stepnft")]


def test_without_iterations_the_clone_alone_is_tested():
    diary = diary_of(SCRIPT, "--iterations", 0)
    assert not {"log.csv", "last.pt"} & diary.files
    assert diary.marks("play") == [0] and "stepnft" not in diary.result


# ------------------------------------------------------------------------------------------------
# Demonstrations, worlds and networks


def test_demos_are_the_first_successes_on_the_demo_starts_of_the_run_in_chunks():
    """One candidate list, the world told of the noise, the clone of every chunk of every demo."""
    seen, trained = [], []
    demos = [({"state": torch.randn(n, 3)}, torch.randn(n, 4)) for n in (5, 7)]
    args = SimpleNamespace(resume=None, sft=None, num_demos=2, seed=7, demo_noise=0.3, horizon=3,
                           task="PickCube-v1", out=ROOT, obs="state")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mani, "make_world", lambda args, **made: made)
        patch.setattr(mani, "scripted_demos", lambda *told: seen.append(told) or demos)
        patch.setattr(run, "sft", lambda *told: trained.append(told) or "the clone")
        patch.setattr(run, "save", lambda path, policy, args: seen.append((path, policy)))
        assert mani.clone(args) == "the clone"
        (world, (candidates,), count), saved = seen
        (told_args, make_policy, told_demos, chunks), = trained
        assert type(make_policy()) is RobotPolicy and make_policy().horizon == 3
    assert world == {"demo_noise": 0.3} and count == 2 and saved == (ROOT / "sft.pt", "the clone")
    assert candidates.tolist() == episode_seeds("demo", 20, 7).tolist()
    assert told_args is args and told_demos is demos
    wanted = [[a[min(i + h, len(a) - 1)] for h in range(3)] for _, a in demos
              for i in range(len(a))]
    torch.testing.assert_close(chunks, torch.stack([torch.stack(rows) for rows in wanted]))


def test_a_world_is_made_as_the_flags_say():
    args = SimpleNamespace(task="PushCube-v1", num_envs=6, video=2, obs="state", horizon=5,
                           max_steps=77, renderer="cuda", scenes=9, sim="cpu", episodes=48,
                           device="cuda")
    told = dict(horizon=5, max_steps=77, obs="state")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(maniskill, "make_workers", lambda *names, **more: (names, more))
        for call, num_envs, more in (
                ({}, 6, dict(renderer=None, demo_noise=None, film=None)),
                (dict(demo_noise=0.0), 6, dict(renderer=None, demo_noise=0.0, film=None)),
                (dict(film="x"), 2, dict(renderer="cuda", demo_noise=None, film="x"))):
            assert mani.make_world(args, **call) == (("PushCube-v1", num_envs), {**told, **more})
        args.obs = "rgb"
        assert mani.make_world(args)[1]["renderer"] == "cuda"
        # on a GPU a scene for each episode of this rank; the demos are the CPU's
        patch.setattr(mani.maniskill_gpu, "make_scenes", lambda *told: told)
        patch.setattr(ranks, "rank_of", lambda: (0, 3))
        args.sim, args.obs = "gpu", "state"
        assert mani.make_world(args) == ("PushCube-v1", 16, 77, "cuda")
        assert mani.make_world(args, demo_noise=0.0)[0] == ("PushCube-v1", 6)
    args.task = "PixelGap"
    plain, demos = mani.make_world(args), mani.make_world(args, demo_noise=0.0)
    assert (plain.scenes, plain.demos, demos.scenes, demos.demos) == (9, False, 9, True)


@pytest.mark.parametrize("flags, wanted", [
    ("", dict(kind="robot", state_dim=11, cameras=0, language=False, width=256, action_dim=4)),
    ("--task PutOnPad-v1", dict(kind="slots", state_dim=5 + 27, slots=9, action_dim=4)),
    ("--task PutOnPad-v1 --obs rgb", dict(kind="robot", state_dim=5, cameras=1, language=True)),
    ("--obs rgb", dict(kind="robot", state_dim=5, cameras=1, language=False)),
    ("--task PixelGap", dict(kind="small_images", state_dim=2, cameras=1, action_dim=2))])
def test_each_task_has_its_network(flags, wanted, tmp_path, monkeypatch):
    monkeypatch.setattr(maniskill, "find_renderer", lambda: "cuda")
    args = parse(*flags.split(), "--out", tmp_path, "--horizon", 3)
    config = mani.policy_config(args)
    assert wanted.items() <= config.items() and config["horizon"] == 3
    assert build_policy(config).config == config                   # nothing is left to a default


# ------------------------------------------------------------------------------------------------
# Whole runs on the toy world


@pytest.fixture
def toy(monkeypatch):
    dress(monkeypatch)


@pytest.mark.parametrize("algo", ["stepnft", "ppo", "grpo"])
def test_a_run_cut_short_and_resumed_is_the_run_that_was_not(toy, tmp_path, monkeypatch, algo):
    """Log, tables and every tensor, the critic's and Adam's too; also what the run tells."""
    told, out = run_and_cut(tmp_path, monkeypatch, *TOY, "--algo", algo, script=SCRIPT)
    assert set(told) == {"task", "sft", algo, "episodes", "env_steps", "seconds"}
    log = log_of(tmp_path / "whole")
    assert ("value_loss" in log[0]) == (algo == "ppo") and ("drift" in log[0]) == (
        algo == "stepnft")
    assert any(name.startswith("/critic") for name in content(tmp_path / "whole")) == (
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
    args = SimpleNamespace(task="PutOnPad-v1", obs="state", ood_episodes=10, test_episodes=10,
                           num_steps=4, out=tmp_path, eval_ood=True, eval_only=True, video=0)
    suite, now = maniskill.variants(args.task, args.obs), ["the test"]
    wins = {"the test": 2, **{variant: k % 4 for k, (_, variant, _) in enumerate(suite)}}
    named = {str(changes): variant for _, variant, changes in suite}
    world = SimpleNamespace(change=lambda changes: now.append(named[str(changes)]),
                            close=lambda: None)
    monkeypatch.setattr(flow, "evaluate", lambda policy, world, seeds, steps:
                        np.arange(len(seeds)) < wins[now[-1]] + policy)
    assert mani.test_all({"a": 0, "b": 3}, args, world) == [0.2, 0.5]
    assert now[1:] == [variant for _, variant, _ in suite]
    header, a, b = [line.split() for line in capsys.readouterr().out.splitlines()[-3:]]
    assert header == ["in-distribution", "vision", "semantic", "execution", "OOD", "mean"]
    for line, bonus in ((a, 0), (b, 3)):
        means = [np.mean([wins[v] + bonus for axis, v, _ in suite if axis == x]) / 10
                 for x in header[:4]]
        assert [float(z) for z in line[1:]] == pytest.approx([*means, np.mean(means[1:])],
                                                             abs=6e-4)
    rows = table(tmp_path / "test.csv")
    assert [(row["axis"], row["variant"], row["policy"]) for row in rows[2:]] == [
        (axis, variant, name) for axis, variant, _ in suite for name in ("a", "b")]
    for row in rows[2:]:
        assert float(row["success"]) == (wins[row["variant"]] + 3 * (row["policy"] == "b")) / 10


@pytest.mark.parametrize("algo", ["stepnft", "ppo"])
def test_05_plays_pixel_gap_and_tests_it_out_of_distribution(algo, tmp_path, monkeypatch):
    monkeypatch.setattr(mani, "learning_figure", lambda log, path: path.touch())
    out = tmp_path / "out"
    told, _ = ran(*"--task PixelGap --iterations 2 --episodes 16 --sft-steps 20 --eval-every 1 "
                  "--eval-episodes 16 --test-episodes 50 --ood-episodes 20 --eval-ood".split(),
                  "--algo", algo, "--out", out)
    assert told["episodes"] == "32"
    assert {row["variant"] for row in table(out / "test.csv")} == {
        variant for _, variant, _ in pixel_gap.VARIANTS}
    again, _ = ran("--eval-only", out / "last.pt", "--out", out)
    assert again["success"] == told[algo]


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
        dress(patch, small=False)
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


@pytest.mark.parametrize("flags, named", [
    ("--video 2", "--video"), ("--obs state", "--obs"), ("--max-steps 9", "--max-steps"),
    ("--demo-noise 0.3", "--demo-noise"), ("--algo ppo --beta 2", "--beta"),
    ("--num-envs 3", "--num-envs"),
    ("--scenes 0", "--scenes"), ("--algo ppo --target-kl 0", "--target-kl"),
    ("--target-kl 0.1", "--target-kl"), ("--task PickCube-v1 --scenes 9", "--scenes")])
def test_what_pixel_gap_does_not_use_is_refused_in_one_line(flags, named):
    assert named in wrong_call(SCRIPT, "--task", "PixelGap", *flags.split())


def test_a_checkpoint_of_05_is_refused_by_04(run05):
    for call in (("--eval-only", run05 / "last.pt"), ("--resume", "--out", run05)):
        assert SCRIPT in wrong_call("04_train_libero.py", *call)
    assert "--sft" in wrong_call("04_train_libero.py", "--sft", run05 / "sft.pt")


def test_a_wrong_call_leaves_nothing_but_its_line(tmp_path):
    """Once as a user calls it: no warning beside the line, either."""
    done = run_process(SCRIPT, "--task", "PickCub-v1", cwd=tmp_path, ok=False)
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
    run.save(tmp_path / "p.pt", build_policy(mani.policy_config(args)),
               SimpleNamespace(flags=args.flags))
    _, out = ran("--eval-only", tmp_path / "p.pt", "--eval-ood", "--ood-episodes", 2, "--num-envs",
                 1, "--out", tmp_path / "new")
    rows, suite = table(tmp_path / "new" / "test.csv"), maniskill.variants(args.task, "state")
    assert [(row["axis"], row["variant"]) for row in rows] == [("test", "as in training")] + [
        (axis, variant) for axis, variant, _ in suite]
    for row in rows:
        assert row["episodes"] == "2" and row["policy"] == str(tmp_path / "p.pt")
        interval = run.rated(np.arange(2) < 2 * float(row["success"]))
        assert float(row["low"]) == pytest.approx(interval["low"], abs=1e-4)
        assert float(row["high"]) == pytest.approx(interval["high"], abs=1e-4)
    assert "OOD mean" in out


@sim
def test_a_worker_that_dies_ends_the_run_in_one_line(tmp_path):
    flags = [*TINY, "--iterations", 1, "--episodes", 800, "--out", "new"]
    line = kill_a_worker(SCRIPT, *flags, cwd=tmp_path, when="iteration 1/1")
    assert "--resume" in line and " of PickCube-v1" in line
    seeds = episode_seeds("train", 100, 0, 0)
    assert int(line.split("episode ")[1].split()[0]) in seeds


@sim
def test_two_ranks_of_torchrun_share_the_episodes_of_one_run(tmp_path):
    flags = [*TINY, *"--algo ppo --eval-ood --ood-episodes 2 --iterations 1 --episodes 16 "
             "--test-episodes 3 --out new".split(), "--sft", str(tmp_path / "sft.pt")]
    policy = RobotPolicy(4, 4, state_dim=11, width=256)
    run.save(tmp_path / "sft.pt", policy, SimpleNamespace(flags={}))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2",
                          "--standalone", str(ROOT / SCRIPT), *flags], cwd=tmp_path, text=True,
                         capture_output=True, timeout=400, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("RESULT") == 1          # rank 1 is silent
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

    def watching(policy, *rest, **more):
        norm = optimise(policy, *rest, **more)
        gradients.extend(p.grad.abs().max() for p in policy.image_encoder.parameters())
        return norm

    monkeypatch.setattr(nft, "optimise", watching)
    monkeypatch.setattr(maniskill, "find_renderer", lambda: renderer)  # looked for only once
    flags = parse("--task", "PutOnPad-v1", "--obs", "rgb", "--out", tmp_path).flags
    sft = RobotPolicy(4, 4, state_dim=5, cameras=1, language=True, width=256)
    run.save(tmp_path / "sft.pt", sft, SimpleNamespace(flags=flags))
    result, _ = ran(*"--task PutOnPad-v1 --obs rgb --iterations 1 --episodes 2 --group-size 2 "
                    "--max-steps 8 --eval-every 1 --eval-episodes 1 --test-episodes 1 --num-envs 1 "
                    "--video 1 --lr 1e-3 --device cpu".split(), "--sft", tmp_path / "sft.pt",
                    "--out", tmp_path / "new")
    assert 2 <= int(result["env_steps"]) <= 2 * 8
    film, = (tmp_path / "new" / "videos").glob("*.mp4")
    assert film.name.split("_")[-1] in ("success.mp4", "failure.mp4")
    assert 1 <= imageio.get_reader(film).count_frames() <= 8
    policy = load_policy(tmp_path / "new" / "last.pt")
    assert policy.config == sft.config
    assert not torch.equal(vector(policy.image_encoder), vector(sft.image_encoder))
    assert max(gradients) > 1e-8  # Adam makes steps of rounding errors, too
