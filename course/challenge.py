"""The challenge: how few episodes lift the toy world's clone to 0.90?

An entry is a script that is called as 03 is, with --seed and --out, and does what 03 does: it
starts from the SFT policy of that seed, plays N episodes of GapWorld, saves policy.pt (the network
of 01) and ends with a line RESULT ... episodes=N. Yours to change: all else, the noise, the loss,
what is played, how often a batch is used. Not allowed: demonstrations beyond the clone's six, the
world's inner state, episodes that are not counted, and trying seeds 200 to 204 before it counts.

It is valid if, over these five seeds, the mean success of its policies is 0.90 or more (1,000
starts each that no test of the repo has, without noise) and no run takes over a minute of one core.
Its score is N, the largest of the five: the fewer the better.

Run:     python course/challenge.py --seeds 100 101 102 -- my_03.py --iterations 100      (a trial)
         python course/challenge.py --name "my idea" -- my_03.py --iterations 100       (it counts)
Prints:  a line for each seed, then RESULT valid=... episodes=N
Saves:   with --name a row of course/entries.csv
"""

import importlib
import os
import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from envs.gap_world import GapWorld, episode_seeds  # noqa: E402  (the line above tells where)
from results import common  # noqa: E402
from tools import flags  # noqa: E402
from tools.log import log_row  # noqa: E402

flow = importlib.import_module("01_flow_policy")

SEEDS = (200, 201, 202, 203, 204)
LEVEL = 0.9                                     # mean success of a valid entry
SECONDS = 60                                    # of one core, for each seed
STARTS = 1000                                   # test episodes of each seed


def cpu_seconds():
    """Of this process's children that have ended: a busy machine does not lengthen them."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run(entry, seed):
    """-> (success of its policy on starts that are no test's, episodes, seconds of CPU)."""
    # the clone, where an entry finds it: trained here if missing, so that no entry pays for it
    policy = flow.toy_policy(seed, folder=ROOT / "runs/01_flow_policy")
    with tempfile.TemporaryDirectory() as out:
        before = cpu_seconds()
        try:
            done = subprocess.run([sys.executable, *entry, "--seed", str(seed), "--out", out],
                                  cwd=ROOT, text=True, stdout=subprocess.PIPE, timeout=600,
                                  env={**os.environ, "OMP_NUM_THREADS": "1"})
            found = re.search(r"^RESULT .*?\bepisodes=(\d+)", done.stdout, re.M)
            policy.load_state_dict(torch.load(Path(out, "policy.pt"), weights_only=True))
            assert found and done.returncode == 0, "no RESULT line with episodes=N"
        except Exception as error:  # whatever an entry does
            told = str(error).split("\n")[0][:150]
            raise SystemExit(f"{entry[0]} --seed {seed} is no entry ({told}): see what "
                             "03_step_loss.py prints and saves") from None
        seconds = cpu_seconds() - before
    starts = episode_seeds("test", STARTS, seed=seed, iteration=1)
    return flow.evaluate(policy, GapWorld(), starts).mean(), int(found[1]), seconds


def main():
    parser = flags.Parser(__doc__)
    parser.add_argument("--name", help="adds the entry to the table under this name")
    parser.add_argument("--seeds", type=flags.natural, nargs="+", default=SEEDS,
                        help="others, to try an entry before it counts")
    parser.add_argument("--out", type=Path, default="course", help="folder of the table")
    parser.add_argument("entry", nargs="...", help="your script, with its flags")
    args = parser.parse_args()
    args.entry = args.entry[args.entry[:1] == ["--"]:]  # which ends the list of --seeds
    if not args.entry or not (ROOT / args.entry[0]).exists():
        parser.error("entry: give a script of this folder and its flags, 03_step_loss.py say")
    parser.make_folder("--out", args.out)
    torch.set_num_threads(1)
    results = []
    for seed in args.seeds:
        results.append(run(args.entry, seed))
        print("seed {}: success {:.3f} after {} episodes, {:.0f} seconds".format(
            seed, *results[-1]), flush=True)
    success, episodes, seconds = np.array(results).T
    valid = (success.mean() >= LEVEL and seconds.max() <= SECONDS
             and tuple(args.seeds) == SEEDS)
    row = {"name": args.name, "episodes": int(episodes.max()), "success": success.mean(),
           "each": common.text(list(success)), "valid": "yes" if valid else "no",
           "seconds": seconds.max(), "seeds": common.text(list(args.seeds)),
           **common.origin(" ".join(args.entry))}
    if args.name:
        log_row(args.out / "entries.csv", row)
    print("RESULT valid={valid} episodes={episodes} success={success:.3f} "
          "seconds={seconds:.0f}".format(**row))


if __name__ == "__main__":
    main()
