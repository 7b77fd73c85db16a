"""Every figure of README.md, and three of the studies' pages, from the csv and npz files here.

Run:     python results/figures.py             (about 5 s; needs no simulator, no training)
         python results/figures.py --record    plays the toy policies again first (half a minute)
Draws:   results/figures/*.png; a figure whose data is missing is skipped, and a line says so.
         (results/ablations/run.py draws its own.)

`--record` writes results/figures/toy.npz from the policy of 01 and from the one that
`03_step_loss.py` saved, both at their defaults. All formulas are the scripts' own.
"""

import collections
import importlib
import math
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")  # no display
import matplotlib.pyplot as plt  # noqa: E402  (the line above comes first)

RESULTS = Path(__file__).resolve().parent
DRAWN = RESULTS / "figures"    # where the pictures go
sys.path.insert(0, str(RESULTS.parent))
flow = importlib.import_module("01_flow_policy")
sde = importlib.import_module("02_sde_sampler")
nft = importlib.import_module("03_step_loss")
common = importlib.import_module("results.common")
from envs import libero  # noqa: E402  (the lines above tell where)
from envs.gap_world import GapWorld, episode_seeds  # noqa: E402
from tools.flags import Parser  # noqa: E402
from tools.log import read_log  # noqa: E402
from tools.run import rated  # noqa: E402

read = common.read

# Okabe and Ito's colours: told apart by every kind of colour vision; line style, marker or hatch
# says the same again. Figures lie on a card of their own, so that they read the same on a light and
# on a dark page.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#6e7781"
CARD, INK = "#f1f4f7", "#1f2328"
STYLE = {"figure.facecolor": CARD, "axes.facecolor": CARD, "savefig.dpi": 160,
         "font.size": 9, "axes.titlesize": 9.5, "axes.spines.top": False, "text.color": INK,
         "axes.spines.right": False, "axes.edgecolor": GREY, "axes.labelcolor": INK,
         "xtick.color": INK, "ytick.color": INK, "legend.frameon": False,
         "figure.constrained_layout.use": True, "mathtext.default": "regular"}
NAMES = {"pi-StepNFT": "π-StepNFT", "stepnft": "π-StepNFT", "ppo": "PPO", "grpo": "GRPO",
         "ppo-action": "PPO, action noise"}
POLICY_COLORS = {"SFT": GREY, "PPO": ORANGE, "GRPO": PURPLE, "π-StepNFT": BLUE,
                 "PPO, action noise": GREEN}
POLICY_HATCHES = {"SFT": "//", "PPO": "..", "GRPO": "xx"}
TARGETS = {"next": ("next step", BLUE, "o-"), "endpoint": ("endpoint", ORANGE, "s--"),
           "next-mean": ("next step's mean", PURPLE, "^:")}

K, WIDE, NOISE = 4, 0.5, 0.2   # denoising steps; noise of the hero figure; the paper's, elsewhere
RATES = {"narrow": (0, 0.01), "wide": (0.05, 1), "after": (0.95, 1)}   # what its start must show


# ------------------------------------------------------------------------------------------------
# Recording the toy world


def chunks(policy, noise=0):
    """obs -> chunks (N, H, A) in environment units, by the SDE or, without noise, by the ODE."""
    def sample(obs):
        if noise:
            x_0, _ = sde.sde_sample(policy, obs, K, noise)
        else:
            x_0 = flow.ode_sample(policy, obs, K)
        return policy.denormalise(x_0)
    return sample


def trails(sample, seeds):
    """Every position of the episodes: (episodes, steps + 1, 2), and success (episodes,)."""
    world = GapWorld()
    success, _ = world.play(lambda obs: (sample(obs), {}), seeds)
    return np.stack(world.trail, axis=1), success


def hero_start(samplers, episodes=200):
    """The first test start from which each sampler's rate lies in RATES -> its seed.

    samplers: {narrow, wide, after}. These episodes choose the start and are not shown: rates that
    were chosen for being low are lower than they are.
    """
    for seed in episode_seeds("test", 1000):
        for name, (low, high) in RATES.items():
            _, success = trails(samplers[name], [seed] * episodes)
            if not low <= success.mean() <= high:
                break
        else:
            return seed
    raise SystemExit("no test start shows what the hero figure should: train longer")


