"""Every ablation of the paper on the toy world: what changes when one choice of 03 is another?

A variant is a small function in the place of one of 03's, or another number. Seeds run in parallel,
each writes its row of the csv as it comes, and rows that are there are not repeated: after Ctrl-C
the same command goes on. The paper's world is LIBERO, ours a point robot: compare the order within
a figure, not the numbers.

Why ranking and weighted MSE tie: with e = x_next - mean(v_old), d = beta * (the mean's shift from
v_old to v_theta) and var the step's variance (var_eps left out),

    weighted = r E_pos + (1 - r) E_neg = (|e|^2 + |d|^2 - 2 y <d, e>) / var,      r = (1 + y) / 2
    ranking  = softplus(-2 y <d, e> / var) = ln 2 - y <d, e> / var + <d, e>^2 / (2 var^2) + ...

e is the step's noise, N(0, var I), so the mean of <d, e>^2 is var |d|^2. To second order in delta,
averaged over the step's noise, weighted = 2 x ranking + a constant: the penalty |d|^2 that the
weighted MSE shows openly, ranking has in its curvature. (Terms odd in delta: exactly 2 x, at any
delta.) Adam forgets the factor.

Run:     python results/ablations.py               (184 runs, about 15 s each on one core)
         python results/ablations.py default loss-weighted --seeds 3 --lr 3e-4
         python results/ablations.py --list        (the names, with the paper's numbers)
Saves:   results/ablations/{ablations.csv, ablations.png}
"""

import argparse
import contextlib
import copy
import csv
import functools
import importlib
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from scipy import stats
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
flow, sde, nft = map(importlib.import_module, ("01_flow_policy", "02_sde_sampler", "03_step_loss"))

# ------------------------------------------------------------------------------------------------
# Other rollouts, in the place of 03's `explore`


def explore_uncorrected(policy, num_steps, noise_level):
    """The same noise around the Euler step: wider, and it loses the ODE's marginals."""
    def act(obs):
        obs = flow.to_device(obs, policy)
        x_0, path = sde.sde_sample(policy, obs, num_steps, noise_level, corrected=False)
        return policy.denormalise(x_0).cpu(), {k: z.cpu() for k, z in path._asdict().items()}
    return act


def explore_ode(policy, num_steps, noise_level):
    """No noise on the way, so no step to learn from: x_t are fresh noisings of the x_0 that the ODE
    found, one at every t_k, with the velocity there (DiffusionNFT). No x_next follows from them."""
    @torch.no_grad()
    def act(obs):
        obs = flow.to_device(obs, policy)
        x_0, ctx = flow.ode_sample(policy, obs, num_steps), policy.encode(obs)    # (B, H, A)
        times = sde.time_grid(num_steps).to(x_0.device)
        t = times[:-1, None, None]                                                # (K, 1, 1)
        # x_t = (1 - t) x_0 + t x_1,   an x_1 for each t_k
        x_1 = torch.randn((len(x_0), num_steps, *x_0.shape[1:]), device=x_0.device)
        x_t = (1 - t) * x_0[:, None] + t * x_1                                    # (B, K, H, A)
        v = [policy.velocity(x_t[:, k], times[k].expand(len(x_0)), ctx) for k in range(num_steps)]
        path = {"x": torch.cat([x_t, x_0[:, None]], 1), "v": torch.stack(v, 1),
                "sigma": sde.noise_scale(times, noise_level).expand(len(x_0), num_steps)}
        return policy.denormalise(x_0).cpu(), {k: z.cpu() for k, z in path.items()}
    return act


ROLLOUTS = {"sde": nft.explore, "uncorrected": explore_uncorrected, "ode": explore_ode}

# ------------------------------------------------------------------------------------------------
# Other targets, in the place of 03's `step_error`, and other losses


def uncorrected_error(v, x_t, x_next, t_cur, t_next, sigma, var_eps=1e-4):
    """E(v) of an uncorrected step, judged by its own mean, the Euler step: (B, H)."""
    t_cur, t_next, sigma = (z[:, None, None] for z in (t_cur, t_next, sigma))     # (B, 1, 1)
    mean, std = sde.transition(x_t, v, t_cur, t_next, sigma, corrected=False)
    return ((x_next - mean).pow(2) / (std**2 + var_eps)).sum(-1)


