"""Every ablation of the paper on the toy world: what changes when one choice of 03 is another?

Each variant (variants.py) is tuned on four seeds, then played on eight others: see common.py, which
also goes on after Ctrl-C. A seed is a clone and a run from it; both kinds are scored on the same
1,000 test starts. The paper's world is LIBERO, ours a point robot: compare the order within a
figure, not the numbers.

Run:     python results/ablations/run.py               (368 runs, about 10 s each on one core)
         python results/ablations/run.py default loss-weighted --lr 3e-4 --out runs/short
         python results/ablations/run.py --list        (the names, with the paper's numbers)
Saves:   results/ablations/{ablations.csv, ablations_tuning.csv, ablations.png, verdicts.csv}
"""

import argparse
import importlib
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
variants, tables, common = map(importlib.import_module, (
    "results.ablations.variants", "results.ablations.tables", "results.common"))
from tools import flags  # noqa: E402  (the lines above tell where)


def run(job):
    """A job -> the rest of its row."""
    args = variants.settings(job)
    return variants.row_of(
        args, f"results/ablations/run.py {job['variant']} --seeds 1 --first-seed {args.seed} "
        f"--lr {args.lr:g} --iterations {args.iterations} --episodes {args.episodes} "
        f"--noise-level {args.noise_level:g}")


def variant(text):
    """The type of a name: one of VARIANTS."""
    if text not in variants.VARIANTS:
        raise argparse.ArgumentTypeError(
            f"no variant {text}; there are {', '.join(variants.VARIANTS)}")
    return text


def parse_args():
    parser = flags.Parser(__doc__)
    add, positive = parser.add_argument, flags.positive_float
    add("names", nargs="*", type=variant, default=list(variants.VARIANTS), metavar="NAME",
        help="variants")
    add("--list", action="store_true", help="print names and the paper's numbers, and stop")
    add("--lr", type=positive, nargs="+", default=[3e-4, 1e-3],
        help="Adam's learning rates to tune with; one: no tuning")
    add("--noise-level", type=positive, default=variants.BASE["noise_level"],
        help="of the variants that do not vary it")
    common.add_toy_flags(parser, "results/ablations")
    args = parser.parse_args()
    for name in args.names:
        group = variants.VARIANTS[name].get("group_size", 1)
        if args.episodes % group:
            parser.error(f"--episodes {args.episodes} is no multiple of {group}, the episodes from "
                         f"one start in {name}")
    if not args.list:
        common.check_toy_flags(parser, args)
    return args


def main():
    args, start = parse_args(), time.time()
    if args.list:
        for figure, names in tables.FIGURES.items():
            for name, paper in names.items():
                print(f"{figure:<14} {name:<24} {'-' if paper is None else paper}")
        return
    compared = [{"variant": name, "iterations": args.iterations, "episodes": args.episodes,
                 "noise_level": variants.VARIANTS[name].get("noise_level", args.noise_level)}
                for name in args.names]
    rows = common.tune_and_play(compared, [{"lr": lr} for lr in args.lr], run, args, "ablations")
    table = tables.summarise(rows)
    tables.show(table)
    tables.draw(table, args.out / "ablations.png")
    tables.verdicts(args.out)
    print(f"RESULT variants={len(compared)} runs={len(rows)} saved={args.out}/ablations.csv "
          f"seconds={time.time() - start:.0f}")


if __name__ == "__main__":
    main()
