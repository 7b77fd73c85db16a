"""01 - A policy is a velocity field.

A flow policy draws Gaussian noise x_1 and carries it to an action chunk x_0 (the next H actions,
played without looking again) by a learned velocity:

    dx_t / dt = v_theta(x_t, t, observation),        from t = 1 (noise) down to t = 0 (action)

Flow matching trains v_theta on demonstrations: mix a demonstrated chunk x_0 with noise x_1 on a
straight line, x_t = (1 - t) x_0 + t x_1, and regress the line's direction, v = x_1 - x_0. Squared
error makes v_theta the mean direction of the lines through x_t. No likelihood is computed, and
policy gradients need one: 03 brings pi-StepNFT. (Time as in pi-0's code, not as in Lipman et al.)

The world: a point robot must pass a gap in a wall. Six demonstrations start near the middle of the
left edge, the test anywhere on it: the clone (SFT, supervised fine-tuning) is good where it has
seen data and poor elsewhere; 03 mends that. Left out: the large network for images and language.

Run:     python 01_flow_policy.py          (about 10 s on one CPU core)
Prints:  flow matching loss, then success from the demo starts (narrow) and from everywhere (wide).
Saves:   runs/01_flow_policy/{sft_*.pt, flow_policy.png}; 02 and 03 start from the checkpoint.
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

# Shapes: B batch, H actions per chunk, A action dims, K denoising steps, S state dims, N rows of a
# data set or episodes at once, T steps of a demo. "Flow units": normalised actions.
# ------------------------------------------------------------------------------------------------
# The policy: encode the observation once, then ask for a velocity at any (x_t, t)


class FlowPolicy(nn.Module):
    """Velocity field v_theta(x_t, t, obs) over chunks of H normalised actions.

    Any nn.Module with encode, velocity, denormalise, horizon and action_dim is a policy here (for
    `train_sft` also normalise, fit_normalisation). encode makes ctx, only velocity looks inside.
    """

    def __init__(self, horizon, action_dim, state_dim, width=128, depth=3):
        super().__init__()
        self.horizon, self.action_dim = horizon, action_dim
        for name, size in (("state", state_dim), ("action", action_dim)):  # part of the checkpoint
            self.register_buffer(f"{name}_centre", torch.zeros(size))
            self.register_buffer(f"{name}_scale", torch.ones(size))
        sizes = [horizon * action_dim + 8 + state_dim] + [width] * depth  # 8: the time embedding
        layers = [m for i, o in zip(sizes, sizes[1:]) for m in (nn.Linear(i, o), nn.SiLU())]
        self.head = nn.Sequential(*layers, nn.Linear(width, horizon * action_dim))

    def encode(self, obs):
        """obs {"state": (B, S)} -> ctx (B, S): all that the velocity needs to know of it."""
        state = (obs["state"] - self.state_centre) / self.state_scale
        return state.clamp(-5, 5)  # far outside the demos, do not extrapolate without limit

    def velocity(self, x_t, t, ctx):
        """x_t (B, H, A), t (B,) in [0, 1], ctx from `encode` -> velocity (B, H, A)."""
        expected = len(t), self.horizon, self.action_dim
        assert x_t.shape == expected, f"x_t has shape {tuple(x_t.shape)}, expected {expected}"
        # the time as sines and cosines of four frequencies
        angles = t[:, None] * math.pi * torch.tensor([0.5, 1.0, 2.0, 4.0], device=t.device)
        inputs = torch.cat([x_t.flatten(1), angles.sin(), angles.cos(), ctx], dim=-1)
        return self.head(inputs).view_as(x_t)

    def fit_normalisation(self, obs, chunks):
        """From demos, per dimension: obs["state"] (N, S) gets mean 0 and std 1, chunks (N, H, A)
        their 1 % and 99 % quantiles at -1 and +1. Floors avoid dividing by 0."""
        self.state_centre.copy_(obs["state"].mean(0))
        self.state_scale.copy_(obs["state"].std(0).clamp(min=1e-2))
        low, high = (torch.quantile(chunks.flatten(0, 1), q, dim=0) for q in (0.01, 0.99))
        self.action_centre.copy_((low + high) / 2)
        self.action_scale.copy_(((high - low) / 2).clamp(min=1e-2))

    def normalise(self, actions):
        """Environment units -> flow units, (..., A)."""
        return (actions - self.action_centre) / self.action_scale

    def denormalise(self, x_0):
        """Flow units -> environment units, (..., A)."""
        return x_0 * self.action_scale + self.action_centre


# ------------------------------------------------------------------------------------------------
# Flow matching, ODE sampling, few-shot SFT


def flow_matching_loss(policy, obs, x_0):
    """Mean squared error of the velocity at a random point of the line from x_0 (B, H, A), in flow
    units, to noise -> scalar. (Lipman et al. 2023; pi-StepNFT, section 3)"""
    x_1 = torch.randn_like(x_0)
    t = torch.rand(len(x_0), device=x_0.device)
    # x_t = (1 - t) x_0 + t x_1          v = x_1 - x_0
    x_t = (1 - t)[:, None, None] * x_0 + t[:, None, None] * x_1
    return (policy.velocity(x_t, t, policy.encode(obs)) - (x_1 - x_0)).pow(2).mean()


def noise_like_chunks(policy, obs):
    """x_1 (B, H, A): a chunk of standard normal noise for each row of the observation."""
    rows = next(iter(obs.values()))
    return torch.randn((len(rows), policy.horizon, policy.action_dim), device=rows.device)


@torch.no_grad()
def ode_path(policy, obs, num_steps, x_1=None):
    """K Euler steps from noise to an action chunk, all K+1 points: (B, K+1, H, A), flow units."""
    path = [noise_like_chunks(policy, obs) if x_1 is None else x_1]
    ctx, dt = policy.encode(obs), 1 / num_steps
    for k in range(num_steps):
        t = path[0].new_full(path[0].shape[:1], 1 - k * dt)
        # x_{t - dt} = x_t - dt v
        path.append(path[-1] - dt * policy.velocity(path[-1], t, ctx))
    return torch.stack(path, dim=1)


def ode_sample(policy, obs, num_steps, x_1=None):
    """The end of that path: x_0 (B, H, A), in flow units."""
    return ode_path(policy, obs, num_steps, x_1)[:, -1]


def take(tensors, rows):
    """Rows of every tensor in a dict."""
    return {name: values[rows] for name, values in tensors.items()}


def to_device(tensors, policy):
    """A dict of tensors -> the same on the device where the policy's parameters are."""
    device = next(policy.parameters()).device
    return {name: values.to(device) for name, values in tensors.items()}


