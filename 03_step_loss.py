"""03 - Finer steps: the ranking loss of pi-StepNFT, and the reinforcement learning iteration.

02 recorded noisy denoising steps x_t -> x_next, each a draw from a Gaussian whose mean is affine in
the velocity. So one step can be judged by itself. Mirror the trained velocity around the one that
acted, v_pos = v_old + beta delta and v_neg = v_old - beta delta with delta = v_theta - v_old, and
ask which of these two branches explains the observed x_next better:

    E(v) = |x_next - mean(v)|^2 / (std^2 + eps)                 of each action, eps = 1e-4
    L    = softplus(dpo_beta / 2 * y * (E_pos - E_neg)),        y = +1 success, -1 failure

A success says v_pos should win, a failure v_neg. No critic, no likelihood of the whole path, one
forward pass per optimisation step. At delta = 0 the loss is ln 2 and its gradient that of
-y log N(x_next; mean, std^2), averaged over the executed actions, times beta dpo_beta std^2 /
(std^2 + eps): REINFORCE on this one step. Further on E_pos - E_neg stays linear in delta (the
squares cancel), so the slope is bounded and fades as the branch that should win does.

    world.play(explore(old)): old acts, with noise -> labels -> update: the loss -> ema_update

New since 02: the loss, the iteration, and the EMA (exponential moving average) by which the acting
policy `old` follows the trained one. `--target endpoint` asks which branch explains the end of the
path, x_0, instead (DiffusionNFT). Unlike in the paper's code, a success in the last chunk counts.

Run:     python 03_step_loss.py            (about 25 s on one CPU core, SFT included)
Prints:  success so far beside the progress bar, then RESULT before (sft) and after (stepnft).
Saves:   runs/03_step_loss/{log.csv, learning.png, policy.pt}
"""

import copy
import csv
import importlib
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

flow = importlib.import_module("01_flow_policy")
sde = importlib.import_module("02_sde_sampler")

# ------------------------------------------------------------------------------------------------
# The loss of one denoising step


def mirror(v_theta, v_old, beta, max_drift):
    """Two velocities at equal distance from v_old, one towards v_theta and one away: (B, H, A). A
    longer delta than max_drift per action is not rewarded: it is shortened, then beta scales it."""
    delta = v_theta - v_old
    norm = torch.linalg.vector_norm(delta, dim=-1, keepdim=True)                  # (B, H, 1)
    delta = delta * (max_drift / norm.clamp(min=max_drift))
    # v_pos = v_old + beta delta         v_neg = v_old - beta delta
    return v_old + beta * delta, v_old - beta * delta


def step_error(v, x_t, x_next, t_cur, t_next, sigma, var_eps=1e-4):
    """E(v): how badly a velocity explains a step x_t -> x_next, summed over action dims: (B, H)."""
    t_cur, t_next, sigma = (z[:, None, None] for z in (t_cur, t_next, sigma))     # (B, 1, 1)
    mean, std = sde.transition(x_t, v, t_cur, t_next, sigma)
    # E = sum over action dims of (x_next - mean(v))^2 / (std^2 + eps)
    return ((x_next - mean).pow(2) / (std**2 + var_eps)).sum(-1)


def endpoint_error(v, x_t, x_0, t_cur, t_next, sigma, var_eps=1e-4):
    """The contrast, DiffusionNFT's target: how badly x0_hat = x_t - t v predicts the end of the
    path, summed likewise: (B, H). The variance is that of the step, as in the official code."""
    t_cur, t_next, sigma = (z[:, None, None] for z in (t_cur, t_next, sigma))     # (B, 1, 1)
    x0_hat = x_t - t_cur * v
    # E = sum over action dims of (x_0 - x0_hat(v))^2 / (std^2 + eps),     std^2 = sigma^2 dt
    return ((x_0 - x0_hat).pow(2) / (sigma**2 * (t_cur - t_next) + var_eps)).sum(-1)


TARGETS = {"next": step_error, "endpoint": endpoint_error}


