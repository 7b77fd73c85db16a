"""05 - pi-StepNFT on a robot arm: ManiSkill, from a few scripted demonstrations.

The method of 03 unchanged, on a real simulator: a Panda arm must grasp a cube and hold it at a goal
(PickCube-v1). A scripted controller gives a few demonstrations, flow matching clones them (SFT), and
reinforcement learning lifts the clone:

    rollout (02: SDE, wide) -> label by success -> update (03: one-step ranking) -> EMA -> evaluate

New since 03: simulators in worker processes (or thousands on a GPU), checkpoints and --resume.
Defaults that differ from the paper's, because twenty demos and two CPU cores are not a GPU cluster:
all K denoising steps of a chunk are trained on, not one (four times the data from the same
simulation); each start is played eight times and labels are centered on its mean (a start that
always fails says nothing); noise 0.3; the old policy follows quickly. Each is a flag.
Left out: the vision-language backbone and, so far, images and the critic baseline.

Run:     python 05_train_maniskill.py                       (about 5 minutes on two CPU cores)
         python 05_train_maniskill.py --eval-only runs/05_train_maniskill/best.pt
Prints:  success of SFT and of every evaluation with its 95 % interval, then RESULT.
Saves:   runs/05_train_maniskill/{sft.pt, last.pt, best.pt, log.csv, learning.png}
"""

import argparse
import copy
import functools
import importlib
import os
import time
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch

flow = importlib.import_module("01_flow_policy")
nft = importlib.import_module("03_step_loss")
# Borrowed from 01: FlowPolicy;  train_sft(policy, obs, chunks, steps) -> loss;  sliding_chunks;
#   play(act, envs, seeds) -> (success, rows);  evaluate(policy, envs, seeds) -> success, ODE;
#   wilson(success) -> 95 % interval;  save_checkpoint, load_policy.
# Borrowed from 03: rollout -> (success, batch);  labels -> y;  update -> info;  ema_decay, ema_update;
#   ChunkEnv, worker_envs: simulators in processes;  add_method_flags, method: the ablation flags.

# Disjoint episodes: demos 0.., validation and test on their own ranges, training above them.
VALIDATION, TEST, TRAIN = 1_000_000, 1_500_000, 2_000_000

INSTRUCTIONS = {"PickCube-v1": "pick up the red cube and hold it at the green goal"}
STATE_DIM, ACTION_DIM = 11, 4
REACH = 0.1  # metres that an action of 1 asks for (pd_ee_delta_pos)

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


def check_task(task):
    """One clear line for a task that does not exist, has no controller, or wants a download."""
    import mani_skill.envs  # noqa: F401  (importing it registers the tasks)
    from mani_skill.utils import assets
    from mani_skill.utils.registration import REGISTERED_ENVS
    if task not in REGISTERED_ENVS:
        raise SystemExit(f"--task {task} is not a ManiSkill task; try {', '.join(INSTRUCTIONS)}")
    needed = []
    for name in REGISTERED_ENVS[task].asset_download_ids or []:
        needed += (assets.expand_data_group_into_individual_data_source_ids(name)
                   if name in assets.DATA_GROUPS else [name])
    if not all(assets.is_data_source_downloaded(name) for name in needed):
        raise SystemExit(f"--task {task} needs a download: run "
                         f"`python -m mani_skill.utils.download_asset {task}` first")
    if task not in INSTRUCTIONS:
        raise SystemExit(f"--task {task} has no scripted controller here to take demos from; "
                         f"choose {', '.join(INSTRUCTIONS)}, or write one beside `expert`")


