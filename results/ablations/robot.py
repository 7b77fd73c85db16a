"""The title's question on a robot: does wider noise need the finer target on PickCube?

Both targets in three widths of noise, each with the learning rate and EMA that served it best out
of six settings on seed 10; then 05's defaults otherwise, 12 iterations from the seed's own clone,
400 test episodes of the last policy. A run takes all cores: one at a time.

Run:     python results/ablations/robot.py             (66 runs, 3 minutes each on two cores)
Saves:   results/ablations/{robot.csv, robot_tuning.csv, verdicts.csv}
"""

import importlib
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
tables, common = map(importlib.import_module, ("results.ablations.tables", "results.common"))
from tools import flags  # noqa: E402  (the lines above tell where)

TARGETS, NOISE_LEVELS, TUNING_SEED = ("next", "endpoint"), (0.1, 0.3, 0.5), 10
GRID = [{"ema": ema, "lr": lr} for ema in ("0.1 0.5", "0.9 0.9") for lr in (1e-4, 3e-4, 1e-3)]


def run(job):
    """05 from the clone of this seed, which is made once."""
    folder, start = f"runs/phase_robot/seed{job['seed']}", time.time()
    rest = f"--seed {job['seed']} --eval-every 100 --eval-episodes 8"
    if not (common.ROOT / folder / "sft.pt").exists():
        common.call(f"05_train_maniskill.py {rest} --iterations 0 --test-episodes 8 --out {folder}")
    with tempfile.TemporaryDirectory() as out:
        command = (f"05_train_maniskill.py {rest} --iterations 12 --sft {folder}/sft.pt --target "
                   f"{job['target']} --lr {job['lr']:g} --noise-level {job['noise_level']:g} "
                   f"--ema {job['ema']}")
        told = common.result_line(common.call(f"{command} --out {out}"))
    return {"sft": told["sft"], "after": told["stepnft"], "test_episodes": 400,
            "seconds": round(time.time() - start), **common.origin(command),
            "hardware": f"{os.cpu_count()} CPU cores"}


def main():
    parser, start = flags.Parser(__doc__), time.time()
    parser.add_argument("--seeds", type=flags.number(int, 1, TUNING_SEED), default=5,
                        help="how many seeds, from 0 on")
    parser.add_argument("--out", type=Path, default="results/ablations", help="folder of tables")
    args = parser.parse_args()
    parser.make_folder("--out", args.out)
    compared = [{"target": target, "noise_level": a} for a in NOISE_LEVELS for target in TARGETS]
    tuning = args.out / "robot_tuning.csv"
    grid = [{**one, **setting, "seed": TUNING_SEED} for one in compared for setting in GRID]
    common.collect(grid, run, tuning, desc="tuning")
    best = {}
    for row, job in zip(common.sort_rows(grid, tuning), grid):
        which = job["target"], job["noise_level"]
        if which not in best or float(row["after"]) > best[which][0]:
            best[which] = float(row["after"]), job
    jobs = [{**job, "seed": seed} for seed in range(args.seeds) for _, job in best.values()]
    common.collect(jobs, run, args.out / "robot.csv")
    tables.show_phase(tables.phase_table(common.rows_of(jobs, args.out / "robot.csv")))
    tables.verdicts(args.out)
    print(f"RESULT runs={len(jobs)} saved={args.out}/robot.csv seconds={time.time() - start:.0f}")


if __name__ == "__main__":
    main()