def step_nft_loss(v_theta, v_old, x_t, target, t_cur, t_next, sigma, y, mask=None, *, beta=1.0,
                  max_drift=0.5, dpo_beta=1.0, kl_weight=1e-4, error=step_error):
    """The pi-StepNFT loss of a batch of single denoising steps -> (scalar, info of 0-d tensors).

    v_theta, v_old, x_t and target (x_next, or x_0 for endpoint_error) are (B, H, A); t_cur, t_next,
    sigma, y are (B,); mask (B, H) marks executed actions. Only v_theta carries a gradient. Added
    is a pull to v_old, kl_weight times the mean over dims of (v_theta - v_old)^2. info: loss,
    without the pull; rank_accuracy, share of actions whose E is lower in the branch that should
    win; margin, y (E_neg - E_pos); drift, |v_theta - v_old|; clipped, share above max_drift.
    """
    assert v_theta.shape == v_old.shape == x_t.shape == target.shape, "expected four (B, H, A)"
    assert y.shape == t_cur.shape == x_t.shape[:1], f"y has shape {tuple(y.shape)}, expected (B,)"
    mask = torch.ones_like(x_t[..., 0]) if mask is None else mask.to(x_t.dtype)   # (B, H)
    y, v_old = y[:, None], v_old.detach()
    v_pos, v_neg = mirror(v_theta, v_old, beta, max_drift)
    E_pos, E_neg = (error(v, x_t, target, t_cur, t_next, sigma) for v in (v_pos, v_neg))
    # L = softplus(dpo_beta / 2 * y * (E_pos - E_neg))
    loss = executed_mean(F.softplus(dpo_beta / 2 * y * (E_pos - E_neg)), mask)
    with torch.no_grad():
        drift, margin = (v_theta - v_old).norm(dim=-1), y * (E_neg - E_pos)       # (B, H)
        info = {"rank_accuracy": margin > 0, "margin": margin, "drift": drift,
                "clipped": drift > max_drift}
        info = {name: (z * mask).sum() / mask.sum().clamp(min=1) for name, z in info.items()}
    pull = executed_mean((v_theta - v_old).pow(2).mean(-1), mask)  # a KL would weigh it by t
    return loss + kl_weight * pull, {"loss": loss.detach(), **info}


def executed_mean(values, mask):
    """(B, H) -> mean over a row's executed actions, then over the rows that have any, or 0."""
    actions = mask.sum(-1)                                                        # (B,)
    per_row = (values * mask).sum(-1) / actions.clamp(min=1)
    return per_row.sum() / (actions > 0).sum().clamp(min=1)


# ------------------------------------------------------------------------------------------------
# One RL iteration: rollout, labels, update, ema_update


def explore(policy, num_steps, noise_level):
    """An `act` for a world's `play`: SDE actions, with the whole denoising path recorded."""
    def act(obs):
        x_0, path = sde.sde_sample(policy, flow.to_device(obs, policy), num_steps, noise_level)
        return policy.denormalise(x_0).cpu(), {k: z.cpu() for k, z in path._asdict().items()}
    return act


def labels(success, episode, group_size=1):
    """success (episodes,), episode of each row (B,) -> y (B,) float: +1 success, -1 failure (the
    paper). With group_size > 1, that many neighbours share a start, and the mean of their y is
    taken off (GRPO's baseline): a start that always fails or always succeeds teaches nothing."""
    y = torch.as_tensor(success).float() * 2 - 1                                  # (episodes,)
    if group_size > 1:
        groups = y.view(-1, group_size)
        y = (groups - groups.mean(1, keepdim=True)).flatten()
    return y[episode]


def recorded_steps(policy, batch):
    """Recorded denoising steps of b rows, with the velocity that `policy` has there now. batch: an
    observation, x, v, sigma as in SamplingPath (02), y (b,), mask (b, H); k (b, n): which n of a
    row's K steps, one at random here, all K in 04 and 05. -> (ctx of the b rows, for 05's critic;
    v_theta v_old x_t x_next x_0 t_cur t_next sigma y mask in a dict, b * n each, row after row)."""
    batch = flow.to_device(batch, policy)
    k, rows = batch["k"], torch.arange(len(batch["k"]))[:, None]
    times, n = sde.time_grid(batch["v"].shape[1]).to(k.device), k.shape[1]
    x_t, t_cur, ctx = batch["x"][rows, k], times[k], policy.encode(batch)  # (b, n, H, A), (b, n)
    v_theta = torch.stack([policy.velocity(x_t[:, j], t_cur[:, j], ctx) for j in range(n)], 1)
    steps = dict(v_theta=v_theta, v_old=batch["v"][rows, k], x_t=x_t, t_cur=t_cur,
                 x_next=batch["x"][rows, k + 1], t_next=times[k + 1], sigma=batch["sigma"][rows, k])
    each = {name: batch[name].repeat_interleave(n, 0) for name in ("y", "mask")}
    x_0 = batch["x"][:, -1].repeat_interleave(n, 0)
    return ctx, {**{name: z.flatten(0, 1) for name, z in steps.items()}, **each, "x_0": x_0}


