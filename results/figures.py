"""Every figure of the README, drawn from the csv and npz files in results/.

Run:     python results/figures.py             (about 5 s; needs no simulator, no training)
         python results/figures.py --record    plays the toy policies again first (10 s)
Draws:   results/figures/*.png; a figure whose data is missing is skipped, and a line says so.
         (results/ablations.py draws its own.)

`--record` writes results/figures/toy.npz from the policy of 01 and from the one that
`03_step_loss.py --noise-level 0.5 --out runs/03_noise05` saved. All formulas are the scripts' own.
"""

import collections
import importlib
import math
import sys
from pathlib import Path

import numpy as np
import torch

RESULTS = Path(__file__).resolve().parent
DRAWN = RESULTS / "figures"    # where the pictures go
sys.path[:0] = [str(RESULTS.parent), str(RESULTS)]
flow, sde, nft, robot, ablations, study = map(importlib.import_module, (
    "01_flow_policy", "02_sde_sampler", "03_step_loss", "04_train_libero", "ablations", "study"))
plt, read = flow.pyplot(), study.read

# Okabe and Ito's colours: told apart by every kind of colour vision. Figures lie on a card of their
# own, so that they read the same on a light and on a dark page.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#6e7781"
STYLE = {"figure.facecolor": "#f1f4f7", "axes.facecolor": "#f1f4f7", "savefig.dpi": 160,
         "font.size": 9, "axes.titlesize": 9.5, "axes.spines.top": False, "text.color": "#1f2328",
         "axes.spines.right": False, "axes.edgecolor": GREY, "axes.labelcolor": "#1f2328",
         "xtick.color": "#1f2328", "ytick.color": "#1f2328", "legend.frameon": False,
         "figure.constrained_layout.use": True, "mathtext.default": "regular"}
NAMES = {"pi-StepNFT": "π-StepNFT", "stepnft": "π-StepNFT", "ppo": "PPO", "grpo": "GRPO"}
POLICY_COLORS = {"SFT": GREY, "PPO": ORANGE, "GRPO": PURPLE, "π-StepNFT": BLUE}

K, WIDE, NOISE = 4, 0.5, 0.2   # denoising steps; noise of the hero figure; the paper's, elsewhere


# ------------------------------------------------------------------------------------------------
# Recording the toy world


def chunks(policy, noise=0):
    """obs -> chunks (N, H, A) in environment units, by the SDE or, without noise, by the ODE."""
    def sample(obs):
        x_0 = (sde.sde_sample(policy, obs, K, noise)[0] if noise
               else flow.ode_sample(policy, obs, K))
        return policy.denormalise(x_0)
    return sample


def trails(sample, seeds, horizon=4):
    """Every position of the episodes: (episodes, steps + 1, 2), nan after the end, and success.

    The world runs with chunks of one action, so that each step is seen; a new chunk is sampled
    after every `horizon` of them, as in training.
    """
    world, plan, step = flow.GapWorld(), None, 0

    def act(obs):
        nonlocal plan, step
        if step % horizon == 0:
            plan = sample(obs)
        step += 1
        return plan[:, (step - 1) % horizon][:, None], {}

    success, rows = world.play(act, seeds)
    seen = np.full((len(seeds), world.max_steps + 1, 2), np.nan, np.float32)
    for e in range(len(seeds)):
        trail = np.vstack([rows["state"][rows["episode"] == e, :2], world.position[e]])
        seen[e, :len(trail)] = trail
    return seen, success


def hero_start(sft, trained, episodes=200):
    """The hero's episodes: trails and success of the clone, of the clone under noise and of the
    trained policy, from the first test start at which at most 5 %, at least 5 % and at least 95 %
    of them arrive."""
    for seed in flow.episode_seeds("test", 1000):
        data = {"seed": seed, "gap": flow.GapWorld().reset([seed])["state"][0, 2]}
        for name, sample, low, high in (("narrow", chunks(sft), 0, 0.05),
                                        ("wide", chunks(sft, WIDE), 0.05, 1),
                                        ("after", chunks(trained), 0.95, 1)):
            data[name], data[f"{name}_success"] = trails(sample, [seed] * episodes)
            if not low <= data[f"{name}_success"].mean() <= high:
                break
        else:
            return data
    raise SystemExit("no test start shows what the hero figure should: train longer")


