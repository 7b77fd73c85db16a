"""What a critic costs in meaning: pi-StepNFT and PPO on TwoGaps, where a sentence names the gap.

Most of the paper's lead out of distribution is semantic: another thing is asked for. A policy that
can be asked for what it was never trained on must know more than its training shows, so here, as
in the paper, the eyes come first: one network learns, on a million scenes with every pair of
colours and every sentence, where the named gap is. Then 48 demonstrations and RL in 64 scenes, with
12 of the 15 pairs and one way of asking. Does RL keep what the eyes knew?

PPO runs twice: its critic on detached features, as in the paper, and sharing the encoder, which it
then trains. All start from the same clone, play the same starts, each at the settings that suit it
(tuned for success in distribution alone). The statistic is PixelGap's, fixed before the run.

Run:     python results/meaning/run.py                (81 runs, two minutes each on one core)
         python results/meaning/run.py --seeds 2 --iterations 20 --out runs/meaning_short
Saves:   results/meaning/{tuning.csv, main.csv, verdicts.csv, meaning.png}
"""

import contextlib
import functools
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
flow, compare, common, pixel_gap, statistic, eyes = map(importlib.import_module, (
    "01_flow_policy", "05_train_maniskill", "results.common", "results.pixel_gap.run",
    "results.pixel_gap.statistic", "results.meaning.eyes"))
from envs import two_gaps  # noqa: E402  (the lines above tell where)
from envs.gap_world import episode_seeds  # noqa: E402
from tools import flags  # noqa: E402
from tools.log import log_row  # noqa: E402

METHODS = ("stepnft", "ppo", "ppo-shared")
CONDITIONS = dict(zip(("id", "pairs", "words", "order", "third", "textures", "gaps", "starts"),
                      (changes for _, _, changes in two_gaps.VARIANTS)))
SEMANTIC, VISION = ("pairs", "words", "order", "third"), ("textures", "gaps")
WHILE_TRAINING, AT_THE_END = 400, 1000     # test episodes in each condition


# ------------------------------------------------------------------------------------------------
# One run


def grid(method):
    """Six settings: learning rate, and what holds the method back; widths are PixelGap's best."""
    if method == "stepnft":
        stops = [{"noise_level": 0.5, "ema": ema, "target_kl": ""} for ema in
                 ("0.1 0.5", "0.1 0.995")]
    else:
        stops = [{"noise_level": 0.5, "ema": "", "target_kl": kl} for kl in (0.02, 0.1)]
    return [{"lr": lr, **stop} for lr in (1e-4, 3e-4, 1e-3) for stop in stops]


def run(job, split="test"):
    """05's loop from this seed's clone, tested all along -> a row for each evaluation. split =
    "validation": for the tuning, in distribution alone, one row: `after`, the mean of the last
    three."""
    start, rows, world = time.time(), [], two_gaps.TwoGaps(eyes.SCENES)
    settings = {name: value for name, value in job.items() if name != "method"}
    settings["algo"] = job["method"].removesuffix("-shared")

    def measure(iteration, policy, *_):
        last = iteration == job["iterations"]
        row = {"iteration": iteration, "episodes_each": AT_THE_END if last else WHILE_TRAINING}
        for condition, changes in CONDITIONS.items():
            if split == "test" or condition == "id":
                world.change(changes)
                seeds = episode_seeds(split, row["episodes_each"], iteration=condition != "id")
                row[condition] = flow.evaluate(policy, world, seeds, 4).mean()
        world.change({})
        rows.append(row)

    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
        # 05's settings are PixelGap's; the world is TwoGaps
        args = compare.parse_args(["--task", "PixelGap", *pixel_gap.flags_of(settings), "--out",
                                   out, "--device", "cpu"])
        pixel_gap.train(args, eyes.clone_of(job["seed"]), world, measure,
                        eyes.SharedCritic if job["method"] == "ppo-shared" else eyes.Critic)
    told = {"seconds": round(time.time() - start), **common.origin("results/meaning/run.py")}
    if split == "validation":
        return {"after": np.mean([row["id"] for row in rows[1:][-3:]]), **told}
    return [{**row, **told} for row in rows]


run_validation = functools.partial(run, split="validation")


# ------------------------------------------------------------------------------------------------
# The statistic


def verdict(mean, half):
    """What a difference in points, with half of its 95 % interval, says of the paper's claim."""
    if mean + half < 0:
        return "contradicted"
    if mean + half < 5:
        return "not supported here"
    return "supported" if mean >= 5 and mean - half > 0 else "undecided"


