"""What the notebooks draw with: pictures of arrays, no formula. See the notebooks for the data.

`row` makes the figure and its style; each other function draws one picture.
"""

import matplotlib.pyplot as plt
import numpy as np

# Okabe and Ito's colours, as in results/figures.py; line style, marker or hatch says the same again
BLUE, ORANGE, PURPLE, GREY = "#0072b2", "#d55e00", "#cc79a7", "#6e7781"
CARD, INK = "#f1f4f7", "#1f2328"
STYLE = {"figure.facecolor": CARD, "axes.facecolor": CARD, "figure.dpi": 96, "font.size": 9,
         "axes.titlesize": 9.5, "axes.spines.top": False, "axes.spines.right": False,
         "axes.edgecolor": GREY, "legend.frameon": False, "legend.fontsize": 8,
         "figure.constrained_layout.use": True}
TARGETS = {"next": ("next step", BLUE, "o-"), "endpoint": ("endpoint", ORANGE, "s--"),
           "next-mean": ("next step's mean", PURPLE, "^:")}
SAMPLERS = {"before_ode": "SFT, ODE", "before_sde": "SFT, SDE",
            "after_ode": "after π-StepNFT, ODE", "after_sde": "after π-StepNFT, SDE"}


def row(count, height=3.0, width=11.0, **options):
    """A figure of so many panels beside each other -> their axes."""
    plt.rcParams.update(STYLE)
    _, axes = plt.subplots(1, count, figsize=(width, height), squeeze=False, **options)
    return axes[0]


def circles(ax, centre, std):
    """One and two standard deviations around a mean."""
    for n in (1, 2):
        ax.add_patch(plt.Circle(centre, n * float(std), fill=False, color=GREY, ls="--"))


# ------------------------------------------------------------------------------------------------
# exploration_width


def bands(paths):
    """paths {name: (B, K+1, H, A)}: one coordinate from noise to action, as quantile bands."""
    for ax, (name, x), color in zip(row(3, sharey=True), paths.items(), (GREY, BLUE, ORANGE)):
        x = x[:, :, 0, 1]
        t = np.linspace(1, 0, x.shape[1])
        for low, high, alpha in ((0.05, 0.95, 0.2), (0.25, 0.75, 0.35)):
            ax.fill_between(t, x.quantile(low, 0), x.quantile(high, 0), color=color, alpha=alpha,
                            lw=0)
        ax.plot(t, x.median(0).values, color=color)
        ax.set(title=f"{name}: std at t = 0 is {x[:, -1].std():.3f}", xlim=(1, 0),
               xlabel="t: noise (1) to action (0)")
        if name == "ODE":
            ax.set_ylabel("first action, vertical\n(flow units)")


def two_bars(labels, injected, left):
    """For each step the noise that it draws and what is left of it in the chunk."""
    ax, = row(1, width=6)
    for shift, heights, color, name in ((-0.2, injected, GREY, "std drawn in this step"),
                                        (0.2, left, BLUE, "std of the chunk if it alone is noisy")):
        bars = ax.bar(np.arange(len(labels)) + shift, heights, 0.4, color=color, label=name)
        ax.bar_label(bars, fmt="%.2f", fontsize=8)
    ax.set_xticks(range(len(labels)), labels)
    ax.legend()


def fan(ax, chunks, start, speed, title):
    """Where chunks (N, H, 2) of velocities would lead from a start."""
    moves = speed * np.clip(np.asarray(chunks), -1, 1)
    ways = np.concatenate([np.zeros((len(moves), 1, 2)), moves], 1).cumsum(1) + start[:2]
    ax.plot(*np.moveaxis(ways, 2, 0).swapaxes(1, 2), color=BLUE, lw=0.6, alpha=0.3)
    ax.set(title=title, xlabel="x (m)", xlim=(-0.82, -0.15), ylim=(-0.25, 0.3))


def price(noise, width, rate):
    """Width and success, a point for each noise level."""
    ax, = row(1, width=6)
    ax.plot(width, rate, "o-", color=BLUE)
    for x, y, a in zip(width, rate, noise):
        first = a == noise[0]
        ax.annotate(f"noise {a:g}: {y:.2f}", (x, y), (0, 10) if first else (6, 4), fontsize=8,
                    textcoords="offset points", ha="center" if first else "left")
    ax.set(xlabel="width: std of y at the wall (m), one start", ylabel="success, 500 starts",
           ylim=(0, 0.7))
    ax.set_xlim(0, 1.3 * max(width))


