"""Fills the result tables and the line numbers of README.md and results/*/README.md.

Run:     python results/tables.py          (after new results, or after a script has moved)

A table of results stands under a comment that says where each column comes from:

    <!-- table: PATH | column | column | ... | where COLUMN=VALUE,VALUE | mean row -->

PATH     a csv in results/, or a pattern; the seed in a file's name then becomes the column `seed`
column   NAME              as in the csv, floats with three decimals (NAME:.1f asks for one)
         NAME:flags        a command without the script's name
         NAME[low,high]    with the interval of these two columns
         NAME[episodes]    with the 95 % Wilson interval for that column's number of episodes
         AFTER-BEFORE      a gain, in points
where    keeps some rows;  `mean row` adds a last one, `mean only` shows no other. May be left out.

Without columns, a csv gets a table of its own shape: trial_target_noise target x noise, ood policy
x axis, runs of results/ablations.py variant x learning rate (mean over seeds).

Links such as [`mirror`](03_step_loss.py#L56) get the line on which that name is defined.
tests/test_readme.py fails while a page differs from what this script would write.
"""

import csv
import glob
import importlib
import os
import re
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "results")]
robot, ablations, figures = map(importlib.import_module,
                                ("04_train_libero", "ablations", "figures"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "results").glob("*/README.md"))]
LINK = r"\[`([\w.]+)`\]\(([\w./]+\.py)#L(\d+)\)"


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def rows_of(pattern):
    files, rows = sorted(glob.glob(str(ROOT / pattern))), []
    if not files:
        raise SystemExit(f"a README cites {pattern}, which does not exist")
    for file in files:
        seed = re.search(r"seed(\d+)", Path(file).name)
        rows += [{**({"seed": seed[1]} if seed else {}), **row} for row in read(file)]
    return rows


def show(value, form=""):
    """A csv entry as a README writes it."""
    if value == "":
        return ""
    if isinstance(value, str) and not re.fullmatch(r"-?[\d.]+(e-?\d+)?", value):
        return f"`{value}`" if re.match(r"\d\d_|--", value) else figures.NAMES.get(value, value)
    if not form and "." not in str(value):
        return f"{int(value):,}"
    return f"{float(value):{form or '.3f'}}"


def cell(row, spec):
    gain = re.fullmatch(r"(\w+)-(\w+)", spec)
    if gain:
        return f"{100 * (float(row[gain[1]]) - float(row[gain[2]])):+.1f}"
    name, inner, form = re.fullmatch(r"(\w+)(?:\[(.+)\])?(?::(.+))?", spec).groups()
    if form == "flags":
        return f"`{row[name].split(' ', 1)[1]}`"
    if not inner:
        return show(row[name], form or "")
    value, bounds = float(row[name]), inner.split(",")
    if len(bounds) == 1:
        episodes = int(row[inner])
        rated = robot.rated(np.arange(episodes) < round(value * episodes))
        low, high = rated["low"], rated["high"]
    else:
        low, high = (float(row[bound]) for bound in bounds)
    return f"{value:.3f} [{low:.3f},&nbsp;{high:.3f}]"


def mean_row(rows, specs):
    """Means of the rates and gains; the first column says so, what has no mean stays empty."""
    cells = [f"mean of {len(rows)}"]
    for spec in specs[1:]:
        gain, rate = re.fullmatch(r"(\w+)-(\w+)", spec), re.fullmatch(r"(\w+)\[.+\]", spec)
        if gain:
            after, before = (np.mean([float(row[name]) for row in rows]) for name in gain.groups())
            cells.append(f"{100 * (after - before):+.1f}")
        else:
            cells.append(f"{np.mean([float(row[rate[1]]) for row in rows]):.3f}" if rate else "")
    return cells


def table(pattern, specs):
    """-> rows of cells."""
    rows = rows_of(pattern)
    for name, value in (re.fullmatch(r"where (\w+)=(.*)", s).groups() for s in specs
                        if s.startswith("where ")):
        rows = [row for row in rows if row[name] in value.split(",")]
    columns = [spec for spec in specs if not re.match("where |mean (row|only)$", spec)]
    if not columns:
        shapes = {"ood": axes_table, "trial_target_noise": trial_table}
        return shapes.get(Path(pattern).stem, ablation_table)(rows)
    cells = [] if "mean only" in specs else [[cell(row, spec) for spec in columns] for row in rows]
    mean = {"mean row", "mean only"} & set(specs)
    return cells + ([mean_row(rows, columns)] if mean else [])


