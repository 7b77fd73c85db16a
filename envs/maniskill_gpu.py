"""ManiSkill on a GPU: many scenes of a task in one process, for `05 --sim gpu`. No learning.

    make_scenes(task, num_envs).play(act, seeds) -> (success (episodes,) bool, rows): see Workers

Scenes gives Workers the answers of its processes. A seed is an episode, in any scene, but not the
CPU's episode of that seed: CUDA draws other numbers. Demonstrations, images, PutOnPad-v1 and OOD
variants stay with the CPU's processes, in envs/maniskill.py.

Not run on a GPU here: the tests play it with PhysX on the CPU, where it equals ManiSkillSim. Where
there is a GPU, results/gpu/run.py is what to call first.
"""

import gymnasium as gym
import numpy as np
import torch

from envs.maniskill import TASKS, physics_only
from envs.workers import Workers, tokens


class Scenes:
    """num_envs scenes of a task, stepped together: what Workers asks of gymnasium's vector env.
    max_steps: the time limit in control steps; device: "cuda:1", say, or "cpu", for one scene."""

    def __init__(self, task, num_envs, max_steps, device="cuda"):
        import mani_skill.envs  # noqa: F401
        physics_only()
        self.task, self.max_steps = TASKS[task], max_steps
        self.env = gym.make(task, num_envs=num_envs, sim_backend=f"physx_{device}",
                            obs_mode="none", reward_mode="none", render_backend="none",
                            robot_uids="panda", control_mode="pd_ee_delta_pos").unwrapped
        self.close = self.env.close
        self.steps, self.over = np.zeros(num_envs, int), np.ones(num_envs, bool)

    def reset(self, *, seed=None, options=None):
        """Starts episode seed[i] in every scene i of options["reset_mask"], and in no other."""
        if seed is None:  # no episode to play yet
            return self.observe(), {}
        env, scene, fresh = self.env, self.env.scene, options["reset_mask"]
        # The parts of ManiSkill's reset, which as a whole seeds all scenes by the first of them
        scene._reset_mask = torch.as_tensor(fresh, device=env.device)  # what is set, is set here
        env._clear_sim_state()
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            for i in np.flatnonzero(fresh):
                scene._reset_mask = torch.arange(len(fresh), device=env.device) == i
                torch.manual_seed(seed[i])
                env._episode_rng = np.random.RandomState(seed[i])
                env._initialize_episode(torch.tensor([i], device=env.device), {})
        scene._reset_mask = torch.ones_like(scene._reset_mask)
        if scene.gpu_sim_enabled:
            scene._gpu_apply_all()
            scene.px.gpu_update_articulation_kinematics()
            scene._gpu_fetch_all()
        self.steps[fresh], self.over[fresh] = 0, False
        return self.observe(), {}

    def step(self, chunks):
        """chunks (N, H, 4). A scene whose episode is over waits: its actions are zeros."""
        executed, success = np.zeros(len(chunks), int), np.zeros(len(chunks), bool)
        products, fast = torch.backends.cuda.matmul, torch.backends.cuda.matmul.allow_tf32
        products.allow_tf32 = False  # for the inverse kinematics
        for actions in torch.as_tensor(chunks).clamp(-1, 1).unbind(1):
            playing = ~self.over
            if not playing.any():
                break
            actions = actions * torch.as_tensor(playing)[:, None]
            self.env._step_action(actions.to(self.env.device))
            won = self.env.evaluate()["success"].cpu().numpy() & playing
            executed, self.steps, success = executed + playing, self.steps + playing, success | won
            self.over |= won | (self.steps >= self.max_steps)
        products.allow_tf32 = fast
        info = {"executed": executed, "success": success}
        return self.observe(), success.astype(float), success, self.over & ~success, info

    def observe(self):
        """A row of ManiSkillSim's for each scene: {"state": (N, 5 + 3 P), "tokens": (N, 128)}."""
        env, objects = self.env, self.task.objects(self.env)
        hand, opening = env.agent.tcp_pos, env.agent.robot.get_qpos()[:, -2:].sum(1)
        may_hold = (self.steps > 0) & (self.task.skill != "push")  # contacts outlive a reset
        held = env.agent.is_grasping(objects[0]) * hand.new_tensor(may_hold)
        places = torch.stack([actor.pose.p for actor in objects] + self.task.goals(env), 1)
        offsets = (places - hand[:, None]).flatten(1)
        state = torch.cat([hand, opening[:, None], held[:, None], offsets], 1).cpu()
        return {"state": state, "tokens": torch.tensor(tokens("")).expand(len(state), -1)}


def make_scenes(task, num_envs, max_steps=None, device="cuda"):
    """num_envs scenes in this process -> Workers; max_steps as for maniskill.make_workers."""
    scenes = Scenes(task, num_envs, max_steps or TASKS[task].max_steps, device)
    return Workers(None, num_envs, name=lambda seed: f"episode {seed} of {task}", envs=scenes)
