"""03: the loss against slow scalar loops, autograd and torch.distributions; the RL iteration piece
by piece, then as a whole on a one-action world and on the toy."""

import copy
import importlib
import inspect
import math
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from conftest import (ROOT, Opaque, Scripted, expert_plan, result_line, run_main, run_script,
                      wrong_call)
from test_01_flow_policy import WRAPS, Diary, Wrapped, toy_chunks

from envs import gap_world

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
    tensors = {name: torch.randn(B, H, A).double() for name in ("v_old", "x_t", "target")}
    tensors["v_theta"] = tensors["v_old"] + 0.4 * torch.randn(B, H, A).double()
    mask = torch.arange(H) < torch.tensor([3, 1, 0, 2, 3, 2])[:B, None]
    y = torch.tensor([1, -1, 1, 0, 0.4, -1.6])[:B].double()
    return {**tensors, "t_cur": times[k], "t_next": times[k + 1], "sigma": sigmas[k], "y": y,
            "mask": mask}


def slow_error(v, x, target, t, t_next, sigma, error, var_eps=1e-4):
    """E of one action with plain floats: v, x, target are lists of A numbers."""
    dt, total = t - t_next, 0.0
    for a in range(len(v)):
        if error == "endpoint":
            explained = x[a] - t * v[a]
        else:                                      # Euler step, then towards the score -x1_hat / t
            explained = x[a] - dt * v[a] - sigma**2 * dt / (2 * t) * (x[a] + (1 - t) * v[a])
        total += (target[a] - explained)**2
    return total / (sigma**2 * dt + var_eps)


def slow_mean(values, mask):
    """Mean of lists of lists over a row's marked actions, then over the rows that have any."""
    rows = [[value for value, counts in zip(*row) if counts] for row in zip(values, mask.tolist())]
    means = [sum(row) / len(row) for row in rows if row]
    return sum(means) / len(means) if means else 0.0


def slow_loss(v_theta, v_old, x_t, target, t_cur, t_next, sigma, y, mask, beta=1.0, max_drift=0.5,
              dpo_beta=1.0, kl_weight=1e-4, error="next"):
    """The loss of the design note with plain floats."""
    losses, squares = [], []
    for b in range(len(x_t)):
        losses.append([])
        squares.append([])
        for h in range(x_t.shape[1]):
            old, x, seen = (z[b, h].tolist() for z in (v_old, x_t, target))
            delta = [new - was for new, was in zip(v_theta[b, h].tolist(), old)]
            length = math.sqrt(sum(d * d for d in delta))
            squares[b].append(length**2 / len(delta))              # mean over the action dims
            if length > max_drift:
                delta = [d * max_drift / length for d in delta]
            E = [slow_error([v + side * beta * d for v, d in zip(old, delta)], x, seen,
                            t_cur[b].item(), t_next[b].item(), sigma[b].item(), error)
                 for side in (1, -1)]
            losses[b].append(math.log(1 + math.exp(dpo_beta / 2 * y[b].item() * (E[0] - E[1]))))
    kl = slow_mean(squares, mask)     # over all actions, executed or not
    return slow_mean(losses, mask) + kl_weight * kl


ERRORS = {"next": loss.step_error, "endpoint": loss.endpoint_error}
CHOICES = [dict(error=error, **options) for error in ERRORS for options in (
    {}, dict(beta=0.3, max_drift=0.2, dpo_beta=0.7), dict(kl_weight=0.5, max_drift=5.0),
    dict(beta=2.0, dpo_beta=0.1))]


def fast(choice):
    """The options of slow_loss as step_nft_loss takes them."""
    return {**choice, "error": ERRORS[choice["error"]]}


@pytest.mark.parametrize("choice", CHOICES, ids=lambda c: "-".join(map(str, c.values())))
def test_the_loss_is_the_slow_loop(choice):
    torch.manual_seed(0)
    steps = batch_of_steps()
    value, _ = loss.step_nft_loss(**steps, **fast(choice))
    assert value.item() == pytest.approx(slow_loss(**steps, **choice), rel=1e-5)


@pytest.mark.parametrize("choice", CHOICES, ids=lambda c: "-".join(map(str, c.values())))
def test_its_gradient_is_the_slow_loops_slope(choice):
    """Central differences of the slow loop along one random direction of v_theta."""
    torch.manual_seed(0)
    steps = batch_of_steps()
    v_theta, direction, h = steps["v_theta"].requires_grad_(), torch.randn(6, 3, 2).double(), 1e-5
    loss.step_nft_loss(**steps, **fast(choice))[0].backward()
    up, down = (slow_loss(**{**steps, "v_theta": v_theta.detach() + s * h * direction}, **choice)
                for s in (1, -1))
    assert (v_theta.grad * direction).sum().item() == pytest.approx((up - down) / (2 * h), rel=1e-4)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("var_eps", [1e-4, 0.1])
