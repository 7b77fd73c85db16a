"""05 - What a critic costs: pi-StepNFT beside PPO and GRPO, in and out of distribution.

The method of 03 on a second simulator, ManiSkill: a Panda arm holds a cube at a goal,
pushes, stacks, or follows a sentence, "put the red cube on the green pad" (--task). As in 04, a
scripted controller gives a few demonstrations, flow matching clones them (SFT), and reinforcement
learning lifts the clone; --algo says how:

    stepnft   rank the mirrored branches of one step by the episode's success        (03)
    ppo       clipped policy gradient on the likelihood of one noisy step, with a critic's advantage
    grpo      the same with the mean of the episodes from one start in the critic's place

New since 04: those two, and a test out of distribution (--eval-ood: vision, semantic, execution;
never trained on). The simulator, its tasks and the variants live in envs/maniskill.py; --task
PixelGap is the toy world seen through a camera, with defaults of its own, in minutes. Defaults
that differ from the paper's, because a few demos and two CPU cores are not a GPU cluster: all K
denoising steps of a chunk are trained on; labels are centred on the 8 episodes from one start;
noise 0.3; the old policy follows quickly. Each is a flag. Left out: the vision-language backbone.

Run:     python 05_train_maniskill.py                       (5 to 9 minutes on two CPU cores)
         python 05_train_maniskill.py --task PutOnPad-v1 --num-demos 40 --sft-steps 3000
             --lr 3e-5 --dpo-beta 0.1 --eval-ood     (one line; 1000 SFT steps are too few)
         python 05_train_maniskill.py --task PixelGap --algo ppo --eval-ood      (a minute)
         python 05_train_maniskill.py --eval-only runs/05_train_maniskill/last.pt
Prints:  success of SFT and of every evaluation with its 95 % interval, then RESULT.
Saves:   runs/05_train_maniskill/{sft.pt, last.pt, log.csv, test.csv, learning.png, videos/}; with
         PixelGap runs/05_pixel_gap/, without videos
"""

import argparse
import functools
import importlib
import time
import warnings

import numpy as np
import torch
from torch import nn

from envs import maniskill, pixel_gap

flow, sde, nft, robot = map(importlib.import_module, (
    "01_flow_policy", "02_sde_sampler", "03_step_loss", "04_train_libero"))

# ------------------------------------------------------------------------------------------------
# The baselines: PPO with a critic, and GRPO, the same without one. Their likelihood is that of one
# noisy step: the other steps of a chunk are the ODE's (Flow-SDE, as in the paper's baselines).


def one_noisy_step(policy, num_steps, noise_level):
    """An `act` for a world's `play`: `explore` of 03 with noise in one random step, k (B, 1)."""
    def act(obs):
        obs = flow.to_device(obs, policy)
        k = torch.randint(num_steps, (len(obs["state"]), 1), device=obs["state"].device)
        noise = noise_level * (torch.arange(num_steps, device=k.device) == k)          # (B, K)
        x_0, path = sde.sde_sample(policy, obs, num_steps, noise)
        return policy.denormalise(x_0).cpu(), {
            "k": k.cpu(), **{name: z.cpu() for name, z in path._asdict().items()}}
    return act


class Critic(nn.Module):
    """V(observation, time) for PPO: an MLP on the policy's encoding, which it does not train."""

    lr = 1e-3  # it starts from nothing, the policy does not

    def __init__(self, context, width=256):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(context + 1, width), nn.Tanh(),
                                 nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1))

    def forward(self, ctx, elapsed):
        """ctx (B, C), elapsed (B,): how much of the time limit is over -> (B,)."""
        return self.net(torch.cat([ctx.detach(), elapsed[:, None]], -1))[:, 0]


def elapsed_time(episode, chunks):
    """episode (rows,), in the order of time -> (rows,): chunks of this episode played before, over
    `chunks`, the limit."""
    played, elapsed = {}, []
    for e in episode.tolist():
        elapsed.append(played.get(e, 0) / chunks)
        played[e] = played.get(e, 0) + 1
    return torch.tensor(elapsed)


def gae(values, success, episode, gamma=0.99, lam=0.95):
    """Generalised advantage estimation over chunks -> (advantages, returns), one per row.

    values (rows,), success (episodes,), episode (rows,). The reward is 1 at the end of a success;
    rows of an episode are in the order of time, and nothing is worth anything after its last.
    delta = r + gamma V(next) - V,   A = delta + gamma lambda A(next),   returns = A + V
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


def log_prob(v, x_t, x_next, t_cur, t_next, sigma, mask):
    """log N(x_next; mean(v), std^2) of each row's noisy step, over its executed actions: (B,)."""
    t_cur, t_next, sigma = (z[:, None, None] for z in (t_cur, t_next, sigma))
    normal = torch.distributions.Normal(*sde.transition(x_t, v, t_cur, t_next, sigma))
    return (normal.log_prob(x_next) * mask[..., None]).sum((1, 2))


