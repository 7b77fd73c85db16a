"""Scenes that are cheap to draw: LIBERO's meshes with a tenth of their faces.

    with simple_meshes(model):                           # of mujoco
        renderer = mujoco.Renderer(model, 128, 128)

Software pays for every triangle, and a scene of LIBERO has 300,000 of them for 128 x 128 pixels. A
renderer copies the meshes when it is made and never looks at the model's again. So the model's
lists of faces are shortened, the renderer is made, and the lists are put back: physics never meets
a simple mesh, and the model is what it was to the last bit.

A simple mesh has the vertices of its original and fewer faces: indices (3, faces, 3) of the three
corners' vertices, normals and texture coordinates. fast-simplification finds them by collapsing
edges where the surface is flat (Garland and Heckbert 1997). It takes 3 seconds for a scene, once:
then they lie in ~/.cache/pi-stepnft, a file a mesh, named by a hash of what it was made from.
"""

import contextlib
import hashlib
import os
from collections import namedtuple
from pathlib import Path

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

FEW, MOST = 300, 6000   # meshes of fewer faces stay as they are; a simple one should not have more
TOLERANCE = 0.003       # metres, as the quadrics of all collapses add up; the surface moves less
WELD = 1e-4             # metres: vertices that are closer are one
TURN = 0.03             # metres that a normal's place may be off, rather than turned by 1 rad
VERSION = 1             # of what `simplify` makes, part of the names of the files

# vertices (V, 3) in metres, normals (N, 3), uvs (T, 2) texture coordinates or None; the others are
# the indices (F, 3) that each face has of them
Mesh = namedtuple("Mesh", "vertices normals uvs face face_normal face_uv")


# ------------------------------------------------------------------------------------------------
# One mesh


def directions(points, faces):
    """Unit vectors (F, 3) at right angles to the faces."""
    a, b, c = np.moveaxis(points[faces], 1, 0)
    across = np.cross(b - a, c - a)
    return across / np.maximum(np.linalg.norm(across, axis=1, keepdims=True), 1e-20)


def has_area(faces):
    """Whether a face's corners are three (F,)."""
    a, b, c = faces.T
    return (a != b) & (b != c) & (c != a)


def texture_charts(wedges):
    """The connected piece of the texture (F,) that each face shows. wedges (F, 3): the numbers of
    its corners, where equal ones share their place and their texture coordinates."""
    a, b, c = wedges.T
    links = coo_array((np.ones(2 * len(a)), (np.append(a, b), np.append(b, c))),
                      shape=(wedges.max() + 1,) * 2)
    return connected_components(links, directed=False)[1][a]


def rims(faces, wedges):
    """Edges (E, 2) at which the surface ends or two pieces of the texture meet, and a face (E,) of
    each."""
    sides = [[0, 1], [1, 2], [2, 0]]
    edges, ends = (np.concatenate([each[:, side] for side in sides]) for each in (faces, wedges))
    turned = edges[:, 0] > edges[:, 1]
    edges[turned], ends[turned] = edges[turned, ::-1], ends[turned, ::-1]
    _, beside = np.unique(edges, axis=0, return_counts=True)                     # faces of an edge
    kinds, row = np.unique(np.hstack([edges, ends]), axis=0, return_index=True)
    _, first, views = np.unique(kinds[:, :2], axis=0, return_index=True, return_counts=True)
    found = first[(beside == 1) | (views > 1)]       # more views: its faces disagree on its ends
    return kinds[found, :2], row[found] % len(faces)


def collapse(points, faces, tolerance, most):
    """-> for each point (P,) the number of the one it ends up in, and where those are (Q, 3)."""
    import fast_simplification as library
    # With agg=0 the library collapses every edge whose error, squared, is below 1e-9.
    scaled = points * np.sqrt(1e-9) / tolerance
    _, left, steps = library.simplify(scaled, faces, target_count=4, agg=0.0,
                                      return_collapses=True)
    if len(left) > most:
        _, left, further = library.simplify(scaled, faces, target_count=most,
                                            return_collapses=True)
        # a room of open sheets is locked by its borders, and only gets holes
        steps = further if len(left) <= most else steps
    moved, _, place = library.replay_simplification(scaled, faces, steps)
    return place, moved * tolerance / np.sqrt(1e-9)


