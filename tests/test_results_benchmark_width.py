"""results/benchmark_width/run.py: whole chunks are played step by step; where things are."""

import importlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conftest import Scripted, wrong_call

SCRIPT = "results/benchmark_width/run.py"
width = importlib.import_module("results.benchmark_width.run")


class Rail:
    """Three simulators whose state is the sum of the actions; an episode ends at 5 or at its limit,
    the second one sooner."""

    num_envs = 3

    def play(self, act, seeds):
        place, rows = np.zeros(3), []
        over = np.zeros(3, bool)
        while not over.all():
            obs = {"state": torch.tensor(place[:, None], dtype=torch.float32)}
            actions, _ = act(obs)
            assert actions.shape == (3, 1, 1)
            rows += [(e, place[e]) for e in range(3) if not over[e]]
            place = place + actions[:, 0, 0].numpy() * ~over
            over = over | (place >= 5) | (np.arange(3) == 1) & (place >= 2)
        return place >= 5, {"state": torch.tensor([[p] for _, p in rows]),
                            "episode": torch.tensor([e for e, _ in rows])}


def test_a_chunk_is_played_to_its_end_one_control_step_at_a_time():
    """Two actions a chunk, each held for two steps: 1, 1, 0, 0 and again. Every step is seen."""
    policy = Scripted(lambda state: np.tile([[[1.0], [0.0]]], (len(state), 1, 1)), 2, 1)
    args = SimpleNamespace(num_steps=4, action_repeat=2, max_steps=16)
    states, success = width.paths(policy, args, Rail(), 0, episodes=4)
    assert states.shape == (4, 17, 1) and success.tolist() == [True, False, True, True]
    seen = states[0, :, 0]
    assert seen[:10].tolist() == [0, 1, 2, 2, 2, 3, 4, 4, 4, pytest.approx(np.nan, nan_ok=True)]
    assert np.isnan(seen[9:]).all() and np.isnan(states[1, 3:]).all()


def test_things_are_where_the_hand_sees_them():
    state = np.arange(60, dtype=np.float32)
    thing, goal = width.places("libero", state)
    assert thing.tolist() == [0 + 6, 1 + 7, 2 + 8] and goal.tolist() == [0 + 12, 1 + 13, 2 + 14]
    first = width.maniskill.PROPRIO
    thing, goal = width.places("maniskill", state)
    assert thing.tolist() == [i + first + i for i in range(3)]
    assert goal.tolist() == [i + first + 3 + i for i in range(3)]


@pytest.mark.parametrize("flags, told", [
    (["libero"], "--before"), (["robocasa"], "robocasa"),
    (["libero", "--before", "none.pt", "--after", "none.pt"], "none.pt")])
def test_a_wrong_call_is_told_in_one_line(flags, told):
    assert told in wrong_call(SCRIPT, *flags)
