"""02 - Wider space: noise in every denoising step.

The ODE of 01 tries only what the demonstrations did. So every step here draws noise. A shift of its
mean, the correction, keeps the policy's distribution if steps are fine; with K = 4 coarse ones most
of the width remains, and that is the exploration:

    x_next ~ N(mean, std^2),   mean = (1 - t_next) x0_hat + (t_next - sigma^2 dt / (2 t)) x1_hat
                               std  = sigma sqrt(dt),     sigma = noise_level sqrt(t / (1 - t))

x0_hat = x_t - t v and x1_hat = x_t + (1 - t) v are the ends of 01's line that the velocity points
at: the mean chunk and the mean noise that x_t may come from, E[x_0 | x_t] and E[x_1 | x_t].
`transition` says where the correction comes from. Every step is a Gaussian with a known mean, which
is all that 03 needs; the last is noisy too, as from a step with one outcome nothing is learned.

Run:     python 02_sde_sampler.py          (about 15 s on one CPU core)
Prints, saves (runs/02_sde_sampler/{width.png, width.csv}): for each noise level the spread of
         chunks, of ways at the wall, distance to the ODE, success.
"""

import importlib
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch

from envs.gap_world import GapWorld, episode_seeds
from tools import flags
from tools.log import log_row

flow = importlib.import_module("01_flow_policy")  # a name with a digit first needs this
FINE = 64  # enough steps to see which sampler keeps 01's distribution; K = 4 widens both

# ------------------------------------------------------------------------------------------------
# The grid, the noise, one step, a path; then two measures of a sampler


def time_grid(num_steps):
    """t_k = 1 - k / K for k = 0..K, from noise (1) to action (0): (K+1,)."""
    return torch.linspace(1, 0, num_steps + 1)


def noise_scale(times, noise_level):
    """sigma_k at the start of each step: times (K+1,) -> (K,), or (B, K) if noise_level is. (Flow-
    SDE, as in Flow-GRPO.) At t = 1, where 1 - t is 0, the next grid time replaces t in it."""
    t, t_next = times[:-1], times[1:]
    # sigma_k = a sqrt(t_k / (1 - t_k)),   a = noise_level
    return noise_level * torch.sqrt(t / (1 - torch.where(t == 1, t_next, t)))


def transition(x_t, v, t_cur, t_next, sigma, corrected=True):
    """Mean and std of x_next given x_t and a velocity: the one-step Gaussian (Flow-SDE).

    x_t, v (B, H, A); t_cur, t_next, sigma are floats or anything that broadcasts against x_t.
    Mean (B, H, A), std like sigma. sigma = 0 is the ODE's Euler step x_t - dt v, around which
    `corrected=False` adds the same noise."""
    dt = t_cur - t_next
    x0_hat = x_t - t_cur * v
    x1_hat = x_t + (1 - t_cur) * v
    # A drift b changes a density p by -div(p b) dt; noise changes it by sigma^2/2 laplace p dt
    # (Fokker-Planck). As laplace p = div(p grad log p), noise acts as the drift -sigma^2/2 grad
    # log p would, and the mean adds the opposite. Given x_0, x_t is N((1 - t) x_0, t^2), so grad
    # log p is -(x_t - (1 - t) x_0) / t^2 = -x_1 / t; over all x_0 its mean, -x1_hat / t. (Exact
    # for small steps and the exact velocity, nearly so for a fitted one, less after RL.)
    correction = sigma**2 * dt / (2 * t_cur) if corrected else 0
    # the Euler step is (1 - t_next) x0_hat + t_next x1_hat
    mean = (1 - t_next) * x0_hat + (t_next - correction) * x1_hat
    return mean, sigma * dt**0.5


# x (B, K+1, H, A) from noise to action; v (B, K, H, A) and sigma (B, K) at the start of each step
SamplingPath = namedtuple("SamplingPath", "x v sigma")


@torch.no_grad()
def sde_sample(policy, obs, num_steps, noise_level, x_1=None, corrected=True):
    """K noisy steps from noise to an action chunk -> (x_0 (B, H, A) in flow units, path).
    noise_level: a number, or a tensor (B, K) with one for each row and step."""
    x_t = flow.noise_like_chunks(policy, obs) if x_1 is None else x_1
    B, ctx, times = len(x_t), policy.encode(obs), time_grid(num_steps).to(x_t.device)
    sigmas = noise_scale(times, noise_level).expand(B, num_steps)                 # (B, K)
    xs, vs = [x_t], []
    for k in range(num_steps):
        v = policy.velocity(x_t, times[k].expand(B), ctx)                         # 4, see 03
        mean, std = transition(x_t, v, times[k], times[k + 1], sigmas[:, k, None, None], corrected)
        x_t = mean + std * torch.randn_like(mean)                                 # 5
        xs.append(x_t)
        vs.append(v)
    return x_t, SamplingPath(torch.stack(xs, 1), torch.stack(vs, 1), sigmas)


def marginal_distance(a, b, projections=64):
    """Distance of the distributions of two samples (N, H, A), in flow units: project both on random
    directions, sort, compare (sliced Wasserstein-1). An average over directions: a shift by 1 in
    one of eight dimensions counts about 0.29."""
    a, b = a.flatten(1), b.flatten(1)
    directions = torch.randn(a.shape[1], projections)
    directions = directions / directions.norm(dim=0)
    return ((a @ directions).sort(0)[0] - (b @ directions).sort(0)[0]).abs().mean().item()


