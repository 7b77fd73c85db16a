"""04 - To a robot: pi-StepNFT on LIBERO, from a few demonstrations.

The method of 03 on the paper's benchmark: pick and place with a Panda arm. A scripted controller
gives a few demonstrations, flow matching clones them (SFT), and each iteration of RL then

    acts with noise, labels by success, updates by 03's ranking loss, lets the old policy follow.

New since 03: a network with eyes and a sentence (policies/), a real simulator (envs/), a run that
can stop and go on, and several GPUs (tools/). The loop stands in `main`.

The defaults are for two CPU cores, not for a GPU cluster: one action a chunk, held for 4 control
steps; all K denoising steps of a chunk trained on; labels centred on 8 episodes from one start;
noise 0.5, slope (dpo_beta) 0.1 (results/libero says why). --policy brings the paper's network.

Run:     python 04_train_libero.py --num-demos 1 --seed 2     (task 0, 16 minutes on two cores)
         python 04_train_libero.py --eval-only runs/04_train_libero/last.pt --video 4
         torchrun --nproc-per-node=8 04_train_libero.py --obs rgb --tasks all --episodes 512
Prints:  success of SFT and of every evaluation with its 95 % interval, then RESULT.
Saves:   runs/04_train_libero/{sft.pt, last.pt, log.csv, test.csv, learning.png, videos/}
"""

import copy
import importlib
import time
from pathlib import Path

import numpy as np
import torch

from envs import libero, libero_demos
from envs.gap_world import episode_seeds
from envs.workers import scripted_demos
from policies import build_policy, credited, load_policy, pi0
from tools import flags, ranks, run
from tools.log import learning_figure, log_row

flow = importlib.import_module("01_flow_policy")
nft = importlib.import_module("03_step_loss")

# ------------------------------------------------------------------------------------------------
# LIBERO's simulators. A seed is a task and a start: an official one or a random placement.


def make_world(args, suite=None, demo_noise=None, test=False, film=None):
    """The simulators. With demo_noise they also observe the expert's action. test: with the test's
    time limit; film: a folder."""
    suite = suite or args.suite
    limit = (args.test_max_steps or libero.time_limit(suite)) if test else args.max_steps
    return libero.make_workers(
        suite, args.tasks, min(args.num_envs, args.video) if film else args.num_envs,
        obs=args.obs, state_dim=args.state_dim, horizon=args.horizon,
        action_repeat=args.action_repeat, demo_noise=demo_noise, image_size=args.image_size,
        max_steps=limit, gl=args.gl, film=film, published=bool(args.policy), meshes=args.meshes)