def update(policy, optimizer, batch, *, epochs=4, minibatch=512, grad_clip=1.0, target="next",
           loss=step_nft_loss, **loss_options):
    """Minibatch steps of the ranking loss over a labelled batch -> mean info of all steps. target:
    "next" or "endpoint", what the branches must explain; loss: another one, to ablate this."""
    infos, loss_options = [], {"error": TARGETS[target], **loss_options}
    for _ in range(epochs):
        for rows in torch.randperm(len(batch["y"])).split(minibatch):
            _, steps = recorded_steps(policy, flow.take(batch, rows))
            x_next, x_0 = steps.pop("x_next"), steps.pop("x_0")
            value, info = loss(**steps, target=x_next if target == "next" else x_0, **loss_options)
            info["grad_norm"] = optimise(policy, optimizer, value, grad_clip)
            infos.append(info)
    return mean_info(infos)


def optimise(learners, optimizer, loss, grad_clip):
    """One optimisation step -> norm of the gradient before it was clipped."""
    optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(learners.parameters(), grad_clip)
    optimizer.step()
    return norm


def mean_info(infos):
    return {name: torch.stack([info[name] for info in infos]).mean().item() for name in infos[0]}


def ema_decay(iteration, iterations, start=0.1, end=0.995):
    """alpha at an iteration, a half cosine from start (old follows at once) to end (old rests):
    end - (end - start) (1 + cos(pi i / n)) / 2 at iteration i of n, counted from 0."""
    return end - (end - start) * (1 + math.cos(math.pi * iteration / iterations)) / 2


@torch.no_grad()
def ema_update(old, new, decay):
    """old <- decay old + (1 - decay) new, for every parameter of the two policies."""
    for p_old, p_new in zip(old.parameters(), new.parameters()):
        p_old.lerp_(p_new, 1 - decay)


# ------------------------------------------------------------------------------------------------
# The method on the toy world


