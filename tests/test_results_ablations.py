"""results/ablations: every variant's rollout, target and loss against slow scalar loops or
closed forms; the loop against 03's; the tables, the script. (The csv that resumes:
test_results_common.)"""

import copy
import importlib
import math
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import special, stats

from conftest import Scripted, expert_plan, run_script
import tools.flags
from envs.gap_world import GapWorld
from test_03_step_loss import Diary, Foreign, batch_of_steps, one_step, random_policy, slow_mean

flow = importlib.import_module("01_flow_policy")
sde = importlib.import_module("02_sde_sampler")
nft = importlib.import_module("03_step_loss")
ablations, phase, robot, rollouts, tables, variants, common = map(importlib.import_module, (
    "results.ablations.run", "results.ablations.phase", "results.ablations.robot",
    "results.ablations.sde", "results.ablations.tables", "results.ablations.variants",
    "results.common"))

TIMES = [1, 0.75, 0.5, 0.25, 0]

# ------------------------------------------------------------------------------------------------
# Losses and targets against a slow loop over scalars


def slow_variant(v_theta, v_old, x_t, target, t_cur, t_next, sigma, y, mask, what, form, corrected,
                 beta=1.0, max_drift=0.5, var_eps=1e-4):
    """The loss of a variant with plain floats; target is x_next or x_0, as `what` needs it."""
    losses, counts = [], mask.clone()
    for b in range(len(x_t)):
        t, dt, y_b = t_cur[b].item(), (t_cur[b] - t_next[b]).item(), y[b].item()
        var = sigma[b].item()**2 * dt

        def mean(x, v):                            # Euler step, then towards the score -x1_hat / t
            return x - dt * v - (var / (2 * t) * (x + (1 - t) * v) if corrected else 0)

        losses.append([])
        for h in range(x_t.shape[1]):
            old, x, end = (z[b, h].tolist() for z in (v_old, x_t, target))
            delta = [new - was for new, was in zip(v_theta[b, h].tolist(), old)]
            shorten = min(1, max_drift / math.sqrt(sum(d * d for d in delta)))
            E = {}
            for side in (1, -1):
                E[side] = 0.0
                for a in range(len(x)):
                    v, seen = old[a] + side * beta * shorten * delta[a], end[a]
                    explained = x[a] - t * v if what == "endpoint" else mean(x[a], v)
                    if what == "next-mean":          # the velocity that leads from x_t to x_0
                        seen = mean(x[a], (x[a] - end[a]) / t)
                    E[side] += (seen - explained)**2 / (var + var_eps)
            losses[b].append((1 + y_b) / 2 * E[1] + (1 - y_b) / 2 * E[-1] if form == "weighted" else
                             math.log(1 + math.exp(y_b / 2 * (E[1] - E[-1]))))
        if form == "positive" and y_b <= 0 or form == "negative" and y_b >= 0:
            counts[b] = False
    return slow_mean(losses, counts)


CHOICES = [(what, form, corrected) for what in ("next", "next-mean", "endpoint")
           for form in variants.LOSSES for corrected in (True, False)]


@pytest.mark.parametrize("what, form, corrected", CHOICES)
def test_a_variants_loss_is_the_slow_loop_and_its_gradient_the_slope(what, form, corrected):
    steps = batch_of_steps()
    error = (variants.ERRORS if corrected else variants.UNCORRECTED)[what]
    v_theta, direction, h = steps["v_theta"].requires_grad_(), torch.randn(6, 3, 2).double(), 1e-5
    value, info = variants.LOSSES[form](**steps, error=error, beta=0.8, kl_weight=0)
    value.backward()
    slow = [slow_variant(**{**steps, "v_theta": v_theta.detach() + s * h * direction}, what=what,
                         form=form, corrected=corrected, beta=0.8) for s in (0, 1, -1)]
    assert value.item() == pytest.approx(slow[0], rel=1e-6)
    assert (v_theta.grad * direction).sum().item() == pytest.approx((slow[1] - slow[2]) / (2 * h),
                                                                    rel=1e-4)
    assert all(z.isfinite() and not z.requires_grad for z in info.values())


@pytest.mark.parametrize("form, sign", [("positive", 1), ("negative", -1)])
def test_one_outcome_alone_is_the_ranking_loss_of_those_rows(form, sign):
    steps = batch_of_steps()
    rows = sign * steps["y"] > 0
    alone = nft.step_nft_loss(**flow.take(steps, rows), kl_weight=0)[0]
    assert not rows.all()
    torch.testing.assert_close(variants.LOSSES[form](**steps, kl_weight=0)[0], alone)
    nothing = {**flow.take(steps, ~rows), "v_theta": steps["v_theta"][~rows].requires_grad_()}
    value, _ = variants.LOSSES[form](**nothing, kl_weight=0)
    value.backward()
    assert value == 0 and not nothing["v_theta"].grad.any()


