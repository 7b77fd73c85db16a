"""Records hand paths of 04's and 05's policies from one start, for notebooks/benchmark_width.ipynb.

Run:     python results/record_width.py libero --before runs/04_train_libero/sft.pt \
             --after runs/04_train_libero/best.pt
         python results/record_width.py maniskill --before runs/05_train_maniskill/sft.pt \
             --after runs/05_train_maniskill/best.pt
Saves:   results/benchmark_width/{libero,maniskill}.npz (a few minutes each on two CPU cores)

One start is played many times by four samplers: before and after pi-StepNFT, the ODE and the SDE.
The start is the first one of the test seeds from which the SFT policy fails at least half of the
time and under noise sometimes succeeds (12 episodes each); --placement names another. Flags after
`--` go to the script itself, for policies of another suite or task: `-- --suite libero_goal`.
"""

import argparse
import importlib
import sys
import time
from pathlib import Path

import numpy as np
import torch

RESULTS = Path(__file__).resolve().parent
sys.path.insert(0, str(RESULTS.parent))
flow, sde = map(importlib.import_module, ("01_flow_policy", "02_sde_sampler"))

SCRIPTS = {"libero": "04_train_libero", "maniskill": "05_train_maniskill"}


def open_envs(name, num_envs, flags=()):
    """The script's own environments with chunks of one action, so that every step is seen.

    Returns (envs, the script's arguments, the first test seed).
    """
    script, own = importlib.import_module(SCRIPTS[name]), sys.argv
    sys.argv = [f"{SCRIPTS[name]}.py", "--num-envs", str(num_envs), "--out", "runs/record", *flags]
    try:
        args = script.parse_args()
        if hasattr(script, "check"):
            script.check(args)
    finally:
        sys.argv = own
    args.horizon = args.action_repeat = 1
    first = script.TEST
    if name == "libero":
        first = int(script.episode_seeds(args.tasks, [first])[0])
    return script.make_envs(args), args, first


def places(name, state):
    """Where the object and the goal are, from a start's state, which sees them from the hand."""
    script, hand = importlib.import_module(SCRIPTS[name]), state[:3]
    if name == "libero":  # six numbers of the hand, six of the object, six of the goal
        return hand + state[6:9], hand + state[12:15]
    first = script.PROPRIO  # object - hand and goal - hand follow what the arm feels
    return hand + state[first:first + 3], hand + state[first + 3:first + 6]


def paths(policy, envs, seed, episodes, max_steps, noise_level=0, num_steps=4):
    """One start, many episodes -> (hand (episodes, steps + 1, 3), nan after the end; success).

    A chunk is sampled when the last one is over, as in training; noise_level 0 is the ODE.
    """
    hold = policy.action_repeat
    every, wins = [], []
    for _ in range(0, episodes, envs.num_envs):
        plan, step = None, 0

        def act(obs):
            nonlocal plan, step
            if step % (policy.horizon * hold) == 0:
                x_0 = (sde.sde_sample(policy, obs, num_steps, noise_level)[0] if noise_level
                       else flow.ode_sample(policy, obs, num_steps))
                plan = policy.denormalise(x_0).detach().numpy()
            step += 1
            return plan[:, (step - 1) // hold % policy.horizon][:, None], {}

        success, rows = flow.play(act, envs, [seed] * envs.num_envs)
        seen = np.full((envs.num_envs, max_steps + 1, 3), np.nan, np.float32)
        for e in range(envs.num_envs):  # the hand's position comes first in both scripts' states
            trail = rows["obs"]["state"][rows["episode"] == e, :3]
            seen[e, :len(trail)] = trail
        every.append(seen)
        wins.append(success)
    return np.concatenate(every)[:episodes], np.concatenate(wins)[:episodes]


def record(name, before, after, noise_level, episodes=48, num_envs=8, placement=None, flags=()):
    """-> results/benchmark_width/NAME.npz, for the notebook."""
    torch.manual_seed(0)
    envs, args, first = open_envs(name, num_envs, flags)
    sft, trained = (flow.load_policy(path) for path in (before, after))
    start = time.time()
    try:
        candidates = range(first, first + 12) if placement is None else [first + placement]
        for seed in candidates:
            alone, wide = (paths(sft, envs, seed, 12, args.max_steps, noise)[1].mean()
                           for noise in (0, noise_level))
            print(f"start {seed}: SFT {alone:.2f}, under noise {wide:.2f}", flush=True)
            if alone <= 0.5 and wide > 0.1:
                break
        obs, _ = envs.reset(seed=[seed] * num_envs)
        thing, goal = places(name, obs["state"][0])
        data = {"seed": seed, "noise_level": noise_level, "object": thing, "goal": goal}
        for when, policy in (("before", sft), ("after", trained)):
            for sampler, noise in (("ode", 0), ("sde", noise_level)):
                hand, success = paths(policy, envs, seed, episodes, args.max_steps, noise)
                data[f"{when}_{sampler}"] = hand.astype(np.float16)
                data[f"{when}_{sampler}_success"] = success
                print(f"{when}, {sampler}: {success.mean():.2f}, {time.time() - start:.0f} s",
                      flush=True)
    finally:
        envs.close()
    path = RESULTS / f"benchmark_width/{name}.npz"
    path.parent.mkdir(exist_ok=True)
    np.savez_compressed(path, **data)
    print(f"saved {path.relative_to(RESULTS.parent)}, {path.stat().st_size // 1000} kB")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("name", choices=SCRIPTS, help="whose policies")
    add("--before", required=True, help="checkpoint of SFT")
    add("--after", required=True, help="checkpoint after pi-StepNFT")
    add("--noise-level", type=float, help="of the SDE; default: that of the script's training")
    add("--episodes", type=int, default=48, help="from the one start, for each of four samplers")
    add("--num-envs", type=int, default=8, help="simulators at a time")
    add("--placement", type=int, help="which test start, counted from 0")
    own, _, flags = " ".join(sys.argv[1:]).partition(" -- ")
    args = parser.parse_args(own.split())
    noise = args.noise_level or {"libero": 0.5, "maniskill": 0.3}[args.name]
    record(args.name, args.before, args.after, noise, args.episodes, args.num_envs, args.placement,
           flags.split())


if __name__ == "__main__":
    main()
