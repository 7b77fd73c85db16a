"""Does a policy that explored widely go on where the demonstrations never were?

Every policy trains from the narrow starts of the demonstrations alone (|y| < 0.3), where the clone
hardly fails, and is tested from starts that nobody began from (0.3 to 0.9) and after a push
sideways. Each way to train differs from the one before it in one thing: the rollout, the target,
the width; learning rate and EMA are those that suit it.

They are tuned by halving on seeds 100 to 103 (common.py; success from unvisited starts), then
played on eight seeds that no other study has used.

Run:     python results/recovery/run.py                (115 runs, about 20 s each on one core)
         python results/recovery/run.py next-0.5 --seed 4242    (one run of a way, as tuned)
Saves:   results/recovery/{recovery.csv, recovery_tuning.csv, verdicts.csv, recovery.png}
"""

import contextlib
import importlib
import io
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
flow, variants, common = map(importlib.import_module, (
    "01_flow_policy", "results.ablations.variants", "results.common"))
from envs.gap_world import GapWorld, episode_seeds  # noqa: E402  (the lines above tell where)
from tools import flags  # noqa: E402
from tools.log import log_row  # noqa: E402

WAYS = {"ode": {"rollout": "ode", "target": "endpoint", "noise_level": 0.2},
        "endpoint-0.2": {"rollout": "sde", "target": "endpoint", "noise_level": 0.2},
        "next-0.2": {"rollout": "sde", "target": "next", "noise_level": 0.2},
        "next-0.5": {"rollout": "sde", "target": "next", "noise_level": 0.5},
        "endpoint-0.5": {"rollout": "sde", "target": "endpoint", "noise_level": 0.5}}
NAMES = {"sft": "SFT", "ode": "ODE, endpoint", "endpoint-0.2": "SDE 0.2, endpoint",
         "next-0.2": "SDE 0.2, next step", "next-0.5": "SDE 0.5, next step",
         "endpoint-0.5": "SDE 0.5, endpoint"}
LOOKS = {"sft": ("0.45", "o:"), "ode": ("#d55e00", "s--"), "endpoint-0.2": ("#cc79a7", "^-."),
         "next-0.2": ("#56b4e9", "D-"), "next-0.5": ("#0072b2", "o-"),
         "endpoint-0.5": ("#009e73", "v-.")}   # colour and line of each in the figure
GRID = [{"ema": ema, "lr": lr} for ema in ("0.1 0.1", "0.9 0.9", "0.9 0.995")
        for lr in (3e-4, 1e-3)]
COMPARED = [("endpoint-0.2", "ode"), ("next-0.2", "endpoint-0.2"), ("next-0.5", "next-0.2"),
            ("next-0.5", "ode"), ("next-0.5", "endpoint-0.5")]
SHOWN = ("ode", "endpoint-0.2", "next-0.2", "next-0.5")   # where these went is drawn
NARROW, PUSHES, BINS, TEST_EPISODES = 0.3, (0.15, 0.3), 9, 3000
TESTS = ("visited", "unvisited", *(f"push_{push}" for push in PUSHES))