@pytest.mark.parametrize("form", variants.LOSSES)
def test_every_loss_pulls_weakly_to_the_old_velocity(form):
    """What 1e-4 mean (v_theta - v_old)^2 adds, where every action counts."""
    steps = batch_of_steps()
    steps["mask"][:], steps["y"][:] = True, -1.0 if form == "negative" else 1.0
    with_pull, without = (variants.LOSSES[form](**steps, error=nft.step_error, **options)[0]
                          for options in ({}, {"kl_weight": 0}))
    square = (steps["v_theta"] - steps["v_old"]).pow(2).mean()
    assert (with_pull - without).item() == pytest.approx(1e-4 * square.item(), rel=1e-6)


@pytest.mark.parametrize("y", [1.0, -1.0])
def test_weighted_mse_is_ranking_plus_a_separation_penalty(y):
    """r E_pos + (1 - r) E_neg = (|e|^2 + beta^2 |d|^2 - 2 y beta <d, e>) / var."""
    step, by = one_step(2, y)
    value, _ = variants.weighted_loss(**step, mask=torch.ones(1, 1), error=nft.step_error,
                                       beta=0.8, max_drift=9, kl_weight=0)
    expected = by.e.square() + 0.8**2 * by.d.square() - 2 * y * 0.8 * by.d * by.e
    torch.testing.assert_close(value, expected.sum() / (by.var + by.eps))


@pytest.mark.parametrize("k", range(4))
def test_weighted_is_twice_ranking_plus_a_constant_to_second_order(k):
    """Over the noise of a step, laid out as the quantiles of a normal. Success depends on it, so
    there is a slope to follow: the odd part in delta, twice that of ranking at any distance. The
    even part, the penalty, is twice that of ranking near delta = 0."""
    n, (step, by) = 20_000, one_step(k, A=1, noise_level=0.4)
    steps = {name: z.expand(n, *z.shape[1:]) for name, z in step.items()}
    noise = torch.from_numpy(special.ndtri((np.arange(n) + 0.5) / n))
    steps["target"] = (by.mean.flatten() + noise * by.var**0.5)[:, None, None]
    steps["y"] = torch.where(noise > 0.3, 1.0, -1.0).double()

    def part(form, delta, sign):
        there, here, back = (variants.LOSSES[form](
            **{**steps, "v_theta": steps["v_old"] + shift}, mask=torch.ones(n, 1, dtype=bool),
            max_drift=9, error=nft.step_error, kl_weight=0)[0] for shift in (delta, 0, -delta))
        return (there + sign * back - (1 + sign) * here).item()

    for delta in (0.02, 2.0):
        odd, even = (part("weighted", delta, s) / part("ranking", delta, s) for s in (-1, 1))
        assert odd == pytest.approx(2, abs=1e-6)
        assert (abs(even - 2) < 0.02) == (delta == 0.02)


# ------------------------------------------------------------------------------------------------
# Targets


@pytest.mark.parametrize("corrected", [True, False])
def test_the_next_steps_mean_is_what_the_velocity_to_the_endpoint_would_give(corrected):
    """No error for the velocity that leads to x_0; for another its own distance to that mean."""
    (step, by), x_0 = one_step(1), torch.randn(1, 1, 3).double()
    error = (variants.ERRORS if corrected else variants.UNCORRECTED)["next-mean"]
    rest = step["x_t"], x_0, step["t_cur"], step["t_next"], step["sigma"]
    ideal = (step["x_t"] - x_0) / step["t_cur"]
    assert error(ideal, *rest).item() < 1e-20
    slope = by.B if corrected else -0.25             # of the mean, in v
    expected = (slope * (step["v_old"] - ideal)).square().sum() / (by.var + by.eps)
    assert error(step["v_old"], *rest).item() == pytest.approx(expected.item())


def test_an_uncorrected_rollout_is_judged_by_the_uncorrected_mean():
    """x_next is the Euler step: no branch is better, margin 0, but only by its own mean."""
    step, _ = one_step(1, drift=0.1)
    step["target"] = step["x_t"] - 0.25 * step["v_old"]
    margin, wrong = (nft.step_nft_loss(**step, error=errors["next"])[1]["margin"]
                     for errors in (variants.UNCORRECTED, variants.ERRORS))
    assert abs(margin) < 1e-9 and abs(wrong) > 1e-3


@pytest.mark.parametrize("what", variants.ERRORS)
@pytest.mark.parametrize("errors", [variants.ERRORS, variants.UNCORRECTED])
@pytest.mark.parametrize("form", variants.LOSSES)
@pytest.mark.parametrize("drift", [0.0, 0.3])
def test_gradients_are_finite(what, errors, form, drift):
    """At zero drift, and at t = 1 (k = 0) as everywhere."""
    for k in range(4):
        step, _ = one_step(k, drift=drift)
        step["v_theta"].requires_grad_()
        value, _ = variants.LOSSES[form](**step, mask=torch.ones(1, 1, dtype=bool),
                                          error=errors[what])
        value.backward()
        assert value.isfinite() and step["v_theta"].grad.isfinite().all()


