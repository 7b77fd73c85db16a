"""Find the bug: learning curves of 03 as it is, and with one planted mistake.

The mistakes are some of those that tests/test_mutants.py plants. This file names them: whoever
wants to find them from the curves (course/README.md, exercises 14 to 16) should not read on.

Run:     python course/find_the_bug.py          (2 minutes on one core)
Saves:   course/bugs/{right,bug1,bug2,bug3}.csv, 03's logs at its defaults, seed 0, and
         bug1.png to bug3.png, each beside the right one
"""

import contextlib
import importlib
import sys
from collections import namedtuple
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import test_mutants as known  # noqa: E402  (the line above tells where)
from tools import flags  # noqa: E402
from tools.log import read_log  # noqa: E402

nft = importlib.import_module("03_step_loss")

FOLDER = ROOT / "course/bugs"
Bug = namedtuple("Bug", "name function mistake")
BUGS = [
    Bug("bug1", "recorded_steps", "v_old is that of the first step"),
    Bug("bug2", "ema_update", "the weights of old and new are swapped"),
    Bug("bug3", "labels", "labels of the neighbouring episode"),
]


def planted(bug):
    """-> what `setattr` takes: the module, the function's name, the function with the mistake."""
    for (module, function, _), mistakes in known.MUTANTS.items():
        for what, code, mistake in mistakes:
            if (function, what) == (bug.function, bug.mistake):
                return known.mutate(module, function, code, mistake)
    raise KeyError(f"test_mutants.py plants no such mistake: {bug}")


def train(path, bug=None, argv=()):
    """03 with its defaults, with the mistake or without one -> its log at `path`."""
    args = nft.parse_args(["--out", str(ROOT / "runs/find_the_bug"), *argv])
    path.unlink(missing_ok=True)
    module, name, function = planted(bug) if bug else (nft, "train_toy", nft.train_toy)
    real = getattr(module, name)
    setattr(module, name, function)
    try:
        with contextlib.chdir(ROOT):  # where the clone is
            nft.train_toy(args, path)
    finally:
        setattr(module, name, real)


def draw(right, wrong, path):
    """Six columns of two logs, one above the other -> a picture at `path`."""
    from matplotlib.figure import Figure
    fig = Figure(figsize=(10, 5.6), layout="constrained")
    axes = fig.subplots(2, 3).flat
    columns = {"eval_ode": "success (eval_ode)", "train_sde": "success, old policy (train_sde)",
               "loss": "loss", "margin": "margin", "drift": "drift", "grad_norm": "grad_norm"}
    for ax, (column, title) in zip(axes, columns.items()):
        for log, colour, label in ((right, "#0072b2", "as it is"), (wrong, "#d55e00", "bug")):
            seen = log[column] == log[column]  # a cell without evaluation is nan
            ax.plot(log["episodes"][seen] / 1000, log[column][seen], color=colour, label=label,
                    lw=1.5 if column == "eval_ode" else 0.8)
        if column in ("eval_ode", "train_sde"):
            ax.set(ylim=(0, 1.02))
        elif max(abs(wrong[column])) > 10 * max(abs(right[column])):
            ax.set_yscale("symlog", linthresh=float(max(abs(right[column]))))
        ax.set(title=title, xlabel="training episodes, thousands")
    fig.axes[0].legend(frameon=False)
    fig.savefig(path, dpi=100)


def main():
    flags.Parser(__doc__).parse_args()
    torch.set_num_threads(1)
    FOLDER.mkdir(exist_ok=True)
    train(FOLDER / "right.csv")
    right = read_log(FOLDER / "right.csv")
    for bug in BUGS:
        path = FOLDER / f"{bug.name}.csv"
        train(path, bug)
        draw(right, read_log(path), path.with_suffix(".png"))
    print(f"RESULT bugs={len(BUGS)} saved={FOLDER.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
