"""Why do episodes on LIBERO fail? What became of the thing that was to be moved.

Plays checkpoints of 04 (object poses, no images) from official initial states, without noise and
with the noise of their training, and sorts every episode by what its states show:

    success     LIBERO's own check
    missed      the thing was never more than 3 cm above its start
    dropped     it was, but never came within 5 cm of its goal (seen from above)
    late        it did, and the episode still did not succeed: put down badly, or time was up

It fits tasks that move one thing: of two the first is followed, and where nothing is moved (turn on
the stove) every failure reads missed.

A task without a success under noise gives the labels nothing to tell apart.

Run:     python results/libero_failures/run.py runs/04_train_libero/sft.pt \
             runs/04_train_libero/last.pt
Prints, saves: a row for each policy, noise and task, added to --out.
"""

import argparse
import contextlib
import importlib
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
flow, nft = map(importlib.import_module, ("01_flow_policy", "03_step_loss"))
from envs import libero  # noqa: E402  (the line above tells where)
from policies import load_policy  # noqa: E402
from tools import flags  # noqa: E402
from tools.log import log_row  # noqa: E402


def fate(states, success):
    """States (T, S) of an episode, in the order of time -> success, missed, dropped or late.

    Numbers 0 to 2 of a state are the hand's place, 6 to 8 where the thing is as seen from there,
    12 to 14 its goal.
    """
    hand, thing, goal = (states[:, i:i + 3] for i in (0, 6, 12))
    raised = (hand + thing)[:, 2] > (hand + thing)[0, 2] + 0.03
    near = np.linalg.norm((thing - goal)[:, :2], axis=1) < 0.05
    if success:
        return "success"
    return "missed" if not raised.any() else "late" if (raised & near).any() else "dropped"


def rows_of(path, noisy, episodes, num_envs):
    """Plays a checkpoint on all of its tasks -> a row for each of them."""
    policy = load_policy(path)
    args = argparse.Namespace(**flags.look_into(path)["flags"])
    if "all" in args.tasks:  # as it was typed
        args.tasks = list(range(len(libero.read_suite(args.suite).problems)))

    def ode(obs):
        return policy.denormalise(flow.ode_sample(policy, obs, args.num_steps)), {}

    act = nft.explore(policy, args.num_steps, args.noise_level) if noisy else ode
    seeds = np.array([libero.TASK * task + i for task in args.tasks for i in range(episodes)])
    with contextlib.closing(libero.make_workers(
            args.suite, args.tasks, num_envs, state_dim=libero.state_size(args.suite),
            horizon=args.horizon, action_repeat=args.action_repeat,
            max_steps=libero.time_limit(args.suite))) as world:
        torch.manual_seed(0)
        success, rows = world.play(act, seeds)
    found = [fate(rows["state"][rows["episode"] == e].numpy(), success[e])
             for e in range(len(seeds))]
    for task in args.tasks:
        own = np.array(found)[seeds // libero.TASK == task]
        yield {"checkpoint": Path(path).name, "suite": args.suite, "seed": args.seed, "task": task,
               "noise_level": args.noise_level if noisy else 0, "episodes": episodes,
               **{kind: float((own == kind).mean())
                  for kind in ("success", "missed", "dropped", "late")}}


def main():
    parser = flags.Parser(__doc__)
    add = parser.add_argument
    add("checkpoints", nargs="+", type=flags.checkpoint, help="sft.pt, last.pt of a run")
    add("--episodes", type=flags.number(int, 1, libero.NUM_OFFICIAL), default=20,
        help="official initial states of each task")
    add("--num-envs", type=flags.positive_int, default=8, help="simulators at a time")
    add("--out", type=Path, default="runs/libero_failures/failures.csv", help="csv for the rows")
    args = parser.parse_args()
    for path in args.checkpoints:
        stored = flags.look_into(path)["flags"]
        if "suite" not in stored or stored["obs"] != "state":
            parser.error(f"{path}: give a checkpoint of 04 that was trained with --obs state")
    parser.make_folder("--out", args.out.parent)
    count = 0
    for path in args.checkpoints:
        for noisy in (False, True):
            for row in rows_of(path, noisy, args.episodes, args.num_envs):
                log_row(args.out, row)
                print("{checkpoint} noise {noise_level} task {task}: success {success:.2f}, missed "
                      "{missed:.2f}, dropped {dropped:.2f}, late {late:.2f}".format(**row))
                count += 1
    print(f"RESULT rows={count} saved={args.out}")


if __name__ == "__main__":
    main()