class ManiSkillSim:
    """n copies of one task side by side: n = 1 on physx_cpu, many on physx_cuda.

    It steps ManiSkill's BaseEnv below env.step, so nothing is built that nobody reads: no reward,
    no observation inside a chunk. Physics and the success check are ManiSkill's own.
    """

    def __init__(self, task, num_envs=1, backend="physx_cpu"):
        warnings.filterwarnings("ignore")
        import mani_skill.envs  # noqa: F401
        physics_only()
        self.env = gym.make(task, num_envs=num_envs, sim_backend=backend, render_backend="none",
                            obs_mode="none", reward_mode="none",
                            control_mode="pd_ee_delta_pos").unwrapped
        self.num_envs, self.seeds = num_envs, np.zeros(num_envs, np.int64)
        self.initialize = self.env._initialize_episode
        if num_envs > 1:
            self.env._initialize_episode = self.initialize_each

    def reset(self, seeds, which):
        """Starts episode seeds[j] in env which[j]; a seed is the same episode whenever it is played."""
        self.seeds[which] = seeds
        index = torch.as_tensor(which, device=self.env.device)
        if not self.env.gpu_sim_enabled:
            self.fresh_physics()
        _, self.info = self.env.reset(seed=self.seeds.tolist(), options={"env_idx": index})
        if not self.env.gpu_sim_enabled:
            for body in self.bodies():
                body.wake_up()  # the time a body has rested starts at zero
        # PhysX still lists the contacts of the last step, so a cube that was held when its episode
        # ended would count as grasped.
        self.info["is_grasped"][index] = False

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
        old, new = scene.sub_scenes[0], sapien.Scene([system])
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
        if self.env.gpu_sim_enabled:
            self.env._step_action(torch.as_tensor(actions, device=self.env.device))
        else:
            self.aim(actions[0])
            self.env._step_action(None)  # physics towards the joint targets just set
        self.info = self.env.evaluate()
        return self.info["success"].cpu().numpy()

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
        target = sapien.Pose(np.float32(REACH) * action[:3] + position, turn if turn[0] >= 0 else -turn)
        goal, found, _ = ik.pmodel.compute_inverse_kinematics(
            ik.end_link_idx, target, initial_qpos=joints, active_qmask=ik.qmask, max_iterations=100)
        for joint, angle in zip(arm.joints, goal if found else joints):
            joint._objs[0].set_drive_target(np.float32(angle))
        low, high = gripper.action_space_low.numpy(), gripper.action_space_high.numpy()
        opening = 0.5 * (high + low) + 0.5 * (high - low) * action[3]
        for joint in gripper.joints:
            joint._objs[0].set_drive_target(opening[0])

    def observe(self):
        """{"state": (n, 11)}: hand x y z, gripper opening, cube - hand, goal - cube, grasped.

        Offsets generalise over the table where poses would have to be seen everywhere. No
        quaternions: the hand always points down, where their signs flip at random.
        """
        env = self.env
        hand, cube, goal = env.agent.tcp_pos, env.cube.pose.p, env.goal_site.pose.p
        opening = env.agent.robot.get_qpos()[:, -2:].sum(1, keepdim=True)
        state = [hand, opening, cube - hand, goal - cube, self.info["is_grasped"][:, None].float()]
        return {"state": torch.cat(state, dim=1).float().cpu().numpy()}


class OneSim:
    """The same for n = 1 without the batch dimension: what ChunkEnv of 03 drives in a worker."""

    def __init__(self, task):
        self.sim = ManiSkillSim(task)

    def reset(self, seed):
        self.sim.reset([seed], [0])

    def advance(self, action):
        return self.sim.advance(action[None])[0]

    def observe(self):
        return {k: v[0] for k, v in self.sim.observe().items()}


class CudaEnvs(gym.vector.VectorEnv):
    """ChunkEnv for n simulators in this process (physx_cuda): the same chunks, batched."""

    metadata = {"autoreset_mode": gym.vector.AutoresetMode.DISABLED}

    def __init__(self, task, num_envs, max_steps, backend="physx_cuda"):
        self.sim, self.num_envs, self.max_steps = ManiSkillSim(task, num_envs, backend), num_envs, max_steps
        self.steps, self.over = np.zeros(num_envs, int), np.ones(num_envs, bool)

    def reset(self, *, seed, options=None):
        which = np.flatnonzero((options or {}).get("reset_mask", np.ones(self.num_envs, bool)))
        self.sim.reset(np.asarray(seed)[which], which)
        self.steps[which], self.over[which] = 0, False
        return self.sim.observe(), {}

    def step(self, chunks):
        success, executed = np.zeros(self.num_envs, bool), np.zeros(self.num_envs, int)
        for h in range(chunks.shape[1]):
            live = ~self.over
            if not live.any():
                break
            arrived = self.sim.advance(chunks[:, h] * live[:, None])
            executed, self.steps = executed + live, self.steps + live
            success |= live & arrived
            self.over = self.over | arrived | (self.steps >= self.max_steps)
        info = {"success": success, "executed": executed}
        return self.sim.observe(), success * 1.0, success, self.over & ~success, info


def make_envs(args):
    """Worker processes on the CPU, or one process with many simulators on the GPU."""
    if args.backend == "physx_cuda":
        return CudaEnvs(args.task, args.num_envs, args.max_steps)
    space = gym.spaces.Dict({"state": gym.spaces.Box(-np.inf, np.inf, (STATE_DIM,))})
    make = functools.partial(nft.ChunkEnv, functools.partial(OneSim, args.task), space, ACTION_DIM,
                             args.max_steps, args.horizon)
    return nft.worker_envs(make, args.num_envs)


# ------------------------------------------------------------------------------------------------
# Demonstrations


