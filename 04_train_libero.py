"""04 - From the toy to a robot: pi-StepNFT on LIBERO, from a few demonstrations.

The method of 03 on the benchmark of the paper: pick and place with a Panda arm. A scripted
controller (or LIBERO's recorded files) gives a few demonstrations, flow matching clones them (SFT),
and reinforcement learning lifts the clone:

    explore (03, the sampler of 02) -> label by success -> update (one-step ranking) -> EMA

New since 03: a policy that sees images and reads a sentence, demonstrations, tests in and out of
distribution; a run that can stop and go on, and several GPUs (tools/). The simulators live in
envs/. All that comes before LIBERO, near the end, serves 05 too.

Defaults that differ from the paper's, because two CPU cores are not a GPU cluster: a chunk is one
action, held for 4 control steps, so that an episode's success hangs on a quarter of the random
numbers; all K denoising steps of a chunk are trained on; labels are centred on the 8 episodes from
one start; training grants half of the test's control steps, 160 or more (with recorded demos all of
them); noise 0.5, because most of it is contracted away before it reaches the arm (notebook
exploration_width); slope 0.1 of the ranking, which holds the policy back less; the old policy
follows quickly. Each is a flag. Always: the learning rate falls to 0, and action dims that hardly
move in the demos earn no credit. --policy brings the paper's kind of network, a pi0
(policies/pi0.py), in the place of the small one below.

Run:     python 04_train_libero.py --num-demos 1 --seed 2     (task 0, 16 minutes on two cores)
         python 04_train_libero.py --eval-only runs/04_train_libero/last.pt --video 4
         torchrun --nproc-per-node=8 04_train_libero.py --obs rgb --tasks all --episodes 512
Prints:  success of SFT and of every evaluation with its 95 % interval, then RESULT.
Saves:   runs/04_train_libero/{sft.pt, last.pt, log.csv, test.csv, learning.png, videos/}
"""

import copy
import importlib
import itertools
import os
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from envs import libero, libero_demos
from policies import pi0
# Several GPUs: each rank plays its share, and gradients are averaged.
from tools.ranks import average_gradients, equal_rows, gather, join_ranks, rank_of, share
# A run that can stop and go on: its checkpoints, and the flags that come back from them.
from tools.resume import check_clone, checkpoint, load_run, parse_run, save

flow = importlib.import_module("01_flow_policy")
nft = importlib.import_module("03_step_loss")

# ------------------------------------------------------------------------------------------------
# The policy: FlowPolicy of 01 with eyes and a sentence. Only `encode` is new.


