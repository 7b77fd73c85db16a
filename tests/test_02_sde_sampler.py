"""02: one step against scalar formulas, many steps against distributions known in closed form."""

import csv
import importlib
import math

import numpy as np
import pytest
import torch
from scipy import stats

from conftest import MixtureFlow, result_line, run_main, run_script, wrong_call
from envs import gap_world
from test_01_flow_policy import WRAPS, Wrapped

flow = importlib.import_module("01_flow_policy")
sde = importlib.import_module("02_sde_sampler")

# ------------------------------------------------------------------------------------------------
# The grid and the noise scale


def test_the_grid_runs_from_noise_to_action_in_equal_steps():
    assert sde.time_grid(4).tolist() == [1, 0.75, 0.5, 0.25, 0]
    for K in (1, 3, 10):
        np.testing.assert_allclose(sde.time_grid(K), [1 - k / K for k in range(K + 1)], atol=1e-6)


def test_the_papers_stds():
    """K = 4, a = 0.2: 0.200, 0.173, 0.100, 0.058; the last step is noisy too."""
    times = sde.time_grid(4)
    sigmas = sde.noise_scale(times, 0.2)
    stds = [sde.transition(torch.zeros(1), torch.zeros(1), t, t_next, sigma)[1].item()
            for t, t_next, sigma in zip(times[:-1], times[1:], sigmas)]
    np.testing.assert_allclose(stds, [0.200, 0.173, 0.100, 0.058], atol=5e-4)


@pytest.mark.parametrize("num_steps", [1, 2, 4, 9])
def test_sigma_uses_the_next_grid_time_only_at_t_1_and_only_below(num_steps):
    a, K = 0.7, num_steps
    times = [1 - k / K for k in range(K + 1)]
    expected = [a * math.sqrt(1 / (1 - times[1]))]                 # not sqrt(t_1 / (1 - t_1))
    expected += [a * math.sqrt(t / (1 - t)) for t in times[1:-1]]
    sigmas = sde.noise_scale(sde.time_grid(K), a)
    assert sigmas.shape == (K,) and sigmas.isfinite().all()
    np.testing.assert_allclose(sigmas, expected, rtol=1e-4)


def test_sigma_is_proportional_to_the_noise_level():
    times = sde.time_grid(5)
    torch.testing.assert_close(sde.noise_scale(times, 0.6), 3 * sde.noise_scale(times, 0.2))
    assert not sde.noise_scale(times, 0.0).any()


# ------------------------------------------------------------------------------------------------
# One step


def slow_step(x, v, t, t_next, sigma, corrected=True):
    """Mean and std for scalars, written the other way: an Euler step, then towards the score.

    score of x_t = -x1_hat / t;   mean = x - dt v + sigma^2 dt / 2 * score;   std = sigma sqrt(dt)
    """
    dt = t - t_next
    score = -(x + (1 - t) * v) / t
    return x - dt * v + corrected * sigma**2 * dt / 2 * score, sigma * math.sqrt(dt)


@pytest.mark.parametrize("corrected", [True, False])
def test_a_step_is_an_euler_step_plus_the_score(corrected):
    """Every row of a batch has its own time and sigma; entry by entry against the scalar form."""
    x, v = torch.randn(5, 3, 2).double(), torch.randn(5, 3, 2).double()
    t, t_next = torch.tensor([1, 0.75, 0.5, 0.3, 0.25]), torch.tensor([0.75, 0.5, 0.4, 0.1, 0])
    sigma = torch.tensor([0.4, 0.3, 0.2, 0.9, 0])
    mean, std = sde.transition(x, v, *(z.double()[:, None, None] for z in (t, t_next, sigma)),
                               corrected)
    for b, h, a in np.ndindex(5, 3, 2):
        slow_mean, slow_std = slow_step(x[b, h, a].item(), v[b, h, a].item(), t[b].item(),
                                        t_next[b].item(), sigma[b].item(), corrected)
        assert mean[b, h, a].item() == pytest.approx(slow_mean, abs=1e-6)
        assert std[b].item() == pytest.approx(slow_std, abs=1e-6)