def test_centred_labels_lose_the_mean_over_episodes():
    """Not over rows: three of four episodes succeed, so 1 - 0.5 and -1 - 0.5."""
    episode = torch.tensor([0, 1, 2, 2, 2, 3])
    y = variants.centred(nft.labels([True, True, False, True], episode), episode)
    assert y.tolist() == [0.5, 0.5, -1.5, -1.5, -1.5, 0.5]


def test_the_adaptive_error_divides_by_its_own_distance_which_is_held_fixed():
    """Doubling the distance doubles the error, whatever the step's variance; the gradient is that
    of the square alone."""
    steps = batch_of_steps()
    x_t, x_0, rest = steps["x_t"], steps["target"], (steps["t_cur"], steps["t_next"])
    t = steps["t_cur"][:, None, None]
    exact = (x_t - x_0) / t                                  # leads to x_0
    errors = [variants.adaptive_error(exact + scale * steps["v_old"], x_t, x_0, *rest, sigma)
              for scale, sigma in ((1, steps["sigma"]), (2, 9 * steps["sigma"]))]
    torch.testing.assert_close(errors[1], 2 * errors[0])
    v = (exact + steps["v_old"]).requires_grad_()
    variants.adaptive_error(v, x_t, x_0, *rest, steps["sigma"]).sum().backward()
    off = (t * steps["v_old"])
    wanted = 2 * t * off / off.abs().mean((1, 2), keepdim=True)
    torch.testing.assert_close(v.grad, wanted)


# ------------------------------------------------------------------------------------------------
# Rollouts


def check_record(policy, world, batch, a):
    """Velocities, noise and actions belong to the recorded path."""
    assert set(batch) == {"state", "episode", "mask", "x", "v", "sigma"}
    assert not batch["v"].requires_grad
    for k in range(4):
        t = torch.full((len(batch["x"]),), float(TIMES[k]))
        v = policy.velocity(batch["x"][:, k], t, policy.encode(batch)).detach()
        torch.testing.assert_close(batch["v"][:, k], v, rtol=1e-4, atol=1e-5)
        sigma = a * math.sqrt(TIMES[k] / (1 - (TIMES[k] if k else TIMES[1])))
        np.testing.assert_allclose(batch["sigma"][:, k], sigma, rtol=1e-5)
    acted = batch["x"][:60, 4] * torch.tensor([0.5, 0.8]) + torch.tensor([0.3, -0.1])
    np.testing.assert_allclose(world.chunks[0], acted, rtol=1e-5, atol=1e-5)


def test_an_uncorrected_rollout_records_noise_around_the_euler_step():
    policy, world = random_policy(), Diary()
    _, batch = world.play(variants.explore_uncorrected(policy, 4, 1.0), range(60))
    check_record(policy, world, batch, 1.0)
    for k in range(4):
        euler = batch["x"][:, k] - 0.25 * batch["v"][:, k]
        std = math.sqrt(TIMES[k] / (1 - (TIMES[k] if k else TIMES[1])) * 0.25)
        residual = (batch["x"][:, k + 1] - euler) / std
        assert stats.kstest(residual.flatten(), "norm").pvalue > 1e-3, f"step {k}"


def test_an_ode_rollout_noises_its_endpoint_afresh():
    policy, world = random_policy(), Diary()
    _, batch = world.play(variants.explore_ode(policy, 4, 0.3), range(60))
    check_record(policy, world, batch, 0.3)
    x_0 = batch["x"][:, 4]
    noise = [((batch["x"][:, k] - (1 - t) * x_0) / t).flatten() for k, t in enumerate(TIMES[:4])]
    assert all(stats.kstest(n, "norm").pvalue > 1e-3 for n in noise)
    assert np.abs(np.corrcoef(noise) - np.eye(4)).max() < 0.1
    plan = Scripted(lambda state: expert_plan(state, 4), 4)             # the ODE has no noise in it
    _, batch = GapWorld().play(variants.explore_ode(plan, 4, 0.3), range(9))
    np.testing.assert_allclose(batch["x"][:, 4], expert_plan(batch["state"].numpy(), 4), atol=1e-5)


# ------------------------------------------------------------------------------------------------
# The runs


TINY = dict(seed=0, lr=1e-3, iterations=2, episodes=16, noise_level=0.2)
FLAGS = ("--seeds", 1, "--iterations", 1, "--episodes", 8, "--lr", 1e-3, "--jobs", 1)


def make_job(name, **changes):
    """A job as main makes it."""
    return {"variant": name, **TINY, "noise_level": variants.VARIANTS[name].get(
        "noise_level", 0.2), **changes}


