"""01 - A policy is a velocity field.

A flow policy draws Gaussian noise x_1 and carries it to an action chunk x_0 (the next H actions,
played without looking again) by a learned velocity:

    dx_t / dt = v_theta(x_t, t, observation),        from t = 1 (noise) down to t = 0 (action)

Flow matching trains v_theta on demonstrations: mix a demonstrated chunk x_0 with noise x_1 on a
straight line, x_t = (1 - t) x_0 + t x_1, and regress the line's direction, v = x_1 - x_0. No
likelihood appears anywhere, and policy gradients need one: RL will ask for a new idea (03).

This file holds the policy network with its encoders, flow matching (SFT: supervised fine-tuning),
ODE sampling, the loop that plays episodes, and the toy world of 01-03: a point robot that must pass
a gap in a wall. Six demonstrations start near the middle of the left edge, the test anywhere on it,
so the cloned policy is good where it has seen data and poor elsewhere. RL will close that gap.
Left out of the published models: the pretrained vision-language backbone. It would offer `encode`
and `velocity` like FlowPolicy here (and `denormalise`, `horizon`, `action_dim`, `action_centre`).

Run:     python 01_flow_policy.py          (about 10 s on one CPU core)
Prints:  flow matching loss, then success from the demo starts (narrow) and from everywhere (wide).
Saves:   runs/01_flow_policy/{sft_*.pt, flow_policy.png}; 02 and 03 start from the checkpoint.
"""

import argparse
import math
import os
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from torch import nn
from tqdm import tqdm

EVAL_SEED = 1_000_000  # evaluation plays seeds 1000000, 1000001, ...; demos lie below, RL above

# Shapes in this repo: B batch, H actions per chunk, A action dims, K denoising steps, S state dims,
# C numbers of an encoded observation (ctx), N rows of a data set or simulators side by side,
# T steps of a demo. "Flow units" are normalised actions, what the flow sees; `normalise` converts.

# ------------------------------------------------------------------------------------------------
# The policy: encode the observation once, then ask for a velocity at any (x_t, t)