def verdicts(rows):
    """Paired differences over seeds, in points: of each axis where both first have the highest
    in-distribution success that both reach, and at the end."""
    runs, found = {}, []
    for row in rows:
        runs.setdefault((row["method"], row["seed"]), []).append(row)
    for a, b in (("stepnft", "ppo"), ("stepnft", "ppo-shared"), ("ppo", "ppo-shared")):
        seeds = [seed for method, seed in runs if method == a and (b, seed) in runs]
        for axis, names in (("semantic", SEMANTIC), ("vision", VISION), ("execution", ["starts"]),
                            ("in distribution", ["id"])):
            for when, measure in (("at equal in-distribution success", statistic.matched),
                                  ("at the end", statistic.ahead)):
                if len(seeds) < 2 or axis == "in distribution" and when != "at the end":
                    continue
                points = [100 * measure(runs[a, s], runs[b, s], names) for s in seeds]
                mean, half = np.mean(points), common.half_interval(points)
                found.append({"comparison": f"{a} - {b}", "axis": axis, "when": when,
                              "seeds": len(seeds), "mean": float(mean), "low": float(mean - half),
                              "high": float(mean + half), "verdict": verdict(mean, half)})
    return found


def draw(rows, path):
    """Success in distribution and on each axis along training: means, bands of 95 % intervals."""
    import matplotlib
    from matplotlib.figure import Figure
    figures = importlib.import_module("results.figures")
    names = dict(zip(METHODS, ("π-StepNFT", "PPO", "PPO, shared encoder")))
    colors = dict(zip(METHODS, (figures.BLUE, figures.ORANGE, figures.PURPLE)))
    with matplotlib.rc_context(figures.STYLE):
        fig = Figure(figsize=(12, 3.2))
        for ax, (title, columns) in zip(fig.subplots(1, 4, sharey=True), (
                ("in distribution", ["id"]), ("semantic: asked otherwise", SEMANTIC),
                ("vision: textures, gaps", VISION), ("execution: starts", ["starts"]))):
            for method, line in zip(METHODS, ("-", "--", ":")):
                own = {}
                for row in rows:
                    if row["method"] == method:
                        own.setdefault(row["seed"], []).append(
                            np.mean([float(row[column]) for column in columns]))
                x = sorted({int(row["iteration"]) for row in rows})
                statistic.band(ax, x, np.array(list(own.values())), color=colors[method],
                               label=names[method], ls=line)
            ax.set(title=title, xlabel="iterations", ylim=(0, 1))
        fig.axes[0].set_ylabel("success")
        fig.axes[0].legend(fontsize=8)
        fig.savefig(path)


def main():
    parser, start = flags.Parser(__doc__), time.time()
    add = parser.add_argument
    add("--seeds", type=flags.number(int, 2, common.ROUNDS[0][0]), default=12, help="how many")
    add("--iterations", type=flags.positive_int, default=240, help="RL iterations")
    add("--episodes", type=flags.number(int, 8), default=512, help="episodes per iteration")
    add("--jobs", type=flags.positive_int, default=common.cores(), help="runs at a time")
    add("--out", type=Path, default="results/meaning", help="folder of tables and figure")
    args = parser.parse_args()
    parser.make_folder("--out", args.out)
    torch.set_num_threads(1)
    for seed in [*(s for seeds in common.ROUNDS for s in seeds), *range(args.seeds)]:
        eyes.clone_of(seed)  # once, before several workers need it
    jobs = []
    for method in METHODS:
        one = {"method": method, "iterations": args.iterations, "episodes": args.episodes,
                  "eval_every": 40}
        best, = common.tune([one], grid(method), run_validation, args.out / "tuning.csv", args.jobs)
        print(method, *(f"{name}={common.text(value)}" for name, value in best.items()), flush=True)
        jobs += [{**one, **best, "seed": seed} for seed in range(args.seeds)]
    jobs.sort(key=lambda job: job["seed"])
    common.collect(jobs, run, args.out / "main.csv", args.jobs)
    rows = common.rows_of(jobs, args.out / "main.csv")
    (args.out / "verdicts.csv").unlink(missing_ok=True)
    for row in verdicts(rows):
        log_row(args.out / "verdicts.csv", row)
        print("{comparison:<22} {axis:<16} {when:<33} {mean:+.1f} [{low:+.1f}, {high:+.1f}] "
              "{verdict}".format(**row))
    draw(rows, args.out / "meaning.png")
    print(f"RESULT runs={len(jobs)} saved={args.out}/verdicts.csv "
          f"seconds={time.time() - start:.0f}")


if __name__ == "__main__":
    main()
