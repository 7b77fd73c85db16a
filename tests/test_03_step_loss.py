"""03: the loss against slow scalar loops, autograd and torch.distributions; the RL iteration piece
by piece, then as a whole on a one-action world and on the toy."""

import copy
import csv
import importlib
import inspect
import math
import os
import socket
import subprocess
import sys
import tempfile
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from conftest import ROOT, Scripted, one_clear_line, result_line, run_script

flow = importlib.import_module("01_flow_policy")
sde = importlib.import_module("02_sde_sampler")
loss = importlib.import_module("03_step_loss")

# ------------------------------------------------------------------------------------------------
# The two branches


def test_mirror_steps_equally_far_to_both_sides():
    v_theta, v_old = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[0.9, 2.2]]])
    v_pos, v_neg = loss.mirror(v_theta, v_old, beta=2.0, max_drift=0.5)
    torch.testing.assert_close(v_pos, torch.tensor([[[1.1, 1.8]]]))  # v_old + 2 (v_theta - v_old)
    torch.testing.assert_close(v_neg, torch.tensor([[[0.7, 2.6]]]))


def test_drift_is_clipped_per_action():
    """Four actions of a chunk, two of them too far: only those are shortened, along their line."""
    v_old = torch.randn(1, 4, 2)
    delta = torch.tensor([[[3.0, 4.0], [0.3, -0.1], [0.0, -2.0], [0.1, 0.2]]])
    v_pos, v_neg = loss.mirror(v_old + delta, v_old, beta=1.0, max_drift=0.5)
    expected = torch.tensor([[[0.3, 0.4], [0.3, -0.1], [0.0, -0.5], [0.1, 0.2]]])
    torch.testing.assert_close(v_pos - v_old, expected)
    torch.testing.assert_close(v_neg - v_old, -expected)


def test_beta_scales_after_the_clip():
    v_old, far = torch.zeros(1, 1, 2), torch.tensor([[[30.0, 40.0]]])
    v_pos, _ = loss.mirror(far, v_old, beta=3.0, max_drift=0.5)
    torch.testing.assert_close(v_pos, torch.tensor([[[0.9, 1.2]]]))


# ------------------------------------------------------------------------------------------------
# The loss against a slow loop over scalars


def batch_of_steps(B=6, H=3, A=2, num_steps=4, noise_level=0.3):
    """Random steps in double precision, every row at another k, some far drifts, ragged masks."""
    times = sde.time_grid(num_steps).double()
    sigmas, k = sde.noise_scale(times, noise_level), torch.arange(B) % num_steps
    tensors = {name: torch.randn(B, H, A).double() for name in ("v_old", "x_t", "x_next", "x_0")}
    tensors["v_theta"] = tensors["v_old"] + 0.4 * torch.randn(B, H, A).double()
    mask = torch.arange(H) < torch.tensor([3, 1, 0, 2, 3, 2])[:B, None]
    y = torch.tensor([1, -1, 1, 0, 0.4, -1.6])[:B].double()
    return {**tensors, "t_cur": times[k], "t_next": times[k + 1], "sigma": sigmas[k], "y": y,
            "mask": mask}


def slow_loss(v_theta, v_old, x_t, x_next, t_cur, t_next, sigma, y, mask, x_0, beta=1.0,
              max_drift=0.5, dpo_beta=1.0, kl_weight=1e-4, target="next", form="ranking",
              var_eps=1e-4):
    """The loss of the design note with plain floats."""
    B, H, A = x_t.shape
    row_losses, kl = [], 0.0
    for b in range(B):
        t, dt, y_b = t_cur[b].item(), (t_cur[b] - t_next[b]).item(), y[b].item()
        var = sigma[b].item()**2 * dt + var_eps

        def mean(x, v):                            # Euler step, then towards the score -x1_hat / t
            return x - dt * v - sigma[b].item()**2 * dt / (2 * t) * (x + (1 - t) * v)

        action_losses = []
        for h in range(H):
            old, x, seen, end = ([z[b, h, a].item() for a in range(A)]
                                 for z in (v_old, x_t, x_next, x_0))
            delta = [v_theta[b, h, a].item() - old[a] for a in range(A)]
            length = math.sqrt(sum(d * d for d in delta))
            kl += sum(d * d for d in delta) / (B * H * A)
            if length > max_drift:
                delta = [d * max_drift / length for d in delta]
            E = {}
            for side in (1, -1):
                v = [old[a] + side * beta * delta[a] for a in range(A)]
                if target == "endpoint":
                    E[side] = sum((end[a] - (x[a] - t * v[a]))**2 for a in range(A))
                else:
                    if target == "next-mean":      # the velocity that leads from x_t to x_0
                        seen = [mean(x[a], (x[a] - end[a]) / t) for a in range(A)]
                    E[side] = sum((seen[a] - mean(x[a], v[a]))**2 for a in range(A)) / var
            value = math.log(1 + math.exp(dpo_beta / 2 * y_b * (E[1] - E[-1])))
            if form == "weighted":
                value = (1 + y_b) / 2 * E[1] + (1 - y_b) / 2 * E[-1]
            counts = {"positive": y_b > 0, "negative": y_b < 0}.get(form, True)
            if mask[b, h] and counts:
                action_losses.append(value)
        if action_losses:
            row_losses.append(sum(action_losses) / len(action_losses))
    return (sum(row_losses) / len(row_losses) if row_losses else 0) + kl_weight * kl


CHOICES = [dict(target=target, form=form) for target in ("next", "next-mean", "endpoint")
           for form in ("ranking", "weighted", "positive", "negative")]
CHOICES += [dict(beta=0.3, max_drift=0.2, dpo_beta=0.7), dict(kl_weight=0.5, max_drift=5.0),
            dict(var_eps=0.1, beta=2.0)]


@pytest.mark.parametrize("choice", CHOICES, ids=lambda c: "-".join(map(str, c.values())))
def test_the_loss_is_the_slow_loop(choice):
    torch.manual_seed(0)
    steps = batch_of_steps()
    value, _ = loss.step_nft_loss(**steps, **choice)
    assert value.item() == pytest.approx(slow_loss(**steps, **choice), rel=1e-5)


@pytest.mark.parametrize("choice", CHOICES, ids=lambda c: "-".join(map(str, c.values())))
def test_its_gradient_is_the_slow_loops_slope(choice):
    """Central differences of the slow loop along one random direction of v_theta."""
    torch.manual_seed(0)
    steps = batch_of_steps()
    v_theta, direction, h = steps["v_theta"].requires_grad_(), torch.randn(6, 3, 2).double(), 1e-5
    loss.step_nft_loss(**steps, **choice)[0].backward()
    up, down = (slow_loss(**{**steps, "v_theta": v_theta.detach() + s * h * direction}, **choice)
                for s in (1, -1))
    assert (v_theta.grad * direction).sum().item() == pytest.approx((up - down) / (2 * h), rel=1e-4)