class FlowPolicy(nn.Module):
    """Velocity field v_theta(x_t, t, obs) over chunks of H normalised actions.

    01-03 use the state alone; images, sentences and slots are for 04 and 05: skip them at first.
    Observations are a dict with any of
        state        (B, S) float32       normalised here, per dimension
        rgb          (B, cameras, 3, height, width) uint8
        instruction  list of B sentences  read as bytes, so unseen words are no error
    `cameras` and `language` say which encoders to build, `backbone` names a torchvision ResNet for
    the images. The last 3 * `slots` numbers of the state are positions (m) of things that the
    instruction may name; it decides which are looked at. Actions are normalised per dimension with
    the statistics of the demonstrations, which are part of the checkpoint. `action_repeat` is for
    whoever plays the chunk: each action is held for that many time steps.
    """

    def __init__(self, horizon, action_dim, state_dim=0, cameras=0, language=False, width=128,
                 depth=3, backbone=None, slots=0, action_repeat=1):
        super().__init__()
        # what rebuilds this policy; part of the checkpoint
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        self.horizon, self.action_dim, self.action_repeat = horizon, action_dim, action_repeat
        self.state_dim, self.cameras = state_dim, cameras
        self.language, self.slots = language, slots
        for name, size in (("state", state_dim), ("action", action_dim)):
            self.register_buffer(f"{name}_centre", torch.zeros(size))
            self.register_buffer(f"{name}_scale", torch.ones(size))
        if cameras:  # one net, shared by the cameras
            self.eye = image_net(backbone)
        if language:  # bytes -> vectors, a convolution that sees five letters at a time, maximum
            self.letters = nn.Embedding(256, 32)
            self.words = nn.Conv1d(32, 64, 5, padding=2)
        if slots:  # four glances, each a softmax over the slots that the sentence decides
            self.glance = nn.Linear(64, 4 * slots)
        # three numbers a glance, two for each of 64 feature maps, 64 a sentence; 8 for the clock
        self.context_dim = context = (state_dim - 3 * slots + 12 * (slots > 0) + 128 * cameras
                                      + 64 * language)
        sizes = [horizon * action_dim + 8 + context] + [width] * depth
        layers = [m for i, o in zip(sizes, sizes[1:]) for m in (nn.Linear(i, o), nn.SiLU())]
        self.head = nn.Sequential(*layers, nn.Linear(width, horizon * action_dim))

    def encode(self, obs):
        """obs -> ctx (B, C), everything about the observation that the velocity needs."""
        parts = []
        if self.state_dim:
            state = (obs["state"] - self.state_centre) / self.state_scale           # (B, S)
            state = state[:, :self.state_dim - 3 * self.slots]  # slots are looked at below
            parts.append(state.clamp(-5, 5))  # a robot that bumps can be 100 stds away
        if self.cameras:
            images = obs["rgb"].flatten(0, 1).float() / 255 - 0.5               # (B*cameras, 3, ..)
            # half precision for the images; the head keeps 32 bits, RL compares close velocities
            with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
                maps = self.eye(images)                                 # (B*cameras, 64, h, w)
            parts.append(looks_at(maps.float()).view(-1, 128 * self.cameras))
        if self.language:
            text = self.read(obs["instruction"])                                # (B, 64)
            parts.append(text)
        if self.slots:
            weights = self.glance(text).view(-1, 4, self.slots).softmax(-1)
            places = obs["state"][:, -3 * self.slots:].view(-1, self.slots, 3)
            parts.append(10 * (weights @ places).flatten(1))         # (B, 12), decimetres: order 1
        return torch.cat(parts, dim=-1)

    def read(self, sentences):
        """Sentences -> (B, 64). Each different sentence of the batch is read once."""
        unique = sorted(set(sentences))
        text = [s.lower().encode()[:128].ljust(128) for s in unique]
        text = torch.tensor([list(s) for s in text], device=self.letters.weight.device)
        features = self.words(self.letters(text).transpose(1, 2)).amax(-1)
        return features[[unique.index(s) for s in sentences]]

    def velocity(self, x_t, t, ctx):
        """x_t (B, H, A), t (B,) in [0, 1], ctx (B, C) -> velocity (B, H, A)."""
        assert x_t.shape[1:] == (self.horizon, self.action_dim), f"x_t has shape {x_t.shape}"
        assert t.shape == x_t.shape[:1], f"t has shape {t.shape}, expected {x_t.shape[:1]}"
        # the time as sines and cosines of four frequencies
        angles = t[:, None] * math.pi * torch.tensor([0.5, 1.0, 2.0, 4.0], device=t.device)
        clock = torch.cat([angles.sin(), angles.cos()], dim=-1)                 # (B, 8)
        return self.head(torch.cat([x_t.flatten(1), clock, ctx], dim=-1)).view_as(x_t)

    def fit_normalisation(self, obs, chunks):
        """Statistics of the demos per dimension: obs["state"] (N, S), chunks (N, H, A).

        States get mean 0 and std 1. Actions get their 1 % and 99 % quantiles at -1 and +1, so that
        noise of std 0.2 in flow units (02) means a tenth of the range the demos used. Floors keep
        a dimension that never moves in the demos from being blown up.
        """
        if self.state_dim:
            self.state_centre.copy_(obs["state"].mean(0))
            self.state_scale.copy_(obs["state"].std(0).clamp(min=1e-2))
        low, high = (torch.quantile(chunks.flatten(0, 1), q, dim=0) for q in (0.01, 0.99))
        self.action_centre.copy_((low + high) / 2)
        self.action_scale.copy_(((high - low) / 2).clamp(min=1e-2))

    @property
    def used(self):
        """(A,) bool: action dims whose range in the demos is more than a tenth of [-1, 1].

        03 gives the other dims no credit.
        """
        return self.action_scale > 0.1

    def normalise(self, actions):
        """Environment units -> flow units, (..., A)."""
        return (actions - self.action_centre) / self.action_scale

    def denormalise(self, x_0):
        """Flow units -> environment units, (..., A)."""
        return x_0 * self.action_scale + self.action_centre


def image_net(backbone=None, weights=None):
    """Images (N, 3, h, w) -> 64 feature maps: a small net, or a torchvision ResNet.

    backbone: resnet18, resnet50, ... without its last stage; weights="DEFAULT": pretrained ones.
    """
    if backbone is None:
        return nn.Sequential(
            nn.Conv2d(3, 32, 7, stride=2), nn.SiLU(), nn.Conv2d(32, 32, 3, stride=2), nn.SiLU(),
            nn.Conv2d(32, 32, 3), nn.SiLU(), nn.Conv2d(32, 64, 3))
    import torchvision
    stages = list(torchvision.models.get_model(backbone, weights=weights).children())[:-3]
    maps = nn.Conv2d(stages[-1][0].downsample[0].out_channels, 64, 1)
    return nn.Sequential(*stages, maps).eval()  # batch norm: acting and training see the same


