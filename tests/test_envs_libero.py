"""envs/libero.py on the real simulator: physics and pixels equal to LIBERO's own, episodes that do
not leak, the scripted expert, recorded demonstrations, and tasks that stay in their processes."""

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import h5py
import numpy as np
import pytest
import torch
from scipy import stats
from scipy.spatial.transform import Rotation

from conftest import ROOT
from envs import libero, libero_demos
from envs.workers import tokens

sim = pytest.mark.sim
SOUP = "pick_up_the_alphabet_soup_and_place_it_in_the_basket_demo.hdf5"
SIZE = 48  # of images


@functools.cache
def simulator(suite, task):
    """A LiberoSim for all the tests, with its model as recordings keep it: MuJoCo writes the last
    one built, no other."""
    made = libero.LiberoSim(suite, task)
    made.xml = made.env.sim.model.get_xml()
    return made


@pytest.fixture(scope="module")
def soup():
    return simulator("libero_object", 0)


@pytest.fixture(scope="module")
def cabinet():
    """A suite whose ten tasks share one table, with a cabinet, a stove and a rack."""
    return simulator("libero_goal", 4)


find_gl = functools.cache(libero.find_gl)


@pytest.fixture(scope="module")
def gl():
    """CI installs EGL; elsewhere the tests that draw may be skipped."""
    try:
        return find_gl()
    except SystemExit as error:
        if os.environ.get("REQUIRE_GL"):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def kept_simulators():
    """Simulators are built once and handed to every run of this process that asks for the same
    ones, as an episode does not depend on the one before; and demos are replayed here."""
    made, make_workers = {}, libero.make_workers

    def make(*args, film=None, **more):
        if film:
            return make_workers(*args, film=film, **more)
        key = str((args, more))
        if key not in made:
            made[key] = make_workers(*args, **more)
            made[key].really_close, made[key].close = made[key].close, lambda: None
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(libero, "make_workers", make)
        patch.setattr(libero_demos.concurrent.futures, "ProcessPoolExecutor", Here)
        yield
    for world in made.values():
        world.really_close()


def play(simulator, number, actions):
    simulator.reset(number)
    states = [simulator.observe()["state"]]
    for action in actions:
        simulator.advance(action)
        states.append(simulator.observe()["state"])
    return np.stack(states)


# ------------------------------------------------------------------------------------------------
# Without a simulator


def test_importing_loads_no_simulator(loaded_by_imports):
    assert not {"mujoco", "robosuite", "libero", "h5py"} & loaded_by_imports


def test_suites_and_their_errors():
    problem = libero.read_suite("libero_object").problems[0]
    assert "alphabet soup" in problem.instruction
    assert problem.facts == [["in", "alphabet_soup_1", "basket_1_contain_region"]]
    assert libero.state_size("libero_object") == 18 and libero.state_size("libero_10", "rgb") == 6
    assert libero.able_tasks("libero_object") == list(range(10))
    assert libero.able_tasks("libero_goal") == [1, 2, 4, 6, 7, 8]
    assert libero.able_tasks("libero_10") == [0, 1, 7]            # two things, one after the other
    with pytest.raises(SystemExit, match="^--suite libero_objects .*libero_object"):
        libero.read_suite("libero_objects")


def test_episodes_have_names():
    seed = 3 * libero.TASK
    assert libero.episode_name(np.int64(seed + 7)) == "task 3 from official state 7"
    assert libero.episode_name(seed + 2_000_012) == (
        f"task 3 from placement 2000012 (seed {seed + 2_000_012})")


def test_random_starts_are_of_their_task_and_no_official_state():
    for task in (0, 3, 89):
        starts = libero.random_start(task, np.array([0, 7, 2**31 - 1]))
        tasks, numbers = np.divmod(starts, libero.TASK)
        assert tasks.tolist() == [task] * 3 and numbers.tolist() == [1000, 1007, 2**31 + 999]
    assert libero.random_start([2, 5], 4).tolist() == [
        2 * libero.TASK + 1004, 5 * libero.TASK + 1004]


def test_a_renamed_object_is_grasped_as_the_one_it_was():
    """LIBERO-PRO's _object suite on every task: what it renames has the axis, the grasp, the place
    of the original; and the tables find nothing else for the names of the original suites."""
    rot, hand = np.linalg.qr(np.random.default_rng(0).normal(size=(2, 3, 3)))[0]
    pairs = zip(*(libero.read_suite(s).problems for s in ("libero_object", "libero_object_object")))
    renamed, axes = 0, 0
    for ours, theirs in pairs:
        renamed += ours.entities != theirs.entities
        axes += any(libero.heading(ours.entities[0], rot, hand))
        for name, new in zip(ours.entities, theirs.entities):
            assert libero.heading(new, rot, hand) == libero.heading(name, rot, hand)
        skill, again = libero.skill(*ours.facts), libero.skill(*theirs.facts)
        assert again.args[2:] == skill.args[2:]                   # grasp and place
    assert renamed == 10 and axes == 6
    for suite in libero.TIME_LIMITS:
        for name in sum((problem.entities for problem in libero.read_suite(suite).problems), []):
            for table in (libero.GRASPS, libero.PLACES):
                key = [key for key in table if name.startswith(key)]
                if name != "new_salad_dressing_1":  # libero_90, task 62: a salad dressing, too
                    assert libero.look_up(table, name) == (table[key[0]] if key else None)


