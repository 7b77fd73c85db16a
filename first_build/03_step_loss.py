"""03 - Finer steps: the ranking loss of pi-StepNFT, and the reinforcement learning iteration.

02 recorded noisy denoising steps x_t -> x_next, each a draw from a Gaussian whose mean is affine in
the velocity. So one step can be judged by itself. Mirror the trained velocity around the one that
acted, v_pos = v_old + beta delta and v_neg = v_old - beta delta with delta = v_theta - v_old, and
ask which of the two explains the observed x_next better:

    E(v) = |x_next - mean(v)|^2 / (std^2 + eps)
    L    = softplus(dpo_beta / 2 * y * (E_pos - E_neg)),        y = +1 success, -1 failure

A success says v_pos should win, a failure says v_neg should. No critic, no likelihood of the whole
path, one forward pass per optimisation step. At delta = 0 the loss is ln 2 and its gradient is
REINFORCE on that one step: label times the gradient of its log-probability. New since 02: the loss,
the EMA (exponential moving average) that keeps the acting policy `old` behind the trained one, and
the iteration: rollout, label, update, EMA. Left out of the published code: padded action dimensions
and an off-by-one in its success history that labels an episode which succeeds in its very last
chunk as a failure. Read as far as `train_toy`; workers, ranks and flags below it serve 04 and 05.

Run:     python 03_step_loss.py            (about 25 s on one CPU core, SFT included)
         python 03_step_loss.py --compare 3 --lr 3e-4   (the paper's ablations in miniature)
Prints:  success so far beside the progress bar, then RESULT before (sft) and after (stepnft).
Saves:   runs/03_step_loss/{log.csv, learning.png, policy.pt}
"""

import argparse
import copy
import csv
import datetime
import importlib
import math
import os
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

flow = importlib.import_module("first_build.01_flow_policy")
sde = importlib.import_module("first_build.02_sde_sampler")
# Borrowed from 01: FlowPolicy.encode(obs) -> ctx (B, C), .velocity(x_t, t, ctx) -> (B, H, A);
#   play(act, envs, seeds) -> (success, rows);  evaluate(policy, envs, seeds) -> success;
#   ode_sample -> x_0 (B, H, A);  take(obs, rows), to_torch(obs, device): observation dicts;
#   save_checkpoint(path, ...), atomic;  GapWorld, the toy world;  toy_policy, its SFT checkpoint;
#   FlowPolicy.denormalise(x_0): environment units;  .used: action dims that move in the demos.
# Borrowed from 02: time_grid(K) -> (K+1,);  noise_scale(times, a) -> sigma (K,);
#   transition(x_t, v, t_cur, t_next, sigma) -> (mean, std);
#   sde_sample -> (x_0, path), path.x (B, K+1, H, A), path.v (B, K, H, A).

# ------------------------------------------------------------------------------------------------
# The loss of one denoising step


def mirror(v_theta, v_old, beta, max_drift):
    """Two velocities at equal distance from v_old, one towards v_theta and one away: (B, H, A).

    delta is shortened per action, so that its norm over the action dims is at most max_drift.
    """
    delta = v_theta - v_old
    norm = torch.linalg.vector_norm(delta, dim=-1, keepdim=True)              # (B, H, 1)
    delta = delta * (max_drift / norm.clamp(min=max_drift))
    # v_pos = v_old + beta delta         v_neg = v_old - beta delta
    return v_old + beta * delta, v_old - beta * delta