def ablation_table(rows):
    """Every variant at both learning rates, and the paper: mean ± half of the 95 % interval."""
    by_lr = [{(row["figure"], row["variant"]): row for row in ablations.summarise(
        [row for row in rows if float(row["lr"]) == lr])} for lr in (3e-4, 1e-3)]
    cells = []
    for figure, variants in ablations.FIGURES.items():
        for variant, paper in variants.items():
            found = [runs.get((figure, variant)) for runs in by_lr]
            if any(found):
                cells.append([figure, f"`{variant}`", *(
                    f"{r['after']:.3f} ± {r['half']:.3f}" if r else "–" for r in found),
                    "–" if paper is None else f"{paper:g}"])
    return cells


def trial_table(rows):
    """Target x noise level; a cell holds the seeds, one after the other."""
    cells = []
    for target, ema in dict.fromkeys((row["target"], row["ema"]) for row in rows):
        own = [row for row in rows if (row["target"], row["ema"]) == (target, ema)]
        cells.append([target, ema.replace(" ", " to "), *(
            " / ".join(f"{float(row['success']):.3f}" for row in own
                       if row["noise_level"] == level) or "–"
            for level in dict.fromkeys(row["noise_level"] for row in rows))])
    return cells


def axes_table(rows):
    """The out-of-distribution suite. For each policy the rate on each axis, all episodes pooled;
    the OOD mean is that of the three axes. Then differences of policies that share their clones and
    their starts: paired by seed, ± half of the 95 % t-interval over seeds, in points."""
    seeds = sorted({row["seed"] for row in rows})
    policies, axes = (list(dict.fromkeys(row[name] for row in rows)) for name in ("policy", "axis"))

    def rates(policy, seeds):
        """Of the axes, then of OOD, over these seeds."""
        found = []
        for axis in axes:
            own = [row for row in rows if row["policy"] == policy and row["axis"] == axis
                   and row["seed"] in seeds]
            episodes = [int(row["episodes"]) for row in own]
            found.append(np.average([float(row["success"]) for row in own], weights=episodes))
        return np.array([*found, np.mean(found[1:])])

    cells = [[figures.NAMES.get(policy, policy), *(f"{rate:.3f}" for rate in rates(policy, seeds))]
             for policy in policies]
    for before, after in (("SFT", "ppo"), ("SFT", "stepnft"), ("ppo", "stepnft")):
        gains = np.array([100 * (rates(after, seed) - rates(before, seed)) for seed in seeds])
        shown = [f"{points.mean():+.1f} ± {ablations.half_interval(points):.1f}"
                 for points in gains.T]
        names = " - ".join(figures.NAMES.get(name, name) for name in (after, before))
        cells.append([names, *shown])
    return cells


def defined_at(path, name):
    """The line of `def name` or `class name` in a script; for `Class.method` inside that class."""
    line, lines = 0, path.read_text().split("\n")
    for part in name.split("."):
        found = [i for i in range(line, len(lines))
                 if re.match(rf"\s*(def|class) {part}\b", lines[i])]
        if not found:
            raise SystemExit(f"a README links to {name}, which {path.name} does not define")
        line = found[0]
    return line + 1


def refresh(text, folder=ROOT):
    """A page of `folder` -> the same with today's numbers and line anchors."""
    def fill(match):
        pattern, *specs = [part.strip() for part in match["spec"].split("|")]
        rows = "".join(f"| {' | '.join(cells)} |\n" for cells in table(pattern, specs))
        return match["head"] + rows

    text = re.sub(r"(?P<head><!-- table:(?P<spec>.*?)-->\n(\|.*\n){2})(\|.*\n)*", fill, text)
    return re.sub(LINK, lambda m: (f"[`{m[1]}`]({m[2]}#L{defined_at(folder / m[2], m[1])})"), text)


if __name__ == "__main__":
    for page in PAGES:
        before = page.read_text()
        after = refresh(before, page.parent)
        changed = sum(a != b for a, b in zip(before.split("\n"), after.split("\n")))
        page.write_text(after)
        print(f"{os.path.relpath(page, ROOT)}: {changed} lines changed")
