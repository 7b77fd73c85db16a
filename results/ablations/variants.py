"""The parts that the toy studies put in the place of 03's, and 03's loop with them.

Another rollout, another target, another loss, other labels: each is a small function with the
interface of the one it replaces. VARIANTS gives the paper's ablations by name; whatever a variant
does not change has the paper's value (BASE), whatever the defaults of 03 are.

Why ranking and weighted MSE tie: with e = x_next - mean(v_old), d = beta * (the mean's shift from
v_old to v_theta) and var the step's variance (var_eps left out),

    weighted = r E_pos + (1 - r) E_neg = (|e|^2 + |d|^2 - 2 y <d, e>) / var,      r = (1 + y) / 2
    ranking  = softplus(-2 y <d, e> / var) = ln 2 - y <d, e> / var + <d, e>^2 / (2 var^2) + ...

e is the step's noise, N(0, var I), so the mean of <d, e>^2 is var |d|^2. To second order in delta,
averaged over the step's noise, weighted = 2 x ranking + a constant: the penalty |d|^2 that the
weighted MSE shows openly, ranking has in its curvature. (Terms odd in delta: exactly 2 x, at any
delta.) Adam forgets the factor.
"""

import argparse
import contextlib
import copy
import functools
import importlib
import io
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
flow, sde, nft, common = map(importlib.import_module, (
    "01_flow_policy", "02_sde_sampler", "03_step_loss", "results.common"))
from envs import gap_world  # noqa: E402  (the lines above tell where)

# ------------------------------------------------------------------------------------------------
# Other rollouts, in the place of 03's `explore`


def explore_uncorrected(policy, num_steps, noise_level):
    """The same noise around the Euler step: wider, and it loses the ODE's marginals."""
    def act(obs):
        x_0, path = sde.sde_sample(policy, obs, num_steps, noise_level, corrected=False)
        return policy.denormalise(x_0), path._asdict()
    return act


def explore_ode(policy, num_steps, noise_level):
    """No noise on the way, so no step to learn from: x_t are fresh noisings of the x_0 that the ODE
    found, one at every t_k, with the velocity there (DiffusionNFT). So x[:, k + 1] is another
    noising, no successor of x[:, k]: for the endpoint only."""
    @torch.no_grad()
    def act(obs):
        x_0, ctx = flow.ode_sample(policy, obs, num_steps), policy.encode(obs)    # (B, H, A)
        times = sde.time_grid(num_steps)
        t = times[:-1, None, None]                                                # (K, 1, 1)
        # x_t = (1 - t) x_0 + t x_1,   an x_1 for each t_k
        x_1 = torch.randn(len(x_0), num_steps, *x_0.shape[1:])
        x_t = (1 - t) * x_0[:, None] + t * x_1                                    # (B, K, H, A)
        v = [policy.velocity(x_t[:, k], times[k].expand(len(x_0)), ctx) for k in range(num_steps)]
        path = {"x": torch.cat([x_t, x_0[:, None]], 1), "v": torch.stack(v, 1),
                "sigma": sde.noise_scale(times, noise_level).expand(len(x_0), num_steps)}
        return policy.denormalise(x_0), path
    return act


ROLLOUTS = {"sde": nft.explore, "uncorrected": explore_uncorrected, "ode": explore_ode}

# ------------------------------------------------------------------------------------------------
# Other targets, in the place of 03's `step_error`, and other losses


def uncorrected_error(v, x_t, x_next, t_cur, t_next, sigma, var_eps=1e-4):
    """E(v) of an uncorrected step, judged by its own mean, the Euler step: (B, H)."""
    t_cur, t_next, sigma = (z[:, None, None] for z in (t_cur, t_next, sigma))     # (B, 1, 1)
    mean, std = sde.transition(x_t, v, t_cur, t_next, sigma, corrected=False)
    return ((x_next - mean).pow(2) / (std**2 + var_eps)).sum(-1)


