"""05 - pi-StepNFT on a robot arm: ManiSkill, the critic it is measured against, the OOD suite.

The method of 03 unchanged on a second simulator: a Panda arm holds a cube at a goal, pushes,
stacks, or follows a sentence, "put the red cube on the green pad" (--task). A scripted controller
gives a few demonstrations, flow matching clones them (SFT), reinforcement learning lifts the clone:

    rollout (02: SDE, wide) -> label by success -> update (03: one-step ranking) -> EMA -> evaluate

New since 03: simulators in worker processes, checkpoints and --resume, camera images (--obs rgb),
PPO with a critic (--algo ppo) from the same clone (--sft), and a test out of distribution
(--eval-ood: vision, semantic, execution; never trained on). Many simulators in one process on a GPU
(--backend physx_cuda) are written below but were never run. Read `train`, near the end, first.
Defaults that differ from the paper's, because a few demos and two CPU cores are not a GPU cluster:
all K denoising steps of a chunk are trained on, not one; each start is played eight times and
labels are centered on its mean (a start that always fails says nothing); noise 0.3; the old policy
follows quickly. Each is a flag. `--rollout ode --target endpoint --loss weighted --labels binary`
is the form of DiffusionNFT. Left out: the vision-language backbone.

Run:     python 05_train_maniskill.py                       (4 to 8 minutes on two CPU cores)
         python 05_train_maniskill.py --task PutOnPad-v1 --num-demos 40 --sft-steps 3000
             --lr 3e-5 --dpo-beta 0.1 --eval-ood     (one line; 1000 SFT steps are too few)
         python 05_train_maniskill.py --eval-only runs/05_train_maniskill/best.pt
Prints:  success of SFT and of every evaluation with its 95 % interval, then RESULT.
Saves:   runs/05_train_maniskill/{sft.pt, last.pt, best.pt, log.csv, test.csv, learning.png,
         videos/}
"""

import argparse
import copy
import dataclasses
import functools
import importlib.util
import os
import subprocess
import sys
import time
import warnings
from collections import namedtuple
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch

flow = importlib.import_module("first_build.01_flow_policy")
sde = importlib.import_module("first_build.02_sde_sampler")
nft = importlib.import_module("first_build.03_step_loss")
# Borrowed from 01: FlowPolicy;  train_sft(policy, obs, chunks, steps) -> loss;  load_policy(path);
#   play(act, envs, seeds) -> (success, rows);  evaluate, the same with ODE actions -> success;
#   take(obs, rows), to_torch(obs, device): observation dicts;  SimulatorDied, raised by play;
#   wilson(success) -> 95 % interval;  report: prints it -> the rate.
# Borrowed from 02: transition(x_t, v, t_cur, t_next, sigma) -> (mean, std).
# Borrowed from 03: start_seeds -> seeds, for grouped labels each 8 times;  rollout -> (success,
#   batch), a row per chunk: obs, x, v, k, mask, episode;  labels -> y;  update -> info;  ema_decay,
#   ema_update.  For PPO the parts of update: minibatches -> [(rows, weight)];  recorded_steps ->
#   (ctx (b, C), {v_theta, v_old, x_t, ...});  optimise: one step -> info;  mean_info.
#   ChunkEnv, worker_envs: simulators in processes;  follow, expert_demos -> (obs, chunks) of the
#   scripted expert's successes;  evaluate, share, gather, join_ranks, rank_of: torchrun's ranks;
#   method(args) -> keywords of rollout and of update;  seed_iteration: a random stream for each;
#   add_run_flags, add_method_flags, check_run, check_method: flags;  save, save_run, load_run:
#   checkpoints;  log_row, draw_run: logs.

# Disjoint episodes: demos 0.., validation, test and OOD on their own ranges, training above them.
VALIDATION, TEST, OOD, TRAIN = 1_000_000, 1_500_000, 1_700_000, 2_000_000

ACTION_DIM = 4  # hand dx dy dz (1 is REACH), gripper (-1 close, +1 open): pd_ee_delta_pos
PROPRIO = 5  # what the robot feels of itself: hand 3, gripper opening, holding; `proprioception`
REACH = 0.1  # metres that an action of 1 asks for
CRITIC_LR = 1e-3  # PPO's value network starts from nothing, the policy does not

# ------------------------------------------------------------------------------------------------
# The tasks. Each is a row: what may be moved, where it should come, and who shows how.