@pytest.mark.parametrize("name, flags", [
    ("default", ""), ("target-endpoint", "--target endpoint"), ("beta-5", "--beta 5"),
    ("target-endpoint-slow", "--target endpoint --ema 0.9 0.995"), ("ema-0.1", "--ema 0.1 0.1"),
    ("labels-grouped", "--group-size 8"), ("noise-0.5", "--noise-level 0.5")])
def test_a_variant_that_03_has_flags_for_is_03s_train_toy(workplace, monkeypatch, name, flags):
    monkeypatch.chdir(workplace)
    argv = (f"--lr 1e-3 --noise-level 0.2 --ema 0.1 0.995 --iterations 2 --episodes 16 "
            f"--out {workplace} {flags}").split()
    *_, before, after = nft.train_toy(nft.parse_args(argv))
    trained, update = [], nft.update
    monkeypatch.setattr(nft, "update", lambda policy, *rest, **options: (
        trained.append(policy), update(policy, *rest, **options))[1])
    args = variants.settings({"variant": name, **TINY, "noise_level": nft.parse_args(
        argv).noise_level})
    assert variants.score(variants.train(args), args) == [before, after]
    *_, policy, _, _ = nft.train_toy(nft.parse_args(argv))
    for mine, theirs in zip(trained[0].parameters(), policy.parameters()):
        assert torch.equal(mine, theirs)