def test_an_error_is_the_slow_loop_action_by_action_and_so_is_its_gradient(error, var_eps):
    """At noise 0 too, where only eps is left to divide by."""
    steps = batch_of_steps(noise_level=0.5)
    steps["sigma"][4] = 0
    v = steps["v_theta"].requires_grad_()
    args = [steps[name] for name in ("x_t", "target", "t_cur", "t_next", "sigma")]
    E = getattr(loss, ERRORS[error].__name__)(v, *args, var_eps=var_eps)
    E.sum().backward()
    assert E.shape == (6, 3)

    def slow(b, h, shift=(0, 0)):
        x, seen, *times = (z[b, h].tolist() if z.dim() == 3 else z[b].item() for z in args)
        moved = [a + s for a, s in zip(v[b, h].tolist(), shift)]
        return slow_error(moved, x, seen, *times, error, var_eps)

    for b, h in np.ndindex(6, 3):
        assert E[b, h].item() == pytest.approx(slow(b, h), rel=1e-6)
        for a in range(2):
            step = [1e-4 * (i == a) for i in range(2)]
            slope = (slow(b, h, step) - slow(b, h, [-s for s in step])) / 2e-4
            assert v.grad[b, h, a].item() == pytest.approx(slope, rel=1e-5)


def test_the_last_step_ends_the_path_so_both_errors_almost_agree_there():
    """t_next = 0: mean = x0_hat - sigma^2 / 2 x1_hat, so they differ by the correction alone."""
    steps = batch_of_steps(B=4, noise_level=1e-3)
    args = [steps[name][3:] for name in ("v_theta", "x_t", "target", "t_cur", "t_next", "sigma")]
    E, E_end = loss.step_error(*args), loss.endpoint_error(*args)
    torch.testing.assert_close(E, E_end, rtol=1e-4, atol=0)


def test_the_branches_stand_still_only_v_theta_learns():
    steps = batch_of_steps()
    for name in ("v_theta", "v_old"):
        steps[name].requires_grad_()
    loss.step_nft_loss(**steps)[0].backward()
    assert steps["v_theta"].grad.abs().max() > 0
    assert steps["v_old"].grad is None


# ------------------------------------------------------------------------------------------------
# The identities of one step


def one_step(k=1, y=1.0, drift=0.1, A=3, noise_level=0.4, num_steps=4, H=1):
    """One row of H actions; by hand its B, var, e = x_next - mean(v_old) and d = B delta."""
    times = [1 - i / num_steps for i in range(num_steps + 1)]
    t, t_next = times[k], times[k + 1]
    dt, sigma = t - t_next, noise_level * math.sqrt(t / (1 - (t if t < 1 else t_next)))
    x_t, v_old, x_next = (torch.randn(1, H, A).double() for _ in range(3))
    v_theta = v_old + drift * torch.randn(1, H, A).double()
    mean_old = x_t - dt * v_old - sigma**2 * dt / (2 * t) * (x_t + (1 - t) * v_old)
    B = -dt * (1 + (1 - t) * sigma**2 / (2 * t))
    time = {name: torch.tensor([z]).double() for name, z in
            (("t_cur", t), ("t_next", t_next), ("sigma", sigma), ("y", y))}
    return dict(v_theta=v_theta, v_old=v_old, x_t=x_t, target=x_next, **time), SimpleNamespace(
        e=x_next - mean_old, d=B * (v_theta - v_old), var=sigma**2 * dt, eps=1e-4, B=B,
        mean=mean_old)


@pytest.mark.parametrize("k", range(4))
@pytest.mark.parametrize("y", [1.0, -1.0, 0.6])
def test_the_branches_differ_by_minus_4_beta_e_d_over_var(k, y):
    """E_pos - E_neg = -4 beta <d, e> / (var + eps), in the margin and through softplus."""
    step, by = one_step(k, y)
    for beta, dpo_beta in ((1.0, 1.0), (0.5, 0.2)):
        difference = -4 * beta * (by.d * by.e).sum() / (by.var + by.eps)
        value, info = loss.step_nft_loss(**step, beta=beta, dpo_beta=dpo_beta, max_drift=9,
                                         kl_weight=0)
        torch.testing.assert_close(info["margin"], -y * difference)
        torch.testing.assert_close(value, (dpo_beta / 2 * y * difference).exp().log1p())


@pytest.mark.parametrize("k", range(4))
def test_the_endpoint_branches_differ_by_4_beta_t_delta_times_residual_over_var(k):
    """x0_hat has slope -t in v: 4 beta t <delta, x_0 - x0_hat(v_old)> / (var + eps)."""
    step, by = one_step(k, 1.0)
    t, delta = step["t_cur"], step["v_theta"] - step["v_old"]
    residual = step["target"] - (step["x_t"] - t * step["v_old"])
    difference = 4 * 0.7 * t * (delta * residual).sum() / (by.var + by.eps)
    _, info = loss.step_nft_loss(**step, beta=0.7, max_drift=9, error=loss.endpoint_error)
    torch.testing.assert_close(info["margin"], -difference.squeeze())


