"""05 - What a critic costs: pi-StepNFT beside PPO and GRPO, in and out of distribution.

The method of 03 on ManiSkill: a Panda arm holds a cube at a goal, pushes, stacks, or follows a
sentence (--task). A few demonstrations are cloned (SFT), and RL lifts the clone; --algo says how:

    stepnft      rank the mirrored branches of one step by the episode's success        (03)
    ppo          clipped policy gradient on the likelihood of a noisy step; a critic's advantage
    grpo         the same with the mean of the episodes from one start in the critic's place
    ppo-action   PPO with the noise on the executed chunk, none in the steps that lead to it

New: the last three, and a test out of distribution (--eval-ood). `update` and the loop are 04's,
written out again. --task PixelGap is the toy world through a camera, in minutes.

Run:     python 05_train_maniskill.py                       (5 to 9 minutes on two CPU cores)
         python 05_train_maniskill.py --task PixelGap --algo ppo --eval-ood      (a minute)
         python 05_train_maniskill.py --eval-only runs/05_train_maniskill/last.pt
Prints:  success of SFT and of every evaluation with its 95 % interval, then RESULT.
Saves:   runs/05_train_maniskill/{sft.pt, last.pt, log.csv, test.csv, learning.png, videos/}
"""

import copy
import importlib
import time
import warnings

import numpy as np
import torch

from envs import maniskill, maniskill_gpu, pixel_gap
from envs.gap_world import episode_seeds
from envs.workers import scripted_demos
from policies import build_policy, credited, load_policy
from policies.critic import Critic
from policies.explore import chunk_log_ratio, noisy_chunk, one_noisy_step
from tools import flags, ranks, run
from tools.log import learning_figure, log_row

flow, sde, nft = map(importlib.import_module,
                     ("01_flow_policy", "02_sde_sampler", "03_step_loss"))

# ------------------------------------------------------------------------------------------------
# Four ways to learn from a rollout. First the method.


def update(policy, optimizer, batch, args):
    """Minibatch steps of 03's ranking loss over a labelled batch -> mean info of all steps. Unlike
    03's it trains on every denoising step of a chunk (--transitions), and an action dim that hardly
    moves earns no credit."""
    count, K = len(batch["y"]), args.num_steps
    batch["k"] = torch.arange(K).expand(count, -1)                                  # (rows, n)
    if args.transitions == "one":
        batch["k"] = torch.randint(K, (count, 1))
    infos = []
    for _ in range(args.epochs):
        for rows in ranks.minibatches(count, args.minibatch):
            part = ranks.to_device(flow.take(batch, rows), args.device)
            ctx = policy.encode(part)  # once a chunk, whatever the number of its steps
            each = [nft.recorded_steps(policy, {**part, "k": k}, ctx) for k in part["k"].T]
            steps = {name: torch.stack([one[name] for one in each], 1).flatten(0, 1)
                     for name in each[0]}                                           # b * n rows
            x_next, x_0 = steps.pop("x_next"), steps.pop("x_0")
            steps["v_theta"] = credited(policy, steps["v_theta"], steps["v_old"])
            loss, info = nft.step_nft_loss(
                **steps, target=x_next if args.target == "next" else x_0,
                error=nft.TARGETS[args.target], beta=args.beta, max_drift=args.max_drift,
                dpo_beta=args.dpo_beta)
            info["grad_norm"] = nft.optimise(policy, optimizer, loss, grad_clip=1.0)
            infos.append(info)
    return nft.mean_info(infos)


# Then PPO with a critic, and GRPO, the same without one. Their likelihood is that of one noisy
# step: the other steps of a chunk are the ODE's (Flow-SDE, as in the paper's baselines); that of
# ppo-action is the chunk's. How each explores: noise in every denoising step, in one, on the chunk.
EXPLORE = {"stepnft": nft.explore, "ppo": one_noisy_step, "grpo": one_noisy_step,
           "ppo-action": noisy_chunk}


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


def step_log_ratio(policy, part, ctx, args):
    """log of the new over the old likelihood of each row's noisy step (executed actions): (B,)."""
    steps = nft.recorded_steps(policy, part, ctx)
    _, _, v_theta, v_old = (steps.pop(name) for name in ("y", "x_0", "v_theta", "v_old"))
    v_theta = credited(policy, v_theta, v_old)
    return log_prob(v_theta, **steps) - log_prob(v_old, **steps)