class RobotPolicy(flow.FlowPolicy):
    """FlowPolicy that may also see images, rgb (B, cameras, 3, h, w) uint8, and read a sentence,
    tokens (B, L) uint8, its bytes.

    The last 3 * `slots` numbers of the state are positions (m) of things that the sentence may
    name: it decides which are looked at (05's PutOnPad). small_images: 16 x 16 pixels, the same
    picture in many rows (05's PixelGap).
    """

    def __init__(self, horizon, action_dim, state_dim, cameras=0, language=False, slots=0,
                 width=512, depth=3, small_images=False):
        config = dict(horizon=horizon, action_dim=action_dim, state_dim=state_dim, cameras=cameras,
                      language=language, slots=slots, width=width, depth=depth,
                      small_images=small_images)
        # two numbers for each of 64 feature maps, 64 a sentence, three a head of attention
        context = state_dim - 3 * slots + 128 * cameras + 64 * language + 12 * (slots > 0)
        super().__init__(horizon, action_dim, context, width, depth)
        self.config, self.context_dim = config, context  # config rebuilds it from a checkpoint
        self.cameras, self.language, self.slots = cameras, language, slots
        self.small_images = small_images
        self.state_centre, self.state_scale = torch.zeros(state_dim), torch.ones(state_dim)
        if small_images:
            self.image_encoder = nn.Sequential(nn.Conv2d(3, 32, 5), nn.SiLU(),
                                               nn.Conv2d(32, 64, 3))
        elif cameras:  # one net, shared by the cameras
            self.image_encoder = nn.Sequential(
                nn.Conv2d(3, 32, 7, stride=2), nn.SiLU(), nn.Conv2d(32, 32, 3, stride=2),
                nn.SiLU(), nn.Conv2d(32, 32, 3), nn.SiLU(), nn.Conv2d(32, 64, 3))
        if language:  # a convolution that sees five bytes at a time, then the maximum
            self.byte_embedding = nn.Embedding(256, 32)
            self.sentence_encoder = nn.Conv1d(32, 64, 5, padding=2)
        if slots:  # four heads of attention, each a softmax over the slots
            self.attention = nn.Linear(64, 4 * slots)

    def encode(self, obs):
        """obs -> ctx (B, C), everything about the observation that the velocity needs."""
        state = super().encode(obs)                                          # (B, S)
        parts = [state[:, :state.shape[1] - 3 * self.slots]]
        if self.cameras:
            images, which = obs["rgb"].flatten(0, 1), slice(None)            # (B*cameras, 3, h, w)
            if self.small_images:  # an episode's picture does not change: each is encoded once
                images, which = images.unique(dim=0, return_inverse=True)
            images = images.float() / 255 - 0.5
            # half precision for the images; the head keeps 32 bits, RL compares close velocities
            with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
                maps = self.image_encoder(images)                            # (B*cameras, 64, ..)
            parts.append(spatial_softmax(maps.float())[which].view(-1, 128 * self.cameras))
        if self.language:
            sentences, which = obs["tokens"].unique(dim=0, return_inverse=True)  # each read once
            letters = self.byte_embedding(sentences.long()).transpose(1, 2)
            text = self.sentence_encoder(letters).amax(-1)[which]                # (B, 64)
            parts.append(text)
        if self.slots:
            weights = self.attention(text).view(-1, 4, self.slots).softmax(-1)
            places = obs["state"][:, -3 * self.slots:].view(-1, self.slots, 3)
            parts.append(10 * (weights @ places).flatten(1))      # (B, 12), decimetres: order 1
        return torch.cat(parts, dim=-1)


def spatial_softmax(maps):
    """Feature maps (N, C, h, w) -> the point each looks at, x and y in [-1, 1]: (N, 2 C). A map
    becomes a probability over pixels, and its mean position the feature (Levine et al. 2016)."""
    height, width = maps.shape[2:]
    chance = maps.flatten(2).softmax(-1).view_as(maps)
    x, y = (torch.linspace(-1, 1, size, device=maps.device) for size in (width, height))
    return torch.cat([chance.sum(2) @ x, chance.sum(3) @ y], dim=-1)


# ------------------------------------------------------------------------------------------------
# Demonstrations and SFT


def follow(obs):
    """The scripted expert's action, which the observation holds, as a chunk of one."""
    return obs["action"][:, None], {}


def scripted_demos(world, candidates, num_demos):
    """The expert's first num_demos successes in each task -> [(rows, actions (T, A)), ...].

    candidates: for each task, the seeds to try in this order.
    """
    demos, missing = [], {task: num_demos for task in range(len(candidates))}
    candidates = [iter(seeds) for seeds in candidates]
    while missing:
        tries = [(task, seed) for task, n in missing.items()
                 for seed in itertools.islice(candidates[task], n)]
        if not tries:
            raise SystemExit(f"--num-demos {num_demos}: the expert failed too often; use less "
                             "--demo-noise or more --max-steps")
        success, rows = world.play(follow, [seed for _, seed in tries])
        episode, _ = rows.pop("episode"), rows.pop("mask")  # what is left was observed
        for e in np.flatnonzero(success):
            demo = flow.take(rows, episode == e)
            demos.append((demo, demo.pop("action")))
            missing[tries[e][0]] -= 1
        missing = {task: n for task, n in missing.items() if n}
    world.close()
    return demos