@pytest.mark.parametrize("num_envs, homes", [
    (1, [{0}, {0}, {0}]), (2, [{0}, {1}, {0}]), (3, [{0}, {1}, {2}]),
    (7, [{0, 3, 6}, {1, 4}, {2, 5}])])
def test_a_task_stays_in_its_own_processes(num_envs, homes):
    tasks = [0, 4, 9]
    plays = libero.pinned(tasks, num_envs)
    for number in (3, 1001, 2_000_012):
        for task, home in zip(tasks, homes):
            seed = task * libero.TASK + number
            assert {slot for slot in range(num_envs) if plays(slot, seed)} == home


def test_the_workers_of_a_run_are_told_what_they_will_see(monkeypatch):
    told = namedtuple("Told", "make_env num_envs plays name")
    monkeypatch.setattr(libero, "Workers", told)
    run = libero.make_workers("libero_object", [2, 5], 3, obs="rgb", action_repeat=4, gl="egl",
                              image_size=64, demo_noise=0.5, meshes="simple")
    env = run.make_env()
    assert {name: (box.shape, box.dtype.name) for name, box in env.observation_space.items()} == {
        "state": ((6,), "float32"), "tokens": ((128,), "uint8"), "action": ((7,), "float32"),
        "rgb": ((2, 3, 64, 64), "uint8")}
    assert env.action_repeat == 1 and env.action_space.shape == (1, 7)
    assert [[run.plays(slot, task * libero.TASK + 7) for slot in range(3)] for task in (2, 5)] == [
        [True, False, True], [False, True, False]]
    assert run.name is libero.episode_name and run.num_envs == 3
    assert env.make_sim.args == ("libero_object", 0.5)              # the suite, the demo's noise
    assert env.make_sim.keywords == dict(obs="rgb", state_dim=6, gl="egl", size=64, published=False,
                                         meshes="simple")
    film = libero.make_workers("libero_object", [0], 1, gl="egl", film="folder", action_repeat=4,
                               horizon=3, max_steps=77, state_dim=30, published=True).make_env()
    assert film.make_sim.keywords == dict(obs="state", state_dim=30, gl="egl", size=256,
                                          published=True, meshes="full")
    assert film.action_repeat == 4 and film.film == "folder" and film.max_steps == 77
    assert film.action_space.shape == (3, 7) and film.observation_space["state"].shape == (30,)


# ------------------------------------------------------------------------------------------------
# The state, without a simulator: each of its numbers from poses that are given

# A hand that points down: its x is the world's y, its y the world's x.
HAND = np.array([[0, 1.0, 0], [1, 0, 0], [0, 0, -1]])


def about(axis, angle):
    """A rotation (3, 3) about "x", "y" or "z"."""
    return Rotation.from_euler(axis, angle).as_matrix()


@pytest.mark.parametrize("angle", [0.0, 0.4, 1.3, -2.0])
def test_a_heading_is_twice_the_angle_between_the_hand_and_the_axis_to_close_along(angle):
    """Butter lies, its y is the axis; a bottle that lies has z, here -y before it is turned. From
    below, where the hand looks from, the object turns the other way round."""
    wanted = [np.cos(2 * angle), -np.sin(2 * angle)]
    lying = about("x", np.pi / 2)
    for name, rest in (("butter_1", np.eye(3)), ("cream_cheese_1", np.eye(3)),
                       ("ketchup_1", lying), ("blue_salad_dressing_2", lying)):
        rot = about("z", angle) @ rest
        np.testing.assert_allclose(libero.heading(name, rot, HAND), wanted, atol=1e-12)
        # half a turn gives the same grasp
        half = about("z", np.pi) @ rot
        np.testing.assert_allclose(libero.heading(name, half, HAND), wanted, atol=1e-12)
        # and only what is between hand and object counts
        both = [about("z", 0.7) @ z for z in (rot, HAND)]
        np.testing.assert_allclose(libero.heading(name, *both), wanted, atol=1e-12)


def test_what_is_round_or_stands_or_is_no_thing_to_grasp_has_no_heading():
    rot = about("z", 0.4) @ about("x", 0.3)
    for name in ("alphabet_soup_1", "milk_1", "akita_black_bowl_1", "basket_1_contain_region",
                 "flat_stove_1"):
        assert libero.heading(name, rot, HAND) == (0, 0)
    standing = libero.heading("ketchup_1", about("z", 0.4), HAND)     # its axis is upright
    np.testing.assert_allclose(standing, 0, atol=1e-12)


def sim_of_poses(hand, rot, fingers, poses, **more):
    """A LiberoSim without MuJoCo: `observe` on poses {name: (position, rotation, opening)}."""
    made = libero.LiberoSim.__new__(libero.LiberoSim)
    qpos = np.arange(10.0)
    qpos[[4, 2]] = fingers
    other = np.full(9, 99.0)
    made.site, made.finger_joints = 1, [4, 2]
    made.data = SimpleNamespace(site_xpos=np.stack([other[:3], hand]), qpos=qpos,
                                site_xmat=np.stack([other, rot.flatten()]))
    made.entities, made.pose, made.obs = list(poses), poses.get, "state"
    vars(made).update(more)
    return made