def step_nft_loss(v_theta, v_old, x_t, x_next, t_cur, t_next, sigma, y, mask=None, *, beta=1.0,
                  max_drift=0.5, dpo_beta=1.0, kl_weight=1e-4, target="next", x_0=None,
                  form="ranking", var_eps=1e-4, corrected=True):
    """The pi-StepNFT loss of a batch of single denoising steps -> (scalar, info of 0-d tensors).

    v_theta, v_old, x_t, x_next, x_0 are (B, H, A); t_cur, t_next, sigma, y are (B,);
    mask (B, H) marks the actions that were executed. Only v_theta carries a gradient.
    info: rank_accuracy, margin: share of actions whose right branch has the lower E, and by how
    much; drift, clipped: length of v_theta - v_old, share above max_drift; loss: without the KL.
    target: next      the observed x_next (the method)
            next-mean the mean x_next would have if its endpoint x_0 were known (needs x_0)
            endpoint  x_0 itself, compared with x0_hat = x_t - t v (needs x_0; the choice of
                      DiffusionNFT, the method that this one refines)
    corrected: the mean of 02's SDE, or of its uncorrected variant.
    form:   ranking   softplus(dpo_beta / 2 * y * (E_pos - E_neg)) (the method)
            weighted  r E_pos + (1 - r) E_neg with r = (1 + y) / 2
            positive, negative: ranking on the successes or on the failures alone
    """
    assert v_theta.shape == v_old.shape == x_t.shape == x_next.shape, "expected four (B, H, A)"
    assert y.shape == t_cur.shape == x_t.shape[:1], f"y has shape {y.shape}, expected (B,)"
    if target != "next" and x_0 is None:
        raise ValueError(f'target="{target}" compares with the endpoint: pass x_0')
    v_old = v_old.detach()
    mask = torch.ones_like(x_t[..., 0]) if mask is None else mask.to(x_t.dtype)   # (B, H)
    t, t_next, sigma = (z[:, None, None] for z in (t_cur, t_next, sigma))         # (B, 1, 1)

    def mean_std(v):
        return sde.transition(x_t, v, t, t_next, sigma, corrected)

    def error(v):
        # E = sum over action dims of (x_next - mean(v))^2 / (std^2 + eps)
        if target == "endpoint":
            return (x_0 - (x_t - t * v)).pow(2).sum(-1)                           # (B, H)
        mean, std = mean_std(v)
        # (x_t - x_0) / t is the velocity that points at x_0
        observed = x_next if target == "next" else mean_std((x_t - x_0) / t)[0]
        return ((observed - mean).pow(2) / (std**2 + var_eps)).sum(-1)            # (B, H)

    v_pos, v_neg = mirror(v_theta, v_old, beta, max_drift)
    E_pos, E_neg = error(v_pos), error(v_neg)
    if form == "weighted":
        r = (1 + y[:, None]) / 2
        loss = r * E_pos + (1 - r) * E_neg
    else:
        # L = softplus(dpo_beta / 2 * y * (E_pos - E_neg))
        loss = F.softplus(dpo_beta / 2 * y[:, None] * (E_pos - E_neg))
        if form != "ranking":
            mask = mask * ((y > 0) if form == "positive" else (y < 0))[:, None]
    actions = mask.sum(-1)                                                        # (B,)
    # mean over a row's actions, then over the rows that have any
    row_loss = (loss * mask).sum(-1) / actions.clamp(min=1)
    loss = row_loss.sum() / (actions > 0).sum().clamp(min=1)
    drift = (v_theta - v_old).norm(dim=-1)
    with torch.no_grad():
        count = mask.sum().clamp(min=1)
        info = {
            "loss": loss.detach(),
            "rank_accuracy": ((y[:, None] * (E_neg - E_pos) > 0) * mask).sum() / count,
            "margin": ((E_neg - E_pos) * y[:, None] * mask).sum() / count,
            "drift": (drift * mask).sum() / count,
            "clipped": ((drift > max_drift) * mask).sum() / count,
        }
    # + kl_weight mean (v_theta - v_old)^2, over all actions: a weak pull to v_old
    return loss + kl_weight * (v_theta - v_old).pow(2).mean(), info


# ------------------------------------------------------------------------------------------------
# One RL iteration: rollout, labels, update, ema_update, and what they need. 04 and 05 share it.


@torch.no_grad()
def rollout(policy, envs, seeds, *, num_steps=4, noise_level=0.2, sampler="sde", transitions="one",
            desc=None):
    """Plays one noisy episode per seed with `policy` and keeps every denoising step.

    Returns (success (episodes,), batch): one row per executed chunk with obs, x (K+1, H, A),
    v (K, H, A), mask (H,), episode, and k: the denoising steps to train on, one drawn at random
    (the paper) or all K. sampler: sde, sde-uncorrected or ode. The ODE records no noise to learn
    from, so its x_t are fresh noisings of x_0 (DiffusionNFT's form; train with target "endpoint",
    or "next-mean").
    flow-sde: one random step is noisy, the others are the ODE's, and k is that step (PPO's form).
    """
    device, K = policy.action_centre.device, num_steps
    times = sde.time_grid(K).to(device)

    def act(obs):
        obs, more = flow.to_torch(obs, device), {}
        if sampler == "ode":
            x_0 = flow.ode_sample(policy, obs, K)
            ctx, noise = policy.encode(obs), torch.randn(len(x_0), K, *x_0.shape[1:], device=device)
            t = times[:K, None, None]
            x_t = (1 - t) * x_0[:, None] + t * noise
            v = torch.stack([policy.velocity(x_t[:, k], times[k].expand(len(x_0)), ctx)
                             for k in range(K)], 1)
            path = sde.SamplingPath(torch.cat([x_t, x_0[:, None]], 1), v)
        else:
            if sampler == "flow-sde":
                more["k"] = torch.randint(K, (envs.num_envs, 1), device=device)
            x_0, path = sde.sde_sample(policy, obs, K, noise_level, noisy=more.get("k"),
                                       corrected=sampler != "sde-uncorrected")
        return policy.denormalise(x_0).cpu().numpy(), {"x": path.x, "v": path.v, **more}

    success, batch = flow.play(act, envs, seeds, desc)
    if sampler != "flow-sde":
        count = len(batch["x"])
        batch["k"] = (torch.randint(K, (count, 1)) if transitions == "one"
                      else torch.arange(K).expand(count, K))
    return success, batch