def hero_episodes(sft, trained, episodes=200):
    """What the hero shows: trails and success from its start, in episodes of their own."""
    samplers = {"narrow": chunks(sft), "wide": chunks(sft, WIDE), "after": chunks(trained)}
    seed = hero_start(samplers, episodes)
    data = {"seed": seed, "gap": GapWorld().reset([seed])["state"][0, 2]}
    for name, sample in samplers.items():
        data[name], data[f"{name}_success"] = trails(sample, [seed] * episodes)
    return data


def record(trained):
    """Plays and samples everything that the hero and the five method pictures show -> toy.npz."""
    torch.manual_seed(0)
    sft = flow.toy_policy(0)
    data = {**hero_episodes(sft, trained), "noise": WIDE}

    # 1: noise draws become one decision, in environment units; 2: the same marginal, or not
    many = {"state": torch.tensor([flow.ONE_STATE]).expand(2000, 3)}
    data["ode"] = sft.denormalise(flow.ode_path(sft, many, 32)[:120])[:, :, 0, 1]
    for name, corrected in (("corrected", True), ("uncorrected", False)):
        x_0, _ = sde.sde_sample(sft, many, sde.FINE, WIDE, corrected=corrected)
        data[name] = sft.denormalise(x_0)[:, 0, 1]
    data["marginal"] = sft.denormalise(flow.ode_sample(sft, many, sde.FINE))[:, 0, 1]

    # 3: one recorded step, its Gaussian, and the two mirrored means; 4: its loss along one line
    times, k = sde.time_grid(K), 1
    sigma = sde.noise_scale(times, NOISE)[k]
    _, path = sde.sde_sample(sft, {"state": many["state"][:1]}, K, NOISE)
    x_t, x_next, v_old = path.x[:, k, :1], path.x[:, k + 1, :1], path.v[:, k, :1]     # (1, 1, 2)
    where = dict(t_cur=times[k], t_next=times[k + 1], sigma=sigma)
    mean, std = sde.transition(x_t, v_old, **where)
    toward = -(x_next - mean) / (x_next - mean).norm()     # a velocity is subtracted: the minus
    aside = toward.flip(-1) * torch.tensor([-1.0, 1.0])
    branches = nft.mirror(v_old + 0.25 * toward + 0.3 * aside, v_old, 1.0, 0.5)
    data |= {"mean": mean[0, 0], "std": std, "x_next": x_next[0, 0]}
    data["branches"] = torch.cat([sde.transition(x_t, v, **where)[0][0] for v in branches])
    data["delta"] = torch.linspace(-0.45, 0.45, 61)
    one = {name: z.reshape(1) for name, z in where.items()}
    data["loss"] = torch.tensor([[
        nft.step_nft_loss(v_old + d * toward, v_old, x_t, x_next, y=torch.tensor([y]), kl_weight=0,
                          **one)[0] for d in data["delta"]] for y in (1.0, -1.0)])
    np.savez_compressed(RESULTS / "figures/toy.npz", **{k: np.asarray(v) for k, v in data.items()})


# ------------------------------------------------------------------------------------------------
# The front page: the hero, five steps, the title


def save(fig, name):
    fig.savefig(DRAWN / f"{name}.png")
    plt.close(fig)
    print(f"drew {name}.png")