def test_a_state_has_the_hand_then_each_thing_in_its_order_then_zeros():
    hand, yaw, fingers = np.array([0.1, -0.2, 0.9]), 0.3, [0.04, -0.035]
    butter = about("z", 1.0) @ about("x", 0.4)           # it is turned, and lies askew
    poses = {"butter_1": (np.array([0.3, 0.1, 0.5]), butter, 0.0),
             "wooden_cabinet_1_top_region": (np.array([-0.2, 0.4, 0.7]), about("z", 2.0), 0.12),
             "flat_stove_1": (np.array([0.0, 0.2, 0.6]), about("x", 1.0), 0.5)}
    sim = sim_of_poses(hand, about("z", yaw) @ HAND, fingers, poses, state_dim=6 + 4 * 6)
    state = sim.observe()["state"]
    angle, level = 1.0 - yaw, np.cos(0.4) ** 2           # of its y, seen from the hand
    wanted = [0.1, -0.2, 0.9, np.sin(yaw), 0.04, -0.035,
              0.2, 0.3, -0.4, level * np.cos(2 * angle), -level * np.sin(2 * angle), 0,
              -0.3, 0.6, -0.2, 0, 0, 0.12,
              -0.1, 0.4, -0.3, 0, 0, 0.5,
              0, 0, 0, 0, 0, 0]
    assert state.dtype == np.float32
    np.testing.assert_allclose(state, wanted, atol=1e-6)


def test_with_images_the_state_is_the_hand_alone():
    sim = sim_of_poses(np.ones(3), HAND, [0.1, 0.2], {"butter_1": (np.zeros(3), HAND, 0.0)},
                       obs="rgb", look=lambda: "two images")
    obs = sim.observe()
    assert obs["rgb"] == "two images" and obs["state"].dtype == np.float32
    np.testing.assert_allclose(obs["state"], [1, 1, 1, 0, 0.1, 0.2], atol=1e-6)


def test_the_pose_of_an_object_a_fixture_and_a_region():
    """An object is a body, a region a site; what has joints is as open as they are."""
    def spot(i):
        return SimpleNamespace(xpos=np.full(3, i), xmat=np.arange(9.0) + i)

    made = libero.LiberoSim.__new__(libero.LiberoSim)
    joints = {"knob": 0.7, "drawer": -0.1}
    made.env = SimpleNamespace(
        object_sites_dict={"drawer_region": SimpleNamespace(joints=["drawer"]),
                           "plate_region": SimpleNamespace()},
        fixtures_dict={"stove": SimpleNamespace(joints=["knob"]),
                       "rack": SimpleNamespace(joints=None)},
        obj_body_id={"soup": 1, "stove": 2, "rack": 3})
    made.data = SimpleNamespace(
        body=spot, site={"drawer_region": spot(7), "plate_region": spot(8)}.get,
        joint=lambda name: SimpleNamespace(qpos=[joints[name]]))
    for name, place, opening in (("soup", 1, 0), ("stove", 2, 0.7), ("rack", 3, 0),
                                 ("drawer_region", 7, -0.1), ("plate_region", 8, 0)):
        pos, rot, opened = made.pose(name)
        assert pos.tolist() == [place] * 3 and opened == opening
        assert rot.tolist() == (np.arange(9.0) + place).reshape(3, 3).tolist()


# ------------------------------------------------------------------------------------------------
# All tasks of a run in one process, and the pushes of its demos


class StillSim:
    """A LiberoSim that stands still and keeps what it was asked to do."""

    instruction = "Pick up the Milk"

    def __init__(self, suite, task, **view):
        self.made, self.reset_to, self.done, self.closed = (suite, task, view), [], [], False

    def reset(self, number):
        self.reset_to.append(number)

    def advance(self, action):
        self.done.append(action)
        return len(self.done) == 3

    def observe(self):
        return {"state": np.float32([len(self.done)])}

    def close(self):
        self.closed = True


class StillExpert:
    """Whatever is seen, it does the same."""

    action = np.array([0.25, -0.5, 0.125, 0, 0.5, -0.25, 1])

    def __init__(self, sim, rng):
        self.sim = sim

    def act(self, sim):
        assert sim is self.sim
        return self.action