def record(trained):
    """Plays and samples everything that the hero and the five method pictures show -> toy.npz."""
    torch.manual_seed(0)
    sft = flow.toy_policy(0)
    data = {**hero_start(sft, trained), "noise": WIDE}

    # 1: noise draws become one decision; 2: the same marginal, or not. One coordinate of the chunk.
    many = {"state": torch.tensor([[-0.8, 0.5, -0.2]]).expand(2000, 3)}
    data["ode"] = flow.ode_path(sft, many, 32)[:120, :, -1, 1]
    for name, corrected in (("corrected", True), ("uncorrected", False)):
        data[name] = sde.sde_sample(sft, many, sde.FINE, 0.5, corrected=corrected)[0][:, -1, 1]
    data["marginal"] = flow.ode_sample(sft, many, sde.FINE)[:, -1, 1]

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
# Drawing


def save(fig, name):
    fig.savefig(DRAWN / f"{name}.png")
    plt.close(fig)
    print(f"drew {name}.png")


def draw_world(ax, trails, success, gap, shown=100):
    for trail, ok in zip(trails[:shown], success):
        ax.plot(*trail.T, ls="-" if ok else "--", color=BLUE if ok else ORANGE, lw=0.6,
                alpha=0.45)
        end = trail[~np.isnan(trail[:, 0])][-1]
        if not ok:
            ax.plot(*end, "x", color=ORANGE, ms=3.5, mew=0.9, alpha=0.6)
    half = flow.GapWorld.gap
    for low, high in ((-1, gap - half), (gap + half, 1)):
        ax.plot([0, 0], [low, high], color="#1f2328", lw=2.5, solid_capstyle="butt")
    ax.add_patch(plt.Circle(flow.GapWorld.goal, flow.GapWorld.goal_radius, color=GREEN, alpha=0.5))
    ax.plot(*trails[0, 0], "o", color="#1f2328", ms=4)
    low, high = np.sort([trails[0, 0, 1], gap])
    middle, half = (low + high) / 2, max(0.7, (high - low) / 2 + 0.25)
    ax.set(xlim=(-0.95, 1), ylim=(middle - half, middle + half), xticks=[], yticks=[],
           aspect="equal")
    for side in ax.spines.values():
        side.set_visible(False)


def hero(data):
    fig, axes = plt.subplots(1, 3, figsize=(9.6, 3.1))
    texts = (("narrow", "Cloned policy, no noise", "one decision, nearly always the same mistake"),
             ("wide", f"Cloned policy, noise {float(data['noise'])} in every step",
              "wider: some of its episodes get through"),
             ("after", "After π-StepNFT, no noise", "no noise, and the way through has stayed"))
    for ax, (name, title, what) in zip(axes, texts):
        draw_world(ax, data[name], data[f"{name}_success"], float(data["gap"]))
        ax.set_title(title, weight="bold")
        rate = data[f"{name}_success"].mean()
        ax.set_xlabel(f"{what}\n{rate:.0%} of {len(data[name])} episodes arrive")
    save(fig, "hero")


def small():
    return plt.subplots(figsize=(3.7, 2.3))


