"""LIBERO by one protocol: suites, few shots, out of distribution, one baseline. Nothing is chosen
for a seed; libero_10, twice as long, has five demonstrations a task, after one had given a clone
that never succeeds.

Each run is 04 at its defaults but for --iterations 16 --eval-every 4: all tasks of a suite that the
scripted expert solves from 90 % or more of the official states (results/experts/libero.csv), object
poses, one policy that reads the sentence, --demos demonstrations *kept* per task, SFT, 16 times 256
episodes for all tasks together, the last policy. The baseline, filtered_bc.py, has --lr 1e-4 on
top: three times the method's, a guess that nobody tuned. Test: the 50 official initial states of
every task under the suite's usual time limit; in training an episode may end sooner (--max-steps of
04).

Removed: the share of the clone's failures that are gone after RL, (after - before) / (1 - before),
of each seed, then the mean; in the average of suites, of its means.

Run:     python results/libero/run.py                 (13 runs, 20 to 60 minutes each on two
                                                      cores; on slow ones, two at once, 160)
         python results/libero/run.py --suite libero_goal --seed 0 --out runs/again \
             --runs runs/again                        (one of them again, from nothing)
         python results/libero/run.py --summary       (no runs: the numbers, from the rows)
Saves:   results/libero/protocol.csv, a row for each task, policy and kind of start;
         protocol_suites.csv, protocol_tasks.csv and protocol_average.csv, what the page tells,
         computed from it; protocol/RUN.csv, the learning curves. The same command goes on where it
         was stopped, also within a run, whose checkpoints are in --runs.
"""

import collections
import importlib
import os
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
common = importlib.import_module("results.common")
from envs import libero  # noqa: E402  (the lines above tell where)
from tools import flags  # noqa: E402
from tools.log import log_row  # noqa: E402

FLAGS = "--iterations 16 --eval-every 4"
OOD = "--eval-suites _swap _object _lan _task --test-states 20 --test-episodes 1"
AFTER = {"stepnft": "pi-StepNFT", "filtered-bc": "filtered BC"}   # the tested policy's name
SCRIPTS = {"stepnft": "04_train_libero.py",
           "filtered-bc": "results/libero/filtered_bc.py --lr 1e-4"}
AVERAGED = ("libero_object", "libero_spatial", "libero_goal")   # one demonstration, three seeds


def all_jobs():
    """In the order in which they are run: what a reader asks first, first."""
    first = [(suite, 0) for suite in AVERAGED]
    more = [(suite, seed) for seed in (1, 2) for suite, _ in first]
    runs = [(suite, seed, 1, "stepnft") for suite, seed in first]
    runs += [("libero_object", 0, 1, "filtered-bc"), ("libero_10", 0, 5, "stepnft"),
             ("libero_object", 0, 2, "stepnft"), ("libero_object", 0, 5, "stepnft")]
    runs += [(suite, seed, 1, "stepnft") for suite, seed in more]
    return [dict(zip(("suite", "seed", "demos", "method"), run)) for run in runs]


def tasks_of(suite):
    """The tasks that have an expert worth copying, by the measured table."""
    able = [row["task"] for row in common.read(ROOT / "results/experts/libero.csv")
            if row["suite"] == suite and float(row["success"]) >= 0.9]
    if not able:
        raise SystemExit(f"results/experts/libero.csv has no row of {suite} with 0.9 or more: run "
                         f"results/experts/run.py libero --suite {suite}")
    return able


def name_of(job):
    return "{suite}_{method}_demos{demos}_seed{seed}".format(**job)


def command_of(job):
    return (f"{SCRIPTS[job['method']]} --suite {job['suite']} --tasks "
            f"{' '.join(tasks_of(job['suite']))} --num-demos {job['demos']} --seed {job['seed']} "
            f"{FLAGS}")


def run(job, runs, curves):
    """Trains and tests -> the rest of its rows. Goes on with what the folder of the run holds."""
    folder, command = runs / name_of(job), command_of(job)
    resume = f"{command.split(' --')[0]} --resume" if (folder / "last.pt").exists() else command
    common.call(f"{resume} --out {shlex.quote(str(folder))}", show=True)
    curves.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / "log.csv", curves / f"{name_of(job)}.csv")
    rows = tested(folder, command)
    if (job["suite"], job["demos"], job["method"]) == ("libero_object", 1, "stepnft"):
        for file, policy in (("sft.pt", "SFT"), ("last.pt", "pi-StepNFT")):
            out = folder / f"ood_{Path(file).stem}"
            (out / "test.csv").unlink(missing_ok=True)  # 04 adds rows to those of a test cut short
            common.call(f"04_train_libero.py --eval-only {shlex.quote(str(folder / file))} {OOD} "
                        f"--out {shlex.quote(str(out))}", show=True)
            more = tested(out, f"04_train_libero.py --eval-only {file} {OOD}")
            rows += [{**row, "policy": policy} for row in more if row["tested"] != job["suite"]]
    return rows


