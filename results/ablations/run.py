"""Every ablation of the paper on the toy world: what changes when one choice of 03 is another?

A variant is a small function in the place of one of 03's, or another number. Each is tuned on four
seeds, then played on eight others: see results/common.py, which also goes on after Ctrl-C. A seed
is a clone and a run from it; both kinds are scored on the same 1,000 test starts. The paper's world
is LIBERO, ours a point robot: compare the order within a figure, not the numbers.

What is not varied has the paper's values (BASE below), whatever the defaults of 03 are: noise 0.2,
an old policy that slows down from 0.1 to 0.995. The learning rate is tuned.

--phase asks the title's question instead: does wider noise need the finer target? Next step, its
mean and endpoint, each in six widths of noise and each tuned for every width.

Why ranking and weighted MSE tie: with e = x_next - mean(v_old), d = beta * (the mean's shift from
v_old to v_theta) and var the step's variance (var_eps left out),

    weighted = r E_pos + (1 - r) E_neg = (|e|^2 + |d|^2 - 2 y <d, e>) / var,      r = (1 + y) / 2
    ranking  = softplus(-2 y <d, e> / var) = ln 2 - y <d, e> / var + <d, e>^2 / (2 var^2) + ...

e is the step's noise, N(0, var I), so the mean of <d, e>^2 is var |d|^2. To second order in delta,
averaged over the step's noise, weighted = 2 x ranking + a constant: the penalty |d|^2 that the
weighted MSE shows openly, ranking has in its curvature. (Terms odd in delta: exactly 2 x, at any
delta.) Adam forgets the factor.

Run:     python results/ablations/run.py               (368 runs, about 10 s each on one core)
         python results/ablations/run.py --phase       (576 runs)
         python results/ablations/run.py --robot       (18 runs of 05, 3 minutes each on two cores)
         python results/ablations/run.py default loss-weighted --seeds 3 --lr 3e-4
         python results/ablations/run.py --list        (the names, with the paper's numbers)
Saves:   results/ablations/{ablations.csv, ablations_tuning.csv, ablations.png}, or
         {phase.csv, phase_tuning.csv}, or phase_robot.csv; and verdicts.csv, from all of them
"""

import argparse
import contextlib
import copy
import functools
import importlib
import io
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
flow, sde, nft, common = map(importlib.import_module, (
    "01_flow_policy", "02_sde_sampler", "03_step_loss", "results.common"))
from envs import gap_world  # noqa: E402  (the lines above tell where)
from tools import flags  # noqa: E402
from tools.log import log_row  # noqa: E402

# ------------------------------------------------------------------------------------------------
# Other rollouts, in the place of 03's `explore`


def explore_uncorrected(policy, num_steps, noise_level):
    """The same noise around the Euler step: wider, and it loses the ODE's marginals."""
    def act(obs):
        x_0, path = sde.sde_sample(policy, obs, num_steps, noise_level, corrected=False)
        return policy.denormalise(x_0), path._asdict()
    return act


def explore_ode(policy, num_steps, noise_level):
    """No noise on the way, so no step to learn from: x_t are fresh noisings of the x_0 that the ODE
    found, one at every t_k, with the velocity there (DiffusionNFT). No x_next follows from them."""
    @torch.no_grad()
    def act(obs):
        x_0, ctx = flow.ode_sample(policy, obs, num_steps), policy.encode(obs)    # (B, H, A)
        times = sde.time_grid(num_steps)
        t = times[:-1, None, None]                                                # (K, 1, 1)
        # x_t = (1 - t) x_0 + t x_1,   an x_1 for each t_k
        x_1 = torch.randn(len(x_0), num_steps, *x_0.shape[1:])
        x_t = (1 - t) * x_0[:, None] + t * x_1                                    # (B, K, H, A)
        v = [policy.velocity(x_t[:, k], times[k].expand(len(x_0)), ctx) for k in range(num_steps)]
        path = {"x": torch.cat([x_t, x_0[:, None]], 1), "v": torch.stack(v, 1),
                "sigma": sde.noise_scale(times, noise_level).expand(len(x_0), num_steps)}
        return policy.denormalise(x_0), path
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


