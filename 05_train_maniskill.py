"""05 - pi-StepNFT on a robot arm: ManiSkill, from a few scripted demonstrations.

The method of 03 unchanged, on a real simulator: a Panda arm must grasp a cube and hold it at a goal
(PickCube-v1). A scripted controller gives a few demonstrations, flow matching clones them (SFT),
and reinforcement learning lifts the clone:

    rollout (02: SDE, wide) -> label by success -> update (03: one-step ranking) -> EMA -> evaluate

New since 03: simulators in worker processes (or thousands on a GPU), checkpoints and --resume.
Defaults that differ from the paper's, because twenty demos and two CPU cores are not a GPU cluster:
all K denoising steps of a chunk are trained on, not one (four times the data from the same
simulation); each start is played eight times and labels are centered on its mean (a start that
always fails says nothing); noise 0.3; the old policy follows quickly. Each is a flag.
--algo ppo trains the same policy with the paper's critic baseline, --algo grpo without the critic;
`--rollout ode --target endpoint --loss weighted` is the form of DiffusionNFT.
Left out: the vision-language backbone and, so far, images.

Run:     python 05_train_maniskill.py                       (about 5 minutes on two CPU cores)
         python 05_train_maniskill.py --eval-only runs/05_train_maniskill/best.pt
Prints:  success of SFT and of every evaluation with its 95 % interval, then RESULT.
Saves:   runs/05_train_maniskill/{sft.pt, last.pt, best.pt, log.csv, learning.png}
"""

import argparse
import copy
import functools
import importlib
import time
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch

flow = importlib.import_module("01_flow_policy")
sde = importlib.import_module("02_sde_sampler")
nft = importlib.import_module("03_step_loss")
# Borrowed from 01: FlowPolicy;  train_sft(policy, obs, chunks, steps) -> loss;  sliding_chunks;
#   play(act, envs, seeds) -> (success, rows);  load_policy.
# Borrowed from 02: transition(x_t, v, t_cur, t_next, sigma) -> (mean, std).
# Borrowed from 03: rollout -> (success, batch);  labels -> y;  update -> info;  ema_decay,
#   ema_update;  ChunkEnv, worker_envs: simulators in processes;  share, gather: torchrun's ranks;
#   add_run_flags, add_method_flags, check_run;  save_run, load_run;  report, log_row, draw_run.

# Disjoint episodes: demos 0.., validation and test on their own ranges, training above them.
VALIDATION, TEST, TRAIN = 1_000_000, 1_500_000, 2_000_000

INSTRUCTIONS = {"PickCube-v1": "pick up the red cube and hold it at the green goal"}
STATE_DIM, ACTION_DIM = 11, 4
CRITIC_LR = 1e-3
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
        """Starts episode seeds[j] in env which[j]; a seed is the same episode at any time."""
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
        self.sim = ManiSkillSim(task, num_envs, backend)
        self.num_envs, self.max_steps = num_envs, max_steps
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
# The baselines: PPO with a critic (piRL's Flow-SDE), and GRPO, the same without one


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
    advantages = torch.zeros_like(values)
    for e in range(len(success)):
        rows, running, following = torch.where(episode == e)[0].tolist(), 0.0, 0.0
        reward = float(success[e])
        for row in reversed(rows):
            # delta = r + gamma V(next) - V          A = delta + gamma lambda A(next)
            delta = reward + gamma * following - values[row]
            running = delta + gamma * lam * running
            advantages[row], following, reward = running, values[row], 0.0
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
    infos = []
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
        learners = torch.nn.ModuleList([policy, critic] if critic else [policy])
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


def pretrain(args, envs, out, device):
    """Demos -> SFT -> sft.pt."""
    torch.manual_seed(args.seed)
    policy = flow.FlowPolicy(args.horizon, ACTION_DIM, state_dim=STATE_DIM, width=256).to(device)
    obs, chunks = collect_demos(envs, args.num_demos, args.seed, args.horizon, args.demo_noise)
    print(f"{args.num_demos} demos, {len(chunks)} chunks of {args.horizon} actions")
    loss = flow.train_sft(policy, obs, chunks, args.sft_steps)
    print(f"SFT: flow matching loss {loss:.3f}")
    nft.save(out / "sft.pt", policy)