def method(data):
    """One picture for each of the five steps."""
    fig, ax = small()
    ax.plot(np.linspace(1, 0, data["ode"].shape[1]), data["ode"].T, color=BLUE, alpha=0.25, lw=0.7)
    ax.set(xlim=(1, 0), xlabel="t: from noise (1) to action (0)", ylabel="one action, flow units")
    save(fig, "step1_flow")

    fig, ax = small()
    bins = np.linspace(*np.percentile(data["uncorrected"], [0.5, 99.5]), 45)
    for name, color, label in (("uncorrected", ORANGE, "SDE, no correction"),
                               ("corrected", BLUE, "SDE, corrected")):
        ax.hist(data[name], bins, density=True, color=color, alpha=0.45, label=label)
    ax.hist(data["marginal"], bins, density=True, histtype="step", color="#1f2328", label="ODE")
    ax.set(xlabel="the same action at t = 0, 64 steps", yticks=[])
    ax.spines.left.set_visible(False)
    ax.legend(fontsize=8, loc="upper left", handlelength=1)
    save(fig, "step2_marginals")

    fig, ax = small()
    for n in (1, 2):
        ax.add_patch(plt.Circle(data["mean"], n * float(data["std"]), fill=False, color=GREY,
                                ls="--", lw=0.8))
    for point, color, name in zip((*data["branches"], data["mean"]), (BLUE, ORANGE, GREY),
                                  ("v_pos", "v_neg", "v_old")):
        if name != "v_old":
            ax.plot(*np.stack([data["x_next"], point]).T, ":", color=color)
        ax.plot(*point, "o", color=color)
        away = 1 if data["mean"][0] > data["x_next"][0] else -1  # names go where x_next is not
        ax.annotate(f"mean({name})", point, (7 * away, -3), textcoords="offset points",
                    color=color, ha="left" if away > 0 else "right")
    ax.plot(*data["x_next"], "*", color="#1f2328", ms=11)
    ax.annotate("x_next", data["x_next"], (0, -14), textcoords="offset points", ha="center")
    ax.set_aspect("equal", "datalim")
    ax.set_axis_off()
    save(fig, "step3_gaussian")

    fig, ax = small()
    for losses, color, what in zip(data["loss"], (BLUE, ORANGE), ("success", "failure")):
        ax.plot(data["delta"], losses, color=color, label=what)
    ax.axhline(math.log(2), color=GREY, ls="--", lw=0.8)
    ax.text(0.45, math.log(2), "ln 2", color=GREY, ha="right", va="bottom")
    ax.set(xlabel="change of velocity towards x_next", ylabel="loss")
    ax.legend(handlelength=1, loc="upper center")
    save(fig, "step4_ranking")

    fig, ax = small()
    draw_curves(ax, sorted((RESULTS / "03_step_loss").glob("seed*.csv")), BLUE)
    ax.set(ylim=(0, 1), xlabel="training episodes, thousands", ylabel="success")
    ax.legend(fontsize=8, loc="lower right", handlelength=1)
    save(fig, "step5_iterate")


def draw_curves(ax, paths, color):
    """Success against training episodes, a line for each log; the acting policy thin and grey."""
    for i, path in enumerate(paths):
        log = nft.read_log(path)
        seen, played = ~np.isnan(log["eval_ode"]), log["episodes"] / 1000
        ax.plot(played, log["train_sde"], color=GREY, lw=0.6, alpha=0.5,
                label="acting policy, SDE" if i == 0 else None)
        ax.plot(played[seen], log["eval_ode"][seen], "o-", ms=2.5, lw=1.3, color=color,
                alpha=1 - 0.25 * (i % 3), label="trained policy, ODE" if i == 0 else None)


def draw_before_after(ax, rows, groups):
    """rows: (group, seed, policy, success, low, high). A pair of bars for each group, mean over
    seeds; a dot with its 95 % interval for each seed."""
    policies = list(dict.fromkeys(row[2] for row in rows))
    width = 0.8 / len(policies)
    for p, policy in enumerate(policies):
        shown = NAMES.get(policy, policy)
        color = POLICY_COLORS.get(shown, GREEN)
        for g, group in enumerate(groups):
            own = [row for row in rows if row[0] == group and row[2] == policy]
            x = g + (p - (len(policies) - 1) / 2) * width
            ax.bar(x, np.mean([row[3] for row in own]) if own else 0, 0.92 * width, color=color,
                   alpha=0.8, label=shown if g == 0 else None)
            for i, (*_, success, low, high) in enumerate(own):
                at = x + (i - (len(own) - 1) / 2) * width / max(4, len(own) + 1)
                ax.errorbar(at, success, [[max(0, success - low)], [max(0, high - success)]],
                            fmt="o", ms=2.5, color="#1f2328", lw=0.7)
    ax.set_xticks(range(len(groups)), groups)
    ax.set(ylim=(0, 1.05), ylabel="success without noise")
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(policies), handlelength=1)


