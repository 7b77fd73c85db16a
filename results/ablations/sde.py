"""Does the SDE explore better than the ODE, and does its correction matter?

All rollouts are judged by the endpoint, the only target that an ODE has, with an old policy that is
slow enough for it: no step of an ODE was drawn from a Gaussian. Its noise level only scales the
error, the "adaptive" error needs none. Each is tuned alike on seeds 100 to 103 (common.py), then
played on eight seeds that no other study here has used.

Run:     python results/ablations/sde.py               (147 runs, about 15 s each on one core)
Saves:   results/ablations/{sde.csv, sde_tuning.csv, verdicts.csv}
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

NOISE_LEVELS = (0.2, 0.5)     # the paper's, and the toy world's best
WAYS = [("sde", "endpoint"), ("uncorrected", "endpoint"), ("ode", "endpoint"), ("ode", "adaptive")]
GRID = [{"ema": ema, "lr": lr} for ema in ("0.9 0.9", "0.9 0.995") for lr in (3e-4, 1e-3)]


def run(job):
    """A job -> the rest of its row."""
    return variants.row_of(variants.settings(job), "results/ablations/sde.py")


def main():
    parser, start = flags.Parser(__doc__), time.time()
    common.add_toy_flags(parser, "results/ablations")
    parser.set_defaults(first_seed=20)
    args = parser.parse_args()
    common.check_toy_flags(parser, args)
    compared = [{"rollout": rollout, "target": target, "noise_level": a,
                 "iterations": args.iterations, "episodes": args.episodes}
                for a in NOISE_LEVELS for rollout, target in WAYS
                if target != "adaptive" or a == NOISE_LEVELS[0]]
    rows = common.tune_and_play(compared, GRID, run, args, "sde")
    for comparison, row in tables.sde_over_ode(rows):
        print(f"{comparison:<36} {100 * row['gain']:+.1f} [{100 * row['low']:+.1f}, "
              f"{100 * row['high']:+.1f}] {row['verdict']}")
    tables.verdicts(args.out)
    print(f"RESULT variants={len(compared)} runs={len(rows)} saved={args.out}/sde.csv "
          f"seconds={time.time() - start:.0f}")


if __name__ == "__main__":
    main()
