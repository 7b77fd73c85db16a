"""Records hand paths of 04's and 05's policies from one start, for notebooks/benchmark_width.ipynb.

Run:     python results/benchmark_width/run.py libero --before runs/04_train_libero/sft.pt \
             --after runs/04_train_libero/last.pt
         python results/benchmark_width/run.py maniskill --before runs/05_train_maniskill/sft.pt \
             --after runs/05_train_maniskill/last.pt
Saves:   results/benchmark_width/{libero,maniskill}.npz (a few minutes each on two CPU cores)

One start is played many times by four samplers: before and after pi-StepNFT, the ODE and the SDE.
The start is the first one of the test from which the SFT policy fails at least half of the time and
under noise sometimes succeeds (12 episodes each), else the last of a dozen; --placement names
another. Suite, task, time limit and noise are those that the policies were trained with.
"""

import contextlib
import importlib
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
flow, sde = map(importlib.import_module, ("01_flow_policy", "02_sde_sampler"))
from envs import libero, maniskill  # noqa: E402  (the lines above tell where)
from envs.gap_world import episode_seeds  # noqa: E402
from policies import load_policy  # noqa: E402
from tools import flags  # noqa: E402

SCRIPTS = {"libero": "04_train_libero", "maniskill": "05_train_maniskill"}


def run_of(name, checkpoint, num_envs):
    """-> (the flags of the run that saved it, its simulators). A chunk of the simulators is one
    control step, so that each of them is seen."""
    script = importlib.import_module(SCRIPTS[name])
    sys.argv[0] = f"{SCRIPTS[name]}.py"  # whose checkpoint that script asks for
    args = script.parse_args(["--eval-only", str(checkpoint), "--out", str(Path(checkpoint).parent),
                              "--num-envs", str(num_envs)])
    if args.obs != "state":
        raise SystemExit(f"{checkpoint} sees images: where the object is, only --obs state tells")
    hold, args.horizon, args.action_repeat = args.action_repeat, 1, 1
    if name == "libero":
        args.tasks = args.tasks[:1]
    world = script.make_world(args)
    args.action_repeat = hold
    return args, world


def paths(policy, args, world, seed, episodes, noise_level=0):
    """One start, many episodes -> (states (episodes, steps + 1, S), nan after the end; success).

    A chunk is sampled when the last one is over, as in training; noise_level 0 is the ODE.
    """
    every, wins, hold = [], [], args.action_repeat
    for _ in range(0, episodes, world.num_envs):
        plan, step = None, 0

        def act(obs):
            nonlocal plan, step
            if step % (policy.horizon * hold) == 0:
                x_0 = (sde.sde_sample(policy, obs, args.num_steps, noise_level)[0] if noise_level
                       else flow.ode_sample(policy, obs, args.num_steps))
                plan = policy.denormalise(x_0)
            step += 1
            return plan[:, (step - 1) // hold % policy.horizon][:, None], {}

        success, rows = world.play(act, [seed] * world.num_envs)  # all start and step together
        states = rows["state"].numpy()
        seen = np.full((world.num_envs, args.max_steps + 1, states.shape[1]), np.nan, np.float32)
        for e in range(world.num_envs):
            trail = states[rows["episode"].numpy() == e]
            seen[e, :len(trail)] = trail
        every.append(seen)
        wins.append(success)
    return np.concatenate(every)[:episodes], np.concatenate(wins)[:episodes]


def places(name, state):
    """Where the object and the goal are, from a start's state, which sees them from the hand."""
    # LIBERO: six numbers of the hand, six of the object, six of the goal; ManiSkill: after what
    # the robot feels of itself three of the object and three of the goal
    first, apart = (6, 6) if name == "libero" else (maniskill.PROPRIO, 3)
    return [state[:3] + state[at:at + 3] for at in (first, first + apart)]


def record(name, before, after, noise_level=None, episodes=48, num_envs=8, placement=None,
           folder=ROOT / "results/benchmark_width"):
    """-> folder/NAME.npz, for the notebook."""
    torch.manual_seed(0)
    sft, trained = (load_policy(path) for path in (before, after))
    args, world = run_of(name, after, num_envs)
    noise_level, start = noise_level or args.noise_level, time.time()
    seeds = episode_seeds("test", max(12, (placement or 0) + 1))
    if name == "libero":
        seeds = libero.random_start(args.tasks[0], seeds)
    with contextlib.closing(world):
        for seed in seeds if placement is None else seeds[placement:placement + 1]:
            states, alone = paths(sft, args, world, seed, 12)
            wide = paths(sft, args, world, seed, 12, noise_level)[1]
            print(f"start {seed}: SFT {alone.mean():.2f}, under noise {wide.mean():.2f}",
                  flush=True)
            if alone.mean() <= 0.5 and wide.mean() > 0.1:
                break
        thing, goal = places(name, states[0, 0])
        data = {"seed": seed, "noise_level": noise_level, "object": thing, "goal": goal}
        for when, policy in (("before", sft), ("after", trained)):
            for sampler, noise in (("ode", 0), ("sde", noise_level)):
                states, success = paths(policy, args, world, seed, episodes, noise)
                # the hand's position comes first in both scripts' states
                data[f"{when}_{sampler}"] = states[..., :3].astype(np.float16)
                data[f"{when}_{sampler}_success"] = success
                print(f"{when}, {sampler}: {success.mean():.2f}, {time.time() - start:.0f} s",
                      flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / f"{name}.npz", **data)
    print(f"saved {folder}/{name}.npz, {(folder / f'{name}.npz').stat().st_size // 1000} kB")


def main():
    parser = flags.Parser(__doc__)
    add = parser.add_argument
    add("name", choices=SCRIPTS, help="whose policies")
    add("--before", type=flags.checkpoint, required=True, help="checkpoint of SFT")
    add("--after", type=flags.checkpoint, required=True, help="checkpoint after pi-StepNFT")
    add("--noise-level", type=flags.positive_float, help="of the SDE; default: the training's")
    add("--episodes", type=flags.positive_int, default=48, help="for each of the four samplers")
    add("--num-envs", type=flags.positive_int, default=8, help="simulators at a time")
    add("--placement", type=flags.natural, help="which test start, counted from 0")
    add("--out", type=Path, default="results/benchmark_width", help="folder of the recording")
    args = parser.parse_args()
    parser.make_folder("--out", args.out)
    record(args.name, args.before, args.after, args.noise_level, args.episodes, args.num_envs,
           args.placement, args.out)


if __name__ == "__main__":
    main()