def all_steps(policy, batch):
    """What `recorded_steps` of 03 gives, for all K steps of each row: b * K, row after row."""
    (rows, K), ctx = batch["v"].shape[:2], policy.encode(batch)   # each row is encoded once
    each = [nft.recorded_steps(policy, {**batch, "k": torch.full((rows,), k)}, ctx)
            for k in range(K)]
    return {name: torch.stack([one[name] for one in each], 1).flatten(0, 1) for name in each[0]}


def update_all_steps(policy, optimizer, batch, *, target, loss, epochs=4, minibatch=512,
                     grad_clip=1.0, **loss_options):
    """`update` of 03 on all K steps of a row at once instead of one -> mean info."""
    infos = []
    for _ in range(epochs):
        for rows in torch.randperm(len(batch["y"])).split(minibatch):
            steps = all_steps(policy, flow.take(batch, rows))
            x_next, x_0 = steps.pop("x_next"), steps.pop("x_0")
            value, info = loss(**steps, target=x_next if target == "next" else x_0, **loss_options)
            info["grad_norm"] = nft.optimise(policy, optimizer, value, grad_clip)
            infos.append(info)
    return nft.mean_info(infos)


def centred(y, episode):
    """Labels of rows minus the mean label of the episodes, REINFORCE's baseline: (rows,)."""
    each = torch.zeros(int(episode.max()) + 1)
    each[episode] = y
    return y - each.mean()


# ------------------------------------------------------------------------------------------------
# The variants. Each is 03 with the settings of BASE but for what stands here.

BASE = {"target": "next", "rollout": "sde", "loss": "ranking", "all_steps": False, "centred": False,
        "group_size": 1, "noise_level": 0.2, "num_steps": 4, "beta": 1.0, "max_drift": 0.5,
        "dpo_beta": 1.0, "ema": [0.1, 0.995]}
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
# The title as a picture: --phase plays every target in every width of noise
TARGETS, NOISE_LEVELS = list(ERRORS), (0.05, 0.1, 0.2, 0.3, 0.5, 0.8)
EMAS = ("0.1 0.1", "0.1 0.995", "0.9 0.9", "0.9 0.995")   # START END, as --ema of 03 takes them
TEST_EPISODES = 1000
ROBOT = {"noise_levels": (0.1, 0.3, 0.8), "seeds": 3, "ema": "0.1 0.5"}   # 05's defaults else


def settings(job):
    """A job -> all that `train` needs."""
    args = argparse.Namespace(**{**BASE, **VARIANTS[job.get("variant", "default")], **job})
    if isinstance(args.ema, str):
        args.ema = [float(part) for part in args.ema.split()]
    return args


def train(args):
    """03's `train_toy` with the variant's parts -> success of SFT and of the trained policy."""
    sft, world = flow.toy_policy(args.seed), gap_world.GapWorld()
    torch.manual_seed(args.seed)
    policy, old = copy.deepcopy(sft), copy.deepcopy(sft)  # policy learns, old acts
    optimizer = torch.optim.Adam(policy.parameters(), lr=args.lr)
    act = ROLLOUTS[args.rollout](old, args.num_steps, args.noise_level)
    error = (UNCORRECTED if args.rollout == "uncorrected" else ERRORS)[args.target]
    update = update_all_steps if args.all_steps else nft.update
    for iteration in range(args.iterations):
        starts = gap_world.episode_seeds("train", args.episodes // args.group_size, args.seed,
                                         iteration)
        success, batch = world.play(act, np.repeat(starts, args.group_size))
        batch["k"] = torch.randint(args.num_steps, (len(batch["x"]),))
        y = nft.labels(success, batch["episode"], args.group_size)
        batch["y"] = centred(y, batch["episode"]) if args.centred else y
        update(policy, optimizer, batch, target="next" if args.target == "next" else "endpoint",
               loss=LOSSES[args.loss], error=error, beta=args.beta, max_drift=args.max_drift,
               dpo_beta=args.dpo_beta)
        nft.ema_update(old, policy, nft.ema_decay(iteration, args.iterations, *args.ema))
    test = gap_world.episode_seeds("test", TEST_EPISODES)
    return [flow.evaluate(p, world, test, args.num_steps).mean() for p in (sft, policy)]