def test_every_variant_runs_and_no_two_are_the_same(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(variants, "TEST_EPISODES", 8)
    ends, ema_update = {}, nft.ema_update
    for name in variants.VARIANTS:
        job = make_job(name, iterations=3)

        def keep(old, new, decay):
            ends[job["variant"]] = torch.cat([p.detach().flatten() for p in new.parameters()])
            ema_update(old, new, decay)

        monkeypatch.setattr(nft, "ema_update", keep)
        row = ablations.run(job)
        assert 0 <= float(row["after"]) <= 1 and ends[job["variant"]].isfinite().all()
    names = list(variants.VARIANTS)
    assert list(ends) == names
    assert not [(a, b) for i, a in enumerate(names) for b in names[:i]
                if torch.equal(ends[a], ends[b])]


def watch(name, monkeypatch, place=nft):
    """What a variant hands to its update in its first iteration -> (batch, options)."""
    seen, update = [], "update" if place is nft else "update_all_steps"
    monkeypatch.setattr(place, update, lambda policy, optimizer, batch, **options: seen.append(
        (batch, options)))
    monkeypatch.setattr(variants, "TEST_EPISODES", 2)
    ablations.run(make_job(name, iterations=1, episodes=64))
    return seen[0]


def test_every_variant_reaches_its_place(workplace, monkeypatch):
    """The error, the loss, the steps and labels that its name promises."""
    monkeypatch.chdir(workplace)
    default = dict(target="next", loss=nft.step_nft_loss, error=nft.step_error, beta=1.0,
                   max_drift=0.5, dpo_beta=1.0)
    batch, options = watch("default", monkeypatch)
    assert options == default
    assert batch["k"].shape == batch["y"].shape and set(batch["y"].tolist()) <= {-1.0, 1.0}
    assert set(batch["k"].tolist()) == {0, 1, 2, 3}
    for name, target, error in (
            ("target-next-mean", "endpoint", variants.next_mean_error),
            ("target-endpoint", "endpoint", nft.endpoint_error),
            ("rollout-ode", "endpoint", nft.endpoint_error),
            ("rollout-ode-mean", "endpoint", variants.next_mean_error),
            ("rollout-uncorrected", "endpoint", nft.endpoint_error),
            ("rollout-uncorrected-mean", "endpoint", variants.UNCORRECTED["next-mean"]),
            ("rollout-uncorrected-next", "next", variants.uncorrected_error)):
        _, options = watch(name, monkeypatch)
        assert (options["target"], options["error"]) == (target, error), name
    for form in ("weighted", "positive", "negative"):
        assert watch(f"loss-{form}", monkeypatch)[1]["loss"] is variants.LOSSES[form]
    assert watch("all-steps", monkeypatch, variants)[1] == default
    for name, mean in (("labels-centred", 0.0), ("labels-grouped", 0.0)):
        batch, _ = watch(name, monkeypatch)
        each = torch.stack([batch["y"][batch["episode"] == e][0] for e in range(64)])
        assert each.mean().item() == pytest.approx(mean, abs=1e-6) and each.abs().max() > 0


def test_the_settings_of_the_study_are_the_papers_whatever_03s_defaults_are():
    assert {name: variants.BASE[name] for name in (
        "target", "noise_level", "num_steps", "beta", "max_drift", "dpo_beta", "ema",
        "group_size")} == {
        "target": "next", "noise_level": 0.2, "num_steps": 4, "beta": 1.0, "max_drift": 0.5,
        "dpo_beta": 1.0, "ema": [0.1, 0.995], "group_size": 1}
    args = variants.settings({"variant": "default", "seed": 0, "lr": 1e-3, "iterations": 2,
                               "episodes": 16})
    assert vars(args) == {**variants.BASE, "variant": "default", "seed": 0, "lr": 1e-3,
                          "iterations": 2, "episodes": 16}


def test_all_steps_of_a_row_are_03s_recorded_steps_at_each_k():
    """Row after row, each with its steps 0 to 3."""
    policy, world = random_policy(), Diary()
    success, batch = world.play(nft.explore(policy, 4, 0.3), range(5))
    rows, y = len(batch["x"]), nft.labels(success, batch["episode"])
    each = [nft.recorded_steps(policy, {**batch, "y": y, "k": torch.full((rows,), k)},
                               policy.encode(batch)) for k in range(4)]
    found = variants.all_steps(policy, {**batch, "y": y})
    assert found.keys() == each[0].keys()
    for name, values in found.items():
        assert len(values) == 4 * rows
        for b in range(rows):
            for k in range(4):
                torch.testing.assert_close(values[4 * b + k], each[k][name][b])


def test_an_update_on_all_steps_takes_the_mean_over_rows_and_steps():
    """One minibatch and plain gradient descent: the gradient is the mean of those of 03's update
    on each of the four steps alone, which is small enough not to be clipped."""
    start, world = random_policy(), Diary()
    success, batch = world.play(nft.explore(start, 4, 0.3), range(5))
    y = torch.where(torch.arange(len(batch["x"])) % 2 == 0, 1.0, -1.0)

    def moved(update, **more):
        policy = copy.deepcopy(start)
        info = update(policy, torch.optim.SGD(policy.parameters(), lr=1e-3),
                      {**batch, "y": y, **more}, epochs=1, minibatch=10**6, target="next",
                      loss=nft.step_nft_loss, error=nft.step_error, grad_clip=1e9)
        return info, torch.cat([(new - old).flatten() for new, old in zip(
            policy.parameters(), start.parameters())])

    info, together = moved(variants.update_all_steps)
    alone = [moved(nft.update, k=torch.full((len(y),), k)) for k in range(4)]
    torch.testing.assert_close(together, torch.stack([step for _, step in alone]).mean(0),
                               rtol=1e-3, atol=1e-7)
    for name in ("loss", "drift", "margin"):
        assert info[name] == pytest.approx(np.mean([one[name] for one, _ in alone]), abs=1e-5)


@pytest.mark.parametrize("update", [nft.update, variants.update_all_steps])
@pytest.mark.parametrize("name", ["rollout-uncorrected", "rollout-ode"])
def test_a_rollout_feeds_update_with_a_foreign_policy(name, update):
    """Nothing but the contract of a policy is used, and its context is handed on as it is."""
    policy, choice = Foreign(3), variants.VARIANTS[name]
    act = variants.ROLLOUTS[choice["rollout"]](policy, 4, 0.2)
    success, batch = GapWorld().play(act, range(8))
    batch.update(k=torch.randint(4, (len(batch["x"]),)), y=nft.labels(success, batch["episode"]))
    before = [p.clone() for p in policy.parameters()]
    info = update(policy, torch.optim.SGD(policy.parameters(), lr=0.1), batch, epochs=1,
                  target="endpoint", loss=nft.step_nft_loss, error=nft.endpoint_error)
    assert all(math.isfinite(v) for v in info.values())
    assert any((p != b).any() for p, b in zip(policy.parameters(), before))


# ------------------------------------------------------------------------------------------------
# The tables


def rows_for(values, lr="0.001"):
    """{variant: values of seeds 0, 1, ...} -> rows as the csv holds them, in no order."""
    rows = [{"variant": name, "seed": str(s), "sft": str(s / 10), "after": str(value), "lr": lr}
            for name, own in values.items() for s, value in enumerate(own)]
    return [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]


@pytest.mark.parametrize("seeds", [2, 3, 8])
def test_the_intervals_are_scipys_and_gains_are_paired_by_seed(seeds):
    rng = np.random.default_rng(seeds)
    first, other = rng.random((2, seeds))
    row, = [row for row in tables.summarise(rows_for({"default": first, "beta-5": other}))
            if row["variant"] == "beta-5"]
    assert (row["figure"], row["paper"], row["seeds"]) == ("beta", 0.79, seeds)
    assert row["sft"] == pytest.approx((seeds - 1) / 20)
    low, high = stats.t.interval(0.95, seeds - 1, other.mean(), stats.sem(other))
    assert row["after"] - row["half"] == pytest.approx(low)
    assert row["after"] + row["half"] == pytest.approx(high)
    paired = stats.ttest_rel(other, first).confidence_interval(0.95)
    assert (row["low"], row["high"]) == pytest.approx((paired.low, paired.high))


@pytest.mark.parametrize("gain, verdict", [(-0.2, "shown"), (0.2, "contradicted"),
                                           (0.0, "not shown")])
def test_a_verdict_compares_the_interval_with_the_sign_of_the_papers_difference(gain, verdict):
    """The paper: beta 5 is worse than 1 (.79, .945), beta 0.1 better (.985)."""
    base, noise = np.array([0.5, 0.6, 0.7]), np.array([-0.01, 0.0, 0.01])
    rows = rows_for({"default": base, "beta-5": base + noise + gain,
                     "beta-0.1": base + noise - gain})
    found = {row["variant"]: row["verdict"] for row in tables.summarise(rows)}
    assert found == {"default": "", "beta-5": verdict, "beta-0.1": verdict}


def test_one_seed_has_no_interval_and_no_first_variant_no_gain(capsys):
    tables.show(tables.summarise(rows_for({"beta-5": [0.8]})))
    assert capsys.readouterr().out.splitlines()[1].split() == (
        ["beta", "beta-5", "0.001", "1", "0.000", "0.800", "-", "-", "-", "-", "0.790"])


def test_every_variant_stands_in_a_figure_and_a_paper_value_of_zero_is_shown(capsys):
    assert {name for variants in tables.FIGURES.values() for name in variants} == set(
        variants.VARIANTS)
    tables.show(tables.summarise(rows_for(dict.fromkeys(variants.VARIANTS, [0.0]))))
    line, = [text for text in capsys.readouterr().out.splitlines()
             if text.split()[:2] == ["target", "target-endpoint"]]
    assert line.split()[-1] == "0.000"


def test_the_phase_table_pairs_the_next_step_with_every_other_target():
    rng, rows, values = np.random.default_rng(0), [], {}
    for noise in ("0.1", "0.5"):
        for target in variants.ERRORS:
            values[noise, target] = rng.random(4)
            rows += [{"noise_level": noise, "target": target, "ema": "0.9 0.9", "lr": "0.001",
                      "seed": str(s), "sft": "0.5", "after": str(value)}
                     for s, value in enumerate(values[noise, target])]
    table = tables.phase_table(rows)
    assert [(row["noise_level"], row["target"]) for row in table] == list(values)
    for row in table:
        own, base = (values[row["noise_level"], t] for t in (row["target"], "next"))
        assert row["after"] == pytest.approx(own.mean()) and row["seeds"] == 4
        if row["target"] == "next":
            assert np.isnan(row["gain"])
        else:
            paired = stats.ttest_rel(base, own).confidence_interval(0.95)
            assert (row["low"], row["high"]) == pytest.approx((paired.low, paired.high))


# ------------------------------------------------------------------------------------------------
# The script


def main_in(folder, monkeypatch, *flags, program=ablations):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [f"{program.__name__}.py", *map(str, flags)])
    program.main()