@contextlib.contextmanager
def still_sims(demo_noise=None, **view):
    """TaskSims of such simulators."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(libero, "LiberoSim", StillSim)
        patch.setattr(libero, "ScriptedExpert", StillExpert)
        yield libero.TaskSims("libero_object", demo_noise, **view)


def demo_pushes(steps, seed=3 * libero.TASK + 1007, demo_noise=0.5):
    """The expert's demo of that many steps -> what was observed of its actions, and what was done
    on top of them, (steps, 7) each."""
    seen = []
    with still_sims(demo_noise) as sims:
        sims.reset(seed)
        for _ in range(steps):
            seen.append(sims.observe()["action"])
            sims.advance(seen[-1])
    return np.array(seen), np.array(sims.sim.done) - seen


def bursts(pushes):
    """Runs of the same push -> [(how long, push (7,)), ...] and how long nothing pushed, each."""
    ends = np.flatnonzero((np.diff(pushes, axis=0) != 0).any(1)) + 1
    runs = [(len(run), run[0]) for run in np.split(pushes, ends)][1:-1]   # the last one was cut
    return [run for run in runs if run[1].any()], [n for n, push in runs if not push.any()]


def test_a_demo_is_pushed_for_5_to_10_steps_in_one_direction_and_then_not():
    _, pushes = demo_pushes(12_000)
    assert not pushes[:, 3:].any()                       # the hand's place, not how it is turned
    pushed, rests = bursts(pushes)
    lengths = np.array([n for n, _ in pushed])
    assert set(lengths) == {5, 6, 7, 8, 9, 10} and len(lengths) > 600
    counts = np.bincount(lengths)[5:]
    assert stats.chisquare(counts).pvalue > 1e-3         # each as often
    # one step in ten begins a push; the pause is 1 / 0.1 steps on average, if there is one
    assert np.mean(rests) == pytest.approx(10, rel=0.15)
    directions = np.array([push[:3] for _, push in pushed])
    for dim in range(3):                                 # demo_noise times a standard normal
        assert stats.kstest(directions[:, dim] / 0.5, "norm").pvalue > 1e-3
    assert np.abs(np.corrcoef(directions.T) - np.eye(3)).max() < 0.15


def test_a_demo_records_the_experts_action_and_not_what_pushed_it():
    seen, pushes = demo_pushes(100)
    assert seen.dtype == np.float32 and (seen == np.float32(StillExpert.action)).all()
    assert np.abs(pushes).max() > 0.1


def test_the_pushes_of_an_episode_hang_on_its_seed_alone():
    (_, one), (_, again), (_, other) = (demo_pushes(60, seed) for seed in (1007, 1007, 1008))
    assert np.array_equal(one, again) and not np.array_equal(one, other)
    _, stronger = demo_pushes(60, 1007, demo_noise=1.0)
    np.testing.assert_allclose(stronger, 2 * one)
    _, none = demo_pushes(60, 1007, demo_noise=0.0)
    assert not none.any()


def test_a_new_demo_does_not_begin_with_the_last_ones_push():
    with still_sims(0.5) as sims:
        sims.reset(1008)
        while not sims.left:
            sims.advance(np.zeros(7))
        sims.reset(1007)
        sims.sim.done.clear()
        for _ in range(60):
            sims.advance(np.zeros(7))
    np.testing.assert_allclose(sims.sim.done, demo_pushes(60, 1007)[1], atol=1e-6)


def test_without_a_demo_nothing_pushes_and_no_expert_is_asked():
    action = np.linspace(-1, 1, 7)
    with still_sims() as sims:
        libero.ScriptedExpert = None
        sims.reset(1007)
        assert [sims.advance(action) for _ in range(4)] == [False, False, True, False]
        assert all(done is action for done in sims.sim.done)
        assert set(sims.observe()) == {"state", "tokens"}
        assert np.array_equal(sims.observe()["tokens"], tokens("pick up the milk"))


def test_a_seed_is_a_task_and_a_start_and_a_tasks_simulator_is_kept():
    with still_sims(state_dim=18, gl=None) as sims:
        for seed in (2 * libero.TASK + 7, 1007, 2 * libero.TASK + 1008):
            sims.reset(seed)
    first, second = sims.sims[2], sims.sims[0]
    assert first.reset_to == [7, 1008] and second.reset_to == [1007]
    assert first.made == ("libero_object", 2, dict(state_dim=18, gl=None))
    assert sims.sim is first and sims.name == "task2_placement1008"
    sims.close()
    assert first.closed and second.closed


# ------------------------------------------------------------------------------------------------
# Recorded demonstrations, without a simulator


class EchoSim:
    """Replays a state as itself."""

    def __init__(self, suite, task):
        pass

    def replay(self, states, model_file):
        assert model_file == "<a model/>"
        return states[:, 1:]


STILL, GRIPS = np.zeros(6), [-1, -1, -1, 1, 1, 1, 1, 1]
MOVES = [STILL, STILL + 0.5, STILL, STILL, STILL, STILL + 5e-5, STILL + 2e-4,
         np.array([0, 0, 0, 0, 0, -0.3])]
# The first step has no grip before it; the fourth opens the hand; of the last two one is small and
# one turns the hand only. The third, fifth and sixth do nothing.
MOVING = [0, 1, 3, 6, 7]


def write_demos(path, numbers, size=4):
    """A file of demos with these numbers; a state holds the demo's number and the step."""
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as content:
        data = content.create_group("data")
        data.attrs["problem_info"] = json.dumps({"language_instruction": (
            libero.read_suite("libero_object").problems[0].instruction)})
        for number in numbers:
            demo = data.create_group(f"demo_{number}")
            demo.attrs["model_file"] = "<a model/>"
            demo["actions"] = np.column_stack([MOVES, GRIPS])
            states = np.zeros((8, 19))
            states[:, 1], states[:, 2] = number, np.arange(8)
            demo["states"] = states
            for camera in ("agentview_rgb", "eye_in_hand_rgb"):
                demo[f"obs/{camera}"] = rng.integers(0, 256, (8, size, size, 3), dtype=np.uint8)


class Here:
    """A pool of one process, this one."""

    def __init__(self, workers, mp_context):
        assert workers == 1

    def __enter__(self):
        return self

    def __exit__(self, *what):
        pass

    def submit(self, function, *args):
        return SimpleNamespace(result=lambda: function(*args))