def run(job):
    """A job -> the rest of its row. It may be in a worker process, so it prints nothing."""
    args, start = settings(job), time.time()
    with contextlib.redirect_stdout(io.StringIO()):
        sft, after = train(args)
    what = job.get("variant") or f"--phase --targets {args.target} --ema '{job['ema']}'"
    return {"sft": sft, "after": after, "test_episodes": TEST_EPISODES,
            "seconds": round(time.time() - start), **common.origin(
                f"results/ablations/run.py {what} --seeds 1 --first-seed {args.seed} "
                f"--lr {args.lr:g} --iterations {args.iterations} --episodes {args.episodes} "
                f"--noise-level{'s' * ('variant' not in job)} {args.noise_level:g}")}


def run_robot(job):
    """The same question on PickCube: 05 from the clone of this seed, 12 iterations, 400 test
    episodes of the last policy. It takes all cores: one run at a time."""
    folder, start = f"runs/phase_robot/seed{job['seed']}", time.time()
    rest = f"--seed {job['seed']} --eval-every 100 --eval-episodes 8"
    if not Path(folder, "sft.pt").exists():
        common.call(f"05_train_maniskill.py {rest} --iterations 0 --test-episodes 8 --out {folder}")
    with tempfile.TemporaryDirectory() as out:
        command = (f"05_train_maniskill.py {rest} --iterations 12 --sft {folder}/sft.pt --target "
                   f"{job['target']} --lr {job['lr']:g} --noise-level {job['noise_level']:g} "
                   f"--ema {job['ema']}")
        told = common.result_line(common.call(f"{command} --out {out}"))
    return {"sft": told["sft"], "after": told["stepnft"], "test_episodes": 400,
            "seconds": round(time.time() - start), **common.origin(command),
            "hardware": f"{os.cpu_count()} CPU cores"}


# ------------------------------------------------------------------------------------------------
# Tables and the figure


def by_seed(rows, **wanted):
    """{seed: success} of the rows with these entries."""
    return {row["seed"]: float(row["after"]) for row in rows
            if all(row[name] == common.text(value) for name, value in wanted.items())}


def mean_of(rows):
    """Rows of one variant, a seed each -> what every line of a table says of it."""
    after = [float(row["after"]) for row in rows]
    return {"lr": rows[0]["lr"], "seeds": len(after), "after": np.mean(after),
            "sft": np.mean([float(row["sft"]) for row in rows]),
            "half": common.half_interval(after)}


def summarise(rows):
    """Rows of runs, the variants at the learning rate they were tuned to -> a dict for each line.

    gain: difference to the first variant of the figure, paired by seed, with its 95 % t-interval
    low, high; half: that of the mean. verdict: does the interval say what the paper's numbers say?
    """
    table = []
    for figure, variants in FIGURES.items():
        first = next(iter(variants))
        shown = {row["variant"] for row in table}
        names = [name for name in variants if by_seed(rows, variant=name)]
        for name in names if set(names) - shown else []:  # not the comparison's basis alone
            after, base = (by_seed(rows, variant=v) for v in (name, first))
            own = {s: v for s, v in after.items() if s in base} if name != first else {}
            gain, low, high = common.difference(own, base) if own else [np.nan] * 3
            said = None if variants[name] is None else variants[name] - variants[first]
            verdict = "" if name == first or not said or np.isnan(low) else (
                "not shown" if low <= 0 <= high else "shown" if low * said > 0 else "contradicted")
            table.append({"figure": figure, "variant": name, "paper": variants[name],
                          "values": list(after.values()), "verdict": verdict,
                          "gain": gain, "low": low, "high": high,
                          **mean_of([row for row in rows if row["variant"] == name])})
    return table


def number(value, form=".3f"):
    return "-" if value is None or np.isnan(value) else f"{value:{form}}"