def draw_world(ax, trails, success, gap):
    for e in np.argsort(success, kind="stable"):  # those that arrive on top
        trail, ok = trails[e], success[e]
        ax.plot(*trail.T, ls="-" if ok else "--", color=BLUE if ok else ORANGE, lw=0.6,
                alpha=0.45)
        if not ok:
            ax.plot(*trail[-1], "x", color=ORANGE, ms=3.5, mew=0.9, alpha=0.6)
    half = GapWorld.gap
    for low, high in ((-1, gap - half), (gap + half, 1)):
        ax.plot([0, 0], [low, high], color=INK, lw=2.5, solid_capstyle="butt")
    ax.add_patch(plt.Circle(GapWorld.goal, GapWorld.goal_radius, color=GREEN, alpha=0.5))
    ax.plot(*trails[0, 0], "o", color=INK, ms=4)
    low, high = np.sort([trails[0, 0, 1], gap])
    middle, half = (low + high) / 2, max(0.7, (high - low) / 2 + 0.25)
    ax.set(xlim=(-0.95, 1), ylim=(middle - half, middle + half), xticks=[], yticks=[],
           aspect="equal")
    for side in ax.spines.values():
        side.set_visible(False)


def name_things(ax, start, gap):
    """Start, wall, gap and goal, written beside them."""
    say = dict(textcoords="offset points", color=INK, fontsize=8)
    ax.annotate("start", start, (0, -12), ha="center", **say)
    ax.annotate("goal", GapWorld.goal, (0, 15), ha="center", **say)
    ax.annotate("gap", (0, gap), (6, -4), ha="left", **say)
    ax.annotate("wall", (0, gap - 0.35), (6, 0), ha="left", **say)


def hero(data):
    fig, axes = plt.subplots(1, 3, figsize=(9.6, 3.4))
    texts = (("narrow", "The copy, no noise", "one decision, the same mistake again"),
             ("wide", f"The copy, noise {float(data['noise'])} in every step",
              "wider: a few episodes get through"),
             ("after", "After π-StepNFT, no noise", "no noise, and the way through has stayed"))
    for ax, (name, title, what) in zip(axes, texts):
        draw_world(ax, data[name], data[f"{name}_success"], float(data["gap"]))
        ax.set_title(title, weight="bold")
        success = data[f"{name}_success"]
        ax.set_xlabel(f"{what}\n{success.sum()} of {len(success)} episodes arrive")
    name_things(axes[0], data["narrow"][0, 0], float(data["gap"]))
    lines = [plt.Line2D([], [], color=BLUE, lw=1.2),
             plt.Line2D([], [], color=ORANGE, lw=1.2, ls="--", marker="x", ms=4)]
    fig.legend(lines, ["arrives", "does not"], ncols=2, loc="outside lower center", fontsize=8)
    save(fig, "hero")


def small(title):
    fig, ax = plt.subplots(figsize=(3.7, 2.4))
    ax.set_title(title, fontsize=9)
    return fig, ax