def ppo_update(policy, critic, optimizer, batch, *, epochs, minibatch, clip=0.2, grad_clip=1.0,
               target_kl=0.05):
    """The clipped objective on the one noisy step of each chunk -> mean info of all steps.

    batch["y"] holds the advantages A; with a critic also batch["returns"] and batch["elapsed"].
    L = -mean min(ratio A, clip(ratio, 1 - clip, 1 + clip) A), v_theta through robot.credited; with
    a critic plus half its mean squared error. nft.optimise(policy, ...) clips the policy's gradient
    alone. Once a minibatch's kl = mean(ratio - 1 - log ratio) is above target_kl, the policy rests:
    only the critic goes on, as it starts untrained; GRPO (critic=None) stops. info: loss, clipped,
    approx_kl, resting, grad_norm, with a critic value_loss.
    """
    resting = False
    infos = []
    for _ in range(epochs):
        for rows in torch.randperm(len(batch["y"])).split(minibatch):
            ctx, steps = nft.recorded_steps(policy, flow.take(batch, rows))
            A, v_theta, v_old, _ = (steps.pop(name) for name in ("y", "v_theta", "v_old", "x_0"))
            v_theta = robot.credited(policy, v_theta, v_old)
            log_ratio = log_prob(v_theta, **steps) - log_prob(v_old, **steps)
            ratio = log_ratio.exp()
            # L = -min(ratio A, clip(ratio, 1 - eps, 1 + eps) A)
            loss = -torch.minimum(ratio * A, ratio.clamp(1 - clip, 1 + clip) * A).mean()
            kl = (ratio - 1 - log_ratio).mean()
            resting = resting or bool(robot.gather(kl.detach().cpu()[None]).mean() > target_kl)
            info = {"loss": loss, "clipped": ((ratio - 1).abs() > clip).float().mean(),
                    "approx_kl": kl, "resting": torch.tensor(float(resting))}
            if resting and not critic:
                return nft.mean_info(infos)
            loss = 0 if resting else loss
            if critic:
                elapsed, returns = (batch[name][rows].to(ctx.device)
                                    for name in ("elapsed", "returns"))
                info["value_loss"] = (critic(ctx, elapsed) - returns).pow(2).mean() / 2
                loss = loss + info["value_loss"]
            # the policy's gradient alone is clipped: the critic's must not shorten it
            info["grad_norm"] = nft.optimise(policy, optimizer, loss, grad_clip)
            infos.append({name: value.detach() for name, value in info.items()})
    return nft.mean_info(infos)