def tested(folder, command):
    """test.csv of a run -> rows of this study; their commit is that of the end of the run."""
    return [{"tested": row["suite"], "starts": row["starts"], "task": row["task"],
             "policy": row["policy"], "episodes": row["episodes"], "success": row["success"],
             **common.origin(command), "hardware": f"{os.cpu_count()} CPU cores"}
            for row in common.read(folder / "test.csv")]


# ------------------------------------------------------------------------------------------------
# The numbers of the page


def rate(rows, policy):
    """Success of a policy over all of its episodes in these rows."""
    own = [(int(row["episodes"]), float(row["success"])) for row in rows if row["policy"] == policy]
    return sum(n * p for n, p in own) / sum(n for n, _ in own)


def summarise(rows):
    """A row for each suite, number of demos, method and kind of test: before, after, gain and share
    of failures removed, mean and 95 % t-interval over seeds (nan for one seed)."""
    groups = collections.defaultdict(lambda: collections.defaultdict(list))
    for row in rows:
        if row["starts"] == libero.OFFICIAL_STARTS:
            group = row["suite"], row["demos"], row["method"], row["tested"]
            groups[group][row["seed"]].append(row)
    found = []
    for group, seeds in groups.items():
        before = np.array([rate(own, "SFT") for own in seeds.values()])
        after = np.array([rate(own, AFTER[group[2]]) for own in seeds.values()])
        room = before < 1  # a clone without failures has none to remove
        removed = (after - before)[room] / (1 - before)[room] if room.any() else np.full(1, np.nan)
        row = dict(zip(("suite", "demos", "method", "tested"), group), seeds=len(seeds),
                   tasks=len({row["task"] for own in seeds.values() for row in own}))
        for what, values in (("sft", before), ("after", after), ("gain", after - before),
                             ("removed", removed)):
            half = common.half_interval(values)
            row |= {what: values.mean(), f"{what}_low": values.mean() - half,
                    f"{what}_high": values.mean() + half}
        found.append({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
    return found


def at_fewest(rows):
    """The rows of each suite's own test of the method, at its fewest demonstrations."""
    own = [row for row in rows if (row["tested"], row["method"]) == (row["suite"], "stepnft")]
    few = {}
    for row in own:
        few[row["suite"]] = min(few.get(row["suite"], row["demos"]), row["demos"], key=int)
    return [row for row in own if row["demos"] == few[row["suite"]]]


def average(rows):
    """The average of the three suites that have one demonstration and three seeds, in two ways, and
    what becomes of each task: rows of protocol_average.csv, none with fewer than two seeds.

    over=seeds: each seed's mean over the suites, then the mean and 95 % t-interval over seeds. The
    suites count alike, however many tasks they have. over=tasks: the mean of each task over its
    seeds, then mean and interval over all tasks, which count alike. Removed is of these means, as
    the paper's 0.776 is. over=task-seeds: how many of them end lower, how many higher.
    """
    own = [row for row in rows if row["suite"] == row["tested"] in AVERAGED
           and (row["demos"], row["method"]) == ("1", "stepnft")
           and row["starts"] == libero.OFFICIAL_STARTS]
    success = {(row["suite"], row["task"], row["seed"], row["policy"]): float(row["success"])
               for row in own}
    seeds = set.intersection(*({row["seed"] for row in own if row["suite"] == suite}
                               for suite in AVERAGED))
    if len(seeds) < 2:
        return []
    seeds, tasks = sorted(seeds), sorted({(row["suite"], row["task"]) for row in own})

    def pair(task, seed):
        return [success[*task, seed, policy] for policy in ("SFT", "pi-StepNFT")]

    def mean(pairs):
        return np.mean(list(pairs), axis=0)                                       # (2,)

    of_suite = {suite: [task for task in tasks if task[0] == suite] for suite in AVERAGED}
    by_seed = [mean(mean(pair(task, seed) for task in of_suite[suite]) for suite in AVERAGED)
               for seed in seeds]
    by_task = [mean(pair(task, seed) for seed in seeds) for task in tasks]
    found = []
    for over, pairs in (("seeds", by_seed), ("tasks", by_task)):
        before, after = mean(pairs)
        half = common.half_interval([after - before for before, after in pairs])
        found.append({"over": over, "count": len(pairs), "sft": before, "after": after,
                      "gain": after - before, "gain_low": after - before - half,
                      "gain_high": after - before + half,
                      "removed": (after - before) / (1 - before), "fall": "", "rise": ""})
    gains = [after - before for before, after in (pair(task, seed) for task in tasks
                                                  for seed in seeds)]
    found.append({**dict.fromkeys(found[0], ""), "over": "task-seeds", "count": len(gains),
                  "fall": sum(gain < 0 for gain in gains), "rise": sum(gain > 0 for gain in gains)})
    return [{name: round(float(value), 4) if isinstance(value, float) else value
             for name, value in row.items()} for row in found]


def task_rows(rows):
    """Each task of each suite in the method's runs with the fewest demonstrations: success before
    and after, over all seeds and in each of them, first seed first."""
    tested = collections.defaultdict(list)
    for row in at_fewest(rows):
        if row["starts"] == libero.OFFICIAL_STARTS:
            tested[row["suite"], row["task"]].append(row)
    for (suite, task), own in tested.items():
        found = {"suite": suite, "task": task,
                 "instruction": libero.read_suite(suite).problems[int(task)].instruction,
                 "seeds": len({row["seed"] for row in own})}
        for name, policy in (("sft", "SFT"), ("after", "pi-StepNFT")):
            each = sorted((int(row["seed"]), float(row["success"])) for row in own
                          if row["policy"] == policy)
            found |= {name: round(rate(own, policy), 4),
                      f"{name}_each": ", ".join(f"{success:.2f}" for _, success in each)}
        yield found


def write(rows, folder):
    """protocol_suites.csv and protocol_average.csv, whose rows it returns; protocol_tasks.csv."""
    suites, means = summarise(rows), average(rows)
    for name, found in (("suites", suites), ("average", means), ("tasks", task_rows(rows))):
        path = folder / f"protocol_{name}.csv"
        path.unlink(missing_ok=True)
        for row in found:
            log_row(path, row)
    return suites, means


def parse_args():
    parser = flags.Parser(__doc__)
    add = parser.add_argument
    add("--suite", help="only the runs of this suite")
    add("--demos", type=flags.positive_int, help="only those with as many demonstrations a task")
    add("--seed", type=flags.natural, help="only those of this seed")
    add("--method", choices=list(SCRIPTS), help="only those of this method")
    add("--summary", action="store_true", help="no runs: the numbers, from the rows there are")
    add("--out", type=Path, default="results/libero", help="folder of the tables")
    add("--runs", type=Path, default="runs/protocol", help="folder of checkpoints")
    args = parser.parse_args()
    chosen = {name: value for name in ("suite", "demos", "seed", "method")
              if (value := getattr(args, name)) is not None}
    args.jobs = [job for job in all_jobs() if chosen.items() <= job.items()]
    if not args.jobs:
        told = " ".join(f"--{name} {value}" for name, value in chosen.items())
        parser.error(f"{told}: the protocol has no such run; leave one of these flags out")
    parser.make_folder("--out", args.out)
    args.runs, args.out = args.runs.resolve(), args.out.resolve()  # 04 runs in the repo's folder
    return args


def main():
    args = parse_args()
    path = args.out / "protocol.csv"
    for job in [] if args.summary else args.jobs:
        common.collect([job], lambda job: run(job, args.runs, args.out / "protocol"), path)
        write(common.read(path), args.out)
    rows = common.read(path)
    if not rows:
        raise SystemExit(f"--summary: {path} has no rows yet; leave the flag out to make some")
    print(f"{'tested':<22} {'method':<12} demos seeds  before  after  removed")
    suites, means = write(rows, args.out)
    for row in suites:
        print("{tested:<22} {method:<12} {demos:>5} {seeds:>5} {sft:>7.3f} {after:>6.3f} "
              "{removed:>8.3f}".format(**row))
    for row in means[:2]:
        print("average of three suites, over {count} {over}: {sft:.3f} to {after:.3f}, gain "
              "{gain:+.3f} [{gain_low:+.3f}, {gain_high:+.3f}]".format(**row))
    print(f"RESULT rows={len(rows)} saved={path}")


if __name__ == "__main__":
    main()