def looks_at(maps):
    """Feature maps (N, C, h, w) -> the point each looks at, x and y in [-1, 1]: (N, 2 C).

    A map becomes a probability over pixels, and its mean position the feature (spatial softmax,
    Levine et al. 2016): where things are, to a fraction of a pixel, and nothing else.
    """
    height, width = maps.shape[2:]
    chance = maps.flatten(2).softmax(-1).view_as(maps)
    x, y = (torch.linspace(-1, 1, size, device=maps.device) for size in (width, height))
    return torch.cat([chance.sum(2) @ x, chance.sum(3) @ y], dim=-1)


# ------------------------------------------------------------------------------------------------
# Flow matching, ODE sampling, few-shot SFT


def flow_matching_loss(policy, obs, x_0):
    """Mean squared error of the velocity at a random point of the line from x_0 to noise.

    x_0 (B, H, A) in flow units -> scalar. (Lipman et al. 2023; pi-StepNFT, section 3)
    """
    x_1 = torch.randn_like(x_0)
    t = torch.rand(len(x_0), device=x_0.device)
    # x_t = (1 - t) x_0 + t x_1          v = x_1 - x_0
    x_t = (1 - t)[:, None, None] * x_0 + t[:, None, None] * x_1
    return (policy.velocity(x_t, t, policy.encode(obs)) - (x_1 - x_0)).pow(2).mean()


@torch.no_grad()
def ode_path(policy, obs, num_steps, x_1=None):
    """K Euler steps from noise to an action chunk, all of them: (B, K+1, H, A), in flow units."""
    ctx, dt = policy.encode(obs), 1 / num_steps
    shape = (len(ctx), policy.horizon, policy.action_dim)
    path = [torch.randn(shape, device=ctx.device) if x_1 is None else x_1]
    for k in range(num_steps):
        t = torch.full((len(ctx),), 1 - k * dt, device=ctx.device)
        # x_{t - dt} = x_t - dt v
        path.append(path[-1] - dt * policy.velocity(path[-1], t, ctx))
    return torch.stack(path, dim=1)


def ode_sample(policy, obs, num_steps, x_1=None):
    """The end of that path: x_0 (B, H, A), in flow units."""
    return ode_path(policy, obs, num_steps, x_1)[:, -1]


