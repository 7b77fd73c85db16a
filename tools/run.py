"""A run that can stop and go on, and how its results are told.

`save` writes a policy with the flags of its run. `last.pt`, written after every iteration, also has
all else that the next one needs: the acting policy, Adam's averages, how far the run is. Each
iteration has a random stream of its own, so a run that is killed and resumed ends with the numbers
of one that never stopped (on the CPU; on a GPU sums may differ in the last digits).

    python 04_train_libero.py --resume --out runs/04_train_libero      no other flag is needed
"""

import importlib
import os

import numpy as np
import torch

from envs.gap_world import episode_seeds
from tools import files
from tools.ranks import OnDevice, average_gradients, gather, rank_of

flow = importlib.import_module("01_flow_policy")


def save(path, policy, args, **more):
    """A policy and the flags it was trained with. Rank 0 alone writes: the others have the same."""
    if rank_of()[0] == 0:
        content = {"config": policy.config, "policy": policy.state_dict(), "flags": args.flags}
        files.save({**content, **more}, path)


def save_last(args, parts, state):
    """last.pt: all that the next iteration needs. parts: what `begin` gets."""
    rest = {name: part.state_dict() for name, part in parts.items() if name != "policy"}
    save(args.out / "last.pt", parts["policy"], args, state=state, **rest)


def begin(args, parts):
    """-> {"iteration", "env_steps"}: how far the run is. With --resume, last.pt is put back into
    its parts, a dict of modules and optimisers. A row that was logged just before the run was
    killed, and is about to come again, is taken out of the log."""
    if not args.resume:
        if args.iterations:
            (args.out / "log.csv").unlink(missing_ok=True)  # of a run that never had a checkpoint
        return {"iteration": 0, "env_steps": 0}
    content = torch.load(args.resume, map_location=args.device, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(content[name])
    header, *rows = (args.resume.parent / "log.csv").read_text().splitlines(keepends=True)
    done = [row for row in rows if int(row.split(",")[0]) <= content["state"]["iteration"]]
    (args.out / "log.tmp").write_text(header + "".join(done))
    os.replace(args.out / "log.tmp", args.out / "log.csv")
    return content["state"]


def sft(args, make_policy, demos, chunks):
    """Flow matching on demos [(rows, actions), ...] and their chunks (N, H, A) -> the policy."""
    print(f"{len(demos)} demos, {len(chunks)} chunks of {chunks.shape[1]} actions", flush=True)
    obs = {name: torch.cat([rows[name] for rows, _ in demos]) for name in demos[0][0]}
    torch.manual_seed(args.seed)
    policy = make_policy().to(args.device)
    average_gradients(policy)
    torch.manual_seed(args.seed + rank_of()[0])  # each rank draws minibatches of its own
    loss = flow.train_sft(policy, obs, chunks, args.sft_steps, args.sft_lr, args.sft_batch)
    if not np.isfinite(loss):
        raise SystemExit("SFT: the loss is no number any more: give a lower --sft-lr")
    policy.zero_grad()  # frees the gradients
    print(f"SFT: flow matching loss {loss:.3f}")
    return policy


def random_stream(seed, iteration):
    """torch's random numbers from here on: the same for this iteration whenever it is played.
    Seeded by its first training start, plus the rank."""
    torch.manual_seed(int(episode_seeds("train", 1, seed, iteration)[0]) + rank_of()[0])


def count(args, state, success, batch):
    """Counts an iteration in `state` -> the first columns of its row in the log."""
    if not success.any():
        print("no episode succeeded, so there is nothing to repeat: more --num-demos may help")
    actions = int(gather(batch["mask"].sum()[None]).sum())  # of all ranks
    state["iteration"] += 1
    state["env_steps"] += actions * args.action_repeat  # a success may cut the last action short
    return {"iteration": state["iteration"], "episodes": state["iteration"] * args.episodes,
            "env_steps": state["env_steps"], "train_sde": success.mean()}


def rated(success):
    """Successes -> the columns of a table: their rate with its 95 % Wilson interval."""
    import scipy.stats  # not at the top: every worker process would load it
    test = scipy.stats.binomtest(int(np.sum(success)), len(success))
    low, high = test.proportion_ci(0.95, method="wilson")
    return {"episodes": len(success), "success": float(np.mean(success)), "low": low, "high": high}


def report(name, success):
    """Prints a success rate with its interval -> the rate."""
    row = rated(success)
    print("{}: success {success:.3f} [{low:.3f}, {high:.3f}] over {episodes} episodes".format(
        name, **row), flush=True)
    return row["success"]


def show_axes(rates):
    """Prints a table: a row for each policy, its mean success on each axis of a test out of
    distribution. rates: {(axis, policy): [rate of each variant]}, the axis of training first."""
    axes = list(dict.fromkeys(axis for axis, _ in rates))
    print(f"{'':<12}" + "".join(f"{axis:>17}" for axis in [*axes, "OOD mean"]))
    for name in dict.fromkeys(policy for _, policy in rates):
        means = [np.mean(rates[axis, name]) for axis in axes]
        means.append(np.mean(means[1:]))  # the OOD mean is the mean of the axes
        print(f"{name:<12}" + "".join(f"{mean:17.3f}" for mean in means))


def film(args, world, policy, seeds):
    """Plays the first of the seeds, args.video of them, in a world that films. One rank does."""
    flow.evaluate(policy, OnDevice(world, args.device), seeds[:args.video], args.num_steps)
    world.close()
    print(f"saved {len(seeds[:args.video])} episodes in {args.out}/videos")