def test_the_branches_stand_still_only_v_theta_learns():
    steps = batch_of_steps()
    for name in ("v_theta", "v_old"):
        steps[name].requires_grad_()
    loss.step_nft_loss(**steps)[0].backward()
    assert steps["v_theta"].grad.abs().max() > 0
    assert steps["v_old"].grad is None


# ------------------------------------------------------------------------------------------------
# The identities of one step


def one_step(k=1, y=1.0, drift=0.1, A=3, noise_level=0.4, num_steps=4):
    """One row of one action; by hand its B, var, e = x_next - mean(v_old) and d = B delta."""
    times = [1 - i / num_steps for i in range(num_steps + 1)]
    t, t_next = times[k], times[k + 1]
    dt, sigma = t - t_next, noise_level * math.sqrt(t / (1 - (t if t < 1 else t_next)))
    x_t, v_old, x_next = (torch.randn(1, 1, A).double() for _ in range(3))
    v_theta = v_old + drift * torch.randn(1, 1, A).double()
    mean_old = x_t - dt * v_old - sigma**2 * dt / (2 * t) * (x_t + (1 - t) * v_old)
    B = -dt * (1 + (1 - t) * sigma**2 / (2 * t))
    time = {name: torch.tensor([z]).double() for name, z in
            (("t_cur", t), ("t_next", t_next), ("sigma", sigma), ("y", y))}
    return dict(v_theta=v_theta, v_old=v_old, x_t=x_t, x_next=x_next, **time), SimpleNamespace(
        e=x_next - mean_old, d=B * (v_theta - v_old), var=sigma**2 * dt + 1e-4, B=B)


@pytest.mark.parametrize("k", range(4))
@pytest.mark.parametrize("y", [1.0, -1.0, 0.6])
def test_the_branches_differ_by_minus_4_beta_e_d_over_var(k, y):
    """E_pos - E_neg = -4 beta <d, e> / var, in the margin and, through softplus, in the loss."""
    step, by = one_step(k, y)
    for beta, dpo_beta in ((1.0, 1.0), (0.5, 0.2)):
        difference = -4 * beta * (by.d * by.e).sum() / by.var
        value, info = loss.step_nft_loss(**step, beta=beta, dpo_beta=dpo_beta, max_drift=9,
                                         kl_weight=0)
        torch.testing.assert_close(info["margin"], -y * difference)
        torch.testing.assert_close(value, (dpo_beta / 2 * y * difference).exp().log1p())


@pytest.mark.parametrize("k", range(4))
@pytest.mark.parametrize("y", [1.0, -1.0, 0.6])
def test_at_zero_drift_the_loss_is_ln_2_and_its_gradient_reinforce(k, y):
    """-y beta grad log N(x_next; mean(v), var), the log-probability from torch.distributions."""
    step, by = one_step(k, y)
    v_theta = step["v_theta"] = step["v_old"].clone().requires_grad_()
    value, _ = loss.step_nft_loss(**step, beta=0.7)
    value.backward()
    assert value.item() == pytest.approx(math.log(2), rel=1e-6)
    v = step["v_old"].clone().requires_grad_()
    mean = step["x_next"] - by.e + by.B * (v - step["v_old"])
    torch.distributions.Normal(mean, by.var**0.5).log_prob(step["x_next"]).sum().backward()
    torch.testing.assert_close(v_theta.grad, -y * 0.7 * v.grad)


@pytest.mark.parametrize("y", [1.0, -1.0])
def test_weighted_mse_is_ranking_plus_a_separation_penalty(y):
    """r E_pos + (1 - r) E_neg = (|e|^2 + beta^2 |d|^2 - 2 y beta <d, e>) / var."""
    step, by = one_step(2, y)
    value, _ = loss.step_nft_loss(**step, form="weighted", beta=0.8, max_drift=9, kl_weight=0)
    expected = by.e.square() + 0.8**2 * by.d.square() - 2 * y * 0.8 * by.d * by.e
    torch.testing.assert_close(value, expected.sum() / by.var)


def test_a_success_pulls_the_mean_towards_what_happened_and_a_failure_pushes_it_away():
    for y in (1.0, -1.0):
        step, by = one_step(1, y)
        v_theta = step["v_theta"] = step["v_old"].clone().requires_grad_()
        loss.step_nft_loss(**step)[0].backward()
        moved = -by.B * v_theta.grad                              # of the mean, downhill
        assert torch.sign((moved * by.e).sum()) == y


def test_errors_are_summed_over_the_action_dims():
    """Three copies of one dimension give three times its margin."""
    step, _ = one_step(1, A=1)
    thrice = {k: v.expand(1, 1, 3) if v.dim() == 3 else v for k, v in step.items()}
    one, three = (loss.step_nft_loss(**s, max_drift=9)[1]["margin"] for s in (step, thrice))
    torch.testing.assert_close(three, 3 * one)


@pytest.mark.parametrize("form", ["ranking", "weighted", "positive", "negative"])
@pytest.mark.parametrize("target", ["next", "next-mean", "endpoint"])
@pytest.mark.parametrize("noise_level", [0.0, 0.3])
@pytest.mark.parametrize("drift", [0.0, 0.3])
def test_gradients_are_finite(form, target, noise_level, drift):
    """At zero drift, at zero noise, and at t = 1 (k = 0) as everywhere."""
    for k in range(4):
        step, _ = one_step(k, drift=drift, noise_level=noise_level)
        step["v_theta"].requires_grad_()
        value, info = loss.step_nft_loss(**step, target=target, form=form,
                                         x_0=torch.randn(1, 1, 3).double())
        value.backward()
        assert value.isfinite() and step["v_theta"].grad.isfinite().all()
        assert torch.stack(list(info.values())).isfinite().all()


def test_a_masked_action_has_no_gradient_and_no_influence():
    steps = batch_of_steps()
    steps["y"][3] = -1                                         # a label of 0 would teach nothing
    v_theta, mask = steps["v_theta"].requires_grad_(), steps["mask"]
    value, info = loss.step_nft_loss(**steps, kl_weight=0)
    value.backward()
    per_action = v_theta.grad.abs().sum(-1)
    assert not per_action[~mask].any() and per_action[mask].all()
    for name in ("x_next", "x_t", "v_old", "v_theta"):
        steps[name] = steps[name].detach() + 5.0 * ~mask[..., None]
    changed, changed_info = loss.step_nft_loss(**steps, kl_weight=0)
    torch.testing.assert_close(changed, value.detach())
    torch.testing.assert_close(changed_info, {k: v.detach() for k, v in info.items()})