def next_mean_error(v, x_t, x_0, t_cur, t_next, sigma, corrected=True):
    """E(v) against the mean that x_next would have if its endpoint x_0 were known: (B, H)."""
    t, after, scale = (z[:, None, None] for z in (t_cur, t_next, sigma))          # (B, 1, 1)
    # the velocity that leads from x_t to x_0:   x_0 = x_t - t v   <=>   v = (x_t - x_0) / t
    x_next, _ = sde.transition(x_t, (x_t - x_0) / t, t, after, scale, corrected)
    error = nft.step_error if corrected else uncorrected_error
    return error(v, x_t, x_next, t_cur, t_next, sigma)


def adaptive_error(v, x_t, x_0, t_cur, t_next, sigma):
    """The endpoint's E(v), not divided by the variance of a step but by its own mean distance over
    the chunk (a constant for the gradient), as DiffusionNFT does: (B, H)."""
    off = x_0 - (x_t - t_cur[:, None, None] * v)                                  # (B, H, A)
    return (off.pow(2) / off.detach().abs().mean((1, 2), keepdim=True).clamp(min=1e-5)).sum(-1)


ERRORS = {"next": nft.step_error, "next-mean": next_mean_error, "endpoint": nft.endpoint_error,
          "adaptive": adaptive_error}
UNCORRECTED = {**ERRORS, "next": uncorrected_error,
               "next-mean": functools.partial(next_mean_error, corrected=False)}


def weighted_loss(v_theta, v_old, x_t, target, t_cur, t_next, sigma, y, mask, *, error, beta=1.0,
                  max_drift=0.5, dpo_beta=None, kl_weight=1e-4):
    """Weighted MSE, the form of DiffusionNFT -> (scalar, info). It has no slope dpo_beta."""
    v_old, r = v_old.detach(), (1 + y[:, None]) / 2
    E_pos, E_neg = (error(v, x_t, target, t_cur, t_next, sigma)
                    for v in nft.mirror(v_theta, v_old, beta, max_drift))
    # L = r E_pos + (1 - r) E_neg,   r = (1 + y) / 2
    loss, pull = (nft.executed_mean(values, mask.to(x_t.dtype)) for values in (
        r * E_pos + (1 - r) * E_neg, (v_theta - v_old).pow(2).mean(-1)))
    return loss + kl_weight * pull, {"loss": loss.detach()}


def one_outcome_loss(sign, *, y, mask, **step):
    """The ranking loss of the successes (sign 1) or of the failures (-1) alone: mean over these."""
    return nft.step_nft_loss(y=y, mask=mask & (sign * y > 0)[:, None], **step)


LOSSES = {"ranking": nft.step_nft_loss, "weighted": weighted_loss,
          "positive": functools.partial(one_outcome_loss, 1),
          "negative": functools.partial(one_outcome_loss, -1)}


def all_steps(policy, batch):
    """What `recorded_steps` of 03 gives, for all K steps of each row: b * K, row after row."""
    (rows, K), ctx = batch["v"].shape[:2], policy.encode(batch)   # each row is encoded once
    each = [nft.recorded_steps(policy, {**batch, "k": torch.full((rows,), k)}, ctx)
            for k in range(K)]
    return {name: torch.stack([one[name] for one in each], 1).flatten(0, 1) for name in each[0]}


def update_all_steps(policy, optimizer, batch, *, target, loss, epochs=4, minibatch=512,
                     grad_clip=1.0, **loss_options):
    """`update` of 03 on all K steps of a row at once instead of one -> mean info."""
    infos = []
    for _ in range(epochs):
        for rows in torch.randperm(len(batch["y"])).split(minibatch):
            steps = all_steps(policy, flow.take(batch, rows))
            x_next, x_0 = steps.pop("x_next"), steps.pop("x_0")
            value, info = loss(**steps, target=x_next if target == "next" else x_0, **loss_options)
            info["grad_norm"] = nft.optimise(policy, optimizer, value, grad_clip)
            infos.append(info)
    return nft.mean_info(infos)


def centred(y, episode):
    """Labels of rows minus the mean label of the episodes, REINFORCE's baseline: (rows,)."""
    each = torch.zeros(int(episode.max()) + 1)
    each[episode] = y
    return y - each.mean()


# ------------------------------------------------------------------------------------------------
# The variants. Each is 03 with the settings of BASE but for what stands here.

