"""envs/libero_meshes.py: simple meshes keep the surface and its texture, are made once, change no
bit of physics, and change few pixels."""

import functools
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from conftest import ROOT
from envs import libero_import, libero_meshes
from test_envs_libero import gl  # noqa: F401  (a fixture)

RADIUS = 0.05                                                        # metres, a tin


@functools.cache
def sphere(rings=60, columns=120):
    """A Mesh of 14,000 faces that wears a map of the world: longitude and latitude, 0 to 1. Like
    LIBERO's scans each face has vertices of its own."""
    u, v = np.meshgrid(np.linspace(0, 1, columns + 1), np.linspace(0, 1, rings + 1))
    uvs = np.stack([u, v], axis=-1).reshape(-1, 2)
    turn, tilt = 2 * np.pi * (uvs[:, 0] % 1), np.pi * uvs[:, 1]
    normals = np.column_stack([np.sin(tilt) * np.cos(turn), np.sin(tilt) * np.sin(turn),
                               np.cos(tilt)])
    corner = np.arange((rings + 1) * (columns + 1)).reshape(rings + 1, -1)
    a, b, c, d = corner[:-1, :-1], corner[1:, :-1], corner[1:, 1:], corner[:-1, 1:]
    faces = np.concatenate([np.stack([a, b, c], axis=-1)[:-1].reshape(-1, 3),
                            np.stack([a, c, d], axis=-1)[1:].reshape(-1, 3)]).astype(np.int32)
    own = np.arange(faces.size, dtype=np.int32).reshape(-1, 3)
    return libero_meshes.Mesh(RADIUS * normals[faces.ravel()], normals.astype(np.float32),
                              uvs.astype(np.float32), own, faces, faces)


def volume(corners):
    """What closed faces (F, 3, 3) hold; a hole or a face that is turned over would change it."""
    return np.linalg.det(corners).sum() / 6


@pytest.mark.parametrize("textured", [True, False])
def test_a_dense_sphere_gets_fewer_faces_and_stays_a_sphere(textured):
    mesh = sphere() if textured else sphere()._replace(uvs=None)
    face, face_normal, _ = libero_meshes.simplify(mesh)
    assert 100 < len(face) < len(mesh.face) / 5
    corners = mesh.vertices[face]                                                   # (F, 3, 3)
    inside = RADIUS - np.linalg.norm(corners.mean(axis=1), axis=1)
    assert inside.max() < libero_meshes.TOLERANCE / 2
    assert volume(corners) == pytest.approx(volume(mesh.vertices[mesh.face]), rel=0.05)
    along = (mesh.normals[face_normal] * corners).sum(axis=2) / RADIUS  # cosine to the true normal
    assert np.degrees(np.arccos(along.clip(-1, 1).min())) < 25


def test_the_texture_stays_in_its_place():
    """On both sides of the seam: there the same vertex has u = 0 in one face, u = 1 in the next."""
    mesh = sphere()
    face, _, face_uv = libero_meshes.simplify(mesh)
    (x, y, z), (u, v) = np.moveaxis(mesh.vertices[face], 2, 0), np.moveaxis(mesh.uvs[face_uv], 2, 0)
    np.testing.assert_allclose(np.arccos(z / RADIUS) / np.pi, v, atol=1e-3)
    off = (np.arctan2(y, x) / (2 * np.pi) - u + 0.5) % 1 - 0.5     # turns, from the right longitude
    poles = np.hypot(x, y) < 1e-3 * RADIUS                         # where there is no longitude
    assert np.abs(off[~poles]).max() < 0.02                        # a few stop short at the seam
    assert (np.abs(off[~poles]) > 1e-3).mean() < 0.03
    assert (np.ptp(u, axis=1)[~poles.any(axis=1)] < 0.5).all()     # none goes the long way round
    assert (u == 0).any() and (u == 1).any()


def test_a_flat_sheet_keeps_its_outline():
    """An L of 5,400 faces, as walls and tables have open edges: its rim alone needs vertices."""
    x, y = np.meshgrid(np.linspace(0, 1, 61), np.linspace(0, 1, 61))
    points = np.stack([x, y, 0 * x], axis=-1).reshape(-1, 3)
    corner = np.arange(61 * 61).reshape(61, 61)
    a, b, c, d = corner[:-1, :-1], corner[:-1, 1:], corner[1:, 1:], corner[1:, :-1]
    faces = np.concatenate([np.stack([a, b, c], axis=-1), np.stack([a, c, d], axis=-1)])
    faces = faces.reshape(-1, 3).astype(np.int32)
    faces = faces[(points[faces].mean(axis=1)[:, :2] < 0.5).any(axis=1)]
    up = np.tile([0, 0, 1.0], (len(points), 1))
    simple, _, _ = libero_meshes.simplify(
        libero_meshes.Mesh(points, up, None, faces, faces, faces))
    a, b, c = np.moveaxis(points[simple], 1, 0)
    area = np.cross(b - a, c - a)[:, 2].sum() / 2                  # a face turned over counts < 0
    assert len(simple) < 20 and area == pytest.approx(0.75, abs=1e-6)


# ------------------------------------------------------------------------------------------------
# The cache


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "pi-stepnft"


def counted(monkeypatch):
    """The list of the meshes that are simplified from now on."""
    made, simplify = [], libero_meshes.simplify
    monkeypatch.setattr(libero_meshes, "simplify", lambda mesh: made.append(mesh) or simplify(mesh))
    return made