def simplify(mesh, tolerance=TOLERANCE, most=MOST):
    """-> (3, faces, 3) int32: fewer faces of a Mesh, as the module's docstring says."""
    _, first, welded = np.unique(np.round(mesh.vertices / WELD), axis=0, return_index=True,
                                 return_inverse=True)
    points, faces = mesh.vertices[first].astype(float), welded.ravel()[mesh.face].astype(np.int32)
    real = has_area(faces)
    faces, face_normal, face_uv = faces[real], mesh.face_normal[real], mesh.face_uv[real]
    facing = directions(points, faces)

    wedges = faces
    if mesh.uvs is not None:
        uv = mesh.uvs[face_uv].astype(float)                                        # (F, 3, 2)
        corners = np.hstack([faces.reshape(-1, 1), uv.reshape(-1, 2)])
        wedges = np.unique(corners, axis=0, return_inverse=True)[1].reshape(-1, 3)
    # A face across a seam would show a wrong piece of the texture, and a sheet would shrink. So a
    # fin stands upright on each rim: it has free edges, and the library collapses these only along
    # themselves.
    rim, beside = rims(faces, wedges)
    a, b = points[rim[:, 0]], points[rim[:, 1]]
    tips = (a + b) / 2 + facing[beside] * np.linalg.norm(b - a, axis=1, keepdims=True)
    fins = np.column_stack([rim, len(points) + np.arange(len(rim))])
    every_point = np.concatenate([points, tips])
    every_face = np.concatenate([faces, fins]).astype(np.int32)

    place, moved = collapse(every_point, every_face, tolerance, most)
    place = place[:len(points)]
    home = np.flatnonzero(has_area(place[faces]))      # the original face that each new one was
    # a vertex of the original in place of the new one: the nearest that ended up there
    order = np.lexsort((np.linalg.norm(points - moved[place], axis=1), place))
    places, nearest = np.unique(place[order], return_index=True)
    stands_for = np.zeros(len(moved), int)
    stands_for[places] = order[nearest]
    new = stands_for[place[faces[home]]]                                            # (faces, 3)

    def look_up(known, asked):
        """Of the original's corners, the nearest (faces, 3) in these numbers."""
        return cKDTree(np.hstack(known)).query(np.hstack(asked))[1].reshape(-1, 3)

    def each(values):
        """A row of a face -> a row for each of its three corners."""
        return np.repeat(np.reshape(values, (len(values), -1)), 3, axis=0)

    old_corners, new_corners = points[faces].reshape(-1, 3), points[new].reshape(-1, 3)
    normal = look_up([old_corners, TURN * each(facing)],
                     [new_corners, TURN * each(directions(points, new))])
    textured = normal
    if mesh.uvs is not None:                           # first the same piece, then the same place
        chart = 1e3 * texture_charts(wedges)
        textured = look_up([each(chart), 100 * old_corners, uv.reshape(-1, 2)],
                           [each(chart[home]), 100 * new_corners, each(uv[home].mean(axis=1))])
    indices = first[new], face_normal.ravel()[normal], face_uv.ravel()[textured]
    return np.stack(indices).astype(np.int32)


# ------------------------------------------------------------------------------------------------
# The cache


def cache_folder():
    return Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME", "~/.cache"))) / "pi-stepnft"


def belongs(indices, mesh):
    """Whether an array can be the indices of a simple mesh of this one."""
    counts = [len(values) for values in mesh[:3] if values is not None]
    return (indices.dtype == np.int32 and indices.shape[::2] == (3, 3)
            and indices.shape[1] <= len(mesh.face) and indices.min(initial=0) >= 0
            and all(rows.max(initial=0) < count for rows, count in zip(indices, counts)))


def cached(mesh):
    """`simplify`, or what it once made of the same mesh. Files are whole or not there, and
    processes that make one at the same time write the same. One that is broken is made anew; a
    folder that cannot be written does no harm."""
    key = hashlib.sha256(repr((VERSION, TOLERANCE, MOST, WELD, TURN)).encode())
    for values in mesh:
        key.update(b"none" if values is None else np.ascontiguousarray(values))
    path = cache_folder() / f"{key.hexdigest()[:32]}.npy"
    with contextlib.suppress(OSError, ValueError, EOFError):
        indices = np.load(path)
        if belongs(indices, mesh):
            return indices
    indices, part = simplify(mesh), path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            np.save(file, indices)
        os.replace(part, path)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink()
    return indices


# ------------------------------------------------------------------------------------------------
# A model


def drawn_meshes(model):
    """The numbers of the meshes that are seen -> whether they have a texture. Collision shapes
    (group 0) are not seen."""
    drawn, is_mesh = {}, model.geom_type == 7  # mujoco.mjtGeom.mjGEOM_MESH
    for geom in np.flatnonzero(is_mesh & (model.geom_group != 0)):
        mesh, material = int(model.geom_dataid[geom]), model.geom_matid[geom]
        textured = material >= 0 and (model.mat_texid[material] >= 0).any()
        drawn[mesh] = drawn.get(mesh, False) or bool(textured)
    return drawn


def mesh_of(model, number, textured):
    """A Mesh of the model's; its faces are views of the model's own."""
    def part(name, count):
        start = getattr(model, f"mesh_{name}adr")[number]
        return slice(start, start + getattr(model, f"mesh_{count}num")[number])

    faces, uvs = part("face", "face"), part("texcoord", "texcoord")
    return Mesh(model.mesh_vert[part("vert", "vert")], model.mesh_normal[part("normal", "normal")],
                model.mesh_texcoord[uvs] if textured and uvs.stop > uvs.start else None,
                model.mesh_face[faces], model.mesh_facenormal[faces],
                model.mesh_facetexcoord[faces])


@contextlib.contextmanager
def simple_meshes(model):
    """A context in which the model's large meshes are simple: for a renderer to be made in."""
    lists = model.mesh_facenum, model.mesh_face, model.mesh_facenormal, model.mesh_facetexcoord
    originals = [values.copy() for values in lists]
    try:
        for number, textured in drawn_meshes(model).items():
            mesh = mesh_of(model, number, textured)
            if len(mesh.face) > FEW:
                indices = cached(mesh)
                count = model.mesh_facenum[number] = indices.shape[1]
                for faces, simple in zip((mesh.face, mesh.face_normal, mesh.face_uv), indices):
                    faces[:count] = simple
        yield
    finally:
        for values, original in zip(lists, originals):
            values[:] = original