class PPO:
    """PPO, or without a critic GRPO, as `train` of 04 uses it."""

    def __init__(self, args, critic=None):
        self.args, self.critic = args, critic
        self.beside = [critic] if critic else []  # learns beside the policy

    def explore(self, old):
        return one_noisy_step(old, self.args.num_steps, self.args.noise_level)

    def learn(self, policy, optimizer, batch, success):
        """Advantages of std 1, then minibatch steps -> info. GRPO's are the labels that are centred
        on each start: centred on the batch as well, starts that always succeed would lose."""
        if self.critic:
            limit = -(-self.args.max_steps // self.args.horizon)  # of an episode, in chunks
            batch["elapsed"] = elapsed_time(batch["episode"], limit)
            with torch.no_grad():
                parts = torch.arange(len(batch["x"])).split(4096)
                shown = (flow.to_device(flow.take(batch, rows), policy) for rows in parts)
                values = torch.cat([self.critic(policy.encode(rows), rows["elapsed"]).cpu()
                                    for rows in shown])
            y, batch["returns"] = gae(values, success, batch["episode"])
            y = y - robot.gather(y).mean()
        else:
            y = nft.labels(success, batch["episode"], self.args.group_size)
        batch["y"] = y / (robot.gather(y).std() + 1e-6)  # `recorded_steps` hands them on as y
        return ppo_update(policy, self.critic, optimizer, robot.equal_rows(batch),
                          epochs=self.args.epochs, minibatch=self.args.minibatch,
                          target_kl=self.args.target_kl)

    def decay(self, iteration):
        return 0.0  # on-policy: the old policy is the trained one


def make_method(args, policy):
    """--algo as `train` of 04 uses it."""
    if args.algo == "stepnft":
        return robot.StepNFT(args)
    torch.manual_seed(args.seed)
    critic = Critic(policy.context_dim).to(args.device) if args.algo == "ppo" else None
    return PPO(args, critic)


# ------------------------------------------------------------------------------------------------
# Worlds, demonstrations, tests


def make_world(args, demo_noise=None, film=None):
    """The simulators. With demo_noise they also observe the expert's action; film: a folder."""
    if args.task == "PixelGap":
        return pixel_gap.PixelGap(args.scenes, demos=demo_noise is not None)
    return maniskill.make_workers(
        args.task, min(args.num_envs, args.video) if film else args.num_envs,
        horizon=args.horizon, max_steps=args.max_steps, obs=args.obs,
        renderer=args.renderer if film or args.obs == "rgb" else None, demo_noise=demo_noise,
        film=film)


def policy_config(args):
    """All that makes this run's policy, as its checkpoints keep it."""
    config = dict(horizon=args.horizon, depth=3)
    if args.task == "PixelGap":
        return dict(config, action_dim=2, state_dim=2, cameras=1, language=False, slots=0,
                    width=128, small_images=True)
    slots = maniskill.slots(args.task)  # things that an instruction may name
    return dict(config, action_dim=maniskill.ACTION_DIM,
                state_dim=maniskill.state_size(args.task, args.obs),
                cameras=int(args.obs == "rgb"), language=slots > 0,
                slots=slots * (args.obs == "state"), width=256, small_images=False)


def make_policy(args):
    return robot.build_policy(policy_config(args))


def collect_demos(args):
    """The expert's first successes -> [(rows, actions (T, 4)), ...]."""
    candidates = [flow.episode_seeds("demo", 10 * args.num_demos, args.seed)]
    return robot.scripted_demos(make_world(args, demo_noise=args.demo_noise), candidates,
                                args.num_demos)


def starts(args, iteration):
    """Seeds of an iteration's episodes: group_size neighbours share one."""
    seeds = flow.episode_seeds("train", args.episodes // args.group_size, args.seed, iteration)
    return np.repeat(seeds, args.group_size)


def log_test(args, policy, axis, variant, success):
    """A row of test.csv, and a line that tells it -> the rate."""
    nft.log_row(args.out / "test.csv", {"policy": policy, "task": args.task, "axis": axis,
                                        "variant": variant, **robot.rated(success)})
    return robot.report(f"{args.task}, {axis}, {variant}, {policy}", success)


def test_ood(policies, args, world):
    """Every policy on every variant, the same seeds each time -> test.csv and a table of axes."""
    rates = {name: {} for name in policies}
    suite = (pixel_gap.VARIANTS if args.task == "PixelGap" else
             maniskill.variants(args.task, args.obs))
    for axis, variant, changes in suite:
        world.change(changes=changes)
        for name, policy in policies.items():
            seeds = flow.episode_seeds("test", args.ood_episodes, iteration=1)
            success = robot.evaluate(policy, world, seeds, args.num_steps)
            rates[name].setdefault(axis, []).append(
                log_test(args, name, axis, variant, success))
    axes = list(dict.fromkeys(axis for axis, *_ in suite))
    print(f"{'':<12}" + "".join(f"{axis:>17}" for axis in [*axes, "OOD mean"]))
    for name, by_axis in rates.items():
        means = [np.mean(by_axis[axis]) for axis in axes]  # the OOD mean is the mean of the axes
        print(f"{name:<12}" + "".join(f"{m:17.3f}" for m in [*means, np.mean(means[1:])]))


def test_all(policies, args, world):
    """The test, on request the OOD suite and films of the last policy -> success of each."""
    rates, seeds = [], flow.episode_seeds("test", args.test_episodes)
    if not args.eval_only:  # its rows are added, under the path of the policy
        (args.out / "test.csv").unlink(missing_ok=True)
    for name, policy in policies.items():
        success = robot.evaluate(policy, world, seeds, args.num_steps)
        rates.append(log_test(args, name, "test", "as in training", success))
    if args.eval_ood:
        test_ood(policies, args, world)
    world.close()
    if args.video and not robot.rank_of()[0]:
        filmed = make_world(args, film=args.out / "videos")
        *_, last = policies.values()
        flow.evaluate(last, filmed, seeds[:args.video], args.num_steps)
        filmed.close()
        print(f"saved {len(seeds[:args.video])} episodes in {args.out}/videos")
    return rates


# ------------------------------------------------------------------------------------------------
# Flags and main

# No noise on its demos, the expert always arrives; one transition a chunk, as PPO and GRPO have
PIXEL_GAP = dict(num_demos=48, sft_steps=1500, iterations=160, episodes=512, eval_every=20,
                 eval_episodes=500, test_episodes=1000, ood_episodes=1000, obs="rgb", max_steps=24,
                 demo_noise=0.0, transitions="one", out="runs/05_pixel_gap")


def parse_args(argv=None):
    """All flags, checked; fills in what depends on the task."""
    parser = flow.Parser(__doc__)
    add = parser.add_argument
    add("--task", default="PickCube-v1", help=f"{', '.join(maniskill.TASKS)}; or PixelGap, the toy "
        "world seen through a camera, which has defaults of its own")
    add("--obs", default="state", choices=["state", "rgb"],
        help="offsets of objects and goals, or a camera (needs a Vulkan driver); and the hand")
    add("--algo", default="stepnft", choices=["stepnft", "ppo", "grpo"],
        help="the method; PPO with a critic; PPO's objective with the group's mean in its place")
    add("--target-kl", type=flow.positive_float, default=0.05,
        help="ppo, grpo: the policy rests once an update has moved it so far")
    add("--scenes", type=flow.positive_int, default=64, help="PixelGap: how many training has")
    add("--eval-ood", action="store_true", help="also test out of distribution")
    add("--ood-episodes", type=flow.positive_int, default=200, help="episodes of each variant")
    robot.add_run_flags(parser, envs_per_core=2, iterations=18, eval_every=3, test_episodes=400,
                        out="runs/05_train_maniskill", group_size=8, noise_level=0.3,
                        ema=[0.1, 0.5])
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--task")
    if peek.parse_known_args(argv)[0].task == "PixelGap":
        parser.set_defaults(**PIXEL_GAP)
    args = robot.parse_run(parser, argv)
    args.action_repeat, pixels = 1, args.task == "PixelGap"
    if pixels:
        for name in ("obs", "max_steps", "demo_noise", "num_envs", "video"):
            if getattr(args, name) != parser.get_default(name):
                parser.error(f"--{name.replace('_', '-')} belongs to the simulator: --task "
                             "PixelGap does not use it")
    else:
        maniskill.check_task(args.task)
        args.max_steps = args.max_steps or maniskill.TASKS[args.task].max_steps
    if args.scenes != parser.get_default("scenes") and not pixels:
        parser.error("--scenes belongs to PixelGap")
    if args.target_kl != parser.get_default("target_kl") and args.algo == "stepnft":
        parser.error("--target-kl belongs to ppo and grpo")
    for name in ("target", "beta", "max_drift", "dpo_beta", "ema", "transitions"):
        if args.algo != "stepnft" and getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} belongs to the method: --algo {args.algo} "
                         "does not use it")
    if args.algo == "grpo" and args.group_size == 1:
        parser.error("--group-size 1: --algo grpo compares the episodes from one start, give 8")
    robot.check_clone(parser, args, policy_config(args))
    seen = not pixels and (args.obs == "rgb" or args.video)
    args.renderer = maniskill.find_renderer() if seen else None
    parser.make_folder("--out", args.out)
    return args


