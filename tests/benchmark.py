"""What the speed is made of: python tests/benchmark.py [--num-envs 2] prints ratios in about 4 min.

Rollouts on ManiSkill and LIBERO against a bare loop of the simulator's own env.step with random
actions, on the same number of processes; the time of one update beside that of its rollout; time,
peak memory and forward passes of an update of pi-StepNFT and of one of PPO, its critic included,
on one batch (--updates-only: that part alone, half a minute).
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
libero = importlib.import_module("04_train_libero")
mani = importlib.import_module("05_train_maniskill")
flow, nft = mani.flow, mani.nft


class PickCube:
    """ManiSkill's env as its users step it."""

    def __init__(self):
        warnings.filterwarnings("ignore")
        import mani_skill.envs  # noqa: F401
        mani.physics_only()
        self.env = gym.make("PickCube-v1", num_envs=1, obs_mode="state", render_backend="none",
                            control_mode="pd_ee_delta_pos")

    def reset(self, seed):
        self.env.reset(seed=seed)

    def step(self):
        self.env.step(self.env.action_space.sample()[None])


class Soup:
    """LIBERO's env as its users step it, state only: libero_object, task 0."""

    def __init__(self):
        tasks, files, _ = libero.read_suite("libero_object")
        self.states, self.rng = tasks.get_task_init_states(0), np.random.default_rng(0)
        self.env = libero.import_libero()(bddl_file_name=files[0], has_renderer=False,
                                          use_camera_obs=False, has_offscreen_renderer=False)
        self.env.reset()

    def reset(self, seed):
        self.env.env.timestep, self.env.env.done = 0, False
        self.env.set_init_state(self.states[seed % 50])

    def step(self):
        self.env.step(self.rng.uniform(-1, 1, 7))


class Bare(gym.Env):
    """A worker that runs the bare loop: one `step` is `count` plain steps of the simulator."""

    observation_space = gym.spaces.Box(-1, 1, (1,))
    action_space = gym.spaces.Box(-1, 1, (1,))

    def __init__(self, make, count, max_steps):
        self.make, self.count, self.max_steps, self.sim = make, count, max_steps, None

    def reset(self, *, seed=None, options=None):
        if self.sim is None:
            torch.set_num_threads(1)
            self.sim = self.make()
        return np.zeros(1, np.float32), {}

    def step(self, action):
        for t in range(self.count):
            if t % self.max_steps == 0:
                self.sim.reset(t)
            self.sim.step()
        return np.zeros(1, np.float32), 0.0, False, False, {}


def bare_rate(make, num_envs, count, max_steps):
    """Control steps per second of the bare loop, all processes together."""
    envs = nft.worker_envs(functools.partial(Bare, make, count, max_steps), num_envs)
    envs.reset(seed=0)
    envs.step(np.zeros((num_envs, 1), np.float32))                 # warm up
    start = time.perf_counter()
    envs.step(np.zeros((num_envs, 1), np.float32))
    rate = num_envs * count / (time.perf_counter() - start)
    envs.close()
    return rate


def against(bare, policy, envs, episodes):
    """A rollout of the SDE policy -> (its batch, seconds, steps per second over `bare`)."""
    nft.rollout(policy, envs, range(2 * envs.num_envs))            # builds the simulators
    start = time.perf_counter()
    _, batch = nft.rollout(policy, envs, range(1000, 1000 + episodes), transitions="all")
    seconds = time.perf_counter() - start
    rate = int(batch["mask"].sum()) * policy.action_repeat / seconds
    print(f"  bare env.step loop, random actions: {bare:.0f} steps/s; rollout of the SDE policy: "
          f"{rate:.0f} steps/s, {rate / bare:.2f}x")
    envs.close()
    return batch, seconds, rate / bare