def wall_spread(trail):
    """Standard deviation (m) of the heights at which episodes first meet the wall, x = 0; trail:
    GapWorld's, every position, T+1 of (N, 2)."""
    heights = []
    for way in np.stack(trail, 1):                                                # (T+1, 2)
        after = np.argmax(way[:, 0] >= 0)                                # 0 if it never comes there
        if after:
            heights.append(np.interp(0, *way[after - 1:after + 1].T))
    return float(np.std(heights))


def main():
    parser = flags.Parser(__doc__)
    add = parser.add_argument
    add("--seed", type=flags.natural, default=0, help="which SFT policy of 01, trained if missing")
    add("--num-steps", type=flags.positive_int, default=4, help="K, denoising steps")
    add("--noise-levels", type=flags.number(float, 0), nargs="+", default=[0, 0.05, 0.1, 0.2, 0.5],
        help="a, widths of the noise to compare")
    add("--samples", type=flags.number(int, 2), default=2000, help="chunks for one observation")
    add("--episodes", type=flags.positive_int, default=500, help="a row, for each column")
    add("--out", type=Path, default="runs/02_sde_sampler", help="folder of the table and figure")
    args = parser.parse_args()
    parser.claim_folder("--out", args.out)
    torch.set_num_threads(1)  # on nets this small, threads only wait for each other
    (args.out / "width.csv").unlink(missing_ok=True)
    start, policy, world = time.time(), flow.toy_policy(args.seed), GapWorld()
    torch.manual_seed(args.seed)
    one_obs = {"state": torch.tensor([flow.ONE_STATE]).expand(args.samples, 3)}
    ode = flow.ode_sample(policy, one_obs, args.num_steps)
    ode_fine = flow.ode_sample(policy, one_obs, FINE)
    floor = np.mean([marginal_distance(ode_fine, flow.ode_sample(policy, one_obs, FINE))
                     for _ in range(10)])
    print(f"distance between two ODE samples, mean of ten (the columns' noise floor): {floor:.4f}")
    print(f" noise        mean   spread  at wall distance  at K={FINE}  success")
    seeds, table, fans = episode_seeds("test", args.episodes), [], {}
    for noise_level, corrected in [(a, True) for a in args.noise_levels] + [
            (a, False) for a in args.noise_levels if a > 0]:  # no noise, nothing to correct
        def sample(obs, num_steps=args.num_steps):
            return sde_sample(policy, obs, num_steps, noise_level, corrected=corrected)[0]

        def act(obs):
            return policy.denormalise(sample(obs)), {}

        x_0, fine = sample(one_obs), sample(one_obs, FINE)
        world.play(act, seeds[:1].repeat(args.episodes))  # from one start: the sampler's width
        at_wall = wall_spread(world.trail)
        success, _ = world.play(act, seeds)
        row = {"noise_level": noise_level, "mean": "corrected" if corrected else "uncorrected",
               "spread": x_0.std(0).mean().item(), "at_wall": at_wall,
               "distance": marginal_distance(x_0, ode),
               "distance_fine": marginal_distance(fine, ode_fine), "success": success.mean()}
        print("{noise_level:6.2f} {mean:>11} {spread:8.4f} {at_wall:8.4f} {distance:8.4f} "
              "{distance_fine:8.4f} {success:8.3f}".format(**row))
        log_row(args.out / "width.csv", row)
        table.append(row)
        if corrected:
            fans[noise_level] = policy.denormalise(x_0[:200]).clamp(-1, 1)
    figure(fans, table, args.out / "width.png")
    at_widest = {row["mean"]: row["distance_fine"] for row in table
                 if row["noise_level"] == max(args.noise_levels)}
    print(f"RESULT ode_floor={floor:.4f}", *(f"{k}={v:.4f}" for k, v in at_widest.items()),
          f"seconds={time.time() - start:.0f}")


def figure(fans, table, path):
    """Where 200 chunks for one observation would carry the robot, for each width of the noise;
    last: how far apart episodes from one start meet the wall."""
    from matplotlib.figure import Figure
    fig = Figure(figsize=(2.6 * (len(fans) + 1), 2.6), layout="constrained")
    *axes, last = fig.subplots(1, len(fans) + 1)
    for ax, (noise_level, chunks) in zip(axes, fans.items()):
        walks = torch.cat([torch.zeros(len(chunks), 1, 2), chunks.cumsum(1)], 1)
        for walk in GapWorld.speed * walks.numpy() + np.array(flow.ONE_STATE[:2]):
            ax.plot(*walk.T, color="#0072b2", lw=0.6, alpha=0.3)
        ax.set(title=f"noise {noise_level}" if noise_level else "ODE, no noise", xlabel="x (m)",
               xlim=(-0.82, -0.3), ylim=(-0.2, 0.3), yticks=(-0.1, 0, 0.1, 0.2))
    axes[0].set_ylabel("y (m)")
    for mean, style in (("corrected", "o-"), ("uncorrected", "s--")):
        own = [row for row in table if row["mean"] == mean]
        last.plot([row["noise_level"] for row in own], [row["at_wall"] for row in own], style,
                  label=mean)
    last.set(title="std of y at the wall (m)", xlabel="noise level a", ylim=(0, None))
    last.legend(frameon=False)
    fig.savefig(path, dpi=120)


if __name__ == "__main__":
    flags.call(main)