def clone(args, make_policy, collect_demos):
    """The SFT policy: this run's (--resume), another run's (--sft), or trained on demos."""
    if args.resume or args.sft:
        path = args.sft or args.resume.parent / "sft.pt"
        policy = load_policy(path, args.device, getattr(args, "micro_batch", 32))  # 05 has no pi0
    else:
        demos, H, R = collect_demos(args), args.horizon, args.action_repeat
        # an action that is held for R steps does what the demo did in them, on average
        chunks = torch.cat([flow.sliding_chunks(actions, H * R).unflatten(1, (H, R)).mean(2)
                            for _, actions in demos])
        print(f"{len(demos)} demos, {len(chunks)} chunks of {H} actions", flush=True)
        obs = {name: torch.cat([rows[name] for rows, _ in demos]) for name in demos[0][0]}
        torch.manual_seed(args.seed)
        policy = make_policy(args).to(args.device)
        average_gradients(policy)
        torch.manual_seed(args.seed + rank_of()[0])  # each rank draws minibatches of its own
        loss = flow.train_sft(policy, obs, chunks, args.sft_steps, args.sft_lr, args.sft_batch)
        policy.zero_grad()  # frees the gradients
        print(f"SFT: flow matching loss {loss:.3f}")
    save(args.out / "sft.pt", policy, args)
    return policy


# ------------------------------------------------------------------------------------------------
# A run: train, its checkpoints and its log. 05 uses all of it.


def credited(policy, v_theta, v_old):
    """v_theta in the action dims whose range in the demos, from the 1 % to the 99 % quantile, is
    over a tenth of [-1, 1]; v_old in the others: they hardly move, so their noise changes nothing
    and earns nothing. Half of that range is FlowPolicy's action_scale; PI0Policy's is a standard
    deviation, so it brings half_range."""
    scale = getattr(policy, "action_scale", torch.ones(1, device=v_old.device))
    return torch.where(getattr(policy, "half_range", scale) > 0.1, v_theta, v_old)


class StepNFT:
    """The method as `train` uses it: how to explore, and what to learn from the episodes."""
    name, key = "pi-StepNFT", "stepnft"  # in tables and in the line RESULT
    beside = ()  # modules that learn beside the policy and are saved with it: a critic, say

    def __init__(self, args):
        self.args = args

    def explore(self, old):
        return nft.explore(old, self.args.num_steps, self.args.noise_level)

    def learn(self, policy, optimizer, batch, success):
        """Labels and minibatch steps -> info."""
        args, rows = self.args, len(batch["x"])
        batch["y"] = nft.labels(success, batch["episode"], args.group_size)
        batch["k"] = torch.arange(args.num_steps).expand(rows, -1)
        if args.transitions == "one":
            batch["k"] = torch.randint(args.num_steps, (rows, 1))

        def loss(v_theta, v_old, **steps):
            return nft.step_nft_loss(credited(policy, v_theta, v_old), v_old, **steps)

        return nft.update(policy, optimizer, equal_rows(batch), epochs=args.epochs, loss=loss,
                          minibatch=args.minibatch, target=args.target, beta=args.beta,
                          max_drift=args.max_drift, dpo_beta=args.dpo_beta)

    def decay(self, iteration):  # alpha: how much of the acting policy stays
        return nft.ema_decay(iteration, self.args.iterations, *self.args.ema)