def labels(success, episode, kind="binary", group_size=8):
    """Success per episode -> y per row. binary (paper): +1 success, -1 failure.

    centered: minus the batch's mean label, REINFORCE's baseline: the rarer outcome speaks louder.
    grouped:  minus the mean of the group_size episodes that share a start (GRPO's baseline): a
              start that always fails or always succeeds gets y = 0 and teaches nothing.
    """
    y = torch.as_tensor(success).float() * 2 - 1                   # (episodes,)
    if kind == "centered":
        y = y - gather(y).mean()  # over all processes of torchrun, if there are any
    if kind == "grouped":
        groups = y.view(-1, group_size)
        y = (groups - groups.mean(1, keepdim=True)).flatten()
    return y[episode]


def start_seeds(first, episodes, kind="binary", group_size=8):
    """The seeds of one iteration: all different, or for grouped labels each group_size times."""
    if kind != "grouped":
        return np.arange(first, first + episodes)
    if episodes % group_size:
        raise ValueError(f"--episodes {episodes} is no multiple of the group size {group_size}")
    return np.repeat(np.arange(first, first + episodes // group_size), group_size)


def recorded_steps(policy, batch, rows, noise_level):
    """Denoising steps of a batch's rows, with the velocity the policy has there now.

    One forward pass: encode and velocity, once each. Returns (ctx (b, C), the tensors that
    `step_nft_loss` takes by name); b rows give b * per_row entries.
    """
    device, K = policy.action_centre.device, batch["v"].shape[1]
    times = sde.time_grid(K)
    sigmas = sde.noise_scale(times, noise_level)
    k = batch["k"][rows].cpu()                                      # (b, 1) or (b, K)
    per_row = k.shape[1]

    def each(z):                                                 # (b, ...) -> (b * per_row, ...)
        return z[rows].repeat_interleave(per_row, 0).to(device)

    def at(z, k):                                                   # the k-th entries, flattened
        return z[rows[:, None], k].flatten(0, 1).to(device)

    x_t, x_next, v_old = at(batch["x"], k), at(batch["x"], k + 1), at(batch["v"], k)
    t_cur, t_next, sigma = (z.flatten().to(device) for z in (times[k], times[k + 1], sigmas[k]))
    ctx = policy.encode(flow.to_torch(flow.take(batch["obs"], rows), device))
    v_theta = policy.velocity(x_t, t_cur, ctx.repeat_interleave(per_row, 0))
    if hasattr(policy, "used"):  # noise in the other dims changes nothing: no credit for it
        v_theta = torch.where(policy.used, v_theta, v_old)
    return ctx, dict(v_theta=v_theta, v_old=v_old, x_t=x_t, x_next=x_next, t_cur=t_cur,
                     t_next=t_next, sigma=sigma, y=each(batch["y"]), mask=each(batch["mask"]),
                     x_0=each(batch["x"][:, -1]))


def update(policy, optimizer, batch, *, noise_level=0.2, epochs=4, minibatch=1024, grad_clip=1.0,
           **loss_options):
    """Minibatch steps of the ranking loss over a labelled batch -> mean info of all steps."""
    infos = []
    order = [part for _ in range(epochs) for part in minibatches(len(batch["y"]), minibatch)]
    # weight: 1, or under torchrun this rank's part of the minibatch (see `minibatches`)
    for rows, weight in order:
        _, steps = recorded_steps(policy, batch, rows, noise_level)
        loss, info = step_nft_loss(**steps, **loss_options)
        infos.append(optimise(policy, optimizer, loss, info, weight, grad_clip))
    return mean_info(infos)


def optimise(policy, optimizer, loss, info, weight, grad_clip):
    """One optimisation step, under torchrun on all ranks' rows -> info with the gradient's norm."""
    optimizer.zero_grad()
    (loss * weight).backward()
    add_up([p.grad for p in policy.parameters()])
    info = {name: value.detach() * weight for name, value in info.items()}
    add_up(info.values())
    info["grad_norm"] = torch.nn.utils.clip_grad_norm_(policy.parameters(), grad_clip)
    optimizer.step()
    return info


def mean_info(infos):
    """[{name: 0-d tensor}, ...] -> {name: mean over the steps}."""
    return {name: torch.stack([info[name] for info in infos]).mean().item() for name in infos[0]}


def ema_decay(step, total, start=0.1, end=0.995):
    """alpha at an iteration: a half cosine from start (old follows at once) to end (old rests)."""
    # alpha = end - (end - start) (1 + cos(pi step / total)) / 2
    return end - (end - start) * (1 + math.cos(math.pi * step / total)) / 2


@torch.no_grad()
def ema_update(old, new, decay):
    """old <- decay old + (1 - decay) new, for every parameter of the two policies."""
    for p_old, p_new in zip(old.parameters(), new.parameters()):
        p_old.lerp_(p_new, 1 - decay)


# ------------------------------------------------------------------------------------------------
# The method on the toy world


def train_toy(args, log=None, quiet=None):
    """SFT -> pi-StepNFT on the toy world -> (SFT policy, trained policy, success of both)."""
    sft = flow.toy_policy(args.seed)
    torch.manual_seed(args.seed)
    policy, old = copy.deepcopy(sft), copy.deepcopy(sft)  # policy learns, old acts
    optimizer = torch.optim.Adam(policy.parameters(), lr=args.lr)
    acting, learning = method(args)
    envs, test = flow.GapWorld(args.episodes), flow.GapWorld(1000)
    test_seeds = range(flow.EVAL_SEED, flow.EVAL_SEED + 1000)  # training seeds start at 2 EVAL_SEED
    before = rate = flow.evaluate(sft, test, test_seeds, args.num_steps).mean()
    bar = tqdm(range(args.iterations), desc="pi-StepNFT", disable=quiet)
    for iteration in bar:
        first = (2 + args.seed) * flow.EVAL_SEED + iteration * args.episodes
        seeds = start_seeds(first, args.episodes, args.labels)
        success, batch = rollout(old, envs, seeds, **acting)
        batch["y"] = labels(success, batch["episode"], args.labels)
        info = update(policy, optimizer, batch, epochs=4, minibatch=512, **learning)
        alpha = ema_decay(iteration, args.iterations, *args.ema)
        ema_update(old, policy, alpha)
        evaluating = (iteration + 1) % 10 == 0 or iteration + 1 == args.iterations
        if evaluating:
            rate = flow.evaluate(policy, test, test_seeds, args.num_steps).mean()
            bar.set_postfix(sft=f"{before:.3f}", now=f"{rate:.3f}")
        if log:
            log_row(log, {"iteration": iteration, "episodes": (iteration + 1) * args.episodes,
                          "train_sde": success.mean(), "eval_ode": rate if evaluating else "",
                          **info, "alpha": alpha})
    return sft, policy, before, rate


# ------------------------------------------------------------------------------------------------
# Simulators in worker processes, for 04 and 05


class ChunkEnv(gym.Env):
    """One simulator as a gymnasium Env whose action is a chunk (H, A), observed once at its end.

    make_sim() -> sim with reset(seed), advance(action) -> success, observe() -> obs dict. It is
    called at the first reset, so that only worker processes ever load a simulator. Each action is
    held for action_repeat control steps; max_steps counts control steps.
    """

    def __init__(self, make_sim, observation_space, action_dim, max_steps, horizon,
                 action_repeat=1):
        self.make_sim, self.sim = make_sim, None
        self.max_steps, self.action_repeat = max_steps, action_repeat
        self.observation_space = observation_space
        self.action_space = gym.spaces.Box(-1, 1, (horizon, action_dim))
        self.steps, self.over = 0, True
        self.obs = observation_space.sample()  # shown while there is no episode to play

    def reset(self, *, seed=None, options=None):
        if seed is None:  # no episode to play yet
            return self.obs, {}
        if self.sim is None:
            torch.set_num_threads(1)
            self.sim = self.make_sim()
        self.sim.reset(seed)
        self.steps, self.over, self.obs = 0, False, self.sim.observe()
        return self.obs, {}

    def step(self, chunk):
        """Stops inside the chunk at success or at the time limit; does nothing once it is over."""
        taken, success = 0, False  # taken: control steps of this chunk
        for action in np.repeat(chunk, self.action_repeat, axis=0):
            if self.over:
                break
            success = bool(self.sim.advance(action))
            taken += 1
            self.steps += 1
            self.over = success or self.steps >= self.max_steps
        if taken:
            self.obs = self.sim.observe()
        info = {"executed": math.ceil(taken / self.action_repeat), "success": success}
        return self.obs, float(success), success, self.over and not success, info


def worker_envs(make_env, num_envs):
    """num_envs simulators in a process each: a gymnasium VectorEnv for `play`."""
    # gymnasium 1.4 reads texts from its shared memory once, before any was written: go without
    envs = gym.vector.AsyncVectorEnv([make_env] * num_envs, context="spawn", shared_memory=False,
                                     autoreset_mode=gym.vector.AutoresetMode.DISABLED)
    envs.reset()  # every worker has something to show
    return envs


def follow(obs):
    """The scripted expert's action, which the observation holds, as a chunk of one."""
    return obs["action"][:, None].numpy(), {}


def expert_demos(args, envs, seeds, action_repeat=1):
    """Plays the expert and keeps the successes -> (obs of N rows, chunks (N, H, A))."""
    success, rows = flow.play(follow, envs, seeds, "demos")
    envs.close()
    if not success.any():
        raise SystemExit(f"--demo-noise {args.demo_noise}, --max-steps {args.max_steps}: no demo "
                         f"succeeded; use less noise or more steps")
    kept = [torch.where(rows["episode"] == e)[0] for e in np.flatnonzero(success)]
    actions = rows["obs"].pop("action")
    chunks = torch.cat([flow.sliding_chunks(actions[k], args.horizon, action_repeat) for k in kept])
    print(f"{len(kept)} of {len(seeds)} demos succeeded: {len(chunks)} chunks of {args.horizon} "
          f"actions", flush=True)
    return flow.take(rows["obs"], torch.cat(kept)), chunks


# ------------------------------------------------------------------------------------------------
# Data parallel: `torchrun --nproc-per-node=N` starts N ranks. Each plays its share of the episodes;
# a minibatch is drawn from the rows of all, and gradients add up to those of the joined batch.


def join_ranks(device):
    """Under torchrun meets the other ranks; only rank 0 prints. -> the device as torch names it."""
    if "RANK" in os.environ:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
                                timeout=datetime.timedelta(days=1))  # SFT runs on rank 0 alone
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        if dist.get_rank():
            sys.stdout = open(os.devnull, "w")
    return torch.device(device)


def rank_of():
    """-> (rank, number of ranks); (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def share(values):
    """The part of a list that belongs to this rank."""
    rank, ranks = rank_of()
    return np.array_split(np.asarray(values), ranks)[rank]


def gather(values):
    """Arrays or tensors of all ranks, one after the other: undoes `share`."""
    parts = [values]
    if dist.is_initialized():
        parts = [None] * rank_of()[1]
        dist.all_gather_object(parts, values)
    return (torch.cat if torch.is_tensor(values) else np.concatenate)(parts)


def add_up(tensors):
    """Sums each tensor over the ranks, in place."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)


def evaluate(policy, envs, seeds, num_steps, desc):
    """`evaluate` of 01, each rank on its share of the episodes."""
    return gather(flow.evaluate(policy, envs, share(seeds), num_steps, desc))


def minibatches(count, size):
    """[(this rank's rows, their weight)]: all ranks' rows in one random order, cut into parts.

    count: this rank's number of rows; size: rows of a part, all ranks together.
    """
    rank, _ = rank_of()
    counts = gather(torch.tensor([count]))
    order, first = torch.randperm(int(counts.sum())), int(counts[:rank].sum())
    if dist.is_initialized():
        dist.broadcast(order, 0)
    parts = []
    for whole in order.split(size):
        own = whole[(whole >= first) & (whole < first + count)] - first
        # a rank without a row in this minibatch still takes part, with weight 0
        parts.append((own if len(own) else torch.tensor([0]), len(own) / len(whole)))
    return parts


# ------------------------------------------------------------------------------------------------
# Flags and logs that 04 and 05 use as well


def add_method_flags(parser, **defaults):
    """One flag per choice of the method: the paper's values unless a script says otherwise."""
    group = parser.add_argument_group("method (each flag an ablation of the paper; --labels and "
                                      "--transitions offer more than it)")
    add = group.add_argument
    add("--rollout", default="sde", choices=["sde", "sde-uncorrected", "ode"],
        help="sampler that acts in training; ode needs --target endpoint or next-mean")
    add("--target", default="next", choices=["next", "next-mean", "endpoint"],
        help="what the two branches must explain: the observed next step, its mean, or x_0")
    add("--loss", default="ranking", choices=["ranking", "weighted", "positive", "negative"],
        help="weighted: weighted MSE; positive/negative: ranking on one outcome alone")
    add("--labels", default="binary", choices=["binary", "centered", "grouped"],
        help="y = +-1; minus the batch's mean; minus the mean of 8 episodes from the same start")
    add("--transitions", default="one", choices=["one", "all"],
        help="train on one random denoising step per chunk, or on all K")
    add("--noise-level", type=float, default=0.2, help="a, width of the exploration")
    add("--num-steps", type=int, default=4, help="K, denoising steps")
    add("--beta", type=float, default=1.0, help="distance of the branches, in units of delta")
    add("--max-drift", type=float, default=0.5, help="longest delta, per action, in flow units")
    add("--dpo-beta", type=float, default=1.0, help="slope of the ranking loss")
    add("--ema", type=float, nargs=2, default=[0.1, 0.995], metavar=("START", "END"),
        help="how slowly the acting policy follows the trained one, first and last iteration")
    parser.set_defaults(**defaults)


def check_method(args):
    """The combinations that cannot work, told in one line before anything is trained."""
    if args.rollout == "ode" and args.target == "next":
        raise SystemExit("--rollout ode records no noise to learn from: add --target endpoint")
    if args.noise_level <= 0 and args.target != "endpoint":
        raise SystemExit("--noise-level 0 leaves no step to explain: raise it, or use "
                         "--rollout ode --target endpoint")
    whole = 8 * int(os.environ.get("WORLD_SIZE", 1))
    if args.labels == "grouped" and args.episodes % whole:
        raise SystemExit(f"--episodes {args.episodes} is no multiple of {whole}: 8 episodes per "
                         "start for --labels grouped, on each rank of torchrun")


def method(args):
    """The flags as keyword arguments: (of rollout, of update)."""
    acting = dict(num_steps=args.num_steps, noise_level=args.noise_level, sampler=args.rollout,
                  transitions=args.transitions)
    learning = dict(noise_level=args.noise_level, beta=args.beta, max_drift=args.max_drift,
                    dpo_beta=args.dpo_beta, target=args.target, form=args.loss,
                    corrected=args.rollout != "sde-uncorrected")
    return acting, learning


def add_run_flags(parser, **defaults):
    """Demos, training, evaluation and logs of 04 and 05."""
    add = parser.add_argument
    add("--num-demos", type=int, default=20, help="demonstrations per task for SFT")
    add("--demo-noise", type=float, default=0.1, help="noise on executed demo actions")
    add("--sft-steps", type=int, default=1000, help="optimisation steps of flow matching")
    add("--iterations", type=int, default=20, help="RL iterations; 0 trains and evaluates SFT only")
    add("--episodes", type=int, default=256, help="episodes per iteration, all tasks together")
    add("--max-steps", type=int, help="time limit of an episode, in control steps")
    add("--horizon", type=int, default=4, help="H, actions per chunk")
    add("--lr", type=float, default=3e-4, help="Adam's learning rate, falling linearly to 0")
    add("--epochs", type=int, default=3, help="passes over each batch")
    add("--minibatch", type=int, default=512, help="chunks per optimisation step")
    add("--eval-every", type=int, default=5, help="iterations between validations")
    add("--eval-episodes", type=int, default=200, help="episodes per validation")
    add("--test-episodes", type=int, default=200, help="episodes of the final test")
    add("--num-envs", type=int, default=len(os.sched_getaffinity(0)),
        help="simulators at a time, for each rank")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of the policy")
    add("--seed", type=int, default=0, help="seed of demos, SFT, rollouts and updates, 0 to 7")
    add("--out", help="folder of logs and checkpoints")
    add("--expert-only", action="store_true", help="test the scripted controller and stop")
    add("--video", type=int, default=0, metavar="N", help="film N test episodes as mp4")
    add("--resume", action="store_true", help="continue the run in --out")
    add("--eval-only", metavar="CHECKPOINT", help="test this policy and stop")
    parser.set_defaults(**defaults)


def check_run(args, wanted):
    """What a user can get wrong, told in one line before anything is simulated or written.

    wanted: what a loaded policy must have been built with, {config entry: (flag, value)}.
    """
    out, sft = Path(args.out), vars(args).get("sft")
    fresh = not (args.resume or args.eval_only or args.expert_only)
    if args.num_demos < 1 and fresh:
        raise SystemExit("--num-demos 0: SFT needs at least one demonstration")
    if args.num_demos > 1000 or not 0 <= args.seed <= 7:
        raise SystemExit("--num-demos goes to 1000 and --seed from 0 to 7: beyond, the episodes of "
                         "demos, validation, test and training would overlap")
    if min(args.sft_steps, args.num_envs, args.horizon) < 1:
        raise SystemExit("--sft-steps, --num-envs, --horizon: give at least 1")
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if min(args.episodes, args.eval_episodes, args.test_episodes or ranks) < ranks:
        raise SystemExit(f"--episodes, --eval-episodes, --test-episodes: give at least {ranks}, "
                         "one for each rank")
    if args.eval_only and not Path(args.eval_only).exists():
        raise SystemExit(f"--eval-only {args.eval_only}: no such file; train first")
    if sft and not Path(sft).exists():
        raise SystemExit(f"--sft {sft}: no such file; a run writes sft.pt into its --out")
    if args.resume and not (out / "last.pt").exists():
        raise SystemExit(f"--resume: {out}/last.pt is missing; start without --resume")
    if fresh and (out / "log.csv").exists():
        raise SystemExit(f"--out {out} holds a run: --resume continues it, another --out keeps it")
    for path in filter(None, [args.eval_only, args.resume and out / "last.pt", sft]):
        config = torch.load(path, map_location="cpu", weights_only=False)["config"]
        for name, (flag, value) in wanted.items():
            if config.get(name, value) != value:
                raise SystemExit(f"{path} was trained with {name} {config[name]}, this run has "
                                 f"{value}: use the {flag} it was trained with")


def save(path, policy, **more):
    """A checkpoint of a policy; `load_policy` of 01 reads it. Rank 0 writes."""
    if not rank_of()[0]:
        flow.save_checkpoint(path, config=policy.config, policy=policy.state_dict(), **more)


def save_run(path, policy, old, best, optimizer, state):
    """Everything a run needs to go on as if it had never stopped."""
    save(path, policy, old=old.state_dict(), best=best.state_dict(), state=state,
         optimizer=optimizer.state_dict())


def load_run(path, policy, old, best, optimizer, device):
    """Undoes `save_run` -> state."""
    checkpoint = torch.load(path, map_location=device, weights_only=False)
    for name, part in dict(policy=policy, old=old, best=best, optimizer=optimizer).items():
        part.load_state_dict(checkpoint[name])
    return checkpoint["state"]


def seed_iteration(seed, iteration):
    """A random stream of its own for each iteration and rank, so that a resumed run repeats it."""
    torch.manual_seed((seed * 100_000 + iteration) * 1000 + rank_of()[0])


def log_row(path, row):
    """Appends a dict to a csv, with a header when the file is new. Rank 0 writes."""
    if rank_of()[0]:
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()})


