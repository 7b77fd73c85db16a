"""The log of a run, a csv with a row for each iteration, and its two learning curves."""

import csv

import numpy as np


def log_row(path, row):
    """Adds a dict to the csv, with a header if it is the first; floats keep five decimals."""
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()})


def read_log(path):
    """The csv as {column: array}; empty cells (no evaluation) become nan."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return {k: np.array([float(r[k] or "nan") for r in rows]) for k in rows[0]}


def draw_learning(log, success_ax, loss_ax):
    """Success of the acting and of the trained policy, and the loss, against episodes."""
    seen, played = ~np.isnan(log["eval_ode"]), log["episodes"] / 1000
    success_ax.plot(played, log["train_sde"], color="0.6", lw=1, label="old policy, SDE")
    success_ax.plot(played[seen], log["eval_ode"][seen], "o-", ms=3, color="#0072b2",
                    label="trained policy, ODE")
    success_ax.set(xlabel="training episodes, thousands", ylabel="success", ylim=(0, 1.02))
    success_ax.legend(frameon=False)
    loss_ax.plot(played, log["loss"], color="#d55e00", lw=1)
    loss_ax.set(xlabel="training episodes, thousands", ylabel="loss")


def learning_figure(log, path):
    """Draws a csv's curves -> a picture at `path`."""
    from matplotlib.figure import Figure  # not at the top: worker processes would load it
    fig = Figure(figsize=(10, 4), layout="constrained")
    draw_learning(read_log(log), *fig.subplots(1, 2))
    fig.savefig(path, dpi=120)