def phase(table):
    """Success after RL against the noise, a line for each target."""
    ax, = row(1, width=6.5, height=3.2)
    for target, (name, color, style) in TARGETS.items():
        own = [line for line in table if line["target"] == target]
        ax.errorbar([float(line["noise_level"]) for line in own], [line["after"] for line in own],
                    [line["half"] for line in own], fmt=style, color=color, capsize=2, label=name)
    ax.axhline(np.mean([line["sft"] for line in table]), color=GREY, ls="-.", lw=1, label="SFT")
    ax.set(xlabel="noise level a", ylabel="success after RL, no noise", ylim=(0, 1))
    ax.legend(loc="lower left")


# ------------------------------------------------------------------------------------------------
# step_loss: all in the plane of one action, horizontal and vertical velocity


def step(mean, std, x_next, branches=()):
    """One step: its Gaussian, what was drawn, and the means of v_pos and v_neg."""
    ax, = row(1, width=4.4, height=4)
    circles(ax, mean[0, 0], std)
    ax.plot(*mean[0, 0], "D", color=GREY, label="mean(v_old)")
    for branch, color, marker, name in zip(branches, (BLUE, ORANGE), "os", ("v_pos", "v_neg")):
        ax.plot(*np.stack([x_next[0, 0], branch[0, 0]], 1), ":", color=color)
        ax.plot(*branch[0, 0], marker, color=color, label=f"mean({name})")
    ax.plot(*x_next[0, 0], "*", color=INK, ms=13, label="x_next, drawn")
    ax.set(aspect="equal", xlabel="horizontal velocity", ylabel="vertical velocity")
    ax.margins(0.15)
    ax.legend(loc="lower right")


def outcome(y):
    return "success" if y > 0 else "failure"


def surfaces(side, values, toward):
    """values {(loss, y): (n, n) over delta}; the arrow points towards x_next."""
    for ax, ((name, y), surface) in zip(row(4, sharex=True, sharey=True), values.items()):
        plt.colorbar(ax.contourf(side, side, surface, 15, cmap="cividis"), ax=ax)
        ax.annotate("", toward, (0, 0), arrowprops=dict(color="white", arrowstyle="->", lw=2))
        ax.set(title=f"{name}, {outcome(y)}", xlabel="delta, horizontal", aspect="equal")
        ax.set_ylabel("delta, vertical" if (name, y) == next(iter(values)) else None)


def arrows(spots, gradients):
    """gradients {(loss, y): (n, 2)} at the spots (n, 2): arrows against them, on one scale."""
    for ax, ((name, y), gradient) in zip(row(4, sharex=True, sharey=True), gradients.items()):
        ax.quiver(*spots.T, *-gradient.T, color=BLUE if y > 0 else ORANGE, angles="xy",
                  width=0.008, scale=15)
        ax.add_patch(plt.Circle((0, 0), 0.5, fill=False, color=GREY, ls="--"))
        ax.set(title=f"{name}, {outcome(y)}", xlabel="delta, horizontal", aspect="equal")


def ends(mean, std, draws, chunks):
    """Left the two draws of a step, right the chunks (N, H, A) that each of them leads to."""
    left, right = row(2, width=8, height=3.6)
    circles(left, mean[0, 0], std)
    names = "x_next as drawn", "its opposite"
    for x, x_0, color, marker, name in zip(draws, chunks, (BLUE, ORANGE), "*^", names):
        left.plot(*x[0, 0], marker, color=color, ms=11, label=name)
        right.plot(*x_0[:, 0].T, marker, color=color, ms=3, alpha=0.35)
        right.plot(*x_0[:, 0].mean(0), marker, color=color, ms=12, mec=INK)
    left.set(title="the next step: one known Gaussian", aspect="equal",
             xlabel="horizontal velocity", ylabel="vertical velocity")
    left.margins(0.25)
    left.legend(loc="lower right")
    right.set(title="the endpoint, and its mean (large)", aspect="equal",
              xlabel="horizontal velocity")


def shares(parts):
    """parts {noise: K rows of (systematic, own, later)}: stacked bars for each step."""
    names = (("this step's noise", BLUE, "", 1), ("later steps' noise", ORANGE, "//", 2),
             ("no noise at all", GREY, "..", 0))
    axes = row(len(parts), height=2.9, sharey=True)
    for ax, (noise, own) in zip(axes, parts.items()):
        own, below = np.array(own), 0
        for name, color, hatch, part in names:
            ax.bar(range(len(own)), own[:, part], 0.7, below, color=color, alpha=0.75, hatch=hatch,
                   edgecolor=CARD, label=name)
            below = below + own[:, part]
        for k, share in enumerate(own[:, 1]):
            ax.text(k, 1.02, f"{share:.0%}", color=BLUE, ha="center")
        ax.set(title=f"noise {noise}", xlabel="step k", xticks=range(len(own)), ylim=(0, 1.15),
               yticks=(0, 0.5, 1))
    axes[0].set_ylabel("share of the residual")
    plt.gcf().legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)


