"""What a critic costs: pi-StepNFT, PPO and GRPO on PixelGap, in and out of distribution.

The paper: in distribution equal, out of it a critic is worse, because it overfits. Here all four
start from the same clone, play the same starts, 8 episodes from each, and pass at most as often
over the chunks, each at the settings that suit it. GRPO is PPO without the critic; ppo-action is
PPO with its noise on the executed chunk, none in the denoising steps; pi-StepNFT has another loss
and what goes with it, noise in all K steps of a chunk and an old policy that follows. A network may
memorise which of PixelGap's 64 textures has which gap, or look at the wall.

Each method is tuned for success in distribution alone (results/common.py). Then 12 seeds are tested
every 20 iterations. A method that is better in distribution is usually better out of it, too; so
two methods are compared where both are equally good in distribution: see `matched`, and the
statistic in results/pixel_gap/README.md, fixed before the run. Whether the critic overfits at all
is measured, too, also with 16 and 256 scenes.

Run:     python results/pixel_gap/run.py              (156 runs, a minute each on one core)
         python results/pixel_gap/run.py --seeds 3 --iterations 20 --out runs/pixel_gap
Saves:   results/pixel_gap/{tuning.csv, main.csv, dose.csv, verdicts.csv, pixel_gap.png}
"""

import contextlib
import copy
import importlib
import io
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
flow, nft, compare, common, statistic = map(importlib.import_module, (
    "01_flow_policy", "03_step_loss", "05_train_maniskill", "results.common",
    "results.pixel_gap.statistic"))
from envs import pixel_gap  # noqa: E402  (the lines above tell where)
from envs.gap_world import episode_seeds  # noqa: E402
from policies import load_policy  # noqa: E402
from tools import flags  # noqa: E402
from tools.log import log_row  # noqa: E402
from tools.run import random_stream  # noqa: E402

ALGOS = ("stepnft", "ppo", "grpo", "ppo-action")
CONDITIONS = dict(zip(("id", "textures", "gaps", "both", "starts"),
                      (changes for _, _, changes in pixel_gap.VARIANTS)))
SCENES, DOSES = statistic.SCENES, (16, 256)   # of the main run; fewer and more, beside it
TESTED = 500, 1000                     # episodes in each condition: while training, at the end
CLONES = "runs/pixel_gap"              # shared by all methods of a seed


def grid(algo):
    """Twelve settings: learning rate, noise (wider where one step of a chunk has it than where all
    have; on the action itself it is a standard deviation) and what holds the method back."""
    if algo == "stepnft":
        widths, stops = (0.2, 0.5), [{"ema": "0.1 0.5", "target_kl": ""},
                                     {"ema": "0.1 0.995", "target_kl": ""}]
    else:
        widths = (0.1, 0.3) if algo == "ppo-action" else (0.5, 1.0)
        stops = [{"ema": "", "target_kl": 0.02}, {"ema": "", "target_kl": 0.1}]
    return [{"lr": lr, "noise_level": noise, **stop} for lr in (1e-4, 3e-4, 1e-3)
            for noise in widths for stop in stops]


# ------------------------------------------------------------------------------------------------
# One run


def clone_of(seed, scenes):
    """The SFT policy's file, trained when missing."""
    folder = Path(CLONES) / f"scenes{scenes}_seed{seed}"
    if not (folder / "sft.pt").exists():
        args = compare.parse_args(["--task", "PixelGap", "--seed", str(seed), "--iterations", "0",
                                   "--scenes", str(scenes), "--out", str(folder),
                                   "--device", "cpu"])
        args.flags["script"] = "05_train_maniskill.py"  # which may test it
        compare.clone(args)
    return folder / "sft.pt"


def flags_of(job):
    """A job as the flags of 05."""
    given = {name.replace("_", "-"): common.text(value) for name, value in job.items()}
    return [part for name, value in given.items() if value
            for part in (f"--{name}", *value.split())]