def method(data):
    """One picture for each of the five steps."""
    fig, ax = small(f"{len(data['ode'])} draws of noise, one decision")
    ax.plot(np.linspace(1, 0, data["ode"].shape[1]), data["ode"].T, color=BLUE, alpha=0.25, lw=0.7)
    ax.set(xlim=(1, 0), xlabel="t: from noise (1) to action (0)",
           ylabel="vertical velocity, first action")
    save(fig, "step1_flow")

    fig, ax = small(f"The same action, {len(data['corrected']):,} samples of each")
    bins = np.linspace(*np.percentile(data["uncorrected"], [0.5, 99.5]), 45)
    ax.hist(data["uncorrected"], bins, density=True, color=ORANGE, alpha=0.45, hatch="//",
            edgecolor=CARD, label="noise alone")
    ax.hist(data["corrected"], bins, density=True, color=BLUE, alpha=0.5,
            label="noise, mean corrected")
    ax.hist(data["marginal"], bins, density=True, histtype="step", color=INK, lw=1.3,
            label="no noise")
    ax.set(xlabel=f"vertical velocity ({sde.FINE} steps)", yticks=[])
    ax.set_ylim(0, 1.45 * ax.get_ylim()[1])
    ax.spines.left.set_visible(False)
    ax.legend(fontsize=7.5, loc="upper left", handlelength=1.2, borderpad=0)
    save(fig, "step2_marginals")

    fig, ax = small("One step: where could it land, where did it?")
    # seen from mean(v_old), x_next to the right and mean(v_pos) above: the same in every recording
    to_right = data["x_next"] - data["mean"]
    to_right = to_right / np.linalg.norm(to_right)
    up = to_right[::-1] * [-1, 1]
    up = up * np.sign((data["branches"][0] - data["mean"]) @ up)
    x_next, v_pos, v_neg = ((point - data["mean"]) @ np.stack([to_right, up], 1)
                            for point in (data["x_next"], *data["branches"]))
    for n in (1, 2):
        radius = n * float(data["std"])
        ax.add_patch(plt.Circle((0, 0), radius, fill=False, color=GREY, ls="--", lw=0.8))
        ax.annotate(f"{n} std", (0, radius), (0, 2), textcoords="offset points", ha="center",
                    fontsize=7, color=GREY)
    for point, color, marker, name, at in ((v_pos, BLUE, "o", "v_pos", (-6, 5)),
                                           (v_neg, ORANGE, "s", "v_neg", (-6, -12)),
                                           (np.zeros(2), GREY, "D", "v_old", (-8, -3))):
        if name != "v_old":
            ax.plot(*np.stack([x_next, point]).T, ":", color=color)
        ax.plot(*point, marker, color=color, ms=5)
        ax.annotate(f"mean({name})", point, at, textcoords="offset points", color=color,
                    ha="right")
    ax.plot(*x_next, "*", color=INK, ms=11)
    ax.annotate("x_next", x_next, (4, -14), textcoords="offset points", ha="center")
    ax.set_aspect("equal", "datalim")
    ax.set_axis_off()
    save(fig, "step3_gaussian")

    fig, ax = small("The loss of this one step")
    for losses, color, style, what in zip(data["loss"], (BLUE, ORANGE), ("-", "--"),
                                          ("its episode succeeded", "its episode failed")):
        ax.plot(data["delta"], losses, style, color=color, label=what)
    ax.axhline(math.log(2), color=GREY, ls=":", lw=0.8)
    ax.text(0.45, math.log(2), "ln 2: tie", color=GREY, ha="right", va="bottom")
    ax.set(xlabel="change of the velocity towards x_next", ylabel="loss")
    ax.legend(handlelength=1.8, loc="upper center", fontsize=8)
    save(fig, "step4_ranking")

    logs = sorted((RESULTS / "toy").glob("seed*.csv"))
    fig, ax = small(f"The toy world, {count(logs)}")
    draw_curves(ax, logs, BLUE)
    clones = [float(row["sft"]) for row in read(RESULTS / "toy/summary.csv")]
    ax.axhline(np.mean(clones), color=GREY, ls="-.", lw=1, label="SFT, mean")
    ax.set(ylim=(0, 1), xlabel="training episodes, thousands", ylabel="success")
    ax.legend(fontsize=7.5, loc="lower right", handlelength=1.5)
    save(fig, "step5_iterate")


def draw_phase(ax, rows, targets):
    """Success after RL against the noise, a line for each target with 95 % t-intervals over seeds,
    and the clone's; -> the summed-up rows."""
    table = common.load("ablations", "tables").phase_table(rows)
    for i, target in enumerate(targets):
        name, color, style = TARGETS[target]
        own = [row for row in table if row["target"] == target]
        x = [float(row["noise_level"]) + 0.007 * (i - 1) for row in own]  # side by side
        ax.errorbar(x, [row["after"] for row in own], [row["half"] for row in own], fmt=style,
                    color=color, ms=4, lw=1.6, capsize=2, label=name if own else None)
    sft = np.mean([row["sft"] for row in table])
    ax.axhline(sft, color=GREY, ls="-.", lw=1)
    ax.text(0.42, sft - 0.01, "SFT, before RL", color=GREY, va="top", ha="center", fontsize=8)
    ax.set(xlabel="noise level a", ylim=(0, 1), ylabel="success after RL")
    return table