# env is ManiSkill's task, n copies side by side; an actor is a body in it, actor.pose.p its centre.
# objects(env) -> actors;  goals(env) -> where their centres should come, a list of (n, 3);
# skill: which scripted controller;  max_steps: what that one needs and half as much again.
Task = namedtuple("Task", "objects goals skill max_steps")
TASKS = {
    "PickCube-v1": Task(lambda env: [env.cube], lambda env: [env.goal_site.pose.p], "hold", 24),
    "PushCube-v1": Task(lambda env: [env.obj], lambda env: [env.goal_region.pose.p], "push", 24),
    "StackCube-v1": Task(lambda env: [env.cubeA], lambda env: [raised(env.cubeB.pose.p, 0.04)],
                         "place", 40),
    "PlaceSphere-v1": Task(lambda env: [env.obj], lambda env: [raised(env.bin.pose.p, 0.0225)],
                           "place", 40),
    "PutOnPad-v1": Task(lambda env: env.things, lambda env: list(env.pad_places.unbind(1)),
                        "place", 40),
}
# PutOnPad-v1, ours: an instruction names one of six things and one of three pads. A thing is a
# number 0-5, 2 * colour + shape, a pad 0-2, its colour. A slot counts both: things 0-5, pads 6-8.
COLOURS = {"red": (0.9, 0.1, 0.1, 1), "green": (0.1, 0.7, 0.1, 1), "blue": (0.1, 0.2, 0.9, 1)}
SHAPES = "cube", "cylinder"
COMBINATIONS = [(thing, pad) for thing in range(6) for pad in range(3)]
# A Latin square: every colour, shape and pad, and every pair of two, is trained; a third is not.
HELD_OUT = [(thing, pad) for thing, pad in COMBINATIONS if (thing // 2 + thing % 2 + pad) % 3 == 0]
TRAINED = [c for c in COMBINATIONS if c not in HELD_OUT]
SENTENCE = "put the {thing} on the {pad} pad"


def raised(position, height):
    return position + torch.tensor([0, 0, height], device=position.device)


@functools.cache
def register_put_on_pad():
    """PutOnPad-v1 the ManiSkill way; inside a function, so that importing 05 loads no simulator.

    Two things and two pads stand on a 2 x 4 grid of places, 12 cm apart and jittered by 2 cm; the
    others are parked behind the robot. Success: the right thing lies still on the right pad, and
    the gripper is open. Class attributes are what the OOD suite changes.
    """
    from mani_skill.envs.sapien_env import BaseEnv
    from mani_skill.sensors.camera import CameraConfig
    from mani_skill.utils import sapien_utils
    from mani_skill.utils.building import actors
    from mani_skill.utils.registration import register_env
    from mani_skill.utils.scene_builder.table import TableSceneBuilder
    from mani_skill.utils.structs.pose import Pose
    import sapien

    @register_env("PutOnPad-v1", max_episode_steps=60)
    class PutOnPad(BaseEnv):
        half, pad_half = 0.02, 0.035                              # m
        # what the OOD suite changes; distractors: how many other things, how many other pads are
        # shown; spread: scales the grid of places
        combinations, sentence, distractors, spread = TRAINED, SENTENCE, (1, 1), 1.0

        @property
        def _default_sensor_configs(self):
            pose = sapien_utils.look_at(eye=[0.35, 0, 0.5], target=[-0.05, 0, 0.05])
            return [CameraConfig("base_camera", pose, 128, 128, 1.0, 0.01, 100)]

        def _load_agent(self, options):
            super()._load_agent(options, sapien.Pose([-0.615, 0, 0]))

        def _load_scene(self, options):
            self.table_scene = TableSceneBuilder(self)
            self.table_scene.build()
            n, self.things, self.pads = self.num_envs, [], []
            for name, colour in COLOURS.items():
                parked = dict(color=colour, initial_pose=sapien.Pose([-0.65, 1, 0.1]))
                self.things += [
                    actors.build_cube(self.scene, self.half, name=f"{name} cube", **parked),
                    actors.build_cylinder(self.scene, self.half, self.half,
                                          name=f"{name} cylinder", **parked)]
                flat = [self.pad_half, self.pad_half, 0.001]
                self.pads.append(actors.build_box(self.scene, flat, name=f"{name} pad",
                                                  body_type="kinematic", add_collision=False,
                                                  **parked))
            # of the episode: slots of the thing and pad that are named; slots that are shown
            self.target, self.goal = torch.zeros(2, n, dtype=torch.long, device=self.device)
            self.shown = torch.zeros(n, 9, dtype=torch.bool, device=self.device)
            self.pad_places = torch.zeros(n, 3, 3, device=self.device)
            self.instructions = [""] * n

        def _initialize_episode(self, env_idx, options):
            self.table_scene.initialize(env_idx)
            poses = torch.zeros(len(env_idx), 9, 3)
            for row, i in enumerate(env_idx.tolist()):
                choice = torch.randint(len(self.combinations), (1,)).item()
                thing, pad = self.combinations[choice]
                others = [t for t in torch.randperm(6).tolist() if t != thing]
                pads = [p for p in torch.randperm(3).tolist() if p != pad]
                used = [thing, *others[:self.distractors[0]],
                        6 + pad, *(6 + p for p in pads[:self.distractors[1]])]
                cells = torch.randperm(8)[:len(used)]
                xy = torch.stack([cells % 2 - 0.5, cells // 2 - 1.5], 1) * 0.12 * self.spread
                poses[row, :, 0], poses[row, :, 1] = -0.65, 0.7 + 0.06 * torch.arange(9)
                poses[row, used, :2] = xy + 0.04 * torch.rand(len(used), 2) - 0.02
                self.target[i], self.goal[i] = thing, 6 + pad
                self.shown[i] = False
                self.shown[i, used] = True
                colours = list(COLOURS)
                self.instructions[i] = self.sentence.format(
                    thing=f"{colours[thing // 2]} {SHAPES[thing % 2]}", pad=colours[pad])
            poses = poses.to(self.device)
            poses[..., 2] = self.half
            self.pad_places[env_idx] = poses[:, 6:]
            for k, actor in enumerate([*self.things, *self.pads]):
                # a cylinder's axis is x: turn it up; a pad lies at 0.05 half, its half thickness
                upright = [0.5**0.5, 0, 0.5**0.5, 0] if k % 2 and k < 6 else [1, 0, 0, 0]
                place = poses[:, k] if k < 6 else poses[:, k] * poses.new_tensor([1, 1, 0.05])
                actor.set_pose(Pose.create_from_pq(place, upright))
                if k < 6:
                    actor.set_linear_velocity(torch.zeros(3))
                    actor.set_angular_velocity(torch.zeros(3))

        def evaluate(self):
            success = self.agent.robot.get_qpos()[:, -2:].sum(1) > 3 * self.half  # let go
            if success.any():
                every = torch.arange(self.num_envs)

                def of_target(values):
                    return torch.stack(values, 1)[every, self.target]
                away = (of_target([t.pose.p for t in self.things])
                        - self.pad_places[every, self.goal - 6]).abs()
                success = success & (away[:, :2] < self.pad_half).all(1) & (away[:, 2] < 0.005)
                success &= of_target([t.linear_velocity for t in self.things]).norm(dim=1) < 0.01
                success &= of_target([t.angular_velocity for t in self.things]).norm(dim=1) < 0.5
            return {"success": success}


# ------------------------------------------------------------------------------------------------
# The simulator


def physics_only():
    """Lets tasks made of primitive shapes run where nothing can draw; a no-op where something can.

    ManiSkill gives every shape a RenderMaterial even when nobody looks, and SAPIEN refuses to make
    one without a Vulkan device. Trying to make one is therefore the honest test.
    """
    import sapien
    import sapien.wrapper.actor_builder as actors
    import sapien.wrapper.urdf_loader as robots
    try:
        sapien.render.RenderMaterial()
        return
    except RuntimeError:  # "failed to find a rendering device"
        pass

    class NoMaterial:
        def __init__(self, *args, **kwargs):
            pass

        def __getattr__(self, name):  # set_base_color(...) and friends do nothing
            return lambda *args: None

    for module in (sapien.render, actors.sapien.render, robots):  # they compare types: one class
        module.RenderMaterial = NoMaterial


def find_renderer():
    """-> "cuda" or "pci:0": the Vulkan device that can draw, tried in a process of its own.

    Without a GPU a software driver does: SwiftShader, which Debian ships with chromium.
    """
    software = "/usr/lib/chromium/vk_swiftshader_icd.json"
    attempts = [{}]
    if "VK_ICD_FILENAMES" not in os.environ and Path(software).exists():
        attempts.append({"VK_ICD_FILENAMES": software})
    for extra in attempts:
        for name in ("cuda", "pci:0"):
            attempt = f"import sapien; assert sapien.Device('{name}').can_render()"
            found = subprocess.run([sys.executable, "-c", attempt], capture_output=True,
                                   env={**os.environ, **extra})
            if found.returncode == 0:
                os.environ.update(extra)  # the workers inherit it
                return name
    raise SystemExit("--obs rgb and --video need a Vulkan driver: `apt-get install chromium-common`"
                     f" brings one in software (VK_ICD_FILENAMES={software}); or use --obs state")


@functools.cache
def draw_with(name):
    """ManiSkill takes the colon of "pci:0" for its own: hand it the device itself."""
    import sapien
    from mani_skill.envs import sapien_env
    parse = sapien_env.parse_sim_and_render_backend

    def parse_both(sim, render):
        if render != name:
            return parse(sim, render)
        return dataclasses.replace(parse(sim, "none"), render_device=sapien.Device(name),
                                   render_backend=name)

    sapien_env.parse_sim_and_render_backend = parse_both


def check_task(task):
    """One clear line for a task that does not exist or has no controller here."""
    if importlib.util.find_spec("mani_skill") is None:
        raise SystemExit("no ManiSkill: pip install mani_skill")
    if task in TASKS:
        return
    import mani_skill.envs  # noqa: F401  (importing it registers the tasks)
    from mani_skill.utils.registration import REGISTERED_ENVS
    if task not in REGISTERED_ENVS:
        raise SystemExit(f"--task {task} is not a ManiSkill task; try {', '.join(TASKS)}")
    raise SystemExit(f"--task {task} has no scripted controller here to take demos from; "
                     f"choose {', '.join(TASKS)}, or write one beside `expert`")


class ManiSkillSim:
    """n copies of one task side by side: n = 1 on physx_cpu, many on physx_cuda.

    It steps ManiSkill's BaseEnv below env.step, so nothing is built that nobody reads: no reward,
    no observation inside a chunk. Physics and the success check are ManiSkill's own.
    renderer: of find_renderer, or None to draw nothing. changes: what a variant of the OOD suite
    changes, {what: how much}, as the tables below have it (STATE_VISION to STARTS).
    """

    def __init__(self, task, num_envs=1, backend="physx_cpu", obs="state", renderer=None,
                 changes=()):
        warnings.filterwarnings("ignore")
        import mani_skill.envs  # noqa: F401
        register_put_on_pad()
        self.task, self.obs, self.renderer = TASKS[task], obs, renderer
        self.changes = dict(changes)
        physics_only()
        if renderer:
            draw_with(renderer)
        self.env = gym.make(task, num_envs=num_envs, sim_backend=backend, reward_mode="none",
                            obs_mode="rgb" if renderer else "none", robot_uids="panda",
                            render_backend=renderer or "none",
                            control_mode="pd_ee_delta_pos").unwrapped
        self.num_envs, self.seeds = num_envs, np.zeros(num_envs, np.int64)
        # of what a variant draws; the episode itself is ManiSkill's
        self.rngs, self.clock = [None] * num_envs, np.zeros(num_envs, int)
        self.bias, self.moves = np.zeros((2, num_envs, 3), np.float32)  # directions
        for goal in self.env._hidden_objects if renderer else []:
            goal.show_visual()  # a goal that nobody sees cannot be reached
        self.env._hidden_objects = []
        self.initialize = self.env._initialize_episode
        if num_envs > 1:
            self.env._initialize_episode = self.initialize_each
        self.apply_changes()

    def apply_changes(self):
        """What a variant of the OOD suite changes once; the rest happens in reset and observe."""
        changes, env = self.changes, self.env
        for name in ("combinations", "sentence", "distractors", "spread", "cube_spawn_center"):
            if name in changes:
                assert hasattr(env, name), f"{env} has nothing called {name}"
                setattr(env, name, changes[name])
        if "arm_noise" in changes:
            env.table_scene.robot_init_qpos_noise = changes["arm_noise"]
        if "friction" in changes:
            import sapien
            fingers = [env.agent.finger1_link, env.agent.finger2_link]
            for body in [b for a in [*self.task.objects(env), *fingers] for b in a._bodies]:
                for shape in body.get_collision_shapes():
                    old = shape.get_physical_material()
                    shape.set_physical_material(sapien.physx.PhysxMaterial(
                        changes["friction"] * old.static_friction,
                        changes["friction"] * old.dynamic_friction, old.restitution))
        if "table" in changes:
            for material in self.materials(env.table_scene.table._objs):
                material.set_base_color_texture(None)
                material.set_base_color([*changes["table"], 1])
        if "tint" in changes:  # shades of the things' colours that were never seen
            # all copies of a thing share the material of the first
            for material in self.materials([a._objs[0] for a in self.task.objects(env)]):
                now = np.float32(material.base_color[:3])
                material.set_base_color([*(now + changes["tint"] * (now[::-1] - now)), 1])
        if "light" in changes:
            import sapien
            for scene in env.scene.sub_scenes:
                scene.set_ambient_light([0.3 * changes["light"]] * 3)
                for part in [c for entity in scene.entities for c in entity.components]:
                    if isinstance(part, sapien.render.RenderLightComponent):
                        part.color = part.color * changes["light"]
        if "camera" in changes:
            for camera in env._sensors["base_camera"].camera._render_cameras:
                pose = camera.local_pose
                pose.p = pose.p + np.float32(changes["camera"])
                camera.local_pose = pose

    def materials(self, entities):
        """What the visible parts of these are painted with."""
        import sapien
        kind = sapien.render.RenderBodyComponent
        shapes = [s for e in entities for s in e.find_component_by_type(kind).render_shapes]
        return [part.material for shape in shapes for part in getattr(shape, "parts", [shape])]

    def reset(self, seeds, which):
        """Starts episode seeds[j] in env which[j]; a seed is the same episode at any time."""
        self.seeds[which] = seeds
        index = torch.as_tensor(which, device=self.env.device)
        if not self.env.gpu_sim_enabled:
            self.fresh_physics()
        self.env.reset(seed=self.seeds.tolist(), options={"env_idx": index})
        if not self.env.gpu_sim_enabled:
            for body in self.bodies():
                body.wake_up()  # the time a body has rested starts at zero
        for i in which:
            self.rngs[i], self.clock[i] = np.random.default_rng(self.seeds[i]), 0
            direction = self.rngs[i].standard_normal(3)
            self.bias[i] = direction / np.linalg.norm(direction)
            self.moves[i] = [*direction[:2] / np.linalg.norm(direction[:2]), 0]
        self.fresh = np.zeros(self.num_envs, bool)  # reset, and not moved since: proprioception
        self.fresh[which] = True

    def bodies(self):
        actors = self.env.scene.actors.values()
        return [actor._bodies[0] for actor in actors if actor.px_body_type == "dynamic"]

    def fresh_physics(self):
        """Moves everything into a new PhysX scene (2 ms), or one episode in ten would depend on the
        one before: bodies keep the time they have rested, scenes keep their contact caches."""
        import sapien
        scene = self.env.scene
        self.env._set_scene_config()  # gravity, solver: process-wide, read by the next lines
        for body in self.bodies():
            body.put_to_sleep()
        system = sapien.physx.PhysxCpuSystem()
        system.timestep = scene.px.timestep
        old = scene.sub_scenes[0]
        new = sapien.Scene([system] + ([old.render_system] if self.renderer else []))
        entities = list(old.entities)
        for entity in entities:  # all out before the first goes in: a robot cannot be in two scenes
            old.remove_entity(entity)
        for entity in entities:
            new.add_entity(entity)
        scene.sub_scenes, scene.px = [new], system

    def initialize_each(self, env_idx, options):
        """ManiSkill draws a whole batch from its first seed; here each env draws from its own."""
        env, scene = self.env, self.env.scene
        for i in env_idx.tolist():
            torch.manual_seed(int(self.seeds[i]))  # env.reset restores torch's generator
            env._episode_rng = np.random.RandomState(self.seeds[i])
            scene._reset_mask = torch.zeros_like(scene._reset_mask)
            scene._reset_mask[i] = True            # what set_pose and set_qpos write to
            self.initialize(torch.as_tensor([i], device=env.device), options)

    def advance(self, actions):
        """One control step (20 Hz): actions (n, 4) in [-1, 1] -> success (n,) bool."""
        actions = np.clip(np.asarray(actions, np.float32), -1, 1)
        if "moved" in self.changes:
            self.move()
        if self.env.gpu_sim_enabled:
            self.env._step_action(torch.as_tensor(actions, device=self.env.device))
        else:
            self.aim(actions[0])
            self.env._step_action(None)  # physics towards the joint targets just set
        self.fresh[:] = False
        return self.env.evaluate()["success"].cpu().numpy()

    def move(self):
        """Shifts the object once, in its fifth control step, by changes["moved"] metres."""
        scene, objects = self.env.scene, self.task.objects(self.env)
        self.clock += 1
        for i in np.flatnonzero(self.clock == 5):
            actor = objects[self.slots()[0][i]]
            pose, scene._reset_mask = actor.pose[i:i + 1], torch.zeros_like(scene._reset_mask)
            scene._reset_mask[i] = True
            shift = torch.as_tensor(self.changes["moved"] * self.moves[i], device=pose.p.device)
            pose.p = pose.p + shift
            actor.set_pose(pose)
            scene._reset_mask[:] = True
        if self.env.gpu_sim_enabled and (self.clock == 5).any():
            scene._gpu_apply_all()
            scene._gpu_fetch_all()

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

    def slots(self):
        """(n,), (n,): which of the places below is the object, and which is its goal."""
        if hasattr(self.env, "target"):
            return self.env.target.tolist(), self.env.goal.tolist()
        return [0] * self.num_envs, [1] * self.num_envs

    def proprioception(self):
        """(n, 5): hand x y z, gripper opening (m), 1 if something is held."""
        env = self.env
        held = torch.zeros(self.num_envs, dtype=torch.bool, device=env.device)
        if self.task.skill != "push":
            for k, actor in enumerate(self.task.objects(env)):
                if not hasattr(env, "shown") or env.shown[:, k].any():
                    held |= env.agent.is_grasping(actor)
        # PhysX still lists the contacts of the last step, so a cube that was held when its episode
        # ended would count as grasped.
        held = held.cpu().numpy() & ~self.fresh
        opening = env.agent.robot.get_qpos()[:, -2:].sum(1, keepdim=True)
        hand = torch.cat([env.agent.tcp_pos, opening], 1).cpu().numpy()
        return np.concatenate([hand, held[:, None]], 1).astype(np.float32)

    def places(self):
        """(n, P, 3): the objects, then the goals, in metres."""
        objects = [actor.pose.p for actor in self.task.objects(self.env)]
        return torch.stack(objects + self.task.goals(self.env), 1).cpu().numpy()

    def observe(self):
        """{"state": (n, 5 + 3 P)}: proprioception, every place minus the hand; or with images
        {"state": (n, 5), "rgb": (n, 1, 3, height, width)}; and the instruction of PutOnPad.

        Offsets generalise over the table where poses would have to be seen everywhere. No
        quaternions: the hand always points down, where their signs flip at random. Each thing and
        pad of PutOnPad has its own three numbers, zeros while it is parked: which of them matter
        stands in the instruction alone.
        """
        proprio, changes = self.proprioception(), self.changes
        obs = {"state": proprio}
        if hasattr(self.env, "instructions"):
            obs["instruction"] = list(self.env.instructions)
        if self.obs == "rgb":
            rgb = self.look()
            if "image_noise" in changes:
                noise = [rng.normal(0, 255 * changes["image_noise"], rgb.shape[1:])
                         for rng in self.rngs]
                rgb = np.clip(rgb + np.stack(noise), 0, 255).astype(np.uint8)
            return {**obs, "rgb": rgb}
        offsets = self.places() - proprio[:, None, :3]
        if "pose_bias" in changes:
            offsets += changes["pose_bias"] * self.bias[:, None]
        if "pose_noise" in changes:
            offsets += changes["pose_noise"] * np.stack(
                [rng.standard_normal(offsets.shape[1:]) for rng in self.rngs])
        if hasattr(self.env, "shown"):
            offsets *= self.env.shown.cpu().numpy()[..., None]
        obs["state"] = np.concatenate([proprio, offsets.reshape(self.num_envs, -1)],
                                      1).astype(np.float32)
        return obs

    def look(self):
        """The camera's picture now: (n, 1, 3, height, width) uint8."""
        data = self.env._get_obs_sensor_data()["base_camera"]["rgb"]
        return data.permute(0, 3, 1, 2)[:, None].cpu().numpy()

    def expert(self):
        """What the scripted controller does now: (n, 4)."""
        proprio, places, every = self.proprioception(), self.places(), np.arange(self.num_envs)
        thing, goal = (places[every, slots] - proprio[:, :3] for slots in self.slots())
        return expert(self.task.skill, proprio, thing, goal)


def expert(skill, proprio, to_object, to_goal):
    """Waypoints as a function of the state alone: proprio (n, 5), offsets (n, 3) -> action (n, 4).

    hold:  above the object, down, close, to the goal (which may be in the air)
    place: the same, but up before and down after the way across; then open, and away
    push:  closed fingers behind the object, then forward along x
    """
    def flat(offset):
        return np.linalg.norm(offset[:, :2], axis=1, keepdims=True)

    up, held = np.float32([0, 0, 1]), proprio[:, 4:] > 0
    if skill == "push":
        behind = to_object - np.float32([0.07, 0, 0])
        lined_up = (np.abs(to_object[:, 1:2]) < 0.01) & (to_object[:, :1] > 0.03)
        low = np.abs(to_object[:, 2:]) < 0.015
        forward = to_object * np.float32([0, 1, 1]) + np.float32([0.1, 0, 0])
        move = np.where(lined_up & low, forward, np.where(flat(behind) < 0.02, behind,
                                                          behind + 0.08 * up))
        grip = np.full_like(held, -1, dtype=np.float32)
    else:
        near = np.linalg.norm(to_object, axis=1, keepdims=True) < 0.012
        fetch = np.where(near, 0, np.where(flat(to_object) < 0.012, to_object,
                                           to_object + 0.05 * up))
        carry, rest = to_goal, to_goal - to_object  # rest: what the object has still to go
        arrived = np.zeros_like(held)
        if skill == "place":
            over = flat(rest) < 0.012
            arrived = over & (np.abs(rest[:, 2:]) < 0.008)
            low = rest[:, 2:] > -0.04
            carry = np.where(over, rest, np.where(low & (flat(rest) > 0.03), 0.1 * up,
                                                  rest + 0.06 * up))
            fetch = np.where(arrived, 0.1 * up, fetch)
        move = np.where(held, np.where(arrived, 0, carry), fetch)
        grip = np.where(arrived, 1, np.where(near | held, -1, 1))
    return np.concatenate([np.clip(move / REACH, -1, 1), grip], axis=1).astype(np.float32)


class OneSim:
    """ManiSkillSim with n = 1, without the batch dimension: what ChunkEnv drives in a worker.

    demo_noise: also observe the expert's action, and add noise of this std to what is executed, so
    that the demos also show how to recover. film: (folder, time limit) for an mp4 of each episode.
    """

    def __init__(self, task, demo_noise=None, film=None, **kinds):
        self.task, self.demo_noise, self.film = task, demo_noise, film
        self.sim = ManiSkillSim(task, **kinds)

    def reset(self, seed):
        self.sim.reset([seed], [0])
        self.rng, self.frames, self.seed = np.random.default_rng(seed), [], seed

    def advance(self, action):
        if self.demo_noise:
            action = action + self.demo_noise * self.rng.standard_normal(4) * [1, 1, 1, 0]
        success = self.sim.advance(action[None])[0]
        if self.film:
            folder, max_steps = self.film
            self.frames.append(self.sim.look()[0, 0].transpose(1, 2, 0))
            if success or len(self.frames) == max_steps:
                import imageio
                folder.mkdir(parents=True, exist_ok=True)
                name = f"{self.task}_{self.seed}_{'success' if success else 'failure'}.mp4"
                imageio.mimwrite(folder / name, self.frames, fps=20)
        return success

    def observe(self):
        obs = self.sim.observe()
        if self.demo_noise is not None:
            obs["action"] = self.sim.expert()
        return {k: v[0] for k, v in obs.items()}


class TaskEnv(nft.ChunkEnv):
    """ChunkEnv whose simulator can be replaced by one with a variant of the OOD suite."""

    def change(self, changes):
        self.make_sim, self.sim = functools.partial(self.make_sim, changes=changes), None


class CudaEnvs(gym.vector.VectorEnv):
    """TaskEnv for n simulators in this process (physx_cuda): the same chunks, batched."""

    metadata = {"autoreset_mode": gym.vector.AutoresetMode.DISABLED}

    def __init__(self, make_sim, num_envs, max_steps, demo_noise=None):
        self.make_sim, self.sim, self.demo_noise = make_sim, make_sim(), demo_noise
        self.num_envs, self.max_steps = num_envs, max_steps
        self.steps, self.over = np.zeros(num_envs, int), np.ones(num_envs, bool)
        self.rng = np.random.default_rng(0)

    def call(self, name, changes):  # what AsyncVectorEnv.call("change", changes) does to workers
        self.sim.env.close()
        self.sim = self.make_sim(changes=changes)

    def observe(self):
        more = {} if self.demo_noise is None else {"action": self.sim.expert()}
        return {**self.sim.observe(), **more}

    def reset(self, *, seed, options=None):
        which = np.flatnonzero((options or {}).get("reset_mask", np.ones(self.num_envs, bool)))
        self.sim.reset(np.asarray(seed)[which], which)
        self.steps[which], self.over[which] = 0, False
        return self.observe(), {}

    def step(self, chunks):
        success, executed = np.zeros(self.num_envs, bool), np.zeros(self.num_envs, int)
        for h in range(chunks.shape[1]):
            live = ~self.over
            if not live.any():
                break
            actions = chunks[:, h]
            if self.demo_noise:
                actions = actions + (self.demo_noise * self.rng.standard_normal(actions.shape)
                                     * [1, 1, 1, 0])
            arrived = self.sim.advance(actions * live[:, None])
            executed, self.steps = executed + live, self.steps + live
            success |= live & arrived
            self.over = self.over | arrived | (self.steps >= self.max_steps)
        info = {"success": success, "executed": executed}
        return self.observe(), success * 1.0, success, self.over & ~success, info


def state_size(task, obs):
    """Proprioception, and without images three numbers for each object and goal."""
    return PROPRIO + (obs == "state") * 3 * (9 if task == "PutOnPad-v1" else 2)


def make_envs(args, demo_noise=None, film=None):
    """Worker processes on the CPU, or one process with many simulators on the GPU.

    Demos, played with demo_noise, may take twice as long.
    """
    max_steps = args.max_steps * (2 if demo_noise else 1)
    drawn = film or args.obs == "rgb"
    kinds = dict(task=args.task, obs=args.obs, renderer=args.renderer if drawn else None)
    if args.backend == "physx_cuda" and not film:
        make_sim = functools.partial(ManiSkillSim, num_envs=args.num_envs, backend=args.backend,
                                     **kinds)
        return CudaEnvs(make_sim, args.num_envs, max_steps, demo_noise)
    box = gym.spaces.Box
    space = {"state": box(-np.inf, np.inf, (state_size(args.task, args.obs),))}
    if args.obs == "rgb":
        space["rgb"] = box(0, 255, (1, 3, 128, 128), np.uint8)
    if args.task == "PutOnPad-v1":
        space["instruction"] = gym.spaces.Text(100, charset="abcdefghijklmnopqrstuvwxyz ,")
    if demo_noise is not None:
        space["action"] = box(-1, 1, (ACTION_DIM,))
    make_sim = functools.partial(OneSim, demo_noise=demo_noise, **kinds,
                                 film=film and (film, args.max_steps))
    make = functools.partial(TaskEnv, make_sim, gym.spaces.Dict(space), ACTION_DIM,
                             max_steps, args.horizon)
    return nft.worker_envs(make, min(args.num_envs, args.video) if film else args.num_envs)


# ------------------------------------------------------------------------------------------------
# Demonstrations


def collect_demos(args):
    """The expert's successes -> (obs of N rows, chunks (N, H, 4))."""
    first = args.seed * 1000
    return nft.expert_demos(args, make_envs(args, demo_noise=args.demo_noise),
                            range(first, first + args.num_demos))


def test_expert(args):
    """--expert-only: the controller without noise, on --task or all; --eval-ood: each variant."""
    rates, start, limit = [], time.time(), args.max_steps
    for task in TASKS if args.task == "all" else [args.task]:
        args.task, args.max_steps = task, limit or TASKS[task].max_steps
        envs, seeds = make_envs(args, demo_noise=0), range(TEST, TEST + args.test_episodes)
        for axis, variant, changes in variants(args) if args.eval_ood else [("", "", {})]:
            envs.call("change", changes)
            success, rows = flow.play(nft.follow, envs, seeds, task)
            (low, high), steps = flow.wilson(success), torch.bincount(rows["episode"]).numpy()
            name = f"{task} {variant}".strip()
            print(f"{name}: {success.mean():.2f} [{low:.2f}, {high:.2f}], "
                  f"{steps[success].mean():.0f} steps", flush=True)
            nft.log_row(Path(args.out) / "experts.csv", {
                "task": task, "axis": axis, "variant": variant, "episodes": len(success),
                "success": success.mean(), "low": low, "high": high,
                "mean_steps": steps[success].mean(), "max_steps": args.max_steps})
            rates.append(success.mean())
        envs.close()
    print(f"RESULT rows={len(rates)} worst={min(rates):.3f} episodes={args.test_episodes} "
          f"seconds={time.time() - start:.0f}")


# ------------------------------------------------------------------------------------------------
# Out of distribution: the paper's three axes. Nothing here is ever trained or validated on.

# What a policy sees of the poses, and of the images
STATE_VISION = [("pose noise 5 mm", {"pose_noise": 0.005}),
                ("pose noise 10 mm", {"pose_noise": 0.01}),
                ("pose bias 5 mm", {"pose_bias": 0.005}), ("pose bias 10 mm", {"pose_bias": 0.01})]
RGB_VISION = [("table colour", {"table": (0.15, 0.3, 0.2)}), ("object shades", {"tint": 0.35}),
              ("dim light", {"light": 0.4}), ("camera moved 5 cm", {"camera": (0.03, 0.03, 0.03)}),
              ("image noise 0.05", {"image_noise": 0.05}),
              ("image noise 0.15", {"image_noise": 0.15})]
SEMANTIC = [("held-out combinations", {"combinations": HELD_OUT}),
            ("paraphrase", {"sentence": "move the {thing} onto the {pad} pad"}),
            ("pad named first", {"sentence": "on the {pad} pad, put the {thing}"}),
            ("second distractor object", {"distractors": (2, 1)}),
            ("second distractor pad", {"distractors": (1, 2)})]
EXECUTION = [("robot start pose noise 0.1 rad", {"arm_noise": 0.1}),
             ("object moved 3 cm in mid-episode", {"moved": 0.03}),
             ("friction x 0.2", {"friction": 0.2})]
STARTS = {"PutOnPad-v1": {"spread": 1.6}, "PickCube-v1": {"cube_spawn_center": (0, 0.2)}}


def variants(args):
    """[(axis, variant, changes)] of a task and an observation mode; in-distribution first."""
    suite = [("in-distribution", "as in training", {})]
    suite += [("vision", *v) for v in (STATE_VISION if args.obs == "state" else RGB_VISION)]
    suite += [("semantic", *v) for v in SEMANTIC if args.task == "PutOnPad-v1"]
    if args.task in STARTS:
        suite.append(("execution", "starts outside the training region", STARTS[args.task]))
    return suite + [("execution", *v) for v in EXECUTION]


def evaluate_ood(policies, args, envs):
    """Every policy on every variant, the same seeds each time -> test.csv and a table of axes."""
    rates = {name: {} for name in policies}
    for axis, variant, changes in variants(args):
        envs.call("change", changes)
        for name, policy in policies.items():
            success = nft.evaluate(policy, envs, range(OOD, OOD + args.ood_episodes),
                                   args.num_steps, variant)
            log_test(args, name, axis, variant, success)
            rates[name].setdefault(axis, []).append(
                flow.report(f"{axis}, {variant}, {name}", success, f"seeds {OOD}.."))
    envs.call("change", {})
    axes = list(rates[name])
    print(f"{'':<12}" + "".join(f"{axis:>17}" for axis in [*axes, "OOD mean"]))
    for name, by_axis in rates.items():
        means = [np.mean(by_axis[axis]) for axis in axes]  # the OOD mean is the mean of the axes
        print(f"{name:<12}" + "".join(f"{m:17.3f}" for m in [*means, np.mean(means[1:])]))


def log_test(args, policy, axis, variant, success):
    low, high = flow.wilson(success)
    nft.log_row(Path(args.out) / "test.csv", {
        "policy": policy, "task": args.task, "axis": axis, "variant": variant,
        "episodes": len(success), "success": success.mean(), "low": low, "high": high})


# ------------------------------------------------------------------------------------------------
# The baselines: PPO with a critic (Flow-SDE: one noisy step), and GRPO, the same without one


class Critic(torch.nn.Module):
    """V(observation) for PPO: an MLP on the policy's encoding, which it does not train."""

    def __init__(self, context, width=256):
        super().__init__()
        nn = torch.nn
        self.net = nn.Sequential(nn.Linear(context, width), nn.Tanh(), nn.Linear(width, width),
                                 nn.Tanh(), nn.Linear(width, 1))

    def forward(self, ctx):
        return self.net(ctx.detach())[:, 0]                                     # (B,)


def gae(values, success, episode, gamma=0.99, lam=0.95):
    """Generalised advantage estimation over chunks -> (advantages, returns), one per row.

    values (rows,), success (episodes,), episode (rows,). The reward is 1 at the end of a success;
    rows of an episode are in the order of time, and nothing is worth anything after its last.
    """
    advantages, V, running, following = [], values.tolist(), {}, {}
    for row, e in reversed(list(enumerate(episode.tolist()))):
        reward = float(success[e]) if e not in running else 0.0  # its last chunk comes first here
        # delta = r + gamma V(next) - V          A = delta + gamma lambda A(next)
        delta = reward + gamma * following.get(e, 0) - V[row]
        running[e], following[e] = delta + gamma * lam * running.get(e, 0), V[row]
        advantages.append(running[e])
    advantages = values.new_tensor(advantages[::-1])
    return advantages, advantages + values


def log_prob(v, x_t, x_next, t_cur, t_next, sigma, mask, **_):
    """log N(x_next; mean(v), std^2) of each row's noisy step, over its executed actions: (B,)."""
    t_cur, t_next, sigma = (z[:, None, None] for z in (t_cur, t_next, sigma))
    normal = torch.distributions.Normal(*sde.transition(x_t, v, t_cur, t_next, sigma))
    return (normal.log_prob(x_next) * mask[..., None]).sum((1, 2))


def ppo_update(policy, critic, optimizer, batch, *, noise_level, epochs, minibatch, clip=0.2,
               grad_clip=1.0, huber_delta=10.0):
    """The clipped objective on the one noisy step of each chunk -> mean info of all steps.

    batch["y"] holds the advantages; with a critic also batch["returns"]. critic=None is GRPO.
    """
    infos, learners = [], torch.nn.ModuleList([policy, critic] if critic else [policy])
    order = [p for _ in range(epochs) for p in nft.minibatches(len(batch["y"]), minibatch)]
    for rows, weight in order:
        ctx, steps = nft.recorded_steps(policy, batch, rows, noise_level)
        A = steps["y"]
        log_ratio = log_prob(steps["v_theta"], **steps) - log_prob(steps["v_old"], **steps)
        ratio = log_ratio.exp()
        # L = -min(ratio A, clip(ratio, 1 - eps, 1 + eps) A)
        loss = -torch.minimum(ratio * A, ratio.clamp(1 - clip, 1 + clip) * A).mean()
        info = {"ratio": ratio.mean(), "clipped": ((ratio - 1).abs() > clip).float().mean(),
                "approx_kl": (ratio - 1 - log_ratio).mean()}
        if critic:
            returns = batch["returns"][rows].to(ctx.device)
            value_loss = torch.nn.functional.huber_loss(critic(ctx), returns, delta=huber_delta)
            loss, info = loss + value_loss, {**info, "value_loss": value_loss}
        infos.append(nft.optimise(learners, optimizer, loss, {"loss": loss, **info}, weight,
                                  grad_clip))
    return nft.mean_info(infos)


def baseline_advantages(args, policy, critic, batch, success, device):
    """Fills batch["y"] with advantages of mean 0 and std 1, and for PPO batch["returns"]."""
    if args.algo == "grpo":  # group-relative: like grouped labels
        y = nft.labels(success, batch["episode"], "grouped")
    else:
        with torch.no_grad():
            parts = torch.arange(len(batch["x"])).split(4096)
            values = torch.cat([critic(policy.encode(flow.to_torch(
                flow.take(batch["obs"], rows), device))).cpu() for rows in parts])
        y, batch["returns"] = gae(values, success, batch["episode"])
    everyone = nft.gather(y)
    batch["y"] = (y - everyone.mean()) / (everyone.std() + 1e-6)


# ------------------------------------------------------------------------------------------------
# Training


def pretrain(args, out, device):
    """Demos -> SFT -> sft.pt; or the clone of another run, so that methods start from one."""
    if args.sft:
        policy = flow.load_policy(args.sft, device)
    else:
        torch.manual_seed(args.seed)
        language = args.task == "PutOnPad-v1"
        policy = flow.FlowPolicy(args.horizon, ACTION_DIM, width=256, language=language,
                                 state_dim=state_size(args.task, args.obs),
                                 cameras=int(args.obs == "rgb"),
                                 slots=9 * (language and args.obs == "state")).to(device)
        loss = flow.train_sft(policy, *collect_demos(args), args.sft_steps)
        print(f"SFT: flow matching loss {loss:.3f}")
    nft.save(out / "sft.pt", policy)


def evaluate(name, policy, args, envs, first, episodes):
    success = nft.evaluate(policy, envs, range(first, first + episodes), args.num_steps, name)
    return flow.report(name, success, f"seeds {first}..{first + episodes - 1}"), success


def test_all(policies, args, envs):
    """The test, on request the OOD suite and films of the last policy -> success of each."""
    out, rates = Path(args.out), []
    if not args.eval_only:  # its rows are added, under the path of the policy
        (out / "test.csv").unlink(missing_ok=True)
    for name, policy in policies.items():
        rate, success = evaluate(f"test, {name}", policy, args, envs, TEST, args.test_episodes)
        log_test(args, name, "test", "as in training", success)
        rates.append(rate)
    if args.eval_ood:
        evaluate_ood(policies, args, envs)
    if args.video and nft.rank_of()[0] == 0:
        filmed = make_envs(args, film=out / "videos")
        flow.evaluate(policy, filmed, range(TEST, TEST + args.video), args.num_steps, "film")
        filmed.close()
        print(f"saved {args.video} episodes in {out}/videos")
    return rates


def train(args, envs, out, device):
    """SFT, then RL by --algo. Returns (SFT policy, best policy, state)."""
    if not args.resume and nft.rank_of()[0] == 0:
        pretrain(args, out, device)
    nft.gather([0])  # the other ranks wait here
    sft = flow.load_policy(out / "sft.pt", device)
    policy, old, best = (copy.deepcopy(sft) for _ in range(3))  # old acts, policy learns
    optimizer = torch.optim.Adam(policy.parameters(), lr=args.lr)
    acting, learning = nft.method(args)
    critic = None
    if args.algo == "ppo":
        torch.manual_seed(args.seed)
        critic = Critic(policy.context_dim).to(device)
        optimizer.add_param_group({"params": critic.parameters(), "lr": CRITIC_LR})
    validation = VALIDATION, args.eval_episodes
    state = {"iteration": 0, "env_steps": 0, "best_rate": -1.0, "algo": args.algo}
    if args.resume:
        state = nft.load_run(out / "last.pt", policy, old, best, optimizer, device)
        if critic:
            critic.load_state_dict(state["critic"])
    elif args.iterations:
        state["best_rate"], _ = evaluate("validation, SFT", sft, args, envs, *validation)
        nft.save(out / "best.pt", best)

    while state["iteration"] < args.iterations:
        start, i = time.time(), state["iteration"]
        nft.seed_iteration(args.seed, i)
        first = TRAIN + args.seed * 1_000_000 + i * args.episodes
        seeds = nft.start_seeds(first, args.episodes, args.labels)
        success, batch = nft.rollout(old, envs, nft.share(seeds), **acting,
                                     desc=f"iteration {i + 1}/{args.iterations}")
        played = time.time()
        optimizer.param_groups[0]["lr"] = args.lr * (1 - i / args.iterations)  # smaller steps late
        passes = dict(epochs=args.epochs, minibatch=args.minibatch)
        if args.algo == "stepnft":
            batch["y"] = nft.labels(success, batch["episode"], args.labels)
            info = nft.update(policy, optimizer, batch, **passes, **learning)
            alpha = nft.ema_decay(i, args.iterations, *args.ema)
        else:
            baseline_advantages(args, policy, critic, batch, success, device)
            info = ppo_update(policy, critic, optimizer, batch, noise_level=args.noise_level,
                              **passes)
            alpha = 0.0  # on-policy: the old policy is the trained one
        nft.ema_update(old, policy, alpha)
        updated = time.time()
        state["iteration"] = i + 1
        state["env_steps"] += int(nft.gather(batch["mask"].sum()[None]).sum())
        rate = ""
        if (i + 1) % args.eval_every == 0 or i + 1 == args.iterations:
            rate, _ = evaluate(f"validation, iteration {i + 1}", policy, args, envs, *validation)
            if rate >= state["best_rate"]:
                state["best_rate"], best = rate, copy.deepcopy(policy)
                nft.save(out / "best.pt", best)
        nft.log_row(out / "log.csv", {
            "iteration": i + 1, "episodes": (i + 1) * args.episodes,
            "env_steps": state["env_steps"], "train_sde": nft.gather(success).mean(),
            "eval_ode": rate, **info, "alpha": alpha, "rollout_seconds": played - start,
            "update_seconds": updated - played})
        if critic:
            state["critic"] = critic.state_dict()
        nft.save_run(out / "last.pt", policy, old, best, optimizer, state)
    return sft, best, state


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--task", default="PickCube-v1", help=f"{', '.join(TASKS)}; all, with --expert-only")
    add("--obs", default="state", choices=["state", "rgb"],
        help="offsets of objects and goals, or a camera (needs a Vulkan driver); and the hand")
    add("--backend", default="physx_cpu", choices=["physx_cpu", "physx_cuda"],
        help="of the physics; physx_cuda, never run: one process holds all --num-envs (try 512)")
    add("--algo", default="stepnft", choices=["stepnft", "ppo", "grpo"],
        help="stepnft: the method; ppo: the critic baseline; grpo: PPO's objective with the "
             "group's mean in the critic's place")
    add("--sft", metavar="CHECKPOINT", help="start from this sft.pt instead of training one")
    add("--eval-ood", action="store_true", help="also test out of distribution")
    add("--ood-episodes", type=int, default=200, help="episodes of each OOD variant")
    nft.add_run_flags(parser, iterations=18, eval_every=3, test_episodes=400,
                      num_envs=2 * len(os.sched_getaffinity(0)), out="runs/05_train_maniskill")
    nft.add_method_flags(parser, transitions="all", labels="grouped", noise_level=0.3,
                         ema=[0.1, 0.5])
    args = parser.parse_args()
    if args.algo != "stepnft":  # Flow-SDE: one noisy step, so that the chunk has a likelihood
        args.rollout = "flow-sde"
        args.labels = "grouped" if args.algo == "grpo" else "binary"
    nft.check_method(args)
    return args


def check(args):
    """What can be wrong with this script's flags, told in one line each; fills in defaults."""
    if not (args.task == "all" and args.expert_only):
        check_task(args.task)
        args.max_steps = args.max_steps or TASKS[args.task].max_steps
        nft.check_run(args, {"cameras": ("--obs", int(args.obs == "rgb")),
                             "horizon": ("--horizon", args.horizon),
                             "state_dim": ("--task", state_size(args.task, args.obs)),
                             "language": ("--task", args.task == "PutOnPad-v1")})
    if not all(1 <= n <= 100_000 for n in (args.test_episodes, args.ood_episodes)):
        raise SystemExit("--test-episodes, --ood-episodes: give 1 to 100000")
    if args.resume:
        state = torch.load(Path(args.out) / "last.pt", weights_only=False)["state"]
        if state.get("algo", args.algo) != args.algo:
            raise SystemExit(f"--resume: {args.out} was trained with --algo {state['algo']}")
    args.renderer = find_renderer() if args.obs == "rgb" or args.video else None


def run(args, envs, device):
    out, start = Path(args.out), time.time()
    if args.eval_only:
        policy = flow.load_policy(args.eval_only, device)
        rate, = test_all({args.eval_only: policy}, args, envs)
        print(f"RESULT task={args.task} success={rate:.3f} episodes={args.test_episodes} "
              f"seconds={time.time() - start:.0f}")
        return
    sft, best, state = train(args, envs, out, device)
    rates = test_all({"SFT": sft, args.algo: best} if args.iterations else {"SFT": sft}, args, envs)
    if args.iterations:
        nft.draw_run(out)
    print(f"RESULT task={args.task} sft={rates[0]:.3f} {args.algo}={rates[-1]:.3f} "
          f"episodes={args.iterations * args.episodes} env_steps={state['env_steps']} "
          f"seconds={time.time() - start:.0f}")


def main():
    warnings.filterwarnings("ignore")  # the simulator's own, about drivers nobody needs here
    args = parse_args()
    check(args)
    device = nft.join_ranks(args.device)
    print(" ".join(f"{k}={v}" for k, v in vars(args).items()), flush=True)
    try:
        if args.expert_only:
            return test_expert(args)
        envs = make_envs(args)
        run(args, envs, device)
        envs.close()
    except flow.SimulatorDied as error:
        seeds = ", ".join(map(str, sorted({*error.args[0]})))
        raise SystemExit(f"a simulator process died (out of memory?) while playing one of the "
                         f"episodes {seeds} of {args.task}. Checkpoints in {args.out} are whole: "
                         f"--resume continues the last") from error


if __name__ == "__main__":
    main()
