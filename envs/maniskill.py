"""ManiSkill: five tasks of a Panda arm, who shows how, and what the OOD suite changes. No learning.

    make_workers(task, num_envs).play(act, seeds) -> (success (episodes,) bool, rows): see Workers

The arm brings a cube to a goal, pushes one, stacks two, drops a ball into a bin, or follows a
sentence, "put the red cube on the green pad" (PutOnPad-v1, ours). An action moves its hand:

    action (4,) in [-1, 1]:  dx dy dz of the hand, 1 is 10 cm;  gripper, -1 close, +1 open;  20 Hz
"""

import functools
import importlib.util
import os
import subprocess
import sys
import warnings
from collections import namedtuple
from unittest.mock import Mock

import gymnasium as gym
import numpy as np
import torch

from envs.pad_words import HELD_OUT
from envs.workers import ChunkEnv, Workers, tokens

ACTION_DIM = 4  # of ManiSkill's controller pd_ee_delta_pos
PROPRIO = 5     # what the robot feels of itself: hand 3, gripper opening, holding; `proprioception`
REACH = 0.1     # metres that an action of 1 asks for

# ------------------------------------------------------------------------------------------------
# The tasks. Each is a row: what may be moved, where it should come, and who shows how.

# env is ManiSkill's task, a batch of one; an actor is a body in it, actor.pose.p (1, 3) its centre.
# objects(env) -> actors;  goals(env) -> where their centres should come, a list of (1, 3);
# skill: which scripted controller;  max_steps: what that one needs and half as much again.
Task = namedtuple("Task", "objects goals skill max_steps")
TASKS = {
    "PickCube-v1": Task(lambda env: [env.cube], lambda env: [env.goal_site.pose.p], "hold", 24),
    "PushCube-v1": Task(lambda env: [env.obj], lambda env: [env.goal_region.pose.p], "push", 24),
    "StackCube-v1": Task(lambda env: [env.cubeA], lambda env: [
        env.cubeB.pose.p + env.cubeB.pose.p.new_tensor([0, 0, 0.04])], "place", 40),
    "PlaceSphere-v1": Task(lambda env: [env.obj], lambda env: [
        env.bin.pose.p + env.bin.pose.p.new_tensor([0, 0, 0.0225])], "place", 40),
    "PutOnPad-v1": Task(lambda env: env.things, lambda env: list(env.pad_places.unbind(1)),
                        "place", 40),
}


def slots(task):
    """How many things and pads the state describes one by one; 0: an object and its goal."""
    return 9 if task == "PutOnPad-v1" else 0


def state_size(task, obs):
    """Proprioception, and without images three numbers for each slot, or for object and goal."""
    return PROPRIO + (obs == "state") * 3 * (slots(task) or 2)


def check_task(task):
    """SystemExit, one clear line, without ManiSkill or for a task without a controller here."""
    if importlib.util.find_spec("mani_skill") is None:
        raise SystemExit("no ManiSkill: pip install mani_skill")
    if task not in TASKS:
        raise SystemExit(f"--task {task}: choose {', '.join(TASKS)}; any other needs a scripted "
                         "controller to take demos from, beside `expert` in envs/maniskill.py")


def check_run(args):
    """The same for a run of 05; with --sim gpu also for what envs/maniskill_gpu.py cannot play."""
    check_task(args.task)
    if args.sim == "cpu":
        return
    for flag, given in {"--task PutOnPad-v1": args.task == "PutOnPad-v1", "--video": args.video,
                        "--obs rgb": args.obs == "rgb", "--eval-ood": args.eval_ood,
                        "--device cpu": args.device == "cpu"}.items():
        if given:
            raise SystemExit(f"--sim gpu: not with {flag}; give --sim cpu")
    from sapien import physx
    try:
        physx.enable_gpu()  # its library comes from SAPIEN's release page, at the first use
    except Exception as error:  # no network, no driver, half an archive: of many kinds
        told = str(error).split("\n")[0][:150]
        raise SystemExit(f"--sim gpu: no PhysX for a GPU in ~/.sapien/physx ({told}), and it could "
                         "not be fetched from github.com/sapien-sim/physx-precompiled") from None


