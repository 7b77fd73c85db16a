"""What the speed is made of: python tests/benchmark.py [--num-envs 2] prints ratios, in about 2 min.

Rollouts on ManiSkill against a bare loop of env.step with random actions, on the same number of
processes; the time of one update beside that of its rollout; forward passes per optimisation step.
"""

import argparse
import functools
import importlib
import os
import sys
import time
import types
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
mani = importlib.import_module("05_train_maniskill")
flow, nft = mani.flow, mani.nft


class Bare(gym.Env):
    """A worker that runs the bare loop: one `step` is `count` plain calls of ManiSkill's env.step."""

    observation_space = gym.spaces.Box(-1, 1, (1,))
    action_space = gym.spaces.Box(-1, 1, (1,))

    def __init__(self, count, max_steps):
        self.count, self.max_steps, self.env = count, max_steps, None

    def reset(self, *, seed=None, options=None):
        if self.env is None:
            warnings.filterwarnings("ignore")
            torch.set_num_threads(1)
            import mani_skill.envs  # noqa: F401
            mani.physics_only()
            self.env = gym.make("PickCube-v1", num_envs=1, obs_mode="state", render_backend="none",
                                control_mode="pd_ee_delta_pos")
        self.env.reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        for t in range(self.count):
            if t % self.max_steps == 0:
                self.env.reset(seed=t)
            self.env.step(self.env.action_space.sample()[None])
        return np.zeros(1, np.float32), 0.0, False, False, {}


def bare_rate(num_envs, count, max_steps):
    """Control steps per second of the bare loop, all processes together."""
    envs = nft.worker_envs(functools.partial(Bare, count, max_steps), num_envs)
    envs.reset(seed=0)
    envs.step(np.zeros((num_envs, 1), np.float32))                 # warm up
    start = time.perf_counter()
    envs.step(np.zeros((num_envs, 1), np.float32))
    rate = num_envs * count / (time.perf_counter() - start)
    envs.close()
    return rate


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--num-envs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--episodes", type=int, default=128)
    args = parser.parse_args()
    torch.set_num_threads(1)
    bare = bare_rate(args.num_envs, 1000, 24)
    print(f"bare env.step loop, random actions: {bare:.0f} steps/s on {args.num_envs} processes")

    envs = mani.make_envs(types.SimpleNamespace(task="PickCube-v1", backend="physx_cpu", horizon=4,
                                                num_envs=args.num_envs, max_steps=24))
    policy = flow.FlowPolicy(4, 4, state_dim=mani.STATE_DIM, width=256)
    nft.rollout(policy, envs, range(8))                            # builds the simulators
    start = time.perf_counter()
    success, batch = nft.rollout(policy, envs, range(args.episodes), transitions="all")
    seconds = time.perf_counter() - start
    steps = int(batch["mask"].sum())
    print(f"rollout of the SDE policy: {steps / seconds:.0f} steps/s, {steps / seconds / bare:.2f}x "
          "the bare loop")
    envs.close()

    calls = {"encode": 0, "velocity": 0}
    for name in calls:
        def counted(*inputs, name=name, method=getattr(policy, name)):
            calls[name] += 1
            return method(*inputs)
        setattr(policy, name, counted)
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-4)
    optimizer_steps = []
    optimizer.register_step_post_hook(lambda *_: optimizer_steps.append(1))
    batch["y"] = torch.ones(len(batch["x"]))
    start = time.perf_counter()
    nft.update(policy, optimizer, batch, epochs=3, minibatch=512)
    update = time.perf_counter() - start
    print(f"update, 3 epochs of {len(batch['y'])} chunks x 4 steps: {update:.2f} s beside {seconds:.1f} "
          f"s of rollout, {update / seconds:.3f}x")
    print(f"forward passes per optimisation step: {calls['velocity'] / len(optimizer_steps):g}")
    print(f"RESULT rollout_over_bare={steps / seconds / bare:.2f} "
          f"update_over_rollout={update / seconds:.3f} "
          f"forward_passes={calls['velocity'] / len(optimizer_steps):g}")


if __name__ == "__main__":
    main()
