"""What the speed is made of: python tests/benchmark.py prints ratios, in about 5 min on two cores.

Rollouts on LIBERO and ManiSkill against a bare loop of the simulator's own env.step with random
actions, on the same number of processes, and how busy they keep the cores; an update of pi-StepNFT
and one of PPO, its critic included, on the same batch with one noisy step a chunk, as PPO needs it
(--updates-only: that part alone, half a minute); an update of 05's beside its rollout.
"""

import contextlib
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
import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
flow, nft, robot, mani = map(importlib.import_module, (
    "01_flow_policy", "03_step_loss", "04_train_libero", "05_train_maniskill"))
from envs import libero, maniskill, workers  # noqa: E402  (the lines above tell where)

LIBERO_STEPS, MANISKILL_STEPS = 100, 24   # time limits: a random policy needs them all


class PickCube:
    """ManiSkill's env as its users step it."""

    def __init__(self):
        warnings.filterwarnings("ignore")
        import mani_skill.envs  # noqa: F401
        maniskill.physics_only()
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
        torch.set_num_threads(1)
        self.sim = self.sim or self.make()
        return np.zeros(1, np.float32), {}

    def step(self, action):
        for t in range(self.count):
            if t % self.max_steps == 0:
                self.sim.reset(t)
            self.sim.step()
        return np.zeros(1, np.float32), 0.0, False, False, {}


def bare_rate(make, num_envs, episodes, max_steps):
    """Control steps per second of the bare loop, all processes together."""
    count = episodes * max_steps
    world = workers.Workers(functools.partial(Bare, make, count, max_steps), num_envs)
    with contextlib.closing(world):
        start = time.perf_counter()
        world.envs.step(np.zeros((num_envs, 1), np.float32))
        return num_envs * count / (time.perf_counter() - start)


def cpu_seconds(world):
    """What this process and those of the simulators have computed so far."""
    pids = [os.getpid(), *(process.pid for process in world.envs.processes)]
    return sum(sum(psutil.Process(pid).cpu_times()[:2]) for pid in pids)


def against(bare, policy, world, episodes, noise_level, action_repeat=1, first=lambda seeds: seeds):
    """A rollout of the SDE policy, `episodes` for each simulator -> (its batch, seconds, steps per
    second over `bare`, share of the time that the cores are busy)."""
    act = nft.explore(policy, 4, noise_level)
    seeds = first(flow.episode_seeds("train", episodes * world.num_envs))
    with contextlib.closing(world):
        world.play(act, first(flow.episode_seeds("validation", world.num_envs)))  # builds them all
        before, start = cpu_seconds(world), time.perf_counter()
        _, batch = world.play(act, seeds)
        seconds = time.perf_counter() - start
        busy = (cpu_seconds(world) - before) / seconds / len(os.sched_getaffinity(0))
    rate = int(batch["mask"].sum()) * action_repeat / seconds
    print(f"  bare env.step loop, random actions: {bare:.0f} steps/s; rollout of the SDE policy: "
          f"{rate:.0f} steps/s, {rate / bare:.2f}x; cores busy {busy:.2f}", flush=True)
    return batch, seconds, rate / bare, busy


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


def pick_policy():
    """05's policy for PickCube."""
    return robot.RobotPolicy(4, maniskill.ACTION_DIM,
                             maniskill.state_size("PickCube-v1", "state"), width=256)


