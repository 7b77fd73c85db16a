"""01 - A policy is a velocity field.

A flow policy turns noise into an action chunk, the next H actions, played without looking again:
it draws Gaussian noise x_1 and follows a learned velocity until the chunk x_0 is left,

    dx_t / dt = v_theta(x_t, t, observation),        from t = 1 (noise) down to t = 0 (action).

Flow matching learns the velocity from demonstrations: mix a chunk with noise on a straight line and
regress the line's direction. No likelihood of an action is computed; a policy gradient needs one.

The world: a point robot, a wall with a gap. It sees x, y and the gap's height, and its action is a
velocity in [-1, 1]^2. Six demonstrations start near the middle of the left edge (|y| < 0.3), the
test anywhere on it (0.9). The clone (SFT, supervised fine-tuning) is good where they were.

Run:     python 01_flow_policy.py          (about 10 s on one CPU core)
Prints:  success from the starts of the demonstrations (narrow) and from everywhere (wide).
Saves:   runs/01_flow_policy/{sft_*.pt, flow_policy.png}; 02 and 03 start from this policy.
"""

import math
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from envs.gap_world import GapWorld, draw_episodes, episode_seeds, expert, expert_demos
from tools import files, flags

# Shapes: B batch, H actions a chunk, A action dims, K denoising steps, S state dims, N rows of data
# or episodes, T steps of a demo. "Flow units": normalised actions.
ONE_STATE = [-0.8, 0.1, 0.0]  # x, y, gap: an observation for figures, its actions within the limit


class FlowPolicy(nn.Module):
    """Velocity field v_theta(x_t, t, obs) over chunks of H normalised actions. Any nn.Module with
    encode, velocity, denormalise, horizon and action_dim is a policy here (for `train_sft` also
    normalise and fit_normalisation)."""

    def __init__(self, horizon, action_dim, state_dim, width=128, depth=3):
        super().__init__()
        self.horizon, self.action_dim = horizon, action_dim
        # units of the demonstrations; as buffers they are part of a checkpoint
        self.register_buffer("state_centre", torch.zeros(state_dim))
        self.register_buffer("state_scale", torch.ones(state_dim))
        self.register_buffer("action_centre", torch.zeros(action_dim))
        self.register_buffer("action_scale", torch.ones(action_dim))
        layers, size = [], horizon * action_dim + 8 + state_dim           # 8 numbers tell the time
        for _ in range(depth):
            layers += [nn.Linear(size, width), nn.SiLU()]
            size = width
        self.head = nn.Sequential(*layers, nn.Linear(size, horizon * action_dim))

    def encode(self, obs):
        """obs {"state": (B, S)} -> ctx (B, S), which only `velocity` looks into."""
        state = (obs["state"] - self.state_centre) / self.state_scale
        return state.clamp(-5, 5)  # far outside the demos, do not extrapolate without limit

    def velocity(self, x_t, t, ctx):
        """x_t (B, H, A), t (B,) in [0, 1], ctx from `encode` -> velocity (B, H, A)."""
        expected = len(t), self.horizon, self.action_dim
        assert x_t.shape == expected, f"x_t has shape {tuple(x_t.shape)}, expected {expected}"
        angles = t[:, None] * math.pi * torch.tensor([0.5, 1.0, 2.0, 4.0], device=t.device)
        inputs = torch.cat([x_t.flatten(1), angles.sin(), angles.cos(), ctx], dim=-1)
        return self.head(inputs).view_as(x_t)

    def fit_normalisation(self, obs, chunks):
        """From demos, per dimension: obs["state"] (N, S) gets mean 0 and std 1, chunks (N, H, A)
        their 1 % and 99 % quantiles at -1 and +1. Floors avoid dividing by 0."""
        self.state_centre.copy_(obs["state"].mean(0))
        self.state_scale.copy_(obs["state"].std(0).clamp(min=1e-2))
        actions = chunks.flatten(0, 1)                                             # (N * H, A)
        low, high = torch.quantile(actions, 0.01, dim=0), torch.quantile(actions, 0.99, dim=0)
        self.action_centre.copy_((low + high) / 2)
        self.action_scale.copy_(((high - low) / 2).clamp(min=1e-2))

    def normalise(self, actions):
        """Environment units -> flow units, (..., A)."""
        return (actions - self.action_centre) / self.action_scale

    def denormalise(self, x_0):
        """Flow units -> environment units, (..., A)."""
        return x_0 * self.action_scale + self.action_centre


def flow_matching_loss(policy, obs, x_0):
    """Mean squared error of the velocity at a random point of the line from x_0 (B, H, A), in flow
    units, to noise -> scalar. (Lipman et al. 2023, whose time runs the other way.)"""
    x_1 = torch.randn_like(x_0)                                                    # (B, H, A)
    t = torch.rand(len(x_0), 1, 1, device=x_0.device)                              # (B, 1, 1)
    x_t = (1 - t) * x_0 + t * x_1
    v = x_1 - x_0                                                                  # d x_t / dt
    error = policy.velocity(x_t, t[:, 0, 0], policy.encode(obs)) - v
    return error.pow(2).mean()  # many lines cross at x_t: the best answer is their mean direction


def sliding_chunks(actions, horizon):
    """Actions of a demo (T, A) -> (T, H, A): the next H from every step, the last one repeated."""
    index = torch.arange(len(actions))[:, None] + torch.arange(horizon)            # (T, H)
    return actions[index.clamp(max=len(actions) - 1)]


def take(tensors, rows):
    """Rows of every tensor in a dict."""
    return {name: values[rows] for name, values in tensors.items()}