def evaluate(name, policy, args, envs, first, episodes):
    success = nft.evaluate(policy, envs, range(first, first + episodes), args.num_steps, name)
    return nft.report(name, success, f"seeds {first}..{first + episodes - 1}")


def train(args, envs, out, device):
    """SFT -> pi-StepNFT. Returns (SFT policy, best policy, state)."""
    if not args.resume and nft.rank_of()[0] == 0:
        pretrain(args, envs, out, device)
    nft.gather([0])  # the other ranks wait here
    sft, _ = flow.load_policy(out / "sft.pt", device)
    policy, old, best = (copy.deepcopy(sft) for _ in range(3))  # old acts, policy learns
    optimizer = torch.optim.Adam(policy.parameters(), lr=args.lr)
    acting, learning = nft.method(args)
    critic = None
    if args.algo == "ppo":
        critic = Critic(STATE_DIM).to(device)
        optimizer.add_param_group({"params": critic.parameters(), "lr": CRITIC_LR})
    validation = VALIDATION, args.eval_episodes
    state = {"iteration": 0, "env_steps": 0, "best_rate": -1.0}
    if args.resume:
        state = nft.load_run(out / "last.pt", policy, old, best, optimizer, device)
        if critic:
            critic.load_state_dict(state["critic"])
    elif args.iterations:
        state["best_rate"] = evaluate("validation, SFT", sft, args, envs, *validation)

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
            rate = evaluate(f"validation, iteration {i + 1}", policy, args, envs, *validation)
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
    parser.add_argument("--task", default="PickCube-v1",
                        help="ManiSkill task with a scripted controller here")
    parser.add_argument("--backend", default=None, choices=["physx_cpu", "physx_cuda"],
                        help="of the physics; default: physx_cuda when --device is cuda. On a GPU "
                             "one process holds all --num-envs (try 512)")
    parser.add_argument("--algo", default="stepnft", choices=["stepnft", "ppo", "grpo"],
                        help="stepnft: the method; ppo: the critic baseline; grpo: PPO's objective "
                             "with the group's mean in the critic's place")
    nft.add_run_flags(parser, iterations=18, max_steps=24, eval_every=3, test_episodes=400,
                      out="runs/05_train_maniskill")
    nft.add_method_flags(parser, transitions="all", labels="grouped", noise_level=0.3,
                         ema=[0.1, 0.5])
    args = parser.parse_args()
    if args.algo != "stepnft":  # Flow-SDE: one noisy step, so that the chunk has a likelihood
        args.rollout = "flow-sde"
        args.labels = "grouped" if args.algo == "grpo" else "binary"
    nft.check_method(args)
    args.backend = args.backend or ("physx_cuda" if args.device == "cuda" else "physx_cpu")
    return args


def main():
    warnings.filterwarnings("ignore")  # the simulator's own, about drivers nobody needs here
    args, start = parse_args(), time.time()
    check_task(args.task)
    nft.check_run(args, {"horizon": ("--horizon", args.horizon),
                         "state_dim": ("--task", STATE_DIM)})
    out, device = Path(args.out), nft.join_ranks(args.device)
    print(" ".join(f"{k}={v}" for k, v in vars(args).items()), flush=True)
    envs, test = make_envs(args), (TEST, args.test_episodes)
    if args.eval_only:
        policy, _ = flow.load_policy(args.eval_only, device)
        rate = evaluate("test", policy, args, envs, *test)
        print(f"RESULT task={args.task} success={rate:.3f} episodes={args.test_episodes} "
              f"seconds={time.time() - start:.0f}")
    else:
        sft, best, state = train(args, envs, out, device)
        before = after = evaluate("test, SFT", sft, args, envs, *test)
        if args.iterations:
            after = evaluate(f"test, {args.algo}", best, args, envs, *test)
            nft.draw_run(out)
        print(f"RESULT task={args.task} sft={before:.3f} {args.algo}={after:.3f} "
              f"episodes={args.iterations * args.episodes} env_steps={state['env_steps']} "
              f"seconds={time.time() - start:.0f}")
    envs.close()


if __name__ == "__main__":
    main()