def test_the_script_in_parallel_with_a_subset_by_name(workplace):
    flags = ("default", "beta-5", *FLAGS[:-1], 2, "--out", "out")
    told = run_script("results/ablations/run.py", *flags, cwd=workplace).stdout
    rows = common.read(workplace / "out" / "ablations.csv")
    assert {row["variant"] for row in rows} == {"default", "beta-5"} and len(rows) == 2
    assert "RESULT variants=2 runs=2" in told and "0.945" in told
    assert (workplace / "out" / "ablations.png").stat().st_size > 1000
    assert not (workplace / "out" / "ablations_tuning.csv").exists()      # one lr: nothing to tune


@pytest.fixture
def no_training(monkeypatch):
    """`train` replaced: success is the seed / 100 + how near lr is to 3e-4; and no SFT. Git is not
    asked for the commit of each of hundreds of rows, either."""
    monkeypatch.setattr(common.subprocess, "getstatusoutput", lambda command: (0, "a commit"))
    monkeypatch.setattr(variants, "train", lambda args: None)
    monkeypatch.setattr(variants, "score", lambda _, args: [0.5, args.seed / 1e3 + 1e-2 * (
        args.lr == 3e-4) + 1e-3 * (args.ema == [0.9, 0.9])])
    monkeypatch.setattr(flow, "toy_policy", lambda seed: None)


def test_variants_are_tuned_on_other_seeds_and_played_with_what_was_best(no_training, tmp_path,
                                                                         monkeypatch, capsys):
    main_in(tmp_path, monkeypatch, "default", "noise-0.3", "--seeds", 2, "--out", "out", "--jobs",
            1)
    tuned, rows = (common.read(tmp_path / "out" / f"ablations{end}.csv") for end in ("_tuning", ""))
    assert {row["seed"] for row in tuned} == {"100", "101", "102", "103"}
    assert {row["lr"] for row in tuned} == {"0.0003", "0.001"} and len(tuned) == 16
    assert {(r["variant"], r["noise_level"], r["lr"], r["seed"]) for r in rows} == {
        (name, noise, "0.0003", seed) for name, noise in (("default", "0.2"), ("noise-0.3", "0.3"))
        for seed in "01"}


