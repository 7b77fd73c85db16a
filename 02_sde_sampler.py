"""02 - Wider space: noise in every denoising step.

The ODE of 01 tries only what the demos did. So every step here draws noise, and a shift of its
mean, the correction, takes back what noise alone would blur: all of it if steps are fine. With
K = 4 they are coarse, and chunks come out wider: the exploration. The correction in two lines,
with dt = t - t_next, x0_hat = x_t - t v, x1_hat = x_t + (1 - t) v, the mean ends of 01's lines:

(1) noise of variance sigma^2 dt spreads the density as a drift of -sigma^2 dt / 2 * score would
    (Fokker-Planck; score: the gradient of log p(x_t)), so the mean must add sigma^2 dt / 2 * score;
(2) x_t given x_0 is N((1 - t) x_0, t^2), with score -(x_t - (1 - t) x_0) / t^2 = -x_1 / t; a
    mixture's score is the mean of its parts', given x_t: -E[x_1 | x_t] / t = -x1_hat / t.

The Euler step x_t - dt v is (1 - t_next) x0_hat + t_next x1_hat. Together (Flow-SDE, Flow-GRPO):

    x_next ~ N(mean, std^2),   mean = (1 - t_next) x0_hat + (t_next - sigma^2 dt / (2 t)) x1_hat
                               std  = sigma sqrt(dt),     sigma = noise_level sqrt(t / (1 - t))

(1) is exact for small steps and any sigma, so the SDE (the ODE plus noise) has the ODE's
distribution at every t, its marginals. (2) holds for the exact velocity field of flow matching,
nearly for a fitted one, and less after RL. Every single step is a Gaussian with a known mean, which
is all that 03 needs. The last step is noisy too, unlike in many samplers: a step with one possible
outcome leaves nothing to rank. Left out of the paper's code: log-probabilities of paths.

Run:     python 02_sde_sampler.py          (about 15 s on one CPU core)
Prints:  noise level against action spread, visited area, distance to the ODE's marginal, success.
Saves:   runs/02_sde_sampler/{width.png, width.csv}
"""

import csv
import importlib
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch

flow = importlib.import_module("01_flow_policy")
FINE = 64  # enough steps to see which sampler keeps the marginals; K = 4 widens both

# ------------------------------------------------------------------------------------------------
# The grid, the noise and one step


def time_grid(num_steps):
    """t_k = 1 - k / K for k = 0..K, from noise (1) to action (0): (K+1,)."""
    return torch.linspace(1, 0, num_steps + 1)


def noise_scale(times, noise_level):
    """sigma_k at the start of each step: times (K+1,) -> (K,), or (B, K) as the noise_level.

    Of Flow-SDE, as in Flow-GRPO; at t = 1 its denominator would be 0 and uses the next grid time.
    """
    t, t_next = times[:-1], times[1:]
    # sigma_k = a sqrt(t_k / (1 - t_k)),   a = noise_level
    return noise_level * torch.sqrt(t / (1 - torch.where(t == 1, t_next, t)))


def transition(x_t, v, t_cur, t_next, sigma, corrected=True):
    """Mean and std of x_next given x_t and a velocity: the one-step Gaussian.

    x_t, v (B, H, A); t_cur, t_next, sigma are floats or anything that broadcasts against x_t.
    Mean (B, H, A), std like sigma. sigma = 0 is the ODE's Euler step x_t - dt v.
    `corrected=False` adds the same noise around the Euler step and so loses the marginals.
    """
    dt = t_cur - t_next
    x0_hat = x_t - t_cur * v
    x1_hat = x_t + (1 - t_cur) * v
    correction = sigma**2 * dt / (2 * t_cur) if corrected else 0
    # mean = (1 - t_next) x0_hat + (t_next - sigma^2 dt / (2 t)) x1_hat
    mean = (1 - t_next) * x0_hat + (t_next - correction) * x1_hat
    return mean, sigma * dt**0.5


# x (B, K+1, H, A) from noise to action; v (B, K, H, A) and sigma (B, K) at the start of each step
SamplingPath = namedtuple("SamplingPath", "x v sigma")


@torch.no_grad()
def sde_sample(policy, obs, num_steps, noise_level, x_1=None, corrected=True):
    """K noisy steps from noise to an action chunk -> (x_0 (B, H, A) in flow units, path).

    noise_level: a number, or a tensor (B, K) with one for each row and step.
    """
    x_t = flow.noise_like_chunks(policy, obs) if x_1 is None else x_1
    B, ctx, times = len(x_t), policy.encode(obs), time_grid(num_steps).to(x_t.device)
    sigmas = noise_scale(times, noise_level).expand(B, num_steps)                 # (B, K)
    xs, vs = [x_t], []
    for k in range(num_steps):
        v = policy.velocity(x_t, times[k].expand(B), ctx)
        mean, std = transition(x_t, v, times[k], times[k + 1], sigmas[:, k, None, None], corrected)
        x_t = mean + std * torch.randn_like(mean)
        xs.append(x_t)
        vs.append(v)
    return x_t, SamplingPath(torch.stack(xs, 1), torch.stack(vs, 1), sigmas)


# ------------------------------------------------------------------------------------------------
# What to measure about a sampler