def expert(state):
    """Above the cube, down, close, carry to the goal: state (n, 11) -> action (n, 4)."""
    to_cube, to_goal, grasped = state[:, 4:7], state[:, 7:10], state[:, 10:] > 0
    over = np.linalg.norm(to_cube[:, :2], axis=1, keepdims=True) < 0.012
    there = np.linalg.norm(to_cube, axis=1, keepdims=True) < 0.012
    above = to_cube + np.float32([0, 0, 0.05])
    move = np.where(grasped, to_goal, np.where(there, 0, np.where(over, to_cube, above)))
    grip = np.where(there | grasped, -1, 1)
    return np.concatenate([np.clip(move / REACH, -1, 1), grip], axis=1).astype(np.float32)


def collect_demos(envs, num_demos, seed, horizon, noise=0.0):
    """Plays the expert and keeps the successes -> (obs {"state": (N, 11)}, chunks (N, H, 4)).

    noise: std of what is added to the executed action while the clean one is recorded, so that the
    demos also show how to recover.
    """
    rng = np.random.default_rng(seed)

    def act(obs):
        clean = expert(obs["state"].numpy())
        played = clean + noise * rng.standard_normal(clean.shape) * [1, 1, 1, 0]
        return played[:, None].astype(np.float32), {"action": torch.from_numpy(clean)}

    success, rows = flow.play(act, envs, range(seed * 1000, seed * 1000 + num_demos), "demos")
    kept = [rows["episode"] == e for e in np.flatnonzero(success)]
    chunks = torch.cat([flow.sliding_chunks(rows["action"][k], horizon) for k in kept])
    return {"state": torch.cat([rows["obs"]["state"][k] for k in kept])}, chunks


# ------------------------------------------------------------------------------------------------
# Training


def report(name, success, start_seed):
    low, high = flow.wilson(success)
    print(f"{name}: success {success.mean():.3f} [{low:.3f}, {high:.3f}] over {len(success)} "
          f"episodes, ODE, seeds {start_seed}..{start_seed + len(success) - 1}", flush=True)
    return float(success.mean())


def train(args, envs, out, device):
    """Demos -> SFT -> pi-StepNFT. Returns (SFT policy, best policy, env steps, episodes)."""
    sft = flow.FlowPolicy(args.horizon, ACTION_DIM, state_dim=STATE_DIM, width=256).to(device)
    torch.manual_seed(args.seed)
    if args.resume:
        sft, _ = flow.load_policy(out / "sft.pt", device)
    else:
        demos = collect_demos(envs, args.num_demos, args.seed, args.horizon, args.demo_noise)
        print(f"{args.num_demos} demos, {len(demos[1])} chunks of {args.horizon} actions")
        obs, chunks = flow.to_torch(demos[0], device), demos[1].to(device)
        loss = flow.train_sft(sft, obs, chunks, args.sft_steps)
        print(f"SFT: flow matching loss {loss:.3f}")
        flow.save_checkpoint(out / "sft.pt", config=sft.config, policy=sft.state_dict())

    policy, old, best = (copy.deepcopy(sft) for _ in range(3))  # old acts, policy learns
    optimizer = torch.optim.Adam(policy.parameters(), lr=args.lr)
    acting, learning = nft.method(args)
    validation = range(VALIDATION, VALIDATION + args.eval_episodes)
    state = {"iteration": 0, "env_steps": 0, "best_rate": -1.0}
    if args.resume:
        state = restore(out / "last.pt", policy, old, best, optimizer, device)
    elif args.iterations:
        state["best_rate"] = report("validation, SFT", flow.evaluate(
            sft, envs, validation, args.num_steps, "evaluate"), VALIDATION)

    while state["iteration"] < args.iterations:
        start, i = time.time(), state["iteration"]
        first = TRAIN + args.seed * 1_000_000 + i * args.episodes
        seeds = nft.start_seeds(first, args.episodes, args.labels)
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
        state["iteration"], state["env_steps"] = i + 1, state["env_steps"] + int(batch["mask"].sum())
        rate = ""
        if (i + 1) % args.eval_every == 0 or i + 1 == args.iterations:
            rate = report(f"validation, iteration {i + 1}", flow.evaluate(
                policy, envs, validation, args.num_steps, "evaluate"), VALIDATION)
            if rate >= state["best_rate"]:
                state["best_rate"], best = rate, copy.deepcopy(policy)
                flow.save_checkpoint(out / "best.pt", config=best.config, policy=best.state_dict())
        nft.log_row(out / "log.csv", {
            "iteration": i + 1, "episodes": (i + 1) * args.episodes, "env_steps": state["env_steps"],
            "train_sde": success.mean(), "eval_ode": rate, **info, "alpha": alpha,
            "rollout_seconds": played - start, "update_seconds": updated - played})
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
    add("--task", default="PickCube-v1", help="ManiSkill task with a scripted controller here")
    add("--num-demos", type=int, default=20, help="scripted demonstrations for SFT")
    add("--demo-noise", type=float, default=0.1, help="noise on executed demo actions")
    add("--sft-steps", type=int, default=1000, help="optimisation steps of flow matching")
    add("--iterations", type=int, default=18, help="RL iterations; 0 trains and evaluates SFT only")
    add("--episodes", type=int, default=256, help="episodes per iteration")
    add("--max-steps", type=int, default=24, help="time limit of an episode, in control steps")
    add("--horizon", type=int, default=4, help="H, actions per chunk")
    add("--lr", type=float, default=3e-4, help="Adam's learning rate, falling linearly to 0")
    add("--epochs", type=int, default=3, help="passes over each batch")
    add("--minibatch", type=int, default=512, help="chunks per optimisation step")
    add("--eval-every", type=int, default=3, help="iterations between validations")
    add("--eval-episodes", type=int, default=200, help="episodes per validation")
    add("--test-episodes", type=int, default=400, help="episodes of the final test")
    add("--num-envs", type=int, default=len(os.sched_getaffinity(0)),
        help="simulators at a time: processes on the CPU, parallel scenes on a GPU (try 512)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of the policy")
    add("--backend", default=None, choices=["physx_cpu", "physx_cuda"],
        help="of the physics; default: physx_cuda when --device is cuda")
    add("--seed", type=int, default=0, help="seed of demos, SFT, rollouts and updates")
    add("--out", default="runs/05_train_maniskill", help="folder of logs and checkpoints")
    add("--resume", action="store_true", help="continue the run in --out")
    add("--eval-only", metavar="CHECKPOINT", help="test this policy and stop")
    nft.add_method_flags(parser, transitions="all", labels="grouped", noise_level=0.3,
                         ema=[0.1, 0.5])
    args = parser.parse_args()
    nft.check_method(args)
    args.backend = args.backend or ("physx_cuda" if args.device == "cuda" else "physx_cpu")
    return args