def advantages(policy, critic, batch, success, args):
    """How much better than expected each row's episode went, over all rows with std 1: (rows,).

    With a critic: GAE, less its mean; batch gets `elapsed` and `returns`, which the critic learns.
    Without (GRPO): the labels less the mean of their start, and not less the batch's mean as well,
    or starts that always succeed would lose.
    """
    if critic:
        limit = -(-args.max_steps // args.horizon)  # of an episode, in chunks
        batch["elapsed"], values = elapsed_time(batch["episode"], limit), []
        with torch.no_grad():
            for rows in torch.arange(len(batch["x"])).split(4096):
                part = ranks.to_device(flow.take(batch, rows), args.device)
                values.append(critic(policy.encode(part), part["elapsed"]).cpu())
        A, batch["returns"] = gae(torch.cat(values), success, batch["episode"])
        A = A - ranks.gather(A).mean()
    else:
        A = nft.labels(success, batch["episode"], args.group_size)
    return A / (ranks.gather(A).std() + 1e-6)


def ppo_update(policy, critic, optimizer, batch, args, clip=0.2):
    """The clipped objective on what was noisy in each chunk -> mean info of all steps.

    batch["y"] holds the advantages A. The critic's loss is half its mean squared error. Once a
    minibatch's kl = mean(ratio - 1 - log ratio) is above --target-kl, the policy rests: only the
    critic goes on, as it starts untrained; GRPO (critic=None) stops, before that is logged.
    """
    resting, infos = False, []
    for _ in range(args.epochs):
        for rows in ranks.minibatches(len(batch["y"]), args.minibatch):
            part = ranks.to_device(flow.take(batch, rows), args.device)
            ctx = policy.encode(part)
            log_ratio = (chunk_log_ratio if args.algo == "ppo-action" else step_log_ratio)(
                policy, part, ctx, args)
            A, ratio = part["y"], log_ratio.exp()
            # L = -min(ratio A, clip(ratio, 1 - eps, 1 + eps) A)
            loss = -torch.minimum(ratio * A, ratio.clamp(1 - clip, 1 + clip) * A).mean()
            kl = (ratio - 1 - log_ratio).mean()
            resting = resting or bool(ranks.gather(kl.detach().cpu()[None]).mean() > args.target_kl)
            info = {"loss": loss, "clipped": ((ratio - 1).abs() > clip).float().mean(),
                    "approx_kl": kl, "resting": torch.tensor(float(resting))}
            if resting and not critic:
                return nft.mean_info(infos)
            loss = 0 if resting else loss
            if critic:
                seen = ctx.detach() if resting else ctx  # a shared encoder rests, too
                error = critic(seen, part["elapsed"]) - part["returns"]
                info["value_loss"] = error.pow(2).mean() / 2
                loss = loss + info["value_loss"]
            # the policy's gradient alone is clipped: the critic's must not shorten it
            info["grad_norm"] = nft.optimise(policy, optimizer, loss, grad_clip=1.0)
            infos.append({name: value.detach() for name, value in info.items()})
    return nft.mean_info(infos)


# ------------------------------------------------------------------------------------------------
# Worlds, demonstrations, tests


def make_world(args, demo_noise=None, film=None):
    """The simulators. With demo_noise they also observe the expert's action; film: a folder."""
    if args.task == "PixelGap":
        return pixel_gap.PixelGap(args.scenes, demos=demo_noise is not None)
    if args.sim == "gpu" and demo_noise is None:
        own = args.episodes // ranks.rank_of()[1]  # all of an iteration's at a time
        return maniskill_gpu.make_scenes(args.task, own, args.max_steps, args.device)
    return maniskill.make_workers(
        args.task, min(args.num_envs, args.video) if film else args.num_envs,
        horizon=args.horizon, max_steps=args.max_steps, obs=args.obs,
        renderer=args.renderer if film or args.obs == "rgb" else None, demo_noise=demo_noise,
        film=film)


def policy_config(args):
    """All that makes this run's policy, as its checkpoints keep it."""
    if args.task == "PixelGap":
        return dict(kind="small_images", horizon=args.horizon, action_dim=2, state_dim=2, cameras=1,
                    language=False, width=128, depth=3)
    config = dict(horizon=args.horizon, action_dim=maniskill.ACTION_DIM,
                  state_dim=maniskill.state_size(args.task, args.obs), width=256, depth=3)
    slots = maniskill.slots(args.task)  # things that an instruction may name
    if slots and args.obs == "state":
        return dict(config, kind="slots", slots=slots)
    return dict(config, kind="robot", cameras=int(args.obs == "rgb"), language=slots > 0)


def clone(args):
    """The SFT policy: this run's (--resume), another run's (--sft), or trained on demos."""
    if args.resume or args.sft:
        policy = load_policy(args.sft or args.resume.parent / "sft.pt", args.device)
    else:
        seeds = [episode_seeds("demo", 10 * args.num_demos, args.seed)]
        demos = scripted_demos(make_world(args, demo_noise=args.demo_noise), seeds, args.num_demos)
        chunks = torch.cat([flow.sliding_chunks(actions, args.horizon) for _, actions in demos])
        policy = run.sft(args, lambda: build_policy(policy_config(args)), demos, chunks)
    run.save(args.out / "sft.pt", policy, args)
    return policy


def test_all(policies, args, world):
    """The test, on request the OOD suite and films of the last policy -> success of each policy.
    Every policy plays the same seeds in every variant: a row of test.csv each."""
    if not args.eval_only:  # which adds rows, named by its checkpoint
        (args.out / "test.csv").unlink(missing_ok=True)
    seeds = episode_seeds("test", args.test_episodes)
    tests, rates = [("test", "as in training", {}, seeds)], {}  # rates: (axis, policy) -> list
    if args.eval_ood:
        suite = (pixel_gap.VARIANTS if args.task == "PixelGap"
                 else maniskill.variants(args.task, args.obs))
        tests += [(*variant, episode_seeds("test", args.ood_episodes, iteration=1))
                  for variant in suite]
    for axis, variant, changes, starts in tests:
        if axis != "test":
            world.change(changes=changes)
        for name, policy in policies.items():
            success = flow.evaluate(policy, world, starts, args.num_steps)
            log_row(args.out / "test.csv", {"policy": name, "task": args.task, "axis": axis,
                                                "variant": variant, **run.rated(success)})
            rate = run.report(f"{args.task}, {axis}, {variant}, {name}", success)
            rates.setdefault((axis, name), []).append(rate)
    world.close()
    if args.video and not ranks.rank_of()[0]:
        *_, last = policies.values()
        run.film(args, make_world(args, film=args.out / "videos"), last, seeds)
    tested = [rates.pop(("test", name))[0] for name in policies]
    if args.eval_ood:
        run.show_axes(rates)
    return tested


# ------------------------------------------------------------------------------------------------
# Flags, and the run


def parse_args(argv=None):
    """All flags, checked; fills in what depends on the task."""
    parser = flags.Parser(__doc__)
    add = parser.add_argument
    add("--task", default="PickCube-v1", help=f"{', '.join(maniskill.TASKS)}; or PixelGap, the toy "
        "world seen through a camera, which has defaults of its own")
    add("--obs", default="state", choices=["state", "rgb"],
        help="offsets of objects and goals, or a camera (needs a Vulkan driver); and the hand")
    add("--sim", default="cpu", choices=["cpu", "gpu"], help="gpu: a scene for each episode of an "
        "iteration, demos on the CPU, nothing but states; not run on a GPU here")
    add("--algo", default="stepnft", choices=list(EXPLORE), help="how it learns, see above")
    add("--target-kl", type=flags.positive_float, default=0.05,
        help="ppo, ppo-action, grpo: the policy rests once an update has moved it so far")
    add("--scenes", type=flags.positive_int, default=64, help="PixelGap: how many training has")
    add("--eval-ood", action="store_true", help="also test out of distribution")
    add("--ood-episodes", type=flags.positive_int, default=200, help="episodes of each variant")
    flags.add_method_flags(parser)
    flags.add_run_flags(parser, envs_per_core=2, iterations=18, eval_every=3, test_episodes=400,
                        out="runs/05_train_maniskill", group_size=8, noise_level=0.3,
                        ema=[0.1, 0.5])
    if parser.peek("--task", argv) == "PixelGap":
        parser.set_defaults(**pixel_gap.RUN)
    args = flags.parse_run(parser, argv)
    args.action_repeat, pixels = 1, args.task == "PixelGap"
    if pixels:
        parser.refuse(args, ["obs", "max_steps", "demo_noise", "num_envs", "video", "sim"],
                      "belongs to the simulator: --task PixelGap does not use it")
    else:
        maniskill.check_run(args)
        args.max_steps = args.max_steps or maniskill.TASKS[args.task].max_steps
        parser.refuse(args, ["scenes"], "belongs to PixelGap")
    if args.algo == "stepnft":
        parser.refuse(args, ["target_kl"], "belongs to ppo and grpo")
    else:
        parser.refuse(args, ["target", "beta", "max_drift", "dpo_beta", "ema", "transitions"],
                      f"belongs to the method: --algo {args.algo} does not use it")
    if args.algo == "grpo" and args.group_size == 1:
        parser.error("--group-size 1: --algo grpo compares the episodes from one start, give 8")
    flags.check_clone(parser, args, policy_config(args))
    seen = not pixels and (args.obs == "rgb" or args.video)
    args.renderer = maniskill.find_renderer() if seen else None
    parser.claim_folder("--out", args.out)
    return args


def main():
    warnings.filterwarnings("ignore")  # the simulator's own, about drivers nobody needs here
    args, start = parse_args(), time.time()
    ranks.join_ranks(args)
    torch.set_num_threads(torch.get_num_threads() if args.renderer else 1)  # 1: without images
    print(*(f"{k}={v}" for k, v in vars(args).items() if k != "flags"), flush=True)
    if args.eval_only:
        policies = {str(args.eval_only): load_policy(args.eval_only, args.device)}
        rate, = test_all(policies, args, ranks.shared(make_world(args), args.device))
        return print(f"RESULT task={args.task} success={rate:.3f} episodes={args.test_episodes} "
                     f"seconds={time.time() - start:.0f}")
    sft = clone(args)
    policy, old = copy.deepcopy(sft), copy.deepcopy(sft)  # policy learns, old acts
    ranks.average_gradients(policy)
    optimizer = torch.optim.Adam(policy.parameters(), lr=args.lr)
    parts, critic = {"policy": policy, "old": old, "optimizer": optimizer}, None
    if args.algo.startswith("ppo"):
        torch.manual_seed(args.seed)
        parts["critic"] = critic = Critic(sft.context_dim).to(args.device)
        ranks.average_gradients(critic)
        optimizer.add_param_group({"params": critic.parameters(), "lr": critic.lr})
    state = run.begin(args, parts)
    world = ranks.shared(make_world(args), args.device)

    def validate(policy, what):
        seeds = episode_seeds("validation", args.eval_episodes)
        return run.report(f"validation, {what}",
                          flow.evaluate(policy, world, seeds, args.num_steps))

    if args.iterations and not args.resume:
        validate(sft, "SFT")
    for i in range(state["iteration"], args.iterations):
        print(f"iteration {i + 1}/{args.iterations}", flush=True)
        run.random_stream(args.seed, i)
        began = time.time()
        # act: the old policy, with the noise that this way to learn needs
        explore = EXPLORE[args.algo]
        starts = episode_seeds("train", args.episodes // args.group_size, args.seed, i)
        success, batch = world.play(explore(old, args.num_steps, args.noise_level),
                                    np.repeat(starts, args.group_size))
        played = time.time()
        optimizer.param_groups[0]["lr"] = args.lr * (1 - i / args.iterations)  # smaller steps late
        # label, update, follow
        if args.algo == "stepnft":
            batch["y"] = nft.labels(success, batch["episode"], args.group_size)
            info = update(policy, optimizer, batch, args)
            alpha = nft.ema_decay(i, args.iterations, *args.ema)
        else:
            batch["y"] = advantages(policy, critic, batch, success, args)
            info = ppo_update(policy, critic, optimizer, batch, args)
            alpha = 0.0  # on-policy: the old policy is the trained one
        nft.ema_update(old, policy, alpha)
        updated = time.time()
        # validate: the trained policy, without noise
        rate = ""
        if (i + 1) % args.eval_every == 0 or i + 1 == args.iterations:
            rate = validate(policy, f"iteration {i + 1}")
        # save: a row of the log (its loss is rank 0's), and the checkpoint
        row = run.count(args, state, success, batch)
        log_row(args.out / "log.csv", {
            **row, "eval_ode": rate, **info, "alpha": alpha, "rollout_seconds": played - began,
            "update_seconds": updated - played})
        run.save_last(args, parts, state)

    policies = {"SFT": sft}
    if args.iterations:
        policies[args.algo] = policy
        learning_figure(args.out / "log.csv", args.out / "learning.png")
    rates = zip(("sft", args.algo), test_all(policies, args, world))
    print(f"RESULT task={args.task}", *(f"{which}={rate:.3f}" for which, rate in rates),
          f"episodes={state['iteration'] * args.episodes} env_steps={state['env_steps']} "
          f"seconds={time.time() - start:.0f}")


if __name__ == "__main__":
    flags.call(main)