def title(folder):
    """The toy world's curve alone: next step and endpoint."""
    if not (folder / "phase.csv").exists():
        return skipped("title", "ablations/phase.csv")
    fig, ax = plt.subplots(figsize=(7.2, 3))
    table = draw_phase(ax, read(folder / "phase.csv"), ("next", "endpoint"))
    ax.set_title(f"Toy world, {table[0]['seeds']} seeds: wide noise pays if the loss judges the "
                 "next step", weight="bold")
    ax.set_xlabel("noise level a (bars: 95 % intervals over seeds)")
    for target in ("next", "endpoint"):  # its name, above its line's right end
        name, color, _ = TARGETS[target]
        own = [row for row in table if row["target"] == target]
        height = np.interp(0.6, *zip(*((float(row["noise_level"]), row["after"]) for row in own)))
        ax.annotate(f"judged by the {name}", (0.6, height), (0, 6), color=color,
                    textcoords="offset points")
    save(fig, "title")


def draw_curves(ax, paths, color):
    """Success against training episodes, a line for each log; the acting policy thin and grey."""
    for i, path in enumerate(paths):
        log = read_log(path)
        seen, played = ~np.isnan(log["eval_ode"]), log["episodes"] / 1000
        ax.plot(played, log["train_sde"], color=GREY, lw=0.6, alpha=0.5,
                label="acting policy, with noise" if i == 0 else None)
        ax.plot(played[seen], log["eval_ode"][seen], "o-", ms=2.5, lw=1.3, color=color,
                alpha=1 - 0.25 * (i % 3), label="trained policy, no noise" if i == 0 else None)


# ------------------------------------------------------------------------------------------------
# The studies' pages


def draw_before_after(ax, rows, groups):
    """rows: (group, seed, policy, success, low, high). A pair of bars for each group, mean over
    seeds; a dot with its 95 % interval for each seed."""
    policies = list(dict.fromkeys(row[2] for row in rows))
    width = 0.8 / len(policies)
    for p, policy in enumerate(policies):
        shown = NAMES.get(policy, policy)
        for g, group in enumerate(groups):
            own = [row for row in rows if row[0] == group and row[2] == policy]
            x = g + (p - (len(policies) - 1) / 2) * width
            ax.bar(x, np.mean([row[3] for row in own]) if own else 0, 0.92 * width, alpha=0.75,
                   color=POLICY_COLORS.get(shown, GREEN), hatch=POLICY_HATCHES.get(shown),
                   edgecolor=CARD, label=shown if g == 0 else None)
            for i, (*_, success, low, high) in enumerate(own):
                at = x + (i - (len(own) - 1) / 2) * width / max(4, len(own) + 1)
                ax.errorbar(at, success, [[max(0, success - low)], [max(0, high - success)]],
                            fmt="o", ms=2.5, color=INK, lw=0.7)
    ax.set_xticks(range(len(groups)), groups)
    ax.set(ylim=(0, 1.05), ylabel="success, no noise")


def libero_protocol(folder):
    """Success before and after, official states, a dot for each seed (rows of protocol.csv): the
    three suites with one demonstration; LIBERO-PRO's variants of one; libero_10, which had five;
    and libero_object from more demonstrations."""
    if not (folder / "protocol.csv").exists():
        return skipped("libero_protocol", "libero/protocol.csv")
    runs = collections.defaultdict(list)  # (suite played, demos, seed, policy) -> its tasks
    for row in read(folder / "protocol.csv"):
        if row["starts"] == libero.OFFICIAL_STARTS and row["method"] == "stepnft":
            runs[row["tested"], int(row["demos"]), row["seed"], row["policy"]].append(row)
    rows = [(suite, demos, seed, policy, *pooled(tasks))
            for (suite, demos, seed, policy), tasks in runs.items()]
    panels = (
        ("one demonstration a task", 1, ["libero_object", "libero_spatial", "libero_goal"], 3),
        ("LIBERO-PRO: never trained on", 1, ["libero_object_swap", "libero_object_object",
                                             "libero_object_lan", "libero_object_task"], 3.4),
        ("five demos,\n2 tasks, 1 seed", 5, ["libero_10"], 1.1))
    looks = {"libero_object_swap": "other\nplaces", "libero_object_object": "other\nlooks",
             "libero_object_lan": "other\nwords", "libero_object_task": "other\ntargets"}
    fig, axes = plt.subplots(1, 4, figsize=(11, 3.2), width_ratios=[*(p[3] for p in panels), 2.2])
    for ax, (name, demos, suites, _) in zip(axes, panels):
        draw_before_after(ax, [(suite, *rest) for suite, shots, *rest in rows
                               if suite in suites and shots == demos], suites)
        ax.set_xticks(range(len(suites)), [looks.get(suite, suite) for suite in suites])
        ax.set_title(name)
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=2,
               handlelength=1.5)
    for ax in axes[1:3]:
        ax.set(ylabel=None)
    more_demos(axes[-1], [row for row in rows if row[0] == "libero_object"])
    fig.supxlabel("bars: mean over seeds; a dot: one seed with its 95 % interval over episodes",
                  fontsize=8, color=GREY)
    save(fig, "libero_protocol")


