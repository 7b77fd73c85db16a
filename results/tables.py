"""Fills the result tables and the line numbers of README.md from results/ and the scripts.

Run:     python results/tables.py          (after new results, or after a script has moved)

A table of results stands under a comment that says where each column comes from:

    <!-- table: PATH | column | column | ... | where COLUMN=VALUE,VALUE | mean -->

PATH     a csv in results/, or a pattern; the seed in a file's name then becomes the column `seed`
column   NAME              as in the csv, floats with three decimals (NAME:.1f asks for one)
         NAME:flags        a command without the script's name
         NAME[low,high]    with the interval of these two columns
         NAME[episodes]    with the 95 % Wilson interval for that column's number of episodes
         AFTER-BEFORE      a gain, in points
where    keeps some rows;  `mean row` adds a last one. Both may be left out.

Links such as [`mirror`](03_step_loss.py#L56) get the line on which that name is defined.
tests/test_readme.py fails while README.md differs from what this script would write.
"""

import csv
import glob
import importlib
import re
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "results"))
flow, nft, figures = map(importlib.import_module, ("01_flow_policy", "03_step_loss", "figures"))


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def rows_of(pattern):
    files, rows = sorted(glob.glob(str(ROOT / pattern))), []
    if not files:
        raise SystemExit(f"README.md cites {pattern}, which does not exist")
    for file in files:
        seed = re.search(r"seed(\d+)", Path(file).name)
        rows += [{**({"seed": seed[1]} if seed else {}), **row} for row in read(file)]
    return rows


def show(value, form=""):
    """A csv entry as the README writes it."""
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
        low, high = flow.wilson(np.arange(episodes) < round(value * episodes))
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
    if pattern == "ablations":
        return ablations()
    if pattern.endswith("ood.csv"):
        return axes_table(ROOT / pattern)
    rows, mean = rows_of(pattern), "mean row" in specs
    for name, value in (re.fullmatch(r"where (\w+)=(.*)", s).groups() for s in specs
                        if s.startswith("where ")):
        rows = [row for row in rows if row[name] in value.split(",")]
    columns = [spec for spec in specs if spec != "mean row" and not spec.startswith("where ")]
    cells = [[cell(row, spec) for spec in columns] for row in rows]
    return cells + ([mean_row(rows, columns)] if mean else [])


def ablations():
    """Every variant of 03, both learning rates and the paper: mean ± half of the 95 % interval."""
    folders = [ROOT / f"results/03_compare_lr{lr}/compare.csv" for lr in ("3e-4", "1e-3")]
    by_name = [{(r["figure"], r["variant"]): r for r in nft.summarise(read(f))} for f in folders]
    cells = []
    for figure, variant, flags, paper in nft.VARIANTS:
        found = [runs.get((figure, variant)) for runs in by_name]
        cells.append([figure, variant, f"`{flags}`" if flags else "", *(
            f"{r['after']:.3f} ± {r['half']:.3f}" if r else "–" for r in found),
            "–" if paper is None else f"{paper:g}"])
    return cells


def axes_table(path):
    """The out-of-distribution suite: a row for each policy, its mean over seeds on each axis, and
    after ± half of the 95 % t-interval over seeds; last, what pi-StepNFT is ahead of PPO."""
    rows, cells, means = figures.ood_rows(path), [], {}
    for policy in dict.fromkeys(row[2] for row in rows):
        found = []
        for axis in figures.AXES:
            values = [row[3] for row in rows if row[2] == policy and row[0] == axis]
            means[policy, axis] = np.mean(values)
            found.append(f"{np.mean(values):.3f} ± {nft.half_interval(values):.3f}")
        cells.append([figures.NAMES.get(policy, policy), *found])
    gains = [100 * (means["stepnft", axis] - means["ppo", axis]) for axis in figures.AXES]
    return cells + [["π-StepNFT - PPO, points", *(f"{gain:+.1f}" for gain in gains)]]


def defined_at(path, name):
    """The line of `def name` or `class name` in a script; for `Class.method` inside that class."""
    line, lines = 0, path.read_text().split("\n")
    for part in name.split("."):
        found = [i for i in range(line, len(lines))
                 if re.match(rf"\s*(def|class) {part}\b", lines[i])]
        if not found:
            raise SystemExit(f"README.md links to {name}, which {path.name} does not define")
        line = found[0]
    return line + 1


def refresh(text):
    """README text -> the same with today's numbers and line anchors."""
    def fill(match):
        pattern, *specs = [part.strip() for part in match["spec"].split("|")]
        rows = "".join(f"| {' | '.join(cells)} |\n" for cells in table(pattern, specs))
        return match["head"] + rows

    text = re.sub(r"(?P<head><!-- table:(?P<spec>.*?)-->\n(\|.*\n){2})(\|.*\n)*", fill, text)
    return re.sub(r"\[`([\w.]+)`\]\((\w+\.py)#L\d+\)", lambda m: (
        f"[`{m[1]}`]({m[2]}#L{defined_at(ROOT / m[2], m[1])})"), text)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    before = readme.read_text()
    readme.write_text(refresh(before))
    changed = sum(a != b for a, b in zip(before.split("\n"), refresh(before).split("\n")))
    print(f"README.md: {changed} lines changed")