def explorer(args, policy):
    """How 05 plays while it trains, as an `act`."""
    return compare.EXPLORE[args.algo](policy, args.num_steps, args.noise_level)


def train(args, sft, world, measure, make_critic=compare.Critic):
    """The loop of 05's `main`, with a measurement in place of its log -> the trained policy.

    measure(iteration, policy, critic, batch, success) is called for the clone, every --eval-every
    iterations and at the end; critic (None but for PPO) last learned from this rollout.
    """
    policy, old = copy.deepcopy(sft), copy.deepcopy(sft)  # policy learns, old acts
    optimizer, critic = torch.optim.Adam(policy.parameters(), lr=args.lr), None
    if args.algo.startswith("ppo"):
        torch.manual_seed(args.seed)
        critic = make_critic(sft.context_dim)
        optimizer.add_param_group({"params": critic.parameters(), "lr": critic.lr})
    measure(0, sft, critic, None, None)
    for i in range(args.iterations):
        random_stream(args.seed, i)
        starts = episode_seeds("train", args.episodes // args.group_size, args.seed, i)
        success, batch = world.play(explorer(args, old), np.repeat(starts, args.group_size))
        optimizer.param_groups[0]["lr"] = args.lr * (1 - i / args.iterations)  # smaller steps late
        if args.algo == "stepnft":
            batch["y"] = nft.labels(success, batch["episode"], args.group_size)
            compare.update(policy, optimizer, batch, args)
            alpha = nft.ema_decay(i, args.iterations, *args.ema)
        else:
            batch["y"] = compare.advantages(policy, critic, batch, success, args)
            compare.ppo_update(policy, critic, optimizer, batch, args)
            alpha = 0.0  # on-policy: the old policy is the trained one
        nft.ema_update(old, policy, alpha)
        if (i + 1) % args.eval_every == 0 or i + 1 == args.iterations:
            measure(i + 1, policy, critic, batch, success)
    return policy


@torch.no_grad()
def explained_variance(critic, policy, args, batch, success):
    """1 - Var(return - V) / Var(return) over rows: 1 a perfect critic, 0 one that knows nothing,
    below 0 a misleading one. A wrong mean of V costs nothing: a policy that succeeds less often in
    unseen scenes is no fault of its critic. The returns are what episodes gave, discounted."""
    elapsed = compare.elapsed_time(batch["episode"], -(-args.max_steps // args.horizon))
    values = critic(policy.encode(batch), elapsed)
    _, returns = compare.gae(values, success, batch["episode"], lam=1.0)
    return float(1 - (returns - values).var() / returns.var())


def run(job, split="test"):
    """05 with these flags, tested all along -> a row for each evaluation. split="validation": for
    the tuning, in distribution alone, and one row, `after`, the mean of the last three."""
    start, rows, world = time.time(), [], pixel_gap.PixelGap(job["scenes"])

    def measure(iteration, policy, critic, learned, won):
        row = {"iteration": iteration, "episodes_each": TESTED[iteration == args.iterations]}
        for condition, changes in CONDITIONS.items():
            if split == "test" or condition == "id":
                world.change(changes)
                seeds = episode_seeds(split, row["episodes_each"],
                                      iteration=int(condition != "id"))  # those of 05
                row[condition] = flow.evaluate(policy, world, seeds, args.num_steps).mean()
        world.change({})
        row |= dict.fromkeys(("critic_trained", "critic_fresh", "critic_unseen"), "")
        if critic and iteration and split == "test":
            row["critic_trained"] = explained_variance(critic, policy, args, learned, won)
            for name, changes in (("fresh", {}), ("unseen", CONDITIONS["both"])):
                world.change(changes)
                success, batch = world.play(explorer(args, policy),
                                            episode_seeds("validation", 512))
                row[f"critic_{name}"] = explained_variance(critic, policy, args, batch, success)
            world.change({})
        rows.append(row)

    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
        sft = clone_of(job["seed"], job["scenes"])
        args = compare.parse_args(["--task", "PixelGap", *flags_of(job), "--sft", str(sft),
                                   "--out", out, "--device", "cpu"])
        train(args, load_policy(sft), world, measure)
    told = {"seconds": round(time.time() - start), **common.origin(
        "05_train_maniskill.py --task PixelGap " + " ".join(flags_of(job)))}
    if split == "validation":
        return {"after": np.mean([row["id"] for row in rows[1:][-3:]]), **told}
    return [{**row, **told} for row in rows]


def run_validation(job):
    return run(job, "validation")


def main():
    parser, start = flags.Parser(__doc__), time.time()
    add = parser.add_argument
    most = common.ROUNDS[0][0]
    add("--seeds", type=flags.number(int, 2, most), default=12, help="how many seeds")
    add("--dose-seeds", type=flags.number(int, 0, most), default=3,
        help="seeds of the runs with 16 and 256 scenes; 0: none")
    add("--iterations", type=flags.positive_int, default=160, help="RL iterations")
    add("--episodes", type=flags.number(int, 8), default=512, help="episodes per iteration")
    add("--jobs", type=flags.positive_int, default=common.cores(),
        help="runs at a time, one core each")
    add("--out", type=Path, default="results/pixel_gap", help="folder of tables and figure")
    args = parser.parse_args()
    if args.episodes % 8:
        parser.error(f"--episodes {args.episodes} is no multiple of 8, the episodes from one start")
    if args.dose_seeds > args.seeds:
        parser.error(f"--dose-seeds {args.dose_seeds}: give --seeds {args.dose_seeds} or more")
    parser.make_folder("--out", args.out)
    torch.set_num_threads(1)
    size = {"iterations": args.iterations, "episodes": args.episodes}
    tuning_seeds = [seed for seeds in common.ROUNDS for seed in seeds]
    doses = [(seed, scenes) for scenes in DOSES for seed in range(args.dose_seeds)]
    for seed, scenes in [(seed, SCENES) for seed in [*tuning_seeds, *range(args.seeds)]] + doses:
        clone_of(seed, scenes)  # once, before several workers need it
    best = {}
    for algo in ALGOS:
        method = {"algo": algo, "scenes": SCENES, **size}
        best[algo], = common.tune([method], grid(algo), run_validation, args.out / "tuning.csv",
                                  args.jobs)
        print(algo, *(f"{name}={common.text(value)}" for name, value in best[algo].items()))
    jobs = [{"algo": algo, "scenes": SCENES, **size, **best[algo], "seed": seed}
            for seed in range(args.seeds) for algo in ALGOS]
    common.collect(jobs, run, args.out / "main.csv", args.jobs)
    dose_jobs = [{**job, "scenes": scenes} for seed, scenes in doses for job in jobs
                 if job["seed"] == seed and job["algo"] in ("ppo", "grpo")]
    common.collect(dose_jobs, run, args.out / "dose.csv", args.jobs)
    rows = common.rows_of(jobs, args.out / "main.csv")
    dosed = common.rows_of(dose_jobs, args.out / "dose.csv") if doses else []
    found = statistic.verdicts(rows + dosed)
    (args.out / "verdicts.csv").unlink(missing_ok=True)
    for row in found:
        log_row(args.out / "verdicts.csv", row)
        print("{comparison:<15} {measure:<38} {scenes:>4} scenes, {seeds} seeds: {mean:+.2f} "
              "[{low:+.2f}, {high:+.2f}] {verdict}".format(**row))
    statistic.draw(rows, args.out / "pixel_gap.png")
    print(f"RESULT runs={len(jobs) + len(dose_jobs)} saved={args.out}/verdicts.csv "
          f"seconds={time.time() - start:.0f}")


if __name__ == "__main__":
    main()
