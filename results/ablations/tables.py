"""Rows of the csv files -> the tables, verdicts and the figure of results/ablations/README.md."""

import importlib
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
common = importlib.import_module("results.common")
from tools.log import log_row  # noqa: E402  (the line above tells where)

# Figure -> variant -> the paper's success at step 200 (LIBERO-Object task 0, read off its plots;
# None: not in the paper). The first of a figure is what the others are compared with. The paper's
# endpoint has 0.83 with a slow old policy, 0 with a fast one; all our rollouts have the fast one.
FIGURES = {
    "target": {"default": 0.945, "target-next-mean": 0.85, "target-endpoint": 0.0,
               "target-endpoint-slow": 0.83},
    "rollout": {"target-endpoint": 0.83, "rollout-uncorrected": 0.53, "rollout-ode": 0.76},
    "rollout (mean)": dict.fromkeys(
        ("target-next-mean", "rollout-uncorrected-mean", "rollout-ode-mean")),
    "rollout (next)": dict.fromkeys(("default", "rollout-uncorrected-next")),
    "loss": {"default": 0.945, "loss-weighted": 0.91, "loss-positive": 0.90, "loss-negative": 0.81},
    "noise level": {"default": 0.945, "noise-0.05": 0.92, "noise-0.1": 0.90, "noise-0.3": 0.79,
                    "noise-0.5": 0.80},
    "beta": {"default": 0.945, "beta-0.1": 0.985, "beta-5": 0.79},
    "EMA": dict.fromkeys(("default", "ema-0.1", "ema-0.9")),
    "beyond": dict.fromkeys(("default", "all-steps", "labels-grouped", "labels-centred")),
}


def by_seed(rows, **wanted):
    """{seed: success} of the rows with these entries."""
    return {row["seed"]: float(row["after"]) for row in rows
            if all(row[name] == common.text(value) for name, value in wanted.items())}


def mean_of(rows):
    """Rows of one variant, a seed each -> what every line of a table says of it."""
    after = [float(row["after"]) for row in rows]
    return {"lr": rows[0]["lr"], "seeds": len(after), "after": np.mean(after),
            "sft": np.mean([float(row["sft"]) for row in rows]),
            "half": common.half_interval(after)}


def summarise(rows):
    """Rows of runs, the variants at the learning rate they were tuned to -> a dict for each line.

    gain: difference to the first variant of the figure, paired by seed, with its 95 % t-interval
    low, high; half: that of the mean. verdict: does the interval say what the paper's numbers say?
    """
    table = []
    for figure, variants in FIGURES.items():
        first = next(iter(variants))
        already = {row["variant"] for row in table}
        names = [name for name in variants if by_seed(rows, variant=name)]
        if set(names) <= already:  # nothing but what the others are compared with
            continue
        for name in names:
            after, base = (by_seed(rows, variant=v) for v in (name, first))
            own = {s: v for s, v in after.items() if s in base} if name != first else {}
            gain, low, high = common.difference(own, base) if own else [np.nan] * 3
            said = None if variants[name] is None else variants[name] - variants[first]
            verdict = ""
            if name != first and said and not np.isnan(low):
                verdict = shown(low, high) if said > 0 else shown(-high, -low)
            table.append({"figure": figure, "variant": name, "paper": variants[name],
                          "values": list(after.values()), "verdict": verdict,
                          "gain": gain, "low": low, "high": high,
                          **mean_of([row for row in rows if row["variant"] == name])})
    return table


def number(value, form=".3f"):
    return "-" if value is None or np.isnan(value) else f"{value:{form}}"


def show(table):
    """The table as text; gain is the paired difference to the first line of a figure."""
    print(f"{'figure':<14} {'variant':<24} {'lr':>6} {'seeds':>5} {'SFT':>6} {'after':>6} "
          f"{'95 %':>6} {'gain':>7} {'low':>7} {'high':>7} {'paper':>6} verdict")
    for row in table:
        rates = " ".join(f"{number(row[name]):>6}" for name in ("sft", "after", "half"))
        gains = " ".join(f"{number(row[name], '+.3f'):>7}" for name in ("gain", "low", "high"))
        print(f"{row['figure']:<14} {row['variant']:<24} {row['lr']:>6} {row['seeds']:5d} {rates} "
              f"{gains} {number(row['paper']):>6} {row['verdict']}")


def phase_table(rows):
    """Rows of phase.csv -> a dict for each noise level and target: settings, mean and half of the
    95 % interval; gain, low, high: next step minus this target, paired by seed."""
    table = []
    for noise in sorted({row["noise_level"] for row in rows}, key=float):
        base = by_seed(rows, noise_level=noise, target="next")
        for target in dict.fromkeys(row["target"] for row in rows):
            own = [r for r in rows if (r["noise_level"], r["target"]) == (noise, target)]
            if not own:
                continue
            gain, low, high = (common.difference(base, by_seed(own))
                               if target != "next" and base else [np.nan] * 3)
            table.append({"noise_level": noise, "target": target, "ema": own[0]["ema"],
                          "gain": gain, "low": low, "high": high, **mean_of(own)})
    return table


