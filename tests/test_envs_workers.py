"""envs/workers.py: chunks, seeds and rows of tiny simulators, in real processes and, where that
changes nothing, in this one; against scalar replays of the same simulators."""

import functools
import math
import os
import signal
import tempfile
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

import conftest  # noqa: F401  (the way to envs, for the worker processes as well)
from envs import workers


# ------------------------------------------------------------------------------------------------
# A simulator behind chunks


class Countdown:
    """A simulator that succeeds at the step its seed says, and counts how often it is observed."""

    def reset(self, seed):
        self.seed, self.step, self.looks = seed, 0, 0

    def advance(self, action):
        self.step += 1
        assert action.shape == (1,)
        return self.step == self.seed

    def observe(self):
        self.looks += 1
        return {"state": np.array([self.step, self.seed], np.float32)}


def state_space(size):
    return gym.spaces.Dict({"state": gym.spaces.Box(-np.inf, np.inf, (size,))})


def countdown_env(max_steps=10, horizon=4, action_repeat=1):
    return workers.ChunkEnv(Countdown, state_space(2), 1, max_steps, horizon, action_repeat)


def check_chunks(horizon, repeat):
    """Success at step 1 to 12 of at most 10, so the last two time out; the 10th just makes it."""
    for arrival in range(1, 13):
        env, step, chunks = countdown_env(10, horizon, repeat), 0, 0
        obs, _ = env.reset(seed=arrival)
        assert env.observation_space.contains(obs)
        terminated = truncated = False
        while not (terminated or truncated):
            assert chunks < 12, "it never ends"
            obs, reward, terminated, truncated, info = env.step(np.zeros((horizon, 1)))
            end = min(step + horizon * repeat, arrival, 10)
            assert info["executed"] == -(-(end - step) // repeat) and obs["state"][0] == end
            assert terminated == info["success"] == (reward == 1) == (end == arrival)
            assert truncated == (end == 10 and arrival != 10)
            step, chunks = end, chunks + 1
        assert env.sim.looks == 1 + chunks                      # observed once a chunk, not a step
        *_, info = env.step(np.zeros((horizon, 1)))             # over: nothing moves any more
        assert info == {"executed": 0, "success": False} and env.sim.step == step
        assert env.sim.looks == 1 + chunks


@pytest.mark.parametrize("horizon, repeat", [(1, 1), (4, 1), (5, 1), (1, 4), (2, 3)])
def test_a_chunk_stops_at_success_or_at_the_time_limit(horizon, repeat):
    check_chunks(horizon, repeat)


def test_an_action_is_held_for_several_control_steps():
    env, seen = countdown_env(100, 2, 3), []
    env.reset(seed=50)
    env.sim.advance = lambda action: seen.append(float(action[0])) or False
    env.step(np.array([[1.0], [2.0]]))
    assert seen == [1, 1, 1, 2, 2, 2]


class Filmed(Countdown):
    """Its picture grows brighter with the time; the names of its episodes tell their seeds."""

    def reset(self, seed):
        super().reset(seed)
        self.name = f"from_{seed}"

    def look(self):
        return np.full((16, 32, 3), 20 * self.step, np.uint8)


def check_films():
    """Episodes one after the other in one simulator, each with a film of its own."""
    ends = ((5, 5, "success"), (10, 10, "success"), (12, 10, "failure"))
    written = {}
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        import imageio
        patch.setattr(imageio, "mimwrite", lambda path, frames, fps: written.update(
            {path: ([frame.mean() for frame in frames], fps)}))
        new = Path(folder) / "new"
        env = workers.ChunkEnv(Filmed, state_space(2), 1, 10, 2, 3, film=new)
        for arrival, _, _ in ends:
            env.reset(seed=arrival)
            for _ in range(3):                                  # the last one is after the end
                env.step(np.zeros((2, 1)))
        assert new.is_dir()
    assert written == {new / f"from_{arrival}_{outcome}.mp4": (
        [20 * step for step in range(1, frames + 1)], 20) for arrival, frames, outcome in ends}


def test_a_film_has_a_picture_of_each_control_step_and_says_how_it_ended(tmp_path):
    check_films()
    import imageio
    env = workers.ChunkEnv(Filmed, state_space(2), 1, 10, 2, 3, film=tmp_path / "new")
    for arrival, frames, outcome in ((5, 5, "success"), (12, 10, "failure")):
        env.reset(seed=arrival)
        for _ in range(2):
            env.step(np.zeros((2, 1)))
        film = imageio.mimread(tmp_path / "new" / f"from_{arrival}_{outcome}.mp4")
        assert len(film) == frames and film[0].shape == (16, 32, 3)
        assert abs(film[3].mean() - 80) < 5
    assert len(list((tmp_path / "new").iterdir())) == 2


def test_a_simulator_is_built_at_the_first_reset_with_a_seed_and_only_once():
    built = []
    env = countdown_env()
    env.make_sim = lambda: built.append(1) or Countdown()
    obs, _ = env.reset()                                        # no episode yet: zeros to show
    assert env.observation_space.contains(obs) and not obs["state"].any() and not built
    *_, info = env.step(np.zeros((4, 1)))
    assert info == {"executed": 0, "success": False} and not built
    for seed in (3, 4):
        assert env.reset(seed=seed)[0]["state"].tolist() == [0, seed]
    assert built == [1]


def test_a_change_makes_a_new_simulator_at_the_next_reset_and_adds_to_earlier_ones():
    built = []
    env = countdown_env()
    env.make_sim = lambda **changes: built.append(changes) or Countdown()
    env.reset(seed=9)
    env.change(light="dim")
    assert built == [{}]
    env.reset(seed=9)
    env.change(mass=2)
    env.reset(seed=9)
    env.change(light="bright")
    env.reset(seed=9)
    env.reset(seed=9)
    assert built[1:] == [{"light": "dim"}, {"light": "dim", "mass": 2},
                         {"light": "bright", "mass": 2}]


def test_a_sentence_becomes_the_bytes_of_its_small_letters():
    ours = workers.tokens("Pick up the Milk")
    assert ours.shape == (128,) and ours.dtype == np.uint8
    assert ours.tolist() == [ord(c) for c in "pick up the milk"] + [ord(" ")] * 112
    assert workers.tokens("").tolist() == [32] * 128
    assert workers.tokens("word " * 100).tolist() == [ord(c) for c in ("word " * 26)[:128]]
    assert workers.tokens("茶")[:3].tolist() == list("茶".encode())
    assert not np.array_equal(workers.tokens("the milk"), workers.tokens("the butter"))


# ------------------------------------------------------------------------------------------------
# Many simulators: a walk along a line, from a start that the seed says to a place at 1


class Walk:
    """Where the seed drops it, it moves by a tenth of each action; beyond 1 it succeeds."""

    def __init__(self, slope=0.1):
        self.slope = slope

    def reset(self, seed):
        self.x, self.steps = self.start(seed), 0

    @staticmethod
    def start(seed):
        return np.random.default_rng(seed).uniform(-0.5, 0.9)

    def advance(self, action):
        self.x, self.steps = self.x + self.slope * float(action[0]), self.steps + 1
        return self.x > 1

    def observe(self):
        return {"state": np.array([self.x, self.steps], np.float32),
                "rgb": np.full((1, 3, 2, 2), self.steps, np.uint8)}


SPACE = gym.spaces.Dict({"state": gym.spaces.Box(-np.inf, np.inf, (2,)),
                         "rgb": gym.spaces.Box(0, 255, (1, 3, 2, 2), np.uint8)})


def walk_env():
    return workers.ChunkEnv(Walk, SPACE, 1, max_steps=10, horizon=4)


def plan(x, steps):
    """A policy by hand: fast far away, backwards in the second chunk; H = 4 numbers."""
    speed = 1.3 - x if steps != 4 else -0.2
    return [np.float32(speed + 0.1 * h) for h in range(4)]


def act(obs):
    actions = torch.tensor([plan(x, steps) for x, steps in obs["state"].tolist()])[:, :, None]
    return actions, {"actions": actions, "double": 2 * obs["state"]}


def slow_episode(seed, slope=0.1):
    """One episode with scalars -> (success, observation of each chunk, actions, flat mask)."""
    x, steps, states, taken, mask = Walk.start(seed), 0, [], [], []
    while True:
        states.append([np.float32(x), steps])
        chunk = plan(float(np.float32(x)), steps)
        taken += chunk
        for i, action in enumerate(chunk):
            x, steps = x + slope * float(action), steps + 1
            if x > 1 or steps == 10:
                mask += [True] * (i + 1) + [False] * (3 - i)
                return x > 1, states, taken, mask
        mask += [True] * 4


def check_rows(success, rows, seeds, slope=0.1):
    """Everything play returned, against the scalar replay of each seed."""
    assert success.shape == (len(seeds),) and success.dtype == bool
    assert set(rows) == {"state", "rgb", "episode", "mask", "actions", "double"}
    assert all(isinstance(values, torch.Tensor) for values in rows.values())
    assert len({len(values) for values in rows.values()}) == 1
    assert sorted(set(rows["episode"].tolist())) == list(range(len(seeds)))
    for e, seed in enumerate(seeds):
        mine = rows["episode"] == e
        ok, states, taken, mask = slow_episode(seed, slope)
        assert success[e] == ok
        np.testing.assert_allclose(rows["state"][mine], states, atol=1e-6)
        assert rows["rgb"][mine].flatten(1).tolist() == [[s] * 12 for _, s in states]
        np.testing.assert_allclose(rows["actions"][mine].flatten(), taken, atol=1e-6)
        assert rows["mask"][mine].flatten().tolist() == mask
    torch.testing.assert_close(rows["double"], 2 * rows["state"])


SEEDS = [5, 3, 11, 4, 8, 2, 9]


def test_the_walks_end_in_both_ways_and_inside_chunks():
    ends = [slow_episode(seed) for seed in SEEDS]
    assert {ok for ok, *_ in ends} == {True, False}
    assert not all(mask[-1] for *_, mask in ends) and len({len(mask) for *_, mask in ends}) > 1


@pytest.fixture(scope="module")
def two():
    world = workers.Workers(walk_env, 2)
    yield world
    world.close()


def test_processes_play_what_a_scalar_replay_plays(two):
    check_rows(*two.play(act, SEEDS), SEEDS)


def test_playing_again_gives_the_same_rows_in_the_same_order(two):
    (success, rows), (again, same) = (two.play(act, SEEDS) for _ in range(2))
    np.testing.assert_array_equal(success, again)
    torch.testing.assert_close(rows, same, rtol=0, atol=0)


def test_fewer_episodes_than_processes_and_numpy_seeds(two):
    check_rows(*two.play(act, np.array([4])), [4])


def test_a_seed_is_an_episode_in_any_process_and_after_any_other(two):
    for seeds in (SEEDS[::-1], [8, 8, 8], [11, 5]):
        check_rows(*two.play(act, seeds), seeds)


def test_a_change_reaches_every_process_and_can_be_taken_back(two):
    two.change(slope=0.3)
    try:
        check_rows(*two.play(act, SEEDS), SEEDS, slope=0.3)
    finally:
        two.change(slope=0.1)
    check_rows(*two.play(act, SEEDS), SEEDS)


def test_no_seeds_no_rows(two):
    success, rows = two.play(act, [])
    assert success.shape == (0,) and success.dtype == bool and rows == {}


class Bomb(gym.Env):
    """A user's own gymnasium.Env with the four habits; seed 13 and any change kill its process.

    Its success is an action above half. It loads nothing before it is asked to.
    """

    def __init__(self):
        self.observation_space = state_space(1)
        self.action_space = gym.spaces.Box(-1, 1, (1, 1))

    def reset(self, *, seed=None, options=None):
        self.seed = seed or 0
        return {"state": np.array([self.seed], np.float32)}, {}

    def step(self, chunk):
        if self.seed == 13:
            os.kill(os.getpid(), signal.SIGKILL)
        success = bool(chunk[0, 0] > 0.5)
        info = {"executed": 1, "success": success}
        return {"state": np.array([0], np.float32)}, float(success), success, not success, info

    def change(self):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_users_environment_joins_and_a_killed_process_is_told_in_one_line():
    """SystemExit with one line that names the start, by the name that the script gives it."""
    world = workers.Workers(Bomb, 2, name=lambda seed: f"task {seed}")
    success, rows = world.play(lambda obs: (obs["state"][:, :, None] / 10, {}), [3, 4, 6, 7])
    assert success.tolist() == [False, False, True, True]
    assert rows["mask"].tolist() == [[True]] * 4
    assert rows["state"].flatten().tolist() == [3, 4, 6, 7]
    with pytest.raises(SystemExit) as stopped:
        world.play(lambda obs: (torch.zeros(2, 1, 1), {}), [1, 2, 5, 13, 6])
    line, = str(stopped.value).splitlines()
    assert "task 13" in line and "task 5" not in line
    assert "--num-envs" in line and "--resume" in line
    assert not any(process.is_alive() for process in world.envs.processes) or all(
        process.join(5) is None and not process.is_alive() for process in world.envs.processes)
    world.close()                                               # says goodbye to nobody


def test_a_process_that_dies_in_a_change_is_told_in_one_line():
    world = workers.Workers(Bomb, 1)
    with pytest.raises(SystemExit) as stopped:
        world.change()
    line, = str(stopped.value).splitlines()
    assert "died" in line and "no episode" in line
    world.close()


# ------------------------------------------------------------------------------------------------
# The same in this process: any number of simulators, which of them plays what


class Serial:
    """What Workers asks of AsyncVectorEnv, one simulator after the other, without processes."""

    def __init__(self, envs):
        self.envs, self.closed = envs, False
        self.obs = [env.reset()[0] for env in envs]

    def together(self):
        return {name: np.stack([obs[name] for obs in self.obs]) for name in self.obs[0]}

    def reset(self, seed, options):
        assert len(seed) == len(self.envs) and all(type(s) is int for s in seed)
        for i in np.flatnonzero(options["reset_mask"]):
            self.obs[i] = self.envs[i].reset(seed=seed[i], options={})[0]
        return self.together(), {}

    def step(self, actions):
        assert isinstance(actions, np.ndarray) and len(actions) == len(self.envs)
        self.obs, *scalars, infos = zip(*(env.step(a) for env, a in zip(self.envs, actions)))
        self.obs = list(self.obs)
        info = {name: np.array([info[name] for info in infos]) for name in infos[0]}
        return self.together(), *map(np.array, scalars), info

    def close(self):
        self.closed = True


def in_process(make_env, num_envs, plays=lambda slot, seed: True):
    """Workers whose simulators live here."""
    world = workers.Workers.__new__(workers.Workers)
    world.num_envs, world.plays, world.name = num_envs, plays, str
    world.envs = Serial([make_env() for _ in range(num_envs)])
    return world


def check_play(num_envs, seeds=tuple(SEEDS)):
    check_rows(*in_process(walk_env, num_envs).play(act, seeds), seeds)


@pytest.mark.parametrize("num_envs", [1, 2, 3, 7, 9])
def test_any_number_of_simulators_plays_the_same_episodes(num_envs):
    check_play(num_envs)


def test_processes_and_this_process_agree_to_the_last_row(two):
    success, rows = two.play(act, SEEDS)
    here, own = in_process(walk_env, 2).play(act, SEEDS)
    np.testing.assert_array_equal(success, here)
    torch.testing.assert_close(rows, own, rtol=0, atol=0)


class Watched(workers.ChunkEnv):
    """Keeps the seeds that it was asked to play."""

    def reset(self, *, seed=None, options=None):
        self.seeds = getattr(self, "seeds", []) + ([] if seed is None else [seed])
        return super().reset(seed=seed, options=options)


def watched(num_envs, seeds, **kwargs):
    """Plays -> the seeds of each simulator, in order."""
    world = in_process(functools.partial(Watched, Walk, SPACE, 1, 10, 4), num_envs, **kwargs)
    check_rows(*world.play(act, seeds), seeds)
    return [env.seeds for env in world.envs.envs]


def test_a_simulator_plays_only_what_it_is_pinned_to():
    """Odd seeds at home in slot 1, even ones in slot 0, whatever the order; the last one waits."""
    seeds = [1, 3, 5, 2, 7, 9, 4, 11]
    even, odd = watched(2, seeds, plays=lambda slot, seed: seed % 2 == slot)
    assert even == [2, 4] and odd == [1, 3, 5, 7, 9, 11]


def test_a_free_simulator_takes_the_next_seed_at_once_and_each_is_played_once():
    """The schedule by hand: the lengths of the episodes, in chunks, decide who is free next."""
    for num_envs in (1, 2, 3):
        slots, queue = [[] for _ in range(num_envs)], list(SEEDS)
        left = [0] * num_envs
        while queue or any(left):
            for slot in range(num_envs):
                if left[slot] == 0 and queue:
                    slots[slot].append(queue.pop(0))
                    left[slot] = len(slow_episode(slots[slot][-1])[1])
            left = [max(0, n - 1) for n in left]
        assert watched(num_envs, SEEDS) == slots


def test_an_episode_that_no_simulator_may_play_is_named():
    world = in_process(walk_env, 2, plays=lambda slot, seed: seed != 8)
    with pytest.raises(AssertionError, match="no process may play 8"):
        world.play(act, SEEDS)


def test_an_idle_simulator_adds_no_rows_and_steals_no_outcome():
    """One success among idle simulators that have never played; the last seed too."""
    winner = next(seed for seed in range(99) if slow_episode(seed)[0])
    success, rows = in_process(walk_env, 4).play(act, [winner])
    assert success.tolist() == [True] and not rows["episode"].any()
    check_rows(success, rows, [winner])
    check_play(4, (SEEDS[0], winner))
    assert len(rows["mask"]) == math.ceil(sum(rows["mask"].flatten().tolist()) / 4)


# ------------------------------------------------------------------------------------------------
# Demonstrations of a scripted expert that sometimes fails


class Moody:
    """A simulator whose expert says 1. A mood that hangs on the seed decides if that helps; the
    third time is the last."""

    def __init__(self, hope):
        self.hope = hope

    @staticmethod
    def good(seed, hope):
        return np.random.default_rng(seed).random() < hope

    def reset(self, seed):
        self.seed, self.step = seed, 0

    def advance(self, action):
        assert np.allclose(action, [1, 0.1 * self.step])
        self.step += 1
        return self.step == 3 and self.good(self.seed, self.hope)

    def observe(self):
        return {"state": np.float32([self.seed, self.step]),
                "action": np.float32([1, 0.1 * self.step])}


def moody_workers(hope):
    box = gym.spaces.Box
    space = gym.spaces.Dict({"state": box(-np.inf, np.inf, (2,)), "action": box(-1, 1, (2,))})
    return in_process(functools.partial(workers.ChunkEnv, functools.partial(Moody, hope), space, 2,
                                        4, 1), 2)


def test_scripted_demos_keep_the_first_successes_of_each_task():
    """Two tasks in two simulators, the expert fails every second time."""
    candidates, world = [range(1000, 1040), range(2000, 2040)], moody_workers(0.5)
    demos = workers.scripted_demos(world, candidates, 4)
    wanted = [[seed for seed in seeds if Moody.good(seed, 0.5)][:4] for seeds in candidates]
    assert wanted[0][-1] > 1004                                    # some did fail
    assert sorted(int(rows["state"][0, 0]) for rows, _ in demos) == sum(wanted, [])
    for rows, actions in demos:
        assert rows["state"][:, 1].tolist() == [0, 1, 2]
        assert len(set(rows["state"][:, 0].tolist())) == 1        # all of one episode
        torch.testing.assert_close(actions, torch.tensor([[1, 0], [1, 0.1], [1, 0.2]]))
        assert set(rows) == {"state"}                             # what was observed, no more
    assert world.envs.closed


def test_no_candidate_is_tried_that_is_not_needed():
    """Of an expert that always succeeds as many as asked; the next ones only for what failed."""
    tried, play = [], workers.Workers.play
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers.Workers, "play", lambda self, act, seeds: tried.append(
            list(seeds)) or play(self, act, seeds))
        workers.scripted_demos(moody_workers(1.0), [range(1000, 1040), range(2000, 2040)], 3)
        assert tried == [[1000, 1001, 1002, 2000, 2001, 2002]]
        tried.clear()
        workers.scripted_demos(moody_workers(0.5), [range(1000, 1040)], 4)
    assert sum(tried, []) == [*range(1000, 1000 + len(sum(tried, [])))]
    for asked, later in zip(tried, tried[1:]):
        missing = sum(not Moody.good(seed, 0.5) for seed in asked)
        assert len(later) == missing > 0


def test_an_expert_that_never_succeeds_gets_one_line():
    with pytest.raises(SystemExit, match="^--num-demos 4: [^\n]*$"):
        workers.scripted_demos(moody_workers(0.0), [range(8)], 4)
