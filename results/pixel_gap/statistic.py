"""The statistic of results/pixel_gap/README.md and its figure, from the rows of main.csv.

A row is one evaluation of one run: algo, scenes, seed, iteration, success in each condition.
"""

import functools
import importlib
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
common, figures = map(importlib.import_module, ("results.common", "results.figures"))

OOD = ("textures", "gaps", "both")     # their mean is what "out of distribution" means below
SCENES = 64                            # of the main run


def smooth(values):
    """Running mean of three, of two at the end; the first, the clone that all share, as it is."""
    return np.array([values[0], *(np.mean(values[i - 1:i + 2]) for i in range(1, len(values)))])


def curve(rows, names):
    """Rows of one run, in the order of time -> the mean of these columns, smoothed."""
    rows = sorted(rows, key=lambda row: int(row["iteration"]))
    return smooth([np.mean([float(row[name]) for name in names]) for row in rows])


def where_first(success, level):
    """The point of a curve, in (fractions of) evaluations, that first reaches this level."""
    i = int(np.argmax(success >= level))
    return i if i == 0 else i - 1 + (level - success[i - 1]) / (success[i] - success[i - 1])


def matched(a, b, names=OOD):
    """Rows of two runs from one clone -> success of a minus that of b, mean of these columns, where
    both have the highest in-distribution success that both reach."""
    level = min(curve(a, ["id"]).max(), curve(b, ["id"]).max())
    at = [np.interp(where_first(curve(rows, ["id"]), level), np.arange(len(rows)),
                    curve(rows, names)) for rows in (a, b)]
    return at[0] - at[1]


def at_end(rows, names):
    """The last evaluation of a run, mean of these columns."""
    last = max(rows, key=lambda row: int(row["iteration"]))
    return np.mean([float(last[name]) for name in names])


def ahead(a, b, names):
    """The same at the end."""
    return at_end(a, names) - at_end(b, names)


def runs_of(rows):
    """{(algo, scenes, seed): its rows}."""
    runs = {}
    for row in rows:
        runs.setdefault((row["algo"], row["scenes"], row["seed"]), []).append(row)
    return runs


def verdicts(rows):
    """Paired differences over seeds, in points with their 95 % t-interval: rows of verdicts.csv."""
    runs, found = runs_of(rows), []
    measures = {"OOD at equal in-distribution success": matched,
                "OOD at the end": functools.partial(ahead, names=OOD),
                "in-distribution at the end": functools.partial(ahead, names=["id"]),
                "starts farther out at the end": functools.partial(ahead, names=["starts"])}
    for scenes in dict.fromkeys(row["scenes"] for row in rows):
        for a, b in (("stepnft", "ppo"), ("grpo", "ppo"), ("stepnft", "grpo"),
                     ("ppo-action", "ppo"), ("ppo-action", "stepnft")):
            seeds = [s for algo, n, s in runs if (algo, n) == (a, scenes) and (b, n, s) in runs]
            for measure, difference in measures.items() if len(seeds) > 1 else ():
                points = [100 * difference(runs[a, scenes, s], runs[b, scenes, s]) for s in seeds]
                mean, half = np.mean(points), common.half_interval(points)
                supported = ("supported" if mean >= 5 and mean > half else
                             "not supported here" if mean + half < 5 else "undecided")
                found.append({"comparison": f"{a} - {b}", "measure": measure, "scenes": scenes,
                              "seeds": len(seeds), "mean": float(mean), "low": float(mean - half),
                              "high": float(mean + half),
                              "verdict": supported if (difference, scenes) == (
                                  matched, str(SCENES)) else ""})
        found += critic_overfits({key[2]: run for key, run in runs.items()
                                  if key[:2] == ("ppo", scenes)}, scenes)
    return found


def critic_overfits(runs, scenes):
    """The manipulation check: what PPO's critic explains, less from here to there, at the end."""
    found = []
    for a, b in (("trained", "fresh"), ("fresh", "unseen")):
        lost = [at_end(run, [f"critic_{a}"]) - at_end(run, [f"critic_{b}"])
                for run in runs.values()]
        if len(lost) > 1:
            half = common.half_interval(lost)
            found.append({"comparison": "critic of ppo", "measure": f"explains {a} - {b}",
                          "scenes": scenes, "seeds": len(lost), "mean": float(np.mean(lost)),
                          "low": float(np.mean(lost) - half), "high": float(np.mean(lost) + half),
                          "verdict": "overfits" if np.mean(lost) > half else "does not show"})
    return found


def draw(rows, path):
    """In and out of distribution along training, the path of one against the other, and how much
    of the returns the critic explains: means over seeds (of the critic medians), bands of the 95 %
    t-interval."""
    import matplotlib
    from matplotlib.figure import Figure
    with matplotlib.rc_context(figures.STYLE):
        fig = Figure(figsize=(13, 3.2))
        axes = fig.subplots(1, 4)
        for algo, line in zip(dict.fromkeys(row["algo"] for row in rows), ("-", "--", ":", "-.")):
            own = [run for (name, scenes, _), run in runs_of(rows).items()
                   if (name, scenes) == (algo, str(SCENES))]
            name = figures.NAMES[algo]
            style = {"color": figures.POLICY_COLORS[name], "label": name,
                     "ls": line}
            x = sorted({int(row["iteration"]) for row in own[0]})
            means = {}
            for ax, what, columns in ((axes[0], "id", ["id"]), (axes[1], "OOD", OOD)):
                curves = np.array([[np.mean([float(row[c]) for c in columns]) for row in run]
                                   for run in own])
                band(ax, x, curves, **style)
                means[what] = curves.mean(0)
            axes[2].plot(means["id"], means["OOD"], marker=".", **style)
            if algo == "ppo":
                for column, line in (("trained", "-"), ("fresh", "--"), ("unseen", ":")):
                    values = np.array([[float(row[f"critic_{column}"] or "nan") for row in run]
                                       for run in own])
                    name = {"trained": "rows it trained on", "fresh": "fresh starts",
                            "unseen": "unseen scenes"}[column]
                    axes[3].plot(x[1:], np.median(values[:, 1:], 0), line, label=name,
                                 color=style["color"])
        for ax, title, x, y in zip(
                axes, ("in distribution", "out of distribution", "one against the other",
                       "what PPO's critic explains"),
                ("iterations", "iterations", "in distribution", "iterations"),
                ("success", "success", "out of distribution", "explained variance, median")):
            ax.set(title=title, xlabel=x, ylabel=y)
            if x == "iterations" and y == "success":
                ax.set_ylim(0, 1)
            ax.legend(fontsize=8)
        fig.savefig(path)


def band(ax, x, curves, **style):
    """Mean of (seeds, points) with its 95 % interval."""
    mean = curves.mean(0)
    half = np.array([common.half_interval(values) for values in curves.T])
    ax.plot(x, mean, **style)
    ax.fill_between(x, mean - half, mean + half, color=style["color"], alpha=0.15, lw=0)
