"""Does pi-StepNFT lift a clone on ManiSkill? 05 at its defaults, PickCube-v1, three seeds.

Run:     python results/maniskill/run.py          (3 runs, 5 to 9 minutes each on two cores)
Saves:   results/maniskill/{summary.csv, seed0.csv to seed2.csv, seed0_test.csv to seed2_test.csv}:
         success before and after on 400 test episodes, the log and the test of each run. The same
         command goes on where it was stopped, also within a run.
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

TEST_EPISODES = 400   # 05 tests PickCube with so many


def run(job, out, runs):
    """A job -> the rest of its row. Log and test are copied to `out`, beside the table."""
    script, *_, seed = job["command"].split()
    folder = runs / f"seed{seed}"
    begin = f"{script} --resume" if (folder / "last.pt").exists() else job["command"]
    told = common.result_line(common.call(f"{begin} --out {shlex.quote(str(folder))}"))
    shutil.copy(folder / "log.csv", out / f"seed{seed}.csv")
    shutil.copy(folder / "test.csv", out / f"seed{seed}_test.csv")
    return {"sft": told["sft"], "stepnft": told["stepnft"], "test_episodes": TEST_EPISODES,
            "rl_episodes": told["episodes"], "env_steps": told["env_steps"],
            "seconds": told["seconds"]}


def main():
    parser = flags.Parser(__doc__)
    add = parser.add_argument
    add("--seeds", type=flags.positive_int, default=3, help="seeds 0, 1, ...")
    add("--out", type=Path, default="results/maniskill", help="folder of table and logs")
    add("--runs", type=Path, default="runs/maniskill", help="folder of checkpoints")
    args = parser.parse_args()
    parser.make_folder("--out", args.out)
    out, runs = args.out.resolve(), args.runs.resolve()  # 05 runs in the repo's folder
    path, jobs = out / "summary.csv", [{"command": f"05_train_maniskill.py --seed {seed}"}
                                       for seed in range(args.seeds)]
    common.collect(jobs, functools.partial(run, out=out, runs=runs), path, desc="seeds")
    rows = common.sort_rows(jobs, path)
    for row in rows:
        print("{command}: SFT {sft}, after RL {stepnft}".format(**row))
    print(f"RESULT seeds={len(rows)} saved={path}")


if __name__ == "__main__":
    main()
