"""What the studies share: one function run for many jobs, a row of a csv for each, tuned before it
is reported.

A job is a dict of settings, run(job) -> a dict of results, or a list of such; both together are a
row. A job whose row is there is not run again: a killed study goes on with the same command.

    collect(jobs, run, path)                     runs what is missing, several at a time
    best = tune(variants, grid, run, path)       for each variant the setting to report with

Every variant is tuned alike, by halving, on run seeds (clone, rollouts, updates) that no reported
number uses: the whole grid plays seed 100, the better half of it also 101, the better half of that
also 102 and 103 (never fewer than three settings), and the best mean over the four seeds wins. The
csv keeps all of it.
"""

import contextlib
import csv
import functools
import importlib
import io
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from tools import flags  # noqa: E402  (the line above tells where)

ROUNDS = ((100,), (101,), (102, 103))   # seeds of the tuning; reported ones are below 100


def load(name, program="run"):
    """The program of a study, results/NAME/run.py, or another beside it, as a module."""
    return importlib.import_module(f"results.{name}.{program}")


def text(value):
    """A setting as the csv holds it: 0.001, "0.1 0.995", next."""
    if isinstance(value, (list, tuple)):
        return " ".join(text(part) for part in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def key(job):
    return tuple(sorted((name, text(value)) for name, value in job.items()))


def read(path):
    """The csv as a list of dicts of strings; no file, no rows."""
    if not Path(path).exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def rows_of(jobs, path):
    """Those rows of the csv that belong to one of the jobs, which all have the same entries."""
    wanted, names = {key(job) for job in jobs}, jobs[0] if jobs else ()
    return [row for row in read(path) if key({name: row[name] for name in names}) in wanted]


def sort_rows(jobs, path):
    """Writes the csv again in the order of the jobs, other rows last -> the rows of the jobs."""
    rows, order = read(path), [key(job) for job in jobs]
    names = jobs[0]

    def place(row):
        own = key({name: row[name] for name in names})
        return order.index(own) if own in order else len(order)

    rows.sort(key=place)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return [row for row in rows if place(row) < len(order)]


class Failed(Exception):
    """A script that was called stopped with an error, which it has told."""


def call(command, show=False):
    """A script of this repo, `NAME.py FLAGS`, run in the repo's folder -> what it printed; with
    `show` that is printed as it comes instead, and the command before it."""
    if show:
        print(command, flush=True)
    done = subprocess.run([sys.executable, *shlex.split(command)], cwd=ROOT, text=True,
                          stdout=None if show else subprocess.PIPE)
    if done.returncode:
        raise Failed(f"this run failed, for the reason above: {command}")
    return done.stdout


def cores():
    """How many CPU cores this process may use: on macOS and Windows all of them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def calm():
    """A worker process: one thread, and Ctrl-C is its parent's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def answer(run, job):
    """The rows of a job: most have one, some have one for each point of a curve."""
    results = run(job)
    return [{**{name: text(value) for name, value in job.items()}, **row}
            for row in (results if isinstance(results, list) else [results])]


def append(path, rows):
    """Adds a job's rows to the csv in one write: a study that is killed has all of them or none.
    Floats are rounded as by 03's `log_row`."""
    lines = io.StringIO()
    writer = csv.DictWriter(lines, rows[0])
    with open(path, "ab", buffering=0) as file:
        if file.tell() == 0:
            writer.writeheader()
        writer.writerows({name: round(value, 5) if isinstance(value, float) else value
                          for name, value in row.items()} for row in rows)
        file.write(lines.getvalue().encode())


def collect(jobs, run, path, workers=1, desc="runs"):
    """Runs the jobs that the csv does not have; their rows are added to it as they come."""
    names = jobs[0] if jobs else ()
    done = {key({name: row.get(name) for name in names}) for row in read(path)}
    todo = [job for job in jobs if key(job) not in done]
    try:
        with contextlib.ExitStack() as stack:
            run_all = map
            if workers > 1 and len(todo) > 1:
                spawn = torch.multiprocessing.get_context("spawn")
                pool = stack.enter_context(spawn.Pool(min(workers, len(todo)), calm))
                run_all = pool.imap_unordered
            answers = run_all(functools.partial(answer, run), todo)
            header = list(read(path)[0]) if done else None
            for rows in tqdm(answers, total=len(todo), desc=desc, disable=None):
                if header and header != list(rows[0]):
                    raise SystemExit(f"{path} has other columns than this study: move it away")
                append(path, rows)
    except Failed as failure:
        raise SystemExit(str(failure)) from None
    except KeyboardInterrupt:
        raise SystemExit(f"stopped: the same command goes on with {path}") from None


def tune(variants, grid, run, path, workers=1, score="after"):
    """The setting of the grid that serves each variant best: a dict for each, in their order."""
    left, played = [list(grid) for _ in variants], ()
    for seeds in ROUNDS:
        played += seeds
        collect([{**variant, **setting, "seed": seed} for seed in seeds
                 for variant, settings in zip(variants, left) for setting in settings],
                run, path, workers, desc=f"tuning, {len(left[0])} settings each")

        def mean(variant, setting):
            rows = rows_of([{**variant, **setting, "seed": seed} for seed in played], path)
            return np.mean([float(row[score]) for row in rows])

        left = [sorted(settings, key=lambda setting: -mean(variant, setting))
                for variant, settings in zip(variants, left)]
        left = [settings[:max(3, len(grid) // 2 ** len(played))] for settings in left]
    return [settings[0] for settings in left]


def add_toy_flags(parser, out):
    """What every study of the toy world asks: which seeds, how long, how many at a time, where."""
    add = parser.add_argument
    add("--seeds", type=flags.positive_int, default=8, help="how many seeds")
    add("--first-seed", type=flags.natural, default=0,
        help="the first of them: seed of SFT, rollouts and updates")
    add("--iterations", type=flags.positive_int, default=160, help="RL iterations")
    add("--episodes", type=flags.positive_int, default=512, help="episodes per iteration")
    add("--jobs", type=flags.positive_int, default=cores(), help="runs at a time, one core each")
    add("--out", type=Path, default=out, help="folder of tables and figure")


def check_toy_flags(parser, args):
    """Reported seeds are none of the tuning's; --out is made."""
    if args.first_seed + args.seeds > ROUNDS[0][0]:
        parser.error(f"--first-seed {args.first_seed}, --seeds {args.seeds}: seeds from "
                     f"{ROUNDS[0][0]} on are for tuning")
    parser.make_folder("--out", args.out)


def tune_and_play(variants, grid, run, args, name, score="after"):
    """Each variant at the setting that served it best, on the reported seeds -> their rows.
    Saves NAME.csv and, if there was a choice, NAME_tuning.csv."""
    torch.set_num_threads(1)  # on nets this small, threads only wait for each other
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    tuned_on = sum(ROUNDS, ()) if len(grid) > 1 else ()
    for seed in [*seeds, *tuned_on]:
        importlib.import_module("01_flow_policy").toy_policy(seed)  # once, before workers need it
    best = grid * len(variants) if len(grid) == 1 else tune(
        variants, grid, run, args.out / f"{name}_tuning.csv", args.jobs, score)
    jobs = [{**one, **setting, "seed": seed} for seed in seeds
            for one, setting in zip(variants, best)]
    collect(jobs, run, args.out / f"{name}.csv", args.jobs)
    return rows_of(jobs, args.out / f"{name}.csv")


def half_interval(values):
    """Half of the 95 % t-interval of a mean; nan for a single value."""
    from scipy import stats  # not at the top: every worker process would load it
    return stats.t.ppf(0.975, len(values) - 1) * stats.sem(values) if len(values) > 1 else np.nan


def difference(after, before):
    """Two dicts {seed: value} -> (mean, low, high) of after - before, paired by seed: 95 % t."""
    gains = [after[seed] - before[seed] for seed in after if seed in before]
    half = half_interval(gains)
    return np.mean(gains), np.mean(gains) - half, np.mean(gains) + half


def result_line(printed):
    """The last line of a script, `RESULT name=value ...` -> a dict of strings."""
    word, *pairs = printed.strip().splitlines()[-1].split()
    assert word == "RESULT", f"expected a line RESULT, got {word}"
    return dict(pair.split("=", 1) for pair in pairs)


def origin(command):
    """The columns that say where a row comes from."""
    failed, commit = subprocess.getstatusoutput(f"git -C '{ROOT}' describe --always --dirty")
    return {"commit": "" if failed else commit, "command": command,
            "hardware": f"1 of {os.cpu_count()} CPU cores"}