def show(table):
    """The table as text; gain is the paired difference to the first line of a figure."""
    print(f"{'figure':<14} {'variant':<24} {'lr':>6} {'seeds':>5} {'SFT':>6} {'after':>6} "
          f"{'95 %':>6} {'gain':>7} {'low':>7} {'high':>7} {'paper':>6} verdict")
    for row in table:
        rates = " ".join(f"{number(row[name]):>6}" for name in ("sft", "after", "half"))
        gains = " ".join(f"{number(row[name], '+.3f'):>7}" for name in ("gain", "low", "high"))
        print(f"{row['figure']:<14} {row['variant']:<24} {row['lr']:>6} {row['seeds']:5d} {rates} "
              f"{gains} {number(row['paper']):>6} {row['verdict']}")


def phase_table(rows):
    """Rows of --phase -> a dict for each noise level and target: settings, mean and half of the
    95 % interval; gain, low, high: next step minus this target, paired by seed."""
    table = []
    for noise in sorted({row["noise_level"] for row in rows}, key=float):
        base = by_seed(rows, noise_level=noise, target="next")
        for target in TARGETS:
            own = [r for r in rows if (r["noise_level"], r["target"]) == (noise, target)]
            if not own:
                continue
            gain, low, high = (common.difference(base, by_seed(own))
                               if target != "next" and base else [np.nan] * 3)
            table.append({"noise_level": noise, "target": target, "ema": own[0]["ema"],
                          "gain": gain, "low": low, "high": high, **mean_of(own)})
    return table


def show_phase(table):
    print(f"{'noise':>5} {'target':<10} {'EMA':<10} {'lr':>6} {'seeds':>5} {'SFT':>6} {'after':>6} "
          f"{'95 %':>6}   next step minus this, paired")
    for row in table:
        rates = " ".join(f"{number(row[name]):>6}" for name in ("sft", "after", "half"))
        gains = " ".join(f"{number(row[name], '+.3f'):>7}" for name in ("gain", "low", "high"))
        print(f"{row['noise_level']:>5} {row['target']:<10} {row['ema']:<10} {row['lr']:>6} "
              f"{row['seeds']:5d} {rates} {gains}")


def verdicts(folder):
    """Every paired difference of the csv files in a folder, in success -> verdicts.csv."""
    found = [(f"{name}: next - {row['target']}, noise {row['noise_level']}", row)
             for name in ("phase", "phase_robot")
             for row in phase_table(common.read(folder / f"{name}.csv"))]
    found += [(f"{row['figure']}: {row['variant']} - {next(iter(FIGURES[row['figure']]))}", row)
              for row in summarise(common.read(folder / "ablations.csv"))]
    (folder / "verdicts.csv").unlink(missing_ok=True)
    for comparison, row in found:
        if not np.isnan(row["gain"]):
            log_row(folder / "verdicts.csv", {
                "comparison": comparison, "seeds": row["seeds"], "mean": float(row["gain"]),
                "low": float(row["low"]), "high": float(row["high"]),
                "verdict": row.get("verdict", "")})


