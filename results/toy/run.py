"""Does pi-StepNFT lift the clone of 01 on every seed? 03 at its defaults, eight times.

Run:     python results/toy/run.py                (8 runs, half a minute each on one core)
         python results/toy/run.py --jobs 2       (two at a time)
Saves:   results/toy/{summary.csv, seed0.csv to seed7.csv, learning.png}: success before and after
         on 1,000 test starts, the log of each run, and the figure of seed 0. The same command goes
         on where it was stopped.
"""

import functools
import importlib
import shlex
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
common = importlib.import_module("results.common")
from tools import flags  # noqa: E402  (the line above tells where)

TEST_EPISODES = 1000   # 03 tests on so many starts


def run(job, out, runs):
    """A job -> the rest of its row. Log and figure are copied to `out`, beside the table."""
    seed = job["command"].split()[-1]
    folder = runs / f"seed{seed}"
    told = common.result_line(common.call(f"{job['command']} --out {shlex.quote(str(folder))}"))
    shutil.copy(folder / "log.csv", out / f"seed{seed}.csv")
    if seed == "0":
        shutil.copy(folder / "learning.png", out / "learning.png")
    return {"sft": told["sft"], "stepnft": told["stepnft"], "test_episodes": TEST_EPISODES,
            "rl_episodes": told["episodes"], "seconds": told["seconds"]}


def main():
    parser = flags.Parser(__doc__)
    add = parser.add_argument
    add("--seeds", type=flags.positive_int, default=8, help="seeds 0, 1, ...")
    add("--jobs", type=flags.positive_int, default=1, help="runs at a time, one core each")
    add("--out", type=Path, default="results/toy", help="folder of table, logs and figure")
    add("--runs", type=Path, default="runs/toy", help="folder of what 03 saves")
    args = parser.parse_args()
    parser.make_folder("--out", args.out)
    out, runs = args.out.resolve(), args.runs.resolve()  # 03 runs in the repo's folder
    path, jobs = out / "summary.csv", [{"command": f"03_step_loss.py --seed {seed}"}
                                       for seed in range(args.seeds)]
    common.collect(jobs, functools.partial(run, out=out, runs=runs), path, args.jobs, "seeds")
    rows = common.sort_rows(jobs, path)
    for row in rows:
        print("{command}: SFT {sft}, after RL {stepnft}".format(**row))
    print(f"RESULT seeds={len(rows)} saved={path}")


if __name__ == "__main__":
    main()