def more_demos(ax, rows):
    """Success against demonstrations a task, before and after."""
    shots = sorted({demos for _, demos, *_ in rows})
    for policy, style in zip(dict.fromkeys(row[3] for row in rows), ("s--", "o-")):  # SFT first
        color = POLICY_COLORS[NAMES.get(policy, policy)]
        each = [[row[4] for row in rows if (row[1], row[3]) == (demos, policy)] for demos in shots]
        ax.plot(shots, [np.mean(own) for own in each], style[1:], color=color)
        for demos, own in zip(shots, each):
            ax.plot([demos] * len(own), own, style[0], ms=4, color=color)
    ax.set(ylim=(0, 1.05), xlabel="demonstrations a task", xticks=shots,
           title="libero_object, more demos")


def pooled(rows):
    """Rows of a csv, a task each -> success of all their episodes, with its 95 % interval."""
    episodes = [int(row["episodes"]) for row in rows]
    won = round(sum(n * float(row["success"]) for n, row in zip(episodes, rows)))
    return numbers(rated(np.arange(sum(episodes)) < won))


def phase(folder):
    """For the page of the ablations: each target against the width of the noise on the toy world
    and on PickCube; and below, why: see results/mechanism."""
    if not (folder / "phase.csv").exists() or not (folder / "phase_robot.csv").exists():
        return skipped("phase", "ablations/phase.csv and phase_robot.csv")
    fig, axes = plt.subplots(2, 2, figsize=(9.6, 5.8))
    shown = (("phase.csv", "toy world, each target tuned", list(TARGETS)),
             ("phase_robot.csv", "PickCube, from shared clones", ["next", "endpoint"]))
    for ax, (name, what, targets) in zip(axes[0], shown):
        table = draw_phase(ax, read(folder / name), targets)
        ax.set_title(f"{what}, {table[0]['seeds']} seeds")
        ax.legend(fontsize=8, loc="lower left", handlelength=2.5)
    mechanism = RESULTS / "mechanism/mechanism.csv"
    residual(axes[1, 0], mechanism)
    pull(axes[1, 1], mechanism)
    save(fig, "phase")


def residual(ax, path, noise="0.5"):
    """Bars: the parts of each target's residual, step by step, mean over clones."""
    rows = [row for row in read(path) if row["noise_level"] == noise]
    bars = {str(k): [r for r in rows if (r["target"], r["step"]) == ("endpoint", str(k))]
            for k in range(K)}
    bars["next,\nany"] = [r for r in rows if r["target"] == "next"]
    below = np.zeros(len(bars))
    for part, color, name, hatch in (("own", BLUE, "this step's noise", ""),
                                     ("later", ORANGE, "later steps' noise", "//"),
                                     ("systematic", GREY, "no noise at all", "..")):
        height = np.array([np.mean([float(r[part]) for r in own]) for own in bars.values()])
        ax.bar(list(bars), height, 0.7, below, color=color, alpha=0.75, hatch=hatch, label=name,
               edgecolor=CARD)
        below += height
    ax.set(title=f"what the label is multiplied with, noise {noise}", yticks=(0, 0.5, 1),
           ylim=(0, 1.3), ylabel="share of the residual", xlabel="endpoint, at step k")
    ax.legend(fontsize=8, loc="upper left", handlelength=1.2, ncols=3, columnspacing=1)


