"""03 - Finer steps: the ranking loss of pi-StepNFT, and the reinforcement learning iteration.

02 recorded noisy denoising steps x_t -> x_next, each a draw from a Gaussian whose mean is affine in
the velocity, so one step can be judged by itself: which of two velocities, mirrored around the one
that acted, explains x_next better? After a success v_pos should (if beta = 1 that is v_theta), and
after a failure its mirror image, v_neg. (NFT: negative-aware fine-tuning.)

     1  policy <- SFT on a few demonstrations;   old <- policy
     2  for each iteration:
     3      for each chunk that old plays:   x_t <- noise
     4          for each of K steps:   v_old <- old(x_t, t, observation)
     5              x_next ~ N(mean(v_old), std^2)
     6      y <- +1 for every chunk of an episode that succeeded, else -1
     7      for each minibatch of recorded steps x_t -> x_next:
     8          delta <- policy(x_t, t, observation) - v_old
     9          v_pos, v_neg <- v_old + beta delta, v_old - beta delta
    10          E_pos, E_neg <- |x_next - mean(v)|^2 / (std^2 + 1e-4)   of v_pos and of v_neg
    11          minimise softplus(dpo_beta / 2 y (E_pos - E_neg))
    12      old <- alpha old + (1 - alpha) policy                 The numbers stand in the margin.

Run:     python 03_step_loss.py            (about 25 s on one CPU core, SFT included)
Prints:  success so far beside the progress bar, then RESULT before (sft) and after (stepnft).
Saves:   runs/03_step_loss/{log.csv, learning.png, policy.pt}
"""

import copy
import importlib
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from envs.gap_world import GapWorld, draw_episodes, episode_seeds
from tools import files, flags
from tools.log import draw_learning, log_row, read_log

flow = importlib.import_module("01_flow_policy")
sde = importlib.import_module("02_sde_sampler")

# ------------------------------------------------------------------------------------------------
# The loss of one denoising step


def mirror(v_theta, v_old, beta, max_drift):
    """Two velocities at equal distance from v_old, one towards v_theta and one away: (B, H, A). A
    longer delta than max_drift per action is not rewarded: it is shortened, then beta scales it."""
    delta = v_theta - v_old                                                              # 8
    norm = torch.linalg.vector_norm(delta, dim=-1, keepdim=True)                  # (B, H, 1)
    delta = delta * (max_drift / norm.clamp(min=max_drift))
    v_pos = v_old + beta * delta                                                         # 9
    v_neg = v_old - beta * delta
    return v_pos, v_neg


def step_error(v, x_t, x_next, t_cur, t_next, sigma, var_eps=1e-4):
    """E(v): how badly a velocity explains a step x_t -> x_next, summed over action dims: (B, H)."""
    t_cur, t_next, sigma = (z[:, None, None] for z in (t_cur, t_next, sigma))     # (B, 1, 1)
    mean, std = sde.transition(x_t, v, t_cur, t_next, sigma)
    return ((x_next - mean).pow(2) / (std**2 + var_eps)).sum(-1)                         # 10


def step_nft_loss(v_theta, v_old, x_t, target, t_cur, t_next, sigma, y, mask=None, *, beta=1.0,
                  max_drift=0.5, dpo_beta=1.0, kl_weight=1e-4, error=step_error):
    """The pi-StepNFT loss of a batch of single denoising steps -> (scalar, info of 0-d tensors).

    v_theta, v_old, x_t and target (x_next, or x_0 for endpoint_error) are (B, H, A); t_cur, t_next,
    sigma, y are (B,); mask (B, H) marks executed actions. Only v_theta carries a gradient. Added
    is a pull to v_old, kl_weight times the mean over dims of (v_theta - v_old)^2. info: loss,
    without the pull; rank_accuracy, share of actions whose E is lower in the branch that should
    win (y = 0 counts as a miss); margin, y (E_neg - E_pos); drift, |v_theta - v_old|; clipped,
    share above max_drift.
    """
    assert v_theta.shape == v_old.shape == x_t.shape == target.shape, "expected four (B, H, A)"
    assert y.shape == t_cur.shape == x_t.shape[:1], f"y has shape {tuple(y.shape)}, expected (B,)"
    mask = torch.ones_like(x_t[..., 0]) if mask is None else mask.to(x_t.dtype)   # (B, H)
    y, v_old = y[:, None], v_old.detach()
    v_pos, v_neg = mirror(v_theta, v_old, beta, max_drift)
    E_pos, E_neg = (error(v, x_t, target, t_cur, t_next, sigma) for v in (v_pos, v_neg))
    # At delta = 0 this is ln 2, a tie, and its gradient REINFORCE's for this step, times beta
    # dpo_beta. What is quadratic in delta cancels in E_pos - E_neg: the slope fades once the right
    # branch wins, and doubles if the wrong one does. The loss stays near ln 2 although success
    # rises: the noise of one step decides little of an episode.
    loss = executed_mean(F.softplus(dpo_beta / 2 * y * (E_pos - E_neg)), mask)           # 11
    with torch.no_grad():
        drift, margin = (v_theta - v_old).norm(dim=-1), y * (E_neg - E_pos)       # (B, H)
        info = {"rank_accuracy": margin > 0, "margin": margin, "drift": drift,
                "clipped": drift > max_drift}
        info = {name: (z * mask).sum() / mask.sum().clamp(min=1) for name, z in info.items()}
    pull = executed_mean((v_theta - v_old).pow(2).mean(-1), mask)  # a KL would weigh each step
    return loss + kl_weight * pull, {"loss": loss.detach(), **info}


