"""LIBERO's recorded demonstrations: its official HDF5 files, one a task.

    recorded_demos("libero_object", [0], "a/folder", num_demos=5, ...) -> [(rows, actions), ...]

The files hold simulator states, which are replayed to see what a policy here sees. Files that were
made anew from them, as OpenVLA does, are read too: they have no model_file, which tells where
cabinet and stove stood, and their images were taken before the action, not after it.
"""

import concurrent.futures
import contextlib
import json
import multiprocessing
import re
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import torch

from envs.libero import ACTION_DIM, LiberoSim, OtherTask, read_suite, sentence, state_size
from envs.workers import tokens

CAMERAS = ["agentview_rgb", "eye_in_hand_rgb"]
OFFICIAL = "give LIBERO's own files"


# ------------------------------------------------------------------------------------------------
# What may be wrong with a file: found before anything is replayed, told in one line


def refuse(file, told, remedy):
    raise SystemExit(f"--demos {file} {told}: {remedy}")


@contextlib.contextmanager
def demo_file(path):
    """The open HDF5 file's group of demos, to read and no more; SystemExit in one line if it cannot
    be read."""
    import h5py
    try:
        with h5py.File(path, "r", locking="best-effort") as content:  # some disks have no locks
            if not isinstance(content.get("data"), h5py.Group):
                refuse(path, f"has no group 'data', it has {names(content)}", OFFICIAL)
            yield content["data"]
    except PermissionError as error:
        refuse(path, f"cannot be read ({error.strerror})", "ask its owner")
    except (OSError, RuntimeError, KeyError) as error:
        told = " ".join(str(error).split())
        if "unable to lock file" in told:
            refuse(path, "is locked", "wait until the program that writes it ends; if none does, "
                   "set HDF5_USE_FILE_LOCKING=FALSE")
        with contextlib.suppress(OSError), open(path, "rb") as start:
            if start.read(30).startswith(b"version https://git-lfs"):
                refuse(path, "is a pointer of git-lfs", "fetch the file itself by `git lfs pull`")
        refuse(path, f"is no complete HDF5 file ({told})", "fetch it again")


def names(group):
    """The first names in a group, for an error."""
    found = list(group)
    return ", ".join(found[:6]) + ", ..." * (len(found) > 6) if found else "nothing"


def demo_names(data, file):
    """Names of a file's demos, demo_0 or demo0, in the order of their numbers."""
    numbers = {name: re.fullmatch(r"demo_?(\d+)", name) for name in data}
    found = sorted(filter(numbers.get, numbers), key=lambda name: int(numbers[name][1]))
    if not found:
        refuse(file, f"holds no demos, its group 'data' has {names(data)}",
               "give a file with demo_0, demo_1 and so on")
    return found


def check_task(data, file, suite, task):
    """SystemExit in one line if a file shows another task. One that does not say what it shows must
    have the task's name."""
    tasks, _, problems = read_suite(suite)
    name = tasks.get_task(task).name
    wanted = problems[task].instruction.lower(), tasks.get_task(task).language.lower()
    try:
        told = json.loads(data.attrs["problem_info"])["language_instruction"]
    except (KeyError, ValueError, TypeError):
        if name not in file.stem:
            refuse(file, "does not say what it shows",
                   f"if it is task {task} of --suite {suite}, call it {name}_demo.hdf5")
        return
    told = told if isinstance(told, str) else " ".join(told)
    if told.strip('"').lower() not in wanted:
        raise SystemExit(f"--demos {file} shows '{told}', task {task} of --suite {suite} is "
                         f"'{wanted[0]}'")


def check_demo(demo, file, keys):
    """SystemExit in one line if a demo lacks one of its arrays, or if they do not fit together."""
    name, count = demo.name.split("/")[-1], None
    for key in keys:
        if key not in demo:
            group = demo["obs"] if key.startswith("obs/") and "obs" in demo else demo
            refuse(file, f"is not complete, {name} has no {key}, it has {names(group)}", OFFICIAL)
        count = count or len(demo[key])
        if len(demo[key]) != count or count == 0:
            refuse(file, f"is not complete, {name} has {count} {keys[0]} and {len(demo[key])} "
                   f"{key}", "fetch it again")
    if demo["actions"].shape[1:] != (ACTION_DIM,):
        refuse(file, f"has actions of shape {demo['actions'].shape} in {name}",
               f"the robot takes {ACTION_DIM} numbers, give demonstrations of LIBERO's")


def check_images(demo, file, image_size):
    """SystemExit in one line if a demo's images are not squares of image_size, if there is one."""
    name, images = demo.name.split("/")[-1], [demo[f"obs/{camera}"] for camera in CAMERAS]
    told = " and ".join(f"{each.shape} of {each.dtype}" for each in images)
    if any(each.ndim != 4 or each.shape[3] != 3 or each.dtype != np.uint8 for each in images):
        refuse(file, f"has images {told} in {name}, not (steps, height, width, 3) of uint8",
               OFFICIAL)
    sides = {side for each in images for side in each.shape[1:3]}
    if len(sides) > 1:
        refuse(file, f"has images {told} in {name}, not squares of one size",
               "record them again as squares, or use --obs state")
    size, = sides
    if image_size not in (None, size):
        raise SystemExit(f"--image-size {image_size}: the images of {file} have {size} x {size} "
                         f"pixels, give --image-size {size}")