@contextlib.contextmanager
def echoing():
    """A folder for demos, which are replayed here and without a simulator."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(libero_demos, "LiberoSim", EchoSim)
        patch.setattr(libero_demos.concurrent.futures, "ProcessPoolExecutor", Here)
        yield Path(folder)


def demos_of(numbers, num_demos, skip_no_ops, obs="state", image_size=None):
    """What `recorded_demos` makes of such a file -> (demos, images {number: (agent, wrist)})."""
    with echoing() as folder:
        write_demos(folder / SOUP, numbers)
        demos = libero_demos.recorded_demos("libero_object", [0], folder, num_demos, skip_no_ops,
                                            obs, image_size)
        with h5py.File(folder / SOUP) as content:
            images = {number: [content[f"data/demo_{number}/obs/{camera}_rgb"][:] for camera in
                               ("agentview", "eye_in_hand")] for number in numbers}
    return demos, images


def test_steps_that_do_nothing_are_kept_or_left_out():
    for skip, wanted in ((False, [*range(8)]), (True, MOVING)):
        (rows, actions), = demos_of([0], 1, skip)[0]
        assert rows["state"][:, 1].tolist() == wanted and rows["state"].shape == (len(wanted), 18)
        made = np.column_stack([MOVES, GRIPS])[wanted].astype(np.float32)
        assert np.array_equal(actions, made) and actions.dtype == torch.float32
        sentence = libero.read_suite("libero_object").problems[0].instruction
        assert rows["tokens"].shape == (len(made), 128)
        assert (rows["tokens"].numpy() == tokens(sentence)).all()


def test_demos_come_in_the_order_of_their_numbers():
    """2 before 10, whatever the alphabet says; and no more than asked."""
    for count, wanted in ((4, [0, 1, 2, 9]), (5, [0, 1, 2, 9, 10]), (9, [0, 1, 2, 9, 10])):
        demos, _ = demos_of([10, 1, 9, 0, 2], count, False)
        assert [int(rows["state"][0, 0]) for rows, _ in demos] == wanted


@pytest.mark.parametrize("skip", [False, True])
def test_a_row_with_images_has_those_of_the_step_before_so_the_first_is_left_out(skip):
    check_images_of_demos(skip)


def check_images_of_demos(skip):
    demos, images = demos_of([0, 3], 2, skip, "rgb", 4)
    steps = (MOVING if skip else [*range(8)])[1:]
    for number, (rows, actions) in zip((0, 3), demos):
        assert rows["state"].shape == (len(steps), 6)    # the hand alone
        assert rows["state"][:, :2].tolist() == [[number, step] for step in steps]
        assert np.array_equal(actions, np.column_stack([MOVES, GRIPS])[steps].astype(np.float32))
        assert rows["rgb"].shape == (len(steps), 2, 3, 4, 4) and rows["rgb"].dtype == torch.uint8
        for row, step in enumerate(steps):
            for camera in range(2):
                upright = np.rot90(images[number][camera][step - 1], 2).transpose(2, 0, 1)
                assert np.array_equal(rows["rgb"][row, camera], upright)


@pytest.mark.parametrize("spoil, words", [
    ("cut", ["--demos", "complete"]), ("no images", ["--demos", "complete", "obs"]),
    ("missing", ["--demos", "--suite libero_object"]),
    ("other", ["--demos", "alphabet soup", "task 3"]),
    ("size", ["--image-size 128", f"--image-size {SIZE}"])])
def test_spoiled_demos_get_one_line(spoil, words):
    with echoing() as folder:
        path = file = folder / SOUP
        write_demos(file, [0], SIZE)
        if spoil == "cut":
            file.write_bytes(file.read_bytes()[:10_000])
        elif spoil == "missing":
            file.unlink()
            path = folder
        elif spoil == "no images":
            with h5py.File(file, "a") as content:
                del content["data/demo_0/obs"]
        with pytest.raises(SystemExit) as error:
            libero_demos.recorded_demos("libero_object", [3 if spoil == "other" else 0], path, 1,
                                        False, "rgb", 128)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------
# Physics and episodes


@sim
def test_advance_equals_liberos_own_step(soup):
    """Sixty random actions: joint positions equal to robosuite's env.step to the last bit."""
    actions = np.random.default_rng(1).uniform(-1, 1, (60, 7))
    soup.reset(5)
    start, grip = soup.env.sim.get_state().flatten(), soup.grip.copy()
    for action in actions:
        soup.advance(action)
    fast = soup.env.sim.data.qpos.copy()
    soup.reset(5)
    assert np.array_equal(soup.env.sim.get_state().flatten(), start)
    assert np.array_equal(soup.grip, grip)
    soup.gripper.current_action = grip                    # where robosuite keeps it
    del soup.controller.update, soup.controller.run_controller  # robosuite's own again
    soup.controller.new_update = True
    for action in actions:
        soup.env.step(action)
    slow = soup.env.sim.data.qpos.copy()
    soup.place(0)  # another controller, patched, for the tests to come
    assert np.array_equal(slow, fast)


def unit(quaternion, vector):
    """A vector turned by MuJoCo's quaternion, which has its real part first."""
    return Rotation.from_quat(np.roll(quaternion, -1)).apply(vector)