def executed_mean(values, mask):
    """(B, H) -> mean over a row's executed actions, then over the rows that have any, or 0."""
    actions = mask.sum(-1)                                                        # (B,)
    per_row = (values * mask).sum(-1) / actions.clamp(min=1)
    return per_row.sum() / (actions > 0).sum().clamp(min=1)


def endpoint_error(v, x_t, x_0, t_cur, t_next, sigma, var_eps=1e-4):
    """A contrast, DiffusionNFT's target: how badly x0_hat predicts the end of the path: (B, H). The
    variance, sigma^2 dt, is that of the step, as in the official code."""
    t_cur, t_next, sigma = (z[:, None, None] for z in (t_cur, t_next, sigma))     # (B, 1, 1)
    x0_hat = x_t - t_cur * v
    return ((x_0 - x0_hat).pow(2) / (sigma**2 * (t_cur - t_next) + var_eps)).sum(-1)


TARGETS = {"next": step_error, "endpoint": endpoint_error}


# ------------------------------------------------------------------------------------------------
# One RL iteration: rollout, labels, update, ema_update; `train_toy` has the loop


def explore(policy, num_steps, noise_level):
    """An `act` for a world's `play`: SDE actions, with the whole denoising path recorded."""
    def act(obs):
        x_0, path = sde.sde_sample(policy, obs, num_steps, noise_level)          # 4, 5: in 02
        return policy.denormalise(x_0), path._asdict()                     # x, v, sigma
    return act


def labels(success, episode, group_size=1):
    """success (episodes,), episode of each row (B,) -> y (B,) float: +1 success, -1 failure (the
    paper). With group_size > 1, that many neighbours share a start, and the mean of their y is
    taken off (GRPO's baseline): a start that always fails or always succeeds teaches nothing."""
    y = torch.as_tensor(success).float() * 2 - 1                                 # 6 (episodes,)
    if group_size > 1:
        groups = y.view(-1, group_size)
        y = (groups - groups.mean(1, keepdim=True)).flatten()
    return y[episode]


def recorded_steps(policy, batch, ctx):
    """One recorded denoising step of each row, step number k, with the velocity that `policy` has
    there now. batch: the observation, x, v, sigma of the path (02), k, y (B,), mask (B, H); ctx
    = encode(batch)
    -> dict of v_theta, v_old, x_t, x_next, x_0 (B, H, A), t_cur, t_next, sigma, y (B,), mask."""
    rows, k = torch.arange(len(batch["k"])), batch["k"]
    times = sde.time_grid(batch["v"].shape[1]).to(k.device)
    x_t, x_next, x_0 = batch["x"][rows, k], batch["x"][rows, k + 1], batch["x"][:, -1]
    v_old, sigma = batch["v"][rows, k], batch["sigma"][rows, k]
    v_theta = policy.velocity(x_t, times[k], ctx)
    return dict(v_theta=v_theta, v_old=v_old, x_t=x_t, x_next=x_next, x_0=x_0, t_cur=times[k],
                t_next=times[k + 1], sigma=sigma, y=batch["y"], mask=batch["mask"])


def update(policy, optimizer, batch, *, epochs=4, minibatch=512, grad_clip=1.0, target="next",
           loss=step_nft_loss, **loss_options):
    """Minibatch steps of the ranking loss over a labelled batch -> mean info of all steps. target:
    "next" or "endpoint", what the branches must explain; loss: another one, to ablate this."""
    infos, loss_options = [], {"error": TARGETS[target], **loss_options}
    for _ in range(epochs):
        for rows in torch.randperm(len(batch["y"])).split(minibatch):                    # 7
            part = flow.take(batch, rows)
            steps = recorded_steps(policy, part, policy.encode(part))
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
    if not norm.isfinite():
        raise SystemExit("the gradient is no number any more: give a lower --lr")
    optimizer.step()
    return norm


def mean_info(infos):
    return {name: torch.stack([info[name] for info in infos]).mean().item() for name in infos[0]}