# ------------------------------------------------------------------------------------------------
# The simulator


def physics_only():
    """Lets tasks made of primitive shapes run where nothing can draw; a no-op where something can.

    ManiSkill gives every shape a RenderMaterial even when nobody looks, and SAPIEN refuses to make
    one without a Vulkan device. Trying to make one is therefore the honest test.
    """
    import sapien
    from sapien.wrapper import actor_builder, urdf_loader
    try:
        sapien.render.RenderMaterial()
    except RuntimeError:  # "failed to find a rendering device"
        for module in (sapien.render, actor_builder.sapien.render, urdf_loader):
            module.RenderMaterial = Mock  # one class for all: they compare it


def find_renderer():
    """-> "cuda" or "pci:0": the Vulkan device that can draw, tried in a process of its own.

    Without a GPU a software driver does, chromium's SwiftShader. Where none is: SystemExit.
    """
    software = "/usr/lib/chromium/vk_swiftshader_icd.json"
    icd = {"VK_ICD_FILENAMES": os.environ.get("VK_ICD_FILENAMES", software)}
    for name, extra in ("cuda", {}), ("pci:0", {}), ("pci:0", icd):
        code = f"import sapien; assert sapien.Device('{name}').can_render()"
        if not subprocess.run([sys.executable, "-c", code], capture_output=True,
                              env={**os.environ, **extra}).returncode:
            os.environ.update(extra)  # the workers inherit it
            return name
    raise SystemExit("--obs rgb and --video need a Vulkan driver: `apt-get install chromium-common`"
                     f" brings one in software (VK_ICD_FILENAMES={software}); or use --obs state")