def peak_memory(work):
    """Most bytes that tensors held at a time beyond what there was before: torch's own record."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU],
                                profile_memory=True) as profile:
        work()
    held = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def compare_updates(chunks=2048, minibatch=512, repeats=15):
    """One epoch of each method over one Flow-SDE batch: one noisy step per chunk, as PPO needs it.

    pi-StepNFT with --transitions all has four steps per chunk to go through instead of one.
    """
    torch.manual_seed(0)
    policy = flow.FlowPolicy(4, 4, state_dim=11, width=256)
    obs, k = {"state": torch.randn(chunks, 11)}, torch.randint(4, (chunks, 1))
    path = mani.sde.sde_sample(policy, obs, 4, 0.3, noisy=k)[1]
    batch = {"obs": obs, "x": path.x, "v": path.v, "k": k, "y": torch.randn(chunks).sign(),
             "mask": torch.ones(chunks, 4, dtype=torch.bool),
             "episode": torch.arange(chunks) // 8}
    critic, success = mani.Critic(policy.context_dim), np.arange(chunks // 8) % 2 == 0
    alone = torch.optim.Adam(policy.parameters(), lr=1e-5)
    both = torch.optim.Adam([*policy.parameters(), *critic.parameters()], lr=1e-5)
    calls = []
    for module, name in ((policy, "velocity"), (critic, "forward")):
        def counted(*inputs, name=name, method=getattr(module, name)):
            calls.append(name)
            return method(*inputs)
        setattr(module, name, counted)

    def stepnft(**other):
        nft.update(policy, alone, {**batch, **other}, epochs=1, minibatch=minibatch)

    def ppo():
        own = dict(batch)
        mani.baseline_advantages(types.SimpleNamespace(algo="ppo"), policy, critic, own, success,
                                 "cpu")
        mani.ppo_update(policy, critic, both, own, noise_level=0.3, epochs=1, minibatch=minibatch)

    methods = {"pi-StepNFT": stepnft, "PPO": ppo, "pi-StepNFT, all 4 steps":
               functools.partial(stepnft, k=torch.arange(4).expand(chunks, 4))}
    seconds, cost = {name: [] for name in methods}, {}
    for _ in range(repeats):                 # taking turns, so that a busy machine is fair to all
        for name, method in methods.items():
            start = time.perf_counter()
            method()
            seconds[name].append(time.perf_counter() - start)
    print(f"update, one epoch of {chunks} chunks in minibatches of {minibatch}")
    for name, method in methods.items():
        calls.clear()
        cost[name] = float(np.median(seconds[name])), peak_memory(method) / 2**20
        steps = chunks // minibatch
        passes = {n: calls.count(n) / steps for n in ("velocity", "forward")}
        print(f"  {name}: {1000 * cost[name][0]:.0f} ms, peak {cost[name][1]:.1f} MiB, "
              f"passes per optimisation step: policy {passes['velocity']:g}, "
              f"critic {passes['forward']:g}")
    time_ratio, memory_ratio = (a / b for a, b in zip(cost["pi-StepNFT"], cost["PPO"]))
    return f"stepnft_over_ppo_time={time_ratio:.2f} stepnft_over_ppo_memory={memory_ratio:.2f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--num-envs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--updates-only", action="store_true", help="no simulator")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.updates_only:
        return print(f"RESULT {compare_updates()}")
    num_envs = args.num_envs

    print(f"LIBERO, libero_object task 0, state, {num_envs} processes")
    envs = libero.make_envs(types.SimpleNamespace(
        suite="libero_object", tasks=[0], obs="state", state_dim=libero.state_size("libero_object"),
        image_size=128, gl=None, horizon=1, action_repeat=4, num_envs=num_envs, max_steps=100))
    policy = flow.FlowPolicy(1, 7, state_dim=libero.state_size("libero_object"), width=512,
                             action_repeat=4)
    _, _, libero_ratio = against(bare_rate(Soup, num_envs, 300, 100), policy, envs, 10 * num_envs)

    print(f"ManiSkill, PickCube-v1, state, {num_envs} processes")
    envs = mani.make_envs(types.SimpleNamespace(task="PickCube-v1", backend="physx_cpu", horizon=4,
                                                obs="state", renderer=None, num_envs=num_envs,
                                                max_steps=24))
    policy = flow.FlowPolicy(4, 4, state_dim=11, width=256)
    batch, seconds, ratio = against(bare_rate(PickCube, num_envs, 1000, 24), policy, envs, 128)

    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-4)
    batch["y"] = torch.ones(len(batch["x"]))
    start = time.perf_counter()
    nft.update(policy, optimizer, batch, epochs=3, minibatch=512)
    update = time.perf_counter() - start
    print(f"  update, 3 epochs of {len(batch['y'])} chunks x 4 steps: {update:.2f} s beside "
          f"{seconds:.1f} s of rollout, {update / seconds:.3f}x")
    print(f"RESULT libero_over_bare={libero_ratio:.2f} maniskill_over_bare={ratio:.2f} "
          f"update_over_rollout={update / seconds:.3f} {compare_updates()}")


if __name__ == "__main__":
    main()