def libero(folder, runs, title, name):
    """One run or several seeds: validation while training, and the test before and after; the
    test's groups are kinds of starts, and suites if LIBERO-PRO's variants were played."""
    logs, tests = (sorted(folder.glob(f"{runs}_seed[0-9]{end}.csv")) for end in ("", "_test"))
    if not logs:
        return skipped(name, f"{folder.name}/{runs}_seed*.csv")
    rows = []
    for i, path in enumerate(tests):
        for row in pooled(read(path)):
            variant = row["suite"].removeprefix("libero_object")
            rows.append((variant or row["starts"].replace(" ", "\n", 1), i, row["policy"],
                         *numbers(row)))
    groups = list(dict.fromkeys(row[0] for row in rows))
    fig, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3), width_ratios=(4, len(groups)))
    draw_curves(left, logs, BLUE)
    left.set(ylim=(0, 1.02), xlabel="training episodes, thousands", ylabel="success",
             title=f"LIBERO-Object, {title}, validation, {count(logs)}")
    left.legend(loc="lower right", handlelength=1.5)
    draw_before_after(right, rows, groups)
    save(fig, name)


def libero_protocol(folder):
    """Success before and after, official states, a dot for each seed (rows of protocol.csv): in
    every suite and in LIBERO-PRO's variants; right: libero_object from more demonstrations."""
    runs = collections.defaultdict(list)  # (suite played, demos, seed, policy) -> its tasks
    for row in read(folder / "protocol.csv"):
        if row["starts"] == robot.libero.OFFICIAL_STARTS and row["method"] == "stepnft":
            runs[row["tested"], int(row["demos"]), row["seed"], row["policy"]].append(
                {**row, "suite": row["tested"]})
    rows = [(suite, demos, seed, policy, *numbers(pooled(tasks)[0]))
            for (suite, demos, seed, policy), tasks in runs.items()]
    # the variants, which have one more _, last
    suites = sorted(dict.fromkeys(row[0] for row in rows), key=lambda suite: suite.count("_"))
    few = {suite: min(demos for name, demos, *_ in rows if name == suite) for suite in suites}
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 3), width_ratios=(3, 1))
    draw_before_after(left, [(suite, *rest) for suite, demos, *rest in rows
                             if demos == few[suite]], suites)
    names = [suite.removeprefix("libero_").replace("object_", "object\n_") if few[suite] == 1 else
             f"{suite}\n({few[suite]} demos)" for suite in suites]
    left.set_xticks(range(len(suites)), names)
    shots = sorted({demos for suite, demos, *_ in rows if suite == "libero_object"})
    for policy in dict.fromkeys(row[3] for row in rows):
        color = POLICY_COLORS[NAMES.get(policy, policy)]
        each = [[row[4] for row in rows if (row[0], row[1], row[3])
                 == ("libero_object", demos, policy)] for demos in shots]
        right.plot(shots, [np.mean(own) for own in each], color=color)
        for demos, own in zip(shots, each):
            right.plot([demos] * len(own), own, "o", ms=4, color=color)
    right.set(ylim=(0, 1.05), xlabel="demonstrations a task, libero_object", xticks=shots)
    save(fig, "libero_protocol")


def rated(won, episodes):
    """So many of so many episodes -> {episodes, success, low, high}."""
    return robot.rated(np.arange(episodes) < won)


def pooled(rows):
    """Rows of test.csv, a task each -> one for all tasks of a policy, suite and kind of starts."""
    found = []
    for policy, suite, starts in dict.fromkeys((r["policy"], r["suite"], r["starts"])
                                               for r in rows):
        own = [r for r in rows if (r["policy"], r["suite"], r["starts"]) == (policy, suite, starts)]
        episodes = [int(r["episodes"]) for r in own]
        won = round(sum(n * float(r["success"]) for n, r in zip(episodes, own)))
        found.append({"policy": policy, "suite": suite, "starts": starts,
                      **rated(won, sum(episodes))})
    return found


TARGETS = {"next": ("next step", BLUE, "o-"), "endpoint": ("endpoint", ORANGE, "s--"),
           "next-mean": ("next step's mean", PURPLE, "^:")}