class ManiSkillSim:
    """One task on the CPU, below env.step: nothing is built that nobody reads, no reward and no
    observation inside a chunk. Physics and the success check are ManiSkill's own.

    obs: "state" or "rgb", see `observe`. renderer: of find_renderer, or None to draw nothing.
    changes: what a variant of the OOD suite changes, {what: how much}, as in the tables below.
    demo_noise: also observe the expert's action, and add noise of this std to what is executed, so
    that the demos also show how to recover; 0: the expert without noise.
    """

    def __init__(self, task, obs="state", renderer=None, changes=None, demo_noise=None):
        warnings.filterwarnings("ignore")  # the simulator's own, about drivers nobody needs here
        import mani_skill.envs  # noqa: F401
        from mani_skill.envs.utils.system import backend
        from envs import put_on_pad  # noqa: F401 (PutOnPad-v1)
        physics_only()
        self.task, self.obs, self.renderer = TASKS[task], obs, renderer
        self.changes, self.demo_noise = changes or {}, demo_noise
        backend.parse_backend_device_id = lambda name: (name, None)  # not at the colon of "pci:0"
        self.env = gym.make(task, num_envs=1, sim_backend="physx_cpu", reward_mode="none",
                            obs_mode="rgb" if renderer else "none", robot_uids="panda",
                            render_backend=renderer or "none",
                            control_mode="pd_ee_delta_pos").unwrapped
        for goal in self.env._hidden_objects if renderer else []:
            goal.show_visual()  # a goal that nobody sees cannot be reached
        self.env._hidden_objects = []
        # of `places`: which two are the object and its goal, which are on the table
        self.named, self.shown, self.sentence = [0, 1], np.ones(2, bool), ""
        self.apply_changes()

    def close(self):
        self.env.close()

    def apply_changes(self):
        """What a variant of the OOD suite changes once; the rest happens in reset and observe."""
        import sapien
        changes, env = self.changes, self.env
        for name in ("combinations", "sentence", "distractors", "spread", "cube_spawn_center"):
            if name in changes:
                assert hasattr(env, name), f"{env} has nothing called {name}"
                setattr(env, name, changes[name])
        if "arm_noise" in changes:
            env.table_scene.robot_init_qpos_noise = changes["arm_noise"]
        if "table" in changes:
            for material in self.materials(env.table_scene.table):
                material.set_base_color_texture(None)
                material.set_base_color([*changes["table"], 1])
        if "tint" in changes:  # shades of the things' colours that were never seen
            for material in self.materials(*self.task.objects(env)):
                now = np.float32(material.base_color[:3])
                material.set_base_color([*(now + changes["tint"] * (now[[1, 2, 0]] - now)), 1])
        if "light" in changes:
            scene = env.scene.sub_scenes[0]
            scene.set_ambient_light([0.3 * changes["light"]] * 3)
            for part in [c for entity in scene.entities for c in entity.components]:
                if isinstance(part, sapien.render.RenderLightComponent):
                    part.color = part.color * changes["light"]
        if "camera" in changes:
            camera, = env._sensors["base_camera"].camera._render_cameras
            pose = camera.local_pose
            camera.local_pose = sapien.Pose(pose.p + np.float32(changes["camera"]), pose.q)

    def materials(self, *actors):
        """What the visible parts of these are painted with."""
        import sapien
        kind = sapien.render.RenderBodyComponent
        shapes = [shape for actor in actors for entity in actor._objs
                  for shape in entity.find_component_by_type(kind).render_shapes]
        return [part.material for shape in shapes for part in getattr(shape, "parts", [shape])]

    def reset(self, seed):
        """Starts episode seed, an int in [0, 2^32): the same at any time, in any process."""
        env = self.env
        self.fresh_physics()
        env.reset(seed=int(seed))
        for actor in env.scene.actors.values():
            if actor.px_body_type == "dynamic":
                actor._bodies[0].wake_up()  # the time it has rested starts at zero
        if hasattr(env, "instructions"):
            self.named, self.shown = [env.target.item(), env.goal.item()], env.shown[0].numpy()
            self.sentence, = env.instructions
        # what a variant or a demo draws; the episode itself is ManiSkill's
        self.rng, self.noise = np.random.default_rng(seed), np.random.default_rng(seed)
        direction = self.rng.standard_normal(2)
        self.sideways = np.float32([*direction / np.linalg.norm(direction), 0])
        self.name, self.steps = f"{env.spec.id}_{seed}", 0

    def fresh_physics(self):
        """Moves everything into a new PhysX scene (2 ms), or one episode in ten would depend on the
        one before: bodies keep the time they have rested, scenes keep their contact caches."""
        import sapien
        scene = self.env.scene
        self.env._set_scene_config()  # gravity, solver: process-wide, read by the next lines
        system = sapien.physx.PhysxCpuSystem()
        system.timestep = scene.px.timestep
        old = scene.sub_scenes[0]
        new = sapien.Scene([system] + ([old.render_system] if self.renderer else []))
        entities = list(old.entities)  # all out before one goes in: a robot cannot be in two scenes
        for entity in entities:
            old.remove_entity(entity)
        for entity in entities:
            new.add_entity(entity)
        scene.sub_scenes, scene.px = [new], system

    def advance(self, action):
        """One control step (20 Hz): action (4,), clipped to [-1, 1] -> success, a bool."""
        self.steps += 1
        if self.demo_noise:
            action = action + self.demo_noise * self.noise.standard_normal(4) * [1, 1, 1, 0]
        if "moved" in self.changes and self.steps == 5:  # the object jumps, once
            actor = self.task.objects(self.env)[self.named[0]]
            pose = actor.pose
            pose.p = pose.p + torch.as_tensor(self.changes["moved"] * self.sideways)
            actor.set_pose(pose)
        self.aim(np.clip(np.asarray(action, np.float32), -1, 1))
        self.env._step_action(None)  # physics towards the joint targets just set
        return bool(self.env.evaluate()["success"])

    def aim(self, action):
        """pd_ee_delta_pos for one CPU robot: hand + delta -> inverse kinematics -> joint targets.

        The library does the same in batched torch: 1.5 ms of a 2.9 ms step, against 0.2 ms here.
        The order of operations is the library's, so that the physics stays equal to the last bit.
        """
        import sapien
        arm, gripper = self.env.agent.controller.controllers.values()
        robot, ik = self.env.agent.robot._objs[0], arm.kinematics
        base, hand, joints = robot.root_pose, arm.ee_link._objs[0].entity_pose, robot.qpos
        w = base.q[0]  # an upright base; PhysX returns 1.0000001 for its 1
        position = (w * -base.p) * w + (w * hand.p) * w  # the hand seen from the base
        turn = w * hand.q
        turn = turn if turn[0] >= 0 else -turn
        target = sapien.Pose(np.float32(REACH) * action[:3] + position, turn)
        goal, found, _ = ik.pmodel.compute_inverse_kinematics(
            ik.end_link_idx, target, initial_qpos=joints, active_qmask=ik.qmask, max_iterations=100)
        for joint, angle in zip(arm.joints, goal if found else joints):
            joint._objs[0].set_drive_target(np.float32(angle))
        low, high = gripper.action_space_low.numpy(), gripper.action_space_high.numpy()
        opening = 0.5 * (high + low) + 0.5 * (high - low) * action[3]
        for joint in gripper.joints:
            joint._objs[0].set_drive_target(opening[0])

    def places(self):
        """(P, 3): the objects, then the goals, in metres."""
        objects = [actor.pose.p for actor in self.task.objects(self.env)]
        return torch.cat(objects + self.task.goals(self.env)).numpy()

    def proprioception(self):
        """(5,): hand x y z, gripper opening (m), 1 if something is held."""
        env, held = self.env, False
        if self.task.skill != "push":
            held = any(env.agent.is_grasping(actor).item() for actor, shown in
                       zip(self.task.objects(env), self.shown) if shown)
        opening = env.agent.robot.get_qpos()[0, -2:].sum().item()
        return np.float32([*env.agent.tcp_pos[0].tolist(), opening, held])

    def observe(self):
        """{"state": (5 + 3 P,)}: proprioception, every place minus the hand; or with images
        {"state": (5,), "rgb": (1, 3, 128, 128) uint8}; the instruction's "tokens" (128,) uint8,
        blanks where the task has none; with demo_noise the expert's "action" (4,).

        Offsets generalise over the table. No quaternions: the hand points down, where their signs
        flip at random. Each thing and pad of PutOnPad has its own three numbers, zeros while it is
        parked: which of them matter stands in the instruction alone.
        """
        proprio, changes = self.proprioception(), self.changes
        obs = {"state": proprio, "tokens": tokens(self.sentence)}
        if self.demo_noise is not None:
            obs["action"] = self.expert()
        if self.obs == "rgb":
            rgb = self.look().transpose(2, 0, 1)[None]
            if "image_noise" in changes:
                rgb = rgb + self.rng.normal(0, 255 * changes["image_noise"], rgb.shape)
            return {**obs, "rgb": np.clip(rgb, 0, 255).astype(np.uint8)}
        offsets = self.places() - proprio[:3]
        if "pose_noise" in changes:
            offsets += changes["pose_noise"] * self.rng.standard_normal(offsets.shape)
        offsets *= self.shown[:, None]
        return {**obs, "state": np.concatenate([proprio, offsets.ravel()])}

    def look(self):
        """The camera's picture now: (height, width, 3) uint8."""
        return self.env._get_obs_sensor_data()["base_camera"]["rgb"][0].numpy()

    def expert(self):
        """What the scripted controller does now: (4,) float32."""
        proprio = self.proprioception()
        thing, goal = self.places()[self.named] - proprio[:3]
        return expert(self.task.skill, proprio[4] > 0, thing, goal)