def train_sft(policy, obs, chunks, steps, lr=1e-3, batch_size=256):
    """Behaviour cloning: obs of N rows, chunks (N, H, A) in environment units -> last loss."""
    policy.fit_normalisation(obs, chunks)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    for _ in tqdm(range(steps), desc="SFT", disable=None, leave=False):  # None: only in a terminal
        rows = torch.randint(len(chunks), (batch_size,))
        loss = flow_matching_loss(policy, take(obs, rows), policy.normalise(chunks[rows]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
        losses.append(loss.item())
    return float(np.mean(losses[-max(1, steps // 10):]))  # of the last tenth


def noise_like_chunks(policy, obs):
    """x_1 (B, H, A): a chunk of standard normal noise for each row of the observation."""
    rows = next(iter(obs.values()))
    return torch.randn((len(rows), policy.horizon, policy.action_dim), device=rows.device)


@torch.no_grad()
def ode_path(policy, obs, num_steps, x_1=None):
    """K Euler steps from noise to an action chunk, all K+1 points: (B, K+1, H, A), flow units."""
    x_t = noise_like_chunks(policy, obs) if x_1 is None else x_1                   # (B, H, A)
    path, ctx, dt = [x_t], policy.encode(obs), 1 / num_steps
    for k in range(num_steps):
        t = torch.full((len(x_t),), 1 - k * dt, device=x_t.device)                 # (B,)
        # x_{t - dt} = x_t - dt v
        x_t = x_t - dt * policy.velocity(x_t, t, ctx)
        path.append(x_t)
    return torch.stack(path, dim=1)


def ode_sample(policy, obs, num_steps, x_1=None):
    """The end of that path: x_0 (B, H, A), in flow units."""
    return ode_path(policy, obs, num_steps, x_1)[:, -1]


def ode_act(policy, num_steps):
    """An `act` for a world's `play`: chunks without noise on the way; {}: nothing to record."""
    return lambda obs: (policy.denormalise(ode_sample(policy, obs, num_steps)), {})


def evaluate(policy, world, seeds, num_steps=4):
    """Plays an episode for each seed, without noise on the way -> success (episodes,) bool. The
    draws of x_1 are the same in every call: policies differ by what they learned, not by luck."""
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(0)
        return world.play(ode_act(policy, num_steps), seeds)[0]


def toy_policy(seed=0, num_demos=6, steps=3000, folder="runs/01_flow_policy"):
    """The few-shot policy that 02 and 03 start from: loaded, or trained and saved when missing."""
    path = Path(folder) / f"sft_demos{num_demos}_steps{steps}_seed{seed}.pt"
    torch.manual_seed(seed)
    policy = FlowPolicy(horizon=4, action_dim=2, state_dim=3)
    if not path.exists():
        files.make_folder(folder)
        demos = expert_demos(num_demos, seed)
        states = torch.cat([states for states, _ in demos])                        # (N, 3)
        chunks = torch.cat([sliding_chunks(actions, 4) for _, actions in demos])   # (N, 4, 2)
        loss = train_sft(policy, {"state": states}, chunks, steps)
        print(f"{path} was missing: trained, with a flow matching loss of {loss:.3f}")
        files.save(policy.state_dict(), path)
    policy.load_state_dict(files.load(path))
    return policy


def figure(policy, args):
    """Ways of the demos and of the clone through the world; and one observation's chunks."""
    from matplotlib.figure import Figure
    fig = Figure(figsize=(16, 4), layout="constrained")
    axes = fig.subplots(1, 4)
    demos, clone = episode_seeds("demo", args.num_demos, args.seed), ode_act(policy, args.num_steps)
    draw_episodes(axes[0], GapWorld(0.3), expert, "the demonstrations", demos)
    draw_episodes(axes[1], GapWorld(0.3), clone, "the clone from narrow starts")
    draw_episodes(axes[2], GapWorld(0.9), clone, "the clone from wide starts")
    obs = {"state": torch.tensor([ONE_STATE]).expand(200, 3)}
    v_y = policy.denormalise(ode_path(policy, obs, 32))[:, :, 0, 1]                # (200, 33)
    axes[3].plot(np.linspace(1, 0, 33), v_y.T, color="#0072b2", alpha=0.15, lw=1)
    axes[3].set(title="200 noise draws become one decision", xlabel="t: noise (1) to action (0)",
                ylabel="vertical velocity, first action", xlim=(1, 0))
    fig.savefig(args.out / "flow_policy.png", dpi=120)


def main():
    parser = flags.Parser(__doc__)
    add = parser.add_argument
    add("--seed", type=flags.natural, default=0, help="seed of the demos and of the training")
    add("--num-demos", type=flags.positive_int, default=6, help="demonstrations, narrow starts")
    add("--sft-steps", type=flags.positive_int, default=3000, help="steps of flow matching")
    add("--num-steps", type=flags.positive_int, default=4, help="K, steps from noise to action")
    add("--episodes", type=flags.positive_int, default=1000, help="episodes of each evaluation")
    add("--out", type=Path, default="runs/01_flow_policy", help="folder of policy and figure")
    args, start = parser.parse_args(), time.time()
    parser.make_folder("--out", args.out)
    torch.set_num_threads(1)  # on nets this small, threads only wait for each other
    policy = toy_policy(args.seed, args.num_demos, args.sft_steps, args.out)
    seeds = episode_seeds("test", args.episodes)
    narrow = evaluate(policy, GapWorld(0.3), seeds, args.num_steps).mean()
    wide = evaluate(policy, GapWorld(0.9), seeds, args.num_steps).mean()
    figure(policy, args)
    print(f"RESULT {narrow=:.3f} {wide=:.3f} episodes={args.episodes} "
          f"seconds={time.time() - start:.0f}")


if __name__ == "__main__":
    flags.call(main)
