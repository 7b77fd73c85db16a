"""Fills the result tables and the line numbers of the pages: README.md and those of the folders.

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

Without columns, a csv gets a table of its own shape (see SHAPES): a grid of targets and noise
levels, say; any other csv is a tuning, a row for each variant and a column for each setting. And

    <!-- table: benchmarks -->

is the one table of the front page: a row for each world, success before and after.

Links such as [`mirror`](03_step_loss.py#L56) get the line on which that name is defined.
tests/test_readme.py fails while a page differs from what this script would write.
"""

import glob
import importlib
import os
import re
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
common = importlib.import_module("results.common")
figures = importlib.import_module("results.figures")
from tools.run import rated  # noqa: E402  (the line above tells where)

read = common.read
PAGES = [ROOT / "README.md"] + [path for folder in ("policies", "course", "results", "results/*")
                                for path in sorted(ROOT.glob(f"{folder}/*.md"))]
LINK = r"\[`([\w.]+)`\]\(([\w./]+\.py)#L(\d+)\)"


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
        flags = row[name].partition(" ")[2]
        return f"`{flags}`" if flags else "–"
    if not inner:
        return show(row[name], form or "")
    value, bounds = float(row[name]), inner.split(",")
    if len(bounds) == 1:
        episodes = int(row[inner])
        found = rated(np.arange(episodes) < round(value * episodes))
        low, high = found["low"], found["high"]
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
    if pattern == "benchmarks":
        return benchmark_table()
    rows = rows_of(pattern)
    for name, value in (re.fullmatch(r"where (\w+)=(.*)", s).groups() for s in specs
                        if s.startswith("where ")):
        rows = [row for row in rows if row[name] in value.split(",")]
    columns = [spec for spec in specs if not re.match("where |mean (row|only)$", spec)]
    if not columns:
        return SHAPES.get(pattern, grid_table)(rows)
    cells = [] if "mean only" in specs else [[cell(row, spec) for spec in columns] for row in rows]
    mean = {"mean row", "mean only"} & set(specs)
    return cells + ([mean_row(rows, columns)] if mean else [])


def plus_minus(row):
    return f"{row['after']:.3f} ± {row['half']:.3f}"


def points(low, mean, high):
    return f"{100 * mean:+.1f} [{100 * low:+.1f},&nbsp;{100 * high:+.1f}]"


def ablation_table(rows):
    """Every variant: mean ± half of the 95 % interval, difference to the first of its figure in
    points, the paper's number, and whether the interval says the same."""
    return [[row["figure"], f"`{row['variant']}`", row["lr"], plus_minus(row),
             "–" if np.isnan(row["gain"]) else points(row["low"], row["gain"], row["high"]),
             "–" if row["paper"] is None else f"{row['paper']:g}", row["verdict"] or "–"]
            for row in common.load("ablations", "tables").summarise(rows)]


def phase_table(rows):
    """Target x noise level: mean ± half of the 95 % interval; then next step minus each of the
    others, paired by seed, in points; then the settings that the tuning chose."""
    table, cells = common.load("ablations", "tables").phase_table(rows), []
    by_target = {target: [row for row in table if row["target"] == target]
                 for target in figures.TARGETS}
    names = {target: name for target, (name, *_) in figures.TARGETS.items()}
    for target, own in by_target.items():
        if own:
            cells.append([names[target], *map(plus_minus, own)])
    for target, own in by_target.items():
        if own and target != "next":
            cells.append([f"next step - {names[target]}", *(
                points(row["low"], row["gain"], row["high"]) for row in own)])
    for target, own in by_target.items():
        if len({(row["ema"], row["lr"]) for row in table}) > 1 and own:
            cells.append([f"EMA, lr of {names[target]}", *(
                f"{row['ema'].replace(' ', '–')}, {float(row['lr']):.0e}".replace("e-0", "e-")
                for row in own)])
    return cells


def sde_table(rows):
    """Rollout x noise level: mean ± half of the 95 % interval; then the SDE minus each of the
    others, paired by seed, in points."""
    own, cells = common.load("ablations", "tables"), []
    noises = sorted({row["noise_level"] for row in rows}, key=float)
    for rollout, target in dict.fromkeys((row["rollout"], row["target"]) for row in rows):
        seen = [[row for row in rows if (row["rollout"], row["target"], row["noise_level"]) == (
            rollout, target, noise)] for noise in noises]
        cells.append([f"{rollout.upper() if len(rollout) == 3 else rollout}, {target}",
                      *(plus_minus(own.mean_of(part)) if part else "as at 0.2" for part in seen)])
    found = own.sde_over_ode(rows)
    for name in dict.fromkeys(comparison.split(",")[0] for comparison, _ in found):
        by_noise = {comparison.split("noise ")[1]: points(row["low"], row["gain"], row["high"])
                    for comparison, row in found if comparison.split(",")[0] == name}
        cells.append([name.replace("sde", "SDE").replace("ode", "ODE"),
                      *(by_noise.get(noise, "–") for noise in noises)])
    return cells