def read_rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def read_log(path):
    """The csv as {column: array}; empty cells (iterations without evaluation) become nan."""
    rows = read_rows(path)
    return {k: np.array([float(r[k] or "nan") for r in rows]) for k in rows[0]}


def draw_learning(log, success_ax, loss_ax):
    """Success and loss against episodes played."""
    seen, played = ~np.isnan(log["eval_ode"]), log["episodes"] / 1000
    success_ax.plot(played, log["train_sde"], color="0.6", lw=1, label="old policy, SDE")
    success_ax.plot(played[seen], log["eval_ode"][seen], "o-", ms=3, color="#0072b2",
                    label="trained policy, ODE")
    success_ax.set(xlabel="training episodes, thousands", ylabel="success", ylim=(0, 1.02))
    success_ax.legend(frameon=False)
    loss_ax.plot(played, log["loss"], color="#d55e00", lw=1)
    loss_ax.set(xlabel="training episodes, thousands", ylabel="loss")
    if "margin" in log:  # not PPO's loss
        loss_ax.axhline(math.log(2), color="0.6", ls="--", label="ln 2: the branches tie")
        loss_ax.legend(frameon=False)


def draw_run(out):
    """log.csv -> learning.png. Rank 0 draws."""
    if not rank_of()[0]:
        fig, axes = flow.pyplot().subplots(1, 2, figsize=(10, 4), layout="constrained")
        draw_learning(read_log(out / "log.csv"), *axes)
        fig.savefig(out / "learning.png", dpi=120)