def phase(folder):
    """Success against the width of the noise for each target, on the toy world and on PickCube,
    with 95 % t-intervals over seeds; and below, why: see mechanism.py."""
    if not (folder / "phase.csv").exists():
        return skipped("phase", "ablations/phase.csv")
    robot_rows = read(folder / "phase_robot.csv")
    if min((row["seeds"] for row in ablations.phase_table(robot_rows)), default=0) < 2:
        robot_rows = []  # a single seed has no interval to draw
    fig, axes = plt.subplots(*((2, 2) if robot_rows else (1, 3)),
                             figsize=(9.6, 5.8 if robot_rows else 3.2))
    axes, shown = axes.flat, [(read(folder / "phase.csv"), "toy world, each tuned")]
    shown += [(robot_rows, "PickCube, from shared clones")] * bool(robot_rows)
    for ax, (rows, title) in zip(axes, shown):
        table = ablations.phase_table(rows)
        for i, (target, (name, color, style)) in enumerate(TARGETS.items()):
            own = [row for row in table if row["target"] == target]
            x = [float(row["noise_level"]) + 0.007 * (i - 1) for row in own]  # side by side
            ax.errorbar(x, [row["after"] for row in own], [row["half"] for row in own], fmt=style,
                        color=color, ms=4, lw=1.6, capsize=2, label=name if own else None)
        ax.axhline(np.mean([row["sft"] for row in table]), color=GREY, ls="-.", lw=1)
        ax.text(0.42, table[0]["sft"] - 0.01, "SFT", color=GREY, va="top", fontsize=8)
        seeds = table[0]["seeds"]
        ax.set(title=f"{title}, {seeds} seed{'s' * (seeds > 1)}", xlabel="noise level a",
               ylim=(0, 1))
        ax.legend(fontsize=8, loc="lower left", handlelength=2)
    axes[0].set_ylabel("success after RL")
    residual(axes[-2], folder / "mechanism.csv")
    pull(axes[-1], folder / "mechanism.csv")
    save(fig, "phase")


def residual(ax, path, noise="0.5"):
    """Bars: the parts of each target's residual, step by step, mean over clones."""
    rows = [row for row in read(path) if row["noise_level"] == noise]
    bars = {**{f"{k}": [r for r in rows if (r["target"], r["step"]) == ("endpoint", str(k))]
               for k in range(K)}, "next,\nany": [r for r in rows if r["target"] == "next"]}
    below = np.zeros(len(bars))
    for part, color, name, hatch in (("own", BLUE, "this step's noise", ""),
                                     ("later", ORANGE, "later steps' noise", "//"),
                                     ("systematic", GREY, "no noise at all", "..")):
        height = np.array([np.mean([float(r[part]) for r in own]) for own in bars.values()])
        ax.bar(list(bars), height, 0.7, below, color=color, alpha=0.75, hatch=hatch, label=name,
               edgecolor="#f1f4f7")
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
            rows.append((f"seed {i}", i, policy, *numbers(rated(won, episodes))))
    draw_before_after(right, rows, sorted({row[0] for row in rows}))
    right.set_ylabel("success, ODE, test")
    save(fig, "maniskill")


def numbers(row):
    return tuple(float(row[name]) for name in ("success", "low", "high"))


def count(paths):
    return f"{len(paths)} seed{'s' if len(paths) > 1 else ''}"


def skipped(name, missing):
    print(f"skipped {name}: results/{missing} is not there yet")


def main():
    parser = flow.Parser(__doc__)
    parser.add_argument("--record", action="store_true", help="play the toy policies again first")
    parser.add_argument("--policy", default="runs/03_noise05/policy.pt",
                        help="with --record: the policy after RL with noise 0.5")
    args = parser.parse_args()
    DRAWN.mkdir(exist_ok=True)
    if args.record:
        trained = flow.FlowPolicy(horizon=4, action_dim=2, state_dim=3)
        try:
            trained.load_state_dict(torch.load(args.policy, weights_only=True))
        except Exception:  # torch raises many kinds for a file that is something else
            parser.error(f"--policy {args.policy} is no checkpoint of 03: run 03_step_loss.py "
                         "--noise-level 0.5 --out runs/03_noise05 first")
        record(trained)
    with plt.rc_context(STYLE):
        toy = np.load(RESULTS / "figures/toy.npz")
        hero(toy)
        phase(RESULTS / "ablations")
        method(toy)
        libero_protocol(RESULTS / "04_train_libero")
        libero(RESULTS / "04_train_libero", "task0", "task 0", "libero")
        libero(RESULTS / "04_train_libero", "ten_tasks", "ten tasks", "libero_ten")
        maniskill(RESULTS / "05_train_maniskill")


if __name__ == "__main__":
    main()