def test_without_noise_a_step_is_the_euler_step():
    x, v = torch.randn(2, 3, 2), torch.randn(2, 3, 2)
    for corrected in (True, False):
        mean, std = sde.transition(x, v, 0.6, 0.2, 0.0, corrected)
        torch.testing.assert_close(mean, x - 0.4 * v)
        assert std == 0


def test_the_mean_is_affine_in_the_velocity_with_slope_b():
    """B = -dt [1 + (1 - t) sigma^2 / (2 t)], by autograd."""
    x, v = torch.randn(1, 2, 2).double(), torch.randn(1, 2, 2).double()
    for t, t_next, sigma in [(1.0, 0.75, 0.4), (0.75, 0.5, 0.35), (0.25, 0.0, 0.12), (0.5, 0.4, 2)]:
        B = -(t - t_next) * (1 + (1 - t) * sigma**2 / (2 * t))
        jacobian = torch.autograd.functional.jacobian(
            lambda v: sde.transition(x, v, t, t_next, sigma)[0], v).view(4, 4)
        torch.testing.assert_close(jacobian, B * torch.eye(4).double())
        at_zero = sde.transition(x, torch.zeros_like(v), t, t_next, sigma)[0]
        torch.testing.assert_close(sde.transition(x, v, t, t_next, sigma)[0], at_zero + B * v)


# ------------------------------------------------------------------------------------------------
# The marginals: kept with the correction, lost without. Data whose velocity is known exactly.

GAUSSIAN = MixtureFlow([1.0], [0.7], [0.3])


def marginal(t):
    """Mean and variance of x_t for that Gaussian."""
    return (1 - t) * 0.7, (1 - t)**2 * 0.3**2 + t**2


def pushed_forward(mean, var, t, t_next, sigma, corrected):
    """Exact mean and variance after one step: for Gaussian data the step is affine in x_t."""
    x = torch.tensor([0.0, 1.0]).double()[:, None, None]
    v = GAUSSIAN.velocity(x, torch.tensor([t, t]), None)
    (low, high), std = sde.transition(x, v, t, t_next, sigma, corrected)
    slope = (high - low).item()
    return low.item() + slope * mean, slope**2 * var + std**2


@pytest.mark.parametrize("t", [0.8, 0.5, 0.2])
@pytest.mark.parametrize("sigma", [0.3, 1.0])
def test_a_small_corrected_step_keeps_the_marginal_and_an_uncorrected_one_does_not(t, sigma):
    """Start in the exact marginal at t. The error in variance is O(dt^2), or exactly sigma^2 dt."""
    def error(dt, corrected):
        mean, var = pushed_forward(*marginal(t), t, t - dt, sigma, corrected)
        return mean - marginal(t - dt)[0], var - marginal(t - dt)[1]

    for dt in (1e-3, 1e-4):
        assert abs(error(dt, True)[0]) < 1e-9                              # the mean is exact
        assert abs(error(dt, True)[1]) < 10 * dt**2
        assert error(dt, False)[1] / dt == pytest.approx(sigma**2, rel=0.05)


def largest_error(num_steps, noise_level, corrected):
    """Of the standard deviation at any t along a whole path, relative to the exact one."""
    times = sde.time_grid(num_steps).double()
    sigmas, errors = sde.noise_scale(times, noise_level), []
    mean, var = 0.0, 1.0
    for t, t_next, sigma in zip(times[:-1].tolist(), times[1:].tolist(), sigmas.tolist()):
        mean, var = pushed_forward(mean, var, t, t_next, sigma, corrected)
        errors.append(abs(math.sqrt(var / marginal(t_next)[1]) - 1))
        assert mean == pytest.approx(marginal(t_next)[0], abs=1e-5)
    return max(errors)