# ------------------------------------------------------------------------------------------------
# Every ablation on the toy world: --compare


# The paper's Figures 2-4 in miniature: figure, variant, flags, the paper's success at step 200
# (LIBERO-Object task 0, read off its plots; None: not in the paper). --target endpoint stands
# twice: 0.83 with the paper's slow old policy, 0.0 with its fast one. "same, mean" has the rollouts
# again, with a target that does not collapse here; "beyond" is not in the paper.
VARIANTS = [
    ("rollout", "SDE corrected", "--target endpoint", 0.83),
    ("rollout", "SDE uncorrected", "--target endpoint --rollout sde-uncorrected", 0.53),
    ("rollout", "ODE", "--target endpoint --rollout ode", 0.76),
    ("same, mean", "SDE corrected", "--target next-mean", None),
    ("same, mean", "SDE uncorrected", "--target next-mean --rollout sde-uncorrected", None),
    ("same, mean", "ODE", "--target next-mean --rollout ode", None),
    ("target", "next step", "", 0.945),
    ("target", "next step's mean", "--target next-mean", 0.85),
    ("target", "endpoint", "--target endpoint", 0.0),
    ("target", "endpoint, slow EMA", "--target endpoint --ema 0.9 0.995", 0.83),
    ("loss", "ranking", "", 0.945),
    ("loss", "weighted MSE", "--loss weighted", 0.91),
    ("loss", "positive only", "--loss positive", 0.90),
    ("loss", "negative only", "--loss negative", 0.81),
    ("noise level", "0.05", "--noise-level 0.05", 0.92),
    ("noise level", "0.1", "--noise-level 0.1", 0.90),
    ("noise level", "0.2", "", 0.945),
    ("noise level", "0.3", "--noise-level 0.3", 0.79),
    ("noise level", "0.5", "--noise-level 0.5", 0.80),
    ("beta", "0.1", "--beta 0.1", 0.985),
    ("beta", "1", "", 0.945),
    ("beta", "5", "--beta 5", 0.79),
    ("EMA", "0.1 to 0.995", "", None),
    ("EMA", "0.1 fixed", "--ema 0.1 0.1", None),
    ("EMA", "0.9 fixed", "--ema 0.9 0.9", None),
    ("beyond", "one step, binary", "", None),
    ("beyond", "all K steps", "--transitions all", None),
    ("beyond", "centered labels", "--labels centered", None),
    ("beyond", "grouped labels", "--labels grouped", None),
]


