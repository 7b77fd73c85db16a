"""LIBERO by one protocol: suites, few shots, out of distribution, one baseline. Nothing is chosen
for a seed; libero_10, twice as long, has five demonstrations a task, after one had given a clone
that never succeeds.

Each run is 04 at its defaults but for --iterations 16 --eval-every 4: all tasks of a suite that the
scripted expert solves from 90 % or more of the official states (scripted_experts.csv, of
results/experts.py), object poses, one policy that reads the sentence, --demos demonstrations *kept*
per task, SFT, 16 iterations of 256 episodes for all tasks together, the last policy. The baseline,
filtered BC, has --lr 1e-4 on top: three times the method's, a guess that nobody tuned. Test: the 50
official initial states of every task under the suite's usual time limit; in training an episode may
end sooner (--max-steps of 04).

Removed: the share of the clone's failures that are gone after RL, (after - before) / (1 - before),
of each seed, then the mean; in the rows `average`, of suites or of all tasks, from the means.

Run:     python results/protocol.py                   (13 runs, 20 to 60 minutes each on two
                                                      cores; on slow ones, two at once, 160)
         python results/protocol.py --suite libero_goal --seed 0 --out runs/again --runs runs/again
                                                      (one of them again, from nothing)
         python results/protocol.py --summary                (no runs: the numbers, from the rows)
Saves:   results/04_train_libero/protocol.csv, a row for each task, policy and kind of start;
         protocol_suites.csv and protocol_tasks.csv, what the page tells, computed from it;
         protocol/RUN.csv, the learning curves. The same command goes on where it was stopped,
         also within a run, whose checkpoints are in --runs.
"""

import argparse
import collections
import importlib
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "results")]
flow, nft, study = map(importlib.import_module, ("01_flow_policy", "03_step_loss", "study"))
from envs import libero  # noqa: E402  (the lines above tell where)

FLAGS = "--iterations 16 --eval-every 4"
OOD = "--eval-suites _swap _object _lan _task --test-states 20 --test-episodes 1"
AFTER = {"stepnft": "pi-StepNFT", "filtered-bc": "filtered BC"}   # the tested policy's name
SCRIPTS = {"stepnft": "04_train_libero.py", "filtered-bc": "results/filtered_bc.py --lr 1e-4"}


def all_jobs():
    """In the order in which they are run: what a reader asks first, first."""
    first = [("libero_object", 0), ("libero_spatial", 0), ("libero_goal", 0)]
    more = [(suite, seed) for seed in (1, 2) for suite, _ in first]
    runs = [(suite, seed, 1, "stepnft") for suite, seed in first]
    runs += [("libero_object", 0, 1, "filtered-bc"), ("libero_10", 0, 5, "stepnft"),
             ("libero_object", 0, 2, "stepnft"), ("libero_object", 0, 5, "stepnft")]
    runs += [(suite, seed, 1, "stepnft") for suite, seed in more]
    return [dict(zip(("suite", "seed", "demos", "method"), run)) for run in runs]


def tasks_of(suite):
    """The tasks that have an expert worth copying, by the measured table."""
    able = [row["task"] for row in study.read(ROOT / "results/04_train_libero/scripted_experts.csv")
            if row["suite"] == suite and float(row["success"]) >= 0.9]
    if not able:
        raise SystemExit(f"scripted_experts.csv has no row of {suite} with 0.9 or more: run "
                         f"results/experts.py libero --suite {suite}")
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
    call(f"{resume} --out {shlex.quote(str(folder))}")
    curves.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / "log.csv", curves / f"{name_of(job)}.csv")
    rows = tested(folder, command)
    if (job["suite"], job["demos"], job["method"]) == ("libero_object", 1, "stepnft"):
        for file, policy in (("sft.pt", "SFT"), ("last.pt", "pi-StepNFT")):
            out = folder / f"ood_{Path(file).stem}"
            (out / "test.csv").unlink(missing_ok=True)  # 04 adds rows to those of a test cut short
            call(f"04_train_libero.py --eval-only {shlex.quote(str(folder / file))} {OOD} "
                 f"--out {shlex.quote(str(out))}")
            more = tested(out, f"04_train_libero.py --eval-only {file} {OOD}")
            rows += [{**row, "policy": policy} for row in more if row["tested"] != job["suite"]]
    return rows


def call(command):
    print(command, flush=True)
    if subprocess.run([sys.executable, *shlex.split(command)], cwd=ROOT).returncode:
        raise SystemExit(f"this run failed, for the reason above: {command}")


def tested(folder, command):
    """test.csv of a run -> rows of this study; their commit is that of the end of the run."""
    return [{"tested": row["suite"], "starts": row["starts"], "task": row["task"],
             "policy": row["policy"], "episodes": row["episodes"], "success": row["success"],
             **study.origin(command), "hardware": f"{os.cpu_count()} CPU cores"}
            for row in study.read(folder / "test.csv")]


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
            half = study.half_interval(values)
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


def average(suites):
    """Two rows, the mean over suites and that over tasks, each suite at its fewest demonstrations;
    none for fewer than two suites. Removed is of these means, as the paper's 0.776 is."""
    few = at_fewest(suites)
    if len(few) < 2:
        return []
    tasks, found = [row["tasks"] for row in few], []
    for name, weights in (("average", None), ("average of tasks", tasks)):
        before, after = (np.average([row[policy] for row in few], weights=weights)
                         for policy in ("sft", "after"))
        means = {"sft": before, "after": after, "gain": after - before,
                 "removed": (after - before) / (1 - before)}
        found.append({**dict.fromkeys(few[0], ""), "tested": name, "method": "stepnft",
                      "tasks": sum(tasks), **{k: round(float(v), 4) for k, v in means.items()}})
    return found


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
    """protocol_suites.csv, whose rows it returns, and protocol_tasks.csv."""
    suites = summarise(rows)
    suites += average(suites)
    for name, found in (("suites", suites), ("tasks", task_rows(rows))):
        path = folder / f"protocol_{name}.csv"
        path.unlink(missing_ok=True)
        for row in found:
            nft.log_row(path, row)
    return suites


def parse_args():
    parser = flow.Parser(__doc__)
    add = parser.add_argument
    add("--suite", help="only the runs of this suite")
    add("--demos", type=flow.positive_int, help="only those with as many demonstrations a task")
    add("--seed", type=flow.natural, help="only those of this seed")
    add("--method", choices=list(SCRIPTS), help="only those of this method")
    add("--summary", action="store_true", help="no runs: the numbers, from the rows there are")
    add("--out", type=Path, default="results/04_train_libero", help="folder of the tables")
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
        study.collect([job], lambda job: run(job, args.runs, args.out / "protocol"), path)
        write(study.read(path), args.out)
    rows = study.read(path)
    if not rows:
        raise SystemExit(f"--summary: {path} has no rows yet; leave the flag out to make some")
    print(f"{'tested':<22} {'method':<12} demos seeds  before  after  removed")
    for row in write(rows, args.out):
        print("{tested:<22} {method:<12} {demos:>5} {seeds:>5} {sft:>7.3f} {after:>6.3f} "
              "{removed:>8.3f}".format(**row))
    print(f"RESULT rows={len(rows)} saved={path}")


if __name__ == "__main__":
    main()