def check(args, out):
    """What a user can get wrong, told in one line before anything is simulated or written."""
    check_task(args.task)
    if args.num_demos < 1 and not (args.resume or args.eval_only):
        raise SystemExit("--num-demos 0: SFT needs at least one demonstration")
    if args.eval_only and not Path(args.eval_only).exists():
        raise SystemExit(f"--eval-only {args.eval_only}: no such file; train first")
    if args.resume and not (out / "last.pt").exists():
        raise SystemExit(f"--resume: {out}/last.pt is missing; start without --resume")
    if not (args.resume or args.eval_only) and (out / "log.csv").exists():
        raise SystemExit(f"--out {out} holds a run: --resume continues it, another --out keeps it")
    for path in filter(None, [args.eval_only, args.resume and out / "last.pt"]):
        config = torch.load(path, map_location="cpu", weights_only=False)["config"]
        wanted = {"horizon": args.horizon, "action_dim": ACTION_DIM, "state_dim": STATE_DIM}
        for name, value in wanted.items():
            if config[name] != value:
                raise SystemExit(f"{path} was trained with {name} {config[name]}, this run has {value}:"
                                 f" use the flags it was trained with (--{name.split('_')[0]})")


def main():
    warnings.filterwarnings("ignore")  # the simulator's own, about drivers nobody needs here
    args, start = parse_args(), time.time()
    out, device = Path(args.out), torch.device(args.device)
    check(args, out)
    print(" ".join(f"{k}={v}" for k, v in vars(args).items()), flush=True)
    envs = make_envs(args)
    test = range(TEST, TEST + args.test_episodes)
    if args.eval_only:
        policy, _ = flow.load_policy(args.eval_only, device)
        rate = report("test", flow.evaluate(policy, envs, test, args.num_steps, "test"), TEST)
        print(f"RESULT task={args.task} success={rate:.3f} episodes={len(test)} "
              f"seconds={time.time() - start:.0f}")
    else:
        sft, best, state = train(args, envs, out, device)
        before, after = (report(f"test, {name}", flow.evaluate(p, envs, test, args.num_steps, "test"),
                                TEST) for name, p in (("SFT", sft), ("pi-StepNFT", best)))
        if args.iterations:
            fig, axes = flow.pyplot().subplots(1, 2, figsize=(10, 4), layout="constrained")
            nft.draw_learning(nft.read_log(out / "log.csv"), *axes)
            fig.savefig(out / "learning.png", dpi=120)
        print(f"RESULT task={args.task} sft={before:.3f} stepnft={after:.3f} "
              f"episodes={args.iterations * args.episodes} env_steps={state['env_steps']} "
              f"seconds={time.time() - start:.0f}")
    envs.close()


if __name__ == "__main__":
    main()