def random_starts(args, split, count, seed=0, iteration=0, group_size=1):
    """Seeds of `count` episodes, the tasks taking turns; group_size neighbours share one start."""
    starts = episode_seeds(split, count // group_size, seed, iteration)
    # an iteration begins with the task after the last one's
    tasks = np.resize(np.roll(args.tasks, -iteration * len(starts)), len(starts))
    return np.repeat(libero.random_start(tasks, starts), group_size)


# ------------------------------------------------------------------------------------------------
# Demonstrations and SFT


def collect_demos(args):
    """--demos scripted, or a PATH to LIBERO's files -> [(rows, actions (T, 7)), ...]."""
    if args.demos != "scripted":
        return libero_demos.recorded_demos(args.suite, args.tasks, args.demos, args.num_demos,
                                           args.skip_no_ops, args.obs, args.image_size,
                                           published=bool(args.policy))
    starts = episode_seeds("demo", 10 * args.num_demos, args.seed)
    return scripted_demos(make_world(args, demo_noise=args.demo_noise),
                          [libero.random_start(task, starts) for task in args.tasks],
                          args.num_demos)


def policy_config(args):
    """All that makes this run's policy, as its checkpoints keep it."""
    config = dict(horizon=args.horizon, action_dim=libero.ACTION_DIM, state_dim=args.state_dim)
    if args.policy:
        return dict(config, kind="pi0", folder=args.policy, train=args.train,
                    tokenizer=args.tokenizer)
    return dict(config, kind="robot", cameras=2 * (args.obs == "rgb"),
                language=len(args.tasks) > 1, width=512, depth=3)


def make_policy(args):
    return build_policy(policy_config(args), args.micro_batch)


def clone(args):
    """The SFT policy: this run's (--resume), another run's (--sft), or trained on demos."""
    if args.resume or args.sft:
        policy = load_policy(args.sft or args.resume.parent / "sft.pt", args.device,
                             args.micro_batch)
    else:
        demos, H, R = collect_demos(args), args.horizon, args.action_repeat
        # an action that is held for R steps does what the demo did in them, on average
        chunks = torch.cat([flow.sliding_chunks(actions, H * R).unflatten(1, (H, R)).mean(2)
                            for _, actions in demos])                               # (N, H, 7)
        policy = run.sft(args, lambda: make_policy(args), demos, chunks)
    run.save(args.out / "sft.pt", policy, args)
    return policy


# ------------------------------------------------------------------------------------------------
# The update of an iteration, and the test at the end


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


def test_all(policies, args):
    """Official and random starts in the suite of the training, official ones in --eval-suites, then
    films of the last policy; test.csv has a row for each task -> {policy: success}, official."""
    official = [libero.TASK * task + i for i in range(args.test_states) for task in args.tasks]
    placements, rates = random_starts(args, "test", args.test_episodes), {}
    if not args.eval_only:  # which adds rows, named by its checkpoint
        (args.out / "test.csv").unlink(missing_ok=True)
    for suite in dict.fromkeys([args.suite, *args.eval_suites]):
        world = ranks.shared(make_world(args, suite, test=True), args.device)
        kinds = {libero.OFFICIAL_STARTS: official}
        if suite == args.suite:
            kinds["random placements"] = placements
        for starts, seeds in kinds.items():
            for name, policy in policies.items():
                success = flow.evaluate(policy, world, seeds, args.num_steps)
                rate = run.report(f"test, {name}, {suite}, {starts}", success)
                rates.setdefault(name, rate)  # the first: official starts, suite of the training
                for task in args.tasks:
                    own = success[np.asarray(seeds) // libero.TASK == task]
                    if len(own):
                        log_row(args.out / "test.csv", {
                            "policy": name, "suite": suite, "task": task, "starts": starts,
                            **run.rated(own)})
        world.close()  # two sets of simulators may be more than the memory
    if args.video and not ranks.rank_of()[0]:
        *_, last = policies.values()
        run.film(args, make_world(args, test=True, film=args.out / "videos"), last, placements)
    return rates


# ------------------------------------------------------------------------------------------------
# Flags


def task(text):
    return text if text == "all" else flags.natural(text)


def default_meshes(args):
    """Simple ones where software draws all that the policy learns from. A checkpoint that does not
    say it is older than the flag: full."""
    from_elsewhere = args.demos != "scripted" or args.policy or args.resume or args.eval_only
    if args.obs != "rgb" or from_elsewhere:
        return "full"
    return "simple" if libero.in_software(args.gl) else "full"


def parse_args(argv=None, doc=__doc__):
    """All flags, checked; fills in what depends on the suite."""
    parser = flags.Parser(doc)
    add, suites = parser.add_argument, ", ".join(libero.TIME_LIMITS)
    add("--suite", default="libero_object", help=f"LIBERO suite: {suites}")
    add("--tasks", type=task, nargs="+", default=[0], help="task numbers in the suite, or all")
    add("--obs", default="state", choices=["state", "rgb"],
        help="poses of the objects, or two cameras (needs EGL or OSMesa); and the hand's pose")
    add("--image-size", type=flags.number(int, 48, 1024), default=128, help="height and width of "
        "the images; with --demos PATH that of the files, 128")
    add("--meshes", choices=["simple", "full"], help="of what is drawn: simple has a tenth of the "
        "triangles and is about 5 times faster without a GPU. Not given: simple with --obs rgb "
        "where software draws, full with a GPU, recorded demos, --policy or only films")
    add("--demos", default="scripted", metavar="PATH",
        help="scripted, or a folder (or file) of LIBERO's official HDF5 demonstrations")
    add("--action-repeat", type=flags.positive_int, default=4, metavar="R",
        help="control steps (1/20 s) for which each action of a chunk is held")
    add("--policy", metavar="PI0", help="a pi0 of Hugging Face's transformers, folder or name on "
        "the hub, in place of the small network from scratch; with --obs rgb. It reads the "
        "sentences that published checkpoints were trained with, LIBERO-PRO's variants keep theirs")
    add("--tokenizer", metavar="PATH", help="folder or name of PaliGemma's tokenizer on the hub, "
        "if the folder of --policy has none; without it, that folder's own")
    add("--train", default="expert", choices=["expert", "all"],
        help="what of pi0 learns; the rest is frozen, in bfloat16")
    add("--micro-batch", type=flags.positive_int, default=32, help="rows in pi0 at a time: lower "
        "it until it fits the GPU; the result is the same")
    add("--skip-no-ops", action="store_true", help="leave out recorded steps that do nothing")
    add("--eval-suites", nargs="*", default=[], metavar="SUITE", help="further suites for the "
        "final test; _swap _object _lan _task are LIBERO-PRO's variants of --suite")
    add("--test-states", type=flags.number(int, 1, libero.NUM_OFFICIAL),
        default=libero.NUM_OFFICIAL,
        help="official initial states of each task in the final test")
    add("--test-max-steps", type=flags.positive_int,
        help="time limit of the final test, in control steps; without it each suite's usual one")
    flags.add_method_flags(parser)
    flags.add_run_flags(
        parser, envs_per_core=4, gb_per_env=1.8 if parser.peek("--obs", argv) == "rgb" else 0.8,
        num_demos=3, demo_noise=0.5, sft_steps=2000, iterations=10, horizon=1, lr=3e-5,
        eval_every=5, eval_episodes=100, test_episodes=100, group_size=8, noise_level=0.5,
        dpo_beta=0.1, ema=[0.1, 0.5], out="runs/04_train_libero")
    args = flags.parse_run(parser, argv)

    every = range(len(libero.read_suite(args.suite).problems))
    args.tasks = list(every) if "all" in args.tasks else sorted(set(args.tasks))
    if not set(args.tasks) <= set(every):
        parser.error(f"--tasks {args.tasks}: {args.suite} has 0 to {every[-1]}, or all")
    scripted, able = args.demos == "scripted", libero.able_tasks(args.suite)
    demos_wanted = not (args.resume or args.eval_only or args.sft)
    if scripted and demos_wanted and not set(args.tasks) <= set(able):
        parser.error(f"--tasks {args.tasks}: --suite {args.suite} has no scripted expert but for "
                     f"the tasks {able}; give --demos PATH")
    if not scripted and demos_wanted and not Path(args.demos).exists():
        parser.error(f"--demos {args.demos}: no such file or folder")
    # In training an episode may end sooner than in the test, as failures cost most time. Scripts of
    # the protocol take 58 to 188 steps on average; one of 145 gets 160 (libero_spatial, task 5).
    test_limit = args.test_max_steps or libero.time_limit(args.suite)
    args.max_steps = args.max_steps or (max(160, test_limit // 2) if scripted else test_limit)
    args.state_dim = libero.state_size(args.suite, args.obs)
    args.eval_suites = [args.suite + s if s.startswith("_") else s for s in args.eval_suites]
    for suite in args.eval_suites:
        if (len(libero.read_suite(suite, "--eval-suites").problems) <= max(args.tasks)
                or libero.state_size(suite, args.obs) > args.state_dim):
            parser.error(f"--eval-suites {suite} has fewer tasks, or more things in one, than "
                         f"--suite {args.suite}: leave it out")
    if not args.policy:
        parser.refuse(args, ["train", "tokenizer", "micro_batch"], "is about pi0; give --policy")
    if args.policy and args.obs != "rgb":
        parser.error("--policy: a vision-language model sees, give --obs rgb")
    flags.check_clone(parser, args, policy_config(args))
    if args.policy:
        pi0.look(policy_config(args))  # before demonstrations are played
    args.gl = libero.find_gl() if args.obs == "rgb" or args.video else None
    args.meshes = args.flags["meshes"] = args.meshes or default_meshes(args)
    parser.claim_folder("--out", args.out)
    return args


# ------------------------------------------------------------------------------------------------
# The run


def main(update=update, name="pi-StepNFT", key="stepnft", doc=__doc__):
    """Demonstrations, SFT, RL, test. Another `update` with its names makes a
    baseline, as results/libero/filtered_bc.py does; batch["won"] is for those."""
    args, start = parse_args(doc=doc), time.time()
    ranks.join_ranks(args)
    if args.obs == "state":
        torch.set_num_threads(1)  # a small net: the cores are for the simulators
    print(*(f"{k}={v}" for k, v in vars(args).items() if k != "flags"), flush=True)
    told = f"RESULT suite={args.suite} task={','.join(map(str, args.tasks))}"
    if args.eval_only:
        policy = load_policy(args.eval_only, args.device, args.micro_batch)
        rate, = test_all({str(args.eval_only): policy}, args).values()
        return print(f"{told} success={rate:.3f} seconds={time.time() - start:.0f}")
    if args.policy:
        pi0.tell_ahead(policy_config(args), rows=max(args.minibatch, args.sft_batch))

    sft = clone(args)
    policy, old = copy.deepcopy(sft), copy.deepcopy(sft)  # policy learns, old acts
    ranks.average_gradients(policy)
    optimizer = torch.optim.Adam(policy.parameters(), lr=args.lr)
    parts = {"policy": policy, "old": old, "optimizer": optimizer}
    state = run.begin(args, parts)
    world = ranks.shared(make_world(args), args.device)

    def validate(policy, what):
        seeds = random_starts(args, "validation", args.eval_episodes)
        success = flow.evaluate(policy, world, seeds, args.num_steps)
        return run.report(f"validation, {what}", success)

    if args.iterations and not args.resume:
        validate(sft, "SFT")
    for i in range(state["iteration"], args.iterations):
        print(f"iteration {i + 1}/{args.iterations}", flush=True)
        run.random_stream(args.seed, i)
        began = time.time()
        # act: the old policy, with noise in every denoising step
        seeds = random_starts(args, "train", args.episodes, args.seed, i, args.group_size)
        success, batch = world.play(nft.explore(old, args.num_steps, args.noise_level), seeds)
        played = time.time()
        # label: every chunk of an episode by its success
        batch["y"] = nft.labels(success, batch["episode"], args.group_size)
        batch["won"] = torch.as_tensor(success)[batch["episode"]]
        # update, with smaller steps late
        optimizer.param_groups[0]["lr"] = args.lr * (1 - i / args.iterations)
        info = update(policy, optimizer, batch, args)
        # follow: the old policy moves towards the trained one
        alpha = nft.ema_decay(i, args.iterations, *args.ema)
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
    world.close()

    policies = {"SFT": sft}
    if args.iterations:
        policies[name] = policy
        learning_figure(args.out / "log.csv", args.out / "learning.png")
    rates = zip(("sft", key), test_all(policies, args).values())
    print(told, *(f"{which}={rate:.3f}" for which, rate in rates),
          f"episodes={state['iteration'] * args.episodes} env_steps={state['env_steps']} "
          f"seconds={time.time() - start:.0f}")


if __name__ == "__main__":
    flags.call(main)
