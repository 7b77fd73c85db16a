"""What the speed is made of: rollouts beside a bare loop of the simulator, updates beside PPO's.

Rollouts on LIBERO and ManiSkill against a bare loop of the simulator's own env.step with random
actions, on the same number of processes, and how busy they keep the cores; an update of pi-StepNFT
and one of PPO, its critic included, on the same batch with one noisy step a chunk, as PPO needs it;
an update of 05's beside its rollout. Ratios say something only on a quiet machine.

Run:     python results/benchmark/run.py                  (about 5 minutes on two cores)
         python results/benchmark/run.py --updates-only   (half a minute, no simulator)
Saves:   results/benchmark/{updates.csv, simulators.csv}
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

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
nft, critics, common = map(importlib.import_module, (
    "03_step_loss", "05_train_maniskill", "results.common"))
from envs import libero, maniskill, workers  # noqa: E402  (the line above tells where)
from envs.gap_world import episode_seeds  # noqa: E402
from policies.small import RobotPolicy  # noqa: E402
from tools import flags  # noqa: E402
from tools.log import log_row  # noqa: E402

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
    """A rollout of the SDE policy, `episodes` for each simulator -> (its batch, seconds, a row of
    simulators.csv: steps per second of the bare loop and of the rollout, their ratio, and the
    share of the time that the cores are busy)."""
    act = nft.explore(policy, 4, noise_level)
    seeds = first(episode_seeds("train", episodes * world.num_envs))
    with contextlib.closing(world):
        world.play(act, first(episode_seeds("validation", world.num_envs)))  # builds them all
        before, start = cpu_seconds(world), time.perf_counter()
        _, batch = world.play(act, seeds)
        seconds = time.perf_counter() - start
        busy = (cpu_seconds(world) - before) / seconds / common.cores()
    rate = int(batch["mask"].sum()) * action_repeat / seconds
    return batch, seconds, {"bare": round(bare), "rollout": round(rate),
                            "ratio": round(rate / bare, 2), "busy": round(busy, 2)}


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
    return RobotPolicy(4, maniskill.ACTION_DIM, maniskill.state_size("PickCube-v1", "state"),
                       width=256)


def update_args(**changes):
    """05's defaults, as its functions want them."""
    return types.SimpleNamespace(**{
        "algo": "stepnft", "num_steps": 4, "noise_level": 0.3, "group_size": 8, "max_steps": 24,
        "horizon": 4, "epochs": 1, "minibatch": 512, "transitions": "all", "target": "next",
        "beta": 1.0, "max_drift": 0.5, "dpo_beta": 1.0, "target_kl": 0.05, "device": "cpu",
        **changes})


def compare_updates(chunks=2048, repeats=15):
    """One epoch of each method over one batch, from what `play` returns to the updated policy ->
    rows of updates.csv."""
    torch.manual_seed(0)
    policy, success, args = pick_policy(), np.arange(chunks // 8) % 2 == 0, update_args()
    obs = {"state": torch.randn(chunks, len(policy.state_centre))}
    batch = {**obs, **critics.one_noisy_step(policy, args.num_steps, args.noise_level)(obs)[1],
             "mask": torch.ones(chunks, 4, dtype=torch.bool), "episode": torch.arange(chunks) // 8}
    critic, alone = critics.Critic(policy.context_dim), torch.optim.Adam(policy.parameters(), 1e-5)
    both = torch.optim.Adam([*policy.parameters(), *critic.parameters()], lr=1e-5)

    def one_step():
        y = nft.labels(success, batch["episode"], args.group_size)
        nft.update(policy, alone, {**batch, "y": y}, epochs=1, minibatch=args.minibatch)

    def all_steps():
        y = nft.labels(success, batch["episode"], args.group_size)
        critics.update(policy, alone, {**batch, "y": y}, args)

    def ppo():
        own = dict(batch)
        own["y"] = critics.advantages(policy, critic, own, success, args)
        info = critics.ppo_update(policy, critic, both, own, update_args(algo="ppo"))
        assert info["resting"] == 0, "the policy rested: this is not a whole update"

    methods = {"pi-StepNFT, one step of a chunk": one_step, "PPO, one step of a chunk": ppo,
               "pi-StepNFT, all 4 steps": all_steps}
    seconds = {name: [] for name in methods}
    for _ in range(repeats):                 # taking turns, so that a busy machine is fair to all
        for name, work in methods.items():
            start = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - start)
    return [{"update": name, "chunks": chunks, "ms": round(1000 * np.median(seconds[name]), 1),
             "mib": round(peak_memory(work) / 2**20, 1)} for name, work in methods.items()]


def compare_simulators(num_envs, episodes):
    """-> rows of simulators.csv, one for each simulator, as they come."""
    bare = bare_rate(Soup, num_envs, episodes, LIBERO_STEPS)
    world = libero.make_workers("libero_object", [0], num_envs, action_repeat=4,
                                max_steps=LIBERO_STEPS)
    policy = RobotPolicy(1, libero.ACTION_DIM, libero.state_size("libero_object"))
    *_, row = against(bare, policy, world, episodes, 0.5, 4,
                      functools.partial(libero.random_start, 0))
    yield {"simulator": "LIBERO, libero_object task 0", **row, "update": ""}

    bare = bare_rate(PickCube, num_envs, 4 * episodes, MANISKILL_STEPS)
    world = maniskill.make_workers("PickCube-v1", num_envs, max_steps=MANISKILL_STEPS)
    policy, args = pick_policy(), update_args(epochs=3)
    batch, seconds, row = against(bare, policy, world, 4 * episodes, args.noise_level)
    batch["y"] = torch.ones(len(batch["x"]))
    optimizer, start = torch.optim.Adam(policy.parameters(), lr=1e-4), time.perf_counter()
    critics.update(policy, optimizer, batch, args)
    update = time.perf_counter() - start
    yield {"simulator": "ManiSkill, PickCube-v1", **row, "update": round(update / seconds, 3)}


def main():
    parser = flags.Parser(__doc__)
    add = parser.add_argument
    add("--num-envs", type=flags.positive_int, default=8, help="simulators at a time")
    add("--episodes", type=flags.positive_int, default=10,
        help="for each simulator of LIBERO, four times as many of ManiSkill")
    add("--updates-only", action="store_true", help="no simulator")
    add("--out", type=Path, default="results/benchmark", help="folder of the tables")
    args = parser.parse_args()
    parser.make_folder("--out", args.out)
    torch.set_num_threads(1)
    told = {**common.origin("results/benchmark/run.py"), "hardware": f"{common.cores()} CPU cores"}
    tables = {"updates": compare_updates()}
    if not args.updates_only:
        tables["simulators"] = compare_simulators(args.num_envs, args.episodes)
    count = 0
    for name, rows in tables.items():
        path = args.out / f"{name}.csv"
        path.unlink(missing_ok=True)
        for row in rows:
            log_row(path, {**row, **told})
            print(*(f"{key}={value}" for key, value in row.items()), flush=True)
            count += 1
    print(f"RESULT rows={count} saved={args.out}")


if __name__ == "__main__":
    main()
