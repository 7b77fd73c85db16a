"""04 on the real simulator: episodes that do not leak, the scripted expert, and clear errors."""

import importlib

import numpy as np
import pytest

from conftest import one_clear_line, run_script

libero = importlib.import_module("04_train_libero")


@pytest.fixture(scope="module")
def sim():
    return libero.LiberoSim("libero_object", 0)


def play(sim, seed, actions):
    sim.reset(seed)
    states = [sim.observe().copy()]
    for action in actions:
        sim.advance(action)
        states.append(sim.observe().copy())
    return np.stack(states)


def test_an_episode_does_not_depend_on_the_one_before(sim):
    actions = np.random.default_rng(0).uniform(-1, 1, (15, 7))
    first = play(sim, 3, actions)
    other = play(sim, 4, actions[::-1])
    assert np.array_equal(play(sim, 3, actions), first)
    assert not np.array_equal(other[0], first[0])


def test_the_expert_solves_official_starts(sim):
    for seed in (0, 17):
        sim.reset(seed)
        expert = libero.ScriptedExpert(sim, np.random.default_rng(seed))
        assert any(sim.advance(expert.act(sim)) for _ in range(150))


def test_advance_equals_liberos_own_step(sim):
    """Sixty random actions: joint positions equal to robosuite's env.step to the last bit."""
    actions = np.random.default_rng(1).uniform(-1, 1, (60, 7))
    sim.reset(5)
    start = sim.env.sim.get_state().flatten()
    for action in actions:
        sim.advance(action)
    fast = sim.env.sim.data.qpos.copy()
    sim.reset(5)
    assert np.array_equal(sim.env.sim.get_state().flatten(), start)
    del sim.controller.update  # robosuite's own again, until the next reset
    sim.controller.new_update, sim.gripper.current_action = True, sim.grip.copy()
    for action in actions:
        sim.env.step(action)
    assert np.array_equal(sim.env.sim.data.qpos, fast)


@pytest.mark.parametrize("flags, words", [
    (["--suite", "libero_objects"], ["--suite"]),
    (["--tasks", "10"], ["--tasks"]),
    (["--num-demos", "0"], ["--num-demos"]),
    (["--suite", "libero_10"], ["--tasks 0", "--suite"]),
    (["--eval-only", "nothing.pt"], ["--eval-only"]),
])
def test_bad_input_gets_one_line_naming_the_flag(tmp_path, flags, words):
    line = one_clear_line(run_script("04_train_libero.py", *flags, "--out", "new", cwd=tmp_path,
                                     ok=False))
    assert all(word in line for word in words)
    assert not (tmp_path / "new").exists()