def train_sft(policy, obs, chunks, steps, lr=1e-3, batch_size=256):
    """Behaviour cloning: obs of N rows, chunks (N, H, A) in environment units -> last loss."""
    policy.fit_normalisation(obs, chunks)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    for _ in tqdm(range(steps), desc="SFT", disable=None, leave=False):  # None: only in a terminal
        rows = torch.randint(len(chunks), (batch_size,))
        batch = to_device({**take(obs, rows), "chunks": chunks[rows]}, policy)
        loss = flow_matching_loss(policy, batch, policy.normalise(batch["chunks"]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
        losses.append(loss.item())
    return float(np.mean(losses[-max(1, steps // 10):]))  # of the last tenth


# ------------------------------------------------------------------------------------------------
# The toy world. A world is whatever offers play(act, seeds): 03's loop drives any of them.


class GapWorld:
    """Point robots, one per episode: each must pass the gap of a wall and reach a goal behind it.

    state (N, 3): position x, y and the gap's centre. Actions: velocities in [-1, 1]^2, H in a
    chunk. start_width: half-width of the start positions, 0.3 in the demos and 0.9 in the test.
    """

    gap, goal, goal_radius = 0.06, np.array([0.8, 0.0]), 0.08     # gap: half of its height
    speed, max_steps = 0.15, 24                                   # longest move, time limit

    def __init__(self, start_width=0.9):
        self.start_width = start_width

    def play(self, act, seeds):
        """Plays one episode per seed -> (success (episodes,) bool, rows).

        act(obs) -> (actions (N, H, A) in environment units, dict of tensors (N, ...) to record).
        rows is a dict of tensors with a row for each executed chunk: the entries of its obs,
        episode (index into seeds), mask (H,) of the actions that ran, and what act recorded.
        """
        obs, rows = self.reset(seeds), []
        while not self.over.all():
            playing = torch.from_numpy(~self.over)
            actions, record = act(obs)
            next_obs, executed = self.step(actions.numpy())
            mask = torch.arange(actions.shape[1]) < torch.from_numpy(executed)[:, None]
            row = {**record, **obs, "episode": torch.arange(len(mask)), "mask": mask}
            rows.append(take(row, playing))
            obs = next_obs
        return self.success, {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    def reset(self, seeds):
        """One episode per seed -> obs {"state": (N, 3)}."""
        y, gap_y = np.array([np.random.default_rng(seed).uniform(-1, 1, 2) for seed in seeds]).T
        self.position = np.column_stack([np.full(len(y), -0.8), y * self.start_width])
        self.gap_y, self.steps = gap_y * 0.3, np.zeros(len(y), int)
        self.over, self.success = np.zeros((2, len(y)), bool)
        return self.observe()

    def observe(self):
        state = np.column_stack([self.position, self.gap_y]).astype(np.float32)
        return {"state": torch.from_numpy(state)}

    def step(self, chunks):
        """chunks (N, H, 2) -> (obs, executed (N,): how many actions ran before the end)."""
        executed = np.zeros(len(chunks), int)
        for action in np.moveaxis(chunks, 1, 0):
            live = ~self.over
            old, move = self.position, self.speed * np.clip(action, -1, 1) * live[:, None]
            new = np.clip(old + move, -1, 1)
            # where the move meets the wall at x = 0, if it does
            crosses = (old[:, 0] < 0) != (new[:, 0] < 0)
            along = -old[:, 0] / np.where(crosses, new[:, 0] - old[:, 0], 1)
            y_wall = old[:, 1] + along * (new[:, 1] - old[:, 1])
            crashed = crosses & (np.abs(y_wall - self.gap_y) > self.gap)
            new[crashed, 0], new[crashed, 1] = 0, y_wall[crashed]
            self.position, self.steps, executed = new, self.steps + live, executed + live
            arrived = live & (np.linalg.norm(new - self.goal, axis=1) < self.goal_radius)
            self.success |= arrived
            self.over |= arrived | crashed | (self.steps >= self.max_steps)
        return self.observe(), executed


def episode_seeds(split, count, seed=0, iteration=0):
    """(count,) seeds of episodes, below 2^31. Their last two bits name the split, so that no start
    of a test was ever trained on; demos and training have the run's own `seed`."""
    number = ("demo", "validation", "test", "train").index(split)
    draws = np.random.SeedSequence([seed, number, iteration]).generate_state(count)
    return draws // 8 * 4 + number


def evaluate(policy, world, seeds, num_steps=4):
    """Success (episodes,) bool of ODE sampling, the sampler behind every result. Two evaluations
    share starts, and noise x_1 where an episode keeps its row: here, not with simulators."""
    def act(obs):
        x_0 = ode_sample(policy, to_device(obs, policy), num_steps)
        return policy.denormalise(x_0).cpu(), {}

    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(0)
        return world.play(act, seeds)[0]


def expert_action(state):
    """The scripted expert: to the gap's mouth, through it, to the goal. (N, 3) -> (N, 2)."""
    position, gap_y = state[:, :2], state[:, 2]
    mouth, behind = (np.column_stack([np.full_like(gap_y, x), gap_y]) for x in (-0.12, 0.12))
    off = np.abs(position[:, 1] - gap_y)[:, None] > 0.03
    before = (position[:, :1] < -0.13) | (position[:, :1] < 0) & off
    inside = (position[:, :1] < 0.1) & ~before
    target = np.where(before, mouth, np.where(inside, behind, GapWorld.goal))
    return np.clip((target - position) / GapWorld.speed, -1, 1).astype(np.float32)


def sliding_chunks(actions, horizon):
    """Actions of a demo (T, A) -> (T, H, A): the next H from every step, the last one repeated."""
    index = torch.arange(len(actions))[:, None] + torch.arange(horizon)
    return actions[index.clamp(max=len(actions) - 1)]


def toy_demos(num_demos, seed):
    """Demos of the expert from the narrow starts -> (obs {"state": (N, 3)}, chunks (N, 4, 2))."""
    def act(obs):
        action = torch.from_numpy(expert_action(obs["state"].numpy()))
        return action[:, None], {"action": action}

    _, rows = GapWorld(start_width=0.3).play(act, episode_seeds("demo", num_demos, seed))
    demos = [rows["episode"] == demo for demo in range(num_demos)]
    chunks = torch.cat([sliding_chunks(rows["action"][demo], 4) for demo in demos])
    return {"state": torch.cat([rows["state"][demo] for demo in demos])}, chunks


def toy_policy(seed=0, num_demos=6, steps=3000, folder="runs/01_flow_policy"):
    """The few-shot policy that 02 and 03 start from: loaded, or trained and saved when missing."""
    path = Path(folder) / f"sft_demos{num_demos}_steps{steps}_seed{seed}.pt"
    torch.manual_seed(seed)
    policy = FlowPolicy(horizon=4, action_dim=2, state_dim=3)
    if not path.exists():
        print(f"{path} is missing: training it")
        loss = train_sft(policy, *toy_demos(num_demos, seed), steps)
        print(f"flow matching loss {loss:.3f} (predicting zero velocity costs about 1.5)")
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(policy.state_dict(), path)
    policy.load_state_dict(torch.load(path, weights_only=True))
    return policy


class Parser(argparse.ArgumentParser):
    """argparse with defaults in --help, and errors of one line that name the flag."""
    def __init__(self, doc):
        super().__init__(description=doc.split("\n\n")[0], allow_abbrev=False,
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")

    def make_folder(self, flag, path):  # last of all checks: a wrong call leaves nothing behind
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self.error(f"{flag} {path}: this folder cannot be made ({error.strerror})")


def number(kind, low, high=math.inf):
    """A flag's type: a finite int or float from low to high."""
    def check(text):
        value = kind(text)
        if not low <= value <= high or value == math.inf:  # nan compares as false
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value
    check.__name__ = kind.__name__  # argparse says "invalid int value"
    return check


positive_int, natural, positive_float = number(int, 1), number(int, 0), number(float, 1e-9)


def pyplot():
    import matplotlib
    matplotlib.use("Agg")  # no display
    import matplotlib.pyplot
    return matplotlib.pyplot


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--seed", type=natural, default=0, help="seed of the demos and of the training")
    add("--num-demos", type=positive_int, default=6, help="demonstrations, all from narrow starts")
    add("--sft-steps", type=positive_int, default=3000, help="optimisation steps of flow matching")
    add("--num-steps", type=positive_int, default=4, help="K, Euler steps from noise to action")
    add("--episodes", type=positive_int, default=1000, help="episodes of each evaluation")
    add("--out", type=Path, default="runs/01_flow_policy", help="folder of policy and figure")
    args, start = parser.parse_args(), time.time()
    parser.make_folder("--out", args.out)
    torch.set_num_threads(1)  # on nets this small, threads only wait for each other
    policy = toy_policy(args.seed, args.num_demos, args.sft_steps, args.out)
    seeds = episode_seeds("test", args.episodes)
    narrow, wide = (evaluate(policy, GapWorld(width), seeds, args.num_steps).mean()
                    for width in (0.3, 0.9))
    print(f"success from narrow starts {narrow:.3f}, from wide ones {wide:.3f}")
    obs = {"state": torch.tensor([[-0.8, 0.5, -0.2]]).expand(200, 3)}
    path = policy.denormalise(ode_path(policy, obs, 32))[:, :, 0, 1]          # (200, 33)
    fig, ax = pyplot().subplots(layout="constrained")
    ax.plot(np.linspace(1, 0, 33), path.T, color="#0072b2", alpha=0.15, lw=1)
    ax.set(title="200 noise draws become one decision", xlabel="t: noise (1) to action (0)",
           ylabel="vertical velocity, first action", xlim=(1, 0))
    fig.savefig(args.out / "flow_policy.png", dpi=120)
    print(f"RESULT {narrow=:.3f} {wide=:.3f} episodes={args.episodes} "
          f"seconds={time.time() - start:.0f}")


if __name__ == "__main__":
    main()