@pytest.mark.parametrize("k", range(4))
@pytest.mark.parametrize("y", [1.0, -1.0, 0.6])
@pytest.mark.parametrize("H, executed", [(1, 1), (4, 4), (4, 3)])
@pytest.mark.parametrize("beta, dpo_beta", [(1.0, 1.0), (0.7, 1.0), (1.0, 0.2), (2.0, 3.0)])
def test_at_zero_drift_the_loss_is_ln_2_and_its_gradient_reinforce(k, y, H, executed, beta,
                                                                   dpo_beta):
    """-(beta dpo_beta / H) var / (var + eps) y grad log N(x_next; mean, var), H executed actions.

    The log-probability is that of torch.distributions, with the variance of the sampler: no eps.
    """
    step, by = one_step(k, y, A=3, H=H)
    mask = torch.arange(H)[None] < executed
    v_theta = step["v_theta"] = step["v_old"].clone().requires_grad_()
    value, _ = loss.step_nft_loss(**step, mask=mask, beta=beta, dpo_beta=dpo_beta)
    value.backward()
    assert value.item() == pytest.approx(math.log(2), rel=1e-6)
    v = step["v_old"].clone().requires_grad_()
    normal = torch.distributions.Normal(by.mean + by.B * (v - step["v_old"]), by.var**0.5)
    normal.log_prob(step["target"])[mask].sum().backward()
    factor = beta * dpo_beta / executed * by.var / (by.var + by.eps)
    torch.testing.assert_close(v_theta.grad, -factor * y * v.grad)
    assert v.grad[mask].abs().min() > 0 and not v.grad[~mask].any()


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


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("noise_level", [0.0, 0.3])
@pytest.mark.parametrize("drift", [0.0, 0.3])
def test_gradients_are_finite(error, noise_level, drift):
    """At zero drift, at zero noise, and at t = 1 (k = 0) as everywhere."""
    for k in range(4):
        step, _ = one_step(k, drift=drift, noise_level=noise_level)
        step["v_theta"].requires_grad_()
        value, info = loss.step_nft_loss(**step, error=ERRORS[error])
        value.backward()
        assert value.isfinite() and step["v_theta"].grad.isfinite().all()
        assert torch.stack(list(info.values())).isfinite().all()


@pytest.mark.parametrize("error", ERRORS)
def test_a_masked_action_has_no_gradient_and_no_influence(error):
    steps = batch_of_steps()
    steps["y"][3] = -1                                         # a label of 0 would teach nothing
    v_theta, mask = steps["v_theta"].requires_grad_(), steps["mask"]
    value, info = loss.step_nft_loss(**steps, kl_weight=0, error=ERRORS[error])
    value.backward()
    per_action = v_theta.grad.abs().sum(-1)
    assert not per_action[~mask].any() and per_action[mask].all()
    for name in ("target", "x_t", "v_old", "v_theta"):
        steps[name] = steps[name].detach() + 5.0 * ~mask[..., None]
    changed, changed_info = loss.step_nft_loss(**steps, kl_weight=0, error=ERRORS[error])
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


def test_without_a_mask_every_action_counts():
    steps = batch_of_steps()
    steps["mask"] = torch.ones(6, 3, dtype=torch.bool)
    with_mask = loss.step_nft_loss(**steps)
    del steps["mask"]
    torch.testing.assert_close(loss.step_nft_loss(**steps), with_mask)


def test_the_executed_mean_is_the_slow_one():
    values, mask = torch.randn(6, 3).double(), batch_of_steps()["mask"]
    ours = loss.executed_mean(values, mask.double())
    assert ours.item() == pytest.approx(slow_mean(values.tolist(), mask))
    assert loss.executed_mean(values, torch.zeros(6, 3)) == 0


def test_wrong_shapes_are_named():
    steps = batch_of_steps()
    with pytest.raises(AssertionError, match="y has shape"):
        loss.step_nft_loss(**{**steps, "y": steps["y"][:, None]})
    with pytest.raises(AssertionError, match="four"):
        loss.step_nft_loss(**{**steps, "target": steps["target"][:, :2]})


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
    value, info = loss.step_nft_loss(**steps, mask=mask, max_drift=0.5)
    assert info["rank_accuracy"].item() == pytest.approx(2 / 3)
    assert info["clipped"].item() == pytest.approx(2 / 3)
    assert info["drift"].item() == pytest.approx((0.003 + 0.9 + 0.6) / 3)
    sides = 4 * abs(by.B) * by.e.norm().item() / (by.var + by.eps) * np.array([0.003, -0.5, 0.5])
    assert info["margin"].item() == pytest.approx(sides.mean())
    assert info["loss"].item() == pytest.approx((
        np.log1p(np.exp(-sides[:2] / 2)).mean() + np.log1p(np.exp(-sides[2] / 2))) / 2)
    assert info["loss"] < value and len(info) <= 8             # without the pull to v_old


# ------------------------------------------------------------------------------------------------
# Labels


def test_labels_are_plus_and_minus_one_per_row():
    y = loss.labels(np.array([True, False, True]), torch.tensor([2, 1, 0, 1, 1]))
    assert y.tolist() == [1, -1, 1, -1, -1]