def compare_updates(chunks=2048, minibatch=512, repeats=15):
    """One epoch of each method over one batch: from what `play` returns to the updated policy."""
    torch.manual_seed(0)
    policy, success = pick_policy(), np.arange(chunks // 8) % 2 == 0
    obs = {"state": torch.randn(chunks, len(policy.state_centre))}
    batch = {**obs, **mani.one_noisy_step(policy, 4, 0.3)(obs)[1],
             "mask": torch.ones(chunks, 4, dtype=torch.bool), "episode": torch.arange(chunks) // 8}
    args = types.SimpleNamespace(group_size=1, max_steps=32, horizon=4, epochs=1,
                                 minibatch=minibatch)
    critic = mani.Critic(policy.context_dim)
    method, alone = mani.PPO(args, critic), torch.optim.Adam(policy.parameters(), lr=1e-5)
    both = torch.optim.Adam([*policy.parameters(), *critic.parameters()], lr=1e-5)

    def stepnft(k=batch["k"]):
        y = nft.labels(success, batch["episode"])
        nft.update(policy, alone, {**batch, "k": k, "y": y}, epochs=1, minibatch=minibatch)

    def ppo():
        info = method.learn(policy, both, dict(batch), success)
        assert info["resting"] == 0, "the policy rested: this is not a whole update"

    methods = {"pi-StepNFT": stepnft, "PPO": ppo, "pi-StepNFT, all 4 steps":
               functools.partial(stepnft, torch.arange(4).expand(chunks, 4))}
    seconds, cost = {name: [] for name in methods}, {}
    for _ in range(repeats):                 # taking turns, so that a busy machine is fair to all
        for name, work in methods.items():
            start = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - start)
    print(f"update, one epoch of {chunks} chunks in minibatches of {minibatch}")
    for name, work in methods.items():
        cost[name] = float(np.median(seconds[name])), peak_memory(work) / 2**20
        print(f"  {name}: {1000 * cost[name][0]:.0f} ms, peak {cost[name][1]:.1f} MiB")
    time_ratio, memory_ratio = (a / b for a, b in zip(cost["pi-StepNFT"], cost["PPO"]))
    return f"stepnft_over_ppo_time={time_ratio:.2f} stepnft_over_ppo_memory={memory_ratio:.2f}"


def main():
    parser = flow.Parser(__doc__)
    add = parser.add_argument
    add("--num-envs", type=flow.positive_int, default=8, help="simulators at a time")
    add("--episodes", type=flow.positive_int, default=10,
        help="for each simulator of LIBERO, four times as many of ManiSkill")
    add("--updates-only", action="store_true", help="no simulator")
    args = parser.parse_args()
    torch.set_num_threads(1)
    updates = compare_updates()
    if args.updates_only:
        return print(f"RESULT {updates}")
    processes = f"state, {args.num_envs} processes on {len(os.sched_getaffinity(0))} cores"

    print(f"LIBERO, libero_object task 0, {processes}", flush=True)
    bare = bare_rate(Soup, args.num_envs, args.episodes, LIBERO_STEPS)
    world = libero.make_workers("libero_object", [0], args.num_envs, action_repeat=4,
                                max_steps=LIBERO_STEPS)
    policy = robot.RobotPolicy(1, libero.ACTION_DIM,
                               libero.state_size("libero_object"))
    *_, libero_ratio, libero_busy = against(bare, policy, world, args.episodes, 0.5, 4,
                                            functools.partial(libero.random_start, 0))

    print(f"ManiSkill, PickCube-v1, {processes}", flush=True)
    bare = bare_rate(PickCube, args.num_envs, 4 * args.episodes, MANISKILL_STEPS)
    world = maniskill.make_workers("PickCube-v1", args.num_envs, max_steps=MANISKILL_STEPS)
    policy = pick_policy()
    batch, seconds, ratio, busy = against(bare, policy, world, 4 * args.episodes, 0.3)

    batch["y"], batch["k"] = torch.ones(len(batch["x"])), torch.arange(4).expand(len(batch["x"]), 4)
    optimizer, start = torch.optim.Adam(policy.parameters(), lr=1e-4), time.perf_counter()
    nft.update(policy, optimizer, batch, epochs=3, minibatch=512)
    update = time.perf_counter() - start
    print(f"  update, 3 epochs of {len(batch['y'])} chunks x 4 steps: {update:.2f} s beside "
          f"{seconds:.1f} s of rollout, {update / seconds:.3f}x")
    print(f"RESULT libero_over_bare={libero_ratio:.2f} libero_busy={libero_busy:.2f} "
          f"maniskill_over_bare={ratio:.2f} maniskill_busy={busy:.2f} "
          f"update_over_rollout={update / seconds:.3f} {updates}")


if __name__ == "__main__":
    main()