def marginal_distance(a, b, projections=64):
    """Sliced Wasserstein-1 distance of two equally large samples (N, H, A), in flow units: project
    both on random directions, sort, compare.

    Zero for equal distributions, up to sampling noise. It is an average over directions: a shift
    by 1 in one of eight dimensions counts about 0.29.
    """
    a, b = a.flatten(1), b.flatten(1)
    directions = torch.randn(a.shape[1], projections)
    directions = directions / directions.norm(dim=0)
    return ((a @ directions).sort(0)[0] - (b @ directions).sort(0)[0]).abs().mean().item()


def visited_area(rows, cell=0.05):
    """Area of the world (2 x 2) where chunks began, counted in cells; rows as of `play`."""
    positions = rows["state"][:, :2]
    return len({tuple(p) for p in (positions / cell).floor().int().tolist()}) * cell**2


def main():
    parser = flow.Parser(__doc__)
    add = parser.add_argument
    add("--seed", type=flow.natural, default=0, help="which SFT policy of 01, trained if missing")
    add("--num-steps", type=flow.positive_int, default=4, help="K, denoising steps")
    add("--noise-levels", type=flow.number(float, 0), nargs="+", default=[0, 0.05, 0.1, 0.2, 0.5],
        help="a, widths of the noise to compare")
    add("--samples", type=flow.number(int, 2), default=2000, help="chunks for one observation")
    add("--episodes", type=flow.positive_int, default=500, help="a row; area: from one start")
    add("--out", type=Path, default="runs/02_sde_sampler", help="folder of the table and figure")
    args = parser.parse_args()
    parser.make_folder("--out", args.out)
    torch.set_num_threads(1)  # on nets this small, threads only wait for each other
    start = time.time()
    policy = flow.toy_policy(args.seed)
    torch.manual_seed(args.seed)
    one_obs = {"state": torch.tensor([[-0.8, 0.5, -0.2]]).expand(args.samples, 3)}
    ode = flow.ode_sample(policy, one_obs, args.num_steps)
    ode_fine = flow.ode_sample(policy, one_obs, FINE)
    floor = marginal_distance(ode_fine, flow.ode_sample(policy, one_obs, FINE))
    print(f"distance between two ODE samples (the noise floor of both columns): {floor:.4f}")
    print(f"{'noise':>6} {'mean':>12} {'spread':>8} {'area':>7} {'distance':>9} "
          f"{f'at K={FINE}':>9} {'success':>8}")
    table, fans, world = [], {}, flow.GapWorld()
    for corrected in (True, False):
        for noise_level in args.noise_levels:
            if noise_level == 0 and not corrected:
                continue  # without noise there is nothing to correct

            def sample(obs, num_steps=args.num_steps):
                return sde_sample(policy, obs, num_steps, noise_level, corrected=corrected)[0]

            def act(obs):
                return policy.denormalise(sample(obs)), {}

            x_0, fine = sample(one_obs), sample(one_obs, FINE)
            # many episodes from one start: their width is the sampler's
            seeds = flow.episode_seeds("test", args.episodes)
            _, rows = world.play(act, seeds[:1].repeat(args.episodes))
            success, _ = world.play(act, seeds)
            name = "corrected" if corrected else "uncorrected"
            row = {"noise_level": noise_level, "mean": name, "spread": x_0.std(0).mean().item(),
                   "area": visited_area(rows), "distance": marginal_distance(x_0, ode),
                   "distance_fine": marginal_distance(fine, ode_fine), "success": success.mean()}
            table.append(row)
            fans[noise_level, name] = policy.denormalise(x_0[:200]).clamp(-1, 1)
            print("{noise_level:6.2f} {mean:>12} {spread:8.4f} {area:7.4f} {distance:9.4f} "
                  "{distance_fine:9.4f} {success:8.3f}".format(**row))
    with open(args.out / "width.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, table[0])
        writer.writeheader()
        writer.writerows(table)
    figure(fans, args.noise_levels, args.out / "width.png")
    print(f"saved {args.out}/width.csv and width.png")
    widest = [row for row in table if row["noise_level"] == max(args.noise_levels)]
    print(f"RESULT ode_floor={floor:.4f} corrected={widest[0]['distance_fine']:.4f} "
          f"uncorrected={widest[-1]['distance_fine']:.4f} seconds={time.time() - start:.0f}")


def figure(fans, noise_levels, path):
    """The fans: where up to 200 sampled chunks would carry the robot, open loop, from one start."""
    fig, axes = flow.pyplot().subplots(2, len(noise_levels), figsize=(2.6 * len(noise_levels), 5),
                                       sharex=True, sharey=True, squeeze=False,
                                       layout="constrained")
    for ax_row, name in zip(axes, ("corrected", "uncorrected")):
        for ax, noise_level in zip(ax_row, noise_levels):
            chunks = fans[noise_level, name if noise_level else "corrected"]
            walks = torch.cat([torch.zeros(len(chunks), 1, 2), chunks.cumsum(1)], 1)
            for walk in flow.GapWorld.speed * walks.numpy() + np.array([-0.8, 0.5]):
                ax.plot(*walk.T, color="#0072b2" if name == "corrected" else "#d55e00",
                        lw=0.6, alpha=0.3)
            ax.set(title=f"{name}, noise {noise_level}" if noise_level else "ODE", xlabel="x")
    axes[0, 0].set_ylabel("y")
    axes[1, 0].set_ylabel("y")
    fig.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