def test_gaussian_data_keeps_its_variance_all_along_the_corrected_path():
    """No samples: variances are pushed through 1000 steps exactly."""
    fine = largest_error(1000, 0.2, corrected=True)
    assert fine < 0.002
    assert largest_error(250, 0.2, corrected=True) > 2 * fine
    assert largest_error(500, 0.2, corrected=False) > 0.15


TWO_MODES = MixtureFlow([0.3, 0.7], [-1.0, 0.8], [0.15, 0.3], horizon=5, action_dim=2)


def distances(noise_level, corrected, num_steps=100, batch=2000):
    """Kolmogorov-Smirnov distance of SDE samples to the exact mixture at t = 0.5, 0.1 and 0."""
    obs = {"state": torch.zeros(batch, 1)}
    x_0, path = sde.sde_sample(TWO_MODES, obs, num_steps, noise_level, corrected=corrected)
    times = sde.time_grid(num_steps)
    return [stats.kstest(path.x[:, k].flatten().double().numpy(), TWO_MODES.cdf(times[k].item())
                         ).statistic for k in (num_steps // 2, num_steps * 9 // 10, num_steps)]


def test_two_modes_keep_their_distribution_under_the_corrected_sde():
    """20 000 entries: sampling noise alone gives a distance of about 0.006."""
    assert max(distances(0.0, True)) < 0.02
    assert max(distances(0.4, True)) < 0.02


def test_two_modes_blur_without_the_correction():
    assert min(distances(0.4, False)[1:]) > 0.05


# ------------------------------------------------------------------------------------------------
# The sampler


def random_policy():
    torch.manual_seed(3)
    return flow.FlowPolicy(4, 2, state_dim=3)


@pytest.mark.parametrize("corrected", [True, False])
def test_every_step_is_a_fresh_standard_normal_around_its_mean(corrected):
    """The last step too. Residuals of neighbouring steps are uncorrelated."""
    policy, obs, K, a = random_policy(), {"state": torch.randn(2000, 3)}, 4, 0.3
    x_0, path = sde.sde_sample(policy, obs, K, a, corrected=corrected)
    residuals, times = [], [1, 0.75, 0.5, 0.25, 0]
    for k in range(K):
        t, t_next = times[k], times[k + 1]
        sigma = a * math.sqrt(t / (1 - (t if t < 1 else t_next)))
        mean, std = slow_step(path.x[:, k], path.v[:, k], t, t_next, sigma, corrected)
        residuals.append(((path.x[:, k + 1] - mean) / std).flatten().numpy())
        assert stats.kstest(residuals[-1], "norm").pvalue > 1e-3, f"step {k}"
    assert np.abs(np.corrcoef([*residuals, path.x[:, 0].flatten()]) - np.eye(K + 1)).max() < 0.04


def test_the_path_records_states_and_velocities():
    policy, obs, K = random_policy(), {"state": torch.randn(6, 3)}, 3
    x_1 = torch.randn(6, 4, 2)
    x_0, path = sde.sde_sample(policy, obs, K, 0.3, x_1)
    assert path.x.shape == (6, K + 1, 4, 2) and path.v.shape == (6, K, 4, 2)
    assert torch.equal(path.x[:, 0], x_1) and torch.equal(path.x[:, K], x_0)
    for k, t in enumerate((1, 2 / 3, 1 / 3)):
        v = policy.velocity(path.x[:, k], torch.full((6,), t), policy.encode(obs))
        torch.testing.assert_close(path.v[:, k], v.detach())
    assert not (x_0.requires_grad or path.v.requires_grad)


def test_the_start_noise_is_standard_normal():
    x_1 = sde.sde_sample(random_policy(), {"state": torch.zeros(1000, 3)}, 1, 0.2)[1].x[:, 0]
    assert stats.kstest(x_1.flatten(), "norm").pvalue > 1e-3


@pytest.mark.parametrize("kind", WRAPS)
def test_the_sampler_never_looks_into_the_context(kind):
    policy, obs, x_1 = random_policy(), {"state": torch.randn(6, 3)}, torch.randn(6, 4, 2)
    wrapped, samples = Wrapped(policy, WRAPS[kind]), []
    for model in (policy, wrapped):
        torch.manual_seed(1)
        samples.append(sde.sde_sample(model, obs, 4, 0.3, x_1)[1])
    for plain, opaque in zip(*samples):
        torch.testing.assert_close(plain, opaque)
    assert wrapped.calls == ["encode"] + ["velocity"] * 4


def test_sigma_of_every_row_and_step_is_recorded():
    obs, times = {"state": torch.randn(6, 3)}, [1, 2 / 3, 1 / 3, 0]
    sigma = sde.sde_sample(random_policy(), obs, 3, 0.3)[1].sigma
    expected = [0.3 * math.sqrt(t / (1 - (t if t < 1 else times[1]))) for t in times[:3]]
    assert sigma.shape == (6, 3)
    np.testing.assert_allclose(sigma, [expected] * 6, rtol=1e-5)


def test_each_row_and_step_can_have_a_noise_level_of_its_own():
    """Levels 0, 0.1 or 0.5 at random: sigma by hand, a residual of std 1 or exactly 0."""
    policy, obs, K = random_policy(), {"state": torch.randn(3000, 3)}, 4
    levels, times = torch.tensor([0, 0.1, 0.5])[torch.randint(3, (3000, K))], [1, .75, .5, .25, 0]
    x_0, path = sde.sde_sample(policy, obs, K, levels)
    assert path.sigma.shape == (3000, K) and torch.equal(x_0, path.x[:, K])
    for k in range(K):
        t = times[k]
        sigma = levels[:, k] * math.sqrt(t / (1 - (t if t < 1 else 0.75)))
        torch.testing.assert_close(path.sigma[:, k], sigma)
        mean, std = path.x[:, k] - 0.25 * path.v[:, k], sigma * 0.5
        mean -= (sigma**2 * 0.25 / (2 * t))[:, None, None] * (path.x[:, k] + (1 - t) * path.v[:, k])
        residual = path.x[:, k + 1] - mean
        assert residual[levels[:, k] == 0].abs().max() < 1e-5
        noisy = levels[:, k] > 0
        normal = residual[noisy] / std[noisy, None, None]
        assert stats.kstest(normal.flatten(), "norm").pvalue > 1e-3, f"step {k}"


def test_a_noise_level_for_all_is_a_table_of_equal_ones():
    policy, obs, x_1 = random_policy(), {"state": torch.randn(5, 3)}, torch.randn(5, 4, 2)
    paths = []
    for noise_level in (0.3, torch.tensor(0.3), torch.full((5, 4), 0.3)):
        torch.manual_seed(1)
        paths.append(sde.sde_sample(policy, obs, 4, noise_level, x_1)[1])
    for path in paths[1:]:
        for ours, first in zip(path, paths[0]):
            torch.testing.assert_close(ours, first)


def test_at_noise_0_the_sde_is_the_ode():
    policy, obs, x_1 = random_policy(), {"state": torch.randn(9, 3)}, torch.randn(9, 4, 2)
    for num_steps in (1, 4, 7):
        x_0, path = sde.sde_sample(policy, obs, num_steps, 0.0, x_1)
        torch.testing.assert_close(path.x, flow.ode_path(policy, obs, num_steps, x_1))
        torch.testing.assert_close(x_0, flow.ode_sample(policy, obs, num_steps, x_1))


def test_more_noise_widens_the_samples_of_one_start_noise():
    policy, obs = random_policy(), {"state": torch.zeros(500, 3)}
    x_1 = torch.randn(1, 4, 2).expand(500, 4, 2)
    spread = [sde.sde_sample(policy, obs, 4, a, x_1)[0].std(0).mean().item() for a in (0, 0.1, 0.2)]
    assert spread[0] < 1e-6 and spread[2] == pytest.approx(2 * spread[1], rel=0.1)


# ------------------------------------------------------------------------------------------------
# What the script measures


def test_marginal_distance_in_one_dimension_is_scipys_wasserstein_distance():
    a, b = torch.randn(500, 1, 1), 0.5 * torch.randn(500, 1, 1) + 1
    exact = stats.wasserstein_distance(a.flatten(), b.flatten())
    assert sde.marginal_distance(a, b) == pytest.approx(exact, rel=1e-4)
    assert sde.marginal_distance(a, a[torch.randperm(500)]) < 1e-6


def test_marginal_distance_of_a_shift_is_the_mean_length_of_its_shadow():
    """A shift s in 2 dimensions casts |s| |cos| on a random direction: on average 2 / pi |s|."""
    a = torch.randn(100, 1, 2)
    distance = sde.marginal_distance(a, a + torch.tensor([3.0, 4.0]), projections=5000)
    assert distance == pytest.approx(5 * 2 / math.pi, rel=0.03)


def test_the_spread_at_the_wall_is_that_of_the_first_crossings():
    """Four ways: straight to 0.4; up from 0 to 0.2 and halfway through the wall at 0.1; one ends in
    the wall at -0.3, and one never comes there. What happens behind the wall does not count."""
    ways = np.array([[(-0.8, 0.4), (-0.2, 0.4), (0.2, 0.4), (0.8, 0.0)],
                     [(-0.8, 0.0), (-0.1, 0.0), (0.1, 0.2), (0.2, 0.9)],
                     [(-0.8, 0.0), (-0.1, 0.0), (0.0, -0.3), (0.0, -0.3)],
                     [(-0.8, 0.0), (-0.6, 0.9), (-0.4, 0.9), (-0.4, 0.9)]])
    trail = list(ways.transpose(1, 0, 2))
    assert sde.wall_spread(trail) == pytest.approx(np.std([0.4, 0.1, -0.3]))


def test_the_spread_at_the_wall_grows_with_the_expert_s_starts():
    """Ways of the expert through its own gap: their spread is that of the gaps."""
    world = gap_world.GapWorld()
    world.play(gap_world.expert, gap_world.episode_seeds("test", 200))
    assert sde.wall_spread(world.trail) == pytest.approx(np.std(world.gap_y), abs=0.01)


# ------------------------------------------------------------------------------------------------
# The script


def test_the_script_measures_every_noise_level(workplace):
    done = run_script("02_sde_sampler.py", "--samples", 50, "--episodes", 4, "--noise-levels", 0,
                      0.2, 0.5, "--out", workplace / "out", cwd=workplace)
    result = result_line(done)
    assert all(math.isfinite(v) for v in result.values())
    rows = list(csv.DictReader(open(workplace / "out" / "width.csv")))
    assert [(float(r["noise_level"]), r["mean"]) for r in rows] == [
        (0, "corrected"), (0.2, "corrected"), (0.5, "corrected"), (0.2, "uncorrected"),
        (0.5, "uncorrected")]
    assert result["uncorrected"] == pytest.approx(float(rows[-1]["distance_fine"]), abs=1e-4)
    assert (workplace / "out" / "width.png").stat().st_size > 1000


def test_help_lists_every_flag_with_its_default():
    code, told, _ = run_main("02_sde_sampler.py", "--help")
    flags = ("--seed", "--num-steps", "--noise-levels", "--samples", "--episodes", "--out")
    assert code == 0 and all(flag in told for flag in flags)
    assert "".join(told.split()).count("(default:") == len(flags)


@pytest.mark.parametrize("flags", [
    "--num-steps 0", "--num-steps -3", "--noise-levels nan", "--noise-levels -1",
    "--noise-levels 0.1 inf", "--noise-levels wide", "--noise-levels", "--samples 1",
    "--samples 0", "--episodes 0", "--seed -1", "--seed x", "--out a_file", "--out a_file/out",
    "--noise-level 0.1", "--eps 3", "--corrected"])
def test_a_call_that_cannot_work_is_told_in_one_line_that_names_the_flag(flags):
    line = wrong_call("02_sde_sampler.py", *flags.split())
    assert flags.split()[0] in line and flags.split()[-1] in line