def draw(table, path):
    """A panel for each figure: bars with 95 % intervals, a dot for each seed, the paper's value."""
    from matplotlib.figure import Figure
    figures = list(dict.fromkeys(row["figure"] for row in table))
    down = -(-len(figures) // 3)
    fig = Figure(figsize=(15, 2.6 * down + 0.5), layout="constrained")
    axes = fig.subplots(down, 3, squeeze=False)
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


# ------------------------------------------------------------------------------------------------
# Flags and main


def variant(text):
    """The type of a name: one of VARIANTS."""
    if text not in VARIANTS:
        raise argparse.ArgumentTypeError(f"no variant {text}; there are {', '.join(VARIANTS)}")
    return text


def parse_args():
    parser = flags.Parser(__doc__)
    add, positive = parser.add_argument, flags.positive_float
    add("names", nargs="*", type=variant, default=list(VARIANTS), metavar="NAME", help="variants")
    add("--list", action="store_true", help="print names and the paper's numbers, and stop")
    add("--phase", action="store_true",
        help="instead of variants: every target in every width of noise, each tuned")
    add("--robot", action="store_true", help="instead: next step and endpoint on PickCube")
    add("--seeds", type=flags.positive_int, default=8, help="how many seeds")
    add("--first-seed", type=flags.natural, default=0, help="seed of SFT, rollouts and updates")
    add("--lr", type=positive, nargs="+", help="Adam's learning rates to tune with; one: no tuning "
        "(default 3e-4 1e-3, with --phase also 1e-4)")
    add("--ema", nargs="+", default=EMAS, choices=EMAS, help="--phase: old policies to tune with")
    add("--targets", nargs="+", default=TARGETS, choices=TARGETS, help="--phase: which of them")
    add("--noise-levels", type=positive, nargs="+", default=NOISE_LEVELS, help="--phase: widths")
    add("--noise-level", type=positive, default=BASE["noise_level"],
        help="a, where none is ablated")
    add("--iterations", type=flags.positive_int, default=160, help="RL iterations")
    add("--episodes", type=flags.positive_int, default=512, help="episodes per iteration")
    add("--jobs", type=flags.positive_int, default=common.cores(),
        help="runs at a time, one core each")
    add("--out", type=Path, default="results/ablations", help="folder of tables and figure")
    args = parser.parse_args()
    for name in [] if args.phase else args.names:
        group = VARIANTS[name].get("group_size", 1)
        if args.episodes % group:
            parser.error(f"--episodes {args.episodes} is no multiple of {group}, the episodes from "
                         f"one start in {name}")
    if args.first_seed + args.seeds > common.ROUNDS[0][0]:
        parser.error(f"--seeds {args.seeds}: seeds from {common.ROUNDS[0][0]} on are for tuning")
    args.lr = args.lr or [1e-4, 3e-4, 1e-3][not args.phase:]
    if not args.list:
        parser.make_folder("--out", args.out)
    return args


def main():
    args, start = parse_args(), time.time()
    if args.list:
        for figure, variants in FIGURES.items():
            for name, paper in variants.items():
                print(f"{figure:<14} {name:<24} {'-' if paper is None else paper}")
        return
    if args.robot:
        jobs = [{"target": target, "noise_level": a, "ema": ROBOT["ema"], "lr": 3e-4, "seed": seed}
                for seed in range(ROBOT["seeds"]) for a in ROBOT["noise_levels"]
                for target in nft.TARGETS]
        common.collect(jobs, run_robot, args.out / "phase_robot.csv")
        show_phase(phase_table(common.rows_of(jobs, args.out / "phase_robot.csv")))
        verdicts(args.out)
        return print(f"RESULT runs={len(jobs)} saved={args.out}/phase_robot.csv "
                     f"seconds={time.time() - start:.0f}")
    size = {"iterations": args.iterations, "episodes": args.episodes}
    if args.phase:
        compared = [{"target": target, "noise_level": a, **size}
                for a in args.noise_levels for target in args.targets]
        grid = [{"ema": ema, "lr": lr} for ema in args.ema for lr in args.lr]
    else:
        compared = [{"variant": name, **size, "noise_level": VARIANTS[name].get(
            "noise_level", args.noise_level)} for name in args.names]
        grid = [{"lr": lr} for lr in args.lr]
    torch.set_num_threads(1)  # on nets this small, threads only wait for each other
    name, seeds = "phase" if args.phase else "ablations", range(
        args.first_seed, args.first_seed + args.seeds)
    for seed in [*seeds, *(s for played in common.ROUNDS for s in played if len(grid) > 1)]:
        flow.toy_policy(seed)  # SFT once, before several workers need it
    best = grid * len(compared) if len(grid) == 1 else common.tune(
        compared, grid, run, args.out / f"{name}_tuning.csv", args.jobs)
    jobs = [{**one, **setting, "seed": seed} for seed in seeds
            for one, setting in zip(compared, best)]
    common.collect(jobs, run, args.out / f"{name}.csv", args.jobs)
    rows = common.rows_of(jobs, args.out / f"{name}.csv")
    if args.phase:
        show_phase(phase_table(rows))
    else:
        show(summarise(rows))
        draw(summarise(rows), args.out / "ablations.png")
    verdicts(args.out)
    print(f"RESULT variants={len(compared)} runs={len(rows)} saved={args.out}/{name}.csv "
          f"seconds={time.time() - start:.0f}")


if __name__ == "__main__":
    main()