def next_mean_error(v, x_t, x_0, t_cur, t_next, sigma, corrected=True):
    """E(v) against the mean that x_next would have if its endpoint x_0 were known: (B, H)."""
    t, after, scale = (z[:, None, None] for z in (t_cur, t_next, sigma))          # (B, 1, 1)
    # the velocity that leads from x_t to x_0:   x_0 = x_t - t v   <=>   v = (x_t - x_0) / t
    x_next, _ = sde.transition(x_t, (x_t - x_0) / t, t, after, scale, corrected)
    error = nft.step_error if corrected else uncorrected_error
    return error(v, x_t, x_next, t_cur, t_next, sigma)


ERRORS = {"next": nft.step_error, "next-mean": next_mean_error, "endpoint": nft.endpoint_error}
UNCORRECTED = {"next": uncorrected_error, "endpoint": nft.endpoint_error,
               "next-mean": functools.partial(next_mean_error, corrected=False)}


def weighted_loss(v_theta, v_old, x_t, target, t_cur, t_next, sigma, y, mask, *, error, beta=1.0,
                  max_drift=0.5, dpo_beta=None, kl_weight=1e-4):
    """Weighted MSE, the form of DiffusionNFT -> (scalar, info). It has no slope dpo_beta."""
    v_old, r = v_old.detach(), (1 + y[:, None]) / 2
    E_pos, E_neg = (error(v, x_t, target, t_cur, t_next, sigma)
                    for v in nft.mirror(v_theta, v_old, beta, max_drift))
    # L = r E_pos + (1 - r) E_neg,   r = (1 + y) / 2
    loss, pull = (nft.executed_mean(values, mask.to(x_t.dtype)) for values in (
        r * E_pos + (1 - r) * E_neg, (v_theta - v_old).pow(2).mean(-1)))
    return loss + kl_weight * pull, {"loss": loss.detach()}


def one_outcome_loss(sign, *, y, mask, **step):
    """The ranking loss of the successes (sign 1) or of the failures (-1) alone: mean over these."""
    return nft.step_nft_loss(y=y, mask=mask & (sign * y > 0)[:, None], **step)


LOSSES = {"ranking": nft.step_nft_loss, "weighted": weighted_loss,
          "positive": functools.partial(one_outcome_loss, 1),
          "negative": functools.partial(one_outcome_loss, -1)}


def centred(y, episode):
    """Labels of rows minus the mean label of the episodes, REINFORCE's baseline: (rows,)."""
    each = torch.zeros(int(episode.max()) + 1)
    each[episode] = y
    return y - each.mean()


# ------------------------------------------------------------------------------------------------
# The variants. Each is 03 but for what stands here.