def expert(skill, held, to_object, to_goal):
    """Waypoints as a function of the state alone: offsets from the hand (3,), in m -> action (4,).

    hold:  above the object, down, close, to the goal (which may be in the air)
    place: the same, but up before and down after the way across; then open, and away
    push:  closed fingers behind the object, then forward along x
    """
    norm, up = np.linalg.norm, np.float32([0, 0, 1])
    move, grip = 0 * up, -1
    if skill == "push":
        behind = to_object - np.float32([0.07, 0, 0])
        move = behind if norm(behind[:2]) < 0.02 else behind + 0.08 * up
        if abs(to_object[1]) < 0.01 and to_object[0] > 0.03 and abs(to_object[2]) < 0.015:
            move = np.float32([0.1, *to_object[1:]])
    else:
        rest = to_goal - to_object  # what the object has still to go
        over = norm(rest[:2]) < 0.012
        arrived = skill == "place" and over and abs(rest[2]) < 0.008
        if arrived:  # open; once it is open, away
            move, grip = (move if held else 0.1 * up), 1
        elif held and skill == "hold":
            move = to_goal
        elif held:
            low = rest[2] > -0.04 and norm(rest[:2]) > 0.03
            move = rest if over else 0.1 * up if low else rest + 0.06 * up
        elif norm(to_object) >= 0.012:  # otherwise it is between the fingers: close them
            move = to_object if norm(to_object[:2]) < 0.012 else to_object + 0.05 * up
            grip = 1
    return np.float32([*np.clip(move / REACH, -1, 1), grip])