def one_run(job):
    """A worker of --compare: (flags, seed, size) -> a row of its csv."""
    flags, seed, size = job
    torch.set_num_threads(1)
    *_, sft, stepnft = train_toy(parse_args(f"--seed {seed} {size} {flags}".split()), quiet=True)
    return {"flags": flags, "seed": seed, "sft": sft, "stepnft": stepnft, "size": size}


def compare(args):
    """Runs every variant with every seed; rows of the same size in the csv are kept: it resumes."""
    path = Path(args.out) / "compare.csv"
    size = f"--iterations {args.iterations} --episodes {args.episodes} --lr {args.lr}"

    def finished():
        return [r for r in read_rows(path) if r.get("size") == size] if path.exists() else []

    done, jobs = {(r["flags"], r["seed"]) for r in finished()}, []
    for seed in map(str, range(args.seed, args.seed + args.compare)):
        flow.toy_policy(int(seed))                   # SFT once, before the workers need it
        for flags in dict.fromkeys(flags for _, _, flags, _ in VARIANTS):
            if (flags, seed) not in done:
                jobs.append((flags, seed, size))
    try:
        with torch.multiprocessing.get_context("spawn").Pool(len(os.sched_getaffinity(0))) as pool:
            for row in tqdm(pool.imap_unordered(one_run, jobs), total=len(jobs), desc="compare",
                            disable=None):
                log_row(path, row)
    except KeyboardInterrupt:
        print(f"stopped: the table is partial, the same command continues {path}")
    summary = summarise(finished())
    print(f"{'figure':<12} {'variant':<19} {'SFT':>6} {'after':>6} {'95 %':>6} {'seeds':>5} "
          f"{'paper':>6}")
    for row in summary:
        print("{figure:<12} {variant:<19} {sft:6.3f} {after:6.3f} {half:6.3f} {seeds:5d} "
              "{paper:>6}".format(**row))
    for number, figures in ((2, ("rollout", "same, mean")), (3, ("target", "loss")),
                            (4, ("noise level", "beta"))):
        rows = [r for r in summary if r["figure"] in figures]
        if rows:
            draw_bars(rows, Path(args.out) / f"compare_figure{number}.png")
    print(f"saved {path} and compare_figure2.png to compare_figure4.png beside it")
    print(f"RESULT variants={len(summary)} runs={len(finished())}")