def pulls(points, k):
    """points {noise: (failures (starts,), pull (starts, K))}: a dot for each start, at step k;
    grey is 1 - 2 x failures."""
    axes = row(len(points), height=2.9, sharex=True, sharey=True)
    for ax, (noise, (failures, pull)) in zip(axes, points.items()):
        ax.plot(failures, pull[:, k], "o", ms=4, color=ORANGE, alpha=0.6)
        ax.plot((0, 1), (1, -1), color=GREY, lw=1)
        ax.axhline(0, color=BLUE)
        ax.axvline(failures.mean(), color=GREY, ls="--")
        ax.set_title(f"noise {noise}: {failures.mean():.0%} fail, "
                     f"mean pull {pull[:, k].mean():+.2f}")
        ax.set_xlabel("failures from this start")
    axes[0].set_ylabel("pull of the labels")


def agree(reinforce, ranking):
    """Two gradients, entry by entry."""
    ax, = row(1, width=3.6, height=3.4)
    ax.axline((0, 0), slope=1, color=GREY, lw=1)
    ax.plot(reinforce.flatten(), ranking.flatten(), ".", ms=3, color=BLUE)
    ax.set(xlabel="gradient of REINFORCE", ylabel="gradient of the ranking loss")
    ax.ticklabel_format(scilimits=(-2, 2))


# ------------------------------------------------------------------------------------------------
# benchmark_width: a recording holds, for each of SAMPLERS, paths (episodes, steps + 1, 3) in metres


def paths(recording, shown=24):
    """Paths of the hand: above from the ceiling, below from the side."""
    plt.rcParams.update(STYLE)
    _, axes = plt.subplots(2, 4, figsize=(11, 5), sharex="row", sharey="row")
    for column, (key, title) in zip(axes.T, SAMPLERS.items()):
        success = recording[f"{key}_success"]
        for path, ok in zip(recording[key][:shown].astype(float), success):
            x, y, z = path.T
            line = dict(ls="-" if ok else "--", color=BLUE if ok else ORANGE, lw=0.7, alpha=0.5)
            column[0].plot(y, x, **line)
            column[1].plot(y, z, **line)
        for place, marker in ((recording["object"], "s"), (recording["goal"], "D")):
            column[0].plot(place[1], place[0], marker, ms=9, mfc="none", color=INK)
            column[1].plot(place[1], place[2], marker, ms=9, mfc="none", color=INK)
        column[0].set_title(f"{title}\n{success.sum()} of {len(success)} succeed")
        column[1].set_xlabel("y (m)")
    axes[0, 0].set_ylabel("from above: x (m)")
    axes[1, 0].set_ylabel("from the side: z (m)")


def sampler_style(key):
    return dict(color=GREY if "before" in key else BLUE, ls="-" if "sde" in key else ":")


def spreads(ax, title, lines):
    """lines {sampler: (steps,)}; the legend says their means."""
    for key, spread in lines.items():
        ax.plot(spread, label=f"{SAMPLERS[key]}: mean {spread.mean():.1f}", **sampler_style(key))
    ax.set(title=title, xlabel="control step", ylabel="spread of the hand (cm)")
    ax.legend()


def rates(ax, title, rated):
    """rated {sampler: {success, low, high}}: bars with intervals."""
    for i, (key, rate) in enumerate(rated.items()):
        ax.bar(i, rate["success"], 0.7, color=sampler_style(key)["color"], alpha=0.8,
               hatch="//" if "sde" in key else None, edgecolor=CARD)
        ax.errorbar(i, rate["success"], [[rate["success"] - rate["low"]],
                                         [rate["high"] - rate["success"]]], color=INK)
    names = [SAMPLERS[key].replace(", ", "\n") for key in rated]
    ax.set_xticks(range(len(rated)), [f"{name}: {rate['success']:.2f}"
                                      for name, rate in zip(names, rated.values())])
    ax.set(title=title, ylim=(0, 1.05), ylabel="success, one start")


def curves(ax, title, logs):
    """Success against training episodes, a line for each log (columns of tools/log.py)."""
    for log in logs:
        seen, played = ~np.isnan(log["eval_ode"]), log["episodes"] / 1000
        acting, = ax.plot(played, log["train_sde"], color=GREY, lw=0.6)
        trained, = ax.plot(played[seen], log["eval_ode"][seen], "o-", ms=3, color=BLUE)
    ax.legend([acting, trained], ["acting policy, with noise", "trained policy, without"],
              loc="lower right")
    ax.set(title=f"{title}, {len(logs)} seeds", xlabel="training episodes, thousands",
           ylabel="success", ylim=(0, 1.02))
