"""Bring your own world: a simulator of 10 lines, and the whole method on it in 30 more.

Anything that can reset to a seed, advance by one action and observe becomes a world by `ChunkEnv`;
a `gymnasium.Env` with the four habits of envs/workers.py may take its place. Copy this file and
exchange `Reach`, `make_env` and `expert` for yours.

Run:     python -m envs.my_world            (a minute or two on two CPU cores)
Prints:  success of the clone, then of the trained policy every fifth iteration, then RESULT.
"""

import copy
import importlib

import gymnasium as gym
import numpy as np
import torch

from envs.gap_world import episode_seeds
from envs.workers import ChunkEnv, Workers


class Reach:
    """Your simulator. This one: bring a point in the plane to the origin."""

    def reset(self, seed):
        """A seed is an episode: the same start, whatever was played before."""
        self.place = np.random.default_rng(seed).uniform(-1, 1, 2)

    def advance(self, action):
        """One action (A,) -> success."""
        self.place = self.place + 0.2 * np.clip(action, -1, 1)
        return bool(np.abs(self.place).max() < 0.1)

    def observe(self):
        """A dict of arrays."""
        return {"state": self.place.astype(np.float32)}


def make_env():
    """One simulator; each runs in a process of its own."""
    space = gym.spaces.Dict(state=gym.spaces.Box(-9, 9, (2,)))
    return ChunkEnv(Reach, space, action_dim=2, max_steps=12, horizon=4)


def expert(obs):
    """Your demonstrations: chunks (N, H, A), and what to record."""
    step = (-obs["state"] / 0.8).clamp(-1, 1)                                      # (N, 2)
    chunk = step[:, None].repeat(1, 4, 1)
    return chunk, {"chunk": chunk}


def main(num_envs=8, num_demos=3, sft_steps=500, iterations=30, episodes=256, group_size=8,
         lr=1e-3, noise_level=0.5):
    flow, nft = map(importlib.import_module, ("01_flow_policy", "03_step_loss"))
    world = Workers(make_env, num_envs)
    torch.manual_seed(0)
    # demonstrations, SFT
    _, demos = world.play(expert, episode_seeds("demo", num_demos))
    policy = flow.FlowPolicy(horizon=4, action_dim=2, state_dim=2)
    flow.train_sft(policy, {"state": demos["state"]}, demos["chunk"], sft_steps)
    test = episode_seeds("test", 200)
    print(f"SFT: success {flow.evaluate(policy, world, test).mean():.3f}")
    # RL: act, label, update, follow
    old = copy.deepcopy(policy)
    optimizer = torch.optim.Adam(policy.parameters(), lr=lr)
    for iteration in range(iterations):
        starts = episode_seeds("train", episodes // group_size, iteration=iteration)
        success, batch = world.play(nft.explore(old, num_steps=4, noise_level=noise_level),
                                    np.repeat(starts, group_size))
        batch["k"] = torch.randint(4, (len(batch["x"]),))
        batch["y"] = nft.labels(success, batch["episode"], group_size)
        nft.update(policy, optimizer, batch)
        nft.ema_update(old, policy, 0.1)
        if iteration % 5 == 4 or iteration + 1 == iterations:
            rate = flow.evaluate(policy, world, test).mean()
            print(f"iteration {iteration + 1}: success {rate:.3f}")
    world.close()
    print(f"RESULT success={rate:.3f} episodes={iterations * episodes}")


if __name__ == "__main__":
    main()