def half_interval(values):
    """Half of the 95 % t-interval of a mean over seeds (up to ten)."""
    if len(values) < 2:
        return math.nan
    t = [12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26][min(len(values), 10) - 2]
    return t * np.std(values, ddof=1) / len(values) ** 0.5


def summarise(rows):
    """csv rows -> per variant the mean over seeds and the half-width of its 95 % t-interval."""
    summary = []
    for figure, variant, flags, paper in VARIANTS:
        runs = [r for r in rows if r["flags"] == flags]
        if runs:
            after = np.array([float(r["stepnft"]) for r in runs])
            summary.append({"figure": figure, "variant": variant, "after": after.mean(),
                            "half": half_interval(after), "seeds": len(after),
                            "sft": np.mean([float(r["sft"]) for r in runs]),
                            "paper": "-" if paper is None else paper})
    return summary


def draw_bars(rows, path):
    fig, ax = flow.pyplot().subplots(figsize=(1.3 * len(rows) + 2, 3.5), layout="constrained")
    x = np.arange(len(rows))
    ax.bar(x, [r["after"] for r in rows], yerr=[r["half"] for r in rows], color="#0072b2",
           capsize=3, width=0.6, label="this world, after RL (95 % over seeds)")
    ax.axhline(rows[0]["sft"], color="0.5", ls="--", label="this world, SFT")
    paper = [(i, r["paper"]) for i, r in enumerate(rows) if r["paper"] != "-"]
    ax.plot(*zip(*paper), "D", color="#d55e00", label="paper, LIBERO-Object task 0")
    ax.set_xticks(x, [f"{r['figure']}\n{r['variant']}" for r in rows], fontsize=7)
    ax.set(ylabel="success", ylim=(0, 1.05))
    ax.legend(fontsize=7, frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1))
    fig.savefig(path, dpi=120)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--seed", type=int, default=0, help="seed of SFT, rollouts and updates")
    add("--iterations", type=int, default=160, help="RL iterations")
    add("--episodes", type=int, default=512, help="episodes per iteration")
    add("--lr", type=float, default=1e-3, help="Adam's learning rate")
    add("--compare", type=int, default=0, metavar="SEEDS",
        help="run every ablation with this many seeds, e.g. 3")
    add("--out", default="runs/03_step_loss", help="folder of logs, figures and checkpoint")
    add_method_flags(parser)
    args = parser.parse_args(argv)
    check_method(args)
    if args.iterations < 1:
        raise SystemExit("--iterations 0 trains nothing: 01_flow_policy.py evaluates SFT alone")
    return args