BASE = {"target": "next", "rollout": "sde", "loss": "ranking", "all_steps": False, "centred": False,
        "group_size": 1, "noise_level": 0.2, "num_steps": 4, "beta": 1.0, "max_drift": 0.5,
        "dpo_beta": 1.0, "ema": [0.1, 0.995]}
SLOW = [0.9, 0.995]
VARIANTS = {
    "default": {},
    "target-next-mean": {"target": "next-mean"},
    "target-endpoint": {"target": "endpoint"},
    "target-endpoint-slow": {"target": "endpoint", "ema": SLOW},
    "rollout-uncorrected": {"rollout": "uncorrected", "target": "endpoint"},
    "rollout-ode": {"rollout": "ode", "target": "endpoint"},
    "rollout-uncorrected-mean": {"rollout": "uncorrected", "target": "next-mean"},
    "rollout-ode-mean": {"rollout": "ode", "target": "next-mean"},
    "rollout-uncorrected-next": {"rollout": "uncorrected"},
    "loss-weighted": {"loss": "weighted"},
    "loss-positive": {"loss": "positive"},
    "loss-negative": {"loss": "negative"},
    **{f"noise-{a}": {"noise_level": a} for a in (0.05, 0.1, 0.3, 0.5)},
    **{f"beta-{beta:g}": {"beta": beta} for beta in (0.1, 5.0)},
    "ema-0.1": {"ema": [0.1, 0.1]},
    "ema-0.9": {"ema": [0.9, 0.9]},
    "all-steps": {"all_steps": True},
    "labels-grouped": {"group_size": 8},
    "labels-centred": {"centred": True},
}
TEST_EPISODES = 1000

def settings(job):
    """A job -> all that `train` needs."""
    args = argparse.Namespace(**{**BASE, **VARIANTS[job.get("variant", "default")], **job})
    if isinstance(args.ema, str):
        args.ema = [float(part) for part in args.ema.split()]
    return args


def train(args, world=None):
    """03's `train_toy` with the variant's parts -> (SFT policy, trained policy). world: where it
    explores; by default starts anywhere."""
    sft, world = flow.toy_policy(args.seed), world or gap_world.GapWorld()
    torch.manual_seed(args.seed)
    policy, old = copy.deepcopy(sft), copy.deepcopy(sft)  # policy learns, old acts
    optimizer = torch.optim.Adam(policy.parameters(), lr=args.lr)
    act = ROLLOUTS[args.rollout](old, args.num_steps, args.noise_level)
    error = (UNCORRECTED if args.rollout == "uncorrected" else ERRORS)[args.target]
    update = update_all_steps if args.all_steps else nft.update
    for iteration in range(args.iterations):
        starts = gap_world.episode_seeds("train", args.episodes // args.group_size, args.seed,
                                         iteration)
        success, batch = world.play(act, np.repeat(starts, args.group_size))
        batch["k"] = torch.randint(args.num_steps, (len(batch["x"]),))
        y = nft.labels(success, batch["episode"], args.group_size)
        batch["y"] = centred(y, batch["episode"]) if args.centred else y
        update(policy, optimizer, batch, target="next" if args.target == "next" else "endpoint",
               loss=LOSSES[args.loss], error=error, beta=args.beta, max_drift=args.max_drift,
               dpo_beta=args.dpo_beta)
        nft.ema_update(old, policy, nft.ema_decay(iteration, args.iterations, *args.ema))
    return sft, policy


def score(policies, args):
    """Success of each policy without noise, from starts anywhere that nobody trained on."""
    test = gap_world.episode_seeds("test", TEST_EPISODES)
    return [flow.evaluate(policy, gap_world.GapWorld(), test, args.num_steps).mean()
            for policy in policies]


def row_of(args, command):
    """Trains and scores -> what a csv keeps of it, with the command that would make it again. It
    may be in a worker process, so it prints nothing."""
    start = time.time()
    with contextlib.redirect_stdout(io.StringIO()):
        sft, after = score(train(args), args)
    return {"sft": sft, "after": after, "test_episodes": TEST_EPISODES,
            "seconds": round(time.time() - start), **common.origin(command)}