# ------------------------------------------------------------------------------------------------


def recorded_states(suite, task, file, wanted, skip_no_ops, obs):
    """Replays the simulator states of the `wanted` demos of a file, in a process of its own like
    every simulator -> [(demo, steps (T,), states (T, S), actions)]; steps: what is left of the
    demo's."""
    demos, made, sim = [], [], LiberoSim(suite, task)
    with demo_file(file) as data:
        for name in wanted:
            demos.append((name, data[name]["actions"][:], data[name]["states"][:],
                          data[name].attrs.get("model_file")))
    # from here on an error is the simulator's, not the file's
    if obs == "state" and not all(model for *_, model in demos):
        if drawn := sim.drawn_fixtures():
            refuse(file, f"has no model_file, which tells where {drawn[0]} stood",
                   f"{OFFICIAL}, or use --obs rgb, which does not ask")
    for name, actions, states, model in demos:
        if not (np.isfinite(actions).all() and np.isfinite(states).all()):
            refuse(file, f"has numbers in {name} that are not finite", "fetch it again")
        still = np.abs(actions[:, :6]).max(axis=1) < 1e-4
        same_grip = np.append(False, actions[1:, 6] == actions[:-1, 6])
        steps = np.flatnonzero(~(still & same_grip) | (not skip_no_ops))
        steps = steps[steps >= int(obs == "rgb")]  # the first may have no image before it
        if len(steps) == 0:
            refuse(file, f"has no step in {name} that does something", "take that demo out")
        try:
            seen = sim.replay(states[steps], model)
        except OtherTask as error:
            refuse(file, f"has {error} in {name}",
                   f"give demonstrations of task {task} of --suite {suite}, of this LIBERO")
        made.append((name, steps, seen, actions[steps]))
    return made


def recorded_images(demo, steps):
    """What was seen before each of these steps, (T, 2, 3, height, width) uint8. The files hold the
    state before an action beside the image after it, or before it if they were made anew; upside
    down: it is turned upright here."""
    before = steps - int("model_file" in demo.attrs)
    images = [demo[f"obs/{camera}"][:][before, ::-1, ::-1] for camera in CAMERAS]
    return torch.from_numpy(np.stack(images, axis=1)).permute(0, 1, 4, 2, 3)


def recorded_demos(suite, tasks, path, num_demos, skip_no_ops, obs, image_size=None,
                   published=False):
    """The first num_demos of each task's official HDF5 file -> [(rows, actions (T, 7)), ...].

    path: a folder with LIBERO's file names, or one file. rows: state (T, S), tokens (T, 128) and,
    with obs="rgb", rgb (T, 2, 3, h, w): 100 kB a row at 128 pixels, all in memory, and without the
    first step, which no image precedes. skip_no_ops leaves out steps that do nothing; published:
    see `sentence` of envs/libero.py. SystemExit in one line for files that are missing, broken, of
    another task or another image_size.
    """
    demos, path, spawn = [], Path(path), multiprocessing.get_context("spawn")
    keys = ["actions", "states"] + [f"obs/{camera}" for camera in CAMERAS] * (obs == "rgb")
    files, wanted = {}, {}
    for task in tasks:
        name = f"{read_suite(suite).tasks.get_task(task).name}_demo.hdf5"
        files[task] = file = path / name if path.is_dir() else path
        if not file.exists():
            raise SystemExit(f"--demos: {file} is missing; give the folder of LIBERO's "
                             f"demonstrations for --suite {suite}, or --demos scripted")
        with demo_file(file) as data:
            check_task(data, file, suite, task)
            wanted[task] = demo_names(data, file)[:num_demos]
            for demo in wanted[task]:
                check_demo(data[demo], file, keys)
                if obs == "rgb":
                    check_images(data[demo], file, image_size)
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        for task, file in files.items():
            said = tokens(sentence(suite, task, published))
            try:
                found = pool.submit(recorded_states, suite, task, file, wanted[task], skip_no_ops,
                                    obs).result()
            except BrokenProcessPool:
                refuse(file, "was being replayed when the simulator's process died",
                       "is the memory full?")
            for name, steps, states, actions in found:
                rows = {"state": torch.from_numpy(states[:, :state_size(suite, obs)]),
                        "tokens": torch.from_numpy(np.tile(said, (len(steps), 1)))}
                if obs == "rgb":
                    with demo_file(file) as data:
                        rows["rgb"] = recorded_images(data[name], steps)
                demos.append((rows, torch.from_numpy(actions).float()))
    return demos
