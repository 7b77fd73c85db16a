"""GapWorld, the toy world: a point robot must pass the gap of a wall and reach a goal behind it.

    GapWorld().play(act, seeds) -> (success (episodes,) bool, rows)

Nothing is learned here. A world is whatever offers `play`: the loop of 03 drives any of them. The
scripted expert, its few demonstrations and the seeds of episodes stand beside it.
"""

import numpy as np
import torch


class GapWorld:
    """Point robots, one per episode, all moved at once.

    state (N, 3): position x, y and the height of the gap's centre. Actions: velocities in
    [-1, 1]^2, H in a chunk. start_width: half-width of the starts, 0.3 in the demonstrations and
    0.9 in the test.
    """

    gap, goal, goal_radius = 0.06, np.array([0.8, 0.0]), 0.08     # gap: half of its height
    speed, max_steps = 0.15, 24                                   # longest move, time limit

    def __init__(self, start_width=0.9):
        self.start_width = start_width
        self.trail = []                     # of the last `play`: every position, T+1 of (N, 2)

    def play(self, act, seeds):
        """Plays one episode per seed -> (success (episodes,) bool, rows).

        act(obs) -> (actions (N, H, A) in environment units, dict of tensors (N, ...) to record).
        rows is a dict of tensors with a row for each executed chunk: the entries of its obs,
        episode (index into seeds), mask (H,) of the actions that ran, and what act recorded.
        """
        obs, rows = self.reset(seeds), []
        self.trail = [self.position]
        while not self.over.all():
            playing = torch.from_numpy(~self.over)
            actions, record = act(obs)
            next_obs, executed = self.step(actions.numpy())
            mask = torch.arange(actions.shape[1]) < torch.from_numpy(executed)[:, None]
            row = {**record, **obs, "episode": torch.arange(len(mask)), "mask": mask}
            rows.append({name: values[playing] for name, values in row.items()})
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
            self.trail.append(new)
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


def expert_action(state):
    """The scripted expert: to the gap's mouth, through it, to the goal. (N, 3) -> (N, 2)."""
    position, gap_y = state[:, :2], state[:, 2]
    mouth, behind = (np.column_stack([np.full_like(gap_y, x), gap_y]) for x in (-0.12, 0.12))
    off = np.abs(position[:, 1] - gap_y)[:, None] > 0.03
    before = (position[:, :1] < -0.13) | (position[:, :1] < 0) & off
    inside = (position[:, :1] < 0.1) & ~before
    target = np.where(before, mouth, np.where(inside, behind, GapWorld.goal))
    return np.clip((target - position) / GapWorld.speed, -1, 1).astype(np.float32)


def expert(obs):
    """The expert as an `act` for `play`: chunks of one action, which is recorded."""
    action = torch.from_numpy(expert_action(obs["state"].numpy()))
    return action[:, None], {"action": action}


def expert_demos(num_demos, seed):
    """Demonstrations from the narrow starts: [(states (T, 3), actions (T, 2)), ...], one a demo."""
    _, rows = GapWorld(start_width=0.3).play(expert, episode_seeds("demo", num_demos, seed))
    demos = []
    for demo in range(num_demos):
        own = rows["episode"] == demo
        demos.append((rows["state"][own], rows["action"][own]))
    return demos


def draw_episodes(ax, world, act, title, seeds=None):
    """Plays an episode for each seed and draws its way: blue and a dot if it arrives, else dotted
    orange and a cross. Marks on the wall show the gap. Without seeds: 30 test starts before walls
    whose gaps are nearly alike, so that one wall can be drawn."""
    if seeds is None:
        seeds = episode_seeds("test", 1000)
        gaps = world.reset(seeds)["state"][:, 2].numpy()
        seeds = seeds[np.argsort(np.abs(gaps - 0.15))[:30]]
    success, _ = world.play(act, seeds)
    ax.axvline(0, color="0.8", lw=3)
    ax.plot(*world.goal, "o", ms=14, color="#009e73", alpha=0.4)
    for e, ok in enumerate(success):
        color, line, end = ("#0072b2", "-", "o") if ok else ("#d55e00", ":", "x")
        trail = np.stack([positions[e] for positions in world.trail])             # (T+1, 2)
        ax.plot(*trail.T, line, color=color, lw=1)
        ax.plot(*trail[-1], end, color=color, ms=5)
        ax.plot([0, 0], [world.gap_y[e] - world.gap, world.gap_y[e] + world.gap], "_", color="0.2")
    ax.set(title=title, xlim=(-1, 1), ylim=(-1, 1), xticks=(-1, 0, 1), yticks=(-1, 0, 1),
           xlabel="x (m)", ylabel="y (m)", aspect="equal")