def recovery_table(rows):
    """Each way to train: its settings, where training went, success from each kind of start, mean
    ± half of the 95 % interval."""
    study, cells = common.load("recovery"), []
    for way, name in study.NAMES.items():
        own = [row for row in rows if row["way"] == ("ode" if way == "sft" else way)]
        values = [[float(row["sft_" * (way == "sft") + test]) for row in own]
                  for test in study.TESTS]
        outside = np.mean([float(row["training_outside"]) for row in own])
        settings = ["–", "–"] if way == "sft" else [
            f"{own[0]['ema'].replace(' ', '–')}, {float(own[0]['lr']):g}", f"{100 * outside:.1f}"]
        cells.append([name, *settings, *(
            plus_minus({"after": np.mean(one), "half": common.half_interval(one)})
            for one in values)])
    return cells


def recovery_verdicts(rows):
    """Each difference: a column for each kind of start."""
    names, cells = common.load("recovery").NAMES, {}
    for row in rows:
        after, before = row["comparison"].split(" - ")
        cells.setdefault(f"{names[after]} - {names[before]}", []).append(
            points(*(float(row[name]) for name in ("low", "mean", "high"))))
    return [[name, *shown] for name, shown in cells.items()]


def mechanism_table(rows):
    """Noise levels: the three shares of the endpoint's residual at each step, mean over clones, and
    the share of failures at which its pull turns to push, median over clones, before the last."""
    rows, cells = [row for row in rows if row["target"] == "endpoint"], []
    for noise in dict.fromkeys(row["noise_level"] for row in rows):
        steps = [[row for row in rows if (row["noise_level"], row["step"]) == (noise, str(k))]
                 for k in range(figures.K)]
        cells.append([noise, *(", ".join(
            f"{np.mean([float(row[part]) for row in own]):.2f}".lstrip("0") for own in steps)
            for part in ("systematic", "own", "later")), ", ".join(
            f"{np.median([float(row['crossing']) for row in own]):.2f}".lstrip("0")
            for own in steps[:-1])])
    return cells


def benchmark_table():
    """The front page's: world, seeds, success before and after in %, gain with its 95 % t-interval
    over seeds, in points."""
    libero, = [row for row in rows_of("results/libero/protocol_average.csv")
               if row["over"] == "seeds"]
    ten, = [row for row in rows_of("results/libero/protocol_suites.csv")
            if (row["tested"], row["method"]) == ("libero_10", "stepnft")]
    cells = []
    for name, seeds, *numbers in (
            ("[toy world](results/toy/README.md)", *over_seeds("toy")),
            ("[LIBERO](results/libero/README.md), 26 tasks of three suites, one demonstration each",
             libero["count"], libero["sft"], libero["after"], libero["gain_low"],
             libero["gain_high"]),
            ("beside it: 2 tasks of libero_10, five demonstrations each",
             ten["seeds"], ten["sft"], ten["after"], ten["gain_low"], ten["gain_high"]),
            ("[ManiSkill](results/maniskill/README.md), PickCube", *over_seeds("maniskill"))):
        before, after, low, high = (100 * float(number) for number in numbers)
        interval = "–" if np.isnan(low) else f"[{low:+.1f},&nbsp;{high:+.1f}]"
        cells.append([name, str(seeds), f"{before:.1f}", f"{after:.1f}", f"{after - before:+.1f}",
                      interval])
    return cells


def over_seeds(folder):
    """A study's summary.csv, a row for each seed -> seeds, success before, after, and the ends of
    the gain's interval."""
    before, after = ({i: float(row[column]) for i, row in enumerate(
        rows_of(f"results/{folder}/summary.csv"))} for column in ("sft", "stepnft"))
    _, low, high = common.difference(after, before)
    return len(before), np.mean(list(before.values())), np.mean(list(after.values())), low, high