def ema_decay(iteration, iterations, start=0.1, end=0.995):
    """alpha at iteration i of n, a half cosine: end - (end - start) (1 + cos(pi i / n)) / 2. The
    paper's ends: old follows nearly at once, later it rests. 03 keeps 0.1 (--ema 0.1 0.1)."""
    return end - (end - start) * (1 + math.cos(math.pi * iteration / iterations)) / 2


@torch.no_grad()
def ema_update(old, new, decay):
    """old <- decay old + (1 - decay) new, for every parameter of the two policies."""
    for p_old, p_new in zip(old.parameters(), new.parameters()):
        p_old.lerp_(p_new, 1 - decay)


def train_toy(args, log=None):
    """SFT -> pi-StepNFT on the toy world -> (SFT policy, trained policy, success of both)."""
    sft = flow.toy_policy(args.seed)                                                     # 1
    torch.manual_seed(args.seed)
    policy, old = copy.deepcopy(sft), copy.deepcopy(sft)  # policy learns, old acts
    optimizer = torch.optim.Adam(policy.parameters(), lr=args.lr)
    world = GapWorld()  # starts anywhere, as in the test; those of the demonstrations were narrow
    test_seeds = episode_seeds("test", 1000)
    before = flow.evaluate(sft, world, test_seeds, args.num_steps).mean()
    bar = tqdm(range(args.iterations), desc="pi-StepNFT", disable=None)
    for iteration in bar:                                                                # 2
        starts = episode_seeds("train", args.episodes // args.group_size, args.seed, iteration)
        seeds = np.repeat(starts, args.group_size)
        success, batch = world.play(explore(old, args.num_steps, args.noise_level), seeds)  # 3
        batch["k"] = torch.randint(args.num_steps, (len(batch["x"]),))  # one step of each chunk
        batch["y"] = labels(success, batch["episode"], args.group_size)
        info = update(policy, optimizer, batch, target=args.target, beta=args.beta,
                      max_drift=args.max_drift, dpo_beta=args.dpo_beta)
        alpha = ema_decay(iteration, args.iterations, *args.ema)
        ema_update(old, policy, alpha)                                                   # 12
        rate = ""
        if (iteration + 1) % 10 == 0 or iteration + 1 == args.iterations:
            rate = flow.evaluate(policy, world, test_seeds, args.num_steps).mean()
            bar.set_postfix(sft=f"{before:.3f}", now=f"{rate:.3f}")
        if log:
            log_row(log, {"iteration": iteration, "episodes": (iteration + 1) * args.episodes,
                          "train_sde": success.mean(), "eval_ode": rate, **info, "alpha": alpha})
    return sft, policy, before, rate


def figure(sft, policy, before, after, args):
    """Above: where 30 test episodes lead, before and after. Below: the learning curves."""
    from matplotlib.figure import Figure
    fig = Figure(figsize=(10, 9), layout="constrained")
    axes = fig.subplots(2, 2)
    for ax, shown, when, rate in ((axes[0, 0], sft, "before", before),
                                  (axes[0, 1], policy, "after", after)):
        draw_episodes(ax, GapWorld(), flow.ode_act(shown, args.num_steps),
                      f"{when}: {rate:.1%} of 1,000 test episodes arrive")
    draw_learning(read_log(args.out / "log.csv"), *axes[1])
    axes[1, 1].axhline(math.log(2), color="0.6", ls="--", label="ln 2: the branches tie")
    axes[1, 1].legend(frameon=False)
    fig.savefig(args.out / "learning.png", dpi=120)


def parse_args(argv=None):
    parser = flags.Parser(__doc__)
    add = parser.add_argument
    add("--seed", type=flags.natural, default=0, help="seed of SFT, rollouts and updates")
    add("--iterations", type=flags.positive_int, default=160, help="RL iterations")
    add("--episodes", type=flags.positive_int, default=512, help="episodes per iteration")
    add("--lr", type=flags.positive_float, default=3e-4, help="Adam's; paper: 1e-5, for pi0")
    add("--out", type=Path, default="runs/03_step_loss", help="folder of log, figure and policy")
    flags.add_method_flags(parser)  # noise, beta and so on, with the paper's values
    args = parser.parse_args(argv)
    flags.check_method(parser, args)
    parser.claim_folder("--out", args.out)
    return args


def main():
    args, start = parse_args(), time.time()
    torch.set_num_threads(1)  # on nets this small, threads only wait for each other
    (args.out / "log.csv").unlink(missing_ok=True)
    sft, policy, before, after = train_toy(args, args.out / "log.csv")
    files.save(policy.state_dict(), args.out / "policy.pt")
    figure(sft, policy, before, after, args)
    print(f"RESULT sft={before:.3f} stepnft={after:.3f} "
          f"episodes={args.iterations * args.episodes} seconds={time.time() - start:.0f}")


if __name__ == "__main__":
    flags.call(main)