def pull(ax, path):
    """Where the labels of a clone's episodes push it along the endpoint's systematic part: mean of
    the steps before the last, over starts; a thin line for each clone."""
    rows = [row for row in read(path) if row["pull"]]
    x = list(dict.fromkeys(row["noise_level"] for row in rows))
    curves = np.array([[np.mean([float(row["pull"]) for row in rows
                                 if (row["noise_level"], row["seed"]) == (a, seed)]) for a in x]
                       for seed in dict.fromkeys(row["seed"] for row in rows)])
    x = [float(a) for a in x]
    ax.plot(x, curves.T, color=ORANGE, lw=0.7, alpha=0.4)
    ax.plot(x, curves.mean(0), "s--", color=ORANGE, ms=4, lw=1.6, label="endpoint")
    ax.axhline(0, color=BLUE, lw=1.6, label="next step: nothing systematic")
    ax.set(title="where labels pull, steps 0 to 2; thin: each clone", xlabel="noise level a",
           ylim=(-0.8, 0.45), ylabel="pull (+1) or push (-1)")
    ax.legend(fontsize=8, loc="lower left", handlelength=2)


def maniskill(folder):
    logs, summary = sorted(folder.glob("seed[0-9].csv")), folder / "summary.csv"
    if not logs or not summary.exists():
        return skipped("maniskill", f"{folder.name}/seed*.csv and summary.csv")
    fig, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3), width_ratios=(1.6, 1))
    draw_curves(left, logs, BLUE)
    left.set(ylim=(0, 1.02), xlabel="training episodes, thousands", ylabel="success",
             title=f"ManiSkill PickCube, validation while training, {count(logs)}")
    left.legend(loc="lower right", handlelength=1.5)
    rows = []
    for i, row in enumerate(read(summary)):
        for policy, column in (("SFT", "sft"), ("pi-StepNFT", "stepnft")):
            episodes = int(row["test_episodes"])
            won = round(float(row[column]) * episodes)
            rows.append((f"seed {i}", i, policy, *numbers(rated(np.arange(episodes) < won))))
    draw_before_after(right, rows, sorted({row[0] for row in rows}))
    right.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, handlelength=1.5)
    right.set_ylabel("success, no noise, test starts")
    save(fig, "maniskill")


def numbers(row):
    return tuple(float(row[name]) for name in ("success", "low", "high"))


def count(paths):
    return f"{len(paths)} seed{'s' if len(paths) > 1 else ''}"


def skipped(name, missing):
    print(f"skipped {name}: results/{missing} is not there yet")


def main():
    parser = Parser(__doc__)
    parser.add_argument("--record", action="store_true", help="play the toy policies again first")
    parser.add_argument("--policy", default="runs/03_step_loss/policy.pt",
                        help="with --record: the policy after RL, of 03 at its defaults")
    args = parser.parse_args()
    DRAWN.mkdir(exist_ok=True)
    if args.record:
        trained = flow.FlowPolicy(horizon=4, action_dim=2, state_dim=3)
        try:
            trained.load_state_dict(torch.load(args.policy, weights_only=True))
        except Exception:  # torch raises many kinds for a file that is something else
            parser.error(f"--policy {args.policy} is no checkpoint of 03: run 03_step_loss.py "
                         "first")
        record(trained)
    with plt.rc_context(STYLE):
        toy = np.load(RESULTS / "figures/toy.npz")
        hero(toy)
        method(toy)
        title(RESULTS / "ablations")
        phase(RESULTS / "ablations")
        libero_protocol(RESULTS / "libero")
        maniskill(RESULTS / "maniskill")


if __name__ == "__main__":
    main()