def test_a_mesh_is_made_once(folder, monkeypatch):
    made, mesh = counted(monkeypatch), sphere()
    first, again = libero_meshes.cached(mesh), libero_meshes.cached(mesh)
    assert len(made) == 1 and np.array_equal(first, again)
    for other in (mesh._replace(vertices=mesh.vertices * 1.01), mesh._replace(uvs=None)):
        libero_meshes.cached(other)                     # not the same mesh
    monkeypatch.setattr(libero_meshes, "TOLERANCE", 0.01)
    libero_meshes.cached(mesh)                          # nor the same wish
    assert len(made) == len(list(folder.iterdir())) == 4


@pytest.mark.parametrize("harm", ["cut", "empty", "other", "beyond", "pickle"])
def test_a_broken_file_is_made_anew(harm, folder, monkeypatch):
    mesh = sphere()
    right = libero_meshes.cached(mesh)
    file, = folder.iterdir()
    whole = file.read_bytes()
    if harm in ("cut", "empty"):
        file.write_bytes(whole[:1000 * (harm == "cut")])
    else:
        np.save(file, {"other": right[0], "beyond": right + 40_000,
                       "pickle": np.array([None])}[harm])
    made = counted(monkeypatch)
    assert np.array_equal(libero_meshes.cached(mesh), right)
    assert len(made) == 1 and file.read_bytes() == whole


def test_a_folder_that_cannot_be_written_does_no_harm(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(libero_meshes.cached(sphere())) == 3


TWICE = """
import sys
sys.path.insert(0, "tests")
from envs import libero_meshes
from test_envs_libero_meshes import sphere
mesh = sphere()
print("ready", flush=True)
sys.stdin.readline()
print(libero_meshes.cached(mesh).sum())
"""


def test_two_processes_at_once_leave_one_whole_file(folder):
    start = functools.partial(subprocess.Popen, [sys.executable, "-c", TWICE], cwd=ROOT, text=True,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    both = [start(), start()]
    assert all(process.stdout.readline() == "ready\n" for process in both)
    for process in both:
        process.stdin.write("go\n")
        process.stdin.flush()
    told = {process.communicate()[0] for process in both}
    assert len(told) == 1 and len(list(folder.iterdir())) == 1
    assert told == {f"{libero_meshes.cached(sphere()).sum()}\n"}


# ------------------------------------------------------------------------------------------------
# On the simulator


def test_drivers_that_draw_in_software_are_known(monkeypatch):
    for name, slow in (("llvmpipe (LLVM 15.0.6, 256 bits)", True), ("softpipe", True),
                       ("NVIDIA H100/PCIe/SSE2", False), ("", False)):
        told = subprocess.CompletedProcess([], 0, f"b'{name}'\n", "")
        monkeypatch.setattr(libero_import, "attempt", lambda *asked: told)
        assert libero_import.in_software("egl") == slow


# A worker's two simulators of a task, one with simple meshes, play the expert's episode.
COMPARE = """
import json, sys
import numpy as np
from envs import libero
gl, suite, task = sys.argv[1], sys.argv[2], int(sys.argv[3])
full, simple = sims = [libero.LiberoSim(suite, task, "rgb", gl=gl, size=128, meshes=meshes)
                       for meshes in ("full", "simple")]

def fields(model):
    names = [name for name in dir(model) if not name.startswith("_")]
    return {name: value.tobytes() for name in names
            if isinstance(value := getattr(model, name), np.ndarray)}

models = [fields(sim.model) for sim in sims]
different = [name for name in models[0] if models[0][name] != models[1][name]]
experts, states, images = [], [[], []], [[], []]
for sim in sims:
    sim.reset(1007)
    experts.append(libero.ScriptedExpert(sim, np.random.default_rng(0)))
for step in range(200):
    done = []
    for sim, expert, seen, shown in zip(sims, experts, states, images):
        if step % 20 == 0:
            shown.append(sim.look())
        done.append(sim.advance(expert.act(sim)))
        seen.append(np.concatenate([sim.data.qpos, sim.data.qvel]))
    if any(done):
        break
full, simple = np.array(images).astype(int)
off = np.abs(full - simple)                                        # (images, 2, 3, 128, 128)
print(json.dumps(dict(
    fields=len(models[0]), different=different, steps=step, done=done,
    equal=bool((np.array(states[0]) == np.array(states[1])).all()),
    mean=off.mean((0, 2, 3, 4)).tolist(), far=(off.max(2) > 30).mean((0, 2, 3)).tolist())))
"""


@pytest.mark.sim
@pytest.mark.parametrize("suite, task", [("libero_object", 0), ("libero_goal", 4),
                                         ("libero_spatial", 0)])
def test_no_bit_of_physics_changes_and_few_pixels_do(suite, task, gl):  # noqa: F811
    """Measured: of 255, the agent's camera is off by 1.0 to 1.8 on average, the hand's by 2.3 to
    2.7; by more than 30 in 0.7 to 2.0 and 1.6 to 2.9 % of the pixels, most of them on edges and in
    the weave of the basket."""
    run = subprocess.run([sys.executable, "-c", COMPARE, gl, suite, str(task)], cwd=ROOT, text=True,
                         capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr[-2000:]
    told = json.loads(run.stdout.strip().splitlines()[-1])
    assert told["fields"] > 300 and told["different"] == []
    assert told["equal"] and told["done"] == [True, True] and told["steps"] > 50
    assert 0.1 < min(told["mean"]) and max(told["mean"]) < 4, told    # they do differ
    assert max(told["far"]) < 0.04, told