def show_phase(table):
    print(f"{'noise':>5} {'target':<10} {'EMA':<10} {'lr':>6} {'seeds':>5} {'SFT':>6} {'after':>6} "
          f"{'95 %':>6}   next step minus this, paired")
    for row in table:
        rates = " ".join(f"{number(row[name]):>6}" for name in ("sft", "after", "half"))
        gains = " ".join(f"{number(row[name], '+.3f'):>7}" for name in ("gain", "low", "high"))
        print(f"{row['noise_level']:>5} {row['target']:<10} {row['ema']:<10} {row['lr']:>6} "
              f"{row['seeds']:5d} {rates} {gains}")


def shown(low, high):
    """What the 95 % interval of a difference says that should be above 0."""
    return "shown" if low > 0 else "contradicted" if high < 0 else "not shown"


def sde_over_ode(rows):
    """Rows of sde.py -> [(comparison, its paired difference and verdict), ...]: the SDE less each
    other rollout of its noise, and at 0.5 less the ODE at its best noise, 0.2."""
    def rates(rollout, target, noise):
        return by_seed(rows, rollout=rollout, target=target, noise_level=noise)

    found = []
    for noise in sorted({row["noise_level"] for row in rows}, key=float):
        sde = rates("sde", "endpoint", noise)
        others = [("uncorrected", "endpoint", noise), ("ode", "endpoint", noise),
                  ("ode", "adaptive", "0.2")]                    # whose error knows no noise
        if noise == "0.5":
            others.append(("ode", "endpoint", "0.2"))
        for other in others:
            if sde and rates(*other):
                gain, low, high = common.difference(sde, rates(*other))
                at = " of 0.2" if other == ("ode", "endpoint", "0.2") and noise != "0.2" else ""
                found.append((f"sde - {other[0]} ({other[1]}){at}, noise {noise}", {
                    "seeds": len(sde), "gain": gain, "low": low, "high": high,
                    "verdict": shown(low, high)}))
    return found


def verdicts(folder):
    """Every paired difference of the csv files in a folder, in success -> verdicts.csv."""
    found = [(f"{name}: next - {row['target']}, noise {row['noise_level']}", row)
             for name in ("phase", "phase_robot", "robot")
             for row in phase_table(common.read(folder / f"{name}.csv"))]
    found += sde_over_ode(common.read(folder / "sde.csv"))
    found += [(f"{row['figure']}: {row['variant']} - {next(iter(FIGURES[row['figure']]))}", row)
              for row in summarise(common.read(folder / "ablations.csv"))]
    (folder / "verdicts.csv").unlink(missing_ok=True)
    for comparison, row in found:
        if not np.isnan(row["gain"]):
            log_row(folder / "verdicts.csv", {
                "comparison": comparison, "seeds": row["seeds"], "mean": float(row["gain"]),
                "low": float(row["low"]), "high": float(row["high"]),
                "verdict": row.get("verdict", "")})


def draw(table, path):
    """A panel for each figure: bars with 95 % intervals, a dot for each seed, the paper's value."""
    from matplotlib.figure import Figure
    figures = list(dict.fromkeys(row["figure"] for row in table))
    down = -(-len(figures) // 3)
    fig = Figure(figsize=(15, 2.6 * down + 0.5), layout="constrained")
    axes = fig.subplots(down, 3, squeeze=False)
    for ax, figure in zip(axes.flat, figures + [None] * 2):
        rows = [row for row in table if row["figure"] == figure]
        if not rows:
            ax.axis("off")
            continue
        for i, row in enumerate(rows):
            ax.barh(i, row["after"], xerr=np.nan_to_num(row["half"]), color="#56b4e9", capsize=3)
            ax.plot(row["values"], [i] * row["seeds"], "o", ms=3, color="#0072b2")
            ax.plot(np.nan if row["paper"] is None else row["paper"], i, "D", color="#d55e00")
        ax.axvline(rows[0]["sft"], color="0.4", ls="--", lw=1)
        ax.set(title=figure, xlim=(-0.02, 1.02), ylim=(len(rows) - 0.4, -0.6))
        ax.set_yticks(range(len(rows)), [row["variant"] for row in rows])
    fig.supxlabel("success of the ODE policy, wide starts, 95 % over seeds. Dots: seeds; dashed: "
                  "SFT; diamonds: the paper, LIBERO-Object task 0", fontsize=10)
    fig.savefig(path, dpi=120)