def test_rows_without_valid_actions_do_not_count():
    steps = batch_of_steps()
    rows = steps["mask"].any(1)
    assert not rows.all()
    without = {k: v[rows] for k, v in steps.items()}
    torch.testing.assert_close(loss.step_nft_loss(**steps, kl_weight=0)[0],
                               loss.step_nft_loss(**without, kl_weight=0)[0])


def test_short_chunks_weigh_as_much_as_long_ones():
    """Mean over a row's valid actions first, then over rows: not one mean over all actions."""
    steps = batch_of_steps()
    rows = [loss.step_nft_loss(**{k: v[b:b + 1] for k, v in steps.items()}, kl_weight=0)[0]
            for b in range(6) if steps["mask"][b].any()]
    torch.testing.assert_close(loss.step_nft_loss(**steps, kl_weight=0)[0], sum(rows) / len(rows))


def test_no_valid_action_at_all_gives_zero_not_nan():
    steps = batch_of_steps()
    steps["v_theta"].requires_grad_()
    steps["mask"] = torch.zeros(6, 3, dtype=bool)
    value, _ = loss.step_nft_loss(**steps, kl_weight=0)
    value.backward()
    assert value == 0 and not steps["v_theta"].grad.any()


def test_the_endpoint_targets_ask_for_x_0():
    step, _ = one_step()
    for target in ("next-mean", "endpoint"):
        with pytest.raises(ValueError, match="x_0"):
            loss.step_nft_loss(**step, target=target)


def test_next_mean_without_noise_in_it_is_blind_to_the_noise_of_x_next():
    step, _ = one_step()
    step["x_0"] = torch.randn(1, 1, 3).double()
    values = [loss.step_nft_loss(**{**step, "x_next": x}, target="next-mean")[0]
              for x in (step["x_next"], step["x_next"] + 1)]
    assert values[0] == values[1]


def test_an_uncorrected_rollout_is_judged_by_the_uncorrected_mean():
    """x_next is the Euler step: no branch is better, margin 0, but only if corrected=False."""
    step, _ = one_step(1, drift=0.1)
    step["x_next"] = step["x_t"] - 0.25 * step["v_old"]
    margin, wrong = (loss.step_nft_loss(**step, corrected=c)[1]["margin"] for c in (False, True))
    assert abs(margin) < 1e-9 and abs(wrong) > 1e-3


def test_the_metrics_mean_what_they_say():
    """Two actions of two rows by hand, a third masked."""
    step, by = one_step(1)
    far = by.e.flatten() / by.e.norm() * (0.7 / abs(by.B))
    steps = {k: v.expand(2, 2, 3).clone() if v.dim() == 3 else v.expand(2) for k, v in step.items()}
    steps["v_theta"] = steps["v_old"].clone()
    steps["v_theta"][0, 0] -= 0.003 * far / far.norm()       # B < 0: towards x_next, ranked right
    steps["v_theta"][0, 1] += 0.9 * far / far.norm()            # away from it, and too far: clipped
    steps["v_theta"][1, 0] -= 0.6 * far / far.norm()            # right again, clipped
    steps["v_theta"][1, 1] += 9                                 # masked
    mask = torch.tensor([[True, True], [True, False]])
    _, info = loss.step_nft_loss(**steps, mask=mask, max_drift=0.5)
    assert info["rank_accuracy"].item() == pytest.approx(2 / 3)
    assert info["clipped"].item() == pytest.approx(2 / 3)
    assert info["drift"].item() == pytest.approx((0.003 + 0.9 + 0.6) / 3)
    sides = 4 * abs(by.B) * by.e.norm().item() / by.var * np.array([0.003, -0.5, 0.5])
    assert info["margin"].item() == pytest.approx(sides.mean())


# ------------------------------------------------------------------------------------------------
# Labels


def test_labels_are_plus_and_minus_one_per_row():
    y = loss.labels(np.array([True, False, True]), torch.tensor([2, 1, 0, 1, 1]))
    assert y.tolist() == [1, -1, 1, -1, -1]


def test_grouped_labels_compare_episodes_of_one_start():
    """Against a slow loop: each label minus the mean of the episodes that share its start."""
    success = np.random.default_rng(0).random(24) < 0.5
    success[8:16] = True                                   # a start that always succeeds
    seeds = loss.start_seeds(500, 24, "grouped", 8)
    expected = []
    for e in range(24):
        mates = [2.0 * success[i] - 1 for i in range(24) if seeds[i] == seeds[e]]
        assert len(mates) == 8
        expected.append(2.0 * success[e] - 1 - sum(mates) / 8)
    y = loss.labels(success, torch.arange(24), "grouped", 8)
    np.testing.assert_allclose(y.numpy(), expected, atol=1e-6)
    assert (y[8:16] == 0).all() and (y[:8] != 0).any()


def test_start_seeds_repeat_only_for_groups():
    assert list(loss.start_seeds(7, 5)) == [7, 8, 9, 10, 11]
    assert list(loss.start_seeds(7, 4, "grouped", 2)) == [7, 7, 8, 8]
    with pytest.raises(ValueError, match="--episodes 5"):
        loss.start_seeds(7, 5, "grouped", 2)


def test_centered_labels_lose_the_mean_over_episodes():
    """Not over rows: three of four episodes succeed, so 1 - 0.5 and -1 - 0.5."""
    y = loss.labels([True, True, False, True], torch.tensor([0, 1, 2, 2, 2, 3]), "centered")
    assert y.tolist() == [0.5, 0.5, -1.5, -1.5, -1.5, 0.5]


