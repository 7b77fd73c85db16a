"""envs/my_world.py, the example of a world of one's own: it plays by its rules, its expert arrives,
and the whole script runs, in a process and in this one."""

import numpy as np
import pytest

import conftest  # noqa: F401  (the way to envs)
from envs import my_world
from test_envs_workers import in_process

SEEDS = [3, 1, 4, 15, 9, 2, 6]


def slow_episode(seed, chunk_of):
    """One episode with scalars -> (success, place before each chunk, how many actions ran)."""
    place, steps, places, ran = list(np.random.default_rng(seed).uniform(-1, 1, 2)), 0, [], []
    while True:
        places.append(place)
        for i, action in enumerate(chunk_of([np.float32(z) for z in place])):
            place = [z + 0.2 * min(max(a, -1), 1) for z, a in zip(place, action)]
            steps += 1
            if max(map(abs, place)) < 0.1 or steps == 12:
                return max(map(abs, place)) < 0.1, places, [*ran, i + 1]
        ran.append(4)


def check_world(act, chunk_of):
    success, rows = in_process(my_world.make_env, 3).play(act, SEEDS)
    for e, seed in enumerate(SEEDS):
        ok, places, ran = slow_episode(seed, chunk_of)
        own = rows["episode"] == e
        assert success[e] == ok
        np.testing.assert_allclose(rows["state"][own], places, atol=1e-5)
        assert rows["mask"][own].sum(1).tolist() == ran
    return success


def test_the_world_plays_by_its_rules():
    """Too fast and too slow, too: actions are cut, and time runs out."""
    outcomes = set()
    for speed in (3.0, 0.6, 0.1):
        def chunk_of(place):
            return [[-speed * z for z in place]] * 4

        def act(obs):
            return (-speed * obs["state"])[:, None].repeat(1, 4, 1), {}

        outcomes |= set(check_world(act, chunk_of).tolist())
    assert outcomes == {True, False}


def test_the_expert_arrives_and_its_chunks_are_recorded():
    success, rows = in_process(my_world.make_env, 2).play(my_world.expert, SEEDS)
    assert success.all() and rows["chunk"].shape[1:] == (4, 2)
    assert rows["chunk"].abs().max() <= 1


def test_the_script_runs(monkeypatch, capsys):
    """A simulator in a process of its own; the clone is told, then every fifth iteration."""
    seeds = my_world.episode_seeds
    monkeypatch.setattr(my_world, "episode_seeds", lambda split, count, **which: seeds(
        split, min(count, 10), **which))
    my_world.main(num_envs=1, num_demos=2, sft_steps=5, iterations=5, episodes=8)
    sft, fifth, last = capsys.readouterr().out.strip().splitlines()
    assert sft.startswith("SFT: success ") and fifth.startswith("iteration 5: success ")
    word, success, episodes = last.split()
    assert (word, episodes) == ("RESULT", "episodes=40")
    assert success == "success=" + fifth.split()[-1]


@pytest.mark.parametrize("place, outcome", [([0.25, 0.05], True), ([0.35, 0.0], False)])
def test_success_is_a_place_near_the_origin(place, outcome):
    world = my_world.Reach()
    world.reset(0)
    world.place = np.array(place)
    assert world.advance(np.array([-5.0, 0.0])) == outcome     # 0.2 at most