class Pushed(GapWorld):
    """Narrow starts, and one push sideways (m) after the first chunk, up or down by the seed."""

    def __init__(self, push):
        super().__init__(NARROW)
        self.push = push

    def reset(self, seeds):
        self.side = np.where(np.asarray(seeds) // 4 % 2, 1, -1)  # above the bits of the split
        return super().reset(seeds)

    def step(self, chunks):
        _, executed = super().step(chunks)
        if self.side is not None:
            self.position[:, 1] += self.push * self.side * ~self.over
            self.side = None
        return self.observe(), executed


class Diary(GapWorld):
    """Narrow starts, and a count of where training's episodes have been: (60, 60), x by y."""

    def __init__(self):
        super().__init__(NARROW)
        self.places = np.zeros((60, 60))

    def play(self, act, seeds):
        played = super().play(act, seeds)
        trail = np.stack(self.trail)                                              # (T+1, N, 2)
        moved = (np.diff(trail, axis=0) != 0).any(-1)                             # (T, N)
        x, y = trail[1:][moved].T
        self.places += np.histogram2d(x, y, 60, [[-1, 1], [-1, 1]])[0]
        return played


def tested(policy, num_steps):
    """Success from visited and unvisited starts, after pushes, and by the start's |y|: start_0.3 is
    from 0.3 to 0.4 m."""
    seeds, world = episode_seeds("test", TEST_EPISODES), GapWorld()
    away = np.abs(world.reset(seeds)["state"][:, 1].numpy())                      # (episodes,)
    success = flow.evaluate(policy, world, seeds, num_steps)
    told = {"visited": success[away < NARROW].mean(), "unvisited": success[away >= NARROW].mean()}
    for push in PUSHES:
        told[f"push_{push}"] = flow.evaluate(policy, Pushed(push), seeds, num_steps).mean()
    tenth = (away * 10).astype(int)
    return told | {f"start_{i / 10}": success[tenth == i].mean() for i in range(BINS)}


def run(job):
    """A job -> the rest of its row. It may be in a worker process, so it prints nothing."""
    args, start, world = variants.settings({**job, **WAYS[job["way"]]}), time.time(), Diary()
    with contextlib.redirect_stdout(io.StringIO()):
        policies = variants.train(args, world)
    sft, after = (tested(policy, args.num_steps) for policy in policies)
    left = world.places[:30]                                       # before the wall, x < 0
    heights = np.abs(np.linspace(-1, 1, 61)[:-1] + 1 / 60)
    return {**after, **{f"sft_{name}": value for name, value in sft.items()},
            "training_outside": left[:, heights > NARROW].sum() / left.sum(),
            "test_episodes": TEST_EPISODES, "seconds": round(time.time() - start),
            **common.origin(f"results/recovery/run.py {job['way']} --seed {job['seed']}")}


def verdicts(rows, path):
    """Paired differences of the ways to train, in each test."""
    path.unlink(missing_ok=True)
    ways = {(row["way"], test): {} for row in rows for test in TESTS}
    for row in rows:
        for test in TESTS:
            ways[row["way"], test][row["seed"]] = float(row[test])
            ways.setdefault(("sft", test), {})[row["seed"]] = float(row[f"sft_{test}"])
    for test in TESTS:
        for a, b in [*COMPARED, ("ode", "sft"), ("next-0.5", "sft")]:
            if (a, test) in ways and (b, test) in ways:
                mean, low, high = common.difference(ways[a, test], ways[b, test])
                said = "shown" if low > 0 else "contradicted" if high < 0 else "not shown"
                log_row(path, {"test": test, "comparison": f"{a} - {b}",
                               "seeds": len(ways[a, test]), "mean": float(mean), "low": float(low),
                               "high": float(high), "verdict": said})
                print(f"{test:<10} {a + ' - ' + b:<26} {100 * mean:+.1f} [{100 * low:+.1f}, "
                      f"{100 * high:+.1f}] {said}")


def by_start(ax, rows):
    """Success against the height of the start, a line for each way to train; 95 % over seeds."""
    for way, (color, line) in LOOKS.items():
        column = "sft_start" if way == "sft" else "start"
        own = [row for row in rows if row["way"] == ("ode" if way == "sft" else way)]
        values = np.array([[float(row[f"{column}_{i / 10}"]) for i in range(BINS)]
                           for row in own])                                       # (seeds, BINS)
        half = [common.half_interval(tenth) for tenth in values.T]
        ax.errorbar(np.arange(BINS) / 10 + 0.05, values.mean(0), half, fmt=line, color=color,
                    label=NAMES[way], capsize=2, ms=5)
    ax.axvspan(0, NARROW, color="0.92")
    ax.text(0.01, 0.02, "starts of the demonstrations and of training", color="0.4")
    ax.set(xlabel="height of the start, |y| (m)", ylabel="success without noise", xlim=(0, 0.9),
           ylim=(0, 1.02))
    ax.legend(loc="lower left", bbox_to_anchor=(0.02, 0.08))


def draw(rows, best, path):
    """Where training went, of one seed of each way, and where each way succeeds, by the start."""
    import matplotlib
    from matplotlib.figure import Figure
    figures = importlib.import_module("results.figures")
    with matplotlib.rc_context(figures.STYLE):
        fig = Figure(figsize=(11, 6), layout="constrained")
        axes = fig.subplot_mosaic([[0, 1, 2, 3], ["by start"] * 4], height_ratios=[1, 1.1])
        seed, places = min(int(row["seed"]) for row in rows), {}
        for way in SHOWN:
            world = Diary()
            variants.train(variants.settings({**best[way], **WAYS[way], "seed": seed}), world)
            places[way] = np.log1p(world.places.T)
        most = max(place.max() for place in places.values())
        for i, way in enumerate(SHOWN):
            axes[i].imshow(places[way], origin="lower", extent=(-1, 1, -1, 1), cmap="Blues",
                           vmax=most)
            axes[i].axvline(0, color="0.6", lw=2)
            for y in (-NARROW, NARROW):
                axes[i].axhline(y, color="0.6", ls=":", lw=1)
            axes[i].set(title=NAMES[way], xticks=(-1, 0, 1), yticks=(-1, 0, 1), xlabel="x (m)",
                        ylabel="y (m): where training went" if i == 0 else "")
        by_start(axes["by start"], rows)
        fig.savefig(path)


def main():
    parser, start = flags.Parser(__doc__), time.time()
    parser.add_argument("ways", nargs="*", metavar="WAY", default=list(WAYS),
                        help=f"which of {', '.join(WAYS)}")
    parser.add_argument("--seed", type=flags.natural, help="one run of each way, as it was tuned: "
                        "printed, not saved")
    common.add_toy_flags(parser, "results/recovery")
    parser.set_defaults(first_seed=30)
    args = parser.parse_args()
    if unknown := set(args.ways) - set(WAYS):
        parser.error(f"no way {', '.join(unknown)}; there are {', '.join(WAYS)}")
    if set(args.ways) != set(WAYS) and args.seed is None and args.out == Path("results/recovery"):
        parser.error(f"a part of the study ({', '.join(args.ways)}) needs a folder of its own: "
                     "give --out, or --seed to try one")
    if args.seed is not None and args.seed in sum(common.ROUNDS, ()):
        parser.error(f"--seed {args.seed} is one that the settings were tuned on: give another")
    common.check_toy_flags(parser, args)
    size = {"iterations": args.iterations, "episodes": args.episodes}
    compared = [{"way": way, **size} for way in args.ways]
    torch.set_num_threads(1)  # on nets this small, threads only wait for each other
    if args.seed is not None:
        best = common.tune(compared, GRID, run, args.out / "recovery_tuning.csv", args.jobs,
                           score="unvisited")
        for one, setting in zip(compared, best):
            row = run({**one, **setting, "seed": args.seed})
            print(f"RESULT way={one['way']} seed={args.seed} "
                  f"sft_unvisited={row['sft_unvisited']:.3f} unvisited={row['unvisited']:.3f} "
                  f"visited={row['visited']:.3f} seconds={row['seconds']}")
        return
    rows = common.tune_and_play(compared, GRID, run, args, "recovery", score="unvisited")
    verdicts(rows, args.out / "verdicts.csv")
    best = {row["way"]: {**size, "ema": row["ema"], "lr": float(row["lr"])} for row in rows}
    if set(best) == set(WAYS):
        draw(rows, best, args.out / "recovery.png")
    print(f"RESULT ways={len(best)} runs={len(rows)} saved={args.out}/recovery.csv "
          f"seconds={time.time() - start:.0f}")


if __name__ == "__main__":
    main()
