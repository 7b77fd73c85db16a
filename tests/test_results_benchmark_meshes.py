"""results/benchmark/meshes.py: what is counted, and a row of its table on the real simulator."""

import importlib
from types import SimpleNamespace

import numpy as np
import pytest

import conftest  # noqa: F401  (the way to the scripts)
from test_envs_libero import gl  # noqa: F401  (a fixture)

meshes = importlib.import_module("results.benchmark.meshes")


def test_faces_are_counted_as_often_as_they_are_drawn():
    """Mesh 0 is in two geoms, mesh 1 only in a collision shape, mesh 2 nowhere; a box has none."""
    model = SimpleNamespace(mesh_facenum=np.array([10, 100, 1000]),
                            geom_type=np.array([7, 7, 7, 6]), geom_group=np.array([1, 1, 0, 1]),
                            geom_dataid=np.array([0, 0, 1, -1]))
    assert meshes.faces_drawn(model) == 20


@pytest.mark.sim
def test_simple_meshes_are_several_times_cheaper(gl):  # noqa: F811
    """Where a GPU draws there is little to save."""
    row = meshes.fresh(meshes.compare, "libero_object", 0, gl, 64, 21)
    assert row["faces_simple"] < row["faces_full"] / 5
    assert 0 < row["mean_agent"] < 4 and 0 < row["far_hand"] < 0.05
    if meshes.libero.in_software(gl):
        assert row["ratio"] > 3, row