@sim
def test_each_number_of_the_state_is_mujocos(cabinet):
    """Names, poses and joints looked up in MuJoCo itself, angles from its quaternions; after the
    arm has turned and pushed, with a drawer open and the stove's knob turned."""
    import mujoco
    cabinet.reset(1004)
    push = np.array([0.3, 0.2, -0.6, 0, 0, 0.5, -1])
    for _ in range(12):
        cabinet.advance(push)
    data = cabinet.data
    joints = {"wooden_cabinet_1_middle_region": "wooden_cabinet_1_middle_level",
              "flat_stove_1": "flat_stove_1_button"}
    for joint, opening in zip(joints.values(), (-0.11, 0.4)):
        data.joint(joint).qpos[0] = opening
    mujoco.mj_forward(cabinet.model, data)
    bodies = ["cream_cheese_1", "akita_black_bowl_1", "flat_stove_1", "wine_bottle_1"]
    regions = ["wooden_cabinet_1_middle_region", "wooden_cabinet_1_top_side"]
    things = [bodies[0], regions[0], *bodies[1:], regions[1]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cabinet, "entities", things)
        patch.setattr(cabinet, "state_dim", 6 + 6 * 8)
        state = cabinet.observe()["state"].astype(float)

    grip = data.site("gripper0_grip_site")
    quaternion = np.zeros(4)
    mujoco.mju_mat2Quat(quaternion, grip.xmat)
    close = unit(quaternion, [0, 1, 0])                    # along which the fingers close
    assert abs(close[2]) < 0.1 < abs(close[1])      # it is level, and has turned
    fingers = [data.joint(f"gripper0_finger_joint{i}").qpos[0] for i in (1, 2)]
    wanted = [*grip.xpos, close[1], *fingers]
    for thing in things:
        if thing in bodies:
            entry = data.body(f"{thing}_main")
            place, turned = entry.xpos, entry.xquat
        else:
            place, turned = data.site(thing).xpos, None
        axis = {"cream_cheese_1": [0, 1, 0]}.get(thing)    # the bottle's is None: it is round
        seen = 0j
        if axis:
            x, y, _ = Rotation.from_quat(np.roll(quaternion, -1)).inv().apply(unit(turned, axis))
            seen = complex(x, y) ** 2                      # twice the angle
        opening = data.joint(joints[thing]).qpos[0] if thing in joints else 0
        wanted += [*(place - grip.xpos), seen.real, seen.imag, opening]
    assert abs(state[6 + 3]) > 0.05 and abs(state[6 + 4]) > 0.05
    np.testing.assert_allclose(state, [*wanted, *np.zeros(12)], atol=1e-6)


@sim
def test_an_episode_does_not_depend_on_the_one_before(soup):
    actions = np.random.default_rng(0).uniform(-1, 1, (10, 7))
    for number in (3, 1003):
        first = play(soup, number, actions)
        other = play(soup, 4, actions[::-1])
        assert np.array_equal(play(soup, number, actions), first)
        assert not np.array_equal(other[0], first[0])
    assert soup.model.ntexdata == 0                           # nothing is drawn: no textures


@sim
def test_random_starts_are_spread_like_the_official_ones(soup):
    """The arm's joints, whose noise LIBERO's wrapper drops at reset, and the target's place."""
    arms, targets = [], []
    for first in (0, 1000):
        for number in range(first, first + 30):
            soup.reset(number)
            arms.append(soup.data.qpos[soup.controller.qpos_index].copy())
            targets.append(soup.pose(soup.entities[0])[0][:2].copy())
    for values in (np.reshape(arms, (2, 30, 7)), np.reshape(targets, (2, 30, 2))):
        official, random = values
        assert np.all(official.std(0) < 2 * random.std(0) + 1e-3)
        assert np.all(random.std(0) < 2 * official.std(0) + 1e-3)
        assert np.all(np.abs(official.mean(0) - random.mean(0)) < 1.5 * official.std(0) + 2e-3)


@sim
def test_the_expert_solves_official_and_random_starts(soup):
    for number in (0, 17, 1017):
        soup.reset(number)
        expert = libero.ScriptedExpert(soup, np.random.default_rng(number))
        assert any(soup.advance(expert.act(soup)) for _ in range(150))


@sim
def test_a_worker_plays_what_is_played_here_and_its_death_is_one_line(soup):
    """The expert in a process of its own, as in this one; then the process is killed."""
    workers = libero.make_workers("libero_object", [0], 1, demo_noise=0, max_steps=150)
    success, rows = workers.play(lambda obs: (obs["action"][:, None], {}), [17])
    soup.reset(17)
    expert = libero.ScriptedExpert(soup, np.random.default_rng(17))
    for state, action in zip(rows["state"], rows["action"]):
        assert np.array_equal(soup.observe()["state"], state.numpy())
        assert np.array_equal(expert.act(soup).astype(np.float32), action.numpy())
        done = soup.advance(action.numpy())
    assert success[0] and done
    sentence = soup.instruction.lower().encode()
    assert bytes(rows["tokens"][-1].tolist()) == sentence + b" " * (128 - len(sentence))

    def kill(obs):
        os.kill(workers.envs.processes[0].pid, signal.SIGKILL)
        workers.envs.processes[0].join()
        return obs["action"][:, None], {}

    with pytest.raises(SystemExit) as stopped:
        workers.play(kill, [2_000_012])
    line = str(stopped.value)
    assert "task 0 from placement 2000012 (seed 2000012)" in line and "\n" not in line


# ------------------------------------------------------------------------------------------------
# Images