def train(args, sft, world, method, start_seeds, validate):
    """Reinforcement learning from a clone -> (trained policy, control steps that were played).

    start_seeds(iteration) -> seeds of its episodes; validate(policy, name) -> success rate.
    """
    policy, old = copy.deepcopy(sft), copy.deepcopy(sft)  # policy learns, old acts
    optimizer = torch.optim.Adam(policy.parameters(), lr=args.lr)
    for module in method.beside:
        optimizer.add_param_group({"params": module.parameters(), "lr": module.lr})
    parts = {"policy": policy, "old": old, "optimizer": optimizer,
             **{f"beside{i}": module for i, module in enumerate(method.beside)}}
    for module in (policy, *method.beside):
        average_gradients(module)
    state = {"iteration": 0, "env_steps": 0}
    if args.resume:
        state = load_run(args, parts)
    elif args.iterations:
        (args.out / "log.csv").unlink(missing_ok=True)  # of a run that never had a checkpoint
        validate(sft, "SFT")

    while state["iteration"] < args.iterations:
        start, i = time.time(), state["iteration"]
        # a random stream of its own for each iteration and rank: a resumed run repeats it
        torch.manual_seed(int(flow.episode_seeds("train", 1, args.seed, i)[0]) + rank_of()[0])
        print(f"iteration {i + 1}/{args.iterations}", flush=True)
        success, batch = world.play(method.explore(old), share(start_seeds(i)))
        played, won = time.time(), gather(success).mean()
        if not won:
            print("no episode succeeded, so there is nothing to repeat: more --num-demos may help")
        optimizer.param_groups[0]["lr"] = args.lr * (1 - i / args.iterations)  # smaller steps late
        info = method.learn(policy, optimizer, batch, success)
        alpha = method.decay(i)
        nft.ema_update(old, policy, alpha)
        updated = time.time()
        actions = gather(batch["mask"].sum()[None]).sum()
        state["env_steps"] += int(actions) * args.action_repeat  # a success may cut the last short
        state["iteration"], rate = i + 1, ""
        if (i + 1) % args.eval_every == 0 or i + 1 == args.iterations:
            rate = validate(policy, f"iteration {i + 1}")
        nft.log_row(args.out / "log.csv", {  # under torchrun `info`, loss and so on, is of rank 0
            "iteration": i + 1, "episodes": (i + 1) * args.episodes,
            "env_steps": state["env_steps"], "train_sde": won,
            "eval_ode": rate, **info, "alpha": alpha, "rollout_seconds": played - start,
            "update_seconds": updated - played})
        save(args.out / "last.pt", policy, args, state=state,
             **{name: part.state_dict() for name, part in parts.items() if name != "policy"})
    if args.iterations:
        fig, axes = flow.pyplot().subplots(1, 2, figsize=(10, 4), layout="constrained")
        nft.draw_learning(nft.read_log(args.out / "log.csv"), *axes)
        fig.savefig(args.out / "learning.png", dpi=120)
    return policy, state["env_steps"]


def build_policy(config, micro_batch=32):
    """The policy that a config, as checkpoints keep it, describes; pi0's names a folder."""
    if "folder" in config:
        return pi0.PI0Policy(**config, micro_batch=micro_batch)
    return RobotPolicy(**config)


def load_policy(path, device="cpu", micro_batch=32):
    """-> the policy of any checkpoint of `save`; pi0's needs the folder it was made from, too."""
    content = torch.load(path, map_location=device, weights_only=True)
    policy = build_policy(content["config"], micro_batch).to(device)
    policy.load_state_dict(content["policy"])
    return policy


def evaluate(policy, world, seeds, num_steps):
    """`evaluate` of 01, each rank on its share of the episodes."""
    return gather(flow.evaluate(policy, world, share(seeds), num_steps))


def rated(success):
    """Successes -> the columns of a table: their rate with its 95 % Wilson interval."""
    import scipy.stats  # not at the top: every worker process would load it
    test = scipy.stats.binomtest(int(np.sum(success)), len(success))
    low, high = test.proportion_ci(0.95, method="wilson")
    return {"episodes": len(success), "success": float(np.mean(success)), "low": low, "high": high}


def report(name, success):
    """Prints a success rate with its interval -> the rate."""
    row = rated(success)
    print("{}: success {success:.3f} [{low:.3f}, {high:.3f}] over {episodes} episodes".format(
        name, **row), flush=True)
    return row["success"]