def main():
    args, start = parse_args(), time.time()
    torch.set_num_threads(1)  # on nets this small, threads only wait for each other
    print(" ".join(f"{k}={v}" for k, v in vars(args).items()))
    if args.compare:
        return compare(args)
    out = Path(args.out)
    (out / "log.csv").unlink(missing_ok=True)
    sft, policy, before, after = train_toy(args, out / "log.csv")
    flow.save_checkpoint(out / "policy.pt", config=policy.config, policy=policy.state_dict())
    fig, axes = flow.pyplot().subplots(2, 2, figsize=(10, 9), layout="constrained")
    seeds = range(flow.EVAL_SEED, flow.EVAL_SEED + 40)
    flow.draw_rollouts(axes[0, 0], sft, seeds, "before (SFT)", args.num_steps)
    flow.draw_rollouts(axes[0, 1], policy, seeds, "after (pi-StepNFT)", args.num_steps)
    draw_learning(read_log(out / "log.csv"), *axes[1])
    fig.savefig(out / "learning.png", dpi=120)
    print(f"success on 1000 wide starts, ODE: SFT {before:.3f} -> trained policy {after:.3f}")
    print(f"saved {out}/log.csv, learning.png, policy.pt")
    print(f"RESULT sft={before:.3f} stepnft={after:.3f} "
          f"episodes={args.iterations * args.episodes} seconds={time.time() - start:.0f}")


if __name__ == "__main__":
    main()