# What LIBERO's scripts/create_dataset.py does with an episode, without any of our code: states
# before each action, what env.step returned after it, and the first five steps are left out.
RECORD = """
import json, os, sys
gl, size, path, actions = sys.argv[1], int(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4])
os.environ["MUJOCO_GL"] = os.environ["PYOPENGL_PLATFORM"] = gl
import h5py, mujoco, numpy as np
from libero.libero import benchmark
from libero.libero.envs import OffScreenRenderEnv
tasks = benchmark.get_benchmark_dict()["libero_object"]()
env = OffScreenRenderEnv(bddl_file_name=tasks.get_task_bddl_file_path(0), camera_heights=size,
                         camera_widths=size)
env.reset()
mujoco.mj_resetData(env.sim.model._model, env.sim.data._data)  # else reset leaks into the episode
env.sim.set_state_from_flattened(tasks.get_task_init_states(0)[3])
env.sim.forward()
env.robots[0].controller.update(force=True)
env.robots[0].controller.reset_goal()
for _ in range(10):
    env.step([0, 0, 0, 0, 0, 0, -1])
states, seen = [], []
for action in actions:
    states.append(env.sim.get_state().flatten())
    seen.append(env.step(action)[0])
with h5py.File(path, "w") as content:
    data = content.create_group("data")
    data.attrs["problem_info"] = json.dumps({"language_instruction": env.language_instruction})
    demo = data.create_group("demo_0")
    demo.attrs["model_file"] = env.sim.model.get_xml()
    demo["actions"], demo["states"] = np.array(actions)[5:], np.stack(states)[5:]
    for name, key in (("agentview_rgb", "agentview_image"), ("ee_pos", "robot0_eef_pos"),
                      ("eye_in_hand_rgb", "robot0_eye_in_hand_image"),
                      ("gripper_states", "robot0_gripper_qpos")):
        demo["obs/" + name] = np.stack([obs[key] for obs in seen])[5:]
"""


@sim
def test_live_and_recorded_images_are_liberos_own(gl, tmp_path):
    """An official file, recorded with LIBERO's own environment, and a worker that repeats it.

    States and pixels of the worker equal LIBERO's to the last bit. A row of the loaded file holds
    what the worker saw at the row's state, and one step later or earlier it saw something else.
    """
    actions = np.random.default_rng(2).integers(-64, 65, (12, 7)) / 64  # float32 holds these
    recorder = subprocess.Popen([sys.executable, "-c", RECORD, gl, str(SIZE), str(tmp_path / SOUP),
                                 json.dumps(actions.tolist())], cwd=tmp_path)
    workers = libero.make_workers("libero_object", [0], 1, obs="rgb", image_size=SIZE, max_steps=12,
                                  gl=gl)
    queue = iter(torch.from_numpy(actions).float()[:, None, None])
    _, live = workers.play(lambda obs: (next(queue), {}), [3])
    workers.close()
    assert recorder.wait() == 0
    with h5py.File(tmp_path / SOUP) as content:
        own = {name: values[:] for name, values in content["data/demo_0/obs"].items()}
    state, images = live["state"].numpy(), live["rgb"].numpy()
    assert np.array_equal(own["ee_pos"].astype(np.float32)[:-1], state[6:, :3])
    assert np.array_equal(own["gripper_states"].astype(np.float32)[:-1], state[6:, 4:])
    for camera, name in enumerate(("agentview_rgb", "eye_in_hand_rgb")):
        upright = own[name][:-1, ::-1, ::-1].transpose(0, 3, 1, 2)
        assert upright.std() > 10 and np.array_equal(upright, images[6:, camera])

    (rows, acted), = libero_demos.recorded_demos("libero_object", [0], tmp_path, 1, False, "rgb",
                                                 SIZE)
    np.testing.assert_allclose(acted, actions[6:], rtol=1e-6)  # the first has no image before it
    np.testing.assert_allclose(rows["state"], state[6:], atol=4e-3)  # live: 2 ms older
    assert np.array_equal(rows["rgb"], images[6:])
    for other in (rows["rgb"][1:], images[6:-1]), (rows["rgb"][:-1], images[7:]):
        assert all((a.numpy() != b).any((1, 2, 3)).all() for a, b in zip(*other))


GLOW = """
import sys
from unittest import mock
from envs import libero
suite = libero.read_suite("libero_goal")
task, = [i for i, problem in enumerate(suite.problems) if "turn on" in problem.instruction.lower()]
sim = libero.LiberoSim("libero_goal", task, "rgb", gl=sys.argv[1], size=48)
other = libero.LiberoSim("libero_object", 0, "rgb", gl=sys.argv[1], size=48)
sim.reset(0)
other.reset(0)
stove = sim.env.get_object("flat_stove_1")
low, high = stove.object_properties["articulation"]["default_turnon_ranges"]
sim.data.joint(stove.joints[0]).qpos[0] = (low + high) / 2
sim.mj.mj_forward(sim.model, sim.data)
with mock.patch.object(sim.env, "_post_process", lambda: None):
    turned = sim.look()[0]  # the knob is turned, the burner still cold
red, green, blue = sim.look()[0].astype(int) - turned
assert red.max() > 30 and green.max() == blue.max() == 0, "the burner does not glow red"
soup = other.look()
sim.close()
assert (other.look() == soup).all(), "closing a simulator spoils another's textures"
print("glows")
"""


@sim
def test_a_burning_stove_glows_and_a_simulator_can_be_closed(gl):
    run = subprocess.run([sys.executable, "-c", GLOW, gl], capture_output=True, text=True, cwd=ROOT)
    assert run.stdout.strip().endswith("glows") and "Error" not in run.stderr, run.stderr[-2000:]


