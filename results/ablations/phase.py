"""The title's question on the toy world: does wider noise need the finer target?

Next step, its mean and endpoint, each in six widths of noise and each tuned for every width, on
seeds 100 to 103 (common.py). All else has the paper's values (variants.py).

Run:     python results/ablations/phase.py             (576 runs, about 10 s each on one core)
         python results/ablations/phase.py --noise-levels 0.2 --seeds 3 --out runs/short
Saves:   results/ablations/{phase.csv, phase_tuning.csv, verdicts.csv}
"""

import importlib
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
variants, tables, common = map(importlib.import_module, (
    "results.ablations.variants", "results.ablations.tables", "results.common"))
from tools import flags  # noqa: E402  (the lines above tell where)

TARGETS, NOISE_LEVELS = ("next", "next-mean", "endpoint"), (0.05, 0.1, 0.2, 0.3, 0.5, 0.8)
EMAS = ("0.1 0.1", "0.1 0.995", "0.9 0.9", "0.9 0.995")   # START END, as --ema of 03 takes them


def run(job):
    """A job -> the rest of its row."""
    args = variants.settings(job)
    return variants.row_of(
        args, f"results/ablations/phase.py --targets {args.target} --ema '{job['ema']}' "
        f"--seeds 1 --first-seed {args.seed} --lr {args.lr:g} --iterations {args.iterations} "
        f"--episodes {args.episodes} --noise-levels {args.noise_level:g}")


def main():
    parser, start = flags.Parser(__doc__), time.time()
    add, positive = parser.add_argument, flags.positive_float
    add("--targets", nargs="+", default=TARGETS, choices=TARGETS, help="which of them")
    add("--noise-levels", type=positive, nargs="+", default=NOISE_LEVELS, help="widths")
    add("--ema", nargs="+", default=EMAS, choices=EMAS, help="old policies to tune with")
    add("--lr", type=positive, nargs="+", default=[1e-4, 3e-4, 1e-3],
        help="Adam's learning rates to tune with")
    common.add_toy_flags(parser, "results/ablations")
    args = parser.parse_args()
    common.check_toy_flags(parser, args)
    compared = [{"target": target, "noise_level": a, "iterations": args.iterations,
                 "episodes": args.episodes} for a in args.noise_levels for target in args.targets]
    grid = [{"ema": ema, "lr": lr} for ema in args.ema for lr in args.lr]
    rows = common.tune_and_play(compared, grid, run, args, "phase")
    tables.show_phase(tables.phase_table(rows))
    tables.verdicts(args.out)
    print(f"RESULT variants={len(compared)} runs={len(rows)} saved={args.out}/phase.csv "
          f"seconds={time.time() - start:.0f}")


if __name__ == "__main__":
    main()