def test_the_verdicts_hold_every_difference_of_the_folder(no_training, tmp_path, monkeypatch):
    main_in(tmp_path, monkeypatch, "default", "beta-5", "--seeds", 2, "--lr", 1e-3, "--jobs", 1,
            "--out", "out")
    main_in(tmp_path, monkeypatch, "--targets", "next", "endpoint", "--noise-levels", 0.3, "--ema",
            "0.9 0.9", "--lr", 1e-3, "--seeds", 2, "--jobs", 1, "--out", "out", program=phase)
    assert [(row["comparison"], row["seeds"], float(row["mean"])) for row in common.read(
        tmp_path / "out/verdicts.csv")] == [("phase: next - endpoint, noise 0.3", "2", 0.0),
                                            ("beta: beta-5 - default", "2", 0.0)]


def test_the_phase_tunes_every_target_in_every_width(no_training, tmp_path, monkeypatch, capsys):
    main_in(tmp_path, monkeypatch, "--seeds", 2, "--out", "out", "--jobs", 1, program=phase)
    tuned, rows = (common.read(tmp_path / "out" / f"phase{end}.csv") for end in ("_tuning", ""))
    compared = {(target, f"{noise:g}") for target in ("next", "next-mean", "endpoint")
                for noise in phase.NOISE_LEVELS}
    assert {(row["target"], row["noise_level"]) for row in rows} == compared
    assert len(rows) == 36
    assert {(row["lr"], row["ema"]) for row in rows} == {("0.0003", "0.9 0.9")}
    assert len(tuned) == len(compared) * (12 + 6 + 3 + 3)
    wanted = "target ema lr noise_level seed sft after episodes seconds".split()
    assert set(wanted) <= set(rows[0])


@pytest.mark.parametrize("program, flags", [
    (ablations, "noise-0.3"), (phase, "--targets endpoint --ema '0.9 0.9' --noise-levels 0.3")])
def test_the_command_in_a_row_makes_that_row(no_training, tmp_path, monkeypatch, program, flags):
    flags = [*shlex.split(flags), "--lr", 7e-4, "--iterations", 1, "--episodes", 8, "--jobs", 1]
    main_in(tmp_path, monkeypatch, *flags, "--seeds", 1, "--first-seed", 5, "--out", "a",
            program=program)
    name = "phase" if program is phase else "ablations"
    row, = common.read(tmp_path / "a" / f"{name}.csv")
    command = shlex.split(row["command"])
    assert command[0] == f"{program.__name__.replace('.', '/')}.py"
    main_in(tmp_path, monkeypatch, *command[1:], "--out", "b", program=program)
    again, = common.read(tmp_path / "b" / f"{name}.csv")
    assert {**again, "seconds": 0} == {**row, "seconds": 0}


def test_sde_over_ode_pairs_every_rollout_with_the_sde_of_its_noise(no_training, tmp_path,
                                                                    monkeypatch, capsys):
    """At 0.5 the adaptive ODE's rows are those of 0.2: its error knows no noise."""
    rates = {("sde", "endpoint"): 0.3, ("uncorrected", "endpoint"): 0.3, ("ode", "endpoint"): 0.1,
             ("ode", "adaptive"): 0.4}
    monkeypatch.setattr(variants, "score", lambda _, args: [
        0.2, rates[args.rollout, args.target] + (0.1 * args.noise_level + args.seed % 3 / 1e3) * (
            args.target != "adaptive")])
    main_in(tmp_path, monkeypatch, "--seeds", 3, "--out", "out", "--jobs", 1, program=rollouts)
    rows = common.read(tmp_path / "out/sde.csv")
    assert {row["seed"] for row in rows} == {"20", "21", "22"} and len(rows) == 7 * 3
    found = dict(tables.sde_over_ode(rows))
    assert set(found) == {f"sde - {name}, noise {noise}" for noise in ("0.2", "0.5") for name in (
        "uncorrected (endpoint)", "ode (endpoint)", "ode (adaptive)")} | {
        "sde - ode (endpoint) of 0.2, noise 0.5"}
    assert found["sde - ode (endpoint) of 0.2, noise 0.5"]["gain"] == pytest.approx(0.23)
    for noise, adaptive in (("0.2", 0.02 - 0.1), ("0.5", 0.05 - 0.1)):
        assert found[f"sde - ode (endpoint), noise {noise}"]["gain"] == pytest.approx(0.2)
        assert found[f"sde - ode (endpoint), noise {noise}"]["verdict"] == "shown"
        row = found[f"sde - ode (adaptive), noise {noise}"]
        assert row["gain"] == pytest.approx(adaptive + 1e-3) and row["verdict"] == "contradicted"
    told = {row["comparison"] for row in common.read(tmp_path / "out/verdicts.csv")}
    assert told == set(found)