@sim
def test_films(gl, tmp_path):
    import imageio
    workers = libero.make_workers("libero_object", [0], 1, max_steps=3, action_repeat=2, gl=gl,
                                  film=tmp_path / "films")
    success, _ = workers.play(lambda obs: (torch.zeros(1, 1, 7), {}), [0, 1_500_000])
    workers.close()
    films = sorted((tmp_path / "films").iterdir())
    assert [film.name for film in films] == ["task0_placement0_failure.mp4",
                                             "task0_placement1500000_failure.mp4"]
    frames = imageio.mimread(films[0])
    assert not success.any() and len(frames) == 3 and frames[0].shape == (256, 512, 3)


# ------------------------------------------------------------------------------------------------
# Recorded demonstrations


@pytest.fixture(scope="module")
def recorded():
    folder, seen = recording()
    return Path(folder.name) / SOUP, seen


@functools.cache
def recording():
    """Two short episodes of the expert in the official file format, and the states seen live.

    The images are random: what matters is where each pixel of the file ends up.
    """
    soup, rng, seen = simulator("libero_object", 0), np.random.default_rng(0), []
    folder = tempfile.TemporaryDirectory()
    file = Path(folder.name) / SOUP
    with h5py.File(file, "w") as content:
        data = content.create_group("data")
        data.attrs["problem_info"] = json.dumps({"language_instruction": [soup.instruction]})
        for i in range(2):
            soup.reset(i)
            expert, actions, states = libero.ScriptedExpert(soup, rng), [], []
            for step in range(12):
                action = expert.act(soup)
                if step in (5, 6):  # two steps of doing nothing, gripper as before
                    action = np.append(np.zeros(6), actions[-1][6])
                actions.append(action)
                states.append(soup.env.sim.get_state().flatten())
                seen.append(soup.observe()["state"])
                soup.advance(action)
            demo = data.create_group(f"demo_{i}")
            demo.attrs["model_file"] = soup.xml
            demo["actions"], demo["states"] = np.stack(actions), np.stack(states)
            for camera in ("agentview_rgb", "eye_in_hand_rgb"):
                demo[f"obs/{camera}"] = rng.integers(0, 256, (12, SIZE, SIZE, 3), dtype=np.uint8)
    return folder, np.stack(seen)


@sim
def test_recorded_demos_give_the_states_that_were_seen(recorded, soup):
    file, seen = recorded
    demos = libero_demos.recorded_demos("libero_object", [0], file.parent, 5, False, "state")
    assert len(demos) == 2                                         # there are no more
    assert all(set(rows) == {"state", "tokens"} for rows, _ in demos)
    # what is seen live is one physics step (2 ms) older than the joints
    states = torch.cat([rows["state"] for rows, _ in demos]).numpy()
    np.testing.assert_allclose(states, seen, atol=2e-3)
    with h5py.File(file) as content:
        for i, (rows, actions) in enumerate(demos):
            assert actions.dtype == torch.float32 and rows["tokens"].shape == (12, 128)
            np.testing.assert_allclose(actions, content[f"data/demo_{i}/actions"][:], rtol=1e-6)
    assert bytes(demos[1][0]["tokens"][3].tolist()).decode().rstrip() == soup.instruction.lower()


@sim
def test_recorded_images_of_steps_that_were_left_out_serve_the_next(recorded):
    file, seen = recorded
    (rows, actions), = libero_demos.recorded_demos("libero_object", [0], file, 1, True, "rgb", SIZE)
    assert len(actions) == len(rows["state"]) == 9         # of 12; two did nothing, one is first
    moving = np.delete(seen[:12, :6], [0, 5, 6], 0)
    np.testing.assert_allclose(rows["state"].numpy(), moving, atol=2e-3)
    images = rows["rgb"]
    assert images.shape == (9, 2, 3, SIZE, SIZE) and images.dtype == torch.uint8
    with h5py.File(file) as content:
        for row, step in ((0, 1), (4, 7), (8, 11)):
            for camera, name in enumerate(("agentview", "eye_in_hand")):
                raw = content[f"data/demo_0/obs/{name}_rgb"][step - 1]
                upright = np.rot90(raw, 2).transpose(2, 0, 1)
                assert np.array_equal(images[row, camera].numpy(), upright)


@sim
def test_an_error_in_the_process_that_replays_is_one_line(recorded, tmp_path):
    (tmp_path / SOUP).write_bytes(recorded[0].read_bytes()[:10_000])
    with pytest.raises(SystemExit) as error:
        libero_demos.recorded_demos("libero_object", [0], tmp_path, 1, False, "rgb", 128)
    assert "--demos" in str(error.value) and "\n" not in str(error.value)


@sim
def test_a_suite_with_fixtures_is_replayed_where_they_stood(cabinet):
    """The cabinet of the recording stands elsewhere than in a fresh simulator."""
    cabinet.reset(1234)
    seen, state = cabinet.observe()["state"], cabinet.env.sim.get_state().flatten()
    root = ElementTree.fromstring(cabinet.xml)
    body = cabinet.env.obj_body_id["wooden_cabinet_1"]
    entry = root.find(f".//body[@name='{cabinet.model.body(body).name}']")
    entry.set("pos", " ".join(map(str, cabinet.model.body_pos[body])))
    entry.set("quat", " ".join(map(str, cabinet.model.body_quat[body])))
    cabinet.reset(0)
    again = cabinet.replay(state[None], ElementTree.tostring(root))[0]
    assert not np.allclose(cabinet.layout[0][body], cabinet.model.body_pos[body], atol=1e-4)
    np.testing.assert_allclose(again, seen, atol=1e-5)