def gap_verdicts(rows):
    """verdicts.csv of PixelGap: success differences in points, explained variance as it is."""
    names = {"stepnft": "π-StepNFT", "ppo-action": "PPO, action noise", "ppo": "PPO",
             "grpo": "GRPO"}

    def shown(row):
        comparison = row["comparison"]
        for algo, name in names.items():
            comparison = comparison.replace(algo, name)
        difference = "{:+.{n}f} [{:+.{n}f},&nbsp;{:+.{n}f}]".format(
            *(float(row[name]) for name in ("mean", "low", "high")),
            n=2 if "critic" in comparison else 1)
        return [comparison, row["measure"], row["scenes"], row["seeds"], difference,
                row["verdict"] or "–"]

    return [shown(row) for row in rows]


def gap_table(rows):
    """main.csv of PixelGap: success of the clone and of each method at the end, mean ± 95 %."""
    iterations = {int(row["iteration"]) for row in rows}
    start, end = min(iterations), max(iterations)
    cells = []
    algos = dict.fromkeys(row["algo"] for row in rows)
    for name, algo, when in (("SFT", "stepnft", start),
                             *((figures.NAMES[algo], algo, end) for algo in algos)):
        own = [row for row in rows if row["algo"] == algo and int(row["iteration"]) == when]
        shown = [[float(row[c]) for row in own] for c in ("id", "textures", "gaps", "both",
                                                          "starts")]
        cells.append([name, *(plus_minus({"after": np.mean(values),
                                          "half": common.half_interval(values)})
                              for values in shown)])
    return cells


def gap_tuning(rows):
    """tuning.csv of PixelGap: the settings of each method, best first."""
    columns = []
    for algo in ("stepnft", "ppo", "grpo"):
        own = [row for row in rows if row["algo"] == algo]
        names = [n for n in ("lr", "noise_level", "ema", "target_kl") if any(r[n] for r in own)]
        found = {}
        for row in own:
            found.setdefault(tuple(row[n] for n in names), []).append(float(row["after"]))
        ranked = sorted(found.items(), key=lambda kv: (-len(kv[1]), -np.mean(kv[1])))
        columns.append([(f"lr {float(key[0]):.0e}".replace("e-0", "e-") + f", noise {key[1]}, "
                         f"{'EMA' if algo == 'stepnft' else 'KL'} {key[2]}",
                         f"{'**' * (i == 0)}{np.mean(values):.3f}{'**' * (i == 0)} "
                         f"({len(values)})") for i, (key, values) in enumerate(ranked)])
    return [[text for pair in row for text in pair] for row in zip(*columns)]


def centred_table(rows):
    """Target and noise: mean ± half of the 95 % interval with labels ±1, with centred ones, and
    their difference, paired by seed, in points."""
    cells = []
    for target, noise in dict.fromkeys((row["target"], row["noise_level"]) for row in rows):
        one, group = ({row["seed"]: float(row["after"]) for row in rows if (
            row["target"], row["noise_level"], row["group_size"]) == (target, noise, size)}
            for size in ("1", "8"))
        means = [{"after": np.mean(list(own.values())),
                  "half": common.half_interval(list(own.values()))} for own in (one, group)]
        gain, low, high = common.difference(group, one)
        cells.append([figures.TARGETS[target][0], noise, *map(plus_minus, means),
                      points(low, gain, high)])
    return cells


def grid_table(rows):
    """A tuning, a row for each variant: every setting's mean over the seeds that it played, and how
    many these were; the one that was taken, the best of those that played them all, is bold."""
    variant = ("variant",) if "variant" in rows[0] else ("target", "noise_level")
    setting = [name for name in ("ema", "lr") if name in rows[0]]

    def values(names, row):
        return tuple(row[name] for name in names)

    columns, cells = sorted({values(setting, row) for row in rows}), []
    for which in sorted({values(variant, row) for row in rows}):
        own = [[float(row["after"]) for row in rows
                if (values(variant, row), values(setting, row)) == (which, column)]
               for column in columns]
        taken = max(own, key=lambda after: (len(after), np.mean(after or 0)))
        shown = [f"{np.mean(after):.3f} ({len(after)})" if after else "–" for after in own]
        cells.append([" ".join(which), *(f"**{text}**" if after is taken else text
                                         for after, text in zip(own, shown))])
    return cells


SHAPES = {"results/ablations/phase.csv": phase_table,
          "results/ablations/phase_robot.csv": phase_table,
          "results/ablations/ablations.csv": ablation_table,
          "results/ablations/centred.csv": centred_table,
          "results/ablations/sde.csv": sde_table,
          "results/recovery/recovery.csv": recovery_table,
          "results/recovery/verdicts.csv": recovery_verdicts,
          "results/mechanism/mechanism.csv": mechanism_table,
          "results/pixel_gap/verdicts.csv": gap_verdicts,
          "results/pixel_gap/main.csv": gap_table,
          "results/pixel_gap/tuning.csv": gap_tuning}


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