def test_grouped_labels_lose_the_mean_over_the_episodes_of_one_start():
    """Groups of four in a slow loop; a start that always succeeds teaches nothing."""
    success, episode = [1, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 0], torch.tensor([0, 4, 5, 5, 8, 9, 11])
    y = loss.labels(np.array(success, bool), episode, "grouped", group_size=4)
    expected = []
    for e in episode.tolist():
        group = [2 * s - 1 for s in success[e // 4 * 4: e // 4 * 4 + 4]]
        expected.append(2 * success[e] - 1 - sum(group) / 4)
    assert y.tolist() == expected and y[0] == 0 and len(set(expected)) == 5


@pytest.mark.parametrize("kind", ["binary", "centered", "grouped"])
def test_seeds_start_fresh_and_a_group_shares_one(kind):
    seeds = loss.start_seeds(100, 12, kind, group_size=4).tolist()
    assert seeds == ([100] * 4 + [101] * 4 + [102] * 4 if kind == "grouped" else [*range(100, 112)])


def test_labels_and_seeds_agree_on_the_group():
    """With both defaults: the labels of the episodes that share a seed add up to zero."""
    seeds, success = loss.start_seeds(0, 48, "grouped"), np.random.rand(48) < 0.5
    y = loss.labels(success, torch.arange(48), "grouped").numpy()
    sums = [y[seeds == seed].sum() for seed in set(seeds.tolist())]
    assert len(sums) > 1 and np.abs(sums).max() < 1e-5 and np.abs(y).max() > 0.1


def test_groups_that_do_not_divide_the_episodes_name_the_flag():
    with pytest.raises(ValueError, match="--episodes 10"):
        loss.start_seeds(0, 10, "grouped", group_size=4)


def calm_expert(state):
    """Slightly slower than the expert, whose full steps land on the very rim of the goal."""
    return 0.97 * flow.expert_chunk(state, 4)


def arrives_in_time(seed):
    """A GapWorld whose time limit is the very step at which that expert arrives from that seed."""
    envs = flow.GapWorld(1, start_width=0.3)
    obs, _ = envs.reset(seed=[seed])
    while not envs.over[0]:
        obs, *_ = envs.step(calm_expert(obs["state"]))
    envs.max_steps = int(envs.steps[0])
    return envs


def test_an_episode_that_first_succeeds_in_its_last_chunk_is_a_success():
    """The published code calls it a failure. Arrival on the last step before the time limit."""
    policy = Scripted(calm_expert, 4)
    for seed in range(5):
        envs = arrives_in_time(seed)
        success, batch = loss.rollout(policy, envs, [seed], noise_level=1e-4)
        assert envs.steps[0] == envs.max_steps and len(batch["x"]) == -(-envs.max_steps // 4)
        assert success.tolist() == [True]
        assert (loss.labels(success, batch["episode"]) == 1).all()
        envs.max_steps -= 1                                     # one step less: now it fails
        success, batch = loss.rollout(policy, envs, [seed], noise_level=1e-4)
        assert success.tolist() == [False]
        assert (loss.labels(success, batch["episode"]) == -1).all()


# ------------------------------------------------------------------------------------------------
# Rollouts


class Listener(flow.GapWorld):
    """Keeps every chunk it was given."""

    def step(self, chunks):
        self.heard = getattr(self, "heard", []) + [chunks]
        return super().step(chunks)


def random_policy():
    torch.manual_seed(3)
    policy = flow.FlowPolicy(4, 2, state_dim=3)
    policy.action_centre.copy_(torch.tensor([0.3, -0.1]))
    policy.action_scale.copy_(torch.tensor([0.5, 0.8]))
    return policy


TIMES = [1, 0.75, 0.5, 0.25, 0]


def check_velocities(policy, batch):
    """v is the policy's velocity at the recorded x_t, t_k and observation."""
    for k in range(4):
        t = torch.full((len(batch["x"]),), float(TIMES[k]))
        v = policy.velocity(batch["x"][:, k], t, policy.encode(batch["obs"])).detach()
        torch.testing.assert_close(batch["v"][:, k], v, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sampler", ["sde", "sde-uncorrected"])
def test_an_sde_rollout_records_the_noisy_steps_it_acted_on(sampler):
    policy, envs, a = random_policy(), Listener(60), 1.0          # enough to see the correction
    success, batch = loss.rollout(policy, envs, range(60), noise_level=a, sampler=sampler)
    rows = len(batch["x"])
    assert success.shape == (60,) and batch["x"].shape == (rows, 5, 4, 2)
    assert batch["v"].shape == (rows, 4, 4, 2) and not batch["v"].requires_grad
    check_velocities(policy, batch)
    for k in range(4):
        t, dt = TIMES[k], 0.25
        sigma = a * math.sqrt(t / (1 - (t if t < 1 else TIMES[1])))
        x, v = batch["x"][:, k], batch["v"][:, k]
        mean = x - dt * v - (sampler == "sde") * sigma**2 * dt / (2 * t) * (x + (1 - t) * v)
        residual = (batch["x"][:, k + 1] - mean) / (sigma * math.sqrt(dt))
        assert stats.kstest(residual.flatten(), "norm").pvalue > 1e-3, f"step {k}"
    acted = batch["x"][:60, 4] * torch.tensor([0.5, 0.8]) + torch.tensor([0.3, -0.1])
    np.testing.assert_allclose(envs.heard[0], acted, rtol=1e-5, atol=1e-5)


def test_an_ode_rollout_noises_its_endpoint_afresh():
    policy, envs = random_policy(), Listener(100)
    _, batch = loss.rollout(policy, envs, range(100), sampler="ode")
    check_velocities(policy, batch)
    x_0 = batch["x"][:, 4]
    acted = x_0[:100] * torch.tensor([0.5, 0.8]) + torch.tensor([0.3, -0.1])
    np.testing.assert_allclose(envs.heard[0], acted, rtol=1e-5, atol=1e-5)
    noise = [((batch["x"][:, k] - (1 - t) * x_0) / t).flatten() for k, t in enumerate(TIMES[:4])]
    assert all(stats.kstest(n, "norm").pvalue > 1e-3 for n in noise)
    assert np.abs(np.corrcoef(noise) - np.eye(4)).max() < 0.1
    plan = Scripted(lambda state: flow.expert_chunk(state, 4), 4)       # the ODE has no noise in it
    _, batch = loss.rollout(plan, flow.GapWorld(9), range(9), sampler="ode")
    script = flow.expert_chunk(batch["obs"]["state"].numpy(), 4)
    np.testing.assert_allclose(batch["x"][:, 4], script, atol=1e-5)


def test_one_random_step_per_chunk_or_all_of_them():
    policy = random_policy()
    _, batch = loss.rollout(policy, flow.GapWorld(300), range(300))
    rows = len(batch["x"])
    assert batch["k"].shape == (rows, 1)
    counts = np.bincount(batch["k"].flatten(), minlength=4)
    assert len(counts) == 4 and stats.chisquare(counts).pvalue > 1e-3
    _, batch = loss.rollout(policy, flow.GapWorld(3), range(3), transitions="all", num_steps=5)
    assert batch["k"].tolist() == [[0, 1, 2, 3, 4]] * len(batch["x"])


@pytest.mark.parametrize("sampler", ["sde", "sde-uncorrected", "ode"])
def test_a_rollout_feeds_update(sampler):
    """All three samplers, with a foreign policy too: nothing but the contract is used."""
    for policy in (random_policy(), Foreign(3)):
        envs = flow.GapWorld(8, horizon=policy.horizon)
        success, batch = loss.rollout(policy, envs, range(8), sampler=sampler, transitions="all")
        batch["y"] = loss.labels(success, batch["episode"])
        before = [p.clone() for p in policy.parameters()]
        info = loss.update(policy, torch.optim.SGD(policy.parameters(), lr=0.1), batch,
                           target="endpoint", epochs=1)
        assert all(math.isfinite(v) for v in info.values())
        assert any((p != b).any() for p, b in zip(policy.parameters(), before))


# ------------------------------------------------------------------------------------------------
# Updates


class Foreign(nn.Module):
    """A policy that shares no code with FlowPolicy; it starts as the velocity field v = 0."""

    def __init__(self, state_dim, action_dim=2, horizon=3):
        super().__init__()
        self.horizon, self.action_dim, self.action_centre = horizon, action_dim, torch.zeros(1)
        size = horizon * action_dim
        self.net = nn.Sequential(nn.Linear(size + 1 + state_dim, 32), nn.Tanh(),
                                 nn.Linear(32, size))
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)
        self.calls = {"encode": 0, "velocity": 0}

    def encode(self, obs):
        self.calls["encode"] += 1
        return obs["state"]

    def velocity(self, x_t, t, ctx):
        self.calls["velocity"] += 1
        return self.net(torch.cat([x_t.flatten(1), t[:, None], ctx], 1)).view_as(x_t)

    def denormalise(self, x_0):
        return x_0


def recorded_batch(policy, rows=12, K=4, noise_level=0.2, transitions="one"):
    """A rollout's batch made by hand with the policy's own velocities; some actions masked."""
    obs = {"state": torch.randn(rows, 3)}
    x = torch.randn(rows, K + 1, policy.horizon, policy.action_dim)
    t = [torch.full((rows,), 1 - k / K) for k in range(K)]
    v = torch.stack([policy.velocity(x[:, k], t[k], obs["state"]) for k in range(K)], 1).detach()
    k = torch.arange(rows)[:, None] % K if transitions == "one" else torch.arange(K).repeat(rows, 1)
    return {"obs": obs, "x": x, "v": v, "k": k, "y": torch.where(torch.rand(rows) < 0.5, -1.0, 1.0),
            "mask": torch.arange(policy.horizon) < torch.randint(1, policy.horizon + 1, (rows, 1)),
            "episode": torch.arange(rows)}


@pytest.mark.parametrize("transitions", ["one", "all"])
def test_the_first_update_is_a_reinforce_step(transitions):
    """One SGD step over one batch, against log-probabilities of torch.distributions, row by row."""
    torch.manual_seed(0)
    policy, a = Foreign(3), 0.3
    nn.init.normal_(policy.net[-1].weight, std=0.3)
    batch = recorded_batch(policy, noise_level=a, transitions=transitions)
    reference, objective, count = copy.deepcopy(policy), 0, 0
    for b in range(12):
        for k in batch["k"][b].tolist():
            t, dt, x_t = 1 - k / 4, 0.25, batch["x"][b, k]
            sigma2 = a**2 * t / (1 - (t if k else 0.75))
            v = reference.velocity(x_t[None], torch.tensor([t]), batch["obs"]["state"][b:b + 1])[0]
            mean = x_t - dt * v - sigma2 * dt / (2 * t) * (x_t + (1 - t) * v)
            normal = torch.distributions.Normal(mean, math.sqrt(sigma2 * dt + 1e-4))
            log_prob = normal.log_prob(batch["x"][b, k + 1]).sum(-1)              # (H,)
            objective += batch["y"][b] * log_prob[batch["mask"][b]].mean()
            count += 1
    (-objective / count).backward()
    loss.update(policy, torch.optim.SGD(policy.parameters(), lr=1e-3), batch, noise_level=a,
                epochs=1, minibatch=12, grad_clip=1e9)
    for p, r in zip(policy.parameters(), reference.parameters()):
        torch.testing.assert_close(p, r - 1e-3 * r.grad, rtol=1e-4, atol=1e-6)
        assert r.grad.abs().max() > 1e-3


@pytest.mark.parametrize("transitions", ["one", "all"])
def test_one_encode_and_one_velocity_call_per_optimisation_step(transitions):
    policy = Foreign(3)
    batch = recorded_batch(policy, rows=10, transitions=transitions)
    optimizer, steps = torch.optim.SGD(policy.parameters(), lr=0.01), []
    optimizer.register_step_post_hook(lambda *_: steps.append(1))
    policy.calls = {"encode": 0, "velocity": 0}
    loss.update(policy, optimizer, batch, epochs=3, minibatch=4)
    assert policy.calls == {"encode": 9, "velocity": 9} and len(steps) == 9       # 4 + 4 + 2 rows


def test_an_epoch_sees_every_row_once_in_random_order():
    policy, seen = Foreign(3), []
    batch = recorded_batch(policy, rows=20)
    policy.encode = lambda obs: seen.append(obs["state"][:, 0].clone()) or obs["state"]
    loss.update(policy, torch.optim.SGD(policy.parameters(), lr=0), batch, epochs=2, minibatch=8)
    first, second, rows = torch.cat(seen[:3]), torch.cat(seen[3:]), batch["obs"]["state"][:, 0]
    for order in (first, second):
        assert torch.equal(order.sort()[0], rows.sort()[0]) and not torch.equal(order, rows)
    assert not torch.equal(first, second)


def test_gradients_do_not_pile_up():
    """Two epochs in one call are two calls of one epoch with the gradients thrown away between."""
    policy = Foreign(3)
    batch, other = recorded_batch(policy), copy.deepcopy(policy)
    loss.update(policy, torch.optim.SGD(policy.parameters(), lr=0.1), batch, epochs=2)
    for _ in range(2):
        other.zero_grad()
        loss.update(other, torch.optim.SGD(other.parameters(), lr=0.1), batch, epochs=1)
    for p, q in zip(policy.parameters(), other.parameters()):
        torch.testing.assert_close(p, q)


def updated(batch):
    """The parameters after two epochs of SGD, from a fixed start and a fixed order."""
    torch.manual_seed(1)
    policy = Foreign(3)
    info = loss.update(policy, torch.optim.SGD(policy.parameters(), lr=0.1), batch, epochs=2,
                       minibatch=5)
    return torch.cat([p.detach().flatten() for p in policy.parameters()]), info


def one_of_two_ranks(rank, port, batch, folder):
    environment = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1",
                       MASTER_PORT=port)
    os.environ.update({k: str(v) for k, v in environment.items()})
    loss.join_ranks("cpu")
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    own = (batch["episode"] < 9) == (rank == 0)                    # nine rows here, three there
    label = loss.labels(np.arange(6) < (2 if rank else 5), torch.arange(6), "centered")
    result = *updated({k: {"state": v["state"][own]} if k == "obs" else v[own]
                       for k, v in batch.items()}), label, loss.share(range(8))
    torch.save(result, folder / f"{rank}.pt")


def test_two_ranks_update_like_one_with_the_joined_batch(tmp_path):
    """Uneven ranks, a rank without a row in some minibatch, centered labels: all as if alone."""
    batch = recorded_batch(Foreign(3))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(one_of_two_ranks, (port, batch, tmp_path), nprocs=2)
    alone, info = updated(batch)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    for parameters, metrics, *_ in ranks:
        torch.testing.assert_close(parameters, alone)
        for name in ("loss", "grad_norm"):
            assert metrics[name] == pytest.approx(info[name], rel=1e-4)
    y = torch.cat([label for _, _, label, _ in ranks])             # 7 successes in 12 episodes
    torch.testing.assert_close(y, torch.tensor([1.0] * 5 + [-1] + [1] * 2 + [-1] * 4) - 2 / 12)
    assert np.concatenate([seeds for *_, seeds in ranks]).tolist() == list(range(8))


def test_an_update_leaves_the_batch_as_it_was():
    policy = Foreign(3)
    batch = recorded_batch(policy)
    before = copy.deepcopy(batch)
    loss.update(policy, torch.optim.Adam(policy.parameters(), lr=0.1), batch, epochs=2, minibatch=5)
    torch.testing.assert_close(batch, before, rtol=0, atol=0)


def test_gradients_are_clipped_and_their_norm_reported():
    policy = Foreign(3)
    batch, before = recorded_batch(policy), copy.deepcopy(policy)
    info = loss.update(policy, torch.optim.SGD(policy.parameters(), lr=1.0), batch, epochs=1,
                       minibatch=12, grad_clip=0.01)
    step = torch.cat([(p - b).flatten() for p, b in zip(policy.parameters(), before.parameters())])
    assert info["grad_norm"] > 0.1 and step.norm().item() == pytest.approx(0.01, rel=1e-3)


def test_the_options_of_update_reach_the_loss():
    """Two steps with SGD; the second starts from a drift that the options then change."""
    torch.manual_seed(0)
    start, results = Foreign(3), []
    batch = recorded_batch(start)
    for options in ({}, {"beta": 3.0}, {"max_drift": 1e-3}, {"dpo_beta": 4.0},
                    {"target": "endpoint"}, {"target": "next-mean"}, {"form": "weighted"},
                    {"form": "negative"}, {"noise_level": 0.7}, {"corrected": False}):
        policy = copy.deepcopy(start)
        torch.manual_seed(1)
        loss.update(policy, torch.optim.SGD(policy.parameters(), lr=0.1), batch, minibatch=12,
                    epochs=2, **options)
        results.append(torch.cat([p.detach().flatten() for p in policy.parameters()]))
    assert all((a - b).abs().max() > 1e-6 for i, a in enumerate(results) for b in results[:i])


def test_info_is_the_mean_over_optimisation_steps():
    """With learning rate 0 every row ties: loss ln 2, no drift, whatever the minibatches."""
    policy = Foreign(3)
    info = loss.update(policy, torch.optim.SGD(policy.parameters(), lr=0), recorded_batch(policy),
                       epochs=2, minibatch=5)
    assert info["loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert info["drift"] == info["margin"] == info["clipped"] == 0
    assert info["rank_accuracy"] == 0                          # a tie is no win


# ------------------------------------------------------------------------------------------------
# The slow policy


def test_ema_decay_runs_a_half_cosine_from_start_to_end():
    assert loss.ema_decay(0, 50) == pytest.approx(0.1)
    assert loss.ema_decay(50, 50) == pytest.approx(0.995)
    alphas = [loss.ema_decay(i, 40, 0.2, 0.8) for i in range(41)]
    # (1 + cos x) / 2 = cos^2(x / 2)
    expected = [0.8 - 0.6 * math.cos(math.pi * i / 80)**2 for i in range(41)]
    np.testing.assert_allclose(alphas, expected, atol=1e-12)
    assert alphas[20] == pytest.approx(0.5) and sorted(alphas) == alphas
    assert alphas[1] - alphas[0] < 0.1 * (alphas[21] - alphas[20])         # starts and ends gently


def test_ema_update_is_the_slow_loop():
    old, new = Foreign(3), Foreign(3)
    nn.init.normal_(new.net[-1].weight)
    expected = [[0.9 * a + 0.1 * b for a, b in zip(p.flatten().tolist(), q.flatten().tolist())]
                for p, q in zip(old.parameters(), new.parameters())]
    before = [q.clone() for q in new.parameters()]
    loss.ema_update(old, new, 0.9)
    for p, slow, q, q_before in zip(old.parameters(), expected, new.parameters(), before):
        np.testing.assert_allclose(p.detach().flatten(), slow, rtol=1e-5, atol=1e-7)
        assert torch.equal(q, q_before)


def test_ema_update_copies_and_does_not_alias():
    """At decay 0 old becomes new, and stays put when new moves on; at decay 1 it does not move."""
    old, new = Foreign(3), Foreign(3)
    loss.ema_update(old, new, 0.0)
    with torch.no_grad():
        for p in new.parameters():
            p += 1
    assert all((q - p).abs().min() > 0.5 for p, q in zip(old.parameters(), new.parameters()))
    before = copy.deepcopy(old)
    loss.ema_update(old, new, 1.0)
    assert all(torch.equal(p, b) for p, b in zip(old.parameters(), before.parameters()))


# ------------------------------------------------------------------------------------------------
# The iteration as a whole


class OneShot:
    """A world of one action: it succeeds when that is above 0.5."""

    def __init__(self, num_envs):
        self.num_envs, self.obs = num_envs, {"state": np.zeros((num_envs, 1), np.float32)}

    def reset(self, *, seed, options):
        return self.obs, {}

    def step(self, chunks):
        success, one = chunks[:, 0, 0] > 0.5, np.ones(self.num_envs, int)
        return self.obs, success * 1.0, one > 0, one < 0, {"success": success, "executed": one}


@pytest.mark.parametrize("form", ["ranking", "weighted", "positive", "negative"])
def test_a_one_action_task_is_learned(form):
    """N(0, 1) has 31 % above 0.5; rollout, labels, update and EMA alone raise that."""
    torch.manual_seed(0)
    policy = Foreign(1, action_dim=1, horizon=1)
    old, optimizer = copy.deepcopy(policy), torch.optim.Adam(policy.parameters(), lr=1e-2)
    before = flow.evaluate(policy, OneShot(1000), range(1000)).mean()
    assert before == pytest.approx(1 - stats.norm.cdf(0.5), abs=0.05)
    for iteration in range(20):
        success, batch = loss.rollout(old, OneShot(256), range(256), transitions="all")
        batch["y"] = loss.labels(success, batch["episode"])
        loss.update(policy, optimizer, batch, minibatch=64, form=form)
        loss.ema_update(old, policy, loss.ema_decay(iteration, 20))
    assert flow.evaluate(policy, OneShot(1000), range(1000)).mean() > before + 0.15


def test_reinforcement_improves_over_few_shot_sft_on_the_toy_world():
    """1000 wide starts, the same for both. Seeds 0 to 4 all gain 0.1 or more; 0.04 is asked for."""
    torch.manual_seed(0)
    policy = flow.FlowPolicy(4, 2, state_dim=3)
    flow.train_sft(policy, *flow.toy_demos(6, 0), 300)
    old, optimizer = copy.deepcopy(policy), torch.optim.Adam(policy.parameters(), lr=5e-4)
    test = range(flow.EVAL_SEED, flow.EVAL_SEED + 1000)
    before = flow.evaluate(policy, flow.GapWorld(1000), test).mean()
    for iteration in range(15):
        seeds = range(256 * iteration, 256 * (iteration + 1))
        success, batch = loss.rollout(old, flow.GapWorld(256), seeds, transitions="all")
        batch["y"] = loss.labels(success, batch["episode"])
        loss.update(policy, optimizer, batch, minibatch=512)
        loss.ema_update(old, policy, loss.ema_decay(iteration, 15))
    assert flow.evaluate(policy, flow.GapWorld(1000), test).mean() > before + 0.04


def test_train_toy_acts_with_the_ema_policy_on_fresh_seeds():
    """Watches rollout and update from outside: who acts, who learns, on which seeds and labels."""
    acted, learned, played, labelled = [], [], [], []
    rollout, update, sft = loss.rollout, loss.update, random_policy()

    def weights(policy):
        return torch.cat([p.detach().flatten().clone() for p in policy.parameters()])

    def watched_rollout(policy, envs, seeds, **kwargs):
        success, batch = rollout(policy, envs, seeds, **kwargs)
        acted.append(weights(policy))
        played.extend(list(seeds))
        labelled.append((success, batch))
        return success, batch

    def watched_update(policy, optimizer, batch, **kwargs):
        info = update(policy, optimizer, batch, **kwargs)
        learned.append(weights(policy))
        return info

    start = weights(sft)
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.chdir(folder)
        patch.setattr(flow, "toy_policy", lambda *a, **k: sft)
        patch.setattr(loss, "rollout", watched_rollout)
        patch.setattr(loss, "update", watched_update)
        args = loss.parse_args("--iterations 3 --episodes 20 --ema 0.25 0.25".split())
        returned_sft, policy, *_ = loss.train_toy(args, quiet=True)
    assert torch.equal(weights(returned_sft), start) and torch.equal(weights(policy), learned[2])
    assert torch.equal(acted[0], start)
    for i in (1, 2):
        torch.testing.assert_close(acted[i], 0.25 * acted[i - 1] + 0.75 * learned[i - 1])
        assert not torch.equal(learned[i], learned[i - 1])
    assert len(set(played)) == 60
    assert not set(played) & set(range(flow.EVAL_SEED, flow.EVAL_SEED + 1000))
    for success, batch in labelled:
        expected = [1 if success[e] else -1 for e in batch["episode"].tolist()]
        assert batch["y"].tolist() == expected


# ------------------------------------------------------------------------------------------------
# Simulators behind chunks


class Countdown:
    """A simulator that succeeds at the step its seed says, and counts how often it is observed."""

    def reset(self, seed):
        self.seed, self.step, self.looks = seed, 0, 0

    def advance(self, action):
        self.step += 1
        assert action.shape == (1,)
        return self.step == self.seed

    def observe(self):
        self.looks += 1
        return {"state": np.array([self.step, self.seed], np.float32)}


def countdown_env(max_steps=10, horizon=4, action_repeat=1):
    space = gym.spaces.Dict({"state": gym.spaces.Box(-np.inf, np.inf, (2,))})
    return loss.ChunkEnv(Countdown, space, 1, max_steps, horizon, action_repeat)


@pytest.mark.parametrize("horizon, repeat", [(1, 1), (4, 1), (5, 1), (1, 4), (2, 3)])
def test_a_chunk_stops_at_success_or_at_the_time_limit(horizon, repeat):
    """Success at step 1 to 12 of at most 10, so the last two time out; the 10th just makes it."""
    for arrival in range(1, 13):
        env, step, chunks = countdown_env(10, horizon, repeat), 0, 0
        env.reset(seed=arrival)
        terminated = truncated = False
        while not (terminated or truncated):
            obs, reward, terminated, truncated, info = env.step(np.zeros((horizon, 1)))
            end = min(step + horizon * repeat, arrival, 10)
            assert info["executed"] == -(-(end - step) // repeat) and obs["state"][0] == end
            assert terminated == info["success"] == (reward == 1) == (end == arrival)
            assert truncated == (end == 10 and arrival != 10)
            step, chunks = end, chunks + 1
        assert env.sim.looks == 1 + chunks                      # observed once a chunk, not a step
        *_, info = env.step(np.zeros((horizon, 1)))             # over: nothing moves any more
        assert info == {"executed": 0, "success": False} and env.sim.step == step
        assert env.sim.looks == 1 + chunks


def test_an_action_is_held_for_several_control_steps():
    """Chunks of a demo are the means of what it did in those steps."""
    actions = torch.arange(7.0)[:, None]
    chunks = flow.sliding_chunks(actions, horizon=2, action_repeat=3)
    assert chunks.shape == (7, 2, 1) and chunks[0, :, 0].tolist() == [1, 4]
    assert chunks[3, :, 0].tolist() == [4, 6] and chunks[6, :, 0].tolist() == [6, 6]
    env, seen = countdown_env(100, 2, 3), []
    env.reset(seed=50)
    env.sim.advance = lambda action: seen.append(float(action[0])) or False
    env.step(np.array([[1.0], [2.0]]))
    assert seen == [1, 1, 1, 2, 2, 2]


def test_a_simulator_is_built_at_the_first_reset_and_only_once():
    built = []
    env = countdown_env()
    env.make_sim = lambda: built.append(1) or Countdown()
    assert not built
    for seed in (3, 4):
        assert env.reset(seed=seed)[0]["state"].tolist() == [0, seed]
    assert built == [1]


def test_worker_processes_play_the_same_episodes():
    """Two workers, five seeds through play: successes, masks and observations of every chunk."""
    envs, seeds = loss.worker_envs(countdown_env, 2), [2, 11, 7, 10, 4]
    try:
        success, rows = flow.play(lambda obs: (np.zeros((2, 4, 1), np.float32), {}), envs, seeds)
    finally:
        envs.close()
    assert success.tolist() == [True, False, True, True, True]
    for e, seed in enumerate(seeds):
        mine, end = rows["episode"] == e, min(seed, 10)
        assert rows["obs"]["state"][mine].tolist() == [[s, seed] for s in range(0, end, 4)]
        assert rows["mask"][mine].flatten().tolist() == [i < end for i in range(-(-end // 4) * 4)]


# ------------------------------------------------------------------------------------------------
# Flags, logs, and the table of --compare


def test_every_flag_reaches_its_function():
    flags = ("--rollout sde-uncorrected --target next-mean --loss weighted --transitions all "
             "--noise-level 0.31 --num-steps 7 --beta 0.4 --max-drift 0.6 --dpo-beta 0.8")
    acting, learning = loss.method(loss.parse_args(flags.split()))
    assert acting == dict(num_steps=7, noise_level=0.31, sampler="sde-uncorrected",
                          transitions="all")
    assert learning == dict(noise_level=0.31, beta=0.4, max_drift=0.6, dpo_beta=0.8,
                            target="next-mean", form="weighted", corrected=False)


def test_the_defaults_are_the_papers():
    """Those of the flags, and those of the functions where a flag has the same name."""
    paper = dict(num_steps=4, noise_level=0.2, sampler="sde", transitions="one", beta=1.0,
                 max_drift=0.5, dpo_beta=1.0, target="next", form="ranking", corrected=True)
    acting, learning = loss.method(loss.parse_args([]))
    assert {**acting, **learning} == paper
    for function in (loss.rollout, loss.update, loss.step_nft_loss):
        for name, parameter in inspect.signature(function).parameters.items():
            assert name not in paper or parameter.default == paper[name]


def test_a_log_comes_back_with_nan_in_empty_cells(tmp_path):
    path = tmp_path / "new" / "log.csv"
    loss.log_row(path, {"a": 1, "b": 0.5})
    loss.log_row(path, {"a": 2, "b": ""})
    log = loss.read_log(path)
    assert log["a"].tolist() == [1, 2] and log["b"][0] == 0.5 and math.isnan(log["b"][1])


def test_the_tables_interval_is_scipys_t_interval():
    for seeds in (2, 3, 5, 10):
        after = np.random.rand(seeds)
        rows = [{"flags": "--beta 5", "seed": str(s), "sft": "0.5", "stepnft": str(a)}
                for s, a in enumerate(after)]
        row, = loss.summarise(rows)
        half = stats.t.ppf(0.975, seeds - 1) * stats.sem(after)
        assert (row["figure"], row["variant"], row["paper"]) == ("beta", "5", 0.79)
        assert row["after"] == pytest.approx(after.mean())
        assert row["half"] == pytest.approx(half, rel=2e-3)


def test_a_paper_value_of_zero_is_shown():
    row, = loss.summarise([{"flags": "--target endpoint", "seed": "0", "sft": "0", "stepnft": "0"}]
                          )[-1:]
    assert row["variant"] == "endpoint" and row["paper"] == 0


# ------------------------------------------------------------------------------------------------
# The script


TINY = ("--iterations", 2, "--episodes", 8)


def test_the_script_trains_logs_and_saves(workplace):
    done = run_script("03_step_loss.py", *TINY, "--out", workplace / "out", cwd=workplace)
    result = result_line(done)
    assert 0 <= result["sft"] <= 1 and 0 <= result["stepnft"] <= 1 and result["episodes"] == 16
    log = loss.read_log(workplace / "out" / "log.csv")
    assert log["iteration"].tolist() == [0, 1] and log["episodes"].tolist() == [8, 16]
    assert log["alpha"][0] == pytest.approx(0.1)
    assert log["eval_ode"][1] == pytest.approx(result["stepnft"], abs=1e-3)
    policy = flow.load_policy(workplace / "out" / "policy.pt")
    test = range(flow.EVAL_SEED, flow.EVAL_SEED + 1000)
    assert flow.evaluate(policy, flow.GapWorld(1000), test).mean() == pytest.approx(
        result["stepnft"], abs=2e-3)
    assert (workplace / "out" / "learning.png").stat().st_size > 1000


def test_compare_draws_three_figures_and_resumes(workplace):
    flags = ("--compare", 1, "--iterations", 1, "--episodes", 8, "--out", workplace / "out")
    table = workplace / "out" / "compare.csv"
    first = run_script("03_step_loss.py", *flags, cwd=workplace)
    assert all(variant in first.stdout for _, variant, _, _ in loss.VARIANTS)
    assert result_line(first)["variants"] == len(loss.VARIANTS)
    assert len(list((workplace / "out").glob("*.png"))) == 3
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted(r["flags"] for r in rows) == sorted({flags for _, _, flags, _ in loss.VARIANTS})
    rows[0]["stepnft"] = "0.12345"                         # a mark: this run must not be repeated
    with open(table, "w", newline="") as file:             # the last run never happened
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows[:-1])
    run_script("03_step_loss.py", *flags, cwd=workplace)
    with open(table, newline="") as file:
        again = list(csv.DictReader(file))
    assert again[0]["stepnft"] == "0.12345"
    assert [r["flags"] for r in again] == [r["flags"] for r in rows]


def test_help_lists_the_flags(tmp_path):
    told = run_script("03_step_loss.py", "--help", cwd=tmp_path).stdout
    assert all(flag in told for flag in ("--compare", "--rollout", "--target", "--ema"))


@pytest.mark.parametrize("flags, fix", [
    ("--rollout ode", "--target endpoint"), ("--noise-level 0", "--rollout ode")])
def test_flags_that_cannot_work_are_told_in_one_line(tmp_path, flags, fix):
    done = run_script("03_step_loss.py", *flags.split(), cwd=tmp_path, ok=False)
    assert fix in one_clear_line(done)
    assert not list(tmp_path.iterdir())


def test_imports_have_no_side_effect_and_need_no_simulator(tmp_path):
    """No simulator, no figure, no parser, no seeding, no output, no file."""
    code = f"""
import argparse, importlib, random, sys
import gymnasium, numpy, torch, tqdm
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("mani_skill", "sapien", "libero", "robosuite", "mujoco",
                                  "matplotlib"):
            raise ImportError(name + " must not be imported here")
def refuse(*args, **kwargs):
    raise AssertionError("a parser at import")
sys.meta_path.insert(0, Blocked())
argparse.ArgumentParser.__init__ = refuse
sys.path.insert(0, {str(ROOT)!r})
state = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
for name in ("01_flow_policy", "02_sde_sampler", "03_step_loss"):
    importlib.import_module(name)
assert state == (random.getstate(), numpy.random.get_state()[1].tolist(),
                 torch.get_rng_state().tolist())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and not list(tmp_path.iterdir())