def main():
    warnings.filterwarnings("ignore")  # the simulator's own, about drivers nobody needs here
    args, start = parse_args(), time.time()
    robot.join_ranks(args)
    torch.set_num_threads(torch.get_num_threads() if args.renderer else 1)  # a small net
    print(*(f"{k}={v}" for k, v in vars(args).items() if k != "flags"), flush=True)
    if args.eval_only:
        policy = robot.load_policy(args.eval_only, args.device)
        rate, = test_all({str(args.eval_only): policy}, args, make_world(args))
        return print(f"RESULT task={args.task} success={rate:.3f} episodes={args.test_episodes} "
                     f"seconds={time.time() - start:.0f}")
    sft = robot.clone(args, make_policy, collect_demos)
    world = make_world(args)

    def validate(policy, name):
        seeds = flow.episode_seeds("validation", args.eval_episodes)
        success = robot.evaluate(policy, world, seeds, args.num_steps)
        return robot.report(f"validation, {name}", success)

    method = make_method(args, sft)
    policy, env_steps = robot.train(args, sft, world, method, functools.partial(starts, args),
                                    validate)
    policies = {"SFT": sft, args.algo: policy} if args.iterations else {"SFT": sft}
    rates = zip(("sft", args.algo), test_all(policies, args, world))
    print(f"RESULT task={args.task}", *(f"{name}={rate:.3f}" for name, rate in rates),
          f"episodes={args.iterations * args.episodes} env_steps={env_steps} "
          f"seconds={time.time() - start:.0f}")


if __name__ == "__main__":
    main()