SLOW = [0.9, 0.995]
VARIANTS = {
    "default": {},
    "target-next-mean": {"target": "next-mean"},
    "target-endpoint": {"target": "endpoint"},
    "target-endpoint-slow": {"target": "endpoint", "ema": SLOW},
    "rollout-uncorrected": {"rollout": "uncorrected", "target": "endpoint"},
    "rollout-ode": {"rollout": "ode", "target": "endpoint"},
    "rollout-uncorrected-mean": {"rollout": "uncorrected", "target": "next-mean"},
    "rollout-ode-mean": {"rollout": "ode", "target": "next-mean"},
    "rollout-uncorrected-next": {"rollout": "uncorrected"},
    "loss-weighted": {"loss": "weighted"},
    "loss-positive": {"loss": "positive"},
    "loss-negative": {"loss": "negative"},
    **{f"noise-{a}": {"noise_level": a} for a in (0.05, 0.1, 0.3, 0.5)},
    **{f"beta-{beta:g}": {"beta": beta} for beta in (0.1, 5.0)},
    "ema-0.1": {"ema": [0.1, 0.1]},
    "ema-0.9": {"ema": [0.9, 0.9]},
    "all-steps": {"all_steps": True},
    "labels-grouped": {"group_size": 8},
    "labels-centred": {"centred": True},
}
# Figure -> variant -> the paper's success at step 200 (LIBERO-Object task 0, read off its plots;
# None: not in the paper). The first of a figure is what the others are compared with. The paper's
# endpoint has 0.83 with a slow old policy, 0 with a fast one; all our rollouts have the fast one.
FIGURES = {
    "target": {"default": 0.945, "target-next-mean": 0.85, "target-endpoint": 0.0,
               "target-endpoint-slow": 0.83},
    "rollout": {"target-endpoint": 0.83, "rollout-uncorrected": 0.53, "rollout-ode": 0.76},
    "rollout (mean)": dict.fromkeys(
        ("target-next-mean", "rollout-uncorrected-mean", "rollout-ode-mean")),
    "rollout (next)": dict.fromkeys(("default", "rollout-uncorrected-next")),
    "loss": {"default": 0.945, "loss-weighted": 0.91, "loss-positive": 0.90, "loss-negative": 0.81},
    "noise level": {"default": 0.945, "noise-0.05": 0.92, "noise-0.1": 0.90, "noise-0.3": 0.79,
                    "noise-0.5": 0.80},
    "beta": {"default": 0.945, "beta-0.1": 0.985, "beta-5": 0.79},
    "EMA": dict.fromkeys(("default", "ema-0.1", "ema-0.9")),
    "beyond": dict.fromkeys(("default", "all-steps", "labels-grouped", "labels-centred")),
}
TEST_EPISODES = 1000
COLUMNS = ("figure variant target loss rollout ema lr noise_level seed iterations episodes sft "
           "after test_episodes commit command hardware seconds").split()
KEY = ("variant", "seed", "lr", "iterations", "episodes", "noise_level")   # names a run in the csv


def make_jobs(names, seeds, lr, iterations, episodes, noise_level):
    """The runs of some variants: dicts with the entries of KEY. A variant may set its noise."""
    return [dict(variant=name, seed=seed, lr=lr, iterations=iterations, episodes=episodes,
                 noise_level=VARIANTS[name].get("noise_level", noise_level))
            for seed in seeds for name in names]


def settings(job):
    """A job -> all that `train` needs: the flags of 03, and four choices that 03 does not have."""
    parser = flow.Parser(__doc__)
    nft.add_method_flags(parser)
    return argparse.Namespace(**{**vars(parser.parse_args([])), "rollout": "sde", "loss": "ranking",
                                 "all_steps": False, "centred": False,
                                 **VARIANTS[job["variant"]], **job})


