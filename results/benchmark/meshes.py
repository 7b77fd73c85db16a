"""What simple meshes save: LIBERO's two cameras drawn in software with full and with simple ones.

Both draw the same moments of the expert's episodes, in turn, so that the ratio holds on a busy
machine, too. `ms`: the processor's time for one drawing of both cameras. `mean`: by how much a
pixel of the simple ones is off, of 255; `far`: the share that is off by more than 30 in a colour;
each for the agent's camera and the hand's. `faces`, `vertices`: what is drawn, three vertices a
face. `mib`: memory of a worker's process that holds this simulator.

Run:     python results/benchmark/meshes.py                  (about 5 minutes on one core)
Saves:   results/benchmark/meshes.csv
"""

import importlib
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
common = importlib.import_module("results.common")
from envs import libero, libero_meshes  # noqa: E402  (the line above tells where)
from tools import flags  # noqa: E402
from tools.log import log_row  # noqa: E402

MESHES = ("full", "simple")
STARTS, EVERY, STEPS = (3, 1007), 10, 120    # an official start and a random one; control steps


def fresh(work, *told):
    """work(*told) in a process of its own, as a worker is."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *told).result()


def memory(suite, task, gl, size, meshes):
    """MiB of a process with one simulator that has drawn."""
    sim = libero.LiberoSim(suite, task, "rgb", gl=gl, size=size, meshes=meshes)
    sim.reset(0)
    sim.look()
    return round(psutil.Process().memory_info().rss / 2**20)


def faces_drawn(model):
    """How many triangles of meshes the cameras are given."""
    return sum(int(model.mesh_facenum[model.geom_dataid[geom]])
               for geom in np.flatnonzero((model.geom_type == 7) & (model.geom_group != 0)))


def timed(sim):
    """-> images of both cameras, ms of the processor."""
    start = time.process_time()
    images = sim.look()
    return images.astype(int), 1000 * (time.process_time() - start)


def compare(suite, task, gl, size, steps=STEPS):
    """-> a row of meshes.csv, but for the memory."""
    sims = [libero.LiberoSim(suite, task, "rgb", gl=gl, size=size, meshes=m) for m in MESHES]
    sim, twin = sims
    faces = {"faces_full": faces_drawn(sim.model)}
    with libero_meshes.simple_meshes(sim.model):
        faces["faces_simple"] = faces_drawn(sim.model)
    spent, off = [], []
    for start in STARTS:
        sim.reset(start)
        expert = libero.ScriptedExpert(sim, np.random.default_rng(0))
        for step in range(steps):
            if step % EVERY == 0:
                # the same pose under both renderers
                twin.env.sim.set_state_from_flattened(sim.env.sim.get_state().flatten())
                twin.model.body_pos[:], twin.model.body_quat[:] = (sim.model.body_pos,
                                                                   sim.model.body_quat)
                twin.mj.mj_forward(twin.model, twin.data)
                sim.mj.mj_forward(sim.model, sim.data)
                (full, slow), (simple, fast) = timed(sim), timed(twin)
                spent.append((slow, fast))
                off.append(np.abs(full - simple))
            if sim.advance(expert.act(sim)):
                break
    (slow, fast), off = np.median(spent[1:], axis=0), np.array(off)     # (n, 2, 3, size, size)
    mean, far = off.mean(axis=(0, 2, 3, 4)), (off.max(axis=2) > 30).mean(axis=(0, 2, 3))
    return {**faces, "vertices_full": 3 * faces["faces_full"],
            "vertices_simple": 3 * faces["faces_simple"],
            "ms_full": round(slow, 1), "ms_simple": round(fast, 1),
            "ratio": round(slow / fast, 2), "mean_agent": round(mean[0], 2),
            "mean_hand": round(mean[1], 2), "far_agent": round(far[0], 4),
            "far_hand": round(far[1], 4)}


def main():
    parser = flags.Parser(__doc__)
    parser.add_argument("--scenes", nargs="+", metavar="SUITE:TASK",
                        default=["libero_object:0", "libero_spatial:0", "libero_goal:4",
                                 "libero_10:0"], help="tasks that the scripted expert can do")
    parser.add_argument("--sizes", type=flags.number(int, 48, 1024), nargs="+", default=[64, 128],
                        help="height and width of the images")
    parser.add_argument("--out", type=Path, default="results/benchmark", help="folder of the table")
    args = parser.parse_args()
    parser.make_folder("--out", args.out)
    gl, path = libero.find_gl(), args.out / "meshes.csv"
    told = common.origin("results/benchmark/meshes.py")
    path.unlink(missing_ok=True)
    for scene in args.scenes:
        suite, task = scene.split(":")
        for size in args.sizes:
            row = {"scene": f"{suite}, task {task}", "size": size,
                   **fresh(compare, suite, int(task), gl, size)}
            for meshes in MESHES:
                row[f"mib_{meshes}"] = fresh(memory, suite, int(task), gl, size, meshes)
            log_row(path, {**row, **told})
            print(*(f"{key}={value}" for key, value in row.items()), flush=True)
    print(f"RESULT rows={len(args.scenes) * len(args.sizes)} saved={path}")


if __name__ == "__main__":
    main()