# ------------------------------------------------------------------------------------------------
# The flags of a run. With --resume or --eval-only `parse_run` takes them from the checkpoint.


def add_run_flags(parser, envs_per_core, **defaults):
    """Demos, training, evaluation and logs of 04 and 05."""
    add, positive_int, natural = parser.add_argument, flow.positive_int, flow.natural
    # torchrun's ranks on one machine share its cores
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = own // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    add("--num-demos", type=positive_int, default=20, help="demonstrations per task for SFT")
    add("--demo-noise", type=flow.number(float, 0), default=0.1, help="noise on demo actions: in "
        "04 pushes of the hand in one direction, for 5 to 10 steps; in 05 fresh in every step")
    add("--sft-steps", type=positive_int, default=1000, help="optimisation steps of flow matching")
    add("--sft-lr", type=flow.positive_float, default=1e-3, help="AdamW's, falling to 0")
    add("--sft-batch", type=positive_int, default=256, help="rows of each of these steps, on "
        "each rank")
    add("--sft", type=checkpoint, metavar="FILE", help="start from another run's sft.pt")
    add("--iterations", type=natural, default=20, help="RL iterations; 0: SFT only. --resume "
        "may change it: --lr and --ema then run over the new number")
    add("--episodes", type=positive_int, default=256, help="episodes per iteration, all tasks")
    add("--max-steps", type=positive_int, help="time limit of an episode, in control "
        "steps; without it 05 takes the task's, 04 half of the suite's test limit, 160 or more, "
        "and with recorded demos all of it")
    add("--horizon", type=positive_int, default=4, help="H, actions per chunk")
    add("--transitions", default="all", choices=["all", "one"],
        help="train on all K denoising steps of a chunk, or on one at random (the paper)")
    add("--lr", type=flow.positive_float, default=3e-4, help="Adam's, falling linearly to 0")
    add("--epochs", type=positive_int, default=3, help="passes over each batch")
    add("--minibatch", type=positive_int, default=512, help="chunks per step, on each rank")
    add("--eval-every", type=positive_int, default=5, help="iterations between validations")
    add("--eval-episodes", type=positive_int, default=200, help="episodes per validation")
    add("--test-episodes", type=positive_int, default=200, help="episodes of the final test")
    add("--num-envs", type=positive_int, default=envs_per_core * max(cores, 1),
        help="simulators at a time, for each rank of torchrun")
    devices = ["cuda"] * torch.cuda.is_available() + ["cpu"]
    add("--device", choices=devices, default=devices[0], help="of the policy")
    add("--seed", type=natural, default=0, help="seed of demos, SFT, rollouts and updates")
    add("--out", type=Path, default="runs", help="folder of logs and checkpoints")
    add("--video", type=natural, default=0, metavar="N", help="film N test episodes as mp4")
    add("--resume", action="store_true", help="continue the run in --out, with its flags")
    add("--eval-only", type=checkpoint, metavar="FILE", help="test this policy and stop")
    nft.add_method_flags(parser)
    parser.set_defaults(**defaults)


# ------------------------------------------------------------------------------------------------
# LIBERO. A seed of envs/libero.py is a task and a start: an official one or a random placement.


def make_world(args, suite=None, demo_noise=None, test=False, film=None):
    """The simulators. With demo_noise they also observe the expert's action. test: with the test's
    time limit; film: a folder."""
    suite = suite or args.suite
    limit = (args.test_max_steps or libero.time_limit(suite)) if test else args.max_steps
    return libero.make_workers(
        suite, args.tasks, min(args.num_envs, args.video) if film else args.num_envs,
        obs=args.obs, state_dim=args.state_dim, horizon=args.horizon,
        action_repeat=args.action_repeat, demo_noise=demo_noise, image_size=args.image_size,
        max_steps=limit, gl=args.gl, film=film)


