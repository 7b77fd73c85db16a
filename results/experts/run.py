"""How often do the scripted controllers succeed, whose demonstrations 04 and 05 clone?

They act without noise, on LIBERO from the official initial states, on ManiSkill from the starts of
the test (--ood: and in every variant of the suite). A clone can hardly be better than they are.

Run:     python results/experts/run.py libero --suite libero_object --tasks all
         python results/experts/run.py maniskill --task all --ood
Prints:  a line for each task (a minute on two CPU cores), with its 95 % Wilson interval.
Saves:   rows of --out, added to those it has; mean_steps: control steps of the successes.
"""

import contextlib
import os
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from envs import gap_world, libero, maniskill, workers  # noqa: E402  (the line above tells where)
from tools import flags  # noqa: E402
from tools.log import log_row  # noqa: E402
from tools.run import rated, report  # noqa: E402

COLUMNS = "suite task instruction variant episodes success low high mean_steps max_steps".split()


def libero_rows(args):
    """Plays all tasks at once -> (what was played, success, steps) of each."""
    limit = libero.time_limit(args.suite)
    seeds = [libero.TASK * task + i for task in args.tasks for i in range(libero.NUM_OFFICIAL)]
    with contextlib.closing(libero.make_workers(
            args.suite, args.tasks, args.num_envs, max_steps=limit, demo_noise=0)) as world:
        success, steps = play(world, seeds)
    for task in args.tasks:
        own = np.asarray(seeds) // libero.TASK == task
        instruction = libero.read_suite(args.suite).problems[task].instruction
        played = args.suite, task, instruction, libero.OFFICIAL_STARTS, limit
        yield played, success[own], steps[own]


def maniskill_rows(args):
    """Plays a task and variant after the other -> (what was played, success, steps) of each."""
    seeds = gap_world.episode_seeds("test", args.episodes)
    for task in args.tasks:
        limit = maniskill.TASKS[task].max_steps
        with contextlib.closing(maniskill.make_workers(
                task, args.num_envs, horizon=1, demo_noise=0)) as world:
            for _, variant, changes in maniskill.variants(task, "state")[:None if args.ood else 1]:
                world.change(changes=changes)
                yield ("maniskill", task, "", variant, limit), *play(world, seeds)


def play(world, seeds):
    """-> success (episodes,) bool, and how many control steps each episode took."""
    success, rows = world.play(workers.follow_expert, seeds)
    return success, torch.bincount(rows["episode"]).numpy()


def parse_args():
    def parser_of_a_world(prog):  # prog: "run.py libero", say
        parser = flags.Parser(__doc__)
        parser.prog = prog
        return parser

    parser = flags.Parser(__doc__)
    kinds = parser.add_subparsers(dest="world", required=True, metavar="libero | maniskill",
                                  parser_class=parser_of_a_world)
    of_libero, of_maniskill = map(kinds.add_parser, ("libero", "maniskill"))
    of_libero.add_argument("--suite", default="libero_object", help=", ".join(libero.TIME_LIMITS))
    of_libero.add_argument("--tasks", nargs="+", default=["all"],
                           help="task numbers in the suite, or all that the controller can do")
    of_maniskill.add_argument("--task", default="PickCube-v1",
                              help=f"{', '.join(maniskill.TASKS)}, or all")
    of_maniskill.add_argument("--episodes", type=flags.positive_int, default=100,
                              help="test episodes, for each task and variant")
    of_maniskill.add_argument("--ood", action="store_true", help="in every variant, too")
    for kind in (of_libero, of_maniskill):
        kind.add_argument("--num-envs", type=flags.positive_int,
                          default=2 * len(os.sched_getaffinity(0)), help="simulators at a time")
        kind.add_argument("--out", type=Path, default="runs/experts/experts.csv",
                          help="csv that gets the rows")
    args = parser.parse_args()
    if args.world == "libero":
        able = {str(task): task for task in libero.able_tasks(args.suite)}
        chosen = list(able) if args.tasks == ["all"] else args.tasks
        for task in chosen or ["all"]:
            if task not in able:
                parser.error(f"--tasks {task}: in {args.suite} the scripted controller can do "
                             f"{', '.join(able) or 'none'}")
        args.tasks = sorted({able[task] for task in chosen})
    else:
        args.tasks = list(maniskill.TASKS) if args.task == "all" else [args.task]
        maniskill.check_task(args.tasks[0])
    if args.out.is_dir() or args.out.exists() and not args.out.read_text(
            errors="replace").startswith(",".join(COLUMNS)):
        parser.error(f"--out {args.out} is no table of this script")
    parser.make_folder("--out", args.out.parent)
    return args


def main():
    warnings.filterwarnings("ignore")  # the simulator's own, about drivers nobody needs here
    args, start, rates = parse_args(), time.time(), []
    all_rows = libero_rows if args.world == "libero" else maniskill_rows
    for (suite, task, instruction, variant, limit), success, steps in all_rows(args):
        mean = steps[success].mean() if success.any() else np.nan
        rates.append(report(f"{suite} {task}, {variant}, {mean:.0f} steps", success))
        log_row(args.out, dict(zip(COLUMNS, (suite, task, instruction, variant, *rated(
            success).values(), mean, limit), strict=True)))
    print(f"RESULT rows={len(rates)} worst={min(rates):.3f} seconds={time.time() - start:.0f}")


if __name__ == "__main__":
    main()
