"""Why wide noise needs finer steps: what the residual of each target is made of.

At v_theta = v_old the loss multiplies the label with the residual, what v_old left unexplained: of
the next step e = x_next - mean(v_old), of the endpoint e = x_0 - x0_hat(v_old). Given x_t, the mean
of |e|^2 over everything that can follow has three parts:

    mean |e|^2  =  |mean e|^2             systematic: no noise caused it, the label credits it too
                +  Var mean[e | x_next]      this step's noise: what the label should be about
                +  mean Var[e | x_next]      the later steps' noise: it drowns the second

The next step has the second part alone. Measured on clones of 01, from the first chunk of test
starts: many x_next from each x_t, and two continuations to x_0 from each x_next. Two continuations
share their x_next and nothing else, so the mean of their product is the second part.

The systematic part has a direction, and the label says which way to go along it. `pull` is how far,
averaged over the episodes from one start: 1 - 2 x failures if the success of an episode hardly
hangs on the noise of one chunk, which is what is measured. Where it crosses 0 the endpoint's loss
turns from pulling the policy where it goes anyway to pushing it away.

Run:     python results/mechanism/run.py            (about two minutes on one core)
Saves:   results/mechanism/mechanism.csv
"""

import importlib
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
flow, sde, nft, phase = map(importlib.import_module, (
    "01_flow_policy", "02_sde_sampler", "03_step_loss", "results.ablations.phase"))
from envs import gap_world  # noqa: E402  (the lines above tell where)
from tools import flags  # noqa: E402
from tools.log import log_row  # noqa: E402

K = 4  # denoising steps


@torch.no_grad()
def go_on(policy, ctx, x, first, last, noise_level):
    """Samples from the points x (N, H, A) of step `first` on to those of step `last`."""
    times = sde.time_grid(K)
    for k in range(first, last):
        v = policy.velocity(x, times[k].expand(len(x)), ctx)
        mean, std = sde.transition(x, v, times[k], times[k + 1],
                                   sde.noise_scale(times, noise_level)[k])
        x = mean + std * torch.randn_like(x)
    return x


@torch.no_grad()
def residuals(policy, ctx, x_t, k, noise_level, target, draws):
    """Of two continuations that share x_next, `draws` times from each x_t (N, H, A): two tensors
    (N, draws, H * A)."""
    times, N = sde.time_grid(K), len(x_t)
    x_t, ctx = x_t.repeat_interleave(draws, 0), ctx.repeat_interleave(draws, 0)
    v = policy.velocity(x_t, times[k].expand(len(x_t)), ctx)
    mean, _ = sde.transition(x_t, v, times[k], times[k + 1],
                             sde.noise_scale(times, noise_level)[k])
    x_next = go_on(policy, ctx, x_t, k, k + 1, noise_level)
    if target == "next":
        pair = [x_next - mean] * 2
    else:
        pair = [go_on(policy, ctx, x_next, k + 1, K, noise_level) - (x_t - times[k] * v)
                for _ in range(2)]
    return [e.view(N, draws, -1) for e in pair]


def shares(policy, ctx, x_t, k, noise_level, target, draws=300):
    """(systematic, own, later): what part of the residual's energy each is, over all the x_t."""
    a, b = residuals(policy, ctx, x_t, k, noise_level, target, draws)
    each = (a + b) / 2                                                       # (N, draws, H * A)
    mean, unbiased = each.mean(1, keepdim=True), draws / (draws - 1)
    energy = (a.pow(2) + b.pow(2)).sum() / 2 / draws
    own = ((a - mean) * (b - mean)).sum() / draws * unbiased
    # a mean of so many draws is off by Var / draws
    systematic = mean.pow(2).sum() - (each - mean).pow(2).sum() / draws * unbiased / draws
    return [float(part / energy) for part in (systematic, own, energy - systematic - own)]


def pull(policy, noise_level, starts, episodes=64, draws=40):
    """For each start, from `episodes` episodes: its share of failures (starts,), and how far the
    labels pull along the systematic part of the endpoint's residual, (starts, K)."""
    seeds = np.repeat(starts, episodes)
    success, rows = gap_world.GapWorld().play(nft.explore(policy, K, noise_level), seeds)
    first = np.unique(rows["episode"].numpy(), return_index=True)[1]          # each first chunk
    rows = flow.take(rows, torch.from_numpy(first))
    ctx, y, times = policy.encode(rows), torch.as_tensor(success).float() * 2 - 1, sde.time_grid(K)
    pulls = []
    for k in range(K):
        x_t = rows["x"][:, k]
        a, b = residuals(policy, ctx, x_t, k, noise_level, "endpoint", draws)
        half, other = ((a + b)[:, i::2].mean(1) / 2 for i in (0, 1))         # (episodes, H * A)
        e = (rows["x"][:, -1] - (x_t - times[k] * rows["v"][:, k])).flatten(1)
        # the product of two independent means has no draws' noise in it, a square would
        along, length = y * (e * (half + other) / 2).sum(1), (half * other).sum(1)
        pulls.append(along.view(-1, episodes).sum(1) / length.view(-1, episodes).sum(1))
    return 1 - success.reshape(-1, episodes).mean(1), torch.stack(pulls, 1).numpy()


def crossing(failures, pulls):
    """The share of failures at which the straight line through the points (starts,) crosses 0."""
    slope, at_zero = np.polyfit(failures, pulls, 1)
    return -at_zero / slope


def main():
    parser, start = flags.Parser(__doc__), time.time()
    parser.add_argument("--seeds", type=flags.positive_int, default=8, help="clones of 01")
    parser.add_argument("--starts", type=flags.positive_int, default=64, help="test starts of each")
    parser.add_argument("--out", type=Path, default="results/mechanism", help="folder of the csv")
    args = parser.parse_args()
    parser.make_folder("--out", args.out)
    torch.set_num_threads(1)
    (args.out / "mechanism.csv").unlink(missing_ok=True)
    starts = gap_world.episode_seeds("test", args.starts)
    obs = gap_world.GapWorld().reset(starts)
    for seed in tqdm(range(args.seeds), desc="clones", disable=None):
        policy = flow.toy_policy(seed)
        torch.manual_seed(seed)
        for noise_level in phase.NOISE_LEVELS:
            path, ctx = sde.sde_sample(policy, obs, K, noise_level)[1], policy.encode(obs)
            failures, pulls = pull(policy, noise_level, starts)
            for k in range(K):
                for target in nft.TARGETS:
                    parts = shares(policy, ctx, path.x[:, k], k, noise_level, target)
                    row = {"seed": seed, "noise_level": noise_level, "step": k, "target": target,
                           **dict(zip(("systematic", "own", "later"), parts)),
                           "failures": float(failures.mean()), "pull": "", "crossing": ""}
                    if target == "endpoint" and k < K - 1:  # later hardly anything is systematic
                        row |= {"pull": float(pulls[:, k].mean()),
                                "crossing": float(crossing(failures, pulls[:, k]))}
                    log_row(args.out / "mechanism.csv", row)
    print(f"RESULT saved={args.out}/mechanism.csv seconds={time.time() - start:.0f}")


if __name__ == "__main__":
    main()