def policy_config(args):
    """All that makes this run's policy, as its checkpoints keep it."""
    config = dict(horizon=args.horizon, action_dim=libero.ACTION_DIM, state_dim=args.state_dim)
    if args.policy:
        return dict(config, folder=args.policy, train=args.train)
    return dict(config, cameras=2 * (args.obs == "rgb"), language=len(args.tasks) > 1, slots=0,
                width=512, depth=3, small_images=False)


def make_policy(args):
    return build_policy(policy_config(args), args.micro_batch)


def collect_demos(args):
    """--demos scripted, or a PATH to LIBERO's files -> [(rows, actions (T, 7)), ...]."""
    if args.demos != "scripted":
        return libero_demos.recorded_demos(args.suite, args.tasks, args.demos, args.num_demos,
                                           args.skip_no_ops, args.obs, args.image_size)
    starts = flow.episode_seeds("demo", 10 * args.num_demos, args.seed)
    return scripted_demos(make_world(args, demo_noise=args.demo_noise),
                          [libero.random_start(task, starts) for task in args.tasks],
                          args.num_demos)


def random_starts(args, split, count, seed=0, iteration=0, group_size=1):
    """Seeds of `count` episodes, the tasks taking turns; group_size neighbours share one start."""
    starts = flow.episode_seeds(split, count // group_size, seed, iteration)
    # an iteration begins with the task after the last one's
    tasks = np.resize(np.roll(args.tasks, -iteration * len(starts)), len(starts))
    return np.repeat(libero.random_start(tasks, starts), group_size)


def test_all(policies, args):
    """Official and random starts in the suite of the training, official ones in --eval-suites, then
    films of the last policy; test.csv has a row for each task -> {policy: success}, official."""
    official = [libero.TASK * task + i for i in range(args.test_states) for task in args.tasks]
    placements, rates = random_starts(args, "test", args.test_episodes), {}
    if not args.eval_only:  # its rows are added, under the path of the policy
        (args.out / "test.csv").unlink(missing_ok=True)
    for suite in dict.fromkeys([args.suite, *args.eval_suites]):
        world = make_world(args, suite, test=True)
        kinds = {libero.OFFICIAL_STARTS: official}
        if suite == args.suite:
            kinds["random placements"] = placements
        for starts, seeds in kinds.items():
            for name, policy in policies.items():
                success = evaluate(policy, world, seeds, args.num_steps)
                rate = report(f"test, {name}, {suite}, {starts}", success)
                rates.setdefault(name, rate)  # the first: official starts, suite of the training
                for task in args.tasks:
                    own = success[np.asarray(seeds) // libero.TASK == task]
                    if len(own):
                        nft.log_row(args.out / "test.csv", {
                            "policy": name, "suite": suite, "task": task, "starts": starts,
                            **rated(own)})
        world.close()  # two sets of simulators may be more than the memory
    if args.video and not rank_of()[0]:
        filmed = make_world(args, test=True, film=args.out / "videos")
        *_, last = policies.values()
        flow.evaluate(last, filmed, placements[:args.video], args.num_steps)
        filmed.close()
        print(f"saved {len(placements[:args.video])} episodes in {args.out}/videos")
    return rates


def task(text):
    return text if text == "all" else flow.natural(text)


def parse_args(argv=None, doc=__doc__):
    """All flags, checked; fills in what depends on the suite."""
    parser = flow.Parser(doc)
    add, suites = parser.add_argument, ", ".join(libero.TIME_LIMITS)
    add("--suite", default="libero_object", help=f"LIBERO suite: {suites}")
    add("--tasks", type=task, nargs="+", default=[0], help="task numbers in the suite, or all")
    add("--obs", default="state", choices=["state", "rgb"],
        help="poses of the objects, or two cameras (needs EGL or OSMesa); and the hand's pose")
    add("--image-size", type=flow.number(int, 48, 1024), default=128, help="height and width of "
        "the images; with --demos PATH that of the files, 128")
    add("--demos", default="scripted", metavar="PATH",
        help="scripted, or a folder (or file) of LIBERO's official HDF5 demonstrations")
    add("--action-repeat", type=flow.positive_int, default=4, metavar="R",
        help="control steps (1/20 s) for which each action of a chunk is held")
    add("--policy", metavar="PI0", help="a pi0 of Hugging Face's transformers, folder or name on "
        "the hub, in place of the small network from scratch; with --obs rgb")
    add("--train", default="expert", choices=["expert", "all"],
        help="what of pi0 learns; the rest is frozen, in bfloat16")
    add("--micro-batch", type=flow.positive_int, default=32, help="rows in pi0 at a time: lower it "
        "until it fits the GPU; the result is the same")
    add("--skip-no-ops", action="store_true", help="leave out recorded steps that do nothing")
    add("--eval-suites", nargs="*", default=[], metavar="SUITE", help="further suites for the "
        "final test; _swap _object _lan _task are LIBERO-PRO's variants of --suite")
    add("--test-states", type=flow.number(int, 1, libero.NUM_OFFICIAL),
        default=libero.NUM_OFFICIAL,
        help="official initial states of each task in the final test")
    add("--test-max-steps", type=flow.positive_int,
        help="time limit of the final test, in control steps; without it each suite's usual one")
    add_run_flags(parser, envs_per_core=4, num_demos=3, demo_noise=0.5, sft_steps=2000,
                  iterations=10, horizon=1, lr=3e-5, eval_every=5, eval_episodes=100,
                  test_episodes=100, out="runs/04_train_libero", group_size=8, noise_level=0.5,
                  dpo_beta=0.1, ema=[0.1, 0.5])
    args = parse_run(parser, argv)

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
    if not args.policy and args.train != parser.get_default("train"):
        parser.error("--train all: that is about pi0; give --policy")
    if args.policy and args.obs != "rgb":
        parser.error("--policy: a vision-language model sees, give --obs rgb")
    check_clone(parser, args, policy_config(args))
    args.gl = libero.find_gl() if args.obs == "rgb" or args.video else None
    parser.make_folder("--out", args.out)
    return args


def main(method=StepNFT, doc=__doc__):
    args, start = parse_args(doc=doc), time.time()
    join_ranks(args)
    if args.obs == "state":
        torch.set_num_threads(1)  # a small net: the cores are for the simulators
    print(*(f"{k}={v}" for k, v in vars(args).items() if k != "flags"), flush=True)
    told = f"RESULT suite={args.suite} task={','.join(map(str, args.tasks))}"
    if args.eval_only:
        policy = load_policy(args.eval_only, args.device, args.micro_batch)
        rate, = test_all({str(args.eval_only): policy}, args).values()
        return print(f"{told} success={rate:.3f} seconds={time.time() - start:.0f}")
    if args.policy:
        pi0.tell_memory(args.policy, args.train, rows=max(args.minibatch, args.sft_batch))
    sft = clone(args, make_policy, collect_demos)
    world = make_world(args)

    def start_seeds(iteration):
        return random_starts(args, "train", args.episodes, args.seed, iteration,
                             group_size=args.group_size)

    def validate(policy, name):
        seeds = random_starts(args, "validation", args.eval_episodes)
        return report(f"validation, {name}", evaluate(policy, world, seeds, args.num_steps))

    policy, env_steps = train(args, sft, world, method(args), start_seeds, validate)
    world.close()
    policies = {"SFT": sft, method.name: policy} if args.iterations else {"SFT": sft}
    rates = zip(("sft", method.key), test_all(policies, args).values())
    print(told, *(f"{name}={rate:.3f}" for name, rate in rates),
          f"episodes={args.iterations * args.episodes} env_steps={env_steps} "
          f"seconds={time.time() - start:.0f}")


if __name__ == "__main__":
    main()