# ------------------------------------------------------------------------------------------------
# Out of distribution: the paper's three axes. Nothing here is ever trained or validated on.

# What a policy sees of the poses, and of the images. What turned out to change nothing is not here:
# pose noise of 5 mm, a constant error of 10 mm, a fifth of the friction.
STATE_VISION = [("pose noise 10 mm", {"pose_noise": 0.01})]
RGB_VISION = [("table colour", {"table": (0.15, 0.3, 0.2)}), ("object shades", {"tint": 0.35}),
              ("dim light", {"light": 0.4}), ("camera moved 5 cm", {"camera": (0.03, 0.03, 0.03)}),
              ("image noise 0.05", {"image_noise": 0.05}),
              ("image noise 0.15", {"image_noise": 0.15})]
SEMANTIC = [("held-out combinations", {"combinations": HELD_OUT}),
            ("paraphrase", {"sentence": "move the {thing} onto the {pad} pad"}),
            ("pad named first", {"sentence": "on the {pad} pad, put the {thing}"})]
# In a state every thing and pad has a place of its own, and one more of them changed nothing.
RGB_SEMANTIC = SEMANTIC + [("second distractor object", {"distractors": (2, 1)}),
                           ("second distractor pad", {"distractors": (1, 2)})]
EXECUTION = [("robot start pose noise 0.1 rad", {"arm_noise": 0.1}),
             ("object moved 3 cm in mid-episode", {"moved": 0.03})]
STARTS = {"PutOnPad-v1": {"spread": 1.6}, "PickCube-v1": {"cube_spawn_center": (0, 0.2)}}


def variants(task, obs):
    """[(axis, variant, changes)] of a task and an observation mode; in-distribution first."""
    starts = [("starts outside the training region", STARTS[task])] if task in STARTS else []
    vision, semantic = {"state": (STATE_VISION, SEMANTIC), "rgb": (RGB_VISION, RGB_SEMANTIC)}[obs]
    suite = {"in-distribution": [("as in training", {})], "vision": vision,
             "semantic": semantic if task == "PutOnPad-v1" else [],
             "execution": starts + EXECUTION}
    return [(axis, *variant) for axis, kinds in suite.items() for variant in kinds]


# ------------------------------------------------------------------------------------------------
# Many of them


def make_workers(task, num_envs, horizon=4, max_steps=None, obs="state", renderer=None,
                 demo_noise=None, film=None):
    """num_envs simulators in a process each -> Workers; Workers.change(changes={...}): a variant.

    max_steps: the time limit in control steps; demos with noise on their actions have twice that.
    renderer: of find_renderer, for obs="rgb" or film. film: a folder for an mp4 of each episode.
    """
    max_steps = (max_steps or TASKS[task].max_steps) * (2 if demo_noise else 1)
    renderer, box = renderer if film or obs == "rgb" else None, gym.spaces.Box
    make_sim = functools.partial(ManiSkillSim, task, obs, renderer, demo_noise=demo_noise)
    space = {"state": box(-np.inf, np.inf, (state_size(task, obs),)),
             "tokens": box(0, 255, (128,), np.uint8)}
    if obs == "rgb":
        space["rgb"] = box(0, 255, (1, 3, 128, 128), np.uint8)
    if demo_noise is not None:
        space["action"] = box(-1, 1, (ACTION_DIM,))
    make_env = functools.partial(ChunkEnv, make_sim, gym.spaces.Dict(space), ACTION_DIM, max_steps,
                                 horizon, film=film)
    return Workers(make_env, num_envs, name=lambda seed: f"episode {seed} of {task}")
