"""results/libero_failures/run.py: what a path of states is called, and a run on the simulator."""

import importlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conftest import result_line, run_process, wrong_call
from policies import build_policy
from policies.small import RobotPolicy
from tools.run import save

SCRIPT = "results/libero_failures/run.py"
failures, common, robot = map(importlib.import_module, (
    "results.libero_failures.run", "results.common", "04_train_libero"))


def path(heights, distances):
    """States of a hand that rises with the thing it holds and nears a goal on the table."""
    states = np.zeros((len(heights), 18))
    states[:, :3] = [0.1, 0.2, 1.0]
    states[:, 6:9] = [0.01, 0, -0.1]
    states[:, 2] += heights
    states[:, 12] = 0.01 + np.asarray(distances)
    states[:, 14] = -0.1 - np.asarray(heights)
    return states


@pytest.mark.parametrize("heights, distances, fate", [
    ([0, 0.02, 0.02], [0.3, 0.01, 0.01], "missed"),       # pushed to the goal, never raised
    ([0, 0.10, 0], [0.3, 0.2, 0.01], "dropped"),          # it fell, and rolled there
    ([0, 0.10, 0.1], [0.3, 0.2, 0.04], "late")])
def test_what_became_of_the_thing(heights, distances, fate):
    assert failures.fate(path(heights, distances), False) == fate
    assert failures.fate(path(heights, distances), True) == "success"


def test_a_wrong_call_is_told_in_one_line(tmp_path):
    assert "no such file" in wrong_call(SCRIPT, str(tmp_path / "none.pt"))
    for flags in {"task": "PickCube-v1", "obs": "state"}, {"suite": "libero_goal", "obs": "rgb"}:
        save(tmp_path / "other.pt", RobotPolicy(1, 7, state_dim=18), SimpleNamespace(flags=flags))
        assert "--obs state" in wrong_call(SCRIPT, str(tmp_path / "other.pt"))


@pytest.mark.sim
def test_a_row_for_each_task_and_noise(tmp_path):
    args = robot.parse_args(["--tasks", "0", "1", "--out", str(tmp_path)])
    policy = build_policy(robot.policy_config(args))
    policy.fit_normalisation({"state": torch.randn(9, args.state_dim)}, torch.rand(9, 1, 7))
    save(tmp_path / "clone.pt", policy, args)
    done = run_process(SCRIPT, "clone.pt", "--episodes", "1", "--num-envs", "1", "--out",
                      "found/rows.csv", cwd=tmp_path)
    assert result_line(done)["rows"] == 4
    rows = common.read(tmp_path / "found/rows.csv")
    assert [(row["noise_level"], row["task"]) for row in rows] == [
        ("0", "0"), ("0", "1"), ("0.5", "0"), ("0.5", "1")]
    assert all(sum(float(row[kind]) for kind in ("success", "missed", "dropped", "late")) == 1
               for row in rows)