def test_the_robots_settings_are_the_best_on_the_seed_of_the_tuning(tmp_path, monkeypatch, capsys):
    """Without the simulator: the best lr is 3e-4, the best EMA the next step's fast one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(robot, "run", lambda job: {
        "sft": 0.4, "after": 0.5 - abs(job["lr"] - 3e-4) + 0.01 * (
            (job["target"] == "next") == (job["ema"] == "0.1 0.5")) + job["noise_level"] / 100})
    main_in(tmp_path, monkeypatch, "--seeds", 2, "--out", "out", program=robot)
    tuning, rows = (common.read(tmp_path / f"out/robot{end}.csv") for end in ("_tuning", ""))
    assert len(tuning) == 36 and {row["seed"] for row in tuning} == {"10"}
    assert {(r["target"], r["noise_level"], r["ema"], r["lr"], r["seed"]) for r in rows} == {
        (target, noise, ema, "0.0003", seed) for noise in ("0.1", "0.3", "0.5") for seed in "01"
        for target, ema in (("next", "0.1 0.5"), ("endpoint", "0.9 0.9"))}


def test_a_row_of_the_phase_is_what_03_prints_with_these_flags(workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    job = {"target": "endpoint", "noise_level": 0.5, "iterations": 2, "episodes": 16,
           "ema": "0.9 0.995", "lr": 3e-4, "seed": 0}
    told = run_script("03_step_loss.py", "--target", "endpoint", "--noise-level", 0.5, "--ema", 0.9,
                      0.995, "--lr", 3e-4, "--iterations", 2, "--episodes", 16, cwd=workplace)
    row = phase.run(job)
    assert f"sft={row['sft']:.3f} stepnft={row['after']:.3f}" in told.stdout


def test_a_run_on_the_robot_is_05_from_the_seeds_own_clone(tmp_path, monkeypatch):
    """The calls, without the simulator: the clone once, then each target from it."""
    asked = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "ROOT", tmp_path)
    monkeypatch.setattr(common, "call", lambda command: (asked.append(command.split()), (
        Path("runs/phase_robot/seed2").mkdir(parents=True, exist_ok=True),
        Path("runs/phase_robot/seed2/sft.pt").touch()), "x\nRESULT sft=0.4 stepnft=0.6 y=1")[-1])
    for target in ("next", "endpoint"):
        row = robot.run({"target": target, "noise_level": 0.8, "ema": "0.1 0.5",
                                   "lr": 3e-4, "seed": 2})
        assert (row["sft"], row["after"]) == ("0.4", "0.6")
    maniskill = importlib.import_module("05_train_maniskill")
    clone, *runs = asked
    assert clone[1:3] == ["--seed", "2"] and "--iterations 0" in " ".join(clone) and len(runs) == 2
    monkeypatch.setattr(tools.flags, "checkpoint", Path)
    monkeypatch.setattr(maniskill.flags, "check_clone", lambda *rest: None)
    for command, target in zip(runs, ("next", "endpoint")):
        args = maniskill.parse_args(command[1:])
        assert (args.target, args.noise_level, args.lr, args.ema, args.iterations, args.episodes,
                args.test_episodes, args.sft) == (
            target, 0.8, 3e-4, [0.1, 0.5], 12, 256, 400, Path("runs/phase_robot/seed2/sft.pt"))


def test_the_list_has_every_name_and_the_papers_numbers(tmp_path, monkeypatch, capsys):
    main_in(tmp_path, monkeypatch, "--list")
    told = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert {line[-2] for line in told} == set(variants.VARIANTS) and not list(tmp_path.iterdir())
    assert ["loss", "loss-weighted", "0.91"] in told and ["EMA", "ema-0.9", "-"] in told


@pytest.mark.parametrize("flags, named", [
    ("target-endpiont", "target-endpoint"), ("--seeds 0", "--seeds"), ("--jobs 0", "--jobs"),
    ("--lr nan", "--lr"), ("--first-seed -1", "--first-seed"), ("--iterations 0", "--iterations"),
    ("labels-grouped --episodes 12", "--episodes"), ("--noise-level 0", "--noise-level"),
    ("--first-seed 95", "--seeds"), ("--targets x_0", "--targets"), ("--ema 0.5", "--ema"),
    ("--out a_file", "--out")])
def test_a_call_that_cannot_work_is_told_in_one_line_and_leaves_nothing(tmp_path, monkeypatch,
                                                                       capsys, flags, named):
    (tmp_path / "a_file").write_text("not a folder")
    with pytest.raises(SystemExit) as stopped:
        main_in(tmp_path, monkeypatch, *flags.split(),
                program=phase if "targets" in flags or "ema" in flags else ablations)
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and out == "" and len(err.strip().splitlines()) == 1
    assert named in err and [p.name for p in tmp_path.iterdir()] == ["a_file"]