def train(args):
    """03's `train_toy` with the variant's parts -> success of SFT and of the trained policy."""
    sft, world = flow.toy_policy(args.seed), flow.GapWorld()
    torch.manual_seed(args.seed)
    policy, old = copy.deepcopy(sft), copy.deepcopy(sft)  # policy learns, old acts
    optimizer = torch.optim.Adam(policy.parameters(), lr=args.lr)
    act = ROLLOUTS[args.rollout](old, args.num_steps, args.noise_level)
    error = (UNCORRECTED if args.rollout == "uncorrected" else ERRORS)[args.target]
    for iteration in range(args.iterations):
        starts = flow.episode_seeds("train", args.episodes // args.group_size, args.seed, iteration)
        success, batch = world.play(act, np.repeat(starts, args.group_size))
        k = torch.randint(args.num_steps, (len(batch["x"]), 1))
        batch["k"] = torch.arange(args.num_steps).expand(len(k), -1) if args.all_steps else k
        y = nft.labels(success, batch["episode"], args.group_size)
        batch["y"] = centred(y, batch["episode"]) if args.centred else y
        nft.update(policy, optimizer, batch, target="next" if args.target == "next" else "endpoint",
                   loss=LOSSES[args.loss], error=error, beta=args.beta, max_drift=args.max_drift,
                   dpo_beta=args.dpo_beta)
        nft.ema_update(old, policy, nft.ema_decay(iteration, args.iterations, *args.ema))
    test = flow.episode_seeds("test", TEST_EPISODES)
    return [flow.evaluate(p, world, test, args.num_steps).mean() for p in (sft, policy)]


def run(job):
    """A job -> its row of the csv. It may be in a worker process, so it prints nothing."""
    args, start = settings(job), time.time()
    with contextlib.redirect_stdout(io.StringIO()):
        sft, after = train(args)
    command = (f"results/ablations.py {args.variant} --seeds 1 --first-seed {args.seed} "
               f"--lr {args.lr} --iterations {args.iterations} --episodes {args.episodes} "
               f"--noise-level {args.noise_level}")
    row = {**vars(args), "ema": "{} {}".format(*args.ema), "sft": sft, "after": after,
           "figure": next(f for f, variants in FIGURES.items() if args.variant in variants),
           "test_episodes": TEST_EPISODES, "commit": commit(), "command": command,
           "hardware": f"1 of {os.cpu_count()} CPU cores", "seconds": round(time.time() - start)}
    return {name: str(row[name]) for name in COLUMNS}


def commit():
    """The commit the numbers come from, -dirty where files differ from it; empty without git."""
    failed, text = subprocess.getstatusoutput(f"git -C '{ROOT}' describe --always --dirty")
    return "" if failed else text


# ------------------------------------------------------------------------------------------------
# Many runs: in parallel, one csv, a table, a figure


def key(row):
    """What names a run, of a job or of a row of the csv."""
    return (row["variant"], *(float(row[name]) for name in KEY[1:]))


def read(path):
    """The csv as a list of dicts; no file, no rows."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def calm():
    """A worker process: one thread, and Ctrl-C is its parent's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def collect(jobs, path, workers):
    """Runs the jobs that the csv does not have, and adds their rows to it as they come."""
    done = {key(row) for row in read(path)}
    todo = [job for job in jobs if key(job) not in done]
    try:
        for seed in {job["seed"]: 0 for job in todo}:
            flow.toy_policy(seed)  # SFT once, before several workers need it
        with contextlib.ExitStack() as stack:
            run_all = map
            if workers > 1 and len(todo) > 1:
                spawn = torch.multiprocessing.get_context("spawn")
                pool = stack.enter_context(spawn.Pool(min(workers, len(todo)), calm))
                run_all = pool.imap_unordered
            for row in tqdm(run_all(run, todo), total=len(todo), desc="runs", disable=None):
                nft.log_row(path, row)
    except KeyboardInterrupt:
        print(f"stopped: the same command goes on with {path}")


def half_interval(values):
    """Half of the 95 % t-interval of a mean; nan for a single value."""
    return stats.t.ppf(0.975, len(values) - 1) * stats.sem(values) if len(values) > 1 else np.nan


def summarise(rows):
    """Rows of runs that differ in variant and seed alone -> a dict for each line of the table.

    gain: difference to the first variant of the figure, paired by seed. half, gain_half: of the
    95 % t-intervals over seeds.
    """
    after, table = {name: {} for name in VARIANTS}, []
    for row in rows:
        after[row["variant"]][row["seed"]] = float(row["after"])
    sft = {row["seed"]: float(row["sft"]) for row in rows}
    for figure, variants in FIGURES.items():
        first, shown = next(iter(variants)), {row["variant"] for row in table}
        names = [name for name in variants if after[name]]
        for name in names if set(names) - shown else []:  # not the comparison's basis alone
            values = list(after[name].values())
            gains = [value - after[first][seed] for seed, value in after[name].items()
                     if name != first and seed in after[first]]
            table.append({"figure": figure, "variant": name, "seeds": len(values), "values": values,
                          "sft": np.mean([sft[seed] for seed in after[name]]),
                          "after": np.mean(values), "half": half_interval(values),
                          "gain": np.mean(gains) if gains else np.nan,
                          "gain_half": half_interval(gains), "paper": variants[name]})
    return table


def show(table):
    """The table as text; gain is the paired difference to the first line of a figure."""
    print(f"{'figure':<14} {'variant':<24} {'seeds':>5} {'SFT':>6} {'after':>6} {'95 %':>6} "
          f"{'gain':>6} {'95 %':>6} {'paper':>6}")
    for row in table:
        cells = [row[name] for name in ("sft", "after", "half", "gain", "gain_half", "paper")]
        print(f"{row['figure']:<14} {row['variant']:<24} {row['seeds']:5d}", *(
            f"{'-':>6}" if cell is None or np.isnan(cell) else f"{cell:6.3f}" for cell in cells))


def draw(table, path):
    """A panel for each figure: bars with 95 % intervals, a dot for each seed, the paper's value."""
    figures = list(dict.fromkeys(row["figure"] for row in table))
    down = -(-len(figures) // 3)
    fig, axes = flow.pyplot().subplots(down, 3, figsize=(15, 2.6 * down + 0.5), squeeze=False,
                                       layout="constrained")
    for ax, figure in zip(axes.flat, figures + [None] * 2):
        rows = [row for row in table if row["figure"] == figure]
        if not rows:
            ax.axis("off")
            continue
        for i, row in enumerate(rows):
            ax.barh(i, row["after"], xerr=np.nan_to_num(row["half"]), color="#56b4e9", capsize=3)
            ax.plot(row["values"], [i] * row["seeds"], "o", ms=3, color="#0072b2")
            ax.plot(np.nan if row["paper"] is None else row["paper"], i, "D", color="#d55e00")
        ax.axvline(rows[0]["sft"], color="0.4", ls="--", lw=1)
        ax.set(title=figure, xlim=(-0.02, 1.02), ylim=(len(rows) - 0.4, -0.6))
        ax.set_yticks(range(len(rows)), [row["variant"] for row in rows])
    fig.supxlabel("success of the ODE policy, wide starts, 95 % over seeds. Dots: seeds; dashed: "
                  "SFT; diamonds: the paper, LIBERO-Object task 0", fontsize=10)
    fig.savefig(path, dpi=120)


def variant(text):
    """The type of a name: one of VARIANTS."""
    if text not in VARIANTS:
        raise argparse.ArgumentTypeError(f"no variant {text}; there are {', '.join(VARIANTS)}")
    return text


def main():
    parser, start = flow.Parser(__doc__), time.time()
    add = parser.add_argument
    add("names", nargs="*", type=variant, default=list(VARIANTS), metavar="NAME", help="variants")
    add("--list", action="store_true", help="print names and the paper's numbers, and stop")
    add("--seeds", type=flow.positive_int, default=8, help="how many seeds")
    add("--first-seed", type=flow.natural, default=0, help="seed of SFT, rollouts and updates")
    add("--lr", type=flow.positive_float, default=1e-3, help="Adam's learning rate")
    add("--iterations", type=flow.positive_int, default=160, help="RL iterations")
    add("--episodes", type=flow.positive_int, default=512, help="episodes per iteration")
    add("--noise-level", type=flow.positive_float, default=0.2, help="a, where none is ablated")
    add("--jobs", type=flow.positive_int, default=len(os.sched_getaffinity(0)),
        help="runs at a time, one core each")
    add("--out", type=Path, default="results/ablations", help="folder of table and figure")
    args = parser.parse_args()
    if args.list:
        for figure, variants in FIGURES.items():
            for name, paper in variants.items():
                print(f"{figure:<14} {name:<24} {'-' if paper is None else paper}")
        return
    for name in args.names:
        group = VARIANTS[name].get("group_size", 1)
        if args.episodes % group:
            parser.error(f"--episodes {args.episodes} is no multiple of {group}, the episodes from "
                         f"one start in {name}")
    parser.make_folder("--out", args.out)
    torch.set_num_threads(1)  # on nets this small, threads only wait for each other
    path, seeds = args.out / "ablations.csv", range(args.first_seed, args.first_seed + args.seeds)
    size = args.lr, args.iterations, args.episodes, args.noise_level
    collect(make_jobs(args.names, seeds, *size), path, args.jobs)
    wanted = {key(job) for job in make_jobs(VARIANTS, seeds, *size)}  # rows of before, too
    rows = [row for row in read(path) if key(row) in wanted]
    if rows:
        table = summarise(rows)
        show(table)
        draw(table, args.out / "ablations.png")
        print(f"saved {path} and ablations.png")
    print(f"RESULT variants={len({row['variant'] for row in rows})} runs={len(rows)} "
          f"seconds={time.time() - start:.0f}")


if __name__ == "__main__":
    main()
