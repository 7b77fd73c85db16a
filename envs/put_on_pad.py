"""PutOnPad-v1, ours, the ManiSkill way: put the thing that a sentence names on the pad it names.

Two things and two pads stand on a 2 x 4 grid of places, 12 cm apart and jittered by 2 cm; the
others are parked behind the robot. Success: the right thing lies still on the right pad, and
the gripper is open. Class attributes are what the OOD suite changes.

Importing this loads the simulator: only worker processes do.
"""

import sapien
import torch
from mani_skill.envs.sapien_env import BaseEnv
from mani_skill.sensors.camera import CameraConfig
from mani_skill.utils import sapien_utils
from mani_skill.utils.building import actors
from mani_skill.utils.registration import register_env
from mani_skill.utils.scene_builder.table import TableSceneBuilder
from mani_skill.utils.structs.pose import Pose

from envs.pad_words import COLOURS, SHAPES, TRAINED


@register_env("PutOnPad-v1", max_episode_steps=60)
class PutOnPad(BaseEnv):
    half, pad_half = 0.02, 0.035                              # m
    # distractors: how many other things, how many other pads are shown; spread: scales the grid
    combinations, distractors, spread = TRAINED, (1, 1), 1.0
    sentence = "put the {thing} on the {pad} pad"

    @property
    def _default_sensor_configs(self):
        pose = sapien_utils.look_at(eye=[0.35, 0, 0.5], target=[-0.05, 0, 0.05])
        return [CameraConfig("base_camera", pose, 128, 128, 1.0, 0.01, 100)]

    def _load_agent(self, options):
        super()._load_agent(options, sapien.Pose([-0.615, 0, 0]))

    def _load_scene(self, options):
        self.table_scene = TableSceneBuilder(self)
        self.table_scene.build()
        self.things, self.pads = [], []
        scene, half, flat = self.scene, self.half, [self.pad_half, self.pad_half, 0.001]
        for name, colour in COLOURS.items():
            parked = dict(color=colour, initial_pose=sapien.Pose([-0.65, 1, 0.1]))
            self.things += [
                actors.build_cube(scene, half, name=f"{name} cube", **parked),
                actors.build_cylinder(scene, half, half, name=f"{name} cylinder", **parked)]
            self.pads.append(actors.build_box(scene, flat, name=f"{name} pad", **parked,
                                              body_type="kinematic", add_collision=False))
        # of the episode: slots of the thing and pad that are named; slots that are shown
        n, self.instructions = self.num_envs, [""] * self.num_envs
        self.target, self.goal = torch.zeros(2, n, dtype=torch.long)
        self.shown, self.pad_places = torch.zeros(n, 9, dtype=bool), torch.zeros(n, 3, 3)

    def _initialize_episode(self, env_idx, options):
        self.table_scene.initialize(env_idx)
        poses, colours = torch.full((len(env_idx), 9, 3), self.half), list(COLOURS)
        poses[..., 0], poses[..., 1] = -0.65, 0.7 + 0.06 * torch.arange(9)  # parked
        for row, i in enumerate(env_idx.tolist()):
            thing, pad = self.combinations[torch.randint(len(self.combinations), (1,))]
            others = [t for t in torch.randperm(6).tolist() if t != thing]
            pads = [6 + p for p in torch.randperm(3).tolist() if p != pad]
            used = [thing, *others[:self.distractors[0]], 6 + pad, *pads[:self.distractors[1]]]
            cells = torch.randperm(8)[:len(used)]
            xy = torch.stack([cells % 2 - 0.5, cells // 2 - 1.5], 1) * 0.12 * self.spread
            poses[row, used, :2] = xy + 0.04 * torch.rand(len(used), 2) - 0.02
            self.target[i], self.goal[i], self.shown[i] = thing, 6 + pad, False
            self.shown[i, used] = True
            self.instructions[i] = self.sentence.format(
                thing=f"{colours[thing // 2]} {SHAPES[thing % 2]}", pad=colours[pad])
        self.pad_places[env_idx] = poses[:, 6:]
        poses[:, 6:, 2] *= 0.05  # a pad lies at its half thickness
        for k, actor in enumerate([*self.things, *self.pads]):
            # a cylinder's axis is x: turn it up
            upright = [0.5**0.5, 0, 0.5**0.5, 0] if k % 2 and k < 6 else [1, 0, 0, 0]
            actor.set_pose(Pose.create_from_pq(poses[:, k], upright))

    def evaluate(self):
        open_hand = self.agent.robot.get_qpos()[:, -2:].sum(1) > 3 * self.half
        if not open_hand.any():  # nothing else needs to be asked
            return {"success": open_hand}
        every = torch.arange(self.num_envs)
        now = [(t.pose.p, t.linear_velocity, t.angular_velocity) for t in self.things]
        place, speed, spin = (torch.stack(v, 1)[every, self.target] for v in zip(*now))
        away = (place - self.pad_places[every, self.goal - 6]).abs()
        arrived = (away[:, :2] < self.pad_half).all(1) & (away[:, 2] < 0.005)
        still = (speed.norm(dim=1) < 0.01) & (spin.norm(dim=1) < 0.5)
        return {"success": open_hand & arrived & still}