def train_toy(args, log=None):
    """SFT -> pi-StepNFT on the toy world -> (SFT policy, trained policy, success of both)."""
    sft = flow.toy_policy(args.seed)
    torch.manual_seed(args.seed)
    policy, old = copy.deepcopy(sft), copy.deepcopy(sft)  # policy learns, old acts
    optimizer = torch.optim.Adam(policy.parameters(), lr=args.lr)
    world = flow.GapWorld()
    test_seeds = flow.episode_seeds("test", 1000)
    before = flow.evaluate(sft, world, test_seeds, args.num_steps).mean()
    bar = tqdm(range(args.iterations), desc="pi-StepNFT", disable=None)
    for iteration in bar:
        starts = flow.episode_seeds("train", args.episodes // args.group_size, args.seed, iteration)
        seeds = np.repeat(starts, args.group_size)
        success, batch = world.play(explore(old, args.num_steps, args.noise_level), seeds)
        batch["k"] = torch.randint(args.num_steps, (len(batch["x"]), 1))
        batch["y"] = labels(success, batch["episode"], args.group_size)
        info = update(policy, optimizer, batch, target=args.target, beta=args.beta,
                      max_drift=args.max_drift, dpo_beta=args.dpo_beta)
        alpha = ema_decay(iteration, args.iterations, *args.ema)
        ema_update(old, policy, alpha)
        rate = ""
        if (iteration + 1) % 10 == 0 or iteration + 1 == args.iterations:
            rate = flow.evaluate(policy, world, test_seeds, args.num_steps).mean()
            bar.set_postfix(sft=f"{before:.3f}", now=f"{rate:.3f}")
        if log:
            log_row(log, {"iteration": iteration, "episodes": (iteration + 1) * args.episodes,
                          "train_sde": success.mean(), "eval_ode": rate, **info, "alpha": alpha})
    return sft, policy, before, rate


def log_row(path, row):
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
    seen, played = ~np.isnan(log["eval_ode"]), log["episodes"] / 1000
    success_ax.plot(played, log["train_sde"], color="0.6", lw=1, label="old policy, SDE")
    success_ax.plot(played[seen], log["eval_ode"][seen], "o-", ms=3, color="#0072b2",
                    label="trained policy, ODE")
    success_ax.set(xlabel="training episodes, thousands", ylabel="success", ylim=(0, 1.02))
    success_ax.legend(frameon=False)
    loss_ax.plot(played, log["loss"], color="#d55e00", lw=1)
    loss_ax.set(xlabel="training episodes, thousands", ylabel="loss")


def draw_rollouts(ax, policy, title, num_steps):
    world, seeds = flow.GapWorld(), flow.episode_seeds("test", 40)
    success, rows = world.play(
        lambda obs: (policy.denormalise(flow.ode_sample(policy, obs, num_steps)), {}), seeds)
    for e, ok in enumerate(success):
        trail = np.vstack([rows["state"][rows["episode"] == e, :2], world.position[e]])
        ax.plot(*trail.T, "-o" if ok else ":x", markevery=[-1], ms=5, lw=1,
                color="#0072b2" if ok else "#d55e00")
    ax.axvline(0, color="0.6", lw=1)
    ax.plot(*world.goal, "o", ms=14, color="#009e73", alpha=0.4)
    ax.set(title=f"{title}: {success.mean():.0%} arrive", xlim=(-1, 1), ylim=(-1, 1))


def add_method_flags(parser):
    """The method's main numbers, with the paper's values."""
    add, positive = parser.add_argument, flow.positive_float
    add("--target", default="next", choices=list(TARGETS),
        help="what the branches must explain: the next step (the method), or the endpoint x_0")
    add("--group-size", type=flow.positive_int, default=1,
        help="episodes per start; above 1, labels are centred on their mean")
    add("--noise-level", type=positive, default=0.2, help="a, width of the exploration")
    add("--num-steps", type=flow.positive_int, default=4, help="K, denoising steps")
    add("--beta", type=positive, default=1.0, help="distance of the branches, in units of delta")
    add("--max-drift", type=positive, default=0.5, help="longest delta, per action, in flow units")
    add("--dpo-beta", type=positive, default=1.0, help="slope of the ranking, as in DPO")
    add("--ema", type=flow.number(float, 0, 1), nargs=2, metavar=("START", "END"),
        default=[0.1, 0.995], help="how slowly the acting policy follows, first and last iteration")


def check_method(parser, args):
    if args.episodes % args.group_size:
        parser.error(f"--episodes {args.episodes} is no multiple of --group-size {args.group_size}")
    if args.ema[0] > args.ema[1]:
        parser.error(f"--ema {args.ema[0]} {args.ema[1]}: END is below START, but old slows down")


def parse_args(argv=None):
    parser = flow.Parser(__doc__)
    add = parser.add_argument
    add("--seed", type=flow.natural, default=0, help="seed of SFT, rollouts and updates")
    add("--iterations", type=flow.positive_int, default=160, help="RL iterations")
    add("--episodes", type=flow.positive_int, default=512, help="episodes per iteration")
    add("--lr", type=flow.positive_float, default=1e-3, help="Adam's learning rate")
    add("--out", type=Path, default="runs/03_step_loss", help="folder of log, figure and policy")
    add_method_flags(parser)
    args = parser.parse_args(argv)
    check_method(parser, args)
    parser.make_folder("--out", args.out)
    return args


def main():
    args, start = parse_args(), time.time()
    torch.set_num_threads(1)  # on nets this small, threads only wait for each other
    (args.out / "log.csv").unlink(missing_ok=True)
    sft, policy, before, after = train_toy(args, args.out / "log.csv")
    torch.save(policy.state_dict(), args.out / "policy.pt")
    fig, axes = flow.pyplot().subplots(2, 2, figsize=(10, 9), layout="constrained")
    for ax, shown, title in zip(axes[0], (sft, policy), ("before (SFT)", "after (pi-StepNFT)")):
        draw_rollouts(ax, shown, title, args.num_steps)
    draw_learning(read_log(args.out / "log.csv"), *axes[1])
    axes[1, 1].axhline(math.log(2), color="0.6", ls="--")  # the branches tie
    fig.savefig(args.out / "learning.png", dpi=120)
    print(f"RESULT sft={before:.3f} stepnft={after:.3f} "
          f"episodes={args.iterations * args.episodes} seconds={time.time() - start:.0f}")


if __name__ == "__main__":
    main()