def test_grouped_labels_lose_the_mean_over_the_episodes_of_one_start():
    """Groups of four in a slow loop; a start that always succeeds teaches nothing."""
    success, episode = [1, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 0], torch.tensor([0, 4, 5, 5, 8, 9, 11])
    y = loss.labels(np.array(success, bool), episode, group_size=4)
    expected = []
    for e in episode.tolist():
        group = [2 * s - 1 for s in success[e // 4 * 4: e // 4 * 4 + 4]]
        expected.append(2 * success[e] - 1 - sum(group) / 4)
    assert y.tolist() == expected and y[0] == 0 and len(set(expected)) == 5


def calm_expert(state):
    """Slightly slower than the expert, whose full steps land on the very rim of the goal."""
    return 0.97 * expert_plan(state, 4)


def arrives_in_time(seed):
    """A GapWorld whose time limit is the very step at which that expert arrives from that seed."""
    world = gap_world.GapWorld(start_width=0.3)
    obs = world.reset([seed])
    while not world.over[0]:
        obs, _ = world.step(calm_expert(obs["state"].numpy()))
    world.max_steps = int(world.steps[0])
    return world


def test_an_episode_that_first_succeeds_in_its_last_chunk_is_a_success():
    """The published code calls it a failure. Arrival on the last step before the time limit."""
    act = loss.explore(Scripted(calm_expert, 4), 4, noise_level=1e-4)
    for seed in range(5):
        world = arrives_in_time(seed)
        success, batch = world.play(act, [seed])
        assert world.steps[0] == world.max_steps and len(batch["x"]) == -(-world.max_steps // 4)
        assert success.tolist() == [True]
        assert (loss.labels(success, batch["episode"]) == 1).all()
        world.max_steps -= 1                                    # one step less: now it fails
        success, batch = world.play(act, [seed])
        assert success.tolist() == [False]
        assert (loss.labels(success, batch["episode"]) == -1).all()


# ------------------------------------------------------------------------------------------------
# Exploring: what a rollout records


def random_policy():
    torch.manual_seed(3)
    policy = flow.FlowPolicy(4, 2, state_dim=3)
    policy.action_centre.copy_(torch.tensor([0.3, -0.1]))
    policy.action_scale.copy_(torch.tensor([0.5, 0.8]))
    return policy


TIMES = [1, 0.75, 0.5, 0.25, 0]


def test_a_rollout_records_the_noisy_steps_it_acted_on():
    policy, world, a = random_policy(), Diary(), 1.0              # enough to see the correction
    success, batch = world.play(loss.explore(policy, 4, a), range(60))
    rows = len(batch["x"])
    assert set(batch) == {"state", "episode", "mask", "x", "v", "sigma"}
    assert success.shape == (60,) and batch["x"].shape == (rows, 5, 4, 2)
    assert batch["v"].shape == (rows, 4, 4, 2) and not batch["v"].requires_grad
    assert batch["sigma"].shape == (rows, 4)
    for k in range(4):
        t, dt = TIMES[k], 0.25
        x, v = batch["x"][:, k], batch["v"][:, k]
        expected = policy.velocity(x, torch.full((rows,), float(t)), policy.encode(batch)).detach()
        torch.testing.assert_close(v, expected, rtol=1e-4, atol=1e-5)
        sigma = a * math.sqrt(t / (1 - (t if t < 1 else TIMES[1])))
        np.testing.assert_allclose(batch["sigma"][:, k], sigma, rtol=1e-5)
        mean = x - dt * v - sigma**2 * dt / (2 * t) * (x + (1 - t) * v)
        residual = (batch["x"][:, k + 1] - mean) / (sigma * math.sqrt(dt))
        assert stats.kstest(residual.flatten(), "norm").pvalue > 1e-3, f"step {k}"
    acted = batch["x"][:60, 4] * torch.tensor([0.5, 0.8]) + torch.tensor([0.3, -0.1])
    np.testing.assert_allclose(world.chunks[0], acted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_steps", [1, 3])
def test_a_rollout_has_as_many_steps_as_asked(num_steps):
    _, batch = gap_world.GapWorld().play(loss.explore(random_policy(), num_steps, 0.2), range(3))
    assert batch["x"].shape[1:] == (num_steps + 1, 4, 2)
    assert batch["v"].shape[1] == batch["sigma"].shape[1] == num_steps


# ------------------------------------------------------------------------------------------------
# Updates


class Foreign(nn.Module):
    """A policy that shares no code with FlowPolicy; it starts as the velocity field v = 0."""

    def __init__(self, state_dim, action_dim=2, horizon=3):
        super().__init__()
        self.horizon, self.action_dim = horizon, action_dim
        size = horizon * action_dim
        self.net = nn.Sequential(nn.Linear(size + 1 + state_dim, 32), nn.Tanh(),
                                 nn.Linear(32, size))
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)
        self.calls = {"encode": 0, "velocity": 0}

    def encode(self, obs):
        self.calls["encode"] += 1
        return Opaque(obs["state"])

    def velocity(self, x_t, t, ctx):
        self.calls["velocity"] += 1
        return self.net(torch.cat([x_t.flatten(1), t[:, None], ctx.content], 1)).view_as(x_t)

    def denormalise(self, x_0):
        return x_0


def recorded_batch(policy, rows=12, K=4, noise_level=0.2):
    """A rollout's batch made by hand with the policy's own velocities; some actions masked."""
    obs = {"state": torch.randn(rows, 3)}
    x = torch.randn(rows, K + 1, policy.horizon, policy.action_dim)
    t = [torch.full((rows,), 1 - k / K) for k in range(K)]
    ctx = Opaque(obs["state"])
    v = torch.stack([policy.velocity(x[:, k], t[k], ctx) for k in range(K)], 1).detach()
    k = torch.arange(rows) % K
    sigma = torch.tensor([noise_level * math.sqrt(s / (1 - min(s, 1 - 1 / K)))
                          for s in (1 - k / K for k in range(K))]).expand(rows, K)
    return {**obs, "x": x, "v": v, "sigma": sigma, "k": k,
            "y": torch.where(torch.rand(rows) < 0.5, -1.0, 1.0),
            "mask": torch.arange(policy.horizon) < torch.randint(1, policy.horizon + 1, (rows, 1)),
            "episode": torch.arange(rows)}


@pytest.mark.parametrize("beta, dpo_beta", [(1.0, 1.0), (0.5, 3.0)])
def test_the_first_update_is_a_reinforce_step(beta, dpo_beta):
    """One SGD step over one batch, against log-probabilities of torch.distributions, row by row."""
    torch.manual_seed(0)
    policy, a = Foreign(3), 0.3
    nn.init.normal_(policy.net[-1].weight, std=0.3)
    batch = recorded_batch(policy, noise_level=a)
    reference, objective = copy.deepcopy(policy), 0
    for b, k in enumerate(batch["k"].tolist()):
        t, dt, x_t = 1 - k / 4, 0.25, batch["x"][b, k]
        sigma2 = a**2 * t / (1 - (t if k else 0.75))
        ctx = Opaque(batch["state"][b:b + 1])
        v = reference.velocity(x_t[None], torch.tensor([t]), ctx)[0]
        mean = x_t - dt * v - sigma2 * dt / (2 * t) * (x_t + (1 - t) * v)
        var = sigma2 * dt
        log_prob = torch.distributions.Normal(mean, math.sqrt(var)).log_prob(
            batch["x"][b, k + 1]).sum(-1)                                         # (H,)
        factor = beta * dpo_beta * var / (var + 1e-4)
        objective += factor * batch["y"][b] * log_prob[batch["mask"][b]].mean()
    (-objective / 12).backward()
    loss.update(policy, torch.optim.SGD(policy.parameters(), lr=1e-3), batch, beta=beta,
                dpo_beta=dpo_beta, epochs=1, minibatch=12, grad_clip=1e9)
    for p, r in zip(policy.parameters(), reference.parameters()):
        torch.testing.assert_close(p, r - 1e-3 * r.grad, rtol=1e-4, atol=1e-6)
        assert r.grad.abs().max() > 1e-3


def parameters(policy):
    return torch.cat([p.detach().flatten().clone() for p in policy.parameters()])


def test_recorded_steps_are_read_off_the_path_row_by_row():
    policy, K = Foreign(3), 4
    nn.init.normal_(policy.net[-1].weight, std=0.3)
    batch = recorded_batch(policy, rows=5)
    batch["v"] = torch.randn_like(batch["v"])                  # no longer what the policy says now
    batch["sigma"] = torch.rand(5, K)                          # a noise of its own for every step
    steps = loss.recorded_steps(policy, batch, policy.encode(batch))
    assert set(steps) == {"v_theta", "v_old", "x_t", "x_next", "x_0", "t_cur", "t_next", "sigma",
                          "y", "mask"}
    for b, k in enumerate(batch["k"].tolist()):
        now = policy.velocity(batch["x"][b:b + 1, k], torch.tensor([1 - k / K]),
                              Opaque(batch["state"][b:b + 1]))[0]
        torch.testing.assert_close(steps["v_theta"][b], now)
        x = batch["x"][b]
        expected = dict(x_t=x[k], x_next=x[k + 1], x_0=x[K], v_old=batch["v"][b, k],
                        sigma=batch["sigma"][b, k], y=batch["y"][b], mask=batch["mask"][b],
                        t_cur=torch.tensor(1 - k / K), t_next=torch.tensor(1 - (k + 1) / K))
        torch.testing.assert_close({name: steps[name][b] for name in expected}, expected)
    assert all(len(values) == 5 for values in steps.values())


@pytest.mark.parametrize("target", ERRORS)
def test_the_target_of_update_picks_error_and_what_is_to_be_explained(target):
    """Two SGD steps on one batch, against the slow loss and the policy's own gradient."""
    torch.manual_seed(0)
    policy = Foreign(3)
    nn.init.normal_(policy.net[-1].weight, std=0.3)
    batch = recorded_batch(policy)
    seen = []

    def spying(*args, target, error, **steps):
        seen.append((target.detach(), error))
        return loss.step_nft_loss(*args, target=target, error=error, **steps)

    loss.update(policy, torch.optim.SGD(policy.parameters(), lr=0), batch, target=target, epochs=1,
                minibatch=12, loss=spying)
    (explained, error), = seen
    rows = torch.arange(12)
    expected = batch["x"][:, -1] if target == "endpoint" else batch["x"][rows, batch["k"] + 1]
    assert error is ERRORS[target]
    assert torch.equal(explained.flatten(1).sort(0)[0], expected.flatten(1).sort(0)[0])


@pytest.mark.parametrize("kind", WRAPS)
@pytest.mark.parametrize("target", ERRORS)
def test_a_rollout_feeds_update_whatever_the_context_is(kind, target):
    """explore, labels and update use nothing but the contract: same result as the bare policy."""
    results = []
    for wrap in (lambda ctx: ctx, WRAPS[kind]):
        torch.manual_seed(0)
        policy = Wrapped(random_policy(), wrap)
        before = parameters(policy)
        success, batch = gap_world.GapWorld().play(loss.explore(policy, 3, 0.2), range(8))
        batch["k"], batch["y"] = torch.arange(len(batch["x"])) % 3, loss.labels(
            success, batch["episode"])
        info = loss.update(policy, torch.optim.SGD(policy.parameters(), lr=0.1), batch,
                           target=target, epochs=2, minibatch=9)
        assert all(math.isfinite(v) for v in info.values())
        results.append(parameters(policy))
    assert not torch.equal(results[0], before)
    torch.testing.assert_close(*results)


def test_one_encode_and_one_velocity_in_each_optimisation_step():
    policy = Foreign(3)
    batch = recorded_batch(policy, rows=10)
    optimizer, steps = torch.optim.SGD(policy.parameters(), lr=0.01), []
    optimizer.register_step_post_hook(lambda *_: steps.append(1))
    policy.calls = {"encode": 0, "velocity": 0}
    loss.update(policy, optimizer, batch, epochs=3, minibatch=4)
    assert policy.calls == {"encode": 9, "velocity": 9} and len(steps) == 9           # 4 + 4 + 2


def test_an_epoch_sees_every_row_once_in_random_order():
    policy, seen = Foreign(3), []
    batch = recorded_batch(policy, rows=20)
    policy.encode = lambda obs: seen.append(obs["state"][:, 0].clone()) or Opaque(
        obs["state"])
    loss.update(policy, torch.optim.SGD(policy.parameters(), lr=0), batch, epochs=2, minibatch=8)
    first, second, rows = torch.cat(seen[:3]), torch.cat(seen[3:]), batch["state"][:, 0]
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
    for options in ({}, {"beta": 3.0}, {"max_drift": 1e-3}, {"dpo_beta": 4.0}, {"kl_weight": 10.0},
                    {"target": "endpoint"}, {"epochs": 3}):
        policy = copy.deepcopy(start)
        torch.manual_seed(1)
        loss.update(policy, torch.optim.SGD(policy.parameters(), lr=0.1), batch,
                    **{"minibatch": 12, "epochs": 2, **options})
        results.append(parameters(policy))
    assert all((a - b).abs().max() > 1e-6 for i, a in enumerate(results) for b in results[:i])


def test_the_noise_recorded_with_a_step_is_the_noise_it_is_judged_by():
    start, results = Foreign(3), []
    batch = recorded_batch(start)
    for factor in (1, 3):
        policy = copy.deepcopy(start)
        loss.update(policy, torch.optim.SGD(policy.parameters(), lr=0.1),
                    {**batch, "sigma": factor * batch["sigma"]}, minibatch=12, epochs=1)
        results.append(parameters(policy))
    assert (results[0] - results[1]).abs().max() > 1e-6


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

    def play(self, act, seeds):
        obs = {"state": torch.zeros(len(seeds), 1)}
        actions, record = act(obs)
        mask = torch.ones(actions.shape[:2], dtype=torch.bool)
        success = (actions[:, 0, 0] > 0.5).numpy()
        return success, {**obs, **record, "episode": torch.arange(len(seeds)), "mask": mask}


@pytest.mark.parametrize("group_size", [1, 8])
def test_a_one_action_task_is_learned(group_size):
    """N(0, 1) has 31 % above 0.5; explore, labels, update and EMA alone raise that."""
    torch.manual_seed(0)
    policy = Foreign(1, action_dim=1, horizon=1)
    old, optimizer = copy.deepcopy(policy), torch.optim.Adam(policy.parameters(), lr=1e-2)
    before = flow.evaluate(policy, OneShot(), range(1000)).mean()
    assert before == pytest.approx(1 - stats.norm.cdf(0.5), abs=0.05)
    for iteration in range(20):
        success, batch = OneShot().play(loss.explore(old, 4, 0.2), range(256))
        batch["k"] = torch.arange(256) % 4
        batch["y"] = loss.labels(success, batch["episode"], group_size)
        loss.update(policy, optimizer, batch, minibatch=64)
        loss.ema_update(old, policy, loss.ema_decay(iteration, 20))
    assert flow.evaluate(policy, OneShot(), range(1000)).mean() > before + 0.15


def test_reinforcement_improves_over_few_shot_sft_on_the_toy_world():
    """1000 wide starts, the same for both. Seeds 0 to 4 all gain 0.1 or more; 0.04 is asked for."""
    torch.manual_seed(0)
    policy, world = flow.FlowPolicy(4, 2, state_dim=3), gap_world.GapWorld()
    flow.train_sft(policy, *toy_chunks(6, 0), 300)
    old, optimizer = copy.deepcopy(policy), torch.optim.Adam(policy.parameters(), lr=5e-4)
    test = gap_world.episode_seeds("test", 1000)
    before = flow.evaluate(policy, world, test).mean()
    for iteration in range(15):
        seeds = range(256 * iteration, 256 * (iteration + 1))
        success, batch = world.play(loss.explore(old, 4, 0.2), seeds)
        batch["k"] = torch.randint(4, (len(batch["x"]),))
        batch["y"] = loss.labels(success, batch["episode"])
        loss.update(policy, optimizer, batch, minibatch=512)
        loss.ema_update(old, policy, loss.ema_decay(iteration, 15))
    assert flow.evaluate(policy, world, test).mean() > before + 0.04


def watch_training(flags):
    """train_toy seen from outside: who acts, who learns, on which seeds, with which labels."""
    seen = SimpleNamespace(acted=[], learned=[], played=[], batches=[], explored=[], options=[])
    explore, update, play = loss.explore, loss.update, gap_world.GapWorld.play
    sft = random_policy()

    def watched_explore(policy, num_steps, noise_level):
        seen.acted.append(parameters(policy))
        seen.explored.append((num_steps, noise_level))
        seen.act = explore(policy, num_steps, noise_level)
        return seen.act

    def watched_play(world, act, seeds):
        success, rows = play(world, act, seeds)
        if act is getattr(seen, "act", None):                  # not an evaluation
            seen.played.append(list(seeds))
            seen.batches.append((success, rows))
        return success, rows

    def watched_update(policy, optimizer, batch, **options):
        info = update(policy, optimizer, batch, **options)
        seen.learned.append(parameters(policy))
        seen.options.append(options)
        return info

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flow, "toy_policy", lambda *a, **k: sft)
        patch.setattr(loss, "explore", watched_explore)
        patch.setattr(loss, "update", watched_update)
        patch.setattr(gap_world.GapWorld, "play", watched_play)
        patch.setattr(loss.flags.Parser, "claim_folder", lambda *a: None)
        args = loss.parse_args(flags.split())
        seen.start = parameters(sft)
        seen.sft, seen.policy, seen.before, seen.after = loss.train_toy(args)
    return seen


def test_train_toy_acts_with_the_ema_policy_on_fresh_seeds():
    seen = watch_training("--iterations 3 --episodes 20 --ema 0.25 0.25")
    learned, acted = seen.learned, seen.acted
    assert torch.equal(parameters(seen.sft), seen.start)
    assert torch.equal(parameters(seen.policy), learned[2]) and torch.equal(acted[0], seen.start)
    for i in (1, 2):
        torch.testing.assert_close(acted[i], 0.25 * acted[i - 1] + 0.75 * learned[i - 1])
        assert not torch.equal(learned[i], learned[i - 1])
    played = [seed for seeds in seen.played for seed in seeds]
    assert len(set(played)) == len(played) == 60
    assert not set(played) & set(gap_world.episode_seeds("test", 1000).tolist())
    for success, batch in seen.batches:
        expected = [1 if success[e] else -1 for e in batch["episode"].tolist()]
        assert batch["y"].tolist() == expected


def test_train_toy_takes_one_random_step_of_every_chunk():
    seen = watch_training("--iterations 2 --episodes 128")
    ks = torch.cat([batch["k"] for _, batch in seen.batches])
    assert ks.shape == (sum(len(batch["x"]) for _, batch in seen.batches),)
    counts = np.bincount(ks, minlength=4)
    assert len(counts) == 4 and stats.chisquare(counts).pvalue > 1e-3


def test_train_toy_compares_the_episodes_of_one_start():
    seen = watch_training("--iterations 2 --episodes 16 --group-size 4")
    for seeds, (success, batch) in zip(seen.played, seen.batches):
        assert all(len(set(seeds[i:i + 4])) == 1 for i in range(0, 16, 4)) and len(set(seeds)) == 4
        for e, y in zip(batch["episode"].tolist(), batch["y"].tolist()):
            mates = [2.0 * success[i] - 1 for i in range(16) if seeds[i] == seeds[e]]
            assert y == pytest.approx(2 * success[e] - 1 - sum(mates) / 4)
    assert not set(seen.played[0]) & set(seen.played[1])


# ------------------------------------------------------------------------------------------------
# Flags and logs


def test_every_flag_reaches_its_function():
    seen = watch_training("--iterations 1 --episodes 4 --num-steps 7 --noise-level 0.31 --beta 0.4 "
                          "--max-drift 0.6 --dpo-beta 0.8 --target endpoint")
    assert seen.explored == [(7, 0.31)] and seen.batches[0][1]["v"].shape[1] == 7
    assert seen.options == [dict(beta=0.4, max_drift=0.6, dpo_beta=0.8, target="endpoint")]


def test_the_defaults_are_the_papers_but_for_two_that_show_the_method():
    """Those of the flags, and those of the functions where a flag has the same name."""
    paper = dict(num_steps=4, noise_level=0.5, beta=1.0, max_drift=0.5, dpo_beta=1.0, target="next",
                 ema=[0.1, 0.1], group_size=1, kl_weight=1e-4)       # noise 0.2, EMA 0.1 0.995
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss.flags.Parser, "claim_folder", lambda *a: None)
        args = vars(loss.parse_args([]))
    assert {name: args.get(name, 1e-4) for name in paper} == paper      # kl_weight is no flag
    defaults = {"start": 0.1, "end": 0.995, **paper}
    for function in (loss.update, loss.step_nft_loss, loss.labels, loss.ema_decay, flow.evaluate):
        for name, parameter in inspect.signature(function).parameters.items():
            if name in defaults and parameter.default is not parameter.empty:
                assert parameter.default == defaults[name], (function, name)


def test_a_log_comes_back_with_nan_in_empty_cells(tmp_path):
    path = tmp_path / "log.csv"
    loss.log_row(path, {"a": 1, "b": 0.5})
    loss.log_row(path, {"a": 2, "b": ""})
    log = loss.read_log(path)
    assert log["a"].tolist() == [1, 2] and log["b"][0] == 0.5 and math.isnan(log["b"][1])


# ------------------------------------------------------------------------------------------------
# The script


@pytest.mark.parametrize("target", ERRORS)
def test_the_script_trains_logs_and_saves(workplace, target):
    flags = ("--iterations", 2, "--episodes", 8, "--out", workplace / "out", "--target", target)
    done = run_script("03_step_loss.py", *flags, cwd=workplace)
    result = result_line(done)
    assert 0 <= result["sft"] <= 1 and 0 <= result["stepnft"] <= 1 and result["episodes"] == 16
    log = loss.read_log(workplace / "out" / "log.csv")
    assert log["iteration"].tolist() == [0, 1] and log["episodes"].tolist() == [8, 16]
    assert log["alpha"][0] == pytest.approx(0.1)
    assert log["eval_ode"][1] == pytest.approx(result["stepnft"], abs=1e-3)
    policy = flow.FlowPolicy(4, 2, state_dim=3)
    policy.load_state_dict(torch.load(workplace / "out" / "policy.pt", weights_only=True))
    test = gap_world.episode_seeds("test", 1000)
    rate = flow.evaluate(policy, gap_world.GapWorld(), test).mean()
    assert rate == pytest.approx(result["stepnft"], abs=2e-3)
    assert (workplace / "out" / "learning.png").stat().st_size > 1000


def test_help_lists_every_flag_with_its_default():
    code, told, _ = run_main("03_step_loss.py", "--help")
    flags = ("--seed --iterations --episodes --lr --out --target --group-size --noise-level "
             "--num-steps --beta --max-drift --dpo-beta --ema").split()
    assert code == 0 and all(flag in told for flag in flags)
    assert "".join(told.split()).count("(default:") == len(flags)


@pytest.mark.parametrize("flags", [
    "--noise-level 0", "--noise-level nan", "--noise-level -1", "--noise-level inf", "--lr -1",
    "--lr nan", "--lr 0", "--lr fast", "--ema 2 3", "--ema 0.9 0.1", "--ema 0.5", "--ema -0.1 0.5",
    "--ema nan 1", "--beta 0", "--beta -1", "--beta nan", "--max-drift 0", "--dpo-beta 0",
    "--num-steps 0", "--num-steps -3", "--iterations 0", "--episodes 0", "--group-size 0",
    "--group-size 3", "--episodes 10 --group-size 4", "--seed -1", "--seed x", "--target x_0",
    "--out a_file", "--out a_file/out", "--rollout ode", "--loss weighted", "--compare 5",
    "--iter 3", "--noise 0.2", "--lr"])
def test_a_call_that_cannot_work_is_told_in_one_line_that_names_the_flag(flags):
    assert flags.split()[0] in wrong_call("03_step_loss.py", *flags.split())


def test_imports_have_no_side_effect_and_need_no_simulator(tmp_path):
    """No simulator, no figure, no parser, no seeding, no output, no file: 01 to 03 and workers."""
    code = f"""
import argparse, importlib, random, sys
import gymnasium, numpy, torch, tqdm
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("mani_skill", "sapien", "libero", "robosuite", "mujoco",
                                  "matplotlib", "transformers"):
            raise ImportError(name + " must not be imported here")
def refuse(*args, **kwargs):
    raise AssertionError("a parser at import")
sys.meta_path.insert(0, Blocked())
argparse.ArgumentParser.__init__ = refuse
sys.path.insert(0, {str(ROOT)!r})
state = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
threads = torch.get_num_threads()
for name in ("01_flow_policy", "02_sde_sampler", "03_step_loss", "envs.workers"):
    importlib.import_module(name)
assert state == (random.getstate(), numpy.random.get_state()[1].tolist(),
                 torch.get_rng_state().tolist())
assert threads == torch.get_num_threads()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and not list(tmp_path.iterdir())
