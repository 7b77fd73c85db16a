"""LIBERO's recorded demonstrations: its official HDF5 files, one a task.

    recorded_demos("libero_object", [0], "a/folder", num_demos=5, ...) -> [(rows, actions), ...]

The files hold simulator states, which are replayed to see what a policy here sees.
"""

import concurrent.futures
import contextlib
import json
import multiprocessing
from pathlib import Path

import numpy as np
import torch

from envs.libero import LiberoSim, read_suite, state_size
from envs.workers import tokens


@contextlib.contextmanager
def demo_file(path):
    """The open HDF5 file's demos; SystemExit in one line if they are not all there."""
    import h5py
    try:
        with h5py.File(path) as content:
            yield content["data"]
    except (OSError, KeyError, ValueError) as error:
        raise SystemExit(f"--demos {path} is no complete LIBERO demonstration file ({error}): "
                         "fetch it again") from None


def recorded_states(suite, task, file, num_demos, skip_no_ops, first):
    """Replays the simulator states of a file, in a process of its own like every simulator
    -> [(demo, steps (T,), states (T, S), actions)]; steps: what is left of the demo's, from `first`
    on."""
    tasks, _, problems = read_suite(suite)
    wanted = problems[task].instruction.lower(), tasks.get_task(task).language.lower()
    with demo_file(file) as data:
        told = json.loads(data.attrs["problem_info"])["language_instruction"]
        told = told if isinstance(told, str) else " ".join(told)
        if told.strip('"').lower() not in wanted:
            raise SystemExit(f"--demos {file} shows '{told}', task {task} of --suite {suite} is "
                             f"'{wanted[0]}'")
        sim, demos = LiberoSim(suite, task), []
        for name in sorted(data, key=lambda name: int(name.split("_")[1]))[:num_demos]:
            actions, states = data[name]["actions"][:], data[name]["states"][:]
            still = np.abs(actions[:, :6]).max(axis=1) < 1e-4
            same_grip = np.append(False, actions[1:, 6] == actions[:-1, 6])
            steps = np.flatnonzero(~(still & same_grip) | (not skip_no_ops))
            steps = steps[steps >= first]
            seen = sim.replay(states[steps], data[name].attrs["model_file"])
            demos.append((name, steps, seen, actions[steps]))
        return demos


def recorded_images(demo, steps):
    """What was seen before each of these steps, (T, 2, 3, height, width) uint8. The files hold the
    state before an action beside the image after it, upside down: it is turned upright here."""
    images = [demo["obs"][f"{camera}_rgb"][:][steps - 1, ::-1, ::-1]
              for camera in ("agentview", "eye_in_hand")]
    return torch.from_numpy(np.stack(images, axis=1)).permute(0, 1, 4, 2, 3)


def recorded_demos(suite, tasks, path, num_demos, skip_no_ops, obs, image_size=None):
    """The first num_demos of each task's official HDF5 file -> [(rows, actions (T, 7)), ...].

    path: a folder with LIBERO's file names, or one file. rows: state (T, S), tokens (T, 128) and,
    with obs="rgb", rgb (T, 2, 3, h, w): 100 kB a row at 128 pixels, all in memory, and without the
    first step, which no image precedes. skip_no_ops leaves out steps that do nothing. SystemExit in
    one line for files that are missing, broken, of another task or another image_size.
    """
    demos, path, spawn = [], Path(path), multiprocessing.get_context("spawn")
    known, _, problems = read_suite(suite)
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        for task in tasks:
            file = path / f"{known.get_task(task).name}_demo.hdf5" if path.is_dir() else path
            if not file.exists():
                raise SystemExit(f"--demos: {file} is missing; give the folder of LIBERO's "
                                 f"demonstrations for --suite {suite}, or --demos scripted")
            sentence = tokens(problems[task].instruction)
            found = pool.submit(recorded_states, suite, task, file, num_demos, skip_no_ops,
                                int(obs == "rgb")).result()
            for name, steps, states, actions in found:
                rows = {"state": torch.from_numpy(states[:, :state_size(suite, obs)]),
                        "tokens": torch.from_numpy(np.tile(sentence, (len(steps), 1)))}
                if obs == "rgb":
                    with demo_file(file) as data:
                        rows["rgb"] = recorded_images(data[name], steps)
                    size = rows["rgb"].shape[-1]
                    if image_size not in (None, size):
                        raise SystemExit(f"--image-size {image_size}: the images of {file} have "
                                         f"{size} x {size} pixels, give --image-size {size}")
                demos.append((rows, torch.from_numpy(actions).float()))
    return demos