def train_sft(policy, obs, chunks, steps, lr=1e-3, batch_size=256):
    """Supervised fine-tuning on demonstrations: obs dict of N rows, chunks (N, H, A) in env units.

    obs may hold anything that gives rows by index, images on disk for example. Returns the mean
    flow matching loss of the last tenth of the steps.
    """
    if len(chunks) == 0 or steps < 1:
        raise ValueError("nothing to train on: give --num-demos and --sft-steps at least 1")
    device = policy.action_centre.device
    policy.fit_normalisation(obs, chunks)
    x_0 = policy.normalise(chunks.to(device))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    for _ in tqdm(range(steps), desc="SFT", disable=None, leave=False):  # None: only in a terminal
        rows = torch.randint(len(x_0), (batch_size,))
        loss = flow_matching_loss(policy, to_torch(take(obs, rows), device), x_0[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
        losses.append(loss.detach())
    return torch.stack(losses[-max(1, steps // 10):]).mean().item()


def take(obs, rows):
    """Rows of an observation dict; instructions are a list, everything else a tensor."""
    return {k: [v[i] for i in rows.tolist()] if k == "instruction" else v[rows]
            for k, v in obs.items()}


def to_torch(obs, device="cpu"):
    """An observation dict of arrays or tensors -> of tensors on the device."""
    return {k: list(v) if k == "instruction" else torch.as_tensor(v, device=device)
            for k, v in obs.items()}


def save_checkpoint(path, **content):
    """Writes to a temporary file and renames it, so a crash never leaves half a checkpoint."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def load_policy(path, device="cpu"):
    """-> FlowPolicy from a file of `save_checkpoint(path, config=, policy=, ...)`."""
    checkpoint = torch.load(path, map_location=device, weights_only=False)
    policy = FlowPolicy(**checkpoint["config"]).to(device)
    policy.load_state_dict(checkpoint["policy"])
    return policy


# ------------------------------------------------------------------------------------------------
# Playing episodes. Every world here is a gymnasium VectorEnv whose action is a whole chunk (H, A);
# info["executed"] counts the actions of the chunk that ran before the episode ended, and
# info["success"] says how it ended.


class SimulatorDied(RuntimeError):
    """A worker process ended in the middle of its episode; args[0] are the seeds in play."""


def play(act, envs, seeds, desc=None):
    """Plays one episode per seed and returns (success (episodes,) bool, rows).

    act(obs) -> (actions (N, H, A) in environment units, dict of tensors (N, ...) to record).
    A slot (one of the N simulators) whose episode ends takes the next seed at once, so short
    episodes never wait for long ones. rows holds one entry per executed chunk: obs, episode (index
    into seeds), mask (H,) of executed actions, and what act recorded.
    """
    num_envs, seeds = envs.num_envs, list(seeds)
    success = np.zeros(len(seeds), dtype=bool)
    episode = np.full(num_envs, -1)          # which episode each slot plays; -1: none
    rows, started = [], 0
    bar = tqdm(total=len(seeds), desc=desc, disable=None if desc else True, leave=False)
    while True:
        idle = np.flatnonzero(episode < 0)[: len(seeds) - started]
        episode[idle] = np.arange(started, started + len(idle))
        started += len(idle)
        try:
            if len(idle):
                fresh = np.isin(np.arange(num_envs), idle)
                # gymnasium wants a seed for the slots it leaves alone, too
                slot_seeds = [int(seeds[e]) if e >= 0 else 0 for e in episode]
                obs, _ = envs.reset(seed=slot_seeds, options={"reset_mask": fresh})
            if (episode < 0).all():
                break
            obs = to_torch(obs)
            actions, record = act(obs)
            next_obs, _, terminated, truncated, info = envs.step(actions)
        except (EOFError, ConnectionError) as error:
            for process in envs.processes:
                process.kill()
            envs.closed = True  # there is nobody left to say goodbye to
            raise SimulatorDied([int(seeds[e]) for e in episode if e >= 0]) from error
        playing = torch.from_numpy(np.flatnonzero(episode >= 0))
        mask = torch.arange(actions.shape[1]) < torch.as_tensor(info["executed"])[:, None]
        row = {**record, "episode": torch.from_numpy(episode), "mask": mask}
        rows.append({**take(row, playing), "obs": take(obs, playing)})
        over = (terminated | truncated) & (episode >= 0)
        success[episode[over]] = info["success"][over]
        bar.update(int(over.sum()))
        episode[over] = -1
        obs = next_obs
    bar.close()
    merged = {k: torch.cat([r[k] for r in rows]) for k in rows[0] if k != "obs"}
    merged["obs"] = {k: [s for r in rows for s in r["obs"][k]] if k == "instruction"
                     else torch.cat([r["obs"][k] for r in rows]) for k in rows[0]["obs"]}
    return success, merged


def evaluate(policy, envs, seeds, num_steps=4, desc=None):
    """Success (episodes,) bool of ODE sampling: the deterministic sampler all results use.

    The start noise x_1 is drawn from a fixed stream, so two evaluations differ by policy alone.
    """
    device = policy.action_centre.device

    def act(obs):
        x_0 = ode_sample(policy, to_torch(obs, device), num_steps)
        return policy.denormalise(x_0).cpu().numpy(), {}

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return play(act, envs, seeds, desc)[0]


def wilson(success):
    """95 % Wilson interval of a success rate: (low, high)."""
    n, p, z = len(success), float(np.mean(success)), 1.96
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2)
    return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)


def report(name, success, what):
    """Prints a success rate with its interval -> the rate."""
    low, high = wilson(success)
    print(f"{name}: success {success.mean():.3f} [{low:.3f}, {high:.3f}] over {len(success)} "
          f"episodes, ODE, {what}", flush=True)
    return float(success.mean())


# ------------------------------------------------------------------------------------------------
# The toy world


class GapWorld(gym.vector.VectorEnv):
    """A point robot starts left of a wall, must pass a gap in it, and reach a goal on the right.

    state (3,): position x, y and the gap's centre. Actions: velocities in [-1, 1]^2, H in a chunk.
    `start_width` is the half-width of the start positions: 0.3 in the demos, 0.9 in the test.
    """

    gap, goal, goal_radius = 0.06, np.array([0.8, 0.0]), 0.08     # gap: half of its height
    speed, max_steps = 0.15, 24                                   # longest move, time limit
    metadata = {"autoreset_mode": gym.vector.AutoresetMode.DISABLED}

    def __init__(self, num_envs, start_width=0.9, horizon=4):
        self.num_envs, self.start_width, self.horizon = num_envs, start_width, horizon
        self.observation_space = gym.spaces.Dict({"state": gym.spaces.Box(-1, 1, (num_envs, 3))})
        self.action_space = gym.spaces.Box(-1, 1, (num_envs, horizon, 2))
        self.position, self.gap_y = np.zeros((num_envs, 2)), np.zeros(num_envs)
        self.steps, self.over = np.zeros(num_envs, int), np.ones(num_envs, bool)

    def observe(self):
        return {"state": np.column_stack([self.position, self.gap_y]).astype(np.float32)}

    def reset(self, *, seed, options=None):
        """Starts an episode per seed; options["reset_mask"] limits it to some slots."""
        fresh = (options or {}).get("reset_mask", np.ones(self.num_envs, bool))
        for i in np.flatnonzero(fresh):
            y, gap_y = np.random.default_rng(seed[i]).uniform(-1, 1, 2)
            self.position[i] = -0.8, y * self.start_width
            self.gap_y[i], self.steps[i], self.over[i] = gap_y * 0.3, 0, False
        return self.observe(), {}

    def step(self, chunks):
        """chunks (N, H, 2) -> gymnasium's five; a crash terminates without success."""
        success, terminated = np.zeros((2, self.num_envs), bool)
        executed = np.zeros(self.num_envs, int)
        for h in range(self.horizon):
            live = ~self.over
            move = self.speed * np.clip(chunks[:, h], -1, 1) * live[:, None]
            old, new = self.position, np.clip(self.position + move, -1, 1)
            crosses = (old[:, 0] < 0) != (new[:, 0] < 0)
            # the wall, as a fraction of the way
            along = -old[:, 0] / np.where(crosses, new[:, 0] - old[:, 0], 1)
            y_wall = old[:, 1] + along * (new[:, 1] - old[:, 1])
            crashed = crosses & (np.abs(y_wall - self.gap_y) > self.gap)
            new[crashed, 0], new[crashed, 1] = 0, y_wall[crashed]
            self.position, self.steps = new, self.steps + live
            executed += live
            arrived = np.linalg.norm(new - self.goal, axis=1) < self.goal_radius
            success |= live & arrived
            terminated |= live & (crashed | arrived)
            self.over = self.over | terminated | (self.steps >= self.max_steps)
        truncated = self.over & ~terminated & (executed > 0)
        info = {"success": success, "executed": executed}
        return self.observe(), success * 1.0, terminated, truncated, info


def expert_chunk(state, horizon):
    """The scripted expert: to the gap's mouth, through it, to the goal. (N, 3) -> (N, H, 2)."""
    position, gap_y, chunk = state[:, :2].copy(), state[:, 2], []
    for _ in range(horizon):
        mouth, behind = (np.column_stack([np.full_like(gap_y, x), gap_y]) for x in (-0.12, 0.12))
        off = np.abs(position[:, 1] - gap_y)[:, None] > 0.03
        before = (position[:, :1] < -0.13) | (position[:, :1] < 0) & off
        inside = (position[:, :1] < 0.1) & ~before
        target = np.where(before, mouth, np.where(inside, behind, GapWorld.goal))
        step = np.clip((target - position) / GapWorld.speed, -1, 1)
        chunk.append(step)
        position = position + GapWorld.speed * step
    return np.stack(chunk, axis=1).astype(np.float32)


def sliding_chunks(actions, horizon, action_repeat=1):
    """Actions of a demo (T, A) -> (T, H, A): the next H from every step, the last one repeated.

    With action_repeat R each of the H is the mean of R steps of the demo.
    """
    index = torch.arange(len(actions))[:, None] + torch.arange(horizon * action_repeat)
    chunks = actions[index.clamp(max=len(actions) - 1)]
    return chunks.unflatten(1, (horizon, action_repeat)).mean(2)


def toy_demos(num_demos, seed):
    """Demos of the expert from the narrow starts -> (obs {"state": (N, 3)}, chunks (N, 4, 2))."""
    envs = GapWorld(num_demos, start_width=0.3, horizon=1)

    def act(obs):
        actions = expert_chunk(obs["state"].numpy(), 1)
        return actions, {"action": torch.from_numpy(actions[:, 0])}

    _, rows = play(act, envs, range(seed * 1000, seed * 1000 + num_demos))
    by_demo = [rows["episode"] == demo for demo in range(num_demos)]
    chunks = torch.cat([sliding_chunks(rows["action"][demo], 4) for demo in by_demo])
    return {"state": torch.cat([rows["obs"]["state"][demo] for demo in by_demo])}, chunks


def toy_policy(seed=0, num_demos=6, steps=3000, folder="runs/01_flow_policy"):
    """The few-shot policy that 02 and 03 start from: loaded, or trained and saved when missing."""
    path = Path(folder) / f"sft_demos{num_demos}_steps{steps}_seed{seed}.pt"
    if path.exists():
        print(f"{path}: loaded")
        return load_policy(path)
    print(f"{path} is missing: training it")
    torch.manual_seed(seed)
    policy = FlowPolicy(horizon=4, action_dim=2, state_dim=3)
    loss = train_sft(policy, *toy_demos(num_demos, seed), steps)
    print(f"flow matching loss {loss:.3f} (predicting zero velocity costs about 1.5)")
    save_checkpoint(path, config=policy.config, policy=policy.state_dict())
    return policy


def draw_rollouts(ax, policy, seeds, title, num_steps=4):
    """One line per ODE episode from the wide starts: solid if it arrives, dotted if it fails."""
    envs = GapWorld(len(seeds))

    def act(obs):
        return policy.denormalise(ode_sample(policy, obs, num_steps)).numpy(), {}

    success, rows = play(act, envs, seeds)
    for e, ok in enumerate(success):
        trail = np.vstack([rows["obs"]["state"][rows["episode"] == e, :2], envs.position[e]])
        ax.plot(*trail.T, "-" if ok else ":", color="#0072b2" if ok else "#d55e00", lw=1)
        ax.plot(*trail[-1], "o" if ok else "x", color="#0072b2" if ok else "#d55e00", ms=5)
    ax.axvline(0, color="0.6", lw=1)
    ax.plot(*GapWorld.goal, "o", ms=14, color="#009e73", alpha=0.4)
    ax.set(title=f"{title}: {success.mean():.0%} arrive", xlim=(-1, 1), ylim=(-1, 1), xlabel="x",
           ylabel="y")


def pyplot():
    """matplotlib without a display."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    return pyplot


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--seed", type=int, default=0, help="seed of the demos and of the training")
    add("--num-demos", type=int, default=6, help="demonstrations, all from the narrow starts")
    add("--sft-steps", type=int, default=3000, help="optimisation steps of flow matching")
    add("--num-steps", type=int, default=4, help="K, Euler steps from noise to action")
    add("--episodes", type=int, default=1000, help="episodes per evaluation, on seeds 1000000 + i")
    add("--out", default="runs/01_flow_policy", help="folder of the checkpoint and the figure")
    args = parser.parse_args()
    if min(args.num_demos, args.sft_steps) < 1:
        raise SystemExit("--num-demos, --sft-steps: SFT needs at least one of each")
    print(" ".join(f"{k}={v}" for k, v in vars(args).items()))
    torch.set_num_threads(1)  # on nets this small, threads only wait for each other
    start = time.time()
    policy = toy_policy(args.seed, args.num_demos, args.sft_steps, args.out)
    rates, seeds = {}, range(EVAL_SEED, EVAL_SEED + args.episodes)
    for name, width in (("narrow", 0.3), ("wide", 0.9)):
        success = evaluate(policy, GapWorld(args.episodes, width), seeds, args.num_steps)
        rates[name] = report(f"{name} starts (y within {width})", success,
                             f"{args.num_steps} steps")
    fig, (left, right) = pyplot().subplots(1, 2, figsize=(10, 4.5), layout="constrained")
    obs = {"state": torch.tensor([[-0.8, 0.5, -0.2]]).expand(200, 3)}
    path = policy.denormalise(ode_path(policy, obs, 32))[:, :, 0, 1]          # (200, 33)
    left.plot(np.linspace(1, 0, 33), path.T, color="#0072b2", alpha=0.15, lw=1)
    left.set(title="200 noise draws become one decision", xlabel="t: noise (1) to action (0)",
             ylabel="vertical velocity, first action", xlim=(1, 0))
    draw_rollouts(right, policy, seeds[:40], "40 wide starts, SFT", args.num_steps)
    fig.savefig(Path(args.out) / "flow_policy.png", dpi=120)
    print(f"saved {args.out}/flow_policy.png")
    print(f"RESULT narrow={rates['narrow']:.3f} wide={rates['wide']:.3f} "
          f"episodes={args.episodes} seconds={time.time() - start:.0f}")


if __name__ == "__main__":
    main()
